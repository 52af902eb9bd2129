"""Prediction and suppression neurons, from the weights alone (method, section 4; Gurnee et al., arXiv 2401.12181)."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from loopscope.measures.base import Named
from loopscope.measures.functions import widen
from loopscope.model import LoopedTransformer

__all__ = ["KURTOSIS", "neuron_moments", "neuron_operations", "neurons"]

KURTOSIS = 10.0
"""Above this kurtosis (3 for a normal distribution) a few tokens stand far out of the rest, and a neuron predicts or
suppresses them."""

_CHUNK = 2**24
"""Cosines that are held at a time: 64 MiB in float32."""


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
