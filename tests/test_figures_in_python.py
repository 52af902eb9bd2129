"""`study.plot`: every figure of a study as one of plotly's, with all that its plot holds."""

from __future__ import annotations

import numpy as np
import pytest

from loopscope.errors import StudyError
from loopscope.report.figures.in_python import interactive
from loopscope.report.figures.plot import Line
from loopscope.report.figures.write import STUDY_FIGURES
from loopscope.report.settings import ReportSettings
from loopscope.study import Study, view_study
from synthetic_study import contracting, feed_forward_study, looped_study, with_behaviour


@pytest.fixture(scope="module")
def study() -> Study:
    return with_behaviour(looped_study(contracting(), recurrences=16, horizon=32))


def test_every_figure_is_drawn_with_all_its_lines(study: Study) -> None:
    view = view_study(study)
    drawn = 0
    for figure in STUDY_FIGURES:
        if figure.absent(view) is not None:
            continue
        plot = figure.draw(view, ReportSettings())
        shown = interactive(plot)
        panels = [panel for panel in plot.panels if panel.has_data]
        marks = [mark for panel in panels for mark in panel.marks if isinstance(mark, Line)]
        lines = [trace for trace in shown.data if trace.type == "scatter" and "markers" not in (trace.mode or "")]
        named = {trace.name for trace in shown.data if trace.showlegend}
        assert len(lines) >= sum(not mark.points and np.size(mark.x) > 1 for mark in marks)
        assert {trace.xaxis for trace in shown.data} == {f"x{place or ''}" for place in [0, *range(2, len(panels) + 1)]}
        assert len(named) == sum(bool(trace.showlegend) for trace in shown.data)
        assert plot.question.split()[0] in shown.layout.title.text
        drawn += 1
    assert drawn > 30


def test_a_figure_is_found_by_its_name_or_its_place_in_the_report(study: Study) -> None:
    assert {"distance", "distance_by_layer", "loss", "behaviour_layers"} <= set(dir(study.plot))
    assert study.plot.distance() == study.plot.distance_by_layer()
    assert study.plot.loss(matplotlib=True)._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(AttributeError, match="no figure 'distances'; did you mean distance"):
        study.plot.distances()
    plain = feed_forward_study()
    assert "distance" not in dir(plain.plot)
    with pytest.raises(StudyError, match="distance-by-layer cannot be drawn: a feed-forward model has no recurrences"):
        plain.plot.distance()
