"""Any torch module as a subject, watched by hooks while its own forward pass runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from loopscope._util.shapes import Logits, States
from loopscope.errors import ConfigError
from loopscope.models.hooks.apart import ForwardsApart, Group, SteppedForward
from loopscope.models.hooks.called import settle_form, settle_place
from loopscope.models.hooks.calls import Forward, ModelCall, is_prefix_model, is_pretrained
from loopscope.models.hooks.discovery import branches, check_places
from loopscope.models.hooks.forward import ForwardSpec, HookedForward
from loopscope.models.hooks.layout import HookLayout
from loopscope.models.hooks.pausing import ForwardContext, Setting, devices_of
from loopscope.models.hooks.probe import Facts, Padding, measure_facts, measure_padding
from loopscope.models.hooks.run import HookedRun
from loopscope.models.hooks.trial import ProbeTokens, check_setting, check_weights, positions_of, probe_of, trial
from loopscope.models.hooks.unobservable import PREFIX, loop_limits, no_one_map, no_padding, unobservable
from loopscope.models.hooks.wrappers import placement_of, weights_of
from loopscope.models.subject import Batch, CallableSubject, PrefixReading, SubjectInfo, check_length, weights_digest
from loopscope.models.visits import Observer
from loopscope.prompts.tokenizer import TextTokenizer

SetRecurrences = str | Callable[[nn.Module, int], Mapping[str, Any] | None]
"""A dotted path of the attribute that holds the number of recurrences, or a function of the model and the number that
may return more keyword arguments for the forward pass."""


class HookedSubject(CallableSubject):
    """A torch module as a subject. Made by `loopscope.hook`, which says what the arguments are.

    The module's weights are not touched. While a run computes, the module is in evaluation mode and has hooks; between
    recurrences it has its own modes back, and when a run ends, however it ends, its hooks are gone.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: HookLayout,
        *,
        set_recurrences: SetRecurrences | None = None,
        trained_recurrences: int | None = None,
        forward: Forward | None = None,
        name: str | None = None,
        tokenizer: TextTokenizer | None = None,
        weights_sha256: str | None = None,
        revision: str | None = None,
        found: str | None = None,
        prefix: PrefixReading = "causal",
        notes: Sequence[str] = (),
        probe: ProbeTokens | None = None,
        tokens_before: int = 0,
        attention_call: int | None = None,
    ) -> None:
        check_weights(model)
        self.notes = tuple(notes)
        """How the model came to be run through hooks, in sentences, where that is not what its owner asked for."""
        self.found = found
        """What was found of the layout by watching a forward pass, in words; None for one that was given."""
        self.model = model
        self.tokenizer = tokenizer
        self.layout = layout
        is_prefix = is_prefix_model(model) and forward is None
        self._prefix: PrefixReading | None = prefix if is_prefix else None
        self._probe = probe_of(model, probe)
        self._call = ModelCall(model, forward, prefix=self._prefix == "trained", tokens_before=tokens_before)
        self._attention_call = attention_call
        self._setting = Setting(model, set_recurrences) if isinstance(set_recurrences, str) else None
        self._function = None if isinstance(set_recurrences, str) else set_recurrences
        with trial(model, is_function=self._function is not None, trained=trained_recurrences):
            extra = self._extra(trained_recurrences)
            settle_form(self._call, self._probe, (layout.prelude or layout.recurrent)[0].module, extra)
            if layout.recurrent:
                ends = [layer.module for layer in (layout.recurrent[-1], layout.loop_end) if layer is not None]
                settle_place(self._call, self._probe, ends, layout.recurrent[0].module, extra)
            if tokens_before:
                check_places(self._call, self._probe, layout, extra, whole=found is not None)
        self._facts: Facts | None = None
        self._facts = self._measure(trained_recurrences)
        self.branches = branches(self._call, self._probe, layout, self._extra(trained_recurrences))
        """Why what its layers put out may be no states, in words; None where they pass it on to each other."""
        self._padding, self._padded_for = self._facts.behind, self._facts.recurrences or 0
        self.info = self._info(name or type(model).__name__, weights_sha256, revision)

    def _facts_shown(self) -> dict[str, str]:
        return super()._facts_shown() | ({"found": self.found} if self.found else {})

    @property
    def device(self) -> torch.device:
        return devices_of(self.model)[0]

    @property
    def facts(self) -> Facts:
        """What the probe measured."""
        assert self._facts is not None  # but while the probe itself runs
        return self._facts

    @property
    def unobservable(self) -> list[str]:
        """What cannot be seen of this model, in sentences."""
        found = unobservable(
            self.layout,
            self.facts,
            self._padding,
            self.branches,
            settable=self.settable,
            takes_mask=self._call.takes_mask,
            tokens_before=self._call.tokens_before,
            attention_call=self._attention_call,
        )
        return found if self._prefix is None else [*found, PREFIX[self._prefix]]

    @property
    def settable(self) -> bool:
        """Another number of recurrences than the model's own can be asked for."""
        return self._setting is not None or self._function is not None

    @property
    def no_one_map(self) -> str | None:
        """Why no recurrence of it has eigenvalues of its own; None for a loop of one map."""
        return no_one_map(self.facts)

    def start(
        self,
        batch: Batch,
        *,
        recurrences: int,
        seed: int = 0,
        initial_state: States | None = None,
        observers: Iterable[Observer] = (),
    ) -> HookedRun:
        """Raises `ConfigError` for a number of recurrences, an initial state or padding that the model cannot have."""
        facts = self.facts
        if initial_state is not None:
            raise ConfigError(f"{self.info.name} is run through hooks, which cannot give it another initial state.")
        if facts.recurrences is not None and recurrences < 1:
            raise ConfigError(f"recurrences must be at least 1, got {recurrences}.")
        if facts.recurrences is not None and recurrences != facts.recurrences and not self.settable:
            raise ConfigError(
                f"{self.info.name} runs its own {facts.recurrences} recurrences, and {recurrences} were asked for; "
                "tell loopscope.hook what sets them (set_recurrences); given no layers either, it looks for both."
            )
        check_length(self.info, batch.counts.tolist())
        if bool((batch.mask[:, 1:] & ~batch.mask[:, :-1]).any()):
            raise ConfigError(
                f"{self.info.name} is run through hooks and counts positions itself, from the first column on; put "
                "padding behind the prompts, not before or within them."
            )
        batch, count = batch.to(self.device), recurrences if self.info.is_looped else 0
        return HookedRun(lambda done: self.forward_of_prompts(batch, done, seed), self.info, facts, count, observers)

    def padding(self, recurrences: int | None) -> Padding:
        """What padding does in a run of that many recurrences; measured for more than were tried so far."""
        longer = recurrences is not None and self.settable and recurrences > self._padded_for
        if longer and no_padding(self._padding, self._call.takes_mask) is None:
            with suppress(Exception):  # the run itself will say that the model cannot have so many
                self._padding = measure_padding(
                    self.forward,
                    recurrences,
                    self._probe,
                    takes_mask=self._call.takes_mask,
                    random=self.facts.random,
                )
                self._padded_for = recurrences or 0
        return self._padding

    def no_padding(self, recurrences: int | None) -> str | None:
        """Why prompts of different lengths are run apart; None where they are one padded batch."""
        return no_padding(self.padding(recurrences), self._call.takes_mask)

    def other_initial_state(self, batch: Batch, seed: int) -> None:
        """None: the model makes its own initial state."""

    def bare_logits(self, batch: Batch, *, recurrences: int, seed: int = 0) -> Logits:
        """What the module answers, called as a run calls it but with no hook on it, (batch, token, vocabulary)."""
        batch = batch.to(self.device)
        context = self._context(recurrences, seed)
        try:
            context.take()
            with torch.no_grad():
                return self._call(batch, self._extra(recurrences))
        finally:
            context.give_back()

    def forward(
        self,
        batch: Batch,
        recurrences: int | None,
        seed: int = 0,
        begins_with: States | None = None,
        gradients: bool = False,
    ) -> HookedForward:
        """Begin a forward pass; with None, of the number of recurrences that the model has anyway.

        `begins_with` is given to the first recurrent layer instead of what it would receive. With `gradients`, those
        of what is announced flow to it.
        """
        facts = self._facts
        return HookedForward(
            ForwardSpec(
                self._call,
                self.layout,
                batch.to(self.device),
                recurrences,
                lambda: self._extra(recurrences),
                self._context(recurrences, seed),
                blind=frozenset() if facts is None else frozenset(facts.unseen),
                copies=facts is not None and facts.overwrites,
                width=None if facts is None else facts.width,
                begins_with=begins_with,
                gradients=gradients,
                attention_call=self._attention_call,
                carries=None if facts is None or facts.restarts else facts.carries,
            )
        )

    def forward_of_prompts(
        self,
        batch: Batch,
        recurrences: int | None,
        seed: int = 0,
        begins_with: States | None = None,
        gradients: bool = False,
    ) -> SteppedForward:
        """The same of prompts that may differ in length: one pass, or one for each length where padding is no way."""
        if bool(batch.mask.all()) or self.no_padding(recurrences) is None:
            return self.forward(batch, recurrences, seed, begins_with, gradients)

        def begin(group: Group, prompts: Batch) -> HookedForward:
            state = None if begins_with is None else begins_with[list(group.rows), : group.tokens]
            return self.forward(prompts, recurrences, seed, state, gradients)

        return ForwardsApart(batch.to(self.device), begin)

    def _context(self, recurrences: int | None, seed: int) -> ForwardContext:
        # A model that draws no random numbers leaves the generators alone, so they need not be saved.
        draws = self._facts is None or self._facts.draws
        setting = self._setting if recurrences and self.layout.recurrent else None
        return ForwardContext(self.model, setting=setting, recurrences=recurrences or 0, seed=seed if draws else None)

    def _extra(self, recurrences: int | None) -> Mapping[str, Any]:
        if self._function is None or not recurrences:
            return {}
        return self._function(self.model, recurrences) or {}

    def _measure(self, trained: int | None) -> Facts:
        own = self._setting.get() if self._setting is not None else trained
        with trial(self.model, is_function=self._function is not None, trained=trained):
            try:
                facts = measure_facts(
                    self.forward,
                    looped=bool(self.layout.recurrent),
                    own=own,
                    settable=self.settable,
                    takes_mask=self._call.takes_mask,
                    probe=self._probe,
                )
            except ConfigError as error:
                if self.settable and self.layout.recurrent:
                    check_setting(self._call, self._probe, self.layout, self._setting or self._extra, own or 2, error)
                raise
        if trained is not None and facts.recurrences != trained:
            raise ConfigError(
                f"trained_recurrences={trained}, but the model's own number is {facts.recurrences}; leave it out."
            )
        return facts

    def _info(self, name: str, weights_sha256: str | None, revision: str | None) -> SubjectInfo:
        kind = getattr(self.model.config, "model_type", None) if is_pretrained(self.model) else None
        facts = self.facts
        return SubjectInfo(
            name=name,
            family=f"{kind or type(self.model).__name__} (hooked)",
            prelude=len(self.layout.prelude),
            recurrent=len(self.layout.recurrent),
            coda=len(self.layout.coda),
            trained_recurrences=facts.recurrences,
            injection="none" if facts.prompt_enters is False or not self.layout.recurrent else None,
            norm_placement=None,
            loop_norm=None,
            state_init=None,
            width=facts.width,
            heads=facts.heads,
            vocab_size=facts.vocab_size,
            max_positions=positions_of(self.model),
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            dtype=str(facts.dtype).removeprefix("torch."),
            device=str(self.device),
            weights_sha256=weights_sha256 or weights_digest(weights_of(self.model)),
            placement=placement_of(self.model),
            revision=revision,
            other_states=self.layout.other_states,
            only_tokens=facts.only_tokens,
            sink_heads=facts.sink_heads,
            prefix=self._prefix,
            loop_limits=tuple(loop_limits(facts)) if self.layout.recurrent else (),
        )
