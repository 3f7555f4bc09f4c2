"""What the evaluation command writes: every number with what identifies it, and the numbers themselves."""

import csv
import hashlib
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from evaluation_project import LAYOUT, MERGED, PRUNED, WIKITEXT, evaluate, merge_with_peft, results, write_project
from peft import PeftModel
from transformers import AutoTokenizer, MistralForCausalLM

from mistral_prune_lora.pruning.identity import PassLayer

A, B, C = (f"./{MERGED}/{part}_merged" for part in "ABC")
CORPUS = ["--text_file", "./corpus.txt", "--seqlen", "64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    (folder / "corpus.txt").write_text("\n".join(f"Line {i} is about {i * i}." for i in range(100)), encoding="utf-8")
    (folder / "second.txt").write_text("Another file.\n" * 40, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def ids_of(folder, text: str, seqlen: int, limit: int | None = None) -> np.ndarray:
    """The windows of a text, cut by hand."""
    ids = AutoTokenizer.from_pretrained(folder / "dense")(text)["input_ids"]
    return np.array(ids[: len(ids) // seqlen * seqlen]).reshape(-1, seqlen)[:limit]


def sha256(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()


@torch.inference_mode()
def nll_of(model, ids: np.ndarray) -> np.ndarray:
    """Mean NLL of each window, in plain transformers."""
    tokens = torch.from_numpy(ids)
    logits = torch.cat([model(row[None]).logits[:, :-1] for row in tokens])
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return loss.double().mean(1).numpy()


def test_json_holds_numbers_and_identity(folder):
    done = evaluate(
        folder, "--model_path", "./dense", A, B, C, *CORPUS, "--dtype", "fp32", "--json", "out/r.json", "--csv", "r.csv"
    )
    assert done.code == 0, done.err
    content = json.loads((folder / "out/r.json").read_text())
    dense, a, _, full = content["results"]
    text = (folder / "corpus.txt").read_text()
    ids = ids_of(folder, text, 64)
    nll = nll_of(MistralForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval(), ids)
    covered = len(AutoTokenizer.from_pretrained(folder / "dense").decode(ids.ravel()).encode())

    assert dense["mean_nll"] == pytest.approx(nll.mean(), rel=1e-6)
    assert dense["ppl"] == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    error = nll.std(ddof=1) / math.sqrt(len(nll))
    assert dense["mean_nll_se"] == pytest.approx(error, rel=1e-4)
    assert dense["ppl_se"] == pytest.approx(error * dense["ppl"], rel=1e-4)
    assert dense["bits_per_byte"] == pytest.approx(nll.mean() / math.log(2) * ids.size / covered, rel=1e-6)
    assert (dense["windows"], dense["tokens"], dense["seqlen"]) == (len(ids), len(ids) * 63, 64)
    assert 0 <= dense["top1_accuracy"] < 1 and "kl_dense" not in dense

    for result in (dense, a, full):
        assert result["protocol"].startswith("text joined and tokenised once, non-overlapping windows")
        assert result["ids_sha256"] == sha256(ids)
        assert result["text"]["dataset"] == "corpus"
        assert result["text"]["sha256"] == hashlib.sha256(text.encode()).hexdigest()
        assert result["text"]["utf8_bytes_covered"] == covered
        assert result["tokenizer"]["name"].startswith(str(folder)) and len(result["tokenizer"]["sha256"]) == 64
        assert (result["dtype"], result["device"]) == ("fp32", "cpu")
        assert result["steps"][0]["torch"] == torch.__version__
        assert result["steps"][0]["transformers"] == transformers.__version__
    assert set(a["weights"]) == {"embed_tokens", "norm", "lm_head", *(f"layers.{i:03d}" for i in LAYOUT.kept)}
    assert set(full["weights"]) == set(dense["weights"])
    assert full["weights"]["norm"] == dense["weights"]["norm"] and full["weights_sha256"] != dense["weights_sha256"]
    assert a["kl_dense"] > 0 and 0 <= a["top1_agreement"] <= 1 and a["kl_dense_se"] > 0
    assert (a["active_layers"], full["active_layers"]) == (4, 8)

    (pair,) = [d for d in content["differences"] if (d["first"], d["second"]) == ("dense[dense]", "A_merged[A]")]
    assert pair["difference"] == pytest.approx(a["mean_nll"] - dense["mean_nll"])
    assert pair["low"] < pair["difference"] < pair["high"]
    assert len(content["differences"]) == 6
    rows = list(csv.DictReader((folder / "r.csv").open(encoding="utf-8")))
    assert [row["label"] for row in rows] == [r["label"] for r in content["results"]]
    assert float(rows[1]["ppl"]) == a["ppl"] and float(rows[1]["kl_dense"]) == a["kl_dense"]
    assert rows[0]["kl_dense"] == "" and rows[2]["ids_sha256"] == sha256(ids)


def test_adapters_left_unmerged_equal_merged_ones(folder, tmp_path):
    """In float32 the two differ by rounding only; and PEFT's own modules in a whole model say the same."""
    merge_with_peft(folder, tmp_path / "exact", dtype=torch.float32)
    parts = ["--model_path", f"./{PRUNED}/A", "--bundles_dir", f"{PRUNED}/bundles"]
    adapters = [f"./adapters/{part}_lora" for part in "CAB"]
    unmerged = results(folder, *parts, *CORPUS, "--lora_paths", *adapters)
    merged = results(folder, "--model_path", *(str(tmp_path / f"exact/{p}_merged") for p in "ABC"), *CORPUS)
    assert [r["label"] for r in unmerged] == [
        "A[A]", "A[AB]", "A[ABC]", "A+A_lora[A]", "A+A_lora+B_lora[AB]", "A+A_lora+B_lora+C_lora[ABC]"
    ]  # fmt: skip
    for plain, beside, into in zip(unmerged[:3], unmerged[3:], merged, strict=True):
        assert beside["mean_nll"] == pytest.approx(into["mean_nll"], rel=1e-6)
        assert abs(plain["mean_nll"] - into["mean_nll"]) > 1e-3, "the adapters must matter"
    model = MistralForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder / "adapters/A_lora").eval()
    for i in LAYOUT.dropped:
        model.base_model.model.model.layers[i] = PassLayer(i)
    oracle = nll_of(model, ids_of(folder, (folder / "corpus.txt").read_text(), 64))
    assert unmerged[3]["mean_nll"] == pytest.approx(oracle.mean(), rel=1e-6)


def test_an_adapter_of_one_part_is_measured_at_the_stages_it_changes(folder):
    found = results(
        folder, "--model_path", f"{PRUNED}/A", "--bundles_dir", f"{PRUNED}/bundles", *CORPUS, "--lora_paths",
        "./adapters/B_lora",
    )  # fmt: skip
    assert [r["label"] for r in found[3:]] == ["A+B_lora[AB]", "A+B_lora[ABC]"]
    done = evaluate(folder, "--model_path", f"{PRUNED}/A", *CORPUS, "--lora_paths", "./adapters/B_lora")
    assert done.code == 1 and "whose layers no stage of A has" in done.err


def test_several_text_files_are_one_text(folder):
    (result,) = results(folder, "--model_path", A, *CORPUS, "--text_file", "second.txt")
    text = (folder / "corpus.txt").read_text() + "\n\n" + (folder / "second.txt").read_text()
    assert result["ids_sha256"] == sha256(ids_of(folder, text, 64))
    assert result["text"]["dataset"] == "corpus+second"


def test_wikitext_rows_are_joined_with_a_blank_line(folder):
    (result,) = results(folder, "--model_path", A, "--mirror", "./wikitext", "--seqlen", "64")
    assert result["ids_sha256"] == sha256(ids_of(folder, "\n\n".join(WIKITEXT), 64, 256))
    assert result["text"]["dataset"] == "wikitext2" and "sha256=" in result["text"]["source"]


def test_a_dataset_of_the_users_own(folder):
    pd.DataFrame({"body": ["One row.", "Another row that is longer."] * 20}).to_parquet(folder / "mine.parquet")
    (result,) = results(
        folder, "--model_path", A, "--dataset", "mine.parquet", "--column", "body", "--seqlen", "32"
    )  # fmt: skip
    text = "\n\n".join(["One row.", "Another row that is longer."] * 20)
    assert result["ids_sha256"] == sha256(ids_of(folder, text, 32))
    done = evaluate(folder, "--model_path", A, "--dataset", "mine.parquet", "--seqlen", "32")
    assert done.code == 1 and "there is no column 'text', only 'body'" in done.err


@pytest.mark.parametrize(
    ("arguments", "windows"),
    [
        (["--max_batches", "2", "--batch_size", "3"], 6),
        (["--nsamples", "5"], 5),
        (["--nsamples", "5", "--max_batches", "2", "--batch_size", "3"], 5),
        (["--nsamples", "5", "--max_batches", "1", "--batch_size", "3"], 3),
    ],
)
def test_fewer_windows_are_the_first_ones(folder, arguments, windows):
    (result,) = results(folder, "--model_path", A, *CORPUS, *arguments)
    ids = ids_of(folder, (folder / "corpus.txt").read_text(), 64)
    assert result["ids_sha256"] == sha256(ids[:windows]) and result["windows"] == windows
    assert result["text"]["windows_available"] == len(ids)


def test_a_seed_draws_other_windows_the_same_every_time(folder):
    first, again, other = (
        results(folder, "--model_path", A, *CORPUS, "--nsamples", "5", "--seed", seed)[0] for seed in ("7", "7", "8")
    )
    assert first["ids_sha256"] == again["ids_sha256"] != other["ids_sha256"] and first["windows"] == 5
    assert first["mean_nll"] == again["mean_nll"]


def test_models_with_other_tokenizers_are_compared_by_bits_per_byte_only(folder, tmp_path):
    """Token ids differ, so neither pairs nor KL are given."""
    shutil.copytree(folder / A, tmp_path / "other")
    settings = json.loads((tmp_path / "other/tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(settings))
    done = evaluate(folder, "--model_path", "./dense", str(tmp_path / "other"), *CORPUS, "--json", "o.json")
    assert done.code == 0, done.err
    assert "Different token ids: these PPL do not compare. Bits per byte do: dense[dense]" in done.out
    content = json.loads((folder / "o.json").read_text())
    assert content["differences"] == [] and "kl_dense" not in content["results"][1]
