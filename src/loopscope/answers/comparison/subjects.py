"""What is compared: the studies, told apart by names, and which of them is the reference."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loopscope.answers.comparison.cells import cells_of
from loopscope.answers.comparison.curves import MEASURES, StageCurves
from loopscope.errors import StudyError
from loopscope.study import Study

ComparisonKind = Literal["models", "data sets", "settings", "models and data sets"]
"""What differs between the studies."""


_STEP = re.compile(r"(?:step|checkpoint|ckpt|iter|epoch)[-_]?(\d{1,12})$", re.IGNORECASE)


def refuse_repeats(studies: Sequence[Study]) -> None:
    """Raises `StudyError` for fewer than two studies, and for one that is there twice: it is like itself."""
    if len(studies) < 2:
        raise StudyError(f"A comparison needs at least two studies, got {len(studies)}; name another study's folder.")
    folders = Counter(study.folder.resolve() for study in studies if study.folder is not None)
    objects = Counter(id(study) for study in studies)
    if folders and max(folders.values()) > 1:
        twice = next(study.folder for study in studies if study.folder and folders[study.folder.resolve()] > 1)
        raise StudyError(f"The study in {twice} is given twice; name each study once.")
    if max(objects.values()) > 1:
        raise StudyError("The same Study object is given twice; give each study once.")


def distinct_labels(studies: Sequence[Study]) -> list[str]:
    """A name for each study: the shortest of several that tells all of them apart.

    The model's; of one model alone that of the prompts, or of the folder; else model and prompts, model and what was
    changed in it, and model and folder.
    What has the same name in all of these is numbered. A checkpoint folder goes by its last part, if that tells models
    apart.
    """
    models = {_model(study) for study in studies}
    model = _last_part if len({_last_part(study) for study in studies}) == len(models) else _model
    ways: list[Callable[[Study], str]] = [model]
    if len(models) == 1:
        ways += [_prompts_name, _folder_name]
    ways += [
        lambda study: _prompts_name(study) and f"{model(study)} on {_prompts_name(study)}",
        lambda study: f"{model(study)} with {', '.join(_changes(study))}" if _changes(study) else model(study),
        lambda study: _folder_name(study) and f"{model(study)} in {_folder_name(study)}",
    ]
    for way in ways:
        labels = [way(study) for study in studies]
        if all(labels) and len(set(labels)) == len(labels):
            return labels
    return [f"{model(study)} [{number}]" for number, study in enumerate(studies, start=1)]


def choose_reference(labels: Sequence[str], studies: Sequence[Study], wanted: str | Path | None) -> int:
    """Which study the others are compared with: the one asked for by label, model name or folder, else the first
    feed-forward one, else the first.

    Raises `StudyError` for a wish that names none of them, or several.
    """
    if wanted is None:
        kinds = [study.manifest["model"]["kind"] for study in studies]
        return kinds.index("feed-forward") if "feed-forward" in kinds else 0
    by_folder = [
        index
        for index, study in enumerate(studies)
        if study.folder is not None and study.folder.resolve() == Path(wanted).resolve()
    ]
    by_name = [index for index, label in enumerate(labels) if str(wanted) in (label, _model(studies[index]))]
    found = by_folder or by_name
    if len(found) != 1:
        what = "none" if not found else f"{len(found)}"
        raise StudyError(
            f"The reference {wanted} names {what} of the studies; they are {', '.join(labels)}. Give one's folder."
        )
    return found[0]


def same_model(first: Study, second: Study) -> bool:
    """Whether two studies are of the same weights."""
    one, other = (study.manifest["model"] for study in (first, second))
    if one.get("weights_sha256") and other.get("weights_sha256"):
        return bool(one["weights_sha256"] == other["weights_sha256"] and one["layout"] == other["layout"])
    return _model(first) == _model(second) and one["layout"] == other["layout"]


def same_prompts(first: Study, second: Study) -> bool:
    """Whether two studies read the same prompts, as far as their manifests say."""
    return _prompts_hash(first) is not None and _prompts_hash(first) == _prompts_hash(second)


def kind_of(studies: Sequence[Study]) -> ComparisonKind:
    one_model = all(same_model(studies[0], study) for study in studies[1:])
    one_text = all(same_prompts(studies[0], study) for study in studies[1:])
    if one_model:
        return "settings" if one_text else "data sets"
    return "models" if one_text else "models and data sets"


def facts_of(study: Study, label: str, curves: StageCurves, reference: Study) -> dict[str, Any]:
    """What a reader of a comparison must know of one study, JSON-ready."""
    manifest = study.manifest
    missing = [name for name, rows in zip(MEASURES, curves.values, strict=True) if np.isnan(rows).all()]
    return {
        "label": label,
        "folder": str(study.folder) if study.folder is not None else None,
        "model": _model(study),
        "weights_sha256": manifest["model"].get("weights_sha256"),
        "layout": {"prelude": curves.prelude, "recurrent": curves.recurrent, "coda": curves.coda},
        "trained_recurrences": curves.trained,
        "step": _step(study),
        "recurrences": curves.recurrences if curves.looped else None,
        "judged_at": curves.home + 1 if curves.looped else None,
        "prompts": {name: _prompts(study).get(name) for name in ("source", "count", "tokens", "sha256")},
        "diverged_prompts": int((study.dataset["diverged_at"] >= 0).sum()),
        "dtype": manifest["settings"]["dtype"],
        "horizon": manifest["settings"].get("horizon") if curves.looped else None,
        "interventions": list(_changes(study)),
        "answers": [cell.to_dict() for cell in cells_of(study)],
        "missing": missing,
        "same_model_as_reference": same_model(study, reference),
        "same_prompts_as_reference": same_prompts(study, reference),
    }


def _step(study: Study) -> int | None:
    """Of a checkpoint that is named after its training step, such as `run/step-500` or a revision `step500`; None of
    other names."""
    names = (study.manifest["model"].get("revision") or "", Path(_model(study)).name)
    found = next((match for name in names if (match := _STEP.search(str(name)))), None)
    return None if found is None else int(found[1])


def _model(study: Study) -> str:
    return str(study.manifest["model"]["name"])


def _last_part(study: Study) -> str:
    """The model's name; of a checkpoint folder the last part of its path. A name of the hub, organisation/model, is no
    path."""
    name = _model(study)
    path = Path(name)
    return path.name if path.is_absolute() or len(path.parts) > 2 or ".." in path.parts else name


def _prompts(study: Study) -> Mapping[str, Any]:
    found: Mapping[str, Any] = study.manifest.get("prompts", {})
    return found


def _prompts_hash(study: Study) -> str | None:
    found = _prompts(study).get("sha256")
    return None if found is None else str(found)


def _prompts_name(study: Study) -> str:
    """The name of a preset, or of a file and the folder it is in: test.jsonl alone says little."""
    source = str(_prompts(study).get("source") or "")
    return "/".join(Path(source).parts[-2:]) if source else ""


def _changes(study: Study) -> tuple[str, ...]:
    return tuple(study.manifest["settings"].get("intervene", ()))


def _folder_name(study: Study) -> str:
    return study.folder.name if study.folder is not None else ""
