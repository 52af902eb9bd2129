"""Interventions at work: what one run of the model changes, asked for at the points where it may change something; and
the noise that initial states and replaced tokens are drawn from."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from loopscope._util.shapes import Noise, States, TokenIds, TokenMask
from loopscope._util.sites import Site, Stage
from loopscope.models.interventions.kinds import (
    Damp,
    FreezeInjection,
    Intervention,
    ReplaceToken,
    ScaleBranch,
    StartFrom,
    StartScaled,
    StartSeed,
)
from loopscope.models.interventions.parsing import check_tokens
from loopscope.models.native.attention import LayerOutput, Through

_CUT = 3.0
"""Standard deviations at which the normal distribution is cut, as Huginn's published code does."""


def initial_noise(
    input_ids: TokenIds, mask: TokenMask | None, width: int, *, std: float, seed: int, begun: int | None = None
) -> Noise:
    """Normal noise, cut at three standard deviations, (batch, token, width), float32 on the CPU.

    Each prompt has a generator of its own, keyed by the seed and the prompt's token ids. So neither batching, padding,
    order nor sharding changes a prompt's state, on any device and in any dtype. Padding gets zeros. Texts that went on
    behind a prompt of `begun` tokens have the prompt's generator, drawn on, as `growing_noise` has it.
    """
    batch, tokens = input_ids.shape
    noise = torch.zeros(batch, tokens, width)
    ids = input_ids.cpu()
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu()
    for row in range(batch):
        prompt = ids[row][keep[row]].numpy()
        noise[row, keep[row]] = _prompt_noise(prompt[:begun], prompt.size, width, seed).float() * std
    return noise


def growing_noise(
    prompt: Sequence[int], tokens: int, width: int, *, std: float, seed: int
) -> Float32[Tensor, "token width"]:
    """The same for a text of that many tokens that begins with a prompt, as if drawn on: the prompt's own rows are
    those of `initial_noise`, so that what follows it changes none of them."""
    return _prompt_noise(np.array(prompt), tokens, width, seed).float() * std


def _prompt_noise(prompt: np.ndarray, tokens: int, width: int, seed: int) -> Tensor:
    """Standard normal values cut at `_CUT`, (token, width), float64, by inversion of the distribution function."""
    digest = hashlib.sha256(f"{seed}:".encode() + prompt.astype("<i8").tobytes()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    uniform = torch.from_numpy(generator.random((tokens, width)))
    lowest = 0.5 * math.erfc(_CUT / math.sqrt(2))
    values: Tensor = torch.special.ndtri(lowest + (1 - 2 * lowest) * uniform)
    return values


@dataclass(frozen=True, slots=True)
class BranchScale:
    """Factors on what a layer's two branches add to the residual stream."""

    attention: float = 1.0
    mlp: float = 1.0


UNCHANGED = BranchScale()


Parts = Callable[[Site, LayerOutput, Tensor], Tensor]
"""`parts(site, part, values)`: what takes the place of a part of a layer at one visit; see `Through`."""


class AppliedInterventions:
    """No interventions: every answer leaves the computation as it is, bit for bit."""

    parts: Parts | None = None
    """What looks on at the parts of layers, or replaces them."""

    def through(self, site: Site) -> Through | None:
        """The same at one visit."""
        return None if self.parts is None else partial(self.parts, site)

    def with_parts(self, parts: Parts | None) -> AppliedInterventions:
        """The same, remembering what was seen so far, with something else that looks on."""
        other = copy.copy(self)
        other.parts = parts
        return other

    def rows(self, rows: Int64[Tensor, " row"]) -> AppliedInterventions:
        """The same for those prompts of the batch, which may be named again."""
        return self

    def scale(self, stage: Stage, layer: int, recurrence: int) -> BranchScale:
        """Factors on the branches of one visit."""
        return UNCHANGED

    def seed(self, seed: int) -> int:
        """Which seed a random initial state is drawn from."""
        return seed

    def started(self, state: States, encoded: States) -> States:
        """The initial state, instead of the model's own."""
        return state

    def received(self, state: States, recurrence: int) -> States:
        """The loop state as a recurrence receives it."""
        return state

    def frozen(self, recurrence: int) -> States | None:
        """The block's input, where it is that of an earlier recurrence."""
        return None

    def mixed(self, state: States, recurrence: int) -> None:
        """The block's input was mixed from state and prelude's output."""

    def of(self, tokens: TokenMask) -> AppliedInterventions:
        """The same for the states of those tokens alone, side by side, in recurrences that replace none."""
        return self

    def carried(self, received: States, state: States) -> States:
        """What is handed to the next recurrence, of what one received and made of it."""
        return state


class RunInterventions(AppliedInterventions):
    """The interventions of one run, which may remember something of it.

    Everything is a function of the prompt, the run's seed and the interventions, prompt by prompt, so that neither
    batching nor padding changes a number.
    """

    def __init__(
        self, interventions: Sequence[Intervention], input_ids: TokenIds, mask: TokenMask | None, seed: int
    ) -> None:
        self._scales = [each for each in interventions if isinstance(each, ScaleBranch)]
        self._replacements = [each for each in interventions if isinstance(each, ReplaceToken)]
        self._start = next((each for each in interventions if isinstance(each, StartFrom | StartScaled)), None)
        self._seed = next((each.seed for each in interventions if isinstance(each, StartSeed)), None)
        self._eta = next((each.eta for each in interventions if isinstance(each, Damp)), 1.0)
        self._freeze_at = next((each.recurrence for each in interventions if isinstance(each, FreezeInjection)), None)
        self._kept: Tensor | None = None
        self._input_ids = input_ids
        self._mask = mask
        self._run_seed = seed
        # Places of each prompt's own tokens: padding may stand on either side of them.
        real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
        self._places = [row.nonzero()[:, 0] for row in real]
        check_tokens(interventions, [len(places) for places in self._places])

    def scale(self, stage: Stage, layer: int, recurrence: int) -> BranchScale:
        factors = {each.branch: each.factor for each in self._scales if each.acts(stage, layer, recurrence)}
        return BranchScale(factors.get("attention", 1.0), factors.get("mlp", 1.0)) if factors else UNCHANGED

    def seed(self, seed: int) -> int:
        return seed if self._seed is None else self._seed

    def started(self, state: States, encoded: States) -> States:
        match self._start:
            case None:
                return state
            case StartScaled(factor):
                return state * factor
            case StartFrom("prelude"):
                return encoded
            case StartFrom():
                return torch.zeros_like(state)

    def received(self, state: States, recurrence: int) -> States:
        replacements = [each for each in self._replacements if each.recurrence == recurrence]
        if not replacements:
            return state
        changed = state.clone()
        for each in replacements:
            noise = self._noise(each, state.shape[-1]) if each.by == "noise" else None
            for row, places in enumerate(self._places):
                place = places[each.token]
                if isinstance(each.by, int):
                    # Of the states before any replacement, so that two tokens can be exchanged.
                    changed[row, place] = state[row, places[each.by]]
                elif noise is None:
                    changed[row, place] = 0.0
                else:
                    changed[row, place] = _as_long_as(state[row, place], noise[row, place.cpu()])
        return changed

    def frozen(self, recurrence: int) -> States | None:
        return self._kept if self._freeze_at is not None and recurrence > self._freeze_at else None

    def mixed(self, state: States, recurrence: int) -> None:
        if recurrence == self._freeze_at:
            self._kept = state

    def of(self, tokens: TokenMask) -> AppliedInterventions:
        some = copy.copy(self)
        some._kept = None if self._kept is None else self._kept[tokens][None]
        return some

    def rows(self, rows: Int64[Tensor, " row"]) -> AppliedInterventions:
        some = copy.copy(self)
        some._input_ids = self._input_ids[rows]
        some._mask = None if self._mask is None else self._mask[rows]
        some._places = [self._places[row] for row in rows.tolist()]
        some._kept = None if self._kept is None else self._kept[rows]
        return some

    def carried(self, received: States, state: States) -> States:
        return state if self._eta == 1.0 else (1.0 - self._eta) * received + self._eta * state

    def _noise(self, replacement: ReplaceToken, width: int) -> Tensor:
        """Of another stream than the initial state, whose direction it must not have."""
        # By the recurrences done before it, as ever, so that the noise of a study can be drawn again.
        name = f"{self._run_seed}:token:{replacement.token}@{replacement.recurrence - 1}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        return initial_noise(self._input_ids, self._mask, width, std=1.0, seed=seed)


def _as_long_as(state: Tensor, noise: Tensor) -> Tensor:
    """The direction of the noise with the Euclidean norm of the state, (width,)."""
    direction = noise.to(state.device, torch.float64)
    length = torch.linalg.vector_norm(state.double()) / torch.linalg.vector_norm(direction)
    return direction.mul(length).to(state.dtype)
