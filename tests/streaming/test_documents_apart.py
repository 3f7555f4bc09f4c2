"""Documents beside each other in one window: each gets the hidden states that it gets alone, in transformers."""

from dataclasses import replace

import pytest
import torch
from cut_model import random_windows, save_dense
from transformers import AutoModelForCausalLM

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.distillation.teacher_states import teacher_states
from mistral_prune_lora.models.config import model_config
from mistral_prune_lora.storage.activations import ActivationReader
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.streaming.memory import working_bytes
from mistral_prune_lora.text.windows import Windows, ids_digest

CPU = torch.device("cpu")
# Lengths of the documents of each window: packed ones, padding on either side, single tokens, one that fills it.
ROWS = ((9, 4, 11), (7, 17), (17, 7), (1, 1, 20, 1, 1), (24,))


def documents(rows) -> Windows:
    windows = random_windows(len(rows), sum(rows[0]))
    positions = torch.stack([torch.cat([torch.arange(n, dtype=torch.int32) for n in row]) for row in rows])
    digest = ids_digest(windows.ids, positions)
    return Windows(windows.ids, replace(windows.identity, ids_sha256=digest), positions)


FAMILIES = [
    ("mistral", {}),
    ("mistral", {"sliding_window": 5}),
    ("llama", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 4}),
    ("qwen3", {}),
]


@torch.inference_mode()
@pytest.mark.parametrize(("family", "config"), FAMILIES, ids=lambda value: str(value))
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_document_has_the_states_that_it_has_alone(tmp_path, family, config, batch_size):
    dense = save_dense(tmp_path / "dense", family=family, dtype=torch.float32, **config)
    windows = documents(ROWS)
    teacher_states(dense, windows, tmp_path / "states", compute=Compute(CPU, torch.float32, batch_size))
    found = ActivationReader(tmp_path / "states").read(0, len(windows))
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    for row, lengths in enumerate(ROWS):
        alone = [model.model(ids[None].long()).last_hidden_state[0] for ids in windows.ids[row].split(list(lengths))]
        torch.testing.assert_close(found[row], torch.cat(alone), rtol=0, atol=2e-5)
    together = model.model(windows.ids[:1].long()).last_hidden_state[0]
    assert not torch.allclose(found[0], together, atol=1e-2), "nothing would be told apart here"


def test_layers_in_groups_keep_documents_apart_too(tmp_path):
    dense = save_dense(tmp_path / "dense", dtype=torch.float32)
    windows, one = documents(ROWS), Compute(CPU, torch.float32, 2)
    teacher_states(dense, windows, tmp_path / "whole", compute=one)
    checkpoint = open_checkpoint(dense)
    config = model_config(checkpoint)
    layer = sum(entry.nbytes for entry in checkpoint.layer(0).values())
    embedding = config.vocab_size * config.hidden_size * 4
    beside = working_bytes(one, config, 24, documents_apart=True)
    small = replace(one, max_memory=embedding + beside + 2 * layer)
    teacher_states(dense, windows, tmp_path / "groups", compute=small)
    whole, groups = (ActivationReader(tmp_path / name).read(0, len(windows)) for name in ("whole", "groups"))
    assert torch.equal(whole, groups)


def test_every_window_s_mask_is_counted(tmp_path):
    config = model_config(open_checkpoint(save_dense(tmp_path / "dense")))
    plain, apart = (working_bytes(Compute(CPU, torch.float32, 3), config, 24, documents_apart=a) for a in (False, True))
    assert apart - plain == 3 * 24 * 24
