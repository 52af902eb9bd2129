"""A report as a browser finds it, without drawing it."""

from __future__ import annotations

import base64
import json
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from loopscope.report.page.write import write_report
from loopscope.report.settings import ReportSettings
from loopscope.study import Study


class Page(HTMLParser):
    """What a browser would find: elements, the text of each, and the data of figures."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._script: dict[str, str | None] | None = None
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text.append(data)
        else:
            self.scripts.append((self._script, data))

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).replace("\u00a0", " ").split())

    @property
    def anchors(self) -> set[str]:
        """Of figures, of their panels, and of sentences in the place of either."""
        return self.ids("figure") | self.ids("div") | self.ids("p")

    @property
    def figures(self) -> dict[str, Any]:
        """Every chart: by the anchor of its figure or panel, or that of its figure and a letter."""
        return {
            str(attributes["id"]).removeprefix("data-"): json.loads(
                content if content.startswith("{") else unpacked(content)
            )
            for attributes, content in self.scripts
            if str(attributes.get("id", "")).startswith("data-")
        }

    def ids(self, tag: str) -> set[str]:
        return {str(attributes["id"]) for name, attributes in self.elements if name == tag and "id" in attributes}


def page_of(study: Study, folder: Path, settings: ReportSettings | None = None) -> Page:
    return Page(write_report(study, folder / "report.html", settings=settings))


def unpacked(text: str) -> bytes:
    """What `packed` made."""
    return zlib.decompress(base64.b85decode(text.translate(str.maketrans(",.:", "<>&"))))


def decoded(array: object) -> np.ndarray:
    """Plotly's form of a typed array."""
    assert isinstance(array, dict)
    return np.frombuffer(base64.b64decode(array["bdata"]), dtype=array["dtype"])
