"""What a model is made of, as data.

`Architecture` describes every model that the native implementation can run. It imports no torch, so that layouts can be
read, compared and printed without loading anything.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from loopscope.errors import ConfigError

__all__ = [
    "Activation",
    "Architecture",
    "Injection",
    "Llama3Scaling",
    "LoopNorm",
    "Mlp",
    "NormPlacement",
    "QkNorm",
    "Rotary",
    "Stage",
    "StateInit",
]

Stage = Literal["prelude", "recurrent", "coda"]
Injection = Literal["none", "linear", "add"]
NormPlacement = Literal["pre", "residual", "branch-in-out", "branch-out"]
LoopNorm = Literal["none", "recurrence", "loop"]
QkNorm = Literal["none", "head", "full"]
Rotary = Literal["none", "halves", "adjacent"]
Mlp = Literal["gated", "plain"]
Activation = Literal["silu", "gelu", "gelu-tanh", "relu"]
StateInit = Literal["embeddings", "normal"]

_T = TypeVar("_T")

_LARGEST_SIZE = 10**6
_MOST_LAYERS = 10**4
"""Far above any model. A larger number comes from a damaged file, and would fail later, in torch, without its name."""


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Frequency-dependent rotary scaling of Llama 3.1 and later: long wavelengths are stretched by `factor`, short
    ones are left, those between are interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        if not 0 < self.low_freq_factor < self.high_freq_factor or self.factor < 1 or self.original_max_positions < 1:
            raise ConfigError(
                f"The rotary scaling {self} is not a llama3 scaling: it needs factor >= 1 and "
                "0 < low_freq_factor < high_freq_factor."
            )


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A (prelude, recurrent (x) recurrences, coda) transformer.

    A feed-forward model is the case `recurrent=0`: all of its layers are its prelude (and coda, if it has one).
    """

    vocab_size: int
    """Rows of the embedding, and entries of the logits."""
    width: int
    """D, the width of the residual stream."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key-value heads; `heads` is a multiple of it."""
    head_dim: int
    """Width of one head; `heads * head_dim` need not be D."""
    mlp_width: int
    """Hidden width of the MLP."""

    prelude: int
    """p: layers that run once, before the loop."""
    recurrent: int
    """k: layers of the recurrent block."""
    coda: int
    """c: layers that run once, after the loop."""
    recurrences: int = 1
    """R: how often the recurrent block runs unless told otherwise, the (mean) number that the model was trained with.
    """

    injection: Injection = "none"
    """How the prelude's output e enters the state s at the start of each recurrence: not at all, `[s ; e] W`, or s +
    e.
    """
    norm_placement: NormPlacement = "pre"
    """Where a layer's norms n1..n4 sit. `pre`: n1 and n3, before each branch. `residual`: n1 and n3 before each
    branch, n2 and n4 on the residual stream after it (Huginn). `branch-in-out`: n1 and n3 before each branch, n2 and
    n4 on its output before it is added (Ouro). `branch-out`: n2 and n4 only, on the branch outputs (OLMo-2)."""
    loop_norm: LoopNorm = "none"
    """The final norm is also applied to the state at the end of each recurrence (Ouro), or once after the loop
    (Huginn).
    """
    norm_eps: float = 1e-6

    qk_norm: QkNorm = "none"
    """RMS norm on queries and keys before the rotation: per head (Qwen3), or over all heads together (OLMo-2)."""
    qk_bias: bool = False
    """A learned bias added to queries and keys before the rotation (Huginn)."""
    rotary: Rotary = "halves"
    """Which coordinates of a head are rotated together: i and i + d/2 (`halves`), or 2i and 2i + 1 (`adjacent`)."""
    rope_base: float = 10000.0
    rope_scaling: Llama3Scaling | None = None

    mlp: Mlp = "gated"
    activation: Activation = "silu"

    tied_embeddings: bool = False
    """The unembedding is the embedding."""
    embedding_scale: float = 1.0
    """Token embeddings are multiplied by it."""

    state_init: StateInit = "embeddings"
    """s_0: the prelude's output (the token embeddings where there is no prelude), or noise, from a normal distribution
    cut at three standard deviations."""
    state_std: float = 1.0
    """Standard deviation of that noise before it is cut."""

    max_positions: int | None = None
    """Longest sequence the model was made for, if it says."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "heads", "kv_heads", "head_dim", "mlp_width", "recurrences"):
            self._require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("vocab_size", "width", "heads", "kv_heads", "head_dim", "mlp_width"):
            self._require(
                getattr(self, name) <= _LARGEST_SIZE,
                f"{name} must be at most {_LARGEST_SIZE}, got {getattr(self, name)}",
            )
        for name in ("prelude", "recurrent", "coda"):
            self._require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
            self._require(
                getattr(self, name) <= _MOST_LAYERS, f"{name} must be at most {_MOST_LAYERS}, got {getattr(self, name)}"
            )
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            choices = get_args(hints[field.name])
            if choices and all(isinstance(choice, str) for choice in choices):
                value = getattr(self, field.name)
                self._require(value in choices, f"{field.name} must be one of {', '.join(choices)}, got {value!r}")
        self._require(self.layers >= 1, "there must be at least one layer in prelude, recurrent or coda")
        self._require(
            self.heads % self.kv_heads == 0,
            f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})",
        )
        self._require(
            self.rotary == "none" or self.head_dim % 2 == 0,
            f"a rotated head needs an even head_dim, got {self.head_dim}",
        )
        for name in ("norm_eps", "rope_base", "state_std", "embedding_scale"):
            value = getattr(self, name)
            self._require(math.isfinite(value) and value > 0, f"{name} must be a positive finite number, got {value}")
        if self.recurrent == 0:
            for name, neutral in (
                ("injection", "none"),
                ("loop_norm", "none"),
                ("state_init", "embeddings"),
                ("recurrences", 1),
            ):
                value = getattr(self, name)
                self._require(
                    value == neutral, f"{name} is {value!r}, but a model without recurrent layers has no loop"
                )

    @staticmethod
    def _require(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(f"This architecture cannot be built: {message}.")

    @property
    def layers(self) -> int:
        """Unique layers, p + k + c."""
        return self.prelude + self.recurrent + self.coda

    @property
    def is_looped(self) -> bool:
        return self.recurrent > 0

    def visits(self, recurrences: int) -> int:
        """Realised depth: p + k R + c layer applications."""
        return self.prelude + self.recurrent * recurrences + self.coda

    @property
    def layout(self) -> str:
        """The paper's notation, with a subscript I for input injection: `(2, 4 (x) 8, 2)_I`."""
        if not self.is_looped:
            return f"{self.layers} layers, feed-forward"
        suffix = "" if self.injection == "none" else "_I"
        return f"({self.prelude}, {self.recurrent} ⊗ {self.recurrences}, {self.coda}){suffix}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Architecture:
        """Build from JSON.

        Raises `ConfigError` naming the first field that is unknown, missing, or of the wrong type.
        """
        values = dict(fields)
        scaling = values.get("rope_scaling")
        if isinstance(scaling, Mapping):
            values["rope_scaling"] = _checked(Llama3Scaling, scaling)
        return _checked(cls, values)


def _checked(cls: type[_T], fields: Mapping[str, Any]) -> _T:
    """Build a dataclass from JSON values, refusing unknown and missing fields and wrong types by name."""
    hints = get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise ConfigError(f"Unknown field {unknown[0]!r} in the {cls.__name__}; known fields are {', '.join(known)}.")
    values = {}
    for name, field in known.items():
        if name not in fields:
            if field.default is dataclasses.MISSING:
                raise ConfigError(f"The {cls.__name__} lacks the field {name!r}.")
            continue
        values[name] = _typed(cls.__name__, name, fields[name], hints[name])
    return cls(**values)


def _typed(owner: str, name: str, value: Any, hint: Any) -> Any:
    """JSON has one kind of number: a whole float is an int where an int is asked for, and an int is a float."""
    options = get_args(hint) or (hint,)
    if all(isinstance(option, str) for option in options):
        if value not in options:
            raise ConfigError(f"The field {name!r} of the {owner} must be one of {', '.join(options)}, got {value!r}.")
        return value
    for option in options:
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if option is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return value
    expected = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ConfigError(f"The field {name!r} of the {owner} must be {expected}, got {value!r}.")
