"""The command line. A command's module is imported when it is run, so that `loopscope --help` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `loopscope ARGUMENTS` and exit: 0, 2 for input that cannot be used (with one sentence), 130 after Ctrl-C."""
    from loopscope.cli.commands import parse_and_run  # tyro takes a tenth of a second to import
    from loopscope.errors import LoopscopeError

    # A waiting OpenMP thread would spin, which on a busy machine costs many times the work itself.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        parse_and_run(sys.argv[1:] if arguments is None else list(arguments))
    except LoopscopeError as error:
        print(f"loopscope: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("loopscope: interrupted; what was finished is kept, the same command resumes it.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone, as in `loopscope models | head -1`.
        sys.stderr.close()
        sys.exit(1)
