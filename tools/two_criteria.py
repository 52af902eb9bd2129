"""The table of docs/method.md: which tokens have settled, by the criteria of two papers, on the same tokens.

    python tools/two_criteria.py [--prompts 8] [--trajectories FOLDER]

Prints a row for each shipped model with a loop, in float32 and bfloat16, and for each trajectory of FOLDER, one token's
loop states (recurrences, width) in a .npy file, of which there is no readout.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import loopscope
from loopscope.answers.answer import Criterion
from loopscope.answers.criteria import Tokens
from loopscope.evaluation.synthetic import SYNTHETIC
from loopscope.models.subject import Batch, Subject
from loopscope.prompts.load import load_prompts
from loopscope.study import view_study

RECURRENCES, HORIZON = 32, 64
SETTLES = 0.05
"""arXiv 2608.18222: a token with an exponent below minus this settles, above it drifts, between the two is marginal."""
MODELS = ("injected", "uninjected", "permutations", "addition")
SKIPPED = ("path-independence", "cycle-similarity", "trajectories", "heads", "maps", "stages", "neurons", "behaviour")


def texts(name: str, count: int) -> list[str]:
    """Documents of the task that the model was trained on, or questions of GSM8K."""
    if name in SYNTHETIC:
        return [document.text for document in SYNTHETIC[name].split()[1][:count]]
    return [prompt.text or "" for prompt in load_prompts(prompts="gsm8k-64", limit=count)]


def changed(model: Subject, batch: Batch) -> np.ndarray:
    """Whether the most probable next token after `HORIZON` recurrences is not that after `RECURRENCES`, by token."""
    run = model.start(batch, recurrences=HORIZON)
    tops = []
    for recurrence in range(1, HORIZON + 1):
        run.advance()
        if recurrence in (RECURRENCES, HORIZON):
            tops.append(run.decode().argmax(-1))
    return np.asarray((tops[0] != tops[1]).cpu())


def row_of_model(name: str, dtype: str, count: int) -> list[str]:
    model = loopscope.load(f"demo:{name}", dtype=dtype)
    study = loopscope.analyze(
        model,
        texts(name, count),
        recurrences=RECURRENCES,
        horizon=HORIZON,
        skip=SKIPPED,
        batch_size=count,
        progress=False,
    )
    found = Tokens.of(view_study(study), Criterion())
    batch = Batch.of([entry["token_ids"] for entry in study.tokens])
    grown = loopscope.lyapunov_exponents(model, batch, recurrences=HORIZON, exponents=1).exponents[..., 0][found.known]
    other = changed(model, batch)[found.known]
    return [
        f"demo:{name}",
        dtype,
        f"{found.total:,}",
        f"{found.near.sum():,}",
        f"{found.safe.sum():,}",
        f"{(found.near & found.safe).sum():,}",
        " / ".join(f"{each:,}" for each in found.reasons),
        f"{(found.near & other).sum():,}; {(found.safe & other).sum():,}",
        f"{(grown < -SETTLES).sum():,} / {(np.abs(grown) <= SETTLES).sum():,} / {(grown > SETTLES).sum():,}",
    ]


def row_of_trajectory(path: Path, others: list[Path]) -> list[str]:
    """Shares of the last state's norm; and the mean logarithm of the factor by which the distance to runs of the same
    prompt from other initial states grows in a recurrence of the first quarter, and of the second half."""
    states, *beside = (np.load(each, allow_pickle=False).astype(np.float64) for each in (path, *others))
    horizon = len(states)
    measured = horizon // 2
    steps = np.linalg.norm(np.diff(states, axis=0), axis=1)
    size = np.linalg.norm(states[-1])
    away, left = np.linalg.norm(states[measured - 1] - states[-1]) / size, steps[measured - 1 :].sum() / size
    growth = []
    for first, last in ((0, horizon // 4), (measured, horizon)):
        apart = [np.linalg.norm(states - other, axis=1)[[first, last - 1]] for other in beside]
        growth.append(np.mean([np.log(end / start) / (last - 1 - first) for start, end in apart]) if beside else np.nan)
    return [
        *(path.stem, f"{measured}", f"{horizon}", f"{steps[-1] / size:.3f}", f"{away:.3f}", f"{left:.2f}"),
        *(f"{each:.3f}" for each in growth),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--trajectories", type=Path)
    given = parser.parse_args()
    for name in MODELS:
        for dtype in ("float32", "bfloat16"):
            print("|", " | ".join(row_of_model(name, dtype, given.prompts)), "|", flush=True)
    for path in sorted(given.trajectories.glob("*.npy")) if given.trajectories else ():
        prompt = path.stem.rpartition("_init")[0]
        others = [each for each in given.trajectories.glob(f"{prompt}_init*.npy") if each != path]
        print("|", " | ".join(row_of_trajectory(path, others)), "|")
