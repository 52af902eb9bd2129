"""Descriptions of models: what is accepted, what is refused by name, and the way to JSON and back."""

import json
import math
import subprocess
import sys
from typing import Any

import pytest

from loopscope import Architecture
from loopscope.errors import ConfigError
from loopscope.models.architecture import LinearScaling, Llama3Scaling, YarnScaling
from pairwise import pairwise
from random_model import random_architecture

SCALING: dict[str, Any] = {
    "kind": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_positions": 8192,
}

CASES = pairwise(
    {
        "injection": ["none", "linear", "add"],
        "norm_placement": ["pre", "residual", "branch-in-out", "branch-out"],
        "rope_scaling": [
            None,
            Llama3Scaling(**SCALING),
            LinearScaling(factor=2.0),
            YarnScaling(factor=4.0, original_max_positions=16, attention_factor=1.1),
        ],
        "window": [{}, {"sliding_window": 3}, {"sliding_window": 3, "full_attention_layers": (0, 2)}],
        "max_positions": [None, 64],
        "tied_embeddings": [False, True],
        "embedding_scale": [1.0, 0.1 + 0.2],
    }
)


@pytest.mark.parametrize("changes", CASES, ids=range(len(CASES)))
def test_json_and_back_is_the_same_architecture(changes: dict[str, Any]) -> None:
    window = changes.pop("window")
    architecture = random_architecture(**changes, **window)
    assert Architecture.from_dict(json.loads(json.dumps(architecture.to_dict()))) == architecture


def test_whole_numbers_may_be_written_either_way() -> None:
    fields = random_architecture().to_dict() | {"rope_base": 500000, "width": 12.0}
    architecture = Architecture.from_dict(fields)
    assert architecture.width == 12
    assert isinstance(architecture.width, int)
    assert isinstance(architecture.rope_base, float)


def test_fields_with_a_default_may_be_left_out() -> None:
    fields = random_architecture().to_dict()
    del fields["norm_eps"]
    assert Architecture.from_dict(fields).norm_eps == 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widht": 12}, "Unknown field 'widht' in the Architecture; known fields are vocab_size, width,"),
        ({"width": "12"}, "field 'width' of the Architecture must be int, got '12'"),
        ({"width": 12.5}, "field 'width' of the Architecture must be int, got 12.5"),
        ({"width": True}, "field 'width' of the Architecture must be int, got True"),
        ({"width": None}, "field 'width' of the Architecture must be int, got None"),
        ({"qk_bias": 1}, "field 'qk_bias' of the Architecture must be bool, got 1"),
        ({"max_positions": "many"}, "field 'max_positions' of the Architecture must be int or null"),
        (
            {"injection": "linaer"},
            "field 'injection' of the Architecture must be one of none, linear, add, bounded, diagonal, got 'linaer'",
        ),
        ({"injection": ["linear"]}, "'injection' of the Architecture must be one of none, linear, add"),
        ({"rope_scaling": SCALING | {"beta": 1}}, "Unknown field 'beta' in the Llama3Scaling"),
        (
            {"rope_scaling": {"kind": "llama3", "factor": 8.0}},
            "The Llama3Scaling lacks the field 'low_freq_factor'",
        ),
        (
            {"rope_scaling": {"factor": 8.0}},
            "'kind' of 'rope_scaling' of the Architecture must be one of llama3, linear, yarn, got None",
        ),
        ({"rope_scaling": SCALING | {"factor": "8"}}, "field 'factor' of the Llama3Scaling must be float"),
        ({"rope_scaling": 8}, "field 'rope_scaling' of the Architecture must be an object, got 8"),
    ],
)
def test_json_that_does_not_fit_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Architecture.from_dict(random_architecture().to_dict() | changes)


def test_a_missing_field_is_named() -> None:
    fields = random_architecture().to_dict()
    del fields["heads"]
    with pytest.raises(ConfigError, match="The Architecture lacks the field 'heads'"):
        Architecture.from_dict(fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"recurrences": 0}, "recurrences must be at least 1, got 0"),
        ({"coda": -1}, "coda must not be negative, got -1"),
        ({"width": 10**15}, "width must be at most 1000000, got 1000000000000000"),
        ({"prelude": 10**9}, "prelude must be at most 1000, got 1000000000"),
        ({"prelude": 0, "recurrent": 0, "coda": 0}, "at least one layer"),
        ({"heads": 3}, r"heads \(3\) must be a multiple of kv_heads \(2\)"),
        ({"head_dim": 5}, "a rotated head needs an even head_dim, got 5"),
        ({"norm_eps": 0.0}, "norm_eps must be a positive finite number, got 0.0"),
        ({"state_std": float("nan")}, "state_std must be a positive finite number, got nan"),
        ({"rope_base": float("inf")}, "rope_base must be a positive finite number, got inf"),
        ({"recurrent": 0}, "injection is 'linear', but a model without recurrent layers has no loop"),
        ({"recurrent": 0, "injection": "none"}, "state_init is 'normal', but a model without"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        random_architecture(**changes)


def test_a_choice_that_does_not_exist_is_refused_where_no_type_checker_is_on() -> None:
    # In this process one is, and refuses it first.
    script = f"""
from loopscope.models.architecture import Architecture
from loopscope.errors import ConfigError
try:
    Architecture(**{random_architecture().to_dict() | {"norm_placement": "post"}!r})
except ConfigError as error:
    print(error)
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    expected = "norm_placement takes pre, residual, branch-in-out or branch-out, got 'post'"
    assert expected in process.stdout


@pytest.mark.parametrize(
    "changes",
    [
        {"factor": 0.5},
        {"factor": math.nan},
        {"factor": math.inf},
        {"low_freq_factor": 4.0},
        {"low_freq_factor": 0.0},
        {"high_freq_factor": math.inf},
        {"original_max_positions": 0},
    ],
)
def test_a_rotary_scaling_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is not a llama3 scaling"):
        Llama3Scaling(**(SCALING | changes))


@pytest.mark.parametrize(
    "changes",
    [{"factor": math.nan}, {"attention_factor": math.nan}, {"attention_factor": 0.0}, {"original_max_positions": 0}],
)
def test_a_yarn_scaling_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is not a YaRN scaling: it needs factor >= 1 and attention_factor > 0"):
        YarnScaling(**({"factor": 4.0, "original_max_positions": 32, "attention_factor": 1.0} | changes))


def test_an_odd_head_is_fine_where_nothing_is_rotated() -> None:
    assert random_architecture(head_dim=5, rotary="none").head_dim == 5


def test_the_layout_is_the_papers_notation() -> None:
    looped = random_architecture(prelude=2, recurrent=4, coda=2, recurrences=8)
    assert looped.layout == "(2, 4 ⊗ 8, 2)_I"
    assert random_architecture(injection="none").layout == "(1, 2 ⊗ 3, 1)"
    assert (looped.layers, looped.visits(8), looped.visits(32)) == (8, 36, 132)
    feed_forward = random_architecture(
        prelude=6, recurrent=0, coda=2, recurrences=1, injection="none", state_init="embeddings"
    )
    assert feed_forward.layout == "8 layers, feed-forward"
    assert not feed_forward.is_looped
    assert feed_forward.visits(1) == 8
