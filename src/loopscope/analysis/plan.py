"""What an analysis decides before it runs anything: from its settings, the subject and the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loopscope._util.wording import plural
from loopscope.analysis.settings import AnalyzeSettings
from loopscope.dynamics.eigenvalues.hooked import why_no_eigenvalues
from loopscope.dynamics.eigenvalues.result import EigenvalueSettings
from loopscope.dynamics.trajectories.settings import DisplacementSettings
from loopscope.errors import ConfigError
from loopscope.measures.base import MapChoice, Plan
from loopscope.measures.behaviour import can_be_judged
from loopscope.measures.maps import map_recurrences, map_sites, map_tokens
from loopscope.measures.readout import readout_grid
from loopscope.measures.rest import longest_rest
from loopscope.measures.stability import replaced_at, study_eigenvalues
from loopscope.models.checkpoints.free_memory import size_text
from loopscope.models.checkpoints.placement import Placement
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.interventions.parsing import last_named
from loopscope.models.native.subject import NativeSubject
from loopscope.models.subject import Subject, SubjectInfo

_EXITS_IF_UNKNOWN = 8
"""Recurrences of a full run of a model whose trained number is not known: as many as most are trained with or more."""
_EXITS_BY_RUNS = 8
"""A model whose state cannot be set is run anew for every readout, 1 + 2 + ... + N recurrences in all; 36 for 8, a
tenth of what an analysis runs by default. Beyond that it is done on request only."""

Note = Callable[[str], None]
"""Told what a user should know of the choices."""


def choose(subject: Subject, lengths: Sequence[int], settings: AnalyzeSettings, note: Note) -> Plan:
    """Of prompts of that many tokens.

    Raises `ConfigError` for settings that ask for what these prompts or this model do not have.
    """
    info = subject.info
    for sentence in subject.notes if isinstance(subject, HookedSubject) else ():
        note(sentence)
    if isinstance(subject, NativeSubject) and subject.placement is not None and subject.placement.is_spread:
        note(_where_layers_lie(info.name, subject.placement, settings))
    elif info.placement is not None:
        note(f"{info.name} lies on {info.placement}.")
    if isinstance(subject, HookedSubject) and subject.found is not None and info.is_looped:
        note(f"{info.name} turned out to have {subject.found}.")
    if isinstance(subject, HookedSubject) and subject.branches is not None:
        note(f"Of {info.name}, {subject.branches}.")
    if info.prefix is not None:
        note(f"{info.name} was trained to read a prompt in both directions, and --prefix {info.prefix} is in force.")
    exits = _exit_recurrences(subject, settings, note)
    maps, notes = choose_maps(info, lengths, settings)
    for message in notes:
        note(message)
    no_eigenvalues = _no_eigenvalues(subject, settings)
    if no_eigenvalues:
        note(f"Eigenvalues are left out for {info.name}: {no_eigenvalues}.")
    return Plan(
        recurrences=settings.recurrences if info.is_looped else 0,
        horizon=settings.horizon,
        seed=settings.seed,
        skip=frozenset(settings.skip),
        other_starts=settings.other_starts,
        cycle_recurrences=settings.cycle_recurrences,
        tracked=tuple(_tracked(lengths, settings)) if info.is_looped else (),
        components=settings.components,
        readout=_readout_grid(info, settings, exits),
        answers=_answers(subject, settings),
        exits=exits,
        head_stable=settings.head_stable,
        support_every=settings.support_every,
        judged_layers=_judged_layers(info, settings),
        eigenvalues=None if no_eigenvalues else _eigenvalues(info, settings),
        no_eigenvalues=no_eigenvalues or "",
        maps=maps,
        stop_at_rest=_stop_at_rest(settings, looped=info.is_looped),
    )


def _where_layers_lie(name: str, placement: Placement, settings: AnalyzeSettings) -> str:
    """With what it costs."""
    loop, others = placement.read("recurrent"), placement.read("prelude", "coda")
    passes = 2 * settings.horizon + settings.recurrences
    each = []
    if loop:
        each.append(
            f"{size_text(loop)} of its loop {passes:,} times or more, once in every recurrence "
            f"({size_text(loop * passes)})"
        )
    if others:
        each.append(f"{size_text(others)} before and behind the loop once in every run and readout")
    cost = f" For each batch, the disk is read for {' and for '.join(each)}." if each else ""
    return f"{name} lies on {placement}.{cost}"


def choose_maps(
    info: SubjectInfo, lengths: Sequence[int], settings: AnalyzeSettings
) -> tuple[MapChoice | None, list[str]]:
    """What an analysis of prompts of these lengths keeps, its rows being prompts of the study, and what to say of it.

    None where no map is kept. Raises `ConfigError` for an unknown prompt or recurrence.
    """
    prompts, recurrences = _prompts(len(lengths), settings), _recurrences(info, settings)
    if "maps" in settings.skip or not prompts:
        return None, []
    if info.heads is None:
        return None, [
            "Attention maps are left out: no layer's attention can be seen, or layers have different numbers of heads."
        ]
    maps = len(prompts) * len(map_sites(info, recurrences)) * info.heads
    most = min(settings.map_tokens, max(lengths[prompt] for prompt in prompts))
    tokens = map_tokens(most, maps, settings.map_limit * 2**20)
    note = (
        f"{maps:,} attention maps are kept for the first {tokens} tokens rather than {most}; raise --map-limit or give "
        "fewer --map-recurrences to have more."
    )
    return MapChoice(prompts, recurrences, tokens) if tokens else None, [note] if tokens < most else []


def _prompts(count: int, settings: AnalyzeSettings) -> tuple[int, ...]:
    missing = [prompt for prompt in settings.map_prompts if prompt >= count]
    if missing:
        raise ConfigError(f"--map-prompts {missing[0]}: there are {count} prompts, counted from 0.")
    return tuple(sorted(set(settings.map_prompts)))


def _recurrences(info: SubjectInfo, settings: AnalyzeSettings) -> tuple[int, ...]:
    asked, measured = settings.map_recurrences, settings.recurrences
    if not info.is_looped:
        return ()
    if asked and max(asked) > measured:
        raise ConfigError(
            f"--map-recurrences asks for {max(asked)} recurrences, but only {measured} are measured; raise "
            "--recurrences."
        )
    return tuple(sorted(set(asked))) or map_recurrences(info.trained_recurrences or 1, measured)


def _judged_layers(info: SubjectInfo, settings: AnalyzeSettings) -> tuple[int, ...]:
    if "behaviour" in settings.skip or not can_be_judged(settings.horizon):
        return ()
    if settings.judged_layers == "last":
        return *info.other_states, info.recurrent - 1
    return tuple(range(info.recurrent))


def _no_eigenvalues(subject: Subject, settings: AnalyzeSettings) -> str | None:
    """Why none are taken, where the settings ask for them and the model has a loop."""
    if not subject.info.is_looped or "stability" in settings.skip:
        return None
    replaced = replaced_at(settings.interventions, 2 * settings.horizon + 1)
    reason = subject.no_eigenvalues if isinstance(subject, NativeSubject) else None
    if isinstance(subject, HookedSubject):
        reason = why_no_eigenvalues(subject)
        if reason is None and not settings.hooked_eigenvalues:
            reason = (
                "a hooked model needs as many copies of a prompt as it has tokens for each product; ask for them with "
                "--hooked-eigenvalues"
            )
    if reason is None and replaced is not None:
        reason = f"'{replaced}' makes the recurrence at which they are taken unlike all others"
    return reason


def _eigenvalues(info: SubjectInfo, settings: AnalyzeSettings) -> EigenvalueSettings | None:
    if not info.is_looped or "stability" in settings.skip:
        return None
    return study_eigenvalues(
        settings.horizon,
        settings.eigenvalue_products,
        settings.eigenvalue_every,
        settings.eigenvalue_search,
        settings.seed,
    )


def _stop_at_rest(settings: AnalyzeSettings, *, looped: bool) -> int:
    """Raises `ConfigError` where the run would end although something is still to happen."""
    if not settings.stop_at_rest:
        return 0
    if "twin" in settings.skip:
        raise ConfigError(
            "--stop-at-rest goes by the noise floor that the twin measures; leave one of it and --skip twin out."
        )
    longest = longest_rest(settings.horizon)
    if looped and settings.stop_at_rest > longest:
        few = longest < DisplacementSettings().least_recurrences
        raise ConfigError(
            f"At a horizon of {settings.horizon} no run can rest for {settings.stop_at_rest} recurrences and end "
            "before twice that; raise --horizon, or "
            f"{'leave --stop-at-rest out' if few else f'take at most {longest}'}."
        )
    for each in settings.interventions:
        named = last_named(each)
        if named is not None and named > settings.horizon:
            raise ConfigError(
                f"--stop-at-rest might end the run before '{each}' has changed all that it changes, beyond the horizon "
                f"({settings.horizon}); leave one of them out, or raise --horizon."
            )
    return settings.stop_at_rest


def _exit_recurrences(subject: Subject, settings: AnalyzeSettings, note: Note) -> int:
    info = subject.info
    if not info.is_looped or "readout" in settings.skip or settings.exit_recurrences == 0:
        return 0
    asked = settings.exit_recurrences
    if asked is not None and asked > settings.recurrences:
        raise ConfigError(
            f"--exit-recurrences asks for {asked} recurrences, but only {settings.recurrences} are measured; raise "
            "--recurrences."
        )
    count = min(info.trained_recurrences or _EXITS_IF_UNKNOWN, settings.recurrences) if asked is None else asked
    reason = None
    if isinstance(subject, HookedSubject) and subject.facts.foresees:
        reason = "its loop depends on how often it will run, so that it cannot be stopped on the way"
    elif asked is None and not info.state_can_be_set and count > _EXITS_BY_RUNS:
        reason = (
            f"reading it out after each of {count} recurrences takes {count * (count + 1) // 2} more of them; ask "
            f"for it with --exit-recurrences {count}"
        )
    if reason is not None:
        note(f"Exit rules are left out for {info.name}: {reason}.")
        return 0
    return count


def _readout_grid(info: SubjectInfo, settings: AnalyzeSettings, exits: int) -> tuple[int, ...]:
    if not info.is_looped:
        return (1,)
    if not settings.readout:
        return readout_grid(info.trained_recurrences or 1, settings.recurrences, exits)
    if max(settings.readout) > settings.recurrences:
        raise ConfigError(
            f"--readout asks for {max(settings.readout)} recurrences, but only {settings.recurrences} are measured; "
            "raise --recurrences."
        )
    return tuple(sorted({*settings.readout, *range(1, exits + 1)}))


def _answers(subject: Subject, settings: AnalyzeSettings) -> tuple[int, ...]:
    """The tokens of the answers, each once."""
    tokenizer = subject.tokenizer
    if tokenizer is None:
        if settings.answer:
            raise ConfigError(f"--answer needs a tokenizer, which {subject.info.name} does not have.")
        return ()
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in settings.answer]
    return tuple(dict.fromkeys(token for each in encoded for token in each.ids))


def _tracked(lengths: Sequence[int], settings: AnalyzeSettings) -> list[tuple[int, int]]:
    """(prompt, token from 0) of the tracked tokens, sorted. Defaults beyond the last prompt are dropped, asked ones
    refused.
    """
    default = AnalyzeSettings().track
    found = []
    for entry, (prompt, token) in zip(settings.track, settings.tracked, strict=True):
        if prompt >= len(lengths):
            if settings.track == default:
                continue
            raise ConfigError(f"--track {entry}: prompts are counted from 0, and the last one is {len(lengths) - 1}.")
        length = lengths[prompt]
        if not -length <= token < length:
            raise ConfigError(f"--track {entry}: prompt {prompt} has {plural(length, 'token')}, counted from 0.")
        found.append((prompt, token % length))
    return sorted(set(found))
