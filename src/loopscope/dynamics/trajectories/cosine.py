"""Verdicts from the cosine to the last state: the family of criteria of arXiv 2604.11791 (appendix C).

The paper's algorithm is not public, and neither are its settings beyond three numbers, so rates from this method are no
replication of the paper's. It is kept to show what it sees and what it misses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from loopscope._util.wording import percent
from loopscope.dynamics.trajectories.settings import CosineSettings
from loopscope.dynamics.trajectories.states import rounding_step
from loopscope.dynamics.verdicts import Kind, Verdict
from loopscope.models.inspection.facts import Dtype


@dataclass(frozen=True, slots=True, eq=False)
class Turns:
    """How each token's direction turns within the window, before anything is decided."""

    away: Float[Tensor, "token recurrence"]
    """1 - c_t, c_t the cosine of state t and the last one."""
    period: Float[Tensor, " token"]
    """Of the largest peak of the spectrum of c_t, the linear trend taken out."""
    peak: Float[Tensor, " token"]
    """That peak's share of the power, both neighbours included."""
    rising: Float[Tensor, " token"]
    """Share of the steps in which c_t rises."""


def cosine_verdicts(turns: Turns, dtype: Dtype, settings: CosineSettings) -> list[Verdict]:
    """A verdict for each token.

    A fixed point if 1 - c_t <= tau for at least a share rho of the window; else an orbit if the spectrum of c_t, its
    trend taken out, has one dominant peak; else a slider if c_t approaches 1 monotonically; else unknown. It sees no
    norms, so nothing diverges, and no floor.
    """
    near, level = (turns.away <= settings.tau).double().mean(-1), (2 * turns.away.amax(-1)).sqrt()
    numbers = torch.stack((near, turns.peak, turns.rising, turns.period, level), dim=-1).tolist()
    kinds = cosine_kinds(turns, settings)
    return [_verdict(kind, each, turns, dtype, settings) for kind, each in zip(kinds, numbers, strict=True)]


def measure_turns(states: Float[Tensor, "token recurrence width"], settings: CosineSettings) -> Turns:
    """What the method looks at in finite trajectories of one length; it depends on the window alone."""
    window = min(settings.window, max(settings.least_recurrences, states.shape[1] // 2))
    tail = states[:, -window:].double()
    # Of unit vectors u, v: 1 - cos = ||u - v||^2 / 2, which does not cancel.
    units = tail / torch.linalg.vector_norm(tail, dim=-1, keepdim=True).clamp_min(1e-300)
    away = (units - units[:, -1:]).square().sum(-1) / 2
    period, peak = _dominant_peak(away)
    # The last cosine is 1 by construction, so that the step into it says nothing.
    rising = (away[:, 1:-1] <= away[:, :-2]).double().mean(-1)
    return Turns(away, period, peak, rising)


def cosine_kinds(turns: Turns, settings: CosineSettings) -> list[Kind]:
    """The kind of each token."""
    near = (turns.away <= settings.tau).double().mean(-1)
    kinds = []
    for close, peak, rising in zip(near.tolist(), turns.peak.tolist(), turns.rising.tolist(), strict=True):
        if close >= settings.rho:
            kinds.append(Kind.FIXED_POINT)
        elif peak >= settings.peak:
            kinds.append(Kind.ORBIT)
        else:
            kinds.append(Kind.SLIDER if rising >= settings.monotone else Kind.UNKNOWN)
    return kinds


def _verdict(kind: Kind, numbers: list[float], turns: Turns, dtype: Dtype, settings: CosineSettings) -> Verdict:
    near, peak, rising, period, level = numbers
    reasons = {
        Kind.FIXED_POINT: f"{percent(near)} of its states are within {settings.tau:g} of the last one.",
        Kind.ORBIT: f"One peak at period {period:.3g} holds {percent(peak)} of the cosine's spectrum.",
        Kind.SLIDER: f"The cosine to the last state rises in {percent(rising)} of the steps.",
        Kind.UNKNOWN: "The cosine to the last state is neither near 1, nor periodic, nor monotone.",
    }
    return Verdict(
        kind=kind,
        reason=reasons[kind],
        method="cosine",
        floor=rounding_step(dtype),
        level=level,
        period=period if kind == Kind.ORBIT else float("nan"),
        evidence={"near": near, "peak": peak, "rising": rising, "window": float(turns.away.shape[1])},
    )


def _dominant_peak(away: Tensor) -> tuple[Tensor, Tensor]:
    """Period of the largest peak of each spectrum, and its share of the power."""
    window = away.shape[1]
    time = torch.arange(window, dtype=away.dtype)
    time = time - time.mean()
    rest = away - away.mean(-1, keepdim=True)
    rest = rest - (rest @ time)[:, None] * time / (time @ time)
    power = torch.fft.rfft(rest, dim=-1).abs().square()[:, 1:]
    around = functional.pad(power, (1, 1)).unfold(-1, 3, 1).sum(-1)
    place = power.argmax(-1)
    total = power.sum(-1)
    peak = around.gather(-1, place[:, None])[:, 0] / total.clamp_min(1e-300)
    period = torch.where(total > 0, window / (place + 1.0).double(), torch.nan)
    return period, torch.where(total > 0, peak, 0.0)
