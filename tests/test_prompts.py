"""Every way to give prompts, what becomes of them, and the sentence for each way that cannot work."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopscope.errors import LoopscopeError, MissingDependencyError, PromptError
from loopscope.prompts.load import load_prompts
from loopscope.prompts.prompt import subsample
from loopscope.prompts.sources import HUB_PRESETS, find_preset, preset_names


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_json_lines(path: Path, *records: object) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def texts(**settings: Any) -> list[str | None]:
    return [prompt.text for prompt in load_prompts(**settings)]


# Sources


def test_a_text_file_has_a_prompt_on_each_line_that_is_not_blank(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "What is 2 + 2?\n\n   \nWhy\u2028not?\n  kept as it is \n")
    prompts = load_prompts(prompts=str(file))
    assert [(prompt.id, prompt.text) for prompt in prompts] == [
        ("line-1", "What is 2 + 2?"),
        ("line-4", "Why\u2028not?"),
        ("line-5", "  kept as it is "),
    ]
    assert all(prompt.system is None and prompt.token_ids is None for prompt in prompts)


def test_a_file_can_be_one_prompt(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "First line.\n\nLast line.\n")
    (prompt,) = load_prompts(prompts=str(file), whole_file=True)
    assert (prompt.id, prompt.text) == ("file", "First line.\n\nLast line.")


@pytest.mark.parametrize("whole_file", [False, True])
def test_windows_files_give_the_same_prompts(tmp_path: Path, whole_file: bool) -> None:
    unix = write(tmp_path / "unix.txt", "Über\nzwei\n")
    windows = write(tmp_path / "windows.txt", b"\xef\xbb\xbf" + "Über\r\nzwei\r\n".encode())
    assert load_prompts(prompts=str(windows), whole_file=whole_file) == load_prompts(
        prompts=str(unix), whole_file=whole_file
    )


def test_a_field_of_json_lines(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl", b'\xef\xbb\xbf{"q": "one\\ntwo", "n": 1}\r\n\r\n{"q": "three\xe2\x80\xa8", "n": 2}\r\n'
    )
    prompts = load_prompts(prompts=str(file), field="q")
    assert [(prompt.id, prompt.text) for prompt in prompts] == [("line-1", "one\ntwo"), ("line-3", "three\u2028")]


def test_token_ids_need_no_text(tmp_path: Path) -> None:
    file = write_json_lines(tmp_path / "a.jsonl", {"ids": [0, 5, 7]}, {"ids": [3]})
    prompts = load_prompts(prompts=str(file), field="ids")
    assert [prompt.token_ids for prompt in prompts] == [(0, 5, 7), (3,)]
    assert [prompt.text for prompt in prompts] == [None, None]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        ([7, 8], ["7", "8"]),
        (["a", "a"], ["line-1", "line-2"]),
        (["1", 1], ["line-1", "line-2"]),
        (["a", None], ["line-1", "line-2"]),
    ],
)
def test_records_keep_their_own_ids_if_each_has_its_own(tmp_path: Path, own: list[object], expected: list[str]) -> None:
    file = write_json_lines(tmp_path / "a.jsonl", *({"id": id_, "q": "text"} for id_ in own))
    assert [prompt.id for prompt in load_prompts(prompts=str(file), field="q")] == expected


def test_a_list_of_texts() -> None:
    prompts = load_prompts(text=("one", "two"))
    assert [(prompt.id, prompt.text) for prompt in prompts] == [("text-1", "one"), ("text-2", "two")]


def test_a_system_prompt_goes_with_every_prompt(tmp_path: Path) -> None:
    system = write(tmp_path / "persona.txt", "\ufeffYou are kind.\r\nAlways.\n\n")
    prompts = load_prompts(text=("one", "two"), system_prompt=system)
    assert {prompt.system for prompt in prompts} == {"You are kind.\nAlways."}


def test_values_that_are_not_drawn_are_not_judged(tmp_path: Path) -> None:
    file = write_json_lines(tmp_path / "a.jsonl", {"q": "good"}, {"q": ""}, {"other": 1})
    assert texts(prompts=str(file), field="q", limit=1) == ["good"]


def test_real_questions(shared_dir: Path) -> None:
    file = str(shared_dir / "data" / "gsm8k" / "test.jsonl")
    drawn = load_prompts(prompts=file, field="question", limit=256, sample_seed=0)
    everything = load_prompts(prompts=file, field="question")
    assert len(everything) == 1319
    assert len(drawn) == 256
    assert [prompt for prompt in everything if prompt in drawn] == drawn


# Drawing


@given(
    total=st.integers(1, 200),
    smaller=st.integers(1, 60),
    more=st.integers(0, 60),
    seed=st.none() | st.integers(-3, 10**9),
)
def test_a_smaller_draw_is_part_of_every_larger_one(total: int, smaller: int, more: int, seed: int | None) -> None:
    items = list(range(total))
    few = subsample(items, limit=smaller, seed=seed)
    many = subsample(items, limit=smaller + more, seed=seed)
    assert len(few) == min(smaller, total)
    assert few == sorted(set(few))
    assert set(few) <= set(many)
    if seed is None:
        assert few == items[:smaller]


def test_seeds_draw_different_subsets() -> None:
    draws = {tuple(subsample(range(1000), limit=20, seed=seed)) for seed in range(50)}
    assert len(draws) == 50
    # Every item has the same chance: 50 draws of 20 from 1000 have a mean index of 499.5 with standard error 9.
    assert abs(sum(map(sum, draws)) / 1000 - 499.5) < 45


def test_a_draw_is_the_same_on_every_machine() -> None:
    """Neither hash seeds nor Python's version take part, and last year's studies keep their prompts."""
    known = [15, 20, 36, 44, 46]  # the smallest of `printf 0:$i | sha256sum`
    assert subsample(range(64), limit=5, seed=0) == known
    command = "from loopscope.prompts.prompt import subsample; print(subsample(range(64), limit=5, seed=0))"
    for hash_seed in ("1", "2"):
        output = subprocess.run(
            [sys.executable, "-c", command],
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert json.loads(output) == known


# Presets


def evaluate(node: ast.AST) -> Fraction:
    """Exact arithmetic of an expression with + - * / and brackets."""
    match node:
        case ast.Expression(body=body):
            return evaluate(body)
        case ast.Constant(value=int(value)):
            return Fraction(value)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return evaluate(left) + evaluate(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return evaluate(left) - evaluate(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return evaluate(left) * evaluate(right)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return evaluate(left) / evaluate(right)
    raise AssertionError(f"{ast.dump(node)} is no plain arithmetic")


def test_the_shipped_word_problems_are_right() -> None:
    found = find_preset("word-problems")
    assert found is not None
    records = [json.loads(line) for line in found[0].read_text(encoding="utf-8").splitlines()]
    assert len({record["question"] for record in records}) == len({record["id"] for record in records}) == 64
    for record in records:
        assert set(record) == {"id", "question", "equation", "answer"}
        assert evaluate(ast.parse(record["equation"], mode="eval")) == record["answer"], record


def test_the_shipped_preset_loads() -> None:
    prompts = load_prompts(prompts="word-problems", limit=3)
    assert [prompt.id for prompt in prompts] == ["word-01", "word-02", "word-03"]
    assert all(prompt.text is not None and prompt.text.endswith("?") for prompt in prompts)
    equations = texts(prompts="word-problems", field="equation", limit=2)
    assert equations == ["5 * 24 - 37", "(18 + 2 * 18) / 6"]


def cached(cache: Path, name: str) -> Path:
    """Where the hub's cache has the file of a preset."""
    preset = HUB_PRESETS[name]
    path = cache / f"datasets--{preset.repo.replace('/', '--')}" / "snapshots" / preset.revision / preset.file
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, without a network."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="the extra `hub` is not installed")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_preset_of_json_lines(hub_cache: Path) -> None:
    write_json_lines(cached(hub_cache, "math500"), {"problem": "Find $x$.", "unique_id": "a"})
    assert texts(prompts="math500") == ["Find $x$."]


def test_a_hub_preset_of_parquet(hub_cache: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `hub` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `hub` is not installed")
    table = pyarrow.table({"question": ["one?", "two?"], "answer": ["1", "2"], "tokens": [[1, 2], [3]]})
    parquet.write_table(table, cached(hub_cache, "gsm8k"))
    assert [(prompt.id, prompt.text) for prompt in load_prompts(prompts="gsm8k")] == [
        ("row-1", "one?"),
        ("row-2", "two?"),
    ]
    assert [prompt.token_ids for prompt in load_prompts(prompts="gsm8k", field="tokens")] == [(1, 2), (3,)]
    with pytest.raises(PromptError, match="has no field 'problem'; its fields are question, answer, tokens"):
        load_prompts(prompts="gsm8k", field="problem")


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="the extra `hub` is not installed")
    file = write(tmp_path / "a.parquet", b"PAR1 and then nothing")
    with pytest.raises(PromptError, match="not a readable parquet file"):
        load_prompts(prompts=str(file), field="question")


def test_a_hub_preset_without_a_network(hub_cache: Path) -> None:
    with pytest.raises(PromptError, match=r"'math500' cannot be downloaded: it is not in the cache, .*--prompts FILE"):
        load_prompts(prompts="math500")


@pytest.mark.parametrize(("package", "name"), [("huggingface_hub", "math500"), ("pyarrow", "gsm8k")])
def test_a_hub_preset_without_the_extra(package: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what an import finds where the package is not installed
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'loopscope[hub]'")):
        load_prompts(prompts=name)


# What cannot work


def bad_inputs() -> Iterator[tuple[str, dict[str, Any], str | bytes | None, str]]:
    """Name, settings with FILE for a file, that file's content, and what the sentence must say."""
    file = {"prompts": "FILE.txt"}
    lines = {"prompts": "FILE.jsonl", "field": "q"}
    yield "missing", file, None, r"FILE\.txt does not exist"
    yield "not UTF-8", file, b"caf\xc3\xa9\ncaf\xe9 au lait", r"FILE\.txt is not UTF-8 text \(byte 9 "
    yield "not UTF-8 after a mark", file, b"\xef\xbb\xbfa\xff", r"byte 4 "
    yield "UTF-16", file, "text".encode("utf-16"), "byte 0 "
    yield "empty", file, "", r"FILE\.txt holds no prompts"
    yield "blank", file, "\n  \n\t\r\n", r"FILE\.txt holds no prompts"
    yield "blank as a whole", file | {"whole_file": True}, "\n\n", r"FILE\.txt is empty or blank"
    yield "JSONL without a field", {"prompts": "FILE.jsonl"}, '{"q": "a", "n": 1}', r"--field \(there are: q, n\)"
    yield "empty JSONL without a field", {"prompts": "FILE.jsonl"}, "", "the file is empty"
    yield "empty JSONL", lines, "\n", "holds no prompts"
    yield "JSON", {"prompts": "FILE.json"}, '[{"q": "a"}]', "with --field, or .* with --whole-file"
    yield "CSV", {"prompts": "FILE.csv"}, 'id,q\n1,"a"', "is a table, of which a line is no prompt; .* --whole-file"
    yield "broken line", lines, '{"q": "a"}\n\n{"q": "b"\n', r"Line 3 of .*FILE\.jsonl is not JSON"
    yield "huge number", lines, '{"q": ' + "1" * 5000 + "}", "Line 1 .* is not JSON"
    yield "deep nesting", lines, "[" * 100_000, "Line 1 .* is not JSON"
    yield "not an object", lines, '{"q": "a"}\n["b"]', "Line 2 .* is not a JSON object but a list"
    yield (
        "unknown field",
        lines,
        '{"q": "a"}\n{"question": "b", "n": 1}',
        "Line 2 .*no field 'q'; its fields are question, n",
    )
    yield "no fields", lines, "{}", "its fields are none"
    yield "number", lines, '{"q": 3.5}', "Line 1 .*'q', must be text or a list of token ids .* got 3.5"
    yield "object", lines, json.dumps({"q": {"nested": "x" * 999}}), "got {'nested': 'x+…"
    yield "no token ids", lines, '{"q": []}', r"got \[\]"
    yield "texts", lines, '{"q": ["a"]}', r"got \['a'\]"
    yield "true is no token", lines, '{"q": [true]}', r"got \[True\]"
    yield "negative token", lines, '{"q": [4, -1]}', r"got \[4, -1\]"
    yield "blank text", lines, '{"q": "a"}\n{"q": " \\n"}', r"Line 2 .*'q', is empty or blank"
    yield "half a character", lines, '{"q": "a\\ud800"}', "half of a character"
    yield "blank --text", {"text": ("a", "  ")}, None, "Prompt 2 of --text is empty or blank"
    yield "blank prompt", {"text": (" ",)}, None, "The prompt is empty or blank"
    yield "a text for a list", {"text": "How?"}, None, r"text must be a list of prompts, got the text 'How\?'"
    yield "neither", {}, None, "neither was given"
    yield "both", file | {"text": ("a",)}, "a", "both were given"
    yield "field of --text", {"text": ("a",), "field": "q"}, None, "--field says how to read a file"
    yield "whole --text", {"text": ("a",), "whole_file": True}, None, "--whole-file says how to read a file"
    yield "field of a whole file", file | {"field": "q", "whole_file": True}, "a", "leave one of them out"
    yield "whole preset", {"prompts": "word-problems", "whole_file": True}, None, "'word-problems' is a preset"
    yield "limit", file | {"limit": 0}, "a", "--limit must be at least 1, got 0"
    yield "seed without limit", file | {"sample_seed": 0}, "a", "add --limit"
    yield "misspelt preset", {"prompts": "gms8k"}, None, "did you mean gsm8k"
    yield "unknown preset", {"prompts": "zzz"}, None, "presets " + ", ".join(preset_names())
    yield "prompt as file", {"prompts": "What is 2/3 of " + "9" * 999}, None, "give it with --text"
    yield "column", {"prompts": "FILE.parquet"}, b"PAR1", "--field"
    yield (
        "missing system prompt",
        {"text": ("a",), "system_prompt": Path("none.txt")},
        None,
        r"none\.txt does not exist",
    )


@pytest.mark.parametrize(
    ("settings", "content", "sentence"), [pytest.param(*case, id=name) for name, *case in bad_inputs()]
)
def test_bad_input_is_answered_in_one_sentence(
    settings: dict[str, Any],
    content: str | bytes | None,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        write(tmp_path / settings["prompts"], content)
    with pytest.raises(PromptError, match=sentence) as caught:
        load_prompts(**settings)
    assert_one_sentence(caught.value)


def assert_one_sentence(error: LoopscopeError) -> None:
    assert "\n" not in str(error)
    assert re.search(r"[.)]$", str(error)), str(error)
    assert len(str(error)) < 400


def test_a_folder_is_no_prompt_file(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="is a folder"):
        load_prompts(prompts=str(tmp_path))


def test_an_empty_system_prompt(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"The system prompt .*persona\.txt is empty"):
        load_prompts(text=("a",), system_prompt=write(tmp_path / "persona.txt", " \n"))
