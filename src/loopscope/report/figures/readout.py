"""What the model would say after each number of recurrences, and where its exit gate stops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loopscope._util.statistics import mean, quantile
from loopscope.report.figures.curves import BAND_LEVELS, final_shares, share_axis, trained_mark
from loopscope.report.figures.exit_rules import EXIT_RULES_FIGURE
from loopscope.report.figures.look import CATEGORIES
from loopscope.report.figures.plot import Axis, Band, Bars, FigureType, Line, Mark, Panel, Plot, Section, on_page
from loopscope.report.figures.predictions import PREDICTIONS
from loopscope.report.settings import ReportSettings
from loopscope.study import StudyView, powers_of_two

_MOST_TICKS = 6
"""Numbers of recurrences that an axis names one by one; of more, the powers of two."""


def _loss(view: StudyView, settings: ReportSettings) -> Plot:
    loss = view.variable("loss").transpose("readout_recurrence", "prompt")
    counts = loss["readout_recurrence"].values
    marks: list[Mark] = []
    spread = ""
    if loss.sizes["prompt"] > 1:
        low, high = (view.median("loss", level).values for level in BAND_LEVELS)
        marks.append(Band(x=counts, low=low, high=high, name="90 % of prompts"))
        spread = " The band holds 90 % of the prompts: it shows how much they differ, not the uncertainty of the mean."
    means = np.array([mean(row) for row in loss.values])
    marks.append(
        Line(
            x=counts, y=means, name="mean over prompts", colour=CATEGORIES[0], points=True,
            tip="after {x}: {y:.3f} nats",
        )
    )  # fmt: skip
    return Plot(
        question="Does the loss improve with more recurrences?",
        reading="Mean next-token loss on the prompts' own tokens, with the state decoded after that many recurrences; "
        f"mean over prompts.{spread}",
        panels=[_over_readouts(view, Axis(title="loss (nats a token)"), marks)],
    )


def _prediction(view: StudyView, settings: ReportSettings) -> Plot:
    agrees, final = final_shares(view.variable("token_top1"))
    counts = view.variable("readout_recurrence").values
    divergence = view.variable("token_kl_to_last").transpose("readout_recurrence", "prompt", "token").values
    rows = divergence[:-1].reshape(len(counts) - 1, -1)
    means = np.array([mean(row) for row in rows])
    high = np.array([quantile(row, BAND_LEVELS[1]) for row in rows])
    return Plot(
        question="When does the prediction stop changing?",
        reading="(a) Share of tokens with the same most probable next token as at the last readout, and share that "
        "keep it from there on. (b) KL divergence of the prediction after that many recurrences from the last one: "
        "mean over tokens, and the 95th percentile.",
        panels=[
            _over_readouts(
                view,
                share_axis("share of tokens"),
                [
                    Line(
                        x=counts, y=agrees, name="same top token as at the last readout", colour=CATEGORIES[5],
                        points=True,
                    ),
                    Line(x=counts, y=final, name="the same from there on", colour=CATEGORIES[0], points=True),
                ],
            ),
            _over_readouts(
                view,
                Axis(title="KL divergence from the last (nats)", scale="auto"),
                [
                    Line(x=counts[:-1], y=means, name="mean over tokens", colour=CATEGORIES[2], points=True),
                    Line(x=counts[:-1], y=high, name="95th percentile of tokens", colour=CATEGORIES[2], dash="dot"),
                ],
                anchor="readout-divergence",
                folded=True,
            ),
        ],
    )  # fmt: skip


def _exit_gate(view: StudyView, settings: ReportSettings) -> Plot:
    share = view.variable("exit_probability").transpose("recurrence", "prompt").values
    counts = np.arange(1, len(share) + 1)
    return Plot(
        question="Where does the exit gate stop?",
        reading="Probability, by the model's own gate, to stop after each recurrence; mean over tokens and prompts. "
        f"Recurrence {len(share)}, the last measured, gets all that is left.",
        panels=[
            Panel(
                x=Axis(title="recurrence", span=(0.4, len(share) + 0.6), whole=True),
                y=Axis(title="probability to stop"),
                marks=[
                    Bars(
                        x=counts, y=np.array([mean(row) for row in share]), colour=CATEGORIES[0],
                        tip="recurrence {x}: {y:.3f}",
                    )
                ],
            )
        ],
    )  # fmt: skip


def _over_readouts(view: StudyView, y: Axis, marks: Sequence[Mark], anchor: str = "", *, folded: bool = False) -> Panel:
    """Over the numbers of recurrences at which the model was read out."""
    counts = [int(count) for count in view.variable("readout_recurrence").values]
    trained = view.trained is not None and counts[0] <= view.trained <= counts[-1]
    return Panel(
        x=Axis(
            title="recurrences before the readout",
            scale="log",
            span=(counts[0] / 1.1, counts[-1] * 1.1),
            ticks=counts if len(counts) <= _MOST_TICKS else powers_of_two(counts[-1]),
        ),
        y=y,
        marks=[*marks, *(trained_mark(view) if trained else [])],
        anchor=anchor,
        folded=folded,
    )


def _one_readout(view: StudyView) -> str | None:
    read = view.shown.sizes.get("readout_recurrence", 0)
    return None if read > 1 else "the model was read out at one number of recurrences only"


READOUT = (
    FigureType("loss", _loss, ("loss",), unless=_one_readout),
    FigureType(
        "prediction", _prediction, ("token_top1", "token_kl_to_last"), anchor="final-token", unless=_one_readout
    ),
    FigureType("exit-gate", _exit_gate, ("exit_probability",)),
    EXIT_RULES_FIGURE,
)


def readout_section(view: StudyView, settings: ReportSettings) -> Section:
    """What the model would say, its loss, and what it would cost to stop, as far as they were measured."""
    return Section(
        anchor="readout",
        short="What it says",
        title="What does it say?",
        lead="The state is decoded by the coda after different numbers of recurrences.",
        figures=on_page((*PREDICTIONS, *READOUT), view, settings),
    )
