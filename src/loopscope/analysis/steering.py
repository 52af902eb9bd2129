"""Steering: a vector from contrasting prompts is added to the loop state, and how long that push lasts.

Rimsky et al., arXiv 2312.06681 (contrastive activation addition), recurrence by recurrence: in a loop that contracts a
push is forgotten, however much it would change at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from loopscope._util.shapes import Logits, States
from loopscope.errors import ConfigError, NonFiniteError, last_resort
from loopscope.models.loading import subject_of
from loopscope.models.native.subject import NativeSubject
from loopscope.models.subject import Batch, InputIds, Subject, batch_for, recurrences_of


@dataclass(frozen=True, eq=False)
class Steering:
    """Runs with and without a push. The columns of a recurrence dimension are those after 1, 2, … of them."""

    vectors: Float64[Tensor, "recurrence width"]
    """Mean over the contrasts of the loop state's difference at the last token."""
    distance: Float64[Tensor, "prompt recurrence"]
    """Of the steered run from the other after each recurrence (and its push): root mean square over tokens of the
    Euclidean norm."""
    random_distance: Float64[Tensor, "prompt recurrence"]
    """The same for a push as long in a random direction."""
    state_norm: Float64[Tensor, "prompt recurrence"]
    """Of the run without a push, likewise."""
    last_push: int
    """The recurrence after which the last vector was added."""
    logits: Logits
    """Of the steered run."""
    unsteered_logits: Logits

    @property
    def kept(self) -> Float64[Tensor, "prompt recurrence"]:
        """Share of the distance after the last push that is left after each recurrence from there on."""
        return self.distance[:, self.last_push - 1 :] / self.distance[:, self.last_push - 1, None]

    @property
    def random_kept(self) -> Float64[Tensor, "prompt recurrence"]:
        """The same for the random push."""
        return self.random_distance[:, self.last_push - 1 :] / self.random_distance[:, self.last_push - 1, None]


@last_resort("steering")
def steer(
    model: str | Path | nn.Module | Subject,
    input_ids: InputIds,
    *,
    towards: InputIds,
    away: InputIds,
    at: Sequence[int],
    recurrences: int | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Steering:
    """Add, after the recurrences `at`, the mean difference of the loop state between two lists of prompts.

    **Arguments**

    - `model`: as for `loopscope.capture`; one that loopscope computes itself.
    - `input_ids`: the prompts that are steered, all of their tokens.
    - `towards`, `away`: contrasting prompts, as many of each, of any length; of each pair the difference of the states
      at the last tokens is taken, after the same recurrence as that at which it is added.
    - `at`: recurrences, as `Trace.loop_state` counts them.
    - `scale`: factor on the vector.

    Raises `ConfigError` for a recurrence that is not run, lists of different lengths, prompts that do not differ there,
    or a model that is only watched; `NonFiniteError` where a run overflows.
    """
    subject = subject_of(model)
    if not isinstance(subject, NativeSubject):
        raise ConfigError(
            f"{subject.info.name} computes by itself and is only watched, so that nothing can be added to its state; "
            "take a model of a family that loopscope reads natively."
        )
    count = recurrences_of(subject.info, recurrences)
    pushes = sorted(set(at)) if hasattr(at, "__iter__") else []
    if not pushes or not all(type(push) is int and 1 <= push <= count for push in pushes):
        raise ConfigError(f"at is a list of recurrences from 1 to {count}, got {at!r}.")
    if not math.isfinite(scale) or scale == 0:
        raise ConfigError(f"scale must be a finite number other than 0, got {scale}.")
    batch, ends = batch_for(subject, input_ids), (batch_for(subject, towards), batch_for(subject, away))
    if len(ends[0].mask) != len(ends[1].mask):
        raise ConfigError(
            f"There are {len(ends[0].mask)} prompts to steer towards and {len(ends[1].mask)} to steer away from; give "
            "as many of each."
        )
    first, second = (_last_states(subject, each, count, seed) for each in ends)
    vectors = (first - second).mean(1)
    if not bool(vectors[[push - 1 for push in pushes]].any(-1).all()):
        raise ConfigError("The prompts to steer towards and away from have the same states, so there is no direction.")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(vectors.shape, generator=generator, dtype=torch.float64).to(vectors.device)
    noise *= (torch.linalg.vector_norm(vectors, dim=-1) / torch.linalg.vector_norm(noise, dim=-1))[:, None]
    plain, unsteered = _states(subject, batch, count, seed, {})
    runs = [
        _states(subject, batch, count, seed, {push: scale * direction[push - 1] for push in pushes})
        for direction in (vectors, noise)
    ]
    mask = batch.mask.to(subject.device)
    norms = [_norm(states, mask) for states in (plain, runs[0][0] - plain, runs[1][0] - plain)]
    if not all(bool(torch.isfinite(each).all()) for each in (vectors, *norms)):
        raise NonFiniteError("A run overflows; run fewer recurrences, push less, or compute in float32.")
    return Steering(vectors, norms[1], norms[2], norms[0], pushes[-1], runs[0][1], unsteered)


def _states(
    subject: NativeSubject, batch: Batch, count: int, seed: int, pushes: dict[int, Tensor]
) -> tuple[Float64[Tensor, "recurrence batch token width"], Logits]:
    """Loop states, with a vector added after some recurrences, and what the model answers."""
    run = subject.start(batch, recurrences=count, seed=seed)
    states: list[States] = []
    for recurrence in range(1, count + 1):
        run.advance()
        if recurrence in pushes:
            run.state = (run.state.double() + pushes[recurrence]).to(run.state.dtype)
        states.append(run.state.double())
    return torch.stack(states), run.decode()


def _last_states(
    subject: NativeSubject, batch: Batch, count: int, seed: int
) -> Float64[Tensor, "recurrence batch width"]:
    states, _ = _states(subject, batch, count, seed, {})
    rows = torch.arange(len(batch.mask))
    last = torch.stack([row.nonzero()[-1, 0] for row in batch.mask])
    return states[:, rows, last]


def _norm(states: Float64[Tensor, "recurrence batch token width"], mask: Tensor) -> Float[Tensor, "batch recurrence"]:
    square = torch.where(mask, states.square().sum(-1), 0.0).sum(-1) / mask.sum(-1)
    return square.sqrt().T
