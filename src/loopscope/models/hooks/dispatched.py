"""Models whose modules accelerate has put on several devices, in memory and on disk (`device_map` of transformers)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn

from loopscope.errors import ConfigError


def is_dispatched(model: nn.Module) -> bool:
    """Weights that are on the device meta are brought while their module runs."""
    return isinstance(getattr(model, "hf_device_map", None), Mapping)


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, those that are brought too, one at a time."""
    for name, values in chain(model.named_parameters(), model.named_buffers()):
        yield name, _brought(model, name) if values.is_meta else values


def placement_of(model: nn.Module) -> str | None:
    """`cuda:0: model.embed_tokens, model.layers.0; disk: lm_head`, of a model that is on more than one device."""
    device_map: Any = getattr(model, "hf_device_map", None)
    if not isinstance(device_map, Mapping):
        return None
    places: dict[str, list[str]] = {}
    for module, place in device_map.items():
        places.setdefault(f"cuda:{place}" if isinstance(place, int) else str(place), []).append(module or "all of it")
    if len(places) == 1:
        return None
    return "; ".join(f"{place}: {', '.join(modules)}" for place, modules in places.items())


def _brought(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    hook: Any = getattr(model.get_submodule(owner), "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        weights = getattr(one, "weights_map", None)
        if weights is not None:
            found: Tensor = weights[leaf]
            return found
    raise ConfigError(
        f"{type(model).__name__} has the weight {name} on the device 'meta', and nothing that brings it; load it."
    )
