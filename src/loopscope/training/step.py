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
from loopscope.training.config import PenaltyConfig, TrainConfig
from loopscope.training.data import Scored, Tokens
from loopscope.training.penalties import LastStates, penalty
from loopscope.training.recurrence import direction_seed, sample_recurrences, state_seed
from loopscope.training.schedule import learning_rate

__all__ = ["StepReport", "take_step"]


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    loss: float
    """Mean next-token loss before the update, nats."""
    penalty: float
    """What was added to it, weights included."""
    lr: float
    grad_norm: float
    """Euclidean norm of all gradients before clipping."""
    recurrences: int


def take_step(
    model: LoopedTransformer,
    optimizer: AdamW,
    batch: Tokens,
    config: TrainConfig,
    step: int,
    counted: Scored | None = None,
) -> StepReport:
    """Update the model on a batch of windows, (batch, context + 1). `step` counts from 0; `counted`, (batch, context),
    says which predicted tokens count, all unless given.

    Raises `NonFiniteError`, before the update, when loss or gradients are no longer numbers.
    """
    tokens = torch.from_numpy(batch).to(model.device)
    recurrences = sample_recurrences(config.recurrences, config.architecture.recurrences, config.seed, step)
    penalised = config.penalties != PenaltyConfig()
    states = LastStates()
    logits = model(
        tokens[:, :-1],
        recurrences=recurrences,
        seed=state_seed(config.seed, step),
        backprop_last=config.recurrences.backprop_last,
        observers=(states,) if penalised else (),
    )
    targets = tokens[:, 1:]
    if counted is None:
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    else:
        places = torch.from_numpy(counted).to(model.device)
        loss = functional.cross_entropy(logits[places], targets[places])
    added = torch.zeros_like(loss)
    if penalised:
        added = penalty(model, tokens[:, :-1], states, config.penalties, direction_seed(config.seed, step))
    optimizer.zero_grad(set_to_none=True)
    (loss + added).backward()
    grad_norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm))
    value = float(loss.detach())
    if not (math.isfinite(value + float(added.detach())) and math.isfinite(grad_norm)):
        raise NonFiniteError(
            f"Training diverged at step {step + 1}: the loss is {value} and the gradient norm {grad_norm}; "
            "choose a lower optimizer.peak_lr or a longer warm-up, and another output folder."
        )
    lr = learning_rate(step, config.steps, config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return StepReport(loss=value, penalty=float(added.detach()), lr=lr, grad_norm=grad_norm, recurrences=recurrences)
