"""Candidates that share their beginnings against each of them alone, by the evaluation of stage A; kills; memory."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cut_model import cut, random_windows, save_dense
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.choosing import measure
from mistral_prune_lora.choosing.candidates import blocks, one_more, running, splits
from mistral_prune_lora.choosing.choose import choose
from mistral_prune_lora.choosing.measure import DENSE, Measurement
from mistral_prune_lora.choosing.settings import ChoiceSettings
from mistral_prune_lora.choosing.tree import Tree
from mistral_prune_lora.errors import DataError, NumberError, PipelineError
from mistral_prune_lora.evaluation.scoring import DenseAnswers
from mistral_prune_lora.evaluation.stages import evaluate_stages
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.pruning.importance import angular_distances, last_token_states
from mistral_prune_lora.sizes import parse_size
from mistral_prune_lora.streaming.backbone import Backbone
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.streaming.passage import Passage

WINDOWS = random_windows(5, 24)
EVERY_BLOCK = blocks(8, 3, keep_last_layer=True)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("choosing") / "dense")


def compute(dtype=torch.float32, **changes):
    return Compute(torch.device("cpu"), dtype, 2, **changes)


def measurement(dense, folder, how=None, windows=WINDOWS, **changes):
    return Measurement(Passage(open_checkpoint(dense), windows, how or compute()), Path(folder) / "journal", **changes)


def measured(dense, folder, candidates, how=None, **changes):
    with measurement(dense, folder, how) as held:
        return held.measure(candidates, words="test", **changes)


def alone(dense, folder, missing, how):
    """What the evaluation finds of A without some layers, beside the dense model."""
    answers = folder / "dense.hidden"
    work = {"work_dir": folder / "work"}
    if not answers.exists():
        list(evaluate_stages(Subject.open(dense), ["FULL"], WINDOWS, how, final_hidden=answers, **work))
    a, _ = cut(dense, Layout(8, (), missing), folder / "-".join(map(str, missing)), torch.bfloat16)
    told = DenseAnswers(open_checkpoint(dense), answers)
    (result,) = evaluate_stages(Subject.open(a), ["A"], WINDOWS, how, dense=told, **work)
    return result.scores


def same(first, second):
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in vars(first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_candidate_has_the_bits_that_it_has_alone(dense, tmp_path, dtype):
    how = compute(dtype)
    ways = [*EVERY_BLOCK[::2], (1, 3, 6), (7,)]
    found = measured(dense, tmp_path, ways, how).scores
    for missing in ways:
        assert same(found[missing], alone(dense, tmp_path, missing, how))
    assert not found[DENSE].kl.any() and (found[DENSE].agree == 23).all()


def test_each_distinct_beginning_is_run_once_and_each_layer_read_once(dense, tmp_path, monkeypatch):
    """30 layers, 8 of them dropped, the last kept: 253 layer passes instead of 484, beside the dense model's 30."""
    every = blocks(30, 8, keep_last_layer=True)
    tree = Tree.of([running(30, missing) for missing in (DENSE, *every)])
    assert (len(every), tree.passes, sum(len(running(30, missing)) for missing in every)) == (22, 253 + 30, 484)
    assert len(blocks(30, 7, keep_last_layer=True)) == 23
    runs, read, run, build = [], [], Backbone.__call__, Backbone._build
    monkeypatch.setattr(Backbone, "__call__", lambda *a, **k: (runs.append(len(a[1])), run(*a, **k))[1])
    monkeypatch.setattr(Backbone, "_build", lambda *a: (read.extend(s.index for s in a[1]), build(*a))[1])
    found = measured(dense, tmp_path, EVERY_BLOCK)
    tree = Tree.of([running(8, missing) for missing in (DENSE, *EVERY_BLOCK)])
    assert found.passes == tree.passes == 8 + sum(5 - start for start in range(5))
    assert sum(runs) == tree.passes * len(WINDOWS) and read == list(range(8))


def test_no_more_is_held_than_is_counted(dense, tmp_path, monkeypatch):
    """The hidden states of all live branches at once, on the way through a tree with forks everywhere."""
    ways, most, run = [(1, 3), (1, 4), (5,), (0, 6, 7)], [], measure.Walk._run

    def watching(self, number, batch, held):
        leaving = run(self, number, batch, held)
        most.append(len(held) + 1)
        return leaving

    monkeypatch.setattr(measure.Walk, "_run", watching)
    with measurement(dense, tmp_path, windows=random_windows(2, 16)) as held:
        held.measure(ways, words="test")
    assert max(most) == Tree.of([running(8, missing) for missing in (DENSE, *ways)]).most_alive


def test_less_memory_takes_more_rounds_and_gives_the_same_bits(dense, tmp_path):
    whole = measured(dense, tmp_path / "a", EVERY_BLOCK, block=3)
    with pytest.raises(PipelineError, match="--max_memory") as caught:
        measured(dense, tmp_path / "b", EVERY_BLOCK, compute(max_memory=1_000_000))
    # What the error asks for is rounded, and suffices for one batch.
    enough = parse_size(str(caught.value).split("Allow ")[1].split(" ")[0]) + 10_000
    with measurement(dense, tmp_path / "b", compute(max_memory=enough)) as held:
        parts = held.measure(EVERY_BLOCK, words="test", block=3)
        assert [entry["count"] for entry in held._journal.entries] == [2, 2, 1]
    assert all(same(parts.scores[missing], whole.scores[missing]) for missing in whole.scores)
    assert parts.proxies.last_token == whole.proxies.last_token


def test_a_killed_measurement_goes_on_with_the_same_bits(dense, tmp_path):
    settings = ChoiceSettings(3, race=2)
    with measurement(dense, tmp_path / "whole", race=2) as held:
        expected = choose(held, settings).table
    (tmp_path / "killed").mkdir()
    rounds, run = [], Measurement._round

    def second_round(self, first, *given):
        if first:
            raise KeyboardInterrupt
        return run(self, first, *given)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Measurement, "_round", second_round)
        with measurement(dense, tmp_path / "killed", race=2) as held:
            choose(held, settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measurement, "_round", lambda *a: (rounds.append(a[1]), run(*a))[1])
        with measurement(dense, tmp_path / "killed", race=2) as held:
            assert choose(held, settings).table.equals(expected)
    assert rounds[:2] == [2, 4]


def test_the_proxies_are_those_of_the_ranking_and_of_transformers_own_states(dense, tmp_path):
    table = choose_table(dense, tmp_path, ChoiceSettings(3))
    states = last_token_states(dense, WINDOWS.ids, beside=tmp_path / "x.csv", compute=compute())
    ranking = angular_distances(states, 3).set_index("start").angular_distance
    rows = table[table.kind == "block"]
    starts = rows.dropped.str.split().str[0].astype(int)
    assert rows.angular_distance.to_numpy() == pytest.approx(ranking[starts].to_numpy(), rel=1e-9)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    last = []
    model.model.norm.register_forward_pre_hook(lambda norm, inputs: last.append(inputs[0]))
    with torch.inference_mode():
        hidden = [*model(WINDOWS.ids.long(), output_hidden_states=True).hidden_states[:-1], *last]
    cosines = [torch.cosine_similarity(a, b, dim=-1).double().mean().item() for a, b in itertools.pairwise(hidden)]
    expected = [sum(1 - cosines[layer] for layer in range(start, start + 3)) for start in starts]
    assert rows.block_influence.to_numpy() == pytest.approx(np.array(expected), rel=1e-5)


def choose_table(dense, folder, settings):
    with measurement(dense, folder, race=settings.race) as held:
        return choose(held, settings).table


def test_greedy_drops_what_hurts_least_at_each_step_and_splits_are_told_by_size(dense, tmp_path):
    with measurement(dense, tmp_path) as held:
        choice = choose(held, ChoiceSettings(3, method="greedy", splits="all", b_sizes=(2, 1)))
    dropped = ()
    for step in range(1, 4):
        scores = measured(dense, tmp_path / f"step{step}", one_more(8, dropped, keep_last_layer=True)).scores
        dropped = min((m for m in scores if m), key=lambda m: scores[m].kl.sum())
    assert choice.dropped == dropped and choice.proxies == {}
    ways = splits(dropped, (2,), every=True)
    scores = measured(dense, tmp_path / "splits", [c for _, c in ways]).scores
    assert (choice.b, choice.c) == min(ways, key=lambda way: scores[way[1]].kl.sum())
    chosen = choice.table[choice.table.kind.str.startswith("split") & choice.table.chosen.astype(bool)]
    assert chosen.kind.tolist() == ["split 2+1"]
    assert choice.table.kind.value_counts()["split 1+2"] == 3


def test_a_number_that_is_none_is_named_and_examples_are_refused(dense, tmp_path):
    spoilt = shutil.copytree(dense, tmp_path / "spoilt")
    content = load_file(spoilt / "model.safetensors")
    content["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(content, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumberError, match=r"tensor model\.layers\.2\.mlp\.up_proj\.weight holds NaN"):
        measured(spoilt, tmp_path, EVERY_BLOCK)
    examples = replace(WINDOWS, positions=torch.arange(24, dtype=torch.int32).repeat(5, 1))
    with pytest.raises(DataError, match="running text"):
        measurement(dense, tmp_path, windows=examples)
