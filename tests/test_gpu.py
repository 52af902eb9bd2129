"""What an analysis does otherwise on a GPU, without one."""

from __future__ import annotations

import pytest
import torch

from loopscope.measures import memory
from loopscope.measures.memory import tile_entries, waiting_bytes

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
