"""The pages of the documentation's site, before a generator makes HTML of them."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loopscope
from build_site import CHECKOUT, write_pages


def test_links_between_pages_hold_and_every_page_can_be_found(tmp_path: Path) -> None:
    write_pages(tmp_path)
    for page in tmp_path.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([\w./-]+\.(?:html|md|pdf|png))", text):
            assert (tmp_path / target).exists(), f"{page.name}: {target}"
    config = tomllib.loads((CHECKOUT / "docs" / "site.toml").read_text(encoding="utf-8"))
    assert set(_strings(config["project"]["nav"])) == {page.name for page in tmp_path.glob("*.md")}


def _strings(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for each in entry.values() if isinstance(entry, dict) else entry:
            yield from _strings(each)


def test_all_public_names_are_on_their_page(tmp_path: Path) -> None:
    write_pages(tmp_path)
    entries = re.findall(r"^::: loopscope\.[\w.]+\.(\w+)$", (tmp_path / "api.md").read_text(encoding="utf-8"), re.M)
    assert entries == loopscope.__all__
