"""What do the tokens tend to?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from loopscope._util.wording import listed, percent, plural
from loopscope.answers.answer import Answer, Criterion, Evidence, Outcome, Question, measured
from loopscope.answers.rates import KindShare, prompt_shares, token_shares
from loopscope.dynamics.verdicts import KINDS, SETTLED_CODES, JudgedFiles, Kind
from loopscope.study import StudyView

BEHAVIOUR = Question(
    key="behaviour",
    text="What do the tokens tend to?",
    figure="behaviour-shares",
    needs=(
        measured(
            "verdict",
            "No token's limit was judged: the part was skipped, the horizon is too short, or the study is older.",
        ),
    ),
)
_TRAJECTORIES = dataclasses.replace(BEHAVIOUR, text="What do the trajectories tend to?")
_PLURALS = {
    Kind.FIXED_POINT: "reach a fixed point",
    Kind.AT_FLOOR: "hover at the noise floor",
    Kind.ORBIT: "orbit",
    Kind.SLIDER: "slide on without a limit",
    Kind.BOUNDED: "keep moving within bounds",
    Kind.DIVERGING: "diverge",
    Kind.UNKNOWN: "cannot be told",
}
_CHANGES = {
    "window": "within a shorter window",
    "horizon": "at the horizon instead of twice it",
    "seed": "from another initial state",
}


def behaviour_answer(view: StudyView, criterion: Criterion) -> Answer:
    """Shares of the kinds at the last layer judged, with Clopper-Pearson intervals."""
    data = view.dataset.isel(judged_layer=-1)
    codes = data["verdict"].transpose("prompt", "token").values
    shares = token_shares(codes[codes >= 0])
    layer = int(data["judged_layer"])
    return _answer(
        BEHAVIOUR,
        shares,
        "token",
        f"After recurrent layer {layer}, {2 * view.horizon} recurrences on",
        {"recurrent_layer": float(layer), **_evidence(shares, "tokens"), **_evidence(prompt_shares(codes), "prompts")},
        [*_changes(view), *_dependence(view.prompts), *_rounded(view.dtype), *_disagreement(view)],
    )


def judged_answer(judged: JudgedFiles) -> Answer:
    """The same of trajectories that another tool captured."""
    codes = np.array([KINDS.index(each.verdict.kind) for each in judged.trajectories], dtype=np.int64)
    shares = token_shares(codes)
    unstable = sum(bool(each.verdict.unstable) for each in judged.trajectories)
    return _answer(
        _TRAJECTORIES,
        shares,
        "trajectory",
        f"By the method {judged.manifest['method']}",
        _evidence(shares, "trajectories"),
        [
            *([f"{_of(unstable, len(codes))} verdicts change within a shorter window."] if unstable else []),
            *_rounded(str(judged.manifest["dtype"])),
            *_dependence(len(judged.manifest["sources"]), "array", "trajectories"),
        ],
    )


def _answer(
    question: Question,
    shares: Sequence[KindShare],
    noun: str,
    where: str,
    evidence: Evidence,
    limits: list[str],
) -> Answer:
    total = shares[0].total
    there = sorted((share for share in shares if share.count), key=lambda share: -share.count)
    if not there:
        return question.unanswered("not measured", "There is no token to judge.")
    settled = sum(share.count for share in there if share.kind.settles)
    unknown = sum(share.count for share in there if share.kind is Kind.UNKNOWN)
    many = "trajectories" if noun == "trajectory" else f"{noun}s"
    counted = f"1 {noun}" if total == 1 else f"{total:,} {many}"
    # Few are counted, so that a rate of one in thousands does not read as none.
    parts = [f"{share.count:,} ({percent(share.share)}) {_verb(share.kind, share.count)}" for share in there]
    first = there[0]
    commonest = f"{percent(first.share)} {first.kind}, {percent(1 - first.share)} otherwise"
    return question.says(
        _outcome(settled, unknown, total),
        f"all: {first.kind}" if first.count == total else commonest,
        f"{where}, of {counted}: {listed(parts)}." + _rare(shares, many),
        evidence,
        limits,
    )


def _verb(kind: Kind, count: int) -> str:
    verb, _, rest = _PLURALS[kind].partition(" ")
    if count != 1 or verb == "cannot":
        return _PLURALS[kind]
    verb = f"{verb}es" if verb == "reach" else f"{verb}s"
    return f"{verb} {rest}".rstrip()


def _outcome(settled: int, unknown: int, total: int) -> Outcome:
    if settled == total:
        return Outcome.YES
    if 2 * unknown > total:
        return Outcome.CANNOT_TELL
    return Outcome.NO if settled == 0 else Outcome.PARTLY


def _rare(shares: Sequence[KindShare], many: str) -> str:
    """What the absence of orbits and sliders means."""
    absent = [share for share in shares if share.kind in (Kind.ORBIT, Kind.SLIDER) and not share.count]
    if not absent:
        return ""
    names = " or ".join(f"{share.kind}" for share in absent)
    return f" No {names} was found, which leaves room for up to {percent(absent[0].interval[1])} of {many} (95 %)."


def _evidence(shares: Sequence[KindShare], things: str) -> Evidence:
    found: Evidence = {}
    for share in shares:
        if share.count or share.kind in (Kind.ORBIT, Kind.SLIDER):
            low, high = share.interval
            found[f"{things}: {share.kind}"] = (
                f"{share.count:,} of {share.total:,}, {percent(low)} to {percent(high)} (95 %)"
            )
    return found


def _changes(view: StudyView) -> list[str]:
    """Verdicts of the last layer that did not stand a trial."""
    changes = view.dataset["verdict_changes"].isel(judged_layer=-1)
    said = []
    for name in map(str, changes["change"].values):
        found = changes.sel(change=name).values
        changed, tried = int((found == 1).sum()), int((found >= 0).sum())
        if changed:
            said.append(f"{_of(changed, tried)} verdicts are others {_CHANGES.get(name, f'with another {name}')}.")
    return said


def _dependence(groups: int, noun: str = "prompt", many: str = "tokens") -> list[str]:
    return [
        f"The {many} come from {plural(groups, noun)}; those of one {noun} depend on each other, so that the interval "
        f"of a share of {many} is too narrow."
    ]


def _rounded(dtype: str) -> list[str]:
    if dtype not in ("bfloat16", "float16"):
        return []
    return [f"In {dtype} motion below the noise floor cannot be seen: an orbit or a slide as small as that is missed."]


def _disagreement(view: StudyView) -> list[str]:
    """Between the two methods, about whether a token settles."""
    if "verdict_cosine" not in view.dataset:
        return []
    codes = [view.dataset[name].isel(judged_layer=-1).values for name in ("verdict", "verdict_cosine")]
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
