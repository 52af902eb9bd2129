"""A model's name, or a model, in; a subject out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from loopscope.errors import ConfigError, MissingDependencyError, UnknownFamilyError, last_resort
from loopscope.models.checkpoints.family import Family
from loopscope.models.checkpoints.find import find_checkpoint
from loopscope.models.checkpoints.load import load_checkpoint
from loopscope.models.checkpoints.store import TensorStore
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.hooks.wrap import load_hooked
from loopscope.models.inspection.facts import Dtype
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.subject import Subject, find_device
from loopscope.prompts.tokenizer import load_tokenizer

_AUTO_FLOAT64 = 50e6
"""Parameters up to which `auto` takes float64 on a CPU: an analysis then takes 1.4 to 1.9 times as long (models of 1 to
27 million); larger ones, which consist of matrix products alone, twice as long and twice the memory."""

_DTYPES = {name: getattr(torch, name) for name in get_args(Dtype)}


@last_resort("loading a model")
def load(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    families: Sequence[Family] = (),
) -> NativeSubject | HookedSubject:
    """Load a shipped model (`demo:injected`), a checkpoint folder, or a model of the Hugging Face hub.

    A string of the form `organisation/model` that is no folder is downloaded from the hub, without any code;
    `revision` is a branch, a tag or a commit there. A model of a family that loopscope does not read itself is loaded
    by the transformers package, if that is installed, and watched through hooks; see `loopscope.hook`.

    `families` describe formats of your own, and are asked before those that loopscope knows; see
    docs/adding-a-family.md.

    `dtype` is float32, float64, bfloat16 or float16, or `auto`: float64 for a model of less than 50 million parameters
    on a CPU, else float32. `device` is a torch device, or `auto` for a GPU where there is one.

    Raises `CheckpointError` or `NonFiniteError` for a checkpoint that cannot be had or loaded exactly, `PromptError`
    for a damaged tokenizer, `ConfigError` for another dtype, a device that is not there, or a revision of something
    that is not on the hub, `MissingDependencyError` for a hub name without the extra `hub`, and `StorageError` where
    the disk is too full for a download.
    """
    if dtype not in (*_DTYPES, "auto"):
        raise ConfigError(f"dtype must be auto or one of {', '.join(_DTYPES)}, got {dtype!r}.")
    found = find_checkpoint(name_or_path, revision)
    place = find_device(device)
    if dtype == "auto":
        parameters = sum(math.prod(header.shape) for header in TensorStore(found.folder).headers.values())
        dtype = "float64" if place.type == "cpu" and parameters < _AUTO_FLOAT64 else "float32"
    try:
        checkpoint = load_checkpoint(found.folder, dtype=_DTYPES[dtype], device=place, families=families)
    except UnknownFamilyError as unknown:
        name = str(name_or_path)
        try:
            return load_hooked(found.folder, dtype=_DTYPES[dtype], device=place, name=name, revision=found.revision)
        except MissingDependencyError as error:
            # What is unknown, and the command that installs what may know it.
            raise MissingDependencyError(f"{unknown} {error}") from None
    return NativeSubject(
        checkpoint.model,
        name=str(name_or_path),
        family=checkpoint.family,
        tokenizer=load_tokenizer(found.folder),
        weights_sha256=checkpoint.weights_sha256,
        revision=found.revision,
    )


def as_subject(model: Subject | nn.Module) -> Subject:
    """What a function that takes a model in memory was given: a subject already, or loopscope's own model.

    Raises `ConfigError` for any other torch module, since only its owner knows which of its layers are which.
    """
    if isinstance(model, LoopedTransformer):
        return NativeSubject(model)
    if isinstance(model, nn.Module):
        raise ConfigError(f"{type(model).__name__} is a torch module; wrap it first, as in loopscope.hook(model).")
    return model


def subject_of(
    model: str | Path | nn.Module | Subject,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
) -> Subject:
    """What a function that takes a model was given: a name or folder for `load`, which the other arguments are for, or
    a model in memory. Raises the errors of `load` and of `as_subject`."""
    if isinstance(model, str | Path):
        return load(model, revision=revision, dtype=dtype, device=device)
    return as_subject(model)
