"""The report in a real browser: tables sort, blocks tell, nothing is fetched, nothing fails, a phone does not scroll sideways."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_rows

from blockprune.reports.html.page import report_files
from blockprune.reports.report_data import report_data

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is installed"),
    # playwright leaves its transport's loop to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report of every kind of run."""
    folder = tmp_path_factory.mktemp("report")
    page = folder / "report.html"
    page.write_text(report_files(report_data(report_rows.everything(folder / "runs")), "thop")[".html"])
    return page.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'blockprune[dev]'")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, report: str) -> Iterator[Any]:
    """The report, open; afterwards nothing may have been logged, thrown or requested."""
    shown = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    shown.on("console", lambda message: wrong.append(message.text))
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.on("dialog", lambda dialog: wrong.append(dialog.message))
    shown.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(("data:", report)) else None)
    shown.goto(report)
    yield shown
    shown.close()
    assert wrong == []


def column(page: Any, name: str) -> list[str]:
    rows = page.locator("#results table.sortable").first
    titles = [t.rstrip() for t in rows.locator("thead button").all_inner_texts()]
    cells = rows.locator(f"tbody tr > :nth-child({titles.index(name) + 1})").all_inner_texts()
    return [cell.split("\n")[0] for cell in cells]


def test_a_click_sorts_and_another_turns_it_round(page: Any) -> None:
    before = column(page, "FID ↓")
    heading = page.locator("#results th", has_text="FID").first
    assert heading.get_attribute("aria-sort") == "none"
    heading.locator("button").click()
    values = [float(text) for text in column(page, "FID ↓")]
    assert values == sorted(values)
    assert [str(v) for v in values] != before
    assert heading.get_attribute("aria-sort") == "ascending"
    heading.locator("button").click()
    assert [float(text) for text in column(page, "FID ↓")] == sorted(values, reverse=True)
    assert heading.get_attribute("aria-sort") == "descending"


def test_the_keyboard_sorts_and_what_is_missing_stays_last(page: Any) -> None:
    heading = page.locator("#results th", has_text="latency").first
    heading.locator("button").focus()
    for _ in range(2):
        page.keyboard.press("Enter")
        times = column(page, "step latency, × teacher")
        assert "–" in times
        assert times == sorted(times, key=lambda t: t == "–")
    assert page.locator("#results th[aria-sort=descending]").count() == 1


def test_a_block_tells_by_pointer_and_by_keyboard(page: Any) -> None:
    tip, drawing = page.locator("#tip"), page.locator("svg.u").first
    assert tip.is_hidden()
    drawing.locator(".block", has_text="R1").first.hover()
    assert tip.inner_text().startswith("down_blocks.0.resnets.1")
    assert "FID" in tip.inner_text()
    box = tip.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 1280
    page.mouse.move(1, 1)
    assert tip.is_hidden()
    drawing.locator(".block[tabindex='0']").focus()
    first = tip.inner_text()
    page.keyboard.press("ArrowRight")
    assert tip.is_visible()
    assert tip.inner_text() != first
    assert drawing.locator(".block[tabindex='0']").count() == 1
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_a_block_tells_when_touched(browser: Any, report: str) -> None:
    shown = browser.new_page(viewport={"width": 375, "height": 800}, has_touch=True)
    shown.goto(report)
    shown.locator("svg.u").nth(1).locator(".block.gone").first.tap()
    text, box = shown.locator("#tip").inner_text(), shown.locator("#tip").bounding_box()
    shown.close()
    assert "removed in this student" in text
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 375


def test_the_results_can_be_copied(page: Any) -> None:
    page.get_by_text("JSON", exact=True).click()
    text = page.locator("pre[data-from]").inner_text()
    assert text.lstrip().startswith("{")
    assert '"made_by": "blockprune report"' in text
    page.get_by_text("LaTeX", exact=True).click()
    assert "\\toprule" in page.locator("#copy pre").first.inner_text()


@pytest.mark.parametrize("width", [375, 768, 1280])
def test_no_width_scrolls_sideways(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_long_name_in_the_header_leaves_room_for_what_it_says(page: Any) -> None:
    page.set_viewport_size({"width": 1280, "height": 800})
    page.evaluate("document.querySelector('dt').textContent = 'Protocol of a-model, '.repeat(20)")
    assert page.evaluate("document.querySelector('dd').getBoundingClientRect().width") > 600
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_every_picture_is_shown(page: Any) -> None:
    shown = page.evaluate("[...document.images].map(i => [i.complete && i.naturalWidth > 0, i.alt.slice(0, 60)])")
    assert len(shown) > 20
    assert [alt for sound, alt in shown if not sound] == []


def test_text_is_readable_in_light_and_dark(page: Any) -> None:
    """The contrast of text on its ground is at least 4.5, WCAG's measure for body text."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        said = page.evaluate("""() => {
            const name = (n) => getComputedStyle(document.documentElement).getPropertyValue(n).trim();
            return ["--ground", "--ink", "--muted", "--accent", "--best", "--faint"].map(name);
        }""")
        ground, ink, muted, accent, best, faint = (luminance(colour) for colour in said)
        for text, behind in ((ink, ground), (muted, ground), (accent, ground), (ink, best), (muted, best), (muted, faint)):
            assert (max(text, behind) + 0.05) / (min(text, behind) + 0.05) >= 4.5, scheme


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_it_prints(page: Any, tmp_path: Path) -> None:
    page.emulate_media(media="print")
    page.pdf(path=tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
