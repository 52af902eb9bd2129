"""AdamW with the usual exemptions from weight decay."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW

from loopscope.training.config import OptimizerConfig

__all__ = ["build_optimizer"]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW over all parameters; norms and biases (one dimension) and embeddings are not decayed.

    The learning rate is set at every step from the schedule.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = list(model.parameters())
    decayed = [entry for entry in parameters if entry.ndim >= 2 and id(entry) not in embeddings]
    kept = [entry for entry in parameters if entry.ndim < 2 or id(entry) in embeddings]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.peak_lr, betas=config.betas, eps=config.eps)
