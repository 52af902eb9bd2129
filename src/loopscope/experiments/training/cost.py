"""What a training run takes at the very least, so that one that cannot end is refused before it begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loopscope._util.wording import duration
from loopscope.errors import ConfigError
from loopscope.experiments.training.config import TrainConfig
from loopscope.models.checkpoints.free_memory import available_memory

_FASTEST = 1e15
"""Floating-point operations a second of the fastest single devices, in their lowest useful precision."""
_VISIT = 1e-4
"""Seconds: what a layer's twenty operations take, forwards and backwards, however small they are."""
_LONGEST = 90 * 86400
"""Seconds of a run that somebody waits for."""


def check_cost(configs: Sequence[TrainConfig], device: torch.device) -> None:
    """Raises `ConfigError` for runs, one after the other, that memory does not do for, or that take months on any
    machine."""
    free = available_memory(device)
    for config in configs:
        needed = least_bytes(config)
        if needed > free:
            raise ConfigError(
                f"Training {config.architecture.parameters:,} parameters with {config.batch_size:,} windows of "
                f"{config.context:,} tokens takes at least {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free "
                f"on {device}; make the model, batch_size, context or architecture.recurrences smaller."
            )
    seconds = sum(map(least_seconds, configs))
    if seconds > _LONGEST:
        many = "" if len(configs) == 1 else f" of the {len(configs):,} models"
        raise ConfigError(
            f"The training{many} takes at least {duration(seconds)} on the fastest machine; lower steps, batch_size, "
            "context or the number of models."
        )


def least_bytes(config: TrainConfig) -> int:
    """Weights, gradients and two moments; what each visit of a layer keeps for its derivative; and the logits."""
    architecture, tokens = config.architecture, config.batch_size * config.context
    last = config.recurrences.backprop_last
    visits = architecture.visits(min(architecture.recurrences, last or architecture.recurrences))
    kept = visits * (4 * architecture.width + architecture.mlp_width) + architecture.vocab_size
    return 4 * (4 * architecture.parameters + tokens * kept)


def least_seconds(config: TrainConfig) -> float:
    """Six operations for every weight that is used, token and step (Kaplan et al., arXiv 2001.08361)."""
    architecture = config.architecture
    visits = architecture.visits(architecture.recurrences)
    weights = architecture.parameters / architecture.layers * visits
    work = 6 * weights * config.batch_size * config.context / _FASTEST
    return config.steps * max(work, visits * _VISIT)
