"""What the header of a safetensors file says about a tensor, without its values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["READABLE", "Headers", "TensorHeader"]

READABLE = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Kinds of numbers that weights are read from, as safetensors spells them and as we do."""

_OTHER = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"} | {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One entry of a header."""

    shape: tuple[int, ...]
    code: str
    """Kind of numbers as safetensors spells it: F32, BF16."""
    file: str
    """Name of the file that holds the tensor."""

    @property
    def dtype(self) -> str:
        """Kind of numbers as torch spells it: float32, bfloat16."""
        return (READABLE | _OTHER).get(self.code, self.code)

    @property
    def nbytes(self) -> int:
        """Size in the file; kinds that are not listed here have a byte for each number."""
        return math.prod(self.shape) * _BYTES.get(self.code, 1)


Headers = Mapping[str, TensorHeader]
"""All tensors of a checkpoint, by name."""
