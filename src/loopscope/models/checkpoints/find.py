"""From a name to a folder."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePath

from loopscope._util.hub import downloading, require
from loopscope._util.reading import is_there
from loopscope.errors import CheckpointError, ConfigError

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of files that are read by unpickling, which can run code."""

# One line, so that it can be copied, and short, so that it fits into a message. `weights_only` refuses pickles that
# would run code; clones give tensors that share memory, such as a tied head, each its own, without which safetensors
# refuses to write them.
_SCRIPT = (
    "import sys,torch,pathlib,safetensors.torch as s;d=pathlib.Path(sys.argv[1]);"
    "s.save_file({n:t.clone().contiguous() for f in d.glob(sys.argv[2]) "
    "for n,t in torch.load(f,map_location='cpu',weights_only=True).items()},d/'model.safetensors',{'format':'pt'})"
)

_WANTED = ("*.json", "*.safetensors", "*.jinja")
_LEFT_OUT = (
    "*/*",  # below the top level lie copies for other programs
    "consolidated*",  # the same weights a second time, for another program
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")

_PREFIX = "demo:"


def is_pickled(name: str) -> bool:
    """Whether a file of this name would have to be unpickled."""
    return PurePath(name).suffix in PICKLED


def conversion_command(folder: Path, names: Sequence[str]) -> str:
    """A shell command that writes model.safetensors beside the pickled files of the given names, of one or several
    shards.

    It needs torch and safetensors alone. Other pickled files than weights (training_args.bin) are left out.
    """
    standard = [name for name in names if name.startswith("pytorch_model")]
    pattern = "pytorch_model*.bin" if standard else "*" + PurePath(names[0]).suffix
    return f'python -c "{_SCRIPT}" {shlex.quote(str(folder))} {shlex.quote(pattern)}'


def is_hub_name(name: str) -> bool:
    """Whether a name has the form `organisation/model`: one slash, and no beginning that only paths have."""
    return _NAME.fullmatch(name) is not None


def download_model(name: str, revision: str | None = None) -> tuple[Path, str]:
    """Folder in the hub's cache, and the commit that it holds. What is cached is not downloaded again.

    `revision` is a branch, a tag or a commit; the repository's main branch unless given. Without a network the cached
    commit of that branch is taken. A download that was interrupted is resumed with the files that are missing.

    Raises `MissingDependencyError` without the extra `hub`, `StorageError` for a full disk, `CheckpointError` for
    everything else that stands in the way.
    """
    with snapshot(name, revision, _WANTED) as folder:
        if not any(folder.glob("*.safetensors")):
            raise without_safetensors(name, folder.name)
    return folder, folder.name


@contextmanager
def snapshot(name: str, revision: str | None, wanted: Sequence[str]) -> Iterator[Path]:
    """The folder of a repository's files of these patterns, downloaded if they are not in the cache. What goes wrong
    there, or in the `with`, raises as in `download_model`."""
    hub = require("huggingface_hub", f"{name!r} is no folder, and to look for it on the Hugging Face hub loopscope")
    with downloading(
        repr(name),
        name,
        error=CheckpointError,
        otherwise="if it is meant to be a folder, check the path, as there is none of this name",
        revision=revision,
    ):
        yield Path(
            hub.snapshot_download(name, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(_LEFT_OUT))
        )


def without_safetensors(name: str, commit: str) -> CheckpointError:
    """The error for a repository that holds no safetensors."""
    files = require("huggingface_hub", name).HfApi().list_repo_files(name, revision=commit)
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


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """Where a checkpoint lies, and which version it is."""

    folder: Path
    revision: str | None
    """The commit, for a model from the hub; None for a folder and for a shipped model."""


def demo_names() -> list[str]:
    """Names of the shipped models, `demo:injected` and so on."""
    models = _demo_folder()
    if not models.is_dir():
        return []
    return sorted(_PREFIX + path.name for path in models.iterdir() if (path / "config.json").is_file())


def find_checkpoint(name_or_path: str | Path, revision: str | None = None) -> FoundCheckpoint:
    """The folder of a path, of a shipped model, or of a model of the Hugging Face hub, which is downloaded.

    A string of the form `organisation/model` is looked for on the hub if there is no folder of this name; a `Path`
    never is. `revision` is a branch, a tag or a commit there.

    Raises `CheckpointError` with the names that exist, or why there can be no download; `ConfigError` for a revision
    of something that is not on the hub; `MissingDependencyError` without the extra `hub`; `StorageError` for a full
    disk.
    """
    name = str(name_or_path)
    path = Path(name_or_path).expanduser()
    local = _local(name, path)
    if local is None and isinstance(name_or_path, str) and is_hub_name(name) and not is_there(path):
        return FoundCheckpoint(*download_model(name, revision))
    if local is not None and revision is None:
        return FoundCheckpoint(local, None)
    if local is not None:
        raise ConfigError(
            f"--revision {revision} chooses a version on the Hugging Face hub, and {name!r} is here already; leave it "
            "out."
        )
    if is_there(path):
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json and model.safetensors.")
    raise CheckpointError(
        f"{name!r} is neither a folder nor a shipped model{_suggestion(_PREFIX + name)}; the shipped ones are "
        f"{', '.join(demo_names())}, and a model of the Hugging Face hub has a name such as organisation/model."
    )


def _local(name: str, path: Path) -> Path | None:
    """The folder of a shipped model or of a path; None where there is none."""
    if not name.startswith(_PREFIX):
        return path if is_there(path) and path.is_dir() else None
    if name in demo_names():
        return _demo_folder() / name.removeprefix(_PREFIX)
    raise CheckpointError(
        f"There is no shipped model {name!r}{_suggestion(name)}; the shipped ones are {', '.join(demo_names())}."
    )


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, demo_names(), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _demo_folder() -> Path:
    return Path(str(files("loopscope"))) / "demo" / "models"
