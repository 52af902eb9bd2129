"""Optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType

from loopscope.errors import MissingDependencyError

__all__ = ["require"]


def require(module: str, purpose: str, extra: str = "hub") -> ModuleType:
    """Import a module of an extra of this package, or raise `MissingDependencyError` with the command that installs it.

    `purpose` begins the sentence: what needs the module.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingDependencyError(
            f"{purpose} needs the package {package}, which is not installed; run: pip install 'loopscope[{extra}]'"
        ) from error
