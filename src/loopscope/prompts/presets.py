"""Prompt sets that go by a name: one shipped with the package, others on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType

from loopscope._extras import require
from loopscope._hub import downloading
from loopscope.errors import PromptError

__all__ = ["HUB_PRESETS", "SHIPPED_PRESETS", "HubPreset", "ShippedPreset", "find_preset", "preset_names"]


@dataclass(frozen=True, kw_only=True)
class ShippedPreset:
    """A JSONL file inside the package."""

    file: str
    field: str
    about: str


@dataclass(frozen=True, kw_only=True)
class HubPreset:
    """One data file of a dataset repository. Files, not loading scripts: no code of a dataset ever runs."""

    repo: str
    revision: str
    """A commit, so that the prompts stay what they are, and a cached copy is used without asking the network."""
    file: str
    field: str
    about: str


SHIPPED_PRESETS: Mapping[str, ShippedPreset] = MappingProxyType(
    {
        "word-problems": ShippedPreset(
            file="demo/prompts/word-problems.jsonl",
            field="question",
            about="64 grade-school word problems, shipped with loopscope",
        ),
    }
)

HUB_PRESETS: Mapping[str, HubPreset] = MappingProxyType(
    {
        "gsm8k": HubPreset(
            repo="openai/gsm8k",
            revision="740312add88f781978c0658806c59bc2815b9866",
            file="main/test-00000-of-00001.parquet",
            field="question",
            about="GSM8K, grade-school mathematics, 1,319 test questions",
        ),
        "svamp": HubPreset(
            repo="ChilleD/SVAMP",
            revision="5e0bf1e5e7c0e9c4bc39180d224f41f3f801b7ef",
            file="data/test-00000-of-00001.parquet",
            field="question_concat",
            about="SVAMP, one-step arithmetic in varied wording, 300 test questions",
        ),
        "aqua": HubPreset(
            repo="deepmind/aqua_rat",
            revision="33301c6a050c96af81f63cad5562cb5363e88971",
            file="raw/test-00000-of-00001.parquet",
            field="question",
            about="AQuA-RAT, algebra, 254 test questions without their options",
        ),
        "math500": HubPreset(
            repo="HuggingFaceH4/MATH-500",
            revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
            file="test.jsonl",
            field="problem",
            about="MATH-500, competition mathematics, 500 problems",
        ),
        "arc-challenge": HubPreset(
            repo="allenai/ai2_arc",
            revision="210d026faf9955653af8916fad021475a3f00453",
            file="ARC-Challenge/test-00000-of-00001.parquet",
            field="question",
            about="ARC-Challenge, school science, 1,172 test questions without their options",
        ),
        "humaneval": HubPreset(
            repo="openai/openai_humaneval",
            revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
            file="openai_humaneval/test-00000-of-00001.parquet",
            field="prompt",
            about="HumanEval, Python functions to complete, 164 prompts",
        ),
    }
)


def preset_names() -> list[str]:
    """Every name that --prompts takes, the shipped ones first."""
    return [*SHIPPED_PRESETS, *HUB_PRESETS]


def find_preset(name: str) -> tuple[Path, str] | None:
    """The preset's file, downloaded if it is not cached, and the field that holds its prompts; None for other names.

    Raises `MissingDependencyError` without the extra `hub`, `PromptError` if the hub cannot be reached or no longer has
    the file.
    """
    if name in SHIPPED_PRESETS:
        shipped = SHIPPED_PRESETS[name]
        return Path(str(resources.files("loopscope").joinpath(shipped.file))), shipped.field
    if name in HUB_PRESETS:
        return _download(name, HUB_PRESETS[name]), HUB_PRESETS[name].field
    return None


def _download(name: str, preset: HubPreset) -> Path:
    purpose = f"The preset {name!r}"
    hub = require("huggingface_hub", purpose)
    if preset.file.endswith(".parquet"):
        require("pyarrow", purpose)  # before the download, which would be in vain without it
    copy = f"give a copy of it with --prompts FILE --field {preset.field}"
    with downloading(purpose, preset.repo, error=PromptError, otherwise=copy, revision=preset.revision):
        path = hub.hf_hub_download(preset.repo, preset.file, revision=preset.revision, repo_type="dataset")
    return Path(path)
