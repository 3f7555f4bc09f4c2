"""Contradictions: sound files that do not go together, outputs that are inputs, arguments that cannot be meant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from output_project import evaluate, flags, merge, prune, train

from attack.classify import Column, Verdict, difference, of_ending, snapshot
from attack.deeds import EVALUATE, EXPORT, MADE, MERGE_A, MERGE_B, PRUNE, TRAIN, export, instead
from attack.room import Room
from mistral_prune_lora.dense.__main__ import main as fetch

_PARTS = ("--model_path", "pruned/A", "--bundles_dir", "other/bundles")
_TABLE: dict[str, tuple[Callable[[list[str]], int], tuple[str, ...]]] = {
    "merge into the base": (merge, instead(MERGE_A, output_dir="2/A")),
    "merge into the adapter": (merge, instead(MERGE_A, output_dir="5/A_lora/merged")),
    "merge over all inputs": (merge, instead(MERGE_A, output_dir="../inputs")),
    "merge where the tokenizer lies": (merge, instead(MERGE_A, output_dir="7/tokenizer")),
    "an adapter twice": (merge, (*MERGE_B, "--adapter_paths", "6/B_lora", "6/B_lora")),
    "B's adapter into A": (merge, instead(MERGE_A, adapter_path="6/B_lora")),
    "A's adapter into B": (merge, instead(MERGE_B, adapter_paths="5/A_lora")),
    "a bundle as the skeleton": (merge, instead(MERGE_B, skeleton="4/C")),
    "an adapter as the base": (merge, instead(MERGE_A, base_model="5/A_lora")),
    "a model as the adapter": (merge, instead(MERGE_A, adapter_path="2/A")),
    "a text as the base": (merge, instead(MERGE_A, base_model="8/eval.txt")),
    "train into the student": (train, instead(TRAIN, output_dir="2/A")),
    "train without the bundle": (train, instead(TRAIN, bundle="4/C")),
    "a bundle as the student": (train, instead(TRAIN, student="3/B")),
    "an adapter as the teacher": (train, instead(TRAIN, teacher="5/A_lora")),
    "a pruned teacher": (train, instead(TRAIN, teacher="2/A")),
    "no target module": (train, (*TRAIN, "--target_modules", "x_proj")),
    "states over the text": (train, (*TRAIN, "--teacher_states", "8/eval.txt")),
    "prune into the model": (prune, instead(PRUNE, save_dir="1/dense")),
    "bundles into the model": (prune, instead(PRUNE, save_removed_dir="1/dense")),
    "A where B goes": (prune, instead(PRUNE, save_dir="../out/bundles/B")),
    "a layer of B and C": (prune, instead(PRUNE, c_layers="4 5")),
    "layers beyond the last": (prune, instead(PRUNE, c_layers="7 8")),
    "a pruned model to prune": (prune, instead(PRUNE, model="2/A")),
    "a bundle to prune": (prune, instead(PRUNE, model="3/B")),
    "JSON over the text": (evaluate, instead(EVALUATE, json="8/eval.txt")),
    "JSON and CSV in one": (evaluate, instead(EVALUATE, csv="../out/made.json")),
    "JSON over a model's configuration": (evaluate, instead(EVALUATE, json="2/A/config.json")),
    "C instead of B": (evaluate, (*flags("--model_path {A} --b_bundle {C} --text_file {text}"), *EVALUATE[-6:])),
    "B instead of C": (evaluate, (*flags("--model_path {A} --c_bundle {B} --text_file {text}"), *EVALUATE[-6:])),
    "bundles alone": (evaluate, (*flags("--model_path {B} {C} --text_file {text}"), *EVALUATE[-6:])),
    "parts of two prunings": (
        evaluate,
        (*flags("--model_path pruned/A --b_bundle other/bundles/B --text_file {text}"), *EVALUATE[-6:]),
    ),
    "an adapter of another part": (
        evaluate,
        (*flags("--model_path {A} --lora_paths adapters/C_lora --text_file {text}"), *EVALUATE[-6:]),
    ),
    "more tokens than there are": (evaluate, instead(EVALUATE, seqlen="100000")),
    "export FULL of two prunings": (export, (*_PARTS, "--stage", "FULL", *MADE)),
    "export FULL without C": (export, tuple(_ for _ in EXPORT if _ not in ("--c_bundle", "4/C"))),
    "export into a bundle": (export, instead(EXPORT, output_dir="3/B")),
    "export B and C exchanged": (export, instead(EXPORT, b_bundle="4/C", c_bundle="3/B")),
    "a pruned model as dense": (fetch, ("--path", "pruned/A")),
    "a bundle as dense": (fetch, ("--path", "pruned/bundles/B")),
    "an adapter as dense": (fetch, ("--path", "5/A_lora")),
}


@dataclass(frozen=True)
class ContradictionCase:
    """One contradiction: its name, which is a key of the table."""

    name: str

    def __str__(self) -> str:
        return f"{self.name}: {' '.join(_TABLE[self.name][1])}"


def contradiction_cases() -> list[ContradictionCase]:
    """All of them."""
    return [ContradictionCase(name) for name in _TABLE]


def attack_with_contradiction(room: Room, case: ContradictionCase) -> Verdict:
    """Run the command: whatever it says, it must not do what it is asked for."""
    main, words = _TABLE[case.name]
    room.clear()
    room.out.mkdir()
    verdict = of_ending(room.run(lambda: main(list(words)))) or Verdict(Column.WRONG, "it is done all the same")
    lost = difference(room.before, snapshot(room.inputs))
    if lost:
        return Verdict(Column.LOST, lost)
    if verdict.column is not Column.REFUSED:
        return verdict
    left = sorted(name for name in snapshot(room.out) if name.split("/")[0] != "work")
    return Verdict(Column.LEFT, f"{left[:5]}") if left else verdict
