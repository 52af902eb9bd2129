"""Reading a published config.json field by field, with a clear sentence for what does not fit."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from loopscope._util.wording import with_article
from loopscope.errors import CheckpointError, ConfigError, UnknownSettingError
from loopscope.models.architecture import MOST_LAYERS

# fmt: off
IGNORED_FIELDS = frozenset({
    # Where the file comes from, and which code and tokenizer go with it.
    "model_type", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "name_or_path",
    "_name_or_path", "_commit_hash", "tokenizer_class", "task_specific_params", "finetuning_task",
    "transformers.js_config", "unsloth_fixed", "unsloth_version", "is_llama_config", "internal_version",
    # Training: initial values, dropout (there is none in evaluation), savings of memory.
    "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "gradient_checkpointing", "neftune_noise_alpha", "pretraining_tp",
    # What a call returns, and how the same attention is computed.
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "torchscript", "chunk_size_feed_forward",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled",
    "use_flash_attn",
    # Special tokens and labels of classifiers.
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id",
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "prefix", "id2label", "label2id",
    "num_labels", "problem_type",
    # Generation, which older files hold here.
    "max_length", "min_length", "max_new_tokens", "max_sequence_length", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "output_scores", "return_dict_in_generate", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens",
})

RAVEN_IGNORED_FIELDS = IGNORED_FIELDS | {
    "activation_checkpoint_impl", "architecture_class_name", "effective_expected_depth", "init_orthogonal",
    "init_strategy", "mean_backprop_depth", "n_layers", "padding_multiple", "sampling_scheme", "test_time_noise_type",
    "vocab_size",
}
"""Of Huginn and its kin. `vocab_size` is the tokenizer's there; the embedding has `padded_vocab_size` rows."""
# fmt: on

_LEFT_OUT = object()


class Remaining(Mapping[str, Any]):
    """A config without the fields that its owner says to pass over, for any reader of it.

    Nested ones are named as in messages, `rope_scaling.beta`. A field that the reader asks for means something to it,
    and is an error; so is one that is not there. Raises `ConfigError`.
    """

    def __init__(self, config: Mapping[str, Any], passed_over: Collection[str], prefix: str = "") -> None:
        self._config, self._prefix = config, prefix
        self._passed_over = {name for name in passed_over if "." not in name or name in config}
        self._within: dict[str, list[str]] = {}
        for name in set(passed_over) - self._passed_over:
            outer, _, inner = name.partition(".")
            self._within.setdefault(outer, []).append(inner)
        for name in (*self._passed_over, *self._within):
            if name not in config or (name in self._within and not isinstance(config[name], Mapping)):
                what = "field" if name in self._passed_over else "object"
                raise ConfigError(f"--ignore-config names {prefix}{name}, and config.json has no such {what}.")

    def __getitem__(self, name: str) -> Any:
        if name in self._passed_over:
            raise ConfigError(
                f"--ignore-config cannot pass over {self._prefix}{name}: loopscope knows that field, and what it says "
                "belongs to the model."
            )
        value = self._config[name]
        return Remaining(value, self._within[name], f"{self._prefix}{name}.") if name in self._within else value

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._config if name not in self._passed_over)

    def __len__(self) -> int:
        return len(self._config) - len(self._passed_over)


class ConfigReader:
    """Typed access to the fields of a family's config, which remembers what was read."""

    def __init__(self, config: Mapping[str, Any], family: str, prefix: str = "") -> None:
        self.config = config
        self.family = family
        self.prefix = prefix
        """Where this object lies in config.json, for messages: `rope_scaling.`, or nothing."""
        self._read: set[str] = set()

    def require(self, name: str, value: Any) -> None:
        """Refuse another value of a field, where it is there: it would be another model than the one implemented."""
        self._read.add(name)
        found = self.config.get(name, value)
        if found != value and not (found is None and value is False):
            raise UnknownSettingError(
                f"config.json has {self.prefix}{name} = {reprlib.repr(found)}; loopscope implements {self.family} with "
                f"{value!r} only."
            )

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.config.get(name) is not None

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number; an error where it is neither there nor has a default."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "a whole number", value)
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.integer(name, default)
        if value < 1:
            raise self._wrong(name, "at least 1", value)
        return value

    def layers(self, name: str) -> int:
        """A number of layers, checked before anything is made for each of them."""
        value = self.integer(name)
        if not 0 <= value <= MOST_LAYERS:
            raise self._wrong(name, f"a number of layers from 0 to {MOST_LAYERS:,}", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number; JSON as Python reads it has others."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise self._wrong(name, "a finite number", value)
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        return value

    def mapping(self, name: str) -> ConfigReader:
        value = self._get(name)
        if not isinstance(value, Mapping):
            raise self._wrong(name, "an object", value)
        return ConfigReader(value, self.family, f"{self.prefix}{name}.")

    def texts(self, name: str) -> list[str]:
        value = self._get(name)
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self._wrong(name, "a list of strings", value)
        return value

    def optional_integer(self, name: str, default: int | None = None) -> int | None:
        """A whole number, or None where the field is null; the default where it is not there."""
        self._read.add(name)
        value = self.config.get(name, default)
        return None if value is None else self.integer(name, default)

    def optional_number(self, name: str) -> float | None:
        """A number, or None where the field is null or not there."""
        self._read.add(name)
        return self.number(name) if self.has(name) else None

    def close(self, harmless: Collection[str] = ()) -> None:
        """Refuse the first field that is set, was not read, and is not known to be harmless (see `IGNORED_FIELDS`)."""
        if self.has("quantization_config") and not self.prefix:
            raise CheckpointError(
                "config.json has a quantization_config; weights are read as floating-point numbers only: give the "
                "checkpoint as it was before it was quantised."
            )
        for name, value in self.config.items():
            unset = value is None or value is False or value in ("", [], {})
            if not unset and name not in self._read and name not in harmless:
                raise CheckpointError(
                    f"config.json sets {self.prefix}{name} = {reprlib.repr(value)}, which loopscope does not know in "
                    f"{with_article(self.family)} model and which may change what it computes; if it does not, pass "
                    f"over it with --ignore-config {self.prefix}{name}."
                )

    def _get(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        value = self.config.get(name, _LEFT_OUT)
        value = default if value is _LEFT_OUT else value
        if value is None:
            raise CheckpointError(
                f"config.json lacks the field {self.prefix + name!r}, which {with_article(self.family)} checkpoint has."
            )
        return value

    def _wrong(self, name: str, expected: str, value: Any) -> CheckpointError:
        return CheckpointError(f"config.json: {self.prefix}{name} must be {expected}, got {reprlib.repr(value)}.")
