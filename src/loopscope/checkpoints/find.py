"""From a name to a folder."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from loopscope.checkpoints.hub import download_model, is_hub_name
from loopscope.errors import CheckpointError, ConfigError

__all__ = ["FoundCheckpoint", "demo_names", "find_checkpoint"]

_PREFIX = "demo:"


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
    if local is None and isinstance(name_or_path, str) and is_hub_name(name) and not path.exists():
        return FoundCheckpoint(*download_model(name, revision))
    if local is not None and revision is None:
        return FoundCheckpoint(local, None)
    if local is not None:
        raise ConfigError(
            f"--revision {revision} chooses a version on the Hugging Face hub, and {name!r} is here already; leave it "
            "out."
        )
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json and model.safetensors.")
    raise CheckpointError(
        f"{name!r} is neither a folder nor a shipped model{_suggestion(_PREFIX + name)}; the shipped ones are "
        f"{', '.join(demo_names())}, and a model of the Hugging Face hub has a name such as organisation/model."
    )


def _local(name: str, path: Path) -> Path | None:
    """The folder of a shipped model or of a path; None where there is none."""
    if not name.startswith(_PREFIX):
        return path if path.is_dir() else None
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
