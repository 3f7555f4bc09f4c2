"""The dense model from a Hub: a local server that speaks as much of its protocol as a download takes."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny import save_tokenizer, tiny_config
from transformers import MistralForCausalLM

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """What the repository holds: a model in several files."""
    torch.manual_seed(0)
    model = MistralForCausalLM(tiny_config(num_hidden_layers=2)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "served", max_shard_size="60KB")
    save_tokenizer(tmp_path / "served")
    return tmp_path / "served"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's protocol as downloading a model takes."""

    folder: Path
    asked: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            repo_id = self.path.removeprefix("/api/models/").split("/revision/")[0].split("/tree/")[0]
            if refusal := {"tiny/gated": (403, "GatedRepo"), "tiny/absent": (401, "RepoNotFound")}.get(repo_id):
                return self.answer(refusal[0], b"{}", {"X-Error-Code": refusal[1]})
            if REVISION not in self.path:
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if "/tree/" in self.path:
                files = [
                    {"type": "file", "path": str(p.relative_to(self.folder)), "size": p.stat().st_size, "oid": "0" * 40}
                    for p in self.folder.rglob("*")
                    if p.is_file()
                ]
                return self.answer(200, json.dumps(files).encode())
            siblings = [{"rfilename": str(p.relative_to(self.folder))} for p in self.folder.rglob("*") if p.is_file()]
            return self.answer(200, json.dumps({"id": repo_id, "sha": REVISION, "siblings": siblings}).encode())
        name = self.path.split(f"/resolve/{REVISION}/")[1]
        self.asked.append(name)
        content = (self.folder / name).read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        return self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION})

    def answer(self, status: int, body: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(dense: Path, tmp_path: Path):
    """Serves the local model with what else such repositories hold; returns (run the command, names asked for)."""
    for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md", "original/model.safetensors"):
        (dense / name).parent.mkdir(exist_ok=True)
        (dense / name).write_bytes(b"not to be fetched")
    handler = type("Served", (Hub,), {"folder": dense, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def run(repo_id: str, revision: str = REVISION, **environment) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "mistral_prune_lora.dense", "--hub", repo_id, "--revision", revision]
        command += ["--output_dir", str(tmp_path / "dense"), "--cache_dir", str(tmp_path / "cache")]
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(tmp_path / "home"),
            **environment,
        }
        environment.pop("HF_HUB_OFFLINE" if environment.get("HF_HUB_OFFLINE") != "1" else "", None)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    yield run, handler.asked
    server.shutdown()
    thread.join()
    server.server_close()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_hub_model(hub, dense: Path, tmp_path: Path):
    run, asked = hub
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    ended = run("tiny/model")
    assert ended.returncode == 0, ended.stderr
    foreign = {"consolidated.safetensors", "pytorch_model.bin", "README.md", "original/model.safetensors"}
    assert not foreign & set(asked)
    fetched = contents(tmp_path / "dense")
    record = json.loads(fetched.pop("source.json"))
    assert fetched == {name: content for name, content in contents(dense).items() if name not in foreign}
    assert record["files"].keys() == fetched.keys()
    assert record["hub"] == {"repo_id": "tiny/model", "revision": REVISION}
    assert not any(p.is_symlink() for p in (tmp_path / "dense").iterdir())
    # Fetched before: a second run needs no network.
    ended = run("tiny/model", HF_HUB_OFFLINE="1")
    assert ended.returncode == 0, ended.stderr


def test_of_a_family_that_is_not_taken_no_weights_are_fetched(hub, dense: Path, tmp_path: Path):
    run, asked = hub
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"model_type": "gemma2"}))
    ended = run("tiny/model")
    assert ended.returncode == 1
    assert "the model_type 'gemma2' is not one that is supported" in ended.stderr.splitlines()[-1]
    assert set(asked) == {"config.json"} and not (tmp_path / "dense").exists()


@pytest.mark.parametrize(
    ("repo_id", "revision", "environment", "message", "mend"),
    [
        (
            "tiny/gated",
            REVISION,
            {},
            "the repository is gated",
            "Accept its terms at https://huggingface.co/tiny/gated",
        ),
        ("tiny/absent", REVISION, {}, "no such repository, or it is private", "Check the id"),
        ("tiny/model", "f" * 40, {}, f"no commit {'f' * 40}", "commit history"),
        ("not a name", REVISION, {}, "not a repository id", "owner/name"),
        ("tiny/model", REVISION, {"HF_HUB_OFFLINE": "1"}, "the Hub cannot be reached", "unset HF_HUB_OFFLINE"),
    ],
)
def test_hub_refusals_are_one_line_that_says_how_to_mend_it(
    hub, tmp_path: Path, repo_id, revision, environment, message, mend
):
    ended = hub[0](repo_id, revision, **environment)
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert mend in last
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "dense").exists()
