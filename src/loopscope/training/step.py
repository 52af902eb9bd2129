"""One optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.optim import AdamW

from loopscope.errors import NonFiniteError
from loopscope.model import LoopedTransformer
from loopscope.training.config import TrainConfig
from loopscope.training.data import Tokens
from loopscope.training.recurrence import sample_recurrences, state_seed
from loopscope.training.schedule import learning_rate

__all__ = ["StepReport", "take_step"]


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    loss: float
    """Mean next-token loss before the update, nats."""
    lr: float
    grad_norm: float
    """Euclidean norm of all gradients before clipping."""
    recurrences: int


def take_step(model: LoopedTransformer, optimizer: AdamW, batch: Tokens, config: TrainConfig, step: int) -> StepReport:
    """Update the model on a batch of windows, (batch, context + 1). `step` counts from 0.

    Raises `NonFiniteError`, before the update, when loss or gradients are no longer numbers.
    """
    tokens = torch.from_numpy(batch).to(model.device)
    recurrences = sample_recurrences(config.recurrences, config.architecture.recurrences, config.seed, step)
    logits = model(
        tokens[:, :-1],
        recurrences=recurrences,
        seed=state_seed(config.seed, step),
        backprop_last=config.recurrences.backprop_last,
    )
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    grad_norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm))
    value = float(loss.detach())
    if not (math.isfinite(value) and math.isfinite(grad_norm)):
        raise NonFiniteError(
            f"Training diverged at step {step + 1}: the loss is {value} and the gradient norm {grad_norm}; "
            "choose a lower optimizer.peak_lr or a longer warm-up, and another output folder."
        )
    lr = learning_rate(step, config.steps, config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return StepReport(loss=value, lr=lr, grad_norm=grad_norm, recurrences=recurrences)
