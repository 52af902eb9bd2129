"""What lies around a model: what it was wrapped in for speed, several devices or training, out of which it is taken;
and accelerate, which puts its modules on several devices, in memory and on disk (`device_map` of transformers)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn

from loopscope.errors import ConfigError

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrap(model: nn.Module) -> tuple[nn.Module, str | None]:
    """The module inside torch.compile, DataParallel and PEFT, in whatever order, and a sentence that says so.

    Adapters that PEFT has put into the layers stay there, as they are set. Raises `ConfigError` for those that PEFT
    adds beside the layers, such as a learned prompt, without which the module inside is another model.
    """
    wrappers = []
    while True:
        compiled = getattr(model, "_orig_mod", None)
        adapted = _adapted(model)
        if isinstance(compiled, nn.Module):
            wrappers.append("torch.compile")
            model = compiled
        elif isinstance(model, _PARALLEL):
            wrappers.append(type(model).__name__)
            model = model.module
        elif adapted is not None:
            wrappers.append(f"PEFT with the adapters {', '.join(adapted.active_adapters)}, which stay in its layers")
            model = adapted.get_base_model()
        else:
            break
    return model, f"{type(model).__name__} was taken out of {' and '.join(wrappers)}." if wrappers else None


def _adapted(model: nn.Module) -> Any:
    """The same, if it is PEFT's wrapper; the package is not imported to find out."""
    package = sys.modules.get("peft")
    if package is None or not isinstance(model, package.PeftModel):
        return None
    adapted: Any = model
    if adapted.active_peft_config.is_prompt_learning:
        raise ConfigError(
            f"{type(model).__name__} has learned tokens ({adapted.active_peft_config.peft_type}) that PEFT puts before "
            "the text, so that its states have other tokens than the prompt; give the model without them."
        )
    return adapted


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
