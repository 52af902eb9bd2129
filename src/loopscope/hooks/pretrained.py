"""Checkpoint folders that the transformers package can load, watched through hooks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from loopscope._extras import require
from loopscope.checkpoints import TensorStore
from loopscope.checkpoints.memory import check_memory
from loopscope.errors import CheckpointError, NonFiniteError
from loopscope.hooks.decoders import find_layout
from loopscope.hooks.hooked import HookedSubject
from loopscope.prompts import load_tokenizer

__all__ = ["load_hooked"]


def load_hooked(
    folder: Path, *, dtype: torch.dtype, device: torch.device, name: str | None = None, revision: str | None = None
) -> HookedSubject:
    """Load a folder with transformers' own modelling code, and hook the model.

    Only safetensors are read, and no code from the folder is run. transformers fills what a checkpoint lacks with
    random numbers, so its account of the loading is checked: a tensor that is missing, not wanted or of another shape
    is named in a `CheckpointError`, as is a model that transformers does not know or cannot load. Raises
    `NonFiniteError` for a weight that is NaN or infinite, `ConfigError` for a model whose layers cannot be told, and
    `MissingDependencyError` without the extra `transformers`.
    """
    transformers = require("transformers", "A model of a family that loopscope does not read itself", "transformers")
    store = TensorStore(folder)
    check_memory(sum(math.prod(header.shape) for header in store.headers.values()), dtype, device)
    model = _load(transformers, folder, dtype).to(device)
    _check_finite(model, folder)
    layout, set_recurrences = find_layout(model)
    return HookedSubject(
        model.eval().requires_grad_(False),
        layout,
        set_recurrences=set_recurrences,
        name=name or str(folder),
        tokenizer=load_tokenizer(folder),
        weights_sha256=store.sha256(),
        revision=revision,
    )


def _load(transformers: ModuleType, folder: Path, dtype: torch.dtype) -> nn.Module:
    try:
        with _silence(transformers):
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # or the error would not say which
                output_loading_info=True,
            )
    except Exception as error:  # anything can go wrong in there, and all of it means the same
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{folder} is of no family that loopscope reads itself, and transformers {transformers.__version__} cannot "
            f"load it either: {reason}"
        ) from error
    _check_report(report, folder)
    loaded: nn.Module = model
    return loaded


def _check_report(report: dict[str, Any], folder: Path) -> None:
    if report["mismatched_keys"]:
        name, stored, wanted = min(report["mismatched_keys"])
        raise CheckpointError(f"{name!r} in {folder} has shape {tuple(stored)}; config.json asks for {tuple(wanted)}.")
    for key, verb, meaning in (
        ("missing_keys", "lacks", "that the model has"),
        ("unexpected_keys", "holds", "that the model does not have"),
    ):
        names = sorted(report[key])
        if names:
            count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
            raise CheckpointError(
                f"{folder} {verb} {count} {meaning}, first {names[0]!r}; it is another model than its config says."
            )
    if report.get("error_msgs"):
        raise CheckpointError(f"transformers could not load {folder} whole: {report['error_msgs'][0]}")


def _check_finite(model: nn.Module, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(
                f"The weight {name!r} in {folder} holds NaN or infinity in {parameter.dtype}; the checkpoint is "
                "damaged, or needs a wider dtype."
            )


@contextmanager
def _silence(transformers: ModuleType) -> Iterator[None]:
    """No progress bars and no reports of the library: what they would say is checked, and said in our words."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
