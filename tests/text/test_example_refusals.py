"""What no example can be made of: refused in one line that says where and how to mend it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
from question_rows import CHATML, ROWS, save_questions, tokenizer_in

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.text.dataset_spec import DatasetSpec
from mistral_prune_lora.text.dataset_windows import dataset_windows
from mistral_prune_lora.text.presets import PRESETS

COMMIT = "7b6d24c440a36b6815f21b70d25016731768db1f"
PROMPT = {"dataset": "rows.jsonl", "split": "train", "shape": "prompt", "preset": "squad"}
CHAT = {"dataset": "rows.jsonl", "split": "train", "shape": "chat"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_questions(tmp_path / "rows")
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows/rows.jsonl").read_text())


def refused(spec, tokenizer, **how):
    with pytest.raises(DataError) as caught:
        dataset_windows(DatasetSpec.of(spec), tokenizer, **{"seqlen": 64, "count": None, **how})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"preset": None}, "exactly one of preset and template"),
        ({"template": {"prompt": "a", "answer": "{b}"}}, "exactly one of preset and template"),
        ({"preset": "squad3"}, "'squad3' is not one of squad, squad_v2"),
        ({"documents": "each"}, "is of texts, and this is of the shape prompt"),
        ({"column": "context"}, "columns says where"),
        ({"shape": "text"}, "is of the shape prompt, and this is of the shape text"),
        ({"columns": {"sky": "x"}}, "the template has no {sky}"),
        ({"columns": {"context": "passage"}}, "row 1: there is no column 'passage'"),
        ({"columns": {"context": "answers"}}, "row 1: the column 'answers' holds dict, not text"),
        ({"preset": None, "template": {"prompt": "{question", "answer": "{b}"}}, "expected '}'"),
        ({"preset": None, "template": {"prompt": "{question.x}", "answer": "{b}"}}, "not the name of a column"),
        ({"preset": None, "template": {"prompt": "{question}", "answer": "b"}}, "the answer names no column"),
        ({"split": "train[a]"}, "names no split"),
        ({"split": "train[9:]"}, "of 0 rows none makes an example"),
        ({"split": "train[:2]", "streaming": True}, "cannot be read as a stream"),
        ({"streaming": True}, "a stream has no end that is known"),
        ({"dataset": "pydoc"}, "a text has no rows of the shape prompt"),
        ({"dataset": "pydoc", "shape": "text", "preset": None, "streaming": True}, "this text is read whole"),
        ({"revision": COMMIT}, "is of a dataset on the Hub alone"),
        ({"config": "plain"}, "is of a dataset on the Hub alone"),
        ({"dataset": "rajpurkar/squad"}, "revision must name the commit"),
        ({"dataset": "rajpurkar/squad", "revision": "main"}, "'main' is not the 40 hex digits"),
        ({"dataset": "nowhere.jsonl"}, "unknown dataset 'nowhere.jsonl'"),
        ({"shape": "text", "preset": None, "packing": True}, "windows of a running text are full"),
        ({"shape": "text", "preset": None, "columns": {"a": "b"}}, "the shape text has no such name"),
    ],
)
def test_datasets_that_contradict_themselves_or_their_files(tmp_path, changes, told):
    assert told in refused({**PROMPT, **changes}, tokenizer_in(tmp_path / "tokenizer"))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "a"}, "row 1: there is no column 'messages', only question"),
        ({"messages": "a"}, "row 1: the column 'messages' holds no list of messages"),
        ({"messages": []}, "holds no list of messages"),
        ({"messages": [{"role": "user"}, {"role": 3, "content": "a"}]}, "a message has the keys role, content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair"),
        ({"messages": [{"role": "user", "content": "a"}]}, "of 1 rows none makes an example"),
    ],
)
def test_conversations_that_are_none(tmp_path, row, told):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert told in refused(CHAT, tokenizer_in(tmp_path / "tokenizer", template=CHATML))


def test_a_tokenizer_without_a_chat_template(tmp_path):
    assert "has no chat template" in refused(CHAT, tokenizer_in(tmp_path / "tokenizer"))


def test_templates_that_write_an_answer_otherwise_later_or_refuse_a_role(tmp_path):
    chat = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    last_only = "{% for m in messages %}{{ m['role'] }}{% if loop.last %}!{% endif %}{{ m['content'] }}</s>{% endfor %}"
    told = refused(CHAT, tokenizer_in(tmp_path / "one", template=last_only))
    assert "row 1: the chat template writes the answer of message 2 otherwise" in told
    strict = "{{ raise_exception('roles must take turns') }}"
    told = refused(CHAT, tokenizer_in(tmp_path / "two", template=strict))
    assert "row 1: the chat template does not take it: roles must take turns" in told


def test_a_prompt_and_an_answer_that_the_tokenizer_joins(tmp_path):
    tokenizer = tokenizer_in(tmp_path / "tokenizer")
    tokenizer.add_tokens(["QA"])
    (tmp_path / "rows.jsonl").write_text('{"q": "Q", "a": "A"}\n')
    template = {"prompt": "{q}", "answer": "{a}"}
    told = refused({**PROMPT, "preset": None, "template": template}, tokenizer)
    assert "row 1: the tokenizer joins the end of the prompt and the beginning of the answer" in told


def test_a_tokenizer_without_an_end(tmp_path):
    tokenizer = tokenizer_in(tmp_path / "tokenizer")
    tokenizer.eos_token = None
    assert "has no token that ends an answer" in refused(PROMPT, tokenizer)


def test_without_network_the_hub_is_one_clean_error(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub = {**PROMPT, "dataset": "rajpurkar/squad", "revision": COMMIT}
    for streaming in (False, True):
        told = refused({**hub, "streaming": streaming}, tokenizer_in(tmp_path / "tokenizer"), count=3)
        assert "the Hub cannot be reached" in told and "the Hub dataset rajpurkar/squad" in told


class Builder:
    """What the dataset library hands out for a dataset of the Hub."""

    def __init__(self, commit):
        self.hash, self.config, self.asked = commit, SimpleNamespace(name="plain_text"), []

    def download_and_prepare(self):
        self.asked.append("rows")

    def as_dataset(self, split):
        assert split == "train[:3]"
        return datasets.Dataset.from_list(ROWS[:3])

    def as_streaming_dataset(self, split):
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()


def test_the_hub_s_rows_are_those_of_the_commit_and_of_no_other(tmp_path, monkeypatch):
    asked, builder = [], Builder(COMMIT)
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda *given, **named: asked.append((given, named)) or builder
    )
    tokenizer, name = tokenizer_in(tmp_path / "tokenizer"), PRESETS["squad"].repo_id
    spec = DatasetSpec(name, "train[:3]", shape="prompt", preset="squad", revision=COMMIT, config="plain_text")
    windows = dataset_windows(spec, tokenizer, seqlen=128, count=None)
    assert asked == [((f"hf://datasets/{name}", "plain_text"), {"revision": COMMIT})] and builder.asked == ["rows"]
    assert windows.identity.source == f"{name}@{COMMIT} (plain_text): train[:3]"
    assert windows.identity.dataset == "squad" and windows.identity.examples["rows"] == 3
    stream = dataset_windows(replace(spec, split="train", streaming=True), tokenizer, seqlen=128, count=2)
    assert stream.ids.tolist() == windows.ids.tolist()
    builder.hash = "0" * 40
    with pytest.raises(DataError, match=f"the local cache holds commit {'0' * 40}, not {COMMIT}"):
        dataset_windows(spec, tokenizer, seqlen=128, count=None)
