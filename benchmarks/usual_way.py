"""Heads and stages measured while a model runs, beside the usual way: keep everything, reduce afterwards.

    python benchmarks/usual_way.py

The usual way is the forward pass of a transformers model with eager attention that returns all hidden states and all
attention maps, which the functions of `loopscope.measures` then reduce one by one. The others run the same weights
natively: once to the last recurrence, whose maps the others are compared with, and once more to be measured; or once,
keeping states, queries and keys, which are measured afterwards. An analysis does the latter by itself where they take
at most an eighth of the free memory (`--keep-limit`); which of the two it would do here is printed.

The model is a random Llama of width 1024 with 16 heads, (1, 2 ⊗ R, 1), on one prompt of 512 tokens. Each run is a
process of its own, which gives large tensors back to the system as soon as they are freed, so that the memory is what
the work needs and not what the C library keeps: seconds of processor time, and the peak resident size (VmHWM) beyond
that of the process with the model loaded. The numbers of both are compared: both do the same work.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from support.own_process import GIVE_MEMORY_BACK, in_a_process, memory
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from loopscope import AnalyzeSettings, measures
from loopscope.analysis.memory import MemoryPlan
from loopscope.analysis.plan import choose
from loopscope.measures.base import BatchInfo
from loopscope.measures.heads import HEAD_NAMES, HeadMeasures
from loopscope.measures.horizon import Horizons
from loopscope.measures.similarity import AttentionCycle
from loopscope.measures.stages import StageMeasures
from loopscope.models.architecture import Architecture
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.subject import Batch
from loopscope.models.visits import Observer, Visit

TOKENS = 512
RECURRENCES = (8, 32, 128)
CYCLE = 8
"""Recurrences in the cycle similarity of attention, as in an analysis."""
SHAPE = Architecture(
    vocab_size=1024,
    width=1024,
    heads=16,
    kv_heads=16,
    head_dim=64,
    mlp_width=2816,
    prelude=1,
    recurrent=2,
    coda=1,
    norm_eps=1e-6,
)
STAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "residual_entropy": measures.residual_entropy,
    "relative_residual_entropy": measures.relative_residual_entropy,
    "mean_token_norm": lambda states: measures.residual_norm(states).mean(-1),
    "largest_token_norm": lambda states: measures.residual_norm(states).amax(-1),
    "massive_activation": measures.massive_activation,
    "massive_token": lambda states: measures.massive_activation_place(states)[..., 0],
    "massive_dimension": lambda states: measures.massive_activation_place(states)[..., 1],
}
"""Of the states of one visit, (batch, token, width)."""


Numbers = dict[str, np.ndarray]


def llama(model: LoopedTransformer, recurrences: int) -> LlamaForCausalLM:
    """The same weights in a transformers model, whose list of layers holds the recurrent ones R times."""
    size = model.architecture
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.width,
        intermediate_size=size.mlp_width,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        num_hidden_layers=size.layers,
        rms_norm_eps=size.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_base},
    )
    theirs: LlamaForCausalLM = LlamaForCausalLM(config).requires_grad_(False)
    theirs.set_attn_implementation("eager")
    modules = {
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    ours = (*model.prelude, *model.recurrent, *model.coda)
    for source, target in zip(ours, theirs.model.layers, strict=True):
        for mine, name in modules.items():
            target.get_submodule(name).weight = source.get_submodule(mine).weight
    theirs.model.embed_tokens.weight = model.embedding.weight
    layers = list(theirs.model.layers)
    loop, after = size.prelude, size.prelude + size.recurrent
    unrolled = [*layers[:loop], *layers[loop:after] * recurrences, *layers[after:]]
    theirs.model.layers = torch.nn.ModuleList(unrolled)
    theirs.config.num_hidden_layers = len(unrolled)
    return theirs


def afterwards(states: list[Tensor], maps: list[Tensor], recurrences: int) -> Numbers:
    """Every measure from what was kept, visit by visit."""
    found = {name: np.array([getattr(measures, name)(each)[0].numpy() for each in maps]) for name in HEAD_NAMES}
    for name, function in STAGES.items():
        found[name] = np.array([float(function(each)[0]) for each in states])
    loop, layers = SHAPE.prelude, SHAPE.recurrent
    end = loop + layers * recurrences
    last = maps[end - layers : end]
    change = [measures.attention_distance(maps[at], maps[at - layers]) for at in range(loop + layers, end)]
    away = [measures.attention_distance(maps[at], last[(at - loop) % layers]) for at in range(loop, end)]
    found["attention_change"] = torch.cat(change).numpy()
    found["attention_distance_to_horizon"] = torch.cat(away).numpy()
    shown = [*maps[: loop + layers * CYCLE], *maps[end:]]
    pairs = [[float(measures.attention_distance(one, two).square().sum()) for two in shown] for one in shown]
    found["attention_cycle_distance"] = np.sqrt(np.array(pairs) / (SHAPE.heads * TOKENS))
    return found


def usual(model: LoopedTransformer, prompt: list[int], recurrences: int) -> Callable[[], Numbers]:
    theirs = llama(model, recurrences)

    def work() -> Numbers:
        with torch.no_grad():
            output: Any = theirs.model(
                torch.tensor([prompt]), output_hidden_states=True, output_attentions=True, use_cache=False
            )
            return afterwards(output.hidden_states[1:], output.attentions, recurrences)

    return work


class Kept(Observer):
    """Keeps what an analysis keeps, for the measures of heads."""

    def __init__(self) -> None:
        self.visits: list[Visit] = []

    def visit(self, visit: Visit) -> None:
        view = None if visit.attention is None else visit.attention.without_values()
        self.visits.append(replace(visit, attention=view))


def native(model: LoopedTransformer, prompt: list[int], recurrences: int, keep: bool) -> Callable[[], Numbers]:
    subject, batch = NativeSubject(model, weights_sha256="none"), Batch.of([prompt])
    settings = AnalyzeSettings(recurrences=recurrences, horizon=recurrences, cycle_recurrences=CYCLE)
    info = BatchInfo.of(subject, batch, choose(subject, [len(prompt)], settings, lambda note: None))

    def run(observers: list[Observer]) -> None:
        going = subject.start(batch, recurrences=recurrences, observers=observers)
        for _ in range(recurrences):
            going.advance(observers)
        going.decode(observers)

    def work() -> Numbers:
        info.horizon = horizon = Horizons(info)
        heads, cycle, stages = HeadMeasures(info), AttentionCycle(info), StageMeasures(info)
        if keep:
            kept = Kept()
            run([horizon, kept, cycle, stages])
            for visit in kept.visits:
                heads.visit(visit)
        else:
            run([horizon])
            run([heads, cycle, stages])
        arrays = heads.result().merge(stages.result())
        found = {str(name): values.isel(prompt=0).values for name, values in arrays.items()}
        for name, first in (("attention_change", 1), ("attention_distance_to_horizon", 0)):
            by_time = found[name][:, first:].swapaxes(0, 1)
            found[name] = by_time.reshape(-1, SHAPE.heads)
        found["attention_cycle_distance"] = cycle.result()["attention_cycle_distance"].values
        return found

    return work


def one_way(way: str, recurrences: int, path: str) -> None:
    """Print seconds and MiB, and leave the numbers in a file."""
    model = LoopedTransformer(SHAPE).initialize(0).eval().requires_grad_(False)
    prompt = np.random.default_rng(0).integers(0, SHAPE.vocab_size, size=TOKENS).tolist()
    if way == "usual":
        work = usual(model, prompt, recurrences)
    else:
        work = native(model, prompt, recurrences, keep=way == "kept")
    before = memory("VmRSS")
    started = time.process_time()
    found = work()
    print(time.process_time() - started, memory("VmHWM") - before)
    np.savez(path, allow_pickle=False, **found)


def measured(way: str, recurrences: int, path: str) -> tuple[float, float]:
    seconds, peak = in_a_process(__file__, way, str(recurrences), path, **GIVE_MEMORY_BACK)
    return seconds, peak


def largest_difference(one: str, two: str) -> float:
    """Over all measures, relative to each one's largest value.

    The last visit is left out of the stages: transformers hands out its state after the final norm.
    """
    with np.load(one) as first, np.load(two) as second:
        ends = {name: -1 if name in STAGES else None for name in first.files}
        return max(
            float(np.abs(first[name][:end] - second[name][:end]).max() / np.abs(first[name][:end]).max())
            for name, end in ends.items()
        )


def kept_by_default(recurrences: int) -> bool:
    """Whether an analysis would keep the states on this machine as it is now."""
    with torch.device("meta"):
        subject = NativeSubject(LoopedTransformer(SHAPE), weights_sha256="none")
    settings = AnalyzeSettings(recurrences=recurrences, horizon=recurrences, cycle_recurrences=CYCLE)
    plan = choose(subject, [TOKENS], settings, lambda note: None)
    return MemoryPlan(subject, plan, settings).kept(Batch.of([[0] * TOKENS])) > 0


def main() -> None:
    print(f"one prompt of {TOKENS} tokens; seconds of processor time, MiB beyond the loaded model")
    for recurrences in RECURRENCES:
        with tempfile.TemporaryDirectory() as folder:
            paths = {way: f"{folder}/{way}.npz" for way in ("usual", "running", "kept")}
            costs = {way: measured(way, recurrences, path) for way, path in paths.items()}
            away = max(largest_difference(paths["usual"], paths[way]) for way in ("running", "kept"))
        (seconds, peak), running, kept = costs.values()
        print(
            f"R = {recurrences}: usual way {seconds:.1f} s, {peak:.0f} MiB; "
            f"while it runs {running[0]:.1f} s ({running[0] / seconds:.2f}), {running[1]:.0f} MiB "
            f"(1/{peak / running[1]:.0f}); with states kept {kept[0]:.1f} s ({kept[0] / seconds:.2f}), "
            f"{kept[1]:.0f} MiB; by default states are {'kept' if kept_by_default(recurrences) else 'not kept'} here; "
            f"numbers differ by {away:.1g} at most",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 4:
        one_way(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    else:
        main()
