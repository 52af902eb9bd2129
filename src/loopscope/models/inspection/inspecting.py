"""`loopscope.inspect_model`: what a config and headers say of a model, with its settings in words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from loopscope.errors import UnknownFamilyError, last_resort
from loopscope.models.architecture import (
    Architecture,
    Injection,
    LinearScaling,
    Llama3Scaling,
    LoopNorm,
    NormPlacement,
    QkNorm,
    RopeScaling,
    Rotary,
    YarnScaling,
)
from loopscope.models.checkpoints.family import Family, parameter_shapes, parse_name
from loopscope.models.checkpoints.layout import CheckpointLayout, find_layout, refuse_ignored
from loopscope.models.checkpoints.metadata import Metadata, read_metadata
from loopscope.models.checkpoints.placement import DeviceMap, place_layers
from loopscope.models.inspection.facts import (
    Inspection,
    ParameterCounts,
    RunSize,
    Sizes,
    TokenizerFacts,
    estimate_memory,
)
from loopscope.models.inspection.hooked import inspect_hooked
from loopscope.models.subject import find_device
from loopscope.prompts.tokenizer import load_tokenizer

_INJECTION: dict[Injection, str] = {
    "none": "none: the prompt enters by the initial state alone",
    "linear": "linear map of [state ; prelude output], in every recurrence",
    "add": "prelude output added to the state, in every recurrence",
    "bounded": "what was in the state decays, by a learned factor below 1 per coordinate, and a linear map of the "
    "prelude's output is added, in every recurrence",
    "diagonal": "what was in the state decays, by a learned factor below 1 per coordinate, and a linear map of the "
    "prelude's output is added in learned steps, in every recurrence",
}
_NORMS: dict[NormPlacement, str] = {
    "pre": "RMS norm before each branch (pre-norm)",
    "residual": "RMS norm before each branch, and on the residual stream after it",
    "branch-in-out": "RMS norm before each branch, and on its output before it is added",
    "branch-out": "RMS norm on each branch's output before it is added",
}
_LOOP_NORM: dict[LoopNorm, str] = {
    "none": "none: the last layer's raw output is carried",
    "recurrence": "final norm at the end of each recurrence; its output is carried",
    "loop": "final norm once after the loop; the raw output is carried",
}
_QK_NORM: dict[QkNorm, str] = {
    "none": "",
    "head": "RMS norm on queries and keys, per head",
    "full": "RMS norm on queries and keys, over all heads together",
    "unweighted": "RMS norm without weights on queries and keys, per head, behind the rotation",
}
_ROTARY: dict[Rotary, str] = {
    "none": "no rotation",
    "halves": "rotary, coordinates i and i + d/2",
    "adjacent": "rotary, coordinates 2i and 2i + 1",
}
_BY_ACCELERATE = "decided by transformers and accelerate, when the model is loaded"


@last_resort("inspecting a model")
def inspect_model(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    run: RunSize | None = None,
    families: Sequence[Family] = (),
    ignore_config: Sequence[str] = (),
    device: str = "auto",
    device_map: DeviceMap | None = None,
) -> Inspection:
    """What a model is and what running it would take, without loading a weight.

    Takes the names that `load` takes. Of a model on the hub only config.json, the tokenizer's files and the headers of
    its tensors are downloaded. `run` is the size of run for which memory is estimated; `families` are formats of your
    own, and `ignore_config` fields of config.json to pass over, as for `load`. With `device_map`, as there too, it is
    said where layers would go now.

    Raises `CheckpointError` for a folder that is no checkpoint, or one that neither loopscope nor transformers could
    load; `MissingDependencyError` where transformers would be needed to know; `PromptError` for a damaged tokenizer.
    """
    run = run or RunSize()
    metadata = read_metadata(name_or_path, revision)
    tokenizer = _tokenizer(metadata.folder)
    try:
        layout = find_layout(metadata.config, metadata.headers, str(name_or_path), families, ignore_config)
    except UnknownFamilyError as unknown:
        refuse_ignored(ignore_config, unknown)
        hooked = inspect_hooked(name_or_path, metadata, unknown, tokenizer, run)
        return hooked if device_map is None else replace(hooked, placement=_BY_ACCELERATE)
    found = inspect_native(name_or_path, metadata, layout, tokenizer, run, ignore_config)
    if device_map is None:
        return found
    dtype: torch.dtype = getattr(torch, run.dtype)
    return replace(found, placement=str(place_layers(layout.architecture, dtype, find_device(device), device_map)))


def _tokenizer(folder: Path) -> TokenizerFacts | None:
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None
    return TokenizerFacts(
        tokens=tokenizer.vocab_size,
        before=tuple(token.text for token in tokenizer.before),
        after=tuple(token.text for token in tokenizer.after),
        chat_template=tokenizer.chat_template is not None,
        notes=tuple(tokenizer.notes),
    )


def inspect_native(
    name: str | Path,
    metadata: Metadata,
    layout: CheckpointLayout,
    tokenizer: TokenizerFacts | None,
    run: RunSize,
    ignore_config: Sequence[str] = (),
) -> Inspection:
    architecture = layout.architecture
    return Inspection(
        name=str(name),
        revision=metadata.revision,
        family=layout.family,
        runs="natively",
        recognised_by=f"model_type {metadata.config.get('model_type')!r} and the names of its {len(metadata.headers)} "
        "tensors" + (f"; passed over in config.json: {', '.join(ignore_config)}" if ignore_config else ""),
        layout=architecture.layout,
        prelude=architecture.prelude,
        recurrent=architecture.recurrent,
        coda=architecture.coda,
        unique_layers=architecture.layers,
        trained_recurrences=architecture.recurrences if architecture.is_looped else None,
        parameters=_counts(layout),
        stored=layout.dtypes,
        files=layout.files,
        width=architecture.width,
        heads=architecture.heads,
        kv_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        mlp_width=architecture.mlp_width,
        vocab_size=architecture.vocab_size,
        max_positions=architecture.max_positions,
        settings=settings_in_words(architecture),
        unobservable=(),
        tokenizer=tokenizer,
        memory=estimate_memory(Sizes.of(architecture), run),
        architecture=architecture,
    )


def _counts(layout: CheckpointLayout) -> ParameterCounts:
    counts: Counter[str] = Counter()
    for name, shape in parameter_shapes(layout.architecture).items():
        parsed = parse_name(name)
        place = parsed.stage or {"injection": "recurrent"}.get(parsed.module, parsed.module)
        size = math.prod(shape)
        counts[place] += size
        counts["total"] += size
    return ParameterCounts(
        total=counts["total"],
        embedding=counts["embedding"],
        unembedding=counts["head"],
        prelude=counts["prelude"],
        recurrent=counts["recurrent"],
        coda=counts["coda"],
    )


def settings_in_words(architecture: Architecture) -> dict[str, str]:
    """A sentence for each setting that this architecture has, by its name."""
    words = {
        "norms": _norms(architecture),
        "attention": _attention(architecture),
        "MLP": f"{architecture.mlp}, {architecture.activation}",
        "positions": _positions(architecture),
        "unembedding": "tied to the embedding" if architecture.tied_embeddings else "a matrix of its own",
    }
    if architecture.embedding_scale != 1.0:
        words["embedding"] = f"scaled by {architecture.embedding_scale:.6g}"
    return words | (_of_the_loop(architecture) if architecture.is_looped else {})


def _of_the_loop(architecture: Architecture) -> dict[str, str]:
    after = ", then a linear map, before the coda" if architecture.readout_map else ""
    words = {
        "injection": _INJECTION[architecture.injection],
        "loop norm": _LOOP_NORM[architecture.loop_norm] + after,
        "initial state": "the prelude's output" if architecture.prelude else "the token embeddings",
        "exit gate": "none",
    }
    if architecture.state_init == "normal":
        words["initial state"] = f"normal noise, standard deviation {architecture.state_std:.4g}, cut at 3 of them"
    if architecture.eta != 1.0:
        words["damping"] = (
            f"a recurrence passes on {1 - architecture.eta:g} of its state and {architecture.eta:g} of the new"
        )
    if architecture.exit_gate:
        words["exit gate"] = f"a token stops at a cumulated probability of {architecture.exit_threshold:g}"
    return words


def _norms(architecture: Architecture) -> str:
    prelude = "RMS norm on the prelude's output" if architecture.prelude_norm else ""
    parts = [_NORMS[architecture.norm_placement], prelude, _QK_NORM[architecture.qk_norm]]
    parts.append(f"eps {architecture.norm_eps:g}")
    return "; ".join(part for part in parts if part)


def _attention(architecture: Architecture) -> str:
    heads, groups = architecture.heads, architecture.kv_heads
    parts = [f"{heads} heads of {architecture.head_dim}"]
    if groups != heads:
        parts.append(f"{groups} for keys and values")
    if architecture.qk_bias:
        parts.append("bias on queries and keys")
    if architecture.value_embeddings:
        count = len(architecture.value_embeddings)
        parts.append(f"a gated embedding of the token in the values of {count} of {architecture.layers} layers")
    if architecture.sliding_window is not None:
        parts.append(_window(architecture, architecture.sliding_window))
    return ", ".join(parts)


def _window(architecture: Architecture, window: int) -> str:
    everywhere = len(architecture.full_attention_layers)
    within = "all layers" if not everywhere else f"{architecture.layers - everywhere} of {architecture.layers} layers"
    return f"the last {window:,} tokens in {within}"


def _positions(architecture: Architecture) -> str:
    parts = [_ROTARY[architecture.rotary]]
    if architecture.rotary != "none":
        parts.append(f"base {architecture.rope_base:g}")
        if architecture.rope_scaling is not None:
            parts.append(_scaling(architecture.rope_scaling))
    longest = architecture.max_positions
    return ", ".join(parts) + (f"; up to {longest:,} tokens" if longest is not None else "; no stated limit")


def _scaling(scaling: RopeScaling) -> str:
    match scaling:
        case LinearScaling():
            return f"stretched {scaling.factor:g} times"
        case Llama3Scaling() | YarnScaling():
            return f"{scaling.kind} scaling {scaling.factor:g} times from {scaling.original_max_positions:,} tokens"
