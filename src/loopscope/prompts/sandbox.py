"""Templates and tokenizers of a checkpoint are programs, which may loop, or write without end: they run in a process of
their own (`sandboxed`), which is ended with what it does."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

from loopscope._util.reading import parse_json

_MOST = 2**28
"""Bytes of an answer."""
SECONDS, CHARACTERS = 10.0, 100_000
"""Of processor time for a request, and one second more for so many characters of it."""


class RefusedError(Exception):
    """A program of a checkpoint gave no answer; the message says why, on one line."""


class Sandbox:
    """Runs requests one by one; the process is started with the first, and again after one that it did not survive."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._known: set[str] = set()
        self._lock = threading.Lock()
        # A fork of this process has one of its own, rather than half of what is written to this one.
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.close)

    def call(self, run: str, content: Mapping[str, Any], **arguments: Any) -> Any:
        """What a program, of this content, makes of the arguments. Raises `RefusedError`."""
        text = json.dumps(content)
        digest = hashlib.sha256(text.encode()).hexdigest()
        with self._lock:
            process = self._started()
            request: dict[str, Any] = {"run": run, "program": digest, "arguments": arguments}
            if digest not in self._known:
                request["content"] = content
            request["seconds"] = SECONDS + len(json.dumps(request)) / CHARACTERS
            answer = self._asked(process, json.dumps(request).encode() + b"\n")
            if not answer.endswith(b"\n"):
                raise RefusedError(self._ended(process, len(answer)))
            self._known.add(digest)
        try:
            found = parse_json(answer.decode())
        except ValueError as error:
            raise RefusedError(str(error)) from None
        if "refused" in found:
            raise RefusedError(found["refused"])
        return found["found"]

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        self._known.clear()
        if process is not None:
            process.kill()
            process.communicate()

    def _forget(self) -> None:
        self._process = None
        self._known.clear()
        self._lock = threading.Lock()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "loopscope.prompts.sandboxed"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # Where a library says that it panics, which the answer says too.
                stderr=subprocess.DEVNULL,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        return self._process

    def _asked(self, process: subprocess.Popen[bytes], request: bytes) -> bytes:
        """The answer; what there is of it where the process ends, or writes too much."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
        except OSError:
            return b""
        except BaseException:  # a signal, after which half a request would be answered
            self.close()
            raise
        try:
            return process.stdout.readline(_MOST)
        except BaseException:
            self.close()
            raise

    def _ended(self, process: subprocess.Popen[bytes], size: int) -> str:
        """Why there is no answer."""
        self.close()
        if size:
            return f"it writes more than {_MOST:,} bytes"
        if process.returncode == -signal.SIGPROF:
            return "it takes too long"
        return "it takes too much memory, or breaks the program that runs it"


@cache
def sandbox() -> Sandbox:
    """The one of this process."""
    return Sandbox()
