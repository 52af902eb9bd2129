"""Verdicts from the cosine to the last state: the family of criteria of arXiv 2604.11791 (appendix C).

The paper's algorithm is not public, and neither are its settings beyond three numbers, so rates from this method are no
replication of the paper's. It is kept to show what it sees and what it misses.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.behaviour.rounding import StateDtype, rounding_step
from loopscope.behaviour.settings import CosineSettings
from loopscope.verdicts import Kind, Verdict

__all__ = ["cosine_verdicts"]


def cosine_verdicts(
    states: Float[Tensor, "token recurrence width"], dtype: StateDtype, settings: CosineSettings
) -> list[Verdict]:
    """A verdict for each of some finite trajectories of one length.

    With c_t the cosine of state t and the last one: a fixed point if 1 - c_t <= tau for at least a share rho of the
    window; else an orbit if the spectrum of c_t, its trend taken out, has one dominant peak; else a slider if c_t
    approaches 1 monotonically; else unknown. It sees no norms, so nothing diverges, and no floor.
    """
    window = min(settings.window, max(settings.least_recurrences, states.shape[1] // 2))
    turned = _cosines(states[:, -window:])
    return [_judge(values, rounding_step(dtype), settings) for values in turned]


def _cosines(tail: Tensor) -> Tensor:
    tail = tail.double()
    last = tail[:, -1:]
    # Of unit vectors u, v: 1 - cos = ||u - v||^2 / 2, which does not cancel.
    units = tail / torch.linalg.vector_norm(tail, dim=-1, keepdim=True).clamp_min(1e-300)
    ends = last / torch.linalg.vector_norm(last, dim=-1, keepdim=True).clamp_min(1e-300)
    apart: Tensor = (units - ends).square().sum(-1)
    return 1 - apart / 2


def _judge(cosines: Float[Tensor, " recurrence"], rounding: float, settings: CosineSettings) -> Verdict:
    near = float((1 - cosines <= settings.tau).double().mean())
    period, share = _dominant_period(cosines)
    # The last cosine is 1 by construction.
    rising = float((cosines[1:-1] >= cosines[:-2]).double().mean())
    evidence = {"near": near, "peak": share, "rising": rising, "window": float(len(cosines))}
    if near >= settings.rho:
        kind, reason = Kind.FIXED_POINT, f"{near:.0%} of its states are within {settings.tau:g} of the last one."
    elif share >= settings.peak:
        kind, reason = Kind.ORBIT, f"One peak at period {period:.3g} holds {share:.0%} of the cosine's spectrum."
    elif rising >= settings.monotone:
        kind, reason = Kind.SLIDER, f"The cosine to the last state rises in {rising:.0%} of the steps."
    else:
        kind, reason = Kind.UNKNOWN, "The cosine to the last state is neither near 1, nor periodic, nor monotone."
    return Verdict(
        kind=kind,
        reason=reason,
        method="cosine",
        floor=rounding,
        level=float((2 * (1 - cosines.min())).clamp_min(0).sqrt()),
        period=period if kind == Kind.ORBIT else float("nan"),
        evidence=evidence,
    )


def _dominant_period(cosines: Tensor) -> tuple[float, float]:
    """Period of the largest peak of the spectrum, the linear trend taken out, and its share of the power, both
    neighbours included."""
    time = torch.arange(len(cosines), dtype=cosines.dtype)
    time = time - time.mean()
    rest = cosines - cosines.mean()
    rest = rest - time * (time @ rest) / (time @ time)
    power = torch.fft.rfft(rest).abs().square()[1:]
    total = float(power.sum())
    if total <= 0:
        return float("nan"), 0.0
    peak = int(power.argmax())
    around = float(power[max(0, peak - 1) : peak + 2].sum())
    return len(cosines) / (peak + 1), around / total
