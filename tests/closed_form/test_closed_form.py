"""Adapters in closed form against transformers, whose hooks give the same features, and against plain least squares."""

import json

import pytest
import torch
from cut_model import cut, random_windows, save_dense
from merge_oracle import peft_merged, read_result
from peft import PeftModel
from safetensors.torch import load_file
from tiny import save_tokenizer
from transformers import AutoModelForCausalLM

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.closed_form import calibration, solve
from mistral_prune_lora.closed_form.places import Place, correction_places
from mistral_prune_lora.closed_form.settings import CalibrationText, ClosedFormSettings
from mistral_prune_lora.closed_form.written import write_closed_form
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.errors import DataError, LayoutError, PipelineError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.models.load import load_model
from mistral_prune_lora.pruning.mistral_merge_adapter import main as merge
from mistral_prune_lora.streaming.compute import Compute, LayerSource
from mistral_prune_lora.streaming.passage import Passage
from mistral_prune_lora.streaming.run import run_to_file

LAYOUT = Layout(8, (3, 4), (5, 6))
SEQLEN = 32
CORRECTED = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("closed_form")
    dense = save_dense(folder / "dense", dtype=torch.float32)
    return dense, *cut(dense, LAYOUT, folder, torch.float32)


def compute_adapter(parts, output, windows=None, part="A", bundles=(), held_out=0, dtype="fp32", given=(), **settings):
    texts = [CalibrationText(each, held_out) for each in windows or [random_windows(12, SEQLEN)]]
    wanted = ClosedFormSettings(**{"ridge": 1e-6, "token_weights": "equal", **settings})
    compute = Compute.named("cpu", dtype, 4)
    closed_form = solve.ClosedForm(part, Student(parts[1], bundles), parts[0], texts, wanted, compute, given)
    write_closed_form(closed_form, output)
    return output


def seen(model, ids, layer):
    """Features of a layer's down_proj, and what leaves the layer, by transformers' own forward pass; float64."""
    found = {}
    block = model.model.layers[layer]
    hooks = [
        block.mlp.down_proj.register_forward_pre_hook(lambda module, given: found.update(x=given[0])),
        block.register_forward_hook(lambda module, given, out: found.update(s=out)),
    ]
    with torch.no_grad():
        model(ids.long())
    for hook in hooks:
        hook.remove()
    return found["x"].flatten(0, 1).double(), found["s"].flatten(0, 1).double()


def ridge_solution(x, y, ridge):
    gram = x.T @ x / len(x)
    return torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)), x.T @ y / len(x))


def product(folder, layer):
    tensors = load_file(folder / "adapter_model.safetensors")
    name = f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_"
    return tensors[f"{name}B.weight"] @ tensors[f"{name}A.weight"]


def merged_by_command(a, adapter, folder):
    save_tokenizer(a)
    given = ["--base_model", str(a), "--adapter_path", str(adapter), "--output_dir", str(folder / "merged")]
    assert not merge(given)
    return read_result(folder / "merged")


@torch.no_grad()
def left(x, y, weights):
    return float((y - x @ weights).square().sum() / y.square().sum())


def test_it_is_the_ridge_regression_of_what_the_cut_takes_away(parts, tmp_path):
    windows = random_windows(12, SEQLEN)
    output = compute_adapter(parts, tmp_path / "adapter")
    dense = AutoModelForCausalLM.from_pretrained(parts[0], dtype=torch.float32)
    (x, s), (_, d) = seen(dense, windows.ids, 2), seen(dense, windows.ids, 6)
    expected = ridge_solution(x, d - s, 1e-6)
    torch.testing.assert_close(product(output, 2), expected.T.float(), rtol=1e-3, atol=1e-4)
    told = json.loads((output / "closed_form.json").read_text())["corrections"][0]
    assert told["residual"] == pytest.approx(left(x, d - s, expected), rel=1e-6)
    # ReplaceMe regresses on the layer's outputs behind the same projection, which are linear in these features.
    outputs = x @ dense.model.layers[2].mlp.down_proj.weight.double().T
    replace_me = left(outputs, d - s, torch.linalg.lstsq(outputs, d - s).solution)
    assert told["residual"] < replace_me


def test_a_token_counts_by_the_length_of_what_is_wanted_there(parts, tmp_path):
    windows = random_windows(12, SEQLEN)
    output = compute_adapter(parts, tmp_path / "adapter", token_weights="inverse_norm")
    dense = AutoModelForCausalLM.from_pretrained(parts[0], dtype=torch.float32)
    (x, s), (_, d) = seen(dense, windows.ids, 2), seen(dense, windows.ids, 6)
    root = d.square().mean(-1, keepdim=True).sqrt().sqrt()  # of the norm, but for the same factor for all
    expected = ridge_solution(x / root, (d - s) / root, 1e-6)
    torch.testing.assert_close(product(output, 2), expected.T.float(), rtol=1e-3, atol=1e-4)
    told = json.loads((output / "closed_form.json").read_text())
    assert told["corrections"][0]["residual"] == pytest.approx(left(x / root, (d - s) / root, expected), rel=1e-6)
    assert told["settings"]["token_weights"] == "inverse_norm"
    assert "was divided by the length of the state" in (output / "README.md").read_text()
    # And it is another one than where all count alike.
    assert (product(output, 2) - ridge_solution(x, d - s, 1e-6).T).abs().max() > 1e-3


def test_peft_reads_it_and_merges_it_with_our_bits(parts, tmp_path):
    output = compute_adapter(parts, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_model(parts[1], dtype=torch.float32), output)
    state = {name.replace(".default", ""): p for name, p in loaded.named_parameters() if "lora_" in name}
    weights = load_file(output / "adapter_model.safetensors")
    assert set(state) == set(weights) and all(torch.equal(state[name], weights[name]) for name in weights)
    merged, expected = merged_by_command(parts[1], output, tmp_path), peft_merged(parts[1], [output], torch.float32)
    assert merged and all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())
    assert not torch.equal(merged[CORRECTED], read_result(parts[1])[CORRECTED])


def test_corrections_behind_one_another_see_the_corrected_stream(tmp_path):
    layout = Layout(8, (2,), (5,))
    dense = save_dense(tmp_path / "dense", dtype=torch.float32)
    parts = dense, *cut(dense, layout, tmp_path, torch.float32)
    windows = random_windows(12, SEQLEN)
    output = compute_adapter(parts, tmp_path / "adapter")
    model, student = AutoModelForCausalLM.from_pretrained(dense), load_model(parts[1], dtype=torch.float32)
    for layer, before in ((1, 3), (4, 6)):
        x, s = seen(student, windows.ids, layer)
        expected = ridge_solution(x, seen(model, windows.ids, before - 1)[1] - s, 1e-6).T
        torch.testing.assert_close(product(output, layer), expected.float(), rtol=2e-3, atol=2e-4)
        student.model.layers[layer].mlp.down_proj.weight.data += product(output, layer)


def test_a_lower_rank_is_the_best_one_in_whitened_space(parts, tmp_path):
    windows = random_windows(12, SEQLEN)
    output = compute_adapter(parts, tmp_path / "adapter", rank=3, ridge=1e-3)
    dense = AutoModelForCausalLM.from_pretrained(parts[0], dtype=torch.float32)
    (x, s), (_, d) = seen(dense, windows.ids, 2), seen(dense, windows.ids, 6)
    gram = x.T @ x / len(x)
    whitener = torch.linalg.cholesky(gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))).T
    u, values, v = torch.linalg.svd(whitener @ ridge_solution(x, d - s, 1e-3), full_matrices=False)
    best = torch.linalg.solve_triangular(whitener, (u[:, :3] * values[:3]) @ v[:3], upper=True)
    found = load_file(output / "adapter_model.safetensors")
    assert {tensor.shape[0] if "lora_A" in name else tensor.shape[1] for name, tensor in found.items()} == {3}
    torch.testing.assert_close(product(output, 2), best.T.float(), rtol=1e-3, atol=1e-5)


def test_the_ridge_is_the_one_that_leaves_least_on_held_out_windows(parts, tmp_path):
    windows = random_windows(12, SEQLEN)
    output = compute_adapter(parts, tmp_path / "adapter", held_out=4, ridge=None)
    dense = AutoModelForCausalLM.from_pretrained(parts[0], dtype=torch.float32)
    solved, held = windows.ids[:8], windows.ids[8:]
    moments = [(seen(dense, ids, 2), seen(dense, ids, 6)) for ids in (solved, held)]
    (x, y), (xh, yh) = ((features, d - s) for (features, s), (_, d) in moments)
    losses = {10 ** (-n / 2): left(xh, yh, ridge_solution(x, y, 10 ** (-n / 2))) for n in range(17)}
    told = json.loads((output / "closed_form.json").read_text())["corrections"][0]
    assert told["ridge"] == min(losses, key=losses.get)
    assert told["held_out_residual"] == pytest.approx(min(losses.values()), rel=1e-5)


def test_texts_count_by_their_weights_whatever_their_length(parts, tmp_path):
    short, long = random_windows(4, SEQLEN, seed=5), random_windows(9, SEQLEN, seed=6)
    texts = [CalibrationText(short, 0, 3.0), CalibrationText(long, 0, 1.0)]
    wanted = ClosedFormSettings(ridge=1e-4, token_weights="equal")
    closed_form = solve.ClosedForm("A", Student(parts[1]), parts[0], texts, wanted, Compute.named("cpu", "fp32", 4))
    write_closed_form(closed_form, tmp_path / "adapter")
    dense = AutoModelForCausalLM.from_pretrained(parts[0], dtype=torch.float32)
    gram, cross = 0, 0
    for windows, share in ((short, 0.75), (long, 0.25)):
        (x, s), (_, d) = seen(dense, windows.ids, 2), seen(dense, windows.ids, 6)
        gram, cross = gram + share * x.T @ x / len(x), cross + share * x.T @ (d - s) / len(x)
    expected = torch.linalg.solve(gram + 1e-4 * gram.diagonal().mean() * torch.eye(len(gram)), cross).T
    torch.testing.assert_close(product(tmp_path / "adapter", 2), expected.float(), rtol=1e-3, atol=1e-4)


def test_b_is_corrected_in_its_last_layer_while_c_is_missing(parts, tmp_path):
    windows = random_windows(12, SEQLEN)
    bundle = parts[2]["B"]
    output = compute_adapter(parts, tmp_path / "adapter", part="B", bundles=(bundle,))
    student = load_model(parts[1], dtype=torch.float32, bundles=(bundle,))
    dense = AutoModelForCausalLM.from_pretrained(parts[0], dtype=torch.float32)
    x, s = seen(student, windows.ids, 4)
    expected = ridge_solution(x, seen(dense, windows.ids, 6)[1] - s, 1e-6).T
    torch.testing.assert_close(product(output, 4), expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "part", "stage", "behind", "expected"),
    [
        (LAYOUT, "A", "A", 0, [Place(2, 7)]),
        (LAYOUT, "A", "A", 2, [Place(2, 7), Place(7, 8)]),
        (Layout(8, (6,), (7,)), "A", "A", 1, [Place(5, 8)]),
        (Layout(8, (2,), (5,)), "A", "A", 1, [Place(1, 3), Place(3, 4), Place(4, 6), Place(6, 7)]),
        (LAYOUT, "B", "AB", 1, [Place(4, 7)]),
        (Layout(8, (5, 6), (3, 4)), "B", "AB", 0, [Place(6, 7)]),
        (LAYOUT, "C", "FULL", 0, [Place(6, 7)]),
    ],
)
def test_places(layout, part, stage, behind, expected):
    assert correction_places(layout.active(stage), layout.layers_of(part), 8, behind) == expected


def test_a_model_that_lacks_nothing_is_refused():
    with pytest.raises(LayoutError, match="no layers are cut away"):
        correction_places(range(8), range(8), 8)


def test_bf16_is_corrected_in_the_stream_as_the_merge_rounds_it(tmp_path):
    layout = Layout(8, (2,), (5,))
    dense = save_dense(tmp_path / "dense")
    a, _ = cut(dense, layout, tmp_path)
    output = compute_adapter((dense, a), tmp_path / "adapter", dtype="bf16")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    factors = load_file(output / "adapter_model.safetensors")
    found = solve.Correction(1, factors[f"{name}A.weight"], factors[f"{name}B.weight"], {})
    layer = load_model(a, dtype=torch.bfloat16).model.layers[1]
    found.wrap(layer, 1)
    merged = merged_by_command(a, output, tmp_path)["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(layer.mlp.down_proj.weight, merged)


def test_a_killed_calibration_goes_on_from_its_passes(parts, tmp_path, monkeypatch):
    runs = []
    once = calibration.run_to_file
    monkeypatch.setattr(calibration, "run_to_file", lambda *given: (runs.append(len(given[2])), once(*given)))
    with monkeypatch.context() as broken:
        broken.setattr(solve, "solve", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compute_adapter(parts, tmp_path / "adapter")
    assert runs == [2, 5], "the student's layers 0-1 are the dense model's, which goes on from there"
    assert not (tmp_path / "adapter").exists()
    compute_adapter(parts, tmp_path / "adapter")
    assert runs == [2, 5], "nothing is run twice"
    assert not (tmp_path / "adapter.unfinished").exists()
    again = compute_adapter(parts, tmp_path / "again")
    assert (again / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_states_that_others_made_of_the_way_are_gone_on_from(parts, tmp_path, monkeypatch):
    windows, compute, runs = random_windows(12, SEQLEN), Compute.named("cpu", "fp32", 4), []

    def states(folder, layers, of=windows):
        model, file = open_checkpoint(folder), tmp_path / f"{folder.name}-{layers}-{len(of)}.safetensors"
        passage = Passage(model, of, compute)
        run_to_file(passage, passage.origin(None), [LayerSource(index, model) for index in range(layers)], file)
        return file

    other = save_dense(tmp_path / "other", dtype=torch.float32, seed=1)
    foreign = [states(other, 2), states(parts[0], 2, random_windows(11, SEQLEN))]
    ways = {"none": [], "all": [states(parts[0], 2), states(parts[0], 7)], "other": foreign}
    once, found = calibration.run_to_file, {}
    monkeypatch.setattr(calibration, "run_to_file", lambda *given: (runs.append(len(given[2])), once(*given)))
    for name, files in ways.items():
        runs.append(name)
        output = compute_adapter(parts, tmp_path / f"from {name}", [windows], given=[files])
        found[name] = (output / "adapter_model.safetensors").read_bytes()
    assert runs == ["none", 2, 5, "all", "other", 2, 5], "those of other weights or windows are left alone"
    assert len(set(found.values())) == 1


def test_what_cannot_be_is_refused(parts, tmp_path):
    with pytest.raises(PipelineError, match="none are held out"):
        compute_adapter(parts, tmp_path / "adapter", ridge=None)
    with pytest.raises(PipelineError, match="none is left"):
        CalibrationText(random_windows(3, 8), 3)
    with pytest.raises(PipelineError, match="ridge is 0"):
        ClosedFormSettings(ridge=0)
    with pytest.raises(PipelineError, match="token_weights is 'norm'"):
        ClosedFormSettings(token_weights="norm")
    with pytest.raises(PipelineError, match="weight is -1"):
        CalibrationText(random_windows(3, 8), 1, -1)
    examples = random_windows(3, 8)
    scored = torch.zeros(3, 8, dtype=torch.bool)
    with pytest.raises(DataError, match="running text"):
        CalibrationText(type(examples)(examples.ids, examples.identity, None, scored), 0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(PipelineError, match="mine"):
        compute_adapter(parts, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
