"""Inputs that once ended in a traceback, without an answer, or with more memory than there is."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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


def archive(path: Path, members: dict[str, bytes], flip: Callable[[bytes], bytes] = bytes) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file, contextlib.suppress(UserWarning):
        for name, member in members.items():
            file.writestr(name, member)
    path.write_bytes(flip(content.getvalue()))


def npy(shape: str = "(64, 4)", dtype: str = "<f4", data: bytes = b"\0" * 1024) -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def trajectories() -> Iterator[Fault]:
    states = npy(data=np.cumsum(np.random.default_rng(0).normal(size=(64, 4)), 0).astype("<f4").tobytes())

    def given(name: str, file: str, make: Callable[[Path], object], *more: str) -> Fault:
        def write(folder: Path) -> list[str]:
            make(folder / file)
            return ["behaviour", str(folder / file), "--dtype", "float32", "--out", str(folder / "out"), *more]

        return Fault("trajectories", name, write)

    def plain(content: bytes) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(content)

    yield given("long double", "a.npy", lambda path: np.save(path, np.ones((64, 4), dtype=np.longdouble)))
    yield given("negative shape", "a.npy", plain(npy("(-64, 4)")))
    yield given("deep header", "a.npy", plain(npy("(" * 100)))
    yield given("objects", "a.npy", plain(npy(dtype="|O")))

    def twice(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.npy", states)
            with contextlib.suppress(UserWarning):
                file.writestr("a.npy", states)

    yield given("npz with a name twice", "a.npz", twice)
    whole = {"a.npy": states}
    yield given(
        "npz checksum", "a.npz", lambda path: archive(path, whole, lambda c: c.replace(states[200:210], b"x" * 10))
    )
    yield given("npz cut", "a.npz", lambda path: archive(path, whole, lambda c: c[: len(c) // 2]))
    yield given(
        "npz encrypted", "a.npz",
        lambda path: archive(path, whole, lambda c: c.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01")),
    )  # fmt: skip
    method = b"PK\x01\x02\x14\x03\x14\x00\x00\x00"
    yield given(
        "npz method 99",
        "a.npz",
        lambda path: archive(path, whole, lambda c: c.replace(method + b"\0\0", method + b"\x63\0")),
    )
    yield given("npz of 16 GB", "a.npz", lambda path: archive(path, {"a.npy": npy("(1024000000, 4)")}))
    yield given("window", "a.npy", plain(states), "--set", f"window={NINES}")
    yield given("first recurrence", "a.npy", plain(states), "--first-recurrence", NINES)
    yield Fault(
        "trajectories", "no file", lambda folder: ["behaviour", "--dtype", "float32", "--out", str(folder / "o")]
    )
    for name in ("manifest.json", "notes.txt"):

        def holds(path: Path, name: str = name) -> None:
            path.write_bytes(states)
            (path.parent / "out").mkdir()
            (path.parent / "out" / name).write_text("{}")

        yield given(f"a folder that holds {name}", "a.npy", holds)


SWEEP: dict[str, Any] = {
    "task": {"kind": "automaton", "cells": 4, "steps": 2, "documents": 40, "test_documents": 8},
    "base": {
        "architecture": {
            "width": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "mlp_width": 32, "prelude": 0, "recurrent": 1,
            "coda": 0, "recurrences": 2, "injection": "linear",
        },
        "steps": 2, "batch_size": 2,
    },
    "seeds": 1, "controls": [], "study": {"prompts": 1, "horizon": 8, "beyond": 1},
}  # fmt: skip
HUGE = int("1" + "0" * 400)


def sweeps() -> Iterator[Fault]:
    def given(name: str, change: Callable[[Any], Any] | str) -> Fault:
        def make(folder: Path) -> list[str]:
            content = change if isinstance(change, str) else json.dumps(change(json.loads(json.dumps(SWEEP))))
            (folder / "s.json").write_text(content)
            return [
                "experiment",
                "training",
                str(folder / "s.json"),
                "--out",
                str(folder / "out"),
                "--engine",
                "serial",
            ]

        return Fault("sweeps", name, make)

    yield given("as it is", lambda s: s)
    yield given("deep", DEEP)
    yield given("deep objects", '{"a":' * 100_000)
    places: list[tuple[str, Any]] = [
        *(("base.architecture", value) for value in ([], 0, 1.5, "x", None)),
        *(("base.evaluation", value) for value in ([{}], "</script>", "x", 1)),
        *(("base.architecture.recurrences", value) for value in (1000, 10**6, HUGE)),
        *(("study.horizon", value) for value in (10**6, 10**9, HUGE)),
        *(("base.architecture.width", value) for value in (10**6, HUGE)),
        *(("seeds", value) for value in (10**6, 10**9, HUGE)),
        *(("task.documents", value) for value in (2 * 10**9, HUGE)),
        *(("task.test_documents", value) for value in (10**6, HUGE)),
        *(("base.steps", value) for value in (10**9, HUGE)),
        *(("base.batch_size", value) for value in (10**5, 10**9)),
        *(("base.architecture.recurrent", value) for value in (10**4, 10**9)),
        *(("study.beyond", value) for value in (10**6, 10**9)),
        *(("study.prompts", value) for value in (10**6, 10**9)),
        ("recipes", {"\ud800": {}}),
        ("grids", [{"base": [{}]}]),
        ("grids", [{".".join(["a"] * 2000): [1]}]),
        ("grids", [{f"optimizer.a{n}": list(range(10)) for n in range(6)}]),
        ("grids", [{"architecture": [[], 1]}]),
    ]
    for place, value in places:
        shown = repr(value) if len(repr(value)) < 30 else repr(value)[:20] + "..."
        yield given(f"{place}={shown}", lambda s, place=place, value=value: nested(s, place, value))  # type: ignore[misc]

    for damaged in ("grid.json", "cells/a.json"):
        for command in ("again", "report"):
            for what, content in (("deep", DEEP), ("null", "null"), ("list", "[]"), ("garbage", "\xff")):

                def make(
                    folder: Path, damaged: str = damaged, command: str = command, content: str = content
                ) -> list[str]:
                    out = folder / "out"
                    (out / "cells").mkdir(parents=True)
                    (out / "grid.json").write_text('{"kind": "training", "finished": true, "cells": ["a"]}')
                    (out / "cells" / "a.json").write_text("{}")
                    (out / damaged).write_text(content, encoding="latin-1")
                    (folder / "s.json").write_text(json.dumps(SWEEP))
                    if command == "again":
                        return [
                            "experiment",
                            "training",
                            str(folder / "s.json"),
                            "--out",
                            str(out),
                            "--engine",
                            "serial",
                        ]
                    return ["experiment", "report", str(out), "--out", str(folder / "r.html")]

                yield Fault("sweeps", f"{command}, {damaged} {what}", make)


def training() -> Iterator[Fault]:
    def config(folder: Path, **changes: Any) -> list[str]:
        architecture = SWEEP["base"]["architecture"] | {"vocab_size": 300}
        content = {
            "architecture": architecture, "data": {"train": "t.txt", "test": "t.txt"}, "steps": 4, "batch_size": 2,
            "context": 8, "log_every": 1, "checkpoint_every": 2, "evaluation": {"recurrences": [1], "every": 2},
        }  # fmt: skip
        (folder / "t.txt").write_text("one two three four five six seven eight\n\n" * 20)
        (folder / "t.jsonl").write_text('{"text": "one two three four five six"}\n' * 20)
        (folder / "c.json").write_text(json.dumps(content | changes))
        return ["train", str(folder / "c.json"), "--out", str(folder / "out")]

    def given(name: str, change: Callable[[Path], list[str]]) -> Fault:
        return Fault("training", name, change)

    for value in (1000, 10**6, HUGE):
        yield given(f"context {str(value)[:9]}", lambda folder, value=value: config(folder, context=value))  # type: ignore[misc]
    jsonl = {"train": "t.jsonl", "test": "t.jsonl"}
    for template in ("{text:>1000000000}", "{text!r}", "{text.__class__}"):
        yield given(template, lambda folder, t=template: config(folder, data=jsonl | {"template": t}))  # type: ignore[misc]
    yield given("threads", lambda folder: [*config(folder), "--threads", "2147483648"])
    yield given("steps", lambda folder: config(folder, steps=10**12))

    def deep(folder: Path) -> list[str]:
        arguments = config(folder)
        (folder / "c.json").write_text(DEEP)
        return arguments

    yield given("deep", deep)

    def deep_text(folder: Path) -> list[str]:
        arguments = config(folder, data=jsonl)
        (folder / "t.jsonl").write_text(DEEP)
        return arguments

    yield given("deep text", deep_text)
    for file in ("train.json", "log.jsonl", "results.json"):
        for what, content in (("deep", DEEP), ("null", "null\n"), ("list", "[]\n"), ("garbage", "\xff\xff\n")):

            def resumed(folder: Path, file: str = file, content: str = content) -> list[str]:
                arguments = config(folder)
                with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                    loopscope.cli.main(arguments)
                (folder / "out" / "results.json").unlink()
                (folder / "out" / file).write_text(content, encoding="latin-1")
                return arguments

            yield given(f"resumed over {file}, {what}", resumed)


def studies(whole: Path) -> Iterator[Fault]:
    def given(name: str, change: Callable[[Path], object], *, old: bool = False) -> Iterator[Fault]:
        """`old` studies have no checksums, so that what is changed has to be noticed by what it says."""

        def copied(folder: Path) -> Path:
            shutil.copytree(whole, folder / "study")
            if old:
                edited(
                    folder / "study" / "manifest.json",
                    lambda m: {k: v for k, v in m.items() if k not in ("files", "checksum")},
                )
            change(folder / "study")
            return folder / "study"

        kind = "old studies" if old else "studies"
        yield Fault(kind, f"report {name}", lambda folder: ["report", str(copied(folder))])
        yield Fault(kind, f"rates {name}", lambda folder: ["rates", str(copied(folder))])
        yield Fault(
            kind,
            f"compare {name}",
            lambda folder: ["compare", str(copied(folder)), str(whole), "--out", str(folder / "c")],
        )
        yield Fault(
            kind, f"resume {name}", lambda folder: [*analyze("demo:injected", folder), "--out", str(copied(folder))]
        )

    def manifest(change: Callable[[Any], Any]) -> Callable[[Path], object]:
        return lambda study: edited(study / "manifest.json", change)

    def without(name: str) -> Callable[[Any], Any]:
        def change(content: Any) -> Any:
            *above, last = name.split(".")
            inner = content
            for each in above:
                inner = inner[each]
            del inner[last]
            return content

        return change

    def tokens(change: Callable[[list[Any]], Any]) -> Callable[[Path], object]:
        def edit(study: Path) -> None:
            path = study / "tokens.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))

        return edit

    def flipped(study: Path, place: float) -> None:
        content = bytearray((study / "study.nc").read_bytes())
        content[int(place * len(content))] ^= 0xFF
        (study / "study.nc").write_bytes(content)

    changes: dict[str, Callable[[Path], object]] = {
        "status alone": manifest(lambda m: {"status": "complete"}),
        "deep manifest": lambda study: (study / "manifest.json").write_text(DEEP),
        "no model": manifest(without("model")),
        "no tokenizer.bos": manifest(without("tokenizer.bos")),
        "model true": manifest(lambda m: m | {"model": True}),
        "settings null": manifest(lambda m: m | {"settings": None}),
        "no tokens": tokens(lambda lines: []),
        "three prompts": tokens(lambda lines: [*lines, *lines]),
        "tokens that are lists": tokens(lambda lines: [[] for _ in lines]),
        "tokens that are null": tokens(lambda lines: [None for _ in lines]),
        "deep tokens": lambda study: (study / "tokens.jsonl").write_text(DEEP),
        "no ids": tokens(lambda lines: [line | {"token_ids": None} for line in lines]),
        "strings 5": tokens(lambda lines: [line | {"token_strings": 5} for line in lines]),
        "system tokens": tokens(lambda lines: [line | {"system_tokens": [1]} for line in lines]),
        **{f"flip at {place}": (lambda study, place=place: flipped(study, place)) for place in (0.05, 0.3, 0.6, 0.95)},  # type: ignore[misc]
        "arrays cut": lambda study: (study / "study.nc").write_bytes((study / "study.nc").read_bytes()[:5000]),
    }
    for name, change in changes.items():
        yield from given(name, change)
        yield from given(name, change, old=True)
