"""The contract that everything loopscope studies must keep, for those who add a family, hooks or a `Subject`.

    from loopscope.testing import check_subject

    report = check_subject(loopscope.load("my-model"))

needs no test framework: a broken promise raises `ContractError`, which is an `AssertionError` too.
"""

from loopscope.testing.bench import RawLogits
from loopscope.testing.contract import check_subject
from loopscope.testing.results import CheckResult, ContractReport
from loopscope.testing.tolerances import Tolerances

__all__ = ["CheckResult", "ContractReport", "RawLogits", "Tolerances", "check_subject"]
