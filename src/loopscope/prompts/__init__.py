"""Prompts: from a file, a list or a preset to tokens that fit the model.

`load_prompts` reads and draws, `encode_prompts` turns text into token ids, `cut_text` one long text into prompts of
one length, and `prompts_digest` says whether two studies saw the same tokens. `load_tokenizer` reads a model's
tokenizer and chat template. The room knows nothing of models.
"""

from loopscope.prompts.load import load_prompts
from loopscope.prompts.prompt import Prompt, TokenizedPrompt, prompts_digest
from loopscope.prompts.tokenizer import load_tokenizer
from loopscope.prompts.tokens import cut_text, encode_prompts

__all__ = [
    "Prompt",
    "TokenizedPrompt",
    "cut_text",
    "encode_prompts",
    "load_prompts",
    "load_tokenizer",
    "prompts_digest",
]
