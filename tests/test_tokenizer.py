"""The tokenizer of a checkpoint folder: BOS as its files say, checked against transformers where that is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from loopscope.errors import PromptError
from loopscope.prompts.load import load_prompts
from loopscope.prompts.prompt import Prompt
from loopscope.prompts.tokenizer import SpecialToken, TextTokenizer, load_tokenizer, tokenizer_record
from loopscope.prompts.tokens import encode_prompts
from test_prompt_tokens import BEGIN, metaspace

BOS, EOS = "<s>", "</s>"
TEXTS = ["How many books are left?", "  two  blanks ", "a", "über 3 €", f"spelled {BOS} out", "line\n\nend\n"]


def bpe(before: str = "", after: str = "", special: tuple[str, ...] = (BOS, EOS)) -> Tokenizer:
    """GPT-2's kind, which puts the given tokens around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([prompt.text for prompt in load_prompts(prompts="word-problems")], trainer)
    pieces = [before, "$A", after]
    tokens = [(token, tokenizer.token_to_id(token)) for token in (before, after) if token]
    if tokens:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(filter(None, pieces)), special_tokens=tokens
        )
    return tokenizer


def folder(path: Path, tokenizer: Tokenizer, config: dict[str, Any] | None = None, **files: Any) -> Path:
    """A checkpoint folder's tokenizer files; `files` by name without `.json`."""
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    named = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(named | (config or {})))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def loaded(path: Path) -> TextTokenizer:
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    return tokenizer


def expected(path: Path) -> Any:
    """The same folder as transformers reads it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.AutoTokenizer.from_pretrained(path)


FLAGS = [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}]


@pytest.mark.parametrize("config", FLAGS, ids=str)
@pytest.mark.parametrize(("before", "after"), [("", ""), (BOS, ""), (BOS, EOS), ("", EOS)])
def test_special_tokens_are_added_as_transformers_adds_them(
    tmp_path: Path, before: str, after: str, config: dict[str, Any]
) -> None:
    path = folder(tmp_path, bpe(before, after), config)
    ours, theirs = loaded(path), expected(path)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
    assert [token.text for token in ours.before] == [before] * bool(before)
    assert [token.text for token in ours.after] == [after] * bool(after)
    assert ours.bos == (SpecialToken(BOS, 0) if before else None)
    asked = {"bos": (config.get("add_bos_token"), bool(before)), "eos": (config.get("add_eos_token"), bool(after))}
    contradicted = [kind for kind, (wanted, has) in asked.items() if wanted is not None and wanted != has]
    assert len(ours.notes) == len(contradicted)
    for note, kind in zip(ours.notes, contradicted, strict=True):
        assert f"add_{kind}_token" in note
        assert "tokenizer.json decides" in note


@pytest.mark.parametrize("config", FLAGS, ids=str)
def test_a_tokenizer_of_pieces_begins_as_in_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    """Llama 2's kind, which transformers builds anew from the vocabulary."""
    declared = {"bos_token": BEGIN, "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    path = folder(tmp_path, metaspace(), declared | config)
    ours, theirs = loaded(path), expected(path)
    assert ours.bos == SpecialToken(BEGIN, 1)
    for text in ["How many books are left?", "a", "12 €"]:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"bos_token": {"__type": "AddedToken", "content": BOS, "lstrip": False, "normalized": False}}, {}),
        ({"extra_special_tokens": ["<new>"]}, {}),
        ({"additional_special_tokens": ["<new>", "many"]}, {}),
        ({"extra_special_tokens": {"image_token": "<new>"}}, {}),
        ({"pad_token": "<new>", "unk_token": "many"}, {}),
        ({"bos_token": None}, {"special_tokens_map": {"bos_token": BOS, "pad_token": {"content": "<new>"}}}),
        ({"added_tokens_decoder": {"400": {"content": "<new>", "special": True}}}, {}),
        (
            {"added_tokens_decoder": {"0": {"content": BOS, "special": True}}},
            {"special_tokens_map": {"pad_token": "<not counted>"}},
        ),
        ({"added_tokens_decoder": {"400": {"content": "<new>", "special": False}, "9": {"content": "many"}}}, {}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_tokens_declared_beside_the_tokenizer_count(
    tmp_path: Path, config: dict[str, Any], files: dict[str, Any]
) -> None:
    path = folder(tmp_path, bpe(BOS), config, **files)
    ours, theirs = loaded(path), expected(path)
    for text in [*TEXTS, "How many <new> books", "a<new>b", "<not counted>"]:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
    assert ours.vocab_size == len(theirs)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_a_tokenizer_alone_is_enough(tmp_path: Path) -> None:
    bpe(BOS).save(str(tmp_path / "tokenizer.json"))
    tokenizer = loaded(tmp_path)
    assert tokenizer.bos == SpecialToken(BOS, 0)
    assert tokenizer.chat_template is None
    assert tokenizer.notes == ()


def test_whole_words_have_a_bos_too() -> None:
    backend = Tokenizer(models.WordLevel({"[CLS]": 0, "zebra": 1, "[SEP]": 2}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["[CLS]", "[SEP]"])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    tokenizer = TextTokenizer(backend)
    assert (tokenizer.before, tokenizer.after) == ((SpecialToken("[CLS]", 0),), (SpecialToken("[SEP]", 2),))
    with pytest.raises(PromptError, match=r"tokenizer cannot read 'zebras' \(.*UNK.*\); leave this prompt out"):
        tokenizer.encode("zebras")


def test_a_tokenizer_neither_cuts_nor_pads(tmp_path: Path) -> None:
    tokenizer = bpe(BOS)
    whole = tokenizer.encode("How many books are left?").ids
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    assert loaded(folder(tmp_path, tokenizer)).encode("How many books are left?").ids == whole
    assert TextTokenizer(tokenizer).encode("How many books are left?").ids == whole
    assert len(tokenizer.encode("a").ids) == 64, "the caller's own tokenizer stays as it was"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("tokenizer.json", "{}", "is not a readable tokenizer"),
        ("tokenizer_config.json", "{", "is not readable JSON"),
        ("tokenizer_config.json", "[1]", "must hold a JSON object, got a list"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}', "unreadable added_tokens_decoder"),
        ("special_tokens_map.json", "\xff", "is not readable JSON"),
        ("chat_template.jinja", "\xff", "is not readable text"),
    ],
)
def test_files_that_are_damaged(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    path = folder(tmp_path, bpe())
    (path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(PromptError, match=sentence) as caught:
        load_tokenizer(path)
    assert name in str(caught.value)


# What is kept of it


def test_the_record_says_what_was_put_around_a_text(tmp_path: Path) -> None:
    tokenizer = loaded(folder(tmp_path, bpe(BOS, EOS), {"add_eos_token": False}))
    prompts = [Prompt("a", text="How many?"), Prompt("b", text=f"What is {EOS} or {BOS}?"), Prompt("c", text="<S>")]
    tokenized = encode_prompts(prompts, tokenizer, vocab_size=500)
    assert [prompt.special_in_text for prompt in tokenized] == [(), (EOS, BOS), ()]
    assert 1 in tokenized[1].token_ids[1:-1]
    record = tokenizer_record(tokenizer, tokenized, chat=False)
    assert record is not None
    contradiction, spelled = record.pop("notes")
    assert record == {
        "vocabulary": 400,
        "bos": {"text": BOS, "id": 0},
        "added_before": [BOS],
        "added_after": [EOS],
        "chat_template": "none",
        "prompts_with_special_tokens": 1,
    }
    assert "add_eos_token = false, but tokenizer.json puts </s> behind a text" in contradiction
    assert spelled.startswith("1 of 3 prompts spell out special tokens (</s>, <s>), which the model reads as those")
    assert spelled.endswith("the first is 'b'.")


def test_a_beginning_that_the_text_spells_out_again_is_said(tmp_path: Path) -> None:
    tokenizer = loaded(folder(tmp_path, bpe(BOS), {}))
    prompts = [Prompt("a", text="How many?"), Prompt("b", text=f"{BOS}What?"), Prompt("c", text=f"Not {BOS}{BOS}")]
    record = tokenizer_record(tokenizer, encode_prompts(prompts, tokenizer, vocab_size=500), chat=False)
    assert record is not None
    assert record["notes"][-1].startswith(
        f"1 of 3 prompts begin with {BOS} twice, as their text spells out what is put"
    )
    assert record["notes"][-1].endswith("The first is 'b'.")


def test_without_a_text_there_is_nothing_to_keep() -> None:
    tokenizer = TextTokenizer(bpe(BOS))
    ids = encode_prompts([Prompt("a", token_ids=(5, 6))], tokenizer, vocab_size=400)
    assert tokenizer_record(tokenizer, ids, chat=False) is None
    assert tokenizer_record(None, ids, chat=False) is None
    plain = TextTokenizer(bpe())
    record = tokenizer_record(plain, encode_prompts([Prompt("a", text="a")], plain, vocab_size=400), chat=False)
    assert record is not None
    assert record["bos"] is None
