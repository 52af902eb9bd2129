"""What `loopscope inspect` estimates for a forward pass, against the peak memory of real processes.

    python benchmarks/memory.py

Each model is run in a process of its own on the CPU; the peak is that of the process beyond what it held before.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

from loopscope.models.architecture import Architecture
from loopscope.models.inspection.facts import RunSize, Sizes, estimate_memory

WIDE = Architecture(
    vocab_size=2048,
    width=768,
    heads=12,
    kv_heads=4,
    head_dim=64,
    mlp_width=2048,
    prelude=2,
    recurrent=4,
    coda=2,
    recurrences=4,
    injection="linear",
    state_init="normal",
)
MODELS = {
    "injected, grouped heads": WIDE,
    "norms on the residual stream": dataclasses.replace(
        WIDE, kv_heads=12, norm_placement="residual", loop_norm="loop", qk_bias=True, rotary="adjacent"
    ),
    "all layers loop, norm at the end": dataclasses.replace(
        WIDE,
        kv_heads=12,
        prelude=0,
        coda=0,
        injection="none",
        state_init="embeddings",
        norm_placement="branch-in-out",
        loop_norm="recurrence",
    ),
    "large vocabulary": dataclasses.replace(WIDE, vocab_size=32768),
    "wide MLP, plain": dataclasses.replace(WIDE, mlp="plain", mlp_width=6144),
    "feed-forward, sliding window": dataclasses.replace(
        WIDE,
        prelude=8,
        recurrent=0,
        coda=0,
        recurrences=1,
        injection="none",
        state_init="embeddings",
        sliding_window=128,
    ),
}
RUNS = (
    RunSize(tokens=512, batch_size=8, recurrences=4),
    RunSize(tokens=2048, batch_size=1, recurrences=4),
    RunSize(tokens=512, batch_size=8, recurrences=4, dtype="bfloat16"),
)

_MEASURE = """
import json, resource, sys
import torch
from loopscope.models.architecture import Architecture
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.native.subject import NativeSubject
from loopscope.models.subject import Batch

fields, run = json.loads(sys.argv[1])
model = LoopedTransformer(Architecture.from_dict(fields)).initialize(0).eval().requires_grad_(False)
subject = NativeSubject(model.to(getattr(torch, run["dtype"])), weights_sha256="none")

def answer(tokens, batch_size, recurrences):
    batch = Batch.of([[1] * tokens] * batch_size)
    count = recurrences if subject.info.is_looped else 0
    going = subject.start(batch, recurrences=count)
    for _ in range(count):
        going.advance()
    going.answer()

def current():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def clear_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

answer(16, 1, 1)  # what is made once and stays
clear_peak()
before = current()
answer(run["tokens"], run["batch_size"], run["recurrences"])
print(peak() - before)
"""


def measured_activations(architecture: Architecture, run: RunSize) -> int:
    """Bytes that a run adds to its process at most."""
    arguments = json.dumps([architecture.to_dict(), dataclasses.asdict(run)])
    process = subprocess.run(
        [sys.executable, "-c", _MEASURE, arguments], capture_output=True, text=True, check=True, timeout=300
    )
    return int(process.stdout)


def main() -> None:
    for name, architecture in MODELS.items():
        for run in RUNS:
            estimate = estimate_memory(Sizes.of(architecture), run).activations
            measured = measured_activations(architecture, run)
            print(
                f"{name}, {run.batch_size} x {run.tokens} tokens, {run.dtype}: estimated {estimate / 2**20:.0f} MiB, "
                f"measured {measured / 2**20:.0f} MiB, ratio {estimate / measured:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
