"""A long text cut into prompts of one length."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from loopscope import analyze
from loopscope.analysis.settings import AnalyzeSettings
from loopscope.errors import ConfigError, PromptError
from loopscope.prompts.load import load_prompts
from loopscope.prompts.prompt import Prompt, TokenizedPrompt, subsample
from loopscope.prompts.tokenizer import TextTokenizer
from loopscope.prompts.tokens import cut_text
from small_models import byte_tokenizer, checkpoint

PLAIN = TextTokenizer(byte_tokenizer())


def framed() -> TextTokenizer:
    """Bytes, between a special token that begins a text and one that ends it."""
    backend = byte_tokenizer()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    return TextTokenizer(backend)


def cut(text: str, chunk: int, tokenizer: TextTokenizer | None = PLAIN, **options: Any) -> list[TokenizedPrompt]:
    return cut_text(Prompt("file", text=text), tokenizer, chunk, **({"vocab_size": 300} | options))


@pytest.mark.parametrize("tokenizer", [PLAIN, framed()], ids=["plain", "framed"])
@given(text=st.text(min_size=12, max_size=60), chunk=st.integers(3, 12))
def test_chunks_in_a_row_are_the_tokens_of_the_text(tokenizer: TextTokenizer, text: str, chunk: int) -> None:
    around = len(tokenizer.before) + len(tokenizer.after)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    chunks = cut(text, chunk, tokenizer)
    own = [each.token_ids[len(tokenizer.before) : chunk - len(tokenizer.after)] for each in chunks]
    assert [token for part in own for token in part] == ids[: len(ids) - len(ids) % (chunk - around)]
    for number, each in enumerate(chunks, 1):
        assert each.id == f"chunk-{number}"
        assert len(each.token_ids) == len(each.token_strings) == chunk
        assert each.suffix_tokens == len(tokenizer.after)
        assert each.text is not None
        assert each.text in text
        assert tokenizer.encode(text).ids[: len(tokenizer.before)] == list(each.token_ids[: len(tokenizer.before)])


def test_each_chunk_has_its_own_text_and_pieces() -> None:
    first, second, _ = cut("To be, or not\nto be", 8, framed())
    assert (first.text, second.text) == ("To be,", " or no")
    assert first.token_strings == ("<s>", "T", "o", " ", "b", "e", ",", "</s>")
    # A character whose bytes lie in two chunks is part of both texts.
    assert [each.text for each in cut("ab€cd", 3)] == ["ab€", "€c"]


def test_special_tokens_are_counted_where_they_are_spelled() -> None:
    spelled = [each.special_in_text for each in cut("abc<s>defghi", 6, framed())]
    assert spelled == [("<s>",), ()]


def test_chunks_are_drawn_and_not_the_file(tmp_path: Path) -> None:
    text = "abcdefghijklmnopqrst"
    assert [each.text for each in cut(text, 4, limit=2)] == ["abcd", "efgh"]
    drawn = cut(text, 4, limit=3, seed=5)
    assert [each.text for each in drawn] == [text[4 * at : 4 * at + 4] for at in subsample(range(5), limit=3, seed=5)]
    assert [each.id for each in drawn] == [f"chunk-{at + 1}" for at in subsample(range(5), limit=3, seed=5)]
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (whole,) = load_prompts(prompts=str(tmp_path / "a.txt"), chunk=2, limit=5, sample_seed=0)
    assert whole.text == "one\n\ntwo"


@pytest.mark.parametrize(
    ("text", "chunk", "tokenizer", "options", "message"),
    [
        ("abc", 4, PLAIN, {}, r"has 3 tokens, too few for a single chunk of 4"),
        ("abc", 2, framed(), {}, r"--chunk 2 leaves no token of the text beside the 2 special tokens"),
        ("abcdef", 4, PLAIN, {"max_positions": 3}, r"'chunk-1' has 4 tokens, but the model has 3 positions"),
        ("abcdef", 4, PLAIN, {"vocab_size": 20}, r"belongs to another model"),
        ("abcdef", 4, PLAIN, {"limit": 0}, r"--limit must be at least 1"),
        ("abcdef", 4, None, {}, r"--chunk .* the model has no tokenizer"),
    ],
)
def test_a_cut_that_cannot_be_made_is_refused(
    text: str, chunk: int, tokenizer: TextTokenizer | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        cut(text, chunk, tokenizer, **options)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"text": ("a",)}, r"--chunk says how to read a file"),
        ({"prompts": "word-problems"}, r"--chunk is for text files, and 'word-problems' is a preset"),
        ({"prompts": "a.jsonl", "field": "q"}, r"--chunk takes a file as one text and --field"),
    ],
)
def test_only_text_files_are_cut(source: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        load_prompts(chunk=4, **source)


@pytest.mark.parametrize("other", [{"chat": True}, {"truncate": 3}, {"system_prompt": Path("a.txt")}])
def test_chunks_have_one_length(other: dict[str, Any]) -> None:
    name = next(iter(other)).replace("_", "-")
    with pytest.raises(ConfigError, match=rf"--chunk cuts a text .* --{name} would change"):
        AnalyzeSettings(chunk=8, **other)
    with pytest.raises(ConfigError, match="--chunk must be at least 1"):
        AnalyzeSettings(chunk=0)


def test_a_running_text_is_analysed_in_chunks(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    text = tmp_path / "play.txt"
    text.write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n")
    study = analyze(model, text, chunk=9, limit=3, recurrences=2, horizon=2, skip=("stability",))
    assert study.dataset["token_count"].values.tolist() == [9, 9, 9]
    assert [each["text"] for each in study.tokens] == ["First Cit", "izen:\nBef", "ore we pr"]
    assert study.manifest["prompts"]["chunk"] == 9
    with pytest.raises(PromptError, match="chunk means nothing for prompts that are lists of token ids"):
        analyze(model, [[1, 2, 3]], chunk=2)
