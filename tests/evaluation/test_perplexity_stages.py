"""Stages from streamed segments against the whole model in plain transformers."""

import numpy as np
import pytest
import torch
from cut_model import cut, make_compact, plain_stage, random_windows, save_dense
from safetensors.torch import load_file

from mistral_prune_lora.errors import DataError, LayoutError
from mistral_prune_lora.evaluation.scoring import DenseAnswers
from mistral_prune_lora.evaluation.stages import boundary_bytes, evaluate_stages
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.layout.partition import STAGES, Layout
from mistral_prune_lora.models import window_scores
from mistral_prune_lora.results.summary import check_same_ids
from mistral_prune_lora.storage.activations import ActivationReader
from mistral_prune_lora.streaming import run
from mistral_prune_lora.streaming.compute import Compute

CPU = torch.device("cpu")
CONTIGUOUS, SCATTERED, FIRST_AND_LAST = Layout(8, (3, 4), (5, 6)), Layout(8, (1, 6), (3,)), Layout(8, (0,), (7,))


@pytest.mark.parametrize(
    ("layout", "dtype", "batch_size", "config"),
    [
        (CONTIGUOUS, torch.float32, 1, {}),
        (CONTIGUOUS, torch.float32, 4, {"tie_word_embeddings": True}),
        (CONTIGUOUS, torch.bfloat16, 4, {}),
        (CONTIGUOUS, torch.bfloat16, 1, {"tie_word_embeddings": True}),
        (SCATTERED, torch.float32, 4, {"sliding_window": 12}),
        (SCATTERED, torch.bfloat16, 1, {"sliding_window": 12}),
        (FIRST_AND_LAST, torch.float32, 4, {"num_key_value_heads": 1}),
        (Layout(8, (2, 3), ()), torch.float32, 1, {"num_key_value_heads": 4}),
        (CONTIGUOUS, torch.float16, 4, {"sliding_window": 40}),
    ],
)
def test_stages_equal_the_whole_model(tmp_path, layout, dtype, batch_size, config):
    dense = save_dense(tmp_path / "dense", **config)
    a, bundles = cut(dense, layout, tmp_path)
    windows = random_windows(6, 32)
    subject, compute = Subject.open(a, bundles), Compute(CPU, dtype, batch_size)
    for stage in STAGES:
        final = tmp_path / f"{stage}.safetensors"
        (result,) = evaluate_stages(subject, [stage], windows, compute, work_dir=tmp_path / stage, final_hidden=final)
        hidden, nll = plain_stage(dense, layout.active(stage), windows, dtype, batch_size)
        assert torch.equal(load_file(final)["hidden_states"], hidden)
        np.testing.assert_allclose(result.scores.nll, nll.numpy(), rtol=1e-6)
    # All of them from one pass over the data: the same bits.
    together = list(evaluate_stages(subject, STAGES, windows, compute, work_dir=tmp_path / "work"))
    assert [r.record["stage"] for r in together] == list(STAGES)
    np.testing.assert_array_equal(together[-1].scores.nll, result.scores.nll)


def test_sliding_window_and_dropped_layers_matter_to_the_plain_model(tmp_path):
    """The test above would prove nothing if what it varies changed nothing."""
    windows = random_windows(2, 32)
    dense = save_dense(tmp_path / "dense")
    sliding = save_dense(tmp_path / "sliding", sliding_window=12)
    everything = tuple(range(8))
    full = plain_stage(dense, everything, windows, torch.float32, 1)[0]
    assert not torch.equal(full, plain_stage(sliding, everything, windows, torch.float32, 1)[0])
    assert not torch.equal(full, plain_stage(dense, CONTIGUOUS.kept, windows, torch.float32, 1)[0])


@pytest.fixture
def parts(tmp_path):
    dense = save_dense(tmp_path / "dense")
    a, bundles = cut(dense, CONTIGUOUS, tmp_path)
    return dense, Subject.open(a, bundles)


def test_pruned_full_is_the_dense_model_bit_for_bit(tmp_path, parts):
    dense_dir, pruned = parts
    windows, compute = random_windows(5, 24), Compute(CPU, torch.bfloat16, 2)
    dense = Subject.open(dense_dir)
    final = tmp_path / "final.safetensors"
    (whole,) = evaluate_stages(dense, ["FULL"], windows, compute, work_dir=tmp_path / "w", final_hidden=final)
    teacher = DenseAnswers(dense.model, final)
    results = list(evaluate_stages(pruned, STAGES, windows, compute, work_dir=tmp_path / "w", dense=teacher))
    full = results[-1]
    np.testing.assert_array_equal(full.scores.nll, whole.scores.nll)
    for key in ("ppl", "mean_nll", "ids_sha256", "parameters", "active_layers", "weights_sha256", "weights"):
        assert full.record[key] == whole.record[key], key
    assert full.record["kl_dense"] == 0.0 and full.record["top1_agreement"] == 1.0
    assert results[0].record["kl_dense"] > 0 and results[0].record["top1_agreement"] < 1
    assert [r.record["label"] for r in (whole, *results)] == ["dense[dense]", "A[A]", "A[AB]", "A[ABC]"]


def test_a_compact_a_is_the_same_model(tmp_path, parts):
    windows, compute = random_windows(2, 16), Compute(CPU, torch.float32, 2)
    before = list(evaluate_stages(parts[1], STAGES, windows, compute, work_dir=tmp_path / "before"))
    make_compact(parts[1].model.path, CONTIGUOUS)
    compact = Subject.open(parts[1].model.path, {p: b.path for p, b in parts[1].bundles.items()})
    after = list(evaluate_stages(compact, STAGES, windows, compute, work_dir=tmp_path / "after"))
    assert [r.record for r in after] == [r.record for r in before]


def test_kl_and_agreement_equal_those_of_whole_logits(tmp_path, parts):
    dense_dir, pruned = parts
    windows, compute = random_windows(3, 16), Compute(CPU, torch.float32, 1)
    final = tmp_path / "final.safetensors"
    dense = Subject.open(dense_dir)
    list(evaluate_stages(dense, ["FULL"], windows, compute, work_dir=tmp_path / "w", final_hidden=final))
    (a,) = evaluate_stages(
        pruned, ["A"], windows, compute, work_dir=tmp_path / "w", dense=DenseAnswers(dense.model, final)
    )
    from mistral_prune_lora.models.load import load_model

    with torch.inference_mode():
        p = load_model(dense_dir, dtype=torch.float32)(windows.ids.long()).logits[:, :-1].double()
        q = load_model(pruned.model.path, dtype=torch.float32)(windows.ids.long()).logits[:, :-1].double()
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum((1, 2))
    np.testing.assert_allclose(a.scores.kl, kl.numpy(), rtol=1e-4)
    assert a.record["top1_agreement"] == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    right = q.argmax(-1) == windows.ids[:, 1:]
    assert a.record["top1_accuracy"] == pytest.approx(right.double().mean().item())


def test_no_batch_size_drops_a_window_or_changes_more_than_rounding(tmp_path, parts):
    windows = random_windows(5, 24)
    means = {}
    for batch_size in (1, 2, 3, 5, 8):
        compute = Compute(CPU, torch.float32, batch_size)
        results = list(evaluate_stages(parts[1], STAGES, windows, compute, work_dir=tmp_path / str(batch_size)))
        assert {r.record["tokens"] for r in results} == {5 * 23}
        means[batch_size] = [r.record["mean_nll"] for r in results]
    for mean in means.values():
        assert mean == pytest.approx(means[1], rel=1e-6)


def test_a_small_memory_budget_gives_the_same_bits(tmp_path, parts, monkeypatch):
    # Or the logits of one block would take more than all layers.
    monkeypatch.setattr(window_scores, "BLOCK_LOGITS", 96 * 8)
    windows = random_windows(3, 24)
    ample, tight = Compute(CPU, torch.float32, 2, 10**9), Compute(CPU, torch.float32, 2, 450_000)
    first = list(evaluate_stages(parts[1], STAGES, windows, ample, work_dir=tmp_path / "ample"))
    seen = []
    original = run.resident_groups
    monkeypatch.setattr(run, "resident_groups", lambda *args: seen.append(original(*args)) or seen[-1])
    second = list(evaluate_stages(parts[1], STAGES, windows, tight, work_dir=tmp_path / "tight"))
    assert sorted(map(len, seen)) == [1, 1, 2, 3, 3], "the budget must have split segments and tails"
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.scores.nll, b.scores.nll)
    assert not list((tmp_path / "tight").glob(".*")), "scratch files must be gone"


def counted(monkeypatch) -> list[int]:
    """A list that every layer enters when it is made resident, which is once for all windows."""
    passes = []
    original = run.Backbone.resident

    def counting(self, groups):
        for group in original(self, groups):
            passes.extend(source.index for source in group)
            yield group

    monkeypatch.setattr(run.Backbone, "resident", counting)
    return passes


def test_a_new_c_bundle_runs_seven_of_thirty_eight_layers_worth_of_segments(tmp_path, parts, monkeypatch):
    windows, compute = random_windows(3, 24), Compute(CPU, torch.float32, 2)
    passes = counted(monkeypatch)
    list(evaluate_stages(parts[1], STAGES, windows, compute, work_dir=tmp_path / "work"))
    # 0-2 once, then 7 for A; 3-4, 7; 5-6, 7.
    assert passes == [0, 1, 2, 7, 3, 4, 7, 5, 6, 7]
    _, other = cut(save_dense(tmp_path / "other", seed=5), CONTIGUOUS, tmp_path / "cut")
    changed = Subject(parts[1].model, parts[1].bundles | {"C": Subject.open(parts[0], other).bundles["C"]})
    passes.clear()
    list(evaluate_stages(changed, STAGES, windows, compute, work_dir=tmp_path / "work"))
    assert passes == [5, 6, 7]
    # FULL alone, which by itself would keep nothing, starts from what the three stages have left.
    _, third = cut(save_dense(tmp_path / "third", seed=6), CONTIGUOUS, tmp_path / "cut3")
    changed = Subject(parts[1].model, parts[1].bundles | {"C": Subject.open(parts[0], third).bundles["C"]})
    passes.clear()
    list(evaluate_stages(changed, ["FULL"], windows, compute, work_dir=tmp_path / "work"))
    assert passes == [5, 6, 7]


def test_activations_where_parts_meet_serve_a_later_bundle(tmp_path, parts, monkeypatch):
    windows, compute = random_windows(3, 24), Compute(CPU, torch.float32, 2)
    dense, subject = parts
    _, other = cut(save_dense(tmp_path / "other", seed=5), CONTIGUOUS, tmp_path / "cut")
    changed = Subject(subject.model, subject.bundles | {"C": Subject.open(dense, other).bundles["C"]})
    folders = [tmp_path / "kept", tmp_path / "bare"]
    for folder, keep_parts in zip(folders, (True, False), strict=True):
        list(evaluate_stages(subject, ["FULL"], windows, compute, work_dir=folder, keep_parts=keep_parts))
        written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        estimate = boundary_bytes(subject, ["FULL"], windows, compute, keep_parts=keep_parts)
        assert estimate <= written <= estimate * 1.5 and bool(estimate) == keep_parts
    passes = counted(monkeypatch)
    found = [list(evaluate_stages(changed, ["FULL"], windows, compute, work_dir=folder)) for folder in folders]
    assert passes == [5, 6, 7, *range(8)]
    np.testing.assert_array_equal(found[0][0].scores.nll, found[1][0].scores.nll)


def test_activations_of_other_windows_are_refused(tmp_path, parts):
    dense = Subject.open(parts[0])
    compute, final = Compute(CPU, torch.float32), tmp_path / "final.safetensors"
    list(evaluate_stages(dense, ["FULL"], random_windows(2, 16), compute, work_dir=tmp_path / "w", final_hidden=final))
    assert ActivationReader(final).shape == (2, 16, 64)
    others = random_windows(2, 16, seed=9)
    with pytest.raises(DataError, match="ids_sha256"):
        list(
            evaluate_stages(
                parts[1], ["A"], others, compute, work_dir=tmp_path / "w", dense=DenseAnswers(dense.model, final)
            )
        )


def test_a_stage_without_its_bundle_is_refused(tmp_path, parts):
    a_only = Subject(parts[1].model)
    with pytest.raises(LayoutError, match="bundle B"):
        list(evaluate_stages(a_only, ["AB"], random_windows(1, 8), Compute(CPU, torch.float32), work_dir=tmp_path))


def test_results_on_other_token_ids_are_not_compared():
    with pytest.raises(DataError, match="different token ids"):
        check_same_ids({"A": {"ids_sha256": "1" * 64}, "AB": {"ids_sha256": "2" * 64}})
    check_same_ids({"A": {"ids_sha256": "1" * 64}, "AB": {"ids_sha256": "1" * 64}})
