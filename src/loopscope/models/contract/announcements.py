"""Checks of what a run announces: order, shapes, facts, attention, finite numbers."""

from __future__ import annotations

import torch

from loopscope.models.contract.bench import Bench
from loopscope.models.contract.recording import Announcement, Recording
from loopscope.models.contract.results import CheckFailed, CheckSkipped
from loopscope.models.subject import SubjectInfo
from loopscope.models.visits import AttentionView, MapAttention


def visits_are_in_order(bench: Bench) -> str:
    """All p + k R + c visits, in order, with the injected and the carried states between them."""
    require_visits(bench.main, bench.info)
    return f"{_count(bench.info, bench.recurrences)} at R = {bench.recurrences}"


def require_visits(recording: Recording, info: SubjectInfo) -> None:
    """Raise `CheckFailed` at the first event that is another, or has another shape, than this layout has."""
    expected = _expected_events(info, recording.recurrences)
    got = recording.events
    for index in range(max(len(expected), len(got))):
        there = str(got[index]) if index < len(got) else "nothing more"
        wanted = str(expected[index]) if index < len(expected) else "nothing more"
        if there != wanted:
            raise CheckFailed(
                f"event {index + 1} at R = {recording.recurrences}: got {there}, expected {wanted}; there are "
                f"{len(got)} events, expected {len(expected)}"
            )
    shape = (*recording.batch.input_ids.shape, info.width)
    states = [event.label for event in expected] + [f"state@{count}" for count in range(1, recording.recurrences + 1)]
    for label in states:
        # Where an injection cannot be seen from outside, the first layer may receive state and prompt side by side.
        free = info.injection is None and label.startswith("injected")
        got_shape = recording.shapes.get(label)
        if got_shape != shape and not (free and got_shape is not None and got_shape[:2] == shape[:2]):
            raise CheckFailed(f"{label}: got shape {got_shape}, expected {shape}")
    for count in range(1, recording.recurrences + 1):
        if not torch.equal(recording.tensors[f"state@{count}"], recording.tensors[f"loop state@{count}"]):
            raise CheckFailed(
                f"the run's state after recurrence {count} is not the loop state that was announced for it"
            )


def _expected_events(info: SubjectInfo, recurrences: int) -> list[Announcement]:
    events = [Announcement("start", f"prelude.{layer}") for layer in range(info.prelude)]
    for recurrence in range(1, recurrences + 1):
        events.append(Announcement("advance", f"injected@{recurrence}"))
        events += [Announcement("advance", f"recurrent.{layer}@{recurrence}") for layer in range(info.recurrent)]
        events.append(Announcement("advance", f"loop state@{recurrence}"))
    return [*events, *(Announcement("answer", f"coda.{layer}") for layer in range(info.coda))]


def _count(info: SubjectInfo, recurrences: int) -> str:
    total = info.prelude + info.recurrent * recurrences + info.coda
    return f"{info.prelude} + {info.recurrent} x {recurrences} + {info.coda} = {total} visits"


def facts_are_true(bench: Bench) -> str:
    """Vocabulary, dtype, device, heads and gate are as `info` says."""
    info, run = bench.info, bench.main
    logits = run.shapes["logits"]
    expected = (*bench.batch.input_ids.shape, info.vocab_size)
    if logits != expected:
        raise CheckFailed(f"the logits have shape {logits}, expected {expected} by info.vocab_size")
    for label, dtype in run.dtypes.items():
        if dtype != info.dtype and label != "logits":  # some models answer in a wider dtype than they run in
            raise CheckFailed(f"{label} is {dtype}, expected {info.dtype} by info.dtype")
    attention = run.of("attention")
    differ = len({maps.shape[1] for maps in attention.values()}) > 1
    for label, maps in attention.items():
        if maps.shape[1] != info.heads and not (differ and info.heads is None):
            raise CheckFailed(f"{label} has {maps.shape[1]} heads, expected {info.heads} by info.heads")
    if info.is_looped and (info.exit_threshold is not None) != bool(run.of("gate")):
        raise CheckFailed(f"info.exit_threshold is {info.exit_threshold}, got {len(run.of('gate'))} gates")
    if bench.module is not None:
        parameters = sum(parameter.numel() for parameter in bench.module.parameters())
        if parameters != info.parameters:
            raise CheckFailed(f"the model has {parameters} parameters, expected {info.parameters} by info.parameters")
    return f"vocabulary {info.vocab_size}, width {info.width}, {info.dtype}"


def attention_is_a_distribution(bench: Bench) -> str:
    """Rows are probabilities over real tokens, and over earlier ones alone where the model is causal."""
    views = {label: view for label, view in bench.main.originals.items() if isinstance(view, AttentionView)}
    if not views:
        raise CheckSkipped("no layer's attention can be seen")
    furthest = 0.0
    for label, view in views.items():
        furthest = max(furthest, _check_map(bench, label, view))
    visits = sum(1 for label in bench.main.originals if label.startswith(("prelude", "recurrent", "coda")))
    return f"{len(views)} maps of {visits} visits, sums of rows at most {furthest:.1g} from 1"


def _check_map(bench: Bench, label: str, view: AttentionView) -> float:
    """How far the sum of a row of real tokens is from 1."""
    maps = view.probabilities()
    mask = bench.batch.mask.to(maps.device)
    tokens = mask.shape[1]
    if maps.shape != (len(mask), view.heads, tokens, tokens):
        raise CheckFailed(f"{label}: got shape {tuple(maps.shape)}, expected {(len(mask), view.heads, tokens, tokens)}")
    apart = float((view.rows(tokens - 1, tokens) - maps[:, :, -1:]).abs().amax())
    if not apart <= bench.tolerances.probability:
        raise CheckFailed(
            f"{label}: the row that rows({tokens - 1}, {tokens}) gives is {apart:.3g} from the last one of "
            f"probabilities(), expected at most {bench.tolerances.probability:.1g}"
        )
    outside = maps.transpose(1, 3)[~mask].abs().sum() + maps.transpose(1, 2)[~mask].abs().sum()
    if float(outside) != 0:
        raise CheckFailed(f"{label}: rows and columns of padding sum to {float(outside):.3g}, expected 0")
    if bench.causal and float(maps.triu(1).abs().amax()) != 0:
        raise CheckFailed(
            f"{label}: the largest probability of a later token is {float(maps.triu(1).amax()):.3g}, expected 0 "
            "(causal=False for a model that looks ahead)"
        )
    if float(maps.amin()) < 0:
        raise CheckFailed(f"{label}: the smallest probability is {float(maps.amin()):.3g}, expected none below 0")
    sums = maps.transpose(1, 2)[mask].sum(-1)
    worst = int((sums - 1).abs().amax(-1).argmax())
    furthest = float((sums[worst] - 1).abs().amax())
    limit = max(bench.tolerances.probability, _resolution(view))
    if not furthest <= limit:
        prompt, token = bench.main.places[worst]
        raise CheckFailed(
            f"{label}: the row of prompt {prompt}, token {token} sums to 1 only within {furthest:.3g}, expected "
            f"{limit:.1g}"
        )
    return furthest


def _resolution(view: AttentionView) -> float:
    """How far from 1 a row may be that the model itself rounded to half precision."""
    half = isinstance(view, MapAttention) and view.maps.dtype in (torch.float16, torch.bfloat16)
    return torch.finfo(view.maps.dtype).eps if isinstance(view, MapAttention) and half else 0.0


def numbers_are_finite(bench: Bench) -> str:
    """Nothing announced is NaN or infinite, and nothing records gradients."""
    for label, tensor in bench.main.tensors.items():
        broken = ~tensor.isfinite().reshape(len(tensor), -1).all(-1)
        if bool(broken.any()):
            prompt, token = bench.main.places[int(broken.int().argmax())]
            raise CheckFailed(f"{label} has NaN or infinity at prompt {prompt}, token {token}, expected finite numbers")
    for label, original in bench.main.originals.items():
        if isinstance(original, torch.Tensor) and original.requires_grad:
            raise CheckFailed(f"{label} records gradients, expected none: the states of a run would all stay in memory")
    return f"{len(bench.main.tensors)} tensors"


def states_stay(bench: Bench) -> str:
    """What was announced is not overwritten afterwards."""
    for label, original in bench.main.originals.items():
        now = original.probabilities().transpose(1, 2) if isinstance(original, AttentionView) else original
        then = bench.main.tensors[label]
        here = bench.main.at_tokens(now)
        if not torch.equal(here.nan_to_num(), then.nan_to_num()):
            size = float((here - then).abs().amax())
            raise CheckFailed(f"{label} was changed in place after it was announced, by up to {size:.3g}, expected 0")
    return f"{len(bench.main.originals)} tensors as announced"
