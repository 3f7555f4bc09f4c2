"""A Hub of one dataset: as much of the Hugging Face Hub's protocol as its libraries need to find and read it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPO, COMMIT = "me/squad", "a" * 40


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """Serve a folder as the dataset REPO at COMMIT; gives the endpoint."""

    class Handler(_Handler):
        folder = root

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    folder: Path

    def log_message(self, *_) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        api, files = f"/api/datasets/{REPO}", f"/datasets/{REPO}/resolve/"
        if path.startswith(files):
            commit, name = path.removeprefix(files).split("/", 1)
            self._file(self.folder / name if commit == COMMIT else None)
        elif path.startswith(f"{api}/tree/"):
            below = path.removeprefix(f"{api}/tree/").partition("/")[2]
            self._json([self._entry(file) for file in sorted((self.folder / below).rglob("*"))])
        elif path.startswith(api):
            self._json({"id": REPO, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0})
        else:
            self._missing("RepoNotFound")

    do_HEAD = do_GET

    def _entry(self, file: Path) -> dict:
        name = str(file.relative_to(self.folder))
        size = file.stat().st_size if file.is_file() else 0
        kind = "file" if file.is_file() else "directory"
        return {"type": kind, "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": size}

    def _file(self, file: Path | None) -> None:
        if file is None:
            self._missing("RevisionNotFound")
        elif not file.is_file():
            self._missing("EntryNotFound")
        else:
            whole = file.read_bytes()
            headers = {
                "X-Repo-Commit": COMMIT,
                "ETag": f'"{hashlib.sha1(whole).hexdigest()}"',
                "Accept-Ranges": "bytes",
            }
            if (wanted := self.headers.get("Range")) and self.command == "GET":
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                end = min(int(last or len(whole)), len(whole) - 1)
                headers["Content-Range"] = f"bytes {first}-{end}/{len(whole)}"
                self._send(206, whole[int(first) : end + 1], headers)
            else:
                self._send(200, whole, headers)

    def _missing(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
