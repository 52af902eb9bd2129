"""The types of figure that show one study."""

from __future__ import annotations

from functools import partial

from loopscope.report.paper import components, prompt_map, readout
from loopscope.report.paper.kinds import FigureType, study_type
from loopscope.study import Readings

_COMPONENTS = (
    "principal components of the residual streams of single tokens, over all recurrent layers and recurrences, with "
    "their shares of the variance. One line per layer; a circle is the first recurrence, a diamond the last."
)


def _no_trajectory(count: int, readings: Readings) -> str | None:
    found = components.tracked(readings, count)
    return None if found else f"no tracked token has {count} finite components"


def _one_readout(readings: Readings) -> str | None:
    read = readings.shown.sizes.get("readout_recurrence", 0)
    return None if read > 1 else "the model was read out at one number of recurrences only"


def _no_finite_prompt(readings: Readings) -> str | None:
    return None if prompt_map.chosen_prompts(readings) else "all prompts diverged"


def _prompts_shown(readings: Readings) -> str:
    ordinary, *slowest = prompt_map.chosen_prompts(readings)
    if not slowest:
        return f"Prompt {ordinary}."
    return f"(a) Prompt {ordinary}, in the middle by its distance at the end, (b) prompt {slowest[0]}, the farthest."


STUDY_FIGURES: tuple[FigureType[Readings], ...] = (
    study_type(
        "trajectories",
        components.trajectories,
        lambda readings: f"First two {_COMPONENTS} {components.token_words(readings, 2)}",
        ("trajectory",),
        (5, 26, 27, 28),
        unless=partial(_no_trajectory, 2),
    ),
    study_type(
        "trajectories-3d",
        components.trajectories_3d,
        lambda readings: (
            f"First three {_COMPONENTS} Each axis has a scale of its own. {components.token_words(readings, 3)}"
        ),
        ("trajectory",),
        (5, 26, 27, 28),
        unless=partial(_no_trajectory, 3),
    ),
    study_type(
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
    study_type(
        "prediction",
        readout.prediction,
        "(a) Share of tokens whose most probable next token is that of the last readout, and that keep it from "
        "there. (b) KL divergence of the prediction from the last one: mean over tokens, and the bound that 95 % "
        "stay below.",
        ("token_top1", "token_kl_to_last"),
        unless=_one_readout,
    ),
    study_type(
        "exit-gate",
        readout.exit_gate,
        "Probability, by the model's exit gate, to stop after each recurrence; mean over tokens and prompts. The "
        "last recurrence measured takes all that is left.",
        ("exit_probability",),
    ),
    study_type(
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
