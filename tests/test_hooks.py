"""Subjects made of any torch module: what a run announces, and what it must leave as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopscope
from foreign_models import PATHS, VOCAB, ForeignLoop, assert_untouched
from loopscope.errors import ConfigError
from loopscope.measures.layer_readout import LayerReadout
from loopscope.models.architecture import Architecture
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.subject import Batch
from loopscope.models.trace import Trace
from loopscope.models.visits import Observer, Visit
from small_models import ARCHITECTURES, FEED_FORWARD, INJECTED, LOOP_NORM, PROMPTS, architecture, hooked_native

BATCH = Batch.of([[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]])


def assert_same(trace: Trace, other: Trace) -> None:
    """Every state, map and logit, bit for bit."""
    assert trace.visits == other.visits
    assert trace.recurrences == other.recurrences
    assert torch.equal(trace.logits, other.logits)
    for site in trace.visits:
        assert torch.equal(trace.residual(*site), other.residual(*site)), site
        assert torch.equal(trace.attention(*site), other.attention(*site)), site
    for recurrence in range(1, trace.recurrences + 1):
        assert torch.equal(trace.loop_state(recurrence), other.loop_state(recurrence))
        assert torch.equal(trace.injected(recurrence), other.injected(recurrence))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_native_model_through_hooks_is_itself_bit_for_bit(name: str) -> None:
    shape = ARCHITECTURES[name]
    native, hooked = hooked_native(shape)
    for recurrences in (1, 4, 7) if shape.is_looped else (None,):
        arguments: dict[str, Any] = {"recurrences": recurrences, "attention": True}
        assert_same(loopscope.capture(native, PROMPTS, **arguments), loopscope.capture(hooked, PROMPTS, **arguments))
    for fact in ("prelude", "recurrent", "coda", "width", "heads", "vocab_size", "parameters", "weights_sha256"):
        assert getattr(hooked.info, fact) == getattr(native.info, fact), fact
    assert hooked.info.trained_recurrences == native.info.trained_recurrences
    assert hooked.facts.unseen == {}
    assert_untouched(hooked.model)


@pytest.mark.parametrize(
    ("shape", "method"),
    [(INJECTED, "keep"), (LOOP_NORM, "second-pass"), (FEED_FORWARD, "keep")],
    ids=["injected", "loop norm", "feed-forward"],
)
def test_a_study_through_hooks_holds_the_same_numbers(shape: Architecture, method: str) -> None:
    # What needs another dtype, another initial state or a named weight cannot be had through hooks.
    settings: dict[str, Any] = {
        "recurrences": 6,
        "horizon": 8,
        "batch_size": 2,
        "horizon_method": method,
        # Eigenvalues are had on request, and checked in test_stability_study.py.
        "skip": ("path-independence", "noise-floor", "twin", "neurons", "stability"),
    }
    native, hooked = (loopscope.analyze(subject, PROMPTS, **settings).dataset for subject in hooked_native(shape))
    # Norm and head of a model that is seen from outside have no names.
    assert set(native.data_vars) - set(hooked.data_vars) == (set(LayerReadout.variables) if shape.is_looped else set())
    unknown = set()
    for name in hooked.data_vars:
        array = native[name]
        if not hooked[name].equals(array):
            unknown.add(name)
            # The acceleration is of two steps, and of the loop state alone.
            last = 2 if name == "token_acceleration" else 1
            seen = hooked[name].sel(recurrence=last)
            assert (seen.sel(site="loop_state") if "site" in seen.dims else seen).isnull().all()
            assert (
                hooked[name].sel(recurrence=slice(last + 1, None)).equals(array.sel(recurrence=slice(last + 1, None)))
            )
    # The first step is one from an initial state that cannot be seen.
    steps = {
        "token_successive_difference",
        "token_relative_step",
        "token_cosine_distance_to_previous",
        "token_acceleration",
    }
    assert unknown == (steps if shape is INJECTED else set())


def test_the_initial_state_is_known_where_the_loop_carries_its_state_unchanged() -> None:
    native, hooked = hooked_native(LOOP_NORM)
    assert hooked.info.injection == "none"
    same = [loopscope.capture(subject, PROMPTS).initial_state for subject in (native, hooked)]
    assert torch.equal(*same)
    _, injected = hooked_native(INJECTED)
    assert injected.info.injection is None
    with pytest.raises(ConfigError, match="cannot be seen from outside"):
        _ = loopscope.capture(injected, PROMPTS).initial_state


def test_answers_between_recurrences_are_those_of_as_many_and_disturb_nothing() -> None:
    native, hooked = hooked_native(INJECTED)
    seen = Recorder()
    run, reference = (subject.start(BATCH, recurrences=4) for subject in (hooked, native))
    for _ in range(4):
        run.advance()
        reference.advance()
        assert torch.equal(run.decode(), reference.decode())
        assert torch.equal(run.answer([seen]), reference.answer())
        assert run.state is not None
        assert reference.state is not None
        assert torch.equal(run.state, reference.state)
    assert [visit.label for visit in seen.visits] == ["coda.0"] * 4
    assert all(visit.attention is not None for visit in seen.visits)
    run.close()
    assert_untouched(hooked.model)


def test_a_foreign_loop_is_seen_whole() -> None:
    model = ForeignLoop().eval()
    subject = loopscope.hook(model, **PATHS, name="foreign")
    assert subject.info.trained_recurrences == 3
    assert subject.info.injection is None
    trace = loopscope.capture(subject, BATCH.input_ids, attention_mask=BATCH.mask, recurrences=5, attention=True)
    assert [site for site in trace.visits if site[0] != "recurrent"] == [
        ("prelude", 0, 0), ("prelude", 1, 0), ("coda", 0, 0),
    ]  # fmt: skip
    assert [site[1:] for site in trace.visits if site[0] == "recurrent"] == [
        (layer, recurrence) for recurrence in range(1, 6) for layer in range(2)
    ]
    model.loops = 5
    assert torch.equal(trace.logits, model(BATCH.input_ids, BATCH.mask)["logits"])
    for recurrence in range(2, 6):
        encoded = trace.residual("prelude", 1)
        assert torch.equal(trace.injected(recurrence), trace.loop_state(recurrence - 1) + encoded)


def test_a_layer_that_comes_twice_in_a_recurrence_is_two_layers() -> None:
    model = TwoStacks()
    subject = loopscope.hook(model, recurrent=["low", "low", "high"], loop_end="norm")
    trace = loopscope.capture(subject, BATCH.input_ids)
    assert trace.visits == [("recurrent", layer, recurrence) for recurrence in (1, 2) for layer in range(3)]
    for recurrence in (1, 2):
        expected = model.norm(trace.residual("recurrent", 2, recurrence))
        assert torch.equal(trace.loop_state(recurrence), expected)


def test_a_loop_end_that_is_missing_after_the_last_recurrence_is_named() -> None:
    with pytest.raises(ConfigError, match=r"loop_end='norm' was called 0 times after the last recurrence"):
        loopscope.hook(TwoStacks(last_norm=False), recurrent=["low", "low", "high"], loop_end="norm")


class TwoStacks(nn.Module):
    """low, low, high, and a norm; twice. The last norm may be left out."""

    def __init__(self, *, last_norm: bool = True) -> None:
        super().__init__()
        self.last_norm = last_norm
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 8)
        self.low, self.high, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, VOCAB)
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for recurrence in range(2):
            x = self.high(self.low(self.low(x)))
            if recurrence == 0 or self.last_norm:
                x = self.norm(x)
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recurrent": ["cycle.1", "cycle.0"]}, r"called cycle\.0 where cycle\.1 \(recurrent\.0@1\) was expected"),
        ({"recurrent": "cycle.0", "prelude": ["enter", "norm"]}, r"called cycle\.0 where norm \(prelude\.2\)"),
        ({"coda": ["leave", "embedding"]}, r"called embedding where enter\.0 \(prelude\.0\) was expected"),
        ({"coda": ["leave", "spare"]}, r"ended after 2 prelude visits, \d recurrences .* where spare \(coda\.1\)"),
        ({"recurrent": "cycle.2"}, r"recurrent='cycle\.2' leads nowhere: ModuleList has no module '2', but 0, 1"),
        ({"recurrent": "cycles"}, r"has no module 'cycles', but embedding, enter, cycle"),
        ({"prelude": []}, r"prelude=\[\] holds no layer"),
        ({"prelude": None, "recurrent": None}, "no layer to watch"),
        ({"loop_end": "norm"}, r"loop_end='norm' was called 0 times"),
        ({"set_recurrences": "loop"}, r"set_recurrences='loop' leads nowhere"),
        ({"set_recurrences": "random_state"}, "must be a whole number in the model, which has False"),
        ({"set_recurrences": "unused"}, r"'unused' changed nothing: .* called cycle\.0 3 times .* loops does"),
        ({"recurrent": None, "prelude": ["enter"], "coda": None}, "mean nothing without recurrent layers"),
        ({"trained_recurrences": 4}, "trained_recurrences=4, but the model's own number is 3"),
        ({"recurrent": ["cycle", nn.Linear(2, 2)]}, "was given a Linear that is no part of the model"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_named(change: dict[str, Any], message: str) -> None:
    model = ForeignLoop()
    model.spare, model.unused = nn.Linear(2, 2), 3  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=message):
        loopscope.hook(model, **(PATHS | change))
    assert_untouched(model)
    assert model.training


def test_a_model_that_cannot_be_run_as_it_is_says_how_it_could() -> None:
    class Strange(ForeignLoop):
        def forward(self, tokens: Tensor, *, steps: int) -> Tensor:  # type: ignore[override]
            self.loops = steps
            return super().forward(tokens)["logits"]

    with pytest.raises(ConfigError, match=r"failed when it was tried .* 'steps'.*forward="):
        loopscope.hook(Strange(), **PATHS)
    subject = loopscope.hook(
        Strange(),
        **PATHS | {"set_recurrences": lambda _, recurrences: {"steps": recurrences}},
        trained_recurrences=4,
    )
    assert loopscope.capture(subject, BATCH.input_ids).recurrences == 4
    other = loopscope.hook(
        Strange(),
        **PATHS | {"set_recurrences": lambda _, recurrences: {"count": recurrences}},
        trained_recurrences=4,
        forward=lambda model, input_ids, mask, count: model(input_ids, steps=count),
    )
    assert loopscope.capture(other, BATCH.input_ids, recurrences=2).recurrences == 2


def test_without_a_way_to_set_recurrences_only_the_models_own_number_runs() -> None:
    subject = loopscope.hook(ForeignLoop(), **PATHS | {"set_recurrences": None})
    assert loopscope.capture(subject, BATCH.input_ids).recurrences == 3
    with pytest.raises(ConfigError, match="runs its own 3 recurrences, and 4 were asked for; tell"):
        loopscope.capture(subject, BATCH.input_ids, recurrences=4)
    with pytest.raises(ConfigError, match="cannot give it another initial state"):
        loopscope.capture(subject, BATCH.input_ids, initial_state=torch.zeros(3, 5, 12))


def test_a_run_knows_its_end() -> None:
    subject = loopscope.hook(ForeignLoop(), **PATHS)
    run = subject.start(BATCH, recurrences=1)
    with pytest.raises(ConfigError, match="after at least one recurrence"):
        run.decode()
    run.advance()
    with pytest.raises(ConfigError, match="started for 1 recurrences, which are done"):
        run.advance()
    run.close()
    with pytest.raises(ConfigError, match="closed"):
        run.decode()


def test_a_model_without_a_head_is_refused() -> None:
    class Headless(ForeignLoop):
        def forward(self, tokens: Tensor) -> Any:  # type: ignore[override]
            return torch.zeros(2, 3) if self.loops == 1 else super().forward(tokens)["logits"].sum(-1)

    with pytest.raises(ConfigError, match=r"returned torch.float32 of shape \(1, 11\) for \(1, 11\) tokens, where"):
        loopscope.hook(Headless(), **PATHS)


def test_padding_of_a_model_that_takes_no_mask_is_hidden_by_causality_or_left_out() -> None:
    class Maskless(ForeignLoop):
        def forward(self, tokens: Tensor) -> Any:  # type: ignore[override]
            return super().forward(tokens)

    causal = loopscope.hook(Maskless(), **PATHS)
    whole = loopscope.capture(causal, [[3, 1, 4, 1, 5], [9, 2]])
    alone = loopscope.capture(causal, [[9, 2]])
    torch.testing.assert_close(whole.logits[1:, :2], alone.logits, rtol=1e-5, atol=1e-6)
    assert any("takes no attention_mask" in sentence for sentence in causal.unobservable)
    looks_ahead = loopscope.hook(Maskless(causal=False), **PATHS)
    assert any("is not causal, so its tokens would look at padding" in each for each in looks_ahead.unobservable)
    apart = loopscope.capture(looks_ahead, [[3, 1, 4], [9, 2]])
    torch.testing.assert_close(apart.logits[1:, :2], loopscope.capture(looks_ahead, [[9, 2]]).logits)


def test_random_initial_states_are_a_function_of_the_seed() -> None:
    model = ForeignLoop(random_state=True)
    subject = loopscope.hook(model, **PATHS)
    assert subject.facts.random
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = loopscope.capture(subject, BATCH.input_ids, recurrences=2, seed=1)
    # Two runs in lockstep, with answers in between, and random numbers drawn outside.
    runs = [subject.start(BATCH, recurrences=2, seed=seed) for seed in (1, 2)]
    for _ in range(2):
        for run in runs:
            run.advance()
            run.decode()
    assert torch.equal(torch.rand(3), expected)
    assert runs[0].state is not None
    assert runs[1].state is not None
    unpadded = loopscope.capture(subject, BATCH.input_ids, attention_mask=BATCH.mask, recurrences=2, seed=1)
    assert torch.equal(runs[0].state, unpadded.loop_state(2))
    assert not torch.equal(runs[0].state, runs[1].state)
    assert torch.equal(first.injected(1), loopscope.capture(subject, BATCH.input_ids, seed=1).injected(1))
    assert not torch.equal(first.injected(1), loopscope.capture(subject, BATCH.input_ids, seed=2).injected(1))
    assert any("drawn for a whole batch" in sentence for sentence in subject.unobservable)


def test_states_that_the_model_overwrites_are_copied() -> None:
    plain, in_place = (loopscope.hook(ForeignLoop(in_place=value), **PATHS) for value in (False, True))
    assert in_place.facts.overwrites
    assert not plain.facts.overwrites
    traces = [loopscope.capture(subject, BATCH.input_ids, attention=True) for subject in (plain, in_place)]
    assert_same(*traces)


def test_one_token_and_one_layer() -> None:
    model = LoopedTransformer(architecture(recurrent=1, prelude=0, coda=0)).initialize(0).eval()
    subject = loopscope.hook(
        model, recurrent=model.recurrent[0], set_recurrences=lambda _, count: {"recurrences": count}
    )
    trace = loopscope.capture(subject, [[5]], recurrences=3, attention=True)
    assert torch.equal(trace.attention("recurrent", 0, 3), torch.ones(1, 2, 1, 1))


class Recorder(Observer):
    def __init__(self) -> None:
        self.visits: list[Visit] = []

    def visit(self, visit: Visit) -> None:
        self.visits.append(visit)
