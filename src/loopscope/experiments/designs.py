"""The designs of random models: norms, injections and scales. A help text needs these, so nothing is imported."""

from __future__ import annotations

from typing import Literal, get_args

NormName = Literal["pre", "residual", "ouro", "olmo2"]
"""pre-norm; a norm on the residual stream after each branch (Huginn); norms in and out of each branch and at the end of
a recurrence (Ouro); norms on the output of each branch (OLMo-2)."""
InjectionName = Literal["none", "linear", "add"]
NORMS: tuple[NormName, ...] = get_args(NormName)
INJECTIONS: tuple[InjectionName, ...] = get_args(InjectionName)
SCALES = (0.01, 0.02, 0.03, 0.045, 0.0625, 0.09)
"""Standard deviations of the weights: the usual 0.02, 1/16 as of PyTorch's linear layers of width 256, and around."""
