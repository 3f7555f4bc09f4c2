"""Templates: how a row becomes a prompt and its answer; the presets are those of SQuAD. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Formatter

from mistral_prune_lora.errors import DataError


@dataclass(frozen=True)
class Template:
    """A prompt, and the answer that follows it at once.

    Texts are filled in as {name}; {{ and }} stand for braces.

    Attributes:
        system: stands before the prompt, an empty line between the two; empty for none.
        prompt: ends where the answer begins.
        answer: holds the one blank or line break that parts it from the prompt.
        unanswerable: what a question without an answer is answered with; None leaves its row out.
        columns: for names that are no columns, where their texts are: `answers.text` is the entry "text" of the column
            "answers". Of a list of texts, the first is taken.
    """

    system: str
    prompt: str
    answer: str
    unanswerable: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping, columns: Mapping[str, str]) -> Template:
        """A template of a configuration.

        Raises:
            DataError: it has braces that name nothing, or no answer; columns for names that it does not have.
        """
        template = cls(
            given.get("system") or "", given["prompt"], given["answer"], given.get("unanswerable"), dict(columns)
        )
        template.check()
        return template

    def check(self) -> None:
        """Raise a DataError unless every brace names a column, the answer one, and `columns` nothing else."""
        prompt, answer = _names(self.system) + _names(self.prompt), _names(self.answer)
        if not answer:
            raise DataError("the answer names no column", where="template.answer", mend='write one, as in " {answer}"')
        unknown = [name for name in self.columns if name not in (*prompt, *answer)]
        if unknown:
            raise DataError(
                f"the template has no {{{unknown[0]}}}", where="columns", mend=f"use {', '.join((*prompt, *answer))}"
            )

    @property
    def needed(self) -> list[str]:
        """The columns that rows must have."""
        names = dict.fromkeys((*_names(self.system), *_names(self.prompt), *_names(self.answer)))
        return list(dict.fromkeys(self.columns.get(name, name).split(".")[0] for name in names))

    def render(self, row: Mapping) -> tuple[str, str | None]:
        """The prompt and the answer of a row; None if it has no answer, and none is said in its place.

        Raises:
            DataError: a column is missing, or holds no text.
        """
        given = {name: self._value(row, name) for name in _names(self.system) + _names(self.prompt)}
        for name, value in given.items():
            if value is None:
                raise DataError(
                    f"the column {self.columns.get(name, name)!r} is empty", mend="leave out rows without a prompt"
                )
        prompt = "\n\n".join(text.format_map(given) for text in (self.system, self.prompt) if text)
        answers = {name: self._value(row, name) for name in _names(self.answer)}
        if any(value is None or not value.strip() for value in answers.values()):
            if self.unanswerable is None:
                return prompt, None
            answers = dict.fromkeys(answers, self.unanswerable)
        return prompt, self.answer.format_map(answers)

    def _value(self, row: Mapping, name: str) -> str | None:
        """The text of a name in a row; None for none."""
        place = self.columns.get(name, name)
        value: object = row
        for key in place.split("."):
            value = _entry(value, key, place)
        while isinstance(value, list):
            value = value[0] if value else None
        if isinstance(value, bool) or not (value is None or isinstance(value, (str, int, float))):
            raise DataError(
                f"the column {place!r} holds {type(value).__name__}, not text", mend="name a column of texts"
            )
        return None if value is None else str(value)

    def content(self) -> dict:
        """As JSON takes it."""
        return {
            "system": self.system,
            "prompt": self.prompt,
            "answer": self.answer,
            "unanswerable": self.unanswerable,
            "columns": dict(self.columns),
        }


def _entry(value: object, key: str, place: str) -> object:
    """The entry of an object, or of each object in a list; of nothing, nothing."""
    if isinstance(value, list):
        return [_entry(item, key, place) for item in value]
    if value is None:
        return None
    if not isinstance(value, Mapping) or key not in value:
        there = ", ".join(map(str, value)) if isinstance(value, Mapping) else "no columns at all"
        raise DataError(
            f"there is no column {place!r}, only {there}", where="columns", mend="name the column with columns"
        )
    return value[key]


def _names(text: str) -> list[str]:
    """The names in the braces of a text.

    Raises:
        DataError: braces that do not close, or hold more than a name.
    """
    try:
        pieces = list(Formatter().parse(text))
    except ValueError as error:
        raise DataError(f"{text!r}: {error}", where="template", mend="write {{ and }} for braces") from None
    names = []
    for _, name, form, conversion in pieces:
        if name is None:
            continue
        if not name.isidentifier() or form or conversion:
            raise DataError(
                f"{{{name}}} is not the name of a column", where="template", mend="write {name}; {{ and }} for braces"
            )
        names.append(name)
    return names


@dataclass(frozen=True)
class Preset:
    """A published dataset of questions and answers.

    Attributes:
        template: how its rows are put into words.
        repo_id, revision: where it is on the Hub.
    """

    template: Template
    repo_id: str
    revision: str


_PLACE = {"answer": "answers.text"}
_PROMPT = "Context: {context}\nQuestion: {question}\nAnswer:"
UNANSWERABLE = "unanswerable"
PRESETS: Mapping[str, Preset] = {
    "squad": Preset(
        Template("Answer the question with words of the context.", _PROMPT, " {answer}", None, _PLACE),
        "rajpurkar/squad",
        "7b6d24c440a36b6815f21b70d25016731768db1f",
    ),
    "squad_v2": Preset(
        Template(
            f'Answer the question with words of the context, or with "{UNANSWERABLE}" if it does not hold the answer.',
            _PROMPT,
            " {answer}",
            UNANSWERABLE,
            _PLACE,
        ),
        "rajpurkar/squad_v2",
        "3ffb306f725f7d2ce8394bc1873b24868140c412",
    ),
}
