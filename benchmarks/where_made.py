"""What patching, steering, probes, exponents and supports of attention cost, as ratios to the runs that they need.

    python benchmarks/where_made.py

Processor time on one thread. What is measured and the bare runs beside it take turns; each number is a median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

import loopscope
from loopscope import AnalyzeSettings
from loopscope.analysis.settings import parts_except
from loopscope.models.native.subject import NativeRun, NativeSubject
from loopscope.models.subject import Batch

ROUNDS, RECURRENCES, CELLS = 5, 8, 32
PAIR = {
    "clean": "Ann has 3 apples and buys 4 more. She has 3 + 4 = <<",
    "corrupted": "Ann has 3 apples and buys 4 more. She has 5 + 4 = <<",
    "answer": "3",
    "wrong": "5",
}
TEXTS = [f"{a} + {b} = <<" for a in range(2, 8) for b in range(2, 8)]


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def ratio(work: Callable[[], object], bare: Callable[[], object]) -> float:
    work(), bare()
    return statistics.median(seconds(work) / seconds(bare) for _ in range(ROUNDS))


def bare_run(model: NativeSubject, prompts: list[list[int]], recurrences: int) -> None:
    run = model.start(Batch.of(prompts), recurrences=recurrences)
    for _ in range(recurrences):
        run.advance()
    run.answer()


def bare_cells(model: NativeSubject, prompt: list[int]) -> None:
    """The passes that a grid of residual states needs: of each cell from its recurrence on, through coda and head."""
    layers, cells = model.info, len(prompt)

    def finish(run: NativeRun, rows: int, left: int) -> None:
        while rows:
            now = min(rows, CELLS)
            forked = run.fork_rows(torch.zeros(now, dtype=torch.int64))
            for _ in range(left):
                forked.advance()
            forked.answer()
            rows -= now

    bare_run(model, [prompt], RECURRENCES)
    for start in range(0, cells * layers.prelude, CELLS):
        bare_run(model, [prompt] * min(CELLS, cells * layers.prelude - start), RECURRENCES)
    run = model.start(Batch.of([prompt]), recurrences=RECURRENCES)
    for done in range(RECURRENCES):
        finish(run, cells * layers.recurrent, RECURRENCES - done)
        run.advance()
    finish(run, cells * layers.coda, 0)
    run.answer()


def main() -> None:
    torch.set_num_threads(1)
    model = loopscope.load("demo:injected")
    assert isinstance(model, NativeSubject)
    assert model.tokenizer is not None
    ids = [list(model.tokenizer.encode(text).ids) for text in (PAIR["clean"], *TEXTS)]
    one, some = ids[0], ids[1:]
    found = ratio(lambda: loopscope.patch(model, [PAIR], recurrences=RECURRENCES), lambda: bare_cells(model, one))
    print(f"patching, residual     {found:5.2f} of the forward passes that its cells need (bound: 1.2)")
    found = ratio(
        lambda: loopscope.steer(model, some, towards=some[:4], away=some[4:8], at=[2], recurrences=16),
        lambda: bare_run(model, some, 16),
    )
    print(f"steering               {found:5.2f} runs of the prompts (3 are made, and two of the contrasts)")
    labels = [text[0] for text in TEXTS]
    found = ratio(lambda: loopscope.probe(model, some, labels, recurrences=16), lambda: bare_run(model, some, 16))
    print(f"probes of a label      {found:5.2f} runs ({len(TEXTS)} prompts, every visit, 20 shuffles each)")
    found = ratio(
        lambda: loopscope.lyapunov_exponents(model, some[:4], recurrences=16, exponents=2),
        lambda: bare_run(model, some[:4], 16),
    )
    print(f"two exponents          {found:5.2f} runs")
    long = [token for each in some for token in each][:128]
    settings = AnalyzeSettings(recurrences=16, horizon=16, skip=parts_except("heads", "support"), track=())

    def analysis(every: int) -> Callable[[], object]:
        return lambda: loopscope.analyze(model, [long] * 2, settings=settings, support_every=every, progress=False)

    found = ratio(analysis(8), analysis(0))
    print(f"supports, cache, CKA   {found:5.2f} of an analysis of heads alone")
    found = ratio(analysis(8), lambda: bare_run(model, [long] * 2, 48))
    print(f"                       {found:5.2f} of its bare forward passes")


if __name__ == "__main__":
    main()
