"""The report in headless Chromium: every figure is drawn, nothing is requested, and no text becomes markup."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import xarray
from playwright.sync_api import Browser, ConsoleMessage, Dialog, FloatRect, Page, sync_playwright

from loopscope.answers.answer import Criterion
from loopscope.answers.comparison.comparing import compare
from loopscope.answers.quick import quick_answers
from loopscope.experiments.cells import Cell, CellOutcome, CellResult
from loopscope.experiments.load import Experiment, load_experiment
from loopscope.report.figures.plot import Drawn, Panel, Plot, Section
from loopscope.report.page import study_page
from loopscope.report.page.write import write_behaviour_report, write_comparison, write_experiments, write_report
from loopscope.study import Study
from synthetic_study import contracting, feed_forward_study, looped_study, overflowing, with_behaviour
from test_report_behaviour import judged

# One worker, and so one browser, for all of them.
pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

CHECKOUT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = CHECKOUT / "node_modules" / "axe-core" / "axe.min.js"
# All but the first keep the browser from a graphics card that is not there, and from talking to its maker.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
MARKUP = (
    '<script>hacked = 1</script><img src="x" onerror="hacked = 2"><b>bold</b><a href="javascript: hacked = 3">a</a>'
)
HOSTILE = MARKUP + "/long" * 40
DRAW_ALL = """async () => {
    for (const fold of document.querySelectorAll("details")) fold.open = true;
    await loopscope.drawAll();
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium found (looked for chromium, chromium-browser, google-chrome)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Opened:
    """A report in a tab, with what happened while it was opened."""

    page: Page
    url: str
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def open_report(browser: Browser, study: Study, path: Path, width: int) -> Opened:
    return open_page(browser, write_report(study, path), width)


def open_page(browser: Browser, path: Path, width: int, *, draw_all: bool = True) -> Opened:
    url = path.as_uri()
    page = browser.new_page(viewport={"width": width, "height": 900})
    opened = Opened(page, url)

    def note_console(message: ConsoleMessage) -> None:
        if message.type == "error":
            opened.problems.append(message.text)

    def note_dialog(dialog: Dialog) -> None:
        opened.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("console", note_console)
    page.on("dialog", note_dialog)
    page.on("pageerror", lambda error: opened.problems.append(str(error)))
    page.on("request", lambda request: opened.requests.append(request.url))
    page.goto(url)
    page.wait_for_selector("html[data-figures=drawn]", state="attached", timeout=120_000)
    if draw_all:
        page.evaluate(DRAW_ALL)
    if page.locator("#attention-maps").count():
        page.wait_for_selector("html[data-maps=drawn]", state="attached")
    if page.locator("#token-panel").count():
        page.wait_for_selector("html[data-tokens=drawn]", state="attached")
    return opened


@pytest.fixture(scope="module")
def study() -> Study:
    """Of a looped model whose every text is hostile, with the maps of two prompts."""
    study = with_behaviour(looped_study(contracting(), prompts=3))
    maps = study.dataset["attention_map"]
    other = maps.copy()
    other[..., 2:, 0] = 99
    both = xarray.concat([maps, other], "mapped").assign_coords(mapped_prompt=("mapped", [0, 2]))
    dataset = study.dataset.drop_vars(["attention_map", "mapped_prompt"]).assign(attention_map=both)
    manifest = dict(study.manifest)
    manifest["model"] = {**manifest["model"], "name": HOSTILE, "norm_placement": HOSTILE}
    manifest["prompts"] = {"source": HOSTILE, HOSTILE: HOSTILE}
    tokens = [{**entry, "text": HOSTILE, "token_strings": [HOSTILE] * 10} for entry in study.tokens]
    return dataclasses.replace(study, dataset=dataset, manifest=manifest, tokens=tokens)


@pytest.fixture(scope="module")
def looped(browser: Browser, study: Study, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A report on it, whose answers and captions are hostile too."""
    answers = [
        dataclasses.replace(
            answer,
            question=answer.question + MARKUP,
            verdict=f"{answer.verdict} <b>b</b>",
            sentence=answer.sentence + MARKUP,
            evidence={**answer.evidence, "layer <b>b</b>": "<b>b</b>"},
            limits=[*answer.limits, MARKUP],
        )
        for answer in quick_answers(study, Criterion())
    ]
    path = tmp_path_factory.mktemp("report") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_page, "_sections", lambda *given, made=study_page._sections: hostile(made(*given)))
        write_report(study, path, answers=answers)
    return open_page(browser, path, width=1600, draw_all=False)


def hostile(sections: list[Section]) -> list[Section]:
    """With captions that are markup."""

    def panel(given: Panel) -> Panel:
        return dataclasses.replace(given, title=f"{given.title} <b>b</b>")

    def figure(given: Drawn) -> Drawn:
        if not isinstance(given, Plot):
            return given
        return dataclasses.replace(
            given,
            question=given.question + MARKUP,
            reading=given.reading + MARKUP,
            panels=[*map(panel, given.panels)],
        )

    return [dataclasses.replace(each, figures=[*map(figure, each.figures)]) for each in sections]


@pytest.fixture(scope="module")
def feed_forward(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A report on a feed-forward model, opened on a telephone."""
    path = tmp_path_factory.mktemp("feed-forward") / "report.html"
    return open_report(browser, feed_forward_study(prompts=3), path, width=400)


def box(page: Page, selector: str) -> FloatRect:
    """Where the first such element stands."""
    found = page.locator(selector).first.bounding_box()
    assert found is not None
    return found


def undrawn(page: Page) -> list[str]:
    """Figures without a visible drawing of their own size in them."""
    found = page.evaluate(
        """() => [...document.querySelectorAll("[data-plot]")].filter((place) => {
            const drawings = [...place.querySelectorAll("svg.main-svg, canvas")];
            const marks = place.querySelector("canvas, .trace, .heatmaplayer image");
            const width = Math.max(0, ...drawings.map((one) => one.getBoundingClientRect().width));
            return !marks || width < 0.8 * place.clientWidth || place.clientWidth < 200;
        }).map((place) => place.dataset.plot)"""
    )
    return list(found)


def overflow(page: Page) -> float:
    """By how many pixels the page is wider than the window."""
    return float(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def beyond_the_edge(page: Page) -> int:
    """How many drawings reach beyond the right edge of the window, but for those that scroll by themselves."""
    count = page.evaluate(
        """() => [...document.querySelectorAll(".panel:not(.scrolls) [data-plot] svg.main-svg")].filter((one) =>
            one.getBoundingClientRect().right > document.documentElement.clientWidth).length"""
    )
    return int(count)


def resize(page: Page, width: int) -> None:
    """Change the width of the window, and wait until the figures have followed."""
    page.set_viewport_size({"width": width, "height": 900})
    for _ in range(100):  # they follow one after the other; ten seconds are plenty
        if overflow(page) == 0 and beyond_the_edge(page) == 0 and undrawn(page) == []:
            break
        page.wait_for_timeout(100)


def assert_sound(opened: Opened) -> None:
    """Every figure is drawn and fits, nothing failed or was requested, and no text became a script."""
    assert undrawn(opened.page) == []
    assert overflow(opened.page) == 0
    assert beyond_the_edge(opened.page) == 0
    assert opened.problems == []
    assert opened.requests == [opened.url]
    assert_inert(opened.page)


def assert_inert(page: Page) -> None:
    """No text became markup or a script, and the policy that would have stopped it is there."""
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("img[src=x], a[href^=javascript], main b, header b").count() == 0
    (policy,) = page.locator("meta[http-equiv=Content-Security-Policy]").evaluate_all(
        "(all) => all.map((m) => m.content)"
    )
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
    assert rules.keys() == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert all(source.startswith("'sha256-") for source in rules["script-src"].split())
    assert "http" not in policy


def assert_accessible(page: Page) -> None:
    """No serious finding of axe, where it is there."""
    if AXE.is_file():
        page.evaluate(AXE.read_text(encoding="utf-8"))
        found = page.evaluate(
            """axe.run({ exclude: [".main-svg"] }, { resultTypes: ["violations"] }).then((found) => found.violations)"""
        )
        assert not [
            (each["id"], [node["html"][:200] for node in each["nodes"][:3]])
            for each in found
            if each["impact"] in ("serious", "critical")
        ]


def test_a_screen_reader_finds_its_way(looped: Opened) -> None:
    if not AXE.is_file():
        pytest.skip("no axe found (npm install axe-core)")
    assert_accessible(looped.page)


def test_figures_are_drawn_when_they_come_into_view(looped: Opened) -> None:
    page = looped.page
    page.emulate_media(reduced_motion="reduce")
    there = page.locator("[data-plot]")
    assert page.locator("#first-figure .main-svg").count() > 0
    top, bottom = (box(page, place) for place in ("#answers", "#first-figure [data-plot]"))
    assert bottom["y"] + bottom["height"] - top["y"] < 450  # above the fold, below a title of ordinary length
    assert there.last.locator(".main-svg").count() == 0
    page.locator(".contents a", has_text="Stages").click()
    page.locator("#stages .main-svg").first.wait_for()
    page.locator(".contents a[aria-current]", has_text="Stages").wait_for()
    # What is folded away is drawn when it is opened, by hand or by a link to it.
    page.locator("#settling .more > summary").click()
    page.locator("#settling .more .main-svg").first.wait_for()
    page.locator("#settling .more > summary").click()
    assert page.locator("#settling .more .main-svg:visible").count() == 0
    page.locator(".contents a", has_text="Answers").click()
    page.locator(".contents a[aria-current]", has_text="Answers").wait_for()
    page.evaluate("location.hash = 'cosine'")
    page.locator("#cosine .main-svg").first.wait_for()
    page.evaluate(DRAW_ALL)


def test_every_figure_is_drawn_without_errors_or_requests(looped: Opened) -> None:
    assert looped.page.locator("[data-plot]").count() >= 18
    cells = "document.querySelector('[data-plot=data-cycle-similarity]').data[0].text"
    assert looped.page.evaluate(f"{cells}[0][1]") == "prelude.0<br>recurrent.0@1"
    assert undrawn(looped.page) == []
    assert looped.problems == []
    assert looped.requests == [looped.url]


def test_hostile_text_is_shown_and_does_nothing(looped: Opened) -> None:
    assert_inert(looped.page)
    assert looped.page.locator("h1").inner_text() == HOSTILE
    shown = looped.page.locator("[data-plot^=data-tokens] .ytick").first.text_content() or ""
    assert shown.startswith("<script>hacked")


def test_a_token_is_picked_by_mouse_and_keyboard(looped: Opened) -> None:
    page = looped.page
    chips, picked = page.locator("[data-chips]"), page.locator("[data-picked]")
    assert chips.locator(".chip").count() == 10
    orbit = chips.locator(".chip", has=page.locator(".letter", has_text="O")).first
    orbit.click()
    assert orbit.get_attribute("aria-selected") == "true"
    assert "orbit" in picked.locator("h4").inner_text()
    assert "It is periodic, with 5.5 recurrences a turn" in picked.inner_text()
    # Its way and its displacement are drawn, the floor in the second.
    plots = page.locator("[data-small-plots] .plot")
    assert [plots.nth(place).locator(".trace").count() for place in range(plots.count())] == [1, 2]
    chips.press("ArrowRight")  # the kinds come in turn
    assert "slider" in picked.locator("h4").inner_text()
    assert "It moves on by 1.2 % of its norm per recurrence" in picked.inner_text()
    before = picked.inner_text()
    page.locator("[data-group]").select_option("1")
    page.wait_for_function("(before) => document.querySelector('[data-picked]').innerText !== before", arg=before)
    assert page.locator("[data-chips] .chip[aria-selected=true]").count() == 1
    assert looped.problems == []


def test_a_name_of_a_shared_legend_hides_and_shows_its_lines_in_all_charts(looped: Opened) -> None:
    shown = """() => [...document.querySelectorAll("#distance [data-plot]")].map((place) =>
        place.data.filter((trace) => trace.name === "1" && trace.visible !== false).length)"""
    button = looped.page.locator("#distance .legend button", has_text="1").first
    assert looped.page.evaluate(shown) == [1, 1, 1]
    button.click()
    assert looped.page.evaluate(shown) == [0, 0, 0]
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert looped.page.evaluate(shown) == [1, 1, 1]


def test_no_button_sends_data_away(looped: Opened) -> None:
    titles = looped.page.locator(".modebar-btn").evaluate_all(
        "(buttons) => buttons.map((one) => one.dataset.title || one.getAttribute('aria-label') || '')"
    )
    assert any("PNG" in title or "png" in title for title in titles)  # a figure can be saved
    assert not [title for title in titles if "share" in title.lower() or "cloud" in title.lower()]
    assert looped.page.locator(".plotlyjsicon, .modebar a[href^=http]").count() == 0


def test_policy_would_stop_a_script_that_got_in(looped: Opened) -> None:
    result = looped.page.evaluate(
        """() => {
            const element = document.createElement("script");
            element.textContent = "window.injected = 1";
            document.body.append(element);
            element.remove();
            return typeof window.injected;
        }"""
    )
    assert result == "undefined"
    looped.problems.clear()  # the browser reports what it stopped


def codes_of(study: Study, layer: str, head: int, query: int) -> dict[str, int]:
    """What token `query` gives the first one in each map of a head, as the study holds it, by the name of the map."""
    columns = [study.dataset[f"map_{name}"].values.tolist() for name in ("stage", "layer", "recurrence")]
    return {
        f"recurrence {recurrence}" if stage == "recurrent" else f"{stage} {number}": int(
            study.dataset["attention_map"][0, visit, head, query, 0]
        )
        for visit, (stage, number, recurrence) in enumerate(zip(*columns, strict=True))
        if f"{stage}.{number}" == layer
    }


def in_percent(code: int) -> str:
    return f"{float(f'{100 * (code / 254) ** 2:.2g}'):g} %"


def assert_shown(page: Page, study: Study, layer: str, head: int) -> None:
    """The controls name this head, and the maps are its own: by what they say when they are asked, and by colour."""
    assert page.get_by_role("combobox", name="Layer").input_value() == layer
    assert page.get_by_role("combobox", name="Head").input_value() == str(head)
    codes = codes_of(study, layer, head, query=3)
    page.mouse.move(0, 0)
    page.locator("[data-multiples]").focus()
    for _ in range(4):  # the first one goes to the first entry
        page.keyboard.press("ArrowDown")
    assert page.locator("[data-pointed]").inner_text().startswith("Token 3 “<script>")
    said = [text.split("\n") for text in page.locator(".multiple h4").all_inner_texts()]
    assert said == [[name, in_percent(code)] for name, code in codes.items()]
    drawn = page.evaluate(
        """() => [...document.querySelectorAll(".multiple canvas")].map((canvas) => {
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return [...new Set(new Uint32Array(data.buffer))];
        })"""
    )
    palette = json.loads(page.locator("#attention-maps").text_content() or "")["palette"]
    for code, colours in zip(codes.values(), drawn, strict=True):
        assert int.from_bytes([*palette[code], 255], "little") in colours


def click(page: Page, figure: str, across: float, down: float) -> None:
    """On the plot of a figure, at a share of its width and height, as a person would: move there, then press."""
    page.locator(f"{figure} .nsewdrag").scroll_into_view_if_needed()
    place = box(page, f"{figure} .nsewdrag")
    x, y = place["x"] + across * place["width"], place["y"] + down * place["height"]
    page.mouse.move(x - 3, y)
    page.mouse.move(x, y)
    page.wait_for_timeout(200)  # plotly looks what is below the pointer a few times a second
    page.mouse.click(x, y)
    page.wait_for_timeout(400)  # and waits for a second click


def test_a_click_on_a_head_shows_its_maps(looped: Opened, study: Study) -> None:
    page = looped.page
    page.set_viewport_size({"width": 1600, "height": 900})
    click(
        page, "#head-change", 0.15, 3.5 / 6
    )  # of three layers with two heads the fourth row, of recurrences an early one
    assert page.locator(".multiple.marked h4").inner_text().startswith("recurrence 4")
    assert_shown(page, study, "recurrent.1", 1)


def test_heads_outside_the_loop_are_chosen_without_a_click(looped: Opened, study: Study) -> None:
    page = looped.page
    for layer, head in (("coda.0", 1), ("prelude.0", 0), ("recurrent.2", 0)):
        page.get_by_role("combobox", name="Layer").select_option(layer)
        page.get_by_role("combobox", name="Head").select_option(str(head))
        assert_shown(page, study, layer, head)


def test_the_floorplan_shows_all_heads_and_leads_to_each(looped: Opened, study: Study) -> None:
    page = looped.page
    passes = page.locator(".pass h4").all_inner_texts()
    assert passes == ["prelude", "recurrence 1", "recurrence 2", "recurrence 4", "recurrence 24", "coda"]
    block = page.locator(".pass canvas").nth(2)
    place = block.bounding_box()
    assert place is not None
    block.click(position={"x": 0.25 * place["width"], "y": 2.5 / 3 * place["height"]})
    assert_shown(page, study, "recurrent.2", 0)
    assert page.locator(".multiple.marked h4").inner_text().startswith("recurrence 2")
    assert page.locator(".pass .chosen:visible").count() == 4  # in each block of the loop
    assert looped.problems == []


def test_a_sparse_report_on_a_telephone(feed_forward: Opened) -> None:
    assert_sound(feed_forward)


def test_a_click_on_a_head_of_a_feed_forward_model(feed_forward: Opened) -> None:
    page = feed_forward.page
    resize(page, 1600)
    assert_sound(feed_forward)
    click(page, "#head-sinks", 0.75, 2.5 / 4)  # layer 2 of 4, head 1 of 2
    page.locator("[data-multiples]").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.get_by_role("combobox", name="Layer").input_value() == "prelude.2"
    assert page.get_by_role("combobox", name="Head").input_value() == "1"
    (code,) = codes_of(feed_forward_study(prompts=3), "prelude.2", 1, query=1).values()
    assert page.locator(".multiple h4").all_inner_texts() == [f"layer 2\n{in_percent(code)}"]
    assert feed_forward.problems == []
    page.close()


def test_an_answer_leads_to_its_figure(looped: Opened) -> None:
    looped.page.locator("#answer-loss a.see").click()
    assert looped.page.url.endswith("#loss")
    looped.page.locator("#loss").wait_for(state="visible")


@pytest.mark.parametrize("width", [1600, 400])
def test_page_fits_the_window(looped: Opened, width: int) -> None:
    resize(looped.page, width)
    assert overflow(looped.page) == 0
    assert beyond_the_edge(looped.page) == 0
    assert undrawn(looped.page) == []


def test_each_map_can_have_a_scale_of_its_own(looped: Opened) -> None:
    page = looped.page
    drawn = "document.querySelector('#floorplan canvas').toDataURL()"
    shared = page.evaluate(drawn)
    page.locator("#floorplan").get_by_role("combobox", name="Colours").select_option("own")
    assert page.locator("#head-maps").get_by_role("combobox", name="Colours").input_value() == "own"
    assert page.locator("#floorplan .ticks:visible").inner_text().endswith("the largest 2 % of each map")
    assert page.evaluate(drawn) != shared
    page.locator("#head-maps").get_by_role("combobox", name="Colours").select_option("shared")
    assert page.evaluate(drawn) == shared
    assert page.locator("#floorplan .ticks:visible").inner_text().endswith("100 %")


def test_another_prompt_can_be_chosen_on_a_telephone(looped: Opened) -> None:
    page = looped.page
    resize(page, 400)
    page.get_by_role("combobox", name="Prompt").last.select_option("1")  # that of the floorplan
    assert page.locator("#head-maps").get_by_role("combobox", name="Prompt").input_value() == "1"
    page.locator("[data-multiples]").focus()
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    assert page.locator(".multiple .value").first.inner_text() == in_percent(99)
    assert overflow(page) == 0
    assert looped.problems == []
    page.close()


def test_a_report_of_which_all_diverged_on_a_telephone(browser: Browser, tmp_path: Path) -> None:
    opened = open_report(browser, looped_study(overflowing, prompts=2), tmp_path / "report.html", width=400)
    assert_sound(opened)
    opened.page.close()


def test_verdicts_on_trajectories(browser: Browser, tmp_path: Path) -> None:
    """Of files and reasons with hostile names."""
    opened = open_page(browser, write_behaviour_report(judged(), tmp_path / "page.html"), width=1400)
    assert_sound(opened)
    opened.page.close()


@pytest.fixture(scope="module")
def compared(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A report on a comparison."""
    looped = looped_study(contracting(), prompts=3)
    looped.manifest["model"]["name"] = HOSTILE
    looped.manifest["model"]["weights_sha256"] = "another"
    path = write_comparison(
        compare([looped, feed_forward_study(prompts=3)]), tmp_path_factory.mktemp("compared") / "report.html"
    )
    return open_page(browser, path, width=400)


@pytest.mark.parametrize("width", [400, 1400])
def test_a_comparison(compared: Opened, width: int) -> None:
    resize(compared.page, width)
    assert_sound(compared)


def random_model(std: float, injection_scale: float = 1.0) -> CellResult:
    """As a phase diagram has them: the fixed point is lost between 0.02 and 0.04."""
    settles = std < 0.03
    return CellResult(
        cell=Cell(
            norm="pre", injection="linear", depth=2, seed=0, std=std, injection_scale=injection_scale, judged=True
        ),
        outcome=CellOutcome.FIXED_POINT if settles else CellOutcome.NONE,
        settling="fixed point" if settles else "not settled",
        degeneracy=0.5,
        drift=0.0,
        norm_growth=1.0,
        counts=(1, 4, 16, 128),
        distance=(0.5, 1e-3, 1e-7, 0.0) if settles else (0.9, 0.8, 0.9, 0.0),
        norm=(1.0, 1.1, 1.2, 1.2),
        radius=25 * std,
        radius_median=20 * std,
        radius_error=1e-6,
        predicted={"fixed point": 6},
        observed_rate=None,
        verdicts={"fixed point" if settles else "orbit": 6},
    )


@pytest.fixture(scope="module")
def experiments(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Of all three kinds, with a design and a folder of hostile names; the trained ones are those that are shipped."""
    shipped = load_experiment(CHECKOUT / "results" / "recipes")
    hostile = [
        dataclasses.replace(each, cell=dataclasses.replace(each.cell, design=HOSTILE))
        if each.cell.design == "plain"
        else each
        for each in shipped.trained
    ]
    grid = tuple(random_model(std, scale) for std in (0.01, 0.02, 0.04) for scale in (1.0, 4.0))
    path = write_experiments(
        [
            Experiment(folder=Path("<b>grid</b>"), kind="architectures", cells=grid[::2]),
            Experiment(folder=Path("phase"), kind="phase", cells=grid),
            dataclasses.replace(shipped, trained=tuple(hostile)),
        ],
        tmp_path_factory.mktemp("experiments") / "page.html",
    )
    return open_page(browser, path, width=400)


@pytest.mark.parametrize("width", [400, 1400])
def test_experiments(experiments: Opened, width: int) -> None:
    resize(experiments.page, width)
    assert_sound(experiments)
    assert_accessible(experiments.page)
    table = experiments.page.locator("#training-table table")
    head = table.locator("thead button", has_text="loss").first
    losses = f"""(table) => [...table.tBodies[0].rows].map((row) =>
        parseFloat(row.cells[{head.evaluate("(one) => one.closest('th').cellIndex")}].textContent))"""
    head.click()
    rising = table.evaluate(losses)
    assert rising == sorted(rising)
    head.click()
    assert table.evaluate(losses) == rising[::-1]
    assert experiments.page.locator("main img, main b, header b").count() == 0
    assert HOSTILE in (experiments.page.locator("#training-table").text_content() or "")


def test_a_page_is_printed_on_one_sheet(browser: Browser, tmp_path: Path) -> None:
    """By the tool that made the report in `results`; it starts a browser of its own."""
    page = write_report(feed_forward_study(prompts=2), tmp_path / "report.html")
    subprocess.run([sys.executable, CHECKOUT / "tools" / "print_page.py", page, tmp_path / "page.pdf"], check=True)
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert content.count(b"/Type /Page\n") == 1
