"""The folder of one training run: what may go into it, and what is found there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from loopscope._files import held_folder, storage_error, write_atomically
from loopscope._json import differences
from loopscope.errors import ConfigError

__all__ = ["RunFolder"]

_MODEL = ("model.safetensors", "config.json", "tokenizer.json")


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
        try:
            found = json.loads(self.identity.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.identity} cannot be read ({error}); choose another output folder.") from error
        places = {"config.data.train", "config.data.test", "config.data.tokenizer"}
        differing = [name for name in differences(found, wanted) if name not in places]
        if differing:
            raise ConfigError(
                f"The output folder {self.path} holds a run with another configuration, differing in "
                f"{', '.join(differing)}; choose another folder, or delete this one to start again."
            )

    def clear_leftovers(self) -> None:
        """Remove the temporary files of a process that was killed while it wrote."""
        for name in ("train.json", "log.jsonl", "state.safetensors", "results.json", *_MODEL):
            for temporary in self.path.glob(f".{name}.*"):
                temporary.unlink(missing_ok=True)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line to the log. Raises `StorageError`."""
        try:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise storage_error(self.log, error) from error

    def rewind_log(self, step: int) -> None:
        """Drop what was logged after the last checkpoint (it will be done again), and a line cut short by a crash."""
        if not self.log.exists():
            return
        kept = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry.get("step", 0) <= step:
                kept.append(line + "\n")
        write_atomically(self.log, "".join(kept).encode())

    def entries(self, kind: str) -> list[dict[str, Any]]:
        """Lines of the log of one kind, in their order. Raises `StorageError`, and `ConfigError` for a damaged log."""
        try:
            lines = [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise storage_error(self.log, error) from error
        except ValueError as error:
            raise ConfigError(f"The log {self.log} is damaged ({error}); train the model again.") from error
        return [line for line in lines if line.get("kind") == kind]

    def read_results(self) -> dict[str, Any] | None:
        """Results of a finished run; None for one that is not."""
        if not self.results.exists():
            return None
        try:
            results: dict[str, Any] = json.loads(self.results.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.results} cannot be read ({error}); delete it to have it made again.") from error
        return results

    def write_results(self, results: Mapping[str, Any]) -> None:
        write_atomically(self.results, _json(results))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
