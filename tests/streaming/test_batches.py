"""Batches on their way to the device and back; here the device is the CPU, on which nothing has to be copied."""

import threading
from dataclasses import replace

import pytest
import torch

from mistral_prune_lora.streaming.batches import DelayedStore, stream_batches
from mistral_prune_lora.streaming.compute import Compute

COMPUTE = Compute(torch.device("cpu"), torch.float32, 3)


@pytest.mark.parametrize("overlap", [True, False])
def test_batch_k_is_always_the_same_windows(overlap):
    asked, compute = [], replace(COMPUTE, overlap=overlap)

    def read(first, last):
        asked.append((first, last))
        return torch.arange(first, last).float()

    found = list(stream_batches(read, [0, 2, 3], 10, compute))
    assert asked == [(0, 3), (6, 9), (9, 10)]
    assert [(batch, windows.tolist()) for batch, windows in found] == [(0, [0, 1, 2]), (2, [6, 7, 8]), (3, [9])]
    assert list(stream_batches(read, [], 10, compute)) == []


def test_the_next_batch_is_fetched_while_one_is_computed():
    fetched = threading.Event()

    def read(first, last):
        if first:
            fetched.set()
        return torch.zeros(last - first)

    stream = stream_batches(read, [0, 1], 6, COMPUTE)
    next(stream)
    assert fetched.wait(60)
    assert next(stream)[0] == 1


def test_without_overlap_a_batch_is_read_when_it_is_asked_for():
    asked = []

    def read(first, last):
        asked.append(first)
        return torch.zeros(last - first)

    stream = stream_batches(read, [0, 1], 6, replace(COMPUTE, overlap=False))
    next(stream)
    assert asked == [0]
    next(stream)
    assert asked == [0, 3]


def test_what_fails_in_reading_fails_where_it_is_used():
    def read(first, last):
        if first:
            raise OSError("the disk is gone")
        return torch.zeros(last - first)

    stream = stream_batches(read, [0, 1], 6, COMPUTE)
    assert next(stream)[0] == 0
    try:
        next(stream)
    except OSError as error:
        assert str(error) == "the disk is gone"
    else:
        raise AssertionError("nothing was raised")


def test_a_store_hands_on_every_batch_in_order():
    kept = []
    store = DelayedStore(lambda batch, hidden: kept.append((batch, hidden.item())), COMPUTE)
    for batch in (4, 0, 2):
        store.put(batch, torch.tensor(float(batch)))
    store.flush()
    assert kept == [(4, 4.0), (0, 0.0), (2, 2.0)]
