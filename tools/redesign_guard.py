"""Guard of the redesign, gone when it is done: what the commands write, before and after a change.

`redesign_guard.py make DIR` writes studies, reports, figures, comparisons, verdicts and experiments of the demo models
and the reference checkpoints into DIR; `redesign_guard.py compare BEFORE AFTER` says what differs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xarray
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("LOOPSCOPE_SHARED", ROOT.parent / "shared"))
TEXTS = (
    "Ann has 3 apples and buys 4 more. How many has she?",
    "A train goes 60 miles in an hour. How far does it go in a half?",
    "Tom reads 12 pages a day.",
)

_RUN = """
import sys
from loopscope.cli import main
sys.argv[0] = "loopscope"
sys.exit(main())
"""


def loopscope(*arguments: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        print("FAILED", *arguments, done.stdout[-500:], done.stderr[-3000:], sep="\n")
        raise SystemExit(1)


def subjects(out: Path) -> dict[str, list[object]]:
    """Arguments of `analyze` for each model."""
    common: list[object] = ["--recurrences", 16, "--horizon", 32, "--batch-size", 2, "--threads", 1]
    texts = ["--text", *TEXTS]
    found: dict[str, list[object]] = {
        f"demo-{name}": [f"demo:{name}", *texts, *common] for name in ("injected", "uninjected", "feedforward")
    }
    found["demo-keep"] = ["demo:injected", *texts, *common, "--horizon-method", "keep", "--map-prompts", 0, 2]
    found["demo-changed"] = [
        "demo:injected",
        *texts,
        *common,
        "--intervene",
        "damp=0.5",
        "--intervene",
        "mlp:prelude.0=0",
    ]
    found["demo-little"] = [
        "demo:injected",
        *texts,
        *common,
        "--skip",
        "heads",
        "readout",
        "stability",
        "path-independence",
    ]
    for folder in sorted((SHARED / "reference").iterdir()):
        if not folder.is_dir():
            continue
        ids = load_file(folder / "expected.safetensors")["input_ids"].tolist()
        prompts = out / f"{folder.name}.jsonl"
        rows = [row[: len(row) - place] for place, row in enumerate(ids)] + [ids[0][:3]]
        prompts.write_text("".join(json.dumps({"ids": row}) + "\n" for row in rows))
        found[folder.name] = [folder, "--prompts", prompts, "--field", "ids", *common]
    return found


def make(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    found = subjects(out)

    def analyse(name: str) -> None:
        loopscope("analyze", *found[name], "--out", out / name)

    def figures(name: str) -> None:
        loopscope("figures", out / name, "--out", out / "figures" / name, "--format", "svg")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(analyse, found))
        list(pool.map(figures, found))
        tracks = sorted((SHARED / "data" / "huginn-trajectories").glob("*n24*.npy"))
        jobs = [
            (
                "compare",
                *(out / f"demo-{name}" for name in ("injected", "uninjected", "feedforward")),
                "--out",
                out / "compared",
            ),
            (
                "experiment",
                "architectures",
                "--out",
                out / "architectures",
                "--depth",
                2,
                "--seeds",
                1,
                "--width",
                64,
                "--recurrences",
                32,
                "--engine",
                "serial",
            ),
            (
                "experiment",
                "report",
                ROOT / "results" / "recipes",
                ROOT / "results" / "architectures-trained",
                "--out",
                out / "experiments.html",
            ),
            ("behaviour", *tracks, "--dtype", "bfloat16", "--out", out / "verdicts"),
        ]
        list(pool.map(lambda job: loopscope(*job), jobs))
    loopscope(
        "figures",
        *(out / f"demo-{name}" for name in ("injected", "uninjected", "feedforward")),
        "--out",
        out / "figures" / "side-by-side",
        "--format",
        "svg",
    )
    loopscope("figures", out / "compared", "--out", out / "figures" / "compared", "--format", "svg")


def compare(before: Path, after: Path) -> bool:
    """Whether nothing that must stay has changed."""
    good = True

    def tell(*words: object) -> None:
        nonlocal good
        good = False
        print(*words)

    for old in sorted(before.rglob("*")):
        new, name = after / old.relative_to(before), str(old.relative_to(before))
        if not new.exists():
            tell("missing", name)
        elif old.suffix == ".nc":
            _datasets(name, old, new, tell)
        elif old.suffix == ".html":
            _pages(name, old, new, tell)
        elif old.name == "manifest.json":
            a, b = (json.loads(path.read_text()) for path in (old, new))
            for key in sorted(a.keys() | b.keys()):
                if key not in ("created", "seconds") and a.get(key) != b.get(key):
                    one, two = (
                        json.dumps(each.get(key)).replace(str(root), "") for each, root in ((a, before), (b, after))
                    )
                    if one != two:
                        tell("manifest", name, key)
        elif old.suffix in (".json", ".jsonl") and old.name not in ("figures.json",):
            one, two = (
                _without_times(path.read_text().replace(str(root), "")) for path, root in ((old, before), (new, after))
            )
            if one != two:
                tell("json", name)
    for new in sorted(after.rglob("*")):
        if not (before / new.relative_to(after)).exists():
            tell("new", new.relative_to(after))
    return good


def _without_times(text: str) -> str:
    return re.sub(r'"(created|seconds|version)": [^,}\n]*', "", text)


def _datasets(name: str, old: Path, new: Path, tell: Any) -> None:
    with xarray.open_dataset(old) as a, xarray.open_dataset(new) as b:
        for variable in sorted({*a.variables} ^ {*b.variables}, key=str):
            tell("variable", name, variable, "is new" if variable in b.variables else "is gone")
        for variable in a.variables:
            if variable not in b.variables:
                continue
            one, two = a[variable], b[variable]
            if one.dims != two.dims or one.dtype != two.dtype or one.shape != two.shape:
                tell("shape", name, variable, one.dims, two.dims, one.dtype, two.dtype, one.shape, two.shape)
            elif one.values.tobytes() != two.values.tobytes() and not (
                one.dtype == object and np.array_equal(one.values, two.values)
            ):
                tell("values", name, variable)


def _pages(name: str, old: Path, new: Path, tell: Any) -> None:
    ids = [set(re.findall(r'\bid="([^"]+)"', path.read_text())) for path in (old, new)]
    for anchor in sorted(ids[0] ^ ids[1]):
        tell("anchor", name, anchor, "is new" if anchor in ids[1] else "is gone")


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]).resolve())
    else:
        sys.exit(not compare(Path(sys.argv[2]).resolve(), Path(sys.argv[3]).resolve()))
