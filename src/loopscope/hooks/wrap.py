"""`loopscope.hook`."""

from __future__ import annotations

from torch import nn

from loopscope.errors import ConfigError
from loopscope.hooks.calling import Forward, is_pretrained
from loopscope.hooks.decoders import find_layout
from loopscope.hooks.hooked import HookedSubject, SetRecurrences
from loopscope.hooks.layout import Layers, Layout, find_layers, find_module
from loopscope.prompts import TextTokenizer

__all__ = ["hook"]


def hook(
    model: nn.Module,
    *,
    prelude: Layers | None = None,
    recurrent: Layers | None = None,
    coda: Layers | None = None,
    loop_end: str | nn.Module | None = None,
    set_recurrences: SetRecurrences | None = None,
    trained_recurrences: int | None = None,
    forward: Forward | None = None,
    name: str | None = None,
    tokenizer: TextTokenizer | None = None,
) -> HookedSubject:
    """Any torch module as a subject, which `capture`, `analyze` and the contract take.

    Each call of a layer is a visit, and visits are counted, so that all R of a recurrent layer are seen. Attention is
    seen where it is computed by `scaled_dot_product_attention` or as a softmax over (batch, head, query, key).

    **Arguments**

    - `prelude`, `recurrent`, `coda`: the layers before, in and after the loop, as dotted paths (`"model.layers"`) or
      modules. A list of layers stands for its layers; a sequence gives the order of calls, in which a layer may come
      more than once. `recurrent` is one recurrence. A feed-forward model's layers are its prelude. Decoders of
      transformers are laid out by themselves if none of the three is given.
    - `loop_end`: a module that is called once at the end of each recurrence, after its last layer, and whose output is
      what the loop carries on; the last layer's output is unless given.
    - `set_recurrences`: dotted path of the attribute with the number of recurrences (`"config.total_ut_steps"`), which
      is set for a run and restored; or a function of the model and the number, called when a run begins, that may
      return keyword arguments for the model's forward. What it changes in the model stays changed. Without it only the
      model's own number can be run.
    - `trained_recurrences`: the model's own number, if it cannot be counted in a run with nothing set.
    - `forward`: `forward(model, input_ids, mask, **keyword_arguments) -> logits` if the model is not called as
      `model(input_ids, attention_mask=...)`; the mask is True for tokens, (batch, token).
    - `name`, `tokenizer`: for results and for prompts that are texts.

    The module is run on a few tokens, about ten times, to measure what would otherwise be assumed: whether the loop
    carries its state unchanged and the prompt enters by it alone, whether random numbers are drawn, whether anything is
    overwritten in place, what padding does, how wide it is.

    While a run computes, the module is in evaluation mode; each module's own mode is back whenever the run stands
    still. Weights are never changed. A model that torch has compiled is run without its compiled code.

    Raises `ConfigError` for paths that lead nowhere, layers that are called in another order than given or not at all,
    layers whose first output is not the state, a model that fails on the probe, and one that gives other numbers when
    it is run again.
    """
    compiled = getattr(model, "_orig_mod", None)
    model = compiled if isinstance(compiled, nn.Module) else model
    given = (prelude, recurrent, coda, loop_end)
    if is_pretrained(model) and all(entry is None for entry in given):
        layout, own_path = find_layout(model)
        set_recurrences = set_recurrences or own_path
    else:
        layout = Layout(
            prelude=find_layers(model, prelude, "prelude"),
            recurrent=find_layers(model, recurrent, "recurrent"),
            coda=find_layers(model, coda, "coda"),
            loop_end=None if loop_end is None else find_module(model, loop_end, "loop_end"),
        )
    if not layout.recurrent and (set_recurrences is not None or trained_recurrences is not None):
        raise ConfigError("set_recurrences and trained_recurrences mean nothing without recurrent layers; name them.")
    return HookedSubject(
        model,
        layout,
        set_recurrences=set_recurrences,
        trained_recurrences=trained_recurrences,
        forward=forward,
        name=name,
        tokenizer=tokenizer,
    )
