"""Prompts: from a file, a list or a preset to tokens that fit the model.

`load_prompts` reads and draws, `encode_prompts` turns text into token ids, `cut_text` one long text into prompts of
one length, and `prompts_digest` says whether two studies saw the same tokens. `load_tokenizer` reads a model's
tokenizer and chat template. The room knows nothing of models.
"""

from loopscope.prompts.chat import ChatTemplate, RenderedChat
from loopscope.prompts.conditions import PADDING, condition_names, pad_prompts, padding_record
from loopscope.prompts.load import load_prompts
from loopscope.prompts.presets import HUB_PRESETS, SHIPPED_PRESETS, preset_names
from loopscope.prompts.prompt import Prompt, TokenizedPrompt, prompts_digest
from loopscope.prompts.record import tokenizer_record
from loopscope.prompts.running_text import cut_text
from loopscope.prompts.sample import draw
from loopscope.prompts.tokenizer import SpecialToken, TextTokenizer, load_tokenizer, read_tokenizer
from loopscope.prompts.tokens import encode_prompts

__all__ = [
    "HUB_PRESETS",
    "PADDING",
    "SHIPPED_PRESETS",
    "ChatTemplate",
    "Prompt",
    "RenderedChat",
    "SpecialToken",
    "TextTokenizer",
    "TokenizedPrompt",
    "condition_names",
    "cut_text",
    "draw",
    "encode_prompts",
    "load_prompts",
    "load_tokenizer",
    "pad_prompts",
    "padding_record",
    "preset_names",
    "prompts_digest",
    "read_tokenizer",
    "tokenizer_record",
]
