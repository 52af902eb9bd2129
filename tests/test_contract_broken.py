"""Each broken promise of the contract is found, named, and found alone."""

from __future__ import annotations

import pytest

import broken_subjects as broken
from broken_subjects import Wrapped, breaking, changes_visits, running, saying, with_maps
from contract_report import NAMES, SHORT, failures
from loopscope._util.shapes import Logits, TokenIds
from loopscope.errors import ContractError
from loopscope.models.contract.bench import RawLogits
from loopscope.models.contract.check import check_subject

BREAKS: dict[str, tuple[type[Wrapped], set[str], str]] = {
    "layers in the wrong order": (
        breaking(broken.Swapped),
        {"visits"},
        r"event 3 at R = 2: got recurrent\.1@1 \(in `advance`\), expected recurrent\.0@1",
    ),
    "a missing visit": (
        breaking(changes_visits(broken.without_the_second)),
        {"visits"},
        r"got loop state@1 .* expected recurrent\.1@1 .*; there are 8 events, expected 10",
    ),
    "an index that stands still": (
        breaking(changes_visits(broken.always_the_first)),
        {"visits"},
        r"got recurrent\.0@1 .* expected recurrent\.0@2",
    ),
    "states of another width": (
        breaking(changes_visits(broken.narrow)),
        {"visits"},
        r"prelude\.0: got shape \(2, 4, 15\), expected \(2, 4, 16\)",
    ),
    "another loop state than is carried": (
        breaking(broken.OtherLoopState),
        {"visits"},
        "state after recurrence 1 is not the loop state",
    ),
    "a wrong vocabulary": (saying(vocab_size=47), {"facts"}, r"\(2, 4, 48\), expected \(2, 4, 47\)"),
    "a wrong dtype": (saying(dtype="bfloat16"), {"facts"}, "prelude.0 is float32, expected bfloat16"),
    "a wrong number of heads": (saying(heads=3), {"facts"}, r"attention of prelude\.0 has 2 heads, expected 3"),
    "a wrong number of parameters": (saying(parameters=1), {"facts"}, "has [0-9]+ parameters, expected 1"),
    "a gate that is not there": (saying(exit_threshold=0.5), {"facts"}, "got 0 gates"),
    "NaN": (breaking(changes_visits(broken.with_nan)), {"finite"}, "prelude.0 has NaN .* prompt 0, token 0"),
    "gradients": (breaking(changes_visits(broken.records_gradients)), {"finite"}, "records gradients"),
    "states that are overwritten": (
        breaking(broken.Overwrites),
        {"kept"},
        r"recurrent\.0@1 was changed in place .* by up to [0-9]",
    ),
    "attention that is no distribution": (
        breaking(with_maps(lambda maps, mask: 1.001 * maps)),
        {"attention"},
        r"the row of prompt \d, token \d sums to 1 only within 0\.001",
    ),
    "attention below zero": (
        breaking(with_maps(broken.below_zero)),
        {"attention"},
        "the smallest probability is -0",
    ),
    "attention to later tokens": (
        breaking(with_maps(broken.looks_ahead)),
        {"attention"},
        r"largest probability of a later token is 0\.",
    ),
    "attention of padding": (
        breaking(with_maps(lambda maps, mask: maps + ~mask[:, None, :, None] / maps.shape[-1])),
        {"attention"},
        r"rows and columns of padding sum to [0-9.]+, expected 0",
    ),
    "other logits": (
        running(broken.TwiceTheLogits),
        {"logits", "recurrences"},
        r"the raw model differs at logits at R = 2 \(prompt 0",
    ),
    "a number of recurrences that is ignored": (
        running(broken.StopsAtTrained),
        {"recurrences"},
        r"R = 3: got nothing more|got coda.0 .* expected injected@3",
    ),
    "an answer that ignores the number": (
        running(broken.AnswersEarly),
        {"recurrences"},
        "at logits at R = 3",
    ),
    "a loop that knows its number": (
        broken.KnowsItsNumber,
        {"recurrences", "decoding"},
        "runs of 1 and of 2 recurrences differ",
    ),
    "padding that is seen": (broken.SeesPadding, {"padding"}, r"initial state \(prompt 0, token \d: got"),
    "an ignored seed": (broken.IgnoresSeed, {"seed"}, "prompt 0, token 0 has the same state with the seeds 0 and 1"),
    "a seed where nothing is random": (broken.ShiftsBySeed, {"seed"}, "although nothing is drawn"),
    "an ignored initial state": (broken.IgnoresInitialState, {"initial state"}, "does not start from the given state"),
    "no other initial state": (broken.NoOtherState, {"initial state"}, "gives None, expected a state"),
    "the same initial state": (broken.SameOtherState, {"initial state"}, "is the same from the other initial state"),
    "another prompt's state": (
        broken.OtherStateOfAnotherPrompt,
        {"initial state"},
        "expected None with injection 'none'",
    ),
    "observers that change the run": (running(broken.ChangedByObservers), {"observers"}, r"state@1 \(prompt"),
    "decoding that changes the run": (running(broken.ChangedByDecoding), {"decoding"}, r"state@2 \(prompt"),
    "decoding another state that changes the run": (
        running(broken.ChangedByDecodingAnother),
        {"decoding"},
        "after decoding on the way, the run differs at logits",
    ),
    "a given state that is not decoded": (
        running(broken.DecodesItsOwn),
        {"decoding"},
        r"later of the state that it left, the result differs at logits@1",
    ),
    "an error estimate that changes the run": (running(broken.ChangedByRounding), {"rounding"}, r"state@2 \(prompt"),
    "an error estimate of another shape": (
        running(broken.MisshapenRounding),
        {"rounding"},
        r"shape \(1, 2, 4\), expected \(2, 2, 4\)",
    ),
    "runs that share their state": (
        type("Broken", (broken.SharesItsState,), {"run_type": broken.SharedRun}),
        {"turns"},
        r"with another run in between, the run differs at state@1",
    ),
    "an abandoned run that is felt": (
        type("Broken", (broken.LeavesSomething,), {"run_type": broken.LeavingRun}),
        {"abandoned"},
        "closed on the way",
    ),
    "a training flag": (broken.Trains, {"untouched"}, r"training flag of coda changed .*got True, expected False"),
    "a hook that stays": (broken.LeavesHooks, {"untouched"}, "number of hooks of norm changed"),
    "a weight": (broken.ChangesWeights, {"untouched"}, "the buffer norm.unused changed"),
    "an exception": (running(broken.Raises), {"decoding"}, r"raised RuntimeError: no kernel image is available$"),
}


def raw(given: Wrapped) -> RawLogits:
    """The forward pass of the model inside."""

    def forward(input_ids: TokenIds, *, recurrences: int, seed: int) -> Logits:
        logits: Logits = given.model(input_ids, recurrences=max(recurrences, 1), seed=seed)
        return logits

    return forward


@pytest.mark.parametrize(("make", "checks", "message"), BREAKS.values(), ids=BREAKS)
def test_a_broken_promise_is_found_and_nothing_else(make: type[Wrapped], checks: set[str], message: str) -> None:
    given = make()
    found = failures(given, prompts=SHORT, raw_logits=raw(given))
    assert set(found) == checks, found
    first = next(name for name in NAMES if name in found)
    assert pytest.raises(ValueError, match=message).matches(ValueError(found[first])), found[first]
    assert all("\n" not in detail for detail in found.values())


def test_the_wrapper_itself_breaks_nothing() -> None:
    given = Wrapped()
    assert failures(given, prompts=SHORT, raw_logits=raw(given)) == {}


def test_a_run_that_never_repeats_is_found() -> None:
    found = failures(broken.OtherEveryTime())
    assert "the same run a second time differs at initial state" in found["repeatability"]


def test_a_second_run_that_announces_less_is_found() -> None:
    found = failures(broken.SilentLater(), prompts=SHORT)
    assert "got no recurrent.1@1" in found["repeatability"]
    assert "visits" not in found


def test_all_broken_promises_are_in_one_error() -> None:
    given = type("Broken", (broken.IgnoresSeed,), {"observer": broken.Swapped, "run_type": broken.ChangedByDecoding})()
    with pytest.raises(ContractError) as caught:
        check_subject(given)
    lines = str(caught.value).splitlines()
    assert lines[0] == "small breaks 3 of 17 promises of the contract:"
    assert [line.split(" (")[0].strip() for line in lines[1:]] == ["visits", "seed", "decoding"]
    assert isinstance(caught.value, AssertionError)


def test_the_error_carries_what_the_subject_raised() -> None:
    with pytest.raises(ContractError) as caught:
        check_subject(running(broken.Raises)())
    assert isinstance(caught.value.__cause__, RuntimeError)
