"""Prompts: from a file, a list or a preset to tokens that fit the model.

`load_prompts` reads and draws, `encode_prompts` turns text into token ids, `prompts_digest` says whether two studies
saw the same tokens. The room needs nothing of loopscope but its errors.
"""

from loopscope.prompts.load import load_prompts
from loopscope.prompts.presets import HUB_PRESETS, SHIPPED_PRESETS, preset_names
from loopscope.prompts.prompt import Prompt, TokenizedPrompt, prompts_digest
from loopscope.prompts.sample import draw
from loopscope.prompts.tokens import encode_prompts, load_tokenizer

__all__ = [
    "HUB_PRESETS",
    "SHIPPED_PRESETS",
    "Prompt",
    "TokenizedPrompt",
    "draw",
    "encode_prompts",
    "load_prompts",
    "load_tokenizer",
    "preset_names",
    "prompts_digest",
]
