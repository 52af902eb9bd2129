"""Nanbeige4.2 (Nanbeige/Nanbeige4.2-*; arXiv 2607.22083): all layers of a Llama loop, from the embeddings, without
injection.

The final norm closes each recurrence, so every recurrence can be read by the head.
"""

from __future__ import annotations

from loopscope.models.architecture import Architecture
from loopscope.models.checkpoints.config_reader import IGNORED_FIELDS, ConfigReader
from loopscope.models.checkpoints.family import Config, Family
from loopscope.models.checkpoints.llama import LLAMA_HEAD, LLAMA_LAYERS, llama_like_parts, read_llama_like

_OFF = (
    # More in a layer.
    *("qk_layernorm", "enable_hyper_connection", "enable_mhc", "enable_h_res_identity", "mhc_identity_nohresparam"),
    *("enable_depth_attention", "depth_attention_stride"),
    # More in the embedding.
    *("emb_neighbor_num", "emb_split_num", "emb_tp_num", "ngram_vocab_size_ratio", "ngram_embedding_hidden_size"),
    *("ngram_mod_force_prime", "ngram_compressed_tokenizer", "skip_ngram_for_input", "insert_ngram_layer_idx"),
    *("ngram_insert_all_layers", "ngram_layer_downproject_size"),
    # Another loop. Weights of losses say how often it runs, in place of its number.
    *("loop_loss_weights", "skip_loop_final_norm", "enable_double_loop_split", "loop_middle_layers", "loop_share_kv"),
    *("mhc_diff_for_loop", "mhc_double_stream_position_for_loop"),
)
"""What the published code can do besides, and the released models do not."""

_HARMLESS = IGNORED_FIELDS | {
    "ngram_fused_mode",
    "num_residual_streams",
    "mhc_sinkhorn_iterations",
    "mhc_init_gating_factor",
    "depth_attention_recent_window",
    "depth_attention_static_anchor_once",
}
"""Sizes of what is off."""


def _architecture(config: Config) -> Architecture:
    fields = ConfigReader(config, "Nanbeige")
    for name in _OFF:
        if config.get(name):
            fields.require(name, False)
    layers = fields.integer("num_hidden_layers")
    fields.require("layer_types", ["full_attention"] * layers if fields.has("layer_types") else False)
    architecture = Architecture(
        prelude=0,
        recurrent=layers,
        coda=0,
        recurrences=fields.count("num_loops"),
        loop_norm="recurrence",
        **read_llama_like(fields),
    )
    fields.require("kv_channels", architecture.head_dim)
    fields.close(_HARMLESS)
    return architecture


NANBEIGE = Family(
    name="nanbeige",
    model_types=("nanbeige",),
    recognises=LLAMA_LAYERS,
    architecture=_architecture,
    parts=llama_like_parts,
    tied_head=LLAMA_HEAD,
)
