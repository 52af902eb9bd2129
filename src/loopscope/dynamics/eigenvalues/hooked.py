"""A hooked model's recurrence near a state, begun where its first recurrent layer receives it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from loopscope._util.shapes import States, TokenMask
from loopscope.dynamics.eigenvalues.krylov import (
    WIDER,
    DifferenceProducts,
    ExactProducts,
    OwnMap,
    Products,
    TokenVectors,
    disagreement,
)
from loopscope.dynamics.eigenvalues.mixing import Places
from loopscope.dynamics.eigenvalues.recurrence import Derivative, LastStep, StateSite, TokenBlock
from loopscope.dynamics.eigenvalues.search import TokenMap
from loopscope.errors import ConfigError
from loopscope.models.hooks.forward import Injected
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.hooks.probe import is_rounding
from loopscope.models.subject import Batch
from loopscope.models.visits import Observer

_COPIED_TOKENS = 2048
"""Tokens of all copies of a prompt that are in one pass; the derivative keeps what every layer computes on them."""

_SAME = 1e-3
"""A prompt without its last token has to give the states that it has with it, but for this share of the largest entry:
above what float32 loses in matrix products of another shape, and below what a token that looks ahead changes."""

_ROUNDS_MORE, _IN_FLOAT32 = 1e-6, 20 * torch.finfo(torch.float32).eps
"""A quotient in float64 is good to 1e-9. One that is off by more than the first number tells of a part of the map in
float32, as norms and softmax often are, and the second is then what products are good to."""

_FEWEST = 3
"""Recurrences that have to be run to see one again: the first begins where the model's own state does."""


def why_no_eigenvalues(subject: HookedSubject) -> str | None:
    """What its probe showed that stands against them; None for nothing. Whether it is causal is asked of a recurrence
    alone, as an initial state may be drawn for a prompt as a whole."""
    if subject.facts.dtype not in (torch.float32, torch.float64):
        return f"it is run through hooks in {subject.info.dtype}, whose rounding hides derivatives; load it in float32"
    return subject.no_one_map


def linearise_hooked(
    subject: HookedSubject, batch: Batch, *, recurrences: int, seed: int, state: States | None = None
) -> HookedRecurrence:
    """Run the prompts that many recurrences, or take the state given for what the first layer then receives.

    A model that cannot run another number runs its own. Raises `ConfigError` for a model whose recurrence cannot be
    entered: not causal, in half precision, run fewer than three times, or not a function of its first layer's input.
    """
    reason = why_no_eigenvalues(subject)
    if reason is not None:
        raise ConfigError(f"No eigenvalues can be taken of {subject.info.name}: {reason}.")
    count = max(recurrences + 1, _FEWEST) if subject.settable else subject.facts.recurrences
    if count is None or count < _FEWEST:
        raise ConfigError(
            f"{subject.info.name} runs {count} recurrences, and eigenvalues need {_FEWEST} to see that a recurrence is "
            "the same again; tell loopscope.hook what sets them (set_recurrences)."
        )
    batch = batch.to(subject.device)
    inputs = _Inputs(min(recurrences, count - 1), subject.facts.dtype)
    run = subject.start(batch, recurrences=count, seed=seed, observers=[inputs])
    try:
        for _ in range(count):
            run.advance([inputs])
    finally:
        run.close()
    state = inputs.last if state is None else state
    found = HookedRecurrence(subject, batch, seed, inputs.at, state, inputs.last_step.steps)
    found.check(inputs.early, inputs.late)
    return found


class HookedRecurrence:
    """The map from what the first recurrent layer receives in one recurrence to what it receives in the next.

    Layers and injection follow each other as in the map from loop state to loop state, which begins elsewhere in the
    cycle. Where J = B A for the one, it is A B for the other, and these have the same eigenvalues.

    Nothing is known of the inside of a foreign attention, so each token has a copy of its prompt, up to itself, in
    which no other state varies.
    """

    site: StateSite = "block input"
    by_token = False

    def __init__(
        self, subject: HookedSubject, batch: Batch, seed: int, recurrences: int, state: States, last_step: States
    ) -> None:
        self._subject, self._batch, self._seed = subject, batch, seed
        self.recurrences = recurrences
        self.state: States = state.to(subject.device, subject.facts.dtype)
        self.last_step: States = last_step

    def apply(self, state: States) -> States:
        return self._following(self._batch, state, gradients=False)

    def token_map(self) -> TokenMap:
        state = self.state.clone()

        def following(vectors: TokenVectors, tokens: Places) -> TokenVectors:
            state[tokens] = vectors
            prompts = tokens.any(-1)
            some = Batch(self._batch.input_ids[prompts], self._batch.mask[prompts])
            return self._following(some, state[prompts], gradients=False)[tokens[prompts]]

        return following

    def check(self, early: Sequence[States], late: Sequence[States]) -> None:
        """What the first layer receives before and after a recurrence near the start, and where the run stands. Raises
        `ConfigError` if one that is entered anew does not lead from the one to the other, or if tokens see later
        ones."""
        if len(late) == 2:
            self._entered_again(late[0], late[1], "where the run stands")
        name, before = self._subject.info.name, early[0]
        again = self._entered_again(before, early[1], "near its start")
        longest = int(self._batch.counts.argmax())
        earlier = slice(0, int(self._batch.counts[longest]) - 1)
        if earlier.stop:
            ids = self._batch.input_ids[longest, None, earlier]
            shorter = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
            alone = self._following(shorter, before[longest, None, earlier], gradients=False)
            if not _apart(alone[0], again[longest, earlier]) <= _SAME:
                raise ConfigError(
                    f"A recurrence of {name} is not causal, so that its tokens have no eigenvalues of their own; take "
                    "a model in which no token looks ahead."
                )

    def _entered_again(self, before: States, after: States, where: str) -> States:
        """What follows `before`. Raises `ConfigError` if it is not `after`."""
        mask, again = self._batch.mask, self.apply(before)
        ends = after[mask].isfinite().all(-1)
        got, wanted = again[mask][ends], after[mask][ends]
        if not is_rounding(got, wanted):
            name = self._subject.info.name
            raise ConfigError(
                f"A recurrence of {name} depends on more than what its first layer receives: entered again with it "
                f"{where}, it differs by {_apart(got, wanted):.1g} of its size, so that it has no "
                "eigenvalues of its own; hook the layers between which the whole state passes."
            )
        return again

    def linearised(self, state: States, tokens: TokenMask) -> Iterator[TokenBlock]:
        for row, those in enumerate(tokens):
            places = those.nonzero()[:, 0]
            while len(places):
                # Copies reach from the prompt's first token to the last that varies.
                count = max(1, int((torch.arange(1, len(places) + 1) * (places.cpu() + 1) <= _COPIED_TOKENS).sum()))
                block = torch.zeros_like(tokens)
                block[row, places[:count]] = True
                products, derivative = self._products(row, places[:count], state)
                yield TokenBlock(block, products, derivative)
                places = places[count:]

    def _products(self, row: int, places: Tensor, state: States) -> tuple[Products, Derivative]:
        exact, plain = (self._own(row, places, state, gradients=gradients) for gradients in (True, False))
        point = state[row, places]
        try:
            # The fused kernels cannot be differentiated twice.
            with sdpa_kernel(SDPBackend.MATH):
                products = ExactProducts(exact, point)
                apart = disagreement(products, plain)
                if apart < torch.inf:
                    if apart > _ROUNDS_MORE:
                        products.accuracy = max(products.accuracy, _IN_FLOAT32)
                    return products, "exact"
        except Exception:  # in-place arithmetic, or an operation of its own, which says so in its own way
            pass
        tries: list[tuple[float, DifferenceProducts]] = []
        for step in (1.0, WIDER) if point.dtype == torch.float64 else (1.0,):
            differences = DifferenceProducts(plain, point, step=step)
            tries.append((disagreement(differences, plain, step / 4), differences))
            if tries[-1][0] <= _ROUNDS_MORE:
                break
        apart, differences = min(tries, key=lambda each: each[0])
        if apart < torch.inf:
            differences.accuracy = max(differences.accuracy, apart)
            return differences, "differences"
        raise ConfigError(
            f"No eigenvalues can be taken of {self._subject.info.name}: its gradients differ from difference quotients "
            f"of what it computes, and these hang on their step, as where a part of it runs in half precision although "
            f"its states are {self._subject.info.dtype}; run it without autocast, in float32."
        )

    def _own(self, row: int, places: Tensor, state: States, *, gradients: bool) -> OwnMap:
        count, end = len(places), int(places[-1]) + 1
        copies = torch.arange(count, device=state.device)
        ids = self._batch.input_ids[row, :end].expand(count, end)
        batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
        still = state[row, :end].expand(count, end, -1)

        def own(vectors: TokenVectors) -> TokenVectors:
            entered = still.index_put((copies, places), vectors)
            following: TokenVectors = self._following(batch, entered, gradients=gradients)[copies, places]
            return following

        return own

    def _following(self, batch: Batch, state: States, *, gradients: bool) -> Tensor:
        """What the first layer receives in the second recurrence, if it receives this state in the first."""
        subject = self._subject
        recurrences = 2 if subject.settable else subject.facts.recurrences
        forward = subject.forward_of_prompts(batch, recurrences, self._seed, begins_with=state, gradients=gradients)
        try:
            return next(event.state for event in forward if isinstance(event, Injected) and event.recurrence == 2)
        finally:
            forward.close()


class _Inputs(Observer):
    """What the first recurrent layer receives, at the recurrences that matter."""

    def __init__(self, at: int, dtype: torch.dtype) -> None:
        self.at, self._dtype = at, dtype
        """Recurrences that are done where the eigenvalues are taken."""
        self.early: list[States] = []
        """Before the second and the third recurrence."""
        self.late: list[States] = []
        """Before the last recurrence, and after it."""
        self.last_step: LastStep
        self.last: States

    def injected(self, recurrence: int, state: States) -> None:
        if recurrence == 1:
            self.last_step = LastStep(state, self._dtype)
        if recurrence in (2, 3):
            self.early.append(state)
        if recurrence in (self.at, self.at + 1):
            self.late.append(state)
        if recurrence <= self.at + 1:
            self.last_step.follow(state)
            self.last = state


def _apart(states: Tensor, others: Tensor) -> float:
    """Largest difference over largest entry; NaN where a state overflowed, which is as good as none."""
    return float((states - others).abs().amax() / others.abs().amax())
