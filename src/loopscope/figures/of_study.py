"""The types of figure that show one study."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from matplotlib.figure import Figure

from loopscope.drawing import Readings
from loopscope.figures import components, convergence, heads, maps, prompt_map, readout
from loopscope.figures.absence import why_absent
from loopscope.figures.captions import line_words
from loopscope.figures.inference import FEW, judged_at
from loopscope.figures.kinds import FigureType
from loopscope.figures.layouts import LAYOUTS, Layout, passes
from loopscope.figures.of_stages import STAGE_FIGURES
from loopscope.figures.style import Width
from loopscope.settings import SINK_THRESHOLD

__all__ = ["STUDY_FIGURES"]

_TOKENS = "90 % of the tokens (median over prompts)"
_HEADS = "90 % of the heads of all prompts"
_MEANS = "Medians over prompts of means over each prompt's tokens."
_COMPONENTS = (
    "principal components of the residual streams of single tokens, over all recurrent layers and recurrences, with "
    "their shares of the variance. One line per layer; a circle is the first recurrence, a diamond the last."
)
_FLOOR = "Dotted, where it is near: the estimated rounding floor."
_PER_ROW = "Frobenius distances are over the square root of the number of tokens."


def _none(_: Readings) -> str | None:
    return None


def _type(
    name: str,
    draw: Callable[[Readings, Width], Figure],
    words: str | Callable[[Readings], str],
    variables: tuple[str, ...],
    paper: tuple[int, ...] = (),
    *,
    loops: bool = True,
    unless: Callable[[Readings], str | None] = _none,
) -> FigureType[Readings]:
    """Of a looped model, unless `loops` is false; `unless` gives another reason for which it cannot be drawn."""

    def absent(readings: Readings) -> str | None:
        return why_absent(readings, variables, loops=loops) or unless(readings)

    said = words if callable(words) else lambda _: str(words)
    return FigureType(name=name, draw=draw, words=said, variables=variables, absent=absent, paper=paper)


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
    return _type(file, draw, words, variables, paper if layout == "by layer" else (), unless=_one_recurrence)


def _cycle_no_longer(readings: Readings) -> str | None:
    labels = maps.cycle_visits(readings, "cycle_similarity", None)[1]
    few = maps.cycle_visits(readings, "cycle_similarity", FEW)[1]
    return (
        None
        if len(labels) > len(few)
        else f"the study holds no more than the first {FEW} recurrences (--cycle-recurrences)"
    )


def _no_trajectory(count: int, readings: Readings) -> str | None:
    found = components.tracked(readings, count)
    return None if found else f"no tracked token has {count} finite components"


def _one_readout(readings: Readings) -> str | None:
    read = readings.shown.sizes.get("readout_recurrence", 0)
    return None if read > 1 else "the model was read out at one number of recurrences only"


def _one_recurrence(readings: Readings) -> str | None:
    return None if readings.view.recurrences > 1 else "one recurrence was measured, so there is no change"


def _no_finite_prompt(readings: Readings) -> str | None:
    return None if prompt_map.chosen_prompts(readings) else "all prompts diverged"


def _maps_words(visits: str) -> str:
    return f"Distance between the attention maps of every two {visits}, over all heads, mean over prompts. {_PER_ROW}"


def _states_words(visits: str) -> str:
    return f"Cosine between the residual streams after every two {visits}, mean over tokens and prompts."


def _visits(readings: Readings) -> str:
    if not readings.view.looped:
        return "layers"
    return f"visits of the first {min(FEW, readings.view.recurrences)} recurrences"


def _prompts_shown(readings: Readings) -> str:
    ordinary, *slowest = prompt_map.chosen_prompts(readings)
    if not slowest:
        return f"Prompt {ordinary}."
    return f"(a) Prompt {ordinary}, in the middle by its distance at the end, (b) prompt {slowest[0]}, the farthest."


STUDY_FIGURES: tuple[FigureType[Readings], ...] = (
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
        f"{_PER_ROW} Medians over prompts of means over heads.",
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
    _type(
        "horizons",
        convergence.horizons,
        "Per recurrent layer, as shares of the state's norm: how far the state moves from H to 2H recurrences, the "
        "steps into both, the estimated rounding floor, and the tolerance of the quick answers. Medians over "
        "prompts; whiskers hold 90 % of the prompts.",
        ("horizon_drift", "horizon_relative_step"),
    ),
    _type(
        "layer-cosine",
        maps.layer_cosine,
        "Cosine between the residual streams of the recurrent layers at the horizon H, median over prompts of means "
        "over tokens. All near 1: the layers share one point, and the cycle is no cycle.",
        ("layer_cosine",),
    ),
    _type(
        "trajectories",
        components.trajectories,
        lambda readings: f"First two {_COMPONENTS} {components.token_words(readings, 2)}",
        ("trajectory",),
        (5, 26, 27, 28),
        unless=partial(_no_trajectory, 2),
    ),
    _type(
        "trajectories-3d",
        components.trajectories_3d,
        lambda readings: (
            f"First three {_COMPONENTS} Each axis has a scale of its own. {components.token_words(readings, 3)}"
        ),
        ("trajectory",),
        (5, 26, 27, 28),
        unless=partial(_no_trajectory, 3),
    ),
    _type(
        "cycle-attention",
        maps.cycle_attention,
        lambda readings: (
            f"{_maps_words(_visits(readings))} Dark diagonals: each layer attends as it did one pass before."
        ),
        ("attention_cycle_distance",),
        (2,),
        loops=False,
    ),
    _type(
        "cycle-attention-long",
        partial(maps.cycle_attention, recurrences=None),
        _maps_words("visits of all the recurrences kept"),
        ("attention_cycle_distance",),
        (21,),
        unless=_cycle_no_longer,
    ),
    _type(
        "cycle-residual",
        maps.cycle_residual,
        lambda readings: _states_words(_visits(readings)),
        ("cycle_similarity",),
        (19,),
        loops=False,
    ),
    _type(
        "cycle-residual-long",
        partial(maps.cycle_residual, recurrences=None),
        _states_words("visits of all the recurrences kept"),
        ("cycle_similarity",),
        (20,),
        unless=_cycle_no_longer,
    ),
    _type(
        "head-change",
        heads.head_change,
        "How much each head's attention map changes from one recurrence to the next, a row per head, median over "
        f"prompts. {_PER_ROW} White lines part the recurrent layers; no colour: no change at all.",
        ("attention_change",),
        unless=_one_recurrence,
    ),
    _type(
        "heads-stable",
        heads.heads_stable,
        lambda readings: (
            "Share of heads, over all prompts, that are stable after so many recurrences: whose change per row stays"
            f" at or below {readings.view.head_stable:g} from there on. The last recurrence measured cannot count. "
            "One line per recurrent layer."
        ),
        # Not head_stable_from: a head that is never stable has no number, so that may be finite nowhere.
        ("attention_change",),
        unless=_one_recurrence,
    ),
    _type(
        "head-sinks",
        heads.head_sinks,
        lambda readings: (
            "Share of each head's attention that the first token receives, along one pass"
            + (f" (recurrence {judged_at(readings)})" if readings.view.looped else "")
            + f", median over prompts. A head has a sink from {SINK_THRESHOLD:g} on."
            + (" White lines part prelude, block and coda." if readings.view.looped else "")
        ),
        ("sink_score",),
        loops=False,
    ),
    *STAGE_FIGURES,
    _type(
        "loss",
        readout.loss,
        lambda readings: (
            "Mean next-token loss on the prompts' own tokens, decoded after so many recurrences; mean over prompts."
            + (
                " The band holds 90 % of the prompts: it shows how much they differ, not how sure the mean is."
                if readings.shown.sizes["prompt"] > 1
                else ""
            )
        ),
        ("loss",),
        unless=_one_readout,
    ),
    _type(
        "prediction",
        readout.prediction,
        "(a) Share of tokens whose most probable next token is that of the last readout, and that keep it from "
        "there. (b) KL divergence of the prediction from the last one: mean over tokens, and the bound that 95 % "
        "stay below.",
        ("token_top1", "token_kl_to_last"),
        unless=_one_readout,
    ),
    _type(
        "exit-gate",
        readout.exit_gate,
        "Probability, by the model's exit gate, to stop after each recurrence; mean over tokens and prompts. The "
        "last recurrence measured takes all that is left.",
        ("exit_probability",),
    ),
    _type(
        "tokens",
        prompt_map.tokens,
        lambda readings: (
            "Distance of every token's state after the last recurrent layer to its state at the horizon H, over the "
            f"norm there. {_prompts_shown(readings)} Of longer prompts the last {prompt_map.MOST_TOKENS} tokens."
        ),
        ("token_relative_distance", "relative_distance_second_horizon"),
        unless=_no_finite_prompt,
    ),
)
