"""Models from the Hugging Face hub: a repository's configuration, tokenizer and safetensors, never its code."""

from __future__ import annotations

import re
from pathlib import Path

from loopscope._extras import require
from loopscope._hub import downloading
from loopscope.checkpoints.conversion import conversion_command, is_pickled
from loopscope.errors import CheckpointError

__all__ = ["LEFT_OUT", "download_model", "is_hub_name", "without_safetensors"]

_WANTED = ("*.json", "*.safetensors", "*.jinja")
LEFT_OUT = (
    "*/*",  # below the top level lie copies for other programs
    "consolidated*",  # the same weights a second time, for another program
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")


def is_hub_name(name: str) -> bool:
    """Whether a name has the form `organisation/model`: one slash, and no beginning that only paths have."""
    return _NAME.fullmatch(name) is not None


def download_model(name: str, revision: str | None = None) -> tuple[Path, str]:
    """Folder in the hub's cache, and the commit that it holds. What is cached is not downloaded again.

    `revision` is a branch, a tag or a commit; the repository's main branch unless given. Without a network the cached
    commit of that branch is taken. A download that was interrupted goes on with the files that are missing.

    Raises `MissingDependencyError` without the extra `hub`, `StorageError` for a full disk, `CheckpointError` for
    everything else that stands in the way.
    """
    hub = require("huggingface_hub", f"{name!r} is no folder, and to look for it on the Hugging Face hub loopscope")
    with downloading(
        repr(name),
        name,
        error=CheckpointError,
        otherwise="if it is meant to be a folder, check the path, as there is none of this name",
        revision=revision,
    ):
        folder = Path(
            hub.snapshot_download(name, revision=revision, allow_patterns=list(_WANTED), ignore_patterns=list(LEFT_OUT))
        )
        if not any(folder.glob("*.safetensors")):
            raise without_safetensors(name, folder.name, hub.HfApi().list_repo_files(name, revision=folder.name))
    return folder, folder.name


def without_safetensors(name: str, commit: str, files: list[str]) -> CheckpointError:
    """The error for a repository that holds no safetensors, given the names of its files."""
    pickled = sorted(file for file in files if "/" not in file and is_pickled(file))
    if not pickled:
        return CheckpointError(
            f"The repository {name!r} holds no weights at its top level as safetensors, which loopscope reads; give "
            "another repository or revision."
        )
    copy = Path(name.partition("/")[2])
    return CheckpointError(
        f"The repository {name!r} holds {pickled[0]} and no safetensors; pickle files can run code and are not read: "
        f"download it with `hf download {name} --revision {commit} --local-dir {copy}`, convert it with "
        f"`{conversion_command(copy, pickled)}` and give the folder."
    )
