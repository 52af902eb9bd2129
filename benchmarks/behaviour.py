"""What verdicts cost, in time and in memory beside the states themselves.

    python benchmarks/behaviour.py
    python benchmarks/behaviour.py --tokens 2000

Trajectories of the calibration's generator, 128 recurrences x width 256: its default mix, and those of its cases that
never rest, so that every token has shapes fitted. Seconds are of processor time on one thread, and the ratio is to one
pass over the same states that centres them in float64 and makes their Gram matrices. Peaks are of
fresh processes that give large tensors back as soon as they are freed, less what they held before they judged.
"""

from __future__ import annotations

import argparse
import gc
import resource
import time

import numpy as np
import torch
from support.own_process import GIVE_MEMORY_BACK, in_a_process
from torch import Tensor

from loopscope.dynamics.trajectories.judge import judge
from loopscope.dynamics.trajectories.synthetic import CASES, generate
from loopscope.models.inspection.facts import Dtype

RECURRENCES, WIDTH = 128, 256
DISTINCT = 650
RESTING = ("contraction", "noise only")
MOST_SECONDS = 8.0
"""For 10,000 tokens; not reached."""
BLOCK = 256


def trajectories(tokens: int, dtype: Dtype, moving: bool) -> Tensor:
    """(token, recurrence, width), in the model's own number type; some hundred different ones, again and again."""
    cases = [case for case in CASES if case not in RESTING] if moving else []
    states = torch.empty(tokens, RECURRENCES, WIDTH, dtype=getattr(torch, dtype))
    count = min(DISTINCT, tokens)
    made = generate(count, seed=5, cases=cases, lengths=(RECURRENCES,), widths=(WIDTH,), dtype=dtype)
    for place, each in enumerate(made):
        states[place::count] = torch.from_numpy(each.states).to(states.dtype)
    return states


def one_pass(states: Tensor) -> None:
    """The least that a method that looks at all states in float64 has to do."""
    for some in states.split(BLOCK):
        whole = some.double()
        centred = whole - whole.mean(1, keepdim=True)
        torch.bmm(centred, centred.mT)


def seconds(tokens: int, dtype: Dtype, moving: bool) -> None:
    states = trajectories(tokens, dtype, moving)
    judge(states[:BLOCK], dtype)
    one_pass(states[:BLOCK])
    took: dict[str, float] = {}
    for name, work in (("bare", lambda: one_pass(states)), ("judge", lambda: judge(states, dtype))):
        started = time.process_time()
        work()
        took[name] = time.process_time() - started
    what = "every token moves" if moving else "default mix"
    whole = took["judge"] * 10_000 / tokens
    print(
        f"time: {dtype}, {what}, {tokens} tokens: {took['judge']:.1f} s, {took['judge'] / took['bare']:.1f} times one "
        f"float64 pass; 10,000 tokens {whole:.0f} s (at most {MOST_SECONDS:.0f})",
        flush=True,
    )


def peak(tokens: int, dtype: Dtype) -> None:
    """Print MiB that judging adds to what the process holds with the states in it."""
    states = trajectories(tokens, dtype, moving=True)
    judge(states[:8], dtype)
    gc.collect()
    held = int(np.loadtxt("/proc/self/statm", dtype=np.int64)[1]) * resource.getpagesize()
    judge(states, dtype)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3000, help="of each timing")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        peak(arguments.peak, "float32")
        return
    # Before this process grows: the system counts its peak as that of the processes that it starts.
    (small,), (large,) = (in_a_process(__file__, "--peak", str(tokens), **GIVE_MEMORY_BACK) for tokens in (1000, 2000))
    print(
        f"memory: beside the states, {small:.0f} MiB with 1,000 tokens, {large:.0f} MiB with 2,000: "
        f"{large / small:.3f} (at most 1.1)",
        flush=True,
    )
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        for moving in (False, True):
            seconds(arguments.tokens, dtype, moving)


if __name__ == "__main__":
    main()
