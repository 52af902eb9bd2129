"""The native model's recurrence near a state."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loopscope._util.shapes import Keys, Queries, States, TokenMask
from loopscope.dynamics.eigenvalues.krylov import ExactProducts, TokenVectors
from loopscope.dynamics.eigenvalues.recurrence import LastStep, StateSite, TokenBlock
from loopscope.errors import ConfigError
from loopscope.models.interventions.kinds import FreezeInjection, ReplaceToken
from loopscope.models.native.subject import NativeRun, NativeSubject
from loopscope.models.subject import Batch


def mix_with_others_frozen(query: Queries, key: Keys, value: Keys, allowed: Tensor | None) -> Queries:
    """softmax(q k^T / sqrt(d)) v, with derivatives by each token's own state alone.

    Keys and values are cut off from their gradients, and a token's own are put back on the diagonal of the map:
    `scores = q k' + diag(q . (k - k'))`, `output = A v' + diag(A) (v - v')`, where the primes have no gradient. The
    differences are zero, so the value is that of ordinary attention. In a causal model no token before i depends on
    the state of i, and none after it is seen, so that a layer's derivative becomes the diagonal block of its Jacobian,
    and products of layers the diagonal blocks of products.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    still_key, still_value = key.detach(), value.detach()
    scores = query @ still_key.transpose(-1, -2) + torch.diag_embed((query * (key - still_key)).sum(-1))
    if allowed is None:
        tokens = query.shape[2]
        allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    maps = (scores * query.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf")).softmax(-1)
    own = maps.diagonal(dim1=-2, dim2=-1)[..., None]
    mixed: Tensor = maps @ still_value + own * (value - still_value)
    return mixed


def linearise_native(
    subject: NativeSubject, batch: Batch, *, recurrences: int, seed: int, state: States | None = None
) -> NativeRecurrence:
    """Run the prompts that many recurrences, or take the state given for that after them.

    Raises `ConfigError` for interventions that make the recurrence there unlike those around it.
    """
    _check_interventions(subject, recurrences, given=state is not None)
    batch = batch.to(subject.device)
    run = subject.start(batch, recurrences=recurrences, seed=seed, initial_state=state)
    last_step = LastStep(run.state, subject.model.dtype)
    if state is None:
        for _ in range(recurrences):
            run.advance()
            last_step.follow(run.state)
    return NativeRecurrence(run, batch.mask, recurrences, state=state, last_step=last_step.steps)


class NativeRecurrence:
    """Of a run that stands at a state.

    A half-precision model's recurrence is computed in float32, with the weights it has: what is rounded to 8 or 11 bits
    has no useful derivative, and the eigenvalues are those of the exact arithmetic.
    """

    site: StateSite = "loop state"

    def __init__(
        self, run: NativeRun, mask: TokenMask, recurrence: int, *, state: States | None = None, last_step: States
    ) -> None:
        """`recurrence` is the one that comes next, whose interventions are in force. A state given takes the place of
        the run's own."""
        state = run.state if state is None else state
        self._dtype = torch.float64 if run.state.dtype == torch.float64 else torch.float32
        self._run, self._mask = run, mask
        self.recurrences = recurrence
        self.state: States = state.to(mask.device, self._dtype)
        self.last_step: States = last_step.to(self._dtype)
        self._plain = run.recurrence_map(recurrence=recurrence, dtype=self._dtype)

    @torch.no_grad()
    def apply(self, state: States) -> States:
        return self._plain(state)

    def linearised(self, state: States) -> Iterator[TokenBlock]:
        alone = self._run.recurrence_map(recurrence=self.recurrences, dtype=self._dtype, mix=mix_with_others_frozen)

        def own(vectors: TokenVectors) -> TokenVectors:
            following: TokenVectors = alone(state.index_put((self._mask,), vectors))[self._mask]
            return following

        yield TokenBlock(self._mask, ExactProducts(own, state[self._mask]), "exact")


def _check_interventions(subject: NativeSubject, recurrence: int, *, given: bool) -> None:
    for each in subject.interventions:
        if isinstance(each, ReplaceToken) and each.recurrence == recurrence:
            raise ConfigError(
                f"The intervention '{each}' replaces a state at the recurrence whose eigenvalues were asked for, which "
                "no other recurrence does; ask for more recurrences."
            )
        if isinstance(each, FreezeInjection) and given:
            raise ConfigError(
                f"The intervention '{each}' makes a recurrence depend on the state before an earlier one, which a "
                "given state does not tell; leave state out."
            )
