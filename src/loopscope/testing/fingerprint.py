"""Everything about a torch module that studying it must leave as it was."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

__all__ = ["fingerprint"]


def fingerprint(module: nn.Module) -> dict[str, object]:
    """What there is to say about each weight, buffer and submodule, by a name for a message."""
    found: dict[str, object] = {}
    for name, parameter in module.named_parameters():
        found[f"the weight {name}"] = _digest(parameter)
        found[f"requires_grad of {name}"] = parameter.requires_grad
    for name, buffer in module.named_buffers():
        found[f"the buffer {name}"] = _digest(buffer)
    for name, part in module.named_modules():
        found[f"the training flag of {name or 'the model'}"] = part.training
        found[f"the number of hooks of {name or 'the model'}"] = len(part._forward_hooks) + len(part._forward_pre_hooks)
        found[f"the forward method of {name or 'the model'}"] = part.__dict__.get("forward")
    return found


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()
