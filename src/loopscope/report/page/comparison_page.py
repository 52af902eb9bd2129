"""The page of a comparison: answers, tables with the null beside every number, curves, drift."""

from __future__ import annotations

import math
from typing import Any

from loopscope._util.table import Table
from loopscope._util.wording import layout_text, listed, percent, plural
from loopscope.answers.comparison.findings import Finding, comparison_answers, finding_of, p_text
from loopscope.answers.comparison.result import Comparison
from loopscope.answers.comparison.side_by_side import SideBySide, side_by_side
from loopscope.report.figures.comparison import comparison_sections
from loopscope.report.page.facts import provenance, thresholds
from loopscope.report.page.html import render_template
from loopscope.report.settings import ReportSettings

_WHAT = {
    "models": "Models compared",
    "data sets": "{model} across data sets",
    "settings": "{model} under several settings",
    "models and data sets": "Models and data sets compared",
}
_SETTINGS = {"recurrences": "recurrences", "horizon": "horizons", "dtype": "dtypes", "interventions": "interventions"}
"""Facts in which studies may differ beside what they are of."""
_COLUMNS = (
    "measure",
    "correlation",
    "reversed",
    "over prompts",
    "95 % of the closest null",
    "p",
    "finding",
    "level difference",
)


def render_comparison(comparison: Comparison) -> str:
    """The whole report of a comparison as HTML."""
    answers = comparison_answers(comparison)
    settings, kind = comparison.settings, str(comparison.manifest["kind"])
    side = side_by_side(comparison)
    return render_template(
        "comparison.html",
        heading=_heading(kind, str(comparison.studies[comparison.reference]["model"]), side),
        side=side,
        differs=f"They differ in {listed(side.differing)}." if side.differing else "All were run alike.",
        facts=_facts(comparison),
        answers=answers,
        limits=answers[-1].limits,
        tables=[table for label in comparison.labels for table in _tables(comparison, label)],
        tables_lead=(
            "Pearson correlation of a study's curve with the reference's, on relative depth. It is compared with "
            f"three nulls: the curve with its layers shuffled ({settings.shuffles:,} orders, or all there are), with "
            "random phases of its steps (as smooth), and on bent depth (as monotone). Alike: at most "
            f"{100 * settings.alpha:g} % of each null correlate as well, and the reversed curve does worse. Over "
            "prompts: 95 % interval, where there are several. Level difference: root mean square difference over the "
            "reference's root mean square."
        ),
        sections=comparison_sections(comparison, ReportSettings()),
        thresholds=thresholds(settings),
        provenance=_provenance(comparison),
        created=str(comparison.manifest["created"])[:16].replace("T", " "),
        version=str(comparison.manifest["versions"]["loopscope"]),
    )


def _heading(kind: str, model: str, side: SideBySide) -> str:
    """What is compared, and which settings are not the same."""
    others = [_SETTINGS[name] for name in side.differing if name in _SETTINGS]
    if kind == "settings" and others:
        return f"{model} with different {listed(others)}"
    return _WHAT[kind].format(model=model) + (f", with different {listed(others)}" if others else "")


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Each study with its layout and prompts, the reference first."""
    ordered = [comparison.reference, *(label for label in comparison.labels if label != comparison.reference)]
    facts = []
    for label in ordered:
        study = comparison.studies[label]
        layout, prompts = study["layout"], study["prompts"]
        text = layout_text(layout["prelude"], layout["recurrent"], layout["coda"])
        if study["judged_at"]:
            text += f", judged at recurrence {study['judged_at']} of {study['recurrences']}"
        text += f"; {plural(prompts['count'], 'prompt')}" if prompts["count"] else ""
        facts.append((label, f"reference: {text}" if label == comparison.reference else text))
    return facts


def _tables(comparison: Comparison, label: str) -> list[Table]:
    """One for the block alone and one for the whole pass, where these differ; none of which nothing is known."""
    if label == comparison.reference:
        return []
    study = comparison.studies[label]
    layout, at = study["layout"], (study["judged_at"] or 1) - 1
    outside = layout["recurrent"] and layout["prelude"] + layout["coda"]
    where = f", recurrence {at + 1}" if layout["recurrent"] else ""
    titles = {"pass": f"{label}{where}: prelude, block and coda" if outside else f"{label}{where}"}
    if outside:
        titles = {"block": f"{label}{where}: the block alone, on 0 to 100 %", **titles}
    anchor = f"table-{comparison.labels.index(label)}"
    tables = [
        Table(
            anchor=anchor if index == 0 else f"{anchor}-{span}",
            title=title,
            columns=_COLUMNS,
            rows=[_row("mean over measures", finding_of(comparison, label, span), math.nan)]
            + [
                _row(
                    name,
                    finding_of(comparison, label, span, name),
                    float(
                        comparison.dataset["level_difference"]
                        .sel(study=label, span=span, measure=name)
                        .isel(recurrence=at)
                    ),
                )
                for name in map(str, comparison.dataset["measure"].values)
            ],
        )
        for index, (span, title) in enumerate(titles.items())
    ]
    return [table for table in tables if any(row[-2] != "cannot tell" for row in table.rows)]


def _row(name: str, finding: Finding, difference: float) -> tuple[str, ...]:
    apart = percent(difference) if math.isfinite(difference) else "–"
    if not finding.known:
        return name, "–", "–", "–", "–", "–", "cannot tell", apart
    return (
        name,
        f"{finding.value:.2f}",
        f"{finding.reversed:.2f}",
        "{:.2f} to {:.2f}".format(*finding.interval) if math.isfinite(finding.interval[0]) else "–",
        f"{finding.null_high:.2f} ({finding.closest})",
        p_text(finding.p_value),
        "alike" if finding.alike else "not shown",
        apart,
    )


def _provenance(comparison: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    manifest: dict[str, Any] = dict(comparison.manifest)
    studies = {entry["label"]: {**entry, "missing": list(entry["missing"])} for entry in manifest.pop("studies")}
    return provenance(manifest | studies)
