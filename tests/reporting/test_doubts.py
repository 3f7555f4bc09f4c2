"""What makes numbers doubtful stands on the first page, and nothing stands there without reason."""

import json

import pytest
from report_results import OTHER, gathered, write_result, write_results

from mistral_prune_lora.reporting.doubts import FEW, doubts_of
from mistral_prune_lora.reporting.front import front

HEALED = "FULL after healing is not the dense model"


def doubts(folder, results, **told):
    """All doubts but that of every healed FULL."""
    told = doubts_of(gathered(folder, results, **told))
    assert HEALED in told.pop()
    return told


def test_sound_results_have_the_one_doubt_that_is_true_of_all_healed_ones(tmp_path):
    results = write_results(tmp_path, "one", FEW) + write_results(tmp_path, "two", FEW)
    assert doubts(tmp_path, results) == []
    pruned = [named for named in results if named.variant != "merged"]
    found = gathered(tmp_path, pruned)
    assert doubts_of(found) == [] and "Before you believe" not in front(found)


def test_a_restored_model_that_is_not_the_dense_one(tmp_path):
    results = write_results(tmp_path, "one", FEW)
    write_result(tmp_path, ("one", "text", "pruned", "FULL"), FEW, weights_sha256=OTHER)
    (doubt,) = doubts(tmp_path, results)
    assert "one on text: FULL without adapters is not the dense model" in doubt


@pytest.mark.parametrize(
    ("windows", "said"), [(1, "a single window"), (FEW - 1, f"only {FEW - 1} windows")], ids=["one", "few"]
)
def test_few_windows(tmp_path, windows, said):
    results = write_results(tmp_path, "one", windows) + write_results(tmp_path, "two", FEW)
    (doubt,) = doubts(tmp_path, results)
    assert doubt.startswith("one on text: ") and said in doubt


def test_tensors_that_a_merge_left_out(tmp_path):
    for part, count in (("A", 0), ("B", 3)):
        record = {"adapters": [{"out_of_scope": [f"t{n}" for n in range(count)]}]}
        (tmp_path / f"{part}.json").write_text(json.dumps(record))
    merges = {("one", part): tmp_path / f"{part}.json" for part in "AB"}
    (doubt,) = doubts(tmp_path, write_results(tmp_path, "one", FEW), merges=merges)
    assert doubt.startswith("one: 3 tensors of its adapters")


def test_what_results_warn_of_is_said_once_and_escaped(tmp_path):
    said = ["windows of 11 tokens are longer than the 8 positions", "token ids of <another> tokenizer"]
    results = write_results(tmp_path, "one", FEW, warnings=said)
    assert doubts(tmp_path, results) == [f"one on text: {words}." for words in said]
    page = front(gathered(tmp_path, results))
    assert "Before you believe" in page and page.count("ids of &lt;another&gt; tokenizer.") == 1


def test_other_token_ids_of_the_same_dataset(tmp_path):
    results = write_results(tmp_path, "one", FEW) + write_results(tmp_path, "two", FEW, ids_sha256="9" * 64)
    (doubt,) = doubts(tmp_path, results)
    assert doubt.startswith("text is of other token ids in some experiments")
