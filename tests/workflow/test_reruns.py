"""What given files, code and lost files make run again: the table of README, row by row, by snakemake for real."""

import os
import shutil

import pytest
from workflow_project import ROOT, Project

AFTER_B = {"merge_B_3to4": 1, "segment": 2, "perplexity": 2, "summary": 1, "plot_perplexity": 1}


def put_link(adapters):
    """B becomes a link to another run, whose files are older than anything that was made."""
    shutil.rmtree(adapters / "B")
    (adapters / "B").symlink_to("other_B")
    age(adapters / "other_B")


def put_older_files(adapters):
    """Another run's files lie where B's were, with their old times, as after `cp -p`."""
    age(adapters / "other_B")
    for file in (adapters / "other_B").iterdir():
        shutil.copy2(file, adapters / "B" / file.name)


def without_tables(jobs):
    """Snakemake may draw the figure again though the table was not made again, which costs nothing."""
    return {rule: count for rule, count in jobs.items() if rule not in ("summary", "plot_perplexity")}


def age(folder):
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))


@pytest.mark.parametrize("swap", [put_link, put_older_files])
def test_other_content_counts_whatever_its_date(finished, swap):
    shutil.copytree(finished.folder / "adapters/B", finished.folder / "adapters/B_before")
    swap(finished.folder / "adapters")
    assert finished.planned() == AFTER_B
    # What was made of the former content is still there.
    finished.config["experiments"]["tiny"]["adapters"]["B"] = "adapters/B_before"
    assert "merge_B_3to4" in finished.planned()  # its input has another name, and makes the same bytes


def test_a_touch_or_another_spelling_runs_nothing(finished):
    for file in (*(finished.folder / "adapters/B").iterdir(), *(finished.folder / "dense").iterdir()):
        file.touch()
    (finished.folder / "corpus.txt").touch()
    finished.config["models"]["dense"]["path"] = f"{finished.folder}/dense/"
    finished.config["experiments"]["tiny"]["adapters"]["B"] = "./adapters/../adapters/B"
    finished.config["datasets"]["corpus"]["text_files"] = [str(finished.folder / "corpus.txt")]
    assert finished.planned() == {}


def test_a_lost_link_is_put_back(finished):
    lost = finished.path("merged/B_merged/layer_003.safetensors")
    lost.unlink()
    assert finished.jobs() == {} and lost.exists()


def test_what_is_made_again_with_the_same_bytes_measures_nothing(finished, tmp_path):
    copied = tmp_path / "workflow"
    for name in ("rules", "workflow_scripts", "lib", "report", "envs", "profiles"):
        shutil.copytree(ROOT / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "Snakefile", copied / "Snakefile")
    project = Project(finished.folder, finished.config, copied)
    module = copied / "lib/mistral_prune_lora/merging/arithmetic.py"
    module.write_text(module.read_text() + "\n# A remark.\n")
    assert project.planned() == {}
    # Records name the files that were read, and this is a copy of the project where they were written: all anew, once.
    module.write_text(module.read_text() + "\n_NOBODY_USES_THIS = 1\n")
    assert project.jobs()["merge_B_3to4"] == 1
    module.write_text(module.read_text() + "\n_NOR_THIS = 1\n")
    assert without_tables(project.jobs()) == {"merge_A": 1, "merge_B_3to4": 1, "merge_C_5to6": 1}
    assert project.planned() == {}
    # A lost file of the merge itself, which everything is linked to.
    (lost,) = project.folder.glob("results/shared/merged/B-*/B_merged/layer_003.safetensors")
    lost.unlink()
    assert without_tables(project.jobs()) == {"merge_B_3to4": 1}
    assert lost.read_bytes() == project.path("merged/B_merged/layer_003.safetensors").read_bytes()


def test_a_flipped_bit_in_a_part_is_not_measured(finished):
    weights = finished.path("merged/B_merged/layer_003.safetensors")
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)  # in place, so that it is the one that is shared
    assert finished.planned() == {}
    finished.config["experiments"]["tiny"]["perplexity"]["batch_size"] = 3
    printed = finished.snakemake("results/tiny/ppl/corpus/merged.AB.json", succeeds=False)
    assert "is not what merge.json says was written" in printed and "layer_003.safetensors" in printed


def test_an_equal_experiment_costs_its_rows_and_a_sweep_what_differs(finished):
    experiments = finished.config["experiments"]
    experiments["again"] = {"like": "tiny"}
    experiments["sizes"] = {"like": "tiny", "sweep": {"perplexity.batch_size": [4, 2]}}
    assert finished.planned() == {
        "segment": 6, "dense_perplexity": 1, "perplexity": 6, "summary": 1, "plot_perplexity": 1, "beside": 1,
    }  # fmt: skip
    del experiments["sizes"]
    assert finished.jobs() == {"summary": 1, "plot_perplexity": 1}
    assert (finished.folder / "results/again/merged/A_merged/model.safetensors").samefile(
        finished.path("merged/A_merged/model.safetensors")
    )
    assert "again" in (finished.folder / "results/summary.csv").read_text()


def test_tidy_leaves_what_is_asked_for_or_linked_to(finished):
    finished.config["experiments"]["tiny"]["adapters"]["B"] = "adapters/other_B"
    printed = finished.snakemake("tidy")
    # The merge of the former B is linked to from the experiment's folder; activations are linked to by nobody.
    assert "B003-004_AB" in printed and "merged/B-" not in printed and "merged/A-" not in printed
    finished.config["experiments"]["tiny"]["adapters"]["B"] = "adapters/B"
    assert finished.planned() == {}
