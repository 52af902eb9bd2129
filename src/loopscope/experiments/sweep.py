"""What the file of a sweep asks for, checked."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from loopscope._util.config_json import build, read_object
from loopscope._util.ranges import Range, check_ranges
from loopscope.errors import ConfigError
from loopscope.experiments.sweep_cells import (
    UNRUNNABLE,
    ControlName,
    StudySettings,
    SweepCell,
    Task,
    object_in,
    require,
)
from loopscope.experiments.training.config import (
    DataConfig,
    EvaluationConfig,
    PenaltyConfig,
    RecurrenceConfig,
    TrainConfig,
)
from loopscope.models.architecture import Architecture

_SAME_PARAMETERS = 0.06
_MOST_MODELS = 2000
"""Looped ones, of one sweep."""
_DECIDED = ("data", "seed")
"""Fields of a training configuration that neither the base nor a design may name."""


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """The fields of a sweep that have a form of their own."""

    task: Task
    seeds: Annotated[int, Range(1, 1000)] = 5
    """Models of each design; fewer tell only of what is far larger than their spread."""
    controls: tuple[ControlName, ...] = ("equal-depth", "equal-parameters")
    """Feed-forward models that are trained beside each looped one."""
    study: StudySettings = field(default_factory=StudySettings)


@dataclass(frozen=True, kw_only=True)
class Sweep(_Checked):
    """What a sweep's file asks for: a base, and what is varied around it."""

    base: dict[str, Any]
    """A training configuration without its `data`, `seed` and `evaluation.recurrences`, which the sweep decides."""
    grids: tuple[dict[str, list[Any]], ...] = ()
    """Each: dotted fields of the configuration with the values to try, all combinations of them."""
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Named designs: dotted fields with one value each."""

    def __post_init__(self) -> None:
        check_ranges(self, UNRUNNABLE)
        decided = [name for name in _DECIDED if name in self.base]
        require(not decided, f"base has a field {decided[:1]}, which the sweep decides; leave it out")
        designs = len(self.recipes) + sum(math.prod(map(len, grid.values())) for grid in self.grids)
        require(
            designs * self.seeds <= _MOST_MODELS,
            f"it asks for {designs:,} designs with {self.seeds} seeds each, and at most {_MOST_MODELS:,} models are "
            "trained; leave values out",
        )

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
        require(bool(looped), "no design is left")
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
            require(
                config.architecture.is_looped,
                f"the design {name or settings} has no recurrent layers; feed-forward models are its controls",
            )
            architecture = config.architecture
            require(
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
            require(
                name.partition(".")[0] not in _DECIDED, f"{name} is decided by the sweep for all designs; leave it out"
            )
            _set(fields, name, value)
        fields["seed"] = seed
        recurrences = object_in(fields, "architecture").get("recurrences", 1)
        fields["evaluation"] = evaluation = object_in(fields, "evaluation")
        require("recurrences" not in evaluation, "evaluation.recurrences is decided by the sweep; leave it out")
        if isinstance(recurrences, int) and 1 <= recurrences <= 10**6:
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


def control_config(looped: TrainConfig, control: ControlName) -> TrainConfig:
    """How the feed-forward model that a looped one is held against is trained: alike in all that is not the loop."""
    return dataclasses.replace(
        looped,
        architecture=control_architecture(looped.architecture, control),
        recurrences=RecurrenceConfig(),
        penalties=PenaltyConfig(),
        evaluation=dataclasses.replace(looped.evaluation, recurrences=EvaluationConfig.recurrences),
    )


def control_architecture(looped: Architecture, control: ControlName) -> Architecture:
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
