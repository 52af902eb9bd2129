"""Stopping rules: what they mean, how they are read, chosen and kept in files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from loopscope.answers.calibration import CalibratedRule, calibrate_exit, rule_table, rules_of_one_signal
from loopscope.answers.exit_rules import exit_costs, quantities, readouts_of
from loopscope.answers.exit_signals import SIGNALS
from loopscope.answers.stopping import Condition, StoppingRule
from loopscope.cli import main
from loopscope.errors import ConfigError, StorageError, StudyError
from loopscope.study import Study
from synthetic_study import contracting, feed_forward_study, looped_study

Array = NDArray[np.float64]


@given(
    step=arrays.arrays(np.float64, (6, 3), elements=st.sampled_from([0.1, 0.5, np.nan])),
    margin=arrays.arrays(np.float64, (6, 3), elements=st.sampled_from([0.1, 0.5, np.nan])),
    joiner=st.sampled_from("&|"),
    patience=st.integers(1, 7),
    least=st.integers(1, 7),
)
def test_a_token_stops_where_the_conditions_have_held_long_enough(
    step: Array, margin: Array, joiner: str, patience: int, least: int
) -> None:
    rule = StoppingRule.parse(f"step <= 0.2 {joiner} margin >= 0.4", patience=patience, least=least)
    found = rule.stop_times({"token_relative_step": step, "token_margin": margin})
    join = all if joiner == "&" else any
    for token in range(3):
        held = [join((step[t, token] <= 0.2, margin[t, token] >= 0.4)) for t in range(6)]
        wanted = next((t for t in range(max(least, patience), 6) if all(held[t - patience : t])), 6)
        assert found[token] == wanted


@given(known=arrays.arrays(np.float64, (6, 4), elements=st.floats(0, 3)), t=st.integers(1, 6))
def test_signals_know_nothing_of_later_recurrences(known: Array, t: int) -> None:
    """What generation relies on: it asks after every recurrence anew."""
    for signal in SIGNALS.values():
        names = dict.fromkeys(signal.variables, known)
        early = signal.of({name: values[:t] for name, values in names.items()})
        np.testing.assert_array_equal(signal.of(names)[:t], early, err_msg=signal.key)


def test_contraction_is_the_sum_of_the_steps_to_come() -> None:
    steps = 3.0 * 0.5 ** np.arange(8.0)[:, None]
    found = SIGNALS["contraction"].of(
        {"token_successive_difference": steps, "token_residual_norm": np.full((8, 1), 2.0)}
    )
    assert np.isnan(found[0, 0])
    for t in range(1, 8):
        assert found[t, 0] == pytest.approx(sum(3.0 * 0.5**later for later in range(t + 1, 200)) / 2.0)
    growing = {"token_successive_difference": 1 / steps, "token_residual_norm": np.ones((8, 1))}
    assert np.isinf(SIGNALS["contraction"].of(growing)[1:]).all()


def test_rules_are_read_and_written_alike() -> None:
    rule = StoppingRule.parse("step<=0.03 & top1 >= 2", patience=2, least=3)
    assert rule.conditions == (Condition("step", 0.03), Condition("top1", 2.0))
    assert str(rule) == "step <= 0.03 & top1 >= 2 (2 in a row, from 3 on)"
    assert SIGNALS["top1"].condition(1.0).endswith("for 1 recurrence")
    assert StoppingRule.parse("entropy-change | kl").joined == "any"
    for text, message in {
        "loss <= 1": "Unknown exit signal 'loss'",
        "step <= 0.1 & kl <= 1 | top1 >= 2": "has & and |",
        "step >= 0.1": "stops where step <= a threshold",
        "step < 0.1": "cannot be read",
        "": "cannot be read",
        "step <= 1e": "is no number",
        "step <= 1e999": "must be a finite number",
        "step <= 0.1 & step <= 0.2": "names step more than once",
    }.items():
        with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
            StoppingRule.parse(text)
    for patience in (0, 1.5):
        with pytest.raises(ConfigError, match="1 or more"):
            StoppingRule.parse("step <= 1", patience=cast("Any", patience))


def test_a_rule_that_can_never_fire_is_refused() -> None:
    for text, settings in (
        ("top1 >= 7", {}),
        ("confidence >= 1.5", {}),
        ("step <= 1 & gate >= 2", {}),
        ("step <= 1", {"least": 8}),
        ("step <= 1", {"patience": 8}),
    ):
        with pytest.raises(ConfigError, match="never fires"):
            StoppingRule.parse(text, **settings).check_can_fire(8)
    for text in ("top1 >= 6", "step <= 1 | gate >= 2", "step <= 0"):
        StoppingRule.parse(text).check_can_fire(8)
    with pytest.raises(ConfigError, match="names no threshold of kl"):
        StoppingRule.parse("step <= 1 & kl").check_can_fire(8)


def test_a_token_whose_row_is_alone_says_nothing_by_its_attention() -> None:
    known = quantities(looped_study(contracting()).dataset)
    assert np.isnan(known["token_attention_change"][..., 0]).all()


# Chosen and kept


def test_thresholds_are_the_cheapest_within_tolerance_of_a_grid() -> None:
    study = looped_study(contracting())
    found = calibrate_exit(study, "step & top1 >= 1", loss=0.02, changed=0.1)
    known, readouts = quantities(study.dataset), readouts_of(study.dataset)
    chosen = slice(0, None, 2)
    threshold = found.rule.conditions[0].threshold

    def costs(step: float) -> tuple[float, bool]:
        rule = StoppingRule.parse(f"step <= {step!r} & top1 >= 1")
        each = exit_costs(rule.stop_times(known), readouts)
        kept = np.nanmean(each["loss_difference"][chosen]) <= 0.02 and each["changed"][chosen].mean() <= 0.1
        return float(each["recurrences"][chosen].mean()), bool(kept)

    assert threshold is not None
    fewest, kept = costs(threshold)
    assert kept
    assert found.choosing["recurrences"] == pytest.approx(fewest)
    steps = known["token_relative_step"][:, chosen].astype(np.float64)
    finer = [costs(float(each)) for each in np.nanquantile(steps, np.linspace(0, 1, 60))]
    # A grid of 81 thresholds: a finer one finds hardly anything cheaper.
    assert fewest <= min(mean for mean, kept in finer if kept) + found.recurrences / 40
    assert found.prompts["chosen_on"] == found.prompts["judged_on"] == 20


def test_a_rule_survives_its_file(tmp_path: Path) -> None:
    study = looped_study(contracting())
    found = calibrate_exit(study, "step | kl", loss=1.0, changed=0.3, patience=2).save(tmp_path / "rule.json")
    again = CalibratedRule.load(tmp_path / "rule.json")
    assert again.tolerance == {"loss": 1.0, "changed": 0.3}
    # What is shown is what was judged.
    assert StoppingRule.parse(str(again.rule).split(" (")[0], patience=2) == again.rule
    assert again == dataclasses.replace(found, prompts=dict(found.prompts))
    model = {**study.manifest["model"], "interventions": []}
    again.check_fits(model, None)
    for change, recurrences, message in (
        ({"weights_sha256": "0"}, None, "has other weights"),
        ({"dtype": "bfloat16"}, None, "was chosen in float32"),
        ({"interventions": ["damp=0.5"]}, None, "under other interventions"),
        ({}, 3, "for full runs of"),
    ):
        with pytest.raises(ConfigError, match=message):
            again.check_fits(model | change, recurrences)


@pytest.mark.parametrize("content", ["", "[]", '{"kind": "exit rule"}', "nonsense", '{"kind": "exit rule", "rule": 1}'])
def test_a_file_that_is_no_rule_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "rule.json").write_text(content)
    with pytest.raises(ConfigError):
        CalibratedRule.load(tmp_path / "rule.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        CalibratedRule.load(tmp_path / "none.json")


def test_what_cannot_be_chosen_says_why() -> None:
    study = looped_study(contracting())
    with pytest.raises(ConfigError, match="never fires before the last recurrence"):
        calibrate_exit(study, "margin >= 1000")
    with pytest.raises(ConfigError, match="can stop no token before the last"):
        calibrate_exit(study, "step", patience=1000)
    with pytest.raises(ConfigError, match="with least 99 can stop no token before the last of 4 recurrences"):
        rules_of_one_signal(study, least=99)
    with pytest.raises(ConfigError, match="a text or a StoppingRule, got 3"):
        calibrate_exit(study, cast("Any", 3))
    with pytest.raises(StudyError, match="lacks token_exit_cumulated"):
        calibrate_exit(study, "gate")
    with pytest.raises(StudyError, match="which takes 4 prompts, and 3 prompts stayed finite"):
        calibrate_exit(looped_study(contracting(), prompts=3), "step")
    with pytest.raises(ConfigError, match="At most 3 thresholds"):
        calibrate_exit(study, "step & kl & margin & entropy")
    silent = dataclasses.replace(study, dataset=study.dataset.drop_vars("token_kl_to_full"))
    with pytest.raises(StudyError, match="--exit-recurrences"):
        calibrate_exit(silent, "step")
    with pytest.raises(StudyError, match="the study's model is feed-forward"):
        calibrate_exit(feed_forward_study(), "step")


def test_the_command_shows_all_rules_and_writes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study: Study = looped_study(contracting()).save(tmp_path / "study")
    rows = rule_table(rules_of_one_signal(study)).rows
    assert len(rows) == len([each for each in SIGNALS.values() if set(each.variables) <= set(study.dataset)])
    main(["exits", str(tmp_path / "study"), "--json"])
    assert set(json.loads(capsys.readouterr().out)) <= set(SIGNALS)
    main(["exits", str(tmp_path / "study"), "--rule", "step & top1", "--out", str(tmp_path / "rule.json")])
    said = " ".join(capsys.readouterr().out.split())
    assert "on 20 prompts that it was not chosen on" in said
    found = CalibratedRule.load(tmp_path / "rule.json")
    assert found.rule.joined == "all"
    with pytest.raises(SystemExit):
        main(["exits", str(tmp_path / "study"), "--out", str(tmp_path / "rule.json")])
    found.save(tmp_path / "rule.json")  # a rule may be replaced
    with pytest.raises(StorageError, match="of another kind, which is not replaced"):
        found.save(tmp_path / "study/manifest.json")
    Study.load(tmp_path / "study")
