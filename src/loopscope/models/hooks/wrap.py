"""`loopscope.hook`, and folders of other families, which transformers loads and the same hooks watch."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from loopscope._util.hub import require
from loopscope.errors import CheckpointError, ConfigError, NonFiniteError, UnknownFamilyError, UnknownSettingError
from loopscope.models.checkpoints.free_memory import check_memory
from loopscope.models.checkpoints.layout import listed, refuse_looped_class
from loopscope.models.checkpoints.placement import DeviceMap, parse_device_map
from loopscope.models.checkpoints.store import READABLE, Headers, TensorStore, read_json
from loopscope.models.hooks.calls import Forward, ModelCall
from loopscope.models.hooks.discovery import Found, find_layout
from loopscope.models.hooks.hooked import HookedSubject, SetRecurrences
from loopscope.models.hooks.how_often import LOOPS
from loopscope.models.hooks.layout import HookLayout, Layers, find_layers, find_module
from loopscope.models.hooks.trial import ProbeTokens, check_weights, probe_of, trial
from loopscope.models.hooks.wrappers import unwrap, weights_of
from loopscope.models.subject import Batch, PrefixReading
from loopscope.prompts.tokenizer import as_tokenizer, load_tokenizer

_NARROW = re.compile(r"F8_|F4|F6")
"""How safetensors names the numbers that only a scale beside them makes weights of."""


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
    tokenizer: object | None = None,
    probe: ProbeTokens | None = None,
    tokens_before: int = 0,
    attention_call: int | None = None,
) -> HookedSubject:
    """Any torch module as a subject, which `capture`, `analyze` and the contract take.

    Each call of a layer is a visit, and visits are counted, so that all R of a recurrent layer are seen. Attention is
    seen where it is computed by `scaled_dot_product_attention` or as a softmax over (batch, head, query, key).

    **Arguments**

    - `prelude`, `recurrent`, `coda`: the layers before, in and after the loop, as dotted paths (`"model.layers"`) or
      modules. A list of layers stands for its layers; a sequence gives the order of calls, in which a layer may come
      more than once. `recurrent` is one recurrence. A feed-forward model's layers are its prelude. If none of the three
      is given, they are found: the model is run once, and what it calls more than once is the loop. Then the settings
      and arguments that may hold the number of recurrences are tried, each set and set back, until one changes the
      order of calls as it should. The subject's `found` says what was found.
    - `loop_end`: a module that is called once at the end of each recurrence, after its last layer, and whose output is
      what the loop carries on; the last layer's output is unless given.
    - `set_recurrences`: dotted path of the attribute that the model reads the number of recurrences from at every call
      (`"model.loops"`), which is set for a run and restored; or a function of the model and the number, called when a
      run begins, that may return keyword arguments for the model's forward. What it changes in the model stays changed.
      Without it only the model's own number can be run.
    - `trained_recurrences`: the model's own number, if it cannot be counted in a run with nothing set.
    - `forward`: `forward(model, input_ids, mask, **keyword_arguments) -> logits` if the model is not called as
      `model(input_ids, attention_mask=...)`; the mask is True for tokens, (batch, token).
    - `name`, `tokenizer`: for results and for prompts that are texts; a tokenizer of transformers (a fast one) or of
      the package tokenizers.

    - `probe`: how many tokens the model is tried on, or the ids of one prompt, where it cannot be run on 11 of the ids
      0 to 2: a board of 81 fields.
    - `tokens_before`: tokens that the model puts before the text, such as registers or those of a puzzle; what is
      announced has the text's states alone.
    - `attention_call`: of a layer that computes more than one map a head, which of them is shown, counted from 0 or,
      negative, from the last. It has no map otherwise, since none of them is what its heads look at.

    The module is run on a few tokens, some fifteen times, to measure what would otherwise be assumed: whether the loop
    carries its state unchanged and the prompt enters by it alone, whether its recurrences are one map, whether layers
    put out states or branches, whether random numbers are drawn, whether anything is overwritten in place, what padding
    does, how wide it is.

    While a run computes, the module is in evaluation mode; each module's own mode is back whenever the run stands
    still. Weights are never changed. A model that torch has compiled is run without its compiled code, one in
    `DataParallel` on one device, and one in PEFT with its adapters; paths are those of the module inside.

    Raises `ConfigError` for paths that lead nowhere, layers that are called in another order than given or not at all,
    layers whose first output is not the state, a model that fails on the probe, and one that gives other numbers when
    it is run again.
    """
    model, unwrapped = unwrap(model)
    check_weights(model)
    found: Found | None = None
    if all(entry is None for entry in (prelude, recurrent, coda, loop_end)):
        call = ModelCall(model, forward, tokens_before=tokens_before)
        found = _find(call, probe_of(model, probe), set_recurrences, trained_recurrences)
        layout = found.layout
        set_recurrences = set_recurrences or found.setting
    else:
        layout = HookLayout(
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
        tokenizer=None if tokenizer is None else as_tokenizer(tokenizer),
        found=None if found is None else found.sentence,
        notes=() if unwrapped is None else (unwrapped,),
        probe=probe,
        tokens_before=tokens_before,
        attention_call=attention_call,
    )


def _find(call: ModelCall, probe: Batch, set_recurrences: SetRecurrences | None, trained: int | None) -> Found:
    extra = None
    if callable(set_recurrences) and trained is not None:
        extra = set_recurrences(call.model, trained)
    with trial(call.model, is_function=callable(set_recurrences), trained=trained):
        return find_layout(call, probe, extra=extra, with_setting=set_recurrences is None)


def load_hooked(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    device_map: DeviceMap | None = None,
    name: str | None = None,
    revision: str | None = None,
    prefix: PrefixReading = "causal",
    unknown: UnknownFamilyError | None = None,
) -> HookedSubject:
    """Load a folder with transformers' own modelling code, and hook the model.

    With `device_map`, transformers and accelerate place its modules, by the names that they have there.

    `unknown` is why loopscope's own reader does not; the subject's `notes` say so.

    Only safetensors are read, and no code from the folder is run. transformers fills what a checkpoint lacks with
    random numbers, so its account of the loading is checked: a tensor that is missing, not wanted or of another shape
    is named in a `CheckpointError`, as is a model that transformers does not know or cannot load. Raises
    `NonFiniteError` for a weight that is NaN or infinite, `ConfigError` for a model whose layers cannot be told, and
    `MissingDependencyError` without the extra `transformers`.
    """
    transformers = require("transformers", "A model of a family that loopscope does not read itself", "transformers")
    store = TensorStore(folder)
    places = None if device_map is None else parse_device_map(device_map)
    if places is None:
        check_memory(
            sum(math.prod(header.shape) for header in store.headers.values()),
            dtype,
            device,
            "--device-map auto spreads it",
        )
    else:
        require("accelerate", "A device map for a model that transformers loads", "devices")
    setting = isinstance(unknown, UnknownSettingError)
    why = str(unknown).rstrip(".") if setting else f"{folder} is of no family that loopscope reads itself"
    model = _load(transformers, folder, dtype, why, store, places)
    if places is None:
        model = model.to(device)
    _check_finite(model, folder)
    found = _find(ModelCall(model.eval().requires_grad_(False)), probe_of(model), None, None)
    return HookedSubject(
        model,
        found.layout,
        set_recurrences=found.setting,
        name=name or str(folder),
        tokenizer=load_tokenizer(folder),
        weights_sha256=store.sha256(),
        revision=revision,
        found=found.sentence,
        prefix=prefix,
        notes=(f"{why}, so the code of transformers {transformers.__version__} runs it, watched through hooks.",),
    )


def _load(
    transformers: ModuleType,
    folder: Path,
    dtype: torch.dtype,
    why: str,
    store: TensorStore,
    places: str | dict[str, str] | None,
) -> nn.Module:
    try:
        with _silence(transformers):
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            check_foreign(read_json(folder / "config.json"), store.headers, config, str(folder))
            model, report = auto_class(transformers, config).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # or the error would not say which
                output_loading_info=True,
                device_map=places,
                key_mapping=dict.fromkeys(store.wrappers, "") or None,
            )
    except CheckpointError:
        raise
    except Exception as error:  # anything can go wrong in there, and all of it means the same
        reason = reason_of(error)
        if places is not None and "device" in reason:
            raise ConfigError(
                f"The device map does not do for {folder}, whose modules transformers {transformers.__version__} "
                f"places: {reason}"
            ) from error
        raise CheckpointError(
            f"{why}, and transformers {transformers.__version__} cannot load it either ({reason}): describe the format "
            "(docs/adding-a-family.md), or load the model yourself and give it to loopscope.hook."
        ) from error
    _check_report(report, folder)
    loaded: nn.Module = model
    return loaded


def check_foreign(config: Mapping[str, Any], headers: Headers, known: Any, where: str) -> None:
    """`known` is the configuration as transformers has read it. Raises `CheckpointError` for weights that are stored as
    whole numbers or in eight bits and would be taken as they are, and for a field that is named like a number of loops
    and that the configuration's class does not have, or code of another name that is called like a loop's: the model
    may loop, and the code of transformers does not."""
    for name, header in headers.items():
        whole = header.code not in READABLE and name.endswith("weight")
        if (whole or _NARROW.match(header.code)) and not config.get("quantization_config"):
            raise CheckpointError(
                f"{name!r} in {header.file} is stored as {header.dtype}; weights are read as floating-point numbers "
                "only: give the checkpoint as it was before it was quantised."
            )
    if not any(hasattr(sys.modules["transformers"], name) for name in listed(config.get("architectures"))):
        refuse_looped_class(config, where)
    for field, value, kind in _unknown(config, known):
        if (
            LOOPS.search(field)
            and isinstance(value, int | float | str | list | dict)
            and value not in (0, 1, "", [], {})
        ):
            raise CheckpointError(
                f"config.json sets {field} = {value!s:.40}, which {kind} of transformers does not know: the model may "
                "loop, and the code of transformers would run it without a loop. Load it by its own code and give it "
                "to loopscope.hook; if the field says nothing of the model, take it out of config.json."
            )


def _unknown(config: Mapping[str, Any], known: Any) -> Iterator[tuple[str, Any, str]]:
    """Fields that the configuration's class does not have, with their values and its name."""
    with suppress(Exception):  # a class that cannot be made without arguments says nothing
        there = {*type(known)().to_dict(), *type(known).attribute_map}
        yield from ((name, value, type(known).__name__) for name, value in config.items() if name not in there)
    for name, part in config.items():
        if isinstance(part, Mapping) and hasattr(getattr(known, name, None), "to_dict"):
            yield from _unknown(part, getattr(known, name))


def reason_of(error: Exception) -> str:
    """The first line of an error of another library, and the next one where the first announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")


def auto_class(transformers: ModuleType, config: Any) -> Any:
    """What makes a model with a head of this configuration: one that also sees pictures has no other."""
    whole = transformers.AutoModelForImageTextToText
    only_whole = type(config) in whole._model_mapping and type(config) not in (
        transformers.AutoModelForCausalLM._model_mapping
    )
    return whole if only_whole else transformers.AutoModelForCausalLM


def _check_report(report: dict[str, Any], folder: Path) -> None:
    if report["mismatched_keys"]:
        name, stored, wanted = min(report["mismatched_keys"])
        raise CheckpointError(f"{name!r} in {folder} has shape {tuple(stored)}; config.json asks for {tuple(wanted)}.")
    for key, verb, meaning in (
        ("missing_keys", "lacks", "that the model has"),
        ("unexpected_keys", "holds", "that the model does not have"),
    ):
        names = sorted(report[key])
        if names:
            count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
            raise CheckpointError(
                f"{folder} {verb} {count} {meaning}, first {names[0]!r}; it is another model than its config says."
            )
    if report.get("error_msgs"):
        raise CheckpointError(f"transformers could not load {folder} whole: {report['error_msgs'][0]}")


def _check_finite(model: nn.Module, folder: Path) -> None:
    for name, parameter in weights_of(model):
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(
                f"The weight {name!r} in {folder} holds NaN or infinity in {parameter.dtype}; the checkpoint is "
                "damaged, or needs a wider dtype."
            )


@contextmanager
def _silence(transformers: ModuleType) -> Iterator[None]:
    """No progress bars and no reports of the library: what they would say is checked, and said in our words."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
