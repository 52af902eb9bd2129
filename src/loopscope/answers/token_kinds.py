"""What each token of a study tends to, where several layers and methods have an opinion of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopscope.dynamics.prediction import PREDICTED_KINDS
from loopscope.dynamics.prediction import PredictedKind as Predicted
from loopscope.dynamics.verdicts import KINDS, MOVING_CODES, Kind
from loopscope.errors import StudyError
from loopscope.study import Study

_UNKNOWN = KINDS.index(Kind.UNKNOWN)
_LEAD_AWAY = [PREDICTED_KINDS.index(each) for each in (Predicted.ORBIT, Predicted.PERIOD_TWO, Predicted.UNSTABLE)]
_MOVES = 3.0
"""Times the noise floor."""


def token_kinds(study: Study, method: str = "displacement") -> NDArray[np.integer]:
    """What each token tends to, (prompt, token), as places in `KINDS`: after the last recurrent layer, and in a model
    in which several states go around after whichever of their last layers it settles least.

    Raises `StudyError` for a study without verdicts.
    """
    codes = verdict_codes(study, method)
    layers = study.dataset["judged_layer"].values.tolist()
    return at_places(least_settled(codes, [layers.index(each) for each in ends_of_states(study)]), codes)


def verdict_codes(study: Study, method: str) -> NDArray[np.integer]:
    """Of every judged layer, (judged_layer, prompt, token); unknown where the displacement method sees an approach to a
    point that `led_away` contradicts. Raises `StudyError` as `token_kinds` does."""
    name = {"displacement": "verdict", "cosine": "verdict_cosine"}.get(method)
    if name is None:
        raise StudyError(f"method is displacement or cosine, got {method!r}.")
    if name not in study.dataset:
        raise StudyError(
            "The study has no verdicts: its model has no loop, the part behaviour was skipped, or it was made by an "
            "older loopscope; run `loopscope analyze` into a new folder."
        )
    codes = study.dataset[name].transpose("judged_layer", "prompt", "token").values
    return np.asarray(codes if method == "cosine" else np.where(led_away(study), _UNKNOWN, codes))


def led_away(study: Study) -> NDArray[np.bool_]:
    """Where a token seems to approach a point, and its eigenvalue there is known to lead away, (judged_layer, prompt,
    token): what comes down to an orbit about a point looks like an approach to it for as long as it shrinks."""

    def values(*names: str) -> list[NDArray[Any]]:
        return [study.dataset[name].transpose(..., "prompt", "token").values for name in names]

    verdict, level, floor = values("verdict", "verdict_level", "verdict_floor")
    if "predicted_kind" not in study.dataset:
        return np.zeros(verdict.shape, dtype=bool)
    kind, rate, error = values("predicted_kind", "predicted_rate", "predicted_rate_error")
    away = np.isin(kind, _LEAD_AWAY) & (rate - error > 1)
    # A state that rests may stand on a point that repels.
    return np.asarray(away & (verdict == KINDS.index(Kind.FIXED_POINT)) & (level > _MOVES * floor))


def ends_of_states(study: Study) -> list[int]:
    """The judged layers after which a state that goes around is whole; the last is that of the loop state."""
    layers = [int(each) for each in study.dataset["judged_layer"].values]
    others = study.manifest["model"].get("other_states", ())
    return [*(layer for layer in layers[:-1] if layer in others), layers[-1]]


def least_settled(codes: NDArray[np.integer], places: Sequence[int]) -> NDArray[np.integer]:
    """Of these places along the first dimension the one at which a token moves, else one where it is unknown; where
    they are alike the last."""
    backwards = np.array(places[::-1])
    there = codes[backwards]
    ranks = np.where(np.isin(there, MOVING_CODES), 2, np.where(there == _UNKNOWN, 1, 0))
    return np.asarray(backwards[ranks.argmax(0)])


def at_places(places: NDArray[np.integer], values: NDArray[Any]) -> NDArray[Any]:
    """Of `values`, (judged_layer, prompt, token), those at the place of each token."""
    return np.asarray(np.take_along_axis(values, places[None], axis=0)[0])
