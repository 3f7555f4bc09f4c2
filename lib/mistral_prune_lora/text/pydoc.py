"""The built-in corpus: the prose of Python's own language reference, which the standard library carries.

`pydoc_data.topics` holds what `help("assert")` prints. Topics repeat each other's paragraphs, so each paragraph counts
for the first topic (in sorted order) that has it; then whole topics go to train, validation or test. The splits
therefore share no paragraph. The text differs between Python versions; its sha256 tells which one a result is about.
"""

from __future__ import annotations

import platform
import re
from pydoc_data.topics import topics

# One topic in ten is for testing, one for validation; with Python 3.11 that is 14 % and 8 % of the characters.
_SPLIT_OF_REMAINDER = {3: "test", 0: "validation"}
_TOPICS_IN_TURN = 10
_MIN_WORDS = 6


def pydoc_paragraphs(split: str) -> list[str]:
    """The paragraphs of one split ("train", "validation", "test"), each on one line, in the order of sorted topics."""
    chosen, seen = [], set()
    for index, name in enumerate(sorted(topics)):
        topic_split = _SPLIT_OF_REMAINDER.get(index % _TOPICS_IN_TURN, "train")
        for block in re.split(r"\n[ \t]*\n", topics[name]):
            paragraph = " ".join(block.split())
            if paragraph in seen or not _is_prose(paragraph):
                continue
            seen.add(paragraph)
            if topic_split == split:
                chosen.append(paragraph)
    return chosen


def pydoc_source() -> str:
    """Where the corpus comes from, with the Python version that decides its wording."""
    return f"pydoc_data.topics of Python {platform.python_version()}"


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph is sentences, not a heading, a grammar rule, a table, a signature or an example session."""
    return (
        re.match(r'[A-Z"*(]', paragraph) is not None
        and paragraph.endswith((".", ":", "?", "!", ")"))
        and not any(sign in paragraph for sign in ("::=", ">>>", "|==="))
        and len(re.findall(r"[A-Za-z]{2,}", paragraph)) >= _MIN_WORDS
    )
