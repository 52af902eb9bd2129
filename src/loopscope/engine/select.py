"""From settings to an engine."""

from __future__ import annotations

from loopscope.engine.cpus import cpu_count
from loopscope.engine.processes import ProcessEngine
from loopscope.engine.ray_cluster import RayEngine
from loopscope.engine.run import Engine
from loopscope.settings import EngineName

__all__ = ["make_engine"]


def make_engine(
    name: EngineName, workers: int | None = None, address: str = "auto", gpus: float = 0.0
) -> Engine | None:
    """None for this process. `workers` is as many as there are CPUs unless given; `gpus` is the share of one that each
    worker on a Ray cluster asks for."""
    if name == "serial":
        return None
    if name == "processes":
        return ProcessEngine(workers or cpu_count())
    return RayEngine(address, workers, gpus)
