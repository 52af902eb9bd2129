"""Is the point at which a token's state stands stable?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray

from loopscope._util.wording import counted_parts, listed, percent, plural, significant, visible
from loopscope.answers.answer import Answer, Claim, Criterion, Evidence, Outcome, Question, measured
from loopscope.answers.predictions import (
    Agreement,
    RatePairs,
    agreement,
    near_the_circle,
    prediction_table,
    rate_pairs,
    token_drivers,
    token_eigenvalues,
    untaken_tokens,
)
from loopscope.dynamics.prediction import KNOWN_CODES, PREDICTED_KINDS, PredictedKind, spectral_radius
from loopscope.study import StudyView

STABILITY = Question(
    key="stability",
    text="Are the fixed points stable?",
    figure="stability-spectrum",
    needs=(measured("predicted_kind", "No eigenvalues were taken"),),
)
_SAID = {
    PredictedKind.FIXED_POINT: "stand at a fixed point that attracts",
    PredictedKind.DAMPED_ROTATION: "spiral into a fixed point that attracts",
    PredictedKind.SLIDER: "have an eigenvalue indistinguishable from 1",
    # A search may have found it, away from where the state is.
    PredictedKind.ORBIT: "have a fixed point that repels with rotation",
    PredictedKind.PERIOD_TWO: "have a fixed point that repels in alternating steps",
    PredictedKind.UNSTABLE: "have a fixed point that repels in one direction",
    PredictedKind.FAR: "stand at no fixed point",
    PredictedKind.UNRESOLVED: "have an eigenvalue that is not known precisely enough",
}
_NEAR_THE_CIRCLE = "turn about a fixed point, with an eigenvalue whose modulus is indistinguishable from 1"


_TRANSIENT = 0.02
"""Observed rates that differ by more in the same direction show a transient: where it is gone they differ by less."""


def stability_answer(view: StudyView, criterion: Criterion) -> Answer:
    """What the leading eigenvalues of one recurrence predict, and whether the trajectories confirm it."""
    data = view.dataset
    codes = data["predicted_kind"].transpose("prompt", "token").values
    counts = {kind: int((codes == place).sum()) for place, kind in enumerate(PREDICTED_KINDS)}
    total = sum(counts.values())
    if not total:
        return STABILITY.unanswered("not measured", "There is no token to take eigenvalues of.")
    if untaken := untaken_tokens(data):
        return _of_some(data, total, untaken)
    near = near_the_circle(data)
    outcome, verdict = _outcome(counts, total, int(near.sum()))
    pairs = rate_pairs(data)
    found = agreement(prediction_table(data)) if "verdict" in data else None
    repel = counts | {
        kind: int(((codes == PREDICTED_KINDS.index(kind)) & ~near).sum())
        for kind in (PredictedKind.ORBIT, PredictedKind.PERIOD_TWO)
    }
    said = [(repel[kind], _SAID[kind]) for kind in counts] + [(int(near.sum()), _NEAR_THE_CIRCLE)]
    there = sorted((each for each in said if each[0]), key=lambda each: -each[0])
    parts = counted_parts([(count, _agreeing(words, count)) for count, words in there], total, "tokens")
    return STABILITY.says(
        outcome,
        verdict,
        f"{listed(parts)}.{_rates(data, pairs)}{_injected(view)}{_growth(data, criterion)}{_confirmed(found)}",
        _evidence(data, counts, total, pairs, found) | _injection_factors(view) | _non_normality(view),
        _limits(view, counts, total, pairs),
        figure="stability-rates" if pairs.predicted.size else None,
        claims=_claims(view, outcome),
    )


def leading_token(view: StudyView) -> str:
    """Whose own eigenvalue sets the largest predicted rate, and how many tokens after it have it from there; empty
    where no rate is known."""
    data = view.dataset
    if "predicted_rate" not in data:
        return ""
    drivers = token_drivers(data)
    rates = np.where(drivers >= 0, data["predicted_rate"].transpose("prompt", "token").values, np.nan)
    if not np.isfinite(rates).any():
        return ""
    prompt, place = np.unravel_index(np.nanargmax(rates), rates.shape)
    token = int(drivers[prompt, place])
    rate, followers = float(rates[prompt, place]), int((drivers[prompt] == token).sum()) - 1
    does = "repels by itself" if rate > 1 else "is the slowest"
    follow = f", which also sets the rate of the {plural(followers, 'token')} after it" if followers > 1 else ""
    return (
        f"“{visible(view.strings(int(prompt))[token])}” (token {token} of prompt {prompt}) {does}: its own largest "
        f"eigenvalue has modulus {significant(rate, 3)}{follow}."
    )


def _of_some(data: xarray.Dataset, total: int, untaken: int) -> Answer:
    radius = spectral_radius(token_eigenvalues(data))
    radius = radius[np.isfinite(radius)]
    own = (
        f" The largest modulus of their own eigenvalues is {significant(float(np.median(radius)), 3)} (median) and at "
        f"most {significant(float(radius.max()), 3)}."
        if radius.size
        else ""
    )
    return STABILITY.unanswered(
        "cannot tell",
        f"Eigenvalues were taken of {total:,} of {plural(total + untaken, 'token')} (--eigenvalue-every). A token "
        f"settles no faster than the slowest token before it, which may be one of the others, so nothing is "
        f"predicted.{own}",
        outcome=Outcome.CANNOT_TELL,
        figure="stability-spectrum",
    )


def _claims(view: StudyView, outcome: Outcome) -> list[Claim]:
    """A point that a search found is not where the run stands, and may attract beside an orbit; and an eigenvalue of
    about 1 lets a state rest."""
    data = view.dataset
    if (data["point_searched"].values == 1).any():
        return []
    repels = outcome is Outcome.NO and bool(
        (_of_known(data, "predicted_rate") - _of_known(data, "predicted_rate_error") > 1).all()
    )
    return [Claim.REPELS] if repels else [Claim.ATTRACTS] if outcome is Outcome.YES else []


def _outcome(counts: Mapping[PredictedKind, int], total: int, near: int) -> tuple[Outcome, str]:
    """`near` is how many that turn may attract as well as repel; of those with an eigenvalue of about 1 nothing is
    known either."""
    stable = sum(count for kind, count in counts.items() if kind.settles)
    edge = near + counts[PredictedKind.SLIDER]
    unknown = sum(count for kind, count in counts.items() if not kind.known)
    if stable == total:
        return Outcome.YES, "yes, all"
    if 2 * (unknown + edge) > total:
        known = counts[PredictedKind.FAR], counts[PredictedKind.UNRESOLVED], edge
        words = "no fixed point found", "cannot tell", "on the edge of stability"
        most = max(known)
        part = f", for {percent(most / total)}" if most < total else ""
        return Outcome.CANNOT_TELL, words[known.index(most)] + part
    if stable == 0:
        return Outcome.NO, "no"
    return Outcome.PARTLY, f"{percent(stable / total)} are"


def _agreeing(words: str, count: int) -> str:
    """In the singular for one token."""
    verb, _, rest = words.partition(" ")
    return f"{ ({'have': 'has'}.get(verb, f'{verb}s') if count == 1 else verb) } {rest}"


def _rates(data: xarray.Dataset, pairs: RatePairs) -> str:
    """How fast, and how far from where stability is lost."""
    rate = _of_known(data, "predicted_rate")
    if not rate.size:
        return ""
    slowest = float(rate.max())
    middle = significant(float(np.median(rate)), 3)
    said = f" The predicted rate per recurrence is {middle} (median) and at most {significant(slowest, 3)}."
    if pairs.predicted.size:
        within = np.abs(pairs.predicted - pairs.observed) <= pairs.uncertainty
        said += (
            f" Observed rates differ from the prediction by {significant(pairs.median_difference)} (median); they "
            f"agree within their uncertainty for {percent(float(within.mean()))} of {plural(within.size, 'token')}."
        )
    return said


def _injection_factors(view: StudyView) -> Evidence:
    """Of a model whose weights say by what its injection alone shrinks the state."""
    factors = view.manifest["model"].get("injection_factors")
    return {} if factors is None else {"injection_factor_mean": factors[0], "injection_factor_largest": factors[1]}


def _injected(view: StudyView) -> str:
    factors = [significant(float(factor), 3) for factor in _injection_factors(view).values()]
    if not factors:
        return ""
    return (
        f" By the weights of the injection alone, each recurrence would multiply a coordinate of the state by "
        f"{factors[0]} (mean; at most {factors[1]}); the layers account for the difference."
    )


def _growth(data: xarray.Dataset, criterion: Criterion) -> str:
    """What eigenvalues below 1 do not say: how far a disturbance may go before it returns."""
    if "transient_growth" not in data:
        return ""
    settles = [code for code, kind in enumerate(PREDICTED_KINDS) if kind.settles]
    growth = _of_kinds(data, "transient_growth", settles)
    grows = growth > criterion.growth_tolerated
    if not grows.any():
        return ""
    return (
        f" Where the point attracts, small disturbances can grow first, by a factor of at least "
        f"{significant(float(growth.max()))}; for {percent(float(grows.mean()))} of these tokens by more than "
        f"{criterion.growth_tolerated:g}."
    )


def _non_normality(view: StudyView) -> Evidence:
    """What eigenvalues leave out, and the motion that rounding is predicted to keep up beside what it does."""
    data = view.dataset
    if "transient_growth" not in data:
        return {}
    evidence: Evidence = {}
    for name in ("singular_value", "krylov_departure", "noise_gain", "transient_growth"):
        values = _of_known(data, name)
        if np.isfinite(values).any():
            evidence |= {f"{name}_median": float(np.nanmedian(values)), f"{name}_largest": float(np.nanmax(values))}
    rounding = data["noise_floor"].isel(layer=-1).values[:, None]
    known = np.isin(data["predicted_kind"].transpose("prompt", "token").values, KNOWN_CODES)
    floor = np.where(known, data["noise_gain"].transpose("prompt", "token").values * rounding, np.nan)
    if np.isfinite(floor).any():
        evidence["predicted_noise_floor_median"] = float(np.nanmedian(floor))
    if np.isfinite(floor).any() and "twin_floor" in data:
        measured_floor = data["twin_floor"].isel(layer=-1).transpose("prompt", "token").values
        evidence["measured_noise_floor_median"] = float(np.nanmedian(measured_floor[np.isfinite(floor)]))
    return evidence


def _confirmed(found: Agreement | None) -> str:
    if found is None or not found.agree + found.disagree:
        return ""
    return f" {found.agree:,} of {found.agree + found.disagree:,} verdicts confirm the prediction."


def _evidence(
    data: xarray.Dataset, counts: Mapping[PredictedKind, int], total: int, pairs: RatePairs, found: Agreement | None
) -> Evidence:
    evidence: Evidence = {f"tokens: {kind}": f"{count:,} of {total:,}" for kind, count in counts.items() if count}
    rate = _of_known(data, "predicted_rate")
    if rate.size:
        evidence["predicted_rate_median"] = float(np.median(rate))
        evidence["predicted_rate_largest"] = float(rate.max())
        evidence["smallest_stability_margin"] = 1 - float(rate.max())
        evidence["error_of_predicted_rate_median"] = float(np.median(_of_known(data, "predicted_rate_error")))
        leading = np.abs(token_eigenvalues(data)[..., 0])
        residual = data["eigenvalue_residual"].transpose("prompt", "token", "pair").values[..., 0]
        there = np.isfinite(residual) & (leading > 0)
        if there.any():
            evidence["relative_residual_of_leading_eigenvalue_median"] = float(
                np.median(residual[there] / leading[there])
            )
        needed = _of_known(data, "damping_needed")
        if np.isfinite(needed).any() and np.nanmin(needed) < 1:
            evidence["largest_step_that_keeps_all_stable"] = float(np.nanmin(needed))
    if pairs.predicted.size:
        evidence["tokens_with_both_rates"] = float(pairs.predicted.size)
        evidence["observed_rate_median"] = float(np.median(pairs.observed))
        evidence["predicted_minus_observed_median_absolute"] = pairs.median_difference
        evidence["observed_minus_predicted_median"] = pairs.bias
        evidence["uncertainty_of_observed_rate_median"] = float(np.median(pairs.uncertainty))
        if np.isfinite(pairs.correlation):
            evidence["correlation_of_predicted_and_observed"] = pairs.correlation
    if found is not None:
        evidence["verdicts_that_agree"] = f"{found.agree:,}, {found.disagree:,} do not, {found.open:,} open"
    return evidence


def _of_known(data: xarray.Dataset, name: str) -> np.ndarray:
    """Values of the tokens about which eigenvalues say something, flat."""
    return _of_kinds(data, name, KNOWN_CODES)


def _of_kinds(data: xarray.Dataset, name: str, codes: Sequence[int]) -> np.ndarray:
    some = np.isin(data["predicted_kind"].transpose("prompt", "token").values, codes)
    return np.asarray(data[name].transpose("prompt", "token").values[some])


def _limits(view: StudyView, counts: Mapping[PredictedKind, int], total: int, pairs: RatePairs) -> list[str]:
    data = view.dataset
    limits = [
        "Eigenvalues describe small disturbances: a state that is pushed far from the fixed point may end elsewhere."
    ]
    if counts[PredictedKind.FAR]:
        step = data["point_step"].values
        limits.append(
            f"For {percent(counts[PredictedKind.FAR] / total)} of the tokens no fixed point was found: where their "
            "eigenvalues were taken, one recurrence still moves the state by up to "
            f"{percent(float(np.nanmax(step)))} of its norm."
        )
    searched = int((data["point_searched"].values == 1).sum())
    if searched:
        moved = data["point_moved"].where(data["point_searched"] == 1)
        limits.append(
            f"The fixed points of {plural(searched, 'prompt')} were found by a search, "
            f"{percent(float(moved.median()))} of the norm (median) from where the run stood."
        )
    if not (data["eigenvalue_exact"].values == 1).all():
        limits.append(
            "The model's code cannot be differentiated twice, so products with the Jacobian were taken by finite "
            "differences."
        )
    if abs(pairs.bias) > _TRANSIENT:
        where = "above" if pairs.bias > 0 else "below"
        limits.append(
            f"Observed rates lie {significant(abs(pairs.bias))} {where} the predicted ones (median). They are fitted "
            f"to steps above the noise floor of {view.dtype}, where faster motion and earlier tokens still contribute; "
            "the predicted rates hold at the fixed point."
        )
    if view.dtype in ("bfloat16", "float16"):
        limits.append(
            f"Eigenvalues are those of exact arithmetic with the model's weights, not of rounding to {view.dtype}."
        )
    return limits
