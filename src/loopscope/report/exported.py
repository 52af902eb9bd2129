"""Studies as tables for others: CSV, parquet, or a folder that the Hugging Face hub takes as a data set."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd

from loopscope._util.files import write_atomically
from loopscope._util.hub import require
from loopscope.answers.quick import study_metrics
from loopscope.errors import StudyError
from loopscope.study import MANIFEST, Study, view_study

ExportFormat = Literal["csv", "parquet", "hub-folder"]

STUDIES = "studies"
"""The table with one row for each study, as a leaderboard wants it."""
_TITLE = "# Dynamics of looped language models, measured by loopscope"
_ABOUT = (
    "A row of `studies` is a study; one of the other tables a prompt, a token, a token's readout, a layer's visit or "
    "a head of one, in the study that the column `study` names. What the columns mean is in loopscope's docs/study.md, "
    "every setting and threshold in `manifests/`. The texts of the prompts are among the data."
)


def write_export(
    studies: Sequence[Study], out: str | Path, *, to: ExportFormat = "parquet", licence: str = "unknown"
) -> Path:
    """Write the frames of studies (`Study.to_pandas`) as tables, in each of which a column `study` says whose rows they
    are, and the table `studies`: a row each, with the model, how it was run, and the numbers of `Study.metrics`.

    `hub-folder` is parquet below `data/`, the manifests, and a README.md whose head names the tables, the models and
    `licence`, an identifier of the hub; the prompts' texts are among the tables. Returns the folder. Raises
    `StudyError` for no study or several of one name, `MissingDependencyError` where parquet needs pyarrow, and
    `StorageError`.
    """
    out, card = Path(out), Path(out) / "README.md"
    if to == "hub-folder" and card.is_file() and _TITLE.encode() not in card.read_bytes():
        raise StudyError(f"{card} is not of a data set by loopscope; choose another folder for this.")
    names = [study.folder.resolve().name if study.folder else f"study-{n}" for n, study in enumerate(studies, 1)]
    if not names or len(set(names)) < len(names):
        raise StudyError("Give one or more studies whose folders have names of their own.")
    if to != "csv":
        require("pyarrow", f"The format {to}")
    tables = {STUDIES: [pd.DataFrame([_row(name, study)]) for name, study in zip(names, studies, strict=True)]}
    for name, study in zip(names, studies, strict=True):
        for table, frame in study.to_pandas().items():
            frame.insert(0, "study", name)
            tables.setdefault(table, []).append(frame)
    folder = out / "data" if to == "hub-folder" else out
    for table, frames in tables.items():
        whole = pd.concat(frames, ignore_index=True)
        if to == "csv":
            write_atomically(folder / f"{table}.csv", whole.to_csv(index=False).encode())
        else:
            content = io.BytesIO()
            whole.to_parquet(content, index=False, engine="pyarrow")
            write_atomically(folder / f"{table}.parquet", content.getvalue())
    if to == "hub-folder":
        for name, study in zip(names, studies, strict=True):
            manifest = json.dumps(study.manifest, indent=2, ensure_ascii=False)
            write_atomically(out / "manifests" / name / MANIFEST, manifest.encode())
        write_atomically(card, _card(tables[STUDIES], list(tables), licence).encode())
    return out


def _row(name: str, study: Study) -> dict[str, str | int | float | None]:
    view, model = view_study(study), study.manifest["model"]
    facts: dict[str, str | int | float | None] = {
        "study": name,
        "model": str(model["name"]),
        "revision": model.get("revision"),
        "weights_sha256": model.get("weights_sha256"),
        "layout": view.layout,
        "dtype": view.dtype,
        "recurrences": view.recurrences,
        "horizon": view.horizon,
        "interventions": " ".join(view.interventions),
        "prompt_source": str(study.manifest["prompts"].get("source")),
        "loopscope": str(study.manifest.get("versions", {}).get("loopscope")),
    }
    return facts | study_metrics(study)


def _card(rows: Sequence[pd.DataFrame], tables: Sequence[str], licence: str) -> str:
    """README.md of a data set, whose head is YAML; texts in it are JSON, which YAML reads as well."""
    facts = [row.iloc[0] for row in rows]
    hub = sorted({fact["model"] for fact in facts if fact["revision"]})  # of a model that is a folder there is none
    configs = "".join(
        f"- config_name: {table}\n  data_files: data/{table}.parquet\n"
        + ("  default: true\n" if table == STUDIES else "")
        for table in tables
    )
    base = f"base_model: {json.dumps(hub)}\n" if hub else ""
    settings = ("model", "layout", "dtype", "recurrences", "horizon", "interventions", "prompt_source")
    lines = [
        "| study | " + " | ".join(name.replace("_", " ") for name in settings) + " |",
        "|---" * (len(settings) + 1) + "|",
        *("| " + " | ".join(_cell(fact[name]) for name in ("study", *settings)) + " |" for fact in facts),
    ]
    head = f"license: {json.dumps(licence)}\n{base}tags: [looped-language-models, loopscope]\nconfigs:\n{configs}"
    return f"---\n{head}---\n\n{_TITLE}\n\n" + "\n".join(lines) + f"\n\n{_ABOUT}\n"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
