"""The evaluation command as a user types it: the documented commands, what they print, what they refuse."""

import gzip
import json
import re
import shutil
import subprocess
import sys

import pytest
from evaluation_project import MERGED, PRUNED, evaluate, write_project
from tiny import save_tokenizer

from mistral_prune_lora.provenance import package_line

A, B, C = (f"./{MERGED}/{part}_merged" for part in "ABC")
MIRROR = ["--mirror", "./wikitext"]
SMALL = ["--text_file", "./eval_corpus.txt", "--seqlen", "64", "--nsamples", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    (folder / "short.txt").write_text("tokens")
    (folder / "empty.txt").write_text(" \n\n")
    (folder / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder / "unclear").mkdir()
    for index, part in ((3, "B"), (5, "C")):
        shutil.copy(folder / f"{MERGED}/{part}_merged/layer_00{index}.safetensors", folder / "unclear")
    save_tokenizer(folder / "large")
    (folder / "large/tokenizer.json").write_text(with_id(300, "L", (folder / "large/tokenizer.json").read_text()))
    return folder


def with_id(index: int, token: str, tokenizer_json: str) -> str:
    """A tokenizer with another id for one token."""
    content = json.loads(tokenizer_json)
    content["model"]["vocab"][token] = index
    return json.dumps(content)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/mistral_prune_lora/evaluation"


def labels(out: str) -> list[str]:
    """The labels of the summary table, whose numbers must be well formed."""
    table = out.split("\nSummary\n")[1].split("=" * 70)[1]
    head, rule, *rows = table.strip("\n").split("\n")
    assert head.split() == ["Label", "PPL", "Mean", "NLL", "Tokens"] and set(rule) == {"─", " "}
    assert all(re.fullmatch(r"\S+ +\d+\.\d{4} +\d+\.\d{6} +\d+", row) and len(row) == len(rule) for row in rows)
    return [row.split()[0] for row in rows]


def run(folder, *arguments: str) -> str:
    done = evaluate(folder, *arguments)
    assert done.code == 0, done.err
    return done.out


def test_one_merged_model_is_evaluated_at_a(folder, cache):
    out = run(folder, "--model_path", A, *MIRROR)
    assert labels(out) == ["A_merged[A]"]
    assert "Stages:      ['A']\nDataset:     wikitext2 (split=test)\nSeq length:  2048\n" in out
    assert not cache.exists() or not any(cache.iterdir())


@pytest.mark.parametrize(
    "named",
    [
        [A, B, C],
        [C, B, A],
        [A, "--b_bundle", B, "--c_bundle", C, "--stages", "A,AB,FULL"],
    ],
)
def test_three_stages_print_what_is_documented(folder, named):
    out = run(folder, "--model_path", *named, *MIRROR)
    numbers = re.findall(r"PPL      = ([\d.]+) +│\n  │ Mean NLL = ([\d.]+) +│\n  │ Tokens   = (\d+) ", out)
    rows = "\n".join(
        f"{label:<41} {ppl:>12} {nll:>12} {tokens:>10}"
        for label, (ppl, nll, tokens) in zip(["A_merged[A]", "A_merged[AB]", "A_merged[ABC]"], numbers, strict=True)
    )
    wide, narrow = "=" * 70, "─" * 60
    space = re.search(r"  Boundary activations: [\d.]+ MB at most, in .*\n", out)[0]
    expected = f"""\
{wide}
Merged Model PPL Evaluation
{wide}
Models:      ['./merged_models_mistral_7b/A_merged']
B bundle:    merged_models_mistral_7b/B_merged
C bundle:    merged_models_mistral_7b/C_merged
Stages:      ['A', 'AB', 'FULL']
Dataset:     wikitext2 (split=test)
Seq length:  2048
Device:      cpu (bf16)
{wide}

{narrow}
[1/1] ./merged_models_mistral_7b/A_merged
{narrow}

  ✓ PassLayer installed: [3, 4, 5, 6] (4 layers)
  ✓ mistral | 8 layers (4 active + 4 PassLayer) | 0.2M params | cpu
  ✓ 2 of 2 windows
{space}
  [A] Evaluating PPL...
{framed("A_merged[A]", numbers[0])}
  [AB] Restoring bundle layers...
  ✓ Stage AB: 6 active layers

  [AB] Evaluating PPL...
{framed("A_merged[AB]", numbers[1])}
  [FULL] Restoring bundle layers...
  ✓ Stage FULL: 8 active layers

  [FULL] Evaluating PPL...
{framed("A_merged[ABC]", numbers[2])}
{wide}
Summary
{wide}
{"Label":<41} {"PPL":>12} {"Mean NLL":>12} {"Tokens":>10}
{"─" * 41} {"─" * 12} {"─" * 12} {"─" * 10}
{rows}
{wide}
"""
    assert out.startswith(expected)


def framed(label: str, numbers: tuple[str, str, str]) -> str:
    lines = [label, None, *map("{} = {}".format, ("PPL     ", "Mean NLL", "Tokens  "), numbers)]
    rows = "".join(f"  ├{'─' * 41}┤\n" if line is None else f"  │ {line:<40}│\n" for line in lines)
    return f"  ┌{'─' * 41}┐\n{rows}  └{'─' * 41}┘\n"


def test_the_dense_model_beside_a(folder):
    out = run(folder, "--model_path", "./dense", A, "--tokenizer_path", "./dense", *MIRROR)
    assert labels(out) == ["dense[dense]", "A_merged[A]"]
    assert "  ✓ mistral | 8 layers (8 active + 0 PassLayer) | 0.4M params | cpu\n" in out
    assert "[1/2] ./dense\n" in out and f"[2/2] {A}\n" in out
    assert "KL(dense||.)" in out and "agreement" in out


def test_bundles_dir_of_a_pruning(folder):
    out = run(folder, "--model_path", A, "--bundles_dir", f"./{PRUNED}/bundles", "--stages", "A,AB,FULL", *MIRROR)
    assert labels(out) == ["A_merged[A]", "A_merged[AB]", "A_merged[ABC]"]
    assert f"B bundle:    {PRUNED}/bundles/B\n" in out


def test_a_text_file(folder):
    out = run(folder, "--model_path", A, "--text_file", "./eval_corpus.txt")
    assert labels(out) == ["A_merged[A]"] and "Dataset:     ./eval_corpus.txt\n" in out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--seqlen", "64", "--nsamples", "4"], "4 of {all} windows (--nsamples)"),
        (["--seqlen", "64", "--nsamples", "4", "--seed", "3"], "4 of {all} windows (--nsamples, drawn with --seed 3)"),
        (["--seqlen", "64", "--max_batches", "2", "--batch_size", "3"], "6 of {all} windows (--max_batches)"),
        (["--seqlen", "16"], "256 of {all} windows (the default of --nsamples: give --nsamples for more)"),
        (["--seqlen", "16", "--nsamples", "256"], "256 of {all} windows (--nsamples)"),
        (["--seqlen", "64", "--nsamples", "5000"], "{all} of {all} windows"),
    ],
)
def test_how_many_windows_are_measured_is_said(folder, flags, told):
    out = run(folder, "--model_path", A, "--text_file", "./eval_corpus.txt", *flags)
    tokens = 1 + len((folder / "eval_corpus.txt").read_bytes())  # one a byte, and the beginning of text
    assert f"params | cpu\n  ✓ {told.format(all=tokens // int(flags[1]))}\n" in out


def test_the_protocol_of_a_dataset_is_named_where_it_keeps_windows_out(folder, tmp_path):
    rows = "".join(json.dumps({"text": f"Document {i} is about {i * i}."}) + "\n" for i in range(300))
    mirror = tmp_path / "c4-validation.00000-of-00008.json.gz"
    mirror.write_bytes(gzip.compress(rows.encode()))
    told = re.compile(r"  ✓ 256 of (\d+) windows \(all that the protocol of c4 looks at\)\n")
    for more in ([], ["--nsamples", "5000"]):
        out = run(folder, "--model_path", A, "--dataset", "c4", "--mirror", str(mirror), "--seqlen", "16", *more)
        assert int(told.search(out)[1]) > 256


def test_the_module_is_a_command(folder):
    command = [sys.executable, "-m", "mistral_prune_lora.mistral_eval_ppl_mergedmodel", "--model_path", A, *SMALL]
    done = subprocess.run([*command, "--device", "cpu"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert labels(done.stdout) == ["A_merged[A]"]
    assert "stage A" in done.stderr and "tok/s" in done.stderr, "a bar with a rate on stderr"
    refused = evaluate(folder, "--model_path", A, *SMALL, "--device", "cuda:7")
    who, error = refused.err.splitlines()
    assert refused.code == 1 and who == package_line() and error.startswith("error: cuda:7 is not there")


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ("FULL", ["A_merged[ABC]"]),
        ("ab, a", ["A_merged[A]", "A_merged[AB]"]),
    ],
)
def test_stages_are_what_is_asked_for(folder, stages, expected):
    out = run(folder, "--model_path", A, B, C, "--stages", stages, *SMALL)
    assert labels(out) == expected
    assert "(4 active + 4 PassLayer)" in out, "the model is loaded as A"
    assert ("[FULL] Restoring bundle layers...\n  ✓ Stage FULL: 8 active layers\n" in out) == (stages == "FULL")


def test_a_b_bundle_alone_gives_a_and_ab(folder):
    assert labels(run(folder, "--model_path", A, B, *SMALL)) == ["A_merged[A]", "A_merged[AB]"]


def test_models_of_one_name_are_told_apart(folder):
    out = run(folder, "--model_path", A, f"./{PRUNED}/../../{MERGED}/A_merged", *SMALL)
    assert labels(out) == [f"{A}[A]", f"./{PRUNED}/../../{MERGED}/A_merged[A]"]


def test_names_do_nothing_to_a_terminal(folder):
    name = "A\x1b[31m\nred"
    (folder / name).symlink_to(folder / f"{MERGED}/A_merged")
    done = evaluate(folder, "--model_path", f"./{name}", *SMALL)
    assert done.code == 0, done.err
    assert "\x1b" not in done.out and "\nred" not in done.out and r"A\x1b[31m\nred[A]" in done.out


def test_an_adapter_never_makes_anything_be_imported(folder, monkeypatch):
    """PEFT's automatic classes import what `auto_mapping` names."""
    shutil.copytree(folder / "adapters/A_lora", folder / "evil_A_lora")
    (folder / "evil.py").write_text("open('ran.txt', 'w').close()\nclass Evil: pass\n")
    config = json.loads((folder / "evil_A_lora/adapter_config.json").read_text())
    mapping = {"base_model_class": "Evil", "parent_library": "evil"}
    (folder / "evil_A_lora/adapter_config.json").write_text(json.dumps({**config, "auto_mapping": mapping}))
    monkeypatch.syspath_prepend(folder)
    evaluate(folder, "--model_path", A, "--lora_paths", "evil_A_lora", *SMALL)
    assert not (folder / "ran.txt").exists() and "evil" not in sys.modules


def test_work_that_was_changed_ends_the_command_with_a_line_that_says_what_to_do(folder):
    command = ["--model_path", A, B, C, *SMALL, "--work_dir", "work"]
    first = run(folder, *command)
    for scores in (folder / "work").glob("*.scores"):
        scores.unlink()
    for file in (folder / "work").glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    while (done := evaluate(folder, *command)).code:
        (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
        named = re.fullmatch(
            r"error: window \d+ is not the one that was written \(in (.*)\)\. Delete it and run the same again\.", error
        )
        (folder / named[1]).unlink()
    assert labels(done.out) and done.out.split("Summary")[1] == first.split("Summary")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_path", A, "--text_file", "short.txt"], "has 6 tokens, less than one window of 2048"),
        (["--model_path", A, "--text_file", "empty.txt"], "the text is empty"),
        (["--model_path", A, "--text_file", "latin.txt"], "UTF-8"),
        (["--model_path", A, "--text_file", "nowhere.txt"], "nowhere.txt"),
        (["--model_path", A, "--split", "validation", *MIRROR], "validation"),
        (["--model_path", A, "unclear", *SMALL], "not clear whether this bundle of layers [3, 5] is B or C"),
        (["--model_path", A, B, "--b_bundle", B, *SMALL], "there are 2 bundles for B"),
        (["--model_path", A, "--b_bundle", C, *SMALL], "no weights of layer 3, which belongs to B"),
        (["--model_path", A, B, "--stages", "FULL", *SMALL], "no such bundle is given"),
        (["--model_path", B, C, *SMALL], "there are only bundles"),
        (["--model_path", A, "--stages", "A,B", *SMALL], "there is no stage B"),
        (["--model_path", "./nowhere", *SMALL], "there is no such directory"),
        (["--model_path", "wikitext", *SMALL], "neither a model"),
        (["--model_path", A, "--bundles_dir", "wikitext", *SMALL], "holds neither B nor C"),
        (["--model_path", A, "--c_bundle", "wikitext", *SMALL], "is not a bundle"),
        (["--model_path", A, "--csv", ".", *SMALL], "is a directory, not a file"),
        (["--model_path", A, "--device", "cuda:5", *SMALL], "cuda:5 is not there"),
        (["--model_path", A, "--device", "meta", *SMALL], "'meta' is not a device (in --device)"),
        (["--model_path", A, "--max_memory", "20MB", *SMALL], "do not fit into 20MB"),
        (["--model_path", A, "--work_dir", "eval_corpus.txt", *SMALL], "is a file, not a directory"),
        (["--model_path", A, "--work_dir", "eval_corpus.txt/work", *SMALL], "lies in an input"),
        (["--model_path", A, "--work_dir", "/proc/work", *SMALL], "(in /proc/work"),
        (["--model_path", A, "--work_dir", "w" * 300, *SMALL], "cannot be written: File name too long"),
        (["--model_path", A, "./no\nsuch\x1b[31m", *SMALL], r"there is no such directory (in "),
        (["--model_path", A, "--tokenizer_path", "large", *SMALL], "token id 300, and the model has 259 embeddings"),
    ],
)
def test_mistakes_are_one_line(folder, arguments, message):
    done = evaluate(folder, *arguments)
    assert done.code == 1
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], done.err
    assert "Traceback" not in done.err and "Summary" not in done.out
