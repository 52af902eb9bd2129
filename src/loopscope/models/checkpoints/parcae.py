"""Parcae (SandyResearch/parcae-*; Prairie et al., arXiv 2604.12946), whose published weights are pickles.

Its injection is a linear system that forgets: a learned factor per coordinate on what was in the state, which its
authors call the contraction factor.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from loopscope.errors import UnknownSettingError
from loopscope.models.architecture import Architecture
from loopscope.models.checkpoints.config_reader import RAVEN_IGNORED_FIELDS, ConfigReader
from loopscope.models.checkpoints.family import Config, Family, TensorSlice, parameter_shapes, parse_name

_FIXED = {
    "block_class_name": "TransformerPreNormBlock",
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "BaseMLP",
    "nonlin_name": "ReLU2",
    "injection_type": "diagonal",
    "state_init": "like-init",
    "bias": False,
    "qk_bias": False,
    "clip_qkv": False,
    "logit_softcap": False,
    "use_abacus": False,
    "debias_attention": False,
    "center_attention": False,
    "mup_model_scaling_factor": 1,
}
"""Settings with one value in all published files; another value would be another model."""
_ROPE = {"use_rope": True, "rope_condense_ratio": 1, "rope_base": 50000}
_INIT = "scaled-zero"
"""How weights begin, which the initial state goes by; others scale embeddings and logits too."""

_HARMLESS = RAVEN_IGNORED_FIELDS | {
    "name", "hf_config", "_class_name", "model_class_name", "attn_impl", "skip_initialization", "use_fused_head",
    "strategy", "curriculum_target", "recurrent_iteration_method", "rope_settings",
}  # fmt: skip

_OUTSIDE = {
    "embedding.weight": "transformer.wte.weight",
    "prelude_norm.weight": "transformer.ln_prelude.weight",
    "injection.rate_log": "transformer.adapter.A_log",
    "injection.step_bias": "transformer.adapter.dt_bias",
    "injection.weight": "transformer.adapter.B",
    "readout_map.weight": "transformer.C.weight",
    "norm.weight": "transformer.ln_f.weight",
    "head.weight": "lm_head.weight",
}
_STAGES = {"prelude": "prelude", "recurrent": "core_block", "coda": "coda"}
_IN_LAYER = {
    "norm_1": "norm_1",
    "norm_3": "norm_2",
    "attention.query": "attn.c_q",
    "attention.key": "attn.c_k",
    "attention.value": "attn.c_v",
    "attention.output": "attn.c_proj",
    "attention.value_gate": "attn.ve_gate",
    "mlp.up": "mlp.fc",
    "mlp.down": "mlp.proj",
}


def _architecture(config: Config) -> Architecture:
    fields = ConfigReader(config, "Parcae")
    for name, value in _FIXED.items():
        fields.require(name, value)
    if fields.has("rope_settings"):
        rope = fields.mapping("rope_settings")
        for name, fixed in _ROPE.items():
            rope.require(name, fixed)
        rope.close()
    fields.require("init_strategy", _INIT)
    width, heads = fields.count("n_embd"), fields.count("num_attention_heads")
    mlp_width = fields.count("intermediate_size")
    for name, same in (
        ("num_key_value_heads", heads),
        ("recurrent_num_attention_heads", heads),
        ("recurrent_embedding_dimension", width),
        ("recurrent_intermediation_embedding_dimension", mlp_width),
    ):
        if fields.has(name):
            fields.require(name, same)
    prelude, recurrent, coda = (fields.layers(f"n_layers_in_{part}") for part in ("prelude", "recurrent_block", "coda"))
    recurrences = fields.count("mean_recurrence")
    architecture = Architecture(
        vocab_size=fields.count("padded_vocab_size"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=mlp_width,
        prelude=prelude,
        recurrent=recurrent,
        coda=coda,
        recurrences=recurrences,
        injection="diagonal",
        prelude_norm=fields.boolean("prelude_norm"),
        readout_map=True,
        norm_eps=fields.number("norm_eps"),
        qk_norm="unweighted" if fields.boolean("qk_norm") else "none",
        rotary="adjacent",
        rope_base=_ROPE["rope_base"],
        value_embeddings=_value_embeddings(prelude, recurrent, coda, recurrences, fields.count("mean_backprop_depth")),
        mlp="plain",
        activation="halved-relu2",
        tied_embeddings=fields.boolean("tie_embeddings"),
        state_init="normal",
        state_std=math.sqrt(2 / (5 * width)),
        max_positions=fields.count("block_size"),
    )
    fields.close(_HARMLESS)
    return architecture


def _value_embeddings(prelude: int, recurrent: int, coda: int, recurrences: int, backprop: int) -> tuple[int, ...]:
    """Every other layer, the last one included. Their gates go by another count of layers, in which those of the loop
    come as often as they run, and a layer that has one of the two alone has neither in the published code."""
    layers = prelude + recurrent + coda
    found = tuple(layer for layer in range(layers) if layer % 2 == (layers - 1) % 2)
    behind = recurrent * (recurrences - 1)
    counted = [layer + (behind if layer >= prelude + recurrent else 0) for layer in range(layers)]
    gates = tuple(layer for layer in range(layers) if counted[layer] % 2 == (recurrent * backprop - 1) % 2)
    if found != gates:
        raise UnknownSettingError(
            f"config.json gives value embeddings to layers {list(found)} and gates for them to layers {list(gates)}; "
            "loopscope implements Parcae with both in the same layers only."
        )
    return found


def _parts(architecture: Architecture, names: Collection[str]) -> dict[str, TensorSlice]:
    first = {"prelude": 0, "recurrent": architecture.prelude, "coda": architecture.prelude + architecture.recurrent}
    parts = {}
    for name, shape in parameter_shapes(architecture).items():
        ours = parse_name(name)
        if not ours.stage:
            theirs = _OUTSIDE[name]
        elif ours.module == "attention.value_embedding":
            theirs = f"value_embeds.{first[ours.stage] + ours.layer}.weight"
        else:
            theirs = f"transformer.{_STAGES[ours.stage]}.{ours.layer}.{_IN_LAYER[ours.module]}.{ours.leaf}"
        parts[name] = TensorSlice(theirs, shape)
    return parts


PARCAE = Family(
    name="parcae",
    model_types=("ParcaeConfig", "Parcae"),
    recognises=lambda names: "transformer.adapter.A_log" in names,
    architecture=_architecture,
    parts=_parts,
    tied_head="lm_head.weight",
)
