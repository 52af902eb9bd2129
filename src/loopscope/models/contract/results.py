"""What a check of the contract found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loopscope.errors import ContractError

_BY_DTYPE = {"float64": 1e-9, "float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}
"""Another batch shape adds the same terms in another order, and a loop carries the difference on and may enlarge it.
The shipped models, with prompts of up to 150 tokens and 68 visits, differ by 2e-6 in float32, 4e-3 in float16 and 3e-2
in bfloat16; these limits leave room for deeper ones. What the contract looks for, a token that sees padding or another
prompt's state, changes numbers by their own size."""


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


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """Largest difference allowed, relative to the largest magnitude in the token's vector (state, logits, map row)."""

    repeated: float = 0.0
    """Between two runs of the same computation. One machine gives the same bits twice; a model whose kernels add in no
    fixed order does not, and needs more."""
    regrouped: float | None = None
    """Between a prompt alone and in a padded batch; by the model's dtype unless given."""
    raw: float | None = None
    """Between the subject's logits and those of the raw model. Unless given, nothing for a model of loopscope or a
    hooked module, which run the same operations, and by dtype for a `raw_logits` of the caller's."""
    probability: float = 1e-5
    """Of a sum of attention probabilities from 1. They are float32 or wider, whatever the model runs in, but for maps
    that a hooked model made in half precision, which may be as far from 1 as that resolves."""

    def regrouped_in(self, dtype: str) -> float:
        """The limit for prompts in a batch, of a model that runs in `dtype`."""
        return _BY_DTYPE[dtype] if self.regrouped is None else self.regrouped

    def raw_in(self, dtype: str, *, is_own: bool) -> float:
        """The limit against the raw model, which is the subject's own module or another implementation."""
        if self.raw is not None:
            return self.raw
        return self.repeated if is_own else _BY_DTYPE[dtype]
