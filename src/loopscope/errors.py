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
    ├── StorageError              writing failed: full disk, no permission
    ├── WorkerError               work that was handed to other processes failed there
    ├── MissingDependencyError    an optional package is needed and not installed
    └── ContractError             a subject breaks promises that loopscope relies on

The command line prints the message and exits with status 2; nobody needs a traceback to learn that a path is wrong.
"""

from __future__ import annotations


class LoopscopeError(Exception):
    """Base of all errors whose message is written for the user."""


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
    """A file could not be written."""


class MissingDependencyError(LoopscopeError):
    """An optional package is not installed."""


class WorkerError(LoopscopeError):
    """Work that was handed to other processes could not be done there."""


class ContractError(LoopscopeError, AssertionError):
    """A subject breaks promises of `loopscope.check_subject`; the message lists all of them, a line each."""
