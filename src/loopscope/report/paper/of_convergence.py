"""The types of figure that show whether the state settles."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from loopscope.report.paper import convergence
from loopscope.report.paper.captions import PER_ROW, line_words
from loopscope.report.paper.kinds import FigureType, one_recurrence, study_type
from loopscope.report.paper.layouts import LAYOUTS, Layout, passes
from loopscope.report.paper.style import Width
from loopscope.study import Readings

_TOKENS = "90 % of the tokens (median over prompts)"
_HEADS = "90 % of the heads of all prompts"
_MEANS = "Medians over prompts of means over each prompt's tokens."
_FLOOR = "Dotted, where it is near: the estimated rounding floor."


def _laid_out(
    name: str,
    function: Callable[[Readings, Layout, Width], Figure],
    what: str,
    variables: tuple[str, ...],
    band: str = "",
    paper: tuple[int, ...] = (),
) -> list[FigureType[Readings]]:
    """A type per layout. The paper has these by layer."""
    return [_of_layout(name, function, layout, what, variables, band, paper) for layout in LAYOUTS]


def _of_layout(
    name: str,
    function: Callable[[Readings, Layout, Width], Figure],
    layout: Layout,
    what: str,
    variables: tuple[str, ...],
    band: str,
    paper: tuple[int, ...],
) -> FigureType[Readings]:
    def draw(readings: Readings, width: Width) -> Figure:
        return function(readings, layout, width)

    def words(readings: Readings) -> str:
        return f"{what} {line_words(readings, layout, band, passes(readings.view.recurrences))}"

    file = f"{name}-{layout.replace(' ', '-')}"
    return study_type(file, draw, words, variables, paper if layout == "by layer" else (), unless=one_recurrence)


CONVERGENCE_FIGURES: tuple[FigureType[Readings], ...] = (
    *_laid_out(
        "step",
        convergence.step,
        "How far one more recurrence moves each layer: (a) Euclidean norm of the difference of successive residual "
        f"streams, (b) the same over the norm of the state. {_MEANS} {_FLOOR}",
        ("successive_difference", "relative_step"),
        _TOKENS,
        (3,),
    ),
    *_laid_out(
        "distance",
        convergence.distance,
        "Distance of each layer's residual stream to its approximate fixed point, its state at the horizon H: (a) "
        "Euclidean norm of the difference, (b) the same over the norm at H, (c) the same for the state at 2H. The "
        f"distance to the state at H is 0 there by construction. {_MEANS} {_FLOOR}",
        ("distance_to_horizon", "relative_distance", "relative_distance_second_horizon"),
        _TOKENS,
        (4,),
    ),
    *_laid_out(
        "direction",
        convergence.direction,
        "Direction of each layer's residual stream: 1 − cosine (a) to the state one recurrence before, (b) to the "
        f"state at the horizon H. On a logarithmic axis what is 0 or below by rounding is a gap. {_MEANS}",
        ("cosine_to_previous", "cosine_to_horizon"),
        _TOKENS,
        (22, 24),
    ),
    *_laid_out(
        "attention",
        convergence.attention,
        "Attention maps of each layer: distance (a) to the map one recurrence before, (b) to the map at the horizon H. "
        f"{PER_ROW} Medians over prompts of means over heads.",
        ("attention_change", "attention_distance_to_horizon"),
        _HEADS,
        (23, 25),
    ),
    _of_layout(
        "norm",
        convergence.norm,
        "by layer",
        "(a) Mean token norm of the residual stream, (b) the same over its value after the first recurrence. A norm "
        f"that grows shrinks relative steps although the state does not settle. {_MEANS}",
        ("residual_norm", "norm_growth"),
        _TOKENS,
        (),
    ),
    _of_layout(
        "path-independence",
        convergence.path_independence,
        "by layer",
        "Two runs of the same prompts from different initial states: (a) distance of their states over the mean "
        f"norm, (b) 1 − cosine. {_MEANS} {_FLOOR}",
        ("path_distance", "path_cosine"),
        "",
        (),
    ),
    study_type(
        "horizons",
        convergence.horizons,
        "Per recurrent layer, as shares of the state's norm: how far the state moves from H to 2H recurrences, the "
        "steps into both, the estimated rounding floor, and the tolerance of the quick answers. Medians over "
        "prompts; whiskers hold 90 % of the prompts.",
        ("horizon_drift", "horizon_relative_step"),
    ),
)
