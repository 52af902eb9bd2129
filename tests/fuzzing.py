"""Inputs of every kind, damaged at random, and what must hold for all of them.

    python tests/fuzzing.py [EXAMPLES]

tries that many, by default 5,000, evenly over the kinds, and prints the counts by kind and the first failures.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import resource
import shutil
import string
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase, given, settings

import loopscope
from loopscope import Study
from loopscope.analysis.job import Job, SilentProgress
from loopscope.analysis.settings import AnalyzeSettings
from loopscope.answers.calibration import CalibratedRule
from loopscope.answers.comparison.result import Comparison
from loopscope.dynamics.trajectories.files import judge_files
from loopscope.errors import LoopscopeError, UnforeseenError
from loopscope.evaluation.result import Evaluation
from loopscope.experiments.load import load_experiment
from loopscope.experiments.sweep import Sweep
from loopscope.experiments.training.config import TrainConfig
from loopscope.experiments.training.data import read_documents
from loopscope.experiments.training.run_folder import RunFolder
from loopscope.models.checkpoints.placement import place_layers
from loopscope.models.interventions.parsing import check_fits, check_recurrences, check_tokens, parse_interventions
from loopscope.prompts import sandbox
from loopscope.prompts.chat import ChatTemplate
from loopscope.prompts.load import load_prompts
from loopscope.prompts.tokenizer import load_tokenizer
from loopscope.prompts.tokens import encode_prompts
from loopscope.report.figures.accuracy import accuracy_plots
from loopscope.study import view_study
from whole_inputs import whole_inputs

SECONDS, MEMORY, LONGEST = 20.0, 2**30, 600
"""Of processor time for an input, bytes that the process may grow by, and characters of a sentence."""


class Kind(NamedTuple):
    """Inputs of one kind."""

    name: str
    damage: st.SearchStrategy[Any]
    prepare: Callable[[Path, Any], Callable[[], object]]
    """Writes the damaged input into a copy of the folder of whole ones, and gives what reads it."""


class BrokenPromiseError(AssertionError):
    """What an input did that none may do."""


def check(prepare: Callable[[Path, Any], Callable[[], object]], damage: Any) -> bool:
    """Success (True), or one sentence (False); within limits, and with nothing changed that was there.

    Raises `BrokenPromiseError`.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "whole"
        shutil.copytree(whole_inputs(), folder)
        read = prepare(folder, damage)
        before = _contents(folder)
        started, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                read()
            said = None
        except UnforeseenError as error:
            raise BrokenPromiseError(f"not foreseen: {type(error.__cause__).__name__}: {error}") from error
        except LoopscopeError as error:
            said = str(error)
        except BaseException as error:
            raise BrokenPromiseError(f"{type(error).__name__}: {error}") from error
        taken = time.process_time() - started
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
        after = _contents(folder)
    if taken > SECONDS:
        raise BrokenPromiseError(f"it took {taken:.0f} s")
    if grown > MEMORY:
        raise BrokenPromiseError(f"it took {grown:,} bytes")
    if any(after.get(path) != content for path, content in before.items()):
        raise BrokenPromiseError("it changed what was there")
    if said is not None and (not said.strip() or len(said) > LONGEST or "\n" in said.strip() or "Traceback" in said):
        raise BrokenPromiseError(f"no sentence: {said[:300]!r} ({len(said)} characters)")
    return said is None


def _contents(folder: Path) -> dict[Path, tuple[int, int]]:
    found = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return {path: (status.st_size, status.st_mtime_ns) for path, status in found}


# Damage

NUMBERS = st.sampled_from(
    [-1, 0, 1, 2, 7, 1000, 10**6, 10**9, 2**31, 2**63, 10**30, 10**400, -(10**400), 0.5, -0.5, 1e300]
)
SPECIAL = st.sampled_from([float("nan"), float("inf"), -float("inf")])
TEXTS = st.sampled_from(
    [
        "",
        " ",
        "x",
        "\ud800",
        "a\0b",
        "x" * 5000,
        "</script>",
        "../../etc/passwd",
        "🙂",
        "(a+)+$",
        "\\g<1>",
        "{text:>1000000000}",
    ]
) | st.text(max_size=8)
DEEP = json.loads("[" * 90 + "]" * 90)
VALUES = (
    st.none() | st.booleans() | NUMBERS | SPECIAL | TEXTS
    | st.sampled_from([[], {}, [[]], {"a": {}}, DEEP, [1] * 300, ["x"] * 3, [{}], {"kind": "x"}, {"Regex": "(x+x+)+y"}])
)  # fmt: skip
EDITS = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["set", "set", "delete", "rename", "twice"]), VALUES),
    min_size=1, max_size=3,
)  # fmt: skip
BYTES = st.lists(
    st.tuples(
        st.sampled_from(["cut", "flip", "insert", "zero"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)
    ),
    min_size=1, max_size=3,
)  # fmt: skip
JSON_DAMAGE = st.tuples(EDITS, st.none() | st.none() | st.none() | BYTES)


def edited(content: Any, edits: Sequence[tuple[int, str, Any]]) -> Any:
    """A JSON value with some of its entries, at whatever depth, set to something else."""
    content = json.loads(json.dumps(content))
    for number, action, given_value in edits:
        value = json.loads(json.dumps(given_value))  # else two places would share it, or hold each other
        places = list(_places(content))
        if not places:
            return value
        inner, name = places[number % len(places)]
        if action == "set":
            inner[name] = value
        elif action == "twice" and isinstance(inner, list):
            inner.append(inner[name])
        elif action == "rename" and isinstance(inner, dict):
            inner[str(value)[:300]] = inner.pop(name)
        else:
            del inner[name]
    return content


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    names = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for name in list(names)[:200]:
        yield content, name
        yield from _places(content[name])


def broken(content: bytes, damage: Sequence[tuple[str, float, bytes]] | None) -> bytes:
    """Bytes with some of them cut off, turned, or put in."""
    for action, where, what in damage or ():
        place = int(where * len(content))
        if action == "cut":
            content = content[:place]
        elif action == "insert":
            content = content[:place] + what + content[place:]
        elif action == "zero":
            content = content[:place] + bytes(len(what)) + content[place + len(what) :]
        elif content:
            place = min(place, len(content) - 1)
            content = content[:place] + bytes([content[place] ^ (what[0] or 1)]) + content[place + 1 :]
    return content


def damage_json(path: Path, damage: tuple[Any, Any]) -> None:
    edits, raw = damage
    content = edited(json.loads(path.read_text(encoding="utf-8")), edits)
    path.write_bytes(broken(json.dumps(content).encode(), raw))


def in_json(name: str, read: Callable[[Path], object]) -> Callable[[Path, Any], Callable[[], object]]:
    def prepare(folder: Path, damage: Any) -> Callable[[], object]:
        damage_json(folder / name, damage)
        return lambda: read(folder)

    return prepare


def in_bytes(name: str, read: Callable[[Path], object]) -> Callable[[Path, Any], Callable[[], object]]:
    def prepare(folder: Path, damage: Any) -> Callable[[], object]:
        (folder / name).write_bytes(broken((folder / name).read_bytes(), damage))
        return lambda: read(folder)

    return prepare


# What reads them


def read_model(folder: Path) -> None:
    loopscope.inspect_model(folder / "model")
    loopscope.load(folder / "model", device="cpu")


def read_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "model")
    encode_prompts(load_prompts(text=["aaaa bbbb! 42 🙂", "x" * 40]), tokenizer, vocab_size=10**9)


def read_study(folder: Path) -> None:
    view_study(Study.load(folder / "study"))


def in_study(name: str, *, old: bool, raw: bool) -> Callable[[Path, Any], Callable[[], object]]:
    """`old` ones have no checksums, so that damage has to be told from what the files say."""

    def prepare(folder: Path, damage: Any) -> Callable[[], object]:
        manifest = folder / "study" / "manifest.json"
        if old:
            content = json.loads(manifest.read_text(encoding="utf-8"))
            manifest.write_text(json.dumps({key: content[key] for key in content if key not in ("files", "checksum")}))
        damaged = in_bytes if raw else in_json
        return damaged(f"study/{name}", read_study)(folder, damage)

    return prepare


def prepare_prompts(folder: Path, damage: Any) -> Callable[[], object]:
    edits, raw, field = damage
    path = folder / "prompts.jsonl"
    lines = [edited(json.loads(line), edits) for line in path.read_text().splitlines()]
    path.write_bytes(broken("".join(json.dumps(line) + "\n" for line in lines).encode(), raw))

    def read() -> None:
        prompts = load_prompts(prompts=str(path), **({"field": field} if field else {"whole_file": True}))
        encode_prompts(prompts, load_tokenizer(folder / "model"), vocab_size=300)

    return read


def prepare_template(folder: Path, source: str) -> Callable[[], object]:
    return lambda: ChatTemplate(source, {"bos_token": "<s>"}).render("hello there")


def prepare_settings(folder: Path, changes: dict[str, Any]) -> Callable[[], object]:
    """Everything that is decided before an analysis starts."""

    def read() -> None:
        chosen = AnalyzeSettings(**changes)
        subject = small_subject()
        check_fits(chosen.interventions, subject.model.architecture, "it")
        check_recurrences(chosen.interventions, chosen.recurrences)
        prompts = load_prompts(text=["one two", "three"], limit=chosen.limit, sample_seed=chosen.sample_seed)
        tokens = encode_prompts(prompts, subject.tokenizer, vocab_size=256, truncate=chosen.truncate)
        check_tokens(chosen.interventions, [len(prompt.token_ids) for prompt in tokens])
        Job(subject, tokens, chosen, SilentProgress())

    return read


@functools.cache
def small_subject() -> Any:
    return loopscope.load(whole_inputs() / "model", device="cpu")


def prepare_interventions(folder: Path, texts: list[str]) -> Callable[[], object]:
    def read() -> None:
        found = parse_interventions(texts)
        check_fits(found, small_subject().model.architecture, "it")
        check_recurrences(found, 8)
        check_tokens(found, [3, 5])

    return read


def prepare_device_map(folder: Path, entries: list[str]) -> Callable[[], object]:
    text = ",".join(entries) or "auto"
    return lambda: place_layers(small_subject().model.architecture, torch.float32, torch.device("cpu"), text)


def prepare_states(folder: Path, damage: Any) -> Callable[[], object]:
    name, raw, member = damage
    path = folder / name
    if member is not None and path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            members = {each: archive.read(each) for each in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive, contextlib.suppress(UserWarning):
            for each, content in members.items():
                archive.writestr(each, broken(content, member))
    else:
        path.write_bytes(broken(path.read_bytes(), raw))
    return lambda: judge_files([path], "float32", check_order=False)


def read_sweep(folder: Path) -> None:
    Sweep.load(folder / "sweep.json").cells()


def read_evaluation(folder: Path) -> None:
    found = Evaluation.load(folder / "evaluation")
    found.tables()
    found.sentences()
    accuracy_plots(found)


def read_rule(folder: Path) -> None:
    found = CalibratedRule.load(folder / "rule.json")
    found.rule.check_can_fire(found.recurrences)
    own: dict[str, Any] = {"name": "a", "revision": None, "dtype": "float32", "interventions": []}
    found.check_fits({"weights_sha256": found.model.get("weights_sha256"), **own}, None)


def read_training(folder: Path) -> None:
    config = TrainConfig.load(folder / "train.json")
    read_documents(folder / "prompts.jsonl", config.data.template)


def prepare_log(folder: Path, damage: Any) -> Callable[[], object]:
    edits, raw = damage
    path = folder / "run" / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = edited(lines, edits)
    text = "".join(json.dumps(line) + "\n" for line in (lines if isinstance(lines, list) else [lines]))
    path.write_bytes(broken(text.encode(), raw))
    return lambda: RunFolder(folder / "run").entries("step")


FRAGMENTS = st.sampled_from(
    [
        "{{ messages[0].content }}", "{{ messages[-1]['content'] }}", "{{ bos_token }}", "{{ 'x' * 10000000000 }}",
        "{% for m in messages %}{{ m.content }}{% endfor %}", "{% for a in range(99999999) %}", "{% endfor %}",
        "{{ messages | tojson(indent=9999999999) }}", "{{ messages[0].content.center(9999999999) }}", "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}", "{% if x %}", "{% endif %}", "{{ 9 ** 9 ** 9 }}",
        "{{ strftime_now('%d') }}", "{% set x = x ~ x %}", "{{ '%9999999999d' % 1 }}", "{{ x.y.z }}", "{{ lipsum(9) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ namespace(a=1).a }}", "{{", "{%", "{{ \ud800 }}",
        "{{ cycler.__init__.__globals__ }}", "{% include 'x' %}", "{{ messages | map('upper') | list }}",
    ]
)  # fmt: skip
DIGITS = st.sampled_from(["0", "1", "-1", "7", "9" * 12, "9" * 5000, "1e400", "nan", "*", "x", "²", "٣"])
FORMS = st.sampled_from(
    [
        "mlp:recurrent.{}=0", "mlp:recurrent.{}@{}-{}={}", "attention:prelude.{}={}", "inject@{}=frozen", "damp={}",
        "start=seed:{}", "start=scale:{}", "start=zeros", "token:{}@{}=noise", "token:{}@{}=token:{}", "{}", "mlp:{}",
    ]
)  # fmt: skip
INTERVENTIONS = st.lists(
    st.builds(lambda form, digits: form.format(*digits), FORMS, st.lists(DIGITS, min_size=4, max_size=4)), max_size=3
)
DEVICE_MAPS = st.lists(
    st.tuples(
        st.sampled_from(["prelude", "recurrent", "coda", "", "auto", "model.layers"]),
        st.sampled_from(["", ".{}", ".{}-{}", "-{}"]),
        st.lists(DIGITS, min_size=3, max_size=3),
        st.sampled_from(["=cpu", "=disk", "=cuda:{}", "=meta", "=", "", "==cpu", "=cpu:{}"]),
    ).map(lambda parts: (parts[0] + parts[1] + parts[3]).format(*parts[2])),
    max_size=4,
)
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    name: NUMBERS.filter(lambda value: isinstance(value, int))
    for name in (
        "recurrences", "horizon", "seed", "sample_seed", "limit", "truncate", "threads", "components", "other_starts",
        "cycle_recurrences", "exit_recurrences", "eigenvalue_products", "eigenvalue_every", "eigenvalue_search",
        "support_every", "map_tokens", "map_limit", "memory_limit", "keep_limit", "batch_size", "chunk",
    )
}  # fmt: skip
OPTIONS |= dict.fromkeys(("head_stable", "neuron_limit"), NUMBERS | SPECIAL)
OPTIONS |= {
    name: st.lists(OPTIONS["seed"], max_size=3).map(tuple) for name in ("readout", "map_prompts", "map_recurrences")
}
OPTIONS |= {"track": st.lists(st.text(string.digits + ":-x", max_size=9) | TEXTS, max_size=2).map(tuple)}
OPTIONS |= {"intervene": INTERVENTIONS.map(tuple)}
SETTINGS = st.lists(
    st.sampled_from(sorted(OPTIONS)).flatmap(lambda name: st.tuples(st.just(name), OPTIONS[name])),
    min_size=1,
    max_size=3,
).map(dict)

KINDS = (
    Kind("configurations", JSON_DAMAGE, in_json("model/config.json", read_model)),
    Kind("weights", BYTES, in_bytes("model/model.safetensors", read_model)),
    Kind("tokenizers", JSON_DAMAGE, in_json("model/tokenizer.json", read_tokens)),
    Kind("tokenizer settings", JSON_DAMAGE, in_json("model/tokenizer_config.json", read_tokens)),
    Kind("chat templates", st.lists(FRAGMENTS, min_size=1, max_size=5).map("".join), prepare_template),
    Kind("prompts", st.tuples(EDITS, st.none() | BYTES, st.sampled_from(["q", "ids", None])), prepare_prompts),
    Kind("options", SETTINGS, prepare_settings),
    Kind("interventions", INTERVENTIONS, prepare_interventions),
    Kind("device maps", DEVICE_MAPS, prepare_device_map),
    Kind(
        "trajectories",
        st.tuples(st.sampled_from(["states.npy", "states.npz", "small.npz"]), BYTES, st.none() | BYTES),
        prepare_states,
    ),
    Kind("manifests", JSON_DAMAGE, in_study("manifest.json", old=False, raw=False)),
    Kind("manifests, no checksums", JSON_DAMAGE, in_study("manifest.json", old=True, raw=False)),
    Kind("tokens, no checksums", JSON_DAMAGE, in_study("tokens.jsonl", old=True, raw=False)),
    Kind("arrays", BYTES, in_study("study.nc", old=False, raw=True)),
    Kind("arrays, no checksums", BYTES, in_study("study.nc", old=True, raw=True)),
    Kind(
        "comparisons",
        JSON_DAMAGE,
        in_json("comparison/comparison.json", lambda folder: Comparison.load(folder / "comparison")),
    ),
    Kind("sweeps", JSON_DAMAGE, in_json("sweep.json", read_sweep)),
    Kind(
        "cells", JSON_DAMAGE, in_json("experiment/cells/a.json", lambda folder: load_experiment(folder / "experiment"))
    ),
    Kind("grids", JSON_DAMAGE, in_json("experiment/grid.json", lambda folder: load_experiment(folder / "experiment"))),
    Kind("evaluations", JSON_DAMAGE, in_json("evaluation/curve.json", read_evaluation)),
    Kind("exit rules", JSON_DAMAGE, in_json("rule.json", read_rule)),
    Kind("training", JSON_DAMAGE, in_json("train.json", read_training)),
    Kind("training logs", JSON_DAMAGE, prepare_log),
)


def campaign(kind: Kind, examples: int) -> tuple[Counter[str], list[str]]:
    """How many were read, refused and wrong; and what was wrong."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=False, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(kind.damage)
    def attempt(damage: Any) -> None:
        try:
            counts["read" if check(kind.prepare, damage) else "refused"] += 1
        except BrokenPromiseError as error:
            counts["wrong"] += 1
            wrong.append(f"{str(error)[:400]}\n    {repr(damage)[:300]}")

    attempt()
    return counts, wrong


def main(examples: int) -> int:
    os.environ["OMP_NUM_THREADS"] = "1"
    sandbox.SECONDS = 1.0
    total: Counter[str] = Counter()
    print(f"{'kind':26s} {'tried':>6s} {'read':>6s} {'refused':>8s} {'wrong':>6s}")
    for kind in KINDS:
        counts, wrong = campaign(kind, -(-examples // len(KINDS)))
        total += counts
        print(f"{kind.name:26s} {counts.total():6d} {counts['read']:6d} {counts['refused']:8d} {counts['wrong']:6d}")
        for each in wrong[:10]:
            print(f"  {each}")
        sys.stdout.flush()
    print(f"{'all':26s} {total.total():6d} {total['read']:6d} {total['refused']:8d} {total['wrong']:6d}")
    return 1 if total["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5000))
