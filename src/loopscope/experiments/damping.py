"""Control: prompts whose tokens do not settle are run again, damped as much as their eigenvalues ask for."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopscope._util.files import write_atomically
from loopscope._util.statistics import finite_or_none
from loopscope._util.wording import listed, plural, significant
from loopscope.analysis.job import Job, Progress, shown
from loopscope.analysis.manifest import PROMPT_SOURCE
from loopscope.analysis.settings import AnalyzeSettings, without_left_out
from loopscope.answers.predictions import token_eigenvalues, untaken_tokens
from loopscope.dynamics.prediction import KNOWN_CODES, best_damping, damped, damping_needed, spectral_radius
from loopscope.dynamics.verdicts import KINDS, MOVING_CODES, SETTLED_CODES, Kind
from loopscope.errors import ConfigError, StudyError
from loopscope.measures.behaviour import can_be_judged
from loopscope.models.interventions.kinds import Damp
from loopscope.models.loading import subject_of
from loopscope.models.native.subject import NativeSubject, intervene
from loopscope.models.subject import Subject
from loopscope.prompts.prompt import TokenizedPrompt
from loopscope.study import Study

CONTROL = "control.json"
"""What `control` adds to the folder of the damped study."""

_RADIUS = 0.95
"""What a damped loop is asked for unless another is given: after twice the default horizon a distance has shrunk to
2e-6, which float32 still sees."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Control:
    """Prompts with tokens that did not settle, before and after damping."""

    eta: float
    """Step of the damped loop, `s <- (1 - eta) s + eta F(s)`, with F as it was run before."""
    asked_by: str
    """Where eta comes from: `the eigenvalues`, for the radius asked for; `the best of the eigenvalues`, where none
    reaches that; `the user`."""
    prompts: tuple[int, ...]
    """Of the first study, which were run again."""
    known: int
    """Their tokens of whose fixed point the eigenvalues are known."""
    predicted_radius: float
    """Largest modulus among the damped eigenvalues of those; NaN without any."""
    transitions: NDArray[np.int64]
    """Their tokens after the last recurrent layer, (verdict before, verdict after), in the order of `KINDS`."""
    observed_rate: float
    """Median over the tokens that settle under damping; NaN where none has one."""
    before: Study
    after: Study

    @property
    def moving(self) -> int:
        """Tokens that orbited, slid, kept moving or diverged before."""
        return int(self.transitions[np.array(MOVING_CODES)].sum())

    @property
    def settled(self) -> int:
        """Of those, the tokens that settle under damping."""
        return int(self.transitions[np.ix_(MOVING_CODES, SETTLED_CODES)].sum())

    def sentences(self) -> list[str]:
        """What was done, what was predicted, and what came of it."""
        total = int(self.transitions.sum())
        said = [
            f"{plural(len(self.prompts), 'prompt')} with {plural(self.moving, 'token')} that did not settle "
            f"{'was' if len(self.prompts) == 1 else 'were'} run again with the step {significant(self.eta, 3)}, which "
            f"{self.asked_by} asked for."
        ]
        if self.known:
            said.append(
                f"Of the {plural(self.known, 'token')} whose fixed point is known, the damped eigenvalues reach "
                f"{significant(self.predicted_radius, 3)} at most."
            )
        if self.known < total:
            said.append(
                f"Of {plural(total - self.known, 'token')} no fixed point is known, so nothing is predicted of them."
            )
        now = "does" if self.settled == 1 else "do"
        said.append(f"Of the {plural(self.moving, 'token')} that did not settle, {self.settled:,} {now} now.")
        for code in (*MOVING_CODES, Kind.UNKNOWN.code):
            row = self.transitions[code]
            if row.any():
                ends = [f"{count:,} {KINDS[to]}" for to, count in enumerate(row.tolist()) if count]
                said.append(f"{KINDS[code].capitalize()} before: now {listed(ends)}.")
        if np.isfinite(self.observed_rate):
            said.append(f"The observed rate per recurrence is {significant(self.observed_rate, 3)} (median).")
        return said

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; NaN is null."""
        return {
            "study": None if self.before.folder is None else str(self.before.folder),
            "eta": self.eta,
            "asked_by": self.asked_by,
            "intervene": list(self.after.manifest["settings"]["intervene"]),
            "prompts": list(self.prompts),
            "tokens_with_known_fixed_point": self.known,
            "predicted_radius": finite_or_none(self.predicted_radius),
            "observed_rate_median": finite_or_none(self.observed_rate),
            "moving_before": self.moving,
            "of_these_settled_after": self.settled,
            "verdicts": {
                str(KINDS[before]): {str(KINDS[to]): count for to, count in enumerate(row) if count}
                for before, row in enumerate(self.transitions.tolist())
                if any(row)
            },
            "sentences": self.sentences(),
        }


def control(
    study: Study | str | Path,
    *,
    out: str | Path | None = None,
    model: str | Path | Subject | None = None,
    eta: float | None = None,
    radius: float = _RADIUS,
    horizon: int | None = None,
    progress: Progress | bool | None = None,
) -> Control:
    """Run the prompts of a study with tokens that orbit, slide, keep moving or diverge again, in a damped loop.

    **Arguments**

    - `study`: one with verdicts and, unless `eta` is given, eigenvalues, or its folder.
    - `out`: folder for the study of the damped loop, and `control.json`. Nothing is written without it.
    - `model`: what the study is of, if it is not to be had by the name in the study. Its weights must be the same.
    - `eta`: step of the damped loop. Unless given, the largest with which the eigenvalues of all tokens of these
      prompts come to at most `radius`, or, where none does, the one that makes the largest modulus smallest.
    - `horizon`: of the damped run; a small step needs more recurrences. That of the study unless given.
    - `progress`: as in `analyze`.

    A study that was damped already is damped further: its step is multiplied.

    Raises `StudyError` for a study without verdicts or eigenvalues, or in which every token settles, and for a model
    with other weights; `ConfigError` if no step is known that would make the fixed points attract.
    """
    study = study if isinstance(study, Study) else Study.load(study)
    codes = _verdicts(study)
    moving = np.isin(codes, MOVING_CODES).any(1)
    if not moving.any():
        undecided, total = int((codes == Kind.UNKNOWN.code).sum()), int((codes >= 0).sum())
        if not undecided:
            raise StudyError("Every token of this study settles, so there is nothing to damp.")
        raise StudyError(
            f"No token of this study is seen to move on, so there is nothing to damp; {undecided:,} of "
            f"{plural(total, 'token')} {'is' if undecided == 1 else 'are'} undecided, and a longer horizon may decide."
        )
    prompts = np.flatnonzero(moving)
    known = _known_eigenvalues(study, prompts, needed=eta is None)
    step, asked_by = (eta, "the user") if eta is not None else _step(known, radius)
    settings = _settings(study, step, horizon)
    if not can_be_judged(settings.horizon):
        raise ConfigError(f"A horizon of {settings.horizon} recurrences is too short for verdicts; give at least 8.")
    subject = _subject(study, model, settings)
    source = study.manifest["model"]["name"] if model is None else model
    of = source if isinstance(source, str | Path) else None
    with shown(progress) as told:
        job = Job(subject, _prompts(study, prompts), settings, told, of)
        after = job.run_in(Path(out)) if out is not None else job.run_in_memory()
    later = _verdicts(after)
    first = codes[prompts, : later.shape[1]]
    transitions = np.zeros((len(KINDS), len(KINDS)), dtype=np.int64)
    np.add.at(transitions, (first[first >= 0], later[first >= 0]), 1)
    result = Control(
        eta=float(step),
        asked_by=asked_by,
        prompts=tuple(int(prompt) for prompt in prompts),
        known=len(known),
        predicted_radius=float(spectral_radius(damped(known, step)).max()) if len(known) else float("nan"),
        transitions=transitions,
        observed_rate=_observed_rate(after, later),
        before=study,
        after=after,
    )
    if out is not None:
        write_atomically(Path(out) / CONTROL, (json.dumps(result.to_dict(), indent=2) + "\n").encode())
    return result


def _verdicts(study: Study) -> NDArray[np.integer]:
    """After the last recurrent layer, (prompt, token)."""
    if "verdict" not in study.dataset:
        raise StudyError(
            "The study has no verdicts, so nothing says which tokens to damp; analyze with behaviour and a horizon of "
            "at least 8."
        )
    return np.asarray(study.dataset["verdict"].isel(judged_layer=-1).transpose("prompt", "token"))


def _observed_rate(study: Study, verdicts: NDArray[np.integer]) -> float:
    """Median over the tokens that settle."""
    if "observed_rate" not in study.dataset:
        return float("nan")
    rates = study.dataset["observed_rate"].transpose("prompt", "token").values
    found = rates[np.isin(verdicts, SETTLED_CODES) & np.isfinite(rates)]
    return float(np.median(found)) if found.size else float("nan")


def _known_eigenvalues(study: Study, prompts: NDArray[np.int64], *, needed: bool) -> NDArray[np.complex128]:
    """Of the tokens of some prompts at whose point there is a fixed point, (token, pair)."""
    if not needed and "predicted_kind" not in study.dataset:
        return np.empty((0, 1), dtype=np.complex128)
    if needed and untaken_tokens(study.dataset):
        raise ConfigError(
            "The study has eigenvalues of some tokens only, and the others may need more damping; analyze without "
            "--eigenvalue-every, or give a step to try, as in --eta 0.5."
        )
    values = token_eigenvalues(study.dataset)[prompts]
    kinds = study.dataset["predicted_kind"].transpose("prompt", "token").values[prompts]
    return np.asarray(values[np.isin(kinds, KNOWN_CODES)])


def _step(eigenvalues: NDArray[np.complex128], radius: float) -> tuple[float, str]:
    if not len(eigenvalues):
        raise ConfigError(
            "No fixed point is known of any prompt that does not settle, so that no eigenvalue says how much damping "
            "it needs; give a step to try, as in --eta 0.5."
        )
    needed = float(damping_needed(eigenvalues.reshape(-1), radius))
    if np.isfinite(needed):
        return needed, "the eigenvalues"
    best, reached = (float(value) for value in best_damping(eigenvalues.reshape(-1)))
    if reached >= 1:
        raise ConfigError(
            "No step makes these fixed points attract: one has an eigenvalue whose real part is 1 or more, which "
            "damping leaves there; give a step to try, as in --eta 0.5."
        )
    return best, "the best of the eigenvalues"


def _settings(study: Study, eta: float, horizon: int | None) -> AnalyzeSettings:
    """Those of the study, of the chosen prompts, damped."""
    recorded = study.manifest["settings"]
    names = {field.name for field in dataclasses.fields(AnalyzeSettings)} - {"track", "map_prompts", "intervene"}
    changes: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items() if name in names
    }
    # Where the prompts came from, for the record; these are some of them, and their texts are in tokens.jsonl.
    for name in (*PROMPT_SOURCE, "truncate", "chat"):
        value = study.manifest["prompts"].get(name)
        if value and name not in ("text", "limit", "sample_seed"):
            changes[name] = Path(value) if name == "system_prompt" else value
    changes = without_left_out(changes)  # which older versions took
    if horizon is not None:
        changes["horizon"] = horizon
    before = AnalyzeSettings(intervene=tuple(recorded.get("intervene", ()))).interventions
    was = next((each.eta for each in before if isinstance(each, Damp)), 1.0)
    others = [each for each in before if not isinstance(each, Damp)]
    return AnalyzeSettings(**changes, intervene=tuple(str(each) for each in (*others, Damp(was * eta))))


def _subject(study: Study, model: str | Path | Subject | None, settings: AnalyzeSettings) -> Subject:
    recorded = study.manifest["model"]
    subject = subject_of(
        recorded["name"] if model is None else model,
        revision=settings.revision,
        dtype=settings.dtype,
        device=settings.device,
        device_map=settings.device_map,
        ignore_config=settings.ignore_config,
    )
    if subject.info.weights_sha256 != recorded["weights_sha256"]:
        raise StudyError(
            f"{subject.info.name} has other weights than the model of this study; name the model that was analyzed."
        )
    if isinstance(subject, NativeSubject) and subject.interventions:
        return subject.intervened(settings.intervene)
    return intervene(subject, settings.intervene)


def _prompts(study: Study, prompts: NDArray[np.int64]) -> list[TokenizedPrompt]:
    found = []
    for prompt in prompts:
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in study.tokens[prompt].items()
        }
        found.append(TokenizedPrompt(**fields))
    return found
