"""The page of a patching: what was found, the grid, the pairs."""

from __future__ import annotations

from loopscope._util.table import Table
from loopscope._util.wording import layout_text, visible
from loopscope.answers.patching import Patching, patching_answer
from loopscope.report.figures.patching import patching_plot
from loopscope.report.figures.plot import Section
from loopscope.report.page.html import render_template

_MOST_ROWS = 200


def render_patching(found: Patching) -> str:
    """The whole page as HTML."""
    answer = patching_answer(found)
    model, settings = found.manifest["model"], found.manifest["settings"]
    plot = patching_plot(found)
    section = Section(
        anchor="grid",
        short="Grid",
        title="Where the answer is made",
        lead="One state at a time, put from the clean prompt's run into the corrupted prompt's.",
        figures=[plot] if plot.has_data else [],
    )
    layout = layout_text(model["prelude"], model["recurrent"], model["coda"], settings["recurrences"])
    facts = [("layout", layout), ("pairs", str(len(found.manifest["pairs"]))), ("run in", model["dtype"])]
    changed = [("interventions", ", ".join(model["interventions"]))] if model["interventions"] else []
    return render_template(
        "patching.html",
        heading=f"Where {visible(str(model['name']), 80)} makes its answer",
        facts=facts + changed,
        answers=[answer],
        limits=answer.limits,
        tables=[_table(found)],
        sections=[section] if section.figures else [],
        thresholds=[(name.replace("_", " "), str(value), "") for name, value in settings.items()],
        provenance=[("model", [(name, str(value)) for name, value in model.items()])],
        version=str(found.manifest["versions"]["loopscope"]),
    )


def _table(found: Patching) -> Table:
    pairs, data = found.manifest["pairs"], found.dataset
    rows = [
        (
            str(pair["id"]),
            str(len(pair["clean"])),
            ", ".join(map(str, pair["differ"])),
            f"{clean:.3g}",
            f"{corrupted:.3g}",
        )
        for pair, clean, corrupted in zip(
            pairs, data["metric_clean"].values.tolist(), data["metric_corrupted"].values.tolist(), strict=True
        )
    ]
    metric = "Difference of the logits of answer and wrong answer"
    if found.manifest["metric"] == "log_probability":
        metric = "Log-probability of the answer (nats)"
    more = f" The first {_MOST_ROWS}; patching.json has all." if len(rows) > _MOST_ROWS else ""
    return Table(
        anchor="table",
        title="Pairs",
        lead=f"{metric} at the last token of each prompt, as the model runs it.{more}",
        columns=("pair", "tokens", "differ at", "clean", "corrupted"),
        rows=rows[:_MOST_ROWS],
    )
