"""Stopping rules: conditions on signals, all or any of them, held for some recurrences in a row."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from loopscope._util.wording import listed
from loopscope.answers.exit_signals import SIGNALS, ExitSignal, Quantities
from loopscope.errors import ConfigError

_CONDITION = re.compile(r"([a-z0-9-]+)(?:\s*(<=|>=|≤|≥)\s*([-+.\deE]+))?")


@dataclass(frozen=True)
class Condition:
    """That a signal is on the right side of a threshold."""

    signal: str
    """A key of `SIGNALS`."""
    threshold: float | None
    """None: still to be chosen."""

    @property
    def about(self) -> ExitSignal:
        return SIGNALS[self.signal]

    def __str__(self) -> str:
        if self.threshold is None:
            return self.signal
        return f"{self.signal} {'>=' if self.about.at_least else '<='} {self.threshold:.15g}"


@dataclass(frozen=True)
class StoppingRule:
    """A token stops after the first recurrence, from `least` on, at which its conditions, all or any of them, have held
    for `patience` recurrences in a row. What is not known holds nothing.

    Raises `ConfigError` for no condition, an unknown signal, and numbers below 1.
    """

    conditions: tuple[Condition, ...]
    joined: Literal["all", "any"] = "all"
    patience: int = 1
    least: int = 1

    def __post_init__(self) -> None:
        for each in self.conditions:
            if each.signal not in SIGNALS:
                raise ConfigError(f"Unknown exit signal {each.signal!r}; the signals are {', '.join(SIGNALS)}.")
            if each.threshold is not None and not np.isfinite(each.threshold):
                raise ConfigError(f"The threshold of {each.signal} must be a finite number, got {each.threshold}.")
            if sum(other.signal == each.signal for other in self.conditions) > 1:
                raise ConfigError(f"The exit rule names {each.signal} more than once; keep one of its conditions.")
        if not self.conditions or self.joined not in ("all", "any"):
            raise ConfigError("An exit rule has one condition or more, joined by all (&) or any (|) of them.")
        for number in (self.patience, self.least):
            if type(number) is not int or number < 1:
                raise ConfigError(
                    "An exit rule's patience and least number of recurrences are whole numbers, 1 or more, got "
                    f"{self.patience!r} and {self.least!r}."
                )

    @classmethod
    def parse(cls, text: str, *, patience: int = 1, least: int = 1) -> StoppingRule:
        """From such as `step <= 0.03 & top1 >= 2`, or with `|` for any of several; a threshold may be left out where it
        is to be chosen. Raises `ConfigError` for what is none."""
        if "&" in text and "|" in text:
            raise ConfigError(f"The exit rule {text!r} has & and |; join all conditions by one of them.")
        found = []
        for part in re.split(r"[&|]", text):
            match = _CONDITION.fullmatch(part.strip())
            if match is None:
                raise ConfigError(
                    f"The exit rule {text!r} cannot be read: a condition is a signal and its threshold, such as "
                    "'step <= 0.03', and several are joined by & or |."
                )
            signal, side, threshold = match.groups()
            if side and signal in SIGNALS and (side in (">=", "≥")) != SIGNALS[signal].at_least:
                right = ">=" if SIGNALS[signal].at_least else "<="
                raise ConfigError(f"A token stops where {signal} {right} a threshold, not where it is {side} one.")
            try:
                found.append(Condition(signal, None if threshold is None else float(threshold)))
            except ValueError:
                raise ConfigError(f"The threshold {threshold!r} of {signal} is no number.") from None
        return cls(tuple(found), "any" if "|" in text else "all", patience, least)

    @property
    def signals(self) -> tuple[ExitSignal, ...]:
        return tuple(each.about for each in self.conditions)

    @property
    def is_open(self) -> bool:
        """Some threshold is still to be chosen."""
        return any(each.threshold is None for each in self.conditions)

    def with_thresholds(self, thresholds: tuple[float, ...]) -> StoppingRule:
        """Those that are still to be chosen, in order."""
        left = iter(thresholds)
        chosen = tuple(
            Condition(each.signal, next(left) if each.threshold is None else each.threshold) for each in self.conditions
        )
        return StoppingRule(chosen, self.joined, self.patience, self.least)

    def check_can_fire(self, recurrences: int) -> None:
        """Raises `ConfigError` for a rule that can stop no token before that many recurrences, whatever its signals
        are, and for one whose thresholds are not all there."""
        if self.is_open:
            unknown = [each.signal for each in self.conditions if each.threshold is None]
            raise ConfigError(
                f"The exit rule {self} names no threshold of {listed(unknown)}; give one, such as "
                f"'{unknown[0]} {'>=' if SIGNALS[unknown[0]].at_least else '<='} 0.1', or let `loopscope exits` choose."
            )
        self.check_reachable(recurrences)

    def check_reachable(self, recurrences: int) -> None:
        """The same of the thresholds that are there."""
        never = [
            (each.threshold or 0) > min(each.about.largest, recurrences - 2 if each.signal == "top1" else np.inf)
            for each in self.conditions
            if each.about.at_least
        ]
        impossible = any(never) if self.joined == "all" else len(never) == len(self.conditions) and all(never)
        check_patience(self.patience, self.least, recurrences)
        if impossible:
            raise ConfigError(
                f"The exit rule {self} can stop no token before the last of {recurrences} recurrences, so that it "
                "never fires; loosen it, or run more recurrences."
            )

    def fires(self, known: Quantities) -> NDArray[np.bool_]:
        """Where a token may stop, (recurrence, ...). Raises `ConfigError` for a rule that is open."""
        held: NDArray[np.bool_] | None = None
        for each in self.conditions:
            if each.threshold is None:
                raise ConfigError(f"The exit rule {self} names no threshold of {each.signal}.")
            now = each.about.reaches(each.about.of(known), each.threshold)
            held = now if held is None else held & now if self.joined == "all" else held | now
        assert held is not None
        return self.patient(held)

    def patient(self, held: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Where a token may stop, of where its conditions hold."""
        found = held.copy()
        for back in range(1, self.patience):
            found[back:] &= held[:-back]
            found[:back] = False
        found[: self.least - 1] = False
        return found

    def stop_times(self, known: Quantities) -> NDArray[np.int64]:
        """Recurrences that each token takes; all there are where it never stops."""
        return first_of(self.fires(known))

    def __str__(self) -> str:
        text = (" & " if self.joined == "all" else " | ").join(map(str, self.conditions))
        more = [f"{self.patience} in a row"] if self.patience > 1 else []
        more += [f"from {self.least} on"] if self.least > 1 else []
        return text + (f" ({', '.join(more)})" if more else "")


def check_patience(patience: int, least: int, recurrences: int) -> None:
    """Raises `ConfigError` for a rule that so many recurrences are too few for, whatever its conditions are."""
    for name, number in (("patience", patience), ("least", least)):
        if number >= recurrences:
            raise ConfigError(
                f"An exit rule with {name} {number} can stop no token before the last of {recurrences} recurrences, so "
                "that it never fires; give less."
            )


def first_of(fires: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The first recurrence, from 1, at which a token may stop; the last one where there is none."""
    fires = fires.copy()
    fires[-1] = True
    return np.asarray(fires.argmax(axis=0) + 1, dtype=np.int64)
