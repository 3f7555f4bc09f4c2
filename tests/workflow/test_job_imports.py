"""What the process of a job imports before its work: what it needs, and nothing else."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "workflow_scripts"
MODELS = {"transformers.modeling_utils", "torch.distributed.tensor", "torch._dynamo"}  # with them, three seconds
OTHERS = {"datasets", "matplotlib", "pandas", "peft", "pyarrow", "scipy", "torch", "transformers"}
# What each script may import of these; whatever is not named here is for the model's own classes.
NEEDED = {
    "beside": {"pandas", "pyarrow"},
    "check": set(),
    "fetch_model": {"torch", "transformers"},
    "merge": {"torch"},
    "plot_importance": {"matplotlib", "pandas", "pyarrow"},
    "plot_perplexity": {"matplotlib", "pandas", "pyarrow"},
    "prune": {"torch"},
    "report_pages": {"pandas", "pyarrow"},
    "show": {"pandas", "pyarrow"},
    "strength": {"torch"},
    "summary": {"pandas", "pyarrow"},
    "tidy": set(),
    "windows": {"torch"},
}
TELL = "\nimport gc, json, sys\nprint(json.dumps([sorted(sys.modules), gc.get_freeze_count(), gc.isenabled()]))\n"


def imports_of(script, shards=()):
    """The imports of a script, without its work; of a job that gathers these shards."""
    body = ast.parse(script.read_text()).body
    only = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom | ast.With)]
    work = [node for node in only if isinstance(node, ast.With) and "job" in ast.unparse(node.items[0])]
    given = f"from types import SimpleNamespace as Given\nsnakemake = Given(input=Given(shards={shards!r}))\n"
    return given + ast.unparse([node for node in only if node not in work])


def imported(code):
    """The modules that a process has after that, how many objects its collector leaves out, and whether it collects."""
    run = subprocess.run([sys.executable, "-c", code + TELL], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_what_makes_no_model_imports_no_model_classes(name):
    modules, _, _ = imported(imports_of(SCRIPTS / f"{name}.py"))
    assert not MODELS & set(modules)
    assert OTHERS & set(modules) <= NEEDED[name]


def test_runs_of_layers_import_neither_tables_nor_plots_nor_training():
    modules, left_out, collects = imported(imports_of(SCRIPTS / "segment.py"))
    assert not {"datasets", "matplotlib", "pandas", "peft", "pyarrow", "scipy"} & set(modules)
    assert left_out > 100_000 and collects


@pytest.mark.parametrize("name", ["segment", "perplexity", "teacher_states", "prefix_states"])
def test_what_gathers_shards_imports_no_model_classes(name):
    modules, _, _ = imported(imports_of(SCRIPTS / f"{name}.py", ("a shard",)))
    assert not (MODELS | {"datasets", "matplotlib", "pandas", "peft", "pyarrow", "scipy"}) & set(modules)


def test_what_puts_links_imports_nothing_large():
    modules, _, _ = imported("import mistral_prune_lora.workflow.place")
    assert not (OTHERS | {"numpy", "regex", "snakemake", "tqdm", "yaml"}) & set(modules)


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda script: script.stem)
def test_every_script_that_imports_something_large_does_it_quickly(script):
    quick = [node for node in ast.parse(script.read_text()).body if "quick_imports()" in ast.unparse(node)]
    assert len(quick) == (0 if NEEDED.get(script.stem, OTHERS) == set() else 1)
