"""The command that chooses layers: what it writes, what it replaces, what it refuses."""

import json

import pandas as pd
import pytest
from cut_model import save_dense
from tiny import save_tokenizer

from mistral_prune_lora.pruning.choose_layers import main


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choice")
    save_dense(folder / "dense", vocab_size=259)
    save_tokenizer(folder / "dense")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return folder


def words(folder, output, *more):
    return [
        "--model", str(folder / "dense"), "--text_file", str(folder / "text.txt"), "--nsamples", "4", "--seqlen", "24",
        "--device", "cpu", "--dtype", "fp32", "--output_dir", str(output), *more,
    ]  # fmt: skip


def test_what_is_chosen_is_written_and_replaced_by_the_next_choice(given, tmp_path, capsys):
    output = tmp_path / "choice"
    assert main(words(given, output, "--drop", "3", "--keep_last_layer", "--b_sizes", "1", "2")) == 0
    told, table = json.loads((output / "choice.json").read_text()), pd.read_csv(output / "choice.csv")
    best = table[table.chosen]
    assert best.kind.tolist() == ["block", "split 1+2"] and best.dropped[0] == " ".join(map(str, told["dropped"]))
    assert [best.B.iloc[1], best.C.iloc[1]] == [str(told["B"][0]), " ".join(map(str, told["C"]))]
    assert told["candidates"][0]["kl_dense"] == pytest.approx(table.kl_dense[0], rel=1e-12)
    assert set(told["model"]["files"]) == {"config.json", "model.safetensors"} and told["made"] is None
    printed = capsys.readouterr().out
    assert "block: 5 candidates" in printed and "by angular_distance: " in printed
    first = (output / "choice.csv").read_bytes()
    again = tmp_path / "again"
    assert main(words(given, again, "--drop", "3", "--keep_last_layer", "--b_sizes", "1", "2")) == 0
    assert (again / "choice.csv").read_bytes() == first
    assert (again / "choice.svg").read_bytes() == (output / "choice.svg").read_bytes()
    # The last layer may go, and B is the lower half, unmeasured.
    assert main(words(given, output, "--drop", "3", "--splits", "none")) == 0
    told = json.loads((output / "choice.json").read_text())
    assert len(told["candidates"]) == 6 and (told["B"], told["C"]) == (told["dropped"][:1], told["dropped"][1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "choice"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--drop", "8"), "8 of 8 layers cannot be dropped"),
        (("--drop", "3", "--b_sizes", "3"), "B cannot have 3 of 3 dropped layers"),
        (("--drop", "3", "--device", "cuda:7"), "--device cpu"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(given, tmp_path, capsys, more, told):
    assert main(words(given, tmp_path / "choice", *more)) == 1
    assert told in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_what_it_has_not_written_is_kept(given, tmp_path, capsys):
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "choice.csv").write_text("mine")
    assert main(words(given, foreign, "--drop", "3")) == 1
    assert "holds no record of a choice of layers (choice.json), but choice.csv" in capsys.readouterr().err
    assert main(words(given, given / "dense", "--drop", "3", "--overwrite")) == 1
    assert "is an input" in capsys.readouterr().err
