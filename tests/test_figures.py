"""`loopscope figures`: what is written and what is left out, files that repeat themselves, and text from outside."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from loopscope import AnalyzeSettings, analyze, compare
from loopscope.answers.answer import Criterion
from loopscope.cli import main
from loopscope.errors import ConfigError, StorageError, StudyError
from loopscope.experiments.cells import Cell, CellOutcome, CellResult
from loopscope.experiments.designs import NormName
from loopscope.experiments.load import load_experiment
from loopscope.models.architecture import Architecture
from loopscope.report.figures import in_matplotlib
from loopscope.report.figures.experiments import architecture_section
from loopscope.report.figures.in_matplotlib import FORMATS, MARK, Format, Width, paper_style
from loopscope.report.figures.look import decade
from loopscope.report.figures.plot import FigureType, Plot
from loopscope.report.figures.write import (
    CAPTIONS,
    COMPARISON_FIGURES,
    STUDY_FIGURES,
    FigureSet,
    draw_figure,
    figure_names,
    file_of,
    write_figures,
)
from loopscope.report.settings import ReportSettings
from loopscope.study import Study, StudyView, view_study
from small_models import FEED_FORWARD, GATED, PROMPTS, subject
from staged_study import OTHER, SHAPE, staged_study
from synthetic_study import contracting, feed_forward_study, looped_study, overflowing, with_behaviour

CHECKOUT = Path(__file__).resolve().parent.parent

OF_STUDY = [kind.name for kind in STUDY_FIGURES]
OF_COMPARISON = [kind.name for kind in COMPARISON_FIGURES if kind.name != "over-training"]
"""Of other studies than checkpoints of one run."""
JUDGED = {name for name in OF_STUDY if name.startswith("verdict-")}
PREDICTED = {name for name in OF_STUDY if name.startswith("stability-")}
SUPPORTS = {"head-supports", "shared-cache", "visit-cka"}
NOT_SYNTHETIC = {"exit-gate", "cycle-attention-long", "cycle-residual-long", *SUPPORTS, *JUDGED, *PREDICTED}
"""What the synthetic studies lack: an exit gate, more than four recurrences in the cycle similarity, supports of
attention, and, unless they are given some, verdicts and eigenvalues."""
SIMPLE = ["norm-by-layer"]
VARIED = ["step-by-depth", "cycle-attention", "trajectories-3d", "tokens"]
"""Lines, a map, a figure in space, names of tokens."""

SAME_CODE = ("distance", "direction", "attention", "magnitude", "concentration")
"""Types that only draw other quantities than `step` and `stages` do."""

HOSTILE = ["$x_1$", "$\\frac{1", "<script>alert(1)</script>", "a_b^c$", "&amp;" * 40, "\x00\u202e\n水\U0001f9ff"]


@pytest.fixture(scope="module")
def study() -> Study:
    return looped_study(contracting(), prompts=5, recurrences=12)


def drawn(kind: FigureType[StudyView], view: StudyView, width: Width = "auto") -> Figure:
    """What `draw_figure` draws, of a study that has been looked at."""
    return in_matplotlib.draw(kind.draw(view, ReportSettings()), width)


def names(found: FigureSet) -> set[str]:
    return set(found.files)


def captions(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / CAPTIONS).read_text(encoding="utf-8"))
    return content


def without(study: Study, *variables: str, why: str | None = None, **settings: Any) -> Study:
    """A study that lacks variables, and says why."""
    left_out = {**study.manifest["left_out"], **(dict.fromkeys(variables, why) if why else {})}
    manifest = {**study.manifest, "settings": {**study.manifest["settings"], **settings}, "left_out": left_out}
    return dataclasses.replace(study, dataset=study.dataset.drop_vars(list(variables)), manifest=manifest)


def test_all_that_a_study_supports_is_written(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_matplotlib, "_PNG_DPI", 50)  # a third of the time goes into pixels
    (found,) = write_figures(study, tmp_path / "new" / "figs", formats=("png",))
    assert found.folder == tmp_path / "new" / "figs"
    assert names(found) == set(OF_STUDY) - NOT_SYNTHETIC
    assert set(found.left_out) == NOT_SYNTHETIC
    assert found.left_out["exit-gate"] == "the model has no exit gate"
    files = {path.name for paths in found.files.values() for path in paths}
    assert {path.name for path in found.folder.iterdir()} == files | {CAPTIONS}
    for paths in found.files.values():
        assert [path.read_bytes()[:4] for path in paths] == [b"\x89PNG"]


def test_captions_say_what_is_drawn_and_from_what(study: Study, tmp_path: Path) -> None:
    write_figures(study, tmp_path, formats=("png", "svg"), only=["step-by-layer", "exit-gate"])
    content = captions(tmp_path)
    assert content["drawn_from"]["model"] == "synthetic"
    assert content["drawn_with"]["matplotlib"] == matplotlib.__version__
    assert content["left_out"] == [{"name": "exit-gate", "reason": "the model has no exit gate"}]
    (figure,) = content["figures"]
    assert figure["files"] == ["step-by-layer.png", "step-by-layer.svg"]
    assert figure["variables"] == ["successive_difference", "relative_step"]
    assert figure["paper_figures"] == [3]
    for words in (
        "(a) Euclidean norm",
        "Medians over prompts",
        "The grey band belongs to the last layer and holds 90 % of the tokens",
        "Dashed: the trained number of recurrences.",
        "Model synthetic, (1, 3 ⊗ R, 1), injection linear, run in float32.",
        "5 prompts from synthetic, 50 tokens.",
        "12 recurrences measured, horizon H = 32; trained with 4 recurrences.",
    ):
        assert words in figure["caption"]


def test_every_caption_is_whole_sentences(study: Study, tmp_path: Path) -> None:
    for kind in STUDY_FIGURES:
        if kind.absent(view_study(study)) is None:
            plot = kind.draw(view_study(study), ReportSettings())
            words = " ".join([plot.question, plot.reading, *plot.lines]).strip()
            assert words.endswith(".")
            assert "  " not in words
            assert not re.search(r"\.\.|[{}]|None|nan", words), words


def test_what_is_unusual_is_in_the_caption(tmp_path: Path) -> None:
    changed = looped_study([contracting(), overflowing], prompts=4, recurrences=8, horizon=8, trained=None)
    changed.manifest["settings"]["intervene"] = ["mlp:prelude.0=0"]
    write_figures(changed, tmp_path, formats=("svg",), only=["norm-by-layer"])
    caption = captions(tmp_path)["figures"][0]["caption"]
    assert "The model was changed while it ran: mlp:prelude.0=0." in caption
    assert "2 prompts of 4 diverged and left out." in caption
    assert "trained with an unknown number." in caption
    assert "Dashed" not in caption


@pytest.mark.parametrize(
    ("variable", "figure", "reason"),
    [
        ("loss", "loss", "the analysis was told to leave it out (--skip readout)"),
        ("sink_score", "head-sinks", "the analysis was told to leave it out (--skip heads)"),
        ("path_distance", "path-independence-by-layer", "the model cannot be started from another initial state"),
        ("prediction_neurons", "neurons", "neurons were not counted"),
    ],
)
def test_missing_parts_are_left_out_with_the_reason_that_the_study_gives(
    study: Study, tmp_path: Path, variable: str, figure: str, reason: str
) -> None:
    lacking = without(study, variable, why=reason)
    (found,) = write_figures(lacking, tmp_path, formats=("svg",), only=[figure, *SIMPLE])
    assert names(found) == set(SIMPLE)
    assert found.left_out[figure] == reason


@pytest.mark.parametrize(
    ("skip", "reason"),
    [
        ([], "the study has no variable layer_cosine"),
        (["heads"], "the study has no variable layer_cosine (--skip heads)"),
    ],
)
def test_a_study_that_does_not_say_why_it_lacks_something(
    study: Study, tmp_path: Path, skip: list[str], reason: str
) -> None:
    lacking = without(study, "layer_cosine", skip=skip)
    (found,) = write_figures(lacking, tmp_path, formats=("svg",), only=["layer-cosine", *SIMPLE])
    assert names(found) == set(SIMPLE)
    assert found.left_out["layer-cosine"] == reason


def test_one_stage_measure_is_enough_for_the_stages(study: Study, tmp_path: Path) -> None:
    attention = ["colsum_concentration", "sink_score", "relative_mixing_score"]
    lacking = without(study, *attention, why="the analysis was told to leave it out (--skip heads)")
    wanted = ["stages-by-layer", "concentration-by-depth"]
    (found,) = write_figures(lacking, tmp_path, formats=("svg",), only=wanted)
    assert names(found) == {"stages-by-layer"}
    assert found.left_out == {"concentration-by-depth": "the analysis was told to leave it out (--skip heads)"}
    caption = captions(tmp_path)["figures"][0]["caption"]
    assert "(a) Residual entropy" in caption
    assert "heads" not in caption


def test_a_feed_forward_study_has_figures_without_recurrences(tmp_path: Path) -> None:
    (found,) = write_figures(feed_forward_study(prompts=3), tmp_path, formats=("svg",))
    assert names(found) == {
        "cycle-attention",
        "cycle-residual",
        "head-sinks",
        "attention-maps",
        "concentration-by-depth",
        "magnitude-by-depth",
        "stages-by-depth",
        "massive-places",
        "neurons",
    }
    reasons = {why for name, why in found.left_out.items() if name != "visit-cka"}
    assert reasons == {"a feed-forward model has no recurrences"}


@pytest.mark.parametrize(
    ("changes", "absent", "laid_out"),
    [
        ({"recurrences": 1}, {"step-by-layer", "head-change", "loss", "concentration-beyond"}, False),
        ({"recurrences": 4, "trained": 4}, {"stages-beyond", "concentration-by-depth-long"}, False),
        ({"trained": None}, {"stages-beyond", "concentration-beyond"}, False),
        ({"fate": [contracting(), overflowing]}, set(), False),
        # Without spread, and without an end.
        ({"prompts": 1, "tokens": 1}, set(), True),
        (
            {"fate": overflowing, "prompts": 1, "tokens": 1},
            {"tokens", "trajectories", "loss", "layer-cosine"},
            True,
        ),
    ],
    ids=["one recurrence", "none beyond", "training unknown", "mixed", "one token", "diverged"],
)
def test_unusual_studies_are_drawn_as_far_as_they_go(changes: dict[str, Any], absent: set[str], laid_out: bool) -> None:
    options = {"fate": contracting(), "prompts": 3, "recurrences": 10, "horizon": 12, **changes}
    view = view_study(looped_study(**options))
    left_out = {kind.name for kind in STUDY_FIGURES if kind.absent(view)}
    assert left_out >= absent
    if not absent:
        assert left_out == NOT_SYNTHETIC
    for kind in STUDY_FIGURES:
        if kind.name not in left_out and not kind.name.startswith(SAME_CODE):
            figure = drawn(kind, view)
            assert has_data(figure), kind.name
            if laid_out:
                assert_inside(figure, kind.name)


@pytest.mark.parametrize("shape", [GATED, FEED_FORWARD], ids=["gated", "feed-forward"])
def test_figures_of_a_real_run(shape: Architecture, tmp_path: Path) -> None:
    settings = AnalyzeSettings(
        recurrences=10, horizon=6, cycle_recurrences=9, track=("0:-1", "1:0"), eigenvalue_search=8
    )
    ran = analyze(subject(shape), PROMPTS, settings=settings)
    view = view_study(ran)
    left_out = {kind.name for kind in STUDY_FIGURES if kind.absent(view)}
    gated = shape.exit_gate
    if gated:
        # A random model has no such neurons, and verdicts need a longer horizon; where nothing settles, eigenvalues
        # have a place in the plane.
        assert left_out == {"neurons", "path-independence-by-layer", "answer", *SUPPORTS, *JUDGED, *PREDICTED} - {
            "stability-spectrum",
            "stability-growth",
        }
    for kind in STUDY_FIGURES:
        if kind.name not in left_out:
            assert has_data(drawn(kind, view)), kind.name
    wanted = "exit-gate" if gated else "stages-by-depth"
    (found,) = write_figures(ran, tmp_path, formats=("svg",), only=[wanted])
    assert names(found) == {wanted}


def test_verdicts_of_all_kinds_are_drawn() -> None:
    view = view_study(with_behaviour(looped_study(contracting(), prompts=3)))
    kinds = [kind for kind in STUDY_FIGURES if kind.name in JUDGED]
    assert not [kind.name for kind in kinds if kind.absent(view)]
    for kind in kinds:
        figure = drawn(kind, view)
        assert has_data(figure), kind.name
        assert_inside(figure, kind.name)


def has_data(figure: Figure) -> bool:
    """Every panel shows a finite number."""
    for axes in figure.axes:
        lines = [np.asarray(line.get_data()[-1], dtype=np.float64) for line in axes.lines if line.get_gid() != MARK]
        maps = [np.ma.filled(np.ma.asarray(image.get_array(), dtype=np.float64), np.nan) for image in axes.images]
        if not axes.patches and not any(np.isfinite(values).any() for values in (*lines, *maps)):
            return False
    return True


def test_a_page_is_as_wide_as_asked(study: Study, tmp_path: Path) -> None:
    widths: dict[Width, float] = {"single": 3.25, "double": 6.75, "auto": 6.75, 5.5: 5.5}
    for width, wanted in widths.items():
        write_figures(study, tmp_path, only=["step-by-layer"], width=width)
        (box,) = re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", (tmp_path / "step-by-layer.pdf").read_bytes())
        assert float(box[0]) == pytest.approx(72 * wanted)


def test_figures_of_one_column_stay_on_the_page_and_no_text_is_a_formula(study: Study) -> None:
    long = {**study.manifest, "model": {**study.manifest["model"], "name": "organisation/" + 9 * "long-name-"}}
    view = view_study(dataclasses.replace(study, manifest=long))
    for kind in STUDY_FIGURES:
        if kind.absent(view) is None and not kind.name.startswith(SAME_CODE[:3]):
            figure = drawn(kind, view, "single")
            assert_inside(figure, kind.name)
            texts: list[Any] = figure.findobj(Text)
            assert len(texts) > 3
            assert not any(found.get_parse_math() for found in texts), kind.name


@pytest.mark.parametrize("width", ["single", "auto"])
def test_long_names_of_studies_stay_on_the_page(width: Width) -> None:
    looped = staged_study([SHAPE, OTHER, SHAPE], (2, 4, 2), model=9 * "long name ", trained=2)
    other = staged_study([SHAPE, OTHER], (0, 8, 0), model="W" * 80, trained=2)
    comparison = compare([looped, other, staged_study(SHAPE, model="W" * 79 + "V")])
    for name in OF_COMPARISON:
        figure = draw_figure(comparison, name, width)
        assert_inside(figure, name)
        # Names that are cut to the same beginning are still entries of their own.
        if name == "compared-curves":
            assert len(figure.legends[0].get_texts()) == 3


def assert_inside(figure: Figure, name: str) -> None:
    """All that is drawn lies on the page, to a hundredth of an inch."""
    with paper_style():
        figure.set_dpi(300)  # as image files have; at fewer pixels letters are rounded to other widths
        layout = figure.get_layout_engine()
        assert layout is not None
        layout.execute(figure)
        box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.01, (name, box.extents, width, height)


def test_an_experiment_has_the_figures_of_its_page(tmp_path: Path) -> None:
    (found,) = write_figures(CHECKOUT / "results" / "recipes", tmp_path, formats=("svg",))
    assert names(found) == {"training-ranking", "training-losses"}
    models = len(load_experiment(CHECKOUT / "results" / "recipes").trained)
    assert captions(tmp_path)["drawn_from"] == {"kind": "experiment", "experiment": "training", "models": models}
    for name in names(found):
        assert_inside(draw_figure(CHECKOUT / "results" / "recipes", name), name)
    with pytest.raises(ConfigError, match=r"There is no figure 'training-rank'; there are .*, training-ranking"):
        write_figures(CHECKOUT / "results" / "recipes", tmp_path, only=["training-rank"])


def test_random_models_are_drawn_depth_by_depth_as_means(tmp_path: Path) -> None:
    """One seed that stands still and one that overflows; the mean ends there."""

    def cell(norm: NormName, depth: int, seed: int, *distance: float | None) -> CellResult:
        return CellResult(
            cell=Cell(norm=norm, injection="none", depth=depth, seed=seed), outcome=CellOutcome.NONE, settling="none",
            degeneracy=0.2 + 0.4 * seed, drift=1.0, norm_growth=1.0, counts=(1, 2, 4), distance=distance,
            norm=(1.0, 1.0, 1.0), radius=None, radius_median=None, radius_error=None, predicted={}, observed_rate=None,
        )  # fmt: skip

    cells = [cell("pre", 12, 0, 0.4, 0.2, 0.0), cell("pre", 12, 1, 0.2, None, None), cell("ouro", 4, 0, 1.0, 0.5, 0.0)]
    first, second, _ = architecture_section(cells).figures
    assert [first.anchor, second.anchor] == ["architectures-12-layers", "architectures-4-layers"]
    assert isinstance(first, Plot)
    assert first.paper == (6,)
    left, right = in_matplotlib.draw(first).axes
    heights = [np.asarray(one.get_ydata(), dtype=np.float64) for one in left.lines]
    np.testing.assert_allclose(np.concatenate([one[np.isfinite(one)] for one in heights]), np.array([0.3]))
    assert [tick.get_text() for tick in left.get_yticklabels()] == [decade(power) for power in (-8, -6, -4, -2, 0)]
    means = [np.asarray(one.get_xdata(), dtype=np.float64) for one in right.lines if one.get_marker() == "o"]
    np.testing.assert_allclose(np.concatenate(means), np.array([0.4]))


@pytest.fixture(scope="module")
def varied(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with different figures in all formats."""
    folder = tmp_path_factory.mktemp("varied")
    write_figures(study, folder, formats=FORMATS, only=VARIED)
    return folder


def test_vector_files_hold_their_fonts_and_no_date(varied: Path) -> None:
    for name in VARIED:
        pdf = (varied / f"{name}.pdf").read_bytes()
        assert b"/FontFile2" in pdf
        assert b"/Subtype /CIDFontType2" in pdf or b"/Subtype /TrueType" in pdf
        assert b"/Type3" not in pdf
        assert b"Date" not in pdf
        svg = (varied / f"{name}.svg").read_text(encoding="utf-8")
        assert "<dc:date>" not in svg
        # Letters are outlines, so that no font has to be there.
        assert "<text" not in svg


def in_a_process(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        timeout=120,
    )


def test_the_same_study_gives_the_same_bytes_without_pyplot(study: Study, varied: Path, tmp_path: Path) -> None:
    study.save(tmp_path / "study")
    script = f"""
import sys
from loopscope import write_figures
write_figures({str(tmp_path / "study")!r}, {str(tmp_path / "again")!r}, formats={FORMATS}, only={VARIED})
assert not any(name.startswith(("matplotlib.pyplot", "tkinter", "PyQt", "torch")) for name in sys.modules)
"""
    # Names have other hashes there than here.
    process = in_a_process(script, PYTHONHASHSEED="1" if os.environ.get("PYTHONHASHSEED") != "1" else "2")
    assert process.returncode == 0, process.stderr
    first, second = (sorted(folder.iterdir()) for folder in (varied, tmp_path / "again"))
    assert len(first) == len(VARIED) * len(FORMATS) + 1
    for one, other in zip(first, second, strict=True):
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes(), one.name


def test_nobodys_settings_matter_and_none_is_left_behind(study: Study, tmp_path: Path) -> None:
    write_figures(study, tmp_path / "plain", formats=FORMATS, only=SIMPLE)
    with matplotlib.rc_context({"font.size": 20.0, "pdf.fonttype": 3, "lines.linewidth": 9.0, "savefig.dpi": 20}):
        before = dict(matplotlib.rcParams)
        write_figures(study, tmp_path / "own", formats=FORMATS, only=SIMPLE)
        assert dict(matplotlib.rcParams) == before
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "own" / path.name).read_bytes()


def test_a_missing_matplotlib_is_answered_with_the_command(study: Study, tmp_path: Path) -> None:
    study.save(tmp_path / "study")
    arguments = ["figures", str(tmp_path / "study"), "--out", str(tmp_path / "figs")]
    process = in_a_process(f"""
import sys
sys.modules["matplotlib"] = None
from loopscope.cli import main
main({arguments})
""")
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.splitlines() == [
        "loopscope: Drawing paper figures needs the package matplotlib, which is not installed; run: pip install "
        "'loopscope[figures]'"
    ]
    assert not (tmp_path / "figs").exists()


def test_text_from_outside_is_no_markup(tmp_path: Path) -> None:
    study = looped_study(contracting(), prompts=3, tokens=len(HOSTILE), recurrences=4, horizon=4)
    for entry in study.tokens:
        assert isinstance(entry, dict)
        entry["token_strings"] = HOSTILE
    hostile = "$model_{1}$ <script>"
    study.manifest["model"]["name"] = hostile
    (found,) = write_figures(study, tmp_path, formats=FORMATS, only=["tokens", "trajectories", "trajectories-3d"])
    assert len(found.files) == 3
    for path in tmp_path.glob("*.svg"):
        assert "<script" not in path.read_text(encoding="utf-8")
    shown = [tick.get_text() for tick in draw_figure(study, "tokens").axes[0].get_yticklabels()]
    assert shown[:2] == ["$x_1$", "$\\frac{1"]
    assert shown[2] == "<script>alert(1)<…"
    # The font has no such letters; white space and controls are made visible.
    assert shown[-1] == "··⏎▯▯"
    assert f"Model {hostile}," in captions(tmp_path)["figures"][0]["caption"]


def test_hostile_names_of_studies(tmp_path: Path) -> None:
    studies = [
        staged_study(SHAPE, model="$a_b$ <b>"),
        staged_study([SHAPE, OTHER], (2, 4, 2), model="../../$\\frac{", trained=2),
    ]
    found = write_figures(studies, tmp_path / "figs", formats=("svg",), only=["compared-curves", "stages-by-depth"])
    assert [each.folder.relative_to(tmp_path).as_posix() for each in found] == ["figs/a_b-b", "figs/frac", "figs"]
    assert "$a_b$ <b> (reference)" in captions(tmp_path / "figs")["figures"][0]["caption"].replace("\u00a0", " ")
    assert {path.name for path in tmp_path.iterdir()} == {"figs"}


def test_several_studies_get_folders_and_figures_side_by_side(tmp_path: Path) -> None:
    looped = staged_study([SHAPE, OTHER, OTHER, SHAPE], (2, 4, 2), model="looped", trained=2)
    folders = [tmp_path / "one" / "run", tmp_path / "two" / "run"]
    for made, folder in zip((looped, staged_study(SHAPE, model="plain")), folders, strict=True):
        made.save(folder)
    wanted = ["stages-beyond", "stages-by-depth", *OF_COMPARISON]
    found = write_figures(folders, tmp_path / "figs", formats=("svg",), only=wanted)
    assert [each.folder for each in found] == [tmp_path / "figs" / name for name in ("run", "run-2", "")]
    assert names(found[2]) == set(OF_COMPARISON)
    assert "stages-beyond" in names(found[0])
    assert "stages-by-depth" in names(found[1])
    content = captions(tmp_path / "figs")
    assert content["drawn_from"] == {"kind": "comparison", "studies": ["looped", "plain"], "reference": "plain"}
    assert "looped: (2, 4 ⊗ R, 2), judged at recurrence 2 of 4" in content["figures"][0]["caption"]
    assert "3 prompts, 150 tokens" in content["figures"][0]["caption"]

    compare(folders).save(tmp_path / "compared")
    (again,) = write_figures(tmp_path / "compared", tmp_path / "same", formats=("svg",))
    assert names(again) == set(OF_COMPARISON)
    for paths in again.files.values():
        for path in paths:
            assert path.read_bytes() == (tmp_path / "figs" / path.name).read_bytes()


def test_studies_that_cannot_be_compared_are_drawn_one_by_one(tmp_path: Path) -> None:
    one = staged_study(SHAPE, model="a")
    found = write_figures([one, one], tmp_path, formats=("svg",), only=["stages-by-depth", "compared-curves"])
    assert [names(each) for each in found] == [{"stages-by-depth"}, {"stages-by-depth"}, set()]
    assert found[2].left_out["compared-curves"].startswith("The same Study object is given twice")


def test_a_single_study_has_nothing_beside_it(study: Study, tmp_path: Path) -> None:
    (found,) = write_figures(study, tmp_path, formats=("svg",), only=["compared-curves", *SIMPLE])
    assert found.left_out == {"compared-curves": "it puts studies side by side; give several, or a comparison"}
    comparison = compare([staged_study(SHAPE, model="a"), staged_study(SHAPE, model="b")])
    (found,) = write_figures(comparison, tmp_path, formats=("svg",), only=["compared-curves", *SIMPLE])
    assert found.left_out == {"norm-by-layer": "it is drawn from a study; give the folder of one"}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda study, out: write_figures(study, out, only=["nothing"]), ConfigError, "no figure 'nothing'; there are"),
        (lambda study, out: write_figures(study, out, formats=[]), ConfigError, "pdf, svg, png, got none"),
        (lambda study, out: write_figures(study, out, width=0.3), ConfigError, "1.5 to 40 inches, got 0.3"),
        (lambda study, out: write_figures(study, out, width=float("nan")), ConfigError, "got nan"),
        (lambda study, out: write_figures([], out), StudyError, "nothing to draw"),
        (lambda study, out: write_figures(out, out), StudyError, "does not exist"),
    ],
)
def test_what_cannot_be_asked_for(
    study: Study, tmp_path: Path, call: Callable[..., Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_figure_says_what_the_study_lacks(study: Study) -> None:
    with pytest.raises(StudyError, match="The figure exit-gate cannot be drawn: the model has no exit gate"):
        draw_figure(study, "exit-gate")
    with pytest.raises(StudyError, match="cannot be drawn: a feed-forward model has no recurrences"):
        draw_figure(feed_forward_study(prompts=2), "step-by-layer")
    with pytest.raises(ConfigError, match="no figure 'norms'; there are step-by-layer"):
        draw_figure(study, "norms")
    with pytest.raises(StudyError, match="cannot be drawn: the study has no variable mean_token_norm"):
        draw_figure(without(study, "mean_token_norm"), "magnitude-by-depth")
    comparison = compare([staged_study(SHAPE, model="a"), staged_study(SHAPE, model="b")])
    with pytest.raises(StudyError, match="cannot be drawn: it is drawn from a study"):
        draw_figure(comparison, "norm-by-layer")


def test_the_tolerance_is_that_of_the_settings(study: Study) -> None:
    settings = ReportSettings(criterion=Criterion(drift_tolerance=0.3))
    (axes,) = draw_figure(study, "horizons", settings=settings).axes
    (tolerance,) = [line for line in axes.lines if str(line.get_label()).startswith("tolerance")]
    assert tolerance.get_label() == "tolerance (0.3)"
    assert list(np.asarray(tolerance.get_ydata())) == [0.3, 0.3]


def test_where_nothing_can_be_drawn_nothing_is_replaced(study: Study, tmp_path: Path) -> None:
    write_figures(study, tmp_path, formats=("svg",), only=SIMPLE)
    before = (tmp_path / CAPTIONS).read_bytes()
    with pytest.raises(StudyError, match=r"None of the figures can be drawn \(exit-gate: the model has no exit gate\)"):
        write_figures(study, tmp_path, only=["exit-gate"])
    assert (tmp_path / CAPTIONS).read_bytes() == before


def test_a_folder_that_cannot_be_made(study: Study, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        write_figures(study, tmp_path / "file" / "figs", only=SIMPLE)


def test_the_command_says_what_it_left_out(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study.save(tmp_path / "study")
    wanted = ["--only", "norm-by-layer", "exit-gate", "--format", "svg", "png"]
    main(["figures", str(tmp_path / "study"), "--out", str(tmp_path / "figs"), *wanted])
    assert capsys.readouterr().out.splitlines() == [
        "left out  exit-gate: the model has no exit gate",
        f"figures  1, with their captions in {tmp_path / 'figs' / CAPTIONS}",
    ]
    assert sorted(path.name for path in (tmp_path / "figs").glob("norm*")) == ["norm-by-layer.png", "norm-by-layer.svg"]
    with pytest.raises(SystemExit) as end:
        main(["figures", str(tmp_path / "study"), "--out", str(tmp_path / "figs"), "--only", "norms"])
    assert end.value.code == 2
    assert "there are step-by-layer" in capsys.readouterr().err


def test_a_figure_that_a_user_saves_is_the_same(study: Study, tmp_path: Path) -> None:
    write_figures(study, tmp_path, only=["magnitude-by-depth"])
    drawn = draw_figure(study, "magnitude-by-depth")
    formats: Format = "pdf"
    assert file_of(drawn, formats) == (tmp_path / "magnitude-by-depth.pdf").read_bytes()


def test_the_documentation_lists_every_figure() -> None:
    text = (CHECKOUT / "docs" / "figures.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \|(.*)\|$", text, flags=re.MULTILINE))
    assert list(rows) == figure_names()
    kinds: list[FigureType[Any]] = [*STUDY_FIGURES, *COMPARISON_FIGURES]
    for kind in kinds:
        _, variables, paper = (cell.strip() for cell in rows[kind.name].split("|"))
        listed = {int(number) for number in re.findall(r"\d+", paper)}
        spans = re.findall(r"(\d+) to (\d+)", paper)
        listed |= {number for low, high in spans for number in range(int(low), int(high) + 1)}
        assert listed == set(kind.paper), kind.name
        assert set(re.findall(r"`(\w+)`", variables)) == set(kind.variables), kind.name


def test_arrays_are_drawn_without_a_warning_where_they_are_empty(study: Study, tmp_path: Path) -> None:
    still = np.zeros_like(study.dataset["successive_difference"].values)
    names_of = ["successive_difference", "relative_step"]
    dataset = study.dataset.assign({name: study.dataset[name].copy(data=still) for name in names_of})
    (found,) = write_figures(
        dataclasses.replace(study, dataset=dataset), tmp_path, formats=("svg",), only=["step-by-layer", "step-by-depth"]
    )
    assert len(found.files) == 2
