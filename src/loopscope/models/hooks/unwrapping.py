"""Taking a model out of what it was wrapped in for speed, several devices or training."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

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
