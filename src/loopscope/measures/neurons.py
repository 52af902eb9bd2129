"""Prediction and suppression neurons: what the MLPs write towards the tokens, from the weights alone (method, section
6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from loopscope.measures.base import Declared, Variable, variable
from loopscope.measures.functions import widen
from loopscope.models.inspection.facts import Sizes
from loopscope.models.native.attention import RMSNorm
from loopscope.models.native.layer import Layer
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.subject import Subject

KURTOSIS = 10.0
"""Above this kurtosis (3 for a normal distribution) a few tokens stand far out of the rest, and a neuron predicts or
suppresses them."""

_CHUNK = 2**21
"""Cosines that are held at a time: 16 MiB in float64, and twice that of their powers."""


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
        away = (rows @ tokens.T).double()
        away -= away.mean(-1, keepdim=True)
        square = away.square()
        variance = square.mean(-1)
        kurtosis.append(square.square().mean(-1) / variance.square())
        skew.append((square * away).mean(-1) / variance**1.5)
    return torch.cat(kurtosis), torch.cat(skew)


def folded_unembedding(model: LoopedTransformer) -> Float[Tensor, "vocabulary width"]:
    """The unembedding with the weights of the final norm in it, less its mean over the vocabulary, which moves all
    logits alike (Gurnee et al., arXiv 2401.12181, appendix)."""
    read = widen(_unembedding(model)) * widen(model.norm.weight)
    return read - read.mean(0)


def folded_output(layer: Layer) -> Float[Tensor, "width neuron"]:
    """What its MLP's neurons write, with the weights of the norm behind the MLP in it, where there is one."""
    output = widen(layer.weight("mlp.down.weight"))
    return output * widen(layer.weight("norm_4.weight"))[:, None] if isinstance(layer.norm_4, RMSNorm) else output


def _unembedding(model: LoopedTransformer) -> Tensor:
    return model.embedding.weight if model.head is None else model.head.weight


class Neurons(Declared):
    """Moments of every neuron, and the shares of prediction and suppression neurons in each unique layer.

    Prelude, recurrent block and coda in this order. Raw: between the weights as they are, as the method has it. Folded:
    with the weights of the norms between them. They are no batch's: a study has them once.
    """

    part = "neurons"
    variables: ClassVar[dict[str, Variable]] = {
        "prediction_neurons": variable(
            "unique_layer",
            "share of MLP neurons for which the cosines of the output with the unembeddings of all tokens have a "
            "kurtosis above 10 and positive skew; from the weights alone",
        ),
        "suppression_neurons": variable("unique_layer", "prediction_neurons with negative skew instead"),
        "neuron_kurtosis": variable("unique_layer neuron", "kurtosis of those cosines; 3 for a normal distribution"),
        "neuron_skew": variable("unique_layer neuron", "skew of those cosines; 0 for a normal distribution"),
        "folded_prediction_neurons": variable(
            "unique_layer",
            "prediction_neurons with the final norm's weights folded into the unembedding, its mean over tokens "
            "subtracted, and the weights of the norm after the MLP folded into the output",
        ),
        "folded_suppression_neurons": variable("unique_layer", "suppression_neurons, folded likewise"),
        "folded_neuron_kurtosis": variable("unique_layer neuron", "neuron_kurtosis, folded likewise"),
        "folded_neuron_skew": variable("unique_layer neuron", "neuron_skew, folded likewise"),
    }
    otherwise = "neurons were not counted (a model watched through hooks, or a count over --neuron-limit)"

    @classmethod
    def of(cls, subject: Subject, limit: float, note: Callable[[str], None]) -> xr.Dataset:
        """Of a native model, if they take at most `limit` tera floating-point operations; else nothing, and why."""
        if not isinstance(subject, NativeSubject):
            return xr.Dataset()
        operations = _tera_operations(Sizes.of(subject.model.architecture))
        if operations > limit:
            note(
                f"Prediction and suppression neurons are left out: counting them takes {operations:.3g} tera "
                "operations; raise --neuron-limit to have them."
            )
            return xr.Dataset()
        return cls.count(subject.model)

    @classmethod
    def memory(cls, sizes: Sizes, limit: float) -> int:
        """Bytes that counting takes: the unembedding twice, as directions and with the norm folded in, what the neurons
        of a layer write, and some cosines. 0 for more than `limit` tera operations."""
        if _tera_operations(sizes) > limit:
            return 0
        wide = 4 * sizes.width * (3 * sizes.vocab_size + 2 * sizes.mlp_width)
        return wide + 28 * min(_CHUNK, sizes.vocab_size * sizes.mlp_width)

    @classmethod
    def count(cls, model: LoopedTransformer) -> xr.Dataset:
        raw = _shares((layer.weight("mlp.down.weight") for layer in model.layers()), _unembedding(model))
        folded = _shares((folded_output(layer) for layer in model.layers()), folded_unembedding(model))
        return cls.dataset({**raw, **{f"folded_{name}": values for name, values in folded.items()}})


def _tera_operations(sizes: Sizes) -> float:
    layers = sizes.prelude + sizes.recurrent + sizes.coda
    return 4e-12 * layers * sizes.mlp_width * sizes.vocab_size * sizes.width


def _shares(outputs: Iterable[Tensor], unembedding: Tensor) -> dict[str, np.ndarray]:
    moments = [neuron_moments(output.to(unembedding.device), unembedding) for output in outputs]
    stored = torch.float64 if unembedding.dtype == torch.float64 else torch.float32
    kurtosis, skew = (np.stack([pair[index].to(stored).cpu().numpy() for pair in moments]) for index in (0, 1))
    stands_out = kurtosis > KURTOSIS
    return {
        "prediction_neurons": (stands_out & (skew > 0)).mean(-1),
        "suppression_neurons": (stands_out & (skew < 0)).mean(-1),
        "neuron_kurtosis": kurtosis,
        "neuron_skew": skew,
    }
