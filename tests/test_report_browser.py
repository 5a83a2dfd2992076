"""The report in a real browser: nothing missing or cut off, legible in light and dark, usable
without a mouse.

Screenshots of a report, four PNG files in a folder, phone and desktop, light and dark:

    python tests/test_report_browser.py runs/demo docs/images
"""

import contextlib
import json
import os
import re
import sys
from pathlib import Path

import pytest

CHROMIUM = Path(os.environ.get("LLM2COMP_CHROMIUM", "/usr/bin/chromium"))
QUIET = (
    "--disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
SIZES = {"phone": (375, 812), "desktop": (1280, 900)}
SCHEMES = ("light", "dark")

pytestmark = pytest.mark.browser


@contextlib.contextmanager
def chromium():
    """This machine's browser, headless; nothing is downloaded. Without one tests are skipped."""
    pytest.importorskip("playwright", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}; LLM2COMP_CHROMIUM names another one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", *QUIET.split()]
        )
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser, file, size="desktop", scheme="light"):
    """A new page on a file; what goes wrong while it loads is listed in its `problems`."""
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.problems, page.requests = [], []
    page.on(
        "console",
        lambda message: (
            page.problems.append(message.text) if message.type in ("error", "warning") else None
        ),
    )
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("requestfailed", lambda request: page.problems.append(request.url))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(file.as_uri())
    return page


def screenshots(file, folder):
    """PNG files of a report's beginning: report-phone-light.png and three more.

    Returns their paths.
    """
    paths = []
    with chromium() as browser:
        for size in SIZES:
            for scheme in SCHEMES:
                paths.append(folder / f"report-{size}-{scheme}.png")
                page = open_page(browser, file, size, scheme)
                page.screenshot(path=paths[-1])
                page.close()
    return paths


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def reports(folder):
    """A report of one run, and one of two."""
    from llm2comp.lab.report import report
    from synthetic_run import write_run

    one = write_run(folder / "synthetic-run")
    other = write_run(
        folder / "another-synthetic-run-with-a-rather-long-name",
        ["seed=1", "ucl=null"],
        seed=1,
        scores=False,
    )
    return {
        "one": report([one], folder / "one.html"),
        "two": report([one, other], folder / "two.html"),
    }


def rgb(colour):
    return [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["one", "two"])
def test_all_is_shown_and_nothing_runs_over(browser, reports, name, size):
    page = open_page(browser, reports[name], size)
    assert page.problems == []
    assert page.requests == [reports[name].as_uri()], "one file, no network"
    widths = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert widths == [SIZES[size][0]] * 2
    drawings = page.evaluate(
        "[...document.querySelectorAll('svg')].map(e => { const r = e.getBoundingClientRect(); "
        "return [r.left, r.right, r.height, e.getBBox().width] })"
    )
    assert len(drawings) >= 20
    for left, right, height, drawn in drawings:
        assert 0 <= left < right <= SIZES[size][0]
        assert height > 150
        assert drawn > 200
    page.close()


def test_text_in_plots_is_legible_on_a_phone(browser, reports):
    page = open_page(browser, reports["one"], "phone")
    heights = page.locator("svg text").evaluate_all(
        "texts => texts.map(e => parseFloat(getComputedStyle(e).fontSize) * "
        "e.ownerSVGElement.getScreenCTM().a)"
    )
    assert len(heights) > 200
    assert min(heights) >= 9.5, "CSS pixels"
    page.close()


def test_tables_hold_the_figures(browser, reports, folder):
    page = open_page(browser, reports["one"])
    rows = [
        json.loads(line)
        for line in (folder / "synthetic-run" / "1-pretext" / "metrics.jsonl")
        .read_text()
        .splitlines()
    ]
    page.locator("#run1-pretext-loss summary").click()
    cells = page.locator("#run1-pretext-loss tbody tr").evaluate_all(
        "rows => rows.map(r => [...r.cells].map(c => c.innerText))"
    )
    assert len(cells) == len(rows) == 11
    for shown, row in zip(cells, rows, strict=True):
        assert shown[0] == str(row["step"])
        assert float(shown[1]) == pytest.approx(row["loss"], rel=1e-3)
    demo = page.locator("#run1-scores table").first
    assert demo.locator("tbody tr").last.locator("th, td").all_inner_texts() == [
        "BM25",
        "61.92",
        "57.99",
        "–",
    ]
    page.close()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_colours_are_legible(browser, reports, scheme):
    page = open_page(browser, reports["one"], scheme=scheme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) < 0.02) == (scheme == "dark")
    colours = page.evaluate(
        "Object.fromEntries(['h1', 'p', 'nav a', 'td', 'th', 'caption', 'figcaption', 'summary', "
        "'.lead', '.note', 'svg text'].map(s => [s, getComputedStyle(document.querySelector(s))[s "
        "== 'svg text' ? 'fill' : 'color']]))"
    )
    raised = page.evaluate("getComputedStyle(document.querySelector('.cards li')).backgroundColor")
    for name, colour in colours.items():
        assert contrast(colour, paper) >= 4.5, name
        assert (luminance(colour) > luminance(paper)) == (scheme == "dark"), name
    assert contrast(colours[".note"], raised) >= 4.5
    skip = page.locator(".skip").evaluate(
        "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"
    )
    assert contrast(*skip) >= 4.5
    lines = page.evaluate(
        "[...new Set([...document.querySelectorAll('svg path')].map(e => "
        "getComputedStyle(e)).filter(s => parseFloat(s.strokeWidth) > 1.5).map(s => s.stroke))]"
    )
    assert len(lines) >= 4, "as many series as the spectrum has"
    assert min(contrast(line, paper) for line in lines) >= 4.5
    page.close()


def test_keyboard_reaches_everything(browser, reports):
    page = open_page(browser, reports["one"], "phone")
    focused = "[document.activeElement.className, document.activeElement.getAttribute('href')]"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == ["skip", "#content"]
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0, (
        "shown once it has the focus"
    )
    links = page.locator("nav a").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    assert len(links) >= 8
    for link in links:
        page.keyboard.press("Tab")
        assert page.evaluate(focused)[1] == link
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert page.locator(link).count() == 1
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    details = "document.activeElement.parentElement"
    assert page.evaluate(f"{details}.open") is False
    page.keyboard.press("Enter")
    assert page.evaluate(f"{details}.open") is True
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "scroll", (
        "the table scrolls by the arrow keys"
    )
    page.close()


def test_skip_link_goes_to_the_content(browser, reports):
    page = open_page(browser, reports["one"])
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    page.close()


def test_wide_tables_scroll_in_their_own_place(browser, reports):
    page = open_page(browser, reports["one"], "phone")
    page.locator("#published summary").click()
    scroll = page.locator("#published .scroll")
    assert scroll.evaluate("e => e.scrollWidth > 2 * e.clientWidth")
    scroll.evaluate("e => e.scrollTo(600, 0)")
    name = page.locator("#published tbody th").first.bounding_box()
    assert 0 <= name["x"] < 30, "the first column stays"
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES["phone"][0]
    page.close()


def test_screenshots_are_made(browser, reports, tmp_path):
    # in a process of its own: one playwright runs here already
    import subprocess

    command = [sys.executable, __file__, str(reports["one"]), str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == sorted(f"report-{size}-{scheme}.png" for size in SIZES for scheme in SCHEMES)
    assert min(path.stat().st_size for path in tmp_path.iterdir()) > 5000


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    if source.is_dir():
        from llm2comp.lab.report import report

        source = report([source], source / "report.html")
    for shot in screenshots(source.resolve(), target):
        sys.stdout.write(f"{shot}\n")
