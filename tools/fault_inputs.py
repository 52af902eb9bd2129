"""Inputs that once ended in a traceback, without an answer, or with more memory than there is."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import loopscope.cli
import loopscope.experiments.run_sweep
import loopscope.report.page.write
from loopscope.models.architecture import Architecture
from loopscope.models.checkpoints.native import save_checkpoint
from loopscope.models.native.transformer import LoopedTransformer

DEMO = Path(loopscope.__path__[0]) / "demo" / "models" / "injected"
NINES, DEEP = "9" * 5000, "[" * 100_000
ANALYZE = ["--recurrences", "2", "--horizon", "8", "--device", "cpu", "--no-report", "--skip", "stability", "heads"]


class Fault(NamedTuple):
    """One input: `make` writes files into an empty folder and gives the command line."""

    kind: str
    name: str
    make: Callable[[Path], list[str]]


def tiny(folder: Path) -> Path:
    """A checkpoint that takes no time."""
    architecture = Architecture(
        vocab_size=1024, width=16, heads=2, kv_heads=2, head_dim=8, mlp_width=32, prelude=1, recurrent=1, coda=1,
        recurrences=4, injection="linear",
    )  # fmt: skip
    save_checkpoint(folder, LoopedTransformer(architecture).initialize(0, 0.1), (DEMO / "tokenizer.json").read_text())
    return folder


def analyze(model: Path | str, folder: Path, *more: str) -> list[str]:
    text = [] if any(each in ("--text", "--prompts") for each in more) else ["--text", "one two three"]
    return ["analyze", str(model), "--out", str(folder / "out"), *ANALYZE, *text, *more]


def edited(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


def nested(content: Any, place: str, value: Any) -> Any:
    *above, last = place.split(".")
    inner = content
    for name in above:
        inner = inner[name] if isinstance(inner, dict) else inner[int(name)]
    inner[last] = value
    return content


def configs() -> Iterator[Fault]:
    ouro = {
        "model_type": "ouro", "vocab_size": 100, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 64, "num_hidden_layers": 2,
    }  # fmt: skip

    def config(name: str, command: str, content: Any) -> Fault:
        def make(folder: Path) -> list[str]:
            model = tiny(folder / "m")
            (model / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
            return ["inspect", str(model)] if command == "inspect" else analyze(model, folder)

        return Fault("config.json", f"{command} {name}", make)

    for layers in (10**8, 10**9, int("9" * 400)):
        for family in ("ouro", "qwen3"):
            yield config(f"{family} layers", "inspect", {**ouro, "model_type": family, "num_hidden_layers": layers})
    for command in ("inspect", "analyze"):
        for name, content in (
            ("long name", json.dumps({"model_type": "x" * 100_000})),
            ("long unknown field", json.dumps({"architecture": {"y" * 200_000: 1}, "model_type": "loopscope"})),
            ("deep", DEEP),
            ("deep objects", '{"a":' * 100_000),
            ("half a character", '{"model_type": "\\ud800"}'),
            ("digits", f'{{"model_type": "ouro", "num_hidden_layers": {NINES}}}'),
        ):
            yield config(name, command, content)

    def pipe(folder: Path) -> list[str]:
        model = tiny(folder / "m")
        (model / "config.json").unlink()
        os.mkfifo(model / "config.json")
        return ["inspect", str(model)]

    yield Fault("config.json", "pipe", pipe)

    def index(folder: Path) -> list[str]:
        model = tiny(folder / "m")
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 5000}}))
        return analyze(model, folder)

    yield Fault("safetensors", "long name in the index", index)


def tokenizers() -> Iterator[Fault]:
    def given(name: str, change: Callable[[Any], Any], beside: Any = None, text: str = "a" * 40 + "!") -> Fault:
        def make(folder: Path) -> list[str]:
            model = tiny(folder / "m")
            edited(model / "tokenizer.json", change)
            if beside is not None:
                content = beside if isinstance(beside, str) else json.dumps(beside)
                (model / "tokenizer_config.json").write_text(content)
            return analyze(model, folder, "--text", text)

        return Fault("tokenizers", name, make)

    patterns = {"(a+)+$": "", "recursive": "(?<r>a\\g<r>?\\g<r>?)+b", "(x+x+)+y": "", "empty": "", "(a|a)*b": ""}
    for name, pattern in patterns.items():
        regex = {"Regex": pattern or ("" if name == "empty" else name)}
        split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
        replace = {"type": "Replace", "pattern": regex, "content": "b"}
        text = "x" * 60 if "x" in name else "a" * 60 + "!"
        for part, what in (("pre_tokenizer", split), ("normalizer", replace)):
            yield given(f"{part} {name}", lambda t, part=part, what=what: t | {part: what}, text=text)  # type: ignore[misc]

    def replaced(pattern: Any, content: str, times: int = 1) -> Callable[[Any], Any]:
        one = {"type": "Replace", "pattern": pattern, "content": content}
        return lambda t: t | {"normalizer": {"type": "Sequence", "normalizers": [one] * times}}

    yield given("normalizer blow-up", replaced({"String": "a"}, "a" * 100, 12))
    yield given("normalizer empties", replaced({"Regex": "."}, ""))
    yield given("normalizer prepends", lambda t: t | {"normalizer": {"type": "Prepend", "prepend": "q " * 10**6}})

    def post(ids: list[int], known: str) -> Callable[[Any], Any]:
        template = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {known: {"id": known, "ids": ids, "tokens": ["<|begin|>"] * len(ids)}},
        }
        return lambda t: t | {"post_processor": template}

    yield given("post-processor without its token", post([0], "other"))
    yield given("post-processor of many ids", post([0] * 10**6, "<|begin|>"))
    same = dict
    yield given("added token without content", same, {"added_tokens_decoder": {"5": {"special": True}}})
    yield given("half a character", same, '{"bos_token": "\\ud800"}')
    yield given("deep", same, DEEP)


def templates() -> Iterator[Fault]:
    sources = {
        "nested range": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "multiplied": "{{ 'x' * 10000000000 }}",
        "multiplied, length": "{{ ('x' * 100000000000) | length }}",
        "centred": "{{ messages[0].content | center(10000000000) }}",
        "indented": "{{ (messages[0].content ~ '\\n' ~ messages[0].content) | indent(10000000000) }}",
        "justified": "{{ messages[0].content.ljust(10000000000) }}",
        "format width": "{{ '%10000000000d' % 1 }}",
        "format method": "{{ '{:>10000000000}'.format(1) }}",
        "lipsum": "{% for a in range(99999) %}{{ lipsum(n=1000) }}{% endfor %}",
        "batch": "{{ [1] | batch(10000000000, 'x') | list | length }}",
        "doubling": "{% set ns = namespace(x='xx') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "JSON indent": "{{ {'a': [1]} | tojson(indent=10000000000) }}",
        "many tokens": "{{ messages[0].content }}{% for a in range(99999) %}{{ 'go on ' * 9 }}{% endfor %}",
        "power": "{{ 9 ** 9 ** 9 ** 9 }}",
        "deep": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
        "recursive macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    }
    for name, source in sources.items():

        def make(folder: Path, source: str = source) -> list[str]:
            model = tiny(folder / "m")
            (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
            return analyze(model, folder, "--chat")

        yield Fault("chat templates", name, make)

    def named(folder: Path) -> list[str]:
        model = tiny(folder / "m")
        (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": {"a": 1}}]}))
        return analyze(model, folder, "--chat")

    yield Fault("chat templates", "a name that is an object", named)


def prompts() -> Iterator[Fault]:
    line = "the quick brown fox jumps over the dog "

    def given(name: str, file: str, content: str | bytes, *more: str) -> Fault:
        def make(folder: Path) -> list[str]:
            path = folder / file
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            return analyze(tiny(folder / "m"), folder, "--prompts", str(path), *more)

        return Fault("prompts", name, make)

    long = line * 250_000
    for option in ([], ["--whole-file"], ["--truncate", "8"], ["--chunk", "64", "--limit", "2"]):
        yield given(f"10 MB line {' '.join(option)}", "p.txt", long, *option)
    yield given("10 MB word", "p.txt", "x" * 10**7)
    yield given("100,000 tokens", "p.txt", line * 25_000)
    yield given("20,000 tokens", "p.txt", line * 2000)
    yield given("half a character", "p.jsonl", '{"id": "\\ud800", "q": "hi"}\n', "--field", "q")
    yield given("200,000 ids", "p.jsonl", json.dumps({"q": [1] * 200_000}) + "\n", "--field", "q")
    yield given("deep", "p.jsonl", DEEP, "--field", "q")
    yield Fault("prompts", "/dev/zero", lambda folder: analyze(tiny(folder / "m"), folder, "--prompts", "/dev/zero"))
    long_name = "/".join(["x" * 200] * 25)
    yield Fault("prompts", "long path", lambda folder: analyze(DEMO, folder, "--prompts", f"/{long_name}.txt"))

    def pipe(folder: Path) -> list[str]:
        os.mkfifo(folder / "p.txt")
        return analyze(DEMO, folder, "--prompts", str(folder / "p.txt"))

    yield Fault("prompts", "pipe", pipe)


def options() -> Iterator[Fault]:
    def given(*more: str) -> Fault:
        shown = " ".join(each if len(each) < 40 else each[:20] + "..." for each in more)
        return Fault("options", shown, lambda folder: analyze(tiny(folder / "m"), folder, *more))

    for name in (
        "recurrences",
        "horizon",
        "threads",
        "components",
        "other-starts",
        "map-tokens",
        "eigenvalue-products",
    ):
        for value in (NINES, "2147483648", "999999999", "-1"):
            yield given(f"--{name}={value}")
    yield given("--track", "0:999999999999999999")
    yield given("--track", f"0:{NINES}")
    yield given("--device", "mps")
    yield given("--device", "meta")
    for form in ("mlp:prelude.{}=0", "mlp:recurrent.0@{}=0", "inject@{}=frozen", "token:{}@1=zeros", "damp={}"):
        yield given("--intervene", form.format(NINES))
    yield Fault("options", "out nul", lambda folder: [*analyze(DEMO, folder), "--out", f"{folder}/a\0b"])
    for command in ("analyze", "inspect"):
        name = "a/" + "b" * 5000
        yield Fault(
            "options", f"{command} long hub name",
            lambda folder, command=command, name=name: (  # type: ignore[misc]
                ["inspect", name] if command == "inspect" else analyze(name, folder)
            ),
        )  # fmt: skip
    for value in (NINES, "1" + "0" * 400):
        yield Fault("options", "inspect tokens", lambda folder, value=value: ["inspect", str(DEMO), "--tokens", value])  # type: ignore[misc]
    yield Fault("options", "calibrate seed -1", lambda folder: ["calibrate", "--seed", "-1", "--count", "8"])
    yield Fault("options", "half a character", lambda folder: ["inspect", "a\udcff"])


def status_of(arguments: list[str]) -> int:
    """With which a command ends, in a fork whose standard error leads elsewhere."""
    sys.stderr = os.fdopen(2, "w", closefd=False)
    try:
        loopscope.cli.main(arguments)
        return 0
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 1
    finally:
        sys.stderr.flush()
