"""The main job: a looped language model and prompts in, a study of its dynamics out."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loopscope._util.ranges import check_type
from loopscope._util.wording import plural
from loopscope.analysis.folder import begun_batch_size
from loopscope.analysis.generating import continued
from loopscope.analysis.job import Job, Progress, SilentProgress, shown
from loopscope.analysis.manifest import PROMPT_SOURCE
from loopscope.analysis.settings import AnalyzeSettings
from loopscope.dynamics.trajectories.states import check_dtype
from loopscope.errors import ConfigError, PromptError, last_resort
from loopscope.models.interventions.parsing import check_recurrences, check_tokens, parse_interventions
from loopscope.models.loading import check_model, subject_of
from loopscope.models.native.subject import intervene
from loopscope.models.subject import Subject, check_length
from loopscope.prompts.load import PADDING, load_prompts, pad_prompts
from loopscope.prompts.prompt import Prompt, TokenizedPrompt, subsample
from loopscope.prompts.tokenizer import doubled_beginnings, read_as_text
from loopscope.prompts.tokens import cut_text, encode_prompts
from loopscope.study import Study

_F = TypeVar("_F", bound=Callable[..., Any])

TokenArray = Tensor | NDArray[Any]
Prompts = (
    str | Path | Sequence[str] | Sequence[int] | Sequence[Sequence[int] | TokenArray] | TokenArray | Mapping[str, Any]
)


def _with_options(function: _F) -> _F:
    """Its signature lists the settings, for whoever completes names by it."""
    known = signature(function)
    options = [
        Parameter(each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in dataclasses.fields(AnalyzeSettings)
        if each.name not in known.parameters
    ]
    own = [each for each in known.parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
    vars(function)["__signature__"] = known.replace(parameters=[*own, *options])
    return function


@_with_options
@last_resort("analysing a model")
def analyze(
    model: str | Path | Subject | nn.Module,
    prompts: Prompts | None = None,
    *,
    out: str | Path | None = None,
    settings: AnalyzeSettings | None = None,
    progress: Progress | bool | None = None,
    **changes: Any,
) -> Study:
    """Run prompts through a model to its horizon and beyond, and measure how each layer's state settles.

    **Arguments**

    - `model`: a shipped model's name, a checkpoint folder, a name on the hub, a subject, or a torch module, which is
      hooked as `loopscope.hook` does.
    - `prompts`: a file, a preset's name, a list of texts, or a list of lists of token ids; a tensor or array of ids,
      (prompt, token) or (token,), a list of those, or what a tokenizer of transformers makes of texts (`input_ids` and
      `attention_mask`), of which padding is left out.
    - `out`: folder for the study; a run that was interrupted is resumed. Nothing is written without it.
    - `settings`, `changes`: `AnalyzeSettings`, and fields of it to change, e.g. `recurrences=64, horizon=128`, or
      `intervene=["damp=0.5"]`.
    - `progress`: True for a bar, False for none; in a terminal or a notebook there is one unless said otherwise. Or an
      object that is notified.

    Raises a `LoopscopeError` for input that cannot be used; what was written before is kept.
    """
    prompts = _without_tensors(prompts)
    if not (prompts is None or isinstance(prompts, Path | Collection)):
        raise ConfigError(f"prompts takes a file, a preset's name, texts or lists of token ids, got {prompts!r}.")
    check_type("out", out, Path | None)
    check_model(model)
    _check_names(changes)
    if "intervene" in changes:
        changes["intervene"] = tuple(str(each) for each in parse_interventions(changes["intervene"]))
    if isinstance(changes.get("device_map"), Mapping):
        changes["device_map"] = ",".join(f"{layers}={place}" for layers, place in changes["device_map"].items())
    settings = dataclasses.replace(settings or AnalyzeSettings(), **_source(prompts), **changes)
    with shown(progress) as told:
        return _analyze(model, prompts, out, settings, told)


def _analyze(
    model: str | Path | Subject | nn.Module,
    prompts: Any,
    out: str | Path | None,
    settings: AnalyzeSettings,
    progress: Progress,
) -> Study:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    # Before the model: a mistyped path should not cost the loading of a large checkpoint.
    loaded = _read(prompts, settings)
    subject = subject_of(
        model,
        revision=settings.revision,
        dtype=settings.dtype,
        device=settings.device,
        device_map=settings.device_map,
        prefix=settings.prefix,
        ignore_config=settings.ignore_config,
    )
    source = model if isinstance(model, str | Path) else None
    if source is None:
        settings = _settings_of(subject, settings)
    elif settings.dtype in ("auto", "stored"):
        progress.note(f"{subject.info.name} runs in {subject.info.dtype} (--dtype {settings.dtype}).")
        settings = dataclasses.replace(settings, dtype=check_dtype(subject.info.dtype))
    if subject.info.interventions != settings.intervene:
        subject = intervene(subject, settings.intervene)
    if str(settings.system_prompt) == PADDING:
        loaded = pad_prompts(loaded, subject.tokenizer)
    tokenized = _tokenize(loaded, subject, settings)
    if subject.tokenizer is not None and type(progress) is SilentProgress:  # which does not pass on the job's notes
        for sentence in doubled_beginnings(subject.tokenizer, read_as_text(tokenized), len(tokenized)):
            warnings.warn(sentence, stacklevel=4)
    if settings.generate is not None:
        tokenized = continued(subject, tokenized, settings.generate, chat=settings.chat, seed=settings.seed)
        written = sum(prompt.generated_tokens for prompt in tokenized)
        progress.note(f"{subject.info.name} wrote {written:,} tokens behind {plural(len(tokenized), 'prompt')}.")
    check_recurrences(settings.interventions, settings.recurrences, "measured")
    check_tokens(settings.interventions, [len(prompt.token_ids) for prompt in tokenized])
    if out is not None and settings.batch_size == "auto":
        settings = dataclasses.replace(settings, batch_size=begun_batch_size(Path(out)) or "auto")
    job = Job(subject, tokenized, settings, progress, source)
    return job.run_in_memory() if out is None else job.run_in(Path(out))


def _check_names(changes: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for what is no setting."""
    known = [each.name for each in dataclasses.fields(AnalyzeSettings)]
    for name in changes:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {close[0]}?" if close else "help(loopscope.AnalyzeSettings) lists what there is."
            raise ConfigError(f"analyze has no option {name!r}; {meant}")


def _without_tensors(prompts: Prompts | None) -> Any:
    """Token ids as lists, of whatever library they are."""
    if isinstance(prompts, Mapping):
        if "input_ids" not in prompts:
            raise PromptError(
                f"Prompts in a mapping are its input_ids, and it has {', '.join(map(str, prompts))} only."
            )
        ids, mask = _without_tensors(prompts["input_ids"]), _without_tensors(prompts.get("attention_mask"))
        if mask is None:
            return ids
        return [[token for token, real in zip(*row, strict=True) if real] for row in zip(ids, mask, strict=True)]
    if isinstance(prompts, Tensor | np.ndarray):
        return (prompts[None] if prompts.ndim == 1 else prompts).tolist()
    if isinstance(prompts, list | tuple) and prompts and all(isinstance(entry, int) for entry in prompts):
        return [prompts]
    if isinstance(prompts, list | tuple):
        return [entry.tolist() if isinstance(entry, Tensor | np.ndarray) else entry for entry in prompts]
    return prompts


def _source(prompts: Prompts | None) -> dict[str, Any]:
    """Prompts as settings, but for lists of token ids, which no setting can hold."""
    if isinstance(prompts, str | Path):
        return {"prompts": str(prompts)}
    if prompts and all(isinstance(prompt, str) for prompt in prompts):
        return {"text": tuple(prompts)}
    return {}


def _read(prompts: Prompts | None, settings: AnalyzeSettings) -> list[Prompt]:
    """The prompts, from where the settings say or as given."""
    if prompts is None or isinstance(prompts, str | Path) or _source(prompts):
        return load_prompts(**{name: getattr(settings, name) for name in PROMPT_SOURCE})
    if not prompts:
        raise PromptError("The list of prompts is empty; give at least one text, or one list of token ids.")
    for name in PROMPT_SOURCE:
        if name not in ("limit", "sample_seed") and getattr(settings, name):
            raise PromptError(f"{name} means nothing for prompts that are lists of token ids; leave it out.")
    given = [_from_ids(index, prompt) for index, prompt in enumerate(prompts)]
    return subsample(given, limit=settings.limit, seed=settings.sample_seed)


def _tokenize(prompts: Sequence[Prompt], subject: Subject, settings: AnalyzeSettings) -> list[TokenizedPrompt]:
    """The prompts as the model reads them; with `chunk`, the one long text cut into prompts."""
    vocab_size, max_positions = subject.info.vocab_size, subject.info.max_positions
    if settings.chunk is not None:
        return cut_text(
            prompts[0],
            subject.tokenizer,
            settings.chunk,
            vocab_size=vocab_size,
            max_positions=max_positions,
            limit=settings.limit,
            seed=settings.sample_seed,
        )
    encoded = encode_prompts(
        prompts,
        subject.tokenizer,
        vocab_size=vocab_size,
        max_positions=max_positions,
        truncate=settings.truncate,
        chat=settings.chat,
    )
    check_length(subject.info, [len(prompt.token_ids) for prompt in encoded])
    return encoded


def _from_ids(index: int, prompt: Any) -> Prompt:
    if (
        isinstance(prompt, str)
        or not isinstance(prompt, Collection)
        or not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in prompt)
    ):
        raise PromptError(f"Prompt {index} is not a list of whole numbers; give only texts, or only lists of ids.")
    if not prompt:
        raise PromptError(f"Prompt {index} is empty; leave it out.")
    return Prompt(id=str(index), text=None, token_ids=tuple(prompt), system=None)


def _settings_of(subject: Subject, settings: AnalyzeSettings) -> AnalyzeSettings:
    """Settings that say what a subject in memory is; others are refused rather than ignored."""
    info = subject.info
    actual: dict[str, Any] = {"dtype": info.dtype, "device": info.device, "revision": info.revision}
    if info.prefix is not None:
        actual["prefix"] = info.prefix
    if info.interventions:
        actual["intervene"] = info.interventions
    actual["ignore_config"] = info.ignored_config
    if settings.device_map is not None:
        raise ConfigError(f"device_map comes too late: {info.name} is loaded already; give it to loopscope.load.")
    default = AnalyzeSettings()
    for name, value in actual.items():
        asked = getattr(settings, name)
        if asked not in (value, getattr(default, name), "auto", "stored"):
            raise ConfigError(
                f"{name}={asked!r} comes too late: {subject.info.name} is loaded already, with {value!r}."
            )
    return dataclasses.replace(settings, **actual)
