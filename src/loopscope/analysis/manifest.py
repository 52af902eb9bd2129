"""What a study says beside its arrays: the coordinates of their dimensions, and the manifest."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from loopscope._util.old_counts import COUNTS_FROM
from loopscope._util.sites import STAGES, Site
from loopscope.analysis.settings import AnalyzeSettings
from loopscope.dynamics.observed_rate import RateSettings
from loopscope.dynamics.prediction import PREDICTED_KINDS
from loopscope.dynamics.trajectories.sensitivity import COSINE_GRID, DISPLACEMENT_GRID
from loopscope.dynamics.trajectories.settings import CosineSettings, DisplacementSettings
from loopscope.dynamics.verdicts import KINDS
from loopscope.measures.base import Plan
from loopscope.measures.behaviour import CHANGES
from loopscope.measures.convergence import LEVELS
from loopscope.measures.heads import fuses
from loopscope.measures.maps import map_sites
from loopscope.measures.registry import declared_variables
from loopscope.measures.stability import RATE_REASONS, study_criterion
from loopscope.models.subject import Subject, SubjectInfo
from loopscope.prompts.load import PADDING, padding_record
from loopscope.prompts.prompt import TokenizedPrompt, prompts_digest
from loopscope.prompts.tokenizer import TextTokenizer

PROMPT_SOURCE = ("prompts", "field", "text", "whole_file", "limit", "sample_seed", "system_prompt", "chunk")
"""Settings that say where prompts come from."""

_version = functools.cache(version)
"""It reads a file of a few hundred lines to find one."""
_GRIDS = (("displacement", DISPLACEMENT_GRID), ("cosine", COSINE_GRID))


def coordinates(arrays: xr.Dataset, info: SubjectInfo, plan: Plan) -> dict[str, Any]:
    """Of every dimension that the arrays have, and what stands beside some of them."""
    lengths = {str(dim): size for dim, size in arrays.sizes.items()}
    visits = [site.label for site in info.sites(range(1, min(plan.cycle_recurrences, plan.recurrences) + 1))]
    values: dict[str, Any] = {
        "unique_layer": [f"{stage}.{layer}" for stage in STAGES for layer in range(getattr(info, stage))],
        "quantile": list(LEVELS),
        "site": ["last_layer", "loop_state"],
        "horizon": ["first", "second"],
        "visit": visits,
        "visit_other": visits,
        "recurrence": np.arange(1, lengths.get("recurrence", 0) + 1),
        "readout_recurrence": list(plan.readout),
        "judged_layer": list(plan.judged_layers),
        "change": list(CHANGES),
        "kind": [str(kind) for kind in KINDS],
        "long_recurrence": np.arange(1, lengths.get("long_recurrence", 0) + 1),
        "lag": np.arange(1, lengths.get("lag", 0) + 1),
        "tail": np.arange(2 * plan.horizon - lengths.get("tail", 0), 2 * plan.horizon) + 1,
        **{
            f"{method}_setting{other}": list(steps)
            for method, grid in _GRIDS
            for other, steps in zip(("", "_other"), grid.values, strict=True)
        },
        "answer": list(plan.answers),
        "exit_recurrence": list(range(1, plan.exits + 1)),
    }
    found = {dim: (dim, values.get(dim, np.arange(size))) for dim, size in lengths.items()}
    if "depth" in lengths:
        sites = info.sites(range(1, plan.recurrences + 1))
        for name, column in zip(Site._fields, zip(*sites, strict=True), strict=True):
            found[f"depth_{name}"] = ("depth", list(column))
    if "mapped" in lengths and plan.maps is not None:
        sites = map_sites(info, plan.maps.recurrences)
        found["map_visit"] = ("map_visit", [site.label for site in sites])
        for name, column in zip(Site._fields, zip(*sites, strict=True), strict=True):
            found[f"map_{name}"] = ("map_visit", list(column))
        found["mapped_prompt"] = ("mapped", list(plan.maps.prompts))
    if "tracked" in lengths:
        found["tracked_prompt"] = ("tracked", [prompt for prompt, _ in plan.tracked])
        found["tracked_token"] = ("tracked", [token for _, token in plan.tracked])
    return found


def predicted_tokens(dataset: xr.Dataset, tokenizer: TextTokenizer) -> dict[str, Any]:
    """The tokens that some readout finds the most probable, and those of the answer, with their texts: a study does not
    keep the tokenizer."""
    names = ("token_top1", "layer_top1", "answer")
    found = [dataset[name].values.ravel() for name in names if name in dataset]
    tokens = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *found]))
    tokens = tokens[tokens >= 0]
    # In a file a text ends where it has a NUL.
    texts = [tokenizer.name(int(token)).replace("\0", "␀") for token in tokens]
    return {"predicted_token": tokens, "predicted_text": ("predicted_token", np.array(texts, dtype=object))}


def describe(dataset: xr.Dataset) -> None:
    """Let each variable say what it is: `long_name`, `units`, and, of codes, `flag_values` and `flag_meanings` as the
    CF conventions have them."""
    declared = declared_variables()
    for name in dataset.data_vars:
        values, about = dataset.variables[name], declared[str(name)]
        values.attrs = {"long_name": about.meaning, "units": about.units}
        if about.flags:
            values.attrs["flag_values"] = np.arange(len(about.flags), dtype=values.dtype)
            values.attrs["flag_meanings"] = " ".join(flag.replace(" ", "_") for flag in about.flags)


def manifest(
    subject: Subject,
    prompts: Sequence[TokenizedPrompt],
    settings: AnalyzeSettings,
    plan: Plan,
    tokenizer: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All but when it was made, and how long that took."""
    info = subject.info
    plain = {name: _plain(value) for name, value in dataclasses.asdict(settings).items()}
    digest = prompts_digest(list(prompts))
    # Whose kernels reduce the attention maps that they know: they round otherwise than tiles.
    fused = {"triton": importlib.import_module("triton").__version__} if fuses(subject.device, info.dtype) else {}
    source = (*PROMPT_SOURCE, "truncate", "chat")
    # Sentences that follow from the model, and places that change nothing.
    beside = ("name", "placement", "loop_limits")
    free = (
        *source,
        "threads",
        "engine",
        "workers",
        "address",
        "keep_limit",
        "memory_limit",
        "horizon_method",
        "device",
        "device_map",
        "dtype",
        "revision",
        "ignore_config",
        "neuron_limit",
    )
    return {
        "model": {
            **info.to_dict(),
            "kind": "looped" if info.is_looped else "feed-forward",
            "layout": {"prelude": info.prelude, "recurrent": info.recurrent, "coda": info.coda},
        },
        "settings": {name: value for name, value in plain.items() if name not in source},
        "prompts": {
            # The texts themselves are in tokens.jsonl.
            **{name: plain[name] for name in source if name != "text"},
            "source": settings.prompts or "given as a list",
            **_padding(subject, settings),
            "count": len(prompts),
            "tokens": sum(len(prompt.token_ids) for prompt in prompts),
            **_generated(subject, prompts, settings),
            "sha256": digest,
        },
        "tokenizer": tokenizer,
        **_behaviour(plan),
        **_stability(settings, plan),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("loopscope", "torch", "numpy", "xarray")},
            **fused,
        },
        "threads": torch.get_num_threads(),
        COUNTS_FROM: 1,
        # All that the numbers depend on: a folder is resumed only if this is the same.
        "identity": {
            "model": {name: value for name, value in info.to_dict().items() if name not in beside},
            "settings": {name: value for name, value in plain.items() if name not in free},
            "prompts": {"count": len(prompts), "sha256": digest},
            "versions": {name: _version(name) for name in ("loopscope", "torch")} | fused,
        },
    }


def _behaviour(plan: Plan) -> dict[str, Any]:
    """How the limits of the tokens were judged."""
    if not plan.judged_layers:
        return {}
    methods = (("displacement", DisplacementSettings()), ("cosine", CosineSettings()))
    return {
        "behaviour": {
            **{name: dataclasses.asdict(settings) for name, settings in methods},
            "sensitivity": {name: list(grid.names) for name, grid in _GRIDS},
        }
    }


def _stability(settings: AnalyzeSettings, plan: Plan) -> dict[str, Any]:
    """How eigenvalues were taken, what was predicted from them by which thresholds, and how rates were observed."""
    if "stability" in settings.skip or not plan.recurrences:
        return {}
    taken = plan.eigenvalues
    return {
        "stability": {
            "eigenvalues": None if taken is None else dataclasses.asdict(taken),
            "criterion": dataclasses.asdict(study_criterion(settings.horizon)),
            "kinds": [str(kind) for kind in PREDICTED_KINDS],
            "rates": dataclasses.asdict(RateSettings()),
            "reasons": [str(reason) for reason in RATE_REASONS],
        }
    }


def _padding(subject: Subject, settings: AnalyzeSettings) -> dict[str, Any]:
    """Of which tokens a system prompt of padding is made."""
    if str(settings.system_prompt) != PADDING or subject.tokenizer is None:
        return {}
    return {"padding": padding_record(subject.tokenizer)}


def _generated(subject: Subject, prompts: Sequence[TokenizedPrompt], settings: AnalyzeSettings) -> dict[str, Any]:
    """How many of the tokens the model wrote itself, the likeliest each time after so many recurrences."""
    if settings.generate is None:
        return {}
    written = sum(prompt.generated_tokens for prompt in prompts)
    return {"generated_tokens": written, "generated_after": subject.info.trained_recurrences}


def _plain(value: Any) -> Any:
    """JSON has no paths and no tuples."""
    if isinstance(value, Path):
        return str(value)
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value
