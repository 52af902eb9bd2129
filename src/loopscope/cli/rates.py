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


@dataclass(frozen=True, kw_only=True)
class CountRates:
    """Count what the tokens of studies tend to: shares with exact 95 % intervals, several studies side by side.

    Shares of tokens, and of prompts that have at least one such token.
    """

    studies: tyro.conf.Positional[tuple[Path, ...]]
    """The --out folders of analyses, such as those of one model under several system prompts."""
    layer: int | None = None
    """A recurrent layer; the last one judged unless given."""
    method: Literal["displacement", "cosine"] = "displacement"
    """Whose verdicts are counted."""
    roles: bool = False
    """Also by the role of the token: question, system prompt, digits, punctuation, last token."""
    json: bool = False
    """Print JSON, for programs."""

    def run(self) -> None:
        import json

        from rich.console import Console

        from loopscope.answers.rates import study_rates
        from loopscope.cli.console import say_table
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
        names = _names(list(found))
        rates = dict(zip(names, found.values(), strict=True))
        if self.json:
            entries = [{"study": str(folder), **_plain(each, roles=self.roles)} for folder, each in found.items()]
            print(json.dumps(entries, indent=2))
            return
        say_table(_table(rates, roles=self.roles))
        console = Console(highlight=False)
        for line in _changed(rates):
            console.print(line, style="dim", markup=False)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names where these differ, whole paths otherwise."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _table(rates: Mapping[str, Rates], *, roles: bool) -> Table:
    """A row each kind that occurs, orbits and sliders always; a column each study."""
    first = next(iter(rates.values()))
    layers = sorted({each.layer for each in rates.values()})
    rows: list[tuple[str, ...]] = []
    groups = {
        "tokens": [each.tokens for each in rates.values()],
        "prompts": [each.prompts for each in rates.values()],
    }
    if roles:
        groups |= {f"tokens: {role}": [each.roles[role] for each in rates.values()] for role in first.roles}
    for name, columns in groups.items():
        if not any(column[0].total for column in columns):
            continue
        rows += [(str(row[0].kind), name, *map(_cell, row)) for row in zip(*columns, strict=True) if _worth_a_row(row)]
    return Table(
        columns=("kind", "share of", *rates),
        rows=rows,
        title=f"{first.method}, recurrent layer {', '.join(map(str, layers))}; 95 % Clopper-Pearson intervals",
    )


def _worth_a_row(row: Sequence[KindShare]) -> bool:
    from loopscope.dynamics.verdicts import Kind

    return row[0].kind in (Kind.ORBIT, Kind.SLIDER) or any(share.count for share in row)


def _cell(share: KindShare) -> str:
    """Count and share on one line, the interval on the next."""
    if not share.total:
        return "–"
    low, high = share.interval
    return (
        f"{share.count:,} of {share.total:,}: {100 * share.share:.3g}\u00a0%\n"
        f"({100 * low:.3g} to {100 * high:.3g}\u00a0%)"
    )


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
        "method": rates.method,
        "tokens": [_share(share) for share in rates.tokens],
        "prompts": [_share(share) for share in rates.prompts],
        "changed": {name: {"changed": changed, "tried": of} for name, (changed, of) in rates.changed.items()},
    }
    if roles:
        found["roles"] = {name: [_share(share) for share in shares] for name, shares in rates.roles.items()}
    return found


def _share(share: KindShare) -> dict[str, Any]:
    low, high = share.interval
    return {
        "kind": str(share.kind),
        "count": share.count,
        "total": share.total,
        "share": share.share if share.total else None,
        "low": low,
        "high": high,
    }
