"""The measures as functions on arrays, against the obvious computation in float64 numpy."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from torch import Tensor

from loopscope._util.sites import sites_in_order
from loopscope.measures.base import masked_mean
from loopscope.measures.convergence import LEVELS
from loopscope.measures.functions import (
    cosine,
    cosine_distance,
    degeneracy,
    distance,
    layer_cosine,
    quantiles,
    relative_distance,
    residual_norm,
)
from loopscope.measures.readout import next_token_loss, readout_grid
from loopscope.measures.trajectories import principal_components
from loopscope.models.subject import Batch

Array = NDArray[np.float64]

# Whole numbers over 8 are exact in float32, and never so small that their squares vanish.
entries = st.integers(-8000, 8000).map(lambda number: number / 8)
widths = st.shared(st.integers(1, 12), key="width")
vectors = st.tuples(st.just(3), widths).flatmap(lambda shape: arrays.arrays(np.float64, shape, elements=entries))
nonzero = vectors.filter(lambda states: bool((np.linalg.norm(states, axis=-1) > 0).all()))
dtypes = st.sampled_from([torch.float32, torch.float64])


def close(found: Tensor, wanted: Array | float, dtype: torch.dtype, scale: float = 1.0) -> bool:
    """Equal but for rounding in `dtype`, relative to `scale` where numbers cancel."""
    eps = torch.finfo(dtype).eps
    return bool(np.allclose(found.double().numpy(), wanted, rtol=16 * eps, atol=16 * eps * scale, equal_nan=True))


@given(x=vectors, y=vectors, dtype=dtypes)
def test_norm_and_distance(x: Array, y: Array, dtype: torch.dtype) -> None:
    states, reference = torch.from_numpy(x).to(dtype), torch.from_numpy(y).to(dtype)
    assert close(residual_norm(states), np.sqrt((x * x).sum(-1)), dtype)
    assert close(distance(states, reference), np.sqrt(((x - y) ** 2).sum(-1)), dtype)


@given(x=nonzero, y=nonzero, dtype=dtypes)
def test_relative_distance_and_cosine(x: Array, y: Array, dtype: torch.dtype) -> None:
    states, reference = torch.from_numpy(x).to(dtype), torch.from_numpy(y).to(dtype)
    norms = np.linalg.norm(x, axis=-1), np.linalg.norm(y, axis=-1)
    assert close(relative_distance(states, reference), np.linalg.norm(x - y, axis=-1) / norms[1], dtype)
    found = cosine(states, reference)
    assert close(found, (x * y).sum(-1) / (norms[0] * norms[1]), dtype, scale=x.shape[-1])
    assert bool((found.abs() <= 1).all())


@given(x=nonzero)
def test_a_state_has_cosine_one_with_itself_and_minus_one_with_its_opposite(x: Array) -> None:
    states = torch.from_numpy(x).float()
    assert close(cosine(states, 3 * states), 1.0, torch.float32)
    assert close(cosine(states, -states), -1.0, torch.float32)


@given(turn=st.floats(1e-9, 3.1), stretch=st.floats(0, 3), seed=st.integers(0, 9), dtype=dtypes)
def test_one_minus_cosine_is_right_however_small(turn: float, stretch: float, seed: int, dtype: torch.dtype) -> None:
    """A turn of the state, and a change of its length up to three times as large."""
    one, other = np.linalg.qr(np.random.default_rng(seed).normal(size=(40, 2)))[0].T
    made = np.stack([one, (1 + stretch * turn) * (math.cos(turn) * one + math.sin(turn) * other)])
    states = torch.from_numpy(made).to(dtype)
    with localcontext(prec=60):
        x, y = ([Decimal(value) for value in row] for row in states.tolist())
        norms = [sum((value * value for value in row), Decimal()).sqrt() for row in (x, y)]
        wanted = float(1 - sum(a * b for a, b in zip(x, y, strict=True)) / (norms[0] * norms[1]))
    assert cosine_distance(states[0], states[1]).item() == pytest.approx(wanted, rel=1e-12, abs=1e-30)
    if dtype == torch.float64 and turn > 1e-6:
        assert wanted == pytest.approx(2 * math.sin(turn / 2) ** 2, rel=1e-8)


def test_one_minus_cosine_of_one_direction_and_of_opposite_ones() -> None:
    states = torch.tensor([1.0, -2.0, 2.0])
    assert cosine_distance(states, 3 * states).item() == pytest.approx(0.0, abs=1e-15)
    assert cosine_distance(states, -states).item() == pytest.approx(2.0)
    assert cosine_distance(states, torch.zeros(3)).isnan()


@pytest.mark.parametrize(("dtype", "away"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_a_distance_near_the_fixed_point_does_not_cancel(dtype: torch.dtype, away: float) -> None:
    # |x|^2 + |y|^2 - 2 x.y has an error of about eps |x|^2, which hides distances below sqrt(eps) |x|.
    point = torch.linspace(1, 2, 64, dtype=dtype)
    near = point * (1 + away)
    wanted = np.linalg.norm(near.double().numpy() - point.double().numpy())
    assert wanted > 0
    assert distance(near, point).item() == pytest.approx(wanted, rel=1e-6)
    assert relative_distance(near, point).item() == pytest.approx(away, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_anything_is_squared_or_added(dtype: torch.dtype) -> None:
    # 300^2 overflows float16; a sum of 512 ones in bfloat16 stops at 256.
    states = torch.full((2, 512), 300.0, dtype=dtype)
    other = states.clone()
    other[:, 0] = 0
    for found, wanted in (
        (residual_norm(states), 300 * math.sqrt(512)),
        (distance(states, other), 300.0),
        (cosine(states, other), math.sqrt(511 / 512)),
    ):
        assert found.dtype == torch.float32
        assert found[0].item() == pytest.approx(wanted, rel=1e-6)
    assert residual_norm(torch.ones(512, dtype=torch.float64)).dtype == torch.float64


@given(
    values=st.tuples(st.integers(1, 3), st.integers(1, 9)).flatmap(
        lambda shape: arrays.arrays(np.float64, shape, elements=entries)
    ),
    data=st.data(),
    dtype=dtypes,
)
def test_quantiles_are_numpys_over_the_tokens_without_padding(
    values: Array, data: st.DataObject, dtype: torch.dtype
) -> None:
    prompts, tokens = values.shape
    counts = data.draw(st.lists(st.integers(1, tokens), min_size=prompts, max_size=prompts))
    padded = torch.from_numpy(values).to(dtype)
    for prompt, count in enumerate(counts):
        padded[prompt, count:] = torch.nan
    found = quantiles(padded, torch.tensor(counts), torch.tensor(LEVELS, dtype=padded.dtype))
    assert found.shape == (len(LEVELS), prompts)
    for prompt, count in enumerate(counts):
        wanted = np.quantile(values[prompt, :count], LEVELS)
        assert close(found[:, prompt], wanted, dtype, scale=2000 * tokens)


def test_quantiles_take_a_count_for_all_rows_above_them() -> None:
    values = torch.arange(24.0).reshape(2, 3, 4)
    found = quantiles(values, torch.tensor([4, 2, 1]), torch.tensor([0.5]))
    assert found.tolist() == [[[1.5, 4.5, 8.0], [13.5, 16.5, 20.0]]]


def test_quantiles_of_a_token_that_is_not_finite_are_nan_and_those_of_other_prompts_are_not() -> None:
    values = torch.tensor([[1.0, torch.inf, 3.0], [1.0, 2.0, torch.nan], [torch.nan, 2.0, 3.0]])
    found = quantiles(values, torch.tensor([3, 2, 3]), torch.tensor([0.5]))
    assert found[0, 1].item() == 1.5
    assert bool(found[0, [0, 2]].isnan().all())


def test_a_masked_mean_leaves_padding_out_whatever_it_holds() -> None:
    values = torch.tensor([[1.0, 2.0, torch.nan], [4.0, torch.inf, torch.nan], [torch.nan, 1.0, 1.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    found = masked_mean(values, mask)
    assert found[:2].tolist() == [1.5, 4.0]
    assert math.isnan(found[2])


def test_layers_that_share_one_point_are_degenerate_whatever_their_norms() -> None:
    point = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    layers = point * torch.tensor([1.0, 2.0, 0.1]).reshape(3, 1, 1, 1)
    assert close(degeneracy(layers), 1.0, torch.float32)
    assert close(layer_cosine(layers), 1.0, torch.float32)


def test_layers_at_right_angles_have_degeneracy_zero() -> None:
    layers = torch.eye(3)[:, None]
    assert degeneracy(layers).tolist() == [0.0]
    assert layer_cosine(layers)[..., 0].tolist() == torch.eye(3).tolist()


def test_degeneracy_is_the_smallest_cosine_with_layer_0_token_by_token() -> None:
    # Layer 1 is far from layer 0 at token 0, layer 2 at token 1; layers 1 and 2 do not enter together.
    layers = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.6, 0.8], [1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]])
    assert degeneracy(layers).tolist() == pytest.approx([0.6, -1.0])


def test_one_layer_has_no_degeneracy() -> None:
    assert degeneracy(torch.ones(1, 2, 3)).isnan().tolist() == [True, True]


@given(
    states=arrays.arrays(np.float64, st.tuples(st.integers(2, 10), st.integers(1, 6)), elements=entries),
    components=st.integers(1, 4),
)
def test_principal_components_are_those_of_the_covariance(states: Array, components: int) -> None:
    scores, share = principal_components(states, components)
    assert scores.shape == (len(states), components)
    centred = states - states.mean(0)
    variance = np.sort(np.linalg.eigvalsh(centred.T @ centred))[::-1]
    kept = min(components, *states.shape)
    total = variance.sum()
    if total > 0:
        np.testing.assert_allclose(share[:kept], variance[:kept] / total, atol=1e-9)
        np.testing.assert_allclose((scores[:, :kept] ** 2).sum(0), variance[:kept], atol=1e-9 * total)
    else:
        assert np.isnan(share).all()
    assert np.isnan(scores[:, kept:]).all()
    assert np.isnan(share[kept:]).all()
    largest = scores[np.abs(scores[:, :kept]).argmax(0), np.arange(kept)]
    assert (largest >= 0).all()


@given(states=arrays.arrays(np.float64, st.tuples(st.integers(2, 8), st.integers(1, 5)), elements=entries))
def test_all_principal_components_together_keep_every_distance(states: Array) -> None:
    scores, _ = principal_components(states, min(states.shape))
    before = np.linalg.norm(states[:, None] - states[None], axis=-1)
    after = np.linalg.norm(scores[:, None] - scores[None], axis=-1)
    np.testing.assert_allclose(after, before, atol=1e-8)


def test_states_that_are_not_finite_have_no_components() -> None:
    scores, share = principal_components(np.array([[1.0, 2.0], [np.inf, 0.0]]), 2)
    assert np.isnan(scores).all()
    assert np.isnan(share).all()


@given(
    prompts=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=3),
    data=st.data(),
)
def test_the_loss_is_that_of_the_prompts_own_next_tokens(prompts: list[list[int]], data: st.DataObject) -> None:
    batch = Batch.of(prompts)
    shape = (*batch.input_ids.shape, 5)
    logits = data.draw(arrays.arrays(np.float64, shape, elements=st.floats(-30, 30)))
    found = next_token_loss(torch.from_numpy(logits), batch)
    for row, prompt in enumerate(prompts):
        probability = np.exp(logits[row]) / np.exp(logits[row]).sum(-1, keepdims=True)
        losses = [-np.log(probability[place, token]) for place, token in enumerate(prompt[1:])]
        wanted = np.mean(losses) if losses else np.nan
        np.testing.assert_allclose(found[row].item(), wanted, rtol=1e-9, atol=1e-9)


def test_the_loss_of_half_precision_logits_is_float32() -> None:
    loss = next_token_loss(torch.zeros(1, 3, 1000, dtype=torch.bfloat16), Batch.of([[0, 1, 2]]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(1000), rel=1e-6)


@given(trained=st.integers(1, 40), recurrences=st.integers(1, 300))
def test_the_readout_grid_has_powers_of_two_the_last_and_the_trained_number(trained: int, recurrences: int) -> None:
    powers = {2**exponent for exponent in range(12)}
    wanted = {count for count in powers | {trained, recurrences} if count <= recurrences}
    assert readout_grid(trained, recurrences) == tuple(sorted(wanted))


def test_visits_are_labelled_in_order_of_realised_depth() -> None:
    assert [site.label for site in sites_in_order(1, 2, 1, (1, 2))] == [
        "prelude.0",
        "recurrent.0@1",
        "recurrent.1@1",
        "recurrent.0@2",
        "recurrent.1@2",
        "coda.0",
    ]
    assert [site.label for site in sites_in_order(2, 0, 1, ())] == ["prelude.0", "prelude.1", "coda.0"]
