"""The native model as a subject, its runs, advanced recurrence by recurrence, and the same under interventions."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call

from loopscope._util.shapes import Logits, States, TokenMask
from loopscope.errors import ConfigError
from loopscope.models.checkpoints.placement import Placement
from loopscope.models.interventions.kinds import Intervention, StartScaled
from loopscope.models.interventions.parsing import check_fits, parse_interventions
from loopscope.models.native.attention import AttentionContext, Mix, RotationTable, mix_values
from loopscope.models.native.exit import ExitRule
from loopscope.models.native.interventions import AppliedInterventions, Parts, RunInterventions, initial_noise
from loopscope.models.native.layer import BoundedInjection, DiagonalInjection
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.native.transformer import Sequence as TokenSequence
from loopscope.models.subject import Batch, CallableSubject, Subject, SubjectInfo, weights_digest
from loopscope.models.visits import Observer
from loopscope.prompts.tokenizer import TextTokenizer


class NativeSubject(CallableSubject):
    """The native looped transformer as a subject."""

    def __init__(
        self,
        model: LoopedTransformer,
        *,
        name: str = "unnamed",
        family: str = "loopscope",
        tokenizer: TextTokenizer | None = None,
        weights_sha256: str | None = None,
        revision: str | None = None,
        ignored_config: Sequence[str] = (),
        placement: Placement | None = None,
    ) -> None:
        """`placement` is where the model's layers lie, if not all on one device."""
        self.model = model
        self.tokenizer = tokenizer
        self.placement = placement
        self.interventions: tuple[Intervention, ...] = ()
        architecture = model.architecture
        self.info = SubjectInfo(
            name=name,
            family=family,
            prelude=architecture.prelude,
            recurrent=architecture.recurrent,
            coda=architecture.coda,
            trained_recurrences=architecture.recurrences if architecture.is_looped else None,
            injection=architecture.injection,
            norm_placement=architecture.norm_placement,
            loop_norm=architecture.loop_norm,
            eta=architecture.eta,
            state_init=architecture.state_init,
            width=architecture.width,
            heads=architecture.heads,
            vocab_size=architecture.vocab_size,
            max_positions=architecture.max_positions,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            weights_sha256=weights_sha256 or weights_digest(model.named_parameters()),
            exit_threshold=architecture.exit_threshold if architecture.exit_gate else None,
            revision=revision,
            ignored_config=tuple(ignored_config),
            injection_factors=_factors(model),
            placement=str(placement) if placement is not None and placement.is_spread else None,
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def no_eigenvalues(self) -> str | None:
        """Why no eigenvalues of its recurrence can be taken; None where they can."""
        if all(layer.brought_from is None for layer in self.model.layers("recurrent")):
            return None
        return (
            f"layers of its loop are brought to {self.device} one at a time, and the recorded derivative of a "
            "recurrence would hold all of them"
        )

    def intervened(self, interventions: str | Sequence[str | Intervention]) -> NativeSubject:
        """The same model, every run of which applies these interventions, in place of those that this one has.

        Raises `ConfigError` for a text that is no intervention, and for interventions that contradict each other or
        do not fit the model.
        """
        found = parse_interventions(interventions)
        check_fits(found, self.model.architecture, self.info.name)
        changed = copy.copy(self)
        changed.interventions = found
        changed.info = dataclasses.replace(self.info, interventions=tuple(str(each) for each in found))
        return changed

    def start(
        self,
        batch: Batch,
        *,
        recurrences: int,
        seed: int = 0,
        initial_state: States | None = None,
        observers: Iterable[Observer] = (),
        parts: Parts | None = None,
        begun: int | None = None,
    ) -> NativeRun:
        batch = batch.to(self.device)
        applied = self.applied(batch, seed).with_parts(parts)
        return NativeRun(self.model, batch, seed, initial_state, tuple(observers), applied, begun)

    def other_initial_state(self, batch: Batch, seed: int) -> States | None:
        architecture = self.model.architecture
        if not self.info.can_start_elsewhere:
            return None
        batch = batch.to(self.device)
        applied = self.applied(batch, seed)
        # Not the seed that the run itself is told to draw from, or the two would be one.
        seed = applied.seed(seed) + 1
        scale = next((abs(each.factor) for each in self.interventions if isinstance(each, StartScaled)), 1.0)
        if architecture.state_init == "normal":
            std = architecture.state_std * scale
            noise = initial_noise(batch.input_ids, batch.mask, architecture.width, std=std, seed=seed)
            return noise.to(self.device, self.model.dtype)
        noise = initial_noise(batch.input_ids, batch.mask, architecture.width, std=scale, seed=seed).to(self.device)
        with torch.no_grad():
            encoded = self.model.encode(batch.input_ids, batch.mask, applied=applied).encoded
        # As large as the state that it replaces, prompt by prompt: what else is in the batch must not matter.
        square = torch.where(batch.mask, encoded.double().square().mean(-1), 0.0).sum(-1) / batch.counts
        noise = noise * square.sqrt()[:, None, None]
        return noise.to(self.device, self.model.dtype)

    def applied(self, batch: Batch, seed: int) -> AppliedInterventions:
        """What interventions change in a run of these prompts."""
        return (
            RunInterventions(self.interventions, batch.input_ids, batch.mask, seed)
            if self.interventions
            else AppliedInterventions()
        )


def _factors(model: LoopedTransformer) -> tuple[float, float] | None:
    if not isinstance(model.injection, BoundedInjection | DiagonalInjection) or model.injection.weight.is_meta:
        return None
    factors = model.injection.factors.detach().double()
    return float(factors.mean()), float(factors.max())


class NativeRun:
    """A run of the native model. Nothing in it records gradients."""

    def __init__(
        self,
        model: LoopedTransformer,
        batch: Batch,
        seed: int,
        initial_state: States | None,
        observers: tuple[Observer, ...],
        applied: AppliedInterventions,
        begun: int | None = None,
    ) -> None:
        self._model = model
        self._records = any(weight.requires_grad for weight in model.parameters())
        """Whether gradients of weights would be recorded."""
        self._next = 1
        """The recurrence that comes next."""
        with torch.no_grad():
            self._sequence = model.encode(batch.input_ids, batch.mask, observers, applied)
            if initial_state is None:
                initial_state = model.initial_state(self._sequence, seed, begun)
        self.state: States = initial_state.to(model.device, model.dtype)
        threshold = model.architecture.exit_threshold
        self._exits = ExitRule(threshold) if model.exit_gate is not None else None

    @torch.no_grad()
    def advance(self, observers: Iterable[Observer] = ()) -> None:
        self.state = self._model.recur(self.state, self._sequence, self._next, observers)
        if self._exits is not None:
            self._exits.after(self.state, self._model.gate(self.state))
        self._next += 1

    def fork(self) -> NativeRun:
        other = copy.copy(self)
        other._sequence = dataclasses.replace(self._sequence, applied=copy.copy(self._sequence.applied))
        other._exits = copy.deepcopy(self._exits)
        return other

    def fork_rows(self, rows: Int64[Tensor, " row"], parts: Parts | None = None) -> NativeRun:
        """Another run of those prompts of the batch, which may be named again, that stands where this one does;
        `parts` looks on in it, or replaces parts of layers."""
        other = copy.copy(self)
        other._sequence = self._sequence.rows(rows, parts)
        other.state = self.state[rows]
        other._exits = None if self._exits is None else self._exits.of(rows)
        return other

    def nudge(self, factors: Float[Tensor, "batch token width"]) -> None:
        # In the wider of the two dtypes: near 1, a factor of a narrow one would be 1.
        self.state = (self.state * factors).to(self._model.dtype)

    @torch.no_grad()
    def decode(self, observers: Iterable[Observer] = (), *, state: States | None = None) -> Logits:
        return self._model.decode(self.state if state is None else state, self._sequence, observers)

    @torch.no_grad()
    def answer(self, observers: Iterable[Observer] = ()) -> Logits:
        state = self.state if self._exits is None else self._exits.answer(self.state)
        return self._model.decode(state, self._sequence, observers)

    def close(self) -> None:
        """Nothing to give back."""

    @torch.no_grad()
    def rounding_error(self) -> Float[Tensor, "layer batch token"]:
        """Against the same recurrence in float64, upcast layer by layer, under the same interventions.

        A float64 model is compared with its float32 self instead, and the error scaled by the ratio of the unit
        roundoffs, 2^-29: rounding errors are proportional to it.
        """
        if self._model.dtype == torch.float64:
            coarse, fine = self._recurrence_in(torch.float32), self._recurrence_in(torch.float64)
            scale = 2.0**-29
        else:
            coarse, fine = self._recurrence_in(self._model.dtype), self._recurrence_in(torch.float64)
            scale = 1.0
        errors = [
            torch.linalg.vector_norm(rough.double() - exact, dim=-1) / torch.linalg.vector_norm(exact, dim=-1)
            for rough, exact in zip(coarse, fine, strict=True)
        ]
        return torch.stack(errors) * scale

    def recurrence_map(
        self,
        *,
        recurrence: int | None = None,
        dtype: torch.dtype | None = None,
        mix: Mix = mix_values,
        tokens: TokenMask | None = None,
    ) -> Callable[[States], States]:
        """One recurrence of this run's prompts as a function of the loop state, (batch, token, width) to the same.

        It is what `advance` does, interventions included, at `recurrence`, from 1, by default the one that comes next;
        in `dtype`, the model's own by default, with the weights that the model has. Gradients flow to the state alone.
        `mix` is how attention mixes values. With `tokens` the map is of the states of those alone, side by side,
        (1, token, width): `mix` then has to know which of them see which, and no token may be replaced at `recurrence`.
        """
        at = self._next if recurrence is None else recurrence
        dtype = dtype or self._model.dtype
        sequence = dataclasses.replace(
            self._sequence,
            encoded=self._sequence.encoded.to(dtype),
            context=dataclasses.replace(_context_in(self._sequence.context, dtype), mix=mix),
            # AppliedInterventions may remember what they see, and this is no part of the run.
            applied=copy.copy(self._sequence.applied),
        )
        if tokens is not None:
            sequence = sequence.of(tokens)
        if dtype == self._model.dtype and not self._records:
            return lambda state: self._model.recur(state, sequence, at)
        module = _Recurrence(self._model)
        weights = {
            name: parameter.detach().to(dtype)
            for name, parameter in module.named_parameters()
            if name.startswith(_Recurrence.USED)
        }

        def one_recurrence(state: States) -> States:
            following: Tensor = functional_call(module, weights, (state, sequence, at))
            return following

        return one_recurrence

    def _recurrence_in(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Outputs of the recurrent layers in one recurrence from here, one by one, computed in another dtype."""
        context, applied = _context_in(self._sequence.context, dtype), self._sequence.applied
        frozen, injection = applied.frozen(self._next), self._model.injection
        state = applied.received(self.state, self._next).to(dtype)
        encoded = self._sequence.encoded.to(dtype)
        if frozen is not None:
            state = frozen.to(dtype)
        elif injection is not None:
            weights = {name: weight.to(dtype) for name, weight in injection.named_parameters()}
            state = functional_call(injection, weights, (torch.cat((state, encoded), dim=-1),))
        else:
            state = self._model.inject(state, encoded)
        for index, layer in enumerate(self._model.layers("recurrent")):
            scale = applied.scale("recurrent", index, self._next)
            state, _ = layer.visit(state, context, scale, dtype=dtype)
            yield state.to(self._model.device)


class _Recurrence(nn.Module):
    """`LoopedTransformer.recur` as the forward pass of a module, whose weights can be given to it."""

    USED = ("model.injection.", "model.recurrent.", "model.norm.")

    def __init__(self, model: LoopedTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, state: States, sequence: TokenSequence, recurrence: int) -> States:
        return self.model.recur(state, sequence, recurrence)


def _context_in(context: AttentionContext, dtype: torch.dtype) -> AttentionContext:
    """The same context for another dtype; only the rotation has one, and it keeps the angles it was made with."""
    if context.rotation is None or dtype != torch.float64:
        return context
    rotation = RotationTable(context.rotation.cos.to(dtype), context.rotation.sin.to(dtype))
    return dataclasses.replace(context, rotation=rotation)


def intervene(subject: Subject, interventions: str | Sequence[str | Intervention]) -> Subject:
    """The subject under interventions. Raises `ConfigError` as `NativeSubject.intervened` does, for a subject that has
    some already, and for one that loopscope does not compute itself.
    """
    if not interventions:
        return subject
    if subject.info.interventions:
        raise ConfigError(
            f"{subject.info.name} is given with interventions ({', '.join(subject.info.interventions)}) already; leave "
            "the others out, or take the model without."
        )
    if not isinstance(subject, NativeSubject):
        raise ConfigError(
            f"{subject.info.name} computes by itself and is only watched, so that no intervention can be made; leave "
            "them out, or take a model of a family that loopscope reads natively."
        )
    return subject.intervened(interventions)
