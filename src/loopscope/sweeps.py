"""Sweeps over trained models, as data: the file that asks for one, its cells, and what was found in each.

No torch is needed here, so that reports can read them.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from loopscope._json import build, read_object
from loopscope.architecture import Architecture
from loopscope.errors import ConfigError
from loopscope.grids import Dynamics
from loopscope.training.config import DataConfig, EvaluationConfig, PenaltyConfig, RecurrenceConfig, TrainConfig

__all__ = [
    "AutomatonTask",
    "Control",
    "Gsm8kTask",
    "StageCurves",
    "StudySettings",
    "Sweep",
    "SweepCell",
    "SweepResult",
    "TextTask",
    "control_architecture",
    "control_config",
]

Control = Literal["equal-depth", "equal-parameters"]
"""Feed-forward models: with as many layers as the looped one applies, or with its number of layers and of parameters.
"""

_BYTES = 259
"""Vocabulary of the byte-level tokenizer that has no merges: 256 bytes and three special tokens."""
_SAME_PARAMETERS = 0.06
_DECIDED = ("data", "seed")
"""Fields of a training configuration that neither the base nor a design may name."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"This sweep cannot be run: {message}.")


@dataclass(frozen=True, kw_only=True)
class AutomatonTask:
    """Given a row of bits and a number n, write the row that n steps of a cellular automaton make of it.

    In a step each cell becomes the exclusive or of itself and its left neighbour, the first cell's being 0 (rule 60),
    so that n steps need what n cells to the left were: more of them, more recurrences. Documents look like
    `3011010>010011`; the tokens behind `>` are the answer. Rows of the test text never occur in the training text.
    """

    kind: Literal["automaton"] = "automaton"
    cells: int = 12
    """In a row."""
    steps: int = 4
    """The most that are asked for; n is drawn between 1 and it."""
    documents: int = 20000
    """For training."""
    test_documents: int = 256
    seed: int = 0

    answer_after: ClassVar[str] = ">"

    def __post_init__(self) -> None:
        _require(2 <= self.cells <= 48, f"task.cells must lie between 2 and 48, got {self.cells}")
        _require(1 <= self.steps <= 9, f"task.steps must lie between 1 and 9, a digit, got {self.steps}")
        for name in ("documents", "test_documents"):
            _require(getattr(self, name) >= 1, f"task.{name} must be at least 1, got {getattr(self, name)}")
        _require(self.seed >= 0, f"task.seed must not be negative, got {self.seed}")

    @property
    def document_tokens(self) -> int:
        """With the begin and the end that frame it."""
        return 2 * self.cells + 4

    def fill(self, config: dict[str, Any]) -> None:
        """Put what the task decides into a training configuration."""
        config["data"] = {"train": "data/train.txt", "test": "data/test.txt", "answer_after": self.answer_after}
        config["architecture"] = {"vocab_size": _BYTES} | config.get("architecture", {})
        asked = config.setdefault("context", self.document_tokens)
        _require(
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

    prompts: int = 8
    horizon: int = 64
    """Twice as many recurrences are run."""
    beyond: int = 8
    """Losses and stages are taken up to so many times the trained number of recurrences."""

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("horizon", 8), ("beyond", 1)):
            _require(getattr(self, name) >= least, f"study.{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class SweepCell:
    """One training run and its analysis. All that is found follows from these, and from the text."""

    design: str
    """What it is called in tables: how it differs from the base."""
    settings: tuple[tuple[str, str], ...]
    """Dotted fields of the training configuration with their values, as JSON, that differ from the base."""
    control: Control | None
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
class StageCurves:
    """Measures of the stages of inference along one pass (prelude, block, coda), at a few recurrences."""

    measures: tuple[str, ...]
    recurrences: tuple[int, ...]
    """Numbers of them; a feed-forward model has one pass, listed as 1."""
    values: tuple[tuple[tuple[float | None, ...], ...], ...]
    """(measure, recurrence, position)."""
    repetition: dict[str, float | None]
    """Share of each measure's variance within the loop that goes with the layer, whatever the recurrence."""

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> StageCurves:
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
    """Training loss, nats, after so many steps."""
    loss: dict[int, float]
    """On the test text, nats, by number of recurrences."""
    accuracy: dict[int, float]
    """Share of the predicted tokens that are the likeliest one, likewise."""
    unigram_entropy: float
    bigram_entropy: float
    dynamics: Dynamics | None
    """None for a feed-forward model."""
    stages: StageCurves | None
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
                "stages": None if stages is None else StageCurves.from_dict(stages),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep's file asks for: a base, and what is varied around it."""

    task: Task
    base: dict[str, Any]
    """A training configuration without its `data`, `seed` and `evaluation.recurrences`, which the sweep decides."""
    grids: tuple[dict[str, list[Any]], ...] = ()
    """Each: dotted fields of the configuration with the values to try, all combinations of them."""
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Named designs: dotted fields with one value each."""
    seeds: int = 2
    """Models of each design."""
    controls: tuple[Control, ...] = ("equal-depth", "equal-parameters")
    """Feed-forward models that are trained beside each looped one."""
    study: StudySettings = field(default_factory=StudySettings)

    def __post_init__(self) -> None:
        _require(self.seeds >= 1, f"seeds must be at least 1, got {self.seeds}")
        decided = [name for name in _DECIDED if name in self.base]
        _require(not decided, f"base has a field {decided[:1]}, which the sweep decides; leave it out")

    @classmethod
    def load(cls, path: Path) -> Sweep:
        """Read a JSON file. Raises `ConfigError` for a missing file, one that is not JSON, and wrong fields."""
        return cls.from_dict(read_object(path, "sweep"))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Sweep:
        """Raises `ConfigError` naming the first field that is unknown, missing, or of the wrong type."""
        # Free-form parts: what they name is checked when the configurations are built.
        free = {"base": dict, "recipes": dict, "grids": list}
        for name, kind in free.items():
            if name in fields and not isinstance(fields[name], kind):
                what = "an object" if kind is dict else "a list of objects"
                raise ConfigError(f"The field {name!r} of the sweep must be {what}.")
        for grid in fields.get("grids", ()):
            if not isinstance(grid, dict):
                raise ConfigError("The field 'grids' of the sweep must be a list of objects.")
            for name, values in grid.items():
                if not isinstance(values, list) or not values:
                    raise ConfigError(f"A grid of the sweep needs a list of values for {name!r}.")
        for name, recipe in fields.get("recipes", {}).items():
            if not isinstance(recipe, dict):
                raise ConfigError(f"The recipe {name!r} of the sweep must be an object.")
        checked = build(_Checked, {name: value for name, value in fields.items() if name not in free}, "the sweep")
        if "base" not in fields:
            raise ConfigError("The sweep lacks the field 'base'.")
        given = {name: fields[name] for name in free if name in fields}
        if "grids" in given:
            given["grids"] = tuple(given["grids"])
        return cls(**{entry.name: getattr(checked, entry.name) for entry in dataclasses.fields(_Checked)}, **given)

    def cells(self, text_sha256: str = "") -> list[SweepCell]:
        """Every design with every seed, then the controls. A design that two grids name occurs once.

        Raises `ConfigError` for a setting that no configuration can have, naming the design.
        """
        looped = [cell for settings, name in self._designs() for cell in self._of_design(settings, name, text_sha256)]
        _require(bool(looped), "no design is left")
        unique = list({cell.config: cell for cell in reversed(looped)}.values())[::-1]
        return [*unique, *self._controls(unique)]

    @property
    def data(self) -> DataConfig:
        """The text of every cell."""
        return self._configuration({}, 0).data

    def _designs(self) -> list[tuple[dict[str, Any], str]]:
        """Settings and, of a recipe, the name."""
        found: list[tuple[dict[str, Any], str]] = [(settings, name) for name, settings in self.recipes.items()]
        for grid in self.grids:
            found += [(dict(zip(grid, values, strict=True)), "") for values in itertools.product(*grid.values())]
        return found or [({}, "")]

    def _of_design(self, settings: Mapping[str, Any], name: str, text_sha256: str) -> list[SweepCell]:
        base = self._configuration({}, 0).to_dict()
        cells = []
        for seed in range(self.seeds):
            try:
                config = self._configuration(settings, seed)
            except ConfigError as error:
                raise ConfigError(f"Of the design {name or settings}: {error}") from error
            _require(
                config.architecture.is_looped,
                f"the design {name or settings} has no recurrent layers; feed-forward models are its controls",
            )
            architecture = config.architecture
            _require(
                architecture.injection != "none" or architecture.state_init == "embeddings",
                f"in the design {name or settings} the prompt never enters the loop: without an injection, "
                "architecture.state_init has to be embeddings",
            )
            differing = tuple(
                (field, json.dumps(value)) for field, value in settings.items() if value != _value_at(base, field)
            )
            label = name or " ".join(f"{field.rpartition('.')[2]}={json.loads(value)}" for field, value in differing)
            cells.append(
                SweepCell(
                    design=label or "base",
                    settings=differing,
                    control=None,
                    control_of="",
                    task=self.task,
                    study=self.study,
                    config=config,
                    text_sha256=text_sha256,
                )
            )
        return cells

    def _configuration(self, settings: Mapping[str, Any], seed: int) -> TrainConfig:
        fields = copy.deepcopy(self.base)
        self.task.fill(fields)
        for name, value in settings.items():
            _require(
                name.partition(".")[0] not in _DECIDED, f"{name} is decided by the sweep for all designs; leave it out"
            )
            _set(fields, name, value)
        fields["seed"] = seed
        recurrences = fields.get("architecture", {}).get("recurrences", 1)
        evaluation = fields.setdefault("evaluation", {})
        _require("recurrences" not in evaluation, "evaluation.recurrences is decided by the sweep; leave it out")
        if isinstance(recurrences, int) and recurrences >= 1:
            evaluation["recurrences"] = _numbers(recurrences, self.study.beyond)
        return TrainConfig.from_dict(fields)

    def _controls(self, looped: list[SweepCell]) -> list[SweepCell]:
        found: dict[TrainConfig, SweepCell] = {}
        usual = self._configuration({}, 0).architecture.norm_placement
        for control in self.controls:
            for cell in looped:
                config = control_config(cell.config, control)
                norms = config.architecture.norm_placement
                found.setdefault(
                    config,
                    dataclasses.replace(
                        cell,
                        design=f"feed-forward, {config.architecture.layers} layers"
                        + (f", {norms}" if norms != usual else ""),
                        settings=(),
                        control=control,
                        control_of=cell.design,
                        config=config,
                    ),
                )
        return list(found.values())


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """The fields of a sweep that have a form of their own."""

    task: Task
    seeds: int = 2
    controls: tuple[Control, ...] = ("equal-depth", "equal-parameters")
    study: StudySettings = field(default_factory=StudySettings)


def control_config(looped: TrainConfig, control: Control) -> TrainConfig:
    """How the feed-forward model that a looped one is held against is trained: alike in all that is not the loop."""
    return dataclasses.replace(
        looped,
        architecture=control_architecture(looped.architecture, control),
        recurrences=RecurrenceConfig(),
        penalties=PenaltyConfig(),
        evaluation=dataclasses.replace(looped.evaluation, recurrences=EvaluationConfig.recurrences),
    )


def control_architecture(looped: Architecture, control: Control) -> Architecture:
    """A feed-forward model to hold a looped one against.

    `equal-depth` has as many layers as the looped one applies at its trained number of recurrences. `equal-parameters`
    has its layers, once each, and MLPs that are wider by what the injection takes, if that is more than 6 % of all
    parameters: below, designs that differ in their injection share a control.
    """
    layers = looped.layers if control == "equal-parameters" else looped.visits(looped.recurrences)
    plain = dataclasses.replace(
        looped,
        prelude=layers,
        recurrent=0,
        coda=0,
        recurrences=1,
        injection="none",
        loop_norm="none",
        state_init="embeddings",
        state_std=1.0,
        eta=1.0,
        full_attention_layers=(),
        sliding_window=None,
    )
    if control == "equal-depth" or looped.parameters <= (1 + _SAME_PARAMETERS) * plain.parameters:
        return plain
    matrices = 3 if looped.mlp == "gated" else 2
    missing = (looped.parameters - plain.parameters) / (matrices * looped.width * layers)
    return dataclasses.replace(plain, mlp_width=looped.mlp_width + round(missing))


def _numbers(trained: int, beyond: int) -> list[int]:
    """Numbers of recurrences at which losses are taken: powers of two up to the trained number, it, and multiples."""
    powers = [2**power for power in range(trained.bit_length()) if 2**power <= trained]
    multiples = [trained * 2**power for power in range(beyond.bit_length()) if 2**power <= beyond]
    return sorted({*powers, *multiples, trained, trained * beyond})


def _set(fields: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    for step in path:
        fields = fields.setdefault(step, {})
        if not isinstance(fields, dict):
            raise ConfigError(f"{name!r} names no field of a training configuration.")
    fields[last] = copy.deepcopy(value)


def _value_at(fields: Mapping[str, Any], name: str) -> Any:
    value: Any = fields
    for step in name.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return value
