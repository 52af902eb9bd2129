"""The command line. A command's module is imported when it is run, so that `loopscope --help` answers at once."""

from __future__ import annotations

import atexit
import gc
import io
import itertools
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from loopscope._util.signals import STOPPING

__all__ = ["main"]

_TIDYING = 2.0
"""Seconds after a signal for which others are ignored: somebody who presses Ctrl-C twice wants no more left behind."""
_NARROWEST = 40
"""Columns that are written to even where there are fewer: a line of words needs some, and where none are known, as
COLUMNS=0 says, nothing would be shown."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `loopscope ARGUMENTS` and exit: 0; 2 for input that cannot be used, with one sentence; 70 for what nobody
    foresaw, with one sentence and the traceback in a file; 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
    from loopscope.errors import LoopscopeError, UnforeseenError, last_resort, shortened

    # A waiting OpenMP thread would spin, which on a busy machine costs many times the work itself.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # When this process ends, nobody needs to look for garbage in all that it has imported.
    atexit.register(gc.freeze)
    _fit_output()
    given = sys.argv[1:] if arguments is None else list(arguments)
    stopped_by = [signal.SIGINT]
    try:
        doing = f"running `{shortened(' '.join(['loopscope', *given]), 120)}`"
        with _signals(stopped_by), last_resort(doing), _output():
            from loopscope.cli.commands import parse_and_run  # tyro takes a tenth of a second to import

            parse_and_run(given)
    except UnforeseenError as error:
        print(f"loopscope: {error} The full account is in {_written(error, given)}.", file=sys.stderr)
        sys.exit(os.EX_SOFTWARE if hasattr(os, "EX_SOFTWARE") else 70)
    except LoopscopeError as error:
        print(f"loopscope: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        kept = f"; what was finished is kept, {stopped}" if str(stopped) else ""
        print(f"loopscope: interrupted{kept}.", file=sys.stderr)
        sys.exit(128 + stopped_by[-1])
    except BrokenPipeError:
        # The reader of our output has gone, as in `loopscope models | head -1`.
        sys.stderr.close()
        sys.exit(1)


def _fit_output() -> None:
    """Whatever the terminal is, it is written to: what its encoding lacks is replaced, and it has some width."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if not os.environ.get("COLUMNS", "unset").strip("0"):
        del os.environ["COLUMNS"]
    if shutil.get_terminal_size().columns < _NARROWEST:
        os.environ["COLUMNS"] = str(_NARROWEST)


@contextmanager
def _output() -> Iterator[None]:
    """What is printed in here is out at the end. Raises `StorageError` where it cannot be."""
    try:
        yield
    except OSError:
        _print_now("\n")  # which fails too, if it was the output that failed
        raise
    finally:
        _print_now("")


def _print_now(text: str) -> None:
    from loopscope.errors import StorageError

    try:
        if text:
            print(end=text)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = io.StringIO()  # or what is left would be tried once more when the process ends
        raise StorageError(
            f"What the command says cannot be written ({error.strerror or error}); send its output elsewhere."
        ) from error


@contextmanager
def _signals(received: list[signal.Signals]) -> Iterator[None]:
    """SIGTERM and SIGHUP are answered as Ctrl-C is: workers are ended, locks and temporary files go. A signal that the
    caller ignores, as `nohup` does, stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = -_TIDYING

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= _TIDYING:
            received.append(signal.Signals(number))
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)
    try:
        yield
    finally:
        # After a signal this process is about to end, which takes some time too.
        if last < 0:
            for number, handler in before.items():
                signal.signal(number, handler)


def _written(error: BaseException, arguments: Sequence[str]) -> Path | str:
    """The file that holds the traceback: beside the output, or where temporary files are."""
    account = "".join(traceback.format_exception(error)).encode(errors="backslashreplace")
    out = next((after for flag, after in itertools.pairwise(arguments) if flag in ("--out", "--output", "-o")), None)
    for folder in ([] if out is None else [Path(out).parent]) + [Path(tempfile.gettempdir())]:
        try:
            handle, path = tempfile.mkstemp(prefix="loopscope-", suffix=".traceback.txt", dir=folder)
            with os.fdopen(handle, "wb") as file:
                file.write(account)
        except (OSError, ValueError):
            continue
        return Path(path)
    return "no file, since none can be written"
