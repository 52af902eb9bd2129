"""Nanbeige4.2 as transformers' Llama computes it: the stack with its final norm, run on its own output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import loopscope
from loopscope.analysis.settings import parts_except
from loopscope.errors import CheckpointError
from loopscope.models.checkpoints.layout import read_layout

transformers = pytest.importorskip("transformers", minversion="5.0")

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,  # not width / heads
    "vocab_size": 41,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
PUBLISHED = SIZES | {
    "architectures": ["NanbeigeForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_nanbeige.NanbeigeForCausalLM"},
    "model_type": "nanbeige",
    "kv_channels": 8,
    "hidden_act": "silu",
    "rope_theta": 70000000,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "num_loops": 2,
    "loop_loss_weights": [],
    "skip_loop_final_norm": False,
    "pretraining_tp": 1,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
IDS = torch.arange(22).reshape(2, 11) * 7 % 41


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 7e7}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_parameters=rope)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights under the published names, which are Llama's."""
    place = tmp_path_factory.mktemp("nanbeige")
    llama.save_pretrained(place)
    (place / "generation_config.json").unlink()
    (place / "config.json").write_text(json.dumps(PUBLISHED))
    return place


@torch.no_grad()
def looped(llama: Any, recurrences: int) -> tuple[list[list[Tensor]], list[Tensor], Tensor]:
    """Each recurrence's layers, what it ends with, and the logits."""
    state, layers, ends = llama.model.embed_tokens(IDS), [], []
    for _ in range(recurrences):
        seen: list[Tensor] = []

        def keep(module: Any, args: Any, output: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(output)

        handles = [layer.register_forward_hook(keep) for layer in llama.model.layers]
        state = llama.model(inputs_embeds=state, use_cache=False).last_hidden_state
        for handle in handles:
            handle.remove()
        layers.append(seen)
        ends.append(state)
    return layers, ends, llama.lm_head(state)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recurrences", [1, 2, 5])
def test_every_state_is_that_of_the_stack_run_on_its_own_output(llama: Any, folder: Path, recurrences: int) -> None:
    model = loopscope.load(folder, device="cpu")
    assert (model.info.family, model.info.trained_recurrences) == ("nanbeige", 2)
    layers, ends, logits = looped(llama, recurrences)
    trace = loopscope.capture(model, IDS, recurrences=recurrences)
    for recurrence in range(recurrences):
        for layer, expected in enumerate(layers[recurrence]):
            close(trace.residual("recurrent", layer, recurrence + 1), expected)
        close(trace.loop_state(recurrence + 1), ends[recurrence])
    close(trace.logits, logits)


def test_it_is_inspected_and_analyzed(folder: Path) -> None:
    found = loopscope.inspect_model(folder)
    assert (found.layout, found.settings["loop norm"]) == (
        "(0, 3 ⊗ 2, 0)",
        "final norm at the end of each recurrence; its output is carried",
    )
    study = loopscope.analyze(folder, IDS, recurrences=3, horizon=4, device="cpu", skip=parts_except("readout"))
    assert study.manifest["model"]["injection"] == "none"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("qk_layernorm", True),
        ("emb_neighbor_num", 2),
        ("insert_ngram_layer_idx", [0]),
        ("ngram_insert_all_layers", True),
        ("enable_double_loop_split", True),
        ("loop_middle_layers", 1),
        ("loop_share_kv", True),
        ("enable_hyper_connection", True),
        ("enable_mhc", True),
        ("enable_h_res_identity", True),
        ("enable_depth_attention", True),
        ("loop_loss_weights", [0.5]),
        ("skip_loop_final_norm", True),
        ("layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        ("kv_channels", 4),
        ("num_loops", None),
    ],
)
def test_what_the_released_models_do_not_use_is_refused(
    field: str, value: object, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | {field: value}))
    with pytest.raises(CheckpointError, match=field):
        read_layout(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | {"layer_types": ["full_attention"] * 3}))
    assert read_layout(tmp_path).family == "nanbeige"
