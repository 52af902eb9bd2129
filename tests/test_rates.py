"""Shares of verdicts with their intervals, by kind, role and layer, and the command that puts studies side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy
import xarray
from hypothesis import given
from hypothesis import strategies as st

from loopscope._util.statistics import clopper_pearson, cluster_interval, surviving
from loopscope.answers.answer import Criterion
from loopscope.answers.behaviour import behaviour_answer
from loopscope.answers.predictions import token_drivers
from loopscope.answers.rates import (
    ROLES,
    by_cluster,
    co_occurrence,
    driver_shares,
    prompt_shares,
    study_rates,
    token_roles,
    token_shares,
)
from loopscope.answers.settling import prompts_by_verdict
from loopscope.answers.token_kinds import token_kinds
from loopscope.cli import main
from loopscope.dynamics.verdicts import KINDS, Kind
from loopscope.errors import StudyError
from loopscope.study import Study, view_study
from synthetic_study import LAYERS, contracting, feed_forward_study, looped_study, with_behaviour

ORBIT, FIXED, UNKNOWN = (KINDS.index(kind) for kind in (Kind.ORBIT, Kind.FIXED_POINT, Kind.UNKNOWN))


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
        assert scipy.stats.binom.sf(successes - 1, trials, low) == pytest.approx(0.025, rel=1e-6)
    if successes < trials:
        assert scipy.stats.binom.cdf(successes, trials, high) == pytest.approx(0.025, rel=1e-6)


@pytest.mark.parametrize("prompts", [5, 40])
@pytest.mark.parametrize("alike", [1.0, 20.0])
def test_the_interval_of_tokens_holds_their_rate_though_those_of_a_prompt_are_alike(prompts: int, alike: float) -> None:
    """Each prompt has a rate of its own; the smaller `alike`, the more its tokens are."""
    rng, held, narrow = np.random.default_rng(0), 0, 0
    for _ in range(300):
        total = rng.integers(40, 120, size=prompts)
        found = rng.binomial(total, rng.beta(0.3 * alike, 0.7 * alike, size=prompts))
        low, high = cluster_interval(found, total)
        held += low <= 0.3 <= high
        low, high = clopper_pearson(int(found.sum()), int(total.sum()))
        narrow += low <= 0.3 <= high
    assert held > 0.92 * 300
    assert narrow < held


def test_one_prompt_tells_nothing_of_others_and_none_found_in_few_prompts_not_much() -> None:
    assert cluster_interval(np.array([3]), np.array([90])) == (0.0, 1.0)
    none = cluster_interval(np.zeros(8, dtype=int), np.full(8, 1000))
    assert none == (0.0, clopper_pearson(0, 8)[1])
    assert cluster_interval(np.full(8, 1000), np.full(8, 1000)) == (clopper_pearson(8, 8)[0], 1.0)


def test_false_discoveries_are_controlled_as_published() -> None:
    # Benjamini and Hochberg (1995), section 4: four of fifteen are left.
    p_values = np.array(
        [1e-4, 4e-4, 19e-4, 95e-4, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.324, 0.4262, 0.5719, 0.6528, 0.759, 1]
    )
    assert surviving(p_values).tolist() == [True] * 4 + [False] * 11
    assert surviving(np.array([np.nan, 0.001])).tolist() == [False, True]
    assert surviving(np.array([0.9])).tolist() == [False]


def test_what_cannot_be_told_is_counted_as_what_it_may_be() -> None:
    codes = np.full((8, 100), UNKNOWN)
    codes[0, :45] = FIXED
    share = token_shares(codes)[ORBIT]
    assert (share.count, share.decided, share.undecided) == (0, 45, 755)
    assert share.bracket == (0.0, 755 / 800)
    assert share.interval[0] == 0
    assert share.interval[1] > 755 / 800
    assert token_shares(codes)[FIXED].share == 1
    prompts = prompt_shares(codes)
    assert prompts[FIXED].bracket == (1 / 8, 1.0)
    assert prompts[ORBIT].undecided == 8
    assert prompts[UNKNOWN].undecided == 0


def test_driven_tokens_count_with_what_drives_them() -> None:
    """Three prompts, each of whose third token makes all later ones orbit."""
    codes = np.full((3, 70), ORBIT)
    codes[:, :2] = FIXED
    drivers = np.full(codes.shape, 2)
    drivers[:, :2] = [0, 1]
    tokens, driving = token_shares(codes)[ORBIT], driver_shares(codes, drivers)[ORBIT]
    assert (tokens.count, tokens.total) == (204, 210)
    assert (driving.count, driving.total) == (3, 9)
    # Where no driver is known, those of a prompt may have one.
    assert driver_shares(codes, np.full(codes.shape, -1))[ORBIT].total == 3


def test_the_driver_of_a_token_is_the_slowest_so_far() -> None:
    moduli = np.array([[0.5, 0.9, 0.7, 1.2, 1.1, np.nan]])
    dims = ("prompt", "token")
    data = xarray.Dataset(
        {
            "predicted_kind": (dims, np.array([[0, 0, 0, 3, 3, -1]])),
            "eigenvalue_real": (("pair", *dims), moduli[None]),
            "eigenvalue_imag": (("pair", *dims), 0 * moduli[None]),
        }
    )
    assert token_drivers(data).tolist() == [[0, 1, 1, 3, 3, -1]]


def test_shares_of_tokens_and_of_prompts(study: Study) -> None:
    rates = study_rates(study)
    assert rates.layer == LAYERS - 1
    assert (rates.tokens[ORBIT].count, rates.tokens[ORBIT].total) == (1, 38)  # padding is no token
    assert (rates.prompts[ORBIT].count, rates.prompts[ORBIT].total) == (1, 4)
    assert rates.prompts[ORBIT].interval == clopper_pearson(1, 4)
    assert rates.drivers == []  # the study has no eigenvalues
    assert rates.prompts[FIXED].count == 4  # a prompt counts for each kind that it has
    assert sum(share.count for share in rates.tokens) == 38
    assert study_rates(study, layer=0).tokens[ORBIT].count == 0
    assert rates.changed == {"window": (1, 40), "horizon": (0, 40), "seed": (0, 0)}
    assert token_shares(by_cluster([ORBIT, ORBIT, FIXED], ["a", "a", "b"]))[ORBIT].share == 2 / 3
    assert prompt_shares(np.full((2, 3), -1))[0].total == 0


@pytest.mark.parametrize(("rate", "not_yet"), [(0.95, 18), (0.5, 0)], ids=["shrinks at 2H", "is there"])
def test_unknown_tokens_of_a_prompt_that_still_settles_are_not_yet(rate: float, not_yet: int) -> None:
    codes = np.full((LAYERS, 2, 10), UNKNOWN, dtype=np.int8)
    codes[:, 1, 3:5] = FIXED
    assert study_rates(with_behaviour(looped_study(contracting(rate), prompts=2), codes)).not_yet == not_yet


def test_of_two_states_a_token_is_what_it_is_where_it_settles_least(study: Study) -> None:
    codes = study.dataset["verdict"].copy()
    codes[:, :2, :4] = FIXED
    codes[0, 0, 1], codes[-1, 0, 2], codes[0, 0, 3], codes[1, 0, 0] = ORBIT, ORBIT, UNKNOWN, ORBIT
    manifest = {**study.manifest, "model": {**study.manifest["model"], "other_states": [0]}}
    both = Study(study.dataset.assign(verdict=codes), manifest, study.tokens)
    # Layer 1 lies between the ends of the two states.
    assert token_kinds(both)[0, :4].tolist() == [FIXED, ORBIT, ORBIT, UNKNOWN]
    rates = study_rates(both)
    assert (rates.layer, rates.other_layers) == (LAYERS - 1, (0,))
    assert rates.tokens[ORBIT].count == study_rates(both, layer=LAYERS - 1).tokens[ORBIT].count + 1
    settle, _ = prompts_by_verdict(view_study(both))
    assert not settle[0]
    answer = behaviour_answer(view_study(both), Criterion())
    assert f"layers 0 and {LAYERS - 1} (a token is what it is at the one where it settles least)" in answer.sentence


def test_what_chance_would_find_stands_beside_the_rates(study: Study) -> None:
    found = study_rates(study).discoveries
    assert found is not None
    assert found.tests == LAYERS * 38  # all layers are looked at, whichever is asked for
    assert found.expected == pytest.approx(1e-4 * LAYERS * 38)
    assert found.surviving[Kind.ORBIT] == (1, 1)
    weak = study.dataset["verdict_p_value"].where(study.dataset["verdict"] != ORBIT, 0.9)
    few = study.dataset["verdict_p_value"].where(study.dataset["verdict"] == ORBIT, 0.9)
    for p_values, left in ((weak, 0), (few, 1), (few.where(few > 0.5, 1e-3), 0)):
        changed = Study(study.dataset.assign(verdict_p_value=p_values), study.manifest, study.tokens)
        discoveries = study_rates(changed).discoveries
        assert discoveries is not None
        assert discoveries.surviving[Kind.ORBIT] == (left, 1)
    assert study_rates(study, method="cosine").discoveries is None


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
        "beginning of text": [],
        "question": [3, 4, 5],
        "system prompt": [0, 1, 2],
        "digits": [3],
        "punctuation": [5],
        "generated": [],
        "last token": [6],
    }
    assert np.flatnonzero(roles["question"][1]).tolist() == [0, 1]
    assert np.flatnonzero(roles["last token"][1]).tolist() == [1]


def test_the_question_compares_the_same_tokens_with_and_without_a_system_prompt() -> None:
    """Without one, the beginning of the text stands before the question alone."""
    plain = {"token_ids": [1, 7, 8, 9], "system_tokens": 0}
    persona = {"token_ids": [1, 4, 5, 7, 8, 9], "system_tokens": 3}
    roles = token_roles([plain, persona], 6, bos=1)
    assert [np.flatnonzero(row).tolist() for row in roles["question"]] == [[1, 2, 3], [3, 4, 5]]
    assert [np.flatnonzero(row).tolist() for row in roles["beginning of text"]] == [[0], [0]]
    assert [np.flatnonzero(row).tolist() for row in roles["system prompt"]] == [[], [1, 2]]


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
    assert orbit["low"] < 1 / 38 < orbit.pop("high")
    del orbit["low"]
    assert orbit == {
        "kind": "orbit", "count": 1, "decided": 38, "undecided": 0, "share": 1 / 38, "least": 1 / 38, "most": 1 / 38
    }  # fmt: skip
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
