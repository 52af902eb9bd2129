"""A small stand-in for the Hugging Face hub: a real HTTP server that speaks what a download needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import pytest

Files = dict[str, bytes]

_API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/?]+))?"
)
_FILE = re.compile(r"/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>[^?]+)")


@dataclass
class Hub:
    """What the server has, and what it was asked for."""

    url: str = ""
    repositories: dict[str, dict[str, Files]] = field(default_factory=dict)
    """Files by repository, and there by commit; the last commit is main."""
    gated: set[str] = field(default_factory=set)
    """Repositories whose files nobody may have."""
    status: int = 200
    """Of every answer: 503 for a hub that is down."""
    broken: set[str] = field(default_factory=set)
    """Files for which the answer is 500."""
    cuts: dict[str, int] = field(default_factory=dict)
    """Files during which the connection breaks, once, after so many bytes."""
    requests: list[str] = field(default_factory=list)
    """Method, path and, where one was asked for, range."""

    def publish(self, repo: str, files: Files) -> str:
        """Add a commit, and return it."""
        commits = self.repositories.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits[commit] = files
        return commit

    def commit(self, repo: str, revision: str) -> str | None:
        commits = self.repositories[repo]
        return list(commits)[-1] if revision == "main" else revision if revision in commits else None


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port of this machine, until the context ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *arguments: object) -> None:
        self.hub = hub
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        asked = self.headers.get("Range")
        self.hub.requests.append(f"{self.command} {self.path}" + (f" {asked}" if asked else ""))
        if self.hub.status != 200:
            return self._send(self.hub.status)
        match = _API.match(self.path) or _FILE.match(self.path)
        if match is None:
            return self._send(404)
        repo, revision = match["repo"], match["revision"] or "main"
        if repo not in self.hub.repositories:
            return self._send(401, error="RepoNotFound")
        commit = self.hub.commit(repo, revision)
        if commit is None:
            return self._send(404, error="RevisionNotFound")
        files = self.hub.repositories[repo][commit]
        if match.re is _FILE:
            return self._send_file(repo, commit, match["path"], files)
        if match["what"] == "tree":
            return self._send_json([self._entry(path, content) for path, content in files.items()])
        siblings = [{"rfilename": path} for path in files]
        return self._send_json({"id": repo, "sha": commit, "siblings": siblings, "tags": [], "private": False})

    @staticmethod
    def _entry(path: str, content: bytes) -> dict[str, object]:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _send_file(self, repo: str, commit: str, path: str, files: Files) -> None:
        if path not in files:
            return self._send(404, error="EntryNotFound")
        if path in self.hub.broken:
            return self._send(500)
        if repo in self.hub.gated:
            return self._send(403, error="GatedRepo")
        content, etag = files[path], hashlib.sha1(files[path]).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self._send(200, content, headers=headers)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, content, headers=headers, cut=self.hub.cuts.pop(path, None))
        first = int(asked[1])
        last = min(int(asked[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._send(206, content[first : last + 1], headers=headers)

    def _send_json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), headers={"Content-Type": "application/json"})

    def _send(
        self,
        status: int,
        content: bytes = b"",
        *,
        error: str | None = None,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), **({"X-Error-Code": error} if error else {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content if cut is None else content[:cut])
        if cut is not None:
            self.close_connection = True


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client look for the hub there."""
    constants = import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@contextmanager
def believed_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client believes in, an empty cache in `folder`, where the process works, and nobody logged in."""
    constants = import_module("huggingface_hub.constants")
    with serving() as hub:
        point_to(hub.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits longer and longer between attempts
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(folder)
        yield hub
