"""Questions and answers in the shapes that SQuAD has, and a tokenizer that begins every text with <s>."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from tiny import save_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

ROWS = [
    {
        "id": str(number),
        "title": "Colours",
        "context": f"The {thing} is {colour}.",
        "question": f"What is the {thing} like?",
        "answers": {"text": [colour, "so"] if colour else [], "answer_start": [8, 1] if colour else []},
    }
    for number, (thing, colour) in enumerate(
        [("sky", "blue"), ("grass", "green"), ("night", ""), ("old brick house", "red"), ("sun", "yellow")]
    )
]
CHATS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
    [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three?"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "thanks"},
    ],
]
CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def nested() -> dict:
    """The rows as SQuAD was first published."""
    questions = [
        {
            "context": row["context"],
            "qas": [
                {
                    "id": row["id"],
                    "question": row["question"],
                    "is_impossible": not row["answers"]["text"],
                    "answers": [
                        {"text": text, "answer_start": start}
                        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
                    ],
                }
            ],
        }
        for row in ROWS
    ]
    return {"version": "v2.0", "data": [{"title": "Colours", "paragraphs": questions}]}


def save_questions(folder: Path) -> list[Path]:
    """The rows in every kind of file that has room for them."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "array.json").write_text(json.dumps(ROWS))
    pd.DataFrame(ROWS).to_parquet(folder / "rows.parquet")
    (folder / "train-v2.0.json").write_text(json.dumps(nested()))
    (folder / "spread.json").write_text(json.dumps(nested(), indent=2))
    return sorted(folder.iterdir())


def tokenizer_in(folder: Path, *, begins: bool = False, template: str | None = None):
    """A tokenizer of bytes; `begins` with <s> before every text."""
    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = template
    return tokenizer
