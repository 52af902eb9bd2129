"""No two answers may be false together: which claims exclude each other, and what becomes of answers that make them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from loopscope.answers.answer import Answer, Claim, Outcome

_NOT_AT_REST = (Claim.GOES_ON, Claim.LEFT_OPEN, Claim.ON_ITS_WAY)
EXCLUDES: dict[tuple[Claim, Claim], tuple[Claim, ...]] = {
    # Verdicts stand: they rest on every state of a tail, token by token.
    (Claim.TOKENS_MOVE, Claim.STOPS): (Claim.STOPS,),
    (Claim.TOKENS_MOVE, Claim.ON_ITS_WAY): (Claim.ON_ITS_WAY,),
    (Claim.TOKENS_SETTLE, Claim.GOES_ON): (Claim.GOES_ON,),
    (Claim.TOKENS_MOVE, Claim.ATTRACTS): (Claim.ATTRACTS,),
    (Claim.TOKENS_SETTLE, Claim.REPELS): (Claim.TOKENS_SETTLE, Claim.REPELS),
    # A state may stand at a point that repels and leave it later, or the eigenvalues may be wrong.
    (Claim.STOPS, Claim.REPELS): (Claim.STOPS, Claim.REPELS),
    # Motion that is seen is seen.
    (Claim.GOES_ON, Claim.ATTRACTS): (Claim.ATTRACTS,),
    # What presumes that the state stops falls with it.
    **{
        (claim, presuming): (presuming,)
        for claim in _NOT_AT_REST
        for presuming in (Claim.POINTS, Claim.ARRIVES, Claim.SETTLED_AT_DEPTH)
    },
}
"""Pairs of claims that cannot both be true, and which of them is withdrawn."""


def contradictions(answers: Sequence[Answer]) -> list[tuple[Answer, Answer, tuple[Claim, ...]]]:
    """Pairs of answers whose claims exclude each other, with the claims to be withdrawn."""
    return [
        (one, other, EXCLUDES[pair])
        for one, other in itertools.permutations(answers, 2)
        for pair in itertools.product(one.claims, other.claims)
        if pair in EXCLUDES
    ]


def consistent(answers: Sequence[Answer]) -> list[Answer]:
    """The answers, those that are contradicted replaced by one that says so, with what both of them found.

    What is withdrawn may pull others after it, so that this is repeated until no two exclude each other.
    """
    found = list(answers)
    while pairs := contradictions(found):
        one, other, fall = pairs[0]
        for answer, against in ((one, other), (other, one)):
            if set(answer.claims) & set(fall):
                found[found.index(answer)] = _withdrawn(answer, against)
    return found


def _withdrawn(answer: Answer, against: Answer) -> Answer:
    stopped = {Claim.STOPS, Claim.GOES_ON, Claim.ON_ITS_WAY} & set(answer.claims)
    return dataclasses.replace(
        answer,
        outcome=Outcome.CANNOT_TELL,
        verdict="cannot tell: contradicted",
        sentence=f"Cannot tell: what was found here excludes what was found for “{against.question}”. "
        f"Here: “{answer.sentence}” There: “{against.sentence}”",
        limits=[*answer.limits, f"“{answer.question}” and “{against.question}” contradict each other in this study."],
        claims=[Claim.LEFT_OPEN] if stopped else [],
    )
