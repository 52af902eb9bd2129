"""What memory is said to be needed, against the peaks of real processes on the CPU.

    python benchmarks/memory.py            forward passes (`loopscope inspect`), then whole analyses
    python benchmarks/memory.py passes
    python benchmarks/memory.py analyses   all that `analyze` does with one batch, everything on, in eight shapes
    python benchmarks/memory.py growth questions.jsonl    peaks of `demo:injected` at R = H = 32 and 256, 16 questions
    python benchmarks/memory.py depth      24 layers of width 512, 8 x 100 tokens, H = 128 (an hour)

Each model is run in a process of its own; the peak is that of the process beyond what it held before. Large tensors are
given back as soon as they are freed: what the C library keeps of them varies by chance.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from support.own_process import GIVE_MEMORY_BACK, in_a_process, memory
from torch import Tensor, nn
from torch.nn import functional

import loopscope
from loopscope.analysis.job import Job, SilentProgress
from loopscope.analysis.settings import AnalyzeSettings
from loopscope.models.architecture import Architecture
from loopscope.models.inspection.facts import RunSize, Sizes, estimate_memory
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.subject import Batch, Subject
from loopscope.prompts.prompt import TokenizedPrompt

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

_NARROW = dataclasses.replace(WIDE, width=96, heads=6, kv_heads=6, head_dim=16, mlp_width=256)
_SMALL = dataclasses.replace(_NARROW, width=128, heads=4, kv_heads=4, head_dim=32, prelude=1, recurrent=2, coda=1)
_OURO = dataclasses.replace(
    WIDE, width=512, heads=8, kv_heads=8, mlp_width=1408, prelude=0, recurrent=24, coda=0, injection="none",
    state_init="embeddings", loop_norm="recurrence", norm_placement="branch-in-out",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """Of an analysis."""

    architecture: Architecture | None
    """None for a model that is watched through hooks."""
    prompts: tuple[int, ...]
    """Tokens of each."""
    recurrences: int
    horizon: int
    keep_limit: int = 0
    """MiB."""
    together: bool = True
    """Whether all prompts are run at once, rather than as many as `analyze` takes."""


CASES = {
    "small width": Case(_NARROW, (100,) * 8, 16, 32),
    "small width, states kept": Case(_NARROW, (60, 80, 100, 70, 90, 100, 50, 60), 32, 32, 1000),
    "large width": Case(dataclasses.replace(WIDE, prelude=1, recurrent=2, coda=1), (64, 64), 8, 16),
    "long tokens": Case(_SMALL, (1024,), 4, 16),
    "many recurrences": Case(_SMALL, (64,) * 4, 192, 192),
    "many heads": Case(dataclasses.replace(_SMALL, width=256, heads=32, kv_heads=32, head_dim=8), (128,) * 4, 8, 16),
    "many layers": Case(
        dataclasses.replace(_OURO, width=128, heads=4, kv_heads=4, head_dim=32, mlp_width=352), (100,) * 4, 8, 16
    ),
    "hooked": Case(None, (128,) * 4, 16, 32),
}
DEPTH = Case(_OURO, (100,) * 8, 16, 128, together=False)


class Layer(nn.Module):
    """Of a model that loopscope knows nothing of."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        after: Tensor = x + self.mlp(self.norm_2(x))
        return after


class Foreign(nn.Module):
    """A looped model of such layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head, self.loops = nn.Embedding(2048, 256), nn.Linear(256, 2048), 4
        self.entry, self.body = nn.ModuleList([Layer(256, 4)]), nn.ModuleList([Layer(256, 4) for _ in "ab"])

    def forward(self, tokens: Tensor) -> Tensor:
        encoded = state = self.entry[0](self.embedding(tokens))
        for _ in range(self.loops):
            state = state + encoded
            for layer in self.body:
                state = layer(state)
        logits: Tensor = self.head(state)
        return logits


def subject_of(architecture: Architecture | None, dtype: str = "float32") -> Subject:
    if architecture is None:
        return loopscope.hook(Foreign().eval(), prelude="entry", recurrent="body", set_recurrences="loops")
    model = LoopedTransformer(architecture).initialize(0).eval().requires_grad_(False)
    return NativeSubject(model.to(getattr(torch, dtype)), weights_sha256="none")


def current() -> int:
    """Bytes of this process, after what was freed has gone back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def clear_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    return int(memory("VmHWM") * 2**20)


def pass_once(architecture: Architecture, run: RunSize) -> int:
    subject = subject_of(architecture, run.dtype)

    def answer(tokens: int, batch_size: int, recurrences: int) -> None:
        count = recurrences if subject.info.is_looped else 0
        going = subject.start(Batch.of([[1] * tokens] * batch_size), recurrences=count)
        for _ in range(count):
            going.advance()
        going.answer()

    answer(16, 1, 1)  # what is made once and stays
    before = current()
    clear_peak()
    answer(run.tokens, run.batch_size, run.recurrences)
    return peak() - before


def analyse_once(case: Case) -> tuple[int, int]:
    """Bytes that are said to be needed, and that are."""
    subject = subject_of(case.architecture)
    tokens = np.random.default_rng(0)

    def job(lengths: tuple[int, ...], recurrences: int, horizon: int) -> Job:
        settings = AnalyzeSettings(
            recurrences=recurrences,
            horizon=horizon,
            batch_size=len(lengths) if case.together else "auto",
            keep_limit=case.keep_limit,
            threads=1,
        )
        texts = [tokens.integers(0, subject.info.vocab_size, size=length).tolist() for length in lengths]
        prompts = [
            TokenizedPrompt(str(index), None, tuple(ids), tuple(map(str, ids)), 0) for index, ids in enumerate(texts)
        ]
        return Job(subject, prompts, settings, SilentProgress())

    job((12, 12), 4, 8).run_in_memory()  # what is imported and made once
    work = job(case.prompts, case.recurrences, case.horizon)
    before = current()
    clear_peak()
    work.run_in_memory()
    return work.needed, peak() - before


def peak_of_a_study(questions: str, recurrences: int, *keep: str) -> int:
    """Bytes of the whole process, everything on."""
    with tempfile.TemporaryDirectory() as folder:
        loopscope.analyze(
            "demo:injected",
            questions,
            field="question",
            limit=16,
            out=folder,
            device="cpu",
            recurrences=recurrences,
            horizon=recurrences,
            keep_limit=0 if keep else None,
        )
    return peak()


def apart(*arguments: str) -> list[int]:
    """Bytes that this script prints in a process of its own."""
    return [int(number) for number in in_a_process(__file__, *arguments, **GIVE_MEMORY_BACK)]


def measured_activations(architecture: Architecture, run: RunSize) -> int:
    """Bytes that a run adds to its process at most."""
    return apart("pass-once", json.dumps([architecture.to_dict(), dataclasses.asdict(run)]))[0]


def say(name: str, said: int, measured: int) -> None:
    print(
        f"{name}: said {said / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB, ratio {said / measured:.2f}",
        flush=True,
    )


def main(what: str) -> None:
    if what in ("all", "passes"):
        for name, architecture in MODELS.items():
            for run in RUNS:
                said = estimate_memory(Sizes.of(architecture), run).activations
                measured = measured_activations(architecture, run)
                say(f"{name}, {run.batch_size} x {run.tokens} tokens, {run.dtype}", said, measured)
    if what in ("all", "analyses"):
        for name in CASES:
            say(f"analysis, {name}", *apart("analyse-once", name))
    if what == "growth":
        for keep in ((), ("keep-none",)):
            small, large = (apart("study", sys.argv[2], count, *keep)[0] for count in ("32", "256"))
            shown = f"{small / 2**20:.0f} and {large / 2**20:.0f} MiB, ratio {large / small:.2f}"
            print(f"peak at R = H = 32 and 256{', --keep-limit 0' if keep else ''}: {shown}", flush=True)
    if what == "depth":
        say("analysis, 24 layers of width 512", *apart("analyse-once", "depth"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["analyse-once"]:
        print(*analyse_once((CASES | {"depth": DEPTH})[sys.argv[2]]))
    elif sys.argv[1:2] == ["study"]:
        print(peak_of_a_study(sys.argv[2], int(sys.argv[3]), *sys.argv[4:]))
    elif sys.argv[1:2] == ["pass-once"]:
        fields, size = json.loads(sys.argv[2])
        print(pass_once(Architecture.from_dict(fields), RunSize(**size)))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else "all")
