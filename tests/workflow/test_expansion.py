"""`like` and `sweep`: whole experiments out of what they differ in."""

import copy
import re
from pathlib import Path

import pytest
import yaml

from mistral_prune_lora.workflow.configuration import ConfigError, baseline_of, check_config, check_files
from mistral_prune_lora.workflow.expansion import expand_experiments

SCHEMA = Path(__file__).parents[2] / "rules" / "config.schema.yaml"
BASE = {
    "model": "m",
    "layers": {"B": [1, 2], "C": [3]},
    "distill": {"dataset": "t", "seed": 0, "loss": {"kd_alpha": 0.5, "temperature": 2.0}},
    "perplexity": {"datasets": ["t"], "stages": ["A", "AB"]},
}


def config_of(**experiments):
    return {
        "models": {"m": {"hub": {"repo_id": "a/b", "revision": "0" * 40}, "num_layers": 8}},
        "datasets": {"t": {"dataset": "pydoc"}},
        "experiments": {name: copy.deepcopy(experiment) for name, experiment in experiments.items()},
    }


def expanded(**experiments):
    return expand_experiments(config_of(**experiments)).config["experiments"]


def faults(**experiments):
    with pytest.raises(ConfigError) as caught:
        expand_experiments(config_of(**experiments))
    return str(caught.value)


def test_an_experiment_like_another_takes_what_it_does_not_say_itself():
    own = {"like": "base", "distill": {"loss": {"temperature": 1.0}}, "perplexity": {"stages": ["FULL"]}}
    made = expanded(other=own, base=BASE)["other"]
    assert made["distill"] == {"dataset": "t", "seed": 0, "loss": {"kd_alpha": 0.5, "temperature": 1.0}}
    assert made["perplexity"] == {"datasets": ["t"], "stages": ["FULL"]}  # a list is replaced whole
    assert made["model"] == "m" and "like" not in made


def test_chains_go_all_the_way_and_share_nothing():
    config = config_of(
        base=BASE, b={"like": "base", "distill": {"seed": 1}}, c={"like": "b", "distill": {"windows": 2}}
    )
    before = copy.deepcopy(config)
    made = expand_experiments(config).config["experiments"]
    assert made["c"]["distill"] == {**BASE["distill"], "seed": 1, "windows": 2}
    made["c"]["distill"]["loss"]["kd_alpha"] = 9
    assert made["b"]["distill"]["loss"]["kd_alpha"] == made["base"]["distill"]["loss"]["kd_alpha"] == 0.5
    assert config == before and list(made) == ["base", "b", "c"]


def test_of_layers_and_pruned_an_experiment_s_own_takes_the_place_of_the_other():
    pruned = {"A": "x/A", "bundles": "x/bundles"}
    made = expanded(base=BASE, given={"like": "base", "pruned": pruned}, again={"like": "given", "layers": {"B": [7]}})
    assert made["given"]["pruned"] == pruned and "layers" not in made["given"]
    assert made["again"]["layers"] == {"B": [7]} and "pruned" not in made["again"]


def test_every_broken_like_is_told_at_once_and_a_circle_once():
    told = faults(
        base=BASE, a={"like": "bse"}, b={"like": "c"}, c={"like": "d"}, d={"like": "b"}, e={"like": "b"},
        f={"like": "f"}, g={"like": 3}, h={"like": "s"}, s={**BASE, "sweep": {"distill.seed": [0]}},
    )  # fmt: skip
    assert "experiments.a.like: 'bse' is not one of experiments: a, b, base, c" in told
    assert "experiments.b.like: goes round in a circle: b, c, d, b" in told
    assert "experiments.f.like: goes round in a circle: f, f" in told
    assert "experiments.g.like: 3 is not one of experiments" in told
    assert "experiments.h.like: 's' has a sweep" in told
    assert "5 mistakes" in told


def test_a_sweep_is_the_product_of_its_values_in_place_of_the_experiment():
    sweep = {"distill.seed": [0, 1], "distill.loss.temperature": [1, 2.0, 0.5]}
    expansion = expand_experiments(config_of(one=BASE, many={"like": "one", "sweep": sweep}, last=BASE))
    made = expansion.config["experiments"]
    assert list(made) == [
        "one", "many-seed0-temperature1", "many-seed0-temperature2", "many-seed0-temperature0p5",
        "many-seed1-temperature1", "many-seed1-temperature2", "many-seed1-temperature0p5", "last",
    ]  # fmt: skip
    chosen = made["many-seed1-temperature0p5"]
    assert chosen["distill"] == {**BASE["distill"], "seed": 1, "loss": {"kd_alpha": 0.5, "temperature": 0.5}}
    assert "sweep" not in chosen and chosen["layers"] == BASE["layers"]
    origin = expansion.sweeps["many-seed1-temperature0p5"]
    assert origin == ("many", {"distill.seed": 1, "distill.loss.temperature": 0.5})
    assert set(expansion.sweeps) == set(made) - {"one", "last"}
    check_config(expansion.config, SCHEMA)


@pytest.mark.parametrize(
    ("key", "values", "names"),
    [
        ("adapters.A", ["train", "given/A_lora"], ["Atrain", "A1"]),
        ("layers.B", [[1, 2], [2, 4]], ["B0", "B1"]),
        ("distill.windows", [None, 8], ["windowsnull", "windows8"]),
        ("distill.share_teacher_states", [True, False], ["share_teacher_statestrue", "share_teacher_statesfalse"]),
        ("distill.parts.A.learning_rate", [2e-5, 1e20, -0.5], ["learning_rate2e-05", "learning_rate1e20",
                                                               "learning_rate-0p5"]),
        ("perplexity.dtype", ["bf16", "x" * 99], ["dtypebf16", "dtype1"]),
        ("odd key.ö", [1], ["_1"]),
    ],
)  # fmt: skip
def test_names_say_the_value_or_its_place(key, values, names):
    made = expanded(x={**BASE, "sweep": {key: values}})
    assert list(made) == [f"x-{name}" for name in names]
    assert all(re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]*", name) for name in made)


def test_keys_with_one_last_word_are_told_apart_by_the_word_before():
    made = expanded(x={**BASE, "sweep": {"distill.seqlen": [8], "perplexity.seqlen": [16], "distill.seed": [1]}})
    assert list(made) == ["x-distill_seqlen8-perplexity_seqlen16-seed1"]


def test_every_broken_sweep_is_told_at_once():
    sweeps = {
        "a": {"distill.seed": []}, "b": {"distill.seed": 3, "distill.windows": "12"}, "c": [1], "d": {},
        "e": {"model.size": [1]}, "f": {"distill.seed": [2, 2.0]}, "g": {"distill.seed": list(range(1001))},
        "i": {"distill.seed": [1], "distill": [{}]},
    }  # fmt: skip
    told = faults(**{name: {**BASE, "sweep": sweep} for name, sweep in sweeps.items()}, h=BASE)
    assert "experiments.a.sweep.distill.seed: [] is not a list of at least one value" in told
    assert "experiments.b.sweep.distill.seed: 3 is not a list of at least one value" in told
    assert "experiments.b.sweep.distill.windows: '12' is not a list" in told
    assert "experiments.c.sweep: is not a mapping of dotted keys" in told
    assert "experiments.d.sweep: is not a mapping of dotted keys" in told
    assert "experiments.e.sweep.model.size: model is 'm' here, which holds no keys" in told
    assert "experiments.f.sweep: 2 experiments would be called 'f-seed2'" in told
    assert "experiments.g.sweep: stands for 1001 experiments" in told
    assert "experiments.i.sweep.distill.seed: distill is swept too" in told
    assert "9 mistakes" in told


@pytest.mark.parametrize("first", ["swept", "written"])
def test_a_made_name_that_another_experiment_has_is_refused(first):
    experiments = {"x-seed1": BASE, "x": {**BASE, "sweep": {"distill.seed": [1]}}}
    told = faults(**dict(sorted(experiments.items(), reverse=first == "swept")))
    assert "experiments.x.sweep: 2 experiments would be called 'x-seed1'" in told


def test_what_a_sweep_sets_is_checked_by_the_schema_under_the_made_name():
    config = expand_experiments(config_of(x={**BASE, "sweep": {"distill.sed": [0]}})).config
    with pytest.raises(ConfigError, match=r"experiments\.x-sed0\.distill\.sed: unknown key"):
        check_config(config, SCHEMA)


@pytest.mark.parametrize("config", [{}, {"experiments": None}, {"experiments": {"a": None, "b": {"like": "a"}}}])
def test_what_is_of_another_shape_is_left_to_the_schema(config):
    with pytest.raises(ConfigError, match=r"is a required property|is not of type"):
        check_config(expand_experiments(config).config, SCHEMA)


def test_a_baseline_is_one_of_the_experiments():
    config = config_of(a={**BASE, "baseline": "b"}, b=BASE, c={**BASE, "sweep": {"distill.seed": [0]}})
    config["baseline"] = "c-seed0"
    config = check_config(expand_experiments(config).config, SCHEMA)
    assert {name: baseline_of(config, name) for name in config["experiments"]} == {
        "a": "b", "b": "c-seed0", "c-seed0": None,
    }  # fmt: skip
    config["baseline"] = config["experiments"]["a"]["baseline"] = "c"
    with pytest.raises(ConfigError) as caught:
        check_config(config, SCHEMA)
    assert "  baseline: 'c' is not one of experiments: a, b, c-seed0" in str(caught.value)
    assert "experiments.a.baseline: 'c' is not one of experiments" in str(caught.value)


def test_an_experiment_that_stands_twice_is_a_mistake_in_whichever_file(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(yaml.safe_dump(config_of(a=BASE)))
    second.write_text("experiments:\n  a:\n    like: b\n  b: {}\n  a:\n    like: c\n")
    with pytest.raises(ConfigError, match=r"second\.yaml: line 5: the key 'a' stands twice"):
        check_files([first, second])
