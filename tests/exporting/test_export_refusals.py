"""What is not exported: contradictions among model, bundles, stage and output, named before a byte is written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import namedtuple
from importlib import import_module
from pathlib import Path

import pytest
import torch
from forked import Forked, run_limited
from merge_oracle import edit_json, edit_tensors
from test_export import LAYOUT, parts

from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.export_stage import main
from mistral_prune_lora.exporting import export
from mistral_prune_lora.exporting.export import export_stage
from mistral_prune_lora.storage import space, transaction


@pytest.fixture
def given(tmp_path) -> tuple[Path, dict[str, Path]]:
    """A and the bundles, in a folder where nothing else may appear."""
    return parts(tmp_path, LAYOUT)


def swap(bundles):
    return {"B": bundles["C"], "C": bundles["B"]}


def rename_layer(a, bundles):
    (bundles["B"] / "bundle_meta.json").unlink()
    (bundles["B"] / "layer_004.safetensors").rename(bundles["B"] / "layer_005.safetensors")


def lose_layer(a, bundles):
    edit_tensors(a / "model.safetensors", lambda t: [t.pop(n) for n in list(t) if n.startswith("model.layers.2.")])


def lose_tensor(a, bundles):
    edit_tensors(a / "model.safetensors", lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))


def add_bias(a, bundles):
    edit_tensors(bundles["B"] / "layer_003.safetensors", lambda t: t.update({"self_attn.q_proj.bias": torch.zeros(96)}))


def widen(a, bundles):
    edit_tensors(bundles["B"] / "layer_003.safetensors", lambda t: t.update({"mlp.up_proj.weight": torch.zeros(8, 64)}))


def quantise(a, bundles):
    edit_tensors(
        bundles["B"] / "layer_003.safetensors",
        lambda t: t.update({"mlp.up_proj.weight": torch.zeros(112, 64, dtype=torch.int8)}),
    )


def add_value_head(a, bundles):
    edit_tensors(a / "model.safetensors", lambda t: t.update({"value_head.weight": torch.zeros(1, 64)}))


def untie(a, bundles):
    edit_tensors(a / "model.safetensors", lambda t: t.pop("lm_head.weight"))


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (None, {"stage": "AB", "bundles": None}, "layer 3 was dropped into bundle B, and no such bundle is given"),
        (None, {"stage": "FULL", "bundles": "B"}, "layer 5 was dropped into bundle C"),
        (None, {"stage": "FULL", "bundles": swap}, r"holds layers \[5, 6\], and the manifest gives \[3, 4\] to B"),
        (rename_layer, {}, r"holds layers \[3, 5\], and the manifest gives \[3, 4\] to B"),
        (lose_layer, {}, "there are no weights of layer 2"),
        (lose_tensor, {}, r"lacks 1 tensors of MistralForCausalLM, first model\.layers\.2\.mlp\.up_proj"),
        (add_bias, {}, r"has self_attn\.q_proj\.bias of shape \[96\], where MistralForCausalLM has no such tensor"),
        (widen, {}, r"mlp\.up_proj\.weight of shape \[8, 64\], where MistralForCausalLM has \[112, 64\]"),
        (quantise, {}, r"mlp\.up_proj\.weight is stored as I8: quantised weights"),
        (add_value_head, {}, r"holds value_head\.weight, which a stock model"),
        (untie, {}, r"has no tensor lm_head\.weight"),
        (lambda a, b: edit_json(a / "config.json", model_type="gemma2"), {}, "model_type 'gemma2' is not one"),
        (lambda a, b: (a / "manifest.json").unlink(), {"stage": "A"}, "it has no stage A"),
        (lambda a, b: (a / "manifest.json").unlink(), {"stage": "FULL"}, "no layer is missing that a bundle could"),
        (lambda a, b: (a / "manifest.json").unlink(), {"stage": "FULL", "bundles": None}, "no weights of layer 3"),
        (lambda a, b: (a / "tokenizer.json").unlink(), {}, "no tokenizer found"),
        (lambda a, b: (a / "generation_config.json").write_text("{"), {}, "generation_config.json.*|is not JSON"),
        (None, {"stage": "C"}, "there is no stage 'C'"),
        (None, {"form": "gguf"}, "there is no format 'gguf'"),
        (None, {"output_dir": "A"}, "is an input, or a part of one"),
        (None, {"output_dir": "A/exported"}, "lies in an input"),
        (None, {"output_dir": "bundles"}, "holds an input"),
        (None, {"bundles": lambda b: {"B": b["B"].parents[1] / "A"}}, "is a model, not a bundle"),
    ],
)
def test_refused_before_anything_is_written(given, tmp_path, spoil, options, message):
    a, bundles = given
    if spoil:
        spoil(a, bundles)
    chosen = options.get("bundles", "BC")
    wanted = chosen(bundles) if callable(chosen) else {part: bundles[part] for part in chosen or ""}
    before = state(tmp_path)
    with pytest.raises(PipelineError, match=message) as caught:
        export_stage(
            a,
            tmp_path / options.get("output_dir", "out"),
            stage=options.get("stage", "AB"),
            form=options.get("form", "stock"),
            bundles=wanted,
        )
    assert caught.value.mend and "\n" not in str(caught.value)
    assert state(tmp_path) == before


def state(folder: Path) -> set[tuple[str, bytes]]:
    return {(str(p), p.read_bytes() if p.is_file() else b"") for p in folder.rglob("*")}


def test_files_of_another_origin_are_not_replaced(given, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.gguf").write_bytes(b"mine")
    with pytest.raises(PipelineError, match=r"holds no record of an export \(export\.json\), but model\.gguf"):
        export_stage(given[0], tmp_path / "out", stage="A")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.gguf"]
    export_stage(given[0], tmp_path / "out", stage="A", overwrite=True)
    export_stage(given[0], tmp_path / "out", stage="A")
    (tmp_path / "out/model.gguf").write_bytes(b"mine")
    with pytest.raises(PipelineError, match=r"holds files that its export\.json does not name: model\.gguf"):
        export_stage(given[0], tmp_path / "out", stage="A")
    assert main(["--model_path", str(given[0]), "--stage", "A", "--output_dir", str(tmp_path / "out")]) == 1
    assert (
        main(["--model_path", str(given[0]), "--stage", "A", "--output_dir", str(tmp_path / "out"), "--overwrite"]) == 0
    )
    assert not (tmp_path / "out/model.gguf").exists()


def test_weights_of_dropped_layers_in_a_are_left_out_and_said(given, tmp_path):
    """As `from_pretrained` and `save_pretrained` of an A leave them: random."""
    a, bundles = given
    extra = {"model.layers.3.mlp.up_proj.weight": torch.randn(112, 64).bfloat16()}
    export_stage(a, tmp_path / "clean", stage="FULL", bundles=bundles)
    edit_tensors(a / "model.safetensors", lambda tensors: tensors.update(extra))
    report = export_stage(a, tmp_path / "out", stage="FULL", bundles=bundles)
    assert any("weights of the dropped layers [3]" in remark for remark in report.remarks)
    assert (tmp_path / "clean/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_parts_of_several_dtypes_are_said(given, tmp_path):
    a, bundles = given
    edit_tensors(bundles["B"] / "layer_003.safetensors", lambda t: t.update({n: v.float() for n, v in t.items()}))
    report = export_stage(a, tmp_path / "out", stage="AB", bundles=bundles)
    assert any("several dtypes (BF16, F32)" in remark for remark in report.remarks)


def test_a_disk_that_is_too_small_is_seen_before(given, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(PipelineError, match=r"\d+MB are needed and .*B are free"):
        export_stage(given[0], tmp_path / "deep/out", stage="A")
    assert not (tmp_path / "deep").exists()


def test_a_full_disk_leaves_the_former_result(given, tmp_path):
    out = tmp_path / "results/out"
    export_stage(given[0], out, stage="A")
    before = state(tmp_path)
    words = ["--model_path", given[0], "--stage", "A", "--output_dir", out]
    done = Forked(run_limited, 100_000, main, [*map(str, words)]).wait()
    assert done.code == 1 and "Traceback" not in done.err
    assert re.search(r"error: .*File too large.*what was there before is untouched", done.err)
    assert state(tmp_path) == before


def export_and_die(room: str, name: str, a: Path, out: Path) -> None:
    """Export, and end without a word where something is called."""
    setattr(import_module(room), name, lambda *_: os._exit(9))
    export_stage(a, out, stage="A")


def test_killed_in_between_leaves_the_former_result(given, tmp_path):
    a, bundles = given
    out = tmp_path / "results/out"
    export_stage(a, out, stage="AB", bundles={"B": bundles["B"]})
    before = state(out)
    # In the middle of an export, and before its last step.
    for room, name in ((export, "copy_settings"), (transaction, "_sync_tree")):
        done = Forked(export_and_die, room.__name__, name, a, out).wait()
        assert done.code == 9, done.err
    assert state(out) == before and len(os.listdir(out.parent)) > 1
    export_stage(a, out, stage="AB", bundles={"B": bundles["B"]})  # the next one tidies up
    assert state(out) == before and os.listdir(out.parent) == ["out"]


def test_an_interrupt_leaves_nothing(given, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(transaction, "_sync_tree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_stage(given[0], tmp_path / "results/out", stage="A")
    assert not (tmp_path / "results").exists()


def test_the_command_is_the_function(given, tmp_path, monkeypatch, capsys):
    a, bundles = given
    export_stage(a, tmp_path / "AB", stage="AB", bundles=bundles, max_shard_size=60_000)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    words = ["--model_path", "A", "--stage", "AB", "--output_dir", "out", "--max_shard_size", "60KB"]
    assert main([*words, "--bundles_dir", "bundles"]) == 0
    printed = capsys.readouterr()
    assert "note: the bundle C is no part of stage AB and is left out" in printed.err
    assert "stage AB as stock, 6 layers [0, 1, 2, 3, 4, 7]" in printed.err and printed.out == ""
    assert {(n.name, n.read_bytes()) for n in Path("out").iterdir() if n.name != "export.json"} == {
        (n.name, n.read_bytes()) for n in Path("AB").iterdir() if n.name != "export.json"
    }
    assert main([*words, "--b_bundle", "bundles/B"]) == 0
    assert main(words) == 1
    assert "error: layer 3 was dropped into bundle B" in capsys.readouterr().err
    assert main(["--model_path", "bundles/B", "--stage", "A", "--output_dir", "out"]) == 1
    assert "there are only bundles" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--stage", "B"])


def test_the_tokenizer_of_another_place(given, tmp_path):
    a, _ = given
    shutil.copytree(a, tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (a / name).unlink()
    (tmp_path / "other/chat_template.jinja").write_text("{{ messages }}")
    export_stage(a, tmp_path / "out", stage="A", tokenizer_path=tmp_path / "other")
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    record = json.loads((tmp_path / "out/export.json").read_text())
    assert str(tmp_path / "other/tokenizer.json") in record["inputs"]
