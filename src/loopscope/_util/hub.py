"""Downloads from the Hugging Face hub: what may go wrong, in one sentence each."""

from __future__ import annotations

import errno
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from loopscope.errors import LoopscopeError, MissingDependencyError, StorageError

_LOGIN = "`hf auth login`"


def require(module: str, purpose: str, extra: str = "hub") -> ModuleType:
    """Import a module of an extra of this package, or raise `MissingDependencyError` with the command that installs it.

    `purpose` begins the sentence: what needs the module.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingDependencyError(
            f"{purpose} needs the package {package}, which is not installed; run: pip install 'loopscope[{extra}]'"
        ) from error


@contextmanager
def downloading(
    what: str, repo: str, *, error: type[LoopscopeError], otherwise: str, revision: str | None = None
) -> Iterator[None]:
    """Turn whatever the hub's client raises into one sentence: `what` cannot be downloaded, why, and what to do.

    The sentence ends with `otherwise`, a way that needs no hub. Raises `error`, or `StorageError` where the disk is
    full.
    """
    try:
        yield
    except LoopscopeError:
        raise
    except Exception as cause:  # the client also passes on what its HTTP library raises, which is not ours to list
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageError(_full(what)) from cause
        problem, remedy = _diagnosis(cause, repo, revision)
        raise error(f"{what} cannot be downloaded: {problem}; {remedy}, or {otherwise}.") from cause


def _full(what: str) -> str:
    cache = require("huggingface_hub.constants", what).HF_HUB_CACHE
    return (
        f"There is no room left to download {what} into {cache}; free some space, or let HF_HOME name a folder on a "
        "larger disk, and run the same command again."
    )


def _diagnosis(cause: Exception, repo: str, revision: str | None) -> tuple[str, str]:
    """What is wrong, and what to do about it."""
    kinds = require("huggingface_hub.errors", repo)
    if isinstance(cause, kinds.GatedRepoError):  # before RepositoryNotFoundError, of which it is a kind
        return f"{repo} is gated", f"accept its terms on its page of the hub and log in with {_LOGIN}"
    if isinstance(cause, kinds.RepositoryNotFoundError):
        return f"the hub has no {repo} that you may read", f"check the name, log in with {_LOGIN} if it is private"
    if isinstance(cause, kinds.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}", "give one of its branches, tags or commits"
    if isinstance(cause, kinds.EntryNotFoundError) and not isinstance(cause, kinds.LocalEntryNotFoundError):
        return f"{repo} no longer has the file", "look for a newer loopscope"
    answer = next((each for each in (cause, cause.__cause__) if isinstance(each, kinds.HfHubHTTPError)), None)
    if answer is not None:
        status = answer.response.status_code
        return f"the hub answered HTTP {status}", f"log in with {_LOGIN}" if status in (401, 403) else "try again later"
    if isinstance(cause.__cause__, kinds.OfflineModeIsEnabled):
        return "it is not in the cache, and HF_HUB_OFFLINE forbids the network", "unset HF_HUB_OFFLINE"
    if isinstance(cause, kinds.LocalEntryNotFoundError):
        return "it is not in the cache, and the hub cannot be reached", "connect to the network"
    return _first_line(cause), "run the same command again, which keeps the files that have arrived"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
