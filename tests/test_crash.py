"""A disk that is full, or that cannot be written to any more, at any of an analysis's operations on files; `make crash`
does the rest."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import xarray

from crash_campaigns import OPERATIONS, WRITES, full, left_over, read_only
from loopscope import AnalyzeSettings, Study, analyze
from loopscope.analysis.settings import parts_except
from loopscope.errors import StorageError
from small_models import checkpoint

SETTINGS = AnalyzeSettings(
    recurrences=2, horizon=8, batch_size=1, threads=1, device="cpu", track=(), skip=parts_except("noise-floor")
)
FAULTS = [full, read_only]
watched: list[Callable[[str, str], None]] = []


def hook(event: str, details: tuple[object, ...]) -> None:
    if watched and event in OPERATIONS:
        watched[-1]("write" if event == "open" and int(str(details[2] or 0)) & WRITES else event, str(details[0]))


@contextmanager
def operations(out: Path, then: Callable[[int, str, str], None]) -> Iterator[None]:
    """`then` is done before each of those below `out`, with its number."""
    count = 0

    def do(event: str, path: str) -> None:
        nonlocal count
        if path.startswith(str(out)):
            count += 1
            then(count, event, path)

    watched.append(do)
    try:
        yield
    finally:
        watched.pop()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.addaudithook(hook)
    return checkpoint(tmp_path_factory.mktemp("model") / "model")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_an_analysis_goes_on_when_there_is_room_again(
    fault: Callable[[str, str], None], model: Path, tmp_path: Path
) -> None:
    prompts, counted = [[1, 2, 3], [4, 5]], [0]
    with operations(tmp_path / "whole", lambda number, event, path: counted.append(number)):
        whole = analyze(model, prompts, settings=SETTINGS, out=tmp_path / "whole")
    for first in (1, counted[-1] // 3, 2 * counted[-1] // 3):
        out = tmp_path / f"out-{first}"

        def fail(number: int, event: str, path: str, first: int = first) -> None:
            if number >= first:
                fault(event, path)

        said = r"no room left to write|cannot be (written|used)"
        with operations(out, fail), pytest.raises(StorageError, match=said):
            analyze(model, prompts, settings=SETTINGS, out=out)
        assert fault is read_only or not left_over(out)
        analyze(model, prompts, settings=SETTINGS, out=out)
        assert not left_over(out)
        xarray.testing.assert_identical(Study.load(out).dataset, whole.dataset)
