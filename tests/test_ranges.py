"""Ranges that settings declare beside their fields."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import pytest

from loopscope._util.ranges import Count, Positive, Range, check_ranges
from loopscope.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings:
    free: int = -1
    steps_taken: Count = 1
    most_steps: Count | None = None
    at: tuple[Annotated[int, Range(0, why="since steps count from 0")], ...] = ()
    scale: Positive = 1.0
    share: Annotated[float, Range(above=0, below=1)] = 0.5
    limit: Annotated[float, Range(0, infinite=True)] = 0.0
    shift: Annotated[float, Range()] = 0.0
    some: Annotated[float, Range(above=2, most=3)] = 3.0
    how: Count | Literal["auto", "none"] = "auto"
    where: Path | None = None
    whether: bool = False
    words: tuple[Literal["one", "two"], ...] = ()

    def __post_init__(self) -> None:
        check_ranges(self, "--")


@pytest.mark.parametrize(
    "fields",
    [
        {"free": -5, "steps_taken": 7, "most_steps": 1, "at": (0, 3)},
        {"how": 3, "where": "a/path", "whether": True, "words": ["one"], "scale": 2},
        {"scale": 1e-300, "share": 0.999, "limit": float("inf"), "shift": -4.0, "some": 2.1},
    ],
)
def test_what_is_within_its_range_is_taken(fields: dict[str, Any]) -> None:
    Settings(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps_taken": 0}, "--steps-taken must be at least 1, got 0."),
        ({"most_steps": 0}, "--most-steps must be at least 1, got 0."),
        ({"at": (2, -1)}, "--at must not be negative, since steps count from 0, got -1."),
        ({"scale": 0.0}, "--scale must be a positive finite number, got 0.0."),
        ({"scale": float("inf")}, "--scale must be a positive finite number, got inf."),
        ({"share": 1.0}, "--share must be below 1, got 1.0."),
        ({"share": float("nan")}, "--share must be a positive finite number, got nan."),
        ({"limit": -0.5}, "--limit must not be negative, got -0.5."),
        ({"limit": float("nan")}, "--limit must not be negative, got nan."),
        ({"shift": float("inf")}, "--shift must be a finite number, got inf."),
        ({"some": 2.0}, "--some must be above 2, got 2.0."),
        ({"some": 3.5}, "--some must be at most 3, got 3.5."),
        ({"steps_taken": "4"}, "--steps-taken takes a whole number, got '4'."),
        ({"most_steps": 4.0}, "--most-steps takes a whole number, got 4.0."),
        ({"free": True}, "--free takes a whole number, got True."),
        ({"scale": "much"}, "--scale takes a number, got 'much'."),
        ({"how": "often"}, "--how takes a whole number, auto or none, got 'often'."),
        ({"where": 5}, "--where takes a path, got 5."),
        ({"whether": 1}, "--whether takes True or False, got 1."),
        ({"words": "one"}, "--words takes several values, in a tuple or a list, got 'one'."),
        ({"words": ["one", "six"]}, "--words takes one or two, got 'six'."),
    ],
)
def test_what_is_outside_is_named_with_its_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings(**fields)
    assert str(caught.value) == message


def test_a_list_is_the_tuple_that_it_stands_for() -> None:
    assert Settings(at=cast(Any, [0, 3])) == Settings(at=(0, 3))
