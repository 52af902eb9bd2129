"""The answers of several studies as one table, a row a question and a column a study."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loopscope._util.table import Table
from loopscope.answers.comparison.cells import ComparedAnswer, place_of
from loopscope.answers.comparison.result import Comparison


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """The answers of several studies as one table."""

    labels: list[str]
    heads: dict[str, list[str]]
    """Facts of each study by what they are: one a study."""
    differing: list[str]
    """Those facts that are not the same in all studies."""
    changed: list[bool]
    """Whether a study's model was changed while it ran."""
    rows: dict[str, tuple[str, list[ComparedAnswer | None]]]
    """By key: the question, and what each study says; None where it was not asked."""

    @property
    def table(self) -> Table:
        """In few words, for a terminal."""
        facts = [(name, *self.heads[name]) for name in self.differing if name != "model"]
        answers = [
            (question, *("–" if cell is None else cell.verdict or cell.number for cell in cells))
            for question, cells in self.rows.values()
        ]
        return Table(columns=("", *self.labels), rows=[*facts, *answers])

    def to_csv(self) -> str:
        """A line a fact and a question; the value alone stands in a second column of each study."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["question", *(name for label in self.labels for name in (label, f"{label}: value"))])
        for name, facts in self.heads.items():
            writer.writerow([name, *(cell for fact in facts for cell in (fact, ""))])
        for question, cells in self.rows.values():
            writer.writerow([question, *(each for cell in cells for each in _both(cell))])
        return stream.getvalue()

    def to_latex(self) -> str:
        """A `tabular` for a paper, with the rules of the package booktabs."""
        lines = [
            r"\begin{tabular}{l" + "l" * len(self.labels) + "}",
            r"\toprule",
            " & ".join(["", *map(_latex, self.labels)]) + r" \\",
            r"\midrule",
            *(" & ".join([_latex(name), *map(_latex, facts)]) + r" \\" for name, facts in self.heads.items()),
            r"\midrule",
        ]
        for question, cells in self.rows.values():
            texts = [_latex(cell.text) if cell is not None else "--" for cell in cells]
            lines.append(" & ".join([_latex(question), *texts]) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def training_steps(comparison: Comparison) -> list[int] | None:
    """The steps of one run's checkpoints, in the order of the studies; None where they are something else."""
    studies = comparison.studies.values()
    steps = [study.get("step") for study in studies]
    alike = len({str(study["layout"]) for study in studies}) == 1 and all(study["recurrences"] for study in studies)
    known = [step for step in steps if step is not None]
    return known if alike and len(set(known)) == len(steps) > 1 else None


def side_by_side(comparison: Comparison) -> SideBySide:
    """The table of a comparison, in the order in which its studies were given."""
    studies = [comparison.studies[label] for label in comparison.labels]
    cells = [comparison.cells(label) for label in comparison.labels]
    # In the order of the study that was asked most.
    keys = dict.fromkeys(key for each in sorted(cells, key=len, reverse=True) for key in each)
    heads = {name: [facts_in_words(study).get(name, "–") for study in studies] for name in _HEADS}
    return SideBySide(
        labels=comparison.labels,
        heads=heads,
        differing=[name for name, facts in heads.items() if _differ(name, facts, studies)],
        changed=[bool(study.get("interventions")) for study in studies],
        rows={
            key: (next(each[key].question for each in cells if key in each), [each.get(key) for each in cells])
            for key in sorted(keys, key=place_of)
        },
    )


def _differ(name: str, facts: list[str], studies: list[Mapping[str, Any]]) -> bool:
    """A feed-forward model has no recurrences that could be others."""
    counts = name in ("recurrences", "horizon")
    alike = {fact for fact, study in zip(facts, studies, strict=True) if study["recurrences"] or not counts}
    return len(alike) > 1


_HEADS = ("model", "prompts", "tokens", "recurrences", "horizon", "dtype", "interventions")


def facts_in_words(study: Mapping[str, Any]) -> dict[str, str]:
    """What a reader must know of a study before its answers, from its entry in a comparison."""
    prompts, changes = study["prompts"], study.get("interventions") or ()
    source = prompts.get("source")
    source = f", {source}" if source == "given as a list" else f" of {source}" if source else ""
    return {
        "model": str(study["model"]),
        "prompts": f"{prompts['count']:,}{source}" if prompts.get("count") else "–",
        "tokens": f"{prompts['tokens']:,}" if prompts.get("tokens") else "–",
        "recurrences": str(study["recurrences"] or "feed-forward"),
        "horizon": str(study.get("horizon") or "–"),
        "dtype": str(study["dtype"]),
        "interventions": ", ".join(changes) or "none",
    }


def _both(cell: ComparedAnswer | None) -> tuple[str, str]:
    return ("", "") if cell is None else (cell.text, f"{cell.value:.9g}" if cell.has_value else "")


_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "<": "$<$",
    ">": "$>$",
}


def _latex(text: str) -> str:
    """Text that LaTeX shows as it is."""
    return "".join(_LATEX.get(character, character) for character in text if character.isprintable())
