"""Published formats in other sizes than the recorded ones, and configs: what is read, and how it may be spelled."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loopscope
from loopscope.errors import CheckpointError
from loopscope.models.architecture import Architecture, LinearScaling, Llama3Scaling, YarnScaling
from loopscope.models.checkpoints.layout import find_layout, read_layout
from loopscope.models.checkpoints.load import load_checkpoint
from loopscope.models.checkpoints.store import TensorHeader
from published import HUGINN, OURO, RETROFIT_LLAMA, RETROFIT_OLMO, our_weights, publish
from slow_model import run_slowly

REFERENCE = Path(__file__).resolve().parent / "reference"

CASES = [f"{name}-tiny" for name in (HUGINN, RETROFIT_LLAMA, RETROFIT_OLMO, OURO, "llama", "olmo2", "qwen3")]

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


def raven(prelude: int, recurrent: int, coda: int, **changes: Any) -> dict[str, Any]:
    layers = {"n_layers_in_prelude": prelude, "n_layers_in_recurrent_block": recurrent, "n_layers_in_coda": coda}
    return layers | {"padded_vocab_size": 23, "n_embd": 20, "intermediate_size": 28} | changes


WINDOWED = {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]}

PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    (HUGINN, raven(1, 1, 1, n_heads=2, num_key_value_heads=2, head_dim=10)),
    (HUGINN, raven(0, 3, 1, qk_bias=False, rope_base=100, norm_eps=1e-3)),
    (RETROFIT_LLAMA, raven(4, 6, 4, n_heads=5, num_key_value_heads=1, head_dim=4)),
    (RETROFIT_LLAMA, raven(1, 2, 0, n_heads=2, num_key_value_heads=2, head_dim=6, rope_scaling=None, rope_theta=100.0)),
    (RETROFIT_OLMO, raven(1, 2, 3, n_heads=4, num_key_value_heads=2, head_dim=6)),
    (RETROFIT_OLMO, raven(0, 1, 0, rope_scaling={"type": "linear", "factor": 2.0})),
    (OURO, {"num_hidden_layers": 1, "layer_types": None, "num_key_value_heads": 2, "total_ut_steps": 3}),
    (OURO, {"num_hidden_layers": 2, "hidden_size": 20, "head_dim": 6, "early_exit_threshold": 0.6} | WINDOWED),
    (OURO, {"num_hidden_layers": 2, "layer_types": None, "tie_word_embeddings": True, "early_exit_threshold": 0.4}),
]


@pytest.mark.parametrize(("family", "changes"), PUBLISHED)
def test_other_sizes_and_settings_are_loaded_and_computed(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = publish(tmp_path, family, **changes)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = our_weights(family, config, theirs)
    model = load_checkpoint(tmp_path, dtype=torch.float64).model
    found = dict(model.named_parameters())
    assert found.keys() == weights.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter, weights[name].reshape(parameter.shape).double()), name

    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    state = torch.randn(1, 8, model.architecture.width, dtype=torch.float64) if family != OURO else None
    trace = loopscope.capture(model, ids, recurrences=6, initial_state=state)
    slow = run_slowly(
        model.architecture,
        {name: parameter.numpy() for name, parameter in found.items()},
        ids,
        6,
        None if state is None else state[0].numpy(),
    )
    # The model rounds rotary frequencies to float32, as the published code does.
    np.testing.assert_allclose(trace.logits[0].numpy(), slow.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(trace.loop_state(6)[0].numpy(), slow.loop_state[5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "changes"), PUBLISHED)
def test_the_arithmetic_of_parameters_is_that_of_the_model(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    theirs = publish(tmp_path, family, **changes)
    layout = read_layout(tmp_path)
    assert layout.architecture.parameters == sum(tensor.numel() for tensor in theirs.values())
    assert layout.dtypes == {"float32": 4 * layout.architecture.parameters}


def configured(tmp_path: Path, case: str, **changes: Any) -> Path:
    """A copy of a reference case whose config has other fields; `...` takes one out."""
    shutil.copyfile(REFERENCE / case / "model.safetensors", tmp_path / "model.safetensors")
    config = json.loads((REFERENCE / case / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    return tmp_path


def described(tmp_path: Path, case: str, **changes: Any) -> Architecture:
    return read_layout(configured(tmp_path, case, **changes)).architecture


def test_a_retrofitted_model_rotates_with_rope_theta_and_not_with_the_left_over_base(tmp_path: Path) -> None:
    assert described(tmp_path, "retrofit-llama-tiny", rope_theta=10000.0, rope_base=500000.0).rope_base == 10000.0
    respelled = {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_theta": 123.0}}
    assert described(tmp_path, "retrofit-llama-tiny", **respelled).rope_base == 123.0


def test_a_tied_head_may_be_named_twice(tmp_path: Path) -> None:
    assert described(tmp_path, "huginn-tiny", tie_word_embeddings=True).tied_embeddings
    assert not described(tmp_path, "retrofit-llama-tiny", tie_word_embeddings=False).tied_embeddings


def test_the_noise_of_a_retrofitted_model_is_as_wide_as_its_config_says(tmp_path: Path) -> None:
    values = {"std": 0.25, "embed_scale": 3.0}
    architecture = described(tmp_path, "retrofit-olmo-tiny", init_values=values)
    assert (architecture.state_std, architecture.embedding_scale) == (0.75, 3.0)


SCALINGS: list[tuple[dict[str, Any], Any]] = [
    ({"rope_scaling": None}, None),
    ({"rope_scaling": {}}, None),
    ({"rope_scaling": {"rope_type": "default"}}, None),
    ({"rope_scaling": {"type": "linear", "factor": 4}}, LinearScaling(factor=4.0)),
    ({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}}, LinearScaling(factor=4.0)),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, None),
    (
        {"rope_scaling": {"rope_type": "llama3"} | LLAMA3},
        Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64),
    ),
    (
        {"rope_scaling": {"type": "yarn", "finetuned": True, "beta_fast": None} | YARN},
        YarnScaling(factor=4.0, original_max_positions=32, attention_factor=0.1 * np.log(4) + 1),
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1, "beta_slow": 2}},
        YarnScaling(factor=4.0, original_max_positions=131072, attention_factor=1.0, beta_slow=2.0),
    ),
    ({"rope_scaling": ..., "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, LinearScaling(factor=2.0)),
]


@pytest.mark.parametrize(("fields", "scaling"), SCALINGS)
def test_a_rotary_scaling_may_be_spelled_in_several_ways(fields: dict[str, Any], scaling: Any, tmp_path: Path) -> None:
    architecture = described(tmp_path, "llama-tiny", **fields)
    assert architecture.rope_scaling == scaling
    assert architecture.rope_base == 500000.0


@pytest.mark.parametrize(
    ("fields", "base"),
    [
        ({"rope_theta": ..., "rope_scaling": None}, 10000.0),
        ({"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_theta": 123.0}}, 123.0),
        ({"rope_theta": 123, "rope_scaling": ..., "rope_parameters": {"rope_type": "default"}}, 123.0),
        ({"rope_theta": 123.0, "rope_scaling": ..., "rope_parameters": {"rope_theta": 123}}, 123.0),
    ],
)
def test_the_rotary_base_may_lie_in_either_place(fields: dict[str, Any], base: float, tmp_path: Path) -> None:
    assert described(tmp_path, "llama-tiny", **fields).rope_base == base


HARMLESS = {
    "_name_or_path": "somewhere",
    "auto_map": {"AutoModel": "code.Model"},
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
    "attention_dropout": 0.1,
    "pretraining_tp": 2,
    "eos_token_id": [1, 2],
    "id2label": {"0": "a"},
    "task_specific_params": {"generation": {}},
    "temperature": 0.6,
    "unknown_to_everyone": None,
    "use_something_else": False,
    "list_of_nothing": [],
}


@pytest.mark.parametrize("case", CASES)
def test_bookkeeping_and_options_that_are_off_do_not_stand_in_the_way(case: str, tmp_path: Path) -> None:
    assert described(tmp_path, case, **HARMLESS) == read_layout(REFERENCE / case).architecture


@pytest.mark.parametrize("case", ["llama-tiny", "ouro-tiny", "qwen3-tiny", "olmo2-tiny"])
def test_a_stored_rotation_table_is_ignored(case: str, tmp_path: Path) -> None:
    weights = load_file(REFERENCE / case / "model.safetensors")
    tables = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6),
        "model.rotary_emb.inv_freq": torch.zeros(6),
    }
    configured(tmp_path, case)
    save_file(weights | tables, tmp_path / "model.safetensors")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(load_checkpoint(tmp_path).model(ids), load_checkpoint(REFERENCE / case).model(ids))


def qwen(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], tmp_path: Path) -> Path:
    configured(tmp_path, "qwen3-tiny")
    save_file(change(load_file(REFERENCE / "qwen3-tiny" / "model.safetensors")), tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_tied_head_and_the_prefix_may_be_left_out(with_head: bool, prefix: str, tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        head = weights.pop("lm_head.weight")
        renamed = {f"{prefix}{name.removeprefix('model.')}": tensor for name, tensor in weights.items()}
        return renamed | ({"lm_head.weight": head} if with_head else {})

    ids = torch.tensor([[1, 2, 3]])
    expected = load_checkpoint(REFERENCE / "qwen3-tiny").model(ids)
    assert torch.equal(load_checkpoint(qwen(change, tmp_path)).model(ids), expected)


def test_windows_are_read_from_a_number_of_layers_or_from_a_list(tmp_path: Path) -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 7}
    listed = ["sliding_attention", "full_attention", "sliding_attention"]
    for fields, window, full in (
        ({"max_window_layers": 1}, 7, (0,)),
        ({"max_window_layers": 0}, 7, ()),
        ({"max_window_layers": 3}, None, ()),
        ({"layer_types": listed}, 7, (1,)),
        ({"layer_types": ["full_attention"] * 3, "max_window_layers": 0}, None, ()),
        ({"use_sliding_window": False, "max_window_layers": 0}, None, ()),
    ):
        architecture = described(tmp_path, "qwen3-tiny", **(sliding | fields))
        assert (architecture.sliding_window, architecture.full_attention_layers) == (window, full)


def test_a_layout_comes_from_headers_alone() -> None:
    folder = REFERENCE / "ouro-tiny"
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    headers = {name: TensorHeader(tuple(tensor.shape), "BF16", "far.safetensors") for name, tensor in weights.items()}
    layout = find_layout(config, headers, "elsewhere")
    assert (layout.family, layout.architecture.layout) == ("ouro", "(0, 3 ⊗ 4, 0)")
    assert layout.dtypes == {"bfloat16": 2 * layout.architecture.parameters}
    assert layout.files == ("far.safetensors",)
    del headers["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"elsewhere lacks 1 tensor .*'model\.norm\.weight'"):
        find_layout(config, headers, "elsewhere")
