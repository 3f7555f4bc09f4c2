"""The commands that write something, each with a second command line that writes another result to the same place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from output_project import COMMANDS, evaluate, flags, merge, prune, train

from mistral_prune_lora.export_stage import main as export

MADE = ("--output_dir", "../out/made")
MEASURED = ("--seqlen", "32", "--nsamples", "2", "--device", "cpu", "--dtype", "fp32")
# The teacher's states, finished and unfinished.
STATES = ("states.safetensors", ".states.safetensors.partial", ".states.safetensors.journal")
MERGE_A = (*COMMANDS["merge A"].words, *MADE)
MERGE_B = (*COMMANDS["merge B"].words, *MADE)
TRAIN = (*COMMANDS["train"].words, *MADE)
PRUNE = (*COMMANDS["prune"].words, "--save_dir", "../out/A", "--save_removed_dir", "../out/bundles")
_RESULTS = ("--json", "../out/made.json", "--csv", "../out/made.csv", "--work_dir", "../out/work")
COMPARE = (*COMMANDS["evaluate"].words, *_RESULTS)  # with the dense model and an adapter beside it
EVALUATE = (*flags("--model_path {A} {B} --c_bundle {C} --text_file {text}"), *MEASURED, *_RESULTS)
EXPORT = (
    *flags("--model_path {A} --b_bundle {B} --c_bundle {C} --stage FULL --tokenizer_path {tokenizer}"),
    *MADE,
)


@dataclass(frozen=True)
class Deed:
    """A command that writes a result.

    Attributes:
        name: in the table.
        main: the command's function.
        words: its arguments.
        other: arguments that give another result in the same place.
        targets: what it writes in ../out: groups of paths, of which each group is put in place as one.
        works_in: what else it keeps there, finished work and unfinished.
    """

    name: str
    main: Callable[[list[str]], int]
    words: tuple[str, ...]
    other: tuple[str, ...]
    targets: tuple[tuple[str, ...], ...] = (("made",),)
    works_in: tuple[str, ...] = ()


def instead(words: tuple[str, ...], **changes: str) -> tuple[str, ...]:
    """A command line with other values of some flags; several values are separated by spaces."""
    words = list(words)
    for flag, value in changes.items():
        at = words.index(f"--{flag}") + 1
        words[at : at + len(value.split())] = value.split()
    return tuple(words)


DEEDS = (
    Deed("merge A", merge, MERGE_A, instead(MERGE_A, adapter_path="adapters/A_lora")),
    Deed("merge B", merge, MERGE_B, instead(MERGE_B, adapter_paths="adapters/B_lora")),
    Deed("train", train, TRAIN, instead(TRAIN, steps="2"), works_in=("made.unfinished",)),
    Deed("prune", prune, PRUNE, instead(PRUNE, b_layers="2 3", c_layers="4 5"), (("bundles/B", "bundles/C", "A"),)),
    Deed("evaluate", evaluate, EVALUATE, instead(EVALUATE, nsamples="3"), (("made.json",), ("made.csv",)), ("work",)),
    Deed("export", export, EXPORT, instead(EXPORT, stage="AB")),
)
