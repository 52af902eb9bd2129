"""What a reader must know about a study besides its numbers: the header's facts, the thresholds, the provenance."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shlex
import textwrap
from collections.abc import Mapping
from typing import Any

from loopscope.analysis.settings import AnalyzeSettings
from loopscope.answers.answer import Criterion
from loopscope.answers.comparison.settings import CompareSettings
from loopscope.study import Study, StudyView

_REPEATED = ("intervene", "ignore_config")
"""Settings whose flag takes one value, and may be given several times."""
_HIDDEN = ("identity", "status", "files", "checksum")
"""Entries of the manifest for programs: what a resumed run must agree on, and whether it is complete."""


def header_facts(view: StudyView) -> list[tuple[str, str]]:
    """(name, value) pairs, most important first."""
    model = view.manifest["model"]
    facts = [("layout", view.layout), ("prompts", f"{view.prompts:,} ({view.tokens:,} tokens)")]
    if view.looped:
        facts += [
            ("recurrences", f"{view.recurrences} measured, " + _trained(view.trained)),
            ("horizon", f"{view.horizon} and {view.second_horizon}"),
            ("injection", view.injection),
        ]
    facts += [("norms", str(model["norm_placement"] or "unknown"))] if "norm_placement" in model else []
    facts += _interventions(view.study)
    written = view.manifest.get("prompts", {}).get("generated_tokens")
    facts += [("of them generated", f"{int(written):,}")] if written else []
    ignored = model.get("ignored_config")
    facts += [("config.json without", ", ".join(ignored))] if ignored else []
    facts += _beginning(view.manifest.get("tokenizer"))
    facts.append(("run in", view.dtype))
    if "parameters" in model:
        facts.append(("parameters", f"{int(model['parameters']):,}"))
    return facts


def command_of(study: Study) -> str:
    """The `loopscope analyze` command that makes a study; empty where prompts were given as token ids."""
    manifest = study.manifest
    prompts = dict(manifest["prompts"])
    if prompts.get("prompts") is None:
        prompts["text"] = [entry["text"] for entry in study.tokens]
        if None in prompts["text"]:
            return ""
    defaults = {field.name: field.default for field in dataclasses.fields(AnalyzeSettings)}
    given = {**manifest["settings"], **prompts}
    words = [str(manifest["model"]["name"])]
    for name, default in defaults.items():
        value = given.get(name, default)
        value = tuple(value) if isinstance(value, list) else value
        if value == default or value is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif name in _REPEATED:
            words += [word for each in value for word in (flag, str(each))]
        else:
            words += [flag, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return shlex.join(["loopscope", "analyze", *words, "--out", "out/again"])


def thresholds(criterion: Criterion | CompareSettings) -> list[tuple[str, str, str]]:
    """(name, value, reason) of every setting; the reasons are those that the source gives."""
    reasons = _attribute_docstrings(type(criterion))
    return [
        (field.name.replace("_", " "), f"{getattr(criterion, field.name):g}", reasons.get(field.name, ""))
        for field in dataclasses.fields(criterion)
    ]


def provenance(manifest: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The manifest as groups of (name, value) pairs, nested names joined by dots."""
    groups: list[tuple[str, list[tuple[str, str]]]] = []
    single: list[tuple[str, str]] = []
    for name, value in manifest.items():
        if name in _HIDDEN:
            continue
        if isinstance(value, Mapping):
            groups.append((name, _flattened(value)))
        else:
            single.append((name, _plain(value)))
    return groups + ([("run", single)] if single else [])


def _interventions(study: Study) -> list[tuple[str, str]]:
    """What the analysis changed in the model: every number of the report is the changed model's."""
    changes = study.manifest["settings"].get("intervene")
    return [("interventions", ", ".join(changes))] if changes else []


def _beginning(tokenizer: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """With which token the prompts begin, where a tokenizer made them: much of what a model does hangs on BOS."""
    if tokenizer is None:
        return []
    bos = "no special token" if tokenizer["bos"] is None else str(tokenizer["bos"]["text"])
    return [("prompts start with", f"{bos}, chat template" if tokenizer["chat_template"] == "used" else bos)]


def _trained(trained: int | None) -> str:
    return "trained with an unknown number" if trained is None else f"trained with {trained}"


def _flattened(entries: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in entries.items():
        if isinstance(value, Mapping):
            rows += _flattened(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", _plain(value)))
    return rows


def _plain(value: Any) -> str:
    if value is None:  # nothing there, or nothing known
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(str(entry) for entry in value) or "none"
    return str(value)


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """The string after each annotated attribute in the class's source; empty where there is no source to read."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except OSError:
        return {}
    assert isinstance(body, ast.ClassDef)
    found = {}
    for attribute, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(attribute, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(attribute.target, ast.Name)
            found[attribute.target.id] = " ".join(str(text.value.value).split())
    return found
