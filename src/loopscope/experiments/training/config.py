"""What a training run is made of, as data. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loopscope._util.config_json import build, read_object
from loopscope.errors import ConfigError
from loopscope.models.architecture import Architecture


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"This training configuration cannot be used: {message}.")


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
    sigma: float = 0.5
    """Standard deviation of the logarithm of the Poisson rate."""
    cap: int | None = None
    """No sample exceeds this number."""
    backprop_last: int | None = None
    """Gradients flow through the last n recurrences only; without it, through all."""

    def __post_init__(self) -> None:
        _require(math.isfinite(self.sigma) and self.sigma >= 0, f"recurrences.sigma must be >= 0, got {self.sigma}")
        for name in ("cap", "backprop_last"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"recurrences.{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class PenaltyConfig:
    """What is added to the loss so that the loop settles. Only a model with a recurrent stage may set any of this."""

    last_step: float = 0.0
    """Weight of the mean over tokens of `|s_R - s_(R-1)|^2 / |s_R|^2`, R being the step's number of recurrences."""
    eigenvalue: float = 0.0
    """Weight of the mean over tokens of `max(0, g - eigenvalue_target)^2`: g is the factor by which the derivative of
    a recurrence at s_R, by the token's own state, stretches a direction that power iteration has turned towards the
    leading eigenvectors."""
    eigenvalue_target: float = 0.8
    """Factors up to this cost nothing."""
    eigenvalue_products: int = 4
    """Products with the derivative, a step: the last is the one that counts. For a leading pair of complex eigenvalues
    a single factor swings around its modulus."""

    def __post_init__(self) -> None:
        for name in ("last_step", "eigenvalue", "eigenvalue_target"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, f"penalties.{name} must be >= 0, got {value}")
        _require(
            self.eigenvalue_products >= 1,
            f"penalties.eigenvalue_products must be at least 1, got {self.eigenvalue_products}",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule. Norms, biases and embeddings are not decayed."""

    peak_lr: float = 3e-3
    final_lr_fraction: float = 0.1
    """The learning rate ends at this fraction of its peak."""
    warmup_steps: int = 50
    """Steps of the linear rise from 0 to the peak."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the way from the peak to the end."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """Gradients with a larger Euclidean norm are scaled down to it."""

    def __post_init__(self) -> None:
        for name in ("peak_lr", "eps", "clip_norm"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, f"optimizer.{name} must be positive, got {value}")
        _require(0 <= self.final_lr_fraction <= 1, "optimizer.final_lr_fraction must lie in [0, 1]")
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps must not be negative")
        _require(all(0 <= beta < 1 for beta in self.betas), f"optimizer.betas must lie in [0, 1), got {self.betas}")
        _require(math.isfinite(self.weight_decay) and self.weight_decay >= 0, "optimizer.weight_decay must be >= 0")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and on how much of the test text the loss is measured."""

    every: int = 200
    """Steps between two evaluations; the last step is always evaluated."""
    recurrences: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of recurrences after which the loss is measured. A model without a recurrent stage has one loss only, and
    must not set them."""
    sequences: int = 32
    """Windows of the test text in an evaluation during training."""
    final_sequences: int | None = None
    """Windows in the evaluation at the end; without it, all of the test text."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, f"evaluation.every must be at least 1, got {self.every}")
        _require(self.sequences >= 1, f"evaluation.sequences must be at least 1, got {self.sequences}")
        _require(self.final_sequences is None or self.final_sequences >= 1, "evaluation.final_sequences must be >= 1")
        _require(
            len(self.recurrences) > 0 and all(number >= 1 for number in self.recurrences),
            f"evaluation.recurrences must be numbers of at least 1, got {list(self.recurrences)}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: with its text, everything that its final weights depend on (but for the rounding of the
    machine: processor, number of threads, torch version)."""

    architecture: Architecture
    data: DataConfig
    steps: int
    """Optimizer steps."""
    batch_size: int = 16
    """Windows in a step."""
    context: int = 256
    """T: input tokens in a window."""
    seed: int = 0
    """Fixes initial weights, order of documents, sampled recurrences and initial states."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    init_branch_gain: float = 1.0
    """Initial weight of the norms on branch outputs, where the architecture has them. With 1, a deep loop without
    injection forgets its tokens before it learns (see docs/log.md)."""
    recurrences: RecurrenceConfig = field(default_factory=RecurrenceConfig)
    penalties: PenaltyConfig = field(default_factory=PenaltyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log_every: int = 10
    """Steps between two lines of the log."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "context", "log_every", "checkpoint_every"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        _require(math.isfinite(self.init_std) and self.init_std > 0, f"init_std must be positive, got {self.init_std}")
        gain = self.init_branch_gain
        _require(math.isfinite(gain) and gain > 0, f"init_branch_gain must be positive, got {gain}")
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
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
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
