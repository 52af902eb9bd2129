"""How many tokens, and how many prompts, tend to what: shares of a study's verdicts, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from loopscope.dynamics.verdicts import KINDS, Kind
from loopscope.errors import StudyError
from loopscope.study import Study

ROLES = ("question", "system prompt", "digits", "punctuation", "last token")
"""Of tokens; one token can have several. The question is what lies between system prompt and suffix."""

_LEVEL = 0.95


def clopper_pearson(successes: int, trials: int, level: float = _LEVEL) -> tuple[float, float]:
    """The exact interval of a proportion, as fractions (Clopper and Pearson, Biometrika 26, 1934).

    It covers the true share with at least the probability `level`, however rare it is; from no trials, (0, 1).
    """
    if trials == 0:
        return 0.0, 1.0
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(special.betaincinv(successes, trials - successes + 1, tail))
    high = 1.0 if successes == trials else float(special.betaincinv(successes + 1, trials - successes, 1 - tail))
    return low, high


@dataclass(frozen=True, slots=True)
class KindShare:
    """How many of how many tend to this."""

    kind: Kind
    count: int
    total: int

    @property
    def share(self) -> float:
        return self.count / self.total if self.total else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Clopper-Pearson interval. Tokens of one prompt depend on each other, so that of a share of tokens is too
        narrow; that of a share of prompts is not."""
        return clopper_pearson(self.count, self.total)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Shares of the kinds at one layer."""

    layer: int
    """Recurrent layer."""
    method: str
    tokens: list[KindShare]
    prompts: list[KindShare]
    """Prompts with at least one such token; they add up to more than 1."""
    roles: dict[str, list[KindShare]]
    """Of the tokens of each role."""
    changed: dict[str, tuple[int, int]]
    """By what a verdict was tried against (window, horizon, seed): how many changed, of how many tried."""


def study_rates(study: Study, *, layer: int | None = None, method: str = "displacement") -> Rates:
    """Shares at a recurrent layer, the last one judged unless given.

    Raises `StudyError` for a study without verdicts, or without those of the layer.
    """
    codes = _codes(study, method)
    layers = [int(each) for each in study.dataset["judged_layer"].values]
    chosen = layers[-1] if layer is None else layer
    if chosen not in layers:
        raise StudyError(f"Layer {chosen} was not judged; the study has verdicts of the layers {layers}.")
    place = layers.index(chosen)
    there = codes[place]
    roles = token_roles(study.tokens, there.shape[1])
    changes = study.dataset["verdict_changes"].transpose("change", "judged_layer", "prompt", "token")
    tried = {
        str(name): changes.sel(change=name).values[place]
        for name in changes["change"].values
        if method == "displacement"
    }
    return Rates(
        layer=chosen,
        method=method,
        tokens=token_shares(there[there >= 0]),
        prompts=prompt_shares(there),
        roles={name: token_shares(there[mask & (there >= 0)]) for name, mask in roles.items()},
        changed={name: (int((found == 1).sum()), int((found >= 0).sum())) for name, found in tried.items()},
    )


def token_shares(codes: NDArray[np.integer]) -> list[KindShare]:
    """Shares among tokens, from their places in `KINDS`."""
    return [KindShare(kind, int((codes == index).sum()), int(codes.size)) for index, kind in enumerate(KINDS)]


def prompt_shares(codes: NDArray[np.integer]) -> list[KindShare]:
    """Shares of the prompts with at least one such token, from places in `KINDS`, (prompt, token); below 0 none."""
    total = int((codes >= 0).any(-1).sum())
    return [KindShare(kind, int((codes == index).any(-1).sum()), total) for index, kind in enumerate(KINDS)]


def co_occurrence(study: Study, method: str = "displacement") -> NDArray[np.float64]:
    """`P(b at some layer | a at some layer)` of the same token, (a, b) in the order of `KINDS`; NaN for an `a` that no
    token has at any layer. Raises `StudyError` for a study without verdicts."""
    codes = _codes(study, method)
    seen = np.stack([(codes == index).any(0) for index in range(len(KINDS))]).reshape(len(KINDS), -1).astype(np.float64)
    both = seen @ seen.T
    with np.errstate(invalid="ignore"):
        return np.asarray(both / np.diagonal(both)[:, None])


def token_roles(tokens: Sequence[Mapping[str, Any]], longest: int) -> dict[str, NDArray[np.bool_]]:
    """Which tokens have which role, (prompt, token) each, from the lines of `tokens.jsonl`."""
    roles = {name: np.zeros((len(tokens), longest), dtype=np.bool_) for name in ROLES}
    for row, prompt in enumerate(tokens):
        count = len(prompt["token_ids"])
        system, suffix = int(prompt.get("system_tokens") or 0), int(prompt.get("suffix_tokens") or 0)
        roles["system prompt"][row, :system] = True
        roles["question"][row, system : count - suffix] = True
        roles["last token"][row, count - 1] = True
        for place, piece in enumerate(prompt.get("token_strings") or ()):
            text = str(piece).strip()
            roles["digits"][row, place] = bool(text) and text.isdigit()
            roles["punctuation"][row, place] = bool(text) and not any(char.isalnum() for char in text)
    return roles


def _codes(study: Study, method: str) -> NDArray[np.integer]:
    name = {"displacement": "verdict", "cosine": "verdict_cosine"}.get(method)
    if name is None:
        raise StudyError(f"method is displacement or cosine, got {method!r}.")
    if name not in study.dataset:
        raise StudyError(
            "The study has no verdicts: its model has no loop, the part behaviour was skipped, or it was made by an "
            "older loopscope; run `loopscope analyze` into a new folder."
        )
    return np.asarray(study.dataset[name].transpose("judged_layer", "prompt", "token").values)
