"""Random models that are small enough to run in a moment, and models whose dynamics are known in closed form."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from loopscope.models.architecture import Architecture
from loopscope.models.checkpoints.native import save_checkpoint
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.hooks.wrap import hook
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.prompts.tokenizer import TextTokenizer

WIDTH, VOCAB = 16, 48

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1], [1, 6, 1, 8, 0], [5], [9, 9, 8, 1, 2, 40, 41]]
"""Token ids. Of different lengths, so that every batch is padded, and one too short to have a next token."""


def architecture(**changes: Any) -> Architecture:
    """(1, 2 (x) 4, 1), pre-norm, with injection into a random state, unless changed."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "width": WIDTH,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 8,
        "mlp_width": 24,
        "prelude": 1,
        "recurrent": 2,
        "coda": 1,
        "recurrences": 4,
        "injection": "linear",
        "state_init": "normal",
        "state_std": 0.5,
    }
    return Architecture(**(fields | changes))


INJECTED = architecture()
RESIDUAL_NORM = architecture(
    norm_placement="residual", loop_norm="loop", qk_bias=True, rotary="adjacent", kv_heads=2, recurrent=3
)
"""Like Huginn."""
LOOP_NORM = architecture(
    norm_placement="branch-in-out",
    loop_norm="recurrence",
    injection="none",
    state_init="embeddings",
    prelude=0,
    coda=0,
)
"""Like Ouro: what is carried on is not what the last layer put out."""
GATED = dataclasses.replace(LOOP_NORM, exit_gate=True, exit_threshold=0.6)
"""With Ouro's exit gate too."""
ADDED = architecture(injection="add", state_init="embeddings", norm_placement="branch-out", recurrent=1)
"""One recurrent layer, and the prelude's output as initial state."""
FEED_FORWARD = architecture(recurrent=0, injection="none", state_init="embeddings", recurrences=1)

ARCHITECTURES = {
    "injected": INJECTED,
    "residual norm": RESIDUAL_NORM,
    "loop norm": LOOP_NORM,
    "added": ADDED,
    "feed-forward": FEED_FORWARD,
}


def subject(
    architecture: Architecture = INJECTED,
    *,
    seed: int = 0,
    std: float = 0.3,
    dtype: torch.dtype = torch.float32,
    tokenizer: TextTokenizer | None = None,
) -> NativeSubject:
    """With random weights. With the standard deviation given, states move a good way in each recurrence."""
    model = LoopedTransformer(architecture).initialize(seed, std).to(dtype).eval().requires_grad_(False)
    return NativeSubject(model, name="small", tokenizer=tokenizer)


def hooked_native(
    shape: Architecture, *, std: float = 0.3, dtype: torch.dtype = torch.float32
) -> tuple[NativeSubject, HookedSubject]:
    """One native model as its own subject and, its modules hooked, as another's."""
    model = LoopedTransformer(shape).initialize(0, std).to(dtype).eval().requires_grad_(False)
    stages: dict[str, Any] = {name: name for name in ("prelude", "recurrent", "coda") if len(getattr(model, name))}
    hooked = hook(
        model,
        **stages,
        loop_end="norm" if shape.loop_norm == "recurrence" else None,
        set_recurrences=(lambda _, recurrences: {"recurrences": recurrences}) if shape.is_looped else None,
    )
    return NativeSubject(model), hooked


def linear_loop(
    on_state: Tensor, on_encoded: Tensor, *, dtype: torch.dtype = torch.float64, **changes: Any
) -> NativeSubject:
    """A loop that is the linear map `s -> on_state s + on_encoded e` of each token, with `e` its embedding.

    Attention and MLP of every layer put out zero, so that the layers pass on what the injection gives them.
    """
    width = len(on_state)
    shape = architecture(prelude=0, coda=0, width=width, **changes)
    model = LoopedTransformer(shape).initialize(0, 1.0)
    with torch.no_grad():
        for layer in model.recurrent.children():
            for name, parameter in layer.named_parameters():
                if name in ("attention.output.weight", "mlp.down.weight"):
                    parameter.zero_()
        assert model.injection is not None
        model.injection.weight.copy_(torch.cat([on_state, on_encoded], dim=1))
    return NativeSubject(model.to(dtype).eval().requires_grad_(False), name="linear")


def relaxation(rate: float, *, width: int = WIDTH, **options: Any) -> NativeSubject:
    """`s -> rate s + (1 - rate) e`: the fixed point is e, and the way to it shrinks by `rate` each time."""
    one = torch.eye(width)
    return linear_loop(rate * one, (1 - rate) * one, **options)


def byte_tokenizer(extra: int = 0) -> Tokenizer:
    """One token a byte, and so many more that no text needs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {piece: index for index, piece in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([f"<extra {number}>" for number in range(extra)])
    return tokenizer


def checkpoint(folder: Path, *, extra_tokens: int = 0, seed: int = 0, std: float = 0.3, **changes: Any) -> Path:
    """A checkpoint folder in loopscope's own format, with a tokenizer of 256 bytes."""
    shape = architecture(**({"vocab_size": 256} | changes))
    model = LoopedTransformer(shape).initialize(seed, std)
    save_checkpoint(folder, model, byte_tokenizer(extra_tokens).to_str())
    return folder
