"""Every state of one small run, kept in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from loopscope._util.cards import card
from loopscope._util.shapes import Logits, Maps, States, TokenIds, TokenMask, TokenValues
from loopscope._util.sites import Site, Stage
from loopscope._util.wording import plural
from loopscope.errors import ConfigError
from loopscope.models.interventions.kinds import Intervention
from loopscope.models.interventions.parsing import check_recurrences, parse_interventions
from loopscope.models.loading import subject_of
from loopscope.models.native.exit import exit_distribution, exit_step
from loopscope.models.native.subject import intervene as intervened
from loopscope.models.subject import (
    Batch,
    InputIds,
    Run,
    Subject,
    SubjectInfo,
    batch_for,
    check_state,
    recurrences_of,
)
from loopscope.models.visits import AttentionView, LoopState, Observer, Visit

_Kept = TypeVar("_Kept")


class Trace:
    """What `capture` returns. Layers count from 0, and recurrences from 1: r of them are done. A feed-forward model's
    layers are its prelude."""

    def __init__(
        self,
        recorder: _Recorder,
        batch: Batch,
        info: SubjectInfo,
        initial_state: States | None,
        logits: Logits | None,
        readout: Run | list[Logits],
        recurrences: int,
    ) -> None:
        self.input_ids: TokenIds = batch.input_ids
        self.mask: TokenMask = batch.mask
        self._initial_state = initial_state
        self._logits = logits
        self._info = info
        self.recurrences: int = recurrences
        self._recorder = recorder
        self._readout = readout

    def __repr__(self) -> str:
        return f"<Trace of {self._info.name}: {', '.join(self._facts_shown().values())}>"

    def _repr_html_(self) -> str:
        return card("Trace", self._info.name, rows=self._facts_shown())

    def _facts_shown(self) -> dict[str, str]:
        return {
            "input": f"{plural(len(self.mask), 'prompt')} of {plural(int(self.mask.sum()), 'token')}",
            "loop": plural(self.recurrences, "recurrence"),
            "states": plural(len(self._recorder.residuals), "residual state"),
            "attention": plural(len(self._recorder.attention), "attention map"),
        }

    @property
    def logits(self) -> Logits:
        """What the model answers, (batch, token, vocabulary): with an exit gate, at each token the logits of the
        recurrence at which it stops. `ConfigError` for a run that ended before the coda."""
        if self._logits is None:
            raise ConfigError(f"This trace has no logits: {_SOME} Ask for a visit of the coda, or leave sites out.")
        return self._logits

    @property
    def visits(self) -> list[Site]:
        """(stage, layer, recurrence) of every visit, in order; the recurrence of prelude and coda is 0."""
        return list(self._recorder.residuals)

    @property
    def initial_state(self) -> States:
        """s_0, before the first recurrence, (batch, token, width); the prelude's output where there is no loop.

        Raises `ConfigError` for a hooked model whose s_0 cannot be told from its first layer's input.
        """
        if self._initial_state is None:
            raise ConfigError(f"The initial state of {self._info.name} cannot be seen from outside; see injected(1).")
        return self._initial_state

    def residual(self, stage: Stage, layer: int, recurrence: int = 0) -> States:
        """A layer's raw output, (batch, token, width). `KeyError` with what there is for a visit that was not made."""
        return self._look_up(self._recorder.residuals, Site(stage, layer, recurrence))

    def attention(self, stage: Stage, layer: int, recurrence: int = 0) -> Maps:
        """Post-softmax attention, (batch, head, query, key), float32 or wider; rows and columns of padding are zero.

        Computed from the queries and keys when asked for. Raises `ConfigError` if `capture` was not told to keep them,
        and `KeyError` for a visit that was not made or whose attention cannot be seen.
        """
        return self.attention_view(stage, layer, recurrence).probabilities()

    def attention_view(self, stage: Stage, layer: int, recurrence: int = 0) -> AttentionView:
        """Queries and keys behind `attention`, of which single rows can be had, and the values where they are seen.
        Errors as there."""
        if not self._recorder.keeps_attention:
            raise ConfigError("This trace kept no attention; call capture(..., attention=True).")
        site = Site(stage, layer, recurrence)
        if site in self._recorder.residuals and site not in self._recorder.attention:
            raise KeyError(f"The attention of layer {layer} in the {stage} of {self._info.name} cannot be seen.")
        return self._look_up(self._recorder.attention, site)

    def loop_state(self, recurrence: int) -> States:
        """The state after that many recurrences as the next one receives it, (batch, token, width)."""
        return self._states(self._recorder.loop_states)[self._place(recurrence)]

    def injected(self, recurrence: int) -> States:
        """The state after injection, the input of recurrent layer 0 in that recurrence, (batch, token, width)."""
        return self._states(self._recorder.injections)[self._place(recurrence)]

    def logits_at(self, recurrence: int) -> Logits:
        """Logits of the state after that many recurrences, decoded by the coda, (batch, token, vocabulary).

        Computed when asked for, or, of a hooked model, kept by `capture(..., readout=True)`: `ConfigError` without.
        """
        place = self._place(recurrence)
        if isinstance(self._readout, list):
            if not self._readout:
                raise ConfigError(
                    f"{self._info.name} is run through hooks, and its states can only be decoded as it runs; call "
                    "capture(..., readout=True)."
                )
            return self._readout[place]
        return self._readout.decode(state=self._states(self._recorder.loop_states)[place])

    def gate(self, recurrence: int) -> TokenValues:
        """The exit gate's answer after that many recurrences, before its sigmoid, (batch, token).

        Raises `ConfigError` for a model without an exit gate, as do the next two.
        """
        return self._gates()[self._place(recurrence)]

    @property
    def exit_distribution(self) -> Tensor:
        """Probability to stop after each recurrence, (batch, token, recurrence)."""
        return exit_distribution(self._gates())

    @property
    def exit_step(self) -> Tensor:
        """The number of recurrences after which the model stops, (batch, token)."""
        assert self._info.exit_threshold is not None  # a model with gates has one
        return exit_step(self.exit_distribution, self._info.exit_threshold)

    def _states(self, kept: list[States]) -> list[States]:
        if not kept and self.recurrences:
            raise ConfigError(f"This trace has no states between layers: {_SOME}")
        return kept

    def _gates(self) -> list[Tensor]:
        if not self._recorder.gates:
            raise ConfigError(f"{self._info.name} has no exit gate that can be seen.")
        return self._recorder.gates

    def _place(self, recurrence: int) -> int:
        if not 1 <= recurrence <= self.recurrences:
            raise KeyError(f"There is no recurrence {recurrence}; the trace has {self.recurrences}, counted from 1.")
        return recurrence - 1

    def _look_up(self, kept: dict[Site, _Kept], site: Site) -> _Kept:
        if site not in kept:
            stage, layer, recurrence = site
            layers = len({layer for name, layer, _ in kept if name == stage})
            raise KeyError(
                f"There is no visit of layer {layer} in the {stage} at recurrence {recurrence}; the {stage} has "
                f"{layers} layers, counted from 0, and the trace {self.recurrences} recurrences, counted from 1 (in "
                "prelude and coda, 0)."
            )
        return kept[site]


_SOME = "capture(..., sites=...) keeps those visits alone, and runs no further than they ask for."


class _Recorder(Observer):
    """Keeps everything it is notified of, or some visits alone."""

    def __init__(self, keeps_attention: bool, sites: frozenset[Site] | None) -> None:
        self.keeps_attention, self.sites = keeps_attention, sites
        self.residuals: dict[Site, Tensor] = {}
        self.attention: dict[Site, AttentionView] = {}
        self.injections: list[Tensor] = []
        self.loop_states: list[Tensor] = []
        self.gates: list[Tensor] = []

    def visit(self, visit: Visit) -> None:
        if self.sites is not None and visit.site not in self.sites:
            return
        self.residuals[visit.site] = visit.residual
        if self.keeps_attention and visit.attention is not None:
            self.attention[visit.site] = visit.attention

    def injected(self, recurrence: int, state: States) -> None:
        if self.sites is None:
            self.injections.append(state)

    def loop_state(self, loop_state: LoopState) -> None:
        if self.sites is not None:
            return
        self.loop_states.append(loop_state.state)
        if loop_state.gate is not None:
            self.gates.append(loop_state.gate)


def capture(
    model: str | Path | nn.Module | Subject,
    input_ids: InputIds,
    *,
    recurrences: int | None = None,
    initial_state: Tensor | None = None,
    attention: bool = False,
    readout: bool = False,
    sites: Iterable[tuple[Stage, int, int]] | None = None,
    attention_mask: Tensor | None = None,
    seed: int = 0,
    intervene: str | Sequence[str | Intervention] = (),
) -> Trace:
    """Run a model once and keep every residual state, loop state and, on request, attention map.

    **Arguments**

    - `model`: a name or folder for `load`, any subject, or a torch module, which is hooked as `loopscope.hook` does.
    - `input_ids`: (batch, token), (token,), or lists of ids, which may differ in length and are padded on the right;
      or a text, or several, for a model with a tokenizer.
    - `recurrences`: the trained number unless given.
    - `initial_state`: s_0, (batch, token, width); the model's own (drawn from `seed`) unless given.
    - `readout`: keep the logits after every recurrence, which `logits_at` needs of a hooked model.
    - `sites`: the visits to keep, such as `("recurrent", 2, 6)`, layer 2 in recurrence 6; nothing else is kept, and the
      run ends with the recurrence that has the last of them. All unless given.
    - `attention_mask`: True for tokens, of the shape of `input_ids`, where those are a tensor that holds padding.
    - `intervene`: what to change in the computation, such as `["mlp:prelude.1=0", "damp=0.5"]`; the forms are in
      docs/interventions.md.

    Memory grows with recurrences; for long runs and many prompts use `analyze`. Raises `ConfigError` for arguments
    that do not fit the model or each other, `NonFiniteError` for an initial state with NaN or infinity.
    """
    subject = intervened(subject_of(model), intervene)
    info = subject.info
    batch = batch_for(subject, input_ids, attention_mask)
    if initial_state is not None:
        if not info.is_looped:
            raise ConfigError(f"{info.name} has no recurrent layers, so initial_state means nothing.")
        check_state(initial_state, (*batch.input_ids.shape, info.width), "initial_state")
        started = [each for each in info.interventions if each.startswith("start=")]
        if started:
            raise ConfigError(f"initial_state and the intervention '{started[0]}' both say where to start; give one.")
    count = recurrences_of(info, recurrences)
    check_recurrences(parse_interventions(info.interventions), count)
    wanted = None if sites is None else _checked_sites(sites, info, count)
    # A hooked model may know no other number of recurrences than its own.
    if wanted is not None and info.state_can_be_set and all(site.stage != "coda" for site in wanted):
        count = max(site.recurrence for site in wanted)
    recorder = _Recorder(attention, wanted)
    run = subject.start(batch, recurrences=count, seed=seed, initial_state=initial_state, observers=[recorder])
    goes_on = info.state_can_be_set
    """The trace decodes what it is asked for by this run."""
    try:
        first = run.state
        kept: list[Logits] = []
        for _ in range(count):
            run.advance([recorder])
            if readout and not goes_on:
                kept.append(run.decode())
        ends = wanted is None or any(site.stage == "coda" for site in wanted) or not info.is_looped
        logits = run.answer([recorder]) if ends else None
        return Trace(recorder, batch, info, first, logits, run if goes_on else kept, count)
    finally:
        if not goes_on:
            run.close()


def _checked_sites(sites: Iterable[tuple[Stage, int, int]], info: SubjectInfo, recurrences: int) -> frozenset[Site]:
    there = set(info.sites(range(1, recurrences + 1)))
    wanted = [Site(*each) for each in sites]
    strange = next((site for site in wanted if site not in there), None)
    if strange is not None or not wanted:
        raise ConfigError(
            f"sites has {'no visit' if strange is None else tuple(strange)}; a run of {info.name} with {recurrences} "
            f"recurrences has {len(there)}, such as {tuple(min(there))} and {tuple(max(there))}: stage, layer from 0, "
            "and recurrence, from 1 in the loop and 0 outside."
        )
    return frozenset(wanted)
