"""Inspection of a checkpoint that the transformers package would load, and hooks would watch.

The model is built on torch's meta device: its modules and shapes are there, its weights are not. What it would call in
which order can be seen all the same, as most models call the same layers whatever their numbers are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from loopscope._util.hub import require
from loopscope._util.wording import layout_text
from loopscope.errors import CheckpointError, UnknownFamilyError, UnknownSettingError
from loopscope.models.checkpoints.metadata import Metadata
from loopscope.models.hooks.calls import ModelCall, is_prefix_model
from loopscope.models.hooks.discovery import Found, find_layout
from loopscope.models.hooks.layout import HookedLayer, HookLayout, decoder_layers
from loopscope.models.hooks.trial import probe_of
from loopscope.models.hooks.unobservable import OF_ALL_LOOPS, OF_ALL_MODELS
from loopscope.models.hooks.wrap import auto_class, check_foreign, reason_of
from loopscope.models.inspection.facts import (
    Inspection,
    MemoryEstimate,
    ParameterCounts,
    RunSize,
    Sizes,
    TokenizerFacts,
    estimate_memory,
)
from loopscope.models.subject import Batch

_UNSEEN_LOOP = "Loop: whether some of the layers are called more than once is seen when the model is loaded."
_MEASURED = (
    "Attention: a layer's is seen if it computes one that is understood, which is measured when the model is loaded."
)
_PREFIX = (
    "Direction: the model was trained to read a prompt in both directions (prefix_lm); analyze reads it so, and with "
    "--prefix causal as a text in which no token sees a later one."
)
_MEASURED_OF_A_LOOP = (
    "Injection and initial state: shown only if the loop turns out to carry its state unchanged, which is measured "
    "when the model is loaded."
)


def inspect_hooked(
    name: str | Path,
    metadata: Metadata,
    unknown: UnknownFamilyError,
    tokenizer: TokenizerFacts | None,
    run: RunSize,
) -> Inspection:
    """Raises `MissingDependencyError` without transformers, `CheckpointError` where it does not know the model, and
    `ConfigError` where its layers cannot be told.
    """
    transformers = require("transformers", f"{unknown} Anything else", "transformers")
    model = _skeleton(transformers, metadata, unknown, name)
    found = _watched(model)
    chain = found or HookLayout(prelude=decoder_layers(model), recurrent=(), coda=())
    layout, recurrences = (chain, None) if isinstance(chain, HookLayout) else (chain.layout, chain.recurrences)
    in_words = layout_text(len(layout.prelude), len(layout.recurrent), len(layout.coda), recurrences)
    config = model.config.get_text_config(decoder=True)
    parameters = _counts(model, layout)
    return Inspection(
        name=str(name),
        revision=metadata.revision,
        family=str(model.config.model_type),
        runs="through hooks",
        recognised_by=f"model_type {model.config.model_type!r} of transformers {transformers.__version__}; "
        + (str(unknown).rstrip(".") if isinstance(unknown, UnknownSettingError) else "loopscope has no reader for it"),
        layout=f"a chain of {len(layout.prelude)} layers" if found is None else in_words,
        prelude=len(layout.prelude),
        recurrent=len(layout.recurrent),
        coda=len(layout.coda),
        unique_layers=len(layout.modules),
        trained_recurrences=recurrences,
        parameters=parameters,
        stored=_stored(metadata),
        files=tuple(sorted({header.file for header in metadata.headers.values()})),
        width=_number(config, "hidden_size"),
        heads=_number(config, "num_attention_heads"),
        kv_heads=_number(config, "num_key_value_heads"),
        head_dim=_number(config, "head_dim"),
        mlp_width=_number(config, "intermediate_size"),
        vocab_size=_number(config, "vocab_size"),
        max_positions=_number(config, "max_position_embeddings"),
        settings={} if found is None else {"calls": found.sentence},
        # What is known before the model runs; a `HookedSubject` knows more.
        unobservable=(
            *OF_ALL_MODELS,
            *((_UNSEEN_LOOP,) if found is None else ()),
            _MEASURED,
            *((_MEASURED_OF_A_LOOP, *OF_ALL_LOOPS) if layout.recurrent else ()),
            *((_PREFIX,) if is_prefix_model(model) else ()),
        ),
        tokenizer=tokenizer,
        memory=_memory(config, parameters, layout, run),
    )


def _skeleton(transformers: ModuleType, metadata: Metadata, unknown: UnknownFamilyError, name: str | Path) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(metadata.folder), trust_remote_code=False, local_files_only=True
        )
        check_foreign(metadata.config, metadata.headers, config, str(name))
        with torch.device("meta"):
            model = auto_class(transformers, config).from_config(config, trust_remote_code=False).eval()
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("batched_mm")  # other products look at numbers, or at the device
        return model
    except CheckpointError:
        raise
    except Exception as error:  # anything can go wrong in there, and all of it means the same
        raise CheckpointError(
            f"{str(unknown).rstrip('.')}; and transformers {transformers.__version__} cannot load it either "
            f"({reason_of(error)}): describe the format (docs/adding-a-family.md), or load the model yourself and give "
            "it to loopscope.hook."
        ) from error


def _watched(model: nn.Module) -> Found | None:
    """What a forward pass without numbers shows; None for a model that asks for one on its way."""
    tokens = probe_of(model).input_ids
    batch = Batch(tokens, torch.ones(tokens.shape, dtype=torch.bool))  # its values are looked at
    try:
        with cast(Any, _Truths)():
            return find_layout(ModelCall(model), batch)
    except Exception:  # whatever stops it, the layers are still known
        return None


class _Truths(TorchDispatchMode):
    """Answers yes where a model asks whether something holds of a tensor without values, as whether the prompt is one
    text: what is asked on the way is whether a short cut may be taken."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        asks = func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta
        if asks and args[0].dtype == torch.bool:
            return True
        return func(*args, **(kwargs or {}))


def _counts(model: Any, layout: HookLayout) -> ParameterCounts:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight or bool(getattr(model.config, "tie_word_embeddings", False))
    own_head = 0 if tied or head is None else _size([head])
    total = _size([model])
    if tied and head is not None and head.weight is not embedding.weight:
        total -= head.weight.numel()  # on the meta device the two are not tied yet
    return ParameterCounts(
        total=total,
        embedding=_size([embedding]),
        unembedding=own_head,
        prelude=_size(_modules(layout.prelude)),
        recurrent=_size(_modules(layout.recurrent)),
        coda=_size(_modules(layout.coda)),
    )


def _modules(layers: Sequence[HookedLayer]) -> list[nn.Module]:
    return [layer.module for layer in layers]


def _size(modules: Sequence[nn.Module]) -> int:
    """Parameters of modules, each counted once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def _stored(metadata: Metadata) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for header in metadata.headers.values():
        sizes[header.dtype] += header.nbytes
    return dict(sorted(sizes.items()))


def _number(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def _memory(config: Any, parameters: ParameterCounts, layout: HookLayout, run: RunSize) -> MemoryEstimate | None:
    """By the same formula as for a native model, with the sizes that the configuration names."""
    width, heads, vocabulary = (_number(config, name) for name in ("hidden_size", "num_attention_heads", "vocab_size"))
    if width is None or heads is None or vocabulary is None:
        return None
    head_dim = _number(config, "head_dim") or math.ceil(width / heads)
    return estimate_memory(
        Sizes(
            width=width,
            query_width=heads * head_dim,
            key_width=(_number(config, "num_key_value_heads") or heads) * head_dim,
            mlp_width=_number(config, "intermediate_size") or 4 * width,
            mlp_matrices=3,
            heads=heads,
            vocab_size=vocabulary,
            parameters=parameters.total,
            prelude=len(layout.prelude),
            recurrent=len(layout.recurrent),
            coda=len(layout.coda),
            injects=bool(layout.recurrent),
            carries_raw_output=layout.loop_end is None,
        ),
        run,
    )
