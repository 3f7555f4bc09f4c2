"""bench/gpu.py on the CPU: all checks at a tiny size, with little installed, and that they find what is wrong."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))

import gpu  # noqa: E402
from gpu_checks import checks, evaluation, memory, merge, plain, resume, training  # noqa: E402
from gpu_checks.finding import Finding, deviation, same_bits, within  # noqa: E402
from gpu_checks.peak import Peak  # noqa: E402
from gpu_checks.setting import SMALL, Setting  # noqa: E402

BATTERY, ONLY = ROOT / "bench" / "gpu.py", ROOT / "tests" / "support" / "only_packages.py"
NAME = "model.layers.0.mlp.up_proj.weight"
PACKAGES = "torch,transformers,peft,safetensors,pandas,pyarrow,pytest"


def run(*words, **env) -> subprocess.CompletedProcess:
    """A process that finds no GPU, and the library in the tree alone."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and "PYTEST" not in name}
    env = {**kept, "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.run([sys.executable, *map(str, words)], env=env, capture_output=True, text=True)


def test_everything_runs_on_a_cpu_with_few_packages_and_without_a_network(tmp_path):
    ended = run(ONLY, PACKAGES, BATTERY, "--device", "cpu", "--small", "--folder", tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = [line.strip("| ").split(" | ") for line in ended.stdout.splitlines() if line.startswith("|")][2:]
    assert {row[0] for row in rows} == set(checks.CHECKS)
    assert {row[4] for row in rows} == {"ok", "told", "n/a"}
    assert ended.stdout.splitlines()[-1].startswith("CPU, ") and ended.stdout.endswith("29 findings, 0 failed\n")
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_so_and_how_to_run_on_the_cpu():
    ended = run(BATTERY)
    assert ended.returncode == 0
    assert ended.stdout.startswith("skipped: torch sees no GPU") and "--device cpu --small" in ended.stdout


def test_a_gpu_that_is_asked_for_and_not_there_is_an_error():
    ended = run(BATTERY, "--device", "cuda:0")
    assert ended.returncode != 0 and "cuda:0 is not there" in ended.stderr


def test_pytest_alone_skips_all_of_tests_gpu_with_a_reason():
    ended = run(ONLY, PACKAGES, "-m", "pytest", ROOT / "tests" / "gpu", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert ended.returncode == 0, ended.stdout
    assert f"{len(checks.CHECKS)} skipped" in ended.stdout and "torch sees no GPU" in ended.stdout


def test_tests_gpu_ends_with_the_table_and_the_card(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "gpu")
    monkeypatch.delitem(sys.modules, "conftest", raising=False)
    hooks = importlib.import_module("conftest")
    monkeypatch.delitem(sys.modules, "conftest")
    config, printed = SimpleNamespace(stash=pytest.Stash()), []
    hooks.pytest_terminal_summary(SimpleNamespace(write_line=printed.append), config)
    assert not printed, "where nothing was checked"
    monkeypatch.setattr(gpu, "machine", lambda device: f"the card {device}")
    config.stash[hooks.FOUND] = [("merge", Finding("bits", "0 differ", "none", True), 0.1)]
    hooks.pytest_terminal_summary(SimpleNamespace(write_line=printed.append), config)
    assert "| merge | bits | 0 differ | none | ok | 0.1 |\n\nthe card cuda:0" in printed[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("battery")


@pytest.fixture
def setting(folder):
    return Setting(torch.device("cpu"), SMALL, folder)


def failed(findings) -> list[str]:
    return [finding.what for finding in findings if finding.ok is False]


def test_a_merge_command_that_fails_is_an_error(setting, monkeypatch):
    monkeypatch.setattr(merge, "merge_command", lambda words: 1)
    with pytest.raises(RuntimeError, match="failed on cpu"):
        list(merge.check_merge(setting))


def test_one_bit_of_a_merge_is_found(setting, monkeypatch):
    def spoilt(*given):
        tensors = merged(*given)
        tensors["model.layers.0.mlp.up_proj.weight"].view(torch.int16)[0, 0] ^= 1
        return tensors

    merged = plain.merged
    monkeypatch.setattr(plain, "merged", spoilt)
    assert failed(merge.check_merge(setting)) == ["merge of A beside PEFT's on this device"]


def test_nan_that_both_merges_of_a_device_have_is_found(setting, monkeypatch):
    def spoilt(folder):
        tensors = read(folder)
        if next(read_so_far):
            tensors[NAME][0, 0] = float("nan")
        return tensors

    def theirs(*given):
        tensors = merged(*given)
        tensors[NAME][0, 0] = float("nan")
        return tensors

    read, merged, read_so_far = merge._tensors, plain.merged, iter([True, False])
    monkeypatch.setattr(merge, "_tensors", spoilt)
    monkeypatch.setattr(plain, "merged", theirs)
    assert failed(merge.check_merge(setting)) == ["merge of A beside the CPU's"]


def test_a_divergence_of_nan_is_found():
    right, wrong = (plain.Step((1.0, divergence, 1.0), {"a": torch.ones(1)}) for divergence in (1.0, float("nan")))
    assert failed(training._beside("fp32", wrong, right)) == [
        "fp32: loss, divergence, cross-entropy of a step beside PEFT's in float32"
    ]


@pytest.mark.parametrize("check", [evaluation.check_float32, evaluation.check_bf16])
def test_layers_in_another_order_are_found(setting, monkeypatch, check):
    def swapped(dense, layers, *given):
        return with_layers(dense, [*layers[:-2], layers[-1], layers[-2]], *given)

    with_layers = plain.with_layers
    monkeypatch.setattr(plain, "with_layers", swapped)
    assert len(failed(check(setting))) == 4


def test_what_overlap_changes_is_found(setting, monkeypatch):
    def other(setting, compute):
        found = evaluate(setting, compute)
        if not compute.overlap:
            found.nll["AB"][0] += 1e-9
        return found

    evaluate = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", other)
    assert failed(evaluation.check_float32(setting)) == ["fp32: streamed with and without overlap"]


def test_another_loss_is_found(setting, monkeypatch):
    def other(dense, layers, lora, loss, *given):
        return trained(dense, layers, lora, type(loss)(loss.kd_alpha - 0.3, loss.temperature), *given)

    trained = plain.trained
    monkeypatch.setattr(plain, "trained", other)
    assert len(failed(training.check_training(setting))) == 4


def test_a_training_that_begins_anew_is_found(setting, monkeypatch):
    monkeypatch.setattr(resume, "_killed", lambda setting: within("left out", 0, 0))
    assert failed(resume.check_resume(setting)) == ["bf16: the killed training, started again"]


def test_too_much_memory_is_found(setting, monkeypatch):
    peaks = iter([1 << 60, 0, 2, 1])

    def measured(self, *_):
        self.nbytes = next(peaks)

    monkeypatch.setattr(Peak, "__exit__", measured)
    found = failed(memory.check_memory(setting))
    assert found == ["fp32: peak of streamed evaluation with overlap", "fp32: peak of a training step"]


def test_a_check_that_ends_in_an_error_fails_and_the_others_run(monkeypatch, capsys, tmp_path):
    import gpu

    def broken(setting):
        yield within("one", 1.0, 2.0)
        raise RuntimeError("CUDA error: an illegal memory access\nand so on")

    chosen = {"broken": broken, "other": lambda setting: [within("two", float("nan"), 2.0)]}
    monkeypatch.setattr(gpu, "CHECKS", chosen)
    with pytest.raises(SystemExit, match="1"):
        gpu.main(["--device", "cpu", "--small", "--folder", str(tmp_path)])
    told = capsys.readouterr().out
    assert "| broken | one | 1 | at most 2 | ok |" in told
    assert "ended by an error | RuntimeError: CUDA error: an illegal memory access | none | FAILED" in told
    assert "| other | two | nan | at most 2 | FAILED |" in told and "3 findings, 2 failed" in told


def test_the_same_bits_means_names_dtypes_shapes_and_signs_of_zero():
    zero = {"w": torch.zeros(3)}
    assert same_bits("", zero, {"w": torch.zeros(3)}).ok
    assert same_bits("", {}, {}).ok is False
    for other in ({}, {"w": torch.zeros(4)}, {"w": torch.zeros(3, dtype=torch.int32)}, {"w": -torch.zeros(3)}):
        assert same_bits("", zero, other).ok is False
    assert deviation(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5
