"""Random checkpoints in the looped families' published formats, written tensor by tensor.

The maps between names are written here once more, in the other direction and from the descriptions of the formats, so
that a test can ask whether what is loaded is what was written.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["HUGINN", "OURO", "RETROFIT_LLAMA", "RETROFIT_OLMO", "our_weights", "publish"]

REFERENCE = Path(__file__).resolve().parent / "reference"

HUGINN, RETROFIT_LLAMA, RETROFIT_OLMO, OURO = "huginn", "retrofit-llama", "retrofit-olmo", "ouro"

_NORMS = {
    HUGINN: {"norm_1": "norm_1", "norm_2": "norm_2", "norm_3": "norm_3", "norm_4": "norm_4"},
    RETROFIT_LLAMA: {"norm_1": "norm_1", "norm_3": "norm_2"},
    RETROFIT_OLMO: {"norm_2": "norm_1", "norm_4": "norm_2"},
    OURO: {
        "norm_1": "input_layernorm",
        "norm_2": "input_layernorm_2",
        "norm_3": "post_attention_layernorm",
        "norm_4": "post_attention_layernorm_2",
    },
}


def publish(folder: Path, family: str, **changes: Any) -> dict[str, Tensor]:
    """Write config.json and model.safetensors; the reference case's config with changes. Returns the tensors."""
    config: dict[str, Any] = json.loads((REFERENCE / f"{family}-tiny" / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    shapes = _ouro(config) if family == OURO else _raven(family, config)
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.2 * noise if "norm" in name or "ln_f" in name else noise * shape[-1] ** -0.5
    save_file(tensors, folder / "model.safetensors")
    return tensors


def _raven(family: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, hidden, vocabulary = config["n_embd"], config["intermediate_size"], config["padded_vocab_size"]
    heads, kv_heads, dim = config["n_heads"], config["num_key_value_heads"], config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocabulary, width),
        "transformer.adapter.weight": (width, 2 * width),
        "transformer.ln_f.weight": (width,),
    }
    if family != HUGINN:
        shapes["lm_head.weight"] = (vocabulary, width)
    for stage, count in (("prelude", "prelude"), ("core_block", "recurrent_block"), ("coda", "coda")):
        for layer in range(config[f"n_layers_in_{count}"]):
            below = f"transformer.{stage}.{layer}"
            shapes[f"{below}.attn.Wqkv.weight"] = ((heads + 2 * kv_heads) * dim, width)
            shapes[f"{below}.attn.proj.weight"] = (width, heads * dim)
            shapes[f"{below}.mlp.fc.weight"] = (2 * hidden, width)
            shapes[f"{below}.mlp.proj.weight"] = (width, hidden)
            for norm in _NORMS[family].values():
                shapes[f"{below}.{norm}.weight"] = (width,)
            if family == RETROFIT_OLMO:
                shapes[f"{below}.attn.q_norm.weight"] = (heads * dim,)
                shapes[f"{below}.attn.k_norm.weight"] = (kv_heads * dim,)
            if family == HUGINN and config["qk_bias"]:
                shapes[f"{below}.attn.qk_bias"] = (2, 1, heads, dim)
    return shapes


def _ouro(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, hidden, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
        "model.early_exit_gate.weight": (1, width),
        "model.early_exit_gate.bias": (1,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        below = f"model.layers.{layer}"
        for name, shape in {
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (hidden, width),
            "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden),
        }.items():
            shapes[f"{below}.{name}.weight"] = shape
        for norm in _NORMS[OURO].values():
            shapes[f"{below}.{norm}.weight"] = (width,)
    return shapes


def our_weights(family: str, config: dict[str, Any], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names."""
    outside = {
        "embedding.weight": ("transformer.wte.weight", "model.embed_tokens.weight"),
        "injection.weight": ("transformer.adapter.weight",),
        "norm.weight": ("transformer.ln_f.weight", "model.norm.weight"),
        "head.weight": ("lm_head.weight",),
        "exit_gate.weight": ("model.early_exit_gate.weight",),
        "exit_gate.bias": ("model.early_exit_gate.bias",),
    }
    ours = {name: theirs[key] for name, keys in outside.items() for key in keys if key in theirs}
    stages = {"transformer.prelude": "prelude", "transformer.core_block": "recurrent", "transformer.coda": "coda"}
    for prefix, stage in (stages | {"model.layers": "recurrent"}).items():
        numbers = {key.split(".")[2] for key in theirs if key.startswith(f"{prefix}.")}
        for number in sorted(numbers):
            below = f"{prefix}.{number}."
            layer = {key.removeprefix(below): value for key, value in theirs.items() if key.startswith(below)}
            for name, value in _our_layer(family, config, layer).items():
                ours[f"{stage}.{number}.{name}"] = value
    return ours


def _our_layer(family: str, config: dict[str, Any], layer: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {f"{name}.weight": layer[f"{key}.weight"] for name, key in _NORMS[family].items()}
    if family == OURO:
        for name, key in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
            ours[f"attention.{name}.weight"] = layer[f"self_attn.{key}_proj.weight"]
        return ours | {f"mlp.{name}.weight": layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
    queries = config["n_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    query, key, value = layer["attn.Wqkv.weight"].split([queries, keys, keys])
    gate, up = layer["mlp.fc.weight"].chunk(2)
    ours |= {
        "attention.query.weight": query,
        "attention.key.weight": key,
        "attention.value.weight": value,
        "attention.output.weight": layer["attn.proj.weight"],
        "mlp.gate.weight": gate,
        "mlp.up.weight": up,
        "mlp.down.weight": layer["mlp.proj.weight"],
    }
    if "attn.q_norm.weight" in layer:
        ours["attention.query_norm.weight"] = layer["attn.q_norm.weight"]
        ours["attention.key_norm.weight"] = layer["attn.k_norm.weight"]
    if "attn.qk_bias" in layer:
        ours["attention.query_bias"], ours["attention.key_bias"] = layer["attn.qk_bias"].flatten(1)
    return ours
