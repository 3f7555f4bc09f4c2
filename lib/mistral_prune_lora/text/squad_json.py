"""SQuAD as it was first published: one JSON object in which articles hold paragraphs, and these their questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


def flat_rows(record: Mapping) -> Iterator[Mapping]:
    """The questions of a record, a row each as the Hub has them; a record of another shape is a row itself.

    Args:
        record: a whole file {"data": [articles]}, an article {"title", "paragraphs": [...]}, or a row.

    Yields:
        {id, title, context, question, answers: {text: [...], answer_start: [...]}}.
    """
    articles = record.get("data")
    if isinstance(articles, list) and all(isinstance(a, Mapping) and "paragraphs" in a for a in articles):
        for article in articles:
            yield from flat_rows(article)
    elif isinstance(record.get("paragraphs"), list):
        for paragraph in record["paragraphs"]:
            for question in paragraph.get("qas", ()):
                answers = question.get("answers") or []
                yield {
                    "id": question.get("id"),
                    "title": record.get("title"),
                    "context": paragraph.get("context"),
                    "question": question.get("question"),
                    "answers": {key: [answer.get(key) for answer in answers] for key in ("text", "answer_start")},
                }
    else:
        yield record
