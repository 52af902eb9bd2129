"""The command that counts verdicts, of several studies side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from loopscope._util.table import Table

if TYPE_CHECKING:
    from loopscope.answers.rates import KindShare, Rates

_SMALLEST = 1e-5
"""Lower ends of intervals below it are told as that: with two prompts they may be powers of ten that mean nothing."""


@dataclass(frozen=True, kw_only=True)
class CountRates:
    """Count what the tokens of studies tend to: shares with 95 % intervals, several studies side by side.

    Shares are of decided tokens, of drivers (a token that sets the rate of those after it counts once with them all),
    and of prompts with at least one such token. Undecided tokens widen every interval: the lower end counts none of
    them as that kind, the upper end all.
    """

    studies: tyro.conf.Positional[tuple[Path, ...]]
    """The --out folders of analyses, such as those of one model under several system prompts."""
    layer: int | None = None
    """A recurrent layer; default: the last judged one."""
    method: Literal["displacement", "cosine"] = "displacement"
    """The method whose verdicts are counted."""
    roles: bool = False
    """Also by role of the token: beginning of text, question, system prompt, digits, punctuation, generated, last
    token."""
    json: bool = False
    """Print JSON, for programs."""

    def run(self) -> None:
        import json

        from rich.console import Console

        from loopscope.answers.rates import study_rates
        from loopscope.cli.console import own_names, say_table
        from loopscope.errors import ConfigError, StudyError
        from loopscope.study import Study

        if not self.studies:
            raise ConfigError("No study was given; name the --out folders of one or more analyses.")
        found = {}
        for folder in dict.fromkeys(self.studies):
            study = Study.load(folder)
            try:
                found[folder] = study_rates(study, layer=self.layer, method=self.method)
            except StudyError as error:
                raise StudyError(f"{folder}: {error}") from None
        names = own_names(list(found))
        rates = dict(zip(names, found.values(), strict=True))
        if self.json:
            entries = [{"study": str(folder), **_plain(each, roles=self.roles)} for folder, each in found.items()]
            print(json.dumps(entries, indent=2))
            return
        say_table(_table(rates, roles=self.roles))
        console = Console(highlight=False)
        for line in [*_not_yet(rates), *_by_chance(rates), *_changed(rates)]:
            console.print(line, style="dim", markup=False)


def _table(rates: Mapping[str, Rates], *, roles: bool) -> Table:
    """A row each kind that occurs, orbits and sliders always; a column each study."""
    first = next(iter(rates.values()))
    layers = sorted({layer for each in rates.values() for layer in (*each.other_layers, each.layer)})
    rows: list[tuple[str, ...]] = []
    groups = {"tokens": [each.tokens for each in rates.values()]}
    if all(each.drivers for each in rates.values()):
        groups["drivers"] = [each.drivers for each in rates.values()]
    groups["prompts"] = [each.prompts for each in rates.values()]
    if roles:
        groups |= {f"tokens: {role}": [each.roles[role] for each in rates.values()] for role in first.roles}
    for name, columns in groups.items():
        if not any(column[0].total for column in columns):
            continue
        rows += [(str(row[0].kind), name, *map(_cell, row)) for row in zip(*columns, strict=True) if _worth_a_row(row)]
    return Table(
        columns=("kind", "share of", *rates),
        rows=rows,
        title=f"{first.method}, recurrent layer {', '.join(map(str, layers))}; 95 % intervals by prompts",
    )


def _worth_a_row(row: Sequence[KindShare]) -> bool:
    from loopscope.dynamics.verdicts import Kind

    return row[0].kind in (Kind.ORBIT, Kind.SLIDER) or any(share.count for share in row)


def _cell(share: KindShare) -> str:
    """Count and share on one line, the interval on the next, then what is undecided."""
    if not share.total:
        return "–"
    low, high = share.interval
    shown = f": {100 * share.share:.3g}\u00a0%" if share.decided else ""
    lowest = f"{100 * low:.3g}" if low >= _SMALLEST or not low else f"<{100 * _SMALLEST:g}"
    lines = [f"{share.count:,} of {share.decided:,}{shown}", f"({lowest} to {100 * high:.3g}\u00a0%)"]
    if share.undecided:
        found, most = share.bracket
        lines.append(f"with {share.undecided:,} undecided {100 * found:.3g} to {100 * most:.3g}\u00a0%")
    return "\n".join(lines)


def _not_yet(rates: Mapping[str, Rates]) -> list[str]:
    """Of how many unknown tokens more recurrences would tell, a line each study that has some."""
    return [
        f"{name}: {each.not_yet:,} of the unknown tokens are not there yet: the steps of their prompts still shrink at "
        "2H; a longer --horizon tells"
        for name, each in rates.items()
        if each.not_yet
    ]


def _by_chance(rates: Mapping[str, Rates]) -> list[str]:
    """What noise would show among the shapes, and how many survive, a line each study."""
    from loopscope._util.wording import percent, significant
    from loopscope.answers.rates import FALSE_DISCOVERIES

    lines = []
    for name, each in rates.items():
        if each.discoveries is not None:
            survive = [f"{kind} {left:,} of {of:,}" for kind, (left, of) in each.discoveries.surviving.items() if of]
            lines.append(
                f"{name}: noise would show {significant(each.discoveries.expected)} orbits and sliders in "
                f"{each.discoveries.tests:,} tests (tokens times layers)"
                + (
                    f"; at a false discovery rate of {percent(FALSE_DISCOVERIES)} remain {', '.join(survive)}"
                    if survive
                    else ""
                )
            )
    return lines


def _changed(rates: Mapping[str, Rates]) -> list[str]:
    """How many verdicts did not stand a trial, a line each study."""
    lines = []
    for name, each in rates.items():
        tried = [f"{what} {changed:,} of {of:,}" for what, (changed, of) in each.changed.items() if of]
        if tried:
            lines.append(f"{name}: verdicts that change with another {', '.join(tried)}")
    return lines


def _plain(rates: Rates, *, roles: bool) -> dict[str, Any]:
    """JSON-ready."""
    found: dict[str, Any] = {
        "layer": rates.layer,
        "other_layers": list(rates.other_layers),
        "method": rates.method,
        "tokens": [_share(share) for share in rates.tokens],
        "drivers": [_share(share) for share in rates.drivers],
        "prompts": [_share(share) for share in rates.prompts],
        "discoveries": None
        if rates.discoveries is None
        else {
            "tests": rates.discoveries.tests,
            "expected": rates.discoveries.expected,
            "surviving": {
                str(kind): {"left": left, "found": of} for kind, (left, of) in rates.discoveries.surviving.items()
            },
        },
        "not_yet": rates.not_yet,
        "changed": {name: {"changed": changed, "tried": of} for name, (changed, of) in rates.changed.items()},
    }
    if roles:
        found["roles"] = {name: [_share(share) for share in shares] for name, shares in rates.roles.items()}
    return found


def _share(share: KindShare) -> dict[str, Any]:
    low, high = share.interval
    least, most = share.bracket
    return {
        "kind": str(share.kind),
        "count": share.count,
        "decided": share.decided,
        "undecided": share.undecided,
        "share": share.share if share.decided else None,
        "least": least if share.total else None,
        "most": most if share.total else None,
        "low": low,
        "high": high,
    }
