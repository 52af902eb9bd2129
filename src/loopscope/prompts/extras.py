"""Optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType

from loopscope.errors import MissingDependencyError

__all__ = ["require"]


def require(module: str, purpose: str) -> ModuleType:
    """Import a module of the extra `hub`, or raise `MissingDependencyError` with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingDependencyError(
            f"{purpose} needs the package {package}, which is not installed; run: pip install 'loopscope[hub]'"
        ) from error
