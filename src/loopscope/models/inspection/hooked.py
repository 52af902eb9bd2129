"""Inspection of a checkpoint that the transformers package would load, and hooks would watch.

The model is built on torch's meta device: its modules and shapes are there, its weights are not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from loopscope._util.hub import require
from loopscope._util.wording import layout_text
from loopscope.errors import CheckpointError, UnknownFamilyError
from loopscope.models.checkpoints.metadata import Metadata
from loopscope.models.hooks.layout import HookedLayer, HookLayout, find_layout
from loopscope.models.hooks.unobservable import OF_ALL_LOOPS, OF_ALL_MODELS
from loopscope.models.inspection.facts import (
    Inspection,
    MemoryEstimate,
    ParameterCounts,
    RunSize,
    Sizes,
    TokenizerFacts,
    estimate_memory,
)

_MEASURED = (
    "Attention: a layer's is seen if it computes one that is understood, which is measured when the model is loaded."
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
    model = _skeleton(transformers, metadata, unknown)
    layout, number = find_layout(model)
    config = model.config.get_text_config(decoder=True)
    recurrences: int | None = None if number is None else attrgetter(number)(model)
    parameters = _counts(model, layout)
    return Inspection(
        name=str(name),
        revision=metadata.revision,
        family=str(model.config.model_type),
        runs="through hooks",
        recognised_by=f"model_type {model.config.model_type!r} of transformers {transformers.__version__}",
        layout=layout_text(len(layout.prelude), len(layout.recurrent), len(layout.coda), recurrences),
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
        settings={},
        # What is known before the model runs; a `HookedSubject` knows more.
        unobservable=(
            *OF_ALL_MODELS,
            _MEASURED,
            *((_MEASURED_OF_A_LOOP, *OF_ALL_LOOPS) if layout.recurrent else ()),
        ),
        tokenizer=tokenizer,
        memory=_memory(config, parameters, layout, run),
    )


def _skeleton(transformers: ModuleType, metadata: Metadata, unknown: UnknownFamilyError) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(metadata.folder), trust_remote_code=False, local_files_only=True
        )
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # anything can go wrong in there, and all of it means the same
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise CheckpointError(
            f"{str(unknown).rstrip('.')}; and transformers {transformers.__version__} does not know it either "
            f"({reason}): describe the format (docs/adding-a-family.md), or load the model yourself and give it to "
            "loopscope.hook."
        ) from error


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
