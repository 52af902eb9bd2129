"""From text to token ids: exact, readable, and refused where they do not fit the model."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from loopscope.errors import PromptError
from loopscope.prompts.load import load_prompts
from loopscope.prompts.prompt import Prompt, TokenizedPrompt, prompts_digest
from loopscope.prompts.tokenizer import TextTokenizer
from loopscope.prompts.tokens import encode_prompts

BEGIN, END = "<|begin|>", "<|end|>"
VOCAB = 600


def train(tokenizer: Tokenizer, special: list[str], vocab_size: int = VOCAB) -> Tokenizer:
    corpus = [prompt.text for prompt in load_prompts(prompts="word-problems")]
    # Blank lines that merge with what follows them are where a system prompt's end is hard to see.
    corpus += ["\n\nHow many", "\n\n  How many"] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def byte_level(*, trim_offsets: bool = False, add_prefix_space: bool = False, use_regex: bool = True) -> Tokenizer:
    """GPT-2's kind: blanks belong to the word after them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, [BEGIN, END])
    framed = processors.TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, 0), (END, 1)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim_offsets), framed])
    return tokenizer


def metaspace() -> Tokenizer:
    """Llama 2's kind: a blank is put in front, unknown characters fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    train(tokenizer, ["<unk>", BEGIN, *(f"<0x{byte:02X}>" for byte in range(256))], 900)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
    return tokenizer


TOKENIZERS = {
    "byte level": TextTokenizer(byte_level()),
    "byte level, trimmed": TextTokenizer(byte_level(trim_offsets=True)),
    "byte level, prefix": TextTokenizer(byte_level(add_prefix_space=True)),
    "byte level, prefix, trimmed": TextTokenizer(byte_level(add_prefix_space=True, trim_offsets=True)),
    "byte level, no words": TextTokenizer(byte_level(use_regex=False)),
    "metaspace": TextTokenizer(metaspace()),
}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
# Special tokens that a text spells out have tests of their own below; hypothesis finds their names in this module.
plain_text = st.text(
    st.sampled_from("aebHow many12  \n\t.,?éß€漢🙂") | st.characters(codec="utf-8", exclude_characters="▁"), max_size=40
).filter(lambda text: not any(special in text for special in (BEGIN, END, "<unk>", "<0x")))


def encode(
    tokenizer: TextTokenizer | None,
    *prompts: Prompt,
    vocab_size: int = 1000,
    max_positions: int | None = None,
    truncate: int | None = None,
) -> list[TokenizedPrompt]:
    return encode_prompts(prompts, tokenizer, vocab_size=vocab_size, max_positions=max_positions, truncate=truncate)


def is_special(piece: str) -> bool:
    return piece in (BEGIN, END)


# Tokens and their strings


@each_tokenizer
@given(text=plain_text.filter(str.strip))
def test_token_strings_put_together_are_the_text(tokenizer: TextTokenizer, text: str) -> None:
    (prompt,) = encode(tokenizer, Prompt("a", text=text))
    assert prompt.token_ids == tuple(tokenizer.encode(text).ids)
    assert len(prompt.token_strings) == len(prompt.token_ids)
    assert all(prompt.token_strings)
    assume("\N{REPLACEMENT CHARACTER}" not in text)
    pieces = [piece for piece in prompt.token_strings if not is_special(piece) and piece != "\N{REPLACEMENT CHARACTER}"]
    # Only a blank that the tokenizer itself puts in front may be more than the text.
    assert "".join(pieces) in (text, f" {text}")


def test_token_strings_read_well() -> None:
    (prompt,) = encode(TOKENIZERS["byte level"], Prompt("a", text="How many €s?"))
    assert prompt.token_strings[0] == BEGIN
    assert prompt.token_strings[-1] == END
    assert " many" in prompt.token_strings
    assert prompt.token_strings[prompt.token_strings.index("€") + 1 :][:2] == ("\N{REPLACEMENT CHARACTER}",) * 2
    (ids,) = encode(TOKENIZERS["byte level"], Prompt("a", token_ids=prompt.token_ids))
    assert [piece for piece in ids.token_strings if piece.isascii()] == [
        piece for piece in prompt.token_strings if piece.isascii()
    ]


def test_token_ids_without_a_tokenizer() -> None:
    (prompt,) = encode(None, Prompt("a", token_ids=(3, 999)))
    assert prompt == TokenizedPrompt("a", None, (3, 999), ("<3>", "<999>"), 0)


# System prompts


@each_tokenizer
@given(system=plain_text.map(str.strip).filter(bool), text=plain_text.filter(str.strip))
def test_the_tokens_of_a_system_prompt_are_counted_exactly(tokenizer: TextTokenizer, system: str, text: str) -> None:
    assume("\N{REPLACEMENT CHARACTER}" not in system + text)
    (prompt,) = encode(tokenizer, Prompt("a", text=text, system=system))
    assert prompt.token_ids == tuple(tokenizer.encode(f"{system}\n\n{text}").ids)
    assert prompt.text == text

    def joined(pieces: tuple[str, ...]) -> str:
        return "".join(piece for piece in pieces if not is_special(piece) and piece != "\N{REPLACEMENT CHARACTER}")

    before = joined(prompt.token_strings[: prompt.system_tokens]).removeprefix(" ")
    end = len(prompt.token_ids) - prompt.suffix_tokens
    after = joined(prompt.token_strings[prompt.system_tokens : end])
    assert all(is_special(piece) for piece in prompt.token_strings[end:])
    if before == f"{system}\n\n":
        assert after in (text, f" {text}")
    else:  # one token reaches across the boundary, and belongs to the prompt
        assert f"{system}\n\n".startswith(before)
        assert after.removeprefix(" ").endswith(text)


def test_a_token_across_the_boundary_belongs_to_the_prompt() -> None:
    tokenizer = TOKENIZERS["byte level, no words"]
    (prompt,) = encode(tokenizer, Prompt("a", text="How many", system="Be kind."))
    assert "".join(prompt.token_strings[: prompt.system_tokens]) == f"{BEGIN}Be kind."
    assert prompt.token_strings[prompt.system_tokens].startswith("\n\nH")


def test_without_a_system_prompt_the_count_is_zero() -> None:
    (prompt,) = encode(TOKENIZERS["byte level"], Prompt("a", text="How many?"))
    assert prompt.token_strings[0] == BEGIN
    assert prompt.system_tokens == 0


@each_tokenizer
@given(text=plain_text.filter(str.strip))
def test_an_end_that_the_tokenizer_adds_comes_after_the_prompt(tokenizer: TextTokenizer, text: str) -> None:
    (prompt,) = encode(tokenizer, Prompt("a", text=text))
    assert prompt.suffix_tokens == len(tokenizer.after)
    (cut,) = encode(tokenizer, Prompt("a", text=text), truncate=len(prompt.token_ids) - 1)
    assert cut.suffix_tokens == 0


def test_an_end_that_the_text_spells_out_is_the_prompts() -> None:
    (prompt,) = encode(TOKENIZERS["byte level"], Prompt("a", text=f"How many?{END}"))
    assert prompt.token_strings[-2:] == (END, END)
    assert prompt.suffix_tokens == 1
    assert prompt.special_in_text == (END,)


# Digest


def test_the_digest_tells_ids_tokens_and_order_apart() -> None:
    def digest(*prompts: tuple[str, tuple[int, ...]]) -> str:
        return prompts_digest(encode(None, *(Prompt(id_, token_ids=ids) for id_, ids in prompts)))

    base = digest(("a", (1, 2)), ("b", (3,)))
    assert len(base) == 64
    assert base == digest(("a", (1, 2)), ("b", (3,)))
    others = {
        digest(("b", (3,)), ("a", (1, 2))),
        digest(("a", (1,)), ("b", (2, 3))),
        digest(("a", (12,)), ("b", (3,))),
        digest(("a", (1, 2)), ("c", (3,))),
        digest(("a", (1, 2))),
        base,
    }
    assert len(others) == 6


# Limits


def test_truncation_keeps_the_first_tokens() -> None:
    tokenizer = TOKENIZERS["byte level"]
    (whole,) = encode(tokenizer, Prompt("a", text="How many books are left?", system="Be kind."))
    for length in range(whole.system_tokens + 1, len(whole.token_ids) + 3):
        (cut,) = encode(tokenizer, Prompt("a", text="How many books are left?", system="Be kind."), truncate=length)
        assert cut.token_ids == whole.token_ids[:length]
        assert cut.token_strings == whole.token_strings[:length]
        assert cut.system_tokens == whole.system_tokens
    with pytest.raises(PromptError, match=f"leaves nothing of prompt 'a', .* has {whole.system_tokens} tokens"):
        encode(tokenizer, Prompt("a", text="How many?", system="Be kind."), truncate=whole.system_tokens)
    with pytest.raises(PromptError, match="--truncate must be at least 1, got 0"):
        encode(tokenizer, Prompt("a", text="How many?"), truncate=0)


def test_a_prompt_longer_than_the_model() -> None:
    fits, too_long = Prompt("short", token_ids=(1,) * 8), Prompt("long", token_ids=(1,) * 9)
    assert len(encode(None, fits, max_positions=8)) == 1
    with pytest.raises(PromptError, match=r"'long' has 9 tokens, but the model has 8 positions; .* --truncate 8"):
        encode(None, fits, too_long, max_positions=8)
    assert len(encode(None, fits, too_long, max_positions=8, truncate=8)[1].token_ids) == 8
    with pytest.raises(PromptError, match="of them before its own text"):
        encode(TOKENIZERS["byte level"], Prompt("a", text="How?", system="Be kind."), max_positions=3)


def test_token_ids_that_the_model_does_not_have() -> None:
    with pytest.raises(PromptError, match=r"'a' has the token id 10, but the model has 10 tokens \(ids 0 to 9\)"):
        encode(None, Prompt("a", token_ids=(9, 10)), vocab_size=10)
    for token in (-1, 2**32, 10**30):
        with pytest.raises(PromptError, match=f"'a' has the token id {token}, but the model has 600 tokens"):
            encode(TOKENIZERS["byte level"], Prompt("a", token_ids=(token,)), vocab_size=600)
    with pytest.raises(PromptError, match="tokenizer has 600 tokens, so it belongs to another model"):
        encode(TOKENIZERS["byte level"], Prompt("a", text="How many books?"), vocab_size=200)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(
        PromptError,
        match=r"'b' is text, but the model has no tokenizer; .* or analyze lists of token ids in a JSONL file",
    ):
        encode(None, Prompt("a", token_ids=(1,)), Prompt("b", text="How?"))


def test_a_system_prompt_cannot_stand_before_token_ids() -> None:
    with pytest.raises(PromptError, match="leave --system-prompt out"):
        Prompt("a", token_ids=(1,), system="Be kind.")
