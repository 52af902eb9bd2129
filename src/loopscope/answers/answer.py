"""What a question and its answer are, the criterion that decides, and the caveats that go with every share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from loopscope._util.cards import card
from loopscope._util.ranges import Positive, Range, check_ranges
from loopscope._util.statistics import Share
from loopscope._util.wording import plural
from loopscope.study import StudyView


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """When a number counts as small, settled or shared.

    The paper whose method loopscope follows gives no numeric criterion for "converged"; these are ours. They are
    stored with every answer that used them. Raises `ConfigError` for a value outside its range.
    """

    drift_tolerance: Positive = 0.01
    """A state is settled if it moves by at most this share of its norm between the two horizons and in the single
    steps into them, which have to be down to rounding or to shrink faster than 1/t. 1 % is far above float32 rounding
    and far below the moves of models that do not settle (tens of percent)."""
    norm_growth_tolerance: Positive = 0.01
    """A norm is settled if it grows by at most this share between the two horizons: as much as the drift may be,
    since a state whose norm grows drifts by at least that much."""
    direction_tolerance: Positive = 0.05
    """A direction is settled if it turns by at most this angle, in radians (2.9 degrees), between the two horizons.
    Looser than the drift: beside a norm that grows linearly, a direction settles no faster than 1/t."""
    slowing_ratio: Annotated[float, Range(above=0, most=1)] = 0.8
    """If the step into the second horizon is below this share of the step into the first, the state is still slowing
    down, and a fixed point farther out is not excluded. 0.8 lies above the 0.71 of steps that shrink like 1/sqrt(t),
    and leaves room for what a mean over tokens scatters when nothing changes."""
    floor_factor: Positive = 3.0
    """Movement within this multiple of the estimated noise floor counts as rounding: the floor is an estimate,
    and two states that both carry rounding differ by 1.4 times as much as one does."""
    tokens_needed: Annotated[float, Range(above=0, most=1)] = 0.95
    """"Every token settles" asks for this share of tokens: a mean over tokens can hide a few that keep moving."""
    prompts_needed: Annotated[float, Range(above=0, most=1)] = 0.9
    """An answer holds for the model if it holds for this share of the prompts; otherwise it depends on the prompt."""
    min_prompts: Annotated[int, Range(above=0)] = 35
    """With fewer prompts every share gets a warning: below 35, even if all prompts agree, the 95 % Wilson interval
    reaches below the 90 % of `prompts_needed`."""
    degenerate_share: Annotated[float, Range(above=0, below=1)] = 0.001
    """Layers share one point if 1 minus the least cosine of their states at the horizon is at most this share of what
    it is between tokens half a prompt apart. Random blocks show up to 0.00013 where points are one, and from 0.0025 on
    where they are distinct; the demo models 0.1 to 0.2."""
    reached_level: Positive = 0.01
    """A state has arrived once its distance to the state at the horizon stays within this share of that state's
    norm."""
    repetition_needed: Annotated[float, Range(above=0, most=1)] = 0.9
    """A quantity repeats from pass to pass if the layer explains this share of its variance within the loop. Without
    any pattern the share is about one over the number of recurrences."""
    growth_tolerated: Positive = 2.0
    """A disturbance that first grows to more than this before it shrinks is worth a sentence: tokens of the demo model
    whose loop settles stay below 1.3, and a factor of 2 leaves no doubt, since the growth is known from below."""
    loss_tolerance: Positive = 0.01
    """Differences of the mean loss below this many nats are no difference: 1 % in perplexity."""
    saving_needed: Annotated[float, Range(above=0, most=1)] = 0.1
    """An exit rule that saves less than this share of the recurrences saves hardly any, and one that takes so little
    less than a fixed number does no better than that: stopping tokens one by one costs something too."""

    def __post_init__(self) -> None:
        check_ranges(self, "The criterion ")


Evidence = dict[str, float | str]


class Outcome(StrEnum):
    """Which way an answer goes, for readers who sort or colour answers; the verdict says it in words."""

    YES = "yes"
    NO = "no"
    PARTLY = "partly"
    NOT_YET = "not yet"
    CANNOT_TELL = "cannot tell"
    NOT_APPLICABLE = "not applicable"


class Claim(StrEnum):
    """What answers say that other answers may contradict; `answers/consistency.py` knows which exclude each other."""

    STOPS = "every layer's state stops"
    ON_ITS_WAY = "the state is still on its way to a limit"
    LEFT_OPEN = "whether the state stops is undecided"
    GOES_ON = "the state does not stop"
    TOKENS_SETTLE = "every token settles"
    TOKENS_MOVE = "most tokens are seen to move on"
    ATTRACTS = "every token stands at a fixed point that attracts"
    REPELS = "no token stands at a fixed point that attracts"
    POINTS = "the layers have points"
    ARRIVES = "the state arrives at a point"
    SETTLED_AT_DEPTH = "it has settled at the trained depth"


@dataclass(frozen=True, kw_only=True, repr=False)
class Answer:
    """One question about a model, answered from the numbers of a study."""

    key: str
    """Stable name of the question, such as `fixed_point`."""
    question: str
    outcome: Outcome
    verdict: str
    """The answer in a word or a short phrase."""
    sentence: str
    """The answer in plain sentences, the first of which gives it."""
    evidence: Evidence = field(default_factory=dict)
    """The numbers that the sentence rests on, by name. Shares and relative quantities are fractions, losses nats,
    angles degrees, and recurrences are counted from 1."""
    figure: str = ""
    """Anchor of the figure in the report that shows it."""
    limits: list[str] = field(default_factory=list)
    """What could make this answer wrong, a sentence each."""
    claims: list[Claim] = field(default_factory=list)
    """What it says, where other answers may contradict it."""
    criterion: Criterion = field(default_factory=Criterion)
    """The thresholds used."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    def __repr__(self) -> str:
        return f"<{self.question} {self.verdict}>"

    def _repr_html_(self) -> str:
        return card(self.question, self.verdict, self.sentence)


@dataclass(frozen=True)
class Need:
    """Something of a study without which a question has no answer."""

    met: Callable[[StudyView], bool]
    otherwise: str | Callable[[StudyView], str]
    """The sentence where it is not met."""
    verdict: str = "not measured"


def measured(variable: str, otherwise: str) -> Need:
    """The study has this variable; `otherwise` goes on with the study's own reason."""
    return Need(lambda view: variable in view.finite, lambda view: f"{otherwise}: {view.why_absent(variable)}.")


def some_finite(otherwise: str) -> Need:
    """A prompt stayed finite; `otherwise` says what there is none of: "there is no answer to follow"."""
    return Need(lambda view: view.finite.sizes["prompt"] > 0, f"Every prompt diverged, so {otherwise}.", "it diverges")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, what an answer needs, and where it is drawn."""

    key: str
    text: str
    figure: str = ""
    """Anchor of the figure that shows what is asked about."""
    needs: tuple[Need, ...] = ()
    """Asked in this order; the first that is not met is what the answer says."""
    drawn: Callable[[StudyView], bool] = lambda view: False
    """Whether the figure is there where a need is not met."""

    def says(
        self,
        outcome: Outcome,
        verdict: str,
        sentence: str,
        evidence: Mapping[str, float | str] | None = None,
        limits: Iterable[str] = (),
        *,
        figure: str | None = None,
        claims: Iterable[Claim] = (),
    ) -> Answer:
        """An answer with its numbers; `figure` is another one than the question's."""
        return Answer(
            key=self.key,
            question=self.text,
            outcome=outcome,
            verdict=verdict,
            sentence=sentence,
            evidence=dict(evidence or {}),
            figure=self.figure if figure is None else figure,
            limits=list(limits),
            claims=list(claims),
        )

    def unanswered(
        self, verdict: str, sentence: str, *, outcome: Outcome = Outcome.NOT_APPLICABLE, figure: str = ""
    ) -> Answer:
        """Why there is no answer."""
        return self.says(outcome, verdict, sentence, figure=figure)

    def declined(self, view: StudyView) -> Answer | None:
        """The answer for a study that lacks what is needed; None for one that has it."""
        for need in self.needs:
            if not need.met(view):
                sentence = need.otherwise if isinstance(need.otherwise, str) else need.otherwise(view)
                return self.unanswered(need.verdict, sentence, figure=self.figure if self.drawn(view) else "")
        return None


def diverged_prompts(view: StudyView) -> list[str]:
    """What has to be said where prompts diverged."""
    if not view.diverged:
        return []
    share = Share(view.diverged, view.prompts)
    return [f"States became infinite or undefined in {share}; medians and means leave these prompts out."]


def few_prompts(view: StudyView, criterion: Criterion) -> list[str]:
    """The warning that goes with every share of few prompts; nothing where they are enough."""
    if view.prompts >= criterion.min_prompts:
        return []
    low, _ = Share(view.prompts, view.prompts).interval
    return [
        f"Only {plural(view.prompts, 'prompt')} ({plural(view.tokens, 'token')}): what all of them show may still "
        f"fail for up to {math.ceil(100 - 100 * low)} % of such prompts (95 % Wilson interval)."
    ]
