"""The state of a run between two steps, in one safetensors file that is whole or absent."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.optim import AdamW

from loopscope._files import write_atomically
from loopscope.errors import CheckpointError

__all__ = ["Progress", "load_state", "save_state"]


@dataclass(frozen=True)
class Progress:
    """How far a run has come. With the seed of the run it fixes everything that is drawn from here on."""

    step: int = 0
    """Finished steps."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = 0.0
    """Time spent in steps, over all resumptions."""

    def after_step(self, *, tokens: int, seconds: float) -> Progress:
        return Progress(self.step + 1, self.tokens + tokens, self.seconds + seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def save_state(path: Path, model: nn.Module, optimizer: AdamW, progress: Progress) -> None:
    """Write weights, both moments of every weight, and the progress. Raises `StorageError`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach().cpu()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu()
    write_atomically(path, save(tensors, metadata={"progress": json.dumps(asdict(progress))}))


def load_state(path: Path, model: nn.Module, optimizer: AdamW) -> Progress:
    """Fill model and optimizer from a file of `save_state`; bit for bit what was saved.

    Raises `CheckpointError` for a damaged file or one of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            progress = Progress(**json.loads(file.metadata()["progress"]))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(file.get_tensor(f"weight.{name}"))
                    optimizer.state[parameter] = {
                        "step": torch.tensor(progress.step, dtype=torch.float32),
                        # Copies: what the file hands out may be a view of it, and the file will be replaced.
                        "exp_avg": file.get_tensor(f"exp_avg.{name}").to(parameter.device, copy=True),
                        "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{name}").to(parameter.device, copy=True),
                    }
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"The training state {path} is damaged or of another model ({error}); delete its folder to start again."
        ) from error
    return progress
