"""Fields of published config.json files that change nothing of what a model computes from tokens.

A configuration says what a model computes, so a field that is not understood may not be passed over. Every field must
therefore be read by its family, be listed here (or by the family), or be unset: null, false, or empty, which is how
files say that an option of other models is off. Anything else is refused by its name (`Fields.close`). The few
options that do something when they are *false*, such as `is_causal`, are required by the families.
"""

from __future__ import annotations

__all__ = ["BOOKKEEPING", "RAVEN_BOOKKEEPING"]

# fmt: off
BOOKKEEPING = frozenset({
    # Where the file comes from, and which code and tokenizer go with it.
    "model_type", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "name_or_path",
    "_name_or_path", "_commit_hash", "tokenizer_class", "task_specific_params", "finetuning_task",
    "transformers.js_config", "unsloth_fixed", "unsloth_version", "is_llama_config",
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

RAVEN_BOOKKEEPING = BOOKKEEPING | {
    "activation_checkpoint_impl", "architecture_class_name", "effective_expected_depth", "init_orthogonal",
    "init_strategy", "mean_backprop_depth", "n_layers", "padding_multiple", "sampling_scheme", "test_time_noise_type",
    "vocab_size",
}
"""Of Huginn and its kin. `vocab_size` is the tokenizer's there; the embedding has `padded_vocab_size` rows."""
# fmt: on
