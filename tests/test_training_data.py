"""From text files to training batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from loopscope.errors import ConfigError, PromptError
from loopscope.experiments.training.config import DataConfig
from loopscope.experiments.training.data import (
    BEGIN,
    END,
    BatchStream,
    Corpus,
    DataFiles,
    load_tokenizer,
    read_documents,
    train_tokenizer,
    windows,
)
from loopscope.prompts.tokenizer import as_tokenizer, ids_of

TEXT = [f"Number {number} is the double of {number / 2}; the next is {number + 1}." for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXT, 320)


@given(text=st.text(max_size=60))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = train_tokenizer(TEXT, 300)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_numbers_are_read_digit_by_digit_behind_the_begin_token(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("1234 5678").tokens
    assert tokens[0] == BEGIN
    assert [token for token in tokens if any(letter.isdigit() for letter in token)] == list("12345678")


def test_the_tokenizer_is_the_same_in_every_process(tokenizer: Tokenizer) -> None:
    program = (
        "import json, sys; from loopscope.experiments.training.data import train_tokenizer;"
        "sys.stdout.write(train_tokenizer(json.loads(sys.stdin.read()), 320).to_str())"
    )
    for threads, hash_seed in (("1", "1"), ("4", "2")):
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(TEXT),
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == tokenizer.to_str()


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 259, got 100"):
        train_tokenizer(TEXT, 100)


def test_an_unfit_tokenizer_file_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(path, 320)
    size = tokenizer.get_vocab_size()
    path.write_text(tokenizer.to_str())
    assert load_tokenizer(path, size).to_str() == tokenizer.to_str()
    with pytest.raises(ConfigError, match=f"{size} entries, but architecture.vocab_size is {size - 1}"):
        load_tokenizer(path, size - 1)
    path.write_text(tokenizer.to_str().replace(END, "<|stop|>"))
    with pytest.raises(ConfigError, match=r"has no <\|end\|> token"):
        load_tokenizer(path, 320)


def test_lines_of_jsonl_fill_the_template(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    # U+2028 is a line break to some readers, but not to JSON.
    path.write_text('{"q": "one\u2028two", "a": 3}\n\n{"q": "four", "a": "five"}\n', encoding="utf-8")
    assert read_documents(path, "{q}? {a}") == ["one\u2028two? 3", "four? five"]


def test_a_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("first\nstill first\n\n \n\nsecond\n")
    assert read_documents(path, "{text}") == ["first\nstill first", "second"]


@pytest.mark.parametrize(
    ("content", "template", "said"),
    [
        ('{"q": "a"}\nnothing\n', "{q}", "line 2, is not JSON"),
        ('{"q": "a"}\n[1]\n', "{q}", "line 2, holds a JSON list"),
        ('{"q": "a"}\n{"p": "a"}\n', "{q}", "line 2, has no field 'q'"),
        ('{"q": null}\n', "{q}", "line 1, has None in the field 'q'"),
        ('{"q": "a"}\n', "{q", "cannot be read"),
        ('{"q": "a"}\n', "{q.__class__}", "must name fields"),
        ('{"q": "a"}\n', "{}", "must name fields"),
        ('{"q": "a"}\n', "always the same", "must name fields"),
        ("\n", "{q}", "holds no documents"),
        ('{"q": ""}\n', "{q}", "holds no documents"),
    ],
)
def test_unusable_text_is_named(tmp_path: Path, content: str, template: str, said: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_documents(path, template)


def test_text_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        read_documents(path, "{text}")


def test_paths_are_relative_to_the_configuration_unless_given(tmp_path: Path) -> None:
    config = DataConfig(train="a.jsonl", test="texts/b.jsonl", tokenizer="t.json")
    assert DataFiles.of(config, tmp_path) == DataFiles(
        tmp_path / "a.jsonl", tmp_path / "texts" / "b.jsonl", tmp_path / "t.json"
    )
    assert DataFiles.of(config, tmp_path, test=Path("other.txt")).test == Path("other.txt")


def test_a_missing_text_is_named_with_the_option_that_replaces_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.jsonl cannot be read .*--train-data"):
        DataFiles(tmp_path / "no.jsonl", tmp_path / "no.jsonl").hashes()


def test_every_document_is_framed(tokenizer: Tokenizer) -> None:
    corpus = Corpus.encode(TEXT, tokenizer)
    assert tokenizer.decode(corpus.tokens.tolist(), skip_special_tokens=False) == "".join(
        f"{BEGIN}{text}{END}" for text in TEXT
    )
    assert (corpus.tokens[corpus.starts[:-1]] == tokenizer.token_to_id(BEGIN)).all()


def test_an_epoch_holds_every_document_once_in_an_order_of_its_own(tokenizer: Tokenizer) -> None:
    corpus = Corpus.encode(TEXT, tokenizer)
    orders = [tokenizer.decode(corpus.epoch(5, epoch).tolist(), skip_special_tokens=False) for epoch in range(3)]
    assert len(set(orders)) == 3
    for order in orders:
        assert sorted(order.removesuffix(END).split(END)) == sorted(f"{BEGIN}{text}" for text in TEXT)
    assert not np.array_equal(corpus.epoch(5, 0), corpus.epoch(6, 0))


@given(length=st.integers(0, 100), context=st.integers(1, 30))
def test_windows_predict_every_token_once(length: int, context: int) -> None:
    tokens = np.arange(length, dtype=np.int64)
    cut = windows(tokens, context)
    predicted = cut[:, 1:].ravel()
    assert cut.shape[1] == context + 1
    assert np.array_equal(predicted, np.arange(1, len(predicted) + 1))
    assert max(length - 1, 0) - len(predicted) < context


def test_a_batch_depends_on_its_step_alone(tokenizer: Tokenizer) -> None:
    corpus = Corpus.encode(TEXT, tokenizer)
    stream = BatchStream(corpus, context=32, batch_size=3, seed=1)
    steps = 2 * corpus.windows_per_epoch(32) // 3 + 2
    in_order = [stream.batch(step) for step in range(steps)]
    for step in (steps - 1, 0, steps // 2):
        fresh = BatchStream(corpus, context=32, batch_size=3, seed=1)
        assert np.array_equal(fresh.batch(step), in_order[step])


def test_the_batches_of_an_epoch_are_its_windows_in_order(tokenizer: Tokenizer) -> None:
    corpus = Corpus.encode(TEXT, tokenizer)
    stream = BatchStream(corpus, context=32, batch_size=1, seed=1)
    number = corpus.windows_per_epoch(32)
    for epoch in range(2):
        seen = np.concatenate([stream.batch(epoch * number + index) for index in range(number)])
        assert np.array_equal(seen, windows(corpus.epoch(1, epoch), 32))


def test_text_shorter_than_a_window_is_refused(tokenizer: Tokenizer) -> None:
    corpus = Corpus.encode(["short"], tokenizer)
    with pytest.raises(ConfigError, match="fewer than one window of 65"):
        BatchStream(corpus, context=64, batch_size=1, seed=0)


def with_expressions(tokenizer: Tokenizer, pattern: str) -> Tokenizer:
    fields = json.loads(tokenizer.to_str())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    fields["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, fields["pre_tokenizer"]]}
    return Tokenizer.from_str(json.dumps(fields))


def test_a_tokenizer_with_expressions_reads_text_within_limits(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splitting = with_expressions(tokenizer, "[0-9]+")
    alone = [splitting.encode(text, add_special_tokens=False).ids for text in TEXT]
    monkeypatch.setattr("loopscope.prompts.tokenizer._LONGEST", 2 * len(TEXT[0]))  # so that there are several groups
    assert ids_of(TEXT, splitting) == alone
    monkeypatch.setattr("loopscope.prompts.sandbox.SECONDS", 0.3)
    endless = with_expressions(tokenizer, "(a+)+$")
    with pytest.raises(PromptError, match="cannot read the text"):
        Corpus.encode(["a" * 40 + "!"], endless)
    # Neither does one in memory, which a hooked module is given.
    with pytest.raises(PromptError, match="tokenizer cannot read"):
        as_tokenizer(endless).encode("a" * 40 + "!")
    path = tmp_path / "tokenizer.json"
    path.write_text(endless.to_str())
    assert load_tokenizer(path, 320).to_str() == endless.to_str()
