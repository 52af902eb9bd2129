"""What the tests of the contract ask of its report."""

from __future__ import annotations

from typing import Any

from loopscope.models.contract.check import check_subject

__all__ = ["NAMES", "SHORT", "failures", "skipped"]

SHORT = [[3, 1, 4, 1], [2, 7]]
NAMES = [
    "visits",
    "facts",
    "finite",
    "kept",
    "attention",
    "logits",
    "recurrences",
    "padding",
    "repeatability",
    "seed",
    "initial state",
    "observers",
    "decoding",
    "rounding",
    "turns",
    "abandoned",
    "untouched",
]


def failures(given: Any, **options: Any) -> dict[str, str]:
    """Details of the failed checks."""
    report = check_subject(given, raise_on_failure=False, **options)
    assert [check.name for check in report.checks] == NAMES
    return {check.name: check.detail for check in report.failed}


def skipped(given: Any, **options: Any) -> set[str]:
    return {check.name for check in check_subject(given, **options).skipped}
