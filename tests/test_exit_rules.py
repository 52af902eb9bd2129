"""What exit rules would have saved and cost, against loops over tokens and against what the model itself answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

import loopscope
from foreign_models import PATHS, ForeignLoop
from loopscope import AnalyzeSettings, Study, Trace, analyze, capture
from loopscope.analysis.job import SilentProgress
from loopscope.analysis.settings import parts_except
from loopscope.answers.answer import Answer, Criterion, Outcome
from loopscope.answers.exit_rules import (
    ExitTables,
    Readouts,
    constant_at,
    constant_table,
    exit_costs,
    exit_table,
    exit_tables,
    spread_thresholds,
    stop_times,
    tables_of,
)
from loopscope.answers.exit_signals import SIGNALS
from loopscope.answers.quick import quick_answers
from loopscope.errors import ConfigError
from loopscope.measures import readout
from loopscope.measures.readout import kl_divergence
from loopscope.models.architecture import Architecture
from loopscope.models.native.subject import NativeSubject
from loopscope.models.subject import Batch
from loopscope.study import view_study
from small_models import FEED_FORWARD, GATED, INJECTED, LOOP_NORM, PROMPTS, RESIDUAL_NORM, subject
from synthetic_study import contracting, feed_forward_study, looped_study, overflowing

Array = NDArray[np.float64]

SETTINGS = AnalyzeSettings(
    recurrences=6,
    horizon=4,
    exit_recurrences=5,
    batch_size=3,
    track=(),
    seed=3,
    skip=("behaviour", "stability", "maps"),
)
COSTS = ("recurrences", "loss", "loss_difference", "changed", "kl")


def tables_of_study(study: Study) -> ExitTables:
    found = exit_tables(study)
    assert found is not None
    return found


# Stopping, as functions of arrays


@st.composite
def signals(draw: st.DrawFn) -> Array:
    """(recurrence, prompt, token), with ties, zeros and recurrences of which nothing is known."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 4)))
    values = st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0, np.nan]) | st.floats(1e-3, 2.0)
    return draw(arrays.arrays(np.float64, shape, elements=values))


def some_readouts(shape: tuple[int, ...], seed: int = 0, padded: bool = True) -> Readouts:
    """The last token of a prompt has no loss; behind the first prompt there is padding, where there is room."""
    rng = np.random.default_rng(seed)
    loss, kl = rng.exponential(size=(2, *shape))
    top1 = rng.integers(0, 3, size=shape)
    loss[..., -1] = np.nan
    if padded and shape[2] > 1:
        loss[:, 0, -2:], kl[:, 0, -1], top1[:, 0, -1] = np.nan, np.nan, -1
    kl[-1] *= 0
    return Readouts(loss=loss, kl=kl, top1=top1)


@given(signal=signals(), threshold=st.floats(0, 2), at_least=st.booleans())
def test_a_token_stops_where_its_signal_first_crosses_the_threshold(
    signal: Array, threshold: float, at_least: bool
) -> None:
    found = stop_times(signal, threshold, at_least=at_least)
    for prompt, token in np.ndindex(signal.shape[1:]):
        wanted = len(signal)
        for recurrence in range(len(signal)):
            value = signal[recurrence, prompt, token]
            if value >= threshold if at_least else value <= threshold:
                wanted = recurrence + 1
                break
        assert found[prompt, token] == wanted


@given(signal=signals(), thresholds=st.lists(st.floats(0, 3), min_size=2, max_size=5).map(sorted))
def test_a_looser_threshold_never_takes_more_recurrences(signal: Array, thresholds: list[float]) -> None:
    readouts = some_readouts(signal.shape)
    loose_last = exit_table(signal, thresholds, readouts)["recurrences"].values
    assert (np.diff(loose_last, axis=0) <= 0).all()
    loose_first = exit_table(signal, thresholds, readouts, at_least=True)["recurrences"].values
    assert (np.diff(loose_first, axis=0) >= 0).all()


@given(signal=signals())
def test_the_ends_of_the_thresholds_stop_everything_or_nothing(signal: Array) -> None:
    first_known = np.where(np.isnan(signal).all(0), len(signal), (~np.isnan(signal)).argmax(0) + 1)
    assert (stop_times(signal, np.inf) == first_known).all()
    zero = np.where((signal == 0).any(0), (signal == 0).argmax(0) + 1, len(signal))
    assert (stop_times(signal, 0.0) == zero).all()
    assert (stop_times(signal, -1e-9) == len(signal)).all()
    assert (stop_times(signal, np.inf, at_least=True) == len(signal)).all()


@given(signal=signals(), threshold=st.floats(0, 2), seed=st.integers(0, 5))
def test_costs_are_means_over_the_tokens_of_a_prompt(signal: Array, threshold: float, seed: int) -> None:
    readouts = some_readouts(signal.shape, seed)
    stops = stop_times(signal, threshold)
    found = exit_costs(stops, readouts)
    for prompt in range(signal.shape[1]):
        wanted: dict[str, list[float]] = {name: [] for name in COSTS}
        for token in range(signal.shape[2]):
            at = stops[prompt, token] - 1
            if readouts.top1[-1, prompt, token] < 0:
                continue
            wanted["recurrences"].append(at + 1)
            wanted["changed"].append(readouts.top1[at, prompt, token] != readouts.top1[-1, prompt, token])
            wanted["kl"].append(readouts.kl[at, prompt, token])
            loss = readouts.loss[:, prompt, token]
            if not np.isnan(loss[-1]):
                wanted["loss"].append(loss[at])
                wanted["loss_difference"].append(loss[at] - loss[-1])
        for name, values in wanted.items():
            mean = np.mean(values) if values else np.nan
            np.testing.assert_allclose(found[name][prompt], mean, rtol=1e-12, atol=1e-12, err_msg=name)


def test_the_same_number_for_all_costs_what_that_readout_costs() -> None:
    readouts = some_readouts((5, 3, 4))
    found = constant_table(readouts)
    assert found["threshold"].values.tolist() == [1, 2, 3, 4, 5]
    for count in range(1, 6):
        at = found.sel(threshold=count)
        assert (at["recurrences"] == count).all()
        np.testing.assert_allclose(at["loss"], np.nanmean(readouts.loss[count - 1], axis=-1))
        np.testing.assert_allclose(at["kl"], np.nanmean(readouts.kl[count - 1], axis=-1))
    last = found.isel(threshold=-1)
    assert all((last[name] == 0).all() for name in ("changed", "kl", "loss_difference"))


@given(recurrences=st.floats(1, 5))
def test_between_whole_numbers_tokens_are_drawn_at_random(recurrences: float) -> None:
    readouts = some_readouts((5, 1, 4000), padded=False)
    found = constant_at(constant_table(readouts), recurrences)
    below = int(recurrences)
    draw = np.random.default_rng(0).uniform(size=(1, 4000)) < recurrences - below
    drawn = exit_costs(below + draw.astype(int), readouts)
    assert float(found["recurrences"][0]) == pytest.approx(recurrences)
    for name in COSTS:
        # Five standard errors of a mean of exponentially distributed numbers.
        assert float(abs(found[name].values - drawn[name])[0]) < 5 * 2 / np.sqrt(4000), name


@pytest.mark.parametrize("at_least", [False, True])
def test_thresholds_are_spread_evenly_over_the_recurrences_that_can_be_saved(at_least: bool) -> None:
    signal = np.random.default_rng(0).exponential(size=(5, 1, 3000)) * 0.3 ** np.arange(5)[:, None, None]
    signal[0] = np.nan  # nothing can stop after the first
    signal = -signal if at_least else signal
    readouts = some_readouts(signal.shape, padded=False)
    thresholds = spread_thresholds(signal, readouts.there, 9, at_least=at_least)
    table = exit_table(signal, list(map(float, thresholds)), readouts, at_least=at_least)
    found = np.sort(table["recurrences"].values[:, 0])
    # The nine are quantiles of four times as many numbers as there are tokens, a fourth of which nothing is known of.
    np.testing.assert_allclose(np.diff(found), 0.5, atol=0.01)
    assert found[0] == 2
    assert spread_thresholds(signal * np.nan, readouts.there, 9).size == 0


# Measured


class Slow:
    """One prompt, run to every length by itself; signals and answers token by token, in plain numpy."""

    def __init__(self, model: NativeSubject, prompt: list[int], full: int) -> None:
        self.prompt, self.full = prompt, full
        trace = capture(model, prompt, recurrences=full, seed=3, attention=True)
        self.shares = []
        for count in range(1, full + 1):
            state = capture(model, prompt, recurrences=count, seed=3).loop_state(count)
            logits = model.start(Batch.of([prompt]), recurrences=0).decode(state=state)[0].double().numpy()
            share = np.exp(logits - logits.max(-1, keepdims=True))
            self.shares.append(share / share.sum(-1, keepdims=True))
        places = [(t, token) for t in range(full) for token in range(len(prompt))]
        self.signals = {"step": {place: self._step(trace, *place) for place in places}}
        self.signals["kl"] = {(t, token): self._divergence(t - 1, t, token) for t, token in places if t}
        self.signals["attention"] = {
            (t, token): self._attention(model, trace, t, token) for t, token in places if t and token
        }
        if model.info.exit_threshold is not None:
            self.signals["gate"] = {place: self._stopped(trace, *place) for place in places}
        self._of_states(trace, places)
        self._of_predictions(places)

    def _of_states(self, trace: Trace, places: list[tuple[int, int]]) -> None:
        states = [trace.initial_state, *(trace.loop_state(t) for t in range(1, self.full + 1))]
        for name in ("cosine", "acceleration", "contraction"):
            self.signals[name] = {}
        for t, token in places:
            x, y, z = (states[max(t + 1 - back, 0)][0, token].double().numpy() for back in range(3))
            cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
            self.signals["cosine"][t, token] = float(1 - cosine)
            if t:
                step, before = np.linalg.norm(x - y), np.linalg.norm(y - z)
                rate, size = step / before, np.linalg.norm(x)
                self.signals["acceleration"][t, token] = float(np.linalg.norm(x - 2 * y + z) / size)
                left = step * rate / (1 - rate) / size if rate < 1 else np.inf
                self.signals["contraction"][t, token] = float(left)

    def _of_predictions(self, places: list[tuple[int, int]]) -> None:
        for name in ("entropy", "entropy-change", "margin", "confidence", "top1"):
            self.signals[name] = {}
        for t, token in places:
            share = self.shares[t][token]
            entropy = self.signals["entropy"]
            entropy[t, token] = float(-(share * np.log(share)).sum())
            if t:
                self.signals["entropy-change"][t, token] = abs(entropy[t, token] - entropy[t - 1, token])
            second, first = np.sort(share)[-2:]
            self.signals["margin"][t, token] = float(np.log(first / second))
            self.signals["confidence"][t, token] = float(first)
            tops = [self.shares[u][token].argmax() for u in range(t + 1)]
            same = next((back for back in range(1, t + 1) if tops[t - back] != tops[t]), t + 1)
            self.signals["top1"][t, token] = same - 1

    @staticmethod
    def _step(trace: Trace, t: int, token: int) -> float:
        before = trace.loop_state(t) if t else trace.initial_state
        now, then = (state[0, token].double().numpy() for state in (trace.loop_state(t + 1), before))
        return float(np.linalg.norm(now - then) / np.linalg.norm(now))

    def _divergence(self, t: int, u: int, token: int) -> float:
        p, q = self.shares[t][token], self.shares[u][token]
        return float((p * np.log(p / q)).sum())

    @staticmethod
    def _attention(model: NativeSubject, trace: Trace, t: int, token: int) -> float:
        moved = []
        for layer in range(model.info.recurrent):
            for head in range(model.model.architecture.heads):
                now, then = (trace.attention("recurrent", layer, u)[0, head, token].double() for u in (t + 1, t))
                moved.append(float((now - then).square().sum()))
        return float(np.sqrt(np.mean(moved)))

    @staticmethod
    def _stopped(trace: Trace, t: int, token: int) -> float:
        going = 1.0
        for u in range(t + 1):
            going *= 1 - 1 / (1 + np.exp(-float(trace.gate(u + 1)[0, token])))
        return 1 - going

    def stops(self, key: str, threshold: float) -> list[int]:
        found = []
        for token in range(len(self.prompt)):
            stop = self.full
            for t in range(self.full):
                signal = self.signals[key].get((t, token))
                if signal is not None and (signal >= threshold if SIGNALS[key].at_least else signal <= threshold):
                    stop = t + 1
                    break
            found.append(stop)
        return found

    def costs(self, stops: list[int]) -> dict[str, float]:
        rows: dict[str, list[float]] = {name: [] for name in COSTS}
        for token, stop in enumerate(stops):
            share, last = self.shares[stop - 1][token], self.shares[-1][token]
            rows["recurrences"].append(stop)
            rows["changed"].append(float(share.argmax() != last.argmax()))
            rows["kl"].append(self._divergence(self.full - 1, stop - 1, token))
            if token + 1 < len(self.prompt):
                following = self.prompt[token + 1]
                rows["loss"].append(-np.log(share[following]))
                rows["loss_difference"].append(np.log(last[following] / share[following]))
        return {name: float(np.mean(values)) if values else np.nan for name, values in rows.items()}


@pytest.mark.parametrize(
    "shape", [INJECTED, RESIDUAL_NORM, LOOP_NORM, GATED], ids=["injected", "residual", "loop", "gate"]
)
def test_every_rule_is_what_a_loop_over_recurrences_and_tokens_finds(shape: Architecture) -> None:
    model = subject(shape, dtype=torch.float64)
    study = analyze(model, PROMPTS, settings=SETTINGS)
    spread = tables_of_study(study)
    assert spread.recurrences == 5
    assert set(spread.rules) == set(SIGNALS) - ({"gate"} if not shape.exit_gate else set())
    # Away from the thresholds of the table, which are values of the signal.
    asked = {key: [1.0001 * float(each) for each in table["threshold"][::20]] for key, table in spread.rules.items()}
    tables = exit_tables(study, asked)
    assert tables is not None
    for row, prompt in enumerate(PROMPTS):
        slow = Slow(model, prompt, 5)
        cases = [
            (f"{key} {each}", slow.stops(key, each), tables.rules[key].sel(threshold=each))
            for key in asked
            for each in asked[key]
        ]
        cases += [(f"all {each}", [each] * len(prompt), tables.constant.sel(threshold=each)) for each in range(1, 6)]
        assert len(cases) > 20
        for told, stops, found in cases:
            for name, value in slow.costs(stops).items():
                got = found[name].values[row]
                np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-7, err_msg=f"{told} {name} of {prompt}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.875, 1.0])
def test_the_gate_at_the_models_own_threshold_gives_the_models_own_answers(
    threshold: float, dtype: torch.dtype
) -> None:
    model = subject(dataclasses.replace(GATED, exit_threshold=threshold), dtype=dtype)
    study = analyze(model, PROMPTS, recurrences=6, horizon=4, exit_recurrences=6, track=(), skip=("stability",))
    run = model.start(Batch.of(PROMPTS), recurrences=6)
    for _ in range(6):
        run.advance()
    answered = run.answer().argmax(-1).numpy()
    signal = study.dataset["token_exit_cumulated"].values
    stops = stop_times(signal, threshold, at_least=True)
    top1 = study.dataset["token_top1"].sel(readout_recurrence=study.dataset["exit_recurrence"].values).values
    there = top1[-1] >= 0
    assert len(np.unique(stops[there])) > (1 if threshold < 1 else 0)
    found = np.take_along_axis(top1, stops[None] - 1, axis=0)[0]
    assert (found[there] == answered[there]).all()
    tables = tables_of_study(study)
    assert tables.usual["gate"] == threshold
    own = tables.rules["gate"].sel(threshold=threshold)
    by_prompt = [np.mean(stops[row][there[row]]) for row in range(len(PROMPTS))]
    np.testing.assert_allclose(own["recurrences"], by_prompt)


def test_readouts_say_what_the_model_would_say() -> None:
    """Top token, its probability and an answer's rank after each recurrence; by norm and head within the block."""
    model = loopscope.load("demo:injected")
    assert isinstance(model, NativeSubject)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    (answer,) = tokenizer.encode(" the", add_special_tokens=False).ids
    prompts = ["Ann has 6 hens and each of", "How many"]
    settings = AnalyzeSettings(
        recurrences=3, horizon=4, exit_recurrences=3, track=(), answer=(" the",), skip=parts_except("readout")
    )
    whole = analyze(model, prompts, settings=settings)
    study = whole.dataset
    texts = dict(zip(study["predicted_token"].values.tolist(), study["predicted_text"].values.tolist(), strict=True))
    assert texts[answer].strip() == "the"
    for row, prompt in enumerate(whole.tokens):
        trace = capture(model, [list(prompt["token_ids"])], recurrences=3)
        length = trace.logits.shape[1]
        shares = trace.logits[0].double().softmax(-1)
        here = study.isel(prompt=row, token=slice(length))
        last = here.sel(readout_recurrence=3)
        assert last["token_top1"].values.tolist() == shares.argmax(-1).tolist()
        np.testing.assert_allclose(last["token_top1_probability"], shares.amax(-1), rtol=1e-5)
        found = last.sel(answer=answer)
        np.testing.assert_allclose(found["answer_log_probability"], shares[:, answer].log(), rtol=1e-5)
        assert found["answer_rank"].values.tolist() == [1 + int((one > one[answer]).sum()) for one in shares]
        within = model.model.unembed(model.model.norm(trace.residual("recurrent", 1, 3))).softmax(-1)[0]
        assert here["layer_top1"].values[1].tolist() == within.argmax(-1).tolist()
        np.testing.assert_allclose(here["layer_top1_probability"].values[1], within.amax(-1).detach(), rtol=1e-4)
        assert (here["layer_top1"].values[-1] == -1).all()
    assert (study["answer_rank"].values[0, :, 1, -1] == -1).all()


def test_a_hooked_model_is_judged_as_a_native_one() -> None:
    """The same computation by hand: a hooked model's own passes of every length, and its states."""
    hooked = loopscope.hook(ForeignLoop().eval(), **PATHS)
    prompts = [[3, 1, 4, 1, 5, 9], [2, 7, 1], [8]]
    study = analyze(hooked, prompts, recurrences=5, horizon=3, exit_recurrences=4, track=())
    tables = tables_of_study(study)
    assert set(tables.rules) == set(SIGNALS) - {"gate"}
    for row, prompt in enumerate(prompts):
        batch = Batch.of([prompt])
        logits = [hooked.bare_logits(batch, recurrences=count)[0].double().log_softmax(-1) for count in range(1, 5)]
        wanted = [float((logits[3].exp() * (logits[3] - each)).sum(-1).mean()) for each in logits]
        np.testing.assert_allclose(tables.constant["kl"][:, row], wanted, rtol=1e-4, atol=1e-6)


class Notes(SilentProgress):
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


class Foreseeing(ForeignLoop):
    """Its state is scaled by how far the loop has come."""

    def forward(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        state = self.embedding(tokens)
        for turn in range(self.loops):
            state = state * (1 + turn / self.loops)
            for block in self.cycle:
                state = block(state)
        return {"logits": self.head(self.norm(self.leave(state)))}


def test_what_would_take_long_or_mean_nothing_is_left_out_and_said() -> None:
    settings: dict[str, Any] = {"recurrences": 10, "horizon": 5, "track": (), "skip": ("heads", "stages")}
    long = ForeignLoop().eval()
    long.loops = 9
    progress = Notes()
    study = analyze(loopscope.hook(long, **PATHS), [[1, 2, 3]], progress=progress, **settings)
    assert "token_kl_to_full" not in study.dataset
    assert exit_tables(study) is None
    assert any("after each of 9 recurrences takes 45 more" in note for note in progress.notes)
    asked = analyze(loopscope.hook(long, **PATHS), [[1, 2, 3]], exit_recurrences=9, **settings)
    assert asked.dataset.sizes["exit_recurrence"] == 9
    progress = Notes()
    foreseeing = loopscope.hook(Foreseeing().eval(), recurrent="cycle", coda="leave", set_recurrences="loops")
    study = analyze(foreseeing, [[1, 2, 3]], progress=progress, exit_recurrences=3, **settings)
    assert "token_kl_to_full" not in study.dataset
    assert any("depends on how often it will run" in note for note in progress.notes)


@pytest.mark.parametrize(
    ("changes", "full", "grid"),
    [
        ({}, 4, [1, 2, 3, 4, 6]),  # the trained number
        ({"recurrences": 3}, 3, [1, 2, 3]),
        ({"recurrences": 1}, 1, [1]),
        ({"exit_recurrences": 5}, 5, [1, 2, 3, 4, 5, 6]),
        ({"exit_recurrences": 3, "readout": (6,)}, 3, [1, 2, 3, 6]),
        ({"exit_recurrences": 0}, 0, [1, 2, 4, 6]),
        ({"skip": ("readout",)}, 0, []),
    ],
)
def test_every_state_of_a_full_run_is_read_out(changes: dict[str, Any], full: int, grid: list[int]) -> None:
    settings = dataclasses.replace(SETTINGS, exit_recurrences=None)
    found = analyze(subject(), PROMPTS[:2], settings=settings, **changes).dataset
    assert found.sizes.get("exit_recurrence", 0) == full
    assert list(found.get("readout_recurrence", [])) == grid


def test_numbers_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="--exit-recurrences asks for 7 recurrences, but only 6 are measured"):
        analyze(subject(), PROMPTS, settings=SETTINGS, exit_recurrences=7)
    with pytest.raises(ConfigError, match="--exit-recurrences must not be negative, got -1"):
        AnalyzeSettings(exit_recurrences=-1)
    with pytest.raises(ConfigError, match="Unknown exit rule 'loss'; the rules are step, kl, attention, gate"):
        exit_tables(looped_study(contracting()), {"loss": [0.1]})


def test_logits_are_reduced_in_pieces_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = analyze(subject(), PROMPTS, settings=SETTINGS).dataset
    monkeypatch.setattr(readout, "_PIECE_ENTRIES", 100)  # two tokens at a time
    pieces = analyze(subject(), PROMPTS, settings=SETTINGS).dataset
    for name in ("loss", "token_loss", "token_entropy", "token_top1", "token_kl_to_previous", "token_kl_to_full"):
        np.testing.assert_allclose(pieces[name].values, whole[name].values, rtol=1e-6, atol=1e-12, err_msg=name)


@given(scores=arrays.arrays(np.float64, (2, 5), elements=st.floats(-40, 40) | st.just(-np.inf)))
def test_divergence_is_that_of_the_definition(scores: Array) -> None:
    scores[:, 0] = 0.0  # something is possible
    found = float(kl_divergence(*torch.from_numpy(scores)))
    log_p, log_q = torch.from_numpy(scores).log_softmax(-1)
    wanted = sum(float(p.exp() * (p - q)) for p, q in zip(log_p, log_q, strict=True) if p > -torch.inf)
    assert found == pytest.approx(max(wanted, 0.0), rel=1e-9, abs=1e-12)
    assert float(kl_divergence(torch.from_numpy(scores[0]), torch.from_numpy(scores[0]))) == 0


def test_a_small_divergence_is_resolved() -> None:
    """`KL(p || p + d)` is about `sum d^2 / (2 p)`, which float32 could not tell from nothing."""
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = logits + 1e-5 * torch.randn(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p, q = logits.log_softmax(-1), moved.log_softmax(-1)
    second_order = float(((q.exp() - p.exp()).square() / (2 * p.exp())).sum())
    assert float(kl_divergence(logits, moved)) == pytest.approx(second_order, rel=1e-3)


# The answer


def story(
    signal: Array | None = None,
    *,
    kl: Array,
    top1: Array,
    loss: Array | None = None,
    prompts: int = 40,
    **manifest: Any,
) -> Study:
    """A study in which every prompt has the same tokens: arrays are (recurrence, token). The step of the loop state is
    the signal, and others say nothing, but that predictions stay."""
    full, tokens = top1.shape
    study = looped_study(contracting(), prompts=prompts, tokens=tokens, trained=full, recurrences=16)
    data = study.dataset

    def put(name: str, values: Array) -> None:
        dims = data[name].dims
        changed = data[name].values.copy()
        changed[..., :full, :, :] = values[:, None]
        data[name] = (dims, changed)

    put("token_relative_step", np.full(top1.shape, np.nan) if signal is None else signal)
    silent = {name for signal in SIGNALS.values() for name in signal.variables} & set(data)
    for name in silent - {"token_relative_step", "token_top1"}:
        put(name, np.full(top1.shape, np.nan))
    put("token_kl_to_full", kl)
    put("token_top1", top1)
    put("token_loss", 2 + kl if loss is None else loss)
    study.manifest["model"].update(manifest)
    return study


def answer(study: Study, criterion: Criterion | None = None) -> Answer:
    return next(each for each in quick_answers(study, criterion) if each.key == "exit_rule")


SETTLED = np.where(np.arange(1, 9)[:, None] >= np.array([1, 1, 1, 1, 1, 1, 1, 1, 7, 8]), 0.0, 1.0)
"""Eight tokens have their answer after the first recurrence, one after the seventh and one after the eighth."""


def test_a_rule_that_knows_which_tokens_are_done_is_worth_it() -> None:
    found = answer(story(SETTLED, kl=SETTLED, top1=SETTLED.astype(np.int64)))
    assert found.outcome is Outcome.YES
    assert found.evidence["best_rule"] == "small step"
    assert found.evidence["best_recurrences"] == pytest.approx((8 * 1 + 7 + 8) / 10)
    assert found.evidence["best_tokens_changed"] == 0
    # At most 0.01 nats: with one token of ten wrong until the eighth, nearly all eight.
    assert float(found.evidence["constant_recurrences"]) == pytest.approx(8 - 0.1)
    assert found.verdict == "yes, 71 %"
    assert (
        "takes 2.3 of the 8 recurrences of a full run on average, and a fixed number would have to be 7.9"
        in found.sentence
    )
    assert "its loop state moves by at most 0 % of its norm" in found.sentence
    assert any("does not change what the others read" in limit for limit in found.limits)


def test_a_fixed_number_may_do_as_well() -> None:
    """All tokens are done after the third recurrence, and the rule sees that."""
    done = np.repeat(np.where(np.arange(1, 9) >= 3, 0.0, 1.0)[:, None], 10, axis=1)
    found = answer(story(done, kl=done, top1=done.astype(np.int64)))
    assert found.outcome is Outcome.PARTLY
    assert found.evidence["best_recurrences"] == 3
    assert found.evidence["best_loss_over_constant"] == 0
    assert float(found.evidence["constant_recurrences"]) == pytest.approx(3 - 0.01)  # 0.01 nats are tolerated
    assert "and 3.0 for every token would do as well" in found.sentence


def test_a_rule_that_stops_the_wrong_tokens_saves_nothing() -> None:
    found = answer(story(1 - SETTLED, kl=SETTLED, top1=SETTLED.astype(np.int64)))
    assert found.outcome is Outcome.NO
    assert "step_recurrences" not in found.evidence
    assert "no rule takes fewer than 8.00 of the 8 recurrences" in found.sentence


def test_the_tolerances_decide() -> None:
    study = story(SETTLED, kl=SETTLED, top1=SETTLED.astype(np.int64))
    loose = answer(study, Criterion(tokens_needed=0.5, loss_tolerance=0.5))
    assert loose.evidence["constant_recurrences"] == 1
    costly = story(SETTLED, kl=SETTLED, top1=SETTLED.astype(np.int64), loss=np.full(SETTLED.shape, 2.0))
    assert answer(costly).evidence["best_loss_difference"] == 0


def test_the_models_own_gate_is_told() -> None:
    study = story(SETTLED, kl=SETTLED, top1=SETTLED.astype(np.int64), exit_threshold=0.5)
    cumulated = np.zeros((16, 40, 10))
    cumulated[1:] = 0.7  # every token stops after the second recurrence
    study.dataset["token_exit_cumulated"] = (("recurrence", "prompt", "token"), cumulated)
    found = answer(study)
    assert found.evidence["own_gate_recurrences"] == 2
    assert found.evidence["own_gate_tokens_changed"] == pytest.approx(0.2)
    assert "The model's own gate, at its threshold of 0.5, takes 2.0 of 8; then 20 % of the most" in found.sentence
    study.manifest["model"]["exit_threshold"] = 1.0
    assert "own gate, at its threshold of 1, stops no token before" in answer(study).sentence


def test_what_holds_on_the_prompts_that_a_rule_was_chosen_on_is_judged_on_the_others() -> None:
    """Of every other prompt, the signal says that the wrong tokens are done."""
    study = story(SETTLED, kl=SETTLED, top1=SETTLED.astype(np.int64))
    study.dataset["token_relative_step"][..., 1::2, :] = 1 - study.dataset["token_relative_step"].values[..., 1::2, :]
    found = answer(study)
    assert found.outcome is Outcome.PARTLY
    assert found.evidence["best_tokens_changed"] == pytest.approx(0.2)
    assert "on the prompts that it was not chosen on it goes beyond" in found.sentence
    assert "chosen on 20 prompts, and what they take and cost is that of the other 20" in found.sentence


def test_few_prompts_judge_no_rule_and_one_token_has_no_loss() -> None:
    few = answer(story(SETTLED, kl=SETTLED, top1=SETTLED.astype(np.int64), prompts=3))
    assert (few.outcome, few.verdict) == (Outcome.CANNOT_TELL, "not judged")
    silent = np.full(SETTLED.shape, np.nan)
    found = answer(story(SETTLED, kl=SETTLED, top1=SETTLED.astype(np.int64), loss=silent))
    assert found.outcome is Outcome.YES
    assert "nats" not in found.sentence


def test_what_has_no_exit_rule_says_why() -> None:
    assert answer(looped_study(overflowing, prompts=2)).verdict == "it diverges"
    assert answer(looped_study(contracting(), recurrences=1, trained=1)).verdict == "nothing to save"
    study = looped_study(contracting())
    without = dataclasses.replace(study, dataset=study.dataset.drop_vars(["token_kl_to_full", "token_kl_to_previous"]))
    assert answer(without).verdict == "not measured"
    assert "exit_rule" not in {each.key for each in quick_answers(feed_forward_study())}
    assert "token_kl_to_full" not in analyze(subject(FEED_FORWARD), PROMPTS, track=()).dataset


def test_diverged_prompts_are_left_out() -> None:
    both = looped_study([contracting(), overflowing], prompts=10)
    tables = tables_of_study(both)
    assert tables.constant.sizes["prompt"] == 5
    all_of_them = tables_of(view_study(both), both.dataset)
    assert all_of_them is not None
    assert all_of_them.constant.sizes["prompt"] == 10


def test_the_first_token_is_not_stopped_by_its_attention() -> None:
    """It has only itself to look at, so that its map never changes."""
    study = analyze(subject(), PROMPTS, settings=SETTINGS)
    assert (study.dataset["token_attention_change"][1:, :, 0] == 0).all()
    tables = exit_tables(study, {"attention": [10.0]})
    assert tables is not None
    found = tables.rules["attention"]["recurrences"].values[0]
    wanted = [(5 + 2 * (len(prompt) - 1)) / len(prompt) for prompt in PROMPTS]
    np.testing.assert_allclose(found, wanted)
