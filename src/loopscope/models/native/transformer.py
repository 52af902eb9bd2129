"""The looped transformer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn import functional

from loopscope._util.shapes import Logits, States, TokenIds, TokenMask, TokenValues
from loopscope._util.sites import STAGES, Site, Stage
from loopscope.errors import ConfigError
from loopscope.models.architecture import Architecture
from loopscope.models.native.attention import AttentionContext, RMSNorm, RotationTable, rotation_table
from loopscope.models.native.exit import ExitRule
from loopscope.models.native.interventions import AppliedInterventions, Parts, initial_noise
from loopscope.models.native.layer import BoundedInjection, DiagonalInjection, Layer
from loopscope.models.visits import LoopState, Observer, Visit


@dataclass(frozen=True, slots=True)
class Sequence:
    """A batch of tokens on its way through the model: what stays the same while the state loops."""

    input_ids: TokenIds
    encoded: States
    """e, the prelude's output."""
    context: AttentionContext
    applied: AppliedInterventions = field(default_factory=AppliedInterventions)
    """What interventions change in the model's computation."""

    def of(self, tokens: TokenMask) -> Sequence:
        """Those tokens side by side in one row. What attention may look at stays that of the whole batch."""
        rotation = self.context.rotation
        if rotation is not None:
            cos, sin = (
                each[:, 0].expand(*tokens.shape, -1)[tokens][None, None] for each in (rotation.cos, rotation.sin)
            )
            rotation = RotationTable(cos, sin)
        input_ids = self.input_ids[tokens][None]
        context = dataclasses.replace(self.context, input_ids=input_ids, rotation=rotation, mask=None)
        return Sequence(input_ids, self.encoded[tokens][None], context, self.applied.of(tokens))

    def rows(self, rows: Int64[Tensor, " row"], parts: Parts | None) -> Sequence:
        """Those prompts of the batch, which may be named again, with `parts` to look on at layers."""

        def some(given: Tensor | None) -> Tensor | None:
            return given if given is None or len(given) != len(self.input_ids) else given[rows]

        input_ids, rotation = self.input_ids[rows], self.context.rotation
        if rotation is not None and len(rotation.cos) == len(self.input_ids):
            rotation = RotationTable(rotation.cos[rows], rotation.sin[rows])
        mask, allowed, near = (some(each) for each in (self.context.mask, self.context.allowed, self.context.near))
        context = AttentionContext(input_ids, rotation, mask, allowed, near, self.context.mix)
        return Sequence(input_ids, self.encoded[rows], context, self.applied.rows(rows).with_parts(parts))


class LoopedTransformer(nn.Module):
    """Prelude, recurrent block, coda.

    `forward` runs all of it. The stages are also there one by one, `encode`, `initial_state`, `recur`, `decode`, so
    that a run can be advanced recurrence by recurrence.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        # Not drawn by nn.Embedding: its normal_ on the meta device imports torch's compiler, which takes seconds.
        weight = torch.empty(architecture.vocab_size, architecture.width).uniform_(-1, 1)
        self.embedding: nn.Embedding = nn.Embedding.from_pretrained(weight, freeze=False)
        layers = [Layer(architecture, place) for place in range(architecture.layers)]
        loop, after = architecture.prelude, architecture.prelude + architecture.recurrent
        self.prelude = nn.ModuleList(layers[:loop])
        self.recurrent = nn.ModuleList(layers[loop:after])
        self.coda = nn.ModuleList(layers[after:])
        self.prelude_norm = RMSNorm(architecture.width, architecture.norm_eps) if architecture.prelude_norm else None
        self.injection: nn.Linear | BoundedInjection | DiagonalInjection | None = None
        if architecture.injection == "linear":
            self.injection = nn.Linear(2 * architecture.width, architecture.width, bias=False)
        elif architecture.injection == "bounded":
            self.injection = BoundedInjection(architecture.width)
        elif architecture.injection == "diagonal":
            self.injection = DiagonalInjection(architecture.width)
        self.readout_map: nn.Linear | None = None
        if architecture.readout_map:
            self.readout_map = nn.Linear(architecture.width, architecture.width, bias=False)
        self.norm = RMSNorm(architecture.width, architecture.norm_eps)
        self.exit_gate = nn.Linear(architecture.width, 1) if architecture.exit_gate else None
        self.head: nn.Linear | None = None
        if not architecture.tied_embeddings:
            self.head = nn.Linear(architecture.width, architecture.vocab_size, bias=False)

    def layers(self, *stages: Stage) -> tuple[Layer, ...]:
        """Unique layers of these stages, or of all, in order."""
        return tuple(cast(Layer, layer) for stage in stages or STAGES for layer in getattr(self, stage))

    @property
    def device(self) -> torch.device:
        """Where states are between layers, and everything that belongs to none; layers may lie elsewhere."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def initialize(self, seed: int, std: float = 0.02, branch_gain: float = 1.0) -> LoopedTransformer:
        """Fill every matrix with N(0, std^2), every norm with 1, every bias and decay with 0 (of which a sigmoid is
        taken); a function of the seed alone.

        Norms on the output of a branch, before it is added to the residual stream, get `branch_gain` instead. With
        1, the branches of a deep stack drown the token embeddings that they are added to.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim >= 2:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1:
                    parameter.fill_(0.0 if name.endswith(("bias", "decay", "log")) else 1.0)
            if self.architecture.norm_placement in ("branch-in-out", "branch-out"):
                for layer in self.layers():
                    for norm in (layer.norm_2, layer.norm_4):
                        norm.get_parameter("weight").fill_(branch_gain)
        return self

    def forward(
        self,
        input_ids: TokenIds,
        *,
        recurrences: int | None = None,
        initial_state: States | None = None,
        attention_mask: TokenMask | None = None,
        seed: int = 0,
        backprop_last: int | None = None,
        observers: Iterable[Observer] = (),
    ) -> Logits:
        """Logits, (batch, token, vocabulary).

        **Arguments**

        - `recurrences`: how often the block runs; the architecture's number unless given.
        - `initial_state`: s_0, (batch, token, width); drawn or taken from the embeddings unless given.
        - `attention_mask`: True for tokens, False for padding, on either side.
        - `seed`: of the random initial state, if the architecture has one.
        - `backprop_last`: gradients flow through the last that many recurrences only (truncated backpropagation).
        - `observers`: notified of every visit.

        With an exit gate each token is answered from the recurrence at which it stops (see `ExitRule`).

        Raises `ConfigError` for a number of recurrences below 1, and for more than one or an initial state where there
        is no loop.
        """
        recurrences = self.architecture.recurrences if recurrences is None else recurrences
        if recurrences < 1:
            raise ConfigError(f"recurrences must be at least 1, got {recurrences}.")
        if recurrences > 1 and not self.architecture.is_looped:
            raise ConfigError(f"This model has no recurrent layers, so recurrences={recurrences} means nothing.")
        if initial_state is not None and not self.architecture.is_looped:
            raise ConfigError("This model has no recurrent layers, so initial_state means nothing.")
        if backprop_last is not None and backprop_last < 1:
            raise ConfigError(f"backprop_last must be at least 1, got {backprop_last}.")
        observers = tuple(observers)
        sequence = self.encode(input_ids, attention_mask, observers)
        state = self.initial_state(sequence, seed) if initial_state is None else initial_state
        exits = ExitRule(self.architecture.exit_threshold) if self.exit_gate is not None else None
        tracked = recurrences if backprop_last is None else backprop_last
        with_gradient = torch.is_grad_enabled()
        if self.architecture.is_looped:
            for recurrence in range(1, recurrences + 1):
                with torch.set_grad_enabled(with_gradient and recurrence > recurrences - tracked):
                    state = self.recur(state, sequence, recurrence, observers)
                    if exits is not None:
                        exits.after(state, self.gate(state))
        return self.decode(state if exits is None else exits.answer(state), sequence, observers)

    def encode(
        self,
        input_ids: TokenIds,
        attention_mask: TokenMask | None = None,
        observers: Iterable[Observer] = (),
        applied: AppliedInterventions | None = None,
        context: AttentionContext | None = None,
    ) -> Sequence:
        """Embed the tokens and run the prelude. `applied` holds for all that is done with the sequence; `context` is
        what these tokens look at, where that is not each other.
        """
        context, applied = context or self.context(input_ids, attention_mask), applied or AppliedInterventions()
        embedded = self.embed(input_ids)
        encoded = self._stage("prelude", embedded, 0, context, applied, observers)
        return Sequence(
            input_ids, encoded if self.prelude_norm is None else self.prelude_norm(encoded), context, applied
        )

    def embed(self, input_ids: TokenIds) -> States:
        """Token embeddings times the embedding scale, as the first layer receives them."""
        embedded: Tensor = self.embedding(input_ids)
        scale = self.architecture.embedding_scale
        return embedded if scale == 1.0 else embedded * scale

    def initial_state(self, sequence: Sequence, seed: int, begun: int | None = None) -> States:
        """s_0 as the architecture says; `begun` as for `initial_noise`."""
        return sequence.applied.started(self._own_initial_state(sequence, seed, begun), sequence.encoded)

    def _own_initial_state(self, sequence: Sequence, seed: int, begun: int | None) -> States:
        if self.architecture.state_init == "embeddings":
            return sequence.encoded
        noise = initial_noise(
            sequence.input_ids,
            sequence.context.mask,
            self.architecture.width,
            std=self.architecture.state_std,
            seed=sequence.applied.seed(seed),
            begun=begun,
        )
        return noise.to(self.device, self.dtype)

    def recur(self, state: States, sequence: Sequence, recurrence: int, observers: Iterable[Observer] = ()) -> States:
        """One pass through the recurrent block: injection, layers, the norm at its end if there is one, damping.

        Recurrences count from 1: `recurrence` of them are done when this one is.
        """
        observers = tuple(observers)
        applied = sequence.applied
        received = applied.received(state, recurrence)
        state = self._input(received, sequence, recurrence)
        for observer in observers:
            observer.injected(recurrence, state)
        state = self._stage("recurrent", state, recurrence, sequence.context, applied, observers)
        if self.architecture.loop_norm == "recurrence":
            state = self.norm(state)
        if self.architecture.eta != 1.0:
            state = (1.0 - self.architecture.eta) * received + self.architecture.eta * state
        state = applied.carried(received, state)
        gate = self.gate(state) if self.exit_gate is not None and observers else None
        for observer in observers:
            observer.loop_state(LoopState(recurrence, state, gate))
        return state

    def _input(self, state: States, sequence: Sequence, recurrence: int) -> States:
        """What the recurrent block receives: the mixed state, or, where the injection is frozen, an earlier one."""
        frozen = sequence.applied.frozen(recurrence)
        if frozen is not None:
            return frozen.to(state.dtype)
        mixed = self.inject(state, sequence.encoded)
        sequence.applied.mixed(mixed, recurrence)
        return mixed

    def gate(self, state: States) -> TokenValues:
        """The exit gate's answer to a loop state, before the sigmoid, (batch, token)."""
        if self.exit_gate is None:
            raise ConfigError("This model has no exit gate.")
        answer: Tensor = self.exit_gate(state)
        return answer.squeeze(-1)

    def inject(self, state: States, encoded: States) -> States:
        """Mix the prelude's output into the state."""
        if self.injection is not None:
            mixed: Tensor = self.injection(torch.cat((state, encoded), dim=-1))
            return mixed
        return state + encoded if self.architecture.injection == "add" else state

    def decode(self, state: States, sequence: Sequence, observers: Iterable[Observer] = ()) -> Logits:
        """Run the coda from a loop state (or, without a loop, from the prelude's output), then norm and head."""
        if self.architecture.loop_norm == "loop":
            state = self.norm(state)
        if self.readout_map is not None:
            state = self.readout_map(state)
        hidden = self._stage("coda", state, 0, sequence.context, sequence.applied, observers)
        return self.unembed(hidden if self._is_normed else self.norm(hidden))

    def unembed(self, hidden: States) -> Logits:
        """Logits of normed states."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return functional.linear(hidden, weight)

    @property
    def _is_normed(self) -> bool:
        """The head reads the loop state itself where the recurrence already ends with the final norm (Ouro)."""
        return self.architecture.loop_norm == "recurrence" and self.architecture.coda == 0

    def _stage(
        self,
        stage: Stage,
        state: States,
        recurrence: int,
        context: AttentionContext,
        applied: AppliedInterventions,
        observers: Iterable[Observer],
    ) -> States:
        home, observers = self.device, tuple(observers)
        for index, layer in enumerate(self.layers(stage)):
            state, view = layer.visit(
                state, context, applied.scale(stage, index, recurrence), applied.through(Site(stage, index, recurrence))
            )
            if observers:
                visit = Visit(stage, index, recurrence, state.to(home), view.on(home))
                for observer in observers:
                    observer.visit(visit)
        return state.to(home)

    def context(self, input_ids: TokenIds, mask: TokenMask | None) -> AttentionContext:
        """What tokens that look at each other share."""
        tokens = input_ids.shape[1]
        position = torch.arange(tokens, device=input_ids.device)
        behind = position[:, None] - position
        window = self.architecture.sliding_window
        # A window as long as the text hides nothing, and causality alone lets the fast kernels apply.
        near = None if window is None or window >= tokens else ((behind >= 0) & (behind < window))[None, None]
        places, allowed = position[None], None
        if mask is None or bool(mask.all()):
            mask = None
        elif not bool(mask.any(-1).all()):
            raise ConfigError("A row of attention_mask has no token; leave empty prompts out of the batch.")
        elif bool((mask[:, 1:] & ~mask[:, :-1]).any()):  # else padding comes last, so that no token can look at it
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            # A padding query may look at itself, or its softmax would be 0/0 and its NaN would spread into gradients.
            itself = torch.eye(tokens, dtype=torch.bool, device=mask.device)
            allowed = (((behind >= 0) & mask[:, None, :]) | itself)[:, None]
            near = allowed if near is None else allowed & (near | itself)
        return AttentionContext(input_ids, rotation_table(self.architecture, places, self.dtype), mask, allowed, near)
