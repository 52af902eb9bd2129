"""Make the documentation's site: README.md and docs/ as pages, the notebook as one, the public names as another.

    python tools/build_site.py [FOLDER]

Pages land in FOLDER/pages (build/site unless given), the site in FOLDER/html. Needs the extra `docs`.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import loopscope

CHECKOUT = Path(__file__).resolve().parent.parent


def write_pages(folder: Path) -> None:
    """The pages, with links between them that hold in one folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(CHECKOUT / "docs", folder, ignore=shutil.ignore_patterns("*.toml", "*.ipynb"))
    for name, target in (("README.md", "index.md"), ("CONTRIBUTING.md", "contributing.md")):
        (folder / target).write_text((CHECKOUT / name).read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "tour.md").write_text(_notebook(CHECKOUT / "docs" / "tour.ipynb", folder / "images"), encoding="utf-8")
    shutil.copy(CHECKOUT / "results" / "report.pdf", folder)
    (folder / "api.md").write_text(_names(), encoding="utf-8")
    for page in folder.glob("*.md"):
        text = re.sub(r"\]\((docs/|\.\./(?=README|CONTRIBUTING)|\.\./results/)", "](", page.read_text(encoding="utf-8"))
        text = text.replace("](README.md", "](index.md").replace("](CONTRIBUTING.md", "](contributing.md")
        page.write_text(text.replace("](tour.ipynb", "](tour.md"), encoding="utf-8")


def _notebook(path: Path, images: Path) -> str:
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text'])}```")
            if "image/png" in output.get("data", {}):
                name = f"{path.stem}-{cell['id']}.png"
                (images / name).write_bytes(base64.b64decode(output["data"]["image/png"]))
                parts.append(f"![What the cell shows](images/{name})")
    return "\n\n".join(parts) + "\n"


def _names() -> str:
    """A page that asks for the docstrings of all public names."""
    homes = (getattr(loopscope, name) for name in loopscope.__all__)
    entries = [f"::: {each.__module__}.{each.__qualname__}" for each in homes]
    return "# Python\n\nThe public names of `loopscope`.\n\n" + "\n\n".join(entries) + "\n"


if __name__ == "__main__":
    place = (Path(sys.argv[1]) if sys.argv[1:] else CHECKOUT / "build" / "site").resolve()
    write_pages(place / "pages")
    shutil.copy(CHECKOUT / "docs" / "site.toml", place / "zensical.toml")
    subprocess.run([Path(sys.executable).with_name("zensical"), "build", "--clean"], cwd=place, check=True)
    print(f"site  {place / 'html' / 'index.html'}")
