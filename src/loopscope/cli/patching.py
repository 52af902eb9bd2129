"""The command that puts states of one prompt's run into another's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from loopscope._util.ranges import Count, Range, Seed, check_ranges
from loopscope.cli.parsing import options


@dataclass(frozen=True, kw_only=True)
class PatchStates:
    """Find where an answer is made: copy states of a clean prompt's run into a corrupted prompt's run, one by one.

    Writes a grid of recoveries to --out: patching.nc, patching.json and report.html; `loopscope figures` draws it too.
    """

    model: tyro.conf.Positional[str]
    """A shipped model such as demo:injected, a checkpoint folder, or a model of the Hugging Face hub such as
    organisation/model."""
    pairs: Path
    """JSONL: clean and corrupted (prompts of equal length), answer and, in all or none, wrong (one token each)."""
    out: Path
    """Folder for the results."""
    recurrences: Count | None = None
    """How often the loop runs; default: the trained number."""
    parts: tuple[Literal["residual", "attention", "mlp", "head"], ...] = ("residual",)
    """What is copied: a layer's output, what its attention or MLP adds, or the output of one head."""
    visits: tuple[str, ...] = ("*",)
    """Patterns for the labels of visits, such as 'recurrent.2@*' or 'prelude.*'."""
    positions: Literal["each", "all"] = "each"
    """One token at a time, or all of them at once."""
    batch_size: Annotated[int, Range(1, 10**4)] = 32
    """Cells to run at once."""
    seed: Seed = 0
    """Seed of random initial states."""
    intervene: tuple[str, ...] = ()
    """Change the model in both runs, as in analyze. Repeat for several."""
    dtype: str = "float32"
    """float32, float64, bfloat16, float16, stored or auto."""
    device: str = "auto"
    """A torch device."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hugging Face hub."""

    def __post_init__(self) -> None:
        check_ranges(self, "--")

    def run(self) -> None:
        from loopscope._util.files import check_no_other
        from loopscope.analysis.patching import patch
        from loopscope.answers.patching import PATCHING_FILE
        from loopscope.cli.console import say, say_path
        from loopscope.models.loading import load
        from loopscope.report.page.write import write_patching

        check_no_other(self.out, PATCHING_FILE)  # before the work, and not only when it is to be saved
        model = load(self.model, revision=self.revision, dtype=self.dtype, device=self.device)
        others = ("model", "pairs", "out", "dtype", "device", "revision")
        found = patch(model, self.pairs, **options(self, *others)).save(self.out)
        report = write_patching(found, self.out / "report.html")
        for sentence in found.sentences():
            say(sentence)
        say_path("report", report)
