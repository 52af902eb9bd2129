"""The kinds of intervention. `str` of one is its text on the command line, which `parse_intervention` reads back.

Layers and tokens count from 0 and recurrences from 1, as everywhere. Constructors raise `ConfigError` for values that
mean nothing for any model; whether an intervention fits a given model is for `check_fits` to say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from loopscope._util.sites import Stage
from loopscope.errors import ConfigError

Branch = Literal["mlp", "attention"]


@dataclass(frozen=True)
class Recurrences:
    """The recurrences `first` to `last`, both included; with None there is no end."""

    first: int
    last: int | None

    def __post_init__(self) -> None:
        if self.first < 1 or (self.last is not None and self.last < self.first):
            raise ConfigError(f"Recurrences go up from 1, as in 3, 2-5 or 4-; got {self}.")

    def __contains__(self, recurrence: int) -> bool:
        return self.first <= recurrence and (self.last is None or recurrence <= self.last)

    def __str__(self) -> str:
        if self.last is None:
            return f"{self.first}-"
        return f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"

    def overlaps(self, other: Recurrences) -> bool:
        return max(self.first, other.first) in self and max(self.first, other.first) in other


_ALL = Recurrences(1, None)


@dataclass(frozen=True)
class ScaleBranch:
    """What a layer's MLP or attention adds to the residual stream, times a factor: `mlp:recurrent.2@4-=0`.

    0 removes it. Where a norm follows the branch before it is added (Ouro, OLMo-2) the factor comes after that norm,
    which would undo it.
    """

    branch: Branch
    stage: Stage
    layer: int | None
    """None for every layer of the stage."""
    factor: float
    recurrences: Recurrences | None = None
    """None for all of them."""

    def __post_init__(self) -> None:
        if self.layer is not None and self.layer < 0:
            raise ConfigError(f"Layers count from 0, got {self.layer}.")
        if not math.isfinite(self.factor):
            raise ConfigError(f"A branch is scaled by a finite factor, got {self.factor}.")
        if self.recurrences is not None and self.stage != "recurrent":
            raise ConfigError(
                f"The {self.stage} runs once, so '{self}' cannot name recurrences; leave out @{self.recurrences}."
            )

    def __str__(self) -> str:
        layer = "*" if self.layer is None else self.layer
        return f"{self.branch}:{self.stage}.{layer}{_at(self.recurrences)}={_number(self.factor)}"

    def acts(self, stage: Stage, layer: int, recurrence: int) -> bool:
        """On this visit."""
        return (
            stage == self.stage
            and self.layer in (None, layer)
            and (self.recurrences is None or recurrence in self.recurrences)
        )

    def meets(self, other: ScaleBranch) -> bool:
        """Both scale the same branch at some visit."""
        layers = self.layer is None or other.layer in (None, self.layer)
        times = (self.recurrences or _ALL).overlaps(other.recurrences or _ALL)
        return self.branch == other.branch and self.stage == other.stage and layers and times


@dataclass(frozen=True)
class FreezeInjection:
    """The block's input of one recurrence is its input in all later ones too: `inject@3=frozen`.

    The prelude's output e never changes, so what can be frozen is the mixed input `u = W [s ; e]` (or `s + e`). That
    cuts the feedback: from there on the block computes on the same u, whatever the state has become.
    """

    recurrence: int = 1

    def __post_init__(self) -> None:
        _check_recurrence(self.recurrence)

    def __str__(self) -> str:
        return f"inject@{self.recurrence}=frozen"


@dataclass(frozen=True)
class Damp:
    """`s <- (1 - eta) s + eta F(s)` with F one whole recurrence, its injection and its norm included: `damp=0.5`.

    An eigenvalue lambda of F becomes `1 - eta + eta lambda`.
    """

    eta: float

    def __post_init__(self) -> None:
        if not 0 < self.eta <= 1:
            raise ConfigError(
                f"The step of damping (eta) must be above 0 and up to 1 (which changes nothing), got {self.eta:g}."
            )

    def __str__(self) -> str:
        return f"damp={_number(self.eta)}"


@dataclass(frozen=True)
class StartFrom:
    """The loop starts from zeros, or from the prelude's output e: `start=zeros`, `start=prelude`."""

    state: Literal["zeros", "prelude"]

    def __str__(self) -> str:
        return f"start={self.state}"


@dataclass(frozen=True)
class StartSeed:
    """A random initial state is drawn from this seed instead of the run's: `start=seed:7`."""

    seed: int

    def __str__(self) -> str:
        return f"start=seed:{self.seed}"


@dataclass(frozen=True)
class StartScaled:
    """The model's own initial state times a factor: `start=scale:0.5`."""

    factor: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.factor) or self.factor == 0:
            raise ConfigError(
                f"start=scale takes a finite factor other than 0 (start=zeros says that), got {self.factor}."
            )

    def __str__(self) -> str:
        return f"start=scale:{_number(self.factor)}"


@dataclass(frozen=True)
class ReplaceToken:
    """One token's state, as one recurrence receives it and before injection, is replaced: `token:-1@4=zeros`.

    At recurrence 1 that is the initial state. What recurrence 3 hands over is announced as it is; 4 starts from the
    replacement.
    """

    token: int
    """Counted from 0 or, negative, from the end of each prompt."""
    recurrence: int
    by: Literal["zeros", "noise"] | int
    """`noise` has the norm of the state that it replaces; a number is another token of the same prompt."""

    def __post_init__(self) -> None:
        _check_recurrence(self.recurrence)
        if self.by == self.token:
            raise ConfigError(f"'{self}' puts a token's own state in its place; name another token.")

    def __str__(self) -> str:
        by = f"token:{self.by}" if isinstance(self.by, int) else self.by
        return f"token:{self.token}@{self.recurrence}={by}"


Intervention = ScaleBranch | FreezeInjection | Damp | StartFrom | StartSeed | StartScaled | ReplaceToken


def _check_recurrence(recurrence: int) -> None:
    if recurrence < 1:
        raise ConfigError(f"Recurrences count from 1, got {recurrence}.")


def _at(recurrences: Recurrences | None) -> str:
    return "" if recurrences is None else f"@{recurrences}"


def _number(value: float) -> str:
    """The shortest text that is read back as the same number."""
    return repr(float(value)).removesuffix(".0")
