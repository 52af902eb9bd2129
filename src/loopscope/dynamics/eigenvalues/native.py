"""The native model's recurrence near a state."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from loopscope._util.shapes import States, TokenMask
from loopscope.dynamics.eigenvalues.krylov import ExactProducts, TokenVectors
from loopscope.dynamics.eigenvalues.mixing import AfterOthers, AmongAll, OthersFrozen, OthersSeen, Places
from loopscope.dynamics.eigenvalues.recurrence import LastStep, StateSite, TokenBlock
from loopscope.dynamics.eigenvalues.search import TokenMap
from loopscope.errors import ConfigError
from loopscope.models.inspection.facts import Sizes
from loopscope.models.interventions.kinds import FreezeInjection, ReplaceToken
from loopscope.models.native.attention import Mix
from loopscope.models.native.subject import NativeRun, NativeSubject
from loopscope.models.subject import Batch


def recorded_bytes(sizes: Sizes, tokens: int, products: int, itemsize: int) -> int:
    """What a token takes while its eigenvalues are found, of a prompt of that many: its basis, what the layers compute
    in one recurrence and in its derivative, recorded, and the small matrix whose eigenvalues are taken, which its
    eigenvectors and their inverse stand beside. Measured with random models, to a tenth."""
    layer = 10 * sizes.width + 6 * sizes.query_width + 3 * sizes.heads * tokens
    layer += 3 * sizes.mlp_matrices * sizes.mlp_width
    product = 2 * sizes.width + 4 * sizes.mlp_width
    dimension = min(products, sizes.width)
    numbers = sizes.recurrent * layer + product + sizes.width * (dimension + 4.3 * sizes.injects)
    return int(numbers * max(itemsize, 4)) + 80 * dimension**2


def linearise_native(
    subject: NativeSubject,
    batch: Batch,
    *,
    recurrences: int,
    seed: int,
    state: States | None = None,
    at_once: int | None = None,
) -> NativeRecurrence:
    """Run the prompts that many recurrences, or take the state given for that after them; derivatives are taken of
    `at_once` tokens at most.

    Raises `ConfigError` for interventions that make the recurrence there unlike those around it, and for a loop whose
    layers are not all on devices.
    """
    if subject.no_eigenvalues is not None:
        raise ConfigError(f"No eigenvalues can be taken of {subject.info.name}: {subject.no_eigenvalues}.")
    _check_interventions(subject, recurrences + 1, given=state is not None)
    batch = batch.to(subject.device)
    run = subject.start(batch, recurrences=recurrences, seed=seed, initial_state=state)
    last_step = LastStep(run.state, subject.model.dtype)
    if state is None:
        for _ in range(recurrences):
            run.advance()
            last_step.follow(run.state)
    return NativeRecurrence(run, batch.mask, recurrences, state=state, last_step=last_step.steps, at_once=at_once)


class NativeRecurrence:
    """Of a run that stands at a state.

    A half-precision model's recurrence is computed in float32, with the weights it has: what is rounded to 8 or 11 bits
    has no useful derivative, and the eigenvalues are those of the exact arithmetic.
    """

    site: StateSite = "loop state"
    by_token = True

    def __init__(
        self,
        run: NativeRun,
        mask: TokenMask,
        recurrences: int,
        *,
        state: States | None = None,
        last_step: States,
        at_once: int | None = None,
    ) -> None:
        """`recurrences` are done; the interventions of the one that comes next are in force. A state given takes the
        place of the run's own."""
        state = run.state if state is None else state
        self._dtype = torch.float64 if run.state.dtype == torch.float64 else torch.float32
        self._run, self._mask = run, mask
        self._at_once = at_once or mask.numel()
        self.recurrences = recurrences
        self.state: States = state.to(mask.device, self._dtype)
        self.last_step: States = last_step.to(self._dtype)

    @torch.no_grad()
    def apply(self, state: States) -> States:
        alone = self._following(AmongAll(self._mask), self._mask)
        return state.index_put((self._mask,), alone(state[self._mask][None])[0])

    def token_map(self) -> TokenMap:
        mix, latest = AfterOthers(self._mask), torch.zeros_like(self._mask)
        alone = self._following(mix, latest)

        @torch.no_grad()
        def following(vectors: TokenVectors, tokens: Places) -> TokenVectors:
            nonlocal alone, latest
            if not torch.equal(tokens, latest):
                mix.begin(tokens)
                alone, latest = self._following(mix, tokens), tokens
            mix.turn = 0
            image: TokenVectors = alone(vectors[None])[0]
            return image

        return following

    def linearised(self, state: States, tokens: TokenMask) -> Iterator[TokenBlock]:
        places = tokens.nonzero()
        # Of about one size: matrix products of a few tokens that are left over take as long as those of many.
        for some in places.tensor_split(max(1, -(-len(places) // self._at_once))):
            block = torch.zeros_like(tokens)
            block[some[:, 0], some[:, 1]] = True
            yield self._block(state, block)

    def _block(self, state: States, tokens: TokenMask) -> TokenBlock:
        mask = self._mask & tokens.any(-1, keepdim=True)
        seen = OthersSeen(mask, tokens)
        whole, alone = (
            self._following(mix, of) for mix, of in ((seen, mask), (OthersFrozen(seen.layers, tokens), tokens))
        )
        with torch.no_grad():
            whole(state[mask][None])

        def own(vectors: TokenVectors) -> TokenVectors:
            following: TokenVectors = alone(vectors[None])[0]
            return following

        return TokenBlock(tokens, ExactProducts(own, state[tokens]), "exact")

    def _following(self, mix: Mix, tokens: TokenMask) -> Callable[[States], States]:
        """The recurrence that comes next, as a function of the states of these tokens."""
        return self._run.recurrence_map(recurrence=self.recurrences + 1, dtype=self._dtype, mix=mix, tokens=tokens)


def _check_interventions(subject: NativeSubject, following: int, *, given: bool) -> None:
    for each in subject.interventions:
        if isinstance(each, ReplaceToken) and each.recurrence == following:
            raise ConfigError(
                f"The intervention '{each}' replaces a state at the recurrence whose eigenvalues were asked for, which "
                "no other recurrence does; ask for more recurrences."
            )
        if isinstance(each, FreezeInjection) and given:
            raise ConfigError(
                f"The intervention '{each}' makes a recurrence depend on the state before an earlier one, which a "
                "given state does not tell; leave state out."
            )
