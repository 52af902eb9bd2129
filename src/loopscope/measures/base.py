"""What a measure is: an observer that declares its variables, reduces while visits pass, and ends with a data set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, overload, runtime_checkable

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from loopscope._util.shapes import Logits, States
from loopscope._util.sites import Stage
from loopscope.dynamics.eigenvalues.result import EigenvalueSettings
from loopscope.dynamics.trajectories.noise import Noise
from loopscope.measures.functions import squared_singular_values
from loopscope.measures.memory import Memory
from loopscope.models.inspection.facts import Sizes
from loopscope.models.native.subject import NativeSubject
from loopscope.models.subject import Batch, Run, Subject, SubjectInfo
from loopscope.models.visits import AttentionView, Observer, Visit


@runtime_checkable
class ArrayFunction(Protocol):
    """Takes one or more arrays, then settings, and answers with an array of the kind it was given."""

    @overload
    def __call__(self, array: Tensor, /, *arguments: Any, **settings: Any) -> Tensor: ...
    @overload
    def __call__(self, array: np.ndarray, /, *arguments: Any, **settings: Any) -> np.ndarray: ...


def on_arrays(function: Callable[..., Tensor]) -> ArrayFunction:
    """Let a function of tensors take numpy arrays, and answer with a numpy array then."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **settings: Any) -> Any:
        answer = function(*map(_tensor, arguments), **{name: _tensor(value) for name, value in settings.items()})
        return answer.numpy() if isinstance(arguments[0], np.ndarray) else answer

    return wrapped


def _tensor(value: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value


@dataclass(frozen=True, slots=True)
class Variable:
    """What a study says of one of its variables."""

    dims: tuple[str, ...]
    meaning: str
    """In a sentence without a full stop; it becomes `long_name`, and a row of docs/study.md."""
    units: str = "1"
    """`1` of shares, ratios and cosines; `residual stream` of what is measured in the model's own activations."""
    flags: tuple[str, ...] = ()
    """What the values 0, 1, 2 ... stand for, of a variable that holds codes."""
    otherwise: str = ""
    """Why a study may lack it although its measure ran."""
    summed: bool = False
    """A mean over prompts: a batch has the sum, and as `<name>_weight` the number of prompts of each entry."""


def variable(dims: str, meaning: str, units: str = "1", **more: Any) -> Variable:
    """With the dimensions as words."""
    return Variable(tuple(dims.split()), meaning, units, **more)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a measure asks of the runs of a batch."""

    loop: bool = False
    """There is nothing to measure in a feed-forward model."""
    long_run: bool = False
    """It watches the run to the second horizon, rather than the measured one."""
    horizon: bool = False
    """It receives the visits of the loop only when the states at the horizon are known."""
    attention: bool = False
    """Queries and keys, or maps, of every visit."""
    second_run: bool = False
    """A run from another initial state, or several, is advanced beside the measured one."""
    twin: bool = False
    """A run that is nudged by one rounding at every recurrence is advanced beside the one from the horizon to the
    second."""
    also: tuple[str, ...] = ()
    """Other parts of the analysis without which it is left out."""


@dataclass(frozen=True, slots=True)
class MapChoice:
    """Which attention maps are kept."""

    prompts: tuple[int, ...]
    """Of the study, from 0."""
    recurrences: tuple[int, ...]
    """Numbers of recurrences, from 1; none for a feed-forward model."""
    tokens: int
    """Of each prompt, at most that many of the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a study measures, of which tokens, layers and recurrences: decided before anything runs."""

    recurrences: int
    """How many are measured; 0 for a feed-forward model."""
    horizon: int
    seed: int
    skip: frozenset[str]
    """Parts to leave out."""
    other_starts: int
    """Other initial states from which the measured recurrences are run too."""
    cycle_recurrences: int
    tracked: tuple[tuple[int, int], ...]
    """(prompt, token from 0)."""
    components: int
    readout: tuple[int, ...]
    """Numbers of recurrences after which the state is decoded."""
    answers: tuple[int, ...]
    """Tokens whose rank and log-probability are read out beside the most probable one."""
    exits: int
    """N, the recurrences of a full run of which exit rules may save some: every state up to N is decoded and compared
    with the one before; 0 for none."""
    head_stable: float
    """Root mean square change of a map's rows below which a head is stable."""
    support_every: int
    """Of every how many rows the support is followed; 0 for none."""
    judged_layers: tuple[int, ...]
    """Recurrent layers whose tokens' limits are judged; none without that part."""
    eigenvalues: EigenvalueSettings | None
    """How each token's eigenvalues are taken; None where they are not."""
    maps: MapChoice | None
    """Which attention maps are kept; None where none are."""
    no_eigenvalues: str = ""
    """Why none are taken, where neither the model's kind nor `skip` says it."""
    stop_at_rest: int = 0
    """Recurrences at rest beyond the horizon after which the run to the second one ends; 0 for never."""


@dataclass(slots=True, kw_only=True)
class BatchInfo:
    """What every measure of one batch shares."""

    subject: Subject
    batch: Batch
    """On the subject's device."""
    plan: Plan
    first_prompt: int = 0
    """Number in the study of the batch's first prompt."""
    second_run: bool = False
    """Whether there is a run from another initial state."""
    has_twin: bool = False
    """Whether a nudged run is advanced beside the one to the second horizon, where runs can be nudged."""
    horizon: HorizonStates | None = None
    """The states at the horizon, of a looped model; filled while its run to the second horizon passes."""
    twin: TwinDistances | None = None
    """How far the nudged run is, where there is one; filled likewise."""
    rest: RestBeyond | None = None
    """Looks whether all is at rest beyond the horizon, where that ends the run."""
    stopped: int | None = None
    """After how many recurrences the run to the second horizon ends, as all is at rest; None while it goes on."""
    _spectrum: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, subject: Subject, batch: Batch, plan: Plan, **more: Any) -> BatchInfo:
        return cls(subject=subject, batch=batch.to(subject.device), plan=plan, **more)

    @property
    def info(self) -> SubjectInfo:
        return self.subject.info

    @property
    def mask(self) -> Tensor:
        """(batch, token), True for tokens."""
        return self.batch.mask

    @property
    def counts(self) -> Tensor:
        """Tokens per prompt, (batch,)."""
        return self.batch.counts

    @property
    def recurrences(self) -> int:
        """R, how many are measured."""
        return self.plan.recurrences

    @property
    def end(self) -> int:
        """After how many recurrences the run to the second horizon ends, as far as is known."""
        return 2 * self.plan.horizon if self.stopped is None else self.stopped

    @property
    def prompts(self) -> int:
        return self.mask.shape[0]

    @property
    def tokens(self) -> int:
        return self.mask.shape[1]

    @property
    def sizes(self) -> Sizes:
        """Of its layers: of a model watched through hooks, which tells only some, as they mostly are."""
        if isinstance(self.subject, NativeSubject):
            return Sizes.of(self.subject.model.architecture)
        info = self.info
        return Sizes(
            width=info.width,
            query_width=info.width,
            key_width=info.width,
            mlp_width=4 * info.width,
            mlp_matrices=2,
            heads=info.heads or 1,
            vocab_size=info.vocab_size,
            parameters=info.parameters,
            prelude=info.prelude,
            recurrent=info.recurrent,
            coda=info.coda,
            injects=True,
            carries_raw_output=info.carries_raw_output,
        )

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the model's dtype."""
        dtype: torch.dtype = getattr(torch, self.info.dtype)
        return dtype.itemsize

    @property
    def bytes(self) -> tuple[int, int]:
        """Of the states of all its tokens at one layer, in the model's dtype, and as they are measured."""
        entries = self.mask.numel() * self.info.width
        return entries * self.itemsize, entries * max(self.itemsize, 4)

    @property
    def attention_bytes(self) -> int:
        """Of the queries and keys of one layer."""
        width = self.sizes.query_width + self.sizes.key_width
        return self.mask.numel() * width * self.itemsize

    @property
    def stored(self) -> torch.dtype:
        """What numbers of tokens, heads and quantiles are stored as: float64 of a model that runs in float64."""
        return torch.float64 if self.info.dtype == "float64" else torch.float32

    def unknown(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An array of NaN that visits fill in, `stored` unless told otherwise. It stays on the device, for which nobody
        waits that way, until the measure is asked for its arrays."""
        return torch.full(shape, torch.nan, dtype=dtype or self.stored, device=self.mask.device)

    def squared_singular_values(self, visit: Visit) -> Tensor:
        """Of each prompt's states, (batch, value); the padding adds zeros. Measures of one visit share them."""
        if self._spectrum is None or self._spectrum[0] is not visit.residual:
            states = visit.residual.masked_fill(~self.mask.unsqueeze(-1), 0.0)
            self._spectrum = visit.residual, squared_singular_values(states)
        return self._spectrum[1]

    def row(self, prompt: int) -> int | None:
        """Of the batch, in which a prompt of the study is, if it is there."""
        row = prompt - self.first_prompt
        return row if 0 <= row < self.prompts else None


class HorizonStates(Protocol):
    """The states that stand in for the fixed points, and their attention."""

    def layer(self, place: int, layer: int) -> Tensor:
        """`X*[layer]` at the first (0) or second (1) horizon, (batch, token, width); `layer` = k is the loop state."""

    def norm(self, place: int, layer: int) -> Tensor:
        """Norms of `layer(place, layer)`, (batch, token), in float64."""

    def attention(self, layer: int) -> AttentionView | None:
        """The attention of a layer at the first horizon; None where it cannot be seen."""


class TwinDistances(Protocol):
    """How far a run that is nudged by one rounding at every recurrence is from the one that is not."""

    distance: Tensor
    """Over the norm, (layer, recurrence from the horizon on, batch, token); NaN of what is still to come."""

    def noise(self, layer: int) -> Noise:
        """What it says of each token at a layer; tokens of all prompts in order. NaN where there was no such run."""


class RestBeyond(Protocol):
    """Ends the run to the second horizon where all is at rest."""

    def look(self, recurrence: int) -> None:
        """After that many recurrences, and those of the twin: sets `BatchInfo.stopped`."""


@dataclass(frozen=True, slots=True)
class RunEnd:
    """A run that has ended, and what can still be asked of it."""

    run: Run
    tick: Callable[[], None]
    """To be called after each step that is announced (`Measure.steps`)."""
    decode: Callable[[int, States | None], Logits]
    """Logits after a number of recurrences of that run, of which the loop state is at hand; None in a model without a
    loop."""


class Declared:
    """Something that a study holds, and what it says of it."""

    part: ClassVar[str | None] = None
    """What `--skip` names it; None for what every study has."""
    variables: ClassVar[Mapping[str, Variable]] = {}
    needs: ClassVar[Needs] = Needs()
    otherwise: ClassVar[str] = ""
    """Why a study may lack all of it although nothing else forbids it."""

    @classmethod
    def absent(cls, info: SubjectInfo, plan: Plan) -> str | None:
        """Why a study of this model lacks it, beyond what `part` and `needs` say; None if it does not."""
        return None

    @classmethod
    def lacks(cls, name: str, plan: Plan) -> str:
        """Why a study has no such variable although nothing forbids the whole."""
        return cls.variables[name].otherwise or cls.otherwise

    @classmethod
    def dataset(cls, arrays: Mapping[str, np.ndarray | Tensor]) -> xr.Dataset:
        """Arrays by name, with their declared dimensions, brought over from their device; the weight of a sum has the
        dimensions of the sum."""
        return xr.Dataset(
            {
                name: (
                    cls.variables[name.removesuffix("_weight")].dims,
                    values.cpu().numpy() if isinstance(values, Tensor) else values,
                )
                for name, values in arrays.items()
            }
        )


class Measure(Declared, Observer):
    """An observer of one batch that declares what it finds: notified of every visit, then asked once for its arrays."""

    beside: Sequence[Observer] = ()
    """Watch the runs from other initial states, one each; those that are not named are not watched."""
    nudged: Observer | None = None
    """Watches the run that is nudged, one recurrence behind the one that is not."""

    def __init__(self, batch: BatchInfo) -> None:
        self.batch = batch

    @classmethod
    def applies(cls, batch: BatchInfo) -> bool:
        """Whether this batch has anything for it."""
        return True

    @classmethod
    def steps(cls, batch: BatchInfo) -> int:
        """How often it calls `RunEnd.tick`."""
        return 0

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        """What it takes beside its arrays and the run. Nothing that matters unless it says so."""
        return Memory()

    def start(self, initial_state: Tensor | None) -> None:
        """The loop state before the first recurrence of its run; None where it is not known."""

    def ended(self, end: RunEnd) -> None:
        """Its run is over: that to the second horizon stands there, the measured one has been decoded."""

    def result(self) -> xr.Dataset:
        """What it found, with the dimensions that `variables` declares."""
        raise NotImplementedError


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last dimension of the entries that `mask` keeps; NaN where one of them is."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1)


def depth_count(batch: BatchInfo) -> int:
    """Visits of a run, p + k R + c."""
    return depth_of(batch, "coda", batch.info.coda, 0)


def depth_of(batch: BatchInfo, stage: Stage, layer: int, recurrence: int) -> int:
    """Place of a visit among the p + k R + c of a run, from 0; recurrences count from 1."""
    info = batch.info
    if stage == "prelude":
        return layer
    if stage == "recurrent":
        return info.prelude + (recurrence - 1) * info.recurrent + layer
    return info.prelude + batch.recurrences * info.recurrent + layer
