"""Any other torch model through hooks: its layers' forward passes are visits.

`hook` wraps a module, `load_hooked` a folder that the transformers package can load; both return a `HookedSubject`.
"""

from loopscope.hooks.hooked import HookedRun, HookedSubject
from loopscope.hooks.pretrained import load_hooked
from loopscope.hooks.wrap import hook

__all__ = ["HookedRun", "HookedSubject", "hook", "load_hooked"]
