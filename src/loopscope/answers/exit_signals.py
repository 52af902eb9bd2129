"""What exit rules go by: signals of a token after each recurrence, of what a study stores or generation computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loopscope._util.wording import significant
from loopscope.study import StudyView

Array = NDArray[np.generic]
Quantities = Mapping[str, Array]
"""By the name of the variable of a study, (recurrence, ...): the first entry is after recurrence 1. What is known after
t recurrences lies in the first t entries, so that a rule that is being run has the same signals as a study."""
Signal = NDArray[np.floating]

_HUGINN_STEP = 0.03
_HUGINN_DIVERGENCE = 5e-4
"""Where the published code of Huginn (arXiv 2502.05171) stops by itself when it is asked to generate adaptively."""


@dataclass(frozen=True)
class ExitSignal:
    """A number of every token after every recurrence, and on which side of a threshold a token may stop."""

    key: str
    name: str
    """In a sentence and a legend."""
    variables: tuple[str, ...]
    """Of the study, from which the signal follows."""
    condition: Callable[[float], str]
    """When a token stops, in words."""
    computed: Callable[[Quantities], Signal] | None = None
    """How it follows; the only variable is the signal unless given."""
    usual: Callable[[StudyView], float | None] = lambda view: None
    """The threshold that the model or its publishers use, or that the study was given; marked in figures."""
    at_least: bool = False
    """It stops where the signal reaches the threshold, rather than where it falls to it."""
    decodes: bool = False
    """To know its signal, the model has to be read out after every recurrence."""
    largest: float = np.inf
    """What it can be at most."""

    def of(self, known: Quantities) -> Signal:
        """(recurrence, ...); NaN where nothing is known, which stops nothing."""
        return np.asarray(known[self.variables[0]]) if self.computed is None else self.computed(known)

    def reaches(self, signal: Signal, threshold: float) -> NDArray[np.bool_]:
        """Where a token may stop."""
        return signal >= float(threshold) if self.at_least else signal <= float(threshold)


def _contraction(known: Quantities) -> Signal:
    """What is left to go, `|dx_t| r / (1 - r)` with `r = |dx_t| / |dx_(t-1)|`, over the norm: the sum of the steps to
    come if each is r times the one before. Infinite where steps do not shrink; 0 where there is no step any more."""
    step, norm = (known[name].astype(np.float64) for name in ("token_successive_difference", "token_residual_norm"))
    left = np.full(step.shape, np.nan)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        ratio = step[1:] / step[:-1]
        left[1:] = np.where(ratio < 1, step[1:] * ratio / (1 - ratio), np.inf) / norm[1:]
    left[1:][np.isnan(ratio)] = np.nan
    left[step == 0] = 0
    return left


def _entropy_change(known: Quantities) -> Signal:
    entropy = known["token_entropy"].astype(np.float64)
    return np.concatenate([np.full_like(entropy[:1], np.nan), np.abs(np.diff(entropy, axis=0))])


def _unchanged(known: Quantities) -> Signal:
    """Recurrences over which the most probable token has stayed, 0 after the first."""
    top1 = known["token_top1"]
    found = np.zeros(top1.shape)
    for t in range(1, len(top1)):
        found[t] = np.where(top1[t] == top1[t - 1], found[t - 1] + 1, 0)
    return found


EXIT_SIGNALS = (
    ExitSignal(
        key="step",
        name="small step",
        variables=("token_relative_step",),
        usual=lambda view: _HUGINN_STEP,
        condition=lambda threshold: f"its loop state moves by at most {significant(100 * threshold, 3)} % of its norm",
    ),
    ExitSignal(
        key="kl",
        name="small KL divergence",
        variables=("token_kl_to_previous",),
        usual=lambda view: _HUGINN_DIVERGENCE,
        condition=lambda threshold: (
            f"the prediction before is at most {significant(threshold, 3)} nats from its own (KL divergence)"
        ),
        decodes=True,
    ),
    ExitSignal(
        key="attention",
        name="attention stable",
        variables=("token_attention_change",),
        usual=lambda view: view.head_stable,
        condition=lambda threshold: (
            f"its rows of the attention maps change by at most {significant(threshold, 3)} (root mean square over "
            "heads and layers)"
        ),
    ),
    ExitSignal(
        key="gate",
        name="exit gate",
        variables=("token_exit_cumulated",),
        usual=lambda view: view.exit_threshold,
        condition=lambda threshold: f"the exit gate's probability to have stopped reaches {threshold:.4g}",
        at_least=True,
        largest=1.0,
    ),
    ExitSignal(
        key="cosine",
        name="direction stable",
        variables=("token_cosine_distance_to_previous",),
        condition=lambda threshold: f"1 less the cosine of its loop state to the one before is at most {threshold:.3g}",
    ),
    ExitSignal(
        key="acceleration",
        name="small acceleration",
        variables=("token_acceleration",),
        condition=lambda threshold: (
            f"its step differs from the one before by at most {significant(100 * threshold, 3)} % of its norm"
        ),
    ),
    ExitSignal(
        key="contraction",
        name="little left to go",
        variables=("token_successive_difference", "token_residual_norm"),
        computed=_contraction,
        condition=lambda threshold: (
            "its steps, if they go on shrinking as the last one did, move it by at most "
            f"{significant(100 * threshold, 3)} % of its norm"
        ),
    ),
    ExitSignal(
        key="entropy",
        name="low entropy",
        variables=("token_entropy",),
        condition=lambda threshold: f"the entropy of its prediction is at most {significant(threshold, 3)} nats",
        decodes=True,
    ),
    ExitSignal(
        key="entropy-change",
        name="entropy stable",
        variables=("token_entropy",),
        computed=_entropy_change,
        condition=lambda threshold: (
            f"the entropy of its prediction changes by at most {significant(threshold, 3)} nats"
        ),
        decodes=True,
    ),
    ExitSignal(
        key="margin",
        name="large margin",
        variables=("token_margin",),
        condition=lambda threshold: (
            f"the logit of its most probable next token is {significant(threshold, 3)} above the next one"
        ),
        at_least=True,
        decodes=True,
    ),
    ExitSignal(
        key="confidence",
        name="high confidence",
        variables=("token_top1_probability",),
        condition=lambda threshold: f"its most probable next token has a probability of at least {threshold:.4g}",
        at_least=True,
        decodes=True,
        largest=1.0,
    ),
    ExitSignal(
        key="top1",
        name="prediction unchanged",
        variables=("token_top1",),
        computed=_unchanged,
        condition=lambda threshold: (
            f"its most probable next token has not changed for {threshold:g} recurrence{'' if threshold == 1 else 's'}"
        ),
        at_least=True,
        decodes=True,
    ),
)
SIGNALS: Mapping[str, ExitSignal] = {signal.key: signal for signal in EXIT_SIGNALS}
