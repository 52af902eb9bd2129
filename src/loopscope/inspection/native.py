"""Inspection of a checkpoint whose family loopscope reads itself."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from loopscope.checkpoints import Layout, Peek
from loopscope.checkpoints.parts import parameter_shapes, parse_name
from loopscope.inspection.facts import Inspection, ParameterCounts, TokenizerFacts
from loopscope.inspection.memory import Sizes, estimate_memory
from loopscope.inspection.words import settings_in_words
from loopscope.settings import RunSize

__all__ = ["inspect_native"]


def inspect_native(
    name: str | Path, peek: Peek, layout: Layout, tokenizer: TokenizerFacts | None, run: RunSize
) -> Inspection:
    architecture = layout.architecture
    return Inspection(
        name=str(name),
        revision=peek.revision,
        family=layout.family,
        runs="natively",
        recognised_by=f"model_type {peek.config.get('model_type')!r} and the names of its {len(peek.headers)} tensors",
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
        blind_spots=(),
        tokenizer=tokenizer,
        memory=estimate_memory(Sizes.of(architecture), run),
    )


def _counts(layout: Layout) -> ParameterCounts:
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
