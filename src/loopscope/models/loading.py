"""A model's name, or a model, in; a subject out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from loopscope._util.ranges import check_type
from loopscope.errors import ConfigError, MissingDependencyError, UnknownFamilyError, last_resort
from loopscope.models.checkpoints.family import ROTATION_TABLES, Family
from loopscope.models.checkpoints.find import find_checkpoint
from loopscope.models.checkpoints.layout import refuse_ignored
from loopscope.models.checkpoints.load import load_checkpoint
from loopscope.models.checkpoints.placement import DeviceMap
from loopscope.models.checkpoints.store import Headers, TensorStore
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.hooks.wrap import hook, load_hooked
from loopscope.models.hooks.wrappers import unwrap
from loopscope.models.inspection.facts import Dtype, dtype_name
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.subject import PrefixReading, Subject, find_device
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
    dtype: str | torch.dtype = "float32",
    device: str = "auto",
    device_map: DeviceMap | None = None,
    families: Sequence[Family] = (),
    prefix: PrefixReading = "causal",
    ignore_config: Sequence[str] = (),
) -> NativeSubject | HookedSubject:
    """Load a shipped model (`demo:injected`), a checkpoint folder, or a model of the Hugging Face hub.

    A string of the form `organisation/model` that is no folder is downloaded from the hub, without any code;
    `revision` is a branch, a tag or a commit there. A model of a family, or with a setting, that loopscope does not
    read itself is loaded by transformers, if that is installed, and watched through hooks; see `loopscope.hook`.

    `families` describe formats of your own, and are asked before those that loopscope knows; see
    docs/adding-a-family.md.

    `dtype` is float32, float64, bfloat16 or float16, by torch's object or by name (`bf16`, `fp16`); or `stored`, the
    narrowest that holds all of the checkpoint's weights as they are; or `auto`, float64 for a model of less than 50
    million parameters on a CPU, else float32. `device` is a torch device, or `auto` for a GPU where there is one.

    `device_map` is for a model that one device has no room for: `auto`, which fills the device, then other GPUs, and
    keeps what is left in memory or leaves it on disk; or places by layers, as a mapping or as text, such as
    `prelude=cuda:0,recurrent.0-3=cuda:1,coda=disk`. What belongs to no layer is on `device`, to which layers on disk
    (and in memory, `cpu`, where that is a GPU) are brought one at a time, whenever they run. The numbers are those of
    one device. A model that transformers loads takes its own names of modules, and needs the package accelerate.

    `prefix` is for a model that was trained to read its prompt in both directions, HRM-Text: `trained` reads it so,
    `causal` as a text that no token looks ahead in. `loopscope analyze` reads it as it was trained.

    `ignore_config` names fields of config.json that loopscope does not know, to be passed over where you know that they
    do not change what the model computes; the subject's `info` keeps them.

    Raises `CheckpointError` or `NonFiniteError` for a checkpoint that cannot be had or loaded exactly, `PromptError`
    for a damaged tokenizer, `ConfigError` for another dtype, a device that is not there, a map of devices that does not
    fit the model, or a revision of something that is not on the hub, `MissingDependencyError` for a hub name without
    the extra `hub`, and `StorageError` where the disk is too full for a download.
    """
    check_type("name_or_path", name_or_path, Path)
    name = dtype_name(dtype)
    if name not in (*_DTYPES, "auto", "stored"):
        raise ConfigError(f"dtype must be auto, stored or one of {', '.join(_DTYPES)}, got {dtype!r}.")
    found = find_checkpoint(name_or_path, revision)
    place = find_device(device)
    taken = _DTYPES[name] if name in _DTYPES else _choose_dtype(name, TensorStore(found.folder).headers, place)
    try:
        checkpoint = load_checkpoint(
            found.folder,
            dtype=taken,
            device=place,
            families=families,
            ignore_config=ignore_config,
            device_map=device_map,
        )
    except UnknownFamilyError as unknown:
        refuse_ignored(ignore_config, unknown)
        try:
            return load_hooked(
                found.folder,
                dtype=taken,
                device=place,
                device_map=device_map,
                name=str(name_or_path),
                revision=found.revision,
                prefix=prefix,
                unknown=unknown,
            )
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
        ignored_config=ignore_config,
        placement=checkpoint.placement,
    )


def _choose_dtype(name: str, headers: Headers, place: torch.device) -> torch.dtype:
    if name == "stored":
        names = {header.dtype for tensor, header in headers.items() if not ROTATION_TABLES.fullmatch(tensor)}
        stored = [_DTYPES[each] for each in names & _DTYPES.keys()] or [torch.float32]
        narrowest: torch.dtype = reduce(torch.promote_types, stored)
        return narrowest
    parameters = sum(math.prod(header.shape) for header in headers.values())
    return torch.float64 if place.type == "cpu" and parameters < _AUTO_FLOAT64 else torch.float32


def as_subject(model: Subject | nn.Module) -> Subject:
    """What a function that takes a model in memory was given: a subject already, loopscope's own model, or any other
    torch module, which is hooked. Raises `ConfigError` as `loopscope.hook` does."""
    if not isinstance(model, nn.Module):
        check_model(model)
        return model
    inside, _ = unwrap(model)
    return NativeSubject(inside) if isinstance(inside, LoopedTransformer) else hook(model)


def check_model(model: object) -> None:
    """Raises `ConfigError` for what no function takes for a model."""
    if not isinstance(model, str | Path | nn.Module) and not hasattr(model, "info"):
        raise ConfigError(f"model takes a name, a folder, a subject or a torch module, got {model!r}.")


def subject_of(
    model: str | Path | nn.Module | Subject,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str = "auto",
    device_map: DeviceMap | None = None,
    prefix: PrefixReading = "causal",
    ignore_config: Sequence[str] = (),
) -> Subject:
    """What a function that takes a model was given: a name or folder for `load`, which the other arguments are for, or
    a model in memory. Raises the errors of `load` and of `as_subject`."""
    if isinstance(model, str | Path):
        return load(
            model,
            revision=revision,
            dtype=dtype,
            device=device,
            device_map=device_map,
            prefix=prefix,
            ignore_config=ignore_config,
        )
    return as_subject(model)
