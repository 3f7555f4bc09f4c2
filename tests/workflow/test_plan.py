"""What an experiment is made of, without Snakemake: names follow from content and settings, equal work has one name."""

import copy
import shutil

import pytest
import yaml
from workflow_project import ROOT

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.workflow.artefacts import in_a_name
from mistral_prune_lora.workflow.configuration import check_config
from mistral_prune_lora.workflow.content import Content, one_path, short_key
from mistral_prune_lora.workflow.plan import Plan


@pytest.fixture
def planned(project, monkeypatch):
    """Plans the project's configuration as it is at the moment."""
    monkeypatch.chdir(project.folder)
    memory = project.folder / "digests.json"

    def plan() -> Plan:
        config = check_config(copy.deepcopy(project.config), ROOT / "rules/config.schema.yaml")
        content = Content(memory)
        made = Plan.of(config, content)
        content.keep()
        return made

    return plan


def names(plan: Plan) -> dict[str, set[str]]:
    return {
        kind: set(getattr(plan, kind)) for kind in ("prunings", "windows", "trainings", "merges", "segments", "scores")
    }


def test_an_equal_experiment_adds_nothing_and_another_layout_its_own(project, planned):
    before = names(planned())
    experiments = project.config["experiments"]
    experiments["again"] = copy.deepcopy(experiments["tiny"])
    assert names(planned()) == before
    experiments["again"]["layers"] = {"B": [3], "C": [4]}
    after = names(planned())
    assert all(before[kind] <= after[kind] for kind in before)
    assert len(after["prunings"]) == 2 and len(after["merges"]) == 6
    dense = [name for name in after["scores"] if name.startswith("dense")]
    assert after["windows"] == before["windows"] and len(dense) == 1


def test_a_seed_is_another_training_of_the_same_windows_and_teacher(project, planned):
    experiment = project.config["experiments"]["tiny"]
    experiment["adapters"] = {}
    experiment["distill"] = {"dataset": "corpus", "seqlen": 16, "share_teacher_states": True}
    other = project.config["experiments"]["other"] = copy.deepcopy(experiment)
    other["distill"]["seed"] = 1
    plan = planned()
    assert len(plan.trainings) == 6 and len(plan.teachers) == 1 and len(plan.windows) == 2


def test_what_a_name_follows_from(project, planned):
    """One bit of an adapter changes the names of its merge and of what is measured on it, and of nothing before it."""
    before = planned()
    weights = project.folder / "adapters/B/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    after = planned()
    tiny = [plan.experiments["tiny"] for plan in (before, after)]
    assert {part: tiny[0].merge(part).name == tiny[1].merge(part).name for part in "ABC"} == {
        "A": True, "B": False, "C": True,
    }  # fmt: skip
    scores = [experiment.measuring.scores() for experiment in tiny]
    changed = {which[1:] for which in scores[0] if scores[0][which].name != scores[1][which].name}
    assert changed == {("merged", "AB"), ("merged", "FULL")}


def test_every_file_of_a_run_is_in_the_plan(first_run, monkeypatch):
    """So that each is a target; what is not is hidden, of the tokenizer, or activations, which may be deleted."""
    project = first_run[0]
    monkeypatch.chdir(project.folder)
    config = check_config(
        yaml.safe_load((project.folder / "config.yaml").read_text()), ROOT / "rules/config.schema.yaml"
    )
    plan = Plan.of(config, Content(project.folder.parent / "digests.json"))
    listed = {*plan.files, *plan.experiments["tiny"].files}
    weights = {str(file.relative_to(project.folder)) for file in project.folder.glob("results/**/*.safetensors")}
    assert {file for file in weights if "/activations/" not in file} <= listed
    assert all((project.folder / file).is_file() for file in listed)


def test_content_is_known_by_its_file_and_read_again_when_that_changes(tmp_path, monkeypatch):
    file, memory = tmp_path / "a", tmp_path / "memory/digests.json"
    file.write_text("one")
    content = Content(memory)
    first = content.sha256(file)
    content.keep()
    reads = []
    monkeypatch.setattr("mistral_prune_lora.workflow.content.file_sha256", lambda path: reads.append(path) or "new")
    again = Content(memory)
    assert again.sha256(file) == first and not reads
    (tmp_path / "link").symlink_to(file)
    assert again.sha256(tmp_path / "link") == first and not reads
    file.touch()
    assert again.sha256(file) == "new" and len(reads) == 1
    memory.write_text("{ no JSON")
    assert Content(memory).sha256(file) == "new"
    with pytest.raises(DataError, match="cannot be read"):
        again.sha256(tmp_path / "nothing")


def test_what_was_forgotten_is_not_kept(tmp_path):
    memory = tmp_path / "digests.json"
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        content = Content(memory)
        content.sha256(tmp_path / name)
        content.keep()
    shutil.move(tmp_path / "a", tmp_path / "c")
    content = Content(memory)
    content.sha256(tmp_path / "c")
    content.keep()
    assert {key.rsplit("/", 1)[1] for key in Content(memory)._known} == {"b", "c"}


def test_one_path_has_one_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {one_path(path) for path in ("./dense", "dense/", "x/../dense", tmp_path / "dense")} == {"dense"}
    assert one_path("../elsewhere") == str(tmp_path.parent / "elsewhere")


def test_keys_and_spans():
    assert short_key({"a": 1, "b": (1, 2)}) == short_key({"b": [1, 2], "a": 1}) != short_key({"a": 2, "b": [1, 2]})
    assert [in_a_name(layers) for layers in ((), (3,), (3, 4, 5, 9))] == ["none", "3", "3to5_9"]


def test_an_adapter_for_all_stages_is_trained_with_all_layers(project, planned):
    experiment = project.config["experiments"]["tiny"]
    experiment["adapters"] = {"A": "train", "B": "train", "C": "train"}
    experiment["distill"] = {"dataset": "corpus", "seqlen": 16, "share_teacher_states": True}
    former = planned().trainings
    experiment["restore"] = "shared"
    shared = next(made for made in planned().trainings.values() if made.part == "A")
    assert shared.name not in former and len(shared.bundles) == 2 and shared.active == 8 and shared.adapted == 4
    assert shared.settings["stages"] == {"A": 1, "AB": 1, "FULL": 1}
    experiment["distill"]["stages"] = {"A": 2, "FULL": 1}
    assert shared.name not in planned().trainings
    experiment["restore"] = "sequential"
    assert planned().trainings.keys() == former.keys(), "the weights of stages are nobody's business then"


def test_closed_forms_are_told_apart_by_what_decides_their_bytes(project, planned):
    experiment = project.config["experiments"]["tiny"]
    experiment["adapters"] = {"A": "closed-form", "B": "train", "C": "train"}
    experiment["distill"] = {"dataset": "corpus", "seqlen": 16, "share_teacher_states": True}
    plain = planned()
    assert [made.part for made in plain.closed_forms.values()] == ["A"]
    experiment["distill"]["start"] = "closed-form"
    started = planned()
    # A's is the same, B and C have theirs; each of them hangs on the merges before it.
    assert plain.closed_forms.keys() < started.closed_forms.keys() and len(started.closed_forms) == 3
    assert not plain.trainings.keys() & started.trainings.keys()
    for key, value in (
        ("ridge", 0.1),
        ("rank", 3),
        ("layers_behind", 1),
        ("token_weights", "equal"),
        ("datasets", {"corpus": 2}),
    ):
        experiment["closed_form"] = {key: value}
        assert not started.closed_forms.keys() & planned().closed_forms.keys(), key


def test_every_job_bears_a_name_of_the_plan(project, planned):
    experiment = project.config["experiments"]["tiny"]
    experiment["adapters"] = {"A": "closed-form", "B": "train", "C": "train"}
    experiment["distill"] = {"dataset": "corpus", "seqlen": 16, "share_teacher_states": True}
    experiment["distill"]["share_prefix_states"] = True
    experiment["choose"] = {"dataset": "corpus", "drop": 4, "seqlen": 16, "windows": 2}
    plan = planned()
    kinds = ("prunings", "windows", "teachers", "prefixes", "trainings", "closed_forms", "merges", "segments", "scores")
    for kind in (*kinds, "choices", "experiments"):
        made = getattr(plan, kind)
        names = {artefact.name for artefact in made.values()}
        assert names and names <= set(plan.names), kind
        assert not [name for name in names if "." in name], "what follows a dot tells jobs for one artefact apart"
    assert "dense" in plan.names, "of the job that fetches the model"


def test_closed_forms_share_the_dense_model_s_way(project, planned):
    experiment = project.config["experiments"]["tiny"]
    experiment["closed_form"] = {"datasets": {"corpus": 1}, "seqlen": 16, "windows": 4, "held_out": 2}

    def read(**changes) -> dict[str, list[list[int]]]:
        experiment.update(changes)
        plan = planned()
        assert {run.name for made in plan.closed_forms.values() for run in made.stations[0]} <= plan.segments.keys()
        return {
            made.part: [[layer for run in station.way for layer in run.layers] for station in made.stations[0]]
            for made in plan.closed_forms.values()
        }

    # B is 3 and 4, C is 5 and 6: corrected are layers 2 and 4, both to what enters layer 7.
    dense = {end: list(range(end)) for end in range(8)}
    exact = {"A": "closed-form", "B": "closed-form", "C": None}
    assert read(restore="exact", adapters=exact) == {"A": [dense[2], dense[7]], "B": [dense[4], dense[7]]}
    assert len([name for name in planned().segments if name.startswith("dense")]) == 3
    # What enters B's and C's last layers is no longer the dense model's where A and B are healed.
    sequential = {part: "closed-form" for part in "ABC"}
    assert read(restore="sequential", adapters=sequential) == {
        "A": [dense[2], dense[7]],
        "B": [dense[7]],
        "C": [dense[7]],
    }


def test_a_closed_form_s_stations_do_not_depend_on_other_parts(project, planned):
    experiment = project.config["experiments"]["tiny"]
    experiment["closed_form"] = {"datasets": {"corpus": 1}, "seqlen": 16, "windows": 4, "held_out": 2}
    found = []
    for b in ("closed-form", "adapters/B"):
        for behind in (0, 1):
            experiment["closed_form"]["layers_behind"] = behind
            experiment["adapters"] = {"A": "closed-form", "B": b, "C": "adapters/C"}
            made = next(each for each in planned().closed_forms.values() if each.part == "A")
            found.append([run.name for run in made.stations[0]])
    assert len({tuple(each) for each in found}) == 1
