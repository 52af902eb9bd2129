"""Trajectories in, verdicts out. No model is needed, so it judges trajectories that come from anywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from loopscope._util.wording import plural
from loopscope.dynamics.trajectories.cosine import cosine_kinds, cosine_verdicts, measure_turns
from loopscope.dynamics.trajectories.displacement import (
    displacement_kinds,
    displacement_verdicts,
    measure_tails,
    plain_kinds,
)
from loopscope.dynamics.trajectories.noise import Noise
from loopscope.dynamics.trajectories.settings import (
    CosineSettings,
    DisplacementSettings,
    Method,
    Settings,
    method_settings,
)
from loopscope.dynamics.trajectories.states import (
    as_states,
    check_axes,
    check_dtype,
    computed_dtype,
    finite_tokens,
    known_dtype,
    rounding_step,
    stored_dtype,
    trajectories_of,
)
from loopscope.dynamics.trajectories.tail import tail_length
from loopscope.dynamics.trajectories.twins import noise_of_twins
from loopscope.dynamics.verdicts import KINDS, Kind, Verdict
from loopscope.errors import ConfigError
from loopscope.models.inspection.facts import Dtype

_CHUNK_BYTES = 2**28
"""That judging some tokens at a time may take: most of it is many small operations, fewer for larger pieces."""
_OUTGROWN = 10.0
"""A state that is no longer finite diverged if its norm had grown by this factor before; otherwise something else
broke."""


def judge(
    states: NDArray[Any] | Tensor | Sequence[Any],
    dtype: object,
    method: Method = "displacement",
    *,
    settings: Settings | None = None,
    first_recurrence: int = 1,
    check_order: bool = True,
    try_window: bool = True,
    noise: Noise | None = None,
    twins: Sequence[NDArray[Any] | Tensor | Sequence[Any]] = (),
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[Verdict]:
    """What each token's state tends to.

    `states` has the axes (token, recurrence, width), or (recurrence, width) for one token: the states of one site, such
    as the output of the last recurrent layer, one a recurrence. `dtype` is the one that the *model* ran in, whatever
    the array is stored in (a name such as "bfloat16", or torch's or numpy's object): it sets the rounding, below which
    no motion is seen. (If the array is stored in a coarser one, or every number of it is one of a coarser one, that
    counts, and the reasons say so.) `first_recurrence` is the number of recurrences after which the first state stands:
    more than 1 if the beginning was cut off.
    `settings` are those of the method, its defaults unless given. `noise` is what was measured of each token's noise;
    where nothing was, `twins` may tell it, arrays like `states` of the same tokens in other runs of the model: from
    initial states that differ by one rounding, best, or from any others (see `noise_of_twins`). Both are for the
    displacement method.
    `try_window` has the displacement method judge the last two thirds of the tail too, and mark verdicts that these do
    not share; it takes most of the same time again. `progress` receives how many tokens were judged since the last
    time.

    The list has one `Verdict` a token. A token whose states are not all finite is `diverging` if they grew before, else
    `unknown`. Raises `ConfigError` for an array that is no trajectory: other axes, other numbers, too few recurrences,
    recurrences along another axis (where that can be seen; `check_order` switches the check off), nothing finite in it.
    """
    chosen = settings or method_settings(method)
    if isinstance(chosen, DisplacementSettings) != (method == "displacement"):
        raise ConfigError(f"These are settings of another method than {method}: {type(chosen).__name__}.")
    if twins and (noise is not None or method != "displacement"):
        reason = "the noise is given" if noise is not None else f"the {method} method has no noise floor"
        raise ConfigError(f"Twins tell the noise of each token, but {reason}; leave them out.")
    return judge_by_all(
        states,
        dtype,
        chosen,
        first_recurrence=first_recurrence,
        check_order=check_order,
        try_window=try_window,
        noise=noise,
        twins=twins,
        progress=progress,
    )[0]


# Thousands of small operations, which without the bookkeeping of gradients take a fifth less.
@torch.inference_mode()
def judge_by_all(
    states: NDArray[Any] | Tensor | Sequence[Any],
    dtype: object,
    chosen: Settings,
    others: Sequence[Settings] = (),
    *,
    first_recurrence: int = 1,
    check_order: bool = True,
    try_window: bool = True,
    noise: Noise | None = None,
    twins: Sequence[NDArray[Any] | Tensor | Sequence[Any]] = (),
    progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[list[Verdict], list[list[Kind]]]:
    """What `judge` says by the chosen settings, and the kinds alone by each of the others, which are of the same method
    and differ in thresholds for which nothing is measured anew (see `measure_tails`)."""
    if first_recurrence < 1:
        raise ConfigError(f"first_recurrence counts from 1, got {first_recurrence}.")
    tensor = as_states(states)
    recurrences = tensor.shape[1]
    if recurrences < chosen.least_recurrences:
        few = f"{plural(recurrences, 'recurrence')} {'is' if recurrences == 1 else 'are'} too few"
        raise ConfigError(
            f"{few} for a verdict: at least {chosen.least_recurrences} are needed to tell motion from noise. Run the "
            "loop longer, or put the axes in the order (token, recurrence, width): the array has the shape "
            f"{tuple(tensor.shape)}."
        )
    if check_order:
        check_axes(tensor)
    runs = [_other_run(each, tensor) for each in twins]
    declared = check_dtype(dtype)
    found = computed_dtype(tensor) or known_dtype(stored_dtype(tensor), otherwise=declared)
    coarse = max(declared, found, key=rounding_step)
    whole = finite_tokens(tensor)
    broken = [(token, tensor[token].isfinite().all(-1)) for token in (~whole).nonzero()[:, 0].tolist()]
    if not bool(whole.any()) and not any(bool(finite.any()) for _, finite in broken):
        raise ConfigError("No state is finite: every one holds NaN or infinity, so there is nothing to judge.")
    told: dict[int, tuple[Verdict, list[Kind]]] = {}
    method: Method = "displacement" if isinstance(chosen, DisplacementSettings) else "cosine"
    for token, finite in broken:
        verdict = _not_finite(tensor[token], finite, first_recurrence, method)
        told[token] = verdict, [verdict.kind] * len(others)
        progress(1)
    for rows in _chunks(whole.nonzero()[:, 0], tensor, tail_length(recurrences, chosen.window, first_recurrence)):
        measured = None if noise is None else noise.take(rows)
        some = trajectories_of(tensor, rows)
        if runs and isinstance(chosen, DisplacementSettings):
            its_runs = [trajectories_of(run, rows) for run in runs]
            measured = noise_of_twins(some, its_runs, coarse, chosen, first_recurrence)
        judged = _judge(some, coarse, chosen, others, first_recurrence, try_window, measured)
        told |= zip(rows.tolist(), judged, strict=True)
        progress(len(rows))
    verdicts = [told[token][0] for token in range(len(tensor))]
    kinds = [[told[token][1][place] for token in range(len(tensor))] for place in range(len(others))]
    if coarse != declared:
        doubt = f" (The dtype is given as {declared}, but every number is one of {coarse}, which they are judged as.)"
        verdicts = [dataclasses.replace(verdict, reason=verdict.reason + doubt) for verdict in verdicts]
    return verdicts, kinds


@torch.inference_mode()
def trial_kinds(states: Tensor, settings: DisplacementSettings, first_recurrence: int, noise: Noise) -> list[Kind]:
    """What verdicts of some finite trajectories are held against: the same by the displacement method, where rest that
    is seen and rest that noise hides count as one."""
    kinds: list[Kind] = []
    window = tail_length(states.shape[1], settings.window, first_recurrence)
    for rows in _chunks(torch.arange(len(states)), states, window):
        found = plain_kinds(trajectories_of(states, rows), settings, first_recurrence, noise.take(rows))
        kinds += [KINDS[code] for code in found.tolist()]
    return kinds


def _judge(
    states: Tensor,
    dtype: Dtype,
    settings: Settings,
    others: Sequence[Settings],
    first_recurrence: int,
    try_window: bool,
    noise: Noise | None,
) -> Iterator[tuple[Verdict, list[Kind]]]:
    # Of the few that begin and end at 0.
    zero = (states[:, 0] == 0).all(-1) & (states[:, -1] == 0).all(-1)
    zero[zero.clone()] = (states[zero] == 0).all(-1).all(-1)
    if isinstance(settings, CosineSettings):
        turns = measure_turns(states, settings)
        found = cosine_verdicts(turns, dtype, settings)
        kinds = [cosine_kinds(turns, each) for each in others if isinstance(each, CosineSettings)]
    else:
        alike = [each for each in others if isinstance(each, DisplacementSettings)]
        noise = noise or Noise.of(dtype, len(states))
        motions = measure_tails(
            states, settings, noise, first_recurrence, others=alike, shorter=try_window, kinds_only=not try_window
        )
        found = displacement_verdicts(motions, settings)
        kinds = [[KINDS[code] for code in displacement_kinds(motions, each).tolist()] for each in alike]
    for token, verdict in enumerate(found):
        if zero[token]:
            reason = "Every number is 0: this may be padding, or nothing ran."
            verdict = dataclasses.replace(verdict, kind=Kind.UNKNOWN, reason=reason)
        yield verdict, [its[token] for its in kinds]


def _other_run(twin: NDArray[Any] | Tensor | Sequence[Any], states: Tensor) -> Tensor:
    other = as_states(twin)
    if other.shape != states.shape:
        raise ConfigError(
            f"A twin is the same tokens in another run; its shape is {tuple(other.shape)}, that of the states "
            f"{tuple(states.shape)}."
        )
    if torch.equal(other, states):
        raise ConfigError("A twin holds the very same states; give those of a run from another initial state.")
    return other


def judged_bytes(window: int) -> int:
    """What judging takes for a token whose tail is so long, beside its states: some copies of its leading components,
    and every displacement at every lag. A bound: a sixth to three fifths of it was measured."""
    return 8 * window * (192 + 4 * window)


def _chunks(rows: Tensor, states: Tensor, window: int) -> Iterator[Tensor]:
    each = states.shape[1:].numel() * states.itemsize + judged_bytes(window)
    yield from rows.split(max(1, _CHUNK_BYTES // each)) if len(rows) else ()


def _not_finite(states: Tensor, finite: Tensor, first_recurrence: int, method: str) -> Verdict:
    until = int((~finite).nonzero()[0, 0])
    grown = float("nan")
    if until >= 2:
        norms = torch.linalg.vector_norm(states[:until].double(), dim=-1)
        grown = float(norms[-1] / norms[0].clamp_min(1e-300))
    overflowed = bool(states[until].isinf().any()) and until > 0
    if grown >= _OUTGROWN or overflowed:
        grew = f" after its norm had grown {grown:.3g}-fold" if grown >= _OUTGROWN else ""
        reason = f"It is no longer finite in recurrence {first_recurrence + until}{grew}."
        return Verdict(kind=Kind.DIVERGING, reason=reason, method=method, evidence={"norm_growth": grown})
    reason = f"It holds NaN in recurrence {first_recurrence + until}, without having grown before."
    return Verdict(kind=Kind.UNKNOWN, reason=reason, method=method, evidence={"norm_growth": grown})
