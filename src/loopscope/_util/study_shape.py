"""What readers of a study take for granted in its files; each check raises `ValueError`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import xarray as xr

from loopscope._util.reading import sha256_of


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a file that is another than the one that the manifest was written with. An older manifest
    says nothing of them."""
    for name, known in manifest.get("files", {}).items():
        if sha256_of(folder / name) != known:
            raise ValueError(f"{name} is not the file that was written: its checksum is another one")


_SHAPE: Mapping[str, tuple[type, ...]] = {
    "model": (dict,),
    "model.name": (str,),
    "model.layout": (dict,),
    "settings": (dict,),
    "prompts?": (dict,),
    "tokenizer?": (dict, NoneType),
    "tokenizer.bos": (dict, NoneType),
    "tokenizer.bos.text": (str,),
    "behaviour?": (dict,),
    "stability?": (dict,),
    "left_out?": (dict,),
    "files?": (dict,),
}
"""Entries of a manifest; with a mark, those that some studies lack."""


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raises `ValueError` for one that is no study's, which a checksum cannot tell in an older study."""
    for place, kinds in _SHAPE.items():
        *above, last = place.removesuffix("?").split(".")
        inner: Any = manifest
        for name in above:
            inner = inner.get(name) if isinstance(inner, dict) else None
        # What is absent, or null, has no entries; whether it may be, its own line says.
        checked = isinstance(inner, Mapping) and (last in inner or not place.endswith("?"))
        if checked and not isinstance(inner.get(last, ()), kinds):
            raise ValueError(f"manifest.json has no entry {'.'.join((*above, last))} of the right kind")


def check_tokens(tokens: Sequence[Any], dataset: xr.Dataset) -> None:
    """Raises `ValueError` where they are not those of the arrays' prompts."""
    if len(tokens) != dataset.sizes.get("prompt"):
        raise ValueError(f"tokens.jsonl has {len(tokens)} prompts, and study.nc {dataset.sizes.get('prompt')}")
    counts = dataset["token_count"].values if "token_count" in dataset else [None] * len(tokens)
    for number, (entry, count) in enumerate(zip(tokens, counts, strict=True), 1):
        fields = entry if isinstance(entry, dict) else {}
        ids, strings = fields.get("token_ids"), fields.get("token_strings")
        whole = isinstance(ids, list) and isinstance(strings, list) and len(ids) == len(strings)
        names = ("system_tokens", "suffix_tokens", "generated_tokens")
        placed = all(type(fields.get(name, 0)) is int for name in names)
        if not (whole and placed and count in (None, len(ids or ()))):
            raise ValueError(f"line {number} of tokens.jsonl is no prompt of this study")
