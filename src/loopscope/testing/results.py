"""What a check of the contract found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loopscope.errors import ContractError

__all__ = ["CheckFailed", "CheckResult", "CheckSkipped", "ContractReport"]


class CheckFailed(Exception):  # noqa: N818 - an outcome; what users catch is ContractError
    """A promise is broken; the message says where, what was got and what was expected."""


class CheckSkipped(Exception):  # noqa: N818 - an outcome
    """The promise means nothing for this subject, or cannot be looked into; the message says why."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One promise and whether it is kept."""

    name: str
    promise: str
    """What has to hold, in a sentence."""
    status: Literal["passed", "failed", "skipped"]
    detail: str
    """What was compared and the largest difference; where, got and expected for a failure; the reason for a skip."""
    error: Exception | None = None
    """What the subject raised, if that is how it failed."""

    def __str__(self) -> str:
        return f"{self.status:<7}  {self.name}: {self.detail}"


@dataclass(frozen=True, slots=True)
class ContractReport:
    """What `check_subject` returns; printed, it is a line per promise."""

    subject: str
    checks: tuple[CheckResult, ...]

    @property
    def passed(self) -> bool:
        """Nothing failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[CheckResult, ...]:
        return self._with("failed")

    @property
    def skipped(self) -> tuple[CheckResult, ...]:
        return self._with("skipped")

    def raise_for_failures(self) -> None:
        """Raise `ContractError` that lists every failed check, if there is one."""
        if self.failed:
            lines = [f"  {check.name} ({check.promise}): {check.detail}" for check in self.failed]
            count = f"{len(lines)} of {len(self.checks)} promises"
            cause = next((check.error for check in self.failed if check.error is not None), None)
            raise ContractError("\n".join([f"{self.subject} breaks {count} of the contract:", *lines])) from cause

    def _with(self, status: str) -> tuple[CheckResult, ...]:
        return tuple(check for check in self.checks if check.status == status)

    def __str__(self) -> str:
        return "\n".join([self.subject, *(f"  {check}" for check in self.checks)])
