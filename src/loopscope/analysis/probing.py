"""Linear probes: what can be read off the states of a visit by a linear map, and what of that is chance or the norm.

Alain and Bengio, arXiv 1610.01644; the control of shuffled labels after Hewitt and Liang, arXiv 1909.03368.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from loopscope._util.sites import Site
from loopscope._util.wording import percent, plural
from loopscope.errors import ConfigError, NonFiniteError, last_resort
from loopscope.models.interventions.kinds import Intervention
from loopscope.models.loading import subject_of
from loopscope.models.native.subject import intervene as intervened
from loopscope.models.subject import Batch, InputIds, Subject, batch_for, recurrences_of
from loopscope.models.visits import Observer, Visit

_RIDGE = 1e-2
"""Of the mean square of the features' singular values: enough where there are fewer prompts than directions, and too
little to bend what many prompts agree on."""
_SHUFFLES = 20
_BATCH = 16

_Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Probes:
    """What `probe` returns.

    `dataset` has, for each visit (or, of the label `recurrence`, for each recurrent layer): `accuracy` on prompts that
    the probe was not fitted to, with its `standard_error` over prompts; `norm_accuracy` of a probe that sees the
    Euclidean norm of the state alone; `shuffled_accuracy`, the mean over probes for labels that were shuffled among
    prompts, and `shuffled_most`, the largest of them.
    """

    dataset: xr.Dataset
    classes: tuple[str, ...]
    prompts: int
    majority: float
    """Accuracy of whoever always says the most frequent label."""

    def sentences(self) -> list[str]:
        """The best place, with its controls."""
        data, (dim,) = self.dataset, self.dataset["accuracy"].dims
        best = int(np.argmax(data["accuracy"].values))
        at = {name: float(data[name][best]) for name in data.data_vars}
        where = f"{'layer ' if dim == 'layer' else ''}{data[dim].values[best]}"
        said = [
            f"{plural(self.prompts, 'prompt')} with {len(self.classes)} labels, the most frequent of which has "
            f"{percent(self.majority)}.",
            f"Best read, of {data.sizes[dim]} places, at {where}: {percent(at['accuracy'])} (standard error "
            f"{percent(at['standard_error'])}); by the norm alone {percent(at['norm_accuracy'])}, of shuffled labels "
            f"{percent(at['shuffled_accuracy'])} on average and {percent(at['shuffled_most'])} at most of {_SHUFFLES}.",
        ]
        # It is the best of all places, so what it has to beat is the best of theirs.
        chance = max(self.majority, float(data["shuffled_most"].max()))
        if at["accuracy"] - 2 * at["standard_error"] <= chance:
            said.append("That is no more than chance gives, so that nothing is seen to be readable.")
        elif at["norm_accuracy"] >= at["accuracy"] - 2 * at["standard_error"]:
            said.append("The norm alone says as much, so that no direction is seen to carry the label.")
        return said


@last_resort("fitting probes")
def probe(
    model: str | Path | nn.Module | Subject,
    input_ids: InputIds,
    labels: Sequence[Hashable] | Literal["recurrence"],
    *,
    recurrences: int | None = None,
    token: int = -1,
    folds: int = 5,
    seed: int = 0,
    intervene: str | Sequence[str | Intervention] = (),
) -> Probes:
    """Fit a linear probe for a label to the states of every visit, and test it on other prompts.

    Ridge regression on the labels as indicators, in closed form, of features that are standardised on the prompts of
    the fit; the largest answer is taken. Prompts are dealt out to `folds`, each label evenly, and each fold is
    predicted from the others: what belongs to a prompt is never on both sides.

    **Arguments**

    - `model`, `input_ids`, `intervene`: as for `loopscope.capture`; watched models too.
    - `labels`: one for each prompt, of any kind: an answer, a difficulty. Or `recurrence`: which recurrence a state of
      the loop is from, layer by layer, which many a loop gives away by the norm alone.
    - `token`: whose states; from 0 or, negative, from the end of each prompt.
    - `seed`: of a random initial state, of folds and of shuffles.

    Raises `ConfigError` for labels of one class, for a label of a single prompt, for another number of labels than of
    prompts, and for a token that a prompt does not have; `NonFiniteError` for states that overflow.
    """
    subject = intervened(subject_of(model), intervene)
    batch = batch_for(subject, input_ids)
    count, prompts = recurrences_of(subject.info, recurrences), len(batch.mask)
    if not 2 <= folds <= prompts:
        raise ConfigError(f"folds must lie between 2 and the number of prompts, {prompts}, got {folds}.")
    shortest = int(batch.counts.min())
    if not -shortest <= token < shortest:
        raise ConfigError(f"There is no token {token} in a prompt of {plural(shortest, 'token')}.")
    by_recurrence = isinstance(labels, str)
    if labels != "recurrence" if by_recurrence else not isinstance(labels, Iterable):
        raise ConfigError(f"labels are one for each prompt, or recurrence; got {labels!r:.40}.")
    if by_recurrence and count < 2:
        raise ConfigError("With fewer than two recurrences there is nothing to tell apart; run more.")
    given = [] if by_recurrence else list(labels)
    if not by_recurrence:
        _check_labels(given, prompts)
    states = _states(subject, batch, count, token, seed)
    random = np.random.default_rng(seed)
    if by_recurrence:
        loop = [site for site in states if site.stage == "recurrent"]
        layers = sorted({site.layer for site in loop})
        groups = {str(layer): np.stack([states[site] for site in loop if site.layer == layer], 1) for layer in layers}
        codes, classes = np.tile(np.arange(count), (prompts, 1)), [str(each) for each in range(1, count + 1)]
    else:
        groups = {site.label: each[:, None] for site, each in states.items()}
        kinds = sorted(set(given), key=repr)
        codes = np.array([kinds.index(label) for label in given])[:, None]
        classes = [str(kind) for kind in kinds]
    fold = _dealt(codes[:, 0], folds, random)
    # Labels exchanged within each prompt, or among prompts.
    shuffled = [
        random.permuted(codes, axis=1) if by_recurrence else random.permutation(codes) for _ in range(_SHUFFLES)
    ]
    found = [_accuracies(each, codes, shuffled, fold, len(classes)) for each in groups.values()]
    names = ("accuracy", "standard_error", "norm_accuracy", "shuffled_accuracy", "shuffled_most")
    dim = "layer" if by_recurrence else "visit"
    coordinate = layers if by_recurrence else list(groups)
    dataset = xr.Dataset(
        {name: (dim, np.array(values)) for name, values in zip(names, zip(*found, strict=True), strict=True)},
        coords={dim: coordinate},
    )
    return Probes(dataset, tuple(classes), prompts, float(np.bincount(codes.ravel()).max() / codes.size))


def _check_labels(labels: list[Hashable], prompts: int) -> None:
    if len(labels) != prompts:
        raise ConfigError(f"There are {len(labels)} labels and {plural(prompts, 'prompt')}; give one label to each.")
    try:
        counts = Counter(labels)
    except TypeError as error:
        raise ConfigError(f"Labels are texts, numbers or the like, which can be counted ({error}).") from None
    if len(counts) < 2:
        raise ConfigError(
            f"All {prompts} labels are {labels[0]!r}, so that there is nothing to tell apart; give at least two."
        )
    label, least = counts.most_common()[-1]
    if least < 2:
        raise ConfigError(
            f"The label {label!r} has one prompt, which cannot be both fitted and tested; give each label two at least."
        )


class _Kept(Observer):
    """States of one token of each prompt."""

    def __init__(self, places: Tensor) -> None:
        self._places = places
        self.states: dict[Site, _Numbers] = {}

    def visit(self, visit: Visit) -> None:
        site = Site(visit.stage, visit.layer, visit.recurrence)
        rows = range(len(self._places))
        self.states[site] = visit.residual[rows, self._places.to(visit.residual.device)].double().cpu().numpy()


def _states(subject: Subject, batch: Batch, count: int, token: int, seed: int) -> dict[Site, _Numbers]:
    """Of every visit, (prompt, width)."""
    parts: list[dict[Site, _Numbers]] = []
    for start in range(0, len(batch.mask), _BATCH):
        some = Batch(batch.input_ids[start : start + _BATCH], batch.mask[start : start + _BATCH])
        real = [row.nonzero()[:, 0] for row in some.mask]
        kept = _Kept(Tensor([int(places[token]) for places in real]).long())
        run = subject.start(some, recurrences=count, seed=seed, observers=[kept])
        try:
            for _ in range(count):
                run.advance([kept])
            run.decode([kept])
        finally:
            run.close()
        parts.append(kept.states)
    states = {site: np.concatenate([part[site] for part in parts]) for site in parts[0]}
    wrong = next((site for site, each in states.items() if not np.isfinite(each).all()), None)
    if wrong is not None:
        raise NonFiniteError(f"The states at {wrong.label} overflow; run fewer recurrences, or leave prompts out.")
    return states


def _dealt(codes: NDArray[np.int64], folds: int, random: np.random.Generator) -> NDArray[np.int64]:
    """A fold for each prompt, in random order and each label evenly."""
    order = random.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]
    fold = np.empty(len(codes), dtype=np.int64)
    fold[order] = np.arange(len(codes)) % folds
    return fold


def _accuracies(
    states: _Numbers,
    codes: NDArray[np.int64],
    shuffled: list[NDArray[np.int64]],
    fold: NDArray[np.int64],
    classes: int,
) -> tuple[float, float, float, float, float]:
    """Of states (prompt, sample, width) and their labels (prompt, sample)."""
    norm = np.linalg.norm(states, axis=-1, keepdims=True)
    right, by_norm = (
        _correct(features, labels, fold, classes)
        for features, labels in ((states, [codes, *shuffled]), (norm, [codes]))
    )
    by_prompt = right[0].mean(1)
    chance = right[1:].mean((1, 2))
    # As of so many prompts, each right or wrong, with two more of either: none wrong is not without error (Agresti and
    # Coull, The American Statistician 52, 1998). Samples of one prompt count as one.
    share = (by_prompt.sum() + 2) / (len(by_prompt) + 4)
    error = float(np.sqrt(share * (1 - share) / (len(by_prompt) + 4)))
    return float(by_prompt.mean()), error, float(by_norm.mean()), float(chance.mean()), float(chance.max())


def _correct(
    features: _Numbers, labels: Sequence[NDArray[np.int64]], fold: NDArray[np.int64], classes: int
) -> NDArray[np.bool_]:
    """Whether each sample is told right by a probe fitted to the other folds, (labelling, prompt, sample). All
    labellings share the matrix of the fit."""
    prompts, samples, width = features.shape
    right = np.empty((len(labels), prompts, samples), dtype=bool)
    for held in np.unique(fold):
        test = fold == held
        fit, there = (features[part].reshape(-1, width) for part in (~test, test))
        mean, spread = fit.mean(0), fit.std(0)
        spread = np.where(spread > 1e-12 * (np.abs(mean) + 1e-300), spread, 1.0)
        fit, there = (fit - mean) / spread, (there - mean) / spread
        targets = np.concatenate([np.eye(classes)[each[~test].ravel()] for each in labels], axis=1)
        level = targets.mean(0)
        weights = _ridge(fit, targets - level)
        scores = (there @ weights + level).reshape(test.sum(), samples, len(labels), classes)
        told = np.moveaxis(scores.argmax(-1), -1, 0)
        right[:, test] = told == np.stack([each[test] for each in labels])
    return right


def _ridge(features: _Numbers, targets: _Numbers) -> _Numbers:
    """`(X'X + c)^-1 X'Y`, by way of the smaller of the two Gram matrices."""
    samples, width = features.shape
    small = min(samples, width)
    gram = features @ features.T if samples < width else features.T @ features
    penalty = max(_RIDGE * np.trace(gram) / small, np.finfo(float).tiny)
    inside = gram + penalty * np.eye(small)
    if samples < width:
        return np.asarray(features.T @ np.linalg.solve(inside, targets))
    return np.asarray(np.linalg.solve(inside, features.T @ targets))
