"""Verdicts from the shape of the motion within the tail."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from loopscope.behaviour.fitting import Fit, fit_shapes, residual_directions, significance
from loopscope.behaviour.rounding import StateDtype, rounding_step
from loopscope.behaviour.settings import DisplacementSettings
from loopscope.behaviour.tail import Tails, mean_squared_displacement, tail_length, take_tails
from loopscope.behaviour.verdict import Kind, Verdict

__all__ = ["displacement_verdicts"]


def displacement_verdicts(
    states: Float[Tensor, "token recurrence width"],
    dtype: StateDtype,
    settings: DisplacementSettings,
    first_recurrence: int = 0,
) -> list[Verdict]:
    """A verdict for each of some finite trajectories of one length."""
    window = tail_length(states.shape[1], settings.window)
    tails = take_tails(states, window, first_recurrence)
    verdicts = [_decide(motion, settings) for motion in _motions(tails, dtype, settings)]
    # What has no shape as a whole may be an approach that ends within the tail: then its later half tells.
    open_ = [index for index, verdict in enumerate(verdicts) if verdict.kind in (Kind.BOUNDED, Kind.UNKNOWN)]
    later = window // 2
    if open_ and later >= _LATER_HALF:
        part = take_tails(states[open_], later, first_recurrence)
        for index, motion in zip(open_, _motions(part, dtype, settings), strict=True):
            verdict = _decide(motion, settings)
            if verdict.kind in (Kind.FIXED_POINT, Kind.AT_FLOOR, Kind.ORBIT):
                verdicts[index] = verdict
    return verdicts


_LATER_HALF = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class _Motion:
    """What is known of one token's tail."""

    window: int
    rounding: float
    level: float
    floor: float
    """Step that the noise makes, from what the best shape leaves."""
    shape: str
    numbers: tuple[float, ...]
    unexplained: float
    amplitude: float
    p_value: float
    margin: float
    """Log likelihood ratio to the best shape of another kind of limit."""
    filling: float
    residual_filling: float
    later: float
    spreading: float
    shrinking: float
    shrinking_late: float
    late_step: float
    norm_growth: float
    speed: float
    displacement: tuple[float, ...]


def _motions(tails: Tails, dtype: StateDtype, settings: DisplacementSettings) -> list[_Motion]:
    rounding = rounding_step(dtype)
    level = tails.displacement.max(-1).values.sqrt()
    moving = (level > settings.rounding_factor * rounding).nonzero()[:, 0]
    best: dict[int, tuple[Fit, int, float, float, float]] = {}
    if len(moving):
        part = tails.select(moving)
        fits = fit_shapes(part, settings.least_periods)
        best = _best_fits(fits, part, moving.tolist(), rounding, settings)
    third = (tails.window - 1) // 3
    square = tails.steps.square()
    early, late = square[:, :third].mean(-1).sqrt(), square[:, -third:].mean(-1).sqrt()
    sixth = max(2, third // 2)
    middle = square[:, -3 * sixth : -2 * sixth].mean(-1).sqrt()
    latest = square[:, -sixth:].mean(-1).sqrt()
    spread = _spreading(tails)
    half = tails.window // 2
    later = mean_squared_displacement(tails.gram[:, half:, half:]).max(-1).values.sqrt()
    white = tails.white_directions
    quarter = max(1, tails.window // 4)
    way = tails.scores[:, -quarter:].mean(1) - tails.scores[:, :quarter].mean(1)
    speed = torch.linalg.vector_norm(way, dim=-1) / (tails.window - quarter)
    motions = []
    for token in range(len(level)):
        fit, row, p_value, margin, filled = best.get(token, (None, 0, 1.0, 0.0, 0.0))
        energy = float(tails.energy[token])
        left = energy if fit is None else float(fit.left[row])
        columns = 0.0 if fit is None else float(fit.columns[row])
        noise = math.sqrt(2 * left / max(1.0, tails.window - 1 - columns))
        motions.append(
            _Motion(
                window=tails.window,
                rounding=rounding,
                level=float(level[token]),
                floor=noise,
                shape="none" if fit is None else fit.name,
                numbers=() if fit is None else tuple(fit.numbers[row].tolist()),
                unexplained=left / energy if energy > 0 else 1.0,
                amplitude=math.sqrt(max(0.0, energy - left) / tails.window),
                p_value=p_value,
                residual_filling=filled / white,
                later=float(later[token] / level[token].clamp_min(1e-300)),
                margin=margin,
                filling=float(tails.directions[token]) / white,
                spreading=float(spread[token]),
                shrinking=float(early[token] / late[token].clamp_min(1e-300)),
                shrinking_late=float(middle[token] / latest[token].clamp_min(1e-300)),
                late_step=float(latest[token]),
                norm_growth=float(tails.norm_growth[token]),
                speed=float(speed[token]),
                displacement=tuple(tails.displacement[token].sqrt().tolist()),
            )
        )
    return motions


def _spreading(tails: Tails) -> Tensor:
    """Mean squared displacement about lag W/2 over that about lag W/16; means over lags, since motion of a period
    has deep minima."""
    window = tails.window
    short = tails.displacement[:, : max(1, window // 8)].mean(-1)
    long = tails.displacement[:, 3 * window // 8 : max(3 * window // 8 + 1, 5 * window // 8)].mean(-1)
    return long / short.clamp_min(1e-300)


_MATERIAL = {"two exponentials": 1.25, "2 rotations": 3.0, "3 rotations": 3.0, "drift after transient": 1.25}
"""By how much less these must leave than simpler shapes. What rounding makes of a slow motion is no white noise, and they
would explain some of that."""


def _best_fits(
    fits: list[Fit], tails: Tails, tokens: list[int], rounding: float, settings: DisplacementSettings
) -> dict[int, tuple[Fit, int, float, float, float]]:
    """By token: the best fit, its row, its p-value, and its margin over the best fit that means another limit."""
    window, directions = tails.window, tails.noise_directions
    # What no shape could resolve: a tenth of the number type's own rounding.
    unresolved = window * (0.1 * rounding) ** 2 / 2
    costs = []
    for fit in fits:
        bits = (fit.columns * directions + fit.numbers.shape[-1]) * (window * directions).log()
        dear = _MATERIAL.get(fit.name, 1.0)
        costs.append(directions * window * (fit.left * dear + unresolved).log() + bits)
    cost = torch.stack(costs)
    chosen = cost.argmin(0)
    p_values = torch.stack([significance(fit, tails) for fit in fits])
    found = {}
    for row, token in enumerate(tokens):
        index = int(chosen[row])
        kind = _limit_of(fits[index], row, window, settings)
        others = [
            float(cost[other, row] - cost[index, row])
            for other in range(len(fits))
            if _limit_of(fits[other], row, window, settings) != kind
        ]
        found[token] = (fits[index], row, float(p_values[index, row]), min(others, default=math.inf) / 2, residual_directions(fits[index], row, tails))
    return found


def _limit_of(fit: Fit, row: int, window: int, settings: DisplacementSettings) -> Kind:
    return _limit(fit.name, tuple(fit.numbers[row].tolist()), window, settings)


def _limit(shape: str, numbers: tuple[float, ...], window: int, settings: DisplacementSettings) -> Kind:
    """What a motion of this shape tends to."""
    grows, settles = math.log(settings.growth), math.log(settings.settling)
    if shape == "arc":
        return Kind.SLIDER
    if shape == "power":
        if numbers[0] <= settings.summable:
            return Kind.FIXED_POINT
        return Kind.DIVERGING if 2 ** (numbers[0] - 1) >= settings.growth else Kind.SLIDER
    if shape == "exponential":
        if numbers[0] >= grows:
            return Kind.DIVERGING
        return Kind.SLIDER if numbers[0] > -grows else Kind.FIXED_POINT
    if shape == "two exponentials":
        return Kind.FIXED_POINT
    if shape == "drift after transient":
        return Kind.SLIDER
    if shape.endswith("rotations"):
        return Kind.BOUNDED
    if shape in ("alternating", "spiral"):
        rate = numbers[-1]
        if abs(rate) <= settles:
            return Kind.ORBIT
        return Kind.DIVERGING if rate > 0 else Kind.FIXED_POINT
    return Kind.ORBIT


def _decide(motion: _Motion, settings: DisplacementSettings) -> Verdict:
    rest = settings.rounding_factor * motion.rounding
    if motion.level == 0:
        return _verdict(motion, Kind.FIXED_POINT, "The state repeats itself exactly.")
    if motion.level <= rest:
        return _verdict(motion, Kind.FIXED_POINT, f"It rests: its displacement of {motion.level:.2g} is rounding.")
    has_shape = motion.p_value <= settings.significance and _is_explained(motion, settings)
    kind = _limit(motion.shape, motion.numbers, motion.window, settings) if motion.shape != "none" else Kind.UNKNOWN
    approaches = motion.shrinking >= settings.shrinking and motion.later <= 0.6 and (motion.shrinking_late > 1.15 or motion.late_step <= rest)
    if has_shape and not (approaches and kind == Kind.ORBIT):
        if kind == Kind.SLIDER and motion.norm_growth >= settings.norm_growth:
            kind = Kind.DIVERGING
        return _verdict(motion, kind, _shape_reason(motion, kind))
    if approaches:
        return _verdict(motion, Kind.FIXED_POINT, f"It approaches: its steps shrink {motion.shrinking:.3g}-fold within the tail.")
    if motion.shrinking <= 1 / settings.shrinking and motion.shrinking_late < 1 / 1.15 and motion.spreading >= settings.spreading:
        return _verdict(motion, Kind.DIVERGING, f"Its steps lengthen {1 / motion.shrinking:.3g}-fold within the tail.")
    times = motion.level / motion.rounding
    fills = motion.filling >= settings.filling or times <= settings.floor_factor / 4
    if times <= settings.floor_factor and fills:
        return _verdict(motion, Kind.AT_FLOOR, f"It hovers: its shapeless displacement is {times:.3g} times the rounding.")
    if motion.spreading >= settings.spreading:
        return _verdict(motion, Kind.UNKNOWN, f"It wanders: its squared displacement still grows {motion.spreading:.3g}-fold.")
    return _verdict(motion, Kind.BOUNDED, f"It keeps moving by {motion.level:.2g}, {times:.3g} times the rounding, without a shape.")


def _is_explained(motion: _Motion, settings: DisplacementSettings) -> bool:
    left = motion.floor / motion.rounding
    if left <= settings.rounding_factor:
        return motion.unexplained <= settings.unexplained_noise
    if left <= settings.floor_factor:
        fills = motion.residual_filling >= settings.filling
        return motion.unexplained <= (settings.unexplained_noise if fills else settings.unexplained)
    return motion.unexplained <= settings.unexplained_structure


def _shape_reason(motion: _Motion, kind: Kind) -> str:
    return f"{motion.shape} {motion.numbers}"


def _verdict(motion: _Motion, kind: Kind, reason: str) -> Verdict:
    return Verdict(
        kind=kind, reason=reason, method="displacement", floor=motion.floor, level=motion.level, p_value=motion.p_value,
        evidence={"unexplained": motion.unexplained, "margin": motion.margin, "filling": motion.filling, "rfill": motion.residual_filling, "later": motion.later, "spreading": motion.spreading, "shrinking": motion.shrinking, "late": motion.shrinking_late,"norm_growth":motion.norm_growth},
        displacement=motion.displacement,
    )
