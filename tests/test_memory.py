"""Memory is planned before an analysis runs, and one that runs out of it loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray

import loopscope
from loopscope import AnalyzeSettings, Study, analyze
from loopscope._util.estimate import Phase
from loopscope._util.shapes import States
from loopscope.analysis.job import Job, SilentProgress
from loopscope.analysis.memory import foresee
from loopscope.analysis.passes import planned_batch
from loopscope.analysis.settings import Part, parts_except
from loopscope.cli import main
from loopscope.errors import ConfigError, UnforeseenError, ran_out
from loopscope.measures.lengths import array_bytes
from loopscope.measures.registry import asked_for
from loopscope.models.inspection.facts import RunSize
from loopscope.models.native.interventions import Parts
from loopscope.models.native.subject import NativeRun, NativeSubject
from loopscope.models.subject import Batch
from loopscope.models.visits import Observer
from loopscope.prompts.prompt import TokenizedPrompt
from small_models import PROMPTS, architecture, subject

SKIP: tuple[Part, ...] = ("behaviour", "twin", "stability", "neurons", "stages", "readout", "noise-floor")
SETTINGS = AnalyzeSettings(recurrences=4, horizon=5, skip=SKIP, threads=1, track=())
FULL: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    lambda: MemoryError("Unable to allocate 9 GiB for an array"),
]


class Noting(SilentProgress):
    """Remembers what was said, and how many steps there were."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.announced, self.steps = 0, 0

    def start(self, phases: Sequence[Phase]) -> None:
        self.announced = sum(phase.steps - phase.done for phase in phases)

    def step(self, phase: str, count: int = 1) -> None:
        self.steps += count

    def note(self, message: str) -> None:
        self.said.append(message)


class Small(NativeSubject):
    """A model on a device that has no room for batches of more than some prompts, nor for prompts of some length, which
    shows some recurrences on."""

    most, longest, error = 2, 99, staticmethod(FULL[0])

    def start(
        self,
        batch: Batch,
        *,
        recurrences: int,
        seed: int = 0,
        initial_state: States | None = None,
        observers: Iterable[Observer] = (),
        parts: Parts | None = None,
        begun: int | None = None,
    ) -> NativeRun:
        run = super().start(
            batch, recurrences=recurrences, seed=seed, initial_state=initial_state, observers=observers, parts=parts,
            begun=begun,
        )  # fmt: skip
        if len(batch.mask) > self.most or int(batch.counts.max()) > self.longest:

            def fail(observers: Iterable[Observer] = ()) -> None:
                raise self.error()

            run.advance = fail  # type: ignore[method-assign]
        return run


def small(**limits: Any) -> Small:
    found = Small(subject(std=0.1, dtype=torch.float64).model, name="small")
    for name, limit in limits.items():
        setattr(found, name, limit)
    return found


def free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr("loopscope.analysis.memory.available_memory", lambda device: nbytes)


@pytest.mark.parametrize("error", FULL)
def test_a_lack_of_memory_is_known_as_one(error: Callable[[], Exception]) -> None:
    assert ran_out(error())


def test_a_batch_that_runs_out_is_halved_and_ends_with_the_same_numbers(tmp_path: Path) -> None:
    progress = Noting()
    whole = analyze(small(most=9), PROMPTS, settings=SETTINGS, batch_size=5)
    parts = analyze(
        small(error=FULL[1]), PROMPTS, out=tmp_path / "study", settings=SETTINGS, batch_size=5, progress=progress
    )
    xarray.testing.assert_allclose(parts.dataset, whole.dataset, rtol=1e-6, atol=1e-9)
    halved = [said for said in progress.said if said.startswith("Memory ran out on cpu over")]
    assert len(halved) == 2  # five prompts, then three of them
    assert progress.steps == progress.announced


def test_what_does_not_fit_alone_ends_in_a_sentence_and_what_was_written_stays(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    prompts = [[1, 2, 3], [4, 5, 6], [7] * 12]
    with pytest.raises(ConfigError, match=r"over prompt 2 alone, of 12 tokens \(CUDA out.*What was finished is"):
        analyze(small(longest=8), prompts, out=folder, settings=SETTINGS, batch_size=1)
    done = sorted(path.name for path in (folder / "shards").iterdir())
    assert done == ["00000.npz", "00001.npz"]
    progress = Noting()
    study = analyze(small(), prompts, out=folder, settings=SETTINGS, batch_size=1, progress=progress)
    assert any("2 of 3 shards are done" in said for said in progress.said)
    assert study.dataset.sizes["prompt"] == 3


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def other() -> Exception:
        return RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    with pytest.raises(UnforeseenError, match="must match") as caught:
        analyze(small(error=other), PROMPTS, settings=SETTINGS, batch_size=5)
    assert type(caught.value.__cause__) is RuntimeError


def test_a_folder_that_was_begun_with_much_memory_is_resumed_with_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = tmp_path / "study", subject(std=0.1, dtype=torch.float64)
    prompts = [*PROMPTS[:4], [7] * 12]
    with pytest.raises(ConfigError, match="alone"):
        analyze(small(most=9, longest=8), prompts, out=folder, settings=SETTINGS, batch_size=4)
    needed = _job(model, prompts[-1:], skip=SETTINGS.skip).needed
    free(monkeypatch, needed)
    progress = Noting()
    study = analyze(model, prompts, out=folder, settings=SETTINGS, progress=progress)
    assert any("1 of 2 shards" in said for said in progress.said)
    assert any(said.startswith("1 prompt at once") for said in progress.said)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["identity"]["settings"]["batch_size"] == manifest["settings"]["batch_size"] == 4
    whole = analyze(model, prompts, settings=SETTINGS, batch_size=4)
    xarray.testing.assert_allclose(study.dataset, whole.dataset, rtol=1e-6, atol=1e-9)


def _job(model: NativeSubject, prompts: list[list[int]], **changes: Any) -> Job:
    tokenized = [
        TokenizedPrompt(str(place), None, tuple(ids), tuple(map(str, ids)), 0) for place, ids in enumerate(prompts)
    ]
    fields: dict[str, Any] = {"recurrences": SETTINGS.recurrences, "horizon": SETTINGS.horizon, **changes}
    return Job(model, tokenized, AnalyzeSettings(**fields), SilentProgress())


@pytest.mark.parametrize(("room", "prompts"), [(100, 8), (8, 4), (1.1, 1)])
def test_auto_takes_what_half_of_the_free_memory_has_room_for(
    room: float, prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts = subject(), [[1] * 20] * 12
    free(monkeypatch, int(room * _job(model, texts[:1], batch_size=1, keep_limit=0).needed))
    chosen = _job(model, texts, keep_limit=0).settings.batch_size
    assert isinstance(chosen, int)
    assert prompts <= chosen <= 8
    assert (chosen == 8) == (prompts == 8)


@pytest.mark.parametrize(("width", "tokens", "prompts"), [(16, 100, 8), (512, 100, 4), (512, 1000, 1), (2048, 50, 8)])
def test_a_batch_on_a_cpu_is_no_larger_than_is_of_use(width: int, tokens: int, prompts: int) -> None:
    model = subject(architecture(width=width, heads=4, kv_heads=4, head_dim=width // 4))
    assert _job(model, [[1] * tokens] * 12, skip=SKIP).settings.batch_size == prompts


def test_what_cannot_fit_is_refused_before_it_starts_with_what_would_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts = subject(), [[1] * 40]
    needed = _job(model, texts, recurrences=6, horizon=8).needed
    free(monkeypatch, int(0.7 * needed))
    with pytest.raises(ConfigError) as refused:
        analyze(model, texts, out=tmp_path / "study", recurrences=6, horizon=8)
    said = str(refused.value)
    assert "A prompt of 40 tokens needs about" in said
    assert "it would fit with --" in said
    assert not (tmp_path / "study").exists()
    free(monkeypatch, 0)
    with pytest.raises(ConfigError, match=r"0 MB may be taken on cpu; take several of --") as refused:
        analyze(model, texts, recurrences=6, horizon=8)
    assert " 0 MB less" not in str(refused.value).replace("(", " ")
    free(monkeypatch, 10 * needed)
    with pytest.raises(ConfigError, match=r"0 MB may be taken on cpu; raise --memory-limit, or take several of --"):
        analyze(model, texts, recurrences=6, horizon=8, memory_limit=0)


def test_a_study_that_could_not_be_put_together_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = subject(), [[1] * 10] * 400
    free(monkeypatch, 2 * _job(model, prompts[:1]).needed)
    with pytest.raises(ConfigError, match=r"The arrays of 400 prompts take about .*--limit"):
        _job(model, prompts)


def test_a_limit_makes_parts_of_a_batch_and_no_other_study(tmp_path: Path) -> None:
    model, progress = subject(std=0.1, dtype=torch.float64), Noting()
    prompts = [[place] * 30 for place in range(5)]
    whole = analyze(model, prompts, out=tmp_path, settings=SETTINGS, batch_size=5)
    limited = analyze(model, prompts, settings=SETTINGS, batch_size=5, memory_limit=2, progress=progress)
    assert any("at once: 5 would take more than 2 MB (--memory-limit)" in said for said in progress.said)
    xarray.testing.assert_allclose(limited.dataset, whole.dataset, rtol=1e-6, atol=1e-9)
    again = Noting()
    analyze(model, prompts, out=tmp_path, settings=SETTINGS, memory_limit=2, progress=again)
    assert any("nothing to measure" in said for said in again.said)


def test_verdicts_of_some_tokens_at_a_time_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, only = subject(std=0.1), parts_except("behaviour")
    settings = AnalyzeSettings(recurrences=16, horizon=16, skip=only, judged_layers="last", threads=1)
    whole = analyze(model, PROMPTS, settings=settings)
    monkeypatch.setattr("loopscope.measures.behaviour._PIECE_BYTES", 2**18)  # some ten tokens
    pieces = analyze(model, PROMPTS, settings=settings).dataset
    xarray.testing.assert_equal(pieces[["verdict", "verdict_changes"]], whole.dataset[["verdict", "verdict_changes"]])
    # Rates are fitted, and follow rounding: they differ as much where prompts are run one by one.
    rates = ["verdict_rate"]
    xarray.testing.assert_allclose(pieces.drop_vars(rates), whole.dataset.drop_vars(rates), rtol=1e-3, atol=1e-6)


def test_each_option_saves_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 2**34)
    run = RunSize(tokens=100, batch_size=2, recurrences=32, horizon=32)
    said = foresee(loopscope.inspect_model("demo:injected", run=run))
    assert said is not None
    model = loopscope.load("demo:injected", device="cpu")
    assert isinstance(model, NativeSubject)
    texts = [[1] * 100] * 2
    fields: dict[str, Any] = {"recurrences": 32, "horizon": 32, "batch_size": 2}
    assert _job(model, texts, **fields).needed == said.needed
    skips = [option for option in said.saved if option.startswith("--skip ")]
    assert len(skips) >= 2
    for option in skips:
        without = _job(model, texts, **fields, skip=(option.removeprefix("--skip "),)).needed
        assert said.needed - without == said.saved[option]
    assert said.needed - _job(model, texts, **fields, keep_limit=0).needed == said.saved["--keep-limit 0"]


def test_inspect_shows_what_an_analysis_would_take(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "demo:uninjected", "--tokens", "100"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "an analysis about" in shown
    assert "saves of that" in shown


@pytest.mark.parametrize("given", [0, -3, "many"])
def test_a_batch_size_is_a_number_or_auto(given: Any) -> None:
    with pytest.raises(ConfigError, match="--batch-size"):
        AnalyzeSettings(batch_size=given)


def test_arrays_are_of_the_size_that_is_said() -> None:
    fields: dict[str, Any] = {"recurrences": 16, "horizon": 8, "skip": ("stability", "twin")}
    study: Study = analyze(subject(), [[1] * 30, [2] * 20], **fields)
    job = _job(subject(), [[1] * 30, [2] * 20], **fields)
    batch = planned_batch(subject(), Batch.of([[1] * 30, [2] * 20]), job.plan)
    said = sum(array_bytes(kind, batch) for kind in asked_for(batch))
    assert said == pytest.approx(sum(np.asarray(each).nbytes for each in study.dataset.data_vars.values()), rel=0.2)
