"""Large studies: one of 5,000 prompts is opened, reported and compared; one of 100 layers and 128 recurrences is drawn.

    python tools/large_study.py [prompts] [layers]

The studies are those of the tests, made as large by repeating them. Each step is a process of its own, whose peak of
memory is printed. Ends with 1 if a peak is above 2 GiB, or the page of the deep one above 20 MB.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from synthetic_study import contracting, looped_study, with_behaviour

from loopscope.study import Study

PROMPTS, TOKENS, PEAK, PAGE = 5000, 40, 2 * 2**30, 20 * 10**6
STEP = """
import resource, sys
{work}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(f"{name:8s} {{peak / 2**20:6.0f}} MB at most", flush=True)
sys.exit(peak > {most})
"""
WORK = {
    "open": "import loopscope; loopscope.Study.load({one!r})",
    "report": "import loopscope.cli; loopscope.cli.main(['report', {one!r}])",
    "compare": "import loopscope.cli; loopscope.cli.main(['compare', {one!r}, {other!r}, '--out', {out!r}])",
    "figures": "import loopscope.cli; loopscope.cli.main(['figures', {one!r}, '--out', {out!r}])",
}


def many_prompts(folder: Path, seed: int) -> None:
    """A study of prompts whose numbers repeat after 50."""
    few = with_behaviour(looped_study(contracting(), prompts=50, tokens=TOKENS, recurrences=32, seed=seed))
    times = PROMPTS // 50
    tokens = [{**entry, "id": str(number)} for number, entry in enumerate(list(few.tokens) * times)]
    Study(few.dataset.isel(prompt=np.tile(np.arange(50), times)), few.manifest, tokens).save(folder)


def step(name: str, **paths: Path) -> bool:
    """Whether it stays below the limit."""
    values = {key: str(path) for key, path in paths.items()}
    started = time.monotonic()
    script = STEP.format(work=WORK[name].format(**values), name=name, most=PEAK)
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    print(f"{done.stdout.strip().splitlines()[-1]}, {time.monotonic() - started:.0f} s", flush=True)
    if done.returncode not in (0, 1):
        print(done.stderr[-2000:])
    return done.returncode == 0


def main(asked: list[str]) -> int:
    right = True
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if not asked or "prompts" in asked:
            for number, name in enumerate(("one", "other")):
                many_prompts(folder / name, number)
            size = Study.load(folder / "one").dataset.nbytes
            print(f"{PROMPTS:,} prompts of {TOKENS} tokens: {size / 2**20:,.0f} MB of arrays")
            for name in WORK:
                right &= step(name, one=folder / "one", other=folder / "other", out=folder / name)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
