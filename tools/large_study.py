"""Large studies: one of 5,000 prompts is opened, reported and compared; one of 100 layers and 128 recurrences is drawn.

    python tools/large_study.py [prompts] [layers]

The studies are those of the tests, made as large by repeating them. Each step is a process of its own, whose peak of
memory is printed. Ends with 1 if a peak is above 2 GiB, or the page of the deep one above 20 MB.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import synthetic_study
from loopscope.report.page.write import write_report
from loopscope.study import Study
from synthetic_study import contracting, looped_study, with_behaviour

PROMPTS, TOKENS, LAYERS, RECURRENCES = 5000, 40, 100, 128
PEAK, PAGE = 2 * 2**30, 20 * 10**6
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


def deep_page(path: Path) -> int:
    """Bytes of the report of 100 layers and 128 recurrences, which is drawn where there is a Chromium."""
    synthetic_study.LAYERS = LAYERS
    deep = with_behaviour(
        looped_study(contracting(), prompts=2, tokens=8, recurrences=RECURRENCES, horizon=RECURRENCES)
    )
    size = write_report(deep, path).stat().st_size
    print(f"{LAYERS} layers, {RECURRENCES} recurrences: a page of {size / 10**6:.1f} MB", flush=True)
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is not None:
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page, started = chromium.new_page(), time.monotonic()
            page.goto(path.as_uri())
            page.wait_for_selector("html[data-figures=drawn]", state="attached", timeout=600_000)
            count, failed = page.locator("[data-plot]").count(), page.get_by_text("could not be drawn").count()
            print(f"{count} figures drawn in {time.monotonic() - started:.0f} s, {failed} not", flush=True)
            chromium.close()
            assert not failed
    return size


def main(asked: list[str]) -> int:
    right = True
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if not asked or "layers" in asked:
            right &= deep_page(folder / "deep.html") <= PAGE
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
