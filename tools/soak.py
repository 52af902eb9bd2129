"""A long analysis: 2,000 prompts of 1 to 2,000 tokens through one call with two workers.

    python tools/soak.py [PROMPTS]

The model is tiny, so that what would grow is loopscope's own. Prints the memory of this process and of the workers
while shards are made, by how many are done, and what is open before and after. Ends with 1 if memory grows by more than
a tenth after the first hundred (or the first tenth of fewer prompts), or a file, thread or process is left.
"""

from __future__ import annotations

import gc
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from loopscope import AnalyzeSettings, analyze
from loopscope._util.estimate import Phase
from loopscope.analysis.job import SilentProgress
from loopscope.models.architecture import Architecture
from loopscope.models.checkpoints.native import save_checkpoint
from loopscope.models.native.transformer import LoopedTransformer

LONGEST, SETTLED, ROOM = 2000, 100, 1.1
MEGABYTE = 2**20


class Watch(SilentProgress):
    """Samples memory while shards are made."""

    def __init__(self, folder: Path) -> None:
        self.shards, self.over = folder / "shards", threading.Event()
        self.samples: list[tuple[int, int, int]] = []
        """(shards that are done, bytes of this process, of the larger worker)."""
        self.thread = threading.Thread(target=self._look, daemon=True)

    def start(self, phases: Sequence[Phase]) -> None:
        """Measuring begins."""
        self.thread.start()

    def step(self, phase: str, count: int = 1) -> None:
        """The last phase puts the study together, which takes what the study takes."""
        if phase == "writing":
            self.over.set()

    def _look(self) -> None:
        own = psutil.Process()
        while not self.over.wait(0.2):
            done = sum(1 for _ in self.shards.glob("[0-9]*.npz"))
            workers = [each.memory_info().rss for each in own.children() if each.is_running()]
            if len(workers) == 2:  # they end when the last shard is there
                self.samples.append((done, own.memory_info().rss, max(workers)))


def main(count: int) -> int:
    torch.set_num_threads(1)
    generator = random.Random(0)
    # The longest first: what it takes is taken from then on.
    lengths = [LONGEST, *(generator.randint(1, LONGEST) for _ in range(count - 1))]
    prompts = [[generator.randrange(256) for _ in range(length)] for length in lengths]
    settled = min(SETTLED, count // 10)
    shape = Architecture(
        vocab_size=256, width=16, heads=2, kv_heads=1, head_dim=8, mlp_width=24, prelude=1, recurrent=1, coda=1,
        recurrences=2, injection="linear",
    )  # fmt: skip
    own = psutil.Process()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_checkpoint(folder / "model", LoopedTransformer(shape).initialize(0, 0.1))
        settings = AnalyzeSettings(
            recurrences=2, horizon=2, batch_size=1, skip=("behaviour", "stability", "heads"), track=(),
            device="cpu", threads=1, engine="processes", workers=2,
        )  # fmt: skip
        analyze(folder / "model", prompts[:3], out=folder / "first", settings=settings)  # what is loaded once
        gc.collect()
        before = own.num_fds(), own.num_threads(), len(own.children())
        watch, started = Watch(folder / "study"), time.monotonic()
        study = analyze(folder / "model", prompts, out=folder / "study", settings=settings, progress=watch)
        seconds, peak = time.monotonic() - started, own.memory_info().rss
        watch.over.set()
        watch.thread.join()
        assert study.dataset.sizes["prompt"] == count
        left = sorted(path.name for path in (folder / "study").iterdir())
        gc.collect()
        after = own.num_fds(), own.num_threads(), len(own.children())
    marks = [settled, *(count * tenth // 10 for tenth in range(2, 11, 2))]
    print(f"{count} prompts, {sum(map(len, prompts)):,} tokens, {seconds:.0f} s; MB resident while shards are made:")
    print(f"{'shards done':>12s} {'this process':>13s} {'a worker':>9s}")
    rows = []
    for begin, end in zip([0, *marks], marks, strict=False):
        inside = [each for each in watch.samples if begin <= each[0] < end] or watch.samples[-1:]
        rows.append((max(each[1] for each in inside), max(each[2] for each in inside)))
        print(f"{begin:5d} - {end:5d} {rows[-1][0] / MEGABYTE:12.0f} {rows[-1][1] / MEGABYTE:9.0f}")
    print(f"with the study, put together and read again: {peak / MEGABYTE:.0f} MB")
    print(f"files, threads, processes: {before} before, {after} after; in the folder: {', '.join(left)}")
    grown = max(last / first for first, last in zip(rows[0], rows[-1], strict=True))
    print(f"memory of the last fifth over that of the first {settled}: {grown:.3f}")
    return 0 if grown <= ROOM and after == before else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000))
