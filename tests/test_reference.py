"""The model against the numbers that the families' published modelling code computes, on tiny random checkpoints.

Huginn goes the user's way, through `load` and `capture`, with the case that is kept beside this file. The other
families show that the one implementation, with the right settings, is each of them; their keys are mapped here.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loopscope
from loopscope import Architecture, LoopedTransformer, Trace
from loopscope.architecture import Llama3Scaling
from loopscope.errors import ConfigError

HUGINN = Path(__file__).resolve().parent / "reference" / "huginn-tiny"

pytestmark = pytest.mark.reference

Tensors = dict[str, Tensor]


@dataclass
class Case:
    """A folder of the reference data."""

    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return content

    @property
    def weights(self) -> Tensors:
        return load_file(self.folder / "model.safetensors")

    @cached_property
    def expected(self) -> Tensors:
        return load_file(self.folder / "expected.safetensors")

    def close(self, ours: Tensor, recorded: str) -> None:
        """Within the tolerance that is recorded with the case."""
        tolerance = json.loads((self.folder / "case.json").read_text())["tolerance"]
        torch.testing.assert_close(
            ours,
            self.expected[recorded],
            atol=tolerance["atol"],
            rtol=tolerance["rtol"],
            msg=lambda text: f"{recorded}: {text}",
        )


def compare(trace: Trace, case: Case, ours: Callable[[str], str] = lambda name: name) -> None:
    """Everything that is recorded of a run, by the names of the looped cases."""
    found = {"logits": trace.logits}
    for stage, layer, recurrence in trace.visits:
        site = f"{recurrence}.{layer}" if stage == "recurrent" else f"{layer}"
        found[f"{stage}.{site}"] = trace.residual(stage, layer, recurrence)
        found[f"attention.{stage}.{site}"] = trace.attention(stage, layer, recurrence)
    for recurrence in range(trace.recurrences):
        found[f"injected.{recurrence}"] = trace.injected(recurrence)
        found[f"loop_end.{recurrence}"] = trace.loop_state(recurrence)
    compared = set()
    for recorded in case.expected:
        name = ours(recorded)
        if name in found:
            case.close(found[name], recorded)
            compared.add(name)
    # Where nothing is injected the published code hands out no injected state.
    assert set(found) - {f"injected.{recurrence}" for recurrence in range(trace.recurrences)} <= compared


@pytest.fixture(scope="module")
def huginn() -> Case:
    return Case(HUGINN)


def huginn_trace(folder: Path, case: Case, **options: Any) -> Trace:
    expected = case.expected
    defaults: dict[str, Any] = {"recurrences": 5, "attention": True, "initial_state": expected["initial_state"]}
    return loopscope.capture(loopscope.load(folder, device="cpu"), expected["input_ids"], **(defaults | options))


def test_huginn_computes_what_the_published_code_does(huginn: Case) -> None:
    trace = huginn_trace(HUGINN, huginn)
    compare(trace, huginn)
    assert len(trace.visits) == 2 + 5 * 4 + 2
    assert {f"injected.{recurrence}" for recurrence in range(5)} <= set(huginn.expected)


def test_huginn_configuration_is_read(huginn: Case) -> None:
    subject = loopscope.load(HUGINN, device="cpu")
    assert (subject.info.prelude, subject.info.recurrent, subject.info.coda) == (2, 4, 2)
    assert subject.info.trained_recurrences == 32
    assert subject.info.family == "huginn"
    assert subject.info.max_positions == 64
    assert subject.tokenizer is None
    # sqrt(D) sqrt(2 / (5 D)), whatever the width is
    assert subject.model.architecture.state_std == pytest.approx((2 / 5) ** 0.5)


@pytest.mark.parametrize("left_out", [["lm_head.weight"], ["freqs_cis"], ["lm_head.weight", "freqs_cis"]])
def test_huginn_needs_neither_the_tied_head_nor_the_rotation_table(
    huginn: Case, tmp_path: Path, left_out: list[str]
) -> None:
    shutil.copy(HUGINN / "config.json", tmp_path)
    weights = {name: tensor for name, tensor in huginn.weights.items() if name not in left_out}
    save_file(weights, tmp_path / "model.safetensors")
    assert torch.equal(huginn_trace(tmp_path, huginn).logits, huginn_trace(HUGINN, huginn).logits)


def test_huginns_rotation_table_is_computed_and_never_read(huginn: Case, tmp_path: Path) -> None:
    shutil.copy(HUGINN / "config.json", tmp_path)
    save_file(huginn.weights | {"freqs_cis": torch.zeros(1, 64, 1, 6, 2)}, tmp_path / "model.safetensors")
    assert torch.equal(huginn_trace(tmp_path, huginn).logits, huginn_trace(HUGINN, huginn).logits)


def test_huginn_runs_for_other_recurrences_than_it_was_trained_for(huginn: Case) -> None:
    trace = huginn_trace(HUGINN, huginn, recurrences=3)
    assert trace.recurrences == 3
    for recurrence in range(3):
        huginn.close(trace.loop_state(recurrence), f"loop_end.{recurrence}")
    assert huginn_trace(HUGINN, huginn, recurrences=None).recurrences == 32


def test_huginn_keeps_no_attention_unless_asked(huginn: Case) -> None:
    trace = huginn_trace(HUGINN, huginn, attention=False)
    with pytest.raises(ConfigError, match=r"kept no attention; call capture\(\.\.\., attention=True\)"):
        trace.attention("recurrent", 0, 0)


def test_huginn_in_float64_is_closer_than_the_recorded_rounding(huginn: Case) -> None:
    exact = loopscope.capture(
        loopscope.load(HUGINN, dtype="float64", device="cpu"),
        huginn.expected["input_ids"],
        recurrences=5,
        initial_state=huginn.expected["initial_state"].double(),
    )
    rounding = json.loads((HUGINN / "case.json").read_text())["rounding"]["largest_difference_to_float64"]
    difference = max(
        float((exact.loop_state(r) - huginn.expected[f"loop_end.{r}"].double()).abs().max()) for r in range(5)
    )
    assert 0 < difference < 2 * rounding


# Where each of our parameters lies in the other families' files: our name below a layer -> theirs.
LLAMA_KEYS = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
NORM_KEYS: dict[str, list[str | None]] = {
    "ouro": ["input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2"],
    "llama": ["input_layernorm", None, "post_attention_layernorm", None],
    "qwen3": ["input_layernorm", None, "post_attention_layernorm", None],
    "olmo2": [None, "post_attention_layernorm", None, "post_feedforward_layernorm"],
    "retrofit-llama": ["norm_1", None, "norm_2", None],
    "retrofit-tinyllama": ["norm_1", None, "norm_2", None],
    "retrofit-olmo": [None, "norm_1", None, "norm_2"],
}
FEED_FORWARD = {"llama", "olmo2", "qwen3"}
SETTINGS: dict[str, dict[str, Any]] = {
    "ouro": {"norm_placement": "branch-in-out", "loop_norm": "recurrence"},
    "llama": {},
    "olmo2": {"norm_placement": "branch-out", "qk_norm": "full"},
    "qwen3": {"qk_norm": "head"},
    "retrofit-llama": {"injection": "linear", "state_init": "normal"},
    "retrofit-tinyllama": {"injection": "linear", "state_init": "normal"},
    "retrofit-olmo": {
        "injection": "linear",
        "state_init": "normal",
        "norm_placement": "branch-out",
        "qk_norm": "full",
    },
}


def scaling_of(config: Mapping[str, Any]) -> Llama3Scaling | None:
    scaling = config.get("rope_scaling")
    if scaling is None:
        return None
    return Llama3Scaling(
        factor=scaling["factor"],
        low_freq_factor=scaling["low_freq_factor"],
        high_freq_factor=scaling["high_freq_factor"],
        original_max_positions=scaling["original_max_position_embeddings"],
    )


def architecture_of(family: str, config: Mapping[str, Any]) -> Architecture:
    shared: dict[str, Any] = {
        "vocab_size": config["vocab_size"],
        "mlp_width": config["intermediate_size"],
        "kv_heads": config["num_key_value_heads"],
        "rope_base": float(config["rope_theta"]),
        "rope_scaling": scaling_of(config),
    } | SETTINGS[family]
    if family.startswith("retrofit"):
        return Architecture(
            width=config["n_embd"],
            heads=config["n_heads"],
            head_dim=config["head_dim"],
            prelude=config["n_layers_in_prelude"],
            recurrent=config["n_layers_in_recurrent_block"],
            coda=config["n_layers_in_coda"],
            recurrences=config["mean_recurrence"],
            norm_eps=config["norm_eps"],
            **shared,
        )
    layers = config["num_hidden_layers"]
    return Architecture(
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        head_dim=config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]),
        prelude=layers if family in FEED_FORWARD else 0,
        recurrent=0 if family in FEED_FORWARD else layers,
        coda=0,
        recurrences=config.get("total_ut_steps", 1),
        norm_eps=config["rms_norm_eps"],
        tied_embeddings=config["tie_word_embeddings"],
        **shared,
    )


def renamed(family: str, architecture: Architecture, theirs: Tensors) -> Tensors:
    """Their tensors under our names."""
    retrofitted = family.startswith("retrofit")
    ours = {
        "embedding.weight": theirs["transformer.wte.weight" if retrofitted else "model.embed_tokens.weight"],
        "norm.weight": theirs["transformer.ln_f.weight" if retrofitted else "model.norm.weight"],
    }
    if not architecture.tied_embeddings:
        ours["head.weight"] = theirs["lm_head.weight"]
    if architecture.injection == "linear":
        ours["injection.weight"] = theirs["transformer.adapter.weight"]
    stages = {"prelude": "transformer.prelude", "recurrent": "transformer.core_block", "coda": "transformer.coda"}
    for stage, folder in stages.items():
        for layer in range(getattr(architecture, stage)):
            prefix = f"{folder}.{layer}." if retrofitted else f"model.layers.{layer}."
            block = {name.removeprefix(prefix): t for name, t in theirs.items() if name.startswith(prefix)}
            if retrofitted:
                block = unstacked(architecture, block)
            for name, value in layer_of(family, architecture, block).items():
                ours[f"{stage}.{layer}.{name}.weight"] = value
    return ours


def unstacked(architecture: Architecture, block: Tensors) -> Tensors:
    """A retrofitted layer under Llama's names: its q, k, v are one matrix, and its gate and up another."""
    queries, keys = (heads * architecture.head_dim for heads in (architecture.heads, architecture.kv_heads))
    query, key, value = block.pop("attn.Wqkv.weight").split([queries, keys, keys])
    gate, up = block.pop("mlp.fc.weight").chunk(2)
    return {name.replace("attn.", "self_attn."): tensor for name, tensor in block.items()} | {
        "self_attn.q_proj.weight": query,
        "self_attn.k_proj.weight": key,
        "self_attn.v_proj.weight": value,
        "self_attn.o_proj.weight": block["attn.proj.weight"],
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": block["mlp.proj.weight"],
    }


def layer_of(family: str, architecture: Architecture, block: Tensors) -> Tensors:
    keys = dict(LLAMA_KEYS)
    for number, name in enumerate(NORM_KEYS[family], start=1):
        if name is not None:
            keys[f"norm_{number}"] = name
    if architecture.qk_norm != "none":
        keys |= {"attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"}
    return {ours: block[f"{theirs}.weight"] for ours, theirs in keys.items()}


def feed_forward_name(recorded: str) -> str:
    """`layer.2` and `attention.2` are our prelude's."""
    kind, _, index = recorded.rpartition(".")
    return {"layer": f"prelude.{index}", "attention": f"attention.prelude.{index}"}.get(kind, recorded)


@pytest.mark.parametrize("family", list(SETTINGS))
def test_the_other_families_are_settings_of_the_same_model(family: str, reference_case: Callable[[str], Path]) -> None:
    case = Case(reference_case(f"{family}-tiny"))
    architecture = architecture_of(family, case.config)
    model = LoopedTransformer(architecture).requires_grad_(False)
    model.load_state_dict(renamed(family, architecture, case.weights))
    expected = case.expected
    recurrences = json.loads((case.folder / "case.json").read_text())["recurrences"]
    trace = loopscope.capture(
        model,
        expected["input_ids"],
        recurrences=recurrences,
        initial_state=expected.get("initial_state"),
        attention=True,
    )
    compare(trace, case, feed_forward_name if family in FEED_FORWARD else lambda name: name)
    case.close(model.embed(expected["input_ids"]), "embeddings")


def test_every_recurrence_of_ouro_has_its_readout(reference_case: Callable[[str], Path]) -> None:
    case = Case(reference_case("ouro-tiny"))
    architecture = architecture_of("ouro", case.config)
    model = LoopedTransformer(architecture).requires_grad_(False)
    model.load_state_dict(renamed("ouro", architecture, case.weights))
    for recurrence in range(4):
        logits = model(case.expected["input_ids"], recurrences=recurrence + 1)
        case.close(logits, f"logits.{recurrence}")
