"""Whether interventions fit a model, a number of recurrences, and prompts. Each refusal is one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from loopscope.architecture import Architecture
from loopscope.errors import ConfigError
from loopscope.interventions.kinds import (
    FreezeInjection,
    Intervention,
    ReplaceToken,
    ScaleBranch,
    StartFrom,
    StartSeed,
)

__all__ = ["check_fits", "check_recurrences", "check_tokens"]


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


def check_recurrences(interventions: Sequence[Intervention], recurrences: int) -> None:
    """Raises `ConfigError` for a recurrence that is named but not run: of 8, the last is number 7."""
    for intervention in interventions:
        named = _last_named(intervention)
        if named is not None and named >= recurrences:
            raise ConfigError(
                f"The intervention '{intervention}' names recurrence {named}, and {recurrences} are run, counted from "
                "0; name an earlier one or run more."
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
        there = [stage for stage in ("prelude", "recurrent", "coda") if getattr(architecture, stage)]
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


def _last_named(intervention: Intervention) -> int | None:
    """The last recurrence that the intervention names."""
    if isinstance(intervention, ReplaceToken | FreezeInjection):
        return intervention.recurrence
    if isinstance(intervention, ScaleBranch) and intervention.recurrences is not None:
        last = intervention.recurrences.last
        return intervention.recurrences.first if last is None else last
    return None
