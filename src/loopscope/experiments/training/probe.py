"""What a loop does while it is trained, on a few prompts that stay the same: numbers for a training log."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from loopscope.answers.answer import Criterion
from loopscope.errors import ConfigError
from loopscope.measures.attention import entropy_of_rows
from loopscope.measures.functions import distance, relative_distance, residual_norm
from loopscope.measures.heads import tiles
from loopscope.measures.readout import next_token_loss
from loopscope.models.loading import as_subject
from loopscope.models.subject import Batch, InputIds, Subject, batch_for, recurrences_of
from loopscope.models.visits import Observer, Visit

_ROUNDOFFS = 300
"""Steps of less than this many unit roundoffs of the state may be rounding and have no rate: loops amplify it, by a
hundred in a trained model."""


class LoopProbe:
    """Called, it runs its prompts through the model as it is now and returns numbers by name.

    R being the number of recurrences asked for, s_t the loop state after t of them, and d_t the length of the step to
    it, over all tokens of the prompts:

    - `loop/step`: median of `d_R / |s_R|`;
    - `loop/distance`: median of `|s_R - s_2R| / |s_2R|`;
    - `loop/rate`: the factor by which steps shrink in a recurrence, median of `(d_t / d_u)^(1 / (t - u))`: t is the
      last of the 2R recurrences whose step is above rounding, and u = t // 2. Absent where there is no such token;
    - `loop/norm`: median of `|s_R|`;
    - `loop/small_step_share`: share of tokens with `d_2R <= 0.01 |s_2R|` (`Criterion.drift_tolerance`): that they move
      little at twice the depth, which is no verdict about where they will end;
    - `loop/attention_entropy`: mean over tokens, heads and recurrent layers at recurrence R, in nats; absent where no
      attention can be seen;
    - `loop/loss_at_1`, `loop/loss_at_R`, `loop/loss_at_2R`: mean next-token loss, nats. A model whose loop depends on
      how often it will run has the last alone.

    What is not finite is NaN or infinite here too. Of a hooked model the first step may be unknown: with R = 1, so is
    `loop/step`.

    R stands for itself in these names, so that curves of different models have one name. Other numbers, of a whole
    analysis, are `Study.metrics()`. The model's modes, hooks, gradients and random numbers are left as they were.
    """

    def __init__(
        self, model: Subject | nn.Module, prompts: InputIds, *, recurrences: int | None = None, seed: int = 0
    ) -> None:
        """`prompts` are token ids, or texts where the model has a tokenizer; `recurrences` is R, the trained number
        unless given; `seed` is that of random initial states, the same at each call.

        Raises `ConfigError` for prompts that the model cannot have, without one of two tokens, for a model without a
        loop, and as `loopscope.hook` does.
        """
        self.subject = as_subject(model)
        if not self.subject.info.is_looped:
            raise ConfigError(f"{self.subject.info.name} has no recurrent layers, so that there is no loop to follow.")
        self.recurrences = recurrences_of(self.subject.info, recurrences)
        self._batch, self._seed = batch_for(self.subject, prompts), seed
        if int(self._batch.counts.max()) < 2:
            raise ConfigError("The prompts of a probe have one token each, and none that follows; give longer ones.")

    def __call__(self) -> dict[str, float]:
        """Raises `ConfigError` where the model cannot run twice as often."""
        depth, batch = self.recurrences, self._batch.to(self.subject.device)
        run = self.subject.start(batch, recurrences=2 * depth, seed=self._seed)
        foresees = getattr(getattr(self.subject, "facts", None), "foresees", False)
        entropy = _Entropy(batch)
        found: dict[str, float] = {}
        steps: list[Tensor] = []
        norms: list[Tensor] = []
        here = there = torch.empty(0)
        try:
            for number in range(1, 2 * depth + 1):
                before = run.state
                run.advance((entropy,) if number == depth else ())
                state = run.state
                assert state is not None  # after a recurrence
                norms.append(residual_norm(state[batch.mask]))
                unknown = torch.full_like(norms[-1], math.nan)
                steps.append(unknown if before is None else distance(before[batch.mask], state[batch.mask]))
                for name, wanted in (("1", 1), ("R", depth), ("2R", 2 * depth)):
                    if number == wanted and (number == 2 * depth or not foresees):
                        found[f"loop/loss_at_{name}"] = _mean_loss(run.answer(), batch)
                here, there = (state[batch.mask], there) if number == depth else (here, state[batch.mask])
        finally:
            run.close()
        found["loop/distance"] = float(relative_distance(here, there).median())
        found["loop/norm"] = float(norms[depth - 1].median())
        small = steps[-1] <= Criterion().drift_tolerance * norms[-1]
        found["loop/small_step_share"] = float(small.double().mean())
        if depth > 1 or self.subject.info.state_can_be_set:
            found["loop/step"] = float((steps[depth - 1] / norms[depth - 1]).median())
        rounding = _ROUNDOFFS * torch.finfo(there.dtype).eps
        rates = _rates(torch.stack(steps), rounding * torch.stack(norms))
        if len(rates):
            found["loop/rate"] = float(rates.median())
        if entropy.rows:
            found["loop/attention_entropy"] = float(entropy.total) / entropy.rows
        return found


def _rates(steps: Tensor, least: Tensor) -> Tensor:
    """Of the tokens that have one, from steps and the least that count, both (recurrence, token)."""
    count = torch.arange(1, len(steps) + 1, device=steps.device)[:, None]
    last = torch.where(steps > least, count, 0).amax(0)
    token = (last >= 2).nonzero().squeeze(-1)
    last = last[token]
    first = last // 2
    return (steps[last - 1, token] / steps[first - 1, token]) ** (1 / (last - first).to(steps.dtype))


class _Entropy(Observer):
    """Sums of the entropies of rows of attention, of all recurrent layers that are seen."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.total: Tensor | float = 0.0
        self.rows = 0

    def visit(self, visit: Visit) -> None:
        view = visit.attention
        if visit.stage != "recurrent" or view is None:
            return
        prompts = len(self._batch.mask)
        for start, stop in tiles(view, prompts, visit.residual.device):
            # Rows of padding are zero, and have no entropy.
            self.total = self.total + entropy_of_rows(view.tile(start, stop)).sum().double()
        self.rows += view.heads * int(self._batch.counts.sum())


def _mean_loss(logits: Tensor, batch: Batch) -> float:
    """Over all tokens that are followed by one."""
    followed = (batch.counts - 1).double()
    losses = next_token_loss(logits, batch).double()
    return float((losses[followed > 0] * followed[followed > 0]).sum() / followed.sum())
