"""The workflow as a module of another one, with several configurations, in another directory."""

import subprocess
import sys

import pandas as pd
import yaml
from workflow_project import ROOT

MODULE = f"""
configfile: "outer.yaml"

module compression:
    snakefile: "{ROOT}/Snakefile"
    config: config["compression"]
    prefix: "compressed"

use rule * from compression as compression_*

rule all:
    default_target: True
    input: rules.compression_all.input
"""


def run(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2", *arguments], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_as_a_module_with_a_prefix(project):
    project.config["experiments"]["tiny"]["perplexity"] |= {
        "variants": ["merged"], "stages": ["AB"], "compare_with_dense": False,
    }  # fmt: skip
    (project.folder / "outer.yaml").write_text(yaml.safe_dump({"compression": project.config}))
    (project.folder / "Snakefile").write_text(MODULE)
    run(project.folder)
    table = pd.read_csv(project.folder / "compressed/results/summary.csv")
    assert table.stage.tolist() == ["AB"] and not (project.folder / "results").exists()
    assert (project.folder / "compressed/results/tiny/merged/A_merged/model.safetensors").is_file()
    assert "Nothing to be done" in run(project.folder)


def test_another_configuration_has_tables_of_its_own(finished):
    before = (finished.folder / "results/summary.csv").read_bytes()
    (finished.folder / "other.yaml").write_text(yaml.safe_dump(finished.config))
    (finished.folder / "more.yaml").write_text("keep_activations: false\n")
    snakefile = ("--snakefile", str(ROOT / "Snakefile"))
    printed = run(finished.folder, *snakefile, "--configfile", "other.yaml")
    assert "results/summary.other.csv  every number" in printed and "merge_A" not in printed.replace(
        "place_merge_A", ""
    )
    assert (finished.folder / "results/summary.csv").read_bytes() == before
    # The later file wins, and both stand in the name.
    assert "results/summary.other.more.csv" in run(
        finished.folder, "--dry-run", *snakefile, "--configfile", "other.yaml", "more.yaml"
    )


def test_from_another_directory_with_a_value_from_the_command_line(finished, tmp_path):
    (finished.folder / "config.yaml").write_text(yaml.safe_dump(finished.config))
    printed = run(
        tmp_path, "--dry-run", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(finished.folder),
        "--configfile", str(finished.folder / "config.yaml"), "--config", "keep_activations=false",
    )  # fmt: skip
    assert "Nothing to be done" in printed
