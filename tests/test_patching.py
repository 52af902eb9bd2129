"""Patching: what is put from one run into another, and a lookup that was planted is found where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import loopscope
from loopscope.analysis.patching import Change, Patches, Recorded
from loopscope.answers.patching import Patching
from loopscope.errors import ConfigError, PromptError, StudyError
from loopscope.models.native.subject import NativeSubject
from loopscope.models.subject import Batch
from loopscope.report.page.write import write_patching
from small_models import ADDED, GATED, INJECTED, LOOP_NORM, RESIDUAL_NORM, hooked_native, linear_loop, subject

CLEAN, CORRUPTED = [3, 1, 4, 1, 5], [9, 1, 4, 1, 5]
PAIR = {"clean": CLEAN, "corrupted": CORRUPTED, "answer": 7, "wrong": 8}
LOOKUP = ["attention:recurrent.1@1-2=0", "attention:recurrent.1@4-=0", "attention:recurrent.0=0"]
"""Leaves the attention of layer 1 in the third of the recurrences alone."""


def lookup() -> NativeSubject:
    """A loop that keeps its state, and one layer whose attention looks at all tokens before."""
    one = torch.eye(16)
    made = linear_loop(one, 0 * one, state_init="embeddings")
    generator = torch.Generator().manual_seed(1)
    weight = made.model.layers("recurrent")[1].attention.output.weight
    weight.copy_(torch.randn(weight.shape, generator=generator))
    return made


def planted(**changes: Any) -> Patching:
    return loopscope.patch(lookup(), [PAIR], recurrences=5, intervene=LOOKUP, **changes)


def test_a_planted_lookup_is_found() -> None:
    found = planted(parts=["residual", "attention", "mlp"])
    recovery = found.dataset["recovery"].isel(pair=0)
    visits = [str(label) for label in recovery["visit"].values]
    at = visits.index("recurrent.1@3")
    expected = np.zeros((len(visits), 5))
    expected[at, -1] = 1.0
    assert recovery.sel(part="attention").values == pytest.approx(expected, abs=1e-9)
    assert recovery.sel(part="mlp").values == pytest.approx(np.zeros_like(expected), abs=1e-9)
    # Until the lookup the answer stands at the first token, from then on at the last.
    expected[:at, 0], expected[at:, -1] = 1.0, 1.0
    assert recovery.sel(part="residual").values == pytest.approx(expected, abs=1e-9)
    assert "Attention: the most is recovered at recurrent.1@3, position -1 (1.00); 1 of 50" in found.sentences()[2]


def test_the_head_that_looks_up_is_found() -> None:
    model = lookup()
    model.model.layers("recurrent")[1].attention.output.weight[:, :8] = 0  # what head 0 says is not heard
    found = loopscope.patch(model, [PAIR], recurrences=5, intervene=LOOKUP, parts=["head"], positions=[-1])
    recovery = found.dataset["recovery"].isel(pair=0, position=0)
    assert recovery["part"].values.tolist() == ["head 0", "head 1"]
    assert recovery.sel(part="head 0").values == pytest.approx(np.zeros(10), abs=1e-9)
    assert recovery.sel(part="head 1").values == pytest.approx(
        1.0 * (recovery["visit"].values == "recurrent.1@3"), abs=1e-9
    )


@pytest.mark.parametrize("shape", [INJECTED, RESIDUAL_NORM, LOOP_NORM, ADDED, GATED], ids=lambda shape: shape.injection)
def test_patching_everything_is_the_other_run_and_nothing_the_same(shape: Any) -> None:
    model = subject(shape, dtype=torch.float64)
    batches = [Batch.of([ids]) for ids in (CLEAN, CORRUPTED)]
    recorded = Recorded(frozenset({"residual", "attention", "mlp", "head"}))

    def answer(batch: Batch, parts: Any, initial: Tensor | None) -> tuple[Tensor, Tensor | None]:
        run = model.start(batch, recurrences=3, initial_state=initial, parts=parts)
        first = run.state
        for _ in range(3):
            run.advance()
        return run.answer(), None if shape.state_init == "embeddings" else first

    clean, initial = answer(batches[0], recorded, None)
    assert torch.equal(clean, answer(batches[0], None, None)[0])
    corrupted, _ = answer(batches[1], None, initial)
    everything = [Change(site, "residual", None) for site, part in recorded.values if part == "residual"]
    heads = shape.heads
    branches = [
        Change(site, part, None, head)
        for site, part in recorded.values
        if part in ("head", "mlp")
        for head in (range(heads) if part == "head" else [None])
    ]
    assert torch.equal(answer(batches[1], Patches(recorded, [[]]), initial)[0], corrupted)
    assert torch.equal(answer(batches[1], Patches(recorded, [everything]), initial)[0], clean)
    assert not torch.equal(answer(batches[1], Patches(recorded, [branches]), initial)[0], corrupted)


@pytest.mark.parametrize("shape", [INJECTED, RESIDUAL_NORM, GATED])
def test_a_cell_is_what_a_run_with_that_one_change_gives(shape: Any) -> None:
    model = subject(shape, dtype=torch.float64)
    found = loopscope.patch(model, [PAIR], recurrences=3, parts=["residual", "head"], batch_size=7)
    recorded = Recorded(frozenset({"residual", "head"}))
    source = model.start(Batch.of([CLEAN]), recurrences=3, parts=recorded)
    own = shape.state_init == "embeddings"
    initial = None if own else source.state
    for _ in range(3):
        source.advance()
    source.decode()
    sites = model.info.sites(range(1, 4))
    for site, name, position in [(sites[0], "residual", 1), (sites[3], "head 1", 0), (sites[-1], "residual", 4)]:
        part, head = ("head", 1) if name == "head 1" else ("residual", None)
        change = Change(site, part, position, head)  # type: ignore[arg-type]
        run = model.start(
            Batch.of([CORRUPTED]), recurrences=3, initial_state=initial, parts=Patches(recorded, [[change]])
        )
        for _ in range(3):
            run.advance()
        logits = run.answer()[0, -1]
        cell = found.dataset["metric"].sel(part=name, visit=site.label, position=position - 5).item()
        assert cell == pytest.approx(float(logits[7] - logits[8]), abs=1e-10)


def test_what_lies_before_a_cell_is_run_once() -> None:
    model = subject(INJECTED)
    rows: list[int] = []
    layer = model.model.layers("recurrent")[0]
    handle = layer.register_forward_hook(lambda *given: rows.append(len(given[1][0])))
    found = loopscope.patch(model, [PAIR], recurrences=4, visits=["recurrent.*"])
    handle.remove()
    cells = 5 * 2  # tokens and layers, in each recurrence
    needed = cells * (4 + 3 + 2 + 1)
    assert found.manifest["recurrences_run"] == sum(rows) <= 1.2 * needed


def test_what_was_found_is_saved_and_read_back(tmp_path: Path) -> None:
    other = {"clean": [3, 1, 4], "corrupted": [3, 2, 4], "answer": 7, "wrong": 8}
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in (PAIR, other)))
    found = loopscope.patch(subject(), file, recurrences=2, visits=["recurrent.*@2"])
    assert found.dataset["position"].values.tolist() == [-5, -4, -3, -2, -1]
    assert np.isnan(found.dataset["recovery"].isel(pair=1).sel(position=-5)).all()
    loaded = Patching.load(found.save(tmp_path / "out").folder or "")
    assert loaded.dataset.identical(found.dataset)
    assert (
        loaded.sentences() == found.sentences() == json.loads((tmp_path / "out/patching.json").read_text())["sentences"]
    )
    (tmp_path / "evaluated").mkdir()
    (tmp_path / "evaluated/curve.json").touch()
    with pytest.raises(StudyError, match="holds an evaluation; choose another folder"):
        found.save(tmp_path / "evaluated")
    with pytest.raises(StudyError, match="holds no patching"):
        Patching.load(tmp_path)
    (tmp_path / "out/patching.nc").write_bytes(b"nothing")
    with pytest.raises(StudyError, match="damaged"):
        Patching.load(tmp_path / "out")


def test_runs_that_do_not_differ_recover_nothing() -> None:
    # Without attention the last token, which is the same in both, sees nothing of the first.
    found = loopscope.patch(lookup(), [PAIR], recurrences=2, intervene=["attention:recurrent.*=0"])
    assert np.isnan(found.dataset["recovery"]).all()
    assert "no more than rounding" in found.sentences()[1]
    assert "cannot be told" in found.sentences()[-1]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"corrupted": [9, 1, 4, 1]}, PromptError, "5 tokens and the corrupted one 4"),
        ({"corrupted": PAIR["clean"]}, PromptError, "same tokens"),
        ({"answer": [7, 8]}, PromptError, r"2 tokens \(7, 8\), and one is read off"),
        ({"answer": "seven"}, PromptError, "no tokenizer"),
        ({"answer": 99}, PromptError, "between 0 and 47"),
        ({"wrong": 7}, PromptError, "same token"),
        ({"clean": "text"}, PromptError, "no tokenizer"),
        ({"clean": [], "corrupted": []}, PromptError, "empty"),
        ({"clean": [1.5]}, PromptError, "text or token ids"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        loopscope.patch(subject(), [{**PAIR, **changes}])


def test_what_does_not_fit_the_model_is_refused() -> None:
    alone = {name: value for name, value in PAIR.items() if name != "wrong"}
    with pytest.raises(PromptError, match="Pair 1 has a wrong answer and Pair 2 has none"):
        loopscope.patch(subject(), [PAIR, alone])
    with pytest.raises(PromptError, match="no field 'clean'"):
        loopscope.patch(subject(), [{"answer": 1}])
    with pytest.raises(PromptError, match="holds no pairs"):
        loopscope.patch(subject(), [])
    with pytest.raises(ConfigError, match=r"No visit is called coda\.7; those of small go from prelude\.0"):
        loopscope.patch(subject(), [PAIR], visits=["coda.7"])
    with pytest.raises(ConfigError, match="no position 5"):
        loopscope.patch(subject(), [PAIR], positions=[5])
    with pytest.raises(ConfigError, match="parts must be"):
        loopscope.patch(subject(), [PAIR], parts=["value"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="only watched"):
        loopscope.patch(hooked_native(INJECTED)[1], [PAIR])


def test_the_grid_is_drawn_on_a_page_and_on_paper(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = planted(parts=["residual", "attention", "head"]).save(tmp_path / "out")
    page = write_patching(found, tmp_path / "report.html").read_text()
    assert "Is there a state that the answer goes through?" in page
    assert "recurrent.1@3" in page
    assert "from patching." in page
    (drawn,) = loopscope.write_figures(tmp_path / "out", tmp_path / "figures", formats=("svg",))
    assert list(drawn.files) == ["patching"]
