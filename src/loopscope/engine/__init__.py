"""Independent items of work, done in this process, in worker processes of this machine, or on a Ray cluster.

Every engine gives the same results: what is done with an item depends on the item alone. A worker that dies loses
nothing but the item it had, which is done again by another.
"""

from loopscope.engine.run import Engine, Worker, WorkerDiedError, run_items
from loopscope.engine.select import make_engine

__all__ = ["Engine", "Worker", "WorkerDiedError", "make_engine", "run_items"]
