"""Single prompts, token by token: which tokens settle late?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loopscope._util.wording import visible
from loopscope.errors import ConfigError
from loopscope.report.figures.look import decade, decade_ticks, decades, logarithms
from loopscope.report.figures.plot import Axis, FigureType, HeatMap, Panel, Plot, Section, on_page
from loopscope.report.settings import ReportSettings
from loopscope.study import StudyView

_COLUMNS = 64
_NAME = "token_relative_distance"


def ordinary_and_farthest(view: StudyView) -> dict[int, str]:
    """Prompts by their mean relative distance at the end: the middle one and the largest; none if all diverged."""
    end = view.finite["relative_distance_second_horizon"].isel(layer=-1, recurrence=-1)
    order = end["prompt"].values[np.argsort(end.values, kind="stable")]
    if not order.size:
        return {}
    ordinary, farthest = int(order[(len(order) - 1) // 2]), int(order[-1])
    return {ordinary: ", a typical one"} | ({farthest: ", farthest from its horizon"} if farthest != ordinary else {})


def _all_diverged(view: StudyView) -> str | None:
    return None if view.finite.sizes["prompt"] else "all prompts diverged"


def _tokens(view: StudyView, settings: ReportSettings) -> Plot:
    """Of the prompts that the settings name, or of an ordinary one and the one farthest out.

    Raises `ConfigError` for a prompt that the study does not have.
    """
    missing = [prompt for prompt in settings.prompts if prompt >= view.prompts]
    if missing:
        raise ConfigError(f"Prompt {missing[0]} cannot be drawn: the study has prompts 0 to {view.prompts - 1}.")
    chosen = dict.fromkeys(settings.prompts, "") or ordinary_and_farthest(view)
    columns = _columns(view.recurrences)
    values = view.dataset[_NAME].sel(site="last_layer").transpose("prompt", "token", "recurrence").values
    shown, cut = {}, []
    for prompt in chosen:
        count = len(view.strings(prompt))
        shown[prompt] = values[prompt, max(0, count - settings.most_tokens) : count][:, columns - 1].astype(np.float64)
        if count > settings.most_tokens:
            cut.append(f" Of prompt {prompt} only the last {settings.most_tokens} of its {count} tokens are drawn.")
    # One range of colours, so that the prompts can be compared.
    ends = decades(np.concatenate([np.empty(0), *(logarithms(values).ravel() for values in shown.values())]))
    return Plot(
        question="Which tokens settle late?",
        reading=(
            "Distance of every token's state after the last recurrent layer to its state at the horizon H = "
            f"{view.horizon}, divided by the norm there. Rows that stay bright are tokens that keep moving; a token "
            f"sees only those above it.{''.join(cut)}"
        ),
        panels=[
            _panel(view, prompt, f"Prompt {prompt}{why}", shown[prompt], columns, ends)
            for prompt, why in chosen.items()
        ],
    )


def _panel(
    view: StudyView,
    prompt: int,
    title: str,
    shown: NDArray[np.float64],
    columns: NDArray[np.int64],
    ends: tuple[float, float],
) -> Panel:
    rows, places = len(shown), np.arange(len(columns))
    strings = view.strings(prompt)
    names = [visible(token, 18) for token in strings[len(strings) - rows :]]
    return Panel(
        x=Axis(title="recurrence", ticks={int(at): str(columns[at]) for at in places[:: max(1, len(columns) // 7)]}),
        y=Axis(title="", ticks=dict(enumerate(names)), span=(rows - 0.5, -0.5)),
        marks=[
            HeatMap(
                z=logarithms(shown),
                x=places,
                bar="distance / norm at H",
                low=ends[0],
                high=ends[1],
                bar_ticks={power: decade(power) for power in decade_ticks(*ends)},
                labels=[[name] * len(columns) for name in names],
                data=np.stack(np.broadcast_arrays(shown, columns[None]), axis=-1).astype(np.float32),
                tip="{label}\nrecurrence {1:.0f}: {0:.2g}",
            )
        ],
        title=title,
        anchor=f"tokens-{prompt}",
        height=16 * rows + 150,
    )


def _columns(recurrences: int) -> NDArray[np.int64]:
    """Recurrences to draw, counted from 1: at most `_COLUMNS`, denser at the start."""
    if recurrences <= _COLUMNS:
        return np.arange(1, recurrences + 1)
    return np.unique(np.geomspace(1, recurrences, _COLUMNS).round().astype(np.int64))


TOKENS = FigureType(
    "tokens", _tokens, (_NAME, "relative_distance_second_horizon"), anchor="token-distances", unless=_all_diverged
)


def tokens_section(view: StudyView, settings: ReportSettings) -> Section:
    """Heat maps of single prompts. Raises `ConfigError` for a prompt that the study does not have."""
    return Section(
        anchor="tokens",
        short="Tokens",
        title="Which tokens settle late?",
        lead="A row per token: bright while it is far from its state at the horizon, dark once it is close.",
        # Prompts that were asked for are drawn up to where they diverge.
        figures=[TOKENS.draw(view, settings)] if settings.prompts else on_page((TOKENS,), view, settings),
    )
