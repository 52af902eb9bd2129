"""How much two numbers that mean the same may differ."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Tolerances"]

_BY_DTYPE = {"float64": 1e-9, "float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}
"""Another batch shape adds the same terms in another order, and a loop carries the difference on and may enlarge it.
The shipped models, with prompts of up to 150 tokens and 68 visits, differ by 2e-6 in float32, 4e-3 in float16 and 3e-2
in bfloat16; these limits leave room for deeper ones. What the contract looks for, a token that sees padding or another
prompt's state, changes numbers by their own size."""


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """Largest difference allowed, relative to the largest magnitude in the token's vector (state, logits, map row)."""

    repeated: float = 0.0
    """Between two runs of the same computation. One machine gives the same bits twice; a model whose kernels add in no
    fixed order does not, and needs more."""
    regrouped: float | None = None
    """Between a prompt alone and in a padded batch; by the model's dtype unless given."""
    raw: float | None = None
    """Between the subject's logits and those of the raw model. Unless given, nothing for a model of loopscope or a
    hooked module, which run the same operations, and by dtype for a `raw_logits` of the caller's."""
    probability: float = 1e-5
    """Of a sum of attention probabilities from 1. They are float32 or wider, whatever the model runs in, but for maps
    that a hooked model made in half precision, which may be as far from 1 as that resolves."""

    def regrouped_in(self, dtype: str) -> float:
        """The limit for prompts in a batch, of a model that runs in `dtype`."""
        return _BY_DTYPE[dtype] if self.regrouped is None else self.regrouped

    def raw_in(self, dtype: str, *, is_own: bool) -> float:
        """The limit against the raw model, which is the subject's own module or another implementation."""
        if self.raw is not None:
            return self.raw
        return self.repeated if is_own else _BY_DTYPE[dtype]
