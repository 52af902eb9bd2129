"""The same for trajectories, sweeps, training runs and studies, most of them folders that something has damaged."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray

import loopscope.cli
import loopscope.experiments.run_sweep
import loopscope.report.page.write
from fault_inputs import DEEP, NINES, Fault, analyze, edited, nested


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
    method = b"PK\x01\x02\x14\x03\x14\x00\x00\x00"
    yield given(
        "npz checksum", "a.npz", lambda path: archive(path, whole, lambda c: c.replace(states[200:210], b"x" * 10))
    )
    yield given("npz cut", "a.npz", lambda path: archive(path, whole, lambda c: c[: len(c) // 2]))
    yield given(
        "npz encrypted", "a.npz",
        lambda path: archive(path, whole, lambda c: c.replace(method[:-1] + b"\0", method[:-2] + b"\1\0")),
    )  # fmt: skip
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
ARRAYS = {
    "no": ("relative_distance_second_horizon_quantile", "verdict_rate", "horizon_drift", "layer_cosine", "token_count"),
    "nothing along": ("layer", "recurrence", "prompt", "depth", "quantile", "token", "horizon", "judged_layer", "site"),
    "words for": ("horizon_relative_step", "horizon_drift", "verdict_level"),
}
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
    no_object: list[Any] = [[], [{}], 0, 1.5, "x", "</script>"]
    places: list[tuple[str, Any]] = [
        *(("base.architecture", value) for value in no_object),
        *(("base.evaluation", value) for value in no_object),
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

    def rewritten(study: Path, what: str, name: str) -> None:
        with xarray.open_dataset(study / "study.nc") as opened:
            data = opened.load().drop_encoding()
        if what == "no":
            data = data.drop_vars(name)
        elif what == "nothing along":
            data = data.isel({name: slice(0)})
        else:
            data[name] = data[name].dims, np.full(data[name].shape, "x")
        data.to_netcdf(study / "study.nc")

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
        **{
            f"arrays with {what} {name}": partial(rewritten, what=what, name=name)
            for what, name_list in ARRAYS.items()
            for name in name_list
        },
        "arrays cut": lambda study: (study / "study.nc").write_bytes((study / "study.nc").read_bytes()[:5000]),
    }
    for name, change in changes.items():
        yield from given(name, change)
        yield from given(name, change, old=True)
