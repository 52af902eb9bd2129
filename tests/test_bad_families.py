"""Checkpoints of a family that is almost known: each is refused with the reason, and none is loaded approximately."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from loopscope.errors import CheckpointError, UnknownFamilyError
from loopscope.models.architecture import Architecture
from loopscope.models.checkpoints.families import FAMILIES
from loopscope.models.checkpoints.family import Family, TensorSlice, parameter_shapes
from loopscope.models.checkpoints.layout import find_layout, read_layout
from loopscope.models.checkpoints.load import load_checkpoint
from loopscope.models.checkpoints.store import TensorStore

REFERENCE = Path(__file__).resolve().parent / "reference"

LLAMA, OLMO2, QWEN3, OURO = "llama-tiny", "olmo2-tiny", "qwen3-tiny", "ouro-tiny"
RETROFIT, RETROFIT_OLMO, HUGINN = "retrofit-llama-tiny", "retrofit-olmo-tiny", "huginn-tiny"


def changed(
    folder: Path, case: str, weights: Callable[[dict[str, Tensor]], object] | None = None, **fields: Any
) -> Path:
    """A copy of a reference case with other fields in its config (`...` takes one out) and other tensors."""
    config = json.loads((REFERENCE / case / "config.json").read_text()) | fields
    kept = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    shutil.copyfile(REFERENCE / case / "model.safetensors", folder / "model.safetensors")
    if weights is not None:
        tensors = load_file(folder / "model.safetensors")
        weights(tensors)
        save_file(tensors, folder / "model.safetensors")
    return folder


def rope(**fields: Any) -> dict[str, Any]:
    return {"rope_scaling": fields}


CASES = [LLAMA, OLMO2, QWEN3, OURO, RETROFIT, RETROFIT_OLMO, HUGINN]
HEADERS = {case: TensorStore(REFERENCE / case).headers for case in CASES}

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    # Options that the native model does not have.
    (LLAMA, {"attention_bias": True}, "attention_bias = True; loopscope implements Llama with False only"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias = True; loopscope implements Llama with False only"),
    (LLAMA, {"is_causal": False}, "is_causal = False; loopscope implements Llama with True only"),
    (LLAMA, {"hidden_act": "xielu"}, "hidden_act = 'xielu'; of the activations, loopscope implements silu"),
    (LLAMA, {"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5; .* with 1\.0 only"),
    (QWEN3, {"attention_bias": True}, "attention_bias = True; loopscope implements Qwen3 with False only"),
    (LLAMA, {"quantization_config": {"bits": 4}}, "has a quantization_config; .* before it was quantised"),
    # Settings that are not known to change nothing.
    (LLAMA, {"final_logit_softcapping": 30.0}, r"sets final_logit_softcapping = 30\.0, which loopscope does not know"),
    (LLAMA, {"sliding_window": 4096}, "sets sliding_window = 4096, .* a Llama model and which may change what it"),
    (OLMO2, {"clip_qkv": 8.0}, "sets clip_qkv = 8.0, .* pass over it with --ignore-config clip_qkv"),
    (OLMO2, {"layer_types": ["full_attention"] * 3}, "sets layer_types = "),
    (OURO, {"early_exit_step": 0}, "sets early_exit_step = 0"),
    (RETROFIT, {"attention_temperature": 2}, "sets attention_temperature = 2"),
    (HUGINN, {"rope_scaling": {"rope_type": "yarn"}}, "sets rope_scaling = "),
    # Rotary settings.
    (LLAMA, rope(rope_type="longrope", factor=2.0), "rope_scaling.rope_type is 'longrope'; .* default, linear, llama3"),
    (LLAMA, rope(type="su"), "rope_scaling.rope_type is 'su'"),
    (LLAMA, rope(type="linear"), "lacks the field 'rope_scaling.factor'"),
    (LLAMA, rope(type="linear", factor="2"), "rope_scaling.factor must be a finite number, got '2'"),
    (LLAMA, rope(type="linear", factor=float("nan")), "rope_scaling.factor must be a finite number, got nan"),
    (LLAMA, rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=0), "must be at least 1, got 0"),
    (LLAMA, {"max_position_embeddings": -1}, "max_position_embeddings must be at least 1, got -1"),
    (LLAMA, rope(type="linear", factor=0.5), r"config\.json: A linear rotary scaling needs a factor of at least 1"),
    (LLAMA, rope(type="linear", factor=2.0, beta_fast=32), "sets rope_scaling.beta_fast = 32"),
    (LLAMA, rope(rope_type="llama3", factor=8.0), "lacks the field 'rope_scaling.low_freq_factor'"),
    (LLAMA, rope(rope_type="llama3", **(LLAMA3 | {"high_freq_factor": 1.0})), "is not a llama3 scaling"),
    (LLAMA, rope(rope_type="linear", type="dynamic", factor=2.0), "rope_scaling.rope_type and .* differ"),
    (LLAMA, rope(rope_type="default", partial_rotary_factor=0.25), r"rope_scaling.partial_rotary_factor = 0\.25"),
    (LLAMA, {"rope_parameters": {"rope_type": "default"}}, "both rope_scaling and rope_parameters, and they differ"),
    (
        LLAMA,
        {"rope_scaling": ..., "rope_parameters": {"rope_theta": 1.0}},
        r"has rope_theta = 500000\.0 and rope_parameters\.rope_theta = 1\.0; keep one",
    ),
    (
        QWEN3,
        {"rope_scaling": ..., "rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "sets rope_parameters.full_attention",
    ),
    (RETROFIT, {"rope_theta": ...}, "lacks the field 'rope_theta', which a retrofitted Llama checkpoint has"),
    (
        RETROFIT,
        {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_type": "default"}},
        "lacks the field 'rope_theta', which a retrofitted Llama checkpoint has",
    ),
    # Windows.
    (QWEN3, {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers"),
    (
        QWEN3,
        {"layer_types": ["chunked_attention"] * 3},
        "layer_types names 'chunked_attention'; .* implements full_att",
    ),
    (QWEN3, {"layer_types": ["sliding_attention"] * 3}, "names sliding_attention, but sliding_window is null"),
    (QWEN3, {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 1}, "sliding_window must be at le"),
    # Fields that are missing or make no sense.
    (LLAMA, {"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
    (LLAMA, {"num_key_value_heads": 3}, r"heads \(4\) must be a multiple of kv_heads \(3\)"),
    (LLAMA, {"hidden_size": ...}, "lacks the field 'hidden_size', which a Llama checkpoint has"),
    (LLAMA, {"rms_norm_eps": None}, "lacks the field 'rms_norm_eps'"),
    (LLAMA, {"rms_norm_eps": True}, "rms_norm_eps must be a finite number, got True"),
    (LLAMA, {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
    (OURO, {"hidden_size": ...}, "lacks the field 'hidden_size', which an Ouro checkpoint has"),
    (OURO, {"total_ut_steps": 0}, "recurrences must be at least 1, got 0"),
    (OURO, {"early_exit_threshold": "high"}, "early_exit_threshold must be a finite number, got 'high'"),
    # Settings left over from Huginn that would be another model.
    (RETROFIT, {"qk_bias": True}, "qk_bias = True; loopscope implements retrofitted Llama with False only"),
    (RETROFIT_OLMO, {"tie_embeddings": True}, "tie_embeddings = True; loopscope implements retrofitted OLMo-2"),
    (HUGINN, {"tie_word_embeddings": False}, "tie_word_embeddings = False; loopscope implements Huginn with True only"),
    (RETROFIT, {"injection_type": "add"}, "injection_type = 'add'"),
    (RETROFIT, {"initial_state_mode": "skip-adapter"}, "initial_state_mode = 'skip-adapter'; .* 'random' only"),
    (RETROFIT_OLMO, {"initial_state_mode": "embed-init"}, "initial_state_mode = 'embed-init'; .* 'random' only"),
    (RETROFIT, {"init_values": {"embed_scale": 1.0}}, "lacks the field 'init_values.std'"),
    # Sizes that are not those of the tensors.
    (LLAMA, {"architectures": ["LoopedLlamaForCausalLM"]}, "names 'LoopedLlamaForCausalLM' as what runs the model"),
    (QWEN3, {"auto_map": {"AutoModelForCausalLM": "modeling_looped.Qwen3"}}, "names 'modeling_looped.Qwen3' as what"),
    (LLAMA, {"num_hidden_layers": 4}, r"lacks 9 tensors that a llama model .* first 'model\.layers\.3\."),
    (LLAMA, {"num_hidden_layers": 2}, r"holds 9 tensors that a llama model .* does not have"),
    (LLAMA, {"num_key_value_heads": 4}, r"k_proj\.weight' .* has shape \(24, 48\); config\.json asks for \(48, 48\)"),
    (RETROFIT, {"num_key_value_heads": 4}, r"Wqkv\.weight' .* has shape \(96, 48\); .* asks for \(144, 48\)"),
    (QWEN3, {"head_dim": ...}, r"q_proj\.weight' .* has shape \(64, 48\); config\.json asks for \(512, 48\)"),
    (LLAMA, {"tie_word_embeddings": True}, r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'"),
    # A model_type that lies.
    (
        LLAMA,
        {"model_type": "qwen3"},
        "model_type 'qwen3', but its tensors are named as those of nanbeige or llama or mistral;",
    ),
    (QWEN3, {"model_type": "llama"}, "model_type 'llama', but its tensors are named as those of qwen3; one of the"),
    (OLMO2, {"model_type": "qwen3"}, "model_type 'qwen3', but its tensors are named as those of olmo2;"),
    (OURO, {"model_type": "mistral"}, "model_type 'mistral', but its tensors are named as those of ouro;"),
    (RETROFIT, {"model_type": "llama"}, "model_type 'llama', but its tensors are named as those of retrofit-llama;"),
]


@pytest.mark.parametrize(("case", "fields", "message"), CONFIGS)
def test_another_config_is_refused(case: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(changed(tmp_path, case, **fields))
    assert "\n" not in str(caught.value)


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.text(max_size=3), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "std"]), st.integers() | st.text(max_size=5)),
)


@settings(max_examples=150)
@given(data=st.data(), case=st.sampled_from(CASES))
def test_whatever_a_config_says_it_is_read_or_refused_in_words(data: st.DataObject, case: str) -> None:
    config = json.loads((REFERENCE / case / "config.json").read_text())
    for name in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3, unique=True)):
        config[name] = data.draw(ANYTHING)
    with contextlib.suppress(CheckpointError):
        layout = find_layout(config, HEADERS[case], "here")
        shapes = parameter_shapes(layout.architecture)
        assert set(layout.parts) == set(shapes)


def extra(name: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights.update({name: torch.ones(shape)})


def narrow(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights.update({name: weights[name].to(torch.float8_e4m3fn)})


FIRST = "model.layers.0"
TENSORS: list[tuple[str, Callable[[dict[str, Tensor]], object], str]] = [
    (
        LLAMA,
        extra(f"{FIRST}.self_attn.q_proj.bias", 48),
        r"holds 1 tensor .* 'model\.layers\.0\.self_attn\.q_proj\.bias'",
    ),
    (LLAMA, extra("score.weight", 2, 48), r"holds 1 tensor .* 'score\.weight'"),
    (LLAMA, lambda w: w.pop("lm_head.weight"), r"lacks 1 tensor .* 'lm_head\.weight'"),
    (OURO, lambda w: w.pop("model.early_exit_gate.bias"), r"lacks 1 tensor .* 'model\.early_exit_gate\.bias'"),
    (OLMO2, lambda w: w.pop(f"{FIRST}.self_attn.q_norm.weight"), "lacks 1 tensor .*q_norm"),
    (QWEN3, extra(f"{FIRST}.self_attn.q_norm.bias", 16), "holds 1 tensor .*q_norm.bias"),
    (RETROFIT, extra("transformer.prelude.0.norm_3.weight", 48), "loopscope implements Huginn with"),
    (RETROFIT, extra("transformer.coda.0.attn.q_norm.weight", 48), "lacks .* tensors that a retrofit-olmo model"),
    (LLAMA, narrow(f"{FIRST}.mlp.up_proj.weight"), "is stored as float8_e4m3fn; .* before it was quantised"),
]


@pytest.mark.parametrize(("case", "change", "message"), TENSORS)
def test_other_tensors_are_refused(
    case: str, change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(changed(tmp_path, case, change))


@pytest.mark.parametrize("model_type", ["bert", "olmo3", "qwen2", None, 7, ["llama"]])
def test_a_family_that_is_not_known_is_refused_with_those_that_are(model_type: object, tmp_path: Path) -> None:
    with pytest.raises(
        UnknownFamilyError, match=r"of no known family, by its model_type .*known families are"
    ) as caught:
        read_layout(changed(tmp_path, LLAMA, model_type=model_type))
    assert all(family.name in str(caught.value) for family in FAMILIES)


def family(parts: Callable[[dict[str, TensorSlice]], object]) -> Family:
    """The Llama family with other places for its parameters."""
    llama = next(family for family in FAMILIES if family.name == "llama")

    def changed_parts(architecture: Architecture, names: Any) -> dict[str, TensorSlice]:
        found = dict(llama.parts(architecture, names))
        parts(found)
        return found

    return Family("mine", ("mine",), llama.recognises, llama.architecture, changed_parts)


HEAD, KEY = "lm_head.weight", "prelude.0.attention.key.weight"
BROKEN: list[tuple[Callable[[dict[str, TensorSlice]], object], str]] = [
    (lambda parts: parts.pop("head.weight"), "mine says of no tensor that it holds the parameter 'head.weight'"),
    (
        lambda parts: parts.update({"head.weight": TensorSlice(HEAD, (97, 48), 0, 96)}),
        r"takes rows 0 to 96 of 'lm_head\.weight', of shape \(97, 48\), for the parameter 'head\.weight' of shape",
    ),
    (
        lambda parts: parts.update({KEY: TensorSlice(parts[KEY].name, (48, 48), 0, 24)}),
        r"says of no parameter that it lies in row 24 of 'model\.layers\.0\.self_attn\.k_proj\.weight', of shape",
    ),
    (
        lambda parts: parts.update({"more": TensorSlice("more", (2, 2))}),
        "says of no parameter that it lies in row 0 of 'more'",
    ),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_family_of_ones_own_must_give_every_parameter_its_values(
    change: Callable[[dict[str, TensorSlice]], object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_layout(changed(tmp_path, LLAMA, model_type="mine"), [family(change)])
