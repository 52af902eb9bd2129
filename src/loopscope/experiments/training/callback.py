"""The numbers of a `LoopProbe` in the log of `transformers.Trainer`. Needs the extra `transformers`."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback

from loopscope._util.ranges import Range
from loopscope.errors import ConfigError
from loopscope.experiments.training.probe import LoopProbe


class LoopCallback(TrainerCallback):
    """Calls a probe every so many steps and gives what it finds to the trainer's own log, and so to whatever trackers
    `report_to` names.

        trainer.add_callback(LoopCallback(trainer, LoopProbe(model, prompts)))
    """

    def __init__(self, trainer: Trainer, probe: LoopProbe, *, every: int = 100) -> None:
        """Raises `ConfigError` for a number of steps below 1."""
        broken = Range(1).broken_by(every)
        if broken:
            raise ConfigError(f"every must {broken}, got {every}.")
        self._trainer, self._probe, self._every = trainer, probe, every

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._every == 0 and state.is_world_process_zero:
            self._trainer.log(self._probe())
