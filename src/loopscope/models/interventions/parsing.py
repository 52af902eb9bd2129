"""Interventions from their text on the command line, and whether they fit a model, a run and its prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal, get_args

from loopscope._util.sites import STAGES, Stage
from loopscope.errors import ConfigError
from loopscope.models.architecture import Architecture
from loopscope.models.interventions.kinds import (
    Damp,
    FreezeInjection,
    Intervention,
    Recurrences,
    ReplaceToken,
    ScaleBranch,
    StartFrom,
    StartScaled,
    StartSeed,
)

_FORMS = {
    "mlp": "mlp:STAGE.LAYER[@RECURRENCES]=FACTOR",
    "attention": "attention:STAGE.LAYER[@RECURRENCES]=FACTOR",
    "inject": "inject[@T]=frozen",
    "damp": "damp=ETA",
    "start": "start=zeros|prelude|seed:N|scale:FACTOR",
    "token": "token:INDEX@T=zeros|noise|token:INDEX",
}
_BRANCH = re.compile(r"(mlp|attention):([a-z]+)\.(\*|\d{1,9})(?:@(\d{1,9})(-(\d{1,9})?)?)?=(.+)", re.ASCII)
_INJECT = re.compile(r"inject(?:@(\d{1,9}))?=frozen", re.ASCII)
_DAMP = re.compile(r"damp=(.+)", re.ASCII)
_START = re.compile(r"start=(?:(zeros|prelude)|seed:(-?\d{1,19})|scale:(.+))", re.ASCII)
_TOKEN = re.compile(r"token:(-?\d{1,9})@(\d{1,9})=(?:(zeros|noise)|token:(-?\d{1,9}))", re.ASCII)


def parse_interventions(texts: str | Sequence[str | Intervention]) -> tuple[Intervention, ...]:
    """Each text as `parse_intervention` reads it; what is an intervention already stays. A single text is one.

    Raises `ConfigError` for a text that is none, and for two that cannot both hold.
    """
    texts = (texts,) if isinstance(texts, str) else texts
    found = tuple(parse_intervention(each) if isinstance(each, str) else each for each in texts)
    for first, second in combinations(found, 2):
        if _conflict(first, second):
            raise ConfigError(f"The interventions '{first}' and '{second}' contradict each other; keep one of them.")
    return found


def parse_intervention(text: str) -> Intervention:
    """One intervention, in the grammar of docs/interventions.md. Raises `ConfigError` with the form that it should
    have.
    """
    kind = re.split(r"[:@=]", text, maxsplit=1)[0]
    if kind not in _FORMS:
        raise ConfigError(f"'{text}' is no intervention; write one of {', '.join(_FORMS.values())}.")
    found = {"inject": _inject, "damp": _damp, "start": _start, "token": _token}.get(kind, _branch)(text)
    if found is None:
        raise ConfigError(f"The intervention '{text}' cannot be read; write {_FORMS[kind]}{_hint(kind)}.")
    return found


def _hint(kind: str) -> str:
    if kind not in ("mlp", "attention"):
        return ""
    return f", with STAGE one of {', '.join(get_args(Stage))}, a LAYER or *, and RECURRENCES like 3, 2-5 or 4-"


def _branch(text: str) -> Intervention | None:
    found = _BRANCH.fullmatch(text)
    factor = None if found is None else _number(found[7])
    if found is None or factor is None or found[2] not in get_args(Stage):
        return None
    branch: Any = found[1]
    stage: Any = found[2]
    return ScaleBranch(branch, stage, None if found[3] == "*" else int(found[3]), factor, _recurrences(found))


def _recurrences(found: re.Match[str]) -> Recurrences | None:
    if found[4] is None:
        return None
    first = int(found[4])
    if found[5] is None:
        return Recurrences(first, first)
    return Recurrences(first, None if found[6] is None else int(found[6]))


def _inject(text: str) -> Intervention | None:
    found = _INJECT.fullmatch(text)
    return None if found is None else FreezeInjection(int(found[1] or 1))


def _damp(text: str) -> Intervention | None:
    found = _DAMP.fullmatch(text)
    eta = None if found is None else _number(found[1])
    return None if eta is None else Damp(eta)


def _start(text: str) -> Intervention | None:
    found = _START.fullmatch(text)
    if found is None:
        return None
    if found[1] is not None:
        state: Any = found[1]
        return StartFrom(state)
    if found[2] is not None:
        return StartSeed(int(found[2]))
    factor = _number(found[3])
    return None if factor is None else StartScaled(factor)


def _token(text: str) -> Intervention | None:
    found = _TOKEN.fullmatch(text)
    if found is None:
        return None
    by: Any = found[3] if found[3] is not None else int(found[4])
    return ReplaceToken(int(found[1]), int(found[2]), by)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _conflict(first: Intervention, second: Intervention) -> bool:
    if isinstance(first, ScaleBranch) or isinstance(second, ScaleBranch):
        return isinstance(first, ScaleBranch) and isinstance(second, ScaleBranch) and first.meets(second)
    if isinstance(first, ReplaceToken) or isinstance(second, ReplaceToken):
        # The same token named from the front and from the end is found out when the prompts are known.
        both = isinstance(first, ReplaceToken) and isinstance(second, ReplaceToken)
        return both and str(first).partition("=")[0] == str(second).partition("=")[0]
    starts = (StartFrom, StartSeed, StartScaled)
    return type(first) is type(second) or (isinstance(first, starts) and isinstance(second, starts))


def check_fits(interventions: Sequence[Intervention], architecture: Architecture, name: str) -> None:
    """Raises `ConfigError` for a layer that the model lacks, and for what its loop does not have."""
    for intervention in interventions:
        if isinstance(intervention, ScaleBranch):
            _check_layer(intervention, architecture, name)
        elif not architecture.is_looped:
            raise ConfigError(
                f"The intervention '{intervention}' needs a loop, and {name} is feed-forward; only mlp: and attention: "
                "apply to it."
            )
        elif isinstance(intervention, FreezeInjection) and architecture.injection == "none":
            raise ConfigError(
                f"The intervention '{intervention}' freezes the injected input, and {name} injects nothing; leave it "
                "out."
            )
        elif isinstance(intervention, StartFrom):
            _check_start(intervention, architecture, name)
        elif isinstance(intervention, StartSeed) and architecture.state_init != "normal":
            raise ConfigError(
                f"The intervention '{intervention}' draws another initial state, and {name} draws none but starts from "
                "the prelude's output; use start=scale:FACTOR."
            )


def check_recurrences(
    interventions: Sequence[Intervention], recurrences: int, done: Literal["run", "measured"] = "run"
) -> None:
    """Raises `ConfigError` for a recurrence that is named and not among those that are run, or measured."""
    for intervention in interventions:
        named = last_named(intervention)
        if named is not None and named > recurrences:
            raise ConfigError(
                f"The intervention '{intervention}' names recurrence {named}, and {recurrences} are "
                f"{done}; name an earlier one or ask for more."
            )


def check_tokens(interventions: Sequence[Intervention], lengths: Sequence[int]) -> None:
    """Raises `ConfigError` for a token that one of the prompts, whose lengths in tokens are given, does not have, and
    for two replacements of what is the same token in one of them.
    """
    replacements = [each for each in interventions if isinstance(each, ReplaceToken)]
    for prompt, length in enumerate(lengths):
        taken: dict[tuple[int, int], ReplaceToken] = {}
        for each in replacements:
            tokens = [each.token, each.by] if isinstance(each.by, int) else [each.token]
            for token in tokens:
                if not -length <= token < length:
                    raise ConfigError(
                        f"The intervention '{each}' names token {token}, and prompt {prompt} has {length} tokens, "
                        "counted from 0 or, negative, from the end; leave the prompt out or name another token."
                    )
            if len({token % length for token in tokens}) < len(tokens):
                raise ConfigError(
                    f"The intervention '{each}' names the same token twice in prompt {prompt}, which has {length} "
                    "tokens; leave the prompt out or name another token."
                )
            place = (each.token % length, each.recurrence)
            if place in taken:
                raise ConfigError(
                    f"The interventions '{taken[place]}' and '{each}' replace the same token of prompt {prompt}, which "
                    f"has {length} tokens; keep one of them."
                )
            taken[place] = each


def _check_layer(intervention: ScaleBranch, architecture: Architecture, name: str) -> None:
    layers: int = getattr(architecture, intervention.stage)
    if not layers:
        there = [stage for stage in STAGES if getattr(architecture, stage)]
        raise ConfigError(
            f"The intervention '{intervention}' names the {intervention.stage}, and {name} has no layers there; its "
            f"layers are in {' and '.join(there)}."
        )
    if intervention.layer is not None and intervention.layer >= layers:
        raise ConfigError(
            f"The intervention '{intervention}' names layer {intervention.layer}, and the {intervention.stage} of "
            f"{name} has {layers}, counted from 0."
        )


def _check_start(intervention: StartFrom, architecture: Architecture, name: str) -> None:
    if intervention.state == "prelude" and architecture.state_init == "embeddings":
        raise ConfigError(
            f"The intervention '{intervention}' changes nothing: {name} starts from the prelude's output anyway; leave "
            "it out."
        )
    if intervention.state == "zeros" and architecture.injection == "none":
        raise ConfigError(
            f"The intervention '{intervention}' would leave no prompt: {name} injects nothing, so the prompt enters by "
            "the initial state alone; use start=scale:FACTOR."
        )


def last_named(intervention: Intervention) -> int | None:
    """The last recurrence that the intervention names."""
    if isinstance(intervention, ReplaceToken | FreezeInjection):
        return intervention.recurrence
    if isinstance(intervention, ScaleBranch) and intervention.recurrences is not None:
        last = intervention.recurrences.last
        return intervention.recurrences.first if last is None else last
    return None
