"""`loopscope behaviour` on real files: what it writes, and what it says of files that it cannot judge."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from loopscope.cli import main
from loopscope.dynamics.trajectories.settings import CosineSettings, DisplacementSettings
from report_page import Page

DOCUMENT = Path(__file__).parents[1] / "docs" / "behaviour.md"


@pytest.fixture(scope="module")
def states() -> NDArray[np.float32]:
    """(token, recurrence, width): one that approaches a point, one that orbits."""
    rng = np.random.default_rng(0)
    time = np.arange(1, 65)[:, None]
    centre, u, v = rng.normal(size=(3, 32))
    nearing = centre + 0.5**time * u
    orbit = centre + 0.2 * (np.cos(0.9 * time) * u + np.sin(0.9 * time) * v)
    return np.stack([nearing, orbit]).astype(np.float32)


def write(states: NDArray[np.float32], path: Path) -> None:
    if path.suffix == ".npy":
        np.save(path, states)
    elif path.suffix == ".npz":
        np.savez(path, h=states)
    else:
        save_file({"h": states}, path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_each_kind_of_file_is_judged_and_reported_on(suffix: str, states: NDArray[np.float32], tmp_path: Path) -> None:
    write(states, tmp_path / f"states{suffix}")
    main(["behaviour", str(tmp_path / f"states{suffix}"), "--dtype", "float32", "--out", str(tmp_path / "out")])
    lines = [json.loads(line) for line in (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["fixed point", "orbit"]
    assert lines[1]["period"] == pytest.approx(2 * np.pi / 0.9, rel=0.02)
    assert lines[1]["array"] == ("" if suffix == ".npy" else "h")
    page = Page(tmp_path / "out" / "report.html")
    assert {"behaviour-shares", "extreme-orbit", "behaviour-tokens"} <= page.anchors
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["dtype"] == "float32"


def test_one_trajectory_without_a_report(states: NDArray[np.float32], tmp_path: Path) -> None:
    write(states[1], tmp_path / "one.npy")
    arguments = ["--dtype", "float32", "--method", "cosine", "--set", "tau=0.001", "--no-report"]
    main(["behaviour", str(tmp_path / "one.npy"), *arguments, "--out", str(tmp_path / "out")])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["tau"] == 0.001
    assert not (tmp_path / "out" / "report.html").exists()


def broken(states: NDArray[np.float32], case: str, path: Path) -> None:
    made = {
        "short": states[:, :8],
        "nan": np.full_like(states, np.nan),
        "axes": states[0, 0],
        "text": np.array(["a", "b"]),
    }
    if case == "damaged":
        path.write_bytes(b"no array")
    elif case == "empty":
        np.savez(path)
    elif case != "missing":
        np.save(path, made[case])


@pytest.mark.parametrize("case", ["short", "nan", "axes", "text", "damaged", "missing", "empty"])
def test_what_cannot_be_judged_is_one_sentence_with_the_file_in_it(
    case: str, states: NDArray[np.float32], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / (f"{case}.npz" if case == "empty" else f"{case}.npy")
    broken(states, case, path)
    with pytest.raises(SystemExit) as stopped:
        main(["behaviour", str(path), "--dtype", "float32", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert path.name in lines[0]
    assert not (tmp_path / "out" / "verdicts.jsonl").exists()


def test_an_unknown_setting_is_named_with_the_known_ones(
    tmp_path: Path, states: NDArray[np.float32], capsys: pytest.CaptureFixture[str]
) -> None:
    write(states, tmp_path / "states.npy")
    with pytest.raises(SystemExit):
        main(
            ["behaviour", str(tmp_path / "states.npy"), "--dtype", "float32", "--out", str(tmp_path), "--set", "flor=1"]
        )
    assert "has no setting 'flor'" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [DisplacementSettings(), CosineSettings()])
def test_the_document_has_every_setting_with_its_default(settings: DisplacementSettings | CosineSettings) -> None:
    rows = [line.split(" | ")[:2] for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        assert any(name == f"| `{field.name}`" and float(shown) == value for name, shown in rows), field.name
