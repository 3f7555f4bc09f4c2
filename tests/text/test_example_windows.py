"""Windows of examples: what is scored is what `labels` of -100 leave in transformers, wherever the padding is."""

import json
from dataclasses import replace

import datasets
import pandas as pd
import pytest
import torch
from question_rows import CHATML, CHATS, ROWS, save_questions, tokenizer_in
from tiny import tiny_config
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.text.dataset_spec import DatasetSpec
from mistral_prune_lora.text.dataset_windows import dataset_windows
from mistral_prune_lora.text.windows import Windows

ANSWERS = ["blue", "green", "red", "yellow"]


@pytest.fixture
def tokenizer(tmp_path):
    return tokenizer_in(tmp_path / "tokenizer", begins=True)


@pytest.fixture
def squad(tmp_path):
    save_questions(tmp_path / "rows")
    return DatasetSpec(str(tmp_path / "rows/rows.jsonl"), "train", shape="prompt", preset="squad")


@pytest.fixture
def chats(tmp_path):
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    return DatasetSpec(str(tmp_path / "chats.jsonl"), "train", shape="chat")


def scored_text(windows, tokenizer):
    return [tokenizer.decode(ids[scored]) for ids, scored in zip(windows.ids, windows.scored, strict=True)]


def prompt_of(row):
    told = "Answer the question with words of the context.\n\n"
    return f"{told}Context: {row['context']}\nQuestion: {row['question']}\nAnswer:"


def test_the_answer_and_its_end_are_scored_and_nothing_else(squad, tokenizer, capsys):
    windows = dataset_windows(squad, tokenizer, seqlen=200, count=None)
    assert scored_text(windows, tokenizer) == [f" {answer}</s>" for answer in ANSWERS]
    whole = tokenizer(prompt_of(ROWS[0]) + " blue")["input_ids"]
    assert windows.ids[0, : len(whole) + 1].tolist() == [*whole, 2] and whole[0] == 1
    assert windows.positions[0].tolist() == [*range(len(whole) + 1), *range(199 - len(whole))]
    told = windows.identity.examples
    assert (told["examples"], told["rows"], told["left_out"]) == (4, 5, {"without an answer": 1})
    assert "rows left out, without an answer: 1" in capsys.readouterr().err
    assert windows.predicted_tokens == sum(len(f" {answer}") + 1 for answer in ANSWERS)


def labelled(examples, seqlen, side):
    """ids, attention_mask and labels as transformers takes them."""
    ids, mask, labels = (torch.full((len(examples), seqlen), fill) for fill in (2, 0, -100))
    for row, (tokens, first) in enumerate(examples):
        place = slice(0, len(tokens)) if side == "right" else slice(seqlen - len(tokens), seqlen)
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
        labels[row, place] = torch.tensor([-100] * first + tokens[first:])
    return ids, mask, labels


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_that_of_transformers_labels(squad, tokenizer, side, packing, window):
    torch.manual_seed(0)
    config = tiny_config(vocab_size=300, num_hidden_layers=2, initializer_range=0.1, sliding_window=window)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    examples = []
    for row in ROWS:
        if row["answers"]["text"]:
            start = tokenizer(prompt_of(row))["input_ids"]
            examples.append((tokenizer(f"{prompt_of(row)} {row['answers']['text'][0]}")["input_ids"] + [2], len(start)))
    ids, mask, labels = labelled(examples, 180, side)
    # Positions of a left-padded row begin at its first token, as `generate` counts them.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    theirs = model(ids, attention_mask=mask, position_ids=positions, labels=labels)
    expected = cross_entropy(theirs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert abs(float(theirs.loss - expected)) < 1e-5  # transformers adds up in float32
    spec = replace(squad, padding_side=side, packing=packing)
    windows = dataset_windows(spec, tokenizer, seqlen=360 if packing else 180, count=None)
    assert len(windows) == (2 if packing else 4)
    logits = model(windows.ids.long(), position_ids=windows.positions.long(), use_cache=False).logits[:, :-1]
    scored = windows.scored[:, 1:]
    found = cross_entropy(logits[scored], windows.ids[:, 1:][scored].long())
    assert abs(float(found - expected)) < 1e-10
    assert int((labels[:, 1:] != -100).sum()) == windows.predicted_tokens


def test_a_long_prompt_loses_its_beginning_and_keeps_the_answer(squad, tokenizer, capsys):
    windows = dataset_windows(squad, tokenizer, seqlen=40, count=None)
    whole = tokenizer(prompt_of(ROWS[0]) + " blue")["input_ids"] + [2]
    assert windows.ids[0].tolist() == [1, *whole[-39:]] and windows.positions[0].tolist() == list(range(40))
    assert scored_text(windows, tokenizer) == [f" {answer}</s>" for answer in ANSWERS]
    assert windows.identity.examples["cut"] == 4 and "examples cut to 40 tokens: 4" in capsys.readouterr().err


def test_an_answer_that_does_not_fit_is_left_out_and_said(squad, tokenizer, capsys):
    windows = dataset_windows(squad, tokenizer, seqlen=7, count=None)
    assert scored_text(windows, tokenizer) == [" blue</s>", " red</s>"]
    assert windows.identity.examples["left_out"] == {"without an answer": 1, "whose answer alone is too long": 2}
    assert "whose answer alone is too long: 2" in capsys.readouterr().err
    with pytest.raises(DataError, match="of 5 rows none makes an example of 4 tokens"):
        dataset_windows(squad, tokenizer, seqlen=4, count=None)


def test_every_file_of_the_same_questions_gives_the_same_windows(tmp_path, squad, tokenizer):
    ids = [
        dataset_windows(replace(squad, dataset=str(file)), tokenizer, seqlen=128, count=None).ids
        for file in save_questions(tmp_path / "rows")
    ]
    assert len(ids) == 5 and all(torch.equal(found, ids[0]) for found in ids)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    saved = dataset_windows(replace(squad, dataset=str(tmp_path / "saved")), tokenizer, seqlen=128, count=None)
    assert torch.equal(saved.ids, ids[0])


def test_a_question_without_answer_is_unanswerable_in_the_second_version(squad, tokenizer):
    windows = dataset_windows(replace(squad, preset="squad_v2"), tokenizer, seqlen=256, count=None)
    assert scored_text(windows, tokenizer)[2] == " unanswerable</s>" and len(windows) == 5


@pytest.mark.parametrize("streaming", [False, True])
def test_so_many_examples_are_taken_as_are_asked_for(squad, tokenizer, streaming):
    windows = dataset_windows(replace(squad, streaming=streaming), tokenizer, seqlen=128, count=3)
    assert scored_text(windows, tokenizer) == [f" {answer}</s>" for answer in ANSWERS[:3]]
    assert windows.identity.examples["rows"] == (None if streaming else 5)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "array.json"])
def test_a_stream_gives_the_windows_of_the_whole(tmp_path, squad, tokenizer, name):
    spec = replace(squad, dataset=str(tmp_path / "rows" / name))
    whole, stream = (dataset_windows(replace(spec, streaming=s), tokenizer, seqlen=128, count=4) for s in (False, True))
    assert torch.equal(whole.ids, stream.ids) and whole.identity.text_sha256 == stream.identity.text_sha256


def test_a_running_text_is_read_as_a_stream_too(tmp_path, tokenizer):
    pd.DataFrame({"text": [f"text number {i}" for i in range(500)]}).to_csv(tmp_path / "rows.csv", index=False)
    spec = DatasetSpec(str(tmp_path / "rows.csv"), "train")
    whole, stream = (dataset_windows(replace(spec, streaming=s), tokenizer, seqlen=32, count=9) for s in (False, True))
    assert torch.equal(whole.ids, stream.ids) and stream.positions is None and stream.scored is None


@pytest.mark.parametrize(
    ("split", "taken"),
    [("train[:2]", [0, 1]), ("train[60%:]", [3, 4]), ("train[:1]+train[-1:]", [0, 4]), ("train[:99]", [0, 1, 3, 4])],
)
def test_a_split_may_be_some_of_its_rows(squad, tokenizer, split, taken):
    windows = dataset_windows(replace(squad, split=split), tokenizer, seqlen=128, count=None)
    assert scored_text(windows, tokenizer) == [f" {ROWS[row]['answers']['text'][0]}</s>" for row in taken]
    assert windows.identity.split == split


def test_rows_of_a_known_text_are_joined_as_all_of_it_is(tmp_path, tokenizer):
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb/ptb.train.txt").write_text(" a b \n c d \n e f \n")
    spec = DatasetSpec("ptb", "train[:2]", mirror=str(tmp_path / "ptb"))
    windows = dataset_windows(spec, tokenizer, seqlen=8, count=None)
    assert tokenizer.decode(windows.ids[0]) == "<s>a b c d" and windows.identity.source.endswith(": train[:2]")


def test_packing_is_first_fit_and_loses_nothing(squad, tokenizer):
    alone, packed = (
        dataset_windows(replace(squad, packing=packing), tokenizer, seqlen=300, count=None) for packing in (False, True)
    )
    assert len(packed) == 2 < len(alone) and packed.predicted_tokens == alone.predicted_tokens
    assert packed.identity.text_sha256 == alone.identity.text_sha256
    assert scored_text(packed, tokenizer) == [" blue</s> green</s>", " red</s> yellow</s>"]
    assert all((row == 0).sum() == 3 for row in packed.positions)


def test_a_document_has_a_window_of_its_own(tmp_path, tokenizer, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("abcdef", "", "xy", None)))
    spec = DatasetSpec(str(tmp_path / "rows.jsonl"), "train", documents="each")
    windows = dataset_windows(spec, tokenizer, seqlen=5, count=None)
    assert scored_text(windows, tokenizer) == ["abcd", "xy"]
    assert windows.positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert (windows.identity.examples["cut"], windows.identity.examples["left_out"]) == (1, {"without an answer": 2})


@pytest.mark.parametrize("begins", [False, True])
def test_every_answer_of_a_conversation_is_scored_with_its_end(tmp_path, chats, begins):
    tokenizer = tokenizer_in(tmp_path / "tokenizer", begins=begins, template=CHATML)
    windows = dataset_windows(chats, tokenizer, seqlen=128, count=None)
    assert scored_text(windows, tokenizer) == ["hello</s>", "two</s>four</s>"]
    rendered = "<s>user\nhi</s>\n<s>assistant\nhello</s>"
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert windows.ids[0, : len(ids)].tolist() == ids


def test_a_long_conversation_keeps_its_last_answer_and_scores_no_half_ones(tmp_path, chats):
    tokenizer = tokenizer_in(tmp_path / "tokenizer", template=CHATML)
    whole = len("..user\nthree?.\n.assistant\nfour.")
    for spare in (0, 2):  # of "two", nothing or its end is left
        windows = dataset_windows(replace(chats, split="train[1:]"), tokenizer, seqlen=whole + spare, count=None)
        assert scored_text(windows, tokenizer) == ["four</s>"] and windows.ids[0, 0] == 1


def test_columns_of_other_names_and_a_template_of_one_s_own(tmp_path, tokenizer):
    row = {"body": "It {broke}.", "labels": [{"name": "repairs"}], "n": 3}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    spec = DatasetSpec(
        str(tmp_path / "rows.jsonl"),
        "train",
        shape="prompt",
        template={"prompt": "{{{n}}} {text}\n", "answer": "{queue}"},
        columns={"text": "body", "queue": "labels.name"},
    )
    windows = dataset_windows(spec, tokenizer, seqlen=64, count=None)
    assert tokenizer.decode(windows.ids[0]).startswith("<s>{3} It {broke}.\nrepairs</s>")
    assert scored_text(windows, tokenizer) == ["repairs</s>"]


def test_examples_are_saved_and_come_back(tmp_path, squad, tokenizer):
    windows = dataset_windows(replace(squad, packing=True), tokenizer, seqlen=300, count=None)
    windows.save(tmp_path / "windows.safetensors")
    again = Windows.load(tmp_path / "windows.safetensors")
    assert again.identity == windows.identity and torch.equal(again.scored, windows.scored)


def test_a_plain_text_has_the_windows_that_it_always_had(tokenizer):
    windows = dataset_windows(DatasetSpec("pydoc", "test"), tokenizer, seqlen=64, count=3)
    assert windows.positions is None and windows.scored is None and windows.identity.examples is None
    assert windows.identity.content().keys() == {
        "dataset", "split", "source", "text_sha256", "ids_sha256", "tokenizer", "tokenizer_sha256", "utf8_bytes",
        "seqlen", "windows", "text_windows",
    }  # fmt: skip
