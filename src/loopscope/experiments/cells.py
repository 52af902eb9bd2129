"""One cell of a grid: a random model, run and measured."""

from __future__ import annotations

import time
from typing import Any

import torch

from loopscope.analysis import analyze
from loopscope.answers import Criterion
from loopscope.architecture import Architecture
from loopscope.experiments.dynamics import dynamics_of
from loopscope.grids import Cell, CellResult, NormName
from loopscope.model import LoopedTransformer
from loopscope.subject import NativeSubject

__all__ = ["architecture_of", "run_cell"]

_VOCABULARY = 256
_HEAD = 32
_MLP_RATIO = 4
_NORMS: dict[NormName, dict[str, Any]] = {
    "pre": {"norm_placement": "pre"},
    "residual": {"norm_placement": "residual", "loop_norm": "loop"},
    "ouro": {"norm_placement": "branch-in-out", "loop_norm": "recurrence"},
    "olmo2": {"norm_placement": "branch-out"},
}
_PARTS = ("heads", "maps", "stages", "neurons", "readout", "trajectories", "path-independence", "cycle-similarity")
"""Of an analysis that no cell needs."""
_KEEP_MIB = 256
_ONE_POINT = 0.999
"""Layers share a point or a direction if the least cosine between them is above. Where nothing is trained a layer adds
little to what is injected: 4 to 16 layers with a point each show 0.65 to 0.998, and those that share one 0.99998."""
_SEARCH, _LONG_SEARCH = 40, 200
"""Recurrences for finding a fixed point that the run does not come to: half of those that repel are found with the
first; with the second, for cells whose tokens are judged, nearly all that are found at all."""


def architecture_of(cell: Cell) -> Architecture:
    """(0, depth (x) R, 0), with heads of 32 and an MLP four times as wide; Huginn's random initial state where the
    prompt is injected, else the embeddings themselves."""
    return Architecture(
        vocab_size=_VOCABULARY,
        width=cell.width,
        heads=cell.width // _HEAD,
        kv_heads=cell.width // _HEAD,
        head_dim=_HEAD,
        mlp_width=_MLP_RATIO * cell.width,
        prelude=0,
        recurrent=cell.depth,
        coda=0,
        recurrences=cell.recurrences,
        injection=cell.injection,
        # Entries of size 1, as large as those of a random state, however small the weights: what is injected has to be
        # seen beside what the layers add.
        embedding_scale=1 / cell.std,
        state_init="embeddings" if cell.injection == "none" else "normal",
        **_NORMS[cell.norm],
    )


def run_cell(cell: Cell) -> CellResult:
    """Analyse the cell's model; a function of the cell alone, so that any process may do it."""
    started = time.monotonic()
    skip: tuple[str, ...] = _PARTS if cell.judged else (*_PARTS, "behaviour")
    study = analyze(
        _model(cell),
        _prompts(cell),
        recurrences=cell.recurrences,
        horizon=cell.recurrences,
        horizon_method="keep",
        keep_limit=_KEEP_MIB,
        batch_size=cell.prompts,
        seed=cell.seed,
        judged_layers="last",
        eigenvalue_search=_LONG_SEARCH if cell.judged else _SEARCH,
        track=(),
        skip=skip,
    )
    found = dynamics_of(study, Criterion(degenerate_cosine=_ONE_POINT))
    return CellResult(**found, cell=cell, seconds=round(time.monotonic() - started, 2))


def _model(cell: Cell) -> NativeSubject:
    model = LoopedTransformer(architecture_of(cell)).initialize(cell.seed, cell.std)
    with torch.no_grad():
        if model.injection is not None:
            # W = [on the state ; on the prompt]: only the prompt's share is scaled.
            model.injection.weight[:, cell.width :] *= cell.injection_scale
        elif cell.injection == "add":
            # What is added are the embeddings, and nothing else reads them before the loop.
            model.embedding.weight *= cell.injection_scale
    return NativeSubject(model.eval().requires_grad_(False), name=cell.name)


def _prompts(cell: Cell) -> list[list[int]]:
    generator = torch.Generator().manual_seed(cell.seed)
    ids = torch.randint(0, _VOCABULARY, (cell.prompts, cell.tokens), generator=generator)
    return [[int(token) for token in row] for row in ids]
