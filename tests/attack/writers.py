"""Two writers: two commands at once that write to one place."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from attack.classify import Column, Verdict, leftovers, of_ending
from attack.deeds import DEEDS, Deed
from attack.kills import again, begin, expect, whole
from attack.room import PATIENCE, Room
from attack.server import Child, Ended

_BY_NAME = {deed.name: deed for deed in DEEDS}
_DIRECTORIES = [deed for deed in DEEDS if deed.targets == (("made",),)]  # all to one place


@dataclass(frozen=True)
class WritersCase:
    """Two writers.

    Attributes:
        name: for --only.
        first: the command's name.
        second: of the one that starts later: the same, the same with another result, or another command to that place.
        other: whether the second one writes another result than the same command usually does.
        former: whether a former result of the first command lies there.
        share: of the first one's usual time, after which the second one starts.
    """

    name: str
    first: str
    second: str
    other: bool
    former: bool
    share: float

    def __str__(self) -> str:
        second = "another result of it" if self.other else "itself" if self.second == self.first else self.second
        return f"{self.name}: {self.first}, and after {self.share:.1%} of its time {second}"


def writers_cases(count: int, seed: int) -> list[WritersCase]:
    """Pairs, the commands in turn, with themselves, with another result of themselves, with each other."""
    draw, cases = random.Random(seed), []
    for number in range(count):
        first, turn = DEEDS[number % len(DEEDS)], number // len(DEEDS)
        rivals = [deed for deed in _DIRECTORIES if deed is not first]
        second = draw.choice(rivals) if turn % 3 == 2 and first in _DIRECTORIES else first
        other = second is first and turn % 3 != 1
        share = draw.choice([0.0, draw.uniform(0, 1)])
        cases.append(WritersCase(f"two-{number:03d}", first.name, second.name, other, turn % 2 == 1, share))
    return cases


def attack_together(room: Room, case: WritersCase) -> Verdict:
    """Run two commands at once, look, and run the first one again."""
    first, second = _BY_NAME[case.first], _BY_NAME[case.second]
    words = second.other if case.other else second.words
    states = [expect(room, first, former=case.former), *_alone(room, case, second)]
    begin(room, first, former=case.former)
    children = [room.start(lambda: first.main(list(first.words)), "first")]
    time.sleep(case.share * states[0].seconds)
    children.append(room.start(lambda: second.main(list(words)), "second"))
    verdicts = [of_ending(_end(child)) for child in children]
    wrong = next((told for told in verdicts if told is not None and told.column is not Column.REFUSED), None)
    if wrong:
        return wrong
    if None not in verdicts:
        return Verdict(Column.OTHERWISE, f"both are refused: {[verdict.told for verdict in verdicts]}")
    wrong = whole(room, first, *states)
    if wrong:
        return wrong
    if leftovers(room.out):
        return Verdict(Column.LEFT, f"{leftovers(room.out)}")
    verdict = next((told for told in verdicts if told is not None), Verdict(Column.SAME))
    if second is not first:
        return verdict  # what stands there may be the second one's, which the first one does not replace
    return again(room, first, states[0], only_targets=True) or verdict


def _alone(room: Room, case: WritersCase, second: Deed) -> list[dict[str, object]]:
    """The states that the second command alone may leave."""
    if case.other:
        # What `begin` puts there for a former result is the other result of the command.
        return [expect(room, second, former=True).old]
    return [expect(room, second, former=False).new]


def _end(child: Child) -> Ended | None:
    ended = child.wait(PATIENCE)
    if ended is None:
        child.kill()
    return ended
