"""What attention heads give to a column beside the tokens, which some models add to the softmax: a learned sink."""

from __future__ import annotations

from typing import ClassVar

import xarray as xr

from loopscope.measures.base import BatchInfo, Measure, Plan, Variable, depth_count, depth_of, masked_mean, variable
from loopscope.measures.functions import widen
from loopscope.models.subject import SubjectInfo
from loopscope.models.visits import Visit


class SinkMass(Measure):
    """The mean of that probability over a prompt's tokens, of every visit and head in which it is seen."""

    part = "heads"
    variables: ClassVar[dict[str, Variable]] = {
        "sink_mass": variable(
            "depth head prompt",
            "mean over tokens of the probability that a head gives to a learned sink, a column beside the "
            "tokens; the tokens get the rest",
        )
    }

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        shape = (depth_count(batch), batch.info.sink_heads or 0, batch.prompts)
        self._mass = batch.unknown(*shape)

    @classmethod
    def absent(cls, info: SubjectInfo, plan: Plan) -> str | None:
        return "no attention of the model has a column beside the tokens" if info.sink_heads is None else None

    def visit(self, visit: Visit) -> None:
        sink = visit.sink
        if sink is not None and sink.shape[1] == self._mass.shape[1]:
            mean = masked_mean(widen(sink), self.batch.mask[:, None])
            self._mass[depth_of(self.batch, visit.stage, visit.layer, visit.recurrence)] = mean.T

    def result(self) -> xr.Dataset:
        return self.dataset({"sink_mass": self._mass})
