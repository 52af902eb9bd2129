"""`loopscope.inspect_model`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loopscope.checkpoints import Family, find_layout, peek_checkpoint
from loopscope.errors import UnknownFamilyError
from loopscope.inspection.facts import Inspection, TokenizerFacts
from loopscope.inspection.hooked import inspect_hooked
from loopscope.inspection.native import inspect_native
from loopscope.prompts import load_tokenizer
from loopscope.settings import RunSize

__all__ = ["inspect_model"]


def inspect_model(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    run: RunSize | None = None,
    families: Sequence[Family] = (),
) -> Inspection:
    """What a model is and what running it would take, without loading a weight.

    Takes the names that `load` takes. Of a model on the hub only config.json, the tokenizer's files and the headers of
    its tensors are downloaded. `run` is the size of run for which memory is estimated; `families` are formats of your
    own.

    Raises `CheckpointError` for a folder that is no checkpoint, or one that neither loopscope nor transformers could
    load; `MissingDependencyError` where transformers would be needed to know; `PromptError` for a damaged tokenizer.
    """
    run = run or RunSize()
    peek = peek_checkpoint(name_or_path, revision)
    tokenizer = _tokenizer(peek.folder)
    try:
        layout = find_layout(peek.config, peek.headers, str(name_or_path), families)
    except UnknownFamilyError as unknown:
        return inspect_hooked(name_or_path, peek, unknown, tokenizer, run)
    return inspect_native(name_or_path, peek, layout, tokenizer, run)


def _tokenizer(folder: Path) -> TokenizerFacts | None:
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None
    return TokenizerFacts(
        tokens=tokenizer.vocab_size,
        before=tuple(token.text for token in tokenizer.before),
        after=tuple(token.text for token in tokenizer.after),
        chat_template=tokenizer.chat_template is not None,
        notes=tuple(tokenizer.notes),
    )
