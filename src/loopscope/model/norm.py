"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich, arXiv 1910.07467).

    Half-precision inputs are normalised in float32 and rounded before the weight is applied, as the published code of
    the families does; OLMo-2's applies the weight first, which differs in the last bit.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.bfloat16, torch.float16):
            return functional.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
