"""How often each method is right on trajectories whose truth is known."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loopscope.dynamics.trajectories.judge import judge
from loopscope.dynamics.trajectories.settings import Method
from loopscope.dynamics.trajectories.synthetic import CASES, LENGTHS, WIDTHS, Trajectory, generate
from loopscope.dynamics.verdicts import Kind
from loopscope.models.inspection.facts import Dtype

_SHAPED = (Kind.ORBIT, Kind.SLIDER)
_GENERATION_BYTES = 2**28


@dataclass(slots=True)
class CaseScore:
    """What a method said of one case."""

    right: int = 0
    wrong: int = 0
    undecidable: int = 0
    """Trajectories that nothing could decide, which count neither way."""
    said: Counter[Kind] = field(default_factory=Counter)
    """Of the decidable ones."""
    wrongly: Counter[Kind] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Right among the decidable; NaN where there are none."""
        total = self.right + self.wrong
        return self.right / total if total else float("nan")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A method on a mix of cases in one dtype."""

    method: Method
    dtype: Dtype
    count: int
    seed: int
    lengths: tuple[int, ...]
    widths: tuple[int, ...]
    cases: dict[str, CaseScore]
    false_alarms: int
    """True fixed points that were called an orbit or a slider."""
    fixed_points: int
    """Decidable trajectories that are true fixed points."""

    @property
    def total(self) -> CaseScore:
        """All cases together."""
        whole = CaseScore()
        for score in self.cases.values():
            whole.right += score.right
            whole.wrong += score.wrong
            whole.undecidable += score.undecidable
            whole.said += score.said
            whole.wrongly += score.wrongly
        return whole

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "method": self.method,
            "dtype": self.dtype,
            "count": self.count,
            "seed": self.seed,
            "lengths": list(self.lengths),
            "widths": list(self.widths),
            "right": self.total.right,
            "wrong": self.total.wrong,
            "undecidable": self.total.undecidable,
            "false_alarms": self.false_alarms,
            "fixed_points": self.fixed_points,
            "cases": {
                name: {
                    "right": score.right,
                    "wrong": score.wrong,
                    "undecidable": score.undecidable,
                    "wrongly": {str(kind): number for kind, number in score.wrongly.items()},
                }
                for name, score in self.cases.items()
            },
        }


def calibrate(
    count: int,
    *,
    dtype: Dtype = "float32",
    methods: Sequence[Method] = ("displacement", "cosine"),
    seed: int = 0,
    lengths: Sequence[int] = LENGTHS,
    widths: Sequence[int] = WIDTHS,
    cases: Sequence[str] = (),
    progress: Callable[[int], None] = lambda trajectories: None,
) -> list[Calibration]:
    """Judge `count` trajectories of the generator's default mix with each method; the same arguments give the same
    table.

    `unknown` is wrong where the truth is another kind. Raises `ConfigError` for a case or a dtype that is not
    known.
    """
    scores = {method: {name: CaseScore() for name in cases or CASES} for method in methods}
    alarms = dict.fromkeys(methods, 0)
    fixed = 0
    # Trajectories of one shape are judged together, of as many as memory may hold at a time.
    for batch in _batches(generate(count, seed=seed, cases=cases, lengths=lengths, widths=widths, dtype=dtype)):
        fixed += sum(_is_fixed(each) for each in batch)
        states = np.stack([each.states for each in batch])
        for method in methods:
            verdicts = judge(states, dtype, method, check_order=False)
            for trajectory, verdict in zip(batch, verdicts, strict=True):
                _count(scores[method][trajectory.case], trajectory, verdict.kind)
                alarms[method] += _is_fixed(trajectory) and verdict.kind in _SHAPED
        progress(len(batch))
    return [
        Calibration(
            method=method,
            dtype=dtype,
            count=count,
            seed=seed,
            lengths=tuple(lengths),
            widths=tuple(widths),
            cases=scores[method],
            false_alarms=alarms[method],
            fixed_points=fixed,
        )
        for method in methods
    ]


def _batches(trajectories: Iterable[Trajectory]) -> Iterator[list[Trajectory]]:
    waiting: dict[tuple[int, ...], list[Trajectory]] = defaultdict(list)
    held = 0
    for each in trajectories:
        waiting[each.states.shape].append(each)
        held += each.states.nbytes
        if held >= _GENERATION_BYTES:
            yield from waiting.values()
            waiting.clear()
            held = 0
    yield from waiting.values()


def _count(score: CaseScore, trajectory: Trajectory, kind: Kind) -> None:
    if not trajectory.decidable:
        score.undecidable += 1
        return
    score.said[kind] += 1
    if kind in trajectory.truth:
        score.right += 1
    else:
        score.wrong += 1
        score.wrongly[kind] += 1


def _is_fixed(trajectory: Trajectory) -> bool:
    return trajectory.decidable and Kind.FIXED_POINT in trajectory.truth
