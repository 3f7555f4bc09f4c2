"""A and the files of the later stages, read as a server reads them that puts layers in while it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cut_model import make_compact, random_windows
from safetensors.torch import load_file
from test_export import LAYOUT, SCATTERED, SMALL, parts, score
from transformers import MistralConfig, MistralForCausalLM

from mistral_prune_lora.errors import LayoutError
from mistral_prune_lora.exporting.export import export_stage
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.pruning.identity import PassLayer

FILES = {"B": "stage2_layers_B.safetensors", "C": "stage3_layers_C.safetensors"}
DESCRIPTIONS = {"manifest.json", "prune_log.json", "layers_map.json"}


class Server:
    """Serves a directory: which layers come later says the split in its prune_log.json, keys go by their prefix."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.split = json.loads((folder / "prune_log.json").read_text())["split"]
        self.model = MistralForCausalLM(MistralConfig.from_pretrained(folder)).to(torch.float32).eval()
        self.waiting = {layer: self.model.model.layers[layer] for part in "BC" for layer in self.split[part]}
        for layer in self.waiting:
            self.model.model.layers[layer] = PassLayer(layer)
        faults = self.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        assert faults.unexpected_keys == [] and set(faults.missing_keys) <= {"lm_head.weight"}
        if self.model.config.tie_word_embeddings:
            self.model.tie_weights()

    def advance(self, part: str) -> None:
        tensors = load_file(self.folder / FILES[part])
        for layer in self.split[part]:
            prefix = f"model.layers.{layer}."
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            self.waiting[layer].load_state_dict(own, strict=True)
            self.model.model.layers[layer] = self.waiting[layer]
        assert {int(name.split(".")[2]) for name in tensors} == set(self.split[part])

    @torch.inference_mode()
    def nll(self, windows) -> torch.Tensor:
        ids = windows.ids.long()
        logits = self.model(ids).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return loss.double().sum(1)


@pytest.mark.parametrize(
    ("layout", "tied", "compact"), [(LAYOUT, False, False), (SCATTERED, True, False), (LAYOUT, True, True)]
)
def test_a_server_goes_from_stage_to_stage(tmp_path, layout, tied, compact):
    a, bundles = parts(tmp_path, layout, tie_word_embeddings=tied)
    if compact:
        make_compact(a, layout)
    out = tmp_path / "out"
    export_stage(a, out, stage="FULL", bundles=bundles, form="stage_files")
    server, windows = Server(out), random_windows(2, 24)
    for stage, part in (("A", None), ("AB", "B"), ("FULL", "C")):
        if part:
            server.advance(part)
        ours = score(a, bundles, stage, windows, tmp_path / stage)
        torch.testing.assert_close(server.nll(windows), torch.from_numpy(ours), rtol=1e-6, atol=0)
        # To our own tools it is an A like any other.
        torch.testing.assert_close(
            torch.from_numpy(score(out, bundles, stage, windows, tmp_path / f"{stage}out")),
            torch.from_numpy(ours), rtol=0, atol=0,
        )  # fmt: skip
    assert {p.name for p in out.iterdir()} == SMALL | DESCRIPTIONS | {"model.safetensors", *FILES.values()}


@pytest.mark.parametrize(("stage", "files"), [("A", set()), ("AB", {"B"}), ("FULL", {"B", "C"})])
def test_a_stage_has_the_files_of_its_parts(tmp_path, stage, files):
    a, bundles = parts(tmp_path)
    out = tmp_path / "out"
    export_stage(a, out, stage=stage, bundles=bundles, form="stage_files", max_shard_size=60_000)
    assert {p.name for p in out.glob("stage*")} == {FILES[part] for part in files}
    # A's own index knows A's own shards, and nothing of the others.
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert {p.name for p in out.glob("model-*.safetensors")} == set(weight_map.values())
    assert {int(name.split(".")[2]) for name in weight_map if ".layers." in name} == set(LAYOUT.kept)
    record = json.loads((out / "export.json").read_text())
    assert record["format"] == "stage_files"
    assert record["original_index"] == {str(i): i for i in LAYOUT.active(stage)}  # nothing was renumbered
    layers_map = json.loads((out / "layers_map.json").read_text())
    assert layers_map["num_layers"] == 8 and layers_map["layer_prefix"] == "model.layers."
    assert sorted(layers_map["non_layer_keys"] + [k for keys in layers_map["layers"].values() for k in keys]) == sorted(
        weight_map
    )
    assert [layer for layer, keys in layers_map["layers"].items() if not keys] == ["3", "4", "5", "6"]
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 8
    assert json.loads((out / "manifest.json").read_text()) == json.loads((a / "manifest.json").read_text())


def test_the_split_is_the_prune_logs_or_else_the_manifests(tmp_path):
    a, bundles = parts(tmp_path)

    def exported() -> dict:
        export_stage(a, tmp_path / "out", stage="FULL", bundles=bundles, form="stage_files")
        return json.loads((tmp_path / "out/prune_log.json").read_text())

    assert exported()["split"] == {"policy": None, "ratio": None, "B": [3, 4], "C": [5, 6]}
    assert exported()["selected_block"]["indices"] == [3, 4, 5, 6]
    # One that has no split, as earlier versions wrote it, keeps what it says and gets what it lacks.
    (a / "prune_log.json").write_text(json.dumps({"model": "m", "B": [3, 4]}))
    assert exported() | {"model": "m", "B": [3, 4]} == exported()
    assert exported()["split"]["C"] == [5, 6]
    theirs = {**exported(), "split": {"policy": "half", "ratio": 0.5, "B": [4, 3], "C": [5, 6]}, "x": 1}
    (a / "prune_log.json").write_text(json.dumps(theirs))
    assert exported() == theirs
    for wrong in ('{"split": {"B": [3], "C": [4, 5, 6]}}', '{"split": {"B": 3}}', "[]", "{"):
        (a / "prune_log.json").write_text(wrong)
        with pytest.raises(LayoutError, match="prune_log"):
            exported()


def test_there_must_be_something_to_load_later(tmp_path):
    a, _ = parts(tmp_path)
    (a / "manifest.json").unlink()
    with pytest.raises(LayoutError, match="it has no stage A"):
        export_stage(a, tmp_path / "out", stage="A", form="stage_files")
    with pytest.raises(LayoutError, match="there is nothing to load later"):
        export_stage(a, tmp_path / "out", stage="FULL", form="stage_files")


def test_a_part_without_layers_has_no_file(tmp_path):
    a, bundles = parts(tmp_path, Layout(8, (3, 4), ()))
    export_stage(a, tmp_path / "out", stage="FULL", bundles=bundles, form="stage_files")
    assert [p.name for p in (tmp_path / "out").glob("stage*")] == [FILES["B"]]
