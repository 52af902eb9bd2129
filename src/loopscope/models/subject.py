"""What can be studied, and one forward pass of it, advanced recurrence by recurrence."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from loopscope._util.cards import card
from loopscope._util.shapes import Logits, States, TokenIds, TokenMask
from loopscope._util.sites import Site, sites_in_order
from loopscope._util.wording import layout_text
from loopscope.errors import ConfigError, NonFiniteError, one_line
from loopscope.models.architecture import Injection, LoopNorm, NormPlacement, StateInit
from loopscope.models.visits import Observer
from loopscope.prompts.tokenizer import TextTokenizer, doubled_beginnings

InputIds = Tensor | np.ndarray | Sequence[Any]
"""Token ids, (batch, token) or (token,), or lists of them, which may differ in length; or a text, or several."""

PrefixReading = Literal["trained", "causal"]
"""How a model reads a prompt that it was trained to read in both directions: so, or no token sees a later one."""

_WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, slots=True)
class SubjectInfo:
    """Facts about a subject, as they are stored with every result."""

    name: str
    family: str
    prelude: int
    recurrent: int
    coda: int
    trained_recurrences: int | None
    """Mean number of recurrences in training; None for a feed-forward model."""
    injection: Injection | None
    """None, here and in the next three: it cannot be seen from outside the model."""
    norm_placement: NormPlacement | None
    loop_norm: LoopNorm | None
    state_init: StateInit | None
    width: int
    heads: int | None
    """Query heads; None where no layer's attention can be seen, or layers have different numbers."""
    vocab_size: int
    max_positions: int | None
    parameters: int
    dtype: str
    device: str
    weights_sha256: str
    """Of the checkpoint's files, or of the values in memory for a model that was not loaded."""
    exit_threshold: float | None = None
    """Of a model with an exit gate: it answers, token by token, with the first recurrence at which the cumulated
    probability to stop reaches it."""
    revision: str | None = None
    """Commit of the repository on the hub that the checkpoint came from."""
    eta: float = 1.0
    """A recurrence passes on `(1 - eta) s + eta F(s)`, as the model was made; a `damp` intervention comes on top."""
    interventions: tuple[str, ...] = ()
    """What every run changes in the model's computation; see docs/interventions.md."""
    other_states: tuple[int, ...] = ()
    """Recurrent layers that end a further state which goes around beside the loop state, such as HRM-Text's z_L: what a
    token tends to is judged there as after the last layer."""
    sink_heads: int | None = None
    """Heads that give a part of their attention to a column beside the tokens (a learned sink); None without one."""
    only_tokens: int | None = None
    """A model that runs on prompts of that many tokens alone, such as boards."""
    ignored_config: tuple[str, ...] = ()
    """Fields of config.json that loopscope does not know and that its user said to pass over."""
    prefix: PrefixReading | None = None
    """Of a model that was trained to read a prompt in both directions; None for every other."""
    injection_factors: tuple[float, float] | None = None
    """Mean and largest factor by which the injection alone shrinks a coordinate of the state in each recurrence, of a
    model whose weights say it (`bounded` and `diagonal`); Parcae's authors call the mean the contraction factor."""
    loop_limits: tuple[str, ...] = ()
    """In what the loop of a hooked model is not one map that is applied again and again, in sentences."""
    placement: str | None = None
    """Where the layers lie of a model that is not on one device."""

    @property
    def is_looped(self) -> bool:
        return self.recurrent > 0

    def sites(self, recurrences: Iterable[int]) -> list[Site]:
        """Every visit of a run, in order, of these recurrences, which count from 1."""
        return sites_in_order(self.prelude, self.recurrent, self.coda, recurrences)

    @property
    def carries_raw_output(self) -> bool:
        """The loop state is the last recurrent layer's raw output, with no norm and no damping between."""
        damped = self.eta != 1.0 or any(each.startswith("damp=") for each in self.interventions)
        return self.loop_norm in ("none", "loop") and not damped

    @property
    def state_can_be_set(self) -> bool:
        """A run can be given its initial state; not that of a hooked model."""
        return self.state_init is not None

    @property
    def can_start_elsewhere(self) -> bool:
        """The prompt enters at every recurrence, so another initial state is still the same prompt."""
        return self.injection in ("linear", "add", "bounded", "diagonal")

    def to_dict(self) -> dict[str, Any]:
        # A list, as JSON gives it back: what was written is compared with what is to be written.
        plain = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts of different lengths, padded on the right."""

    input_ids: TokenIds
    mask: TokenMask
    """True for tokens, False for padding."""

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]]) -> Batch:
        """Pad lists of token ids; the padding's own id is 0 and never looked at."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            input_ids[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        return cls(input_ids, torch.arange(longest) < lengths[:, None])

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.mask.to(device))

    @property
    def counts(self) -> Tensor:
        """Tokens of each prompt, (batch,)."""
        return self.mask.sum(-1)


def batch_for(subject: Subject, given: InputIds, mask: Tensor | None = None) -> Batch:
    """The prompts that a caller gave, of which texts are encoded with what the tokenizer puts around them.

    Raises `ConfigError` for what are no prompts of this model.
    """
    texts = [given] if isinstance(given, str) else given
    if isinstance(texts, list | tuple) and texts and all(isinstance(each, str) for each in texts):
        if subject.tokenizer is None:
            raise ConfigError(
                f"{subject.info.name} has no tokenizer, so that it takes token ids and no text; loopscope.hook takes a "
                "tokenizer."
            )
        given = [subject.tokenizer.encode(text).ids for text in texts]
        named = {str(index): ids for index, ids in enumerate(given)}
        for sentence in doubled_beginnings(subject.tokenizer, named, len(given)):
            warnings.warn(sentence, stacklevel=3)
    return as_batch(given, mask, subject.info)


def recurrences_of(info: SubjectInfo, asked: int | None) -> int:
    """How many to run where so many were asked for, the trained number unless any were; 0 of a feed-forward model.

    Raises `ConfigError`.
    """
    if not info.is_looped:
        if asked not in (None, 1):
            raise ConfigError(f"{info.name} has no recurrent layers, so recurrences={asked} means nothing.")
        return 0
    count = info.trained_recurrences if asked is None else asked
    if not isinstance(count, int | None):
        raise ConfigError(f"recurrences must be a whole number, got {count!r}.")
    if count is None or count < 1:
        raise ConfigError(f"recurrences must be at least 1, got {count}.")
    return count


def logits_of(
    subject: Subject, given: InputIds, recurrences: int | None, attention_mask: Tensor | None, seed: int
) -> Logits:
    """What a model answers, (batch, token, vocabulary), with nothing kept on the way."""
    batch, count = batch_for(subject, given, attention_mask), recurrences_of(subject.info, recurrences)
    run = subject.start(batch, recurrences=count, seed=seed)
    try:
        for _ in range(count):
            run.advance()
        return run.answer()
    finally:
        run.close()


class CallableSubject:
    """What our own subjects have beside the protocol: they are called as a model is, and show themselves."""

    info: SubjectInfo

    def __call__(
        self,
        input_ids: InputIds,
        *,
        recurrences: int | None = None,
        attention_mask: Tensor | None = None,
        seed: int = 0,
    ) -> Logits:
        """What the model answers, (batch, token, vocabulary); the arguments are those of `capture`. No gradients."""
        assert isinstance(self, Subject)
        return logits_of(self, input_ids, recurrences, attention_mask, seed)

    def __repr__(self) -> str:
        return f"<{self.info.name}, {', '.join(self._facts_shown().values())}>"

    def _repr_html_(self) -> str:
        return card("Model", self.info.name, rows=self._facts_shown())

    def _facts_shown(self) -> dict[str, str]:
        info = self.info
        found = {
            "family": info.family,
            "layout": layout_text(info.prelude, info.recurrent, info.coda, info.trained_recurrences),
            "width": f"width {info.width}",
            "parameters": f"{info.parameters:,} parameters",
            "dtype": f"{info.dtype} on {info.device}",
        }
        return found | ({"interventions": ", ".join(info.interventions)} if info.interventions else {})


def as_batch(given: InputIds, mask: Tensor | None, info: SubjectInfo) -> Batch:
    """The prompts that a caller gave, for the model that `info` is of; lists are padded on the right.

    Raises `ConfigError` for what are no token ids of this model.
    """
    batch = _batch(given, mask)
    if info.max_positions is not None and batch.input_ids.shape[1] > info.max_positions:
        raise ConfigError(
            f"input_ids has {batch.input_ids.shape[1]} tokens; {info.name} has {info.max_positions} positions."
        )
    if bool((batch.input_ids >= info.vocab_size).any()) or bool((batch.input_ids < 0).any()):
        raise ConfigError(f"input_ids must lie between 0 and {info.vocab_size - 1}, the model's vocabulary.")
    return batch


def _batch(given: InputIds, mask: Tensor | None) -> Batch:
    if not isinstance(given, Tensor | np.ndarray):
        if mask is not None:
            raise ConfigError("attention_mask goes with a tensor of input_ids; lists are padded and masked already.")
        return Batch.of(_nested(given))
    ids = torch.from_numpy(given) if isinstance(given, np.ndarray) else given
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or 0 in ids.shape or ids.dtype not in _WHOLE_NUMBERS:
        raise ConfigError(
            f"input_ids must be whole numbers of shape (batch, token), got {ids.dtype} {tuple(ids.shape)}."
        )
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != ids.shape:
        raise ConfigError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}.")
    if not bool(mask.any(-1).all()):
        raise ConfigError("attention_mask hides a whole prompt; a prompt needs at least one token.")
    return Batch(ids.long(), mask)


def _nested(given: Sequence[Any]) -> list[list[int]]:
    """Lists of token ids, of one or several prompts, with the numbers of whatever library they are of."""
    if isinstance(given, str) or any(isinstance(entry, str) for entry in given):
        raise ConfigError("input_ids are token ids and texts mixed; give only ids, or only texts.")
    plain = [entry.tolist() if isinstance(entry, Tensor | np.ndarray | np.generic) else entry for entry in given]
    several = all(isinstance(entry, Sequence) for entry in plain)
    nested: list[list[Any]] = [list(entry) for entry in plain] if several else [plain]
    if not all(isinstance(token, int) for prompt in nested for token in prompt):
        raise ConfigError(f"input_ids must be lists of whole numbers, got {given!r:.80}.")
    if not nested or not all(nested):
        raise ConfigError("input_ids is empty; a prompt needs at least one token.")
    return nested


def check_length(info: SubjectInfo, lengths: Iterable[int]) -> None:
    """Raises `ConfigError` for prompts of a length that the model cannot be run on."""
    other = [length for length in lengths if info.only_tokens not in (None, length)]
    if other:
        raise ConfigError(f"{info.name} runs on prompts of {info.only_tokens} tokens only; one has {other[0]}.")


def check_state(state: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Raises `ConfigError` for a state of another shape, and `NonFiniteError` for one with NaN or infinity."""
    if state.shape != shape:
        raise ConfigError(f"{name} has shape {tuple(state.shape)}; these tokens and this model need {shape}.")
    if not bool(torch.isfinite(state).all()):
        raise NonFiniteError(f"{name} holds NaN or infinity; give a finite state.")


@runtime_checkable
class Run(Protocol):
    """One forward pass in progress, standing between two recurrences."""

    @property
    def state(self) -> States | None:
        """The loop state; None before the first recurrence where it cannot be told from the first layer's input."""

    def advance(self, observers: Iterable[Observer] = ()) -> None:
        """Run one recurrence."""

    def decode(self, observers: Iterable[Observer] = (), *, state: States | None = None) -> Logits:
        """Logits of the state as it stands; the run can go on afterwards.

        `state` is decoded instead, where it is given: a loop state of the same tokens, such as an earlier one of this
        run. A subject whose state cannot be set (`info.state_can_be_set`) refuses it with a `ConfigError`.
        """

    def answer(self, observers: Iterable[Observer] = ()) -> Logits:
        """What the model itself answers after the recurrences so far.

        These are the logits of `decode`, but for a model with an exit gate, which answers each token from the
        recurrence at which it stops.
        """

    def close(self) -> None:
        """Nothing more is asked of this run. Closing twice is fine, and one that is garbage closes itself."""

    def rounding_error(self) -> Float[Tensor, "layer batch token"] | None:
        """Relative error that one recurrence from here makes by rounding, per recurrent layer; None if it cannot be
        told.
        """


@runtime_checkable
class NudgedRun(Run, Protocol):
    """A run whose loop state can be disturbed on its way, which a measured noise floor takes."""

    def nudge(self, factors: Float[Tensor, "batch token width"]) -> None:
        """Multiply what the next recurrence receives of the one before by these, which are near 1."""


@runtime_checkable
class ForkedRun(NudgedRun, Protocol):
    """One that can be gone on with in two ways from where it stands."""

    def fork(self) -> ForkedRun:
        """Another run that stands where this one does."""


@runtime_checkable
class Subject(Protocol):
    """A model that announces its visits."""

    @property
    def info(self) -> SubjectInfo: ...

    @property
    def tokenizer(self) -> TextTokenizer | None: ...

    @property
    def device(self) -> torch.device: ...

    def start(
        self,
        batch: Batch,
        *,
        recurrences: int,
        seed: int = 0,
        initial_state: States | None = None,
        observers: Iterable[Observer] = (),
    ) -> Run:
        """Run what comes before the loop.

        `recurrences` is how often the run will be advanced at most; some models must be told before they start. It is
        0 for a feed-forward model.
        """

    def other_initial_state(self, batch: Batch, seed: int) -> States | None:
        """An initial state from which the same prompt can be run too, for path independence.

        None where the prompt enters by the initial state alone, so that another state would be another prompt.
        """


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of the names and values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, values in weights:
        digest.update(name.encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def find_device(name: str) -> torch.device:
    """The device, if tensors can be made on it; `auto` is a GPU where there is one. Raises `ConfigError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        # Of which a number can be read back, as none can of the device meta.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"The device {name!r} cannot be used ({one_line(error)}); try --device cpu.") from None
    return device
