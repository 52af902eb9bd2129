"""Support of attention, similarity of keys, and CKA, beside slow versions of the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foreign_models import PATHS, ForeignLoop
from loopscope import AnalyzeSettings, Study, Subject, Trace, analyze, capture, hook
from loopscope.analysis.settings import parts_except
from loopscope.measures.cka import linear_cka
from loopscope.measures.support import jaccard, mass_support, same_keys, strongest, support_stable_from
from loopscope.models.visits import QueryKeyAttention
from loopscope.report.figures.write import STUDY_FIGURES
from loopscope.report.settings import ReportSettings
from loopscope.study import view_study
from small_models import INJECTED, subject

GENERATOR = np.random.default_rng(0)
PROMPTS = [GENERATOR.integers(0, 48, length).tolist() for length in (40, 23, 5)]
"""Of which the last has no row with more than sixteen keys."""
SETTINGS = AnalyzeSettings(
    recurrences=5, horizon=6, support_every=3, cycle_recurrences=2, skip=parts_except("heads", "support"), track=()
)
ROWS = range(16, 40, 3)


@pytest.fixture(scope="module")
def study() -> Study:
    return analyze(subject(INJECTED, dtype=torch.float64), PROMPTS, settings=SETTINGS)


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    """A prompt each, so that nothing is padded."""
    model = subject(INJECTED, dtype=torch.float64)
    return [capture(model, prompt, recurrences=6, attention=True) for prompt in PROMPTS]


def top(row: Tensor) -> set[int]:
    return set(np.argsort(-row.numpy(), kind="stable")[:16].tolist())


def most(row: Tensor) -> set[int]:
    found, mass = set(), 0.0
    for key in np.argsort(-row.numpy(), kind="stable").tolist():
        if mass >= 0.95:
            break
        found.add(key)
        mass += float(row[key])
    return found


@pytest.mark.parametrize(("name", "support"), [("support_strongest", top), ("support_mass", most)])
def test_supports_are_those_of_the_maps(study: Study, traces: list[Trace], name: str, support: object) -> None:
    assert callable(support)
    for prompt, trace in enumerate(traces):
        rows = [row for row in ROWS if row < len(PROMPTS[prompt])]
        for layer in range(2):
            sets = [
                [[support(each[row]) for row in rows] for each in trace.attention("recurrent", layer, t)[0]]
                for t in range(1, 7)
            ]
            for ending, other in (("", lambda t: t - 1), ("_to_horizon", lambda t: 5)):
                values = study.dataset[name + ending].isel(prompt=prompt, layer=layer)
                for t in range(5):
                    for head in range(2):
                        found = values.isel(recurrence=t, head=head).item()
                        pairs = zip(sets[t][head], sets[other(t)][head], strict=True)
                        by_hand = [len(one & two) / len(one | two) for one, two in pairs]
                        if not rows or other(t) < 0:
                            assert np.isnan(found)
                        else:
                            assert found == pytest.approx(np.mean(by_hand), abs=1e-12)


def test_keys_and_cka_are_as_defined(study: Study, traces: list[Trace]) -> None:
    def keys(trace: Trace, layer: int, t: int) -> Tensor:
        view = trace.attention_view("recurrent", layer, t)
        assert isinstance(view, QueryKeyAttention)
        return view.key[0]

    for prompt, trace in enumerate(traces):
        cosine = torch.cosine_similarity(keys(trace, 1, 4), keys(trace, 1, 3), dim=-1).mean()
        found = study.dataset["key_cosine"].isel(prompt=prompt, layer=1, recurrence=3).item()
        assert found == pytest.approx(float(cosine), abs=1e-6)
        cosine = torch.cosine_similarity(keys(trace, 0, 5), keys(trace, 0, 6), dim=-1).mean()
        found = study.dataset["key_cosine_to_horizon"].isel(prompt=prompt, layer=0, recurrence=4).item()
        assert found == pytest.approx(float(cosine), abs=1e-6)

    def cka(one: Tensor, other: Tensor) -> float:
        one, other = one - one.mean(0), other - other.mean(0)
        norm = torch.linalg.matrix_norm
        return float(norm(other.T @ one) ** 2 / (norm(one.T @ one) * norm(other.T @ other)))

    first, second = ("prelude", 0, 0), ("recurrent", 1, 2)
    by_hand = [cka(trace.residual(*first)[0], trace.residual(*second)[0]) for trace in traces]  # type: ignore[arg-type]
    value = study.dataset["visit_cka"].sel(visit="prelude.0", visit_other="recurrent.1@2").item()
    assert value == pytest.approx(np.mean(by_hand), abs=1e-9)


def one_head(trace: Trace, layer: int, t: int, head: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Queries, keys and values that a query head reads, (token, head_dim), and the factor on scores."""
    view = trace.attention_view("recurrent", layer, t)
    assert isinstance(view, QueryKeyAttention)
    assert view.value is not None
    read = head * view.key.shape[1] // view.heads
    return view.query[0, head], view.key[0, read], view.value[0, read], view.scale


@pytest.mark.parametrize(
    "make", [lambda: subject(INJECTED, dtype=torch.float64), lambda: hook(ForeignLoop().double().eval(), **PATHS)]
)
def test_a_shared_cache_is_the_horizons_for_all_tokens_before(make: Callable[[], Subject]) -> None:
    model = make()
    prompts = [[token % model.info.vocab_size for token in prompt] for prompt in PROMPTS[1:]]
    study = analyze(model, prompts, settings=dataclasses.replace(SETTINGS, recurrences=6))
    data = study.dataset.sel(layer=1)
    for place, prompt in enumerate(prompts):
        trace = capture(model, prompt, recurrences=6, attention=True)
        for t, head in ((1, 1), (3, 0), (6, 0)):
            query, key, value, scale = one_head(trace, 1, t, head)
            _, last_key, last_value, _ = one_head(trace, 1, 6, head)
            found = data.isel(prompt=place, recurrence=t - 1, head=head)
            for name, now, then in (("key", key, last_key), ("value", value, last_value)):
                away = ((now - then).norm(dim=-1) / then.norm(dim=-1)).mean()
                assert found[f"cache_{name}_distance"].item() == pytest.approx(float(away), rel=1e-5, abs=1e-9)
            changes = []
            for row in range(3, len(prompt), 3):
                own = (scale * key[: row + 1] @ query[row]).softmax(0) @ value[: row + 1]
                keys = torch.cat([last_key[:row], key[row, None]])
                values = torch.cat([last_value[:row], value[row, None]])
                other = (scale * keys @ query[row]).softmax(0) @ values
                changes.append(float((other - own).norm() / own.norm()))
            change = found["cache_output_change"].item()
            assert change == pytest.approx(np.mean(changes), rel=1e-5, abs=1e-9)
            assert (change == 0) == (t == 6)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10))
def test_cka_does_not_see_turns_and_scales(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    found = linear_cka(torch.stack([states, scale * states @ turn + 3, torch.randn(9, 6, generator=generator)]))
    assert found[0, 1].item() == pytest.approx(1)
    assert torch.allclose(found, found.T, atol=1e-12)
    assert 0 <= found.min() <= found.max() <= 1 + 1e-12
    assert torch.isnan(linear_cka(torch.ones(1, 4, 3))).all()


def test_sets_by_hand() -> None:
    rows = torch.tensor([[0.5, 0.3, 0.16, 0.04], [0.04, 0.96, 0.0, 0.0]])
    assert mass_support(rows).tolist() == [[True, True, True, False], [False, True, False, False]]
    assert jaccard(mass_support(rows)[0], mass_support(rows)[1]).item() == pytest.approx(1 / 3)
    many = torch.arange(20.0)
    assert same_keys(strongest(many), strongest(-many)).item() == pytest.approx(12 / 20)
    nan = float("nan")
    assert support_stable_from(torch.tensor([nan, 0.5, 0.95, 0.9, 0.99, 0.2])).item() == 2
    assert support_stable_from(torch.tensor([nan, 1.0, 1.0, 1.0])).item() == 1
    assert torch.isnan(support_stable_from(torch.tensor([nan, 1.0, 1.0, 0.8]))).all()
    assert torch.isnan(support_stable_from(torch.tensor([nan, 1.0, 1.0]))).all()


def test_it_is_absent_unless_asked_for() -> None:
    settings = AnalyzeSettings(recurrences=2, horizon=2, skip=parts_except("heads", "support"), track=())
    found = analyze(subject(INJECTED), PROMPTS[2:], settings=settings)
    assert "support_strongest" not in found.dataset
    assert "visit_cka" not in found.dataset
    assert found.manifest["left_out"]["visit_cka"] == "it was not asked for (--support-every)"
    assert AnalyzeSettings.preset("full").support_every


def test_both_are_drawn(study: Study) -> None:
    view = view_study(study)
    for name in ("head-supports", "shared-cache", "visit-cka"):
        figure = next(each for each in STUDY_FIGURES if each.name == name)
        assert figure.absent(view) is None
        assert figure.draw(view, ReportSettings()).has_data
