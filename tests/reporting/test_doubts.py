"""What makes numbers doubtful stands on the first page, and nothing stands there without reason."""

import json

import pytest
from report_results import DENSE, OTHER, gathered, write_result, write_results

from mistral_prune_lora.reporting.doubts import FEW, doubts_of
from mistral_prune_lora.reporting.front import front

HEALED = "FULL after healing is not the dense model"


def doubts(folder, results, **told):
    """All doubts of results, as the first page has them."""
    return doubts_of(gathered(folder, results, **told))


def write_exact_results(folder, experiment, windows, **changes):
    """Results of which FULL is the dense model, after healing too."""
    results = write_results(folder, experiment, windows, **changes)
    write_result(folder, (experiment, "text", "merged", "FULL"), windows, weights_sha256=DENSE, **changes)
    return results


def test_sound_results_have_no_doubts(tmp_path):
    results = write_exact_results(tmp_path, "one", FEW) + write_exact_results(tmp_path, "two", FEW)
    found = gathered(tmp_path, results)
    assert doubts_of(found) == [] and "Before you believe" not in front(found)


def test_a_healed_full_with_other_weights_than_the_dense_model_s(tmp_path):
    exact, healed = write_exact_results(tmp_path, "exact", FEW), write_results(tmp_path, "healed", FEW)
    (doubt,) = doubts(tmp_path, healed)
    assert doubt.startswith(HEALED)
    (doubt,) = doubts(tmp_path, exact + healed)
    assert doubt.startswith(f"healed on text: {HEALED}")
    # Of what it is compared with, only one may have been put back.
    joint = write_result(tmp_path, ("exact", "text", "joint-FULL", "FULL"), FEW)
    (doubt,) = doubts(tmp_path, [*exact, joint])
    assert doubt.startswith(f"exact on text (joint-FULL): {HEALED}")


def test_a_healed_full_where_no_dense_one_was_measured(tmp_path):
    exact, healed = write_exact_results(tmp_path, "exact", FEW), write_results(tmp_path, "healed", FEW)
    (doubt,) = doubts(tmp_path, [named for named in exact + healed if named.variant != "dense"])
    assert doubt.startswith(f"healed on text: {HEALED}")
    # Without the pruned one either, it is told by how far its predictions are from the dense model's.
    (doubt,) = doubts(tmp_path, [named for named in healed if named.variant == "merged"])
    assert doubt.startswith(HEALED)
    alone = write_result(tmp_path, ("exact", "text", "merged", "FULL"), FEW, kl=0.0)
    assert doubts(tmp_path, [alone]) == []


def test_a_restored_model_that_is_not_the_dense_one(tmp_path):
    results = write_exact_results(tmp_path, "one", FEW)
    write_result(tmp_path, ("one", "text", "pruned", "FULL"), FEW, weights_sha256=OTHER)
    (doubt,) = doubts(tmp_path, results)
    assert "one on text: FULL without adapters is not the dense model" in doubt


@pytest.mark.parametrize(
    ("windows", "said"), [(1, "a single window"), (FEW - 1, f"only {FEW - 1} windows")], ids=["one", "few"]
)
def test_few_windows(tmp_path, windows, said):
    results = write_exact_results(tmp_path, "one", windows) + write_exact_results(tmp_path, "two", FEW)
    (doubt,) = doubts(tmp_path, results)
    assert doubt.startswith("one on text: ") and said in doubt


def test_tensors_that_a_merge_left_out(tmp_path):
    for part, count in (("A", 0), ("B", 3)):
        record = {"adapters": [{"out_of_scope": [f"t{n}" for n in range(count)]}]}
        (tmp_path / f"{part}.json").write_text(json.dumps(record))
    merges = {("one", part): tmp_path / f"{part}.json" for part in "AB"}
    (doubt,) = doubts(tmp_path, write_exact_results(tmp_path, "one", FEW), merges=merges)
    assert doubt.startswith("one: 3 tensors of its adapters")


def test_what_results_warn_of_is_said_once_and_escaped(tmp_path):
    said = ["windows of 11 tokens are longer than the 8 positions", "token ids of <another> tokenizer"]
    results = write_exact_results(tmp_path, "one", FEW, warnings=said)
    assert doubts(tmp_path, results) == [f"one on text: {words}." for words in said]
    page = front(gathered(tmp_path, results))
    assert "Before you believe" in page and page.count("ids of &lt;another&gt; tokenizer.") == 1


def test_other_token_ids_of_the_same_dataset(tmp_path):
    results = write_exact_results(tmp_path, "one", FEW) + write_exact_results(tmp_path, "two", FEW, ids_sha256="9" * 64)
    (doubt,) = doubts(tmp_path, results)
    assert doubt.startswith("text is of other token ids in some experiments")
