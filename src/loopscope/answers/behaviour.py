"""What do the tokens tend to?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from loopscope._util.wording import counted_parts, listed, percent, plural, significant
from loopscope.answers.answer import Answer, Claim, Criterion, Evidence, Outcome, Question, measured
from loopscope.answers.rates import (
    FALSE_DISCOVERIES,
    STRUCTURED,
    Discoveries,
    KindShare,
    Rates,
    by_cluster,
    token_shares,
    view_rates,
)
from loopscope.answers.settling import prompts_by_verdict
from loopscope.answers.token_kinds import led_away, token_kinds
from loopscope.dynamics.trajectories.settings import LONG_TAIL
from loopscope.dynamics.verdicts import KINDS, SETTLED_CODES, JudgedFiles, Kind
from loopscope.study import StudyView

BEHAVIOUR = Question(
    key="behaviour",
    text="What do the tokens do in the long run?",
    figure="behaviour-shares",
    needs=(measured("verdict", "No token's limit was judged"),),
)
_TRAJECTORIES = dataclasses.replace(BEHAVIOUR, text="What do the trajectories do in the long run?")
_PLURALS = {
    Kind.FIXED_POINT: "reach or approach a fixed point",
    Kind.AT_FLOOR: "hover at the noise floor",
    Kind.ORBIT: "orbit",
    Kind.SLIDER: "slide on without a limit",
    Kind.BOUNDED: "keep moving within bounds",
    Kind.DIVERGING: "diverge",
}
_CHANGES = {
    "window": "within a shorter window",
    "horizon": "when judged at the horizon rather than at twice the horizon",
    "half-horizon": "when judged at half the horizon",
    "seed": "from another initial state",
}


def behaviour_answer(view: StudyView, criterion: Criterion) -> Answer:
    """Shares of the kinds at the last layer judged, of tokens, of what drives them, and of prompts."""
    rates = view_rates(view, "displacement")
    evidence: Evidence = {"recurrent_layer": float(rates.layer)}
    for things, shares in (("tokens", rates.tokens), ("drivers", rates.drivers), ("prompts", rates.prompts)):
        evidence |= _evidence(shares, things)
    if rates.discoveries is not None:
        evidence |= _by_chance(rates.discoveries)
    # A tail is the second half of a run.
    after = "So far, after" if view.second_horizon < 2 * LONG_TAIL else "After"
    answer = _answer(
        BEHAVIOUR,
        rates.tokens,
        "token",
        f"{after} {rates.where} of recurrence {view.second_horizon}",
        evidence,
        [*_changes(rates), *_led_away(view), *_dependence(view.prompts), *_rounded(view.dtype), *_disagreement(view)],
    )
    _, most_move = prompts_by_verdict(view)
    claims = [Claim.TOKENS_SETTLE] if answer.outcome is Outcome.YES else []
    if 2 * most_move.sum() > view.prompts:
        claims = [Claim.TOKENS_MOVE]
    return dataclasses.replace(answer, sentence=answer.sentence + driven(rates), claims=claims)


def _led_away(view: StudyView) -> list[str]:
    """Of tokens whose eigenvalues say otherwise."""
    count = int(led_away(view.study)[-1].sum())
    if not count:
        return []
    what = "token seems" if count == 1 else "tokens seem"
    return [
        f"{count:,} {what} to approach a point from which an eigenvalue leads away, as what comes down to an orbit "
        "does at first: undecided; a longer horizon tells."
    ]


def driven(rates: Rates) -> str:
    """How many drivers make how many tokens move, as a sentence after others; nothing where none is known."""
    pairs = zip(rates.tokens, rates.drivers, strict=False)
    said = [
        f"{plural(drivers.count, 'driver')} set{'s' if drivers.count == 1 else ''} the motion of "
        f"{'the one' if tokens.count == 1 else f'all {tokens.count:,}'} of kind {tokens.kind}"
        for tokens, drivers in pairs
        if tokens.kind.moves and tokens.count
    ]
    return f" Among the tokens that keep moving, {listed(said)}." if said else ""


def judged_answer(judged: JudgedFiles) -> Answer:
    """The same of trajectories that another tool captured."""
    shares = trajectory_shares(judged)
    total = len(judged.trajectories)
    unstable, small = (
        sum(doubt in each.verdict.unstable for each in judged.trajectories) for doubt in ("window", "noise")
    )
    noise = (
        f"{_of(small, total)} verdicts are of motion so small that it may be rounding kept alive by a slow mode; an "
        "analysis of the model itself can decide that."
    )
    return _answer(
        _TRAJECTORIES,
        shares,
        "trajectory",
        f"By the method {judged.manifest['method']}",
        _evidence(shares, "trajectories"),
        [
            *([f"{_of(unstable, total)} verdicts change within a shorter window."] if unstable else []),
            *([noise] if small else []),
            *_rounded(str(judged.manifest["dtype"])),
            *_dependence(len({(each.file, each.array) for each in judged.trajectories}), "array", "trajectories"),
        ],
    )


def trajectory_shares(judged: JudgedFiles) -> list[KindShare]:
    """Of trajectories of files; those of one array depend on each other."""
    codes = [KINDS.index(each.verdict.kind) for each in judged.trajectories]
    return token_shares(by_cluster(codes, [(each.file, each.array) for each in judged.trajectories]))


def _answer(
    question: Question,
    shares: Sequence[KindShare],
    noun: str,
    where: str,
    evidence: Evidence,
    limits: list[str],
) -> Answer:
    total = shares[0].total
    if not total:
        return question.unanswered("not measured", "There is no token to judge.")
    there = sorted((each for each in shares if each.count and each.kind is not Kind.UNKNOWN), key=lambda s: -s.count)
    settled = sum(share.count for share in there if share.kind.settles)
    unknown = total - sum(share.count for share in there)
    decided = total - unknown
    many = "trajectories" if noun == "trajectory" else f"{noun}s"
    # Few are counted, so that a rate of one in thousands does not read as none.
    of = f"decided {many}" if unknown else many
    parts = counted_parts([(share.count, _verb(share.kind, share.count)) for share in there], decided, of)
    open_ = f"{unknown:,} of {total:,} {many} {'is' if unknown == 1 else 'are'} undecided"
    if not decided:
        verdict, sentence = "cannot tell", f"{where}, {open_}."
    else:
        verdict = _headline(there, settled)
        if unknown:
            open_share = f"{percent(unknown / total)} undecided"
            verdict = f"{verdict}; {open_share}" if unknown < decided else f"{open_share}; of the rest {verdict}"
        sentence = f"{where}, {listed(parts)}." + (f" {open_}." if unknown else "")
    return question.says(
        _outcome(settled, unknown, total), verdict, sentence + _rare(shares, many, unknown), evidence, limits
    )


def _headline(there: Sequence[KindShare], settled: int) -> str:
    """What most do, and what the others do. Whoever rests at a point, or within rounding of one, has settled."""
    groups = ([("settle", settled)] if settled else []) + [
        (str(share.kind), share.count) for share in there if not share.kind.settles
    ]
    groups.sort(key=lambda group: -group[1])
    (first, count), decided = groups[0], sum(group[1] for group in groups)
    if len(groups) == 1:
        return f"all {first}" if settled else f"all: {first}"
    others = groups[1][0] if len(groups) == 2 else "otherwise"
    return f"{percent(count / decided)} {first}, {percent(1 - count / decided)} {others}"


def _verb(kind: Kind, count: int) -> str:
    verb, _, rest = _PLURALS[kind].partition(" ")
    if count != 1:
        return _PLURALS[kind]
    return "reaches or approaches a fixed point" if kind is Kind.FIXED_POINT else f"{verb}s {rest}".rstrip()


def _outcome(settled: int, unknown: int, total: int) -> Outcome:
    if settled == total:
        return Outcome.YES
    if 2 * unknown > total:
        return Outcome.CANNOT_TELL
    return Outcome.NO if settled == 0 else Outcome.PARTLY


def _rare(shares: Sequence[KindShare], many: str, unknown: int) -> str:
    """What the absence of orbits and sliders means."""
    absent = [share for share in shares if share.kind in STRUCTURED and not share.count]
    if not absent:
        return ""
    names = " or ".join(f"{share.kind}" for share in absent)
    counted = "95 %, counting the undecided ones" if unknown else "95 %"
    bound = math.ceil(1e5 * absent[0].interval[1]) / 1e5  # upwards, to what `percent` shows
    return f" No {names} was found; up to {percent(bound)} of {many} could still be one ({counted})."


def _evidence(shares: Sequence[KindShare], things: str) -> Evidence:
    found: Evidence = {}
    for share in shares:
        if share.count or share.kind in STRUCTURED:
            low, high = share.interval
            open_ = f", {share.undecided:,} more may be" if share.undecided else ""
            found[f"{things}: {share.kind}"] = (
                f"{share.count:,} of {share.decided:,}{open_}, {percent(low)} to {percent(high)} (95 %)"
            )
    return found


def _by_chance(found: Discoveries) -> Evidence:
    """What noise would show, and what survives a control of it."""
    return {
        "orbits and sliders that noise would show": f"{significant(found.expected)} in {found.tests:,} tests (tokens "
        "times layers)",
        **{
            f"{kind}: left at a false discovery rate of {percent(FALSE_DISCOVERIES)}": _of(*counts)
            for kind, counts in found.surviving.items()
            if counts[1]
        },
    }


def _changes(rates: Rates) -> list[str]:
    """Verdicts that did not stand a trial."""
    return [
        f"{_of(changed, tried)} verdicts change {_CHANGES.get(name, f'with another {name}')}."
        for name, (changed, tried) in rates.changed.items()
        if changed
    ]


def _dependence(groups: int, noun: str = "prompt", many: str = "tokens") -> list[str]:
    if groups > 1:
        return []
    return [f"All {many} come from one {noun}, which says nothing about others: the interval of a share is 0 to 100 %."]


def _rounded(dtype: str) -> list[str]:
    if dtype not in ("bfloat16", "float16"):
        return []
    return [f"In {dtype}, motion below the noise floor cannot be seen: an orbit or a slide that small is missed."]


def _disagreement(view: StudyView) -> list[str]:
    """Between the two methods, about whether a token settles."""
    if "verdict_cosine" not in view.dataset:
        return []
    codes = [token_kinds(view.study, method) for method in ("displacement", "cosine")]
    one, other = (np.isin(each, SETTLED_CODES) for each in codes)
    differ = int(((one != other) & (codes[0] >= 0)).sum())
    if not differ:
        return []
    return [
        f"The two methods disagree on whether {_of(differ, int((codes[0] >= 0).sum()))} tokens settle; the cosine sees "
        "neither the norm nor small motion."
    ]


def _of(count: int, total: int) -> str:
    return f"{count:,} of {total:,}"
