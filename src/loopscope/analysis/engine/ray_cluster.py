"""Workers on a Ray cluster, one actor each."""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loopscope._util.hub import require
from loopscope.analysis.engine.run import Worker, WorkerDiedError
from loopscope.analysis.engine.worker import answer, pack_work, unpack_work
from loopscope.errors import ConfigError, WorkerError

_SECONDS = 5.0
"""In which a cluster has to answer."""


class RayEngine:
    """A cluster that runs already. Each worker takes one of its CPUs, and needs loopscope installed there.

    Raises `MissingDependencyError` without the package, and `ConfigError` for a cluster that cannot be reached.
    """

    def __init__(self, address: str, workers: int | None, gpus: float) -> None:
        self._ray = require("ray", "The engine ray", extra="ray")
        self._gpus = gpus
        try:
            _knock(address)
            self._ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(
                f"No Ray cluster can be reached at {address!r} ({reason}); start one with `ray start --head`, or name "
                "its address with --address."
            ) from None
        self.workers = workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        self._work: Any = None

    def start(self, work: Callable[[Any], Any]) -> Worker:
        if self._work is None:
            # Once for all workers: the cluster's object store hands it on.
            self._work = self._ray.put(pack_work(work))
        return _RayWorker(self._ray, self._work, self._gpus)

    def close(self) -> None:
        self._ray.shutdown()


class _RayWorker:
    def __init__(self, ray: Any, work: Any, gpus: float) -> None:
        self._ray = ray
        actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0)(_Actor)
        self._actor = actor.remote(work)

    def call(self, item: Any) -> Any:
        exceptions = self._ray.exceptions
        try:
            kind, value = pickle.loads(self._ray.get(self._actor.call.remote(pickle.dumps(item))))  # noqa: S301 - ours
        except (exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.ObjectLostError) as error:
            raise WorkerDiedError(_first_line(error)) from None
        except exceptions.RayError as error:
            raise WorkerError(f"A Ray worker could not read its work: {_first_line(error)}") from None
        if kind == "error":
            raise value
        return value

    def close(self) -> None:
        self._ray.kill(self._actor)


class _Actor:
    """Lives in a process of the cluster."""

    def __init__(self, work: bytes) -> None:
        self._work = unpack_work(work)

    def call(self, item: bytes) -> bytes:
        return pickle.dumps(answer(self._work, pickle.loads(item)))  # noqa: S301 - from the process that runs the job


def _knock(address: str) -> None:
    """Raises `OSError` where nobody listens, for which Ray itself would wait for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or _last_cluster()
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_SECONDS).close()


def _last_cluster() -> str:
    """Address of the cluster that was started on this machine, as Ray notes it; nothing where none was. Ray does not
    cross it out when a cluster is killed, and waits for it."""
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    return note.read_text().strip() if note.is_file() else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
