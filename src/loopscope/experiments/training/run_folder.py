"""The folder of one training run: what may go into it, and what is found there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from torch.optim import AdamW

from loopscope._util.config_json import differences, read_object
from loopscope._util.files import held_folder, storage_error, write_atomically
from loopscope._util.reading import foreign, open_file, parse_json, read_bytes
from loopscope.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class TrainingProgress:
    """How far a run has come. With the seed of the run it fixes everything that is drawn from here on."""

    step: int = 0
    """Finished steps."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = 0.0
    """Time spent in steps, over all resumptions."""

    def after_step(self, *, tokens: int, seconds: float) -> TrainingProgress:
        return TrainingProgress(self.step + 1, self.tokens + tokens, self.seconds + seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def save_state(path: Path, model: nn.Module, optimizer: AdamW, progress: TrainingProgress) -> None:
    """Write weights, both moments of every weight, and the progress. Raises `StorageError`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach().cpu()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu()
    write_atomically(path, save(tensors, metadata={"progress": json.dumps(asdict(progress))}))


def load_state(path: Path, model: nn.Module, optimizer: AdamW) -> TrainingProgress:
    """Fill model and optimizer from a file of `save_state`; bit for bit what was saved.

    Raises `CheckpointError` for a damaged file or one of another model.
    """
    try:
        with open_file(path), foreign(), safe_open(path, framework="pt") as file:
            progress = TrainingProgress(**parse_json(file.metadata()["progress"]))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(file.get_tensor(f"weight.{name}"))
                    optimizer.state[parameter] = {
                        "step": torch.tensor(progress.step, dtype=torch.float32),
                        # Copies: what the file hands out may be a view of it, and the file will be replaced.
                        "exp_avg": file.get_tensor(f"exp_avg.{name}").to(parameter.device, copy=True),
                        "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{name}").to(parameter.device, copy=True),
                    }
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The training state {path} is damaged or of another model ({error}); delete its folder to start again."
        ) from error
    return progress


class RunFolder:
    """Paths in the folder of a run, and its log.

    train.json               the configuration and the hashes of the text
    log.jsonl                one JSON object a line
    state.safetensors        weights and moments at the last checkpoint
    model.safetensors, config.json, tokenizer.json   the model at the last checkpoint
    results.json             once the run is finished
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity = path / "train.json"
        self.log = path / "log.jsonl"
        self.state = path / "state.safetensors"
        self.tokenizer = path / "tokenizer.json"
        self.results = path / "results.json"

    def held(self) -> AbstractContextManager[None]:
        """Keep other processes out (see `held_folder`)."""
        return held_folder(self.path)

    def claim(self, config: Mapping[str, Any], hashes: Mapping[str, Any]) -> None:
        """Make this the folder of one configuration and one text, or check that it is.

        The places of the text are not compared, its contents are. A run that has not come to its first checkpoint has
        nothing to lose, and gives way to another one. Raises `ConfigError` naming the fields that differ, and for a
        folder that holds other things.
        """
        wanted = {"config": dict(config), "sha256": dict(hashes)}
        if not self.identity.exists():
            strangers = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
            if strangers:
                raise ConfigError(
                    f"The output folder {self.path} holds {strangers[0]!r} and no training run; "
                    "choose an empty or new folder."
                )
        if not self.state.exists() and not self.results.exists():
            for left in (self.log, self.tokenizer):
                left.unlink(missing_ok=True)
            write_atomically(self.identity, _json(wanted))
            return
        found = read_object(self.identity, "record of a training run")
        places = {"config.data.train", "config.data.test", "config.data.tokenizer"}
        differing = [name for name in differences(found, wanted) if name not in places]
        if differing:
            raise ConfigError(
                f"The output folder {self.path} holds a run with another configuration, differing in "
                f"{', '.join(differing)}; choose another folder, or delete this one to start again."
            )

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line to the log. Raises `StorageError`."""
        try:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise storage_error(self.log, error) from error

    def rewind_log(self, step: int) -> None:
        """Drop what was logged after the last checkpoint (it will be done again), and a last line cut short by a crash.

        Raises `ConfigError` for a damaged log: its lines are results.
        """
        if not self.log.exists():
            return
        kept = [entry for entry in self._lines() if entry.get("step", 0) <= step]
        write_atomically(self.log, "".join(json.dumps(entry) + "\n" for entry in kept).encode())

    def _lines(self) -> list[dict[str, Any]]:
        try:
            *whole, last = read_bytes(self.log).split(b"\n")
            found = [parse_json(line.decode()) for line in whole]
            with suppress(ValueError):
                found.append(parse_json(last.decode()))
            if not all(isinstance(entry, dict) and isinstance(entry.get("step", 0), int) for entry in found):
                raise ValueError("not every line is an object of a step")
        except (OSError, ValueError) as error:
            raise ConfigError(f"The log {self.log} is damaged ({error}); train the model again.") from error
        return found

    def entries(self, kind: str) -> list[dict[str, Any]]:
        """Lines of the log of one kind, in their order. Raises `ConfigError` for a damaged log."""
        return [entry for entry in self._lines() if entry.get("kind") == kind]

    def read_results(self) -> Mapping[str, Any] | None:
        """Results of a finished run; None for one that is not."""
        if not self.results.exists():
            return None
        return read_object(self.results, "record of results")

    def write_results(self, results: Mapping[str, Any]) -> None:
        write_atomically(self.results, _json(results))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
