"""One implementation, every setting: the model against a plain float64 computation of the same formulas."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import loopscope
from loopscope.models.architecture import LinearScaling, Llama3Scaling, YarnScaling
from loopscope.models.native.exit import ExitRule, exit_distribution, exit_step
from loopscope.models.visits import Observer, Visit
from pairwise import pairwise
from random_model import random_ids, random_model
from slow_model import run_slowly

# The model rounds rotary frequencies to float32. With this base and heads of 8 they are powers of two, so that rounding
# changes nothing and the two computations can agree to float64's last digits.
EXACT_BASE = 2.0**16
# 1, 2^-4, 2^-8 and 2^-12 radians per position: the first three are kept and the last is divided by 8, exactly.
EXACT_SCALING = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
# As above, but 2^-4 falls between the two limits, and is interpolated.
BLENDED_SCALING = Llama3Scaling(factor=8.0, low_freq_factor=0.5, high_freq_factor=2.0, original_max_positions=128)

# Pairs 0 to 2 are the passage; its middle is 9/16 of 2^-4, which float32 holds.
YARN_SCALING = YarnScaling(factor=8.0, original_max_positions=800, attention_factor=1.25)

LOOPED: dict[str, list[Any]] = {
    "norm_placement": ["pre", "residual", "branch-in-out", "branch-out"],
    "injection": ["none", "linear", "add"],
    "loop_norm": ["none", "recurrence", "loop"],
    "qk_norm": ["none", "head", "full"],
    "qk_bias": [False, True],
    "kv_heads": [1, 2, 4],
    "rotary": ["none", "halves", "adjacent"],
    "rope_scaling": [None, EXACT_SCALING, LinearScaling(factor=4.0), YARN_SCALING],
    "window": [{}, {"sliding_window": 3}, {"sliding_window": 2, "full_attention_layers": (0,)}],
    "mlp": ["gated", "plain"],
    "activation": ["silu", "gelu", "gelu-tanh", "relu"],
    "tied_embeddings": [False, True],
    "embedding_scale": [1.0, 2.5],
    "state": ["embeddings", "given"],
    "layout": [(1, 2, 1), (0, 2, 0), (2, 1, 0), (0, 1, 2)],
}
FEED_FORWARD = LOOPED | {
    "injection": ["none"],
    "loop_norm": ["none"],
    "state": ["embeddings"],
    "layout": [(2, 0, 0), (1, 0, 1)],
}
CASES = pairwise(LOOPED) + pairwise(FEED_FORWARD)


def check(settings: dict[str, Any], tolerance: float) -> None:
    settings = dict(settings)
    given = settings.pop("state") == "given"
    prelude, recurrent, coda = settings.pop("layout")
    settings |= settings.pop("window")
    recurrences = 3 if recurrent else 1
    settings |= {"prelude": prelude, "recurrent": recurrent, "coda": coda, "recurrences": recurrences}
    model = random_model(head_dim=8, rope_base=EXACT_BASE, state_init="embeddings", **settings)
    ids = random_ids(2, 6)
    state = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(7), dtype=torch.float64) if given else None
    trace = loopscope.capture(model, ids, initial_state=state, attention=True)

    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    for row in range(2):
        slow = run_slowly(
            model.architecture,
            weights,
            ids[row].tolist(),
            recurrences,
            None if state is None else state[row].numpy(),
        )

        def close(ours: torch.Tensor, plain: np.ndarray, what: str, row: int = row) -> None:
            np.testing.assert_allclose(ours[row].numpy(), plain, rtol=tolerance, atol=tolerance, err_msg=what)

        assert trace.visits == list(slow.residual)
        for stage, layer, recurrence in trace.visits:
            site = (stage, layer, recurrence)
            close(trace.residual(*site), slow.residual[site], f"residual at {site}")
            close(trace.attention(*site), slow.attention[site], f"attention at {site}")
        assert trace.recurrences == len(slow.loop_state) == len(slow.injected)
        for recurrence in range(trace.recurrences):
            close(trace.injected(recurrence + 1), slow.injected[recurrence], f"injected at {recurrence}")
            close(trace.loop_state(recurrence + 1), slow.loop_state[recurrence], f"loop state at {recurrence}")
        for recurrence, gate in enumerate(slow.gate):
            close(trace.gate(recurrence + 1), gate, f"gate at {recurrence}")
        close(trace.logits, slow.logits, "logits")


@pytest.mark.parametrize("settings", CASES, ids=range(len(CASES)))
def test_every_setting_computes_what_it_says(settings: dict[str, Any]) -> None:
    check(settings, tolerance=1e-10)


@pytest.mark.parametrize("rotary", ["halves", "adjacent"])
def test_frequencies_between_the_limits_are_interpolated(rotary: str) -> None:
    # Looser, for the model rounds the interpolated frequencies to float32 as the published code does.
    settings = {name: values[0] for name, values in LOOPED.items()}
    check(settings | {"rotary": rotary, "rope_scaling": BLENDED_SCALING}, tolerance=1e-5)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9, 1.0])
def test_a_model_with_an_exit_gate_answers_each_token_from_where_it_stops(threshold: float) -> None:
    settings = {name: values[0] for name, values in LOOPED.items()}
    gated = {"layout": (1, 2, 0), "loop_norm": "recurrence", "exit_gate": True, "exit_threshold": threshold}
    check(settings | gated, tolerance=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 0.999999, 1.0, 2.0])
def test_the_answer_is_that_of_the_step_that_is_told(threshold: float, dtype: torch.dtype) -> None:
    """In many recurrences probabilities add up to 1 but for rounding, which must not part the two."""
    generator = torch.Generator().manual_seed(0)
    gates = [torch.randn(3, 50, generator=generator).to(dtype) for _ in range(40)]
    states = [torch.full((3, 50, 1), float(recurrence)) for recurrence in range(1, 41)]
    rule = ExitRule(threshold)
    for state, gate in zip(states, gates, strict=True):
        rule.after(state, gate)
    assert torch.equal(rule.answer(states[-1])[..., 0].long(), exit_step(exit_distribution(gates), threshold))


def test_the_exit_gate_stops_tokens_at_different_recurrences() -> None:
    model = random_model(
        coda=0, loop_norm="recurrence", exit_gate=True, exit_threshold=0.6, injection="none", state_init="embeddings"
    )
    trace = loopscope.capture(model, random_ids(2, 6), recurrences=5)
    assert len(trace.exit_step.unique()) > 1
    torch.testing.assert_close(trace.exit_distribution.sum(-1), torch.ones(2, 6, dtype=torch.float64))
    for batch, token in itertools.product(range(2), range(6)):
        step = int(trace.exit_step[batch, token])
        expected = model.unembed(trace.loop_state(step))[batch, token]
        torch.testing.assert_close(trace.logits[batch, token], expected)
        assert float(trace.exit_distribution[batch, token, : step - 1].sum()) < 0.6


def test_the_cases_hold_every_pair_of_settings() -> None:
    cases = pairwise(LOOPED)
    for (a, first), (b, second) in itertools.combinations(LOOPED.items(), 2):
        for value, other in itertools.product(first, second):
            assert any(case[a] == value and case[b] == other for case in cases), (a, value, b, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_compute_the_same_to_their_precision(dtype: torch.dtype) -> None:
    ids = random_ids(2, 6)
    exact = loopscope.capture(random_model(), ids, attention=True)
    narrow = loopscope.capture(random_model(dtype=dtype), ids, attention=True)
    assert narrow.logits.dtype == dtype
    assert narrow.attention("recurrent", 0, 1).dtype == torch.float32
    error = torch.linalg.vector_norm(narrow.logits.double() - exact.logits) / torch.linalg.vector_norm(exact.logits)
    assert 0 < float(error) < 30 * torch.finfo(dtype).eps


def test_attention_is_told_in_tiles_as_it_is_whole() -> None:
    views = []

    class Keep(Observer):
        def visit(self, visit: Visit) -> None:
            views.append(visit.attention)

    mask = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    random_model()(random_ids(2, 6), attention_mask=mask, observers=[Keep()])
    assert len(views) == 1 + 3 * 2 + 1
    for view in views:
        assert view is not None
        whole = view.probabilities()
        tiles = [view.rows(start, min(start + 4, 6)) for start in (0, 4)]
        torch.testing.assert_close(torch.cat(tiles, dim=2), whole, rtol=0, atol=1e-15)
        torch.testing.assert_close(whole.sum(-1), mask[:, None, :].expand(2, 4, 6).double())
