"""Triton's kernels give what tiles give, in Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch

from loopscope import AnalyzeSettings, analyze
from loopscope.analysis.settings import Part
from loopscope.measures.attention import entropy_of_rows
from loopscope.models.visits import QueryKeyAttention
from small_models import PROMPTS, subject

if TYPE_CHECKING:
    from loopscope.measures.fused import MapStatistics

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is missing: pip install 'loopscope[triton]'"
)
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def statistics() -> Iterator[Callable[..., MapStatistics]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module("loopscope.measures.fused").map_statistics


def views(
    maps: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    heads: tuple[int, int] = (2, 2),
    width: int = 8,
    window: int | None = None,
    padding: tuple[int, int] = (0, 0),
    step: float = 0.1,
) -> list[QueryKeyAttention]:
    """Of two prompts, the second of which has padding at its beginning and end, that move by steps of a size."""
    generator = torch.Generator().manual_seed(0)

    def walk(count: int) -> torch.Tensor:
        start, *steps = torch.randn(maps + 1, 2, count, tokens, width, generator=generator)
        states: torch.Tensor = 1.5 * start + step * torch.stack(steps).cumsum(0)
        return states.to(dtype)

    place = torch.arange(tokens)
    end = torch.tensor([tokens, tokens - padding[1]])[:, None]
    mask = (place >= torch.tensor([0, padding[0]])[:, None]) & (place < end) if any(padding) else None
    made = zip(walk(heads[0]), walk(heads[1]), strict=True)
    return [QueryKeyAttention(query, key, width**-0.5, mask, window) for query, key in made]


@pytest.mark.parametrize(
    ("tokens", "dtype", "more"),
    [
        (37, FLOAT32, {"heads": (4, 2), "padding": (0, 5)}),
        (70, BFLOAT16, {"heads": (2, 1), "padding": (3, 4), "window": 9}),
        (66, FLOAT16, {"width": 24, "step": 1e-3}),
        (130, BFLOAT16, {"window": 65, "heads": (1, 1)}),
        (20, FLOAT32, {"padding": (0, 8), "window": 3, "step": 1e-4}),
    ],
)
def test_kernels_give_what_tiles_give(
    statistics: Callable[..., MapStatistics], tokens: int, dtype: torch.dtype, more: dict[str, Any]
) -> None:
    horizon, before, *some = views(4, tokens, dtype, **more)
    found = statistics(some, before, horizon)
    maps = torch.stack([view.probabilities() for view in some]).double()
    last, fixed = before.probabilities().double(), horizon.probabilities().double()
    torch.testing.assert_close(found.columns, maps.sum(-2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.entropy, entropy_of_rows(maps), rtol=1e-5, atol=2e-6)
    # Both sides round a score and its row's normaliser, which is as large, to float32, in each of two maps.
    products = (
        horizon.query.double() @ horizon.key.repeat_interleave(horizon.heads // horizon.key.shape[1], 1).double().mT
    )
    rounding = 2 * 2 * 2 * 2**-24 * float(products.abs().max()) * horizon.scale
    change = (maps - torch.stack((last, *maps[:-1]))).norm(dim=-1)
    torch.testing.assert_close(found.change.sqrt(), change, rtol=1e-5, atol=rounding)
    torch.testing.assert_close(found.away.sqrt(), (maps - fixed).norm(dim=-1), rtol=1e-5, atol=rounding)


def test_many_maps_are_chained_and_what_there_is_nothing_to_compare_with_is_nan(
    statistics: Callable[..., MapStatistics],
) -> None:
    """More than a program goes through; the same as one after the other."""
    before, *some = views(8, 9, FLOAT32)
    together = statistics(some, None, None)
    assert bool(together.change[0].isnan().all())
    assert bool(together.away.isnan().all())
    for index, (last, view) in enumerate(zip([before, *some[:-1]], some, strict=True)):
        alone = statistics([view], last, last)
        assert torch.equal(alone.columns[0], together.columns[index])
        assert torch.equal(alone.entropy[0], together.entropy[index])
        assert torch.equal(alone.change, alone.away)
        if index > 0:
            assert torch.equal(alone.change[0], together.change[index])


def test_an_analysis_says_whose_kernels_it_used_and_finds_the_same(
    statistics: Callable[..., MapStatistics], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = subject(dtype=BFLOAT16)
    skip: tuple[Part, ...] = (
        "behaviour",
        "twin",
        "stability",
        "path-independence",
        "readout",
        "neurons",
        "maps",
        "cycle-similarity",
    )
    settings = AnalyzeSettings(recurrences=3, horizon=4, skip=skip)
    with mock.patch("loopscope.measures.fused.map_statistics", wraps=statistics) as used:
        fused = analyze(model, PROMPTS, settings=settings)
    # A layer of the prelude, one of the coda, and two of the loop whose recurrences are done at once.
    assert used.call_count == 4
    monkeypatch.delenv("TRITON_INTERPRET")
    tiles = analyze(model, PROMPTS, settings=settings)
    assert "triton" in fused.manifest["versions"]
    assert "triton" not in tiles.manifest["versions"]
    for name, values in tiles.dataset.data_vars.items():
        found, expected = torch.from_numpy(fused.dataset[name].values), torch.from_numpy(values.values)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
