"""Stages of inference: entropy and magnitude of the residual stream, in every visit (arXiv 2604.11791, section 5)."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from loopscope.measures.base import Arrays, Frame, Measure, Named, depth_count, depth_of, masked_mean, on_arrays
from loopscope.measures.functions import residual_norm, widen
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.visits import Visit

KURTOSIS = 10.0
"""Above this kurtosis (3 for a normal distribution) a few tokens stand far out of the rest, and a neuron predicts or
suppresses them."""

_CHUNK = 2**24
"""Cosines that are held at a time: 64 MiB in float32."""

TokenStates = Float[Tensor, "*shape token width"]
Values = Float[Tensor, "*shape"]


@torch.no_grad()
def neuron_moments(
    output: Float[Tensor, "width neuron"], unembedding: Float[Tensor, "vocabulary width"]
) -> tuple[Float[Tensor, " neuron"], Float[Tensor, " neuron"]]:
    """Kurtosis (3 for a normal distribution) and skew, over the vocabulary, of the cosines between what a neuron of an
    MLP writes into the residual stream and the unembedding of each token.

    NaN for a neuron that writes nothing.
    """
    directions = functional.normalize(widen(output).T, dim=-1)
    tokens = functional.normalize(widen(unembedding), dim=-1)
    kurtosis, skew = [], []
    for rows in directions.split(max(1, _CHUNK // tokens.shape[0])):
        cosines = (rows @ tokens.T).double()
        away = cosines - cosines.mean(-1, keepdim=True)
        square = away.square()
        variance = square.mean(-1)
        kurtosis.append(square.square().mean(-1) / variance.square())
        skew.append((square * away).mean(-1) / variance**1.5)
    return torch.cat(kurtosis), torch.cat(skew)


def neuron_operations(model: LoopedTransformer) -> float:
    """Floating-point operations that `neurons` takes."""
    architecture = model.architecture
    return 2.0 * architecture.layers * architecture.mlp_width * architecture.vocab_size * architecture.width


def neurons(model: LoopedTransformer) -> dict[str, Named]:
    """Moments of every neuron, and the shares of prediction and suppression neurons in each unique layer.

    Prelude, recurrent block and coda in this order. The final norm between residual stream and unembedding is left out,
    as the method has it.
    """
    unembedding = model.embedding.weight if model.head is None else model.head.weight
    moments = [
        neuron_moments(layer.mlp.down.weight, unembedding) for layer in (*model.prelude, *model.recurrent, *model.coda)
    ]
    kurtosis, skew = (np.stack([pair[index].float().cpu().numpy() for pair in moments]) for index in (0, 1))
    stands_out = kurtosis > KURTOSIS
    share, each = ("unique_layer",), ("unique_layer", "neuron")
    return {
        "prediction_neurons": Named(share, (stands_out & (skew > 0)).mean(-1)),
        "suppression_neurons": Named(share, (stands_out & (skew < 0)).mean(-1)),
        "neuron_kurtosis": Named(each, kurtosis),
        "neuron_skew": Named(each, skew),
    }


STAGE_NAMES = (
    "residual_entropy",
    "relative_residual_entropy",
    "mean_token_norm",
    "largest_token_norm",
    "massive_activation",
    "massive_token",
    "massive_dimension",
)
"""Per visit and prompt."""


@on_arrays
def residual_entropy(states: TokenStates) -> Values:
    """`-sum_j p_j log p_j` with `p_j = s_j^2 / sum s^2`, s the singular values of the (token, width) matrix, in nats.

    From the smaller Gram matrix, in float64. Rows are not normalised: massive activations must count.
    """
    wide = states.double()
    tokens, width = wide.shape[-2:]
    gram = wide @ wide.mT if tokens <= width else wide.mT @ wide
    # A matrix with an entry that is not finite has such a square on the diagonal too.
    finite = torch.isfinite(gram.diagonal(dim1=-2, dim2=-1).sum(-1))
    # One matrix that is not finite would fail the whole batch.
    squares = torch.linalg.eigvalsh(torch.where(finite[..., None, None], gram, 0.0)).clamp(min=0)
    shares = squares / squares.sum(-1, keepdim=True)
    return torch.where(finite, torch.special.entr(shares).sum(-1), torch.nan)


@on_arrays
def relative_residual_entropy(states: TokenStates) -> Values:
    """`residual_entropy` over the most there can be, `log min(T, D)`; in [0, 1], NaN for a single token."""
    most = torch.tensor(min(states.shape[-2:]), dtype=torch.float64).log()
    return residual_entropy(states) / torch.where(most > 0, most, torch.nan)


@on_arrays
def massive_activation(states: TokenStates) -> Values:
    """Largest |entry| over the median |entry| (the lower of two middle ones) of a (token, width) matrix."""
    return _massive(states)[0]


@on_arrays
def massive_activation_place(states: TokenStates) -> Tensor:
    """(token, dimension) of the largest |entry|, (..., 2)."""
    return _massive(states)[1]


def _massive(states: TokenStates) -> tuple[Tensor, Tensor]:
    """Both of the above, from one pass over the entries."""
    entries = widen(states).abs().flatten(-2)
    largest, place = entries.max(-1)
    return largest / _lower_median(entries), torch.stack((place // states.shape[-1], place % states.shape[-1]), -1)


def _lower_median(values: Float[Tensor, "*shape entry"]) -> Values:
    """The median, the lower of two middle ones. On a CPU numpy selects it ten times as fast as torch."""
    if values.device.type != "cpu" or values.requires_grad:
        return values.median(-1).values
    middle = (values.shape[-1] - 1) // 2
    return torch.as_tensor(np.partition(values.numpy(), middle, axis=-1)[..., middle])


class StageMeasures(Measure):
    """One row of numbers a visit and prompt."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        info = frame.info
        depths = depth_count(frame)
        self._lengths = frame.counts.tolist()
        most = [min(length, info.width) for length in self._lengths]
        self._most = torch.tensor(most, dtype=torch.float64).log()
        self._values = np.full((len(STAGE_NAMES), depths, frame.prompts), np.nan, dtype=np.float64)

    def visit(self, visit: Visit) -> None:
        depth = depth_of(self.frame, visit.stage, visit.layer, visit.recurrence)
        states = visit.residual.masked_fill(~self.frame.mask.unsqueeze(-1), 0.0)
        # Rows of zeros, the padding, add nothing to a Gram matrix but eigenvalues of zero.
        entropy = residual_entropy(states).cpu()
        norms = residual_norm(states)
        massive, places = [], []
        for prompt, length in enumerate(self._lengths):
            ratio, found = _massive(states[prompt, :length])
            massive.append(ratio)
            places.append(found)
        place = torch.stack(places).double().cpu()
        values = (
            entropy,
            torch.where(self._most > 0, entropy / self._most, torch.nan),
            masked_mean(norms, self.frame.mask).cpu(),
            norms.amax(-1).cpu(),
            torch.stack(massive).cpu(),
            place[:, 0],
            place[:, 1],
        )
        self._values[:, depth] = np.stack([value.double().numpy() for value in values])

    def finish(self) -> Arrays:
        dims = ("depth", "prompt")
        return Arrays({name: Named(dims, self._values[index]) for index, name in enumerate(STAGE_NAMES)})
