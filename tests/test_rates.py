"""Shares of verdicts with their intervals, by kind, role and layer, and the command that puts studies side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from loopscope.answers.rates import (
    ROLES,
    KindShare,
    clopper_pearson,
    co_occurrence,
    prompt_shares,
    study_rates,
    token_roles,
    token_shares,
)
from loopscope.cli import main
from loopscope.dynamics.verdicts import KINDS, Kind
from loopscope.errors import StudyError
from loopscope.study import Study
from synthetic_study import LAYERS, contracting, feed_forward_study, looped_study, with_behaviour

ORBIT, FIXED = KINDS.index(Kind.ORBIT), KINDS.index(Kind.FIXED_POINT)


@pytest.fixture(scope="module")
def study() -> Study:
    """One orbit, of prompt 1, at the last layer; all other tokens are fixed points."""
    codes = np.full((LAYERS, 4, 10), FIXED, dtype=np.int8)
    codes[-1, 1, 2] = ORBIT
    codes[:, 3, 8:] = -1  # a shorter prompt
    return with_behaviour(looped_study(contracting(), prompts=4), codes)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 1 - 0.025 ** (1 / 10)),  # where nothing, or all, was found the interval has a closed form
        (10, 10, 0.025 ** (1 / 10), 1.0),
        (0, 5000, 0.0, 1 - 0.025 ** (1 / 5000)),
        (0, 0, 0.0, 1.0),
        (1, 5000, 1 - 0.975 ** (1 / 5000), 1.1138e-3),
    ],
)
def test_intervals_of_known_form(successes: int, trials: int, low: float, high: float) -> None:
    np.testing.assert_allclose(clopper_pearson(successes, trials), (low, high), rtol=1e-3)


@given(st.integers(1, 400).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
def test_at_the_ends_of_an_interval_the_binomial_test_leaves_half_of_five_percent(pair: tuple[int, int]) -> None:
    successes, trials = pair
    low, high = clopper_pearson(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    if successes:
        assert stats.binom.sf(successes - 1, trials, low) == pytest.approx(0.025, rel=1e-6)
    if successes < trials:
        assert stats.binom.cdf(successes, trials, high) == pytest.approx(0.025, rel=1e-6)


def test_shares_of_tokens_and_of_prompts(study: Study) -> None:
    rates = study_rates(study)
    assert rates.layer == LAYERS - 1
    assert rates.tokens[ORBIT] == KindShare(Kind.ORBIT, 1, 38)  # padding is no token
    assert rates.prompts[ORBIT] == KindShare(Kind.ORBIT, 1, 4)
    assert rates.prompts[FIXED].count == 4  # a prompt counts for each kind that it has
    assert sum(share.count for share in rates.tokens) == 38
    assert study_rates(study, layer=0).tokens[ORBIT].count == 0
    assert rates.changed == {"window": (1, 40), "horizon": (0, 40), "seed": (0, 0)}
    assert token_shares(np.array([ORBIT, ORBIT]))[ORBIT].share == 1
    assert prompt_shares(np.full((2, 3), -1))[0].total == 0


def test_roles_of_the_tokens_of_a_prompt() -> None:
    prompt = {
        "token_ids": [0, 1, 2, 3, 4, 5, 6],
        "token_strings": ["<s>", "Be kind", "\n\n", " 12", "eggs", "?", "</s>"],
        "system_tokens": 3,
        "suffix_tokens": 1,
    }
    roles = token_roles([prompt, {"token_ids": [0, 1]}], 8)
    found = {name: np.flatnonzero(roles[name][0]).tolist() for name in ROLES}
    assert found == {
        "question": [3, 4, 5],
        "system prompt": [0, 1, 2],
        "digits": [3],
        "punctuation": [5],
        "last token": [6],
    }
    assert np.flatnonzero(roles["question"][1]).tolist() == [0, 1]
    assert np.flatnonzero(roles["last token"][1]).tolist() == [1]


def test_co_occurrence_across_layers_counts_pairs_of_kinds_of_the_same_token(study: Study) -> None:
    found = co_occurrence(study)
    assert found[ORBIT, FIXED] == 1  # the orbit is a fixed point at the layers before
    assert found[FIXED, ORBIT] == pytest.approx(1 / 38)
    assert found[FIXED, FIXED] == found[ORBIT, ORBIT] == 1
    assert np.isnan(found[KINDS.index(Kind.SLIDER)]).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"layer": 7}, "Layer 7 was not judged"), ({"method": "angle"}, "displacement or cosine")],
)
def test_what_was_not_judged_is_said(study: Study, arguments: dict[str, int | str], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        study_rates(study, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [lambda: looped_study(contracting(), prompts=2), feed_forward_study])
def test_a_study_without_verdicts_says_so(make: Callable[[], Study]) -> None:
    with pytest.raises(StudyError, match="has no verdicts"):
        study_rates(make())


# ---- the command ----


@pytest.fixture(scope="module")
def folders(study: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The study, and one in which nothing orbits."""
    root = tmp_path_factory.mktemp("studies")
    calm = with_behaviour(looped_study(contracting(), prompts=2), np.full((LAYERS, 2, 10), FIXED, dtype=np.int8))
    study.save(root / "persona")
    calm.save(root / "plain")
    return root / "persona", root / "plain"


def test_studies_stand_side_by_side(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    main(["rates", *map(str, folders), "--roles"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["kind", "share", "of", "persona", "plain"] for line in lines)
    orbits = next(line for line in lines if line.startswith("orbit") and "tokens" in line)
    assert "1 of 38: 2.63 %" in orbits.replace("\u00a0", " ")
    assert "0 of 20: 0 %" in orbits.replace("\u00a0", " ")
    assert any("tokens: last token" in line for line in lines)


def test_the_same_as_json(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    main(["rates", str(folders[0]), "--layer", "2", "--method", "cosine", "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    orbit = next(share for share in found["tokens"] if share["kind"] == "orbit")
    low, high = clopper_pearson(1, 38)
    assert orbit == {"kind": "orbit", "count": 1, "total": 38, "share": 1 / 38, "low": low, "high": high}
    assert found["layer"] == 2
    assert "roles" not in found


@pytest.mark.parametrize(
    ("more", "words"), [(["--layer", "9"], "persona: Layer 9 was not judged"), (["missing"], "missing does not exist")]
)
def test_errors_are_one_sentence(
    folders: tuple[Path, Path], more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["rates", str(folders[0]), *more])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert len(message.strip().splitlines()) == 1


def test_verdicts_on_trajectories_are_no_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text('{"kind": "verdicts"}')
    with pytest.raises(SystemExit):
        main(["rates", str(tmp_path)])
    assert "holds verdicts on trajectories and no study" in capsys.readouterr().err
