"""The page of a real run of every command in a real browser: what is seen first, what moves, opens and tells; nothing is fetched,
nothing fails, a phone does not scroll sideways."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from blockprune.reports.html.page import report_files
from blockprune.reports.report_data import report_data

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
CUT = "document.querySelector('.first .scroll').classList.contains('more')"
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is installed"),
    # playwright leaves its transport's loop to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def report(real: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the page of all of them."""
    page = tmp_path_factory.mktemp("report") / "report.html"
    data = report_data(list(real.values()))
    page.write_text(report_files(data, "thop")[".html"], encoding="utf-8")
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
    shown = browser.new_page(viewport=DESK)
    wrong: list[str] = []
    shown.on("console", lambda message: wrong.append(message.text))
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.on("dialog", lambda dialog: wrong.append(dialog.message))
    shown.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(("data:", report)) else None)
    shown.goto(report)
    yield shown
    shown.close()
    assert wrong == []


def mark(page: Any, name: str) -> Any:
    """A model's mark in the picture that is shown."""
    return page.locator(f".picture > div:visible .mark[data-name='{name}']")


def test_the_first_screen_says_what_to_take_and_shows_it(page: Any) -> None:
    card = page.locator(".taken li").last.inner_text()
    named = r"Budget: 80\xa0% of the parameters\nTake found (?:again )?\(uses \d\S*\xa0%\): "
    assert re.match(named + "no trained design by hand of this size was evaluated", card)
    assert re.search(r"CLIP score\s+\d\S*\s+FID\s+\d\S*\s+One training, 2 updates in \S+; n\xa0=\xa04", card)
    assert re.search(r"\nNext: python", card)
    for size in (DESK, PHONE):
        page.set_viewport_size(size)
        ends = [box["y"] + box["height"] for box in (page.locator(at).first.bounding_box() for at in (".taken", ".picture"))]
        assert ends[0] < ends[1] <= size["height"]
    page.set_viewport_size(DESK)
    table = page.locator(".first table.sortable:visible")
    assert table.bounding_box()["y"] + table.bounding_box()["height"] <= DESK["height"]
    assert table.locator("tbody th").all_inner_texts()[0] == "tiny-digits"


def test_folded_it_is_short_and_a_link_opens_its_section(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollHeight") <= 3 * DESK["height"]
    assert all(text for text in page.locator(".section > summary > p").all_inner_texts())
    for link in page.locator("nav a").all()[1:]:
        target = link.get_attribute("href")
        assert page.locator(target).get_attribute("open") is None
        link.click()
        page.wait_for_function("id => document.querySelector(id).open", arg=target)
        top = "id => document.querySelector(id).getBoundingClientRect().top"
        page.wait_for_function(f"id => 0 <= ({top})(id) && ({top})(id) < innerHeight", arg=target)  # it scrolls there smoothly


def test_the_picture_shows_another_measure_cost_and_setting(page: Any) -> None:
    where = {"": mark(page, "found").locator(".shape").get_attribute("transform")}
    for name, value in (("measure", "fid"), ("cost", "macs"), ("reading", "1")):
        page.locator(f"select[name={name}]").select_option(value)
        where[name] = mark(page, "found").locator(".shape").get_attribute("transform")
    assert where[""] != where["measure"] != where["cost"] != where["reading"]
    assert page.locator(".picture .wide .heading").text_content() == "FID (lower is better)"
    assert page.locator(".picture .wide .axis.x").text_content().startswith("MACs, % of the teacher")
    # one model was drawn at another setting, too: others are not shown there, nor in its table
    assert mark(page, "mid-removed").count() == 1 and not mark(page, "mid-removed").is_visible()
    assert page.locator(".reading:visible figcaption").inner_text().startswith("Models at CFG 2, 2 steps")


def test_what_the_script_draws_is_what_python_drew(page: Any) -> None:
    before = page.locator(".picture .wide svg").inner_html()
    for value in ("fid", "clip_score"):
        page.locator("select[name=measure]").select_option(value)
    numbers = re.compile(r"-?\d+\.?\d*")
    after = page.locator(".picture .wide svg").inner_html()
    assert sorted(map(float, numbers.findall(after))) == sorted(map(float, numbers.findall(before)))


def test_a_point_tells_and_draws_its_u_by_pointer_and_by_keyboard(page: Any) -> None:
    tip = page.locator("#tip")
    mark(page, "found").locator(".shape").hover()
    assert tip.inner_text().startswith("found")
    assert "FID: " in tip.inner_text() and "trained 2 updates" in tip.inner_text()
    assert tip.locator("svg.u .block.gone").count() > 0
    page.mouse.move(1, 1)
    assert tip.is_hidden()
    page.locator(".picture .wide .mark[tabindex='0']").focus()
    names = [tip.locator("strong").inner_text()]
    for _ in range(2):
        page.keyboard.press("ArrowRight")
        names.append(tip.locator("strong").inner_text())
    assert len({name.partition(",")[0] for name in names}) == 3
    assert page.locator(".picture .wide .mark[tabindex='0']").count() == 1
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith(names[-1])
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_a_block_tells_by_pointer_and_by_keyboard(page: Any) -> None:
    page.locator("nav a", has_text="Remove").click()
    tip, drawing = page.locator("#tip"), page.locator("#remove svg.u").first
    drawing.locator(".block", has_text="R1").first.hover()
    assert tip.inner_text().startswith("down_blocks.0.resnets.1")
    assert "FID" in tip.inner_text()
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 1280
    page.mouse.move(1, 1)
    assert tip.is_hidden()
    drawing.locator(".block[tabindex='0']").focus()
    first = tip.inner_text()
    page.keyboard.press("ArrowRight")
    assert tip.is_visible()
    assert tip.inner_text() != first


def test_a_point_and_a_block_tell_when_touched(browser: Any, report: str) -> None:
    shown = browser.new_page(viewport=PHONE, has_touch=True)
    shown.goto(f"{report}#remove")
    mark(shown, "found").locator(".shape").tap()
    texts, boxes = [shown.locator("#tip").inner_text()], [shown.locator("#tip").bounding_box()]
    shown.locator("#remove svg.u").nth(1).locator(".block.gone").first.tap()
    texts.append(shown.locator("#tip").inner_text())
    boxes.append(shown.locator("#tip").bounding_box())
    shown.close()
    assert texts[0].startswith("found") and "removed in this student" in texts[1]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)


def test_tables_sort_by_click_and_by_key_and_what_is_missing_stays_last(page: Any) -> None:
    table = page.locator(".first table.sortable:visible")
    titles = [text.rstrip() for text in table.locator("thead button").all_inner_texts()]

    def column(name: str) -> list[str]:
        cells = table.locator(f"tbody tr > :nth-child({titles.index(name) + 1})").all_inner_texts()
        return [cell.split("\n")[0] for cell in cells]

    heading = table.locator("th", has_text="FID")
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    values = [float(text) for text in column("FID ↓")]
    assert values == sorted(values)
    heading.locator("button").focus()
    page.keyboard.press("Enter")
    assert [float(text) for text in column("FID ↓")] == values[::-1]
    for _ in range(2):
        table.locator("th", has_text="updates").locator("button").click()
        assert column("updates") == ["2", "–", "–"]


def test_the_results_can_be_copied(page: Any) -> None:
    page.locator("nav a", has_text="Caveats").click()
    page.locator("#copy summary", has_text="JSON").click()
    text = page.locator("#json").inner_text()
    assert text.lstrip().startswith("{")
    assert '"made_by": "blockprune report"' in text
    page.locator("#copy summary", has_text="LaTeX").click()
    assert "\\toprule" in page.locator("#copy pre").first.inner_text()


def test_what_to_run_next_is_copied_by_a_click(page: Any, real: Mapping[str, Path]) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".next button").last.click()
    page.wait_for_function("() => document.getElementById('status').textContent === 'Copied.'")
    program, option, code = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    assert (program, option) == ("python", "-c")
    assert f'bp.load_pipeline("{real["distill"] / "pipeline"}")' in code
    compile(code, "next", "exec")


def test_a_table_that_is_cut_says_so_until_its_end_is_seen(page: Any) -> None:
    table, title = page.locator(".first .reading:visible .scroll"), page.locator(".first .reading:visible figcaption")
    for size, is_cut in ((DESK, False), (PHONE, True)):
        page.set_viewport_size(size)
        page.wait_for_function(f"() => {CUT} === {str(is_cut).lower()}")
        shown = title.evaluate("caption => getComputedStyle(caption, '::after').content")
        assert ("more" in shown) == is_cut
    table.evaluate("box => { box.scrollLeft = box.scrollWidth }")
    page.wait_for_function(f"() => !{CUT}")


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_no_width_scrolls_sideways(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_image_is_shown_and_every_chart_has_a_name(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.wait_for_function("[...document.images].every(i => i.complete)")
    shown = page.evaluate("[...document.images].map(i => [i.naturalWidth > 0, i.alt.slice(0, 60)])")
    assert len(shown) > 20
    assert [alt for sound, alt in shown if not sound] == []
    names = page.evaluate(
        "[...document.querySelectorAll('svg.p, svg.u[role], .mark, .block')].map(s => s.getAttribute('aria-label'))"
    )
    assert len(names) > 50 and all(names)


def test_text_is_readable_in_light_and_dark(page: Any) -> None:
    """The contrast of text on its ground is at least 4.5, WCAG's measure for body text; that of marks at least 3."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        ground, ink, muted, accent, best, faint, hand, found, faded = (luminance(page, f"var(--{name})") for name in NAMES)
        text = [(ink, ground), (muted, ground), (accent, ground), (ink, best), (muted, best), (muted, faint)]
        curves = [(luminance(page, f"s{i}"), ground) for i in range(8)]
        for least, pairs in ((4.5, [*text, *curves]), (3.0, [(hand, ground), (found, ground), (faded, ground)])):
            for one, other in pairs:
                assert (max(one, other) + 0.05) / (min(one, other) + 0.05) >= least, scheme


NAMES = ("ground", "ink", "muted", "accent", "best", "faint", "hand", "found", "faded")
COLOUR = """name => {
    const svg = document.querySelector("svg.p"), shown = document.createElementNS("http://www.w3.org/2000/svg", "g");
    name.startsWith("var") ? shown.style.color = name : shown.classList.add(name);
    svg.append(shown);
    const colour = getComputedStyle(shown).color;
    shown.remove();
    return colour.match(/[0-9.]+/g).map(Number);
}"""


def luminance(page: Any, name: str) -> float:
    """Of a variable or of a class of charts, as the browser resolves it."""
    linear = [
        p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in (c / 255 for c in page.evaluate(COLOUR, name)[:3])
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_without_scripts_there_is_the_same_picture(browser: Any, report: str) -> None:
    context = browser.new_context(java_script_enabled=False, viewport=DESK)
    shown = context.new_page()
    shown.goto(report)
    assert shown.locator(".picture .wide .mark").first.is_visible()
    assert shown.locator(".picture form").is_hidden()
    assert shown.locator(".first table.sortable:visible").count() == 1
    context.close()


@pytest.mark.slow
def test_it_prints_with_everything_open(page: Any, tmp_path: Path) -> None:
    page.evaluate(
        "addEventListener('beforeprint', () => { window.folded = document.querySelectorAll('.section:not([open])').length })"
    )
    page.pdf(path=tmp_path / "report.pdf")
    assert page.evaluate("window.folded") == 0
    assert page.locator(".section[open]").count() == 0
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
