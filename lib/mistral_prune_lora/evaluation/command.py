"""The evaluation command's work: models in turn, results printed as they come, one table over all of them."""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mistral_prune_lora.argument_types import LeftOut
from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.tokenizer import find_tokenizer, load_tokenizer
from mistral_prune_lora.errors import AdapterError, LayoutError, PipelineError
from mistral_prune_lora.evaluation.adapters import open_peft_adapters
from mistral_prune_lora.evaluation.inputs import Inputs, sort_inputs
from mistral_prune_lora.evaluation.report import (
    box,
    csv_output,
    details,
    differences,
    differences_table,
    json_output,
    model_heading,
    model_lines,
    opening,
    summary,
    windows_line,
    write_results,
    write_table,
)
from mistral_prune_lora.evaluation.result import StageResult
from mistral_prune_lora.evaluation.scoring import DenseAnswers
from mistral_prune_lora.evaluation.stages import (
    boundary_bytes,
    evaluate_stages,
    stages_of,
)
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE, STAGES
from mistral_prune_lora.provenance import record_sha256
from mistral_prune_lora.storage.activations import LESS_SPACE
from mistral_prune_lora.storage.outputs import Output, claim
from mistral_prune_lora.storage.space import require_space
from mistral_prune_lora.storage.transaction import check_place
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.streaming.passage import Passage
from mistral_prune_lora.text.sources import Text, load_text
from mistral_prune_lora.text.windows import Windows, make_windows

_WEEK = 7 * 24 * 3600.0
_AGAIN = "Run the command again with another file; what is finished is not computed again"


def run(args: argparse.Namespace) -> list[StageResult]:
    """Evaluate what the command line names; prints, and writes `args.json` and `args.csv`.

    Dense models go first: the others are then compared with the first of them (KL divergence, top-1 agreement).

    Args:
        args: as `mistral_eval_ppl_mergedmodel.parser` gives it.

    Returns:
        Every result, in the order printed.

    Raises:
        PipelineError: of any kind that the parts raise.
    """
    _claim(args)
    _check_places(args)
    inputs = sort_inputs(args.model_path, b_bundle=args.b_bundle, c_bundle=args.c_bundle, bundles_dir=args.bundles_dir)
    stages = _stages(args.stages, inputs)
    folders = [folder for _, folder in inputs.models]
    check = _claim(args, [*folders, *(_tokenizer_place(args, folder) for folder in folders)])
    compute = Compute.named(args.device, args.dtype, args.batch_size, args.max_memory)
    print(
        opening(
            {
                "Models": [name for name, _ in inputs.models],
                **{f"{part} bundle": path for part, path in inputs.bundles.items()},
                "Stages": stages,
                "Dataset": ", ".join(args.text_file) or f"{args.dataset} (split={args.split})",
                "Seq length": args.seqlen,
                "Device": f"{compute.device} ({args.dtype})",
            }
        )
    )
    subjects = [
        subject for name, folder in _labelled(inputs.models) for subject in _subjects(name, folder, inputs, args)
    ]
    subjects.sort(key=lambda subject: not subject.is_dense)
    for subject in subjects:
        _stages_of(subject, stages)
    text = load_text(args.dataset, split=args.split, mirror=args.mirror, text_files=args.text_file, column=args.column)
    evaluation = _Evaluation(args, inputs, compute, text, stages)
    for number, subject in enumerate(subjects, 1):
        evaluation.evaluate(subject, number, len(subjects))
    records = [result.record for result in evaluation.results]
    print(summary(records) + "\n\n" + details(records))
    pairs = differences(evaluation.results)
    if pairs:
        print("\n" + differences_table(pairs))
    for path, write in ((args.json, write_results), (args.csv, write_table)):
        try:
            if path:
                write(path, evaluation.results, check)
        except OSError as error:
            raise PipelineError(f"cannot be written: {error.strerror}", where=path, mend=_AGAIN) from error
    evaluation.clean()
    return evaluation.results


def _claim(args: argparse.Namespace, found: Sequence[str | Path] = ()) -> Callable[[], None]:
    """Raise a PipelineError unless the outputs may be written; `found`: inputs that are not named as they lie."""
    read = [*found, *args.model_path, args.b_bundle, args.c_bundle, args.bundles_dir, *args.lora_paths]
    read += [args.tokenizer_path, args.dataset, args.mirror, *args.text_file]
    outputs = [Output.folder(args.work_dir, "--work_dir")] if args.work_dir else []
    outputs += [make(path) for path, make in ((args.json, json_output), (args.csv, csv_output)) if path]
    return claim(outputs, read, overwrite=args.overwrite)


def _tokenizer_place(args: argparse.Namespace, model: Path) -> Path | str:
    adapter = args.lora_paths[0] if args.lora_paths else None
    return find_tokenizer(model, tokenizer_path=args.tokenizer_path, adapter_path=adapter)


def _check_places(args: argparse.Namespace) -> None:
    """Raise a PipelineError unless the outputs can be written, before hours are spent on what should go there."""
    check_place(*(path for path in (args.json, args.csv) if path), directory=False)
    work = Path(args.work_dir) if args.work_dir else default_work_dir(args)
    check_work_dir(work)
    check_place(work / "activations", directory=False)


def check_work_dir(folder: Path) -> None:
    """Raise a PipelineError where no work could be kept: a file, or a place that may not be written to."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    fault = None if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else "that is no directory to write to"
    try:
        os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, a link that leads to itself
        fault = error.strerror
    if fault:
        raise PipelineError(
            f"finished work cannot be kept: {fault}", where=folder, mend="Name another folder with --work_dir"
        )


def default_work_dir(args: argparse.Namespace) -> Path:
    """Where an evaluation keeps what it has finished if the user names no place: in the cache, a folder a command.

    XDG_CACHE_HOME is respected.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    asked = {**vars(args), "cwd": os.getcwd(), "json": None, "csv": None, "overwrite": None}
    name = record_sha256({key: str(value) for key, value in asked.items()})[:16]
    return cache / "mistral_prune_lora" / "evaluation" / name


def forget_old_work(folder: Path) -> None:
    """Remove what commands that were killed and never repeated have left in a folder of work folders, after a week."""
    for work in folder.iterdir() if folder.is_dir() else ():
        try:
            touched = max((file.lstat().st_mtime for file in work.glob("*")), default=work.lstat().st_mtime)
        except FileNotFoundError:  # another command has just removed its own
            continue
        if time.time() - touched > _WEEK:
            shutil.rmtree(work, ignore_errors=True)


class _Evaluation:
    """What the models of one command share: text, device, the dense model's answers, results so far."""

    def __init__(
        self, args: argparse.Namespace, inputs: Inputs, compute: Compute, text: Text, stages: Sequence[str]
    ) -> None:
        self._args, self._compute, self._text, self._stages = args, compute, text, stages
        self._models = inputs.models
        self._folder = Path(args.work_dir) if args.work_dir else default_work_dir(args)
        self._dense: tuple[DenseAnswers, str] | None = None
        self.results: list[StageResult] = []

    def evaluate(self, subject: Subject, number: int, count: int) -> None:
        """All stages of one model."""
        written = next(name for name, folder in self._models if folder == subject.model.path)
        adapters = "".join(f" + {a.path}" for part in subject.adapters.values() for a in part)
        print(model_heading(number, count, written + adapters))
        windows = self._windows(subject)
        for adapter in (a for part in subject.adapters.values() for a in part):
            if adapter.out_of_scope:
                print(f"  {adapter.name}: on the layers of {adapter.part}; {adapter.out_of_scope} tensors out of scope")
        wanted = _stages_of(subject, self._stages)
        kept = subject.layout.kept
        model_type = subject.model.config["model_type"]
        print(model_lines(model_type, subject.layout, len(kept), subject.parameters(kept), self._compute.device))
        print(windows_line(windows.identity, self._limits(), self._args.seed))
        teaches = subject.is_dense and not subject.adapters and self._dense is None and number < count
        dense = self._dense[0] if self._dense and self._dense[1] == windows.identity.ids_sha256 else None
        self._announce_space(subject, wanted, windows, dense, teaches)
        results = evaluate_stages(
            subject,
            wanted,
            windows,
            self._compute,
            work_dir=self._folder,
            dense=dense,
            final_hidden=self._hidden_file(windows) if teaches else None,
            keep_parts=bool(self._args.work_dir),
        )
        for stage in wanted:
            if stage != "A" and not subject.is_dense:
                print(f"  [{stage}] Restoring bundle layers...")
                print(f"  ✓ Stage {stage}: {len(subject.layout.active(stage))} active layers")
            print(f"\n  [{stage}] Evaluating PPL...", flush=True)
            result = next(results)
            self.results.append(result)
            print(box(result.record), flush=True)
        if teaches:
            self._dense = (DenseAnswers(subject.model, self._hidden_file(windows)), windows.identity.ids_sha256)

    def _announce_space(
        self, subject: Subject, stages: Sequence[str], windows: Windows, dense: DenseAnswers | None, teaches: bool
    ) -> None:
        """Say how much disk the boundary activations take; what is there already needs no more."""
        space = boundary_bytes(
            subject, stages, windows, self._compute, dense=dense, keep_parts=bool(self._args.work_dir)
        )
        space += Passage(subject.model, windows, self._compute).nbytes if teaches else 0
        if space:
            print(f"  Boundary activations: {space / 1e6:.1f} MB at most, in {self._folder}")
            there = sum(file.stat().st_blocks * 512 for file in self._folder.glob("*") if file.is_file())
            require_space({self._folder / "activations": space - there}, mend=LESS_SPACE)

    def clean(self) -> None:
        """Remove what was kept for the case of a kill, unless the user has named a place for it."""
        if not self._args.work_dir:
            forget_old_work(self._folder.parent)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _windows(self, subject: Subject) -> Windows:
        args = self._args
        adapter = args.lora_paths[0] if args.lora_paths else None
        tokenizer = load_tokenizer(subject.model.path, tokenizer_path=args.tokenizer_path, adapter_path=adapter)
        limit = min(count for count, _ in self._limits())
        return make_windows(self._text, tokenizer, seqlen=args.seqlen, max_windows=limit, seed=args.seed)

    def _limits(self) -> list[tuple[int, str]]:
        """What bounds the number of windows, and in whose name; first what the user cannot raise."""
        args, limits = self._args, []
        if self._text.max_windows is not None:
            limits.append((self._text.max_windows, f"all that the protocol of {self._text.name} looks at"))
        if args.max_batches is not None:
            limits.append((args.max_batches * args.batch_size, "--max_batches"))
        default = isinstance(args.nsamples, LeftOut)
        limits.append(
            (args.nsamples, "the default of --nsamples: give --nsamples for more" if default else "--nsamples")
        )
        return limits

    def _hidden_file(self, windows: Windows) -> Path:
        return self._folder / f"dense-{windows.identity.ids_sha256[:16]}-{self._args.dtype}.safetensors"


def _labelled(models: Sequence[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """The models by the last part of their paths; by the whole path as written where that is not unique."""
    names = [Path(written).name or folder.name for written, folder in models]
    unique = [name if names.count(name) == 1 else written for name, (written, _) in zip(names, models, strict=True)]
    return [(name, folder) for name, (_, folder) in zip(unique, models, strict=True)]


def _subjects(name: str, folder: Path, inputs: Inputs, args: argparse.Namespace) -> list[Subject]:
    """The model as it is, and once more with the adapters beside it if there are any."""
    model = open_checkpoint(folder)
    bundles = {} if model.layout is None else {part: open_checkpoint(path) for part, path in inputs.bundles.items()}
    plain = Subject(model, bundles, name=name)
    if not args.lora_paths:
        return [plain]
    bases = [model.path, *(bundle.path for bundle in bundles.values())]
    adapters = open_peft_adapters(args.lora_paths, plain.layout, bases, args.adapter_indices)
    return [plain, Subject(model, bundles, adapters, name=plain.name)]


def _stages_of(subject: Subject, stages: Sequence[str]) -> list[str]:
    """The stages of one model; with adapters beside it, those that one of them changes."""
    wanted = stages_of(subject, stages)
    if not subject.adapters:
        return wanted
    changed = [stage for stage in wanted if set(PARTS_OF_STAGE[stage]) & set(subject.adapters)]
    if not changed:
        raise AdapterError(
            f"these adapters are for {', '.join(subject.adapters)}, whose layers no stage of {', '.join(wanted)} has",
            where="--lora_paths",
            mend="Give adapters for the stages that are evaluated",
        )
    return changed


def _stages(wanted: str | None, inputs: Inputs) -> list[str]:
    """The stages asked for, in the guide's order; by default those that the bundles given allow."""
    if wanted is None:
        given = set(inputs.bundles)
        return ["A", *(["AB"] if "B" in given else []), *(["FULL"] if given == {"B", "C"} else [])]
    named = [stage.strip().upper() for stage in wanted.split(",") if stage.strip()]
    unknown = [stage for stage in named if stage not in STAGES]
    if unknown or not named:
        raise LayoutError(
            f"there is no stage {', '.join(unknown) or repr(wanted)}", where="--stages", mend="Use some of A,AB,FULL"
        )
    return [stage for stage in STAGES if stage in named]
