"""What the model says, as text: the most probable next token after each recurrence, and after each layer of one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from loopscope._util.wording import percent, significant, visible
from loopscope.report.figures.curves import judged_at
from loopscope.report.figures.look import layer_colours
from loopscope.report.figures.plot import Axis, FigureType, HeatMap, Line, Mark, Panel, Plot
from loopscope.report.figures.tokens import ordinary_and_farthest
from loopscope.report.settings import ReportSettings
from loopscope.study import StudyView

_CUT = 9
"""Characters of a token in a cell."""
_MOST_ANSWERS = 7
"""Tokens of an answer that get a line."""

_Colour = Literal["probability", "entropy", "divergence"]
_COLOURS: dict[_Colour, tuple[str, str, str]] = {
    "probability": ("token_top1_probability", "probability of the token", ""),
    "entropy": ("token_entropy", "entropy (nats)", ", coloured by entropy"),
    "divergence": (
        "token_kl_to_last",
        "KL divergence from the last (nats)",
        ", coloured by the divergence from the last readout",
    ),
}


def token_texts(view: StudyView) -> Mapping[int, str]:
    """The texts that a study knows of tokens: those that it keeps for predictions, or, of an older study, those of its
    prompts."""
    data = view.dataset
    if "predicted_text" in data.coords:
        texts = data["predicted_text"].values.tolist()
        return dict(zip(data["predicted_token"].values.tolist(), map(str, texts), strict=True))
    pairs = (zip(entry["token_ids"], entry["token_strings"], strict=True) for entry in view.study.tokens)
    return {int(token): str(text) for prompt in pairs for token, text in prompt}


def _named(texts: Mapping[int, str], token: int) -> str:
    return visible(texts[token], _CUT) if token in texts else f"#{token}"


def _prompt(view: StudyView, settings: ReportSettings) -> int:
    """The first that the settings name, or an ordinary one."""
    return next(iter(settings.prompts), next(iter(ordinary_and_farthest(view)), 0))


def _rows(view: StudyView, settings: ReportSettings, prompt: int) -> slice:
    count = len(view.strings(prompt))
    return slice(max(0, count - settings.most_tokens), count)


def _of_prompt(view: StudyView, settings: ReportSettings, name: str, across: str) -> NDArray[Any]:
    """(token, across) of the prompt that is shown."""
    prompt = _prompt(view, settings)
    values = view.variable(name).isel(prompt=prompt).transpose("token", across).values
    return np.asarray(values[_rows(view, settings, prompt)])


def _panel(
    view: StudyView,
    settings: ReportSettings,
    tokens: NDArray[np.integer],
    values: NDArray[np.floating],
    columns: list[str],
    x_title: str,
    bar: str,
) -> Panel:
    """A row for each token of the prompt, with what is predicted to follow it."""
    prompt, texts = _prompt(view, settings), token_texts(view)
    strings = view.strings(prompt)[_rows(view, settings, prompt)]
    said = [[_named(texts, int(token)) if token >= 0 else "" for token in row] for row in tokens]
    tips = [
        [
            f"after “{visible(string, 24)}”, {column}: “{word}”, {significant(value)}"
            for column, word, value in zip(columns, row, known, strict=True)
        ]
        for string, row, known in zip(strings, said, values.tolist(), strict=True)
    ]
    return Panel(
        x=Axis(title=x_title, ticks=dict(enumerate(columns))),
        y=Axis(
            title="token of the prompt",
            ticks={row: visible(string, 18) for row, string in enumerate(strings)},
            span=(len(strings) - 0.5, -0.5),
        ),
        marks=[
            HeatMap(
                z=values,
                x=range(len(columns)),
                bar=bar,
                low=0,
                high=1 if bar.startswith("probability") else None,
                texts=said,
                gaps=True,
                labels=tips,
                tip="{label}",
            )
        ],
        height=18 * len(strings) + 120,
        least_width=90 + 62 * len(columns),
    )


def _by_recurrence(colour: _Colour, view: StudyView, settings: ReportSettings) -> Plot:
    variable, bar, how = _COLOURS[colour]
    counts = [str(int(count)) for count in view.variable("readout_recurrence").values]
    tokens = _of_prompt(view, settings, "token_top1", "readout_recurrence")
    return Plot(
        question=f"What does the model say after each recurrence{how}?",
        reading=f"The most probable next token after each token of prompt {_prompt(view, settings)}, with the state "
        "decoded after that many recurrences."
        + _cut(view, settings)
        + (" “#” and a number stand for a token whose text the study does not keep." if _unknown(view, tokens) else ""),
        panels=[
            _panel(
                view, settings, tokens.astype(np.int64), _of_prompt(view, settings, variable, "readout_recurrence"),
                counts, "recurrences before the readout", bar,
            )
        ],
    )  # fmt: skip


def _cut(view: StudyView, settings: ReportSettings) -> str:
    count = len(view.strings(_prompt(view, settings)))
    return f" The last {settings.most_tokens} of its {count} tokens are drawn." if count > settings.most_tokens else ""


def _unknown(view: StudyView, tokens: NDArray[Any]) -> bool:
    return bool(set(np.unique(tokens[tokens >= 0]).tolist()) - set(token_texts(view)))


def _by_layer(view: StudyView, settings: ReportSettings) -> Plot:
    """The last column is the readout of the same recurrence."""
    at = judged_at(view)
    tokens = _of_prompt(view, settings, "layer_top1", "layer")[:, :-1]
    values = _of_prompt(view, settings, "layer_top1_probability", "layer")[:, :-1]
    columns = [f"layer {layer}" for layer in range(tokens.shape[1])]
    read = view.variable("readout_recurrence").values.tolist()
    if at in read:
        place = read.index(at)
        tokens = np.column_stack([tokens, _of_prompt(view, settings, "token_top1", "readout_recurrence")[:, place]])
        last = _of_prompt(view, settings, "token_top1_probability", "readout_recurrence")[:, place]
        values = np.column_stack([values, last])
        columns.append(f"layer {len(columns)}, coda")
    return Plot(
        question=f"What does the model say after each layer of recurrence {at}?",
        reading=f"Prompt {_prompt(view, settings)}, coloured by probability. After a layer within the block the "
        "state is read out by the final norm and the head alone, for which it was not trained; after the last layer "
        "by the coda, as in the model." + _cut(view, settings),
        panels=[
            _panel(
                view, settings, tokens.astype(np.int64), values, columns, "read after", "probability of the token"
            )
        ],
    )  # fmt: skip


def _answer(view: StudyView, settings: ReportSettings) -> Plot:
    """After the prompt's last token."""
    prompt, texts = _prompt(view, settings), token_texts(view)
    last = len(view.strings(prompt)) - 1
    counts = [int(count) for count in view.variable("readout_recurrence").values]
    rank, log_probability = (
        view.variable(name).isel(prompt=prompt, token=last).transpose("answer", "readout_recurrence").values
        for name in ("answer_rank", "answer_log_probability")
    )
    tokens = view.dataset["answer"].values.tolist()[:_MOST_ANSWERS]
    names = [f"“{_named(texts, token)}”" for token in tokens]
    found = [f"{name} ends at rank {int(row[-1]):,} with {percent(float(np.exp(odds[-1])))}"
             for name, row, odds in zip(names, rank, log_probability, strict=False)]  # fmt: skip

    def lines(rows: NDArray[np.float64]) -> list[Mark]:
        colours = layer_colours(len(names))
        return [
            Line(x=counts, y=row, name=name, colour=colour, points=True)
            for row, name, colour in zip(rows, names, colours, strict=False)
        ]

    ticks = counts if len(counts) <= 6 else [count for count in counts if not count & (count - 1)]
    x = Axis(title="recurrences before the readout", scale="log", span=(counts[0] / 1.1, counts[-1] * 1.1), ticks=ticks)
    return Plot(
        question="When does the model know the answer?",
        reading=f"Tokens of the answer as the one that follows prompt {prompt}: (a) rank among all tokens, 1 for the "
        f"most probable, (b) log-probability. {'; '.join(found)}.",
        panels=[
            Panel(x=x, y=Axis(title="rank", scale="auto"), marks=lines(rank.astype(np.float64))),
            Panel(x=x, y=Axis(title="log-probability (nats)"), marks=lines(log_probability.astype(np.float64))),
        ],
    )


PREDICTIONS: tuple[FigureType[StudyView], ...] = (
    FigureType("answer", _answer, ("answer_rank", "answer_log_probability"), anchor="answer-rank"),
    *(
        FigureType(
            "predictions" if colour == "probability" else f"predictions-{colour}",
            partial(_by_recurrence, colour),
            ("token_top1", variable),
            folded=colour != "probability",
        )
        for colour, (variable, _, _) in _COLOURS.items()
    ),
    FigureType(
        "predictions-by-layer",
        _by_layer,
        ("layer_top1", "layer_top1_probability", "token_top1", "token_top1_probability"),
        folded=True,
    ),
)
