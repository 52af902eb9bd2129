"""Sweeps over trained models, as data: the file that asks for one, its cells, and what was found in each.

No torch is needed here, so that reports can read them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from loopscope._util.config_json import build
from loopscope._util.ranges import Count, Range, Seed, check_ranges
from loopscope.errors import ConfigError
from loopscope.experiments.cells import Dynamics
from loopscope.experiments.training.config import (
    TrainConfig,
)

ControlName = Literal["equal-depth", "equal-parameters"]
"""Feed-forward models: with as many layers as the looped one applies, or with its number of layers and of parameters.
"""

_BYTES = 259
"""Vocabulary of the byte-level tokenizer that has no merges: 256 bytes and three special tokens."""


UNRUNNABLE = "This sweep cannot be run: "


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"{UNRUNNABLE}{message}.")


def object_in(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of a part of a training configuration; empty where there is none. Raises `ConfigError` for another
    thing."""
    found = config.get(name, {})
    require(isinstance(found, dict), f"{name} must be an object, got {reprlib.repr(found)}")
    return dict(found)


@dataclass(frozen=True, kw_only=True)
class AutomatonTask:
    """Given a row of bits and a number n, write the row that n steps of a cellular automaton make of it.

    In a step each cell becomes the exclusive or of itself and its left neighbour, the first cell's being 0 (rule 60),
    so that n steps need what n cells to the left were: more of them, more recurrences. Documents look like
    `3011010>010011`; the tokens behind `>` are the answer. Rows of the test text never occur in the training text.
    """

    kind: Literal["automaton"] = "automaton"
    cells: Annotated[int, Range(2, 48)] = 12
    """In a row."""
    steps: Annotated[int, Range(1, 9, why="to be one digit")] = 4
    """The most that are asked for; n is drawn between 1 and it."""
    documents: Count = 20000
    """For training."""
    test_documents: Annotated[int, Range(1, 20000)] = 256
    seed: Seed = 0

    answer_after: ClassVar[str] = ">"

    def __post_init__(self) -> None:
        check_ranges(self, f"{UNRUNNABLE}task.")

    @property
    def document_tokens(self) -> int:
        """With the begin and the end that frame it."""
        return 2 * self.cells + 4

    def fill(self, config: dict[str, Any]) -> None:
        """Put what the task decides into a training configuration."""
        config["data"] = {"train": "data/train.txt", "test": "data/test.txt", "answer_after": self.answer_after}
        config["architecture"] = {"vocab_size": _BYTES} | object_in(config, "architecture")
        asked = config.setdefault("context", self.document_tokens)
        require(
            asked == self.document_tokens,
            f"base.context is {asked}, but a document of this task has {self.document_tokens} tokens, and windows have "
            "to begin where documents do; leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """Next-token prediction on text files (see `loopscope.training.config.DataConfig`)."""

    kind: Literal["text"] = "text"
    train: str
    test: str
    """Relative to the file of the sweep."""
    template: str = "{text}"
    tokenizer: str | None = None
    answer_after: str | None = None

    def fill(self, config: dict[str, Any]) -> None:
        """Put what the task decides into a training configuration."""
        config["data"] = {name: value for name, value in dataclasses.asdict(self).items() if name != "kind"}


@dataclass(frozen=True, kw_only=True)
class Gsm8kTask:
    """Next-token prediction on GSM8K, question and answer (Cobbe et al., arXiv 2110.14168)."""

    kind: Literal["gsm8k"] = "gsm8k"
    folder: str = "gsm8k"
    """Where its `train.jsonl` and `test.jsonl` are, relative to the file of the sweep."""

    def fill(self, config: dict[str, Any]) -> None:
        """Put what the task decides into a training configuration."""
        config["data"] = {
            "train": f"{self.folder}/train.jsonl",
            "test": f"{self.folder}/test.jsonl",
            "template": "{question}\n{answer}",
        }


Task = AutomatonTask | TextTask | Gsm8kTask
_TASKS: dict[str, type[AutomatonTask] | type[TextTask] | type[Gsm8kTask]] = {
    "automaton": AutomatonTask,
    "text": TextTask,
    "gsm8k": Gsm8kTask,
}


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """How each trained model is analysed, on the first documents of the test text."""

    prompts: Annotated[int, Range(1, 10**4)] = 8
    horizon: Annotated[int, Range(8, 10**5)] = 64
    """Twice as many recurrences are run."""
    beyond: Annotated[int, Range(1, 1024)] = 8
    """Losses and stages are taken up to this many times the trained number of recurrences."""

    def __post_init__(self) -> None:
        check_ranges(self, f"{UNRUNNABLE}study.")


@dataclass(frozen=True, kw_only=True)
class SweepCell:
    """One training run and its analysis. All that is found follows from these, and from the text."""

    design: str
    """What it is called in tables: how it differs from the base."""
    settings: tuple[tuple[str, str], ...]
    """Dotted fields of the training configuration with their values, as JSON, that differ from the base."""
    control: ControlName | None
    """None for a looped model."""
    control_of: str
    """Of a control: the first design that it stands beside; else empty."""
    task: Task
    study: StudySettings
    config: TrainConfig
    text_sha256: str
    """Of training and test text together; empty where the task makes them."""

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def name(self) -> str:
        """Of its file: readable, and another one for any other cell."""
        about = self.to_dict()
        for left in ("design", "settings", "control_of"):
            del about[left]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
        readable = re.sub(r"[^a-z0-9.]+", "-", self.design.lower()).strip("-")[:60]
        return f"{readable}-s{self.seed}-{digest}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` is its inverse."""
        return dataclasses.asdict(self) | {"config": self.config.to_dict(), "settings": dict(self.settings)}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> SweepCell:
        """Raises `KeyError`, `TypeError`, `ValueError` or `ConfigError` for what is no cell."""
        return cls(
            **{
                **entry,
                "settings": tuple((str(name), str(value)) for name, value in entry["settings"].items()),
                "task": build(_TASKS[entry["task"]["kind"]], entry["task"], "the task"),
                "study": build(StudySettings, entry["study"], "the settings of the study"),
                "config": TrainConfig.from_dict(entry["config"]),
            }
        )


@dataclass(frozen=True, kw_only=True)
class PassCurves:
    """Measures of the stages of inference along one pass (prelude, block, coda), at a few recurrences."""

    measures: tuple[str, ...]
    recurrences: tuple[int, ...]
    """Numbers of them; a feed-forward model has one pass, listed as 1."""
    values: tuple[tuple[tuple[float | None, ...], ...], ...]
    """(measure, recurrence, position)."""
    repetition: dict[str, float | None]
    """Share of each measure's variance within the loop that goes with the layer, whatever the recurrence."""

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> PassCurves:
        """Raises `KeyError` or `TypeError` for what is no such record."""
        return cls(
            measures=tuple(entry["measures"]),
            recurrences=tuple(entry["recurrences"]),
            values=tuple(tuple(tuple(row) for row in rows) for rows in entry["values"]),
            repetition=dict(entry["repetition"]),
        )


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What became of a cell."""

    cell: SweepCell
    layout: str
    parameters: int
    depth: int
    """Layers that are applied in a forward pass at the trained number of recurrences."""
    tokens: int
    """Trained on."""
    curve: tuple[tuple[int, float], ...]
    """Training loss, nats, after a number of steps."""
    loss: dict[int, float]
    """On the test text, nats, by number of recurrences."""
    accuracy: dict[int, float]
    """Share of the predicted tokens that are the likeliest one, likewise."""
    unigram_entropy: float
    bigram_entropy: float
    dynamics: Dynamics | None
    """None for a feed-forward model."""
    stages: PassCurves | None
    """None where they could not be taken."""
    seconds: float = 0.0
    """Of training and analysis."""

    @property
    def trained(self) -> int:
        """Number of recurrences that the model was trained with, 1 for a feed-forward one."""
        return self.cell.config.architecture.recurrences

    @property
    def loss_at_trained(self) -> float:
        return self.loss[self.trained]

    @property
    def loss_beyond(self) -> float:
        """At the largest number of recurrences."""
        return self.loss[max(self.loss)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` is its inverse."""
        return dataclasses.asdict(self) | {"cell": self.cell.to_dict()}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> SweepResult:
        """Raises `KeyError`, `TypeError`, `ValueError` or `ConfigError` for what is no result."""
        dynamics, stages = entry["dynamics"], entry["stages"]
        return cls(
            **{
                **entry,
                "cell": SweepCell.from_dict(entry["cell"]),
                "curve": tuple((int(step), float(loss)) for step, loss in entry["curve"]),
                "loss": {int(number): float(value) for number, value in entry["loss"].items()},
                "accuracy": {int(number): float(value) for number, value in entry["accuracy"].items()},
                "dynamics": None if dynamics is None else Dynamics(**Dynamics.fields_of(dynamics)),
                "stages": None if stages is None else PassCurves.from_dict(stages),
            }
        )
