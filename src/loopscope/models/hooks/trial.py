"""Trying a model on a few tokens, and what to say where that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from loopscope.errors import ConfigError, LoopscopeError
from loopscope.models.hooks.called import WatchedForward
from loopscope.models.hooks.calls import ModelCall, is_pretrained
from loopscope.models.hooks.discovery import discover
from loopscope.models.hooks.layout import HookLayout
from loopscope.models.hooks.pausing import Setting, devices_of
from loopscope.models.hooks.probe import PROBE_TOKENS, probe_batch
from loopscope.models.hooks.wrappers import is_dispatched
from loopscope.models.subject import Batch

ProbeTokens = int | Sequence[int] | Tensor
"""How many tokens, or the ids of one prompt."""


def probe_of(model: nn.Module, given: ProbeTokens | None = None) -> Batch:
    """A few tokens on the model's device, on which facts are measured; `given` are those, or how many.

    Raises `ConfigError` for what is neither.
    """
    if given is None:
        given = min(PROBE_TOKENS, positions_of(model) or PROBE_TOKENS)
    if isinstance(given, int) and given > 0:
        probe = probe_batch(given)
    else:
        tokens = torch.as_tensor(given)
        if tokens.ndim == 2 and len(tokens) == 1:
            tokens = tokens[0]
        if tokens.ndim != 1 or not len(tokens) or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ConfigError(f"probe must be a number of tokens, or the ids of one prompt, got {given!r:.80}.")
        probe = Batch.of([tokens.tolist()])
    return probe.to(devices_of(model)[0])


def positions_of(model: nn.Module) -> int | None:
    """The longest text, where a configuration like those of transformers says it."""
    config: Any = getattr(model, "config", None)
    if is_pretrained(model):
        config = config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None  # XLNet has -1


def check_weights(model: nn.Module) -> None:
    """Raises `ConfigError` for a model that cannot be run, as its weights are not there."""
    if any(parameter.is_meta for parameter in model.parameters()) and not is_dispatched(model):
        raise ConfigError(f"{type(model).__name__} has weights on the device 'meta', which are not there; load them.")


@contextmanager
def trial(model: nn.Module, *, is_function: bool, trained: int | None) -> Iterator[None]:
    """Says of what the model raises within that it failed on the probe, and what may help."""
    try:
        yield
    except LoopscopeError:
        raise
    except Exception as error:
        advice = (
            "check that it runs by itself; give loopscope.hook the tokens it takes, or how many, as probe=, or say how "
            "it is called as forward="
        )
        if is_function and trained is None:
            advice = (
                "it was called with nothing set, to count its recurrences; give their number, as in "
                f"trained_recurrences=4, which set_recurrences is then asked for; or {advice}"
            )
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{type(model).__name__} failed when it was tried on a few tokens ({type(error).__name__}: {reason}); "
            f"{advice}."
        ) from error


def check_setting(
    call: ModelCall,
    probe: Batch,
    layout: HookLayout,
    given: Setting | Callable[[int], Mapping[str, Any]],
    own: int,
    error: ConfigError,
) -> None:
    """Raises `ConfigError` if what is to set the number of recurrences changes nothing, and names what does.

    `error` is what went wrong; it is left to say so where the setting has an effect, or the model fails with it.
    """
    first = layout.recurrent[0]
    before = given.get() if isinstance(given, Setting) else 0
    counts = set()
    try:
        for count in (own, own + 1):
            extra: Mapping[str, Any] = {}
            if isinstance(given, Setting):
                given.set(count)
            else:
                extra = given(count)
            counts.add(len(WatchedForward(call, probe, extra).calls([first.module])))
    except Exception:  # then the first error says more
        return
    finally:
        if isinstance(given, Setting):
            given.set(before)
    if len(counts) > 1:
        return
    advice = "name what sets it, or leave it out to run the model's own number"
    with suppress(Exception):
        there = discover(call, probe).setting
        advice = f"{there} does" if there is not None else advice
    path = f"set_recurrences={given.path!r}" if isinstance(given, Setting) else "set_recurrences"
    raise ConfigError(
        f"{path} changed nothing: {type(call.model).__name__} called {first.path} {counts.pop()} times whatever number "
        f"was set; {advice}."
    ) from error
