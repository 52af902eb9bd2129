"""A folder with a small input of every kind, and nothing wrong with any."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from loopscope.analysis.analyzing import analyze
from loopscope.answers.calibration import CalibratedRule
from loopscope.answers.comparison.comparing import compare
from loopscope.answers.stopping import StoppingRule
from loopscope.evaluation.result import Evaluation, step_points, task_curve
from loopscope.experiments.cells import Cell, CellOutcome, CellResult
from small_models import checkpoint
from staged_study import staged_study


@functools.cache
def whole_inputs() -> Path:
    """A folder with a small one of every kind."""
    folder = Path(tempfile.mkdtemp(prefix="loopscope-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    checkpoint(folder / "model")
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    analyze(
        folder / "model", ["one two"], out=folder / "study", recurrences=4, horizon=8, device="cpu", batch_size=1,
        skip=("stability", "heads"),
    )  # fmt: skip
    curve = [0.1, 0.4, 0.5, 0.3, 0.2, 0.6, 0.7, 0.9]
    compare([staged_study(curve, model="a"), staged_study(curve, model="b")]).save(folder / "comparison")
    states = np.cumsum(np.random.default_rng(0).normal(size=(2, 40, 4)), 1).astype(np.float32)
    np.save(folder / "states.npy", states)
    np.savez(folder / "states.npz", a=states, b=states[0])
    np.savez_compressed(folder / "small.npz", a=states)
    (folder / "sweep.json").write_text(json.dumps(SWEEP))
    (folder / "train.json").write_text(json.dumps(TRAIN))
    lines = [{"id": f"p{n}", "q": f"question {n}", "system": "be kind", "ids": [1, 2, n]} for n in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cells = folder / "experiment" / "cells"
    cells.mkdir(parents=True)
    (cells / "a.json").write_text(json.dumps(CELL.to_dict()))
    (folder / "experiment" / "grid.json").write_text('{"kind": "phase", "finished": true, "cells": ["a"]}')
    EVALUATION.save(folder / "evaluation")
    RULE.save(folder / "rule.json")
    (folder / "run").mkdir()
    log = [{"kind": "start", "step": 0}, *({"kind": "step", "step": step, "loss": 1.5} for step in range(1, 6))]
    (folder / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


_SCORES = {1: [0.0, 0.0, 1.0], 2: [1.0, 0.0, 1.0]}
EVALUATION = Evaluation(
    model="m", weights_sha256="", dtype="float32", trained_recurrences=2, recurrences=(1, 2), seed=0, limit=3,
    curves=tuple(task_curve("t", "accuracy", _SCORES, trained=2, part=part) for part in ("", "1 swap")),
    steps=step_points({1: [0.5, 0.6], 2: [0.1, 0.2]}),
)  # fmt: skip
TOKENIZER_CONFIG: dict[str, Any] = {
    "bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True,
    "added_tokens_decoder": {"256": {"content": "<s>", "special": True}, "257": {"content": "</s>", "special": True}},
    "chat_template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}>",
}  # fmt: skip
SHAPE = {
    "width": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "mlp_width": 32, "prelude": 0, "recurrent": 1, "coda": 0,
    "recurrences": 2, "injection": "linear",
}  # fmt: skip
SWEEP = {
    "task": {"kind": "automaton", "cells": 4, "steps": 2, "documents": 40, "test_documents": 8, "seed": 0},
    "base": {
        "architecture": SHAPE, "steps": 2, "batch_size": 2, "optimizer": {"peak_lr": 0.01}, "evaluation": {"every": 5},
    },
    "grids": [{"architecture.recurrences": [2, 4], "architecture.injection": ["none", "linear"]}],
    "recipes": {"wide": {"architecture.mlp_width": 64}},
    "seeds": 2, "controls": ["equal-depth"], "study": {"prompts": 1, "horizon": 8, "beyond": 2},
}  # fmt: skip
TRAIN = {
    "architecture": SHAPE | {"vocab_size": 300}, "data": {"train": "prompts.jsonl", "test": "t", "template": "{q}"},
    "steps": 4, "batch_size": 2, "context": 8, "seed": 0,
    "recurrences": {"distribution": "poisson-lognormal", "cap": 4},
    "optimizer": {"peak_lr": 0.01, "betas": [0.9, 0.95]}, "penalties": {"last_step": 0.1},
    "evaluation": {"recurrences": [1, 2], "every": 2},
}  # fmt: skip
CELL = CellResult(
    cell=Cell(norm="pre", injection="linear", depth=2, seed=0), outcome=CellOutcome.FIXED_POINT, settling="fixed point",
    degeneracy=0.5, drift=0.0, norm_growth=1.0, counts=(1, 2), distance=(0.5, 0.1), norm=(1.0, 1.0), radius=0.9,
    radius_median=0.8, radius_error=0.01, predicted={"fixed point": 16}, observed_rate=0.9,
)  # fmt: skip
RULE = CalibratedRule(
    rule=StoppingRule.parse("step <= 0.1 & top1 >= 1"),
    model={"name": "a", "weights_sha256": "0", "revision": None, "interventions": []},
    recurrences=4,
    dtype="float32",
    prompts={"source": "a", "count": 4, "sha256": "0", "chosen_on": 2, "judged_on": 2},
    tolerance={"loss": 0.01, "changed": 0.05},
    judged={"recurrences": 2.5, "saved": 0.375},
)
