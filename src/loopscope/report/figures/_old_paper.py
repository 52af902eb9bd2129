"""The paper's figures until each is a `Plot`: goes when the last one is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import loopscope.report.paper._installed  # noqa: F401 - first, so that what is missing is said in a sentence
from loopscope.report.figures.plot import FigureType, Plot
from loopscope.report.paper.of_study import STUDY_FIGURES
from loopscope.study import StudyView, read_study


@dataclass(frozen=True, kw_only=True)
class OldPlot(Plot):
    kind: Any
    source: Any

    def draw(self, width: Any) -> Any:
        return self.kind.draw(self.source, width)


class _OldType(FigureType[Any]):
    def absent(self, source: Any) -> str | None:
        return self.unless(source)


def _source(source: Any) -> Any:
    return read_study(source.study) if isinstance(source, StudyView) else source


def _old_type(kind: Any) -> FigureType[Any]:
    def of(source: Any, _: Any) -> Plot:
        read = _source(source)
        return OldPlot(question="", reading=kind.words(read), panels=(), kind=kind, source=read)

    return _OldType(
        name=kind.name,
        of=of,
        variables=kind.variables,
        paper=kind.paper,
        unless=lambda source: kind.absent(_source(source)),
    )


def old_types(kinds: Sequence[Any], new: Sequence[FigureType[Any]]) -> list[FigureType[Any]]:
    """Those that are not yet among the new ones."""
    names = {each.name for each in new}
    return [_old_type(kind) for kind in kinds if kind.name not in names]


OLD_STUDY = STUDY_FIGURES
