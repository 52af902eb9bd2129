"""Every exception that loopscope raises on purpose.

    LoopscopeError                one sentence for the user: what is wrong, and what to do
    ├── ConfigError               a setting or a configuration file
    ├── CheckpointError           a model's files: missing, damaged, unknown, not fitting
    │   └── UnknownFamilyError    a model's files may be whole, but loopscope has no reader for them
    │       └── UnknownSettingError   it has one for the family, but not with a setting of these files
    ├── PromptError               prompts, token ids, tokenizers
    ├── NonFiniteError            NaN or infinity where a finite number is needed
    ├── StudyError                an output folder or a saved study
    ├── FolderBusyError           another process is writing to the folder of a study or a training run
    ├── StorageError              writing failed: full disk, no permission; a path that the system refuses
    ├── WorkerError               work that was handed to other processes failed there
    ├── MissingDependencyError    an optional package is needed and not installed
    ├── ContractError             a subject breaks promises that loopscope relies on
    └── UnforeseenError           everything else: a mistake of loopscope's own, or memory that ran out

The command line prints the message and exits with status 2, or 70 for the last; nobody needs a traceback to learn that
a path is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST, _LONGEST_WORD = 600, 200
"""Characters of a message, and of a name in it: what is longer is cut in the middle, as a path's ends tell most."""


class LoopscopeError(Exception):
    """Base of all errors whose message is written for the user."""

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(message))


class ConfigError(LoopscopeError):
    """A setting or a configuration file is wrong."""


class CheckpointError(LoopscopeError):
    """A model cannot be loaded from the given folder."""


class UnknownFamilyError(CheckpointError):
    """loopscope has no reader of its own for these files; the package transformers may have one."""


class UnknownSettingError(UnknownFamilyError):
    """A family that loopscope reads itself has a setting that its reader lacks."""


class PromptError(LoopscopeError):
    """Prompts cannot be read or do not fit the model."""


class NonFiniteError(LoopscopeError):
    """A weight, an initial state or an early state is NaN or infinite."""


class StudyError(LoopscopeError):
    """A study folder cannot be used."""


class FolderBusyError(LoopscopeError):
    """Another process is writing to the folder."""


class StorageError(LoopscopeError):
    """A file could not be written, or its place not be used."""


class MissingDependencyError(LoopscopeError):
    """An optional package is not installed."""


class WorkerError(LoopscopeError):
    """Work that was handed to other processes could not be done there."""


class ContractError(LoopscopeError, AssertionError):
    """A subject breaks promises of `loopscope.check_subject`; the message lists all of them, a line each."""

    def __init__(self, message: str = "") -> None:
        Exception.__init__(self, message)


class UnforeseenError(LoopscopeError):
    """Something that nobody foresaw; what was raised is the cause."""


@contextmanager
def last_resort(doing: str) -> Iterator[None]:
    """Let nothing but a `LoopscopeError` out: any other exception becomes an `UnforeseenError` that says what was being
    done, with the original as its cause.

    Also a decorator. What asks a program to stop is let through.
    """
    try:
        yield
    except (LoopscopeError, KeyboardInterrupt, SystemExit, GeneratorExit, BrokenPipeError):
        raise
    except BaseException as error:
        if ran_out(error):
            raise UnforeseenError(
                f"Memory ran out while loopscope was {doing} ({one_line(error)}); ask for less at a time, or take a "
                "machine with more."
            ) from error
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            # The system says itself what is wrong, and with what.
            raise StorageError(f"{error.filename} cannot be used ({error.strerror}); check the path.") from error
        raise UnforeseenError(
            f"loopscope was {doing} when something happened that it does not know ({one_line(error)}); if its input "
            "is sound, please report this."
        ) from error


def ran_out(error: BaseException) -> bool:
    """Whether memory did, as numpy and torch say it."""
    said = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in said or "out of memory" in said)
    )


def one_line(error: BaseException) -> str:
    """What an exception of others says, short enough to be put into a sentence."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = (said.strip().splitlines() or [""])[0].rstrip(".")
    name = type(error).__name__
    shown = line if isinstance(error, OSError | ValueError) and line else f"{name}: {line}" if line else name
    return shortened(shown, _LONGEST_WORD)


def shortened(message: str, longest: int = _LONGEST) -> str:
    """Names, and then the whole, cut in the middle where they are too long; what has no shape is replaced."""
    message = message.encode(errors="backslashreplace").decode()
    return _cut(re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda word: _cut(word[0], _LONGEST_WORD), message), longest)


def _cut(text: str, longest: int) -> str:
    ahead = 2 * longest // 3
    return text if len(text) <= longest else f"{text[:ahead]}…{text[len(text) - (longest - ahead - 1) :]}"
