"""The page of trajectories that another tool captured: their verdicts counted, listed and drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loopscope._util.table import Table
from loopscope._util.wording import listed, plural, significant, visible
from loopscope.answers.behaviour import judged_answer, trajectory_shares
from loopscope.dynamics.verdicts import KINDS, JudgedFiles, JudgedTrajectory, Kind
from loopscope.report.figures.examples import Extreme, extremes_plot
from loopscope.report.figures.plot import Drawn, Section
from loopscope.report.figures.token_panel import FACTS, PanelGroup, PanelToken, TokenPanel, facts_of, token_panel
from loopscope.report.figures.verdicts import ShareSeries, shares_plot
from loopscope.report.page.facts import provenance
from loopscope.report.page.html import render_template

_MOST_ROWS = 200
"""Trajectories that the table lists; verdicts.jsonl has all of them."""
_MOST_GROUPS = 12
"""Arrays whose trajectories can be picked."""
_MOST_TOKENS = 400
"""Of each, so that the page stays light."""
_COLUMNS = ("trajectory", "kind", "reason", "period", "noise floor", "may change with")


def render_behaviour(judged: JudgedFiles) -> str:
    """The whole report as HTML."""
    answer = judged_answer(judged)
    manifest = judged.manifest
    return render_template(
        "verdicts.html",
        heading="Verdicts on trajectories",
        facts=_facts(judged),
        answers=[answer],
        limits=answer.limits,
        tables=[_table(judged.trajectories)],
        sections=_sections(judged),
        thresholds=[(name.replace("_", " "), f"{value:g}", "") for name, value in manifest["settings"].items()],
        provenance=_provenance(judged),
        version=str(manifest["versions"]["loopscope"]),
    )


def _provenance(judged: JudgedFiles) -> list[tuple[str, list[tuple[str, str]]]]:
    kept = {name: value for name, value in judged.manifest.items() if name not in ("settings", "sources")}
    sources = judged.manifest["sources"]
    files = [(_source(entry), f"shape {entry['shape']}, SHA-256 {entry['sha256']}") for entry in sources]
    return [*provenance(kept), ("files", files)]


def _sections(judged: JudgedFiles) -> list[Section]:
    trajectories = judged.trajectories
    shares = shares_plot(
        [ShareSeries(name=str(judged.manifest["method"]), shares=trajectory_shares(judged))],
        "Shares of the trajectories, whose intervals count those of one array as dependent on each other.",
        things="trajectories",
    )
    extremes = extremes_plot(
        [
            Extreme(
                label=each.label,
                kind=each.verdict.kind,
                size=each.verdict.amplitude if each.verdict.kind is Kind.ORBIT else each.verdict.speed,
                period=each.verdict.period,
                path=np.array(each.path),
            )
            for each in trajectories
            if each.path
        ]
    )
    figures: list[Drawn] = [shares, *filter(None, [extremes]), _panel(trajectories)]
    return [
        Section(
            anchor="behaviour",
            short="Verdicts",
            title="What do the trajectories do in the long run?",
            lead="Lengths are relative to the norm of the state.",
            figures=[figure for figure in figures if figure.has_data],
        )
    ]


def _panel(trajectories: Sequence[JudgedTrajectory]) -> TokenPanel:
    """The trajectories of each array, the one that moves most of the rarest kind shown first."""
    groups: dict[tuple[str, str], list[JudgedTrajectory]] = {}
    for each in trajectories:
        groups.setdefault((each.file, each.array), []).append(each)
    shown = list(groups.items())[:_MOST_GROUPS]
    left_out = plural(len(groups) - _MOST_GROUPS, "further array") if len(groups) > _MOST_GROUPS else ""
    return token_panel(
        [
            PanelGroup(
                name=visible(f"{Path(file).name} {array}".strip(), 70),
                tokens=[_token(each) for each in there[:_MOST_TOKENS]],
                first=there[0].token,
                start=_first_shown(there[:_MOST_TOKENS]),
                note=f"The first {_MOST_TOKENS:,} of {len(there):,} trajectories." if len(there) > _MOST_TOKENS else "",
            )
            for (file, array), there in shown
        ],
        title="Trajectory by trajectory",
        caption="Pick a trajectory, with the mouse or the arrow keys, to see its way and its displacement. Ways are "
        "kept for those of each kind that move most."
        + (f" {left_out} are in verdicts.jsonl alone." if left_out else ""),
        choose="Array",
    )


def _token(each: JudgedTrajectory) -> PanelToken:
    verdict = each.verdict
    numbers = {name: float(getattr(verdict, name)) for name in FACTS}
    changes = [("may change with", listed(verdict.unstable))] if verdict.unstable else []
    return PanelToken(
        label=str(each.token),
        kind=verdict.kind,
        line=verdict.reason,
        facts=facts_of(numbers) + changes,
        path=np.array(each.path) if each.path else None,
        curve=np.array(verdict.displacement) if verdict.displacement else None,
        floor=verdict.floor,
    )


def _first_shown(trajectories: Sequence[JudgedTrajectory]) -> int:
    """Of the ones with a way, that of the rarest kind which moves most."""
    counts = {kind: sum(each.verdict.kind is kind for each in trajectories) for kind in KINDS}
    with_way = [place for place, each in enumerate(trajectories) if each.path]
    if not with_way:
        return 0
    return min(
        with_way,
        key=lambda place: (counts[trajectories[place].verdict.kind], -np.nan_to_num(trajectories[place].verdict.level)),
    )


def _table(trajectories: Sequence[JudgedTrajectory]) -> Table:
    rows = [
        (
            visible(each.label, 60),
            str(each.verdict.kind),
            each.verdict.reason,
            _number(each.verdict.period),
            _number(each.verdict.floor),
            listed(each.verdict.unstable) or "–",
        )
        for each in trajectories[:_MOST_ROWS]
    ]
    return Table(anchor="table", title="Verdicts", lead=_table_lead(len(trajectories)), columns=_COLUMNS, rows=rows)


def _table_lead(count: int) -> str:
    if count > _MOST_ROWS:
        return f"The first {_MOST_ROWS} of {count:,} trajectories; verdicts.jsonl has all of them."
    return "Every trajectory; verdicts.jsonl has more numbers of each."


def _facts(judged: JudgedFiles) -> list[tuple[str, str]]:
    manifest = judged.manifest
    lengths = sorted({each.recurrences for each in judged.trajectories})
    floors = [each.verdict.floor for each in judged.trajectories if math.isfinite(each.verdict.floor)]
    recurrences = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else str(lengths[0] if lengths else 0)
    facts = [
        ("method", str(manifest["method"])),
        ("the model ran in", str(manifest["dtype"])),
        ("trajectories", f"{len(judged.trajectories):,}"),
        ("recurrences", recurrences),
        ("noise floor", f"{significant(float(np.median(floors)))} of the norm (median)" if floors else "not estimated"),
    ]
    for what, of in (("files", "sources"), ("twins", "twins")):
        # Verdicts that were written before there were twins lack them.
        if names := [_source(entry) for entry in manifest.get(of, ())]:
            shown = listed(names[:3]) if len(names) <= 3 else f"{', '.join(names[:3])} and {len(names) - 3} more"
            facts.append((what, shown))
    return facts


def _source(entry: dict[str, object]) -> str:
    return f"{Path(str(entry['file'])).name} {entry.get('array', '')}".strip()


def _number(value: float) -> str:
    return significant(value) if math.isfinite(value) else "–"
