"""A checkpoint without its weights: the configuration, the tokenizer and the headers, from a folder or from the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopscope._util.hub import require
from loopscope._util.reading import is_there
from loopscope.errors import CheckpointError
from loopscope.models.checkpoints.find import find_checkpoint, is_hub_name, snapshot, without_safetensors
from loopscope.models.checkpoints.store import (
    Headers,
    TensorHeader,
    TensorStore,
    read_json,
    refuse_adapter,
    without_wrappers,
)


@dataclass(frozen=True)
class Metadata:
    """What is known of a checkpoint before any weight is read or downloaded."""

    folder: Path
    """With config.json and the tokenizer's files; the weights are in it only if they were there already."""
    revision: str | None
    """The commit, for a model from the hub."""
    config: Mapping[str, Any]
    headers: Headers


def read_metadata(name_or_path: str | Path, revision: str | None = None) -> Metadata:
    """Read config.json and the headers of the safetensors files.

    Of a model on the Hugging Face hub that is not in the cache, only these small files and the headers are downloaded.
    Takes names and raises errors as `find_checkpoint` does, and `CheckpointError` for a damaged file.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, str) and is_hub_name(name) and not is_there(Path(name).expanduser()):
        with snapshot(name, revision, ("*.json", "*.jinja")) as folder:
            refuse_adapter(folder)
            config = read_json(folder / "config.json")
            try:
                headers: Headers = TensorStore(folder).headers
            except CheckpointError:  # the weights are not in the cache, or not all of them
                headers = _remote_headers(name, folder.name)
        return Metadata(folder, folder.name, config, headers)
    found = find_checkpoint(name_or_path, revision)
    config = read_json(found.folder / "config.json")
    return Metadata(found.folder, found.revision, config, TensorStore(found.folder).headers)


def _remote_headers(name: str, commit: str) -> Headers:
    hub = require("huggingface_hub", name)
    errors = require("huggingface_hub.errors", name)
    try:
        found = hub.HfApi().get_safetensors_metadata(name, revision=commit)
    except errors.NotASafetensorsRepoError:
        raise without_safetensors(name, commit) from None
    except errors.SafetensorsParsingError as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"A safetensors file of {name!r} is damaged on the hub ({reason}).") from error
    headers = {
        tensor: TensorHeader(tuple(info.shape), info.dtype, file)
        for file, metadata in found.files_metadata.items()
        for tensor, info in metadata.tensors.items()
    }
    return without_wrappers(headers)[0]
