"""What a model is made of, as data.

`Architecture` describes every model that the native implementation can run. It imports no torch, so that layouts can be
read, compared and printed without loading anything.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

from loopscope._util.config_json import build
from loopscope._util.ranges import Count, Positive, Range, check_ranges
from loopscope._util.wording import layout_text
from loopscope.errors import ConfigError

Injection = Literal["none", "linear", "add", "bounded", "diagonal"]
NormPlacement = Literal["pre", "residual", "branch-in-out", "branch-out"]
LoopNorm = Literal["none", "recurrence", "loop"]
QkNorm = Literal["none", "head", "full", "unweighted"]
Rotary = Literal["none", "halves", "adjacent"]
Mlp = Literal["gated", "plain"]
Activation = Literal["silu", "gelu", "gelu-tanh", "relu", "halved-relu2"]
StateInit = Literal["embeddings", "normal"]

# The ends are far above any model: a larger number comes from a damaged file, and would fail later, in torch, without
# its name.
_Size = Annotated[int, Range(1, 10**6)]
MOST_LAYERS = 1000
VALUE_GATE_INPUTS = 32
_Tokens = Annotated[int, Range(1, 10**9)]
_Layers = Annotated[int, Range(0, MOST_LAYERS)]

_IMPOSSIBLE = "This architecture cannot be built: "


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Frequency-dependent rotary scaling of Llama 3.1 and later: long wavelengths are stretched by `factor`, short
    ones are left, those between are interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int
    kind: Literal["llama3"] = "llama3"

    def __post_init__(self) -> None:
        ends_fit = 0 < self.low_freq_factor < self.high_freq_factor < math.inf
        if not (ends_fit and 1 <= self.factor < math.inf and self.original_max_positions >= 1):
            raise ConfigError(
                f"The rotary scaling {self} is not a llama3 scaling: it needs factor >= 1 and "
                "0 < low_freq_factor < high_freq_factor."
            )


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al., arXiv 2306.15595)."""

    factor: float
    kind: Literal["linear"] = "linear"

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise ConfigError(f"A linear rotary scaling needs a factor of at least 1, got {self.factor}.")


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al., arXiv 2309.00071): frequencies that turn less than `beta_slow` times over the original
    context are divided by `factor`, those that turn more than `beta_fast` times are left, those between are
    interpolated; cosines and sines are multiplied by `attention_factor`."""

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """The ends of the interpolation are rounded outwards to whole pairs."""
    kind: Literal["yarn"] = "yarn"

    def __post_init__(self) -> None:
        factors_fit = 1 <= self.factor < math.inf and 0 < self.attention_factor < math.inf
        if not (factors_fit and self.original_max_positions >= 1):
            raise ConfigError(
                f"The rotary scaling {self} is not a YaRN scaling: it needs factor >= 1 and attention_factor > 0."
            )
        if not 0 < self.beta_slow < self.beta_fast < math.inf:
            raise ConfigError(f"A YaRN scaling needs 0 < beta_slow < beta_fast, got {self}.")


RopeScaling = Llama3Scaling | LinearScaling | YarnScaling


_LATER = ("prelude_norm", "readout_map", "value_embeddings")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A (prelude, recurrent (x) recurrences, coda) transformer.

    A feed-forward model is the case `recurrent=0`: all of its layers are its prelude (and coda, if it has one).
    """

    vocab_size: _Size
    """Rows of the embedding, and entries of the logits."""
    width: _Size
    """D, the width of the residual stream."""
    heads: _Size
    """Query heads."""
    kv_heads: _Size
    """Key-value heads; `heads` is a multiple of it."""
    head_dim: _Size
    """Width of one head; `heads * head_dim` need not be D."""
    mlp_width: _Size
    """Hidden width of the MLP."""

    prelude: _Layers
    """p: layers that run once, before the loop."""
    recurrent: _Layers
    """k: layers of the recurrent block."""
    coda: _Layers
    """c: layers that run once, after the loop."""
    recurrences: Count = 1
    """R: how often the recurrent block runs unless told otherwise, the (mean) number that the model was trained with.
    """

    injection: Injection = "none"
    """How the prelude's output e enters the state s at the start of each recurrence: not at all, `[s ; e] W`, s + e,
    or `sigmoid(a) * s + W e` with a learned a per coordinate (bounded: what was in the state decays, so that its norm
    stays below a bound whatever layers whose branches read normed states add), or, with a learned step
    `d = softplus(b)` per coordinate, `exp(-d exp(a)) * s + d * W e` (diagonal; Parcae)."""
    eta: Annotated[float, Range(above=0, most=1)] = 1.0
    """A recurrence passes on `(1 - eta) s + eta F(s)`, F being injection, layers and norm; 1 for F itself."""
    norm_placement: NormPlacement = "pre"
    """Where a layer's norms n1..n4 sit. `pre`: n1 and n3, before each branch. `residual`: n1 and n3 before each
    branch, n2 and n4 on the residual stream after it (Huginn). `branch-in-out`: n1 and n3 before each branch, n2 and
    n4 on its output before it is added (Ouro). `branch-out`: n2 and n4 only, on the branch outputs (OLMo-2)."""
    loop_norm: LoopNorm = "none"
    """The final norm is also applied to the state at the end of each recurrence (Ouro), or once after the loop
    (Huginn).
    """
    prelude_norm: bool = False
    """The prelude's output e is what an RMS norm of its own makes of the last layer's (Parcae)."""
    readout_map: bool = False
    """After the loop, a linear map is applied to the state, before coda and head (Parcae)."""
    norm_eps: Positive = 1e-6

    qk_norm: QkNorm = "none"
    """RMS norm on queries and keys before the rotation: per head (Qwen3), or over all heads together (OLMo-2); or per
    head and behind the rotation, without weights (Parcae)."""
    qk_bias: bool = False
    """A learned bias added to queries and keys before the rotation (Huginn)."""
    rotary: Rotary = "halves"
    """Which coordinates of a head are rotated together: i and i + d/2 (`halves`), or 2i and 2i + 1 (`adjacent`)."""
    rope_base: Positive = 10000.0
    rope_scaling: Llama3Scaling | LinearScaling | YarnScaling | None = None

    sliding_window: _Tokens | None = None
    """A token looks at itself and at the tokens before it, that many in all (Mistral); None for all of them."""
    full_attention_layers: tuple[int, ...] = ()
    """Layers that look at every earlier token all the same, counted from 0 over prelude, recurrent and coda."""

    value_embeddings: tuple[int, ...] = ()
    """Layers, counted likewise, that have an embedding of the tokens for their values: each head adds it, times
    `2 sigmoid(w . x)` of the first 32 coordinates of what the layer's attention receives (Parcae)."""

    mlp: Mlp = "gated"
    activation: Activation = "silu"
    """`halved-relu2` is relu(x)^2 / 2."""

    tied_embeddings: bool = False
    """The unembedding is the embedding."""
    embedding_scale: Positive = 1.0
    """Token embeddings are multiplied by it."""

    state_init: StateInit = "embeddings"
    """s_0: the prelude's output (the token embeddings where there is no prelude), or noise, from a normal distribution
    cut at three standard deviations."""
    state_std: Positive = 1.0
    """Standard deviation of that noise before it is cut."""

    exit_gate: bool = False
    """A learned gate, sigmoid(w . s + b), says after each recurrence how likely it is to stop there (Ouro)."""
    exit_threshold: Annotated[float, Range()] = 1.0
    """The model answers with the first recurrence at which the cumulated probability to have stopped reaches it."""

    max_positions: _Tokens | None = None
    """Longest sequence the model was made for, if it says."""

    def __post_init__(self) -> None:
        check_ranges(self, _IMPOSSIBLE)
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
        self._require(
            self.sliding_window is not None or not self.full_attention_layers,
            "full_attention_layers means nothing without a sliding_window",
        )
        self._require(
            all(0 <= layer < self.layers for layer in self.full_attention_layers),
            f"full_attention_layers must lie between 0 and {self.layers - 1}, got {list(self.full_attention_layers)}",
        )
        self._require(
            all(0 <= layer < self.layers for layer in self.value_embeddings)
            and (not self.value_embeddings or self.width >= VALUE_GATE_INPUTS),
            f"value_embeddings must lie between 0 and {self.layers - 1}, in a model at least {VALUE_GATE_INPUTS} wide, "
            f"got {list(self.value_embeddings)} in one of {self.width}",
        )
        self._require(
            not self.exit_gate or (self.loop_norm == "recurrence" and self.coda == 0),
            "an exit gate reads the normed state that the head reads too, so it needs loop_norm 'recurrence' and no "
            "coda",
        )
        self._require(self.exit_gate or self.exit_threshold == 1.0, "exit_threshold means nothing without an exit_gate")
        if self.recurrent == 0:
            for name, neutral in (
                ("injection", "none"),
                ("loop_norm", "none"),
                ("state_init", "embeddings"),
                ("recurrences", 1),
                ("eta", 1.0),
                ("readout_map", False),
            ):
                value = getattr(self, name)
                self._require(
                    value == neutral, f"{name} is {value!r}, but a model without recurrent layers has no loop"
                )

    @staticmethod
    def _require(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(f"{_IMPOSSIBLE}{message}.")

    @property
    def layers(self) -> int:
        """Unique layers, p + k + c."""
        return self.prelude + self.recurrent + self.coda

    @property
    def is_looped(self) -> bool:
        return self.recurrent > 0

    def window(self, layer: int) -> int | None:
        """Tokens that a layer looks at, itself included, counted over prelude, recurrent and coda; None for all."""
        return None if layer in self.full_attention_layers else self.sliding_window

    @property
    def parameters(self) -> int:
        """Number of parameters, without building the model."""
        width, hidden = self.width, self.mlp_width
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * width * queries + 2 * width * keys
        attention += {"head": 2 * self.head_dim, "full": queries + keys}.get(self.qk_norm, 0)
        attention += queries + keys if self.qk_bias else 0
        mlp = (3 if self.mlp == "gated" else 2) * width * hidden
        norms = (2 if self.norm_placement in ("pre", "branch-out") else 4) * width
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * width
        square = width * width
        injection = {"linear": 2 * square, "bounded": square + width, "diagonal": square + 2 * width}
        values = len(self.value_embeddings) * (self.vocab_size * keys + self.kv_heads * VALUE_GATE_INPUTS)
        around = values + injection.get(self.injection, 0) + self.readout_map * square + self.prelude_norm * width
        gate = width + 1 if self.exit_gate else 0
        return self.layers * (attention + mlp + norms) + embeddings + around + gate + width

    def visits(self, recurrences: int) -> int:
        """Realised depth: p + k R + c layer applications."""
        return self.prelude + self.recurrent * recurrences + self.coda

    @property
    def layout(self) -> str:
        """The paper's notation, with a subscript I for input injection: `(2, 4 (x) 8, 2)_I`."""
        suffix = "" if self.injection == "none" else "_I"
        return layout_text(self.prelude, self.recurrent, self.coda, self.recurrences) + suffix

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` is its inverse.

        Settings that came later are left out at their defaults: models that were made before have the same identity.
        """
        defaults = {each.name: each.default for each in dataclasses.fields(self)}
        fields = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in _LATER or value != defaults[name]
        }
        for name in ("full_attention_layers", "value_embeddings"):
            if name in fields:
                fields[name] = list(fields[name])
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Architecture:
        """Build from JSON.

        Raises `ConfigError` naming the first field that is unknown, missing, or of the wrong type.
        """
        return build(cls, fields, "the Architecture")
