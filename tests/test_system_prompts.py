"""System prompts that go by a name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import loopscope
from loopscope.errors import PromptError
from loopscope.prompts.load import load_prompts, pad_prompts, padding_record
from loopscope.prompts.tokenizer import TextTokenizer, load_tokenizer
from loopscope.prompts.tokens import encode_prompts


def word_tokenizer(*special: str, unknown: bool = True) -> Tokenizer:
    """Whole words, all of them unknown but the special tokens."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


@pytest.fixture(scope="module")
def demo() -> TextTokenizer:
    tokenizer = loopscope.load("demo:injected").tokenizer
    assert tokenizer is not None
    return tokenizer


def tokens_of(name: str, tokenizer: TextTokenizer) -> loopscope.prompts.TokenizedPrompt:
    prompts = load_prompts(text=("Ann has 3 apples.",), system_prompt=Path(name))
    if name == "padding":
        prompts = pad_prompts(prompts, tokenizer)
    return encode_prompts(prompts, tokenizer, vocab_size=1024)[0]


def test_padding_is_as_long_as_the_persona(demo: TextTokenizer) -> None:
    persona, padding, maths = (tokens_of(name, demo) for name in ("persona", "padding", "maths"))
    assert persona.system_tokens == padding.system_tokens > 5 * maths.system_tokens
    own = len(persona.token_ids) - persona.system_tokens
    assert persona.token_ids[-own:] == padding.token_ids[-own:] == maths.token_ids[-own:]
    pad = demo.backend.token_to_id("<|pad|>")
    record = padding_record(demo)
    assert record == {"text": "<|pad|>", "id": pad, "tokens": padding.token_ids.count(pad)}


def test_a_name_is_told_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "persona").write_text("My own.")
    (own,) = load_prompts(text=("a",), system_prompt=tmp_path / "persona")
    (shipped,) = load_prompts(text=("a",), system_prompt=Path("persona"))
    assert own.system == "My own."
    assert shipped.system is not None
    assert 140 <= len(shipped.system.split()) <= 170
    with pytest.raises(PromptError, match="'perso' is neither a file nor the name of a system prompt"):
        load_prompts(text=("a",), system_prompt=Path("perso"))


@pytest.mark.parametrize(
    ("special", "declared", "expected"),
    [
        (("<pad>", "</s>"), {}, "<pad>"),
        (("<|endoftext|>",), {}, "<|endoftext|>"),
        (("<pad>", "<fill>"), {"pad_token": "<fill>"}, "<fill>"),
        (("<stop>",), {"eos_token": "<stop>"}, "<stop>"),
        (("<fill>", "<stop>"), {"eos_token": "<stop>", "pad_token": "<fill>"}, "<fill>"),
    ],
)
def test_the_padding_token_is_the_declared_one_or_the_one_called_so(
    special: tuple[str, ...], declared: dict[str, str], expected: str, tmp_path: Path
) -> None:
    word_tokenizer(*special).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert padding_record(tokenizer)["text"] == expected


def test_without_a_padding_token_one_sentence_says_what_to_do() -> None:
    prompts = load_prompts(text=("a",), system_prompt=Path("padding"))
    with pytest.raises(PromptError, match="needs a padding or an end-of-text token"):
        pad_prompts(prompts, TextTokenizer(word_tokenizer("<s>")))
    with pytest.raises(PromptError, match="the model has none"):
        pad_prompts(prompts, None)


def test_the_condition_is_in_the_manifest() -> None:
    study = loopscope.analyze(
        "demo:injected",
        ["Ann has 3 apples."],
        system_prompt=Path("padding"),
        recurrences=2,
        horizon=2,
        skip=("neurons", "behaviour", "stability", "maps", "heads", "stages"),
    )
    assert study.manifest["prompts"]["system_prompt"] == "padding"
    padding = study.manifest["prompts"]["padding"]
    assert padding["text"] == "<|pad|>"
    assert study.tokens[0]["system_tokens"] >= padding["tokens"]
