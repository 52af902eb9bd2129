"""How many tokens, drivers and prompts tend to what: shares of a study's verdicts, with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopscope._util.statistics import clopper_pearson, cluster_interval, surviving
from loopscope._util.wording import listed
from loopscope.answers.answer import Criterion
from loopscope.answers.predictions import token_drivers
from loopscope.answers.settling import Settling, horizon_settling
from loopscope.answers.token_kinds import at_places, ends_of_states, least_settled, verdict_codes
from loopscope.dynamics.verdicts import KINDS, Kind
from loopscope.errors import StudyError
from loopscope.study import Study, StudyView, trusted, view_study

ROLES = ("beginning of text", "question", "system prompt", "digits", "punctuation", "generated", "last token")
"""Of tokens; one token can have several, but that of the beginning of text neither is of the question nor of the system
prompt. The question is what lies between system prompt and suffix;
generated is what the model wrote itself."""
STRUCTURED = (Kind.ORBIT, Kind.SLIDER)
"""Kinds that are found by their shape, which noise may show by chance."""
FALSE_DISCOVERIES = 0.05
"""Rate to which false ones among the shapes that are found are held."""
_UNKNOWN = KINDS.index(Kind.UNKNOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class KindShare:
    """How many of how many tend to this."""

    kind: Kind
    count: int
    decided: int
    """Those whose kind is known, of which `count` is a share. Of `Kind.UNKNOWN` itself: all."""
    undecided: int
    """Others that may have this kind as well."""
    interval: tuple[float, float]
    """95 % interval of the share of all, whatever kind the undecided have: its lower end if none of them has this one,
    its upper end if all of them have."""

    @property
    def total(self) -> int:
        return self.decided + self.undecided

    @property
    def share(self) -> float:
        """Of those that are decided."""
        return self.count / self.decided if self.decided else float("nan")

    @property
    def bracket(self) -> tuple[float, float]:
        """Share of all that was found, and that with the undecided."""
        if not self.total:
            return float("nan"), float("nan")
        return self.count / self.total, (self.count + self.undecided) / self.total


@dataclass(frozen=True, slots=True, kw_only=True)
class Discoveries:
    """What chance would find among the shapes of a study's tokens."""

    tests: int
    """Tokens times layers."""
    expected: float
    """Shapes that noise alone would show: the significance of one token times the tests."""
    surviving: Mapping[Kind, tuple[int, int]]
    """Of each structured kind, at one layer: how many survive a control of the false discovery rate over all tokens and
    layers, of how many."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Shares of the kinds at one layer, or at those that end the states of a model in which several go around."""

    layer: int
    """Recurrent layer."""
    other_layers: tuple[int, ...]
    """Those that end another state: a token is what it is at that of all these where it settles least."""
    method: str
    tokens: list[KindShare]
    drivers: list[KindShare]
    """The same with tokens that are driven by an earlier one counted with it, for each kind that one of them has; empty
    where no eigenvalue of a fixed point is known."""
    prompts: list[KindShare]
    """Prompts with at least one such token; they add up to more than 1."""
    roles: dict[str, list[KindShare]]
    """Of the tokens of each role."""
    discoveries: Discoveries | None
    """None for a method or a study without p-values."""
    changed: dict[str, tuple[int, int]]
    """By what a verdict was tried against (the coordinate `change`): how many changed, of how many tried."""
    not_yet: int
    """Tokens that cannot be told, of prompts whose steps still shrink at 2H: a longer horizon tells."""

    @property
    def where(self) -> str:
        """`recurrent layer 7`."""
        if not self.other_layers:
            return f"recurrent layer {self.layer}"
        others = listed([f"{layer}" for layer in (*self.other_layers, self.layer)])
        return f"recurrent layers {others} (a token is what it is at the one where it settles least)"


def study_rates(study: Study, *, layer: int | None = None, method: str = "displacement") -> Rates:
    """Shares at a recurrent layer, the last one judged unless given.

    Raises `StudyError` for a study without verdicts, or without those of the layer.
    """
    with trusted([study]):
        return _rates(view_study(study), layer, method)


@lru_cache(maxsize=2)  # by two methods, each of which several figures and an answer ask for
def view_rates(view: StudyView, method: str) -> Rates:
    """Those at the last layer judged, of a study that has been looked at."""
    with trusted([view.study]):
        return _rates(view, None, method)


def _rates(view: StudyView, layer: int | None, method: str) -> Rates:
    study = view.study
    codes = verdict_codes(study, method)
    layers = [int(each) for each in study.dataset["judged_layer"].values]
    chosen = ends_of_states(study) if layer is None else [layer]
    if not set(chosen) <= set(layers):
        raise StudyError(f"Layer {chosen[0]} was not judged; the study has verdicts of the layers {layers}.")
    places = least_settled(codes, [layers.index(each) for each in chosen])
    there = at_places(places, codes)
    bos = (study.manifest.get("tokenizer") or {}).get("bos")
    roles = token_roles(study.tokens, there.shape[1], None if bos is None else int(bos["id"]))
    changes = study.dataset["verdict_changes"].transpose("change", "judged_layer", "prompt", "token")
    displaced = method == "displacement"
    tried = {
        str(name): at_places(places, changes.sel(change=name).values) for name in changes["change"].values if displaced
    }
    drivers = token_drivers(study.dataset) if "predicted_kind" in study.dataset else np.full(there.shape, -1)
    return Rates(
        layer=chosen[-1],
        other_layers=tuple(chosen[:-1]),
        method=method,
        tokens=token_shares(there),
        drivers=driver_shares(there, drivers) if (drivers >= 0).any() else [],
        prompts=prompt_shares(there),
        roles={name: token_shares(np.where(mask, there, -1)) for name, mask in roles.items()},
        discoveries=_discoveries(study, places) if displaced else None,
        changed={name: (int((found == 1).sum()), int((found >= 0).sum())) for name, found in tried.items()},
        not_yet=_not_yet(view, there),
    )


def _not_yet(view: StudyView, codes: NDArray[np.integer]) -> int:
    if not (codes == _UNKNOWN).any():
        return 0
    shrink = [kind is Settling.NOT_YET for kind in horizon_settling(view, Criterion())]
    return int((codes[shrink] == _UNKNOWN).sum())


def by_cluster(codes: Sequence[int], clusters: Sequence[Hashable]) -> NDArray[np.int64]:
    """Verdicts of things that come from clusters, such as trajectories from files, as (cluster, thing), -1 beyond."""
    rows: dict[Hashable, list[int]] = {}
    for code, cluster in zip(codes, clusters, strict=True):
        rows.setdefault(cluster, []).append(code)
    found = np.full((len(rows), max(map(len, rows.values()), default=0)), -1, dtype=np.int64)
    for row, of_cluster in enumerate(rows.values()):
        found[row, : len(of_cluster)] = of_cluster
    return found


def token_shares(codes: NDArray[np.integer]) -> list[KindShare]:
    """Shares among tokens, from their places in `KINDS`, (prompt, token); below 0 none. Intervals are those of tokens
    that depend on each other within a prompt (see `cluster_interval`)."""
    counts = np.stack([(codes == index).sum(-1) for index in range(len(KINDS))])
    return _shares(counts, counts.sum(0), cluster_interval)


def prompt_shares(codes: NDArray[np.integer]) -> list[KindShare]:
    """Shares of the prompts with at least one such token, likewise; intervals are exact (Clopper and Pearson). A prompt
    is undecided about a kind if none of its tokens has it and one is unknown."""
    has = np.stack([(codes == index).any(-1) for index in range(len(KINDS))]).astype(np.int64)
    return _shares(has, np.max(has, axis=0), _exact)


def driver_shares(codes: NDArray[np.integer], drivers: NDArray[np.integer]) -> list[KindShare]:
    """Shares of drivers: a token whose own eigenvalue sets its rate, with all later tokens that follow it. It counts
    for each kind that one of them has, and is undecided about a kind as a prompt is.

    `drivers`, (prompt, token), is the place of the token that drives each (see `token_drivers`), -1 where it is not
    known: such tokens of a prompt count as driven by one.
    """
    shape = (len(KINDS), len(codes), codes.shape[1] + 1)
    has = np.zeros(shape, dtype=np.int64)
    prompt, token = np.nonzero(codes >= 0)
    has[codes[prompt, token], prompt, drivers[prompt, token]] = 1  # -1 is the place beyond the last token
    return _shares(has.reshape(len(KINDS), -1), has.any(0).ravel().astype(np.int64), cluster_interval, len(codes))


def _exact(found: NDArray[np.integer], total: NDArray[np.integer]) -> tuple[float, float]:
    return clopper_pearson(int(found.sum()), int(total.sum()))


def _shares(
    counts: NDArray[np.integer],
    totals: NDArray[np.integer],
    interval: Callable[[NDArray[np.integer], NDArray[np.integer]], tuple[float, float]],
    clusters: int | None = None,
) -> list[KindShare]:
    """Of `counts`, (kind, cluster), of `totals`, (cluster,); with `clusters`, so many rows of units of one cluster."""
    shares = []
    # What is unknown may be of any kind, but not twice of one.
    may_be = np.minimum(counts + counts[_UNKNOWN], totals) - counts
    may_be[_UNKNOWN] = 0

    def summed(values: NDArray[np.integer]) -> NDArray[np.integer]:
        return values if clusters is None else values.reshape(clusters, -1).sum(-1)

    for place, kind in enumerate(KINDS):
        count, undecided = int(counts[place].sum()), int(may_be[place].sum())
        lowest, _ = interval(summed(counts[place]), summed(totals))
        _, highest = interval(summed(counts[place] + may_be[place]), summed(totals))
        shares.append(
            KindShare(
                kind=kind,
                count=count,
                decided=int(totals.sum()) - undecided,
                undecided=undecided,
                interval=(lowest, highest),
            )
        )
    return shares


def _discoveries(study: Study, places: NDArray[np.integer]) -> Discoveries | None:
    settings = (study.manifest.get("behaviour") or {}).get("displacement") or {}
    if "verdict_p_value" not in study.dataset or "significance" not in settings:
        return None
    dims = ("judged_layer", "prompt", "token")
    codes, p_values = (study.dataset[name].transpose(*dims).values for name in ("verdict", "verdict_p_value"))
    tests = int((codes >= 0).sum())
    survive = np.zeros(codes.shape, dtype=np.bool_)
    survive[codes >= 0] = surviving(p_values[codes >= 0], FALSE_DISCOVERIES)
    at = {kind: at_places(places, codes) == KINDS.index(kind) for kind in STRUCTURED}
    return Discoveries(
        tests=tests,
        expected=float(settings["significance"]) * tests,
        surviving={
            kind: (int((at_places(places, survive) & those).sum()), int(those.sum())) for kind, those in at.items()
        },
    )


def co_occurrence(study: Study, method: str = "displacement") -> NDArray[np.float64]:
    """`P(b at some layer | a at some layer)` of the same token, (a, b) in the order of `KINDS`; NaN for an `a` that no
    token has at any layer. Raises `StudyError` for a study without verdicts."""
    codes = verdict_codes(study, method)
    seen = np.stack([(codes == index).any(0) for index in range(len(KINDS))]).reshape(len(KINDS), -1).astype(np.float64)
    both = seen @ seen.T
    with np.errstate(invalid="ignore"):
        return np.asarray(both / np.diagonal(both)[:, None])


def token_roles(
    tokens: Sequence[Mapping[str, Any]], longest: int, bos: int | None = None
) -> dict[str, NDArray[np.bool_]]:
    """Which tokens have which role, (prompt, token) each, from the lines of `tokens.jsonl`; `bos` is the id of the
    token with which a text begins. Without a system prompt it would stand in the question, which would then have other
    tokens than that of a study with one."""
    roles = {name: np.zeros((len(tokens), longest), dtype=np.bool_) for name in ROLES}
    for row, prompt in enumerate(tokens):
        count = len(prompt["token_ids"])
        system, suffix = int(prompt.get("system_tokens") or 0), int(prompt.get("suffix_tokens") or 0)
        roles["system prompt"][row, :system] = True
        generated = int(prompt.get("generated_tokens") or 0)
        roles["question"][row, system : count - suffix - generated] = True
        roles["generated"][row, count - generated : count] = True
        roles["last token"][row, count - 1] = True
        if count and prompt["token_ids"][0] == bos:
            roles["beginning of text"][row, 0] = True
            roles["question"][row, 0] = roles["system prompt"][row, 0] = False
        for place, piece in enumerate(prompt.get("token_strings") or ()):
            text = str(piece).strip()
            roles["digits"][row, place] = bool(text) and text.isdigit()
            roles["punctuation"][row, place] = bool(text) and not any(char.isalnum() for char in text)
    return roles
