"""What all checks of one subject share: prompts, numbers of recurrences, and runs that several of them look at."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from loopscope._util.shapes import Logits, States, TokenIds
from loopscope.errors import ConfigError, LoopscopeError
from loopscope.models.contract.recording import RecordedRun, Recording
from loopscope.models.contract.results import CheckSkipped, Tolerances
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.subject import Batch, Subject, SubjectInfo

_LENGTHS = (7, 3, 1, 5)
"""Of the default prompts: all different, so that most are padded, and one is a single token."""


@runtime_checkable
class RawLogits(Protocol):
    """The model's own forward pass, with nothing of loopscope around it."""

    def __call__(self, input_ids: TokenIds, *, recurrences: int, seed: int) -> Logits:
        """Logits, (1, token, vocabulary), of one prompt without padding.

        `recurrences` is 0 for a feed-forward model. `seed` is that of a random initial state; torch's generators are
        seeded with it already.
        """


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A subject with what it is checked on."""

    subject: Subject
    prompts: Sequence[Sequence[int]]
    recurrences: int
    other_recurrences: tuple[int, ...]
    seed: int
    raw_logits: RawLogits | None
    """None for the default: the bare module, where the subject is one that has it."""
    causal: bool
    same_loop: bool
    tolerances: Tolerances

    @property
    def info(self) -> SubjectInfo:
        return self.subject.info

    @property
    def regrouped(self) -> float:
        return self.tolerances.regrouped_in(self.info.dtype)

    @property
    def has_raw(self) -> bool:
        """Whether `raw` has something to ask."""
        return self.raw_logits is not None or _own_forward(self.subject) is not None

    @property
    def module(self) -> nn.Module | None:
        """The torch module inside the subject, where it is called `model`."""
        module = getattr(self.subject, "model", None)
        return module if isinstance(module, nn.Module) else None

    @cached_property
    def batch(self) -> Batch:
        return Batch.of(self.prompts)

    def start(
        self,
        batch: Batch | None = None,
        recurrences: int | None = None,
        *,
        seed: int | None = None,
        initial_state: States | None = None,
        observed: bool = True,
    ) -> RecordedRun:
        """The main run, but for what is given."""
        return RecordedRun(
            self.subject,
            self.batch if batch is None else batch,
            self.recurrences if recurrences is None else recurrences,
            seed=self.seed if seed is None else seed,
            initial_state=initial_state,
            observed=observed,
        )

    @cached_property
    def main(self) -> Recording:
        """The observed run that others are compared with."""
        return self.start().complete()

    @cached_property
    def unobserved(self) -> Recording:
        return self.start(observed=False).complete()

    def in_other_number(self, recurrences: int) -> Recording:
        """The main run with another number of recurrences; `CheckSkipped` where the subject refuses to start it."""
        try:
            run = self.start(recurrences=recurrences)
        except LoopscopeError as error:
            raise CheckSkipped(f"{recurrences} recurrences are refused: {error}") from error
        return run.complete()  # what has started has promised to get through

    def raw(self, prompt: Sequence[int], recurrences: int) -> Logits:
        """The raw model's logits of one prompt; `CheckSkipped` where there is no raw model to ask."""
        forward = self.raw_logits or _own_forward(self.subject)
        if forward is None:
            raise CheckSkipped("there is nothing to compare with; give raw_logits, the model's own forward pass")
        device = self.subject.device
        input_ids = torch.tensor([list(prompt)], device=device)
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            return forward(input_ids, recurrences=recurrences, seed=self.seed)


def default_prompts(info: SubjectInfo) -> list[list[int]]:
    """Random token ids in prompts of different lengths, the same for every model of this vocabulary."""
    draw = random.Random(0)
    longest = min(max(_LENGTHS), info.max_positions or max(_LENGTHS))
    lengths = [info.only_tokens or min(length, longest) for length in _LENGTHS]
    return [[draw.randrange(info.vocab_size) for _ in range(length)] for length in lengths]


def main_recurrences(info: SubjectInfo, asked: int | None) -> int:
    """The number given, else the trained one; 0 without a loop. Raises `ConfigError` for one that means nothing."""
    if not info.is_looped:
        if asked:
            raise ConfigError(f"{info.name} has no recurrent layers, so recurrences={asked} means nothing.")
        return 0
    count = info.trained_recurrences if asked is None else asked
    if count is None:
        raise ConfigError(f"{info.name} does not say how often it was looped in training; give recurrences.")
    if count < 1:
        raise ConfigError(f"recurrences must be at least 1, got {count}.")
    return count


def default_others(subject: Subject, count: int, seed: int) -> tuple[int, ...]:
    """1, and one more than the main run's number; one less for a hooked model that fails with more, as one with an
    embedding for each of its recurrences does."""
    if isinstance(subject, HookedSubject) and subject.settable and count:
        try:
            subject.bare_logits(Batch.of([[0]]), recurrences=count + 1, seed=seed)
        except Exception:  # the other promises are still worth checking
            return tuple(sorted({1, max(1, count - 1)}))
    return (1, count + 1)


def _own_forward(subject: Subject) -> RawLogits | None:
    if isinstance(subject, NativeSubject):
        # Under interventions a run is not what the bare module computes.
        return None if subject.interventions else _NativeForward(subject.model)
    return _HookedForward(subject) if isinstance(subject, HookedSubject) else None


@dataclass(frozen=True)
class _NativeForward:
    model: LoopedTransformer

    def __call__(self, input_ids: TokenIds, *, recurrences: int, seed: int) -> Logits:
        logits: Logits = self.model(input_ids, recurrences=max(recurrences, 1), seed=seed)
        return logits


@dataclass(frozen=True)
class _HookedForward:
    subject: HookedSubject

    def __call__(self, input_ids: TokenIds, *, recurrences: int, seed: int) -> Logits:
        batch = Batch(input_ids, torch.ones_like(input_ids, dtype=torch.bool))
        return self.subject.bare_logits(batch, recurrences=recurrences, seed=seed)


def fingerprint(module: nn.Module) -> dict[str, object]:
    """What there is to say about each weight, buffer and submodule, by a name for a message."""
    found: dict[str, object] = {}
    for name, parameter in module.named_parameters():
        found[f"the weight {name}"] = _digest(parameter)
        found[f"requires_grad of {name}"] = parameter.requires_grad
    for name, buffer in module.named_buffers():
        found[f"the buffer {name}"] = _digest(buffer)
    for name, part in module.named_modules():
        found[f"the training flag of {name or 'the model'}"] = part.training
        found[f"the number of hooks of {name or 'the model'}"] = len(part._forward_hooks) + len(part._forward_pre_hooks)
        found[f"the forward method of {name or 'the model'}"] = part.__dict__.get("forward")
    return found


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()
