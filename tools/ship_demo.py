"""Copy a finished training run into the package, where `demo:NAME` finds it.

    python tools/ship_demo.py out/train/injected

What only a resumed training needs (the optimiser's state) stays behind.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

SHIPPED = ("config.json", "model.safetensors", "tokenizer.json", "train.json", "log.jsonl", "results.json")
MODELS = Path(__file__).resolve().parent.parent / "src" / "loopscope" / "demo" / "models"
LARGEST = 5_000_000


def ship(run: Path) -> Path:
    """Copy one run's folder; its name becomes the model's."""
    target = MODELS / run.name
    missing = [name for name in SHIPPED if not (run / name).is_file()]
    if missing:
        raise SystemExit(f"{run} lacks {missing[0]}: the training is not finished.")
    if (run / "model.safetensors").stat().st_size > LARGEST:
        raise SystemExit(f"{run / 'model.safetensors'} is larger than {LARGEST:,} bytes.")
    target.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        shutil.copyfile(run / name, target / name)
    return target


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(ship(Path(argument)))
