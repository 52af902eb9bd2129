"""What an analysis does otherwise on a GPU, without one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loopscope.measures import heads, memory
from loopscope.measures.base import RunEnd
from loopscope.measures.horizon import Horizons
from loopscope.measures.memory import tile_entries, waiting_bytes
from loopscope.measures.readout import Readout
from loopscope.measures.registry import MEASURES, asked_for
from loopscope.measures.sinks import SinkMass
from loopscope.models import visits
from loopscope.models.subject import Batch
from loopscope.models.visits import QueryKeyAttention
from measuring import batch_info
from small_models import PROMPTS, architecture, subject

GIB = 2**30


@pytest.mark.parametrize(("gib", "entries", "waiting"), [(139, 2**27, 4.34), (80, 2**27, 2.5), (16, 2**25, 0.5)])
def test_what_is_done_at_once_follows_the_device(
    gib: int, entries: int, waiting: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor's cache, or a GPU's memory."""
    monkeypatch.setattr(memory, "gpu_bytes", lambda device: gib * GIB)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert tile_entries(gpu, 2**18) == entries
    assert tile_entries(gpu, 2**18, itemsize=8) == tile_entries(gpu, 2**18) // 2
    assert waiting_bytes(gpu, 2**25) / GIB == pytest.approx(waiting, abs=0.01)
    assert (tile_entries(cpu, 2**18), waiting_bytes(cpu, 2**25)) == (2**18, 2**25)


class NoCopies(TorchFunctionMode):
    """Refuses what is made of Python's lists or numbers and would be copied to the device, and waited for there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indexed = args[1] if func in (Tensor.__getitem__, Tensor.__setitem__) else ()
        listed = any(isinstance(each, list) for each in (indexed if isinstance(indexed, tuple) else (indexed,)))
        if listed or func in (torch.tensor, torch.as_tensor, torch.from_numpy):
            raise AssertionError(f"{func} makes a tensor of a list.")
        return func(*args, **(kwargs or {}))


class OneDevice(TorchDispatchMode):
    """Refuses operations that have tensors of two devices, a copy from one to the other among them. A tensor of no
    dimensions, which a number of Python's is made into, travels with the operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor) and leaf.ndim]
        if len({tensor.device.type for tensor in tensors}) > 1:
            raise AssertionError(f"{func} has tensors of two devices.")
        return found


@contextmanager
def nothing_waits() -> Iterator[None]:
    modes: tuple[Any, ...] = (NoCopies, OneDevice)
    with modes[0](), modes[1]():
        yield


@contextmanager
def copied_without_numbers() -> Iterator[None]:
    """Within it, copies of objects hold tensors of the device `meta`, which have no entries: whoever asks for one, or
    for what depends on one, such as how many there are of which something holds, is refused."""

    def empty(tensor: Tensor, memo: dict[int, Tensor]) -> Tensor:
        if id(tensor) not in memo:
            memo[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return memo[id(tensor)]

    with mock.patch.object(Tensor, "__deepcopy__", empty), mock.patch.object(nn.Parameter, "__deepcopy__", empty):
        yield


def test_nothing_in_a_pass_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """No measure asks for a number while visits pass, nor does the model: on a device without numbers all goes well.

    Singular values are the exception that this does not see: to find them, torch waits for a GPU itself.
    """
    monkeypatch.setattr(heads, "_PENDING_BYTES", 1)
    loop = subject(architecture(recurrent=2, prelude=1, coda=0), dtype=torch.bfloat16)
    batch, recurrences, horizon = Batch.of([*PROMPTS, list(range(20))]), 2, 20
    chosen = {"exit_recurrences": 2, "track": ("0:-1",), "map_prompts": (0,), "support_every": 2, "stop_at_rest": 16}
    info = batch_info(loop, batch, recurrences=recurrences, horizon=horizon, **chosen)
    info.second_run = info.has_twin = True
    info.horizon = Horizons(info)
    kinds = list(asked_for(info))
    assert set(kinds) == set(MEASURES) - {SinkMass}  # which no native model has
    measures = [info.horizon if kind is Horizons else kind(info) for kind in kinds]
    runs = [loop.start(batch, recurrences=2 * horizon) for _ in range(4)]
    for measure in measures:
        measure.start(runs[0].state)
    with copied_without_numbers():
        measures, runs = copy.deepcopy((measures, runs))
    long_run, twin, run, other = runs
    far = [each for each in measures if each.needs.long_run]
    near = [each for each in measures if not each.needs.long_run]
    with nothing_waits():
        for recurrence in range(2 * horizon):
            long_run.advance(far)
            if recurrence >= horizon:
                twin.advance([each.nudged for each in far if each.nudged is not None])
        for _ in range(recurrences):
            run.advance(near)
            other.advance([watcher for each in measures for watcher in each.beside])
        run.decode(near)
        (readout,) = (each for each in near if isinstance(each, Readout))
        readout.ended(RunEnd(run, lambda: None, lambda count, state: run.decode(state=state)))


def test_a_device_without_numbers_refuses_what_a_gpu_would_wait_for() -> None:
    """So that the test before can fail."""
    there, mask = torch.empty(3, 2, device="meta"), torch.ones(3, dtype=torch.bool, device="meta")
    here = torch.ones(3, dtype=torch.bool)
    waits: tuple[Callable[[], object], ...] = (
        lambda: there.cpu(),
        lambda: there.numpy(),
        lambda: float(there[0, 0]),
        lambda: bool(mask.all()),
        lambda: there[mask],
        lambda: mask.nonzero(),
        lambda: there[[0, 1]],
        lambda: there * torch.tensor([1.0, 2.0], device="meta"),
        lambda: mask & here.to("meta"),
    )
    for wait in waits:
        with nothing_waits(), pytest.raises((AssertionError, NotImplementedError, RuntimeError, TypeError)):
            wait()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_that_are_added_up_in_float32_are_those_of_widened_queries_and_keys(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's product for GPUs replaced by what it is documented to give."""

    def product(one: Tensor, other: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        assert one.dtype == other.dtype == dtype
        return torch.matmul(one.to(out_dtype), other.to(out_dtype))

    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 7, 5, generator=generator).to(dtype) for heads in (6, 3))
    view = QueryKeyAttention(query, key, 5**-0.5, torch.arange(7) < torch.tensor([[7], [4]]), window=3)
    widened = view.tile(2, 6)
    monkeypatch.setattr(visits, "_multiplies_widely", lambda query, key: True)
    monkeypatch.setattr(torch, "bmm", product)
    torch.testing.assert_close(view.tile(2, 6), widened, rtol=2e-6, atol=1e-7)
