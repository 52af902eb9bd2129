"""Print a page that loopscope wrote as a PDF of one long sheet, its tables unfolded.

    python tools/print_page.py REPORT.html REPORT.pdf

Needs Chromium. A tenth of the page's size: for results that are kept in a repository.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTH = 1400
"""CSS pixels."""


def print_page(page_path: Path, pdf: Path) -> None:
    """Write `pdf`; the page has drawn all figures that are not folded away by then."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("Chromium is needed to print a page; install it, for example with apt-get install chromium.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000})
        page.emulate_media(media="screen")
        page.goto(page_path.resolve().as_uri())
        page.evaluate("document.querySelectorAll('.table details').forEach((one) => { one.open = true; })")
        page.evaluate("loopscope.drawAll()")
        height = page.evaluate("document.documentElement.scrollHeight")
        page.pdf(path=pdf, width=f"{WIDTH}px", height=f"{height + 2}px", print_background=True)
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    print_page(Path(sys.argv[1]), Path(sys.argv[2]))
