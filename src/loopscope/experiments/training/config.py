"""What a training run is made of, as data. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from loopscope._util.config_json import build, read_object
from loopscope._util.ranges import Count, Positive, Range, Seed, check_ranges
from loopscope.errors import ConfigError
from loopscope.models.architecture import Architecture

_UNUSABLE = "This training configuration cannot be used: "


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"{_UNUSABLE}{message}.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text is and how it becomes documents."""

    train: str
    """Training text: a `.jsonl` file, or a text file whose documents are separated by blank lines. Relative to the
    configuration file."""
    test: str
    """Held-out text of the same form."""
    template: str = "{text}"
    """How a JSONL line becomes a document: `{name}` stands for the field `name`. Text files do not use it."""
    tokenizer: str | None = None
    """A `tokenizer.json` to use, relative to the configuration file. Without one, a byte-level BPE of
    `architecture.vocab_size` entries is trained on the training text."""
    answer_after: str | None = None
    """A token. With it, training and evaluation look at the tokens of each document that stand behind its last
    occurrence, up to the document's end, and at no others: the text before them asks, and need not be predictable. A
    window that begins inside an answer does not see its rest as one."""


@dataclass(frozen=True, kw_only=True)
class RecurrenceConfig:
    """How many recurrences a training step runs. Only a model with a recurrent stage may set any of this."""

    distribution: Literal["constant", "poisson-lognormal"] = "constant"
    """`constant`: `architecture.recurrences` at every step. `poisson-lognormal`: sampled around that number."""
    sigma: Annotated[float, Range(0)] = 0.5
    """Standard deviation of the logarithm of the Poisson rate."""
    cap: Count | None = None
    """No sample exceeds this number."""
    backprop_last: Count | None = None
    """Gradients flow through the last n recurrences only; without it, through all."""

    def __post_init__(self) -> None:
        check_ranges(self, _UNUSABLE + "recurrences.")


@dataclass(frozen=True, kw_only=True)
class PenaltyConfig:
    """What is added to the loss so that the loop settles. Only a model with a recurrent stage may set any of this."""

    last_step: Annotated[float, Range(0)] = 0.0
    """Weight of the mean over tokens of `|s_R - s_(R-1)|^2 / |s_R|^2`, R being the step's number of recurrences."""
    eigenvalue: Annotated[float, Range(0)] = 0.0
    """Weight of the mean over tokens of `max(0, g - eigenvalue_target)^2`: g is the factor by which the derivative of
    a recurrence at s_R, by the token's own state, stretches a direction that power iteration has turned towards the
    leading eigenvectors."""
    eigenvalue_target: Annotated[float, Range(0)] = 0.8
    """Factors up to this cost nothing."""
    eigenvalue_products: Count = 4
    """Products with the derivative, a step: the last is the one that counts. For a leading pair of complex eigenvalues
    a single factor swings around its modulus."""

    def __post_init__(self) -> None:
        check_ranges(self, _UNUSABLE + "penalties.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule. Norms, biases and embeddings are not decayed."""

    peak_lr: Positive = 3e-3
    final_lr_fraction: Annotated[float, Range(0, 1)] = 0.1
    """The learning rate ends at this fraction of its peak."""
    warmup_steps: Annotated[int, Range(0)] = 50
    """Steps of the linear rise from 0 to the peak."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the way from the peak to the end."""
    betas: Annotated[tuple[float, float], Range(0, below=1)] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Range(0)] = 0.1
    clip_norm: Positive = 1.0
    """Gradients with a larger Euclidean norm are scaled down to it."""

    def __post_init__(self) -> None:
        check_ranges(self, _UNUSABLE + "optimizer.")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and on how much of the test text the loss is measured."""

    every: Count = 200
    """Steps between two evaluations; the last step is always evaluated."""
    recurrences: tuple[Count, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of recurrences after which the loss is measured. A model without a recurrent stage has one loss only, and
    must not set them."""
    sequences: Count = 32
    """Windows of the test text in an evaluation during training."""
    final_sequences: Count | None = None
    """Windows in the evaluation at the end; without it, all of the test text."""

    def __post_init__(self) -> None:
        check_ranges(self, _UNUSABLE + "evaluation.")
        _require(bool(self.recurrences), "evaluation.recurrences must name at least one number")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: with its text, everything that its final weights depend on (but for the rounding of the
    machine: processor, number of threads, torch version)."""

    architecture: Architecture
    data: DataConfig
    steps: Annotated[int, Range(1, 10**8)]
    """Optimizer steps."""
    batch_size: Annotated[int, Range(1, 10**5)] = 16
    """Windows in a step."""
    context: Count = 256
    """T: input tokens in a window."""
    seed: Seed = 0
    """Fixes initial weights, order of documents, sampled recurrences and initial states."""
    init_std: Positive = 0.02
    """Standard deviation of the initial weights."""
    init_branch_gain: Positive = 1.0
    """Initial weight of the norms on branch outputs, where the architecture has them. With 1, a deep loop without
    injection forgets its tokens before it learns (see docs/log.md)."""
    recurrences: RecurrenceConfig = field(default_factory=RecurrenceConfig)
    penalties: PenaltyConfig = field(default_factory=PenaltyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log_every: Count = 10
    """Steps between two lines of the log."""
    checkpoint_every: Count = 100
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        check_ranges(self, _UNUSABLE)
        _require(
            self.architecture.is_looped or self.recurrences == RecurrenceConfig(),
            "a model without recurrent layers has no recurrences to set; leave `recurrences` out",
        )
        _require(
            self.architecture.is_looped or self.penalties == PenaltyConfig(),
            "a model without recurrent layers has no loop that a penalty could act on; leave `penalties` out",
        )
        _require(
            self.architecture.is_looped or self.evaluation.recurrences == EvaluationConfig.recurrences,
            "a model without recurrent layers has one loss only; leave `evaluation.recurrences` out",
        )
        _require(
            not self.architecture.exit_gate,
            "no loss trains an exit gate here; leave `exit_gate` out of the architecture",
        )
        limit = self.architecture.max_positions
        _require(
            limit is None or self.context <= limit,
            f"context is {self.context}, longer than the model's max_positions of {limit}",
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` is its inverse."""
        # Through JSON, so that tuples become the lists that a file gives back.
        values: dict[str, Any] = json.loads(
            json.dumps(dataclasses.asdict(self) | {"architecture": self.architecture.to_dict()})
        )
        return values

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainConfig:
        """Build from JSON.

        Raises `ConfigError` naming the first field that is unknown, missing, or of the wrong type.
        """
        return build(cls, fields, "the training configuration")

    @classmethod
    def load(cls, path: Path) -> TrainConfig:
        """Read a JSON file. Raises `ConfigError` for a missing file, one that is not JSON, and wrong fields."""
        return cls.from_dict(read_object(path, "training configuration"))
