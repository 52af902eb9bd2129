"""One job with loopscope and with the tools that are otherwise at hand: all residual states of a looped model, and of
every attention map the sums of its columns and the entropies of its rows.

    python -m venv peers && peers/bin/pip install '.[transformers]' nnsight transformer_lens
    peers/bin/python benchmarks/peers.py

What is not installed is left out, and said. The model is a torch module that calls two Llama layers of transformers
in a loop, between one layer before and one behind: width 512, 8 heads, random weights, one prompt of 256 tokens.

Each run is a process of its own on one thread, which gives large tensors back to the system as soon as they are freed:
seconds of processor time, the peak resident size (VmHWM) beyond that of the process with the model loaded, and the
lines that a user writes. How many of the visits have the right numbers is told by a slow version in float64, which
shares no code with any of them.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from support.own_process import GIVE_MEMORY_BACK, in_a_process, memory
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

import loopscope
from loopscope import measures
from loopscope.models.subject import Batch

RECURRENCES = (8, 32, 128)
TOKENS, VOCABULARY = 256, 1024
TOLERANCE = 1e-3
"""Of the largest number of a visit: what float32 may differ from float64 by after 128 recurrences."""

Found = tuple[list[Tensor], list[Tensor], list[Tensor]]
"""States (token, width), column sums (head, key) and row entropies (head, query) of every visit, in order."""


def config(layers: int = 4) -> LlamaConfig:
    kind: Any = LlamaConfig
    found: LlamaConfig = kind(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_hidden_layers=layers,
        attn_implementation="eager",
        architectures=["LlamaForCausalLM"],
    )
    return found


class Looped(nn.Module):
    """(1, 2 ⊗ R, 1)."""

    def __init__(self, recurrences: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 512)
        self.entry, *body, self.exit = (LlamaDecoderLayer(config(), index) for index in range(4))
        self.body = nn.ModuleList(body)
        self.norm = LlamaRMSNorm(512)
        self.head = nn.Linear(512, VOCABULARY, bias=False)
        self.rotary = LlamaRotaryEmbedding(config())
        self.loops = recurrences
        self.eval().requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.embedding(tokens)
        turns = self.rotary(state, torch.arange(tokens.shape[1])[None])
        later = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        state = self.entry(state, attention_mask=later, position_embeddings=turns)
        for _ in range(self.loops):
            for layer in self.body:
                state = layer(state, attention_mask=later, position_embeddings=turns)
        state = self.exit(state, attention_mask=later, position_embeddings=turns)
        logits: Tensor = self.head(self.norm(state))
        return logits


def entropy(maps: Tensor) -> Tensor:
    found: Tensor = torch.special.entr(maps).sum(-1)
    return found


def with_loopscope(model: Looped, tokens: Tensor) -> Found:
    subject = loopscope.hook(model, prelude="entry", recurrent="body", coda="exit", set_recurrences="loops")
    trace = loopscope.capture(subject, tokens, recurrences=model.loops, attention=True)
    states, sums, entropies = [], [], []
    for visit in trace.visits:
        maps = trace.attention(*visit)[0]
        states.append(trace.residual(*visit)[0])
        sums.append(maps.sum(-2))
        entropies.append(measures.row_entropy(maps))
    return states, sums, entropies


def with_an_observer(model: Looped, tokens: Tensor) -> Found:
    states, sums, entropies = [], [], []

    class Watch(loopscope.Observer):
        def visit(self, visit: loopscope.Visit) -> None:
            assert visit.attention is not None
            maps = visit.attention.probabilities()[0]
            states.append(visit.residual[0])
            sums.append(maps.sum(-2))
            entropies.append(measures.row_entropy(maps))

    watch = Watch()
    subject = loopscope.hook(model, prelude="entry", recurrent="body", coda="exit", set_recurrences="loops")
    run = subject.start(Batch.of(tokens.tolist()), recurrences=model.loops, observers=[watch])
    for _ in range(model.loops):
        run.advance([watch])
    run.decode([watch])
    run.close()
    return states, sums, entropies


def with_nnsight(model: Looped, tokens: Tensor) -> Found:
    nnsight: Any = importlib.import_module("nnsight")
    watched = nnsight.NNsight(model)
    with torch.no_grad(), watched.trace(tokens) as tracer:
        states, sums, entropies = nnsight.save([]), nnsight.save([]), nnsight.save([])
        maps = watched.entry.self_attn.output[1][0]
        sums.append(maps.sum(-2))
        entropies.append(entropy(maps))
        states.append(watched.entry.output[0])
        for _ in tracer.iter[0 : model.loops]:
            for layer in watched.body:
                maps = layer.self_attn.output[1][0]
                sums.append(maps.sum(-2))
                entropies.append(entropy(maps))
                states.append(layer.output[0])
        maps = watched.exit.self_attn.output[1][0]
        sums.append(maps.sum(-2))
        entropies.append(entropy(maps))
        states.append(watched.exit.output[0])
    return states, sums, entropies


def with_transformers(model: Looped, tokens: Tensor) -> Found:
    unrolled = LlamaForCausalLM(config())
    unrolled.model.embed_tokens, unrolled.model.norm = model.embedding, model.norm
    layers = [model.entry, *list(model.body) * model.loops, model.exit]
    unrolled.model.layers, unrolled.config.num_hidden_layers = nn.ModuleList(layers), len(layers)
    with torch.no_grad():
        output: Any = unrolled.model(tokens, output_hidden_states=True, output_attentions=True, use_cache=False)
    states = [state[0] for state in output.hidden_states[1:]]
    return states, [maps[0].sum(-2) for maps in output.attentions], [entropy(maps[0]) for maps in output.attentions]


def with_transformer_lens(model: Looped, tokens: Tensor, *, copied: bool = False) -> Found:
    bridges: Any = importlib.import_module("transformer_lens.model_bridge")
    unrolled = LlamaForCausalLM(config())
    unrolled.model.embed_tokens, unrolled.model.norm = model.embedding, model.norm
    layers = [model.entry, *list(model.body) * model.loops, model.exit]
    layers = [copy.deepcopy(layer) for layer in layers] if copied else layers
    unrolled.model.layers, unrolled.config.num_hidden_layers = nn.ModuleList(layers), len(layers)
    with tempfile.TemporaryDirectory() as folder:
        unrolled.config.save_pretrained(folder)
        bridge = bridges.TransformerBridge.boot_transformers(folder, hf_model=unrolled, tokenizer=tokenizer(folder))
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, use_cache=False)
    states, sums, entropies = [], [], []
    for place in range(len(layers)):
        states.append(cache[f"blocks.{place}.hook_resid_post"][0])
        maps = cache.cache_dict.get(f"blocks.{place}.attn.hook_pattern", torch.full((1, 8, TOKENS, TOKENS), torch.nan))
        sums.append(maps[0].sum(-2))
        entropies.append(entropy(maps[0]))
    return states, sums, entropies


WAYS: dict[str, tuple[str, Callable[[Looped, Tensor], Found]]] = {
    "loopscope, a trace": ("loopscope", with_loopscope),
    "loopscope, an observer": ("loopscope", with_an_observer),
    "nnsight": ("nnsight", with_nnsight),
    "transformers, unrolled": ("transformers", with_transformers),
    "TransformerLens, unrolled": ("transformer_lens", with_transformer_lens),
    "TransformerLens, each visit a copy": ("transformer_lens", functools.partial(with_transformer_lens, copied=True)),
}
"""The package that each needs, and the code."""


def tokenizer(folder: str) -> Any:
    """One that TransformerLens takes, though nothing is encoded."""
    words = Tokenizer(models.WordLevel({str(word): word for word in range(VOCABULARY)}, unk_token="0"))
    kind: Any = PreTrainedTokenizerFast
    kind(tokenizer_object=words, unk_token="0", pad_token="0", eos_token="1", bos_token="1").save_pretrained(folder)
    return kind.from_pretrained(folder)


def slowly(model: Looped, tokens: Tensor) -> Found:
    """In float64, by the formulas, from the weights alone; head by head."""
    states, sums, entropies = [], [], []
    state = model.embedding.weight[tokens[0]].double()
    size = state.shape[-1] // 8
    angles = torch.arange(TOKENS).double()[:, None] * 10_000.0 ** (-torch.arange(0, size, 2).double() / size)

    def normed(values: Tensor, weight: Tensor) -> Tensor:
        return values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()

    def turned(values: Tensor) -> Tensor:
        one, two = values[:, : size // 2], values[:, size // 2 :]
        return torch.cat((one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()), dim=-1)

    for layer in [model.entry, *list(model.body) * model.loops, model.exit]:
        weights = {name: values.double() for name, values in layer.named_parameters()}
        inner = normed(state, weights["input_layernorm.weight"])
        query, key, value = (inner @ weights[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        sums.append(torch.empty(8, TOKENS, dtype=torch.float64))
        entropies.append(torch.empty(8, TOKENS, dtype=torch.float64))
        heads = []
        for head in range(8):
            some = slice(head * size, (head + 1) * size)
            scores = turned(query[:, some]) @ turned(key[:, some]).T / size**0.5
            maps = (scores.exp() * torch.ones(TOKENS, TOKENS).tril()).double()
            maps /= maps.sum(-1, keepdim=True)
            sums[-1][head] = maps.sum(0)
            entropies[-1][head] = -torch.where(maps > 0, maps * maps.log(), 0.0).sum(-1)
            heads.append(maps @ value[:, some])
        state = state + torch.cat(heads, dim=-1) @ weights["self_attn.o_proj.weight"].T
        inner = normed(state, weights["post_attention_layernorm.weight"])
        gate, up = (inner @ weights[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        state = state + (gate * gate.sigmoid() * up) @ weights["mlp.down_proj.weight"].T
        states.append(state)
    return states, sums, entropies


def prompt() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, size=(1, TOKENS)))


def one_way(way: str, recurrences: int, path: str) -> None:
    """Print seconds and MiB, and leave the numbers in a file."""
    package, work = ("torch", slowly) if way == "slowly" else WAYS[way]
    importlib.import_module(package)
    model = Looped(recurrences)
    before, started = memory("VmRSS"), time.process_time()
    found = work(model, prompt())
    print(time.process_time() - started, memory("VmHWM") - before)
    torch.save(found, path)


def measured(way: str, recurrences: int, path: str) -> tuple[float, float]:
    seconds, peak = in_a_process(__file__, way, str(recurrences), path, **GIVE_MEMORY_BACK)
    return seconds, peak


def right(found: str, wanted: str) -> list[int]:
    """Of how many visits the states, the column sums and the row entropies are right."""
    pairs = zip(torch.load(found), torch.load(wanted), strict=True)
    return [
        sum(bool((one - two).abs().amax() <= TOLERANCE * two.abs().amax()) for one, two in zip(*both, strict=True))
        for both in pairs
    ]


def lines(work: Callable[..., object]) -> int:
    """That a user writes: without the signature, imports and blank lines."""
    function = work.func if isinstance(work, functools.partial) else work
    written = inspect.getsource(function).splitlines()[1:]
    return sum(bool(line.strip()) and "import_module" not in line for line in written)


def main() -> None:
    installed = {name: each for name, each in WAYS.items() if importlib.util.find_spec(each[0])}
    for name in WAYS.keys() - installed:
        print(f"{name} is left out: {WAYS[name][0]} is not installed here.")
    packages = dict.fromkeys(("torch", *(package for package, _ in installed.values())))
    print("versions:", ", ".join(f"{package} {version(package)}" for package in packages))
    for recurrences in RECURRENCES:
        with tempfile.TemporaryDirectory() as folder:
            measured("slowly", recurrences, f"{folder}/slowly")
            for name, (_, work) in installed.items():
                seconds, peak = measured(name, recurrences, f"{folder}/found")
                states, sums, entropies = right(f"{folder}/found", f"{folder}/slowly")
                print(
                    f"R = {recurrences}: {name}: {seconds:.1f} s, {peak:,.0f} MiB, {lines(work)} lines; right of "
                    f"{2 + 2 * recurrences} visits: {states} states, {sums} column sums, {entropies} row entropies",
                    flush=True,
                )


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 4:
        one_way(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    else:
        main()
