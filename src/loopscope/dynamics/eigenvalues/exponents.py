"""Lyapunov exponents along a run: by how much small differences of a token's state grow in each recurrence.

Benettin et al., Meccanica 15 (1980): some vectors are carried along by the derivative of each recurrence and made
orthonormal again after it; the logarithms of what that takes out, on average, are the leading exponents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float64
from numpy import ndarray
from torch import Tensor, nn

from loopscope._util.shapes import TokenMask
from loopscope.dynamics.eigenvalues.native import NativeRecurrence, recorded_bytes
from loopscope.dynamics.eigenvalues.recurrence import TokenBlock
from loopscope.dynamics.eigenvalues.result import EigenvalueSettings
from loopscope.errors import ConfigError, last_resort
from loopscope.models.inspection.facts import Sizes
from loopscope.models.interventions.kinds import Intervention, ReplaceToken
from loopscope.models.interventions.parsing import check_recurrences
from loopscope.models.loading import subject_of
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.subject import intervene as intervened
from loopscope.models.subject import Batch, InputIds, Subject, batch_for


@dataclass(frozen=True, eq=False)
class LyapunovExponents:
    """What `lyapunov_exponents` returns; NaN at padding and from where a state overflowed."""

    growth: Float64[ndarray, "prompt token recurrence exponent"]
    """Natural logarithm of the factor by which each vector, orthogonal to those before it, grew in each recurrence;
    minus infinity where it vanished."""
    mask: Bool[ndarray, "prompt token"]

    @property
    def exponents(self) -> Float64[ndarray, "prompt token exponent"]:
        """Means over the recurrences, per recurrence: finite-time exponents of this run from its start. Those of a
        state that settles tend to the logarithms of its eigenvalues' moduli, with an error that falls as 1 over the
        number of recurrences; `growth` of the last recurrences alone is there sooner."""
        mean: Float64[ndarray, "prompt token exponent"] = self.growth.mean(2)
        return mean

    @property
    def change(self) -> Float64[ndarray, "prompt token exponent"]:
        """Mean over the second half of the recurrences less that over the first: how far the exponents are from having
        settled. NaN of a single recurrence."""
        half = self.growth.shape[2] // 2
        if not half:
            return self.exponents * float("nan")
        change: Float64[ndarray, "prompt token exponent"] = self.growth[:, :, half:].mean(2) - self.growth[
            :, :, :half
        ].mean(2)
        return change


@last_resort("taking Lyapunov exponents")
def lyapunov_exponents(
    model: str | Path | nn.Module | Subject,
    input_ids: InputIds | Batch,
    *,
    recurrences: int = 64,
    exponents: int = 4,
    attention_mask: Tensor | None = None,
    intervene: str | Sequence[str | Intervention] = (),
    seed: int = 0,
) -> LyapunovExponents:
    """The leading finite-time exponents of every token along its run, by products with each recurrence's derivative.

    In a causal model the Jacobian of a recurrence over a prompt is block lower triangular, so its exponents are those
    of the products of its diagonal blocks `J_i = d F(x)_i / d x_i`, one spectrum for each token (see
    `leading_eigenvalues`). Above 0: a small difference grows, and the state is chaotic or diverges.

    **Arguments**

    - `model`, `input_ids`, `attention_mask`, `intervene`: as for `loopscope.capture`; a model that loopscope computes.
    - `recurrences`: how many the run has, all of which count, the first with the direction of random vectors.
    - `exponents`: how many; at most the width, with which they add up to the mean logarithm of the determinant.
    - `seed`: of the initial state and of the vectors.

    Cost: for each recurrence about as much as `exponents` and three more. Raises `ConfigError` for a model without a
    loop, one that is only watched or has layers that are not on devices, and for an intervention that replaces a token.
    """
    subject = intervened(subject_of(model), intervene)
    _check(subject, recurrences, exponents)
    assert isinstance(subject, NativeSubject)  # or _check had raised
    batch = input_ids if isinstance(input_ids, Batch) else batch_for(subject, input_ids, attention_mask)
    batch = batch.to(subject.device)
    sizes, tokens = Sizes.of(subject.model.architecture), batch.input_ids.shape[1]
    one = recorded_bytes(sizes, tokens, exponents, subject.model.dtype.itemsize)
    at_once = EigenvalueSettings().at_once(one)

    def along() -> Iterator[Iterable[TokenBlock]]:
        run = subject.start(batch, recurrences=recurrences, seed=seed)
        for recurrence in range(recurrences):
            near = NativeRecurrence(run, batch.mask, recurrence, last_step=run.state, at_once=at_once)
            yield near.linearised(near.state, batch.mask)
            run.advance()

    growth = vectors_along(along(), batch.mask, subject.info.width, exponents, seed)
    return LyapunovExponents(growth.cpu().numpy(), batch.mask.cpu().numpy())


def _check(subject: Subject, recurrences: int, exponents: int) -> None:
    name = subject.info.name
    if not subject.info.is_looped:
        raise ConfigError(f"{name} has no recurrent layers, so that no recurrence has exponents; take a looped model.")
    if not isinstance(subject, NativeSubject):
        raise ConfigError(
            f"{name} computes by itself and is only watched, so that its recurrences have no derivative along the run; "
            "leading_eigenvalues takes those at its end."
        )
    if subject.no_eigenvalues is not None:
        raise ConfigError(f"No exponents can be taken of {name}: {subject.no_eigenvalues}.")
    if recurrences < 1:
        raise ConfigError(f"recurrences must be at least 1, got {recurrences}.")
    if not 1 <= exponents <= subject.info.width:
        raise ConfigError(
            f"exponents must lie between 1 and the model's width of {subject.info.width}, got {exponents}."
        )
    check_recurrences(subject.interventions, recurrences)
    replaced = next((each for each in subject.interventions if isinstance(each, ReplaceToken)), None)
    if replaced is not None:
        raise ConfigError(
            f"The intervention '{replaced}' replaces a state, so that its recurrence has no derivative; leave it out."
        )


def vectors_along(
    steps: Iterable[Iterable[TokenBlock]], mask: TokenMask, width: int, count: int, seed: int
) -> Float64[Tensor, "batch token recurrence exponent"]:
    """Logarithms of the growth of `count` vectors a token, made orthonormal after each step by a QR decomposition in
    float64. `steps` are the derivatives along a run, in blocks of tokens."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*mask.shape, width, count, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(drawn).Q.to(mask.device)
    found = []
    for blocks in steps:
        growth = torch.full((*mask.shape, count), torch.nan, dtype=torch.float64, device=mask.device)
        for block in blocks:
            point = block.products.point
            before = basis[block.tokens].to(point.dtype)
            carried = torch.stack([block.products(before[..., n]) for n in range(count)], dim=-1).double()
            finite = torch.isfinite(carried).all(-1).all(-1)
            whole = torch.linalg.qr(torch.where(finite[:, None, None], carried, 0.0))
            diagonal = whole.R.diagonal(dim1=-2, dim2=-1).abs().log()
            growth[block.tokens] = torch.where(finite[:, None], diagonal, torch.nan)
            basis[block.tokens] = whole.Q
            del block  # what is recorded for it goes before the next one is made
        found.append(growth)
    return torch.stack(found, dim=2)
