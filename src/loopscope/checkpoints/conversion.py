"""The command that turns pickled weights into safetensors, for those who trust where the weights came from."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath

__all__ = ["PICKLED", "conversion_command", "is_pickled"]

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of files that are read by unpickling, which can run code."""

# One line, so that it can be copied. `weights_only` refuses pickles that would run code; clones give tensors that
# share memory, such as a tied head, each its own, without which safetensors refuses to write them.
_SCRIPT = (
    "import sys, torch; from pathlib import Path; from safetensors.torch import save_file; "
    "folder = Path(sys.argv[1]); save_file({name: tensor.clone().contiguous() "
    "for file in sorted(folder.glob(sys.argv[2])) "
    "for name, tensor in torch.load(file, map_location='cpu', weights_only=True).items()}, "
    "folder / 'model.safetensors', metadata={'format': 'pt'})"
)


def is_pickled(name: str) -> bool:
    """Whether a file of this name would have to be unpickled."""
    return PurePath(name).suffix in PICKLED


def conversion_command(folder: Path, names: Sequence[str]) -> str:
    """A shell command that writes model.safetensors beside the pickled files of the given names, of one or several
    shards.

    It needs torch and safetensors alone. Other pickled files than weights (training_args.bin) are left out.
    """
    standard = [name for name in names if name.startswith("pytorch_model")]
    pattern = "pytorch_model*.bin" if standard else "*" + PurePath(names[0]).suffix
    return f'python -c "{_SCRIPT}" {shlex.quote(str(folder))} {shlex.quote(pattern)}'
