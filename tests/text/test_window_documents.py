"""Windows that hold documents of their own: positions, scored tokens, their digests and their file."""

import json
from dataclasses import replace

import pytest
import torch
from cut_model import random_windows, save_dense
from safetensors import safe_open

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.errors import DataError
from mistral_prune_lora.evaluation.scoring import Scoring
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.streaming.passage import Passage
from mistral_prune_lora.text.windows import Windows, first_windows, ids_digest, scored_digest

POSITIONS = [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
SCORED = [[False, True, True, False, True], [False, False, False, True, True]]


def windows_of(positions=POSITIONS, scored=SCORED, **changes) -> Windows:
    plain = random_windows(2, 5)
    positions = None if positions is None else torch.tensor(positions, dtype=torch.int32)
    scored = None if scored is None else torch.tensor(scored)
    told = {
        "ids_sha256": ids_digest(plain.ids, positions),
        "scored_sha256": None if scored is None else scored_digest(scored),
        **changes,
    }
    return Windows(plain.ids, replace(plain.identity, **told), positions, scored)


@pytest.mark.parametrize("positions", [POSITIONS, None])
@pytest.mark.parametrize("scored", [SCORED, None])
def test_they_come_back_as_they_were_saved(tmp_path, positions, scored):
    if positions is None and scored:
        scored = [[False, True, True, False, True], [False, False, False, True, True]]
    windows = windows_of(positions, scored, examples={"shape": "chat", "taken": 3} if scored else None)
    windows.save(tmp_path / "windows.safetensors")
    again = Windows.load(tmp_path / "windows.safetensors")
    assert again.identity == windows.identity and torch.equal(again.ids, windows.ids)
    for found, wanted in ((again.positions, windows.positions), (again.scored, windows.scored)):
        assert (found is None) == (wanted is None) and (found is None or torch.equal(found, wanted))
    with safe_open(tmp_path / "windows.safetensors", "pt") as file:
        assert set(file.keys()) == {"ids"} | ({"positions"} if positions else set()) | ({"scored"} if scored else set())


def test_what_a_running_text_has_not_is_not_written(tmp_path):
    windows = windows_of(None, None)
    windows.save(tmp_path / "windows.safetensors")
    with safe_open(tmp_path / "windows.safetensors", "pt") as file:
        told = json.loads(file.metadata()["windows"])
    assert told == windows.identity.content() and not {"scored_sha256", "examples"} & told.keys()


def test_predicted_tokens_are_the_scored_ones():
    assert windows_of().predicted_tokens == 5
    assert windows_of(scored=None).predicted_tokens == 8


def test_positions_are_in_the_digest_and_a_running_text_s_stays_what_it_was():
    ids = torch.tensor([[1, 2], [3, 256]], dtype=torch.int32)
    plain = ids_digest(ids)
    positions = torch.tensor([[0, 1], [0, 0]], dtype=torch.int32)
    assert len({plain, ids_digest(ids, positions), ids_digest(ids, positions * 0)}) == 3


def test_first_windows_keep_their_share():
    cut = first_windows(windows_of(), 1)
    assert cut.positions.tolist() == POSITIONS[:1] and cut.scored.tolist() == SCORED[:1]
    assert cut.identity.ids_sha256 == ids_digest(cut.ids, cut.positions)
    assert cut.scored_sha256 == scored_digest(cut.scored)


@pytest.mark.parametrize(
    ("positions", "scored", "changes", "told"),
    [
        ([[1, 2, 3, 4, 5], POSITIONS[1]], SCORED, {}, "do not count documents"),
        ([[0, 1, 3, 4, 5], POSITIONS[1]], SCORED, {}, "do not count documents"),
        ([[0, 1, 2, -1, 0], POSITIONS[1]], SCORED, {}, "do not count documents"),
        (POSITIONS, [[True] * 5, SCORED[1]], {}, "first token of a document is scored"),
        (None, [[True] * 5, SCORED[1]], {}, "first token of a document is scored"),
        (POSITIONS, SCORED, {"scored_sha256": "0" * 64}, "not those that it was written with"),
        (POSITIONS, SCORED, {"scored_sha256": None}, "not those that it was written with"),
        (POSITIONS, None, {"scored_sha256": "0" * 64}, "not those that it was written with"),
        (POSITIONS, SCORED, {"ids_sha256": "0" * 64}, "not those that it was written with"),
        (POSITIONS, SCORED, {"examples": [3]}, "does not say what it was cut from"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, positions, scored, changes, told):
    windows_of(positions, scored, **changes).save(tmp_path / "windows.safetensors")
    with pytest.raises(DataError, match=told):
        Windows.load(tmp_path / "windows.safetensors")


def test_another_byte_of_any_tensor_is_noticed(tmp_path):
    file = tmp_path / "windows.safetensors"
    windows_of().save(file)
    whole = file.read_bytes()
    for back in range(1, 2 * 40 + 10 + 1):
        content = bytearray(whole)
        content[-back] ^= 1
        file.write_bytes(content)
        with pytest.raises(DataError):
            Windows.load(file)


@pytest.mark.parametrize(("positions", "scored"), [(POSITIONS, None), (None, SCORED)])
def test_perplexity_takes_no_examples(tmp_path, positions, scored):
    model = open_checkpoint(save_dense(tmp_path / "dense"))
    passage = Passage(model, windows_of(positions, scored), Compute(torch.device("cpu"), torch.float32))
    with pytest.raises(DataError, match="perplexity takes every token of a running text"):
        Scoring(passage, tmp_path / "journal", passage.origin(None).record, "stage A")
