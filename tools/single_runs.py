"""How often a run by itself, and with other runs of the same tokens, shows that a true fixed point is one.

`python tools/single_runs.py` (four minutes): 32 random models of four layers and 12 tokens, near the loss of stability.
What is true is told by 1,500 recurrences in float64; judged are 256 in float32, alone, beside runs from two other
initial states, and beside one whose initial state differs by a rounding.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from loopscope import judge
from loopscope.experiments.cells import Cell
from loopscope.experiments.designs import NormName
from loopscope.experiments.random_models import architecture_of
from loopscope.models.native.transformer import LoopedTransformer

DESIGNS: tuple[tuple[NormName, float], ...] = (
    ("residual", 0.02),
    ("residual", 0.05),
    ("residual", 0.058),
    ("pre", 0.05),
    ("pre", 0.058),
    ("pre", 0.07),
    ("ouro", 0.02),
    ("ouro", 0.06),
)
SEEDS, TOKENS = 4, 12
RECURRENCES, LONG = 256, 1500


def model_of(norm: NormName, std: float, seed: int) -> LoopedTransformer:
    cell = Cell(norm=norm, injection="linear", depth=4, seed=seed, width=128, std=std, injection_scale=1.0, judged=True)
    return LoopedTransformer(architecture_of(cell)).initialize(seed, std).eval().requires_grad_(False)


@torch.inference_mode()
def run(model: LoopedTransformer, ids: Tensor, start: int, recurrences: int, nudge: float = 0.0) -> Tensor:
    """States of the last layer, (token, recurrence, width)."""
    sequence = model.encode(ids)
    state = model.initial_state(sequence, start)
    state = state * (1 + nudge * torch.randn(state.shape, generator=torch.Generator().manual_seed(0)))
    found = []
    for recurrence in range(1, recurrences + 1):
        state = model.recur(state, sequence, recurrence)
        found.append(state[0])
    return torch.stack(found, dim=1)


def main() -> None:
    said: dict[str, Counter[str]] = {"alone": Counter(), "from two other starts": Counter(), "nudged once": Counter()}
    for norm, std in DESIGNS:
        for seed in range(SEEDS):
            model = model_of(norm, std, seed)
            ids = torch.randint(0, 256, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
            states = run(model, ids, seed, RECURRENCES)
            starts = [run(model, ids, seed + 100 * other, RECURRENCES) for other in (1, 2)]
            twins = {
                "alone": [],
                "from two other starts": starts,
                "nudged once": [run(model, ids, seed, RECURRENCES, 6e-8)],
            }
            end = run(model.double(), ids, seed, LONG)[:, -300:]
            moved = (end - end[:, -1:]).norm(dim=-1).amax(1) / end[:, -1].norm(dim=-1)
            for name, runs in twins.items():
                verdicts = judge(states, "float32", twins=runs)
                for verdict, is_fixed in zip(verdicts, (moved < 1e-10).tolist(), strict=True):
                    marked = ", marked" if "noise" in verdict.unstable else ""
                    said[name][f"{'fixed' if is_fixed else 'other'}: {verdict.kind}{marked}"] += 1
    for name, counts in said.items():
        print(name, *(f"  {what}  {count}" for what, count in sorted(counts.items())), sep="\n")


if __name__ == "__main__":
    main()
