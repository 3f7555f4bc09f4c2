"""The order of candidates, what a race drops, and what is refused before anything is run."""

import numpy as np
import pytest

from mistral_prune_lora.choosing.candidates import blocks, splits
from mistral_prune_lora.choosing.ranking import agreement, ranked, survivors
from mistral_prune_lora.choosing.settings import ChoiceSettings
from mistral_prune_lora.choosing.tree import Tree
from mistral_prune_lora.errors import LayoutError
from mistral_prune_lora.results.statistics import WindowScores

HARD = np.array([10.0, 30.0, 20.0, 40.0, 25.0, 15.0])  # windows that are hard for all of them


def scores(kl, nll=50.0):
    return WindowScores(np.full(len(kl), nll), np.ones(len(kl)), np.asarray(kl), np.ones(len(kl)))


def test_a_race_drops_what_is_surely_worse_and_nothing_else():
    noise = np.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    found = {(0,): scores(HARD), (1,): scores(HARD + 8 + noise), (2,): scores(HARD + noise * 9 + 1)}
    assert survivors(found, 10) == [(0,), (2,)]
    # One window has no interval, so it drops nothing.
    assert len(survivors({m: scores(s.kl[:1]) for m, s in found.items()}, 10)) == 3


def test_what_a_race_has_dropped_stands_behind_and_is_compared_on_its_own_windows():
    found = {(0,): scores(HARD + 1), (1,): scores(HARD[:2] + 3), (2,): scores(HARD)}
    table = ranked(found, 10)
    assert table.missing.tolist() == [(2,), (0,), (1,)] and table["windows"].tolist() == [6, 6, 2]
    assert table.kl_above_best.tolist() == pytest.approx([0, 0.1, 0.3])
    assert table.kl_dense[0] == pytest.approx(HARD.mean() / 10)


def test_regret_is_what_the_choice_of_a_proxy_costs():
    found = {(i,): scores(HARD + [0, 2, 4, 6][i], nll=[50, 40, 60, 70][i]) for i in range(4)}
    table = ranked(found, 10)
    table["angular_distance"] = [0.4, 0.3, 0.2, 0.1]
    told = agreement(table)
    assert told["angular_distance"]["spearman"] == pytest.approx(-1)
    assert told["angular_distance"]["picks"] == [3] and told["angular_distance"]["regret"] == pytest.approx(0.6)
    assert told["ppl"]["picks"] == [1] and told["ppl"]["spearman"] == pytest.approx(0.8)


def test_ways_to_part_layers():
    assert splits((2, 5, 6), (1, 2), every=False) == [
        ((2,), (5, 6)), ((6,), (2, 5)), ((2, 5), (6,)), ((5, 6), (2,)),
    ]  # fmt: skip
    assert len(splits(tuple(range(8)), (4,), every=True)) == 70
    assert blocks(4, 3, keep_last_layer=False) == [(0, 1, 2), (1, 2, 3)]
    with pytest.raises(ValueError, match="ascending"):
        Tree.of([(0, 2, 1)])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (ChoiceSettings(8), "8 of 8 layers cannot be dropped"),
        (ChoiceSettings(4, b_sizes=(4,)), "B cannot have 4 of 4"),
        (ChoiceSettings(1, b_sizes=(1,)), "B cannot have 1 of 1"),
    ],
)
def test_what_cannot_be_chosen_is_refused(settings, told):
    with pytest.raises(LayoutError, match=told):
        settings.check(8)


def test_too_many_ways_are_refused():
    with pytest.raises(LayoutError, match="12870 ways"):
        ChoiceSettings(16, splits="all", b_sizes=(8,)).check(30)
    ChoiceSettings(1).check(8)
