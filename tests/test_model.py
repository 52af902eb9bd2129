"""What a user of the model relies on: padding changes nothing, nothing looks ahead, gradients stop where told."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import loopscope
from loopscope import LoopedTransformer, Observer, Trace, Visit
from loopscope.errors import ConfigError
from loopscope.models.visits import QueryKeyAttention
from random_model import random_ids, random_model

# Rows of (padding before, tokens, padding after).
ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=3)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"rotary": "adjacent", "qk_bias": True, "norm_placement": "residual", "loop_norm": "loop"},
    {"injection": "none", "state_init": "embeddings", "loop_norm": "recurrence", "qk_norm": "head"},
    {"sliding_window": 3, "full_attention_layers": (0,), "injection": "add"},
    {
        "injection": "none",
        "state_init": "embeddings",
        "loop_norm": "recurrence",
        "coda": 0,
        "exit_gate": True,
        "exit_threshold": 0.7,
    },
    {"recurrent": 0, "recurrences": 1, "injection": "none", "state_init": "embeddings"},
]
MODELS = [random_model(**variant) for variant in VARIANTS]


def padded(rows: list[tuple[int, int, int]], seed: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, with random ids in the padding, which must not matter."""
    length = max(sum(row) for row in rows)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, (before, tokens, _) in enumerate(rows):
        mask[row, before : before + tokens] = True
    return random_ids(len(rows), length, seed=seed), mask


def same(ours: Tensor, alone: Tensor) -> None:
    torch.testing.assert_close(ours, alone, rtol=1e-11, atol=1e-11)


def every_state(trace: Trace) -> list[Tensor]:
    recurrences = range(1, trace.recurrences + 1)
    return [
        *(trace.residual(*visit) for visit in trace.visits),
        *(trace.injected(recurrence) for recurrence in recurrences),
        *(trace.loop_state(recurrence) for recurrence in recurrences),
        trace.initial_state,
        trace.logits,
    ]


@pytest.mark.parametrize("model", MODELS, ids=range(len(MODELS)))
@settings(max_examples=15)
@given(rows=ROWS, seed=st.integers(0, 100))
def test_padded_prompts_equal_prompts_run_one_by_one(
    model: LoopedTransformer, rows: list[tuple[int, int, int]], seed: int
) -> None:
    ids, mask = padded(rows, seed)
    batch = loopscope.capture(model, ids, attention_mask=mask, attention=True)
    for row in range(len(rows)):
        keep = mask[row]
        alone = loopscope.capture(model, ids[row][keep], attention=True)
        for ours, theirs in zip(every_state(batch), every_state(alone), strict=True):
            assert bool(torch.isfinite(ours).all())
            same(ours[row][keep], theirs[0])
        for visit in batch.visits:
            maps = batch.attention(*visit)[row]
            same(maps[:, keep][:, :, keep], alone.attention(*visit)[0])
            assert not bool(maps[:, ~keep].any())
            assert not bool(maps[:, :, ~keep].any())


def test_positions_count_tokens_and_not_padding() -> None:
    """Attention sees only differences of positions, so the rotated queries themselves must tell where they start."""
    model = MODELS[0]
    queries = []

    class Keep(Observer):
        def visit(self, visit: Visit) -> None:
            assert isinstance(visit.attention, QueryKeyAttention)
            queries.append(visit.attention.query)

    model(
        torch.tensor([[0, 0, 4, 5], [4, 5, 6, 7]]),
        attention_mask=torch.tensor([[False] * 2 + [True] * 2, [True] * 4]),
        observers=[Keep()],
    )
    left_padded = queries[0]
    torch.testing.assert_close(left_padded[0, :, 2:], left_padded[1, :, :2], rtol=1e-12, atol=1e-12)


def test_every_query_of_a_padded_batch_may_look_somewhere() -> None:
    """Not every kernel answers a softmax over nothing with zeros; some give NaN, which then spreads into gradients."""
    mask = torch.tensor([[False, False, True, True, False], [True] * 5])
    allowed = MODELS[0].encode(random_ids(2, 5), mask).context.allowed
    assert allowed is not None
    assert bool(allowed.any(-1).all())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS, ids=range(len(VARIANTS)))
def test_gradients_of_padded_prompts_are_finite_and_those_of_the_prompts(variant: dict[str, Any], side: str) -> None:
    ids = random_ids(2, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, slice(0, 3) if side == "left" else slice(3, 6)] = False

    def loss(model: LoopedTransformer, ids: Tensor, mask: Tensor | None) -> Tensor:
        logits = model(ids, attention_mask=mask)
        chosen = logits if mask is None else logits[mask]
        return functional.log_softmax(chosen, -1).square().sum()

    together, apart = random_model(**variant), random_model(**variant)
    loss(together, ids, mask).backward()
    for row in range(2):
        loss(apart, ids[row][mask[row]][None], None).backward()
    for (name, ours), theirs in zip(together.named_parameters(), apart.parameters(), strict=True):
        if name.startswith("exit_gate"):  # it decides, and lets no gradient through
            continue
        assert ours.grad is not None, name
        assert theirs.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_a_row_without_a_token_is_refused() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ConfigError, match="row of attention_mask has no token"):
        random_model()(random_ids(2, 2), attention_mask=mask)


@pytest.mark.parametrize("changed", [0, 3, 5])
@pytest.mark.parametrize("variant", VARIANTS, ids=range(len(VARIANTS)))
def test_no_state_depends_on_a_later_token(variant: dict[str, Any], changed: int) -> None:
    model = random_model(**variant)
    ids = random_ids(1, 6)
    other = ids.clone()
    other[0, changed] = (other[0, changed] + 1) % 19
    # The model's own noise is a function of the whole prompt; a given one is not.
    state = torch.randn(1, 6, 12, dtype=torch.float64) if model.architecture.state_init == "normal" else None
    before = loopscope.capture(model, ids, initial_state=state)
    after = loopscope.capture(model, other, initial_state=state)
    for visit in before.visits:
        first, second = before.residual(*visit)[0], after.residual(*visit)[0]
        same(first[:changed], second[:changed])
        assert bool((first[changed:] - second[changed:]).abs().amax(-1).gt(1e-6).all())


@pytest.mark.parametrize("tracked", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS[:3], ids=range(3))
def test_backprop_last_cuts_the_gradient_where_detaching_does(variant: dict[str, Any], tracked: int) -> None:
    recurrences = 4
    ids = random_ids(2, 5)
    weight = torch.randn(2, 5, 19, dtype=torch.float64)
    truncated, by_hand = random_model(**variant), random_model(**variant)
    logits = truncated(ids, recurrences=recurrences, backprop_last=tracked)
    (logits * weight).sum().backward()

    sequence = by_hand.encode(ids)
    state = by_hand.initial_state(sequence, seed=0)
    for recurrence in range(1, recurrences + 1):
        state = by_hand.recur(state, sequence, recurrence)
        if recurrence <= recurrences - tracked:
            state = state.detach()
    expected = by_hand.decode(state, sequence)
    (expected * weight).sum().backward()

    assert torch.equal(logits, expected)
    for (name, ours), theirs in zip(truncated.named_parameters(), by_hand.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_truncation_changes_the_gradient_and_not_the_logits() -> None:
    ids = random_ids(1, 5)
    gradients = []
    for tracked in (1, 4, None):
        model = random_model()
        model(ids, recurrences=4, backprop_last=tracked).square().sum().backward()
        gradient = model.get_parameter("recurrent.0.mlp.up.weight").grad
        assert gradient is not None
        gradients.append(gradient)
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-3)
    assert torch.equal(gradients[1], gradients[2])


def test_initialisation_is_a_function_of_the_seed() -> None:
    model = random_model(qk_bias=True)

    def weights(seed: int, std: float = 0.02) -> dict[str, Tensor]:
        model.initialize(seed, std)
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, parameter in first.items():
        if parameter.ndim == 2:
            assert not torch.equal(parameter, other[name]), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, 0.0 if name.endswith("_bias") else 1.0)), name
    # It neither depends on torch's global generator nor disturbs it.
    torch.manual_seed(5)
    undisturbed = torch.rand(1)
    torch.manual_seed(5)
    weights(1)
    assert torch.equal(torch.rand(1), undisturbed)


@pytest.mark.parametrize("std", [0.02, 0.5])
def test_initial_matrices_have_the_standard_deviation_asked_for(std: float) -> None:
    model = random_model(vocab_size=500, width=64)
    model.initialize(0, std)
    for name in ("embedding.weight", "head.weight"):
        values = model.get_parameter(name).detach()
        # 32000 values: three standard errors of the estimate are 1.2 %.
        assert float(values.std()) == pytest.approx(std, rel=0.012)
        assert abs(float(values.mean())) < 3 * std / values.numel() ** 0.5


@pytest.mark.parametrize("recurrences", [0, -1])
def test_a_loop_runs_at_least_once(recurrences: int) -> None:
    with pytest.raises(ConfigError, match=f"at least 1, got {recurrences}"):
        random_model()(random_ids(1, 3), recurrences=recurrences)
