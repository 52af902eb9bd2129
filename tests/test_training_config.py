"""Training configurations: what is accepted, and what is said of the rest."""

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from loopscope._util.config_json import differences
from loopscope.errors import ConfigError
from loopscope.experiments.training.config import TrainConfig

DEMO_CONFIGS = Path(str(files("loopscope"))) / "demo" / "configs"

MINIMAL: dict[str, Any] = {
    "architecture": {
        "vocab_size": 300,
        "width": 16,
        "heads": 2,
        "kv_heads": 2,
        "head_dim": 8,
        "mlp_width": 32,
        "prelude": 1,
        "recurrent": 1,
        "coda": 0,
    },
    "data": {"train": "train.txt", "test": "test.txt"},
    "steps": 10,
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The minimal configuration with one entry set, by its dotted name."""
    fields: dict[str, Any] = json.loads(json.dumps(MINIMAL))
    *parents, last = path.split(".")
    place = fields
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    return fields


@pytest.mark.parametrize(
    ("name", "layout"),
    [("injected", "(2, 4 ⊗ 8, 2)_I"), ("uninjected", "(0, 8 ⊗ 4, 0)"), ("feedforward", "8 layers, feed-forward")],
)
def test_the_shipped_configurations_load_and_survive_a_round_trip(name: str, layout: str) -> None:
    config = TrainConfig.load(DEMO_CONFIGS / f"{name}.json")
    assert config.architecture.layout == layout
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_demo_models_of_text_share_it_and_their_vocabulary_so_that_they_share_a_tokenizer() -> None:
    every = {path.stem: TrainConfig.load(path) for path in DEMO_CONFIGS.glob("*.json")}
    configs = [every.pop(name) for name in ("injected", "uninjected", "feedforward")]
    assert every.keys() == {"permutations", "addition"}
    assert len({(config.data, config.architecture.vocab_size) for config in configs}) == 1


def test_whole_floats_are_integers_and_integers_are_floats() -> None:
    assert TrainConfig.from_dict(changed("steps", 12.0)).steps == 12
    assert TrainConfig.from_dict(changed("optimizer.peak_lr", 1)).optimizer.peak_lr == 1.0


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("stepz", 3, "'stepz'"),
        ("optimizer.lr", 0.1, "'lr'"),
        ("architecture.depth", 3, "'depth'"),
        ("steps", "many", "'steps' of the training configuration must be int, got 'many'"),
        ("steps", True, "'steps'"),
        ("steps", 2.5, "'steps'"),
        ("steps", 0, "steps must be at least 1"),
        ("data", ["train.txt"], "must be an object"),
        ("optimizer.betas", [0.9], "must be a list of float"),
        ("optimizer.betas", [0.9, 1.0], "betas must be below 1, got 1.0"),
        ("optimizer.decay", "stepwise", "one of cosine, linear, constant"),
        ("optimizer.peak_lr", float("nan"), "peak_lr must be a positive finite number"),
        ("recurrences.distribution", "uniform", "one of constant, poisson-lognormal"),
        ("recurrences.backprop_last", 0, "backprop_last must be at least 1"),
        ("evaluation.recurrences", [], "evaluation.recurrences"),
        ("architecture.max_positions", 32, "longer than the model's max_positions of 32"),
    ],
)
def test_an_unusable_field_is_named(path: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig.from_dict(changed(path, value))


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match="'steps'"):
        TrainConfig.from_dict({name: value for name, value in MINIMAL.items() if name != "steps"})


@pytest.mark.parametrize(("path", "value"), [("recurrences.cap", 4), ("evaluation.recurrences", [1, 2])])
def test_a_feed_forward_model_refuses_settings_of_recurrences(path: str, value: Any) -> None:
    fields = changed(path, value)
    fields["architecture"]["recurrent"] = 0
    with pytest.raises(ConfigError, match="without recurrent layers"):
        TrainConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: None, "cannot be read"),
        (lambda path: path.write_text("{"), "not valid JSON"),
        (lambda path: path.write_text("[]"), "must be an object"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, write: Callable[[Path], object], said: str) -> None:
    path = tmp_path / "train.json"
    write(path)
    with pytest.raises(ConfigError, match=said) as caught:
        TrainConfig.load(path)
    assert str(path) in str(caught.value)


def test_differences_are_named_by_their_place() -> None:
    first = {"a": 1, "b": {"c": [1, 2], "d": 0}, "e": None}
    second = {"a": 1, "b": {"c": [1, 3], "d": 0}, "f": 2}
    assert list(differences(first, second)) == ["b.c", "f"]
