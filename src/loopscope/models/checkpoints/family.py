"""A family of checkpoints: how to recognise it, read its config, and find each of our parameters in its tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loopscope._util.sites import STAGES
from loopscope.models.architecture import VALUE_GATE_INPUTS, Architecture
from loopscope.models.native.transformer import LoopedTransformer

_IN_LAYER = re.compile(r"(prelude|recurrent|coda)\.(\d+)\.(.+)")

Config = Mapping[str, Any]

ROTATION_TABLES = re.compile(r"(.+\.)?(freqs_cis|rotary_emb\.(inv_freq|cos_cached|sin_cached))")
"""Buffers that some files hold, under any module; ours are computed from the config."""


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """Rows `start:stop` of the tensor `name`, which must have the given shape."""

    name: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int | None = None
    """None for all rows."""

    @property
    def rows(self) -> tuple[int, int]:
        return self.start, self.shape[0] if self.stop is None else self.stop


@dataclass(frozen=True, slots=True)
class ParameterName:
    """`recurrent.2.attention.query.weight`, taken apart."""

    stage: str
    """prelude, recurrent or coda; empty for a parameter that belongs to no layer."""
    layer: int
    """Counted within the stage."""
    module: str
    """`attention.query`."""
    leaf: str
    """`weight`."""


def parse_name(name: str) -> ParameterName:
    """Take the name of one of our parameters apart."""
    match = _IN_LAYER.fullmatch(name)
    stage, layer, rest = (match[1], int(match[2]), match[3]) if match else ("", 0, name)
    module, _, leaf = rest.rpartition(".")
    return ParameterName(stage, layer, module, leaf)


def parameter_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every parameter of the native model and its shape, in the model's order.

    One layer of each stage is built, without memory for its values, and stands for the others: a config may ask for
    thousands of layers before it turns out that the checkpoint does not hold them.
    """
    layers = {stage: getattr(architecture, stage) for stage in STAGES}
    fewest = {stage: min(count, 1) for stage, count in layers.items()}
    with torch.device("meta"):
        model = LoopedTransformer(
            dataclasses.replace(
                architecture, **fewest, sliding_window=None, full_attention_layers=(), value_embeddings=()
            )
        )
    keys = architecture.kv_heads * architecture.head_dim
    of_values = {
        "attention.value_embedding.weight": (architecture.vocab_size, keys),
        "attention.value_gate.weight": (architecture.kv_heads, VALUE_GATE_INPUTS),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    place = 0
    for name, module in model.named_children():
        below = {leaf: tuple(parameter.shape) for leaf, parameter in module.named_parameters()}
        if name in layers:
            one = {leaf.removeprefix("0."): shape for leaf, shape in below.items()}
            below = {}
            for layer in range(layers[name]):
                more = of_values if place in architecture.value_embeddings else {}
                of_attention = {leaf: shape for leaf, shape in one.items() if leaf.startswith("attention.")}
                below |= {f"{layer}.{leaf}": shape for leaf, shape in (of_attention | more | one).items()}
                place += 1
        shapes |= {f"{name}.{leaf}": shape for leaf, shape in below.items()}
    return shapes


@dataclass(frozen=True)
class Family:
    """Everything that is particular to one published format.

    A checkpoint belongs to the family whose `model_types` has its config's `model_type` and whose `recognises` knows
    its tensors: either alone may lie.
    """

    name: str
    model_types: tuple[str, ...]
    """What config.json says; several families may share one."""
    recognises: Callable[[Collection[str]], bool]
    """From the names of the tensors."""
    architecture: Callable[[Config], Architecture]
    """Raises `CheckpointError` or `ConfigError` for any setting that the native model does not implement."""
    parts: Callable[[Architecture, Collection[str]], Mapping[str, TensorSlice]]
    """Where each of our parameters lies, given the names of the tensors."""
    unused: re.Pattern[str] = ROTATION_TABLES
    """Names of tensors that may be there and are computed rather than read."""
    tied_head: str | None = None
    """A tensor that may be there where head and embedding are tied, and must then equal the embedding."""
