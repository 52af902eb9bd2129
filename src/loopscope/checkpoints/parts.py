"""Where our parameters lie in stored tensors."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import torch

from loopscope.architecture import Architecture
from loopscope.model import LoopedTransformer

__all__ = ["ParameterName", "Part", "parameter_shapes", "parse_name"]

_IN_LAYER = re.compile(r"(prelude|recurrent|coda)\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Part:
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
    layers = {stage: getattr(architecture, stage) for stage in ("prelude", "recurrent", "coda")}
    fewest = {stage: min(count, 1) for stage, count in layers.items()}
    with torch.device("meta"):
        model = LoopedTransformer(
            dataclasses.replace(architecture, **fewest, sliding_window=None, full_attention_layers=())
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_children():
        below = {leaf: tuple(parameter.shape) for leaf, parameter in module.named_parameters()}
        if name in layers:
            one = {leaf.removeprefix("0."): shape for leaf, shape in below.items()}
            below = {f"{layer}.{leaf}": shape for layer in range(layers[name]) for leaf, shape in one.items()}
        shapes |= {f"{name}.{leaf}": shape for leaf, shape in below.items()}
    return shapes
