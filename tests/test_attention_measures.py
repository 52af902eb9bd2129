"""Attention and stage measures: known maps, a slow and obvious implementation, and equality with maps held whole."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loopscope
from loopscope import measures
from loopscope.analysis.job import SilentProgress
from loopscope.measures.heads import HEAD_NAMES, HeadMeasures, change_bound
from loopscope.measures.horizon import Horizons
from loopscope.measures.neurons import KURTOSIS, folded_output, folded_unembedding
from loopscope.measures.rank import EffectiveRank, effective_rank
from loopscope.measures.stages import STAGE_NAMES, StageMeasures
from loopscope.models.native.attention import RMSNorm
from loopscope.models.native.layer import Layer
from loopscope.models.native.subject import NativeSubject
from loopscope.models.subject import Batch
from loopscope.models.visits import QueryKeyAttention
from measuring import batch_info, watched
from random_model import random_ids, random_model


def uniform(tokens: int) -> torch.Tensor:
    """Every row spreads its attention evenly over what it can see."""
    seen = torch.ones(tokens, tokens, dtype=torch.float64).tril()
    return seen / seen.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("tokens", "sink", "concentration", "mixing"),
    [
        (8, 0.3397, 0.1512, 1.3256),
        (64, 0.0741, 0.0974, 3.2058),
        (256, 0.0239, 0.0754, 4.5596),
    ],
)
def test_uniform_causal_attention(tokens: int, sink: float, concentration: float, mixing: float) -> None:
    attention = uniform(tokens)
    assert float(measures.sink_score(attention)) == pytest.approx(sink, abs=5e-5)
    assert float(measures.colsum_concentration(attention)) == pytest.approx(concentration, abs=5e-5)
    assert float(measures.mixing_score(attention)) == pytest.approx(mixing, abs=5e-5)
    assert float(measures.relative_mixing_score(attention)) == pytest.approx(1.0)
    assert measures.uniform_causal_sink(tokens) == pytest.approx(sink, abs=5e-5)


@pytest.mark.parametrize("tokens", [2, 9, 100])
def test_attention_on_one_token_and_on_oneself(tokens: int) -> None:
    first = torch.zeros(tokens, tokens)
    first[:, 0] = 1
    itself = torch.eye(tokens)
    for attention, sink, concentration in ((first, 1.0, 1.0), (itself, 1 / tokens, 0.0)):
        assert float(measures.sink_score(attention)) == pytest.approx(sink)
        assert float(measures.colsum_concentration(attention)) == pytest.approx(concentration, abs=1e-6)
        assert float(measures.mixing_score(attention)) == 0.0
        assert float(measures.relative_mixing_score(attention)) == 0.0


def test_a_sink_anywhere_is_found() -> None:
    attention = torch.eye(6)
    attention[3:] = torch.eye(6)[2]
    assert float(measures.strongest_sink(attention)) == pytest.approx(4 / 6)
    assert int(measures.strongest_sink_position(attention)) == 2
    heads = torch.stack([attention, uniform(6).float(), torch.eye(6)])
    assert float(measures.sink_rate(heads)) == pytest.approx(1 / 3)
    assert float(measures.sink_rate(heads, position=2)) == pytest.approx(1 / 3)


def test_a_head_is_stable_from_where_its_change_stays_small() -> None:
    nothing = math.nan
    change = torch.tensor(
        [
            [nothing, 0.9, 0.2, 0.01, 0.02],  # small from the fourth on: stable after 3
            [nothing, 0.9, 0.01, 0.9, 0.02],  # small, but not for good
            [nothing, 0.01, 0.01, 0.01, 0.01],
            [nothing, 0.9, 0.9, 0.9, 0.9],
            [nothing, 0.9, 0.01, nothing, 0.01],  # what was not seen is not stable
        ]
    )
    found = measures.stable_from(change, 0.05).tolist()
    assert found[:3] == [3.0, 4.0, 1.0]
    assert math.isnan(found[3])
    assert found[4] == 4.0
    assert bool(measures.stable_from(change[:, :1], 0.05).isnan().all())


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.sampled_from([1, 2, 4]), st.floats(0.01, 10), st.floats(1e-4, 3), st.integers(0, 999))
def test_no_map_changes_by_more_than_its_queries_and_keys_allow(
    tokens: int, kv_heads: int, size: float, step: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, 3, generator=generator, dtype=torch.float64)

    query, key = size * draw(4), size * draw(kv_heads)
    before = QueryKeyAttention(query, key, 0.6, None)
    now = QueryKeyAttention(query + step * draw(4), key + step * draw(kv_heads), 0.6, None)
    change = measures.attention_distance(now.probabilities(), before.probabilities())
    most = change_bound(now, before, torch.ones(1, tokens, dtype=torch.bool))
    assert bool((change <= most * (1 + 1e-12)).all())


def test_the_bound_is_reached_in_the_limit_of_small_changes_of_an_even_choice() -> None:
    """Two keys, equally attended to, one of which moves: the softmax then changes by half of its scores' change."""
    query = torch.ones(1, 1, 2, 1, dtype=torch.float64)
    key = torch.zeros(1, 1, 2, 1, dtype=torch.float64)
    moved = key.clone()
    moved[0, 0, :, 0] = torch.tensor([1e-6, -1e-6])
    views = [QueryKeyAttention(query, each, 1.0, None) for each in (moved, key)]
    change = measures.attention_distance(views[0].probabilities(), views[1].probabilities())
    most = change_bound(views[0], views[1], torch.ones(1, 2, dtype=torch.bool))
    # Of the two rows only the second has a choice, so the bound over both is larger by sqrt(2).
    assert float(change / most) == pytest.approx(2**-0.5, rel=1e-6)


def test_numpy_in_numpy_out() -> None:
    attention = uniform(8)
    found = measures.colsum_concentration(attention.numpy())
    assert isinstance(found, np.ndarray)
    assert float(found) == float(measures.colsum_concentration(attention))
    assert isinstance(measures.residual_entropy(np.eye(3)), np.ndarray)


def random_maps(tokens: int, sharpness: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = sharpness * torch.randn(2, 3, tokens, tokens, generator=generator, dtype=torch.float64)
    hidden = torch.ones(tokens, tokens).triu(1).bool()
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.floats(0.1, 30), st.integers(0, 99))
def test_measures_of_maps_are_what_plain_loops_compute(tokens: int, sharpness: float, seed: int) -> None:
    attention = random_maps(tokens, sharpness, seed)
    other = random_maps(tokens, sharpness, seed + 1)
    for batch in range(2):
        for head in range(3):
            plain = attention[batch, head].tolist()
            columns = [sum(row[key] for row in plain) / tokens for key in range(tokens)]
            entropy = [-sum(p * math.log(p) for p in row if p > 0) for row in plain]
            difference = sum(
                (plain[i][j] - float(other[batch, head, i, j])) ** 2 for i in range(tokens) for j in range(tokens)
            )
            expected = {
                "sink_score": columns[0],
                "strongest_sink": max(columns),
                "colsum_concentration": 1 + sum(c * math.log(c) for c in columns if c > 0) / math.log(tokens),
                "mixing_score": sum(entropy) / tokens,
                "relative_mixing_score": sum(entropy[i] / math.log(i + 1) for i in range(1, tokens)) / (tokens - 1),
            }
            for name, value in expected.items():
                found = float(getattr(measures, name)(attention)[batch, head])
                assert found == pytest.approx(value, rel=1e-9, abs=1e-12), name
                assert -1e-12 <= found <= max(1.0, math.log(tokens)) + 1e-12
            distance = measures.attention_distance(attention, other)[batch, head]
            assert float(distance) == pytest.approx(math.sqrt(difference), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_residual_entropy_is_that_of_the_singular_values(tokens: int, width: int, seed: int) -> None:
    states = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    square = np.linalg.svd(states.numpy(), compute_uv=False) ** 2
    share = square / square.sum()
    entropy = -float(np.sum(share * np.log(share)))
    assert float(measures.residual_entropy(states)) == pytest.approx(entropy, rel=1e-6, abs=1e-9)
    if min(tokens, width) > 1:
        relative = float(measures.relative_residual_entropy(states))
        assert relative == pytest.approx(entropy / math.log(min(tokens, width)), rel=1e-6, abs=1e-9)


def test_massive_activations_are_found_where_they_are() -> None:
    states = torch.ones(2, 5, 4)
    states[0, 3, 1] = -50.0
    states[1, 0, 2] = 7.0
    assert measures.massive_activation(states).tolist() == [50.0, 7.0]
    assert measures.massive_activation_place(states).tolist() == [[3, 1], [0, 2]]
    # One direction holds all: massive activations count, for rows are not normalised.
    states[0, 3, 1] = 1e6
    assert float(measures.residual_entropy(states[0])) == pytest.approx(0.0, abs=1e-6)


UNIFORM = {8: (0.3397, 0.1512, 1.3256), 64: (0.0741, 0.0974, 3.2058), 256: (0.0239, 0.0754, 4.5596)}
"""Sink score of the first token, concentration and mixing score of uniform causal attention, by number of tokens."""


def test_an_analysis_finds_uniform_attention_where_queries_are_zero() -> None:
    """The table of known values, through batches, padding and tiles."""
    model = random_model(max_positions=256)
    for layer in (*model.prelude, *model.recurrent, *model.coda):
        torch.nn.init.zeros_(layer.attention.query.weight)
    prompts = [random_ids(length, seed=length).tolist() for length in UNIFORM]
    found = loopscope.analyze(NativeSubject(model), prompts, recurrences=2, horizon=2).dataset
    for prompt, expected in enumerate(UNIFORM.values()):
        for name, value in zip(("sink_score", "colsum_concentration", "mixing_score"), expected, strict=True):
            np.testing.assert_allclose(found[name].sel(prompt=prompt), value, rtol=0, atol=5e-5, err_msg=name)
        np.testing.assert_allclose(found["relative_mixing_score"].sel(prompt=prompt), 1, rtol=1e-5)
        assert (found["strongest_sink_position"].sel(prompt=prompt) == 0).all()
    # Maps that never change are stable from the first recurrence on, and alike in every visit.
    assert (found["attention_change"].sel(recurrence=2) == 0).all()
    assert (found["head_stable_from"] == 1).all()
    np.testing.assert_allclose(found["attention_cycle_distance"], 0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.floats(0.01, 40), st.integers(0, 99))
def test_entropy_is_exact_whatever_the_sharpness_of_a_map(tokens: int, sharpness: float, seed: int) -> None:
    """Rows from nearly even to nearly all on one key, where an entropy is a sum of tiny terms."""
    maps = random_maps(tokens, sharpness, seed)
    exact = torch.special.entr(maps).sum(-1)
    torch.testing.assert_close(measures.row_entropy(maps), exact, rtol=1e-13, atol=1e-300)
    torch.testing.assert_close(measures.row_entropy(maps.float()).double(), exact, rtol=2e-5, atol=1e-6)


@given(st.integers(1, 30), st.integers(0, 99))
def test_massive_activations_are_relative_to_the_lower_median(size: int, seed: int) -> None:
    states = torch.randn(2, 1, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ordered = states.abs().sort(-1).values[:, 0]
    expected = ordered[:, -1] / ordered[:, (size - 1) // 2]
    assert torch.equal(measures.massive_activation(states), expected)
    # Where gradients are asked for there are the same numbers, and all of the gradients.
    tracked = states.clone().requires_grad_()
    again = measures.massive_activation(tracked)
    assert torch.equal(again, expected)
    again.sum().backward()
    assert tracked.grad is not None
    moved = 0 if size == 1 else 2  # the largest entry and the median, where they are two
    assert (tracked.grad != 0).sum(-1).tolist() == [[moved], [moved]]


LENGTHS = (5, 9, 1)


@pytest.mark.parametrize("tile_entries", [1, 70, 2**20])
@pytest.mark.parametrize("pending_bytes", [1, 2**25])
def test_heads_in_tiles_are_what_whole_maps_give(
    tile_entries: int, pending_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of the tiles, and however many recurrences are done together."""
    monkeypatch.setattr(measures.heads, "_TILE_ENTRIES", tile_entries)
    monkeypatch.setattr(measures.heads, "_PENDING_BYTES", pending_bytes)
    subject = NativeSubject(random_model(sliding_window=4, full_attention_layers=(1,)))
    prompts = [random_ids(length, seed=length).tolist() for length in LENGTHS]
    batch, recurrences = Batch.of(prompts), 5
    trace = loopscope.capture(subject, prompts, recurrences=recurrences, attention=True)

    info = batch_info(subject, batch, recurrences=recurrences, horizon=recurrences, head_stable=0.1)
    info.horizon = Horizons(info)
    watched([info.horizon], info)
    heads = HeadMeasures(info)
    watched([heads], info)
    found = heads.result()

    def compare(name: str, place: tuple[int, ...], expected: torch.Tensor, prompt: int) -> None:
        values = found[name].values[place][:, prompt]
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6, err_msg=name)

    for prompt, length in enumerate(LENGTHS):
        for depth, (stage, layer, recurrence) in enumerate(trace.visits):
            attention = trace.attention(stage, layer, recurrence)[prompt, :, :length, :length]
            for name in HEAD_NAMES:
                compare(name, (depth,), getattr(measures, name)(attention), prompt)
            if stage != "recurrent":
                continue
            last = trace.attention(stage, layer, recurrences)[prompt, :, :length, :length]
            away = measures.attention_distance(attention, last)
            compare("attention_distance_to_horizon", (layer, recurrence - 1), away, prompt)
            change = torch.full((4,), torch.nan)
            if recurrence > 1:
                before = trace.attention(stage, layer, recurrence - 1)[prompt, :, :length, :length]
                change = measures.attention_distance(attention, before)
            compare("attention_change", (layer, recurrence - 1), change, prompt)
    ratios = found["attention_bound_ratio"].values
    assert np.isnan(ratios[:, 0]).all()
    # The prompt of one token has a map that cannot change.
    assert (ratios[:, 1:, :, :2] <= 1).all()
    assert (ratios[:, 1:, :, :2] > 0).all()


def test_stages_of_padded_prompts_are_those_of_the_prompts_alone() -> None:
    subject = NativeSubject(random_model())
    prompts = [random_ids(length, seed=length).tolist() for length in LENGTHS]
    batch, recurrences = Batch.of(prompts), 3
    trace = loopscope.capture(subject, prompts, recurrences=recurrences)
    info = batch_info(subject, batch, recurrences=recurrences)
    stages, rank = StageMeasures(info), EffectiveRank(info)
    watched([stages, rank], info)
    found = stages.result().merge(rank.result())
    for prompt, length in enumerate(LENGTHS):
        for depth, visit in enumerate(trace.visits):
            states = trace.residual(*visit)[prompt, :length]
            norms = states.norm(dim=-1)
            expected = {
                "residual_entropy": measures.residual_entropy(states),
                "relative_residual_entropy": measures.relative_residual_entropy(states),
                "mean_token_norm": norms.mean(),
                "largest_token_norm": norms.max(),
                "massive_activation": measures.massive_activation(states),
                "massive_token": measures.massive_activation_place(states)[0],
                "massive_dimension": measures.massive_activation_place(states)[1],
                "effective_rank": effective_rank(states),
            }
            assert set(expected) == {*STAGE_NAMES, "effective_rank"}
            for name, value in expected.items():
                np.testing.assert_allclose(found[name].values[depth, prompt], value, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(
    ("states", "rank"),
    [
        (torch.ones(5, 3, dtype=torch.float64), 1.0),
        (3 * torch.eye(4, 7, dtype=torch.float64), 4.0),
        # Singular values 3 and 1: shares 3/4 and 1/4, and an entropy of 0.5623.
        (torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)), 4 / 3**0.75),
    ],
)
def test_the_effective_rank_of_matrices_worked_out_by_hand(states: torch.Tensor, rank: float) -> None:
    assert float(effective_rank(states)) == pytest.approx(rank, rel=1e-12)


def test_a_state_that_is_not_finite_has_no_entropy_and_spoils_no_other() -> None:
    states = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = float(measures.residual_entropy(states[1]))
    states[0, 0, 0] = math.inf
    found = measures.residual_entropy(states)
    assert math.isnan(float(found[0]))
    assert float(found[1]) == expected


def test_a_neuron_that_writes_one_token_predicts_it_and_its_opposite_suppresses_it() -> None:
    tokens = torch.randn(500, 256, generator=torch.Generator().manual_seed(0))
    writes = torch.stack([tokens[7], -3 * tokens[7], torch.randn(256, generator=torch.Generator().manual_seed(1))])
    kurtosis, skew = measures.neuron_moments(writes.T, tokens)
    assert kurtosis[0] > KURTOSIS < kurtosis[1]
    assert skew[0] > 0 > skew[1]
    assert float(kurtosis[1]) == pytest.approx(float(kurtosis[0]), rel=1e-4)
    assert 2 < kurtosis[2] < 4


@torch.no_grad()
def test_what_a_norm_and_a_mean_do_to_a_neuron_is_folded_in() -> None:
    """A neuron that writes, through a norm, what the head reads of one token through another."""
    model = random_model(norm_placement="branch-out")  # whose norms weigh every direction differently
    layer = model.recurrent[0]
    assert isinstance(layer, Layer)
    assert isinstance(layer.norm_4, RMSNorm)
    read = folded_unembedding(model)
    layer.mlp.down.weight[:, 0] = read[5] / layer.norm_4.weight
    written = folded_output(layer)[:, 0]
    assert torch.allclose(written, read[5])
    logits = model.unembed((model.norm.weight * written)[None, None])[0, 0]
    assert torch.allclose(read @ written, logits - logits.mean())
    plain = random_model(norm_placement="pre").recurrent[0]
    assert isinstance(plain, Layer)
    assert torch.equal(folded_output(plain), plain.mlp.down.weight)


def test_models_too_large_for_their_neurons_say_so() -> None:
    class Notes(SilentProgress):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, message: str) -> None:
            self.notes.append(message)

    notes = Notes()
    subject = NativeSubject(random_model())
    study = loopscope.analyze(subject, [[1, 2, 3]], recurrences=2, horizon=2, neuron_limit=0.0, progress=notes)
    assert "neuron_kurtosis" not in study.dataset
    assert any("raise --neuron-limit" in note for note in notes.notes)
