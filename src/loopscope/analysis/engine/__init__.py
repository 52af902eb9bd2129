"""Independent items of work, done in this process, in worker processes of this machine, or on a Ray cluster.

Every engine gives the same results: what is done with an item depends on the item alone. A worker that dies loses
nothing but the item it had, which is done again by another.
"""

from loopscope.analysis.engine.cpus import cpu_count
from loopscope.analysis.engine.processes import ProcessEngine
from loopscope.analysis.engine.ray_cluster import RayEngine
from loopscope.analysis.engine.run import Engine, Worker, WorkerDiedError, run_items
from loopscope.analysis.settings import EngineName

__all__ = ["Engine", "Worker", "WorkerDiedError", "make_engine", "run_items"]


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
