"""Names for the shapes that flow through loopscope, used in annotations.

They are checked at run time only where the tests switch that on (see `tests/conftest.py`).
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

TokenIds = Int64[Tensor, "batch token"]
TokenMask = Bool[Tensor, "batch token"]
TokenValues = Float[Tensor, "batch token"]
States = Float[Tensor, "batch token width"]
Noise = Float32[Tensor, "batch token width"]
Logits = Float[Tensor, "batch token vocabulary"]
Queries = Float[Tensor, "batch head token head_dim"]
Keys = Float[Tensor, "batch kv_head token head_dim"]
Values = Float[Tensor, "batch kv_head token value_dim"]
SeenKeys = Float[Tensor, "batch kv_head key head_dim"]
Maps = Float[Tensor, "batch head query key"]
Rows = Float[Tensor, "batch head row key"]
Rotation = Float[Tensor, "#batch 1 token half"]
