"""Kills: a command is killed at a random moment, what stands there is looked at, and the command is run again."""

from __future__ import annotations

import random
import shutil
from contextlib import suppress
from dataclasses import dataclass

from attack.classify import Column, Verdict, difference, leftovers, of_ending, snapshot
from attack.deeds import DEEDS, Deed
from attack.room import Room

_ATTEMPTS = 20  # to be faster than a command that ends a little earlier than usual
_BY_NAME = {deed.name: deed for deed in DEEDS}


@dataclass(frozen=True)
class KillCase:
    """One kill.

    Attributes:
        name: for --only.
        deed: the command's name.
        former: whether a former result of the command lies there.
        share: of its usual time, after which it is killed.
    """

    name: str
    deed: str
    former: bool
    share: float

    def __str__(self) -> str:
        return f"{self.name}: {self.deed}{', over a former result' * self.former}, after {self.share:.1%} of its time"


@dataclass(frozen=True)
class Expected:
    """What a command leaves in `out` when nothing disturbs it.

    Attributes:
        old: the state in which it begins.
        new: the state in which it ends; what differs between two runs stands with its name only.
        seconds: how long it takes.
    """

    old: dict[str, object]
    new: dict[str, object]
    seconds: float


def kill_cases(count: int, seed: int) -> list[KillCase]:
    """Kills, the commands in turn, every second one over a former result.

    Half of the moments are spread over the whole time, half over its last quarter, where results are put in place.
    """
    draw, cases = random.Random(seed), []
    for number in range(count):
        deed = DEEDS[number % len(DEEDS)]
        share = draw.uniform(0, 1) if draw.random() < 0.5 else draw.uniform(0.75, 1)
        cases.append(KillCase(f"kill-{number:03d}", deed.name, number // len(DEEDS) % 2 == 0, share))
    return cases


def attack_kill(room: Room, case: KillCase) -> Verdict:
    """Kill a command, look, and run it again."""
    deed = _BY_NAME[case.deed]
    expected = expect(room, deed, former=case.former)
    usual = expected.seconds
    for _ in range(_ATTEMPTS):
        begin(room, deed, former=case.former)
        child = room.start(lambda: deed.main(list(deed.words)))
        ended = child.wait(case.share * usual) or child.kill()
        if ended.signal:
            break
        usual = min(0.95 * usual, ended.seconds)
    else:
        return Verdict(Column.OTHERWISE, f"it always ends before the kill: {ended}")
    return whole(room, deed, expected) or again(room, deed, expected) or Verdict(Column.SAME)


def expect(room: Room, deed: Deed, *, former: bool) -> Expected:
    """What a command leaves undisturbed; found out once in a room."""

    def find() -> Expected:
        found, seconds = [], []
        for _ in range(2):
            begin(room, deed, former=former)
            old = snapshot(room.out)
            ended = room.run(lambda: deed.main(list(deed.words)))
            if ended is None or ended.code != 0:
                raise RuntimeError(f"{deed.name} does not even run undisturbed: {ended}")
            found.append(snapshot(room.out))
            seconds.append(ended.seconds)
        new = {name: content if found[1][name] == content else None for name, content in found[0].items()}
        return Expected(old, new, min(seconds))

    return room.once(("expected", deed.name, former), find)


def begin(room: Room, deed: Deed, *, former: bool) -> None:
    """Put `out` into the state in which a command begins, with another result of it or with nothing."""
    room.clear()
    state = room.folder / "states" / f"{deed.name} of another"
    if former and not state.exists():
        room.out.mkdir()
        room.must(deed.name, lambda: deed.main(list(deed.other)))
        room.out.rename(state)
    if former:
        shutil.copytree(state, room.out, symlinks=True)
    else:
        room.out.mkdir()


def group_state(told: dict[str, object], group: tuple[str, ...], like: dict[str, object]) -> dict[str, object]:
    """What a snapshot says of the paths of a group; what is always other stands with its name only."""
    own = {n: c for n, c in told.items() if any(n == path or n.startswith(f"{path}/") for path in group)}
    return {name: None if like.get(name, "") is None else content for name, content in own.items()}


def whole(room: Room, deed: Deed, *states: Expected | dict) -> Verdict | None:
    """What is wrong with what stands there: a result that is neither old nor new, or a changed input; None if nothing.

    Args:
        room, deed: where, and of what command.
        states: what may stand there: of an Expected its old state and its new one.
    """
    lost = difference(room.before, snapshot(room.inputs))
    if lost:
        return Verdict(Column.LOST, f"inputs: {lost}")
    allowed = [state for told in states for state in ([told.old, told.new] if isinstance(told, Expected) else [told])]
    for group in deed.targets:
        for path in group:
            verdict = _is_one_of(room, (path,), allowed)
            if verdict:
                return verdict
    if any(len(group) > 1 for group in deed.targets):
        room.must("mending", lambda: _mend(room, deed))
        return next(filter(None, (_is_one_of(room, group, allowed) for group in deed.targets)), None)
    return None


def _is_one_of(room: Room, group: tuple[str, ...], allowed: list[dict[str, object]]) -> Verdict | None:
    now = snapshot(room.out)
    if any(group_state(now, group, state) == group_state(state, group, state) for state in allowed):
        return None
    told = "; or ".join(difference(group_state(s, group, s), group_state(now, group, s)) for s in allowed)
    gone = not group_state(now, group, {})
    return Verdict(Column.LOST if gone else Column.WRONG, f"{group} is none of the whole results: {told}")


def _mend(room: Room, deed: Deed) -> None:
    """What the next run does first: it puts in place the rest of what a killed one was putting in place."""
    from mistral_prune_lora.storage.transaction import atomic_directories

    for group in deed.targets:
        with suppress(_Enough), atomic_directories([room.out / path for path in group]):
            raise _Enough


class _Enough(Exception):
    """A run that ends right after it has begun."""


def again(room: Room, deed: Deed, expected: Expected, *, only_targets: bool = False) -> Verdict | None:
    """What is wrong when the command is run once more, to its end; None if it gives what an undisturbed run does.

    Args:
        room, deed, expected: where, what, and what an undisturbed run leaves.
        only_targets: look at the results alone, and not at the work that is kept beside them.
    """
    ended = room.run(lambda: deed.main(list(deed.words)))
    verdict = of_ending(ended)
    if verdict:
        return Verdict(
            Column.OTHERWISE if verdict.column is Column.REFUSED else verdict.column, f"again: {verdict.told}"
        )
    left = leftovers(room.out)
    if left:
        return Verdict(Column.LEFT, f"after the next run: {left}")
    now = snapshot(room.out)
    looked_at = tuple(path for group in deed.targets for path in group) if only_targets else (*now, *expected.new)
    wrong = difference(*(group_state(told, looked_at, expected.new) for told in (expected.new, now)))
    return Verdict(Column.WRONG, f"again: {wrong}") if wrong else None
