"""The page in a real browser: what it shows is what the server answers, on a phone, in the dark,
without a mouse, with a key.

Screenshots, two JPEG files in a folder, a wide screen and a phone:

    python tests/test_serve_page.py docs/images
"""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import llm2comp
from llm2comp.system.console import GENERAL
from llm2comp.use.serve.settings import Keys
from serving import TINY, serving, tiny
from test_report_browser import SIZES, chromium, contrast

pytestmark = pytest.mark.browser
KEY = "a-secret-key"
TEXTS = ["a cat sleeps", "a kitten naps <b>bold</b>", 'rates were raised, "again" & it\'s done']


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def served():
    with serving(llm2comp.load(TINY, "cpu"), lens=True) as found:
        yield found


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    (folder / "fox.md").write_text("# Foxes\n\nA <b>fox</b> sleeps; foxes are quick.\n")
    index = llm2comp.Index(folder / "db", TINY)
    index.lend(TINY, tiny())
    index.add(folder / "fox.md")
    with serving(index=index) as found:
        yield found


@pytest.fixture
def page(browser, served):
    found = open_page(browser, served)
    yield found
    assert found.problems == []
    assert {url.split("/")[2] for url in found.requests if not url.startswith("data:")} == {
        served.url.split("/")[2]
    }
    found.close()


def open_page(browser, served, size="desktop", scheme="light"):
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.problems, page.requests = [], []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on(
        "console",
        lambda said: page.problems.append(said.text) if said.type in ("error", "warning") else None,
    )
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(served.url)
    page.wait_for_function("document.querySelector('#about').textContent.length > 1")
    return page


def compare(page, texts=TEXTS):
    page.locator("#compare-text").fill("\n".join(texts))
    page.locator("#compare button").click()
    page.locator("#compare table").wait_for()


def look(page, text="a text of some words"):
    page.locator("#memory-text").fill(text)
    page.locator("#memory button").click()
    page.locator("#memory table").wait_for(timeout=60_000)


def plain(text):
    return " ".join(text.split())


def cells(page, section):
    rows = page.locator(f"#{section} tbody tr").evaluate_all(
        "rows => rows.map(r => [...r.querySelectorAll('td')].map(c => c.innerText))"
    )
    return np.array([[float(cell.replace("−", "-")) for cell in row] for row in rows])


def test_texts_are_compared(page):
    compare(page)
    vectors = tiny().encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(cells(page, "compare"), vectors @ vectors.T, atol=0.0051)
    assert page.locator("#compare tbody th").nth(1).inner_text() == f"2 {TEXTS[1]}"
    assert page.locator("#compare b").count() == 0, "a text is never markup"


def test_the_lines_for_a_terminal_and_for_python_do_the_same(page, tmp_path):
    compare(page)
    page.locator("#compare summary").click()
    curl, python = page.locator("#compare pre").all_inner_texts()
    said = subprocess.run(shlex.split(curl), capture_output=True, text=True, check=True)
    own = [item["embedding"] for item in json.loads(said.stdout)["data"]]
    ran = [sys.executable, "-c", python]
    done = subprocess.run(ran, capture_output=True, text=True, check=True)
    found = [item["embedding"] for item in ast.literal_eval(done.stdout)["data"]]
    expected = tiny().encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(own, expected, atol=1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_memory_of_a_text(page, served):
    look(page)
    found = served.post("/memory", {"text": "a text of some words"}).json()
    np.testing.assert_allclose(cells(page, "memory"), found["correlation"], atol=0.0051)
    assert len(found["correlation"]) == 8
    names = page.locator("#memory tbody th").all_inner_texts()
    words = [" · ".join(words) for words in found["words"]]
    assert [plain(name) for name in names] == [plain(f"{i} {w}") for i, w in enumerate(words, 1)]
    read = page.locator("#memory dd").all_inner_texts()
    sources = [plain(found[f"from_{source}"]) for source in ("text", "memory", "nothing")]
    assert [plain(text) for text in read] == [text or "(nothing)" for text in sources]


def test_documents_are_searched(browser, searched):
    page = open_page(browser, searched)
    assert "1 passage of 1 file" in page.locator("#about").inner_text()
    page.locator("#search-text").fill("a quick fox")
    page.keyboard.press("Enter")
    page.locator("#search li").wait_for()
    assert page.locator("#search li strong").inner_text().endswith("fox.md:3")
    assert set(page.locator("#search mark").all_inner_texts()) == {"fox", "foxes", "quick"}
    assert page.locator("#search li b").count() == 0
    page.close()


def test_what_is_wrong_is_told(page):
    page.locator("#compare-text").fill("one text")
    page.locator("#compare button").click()
    page.locator("#compare [role=alert]").wait_for()
    assert page.locator("#compare [role=alert]").inner_text() == "two texts or more, one a line"
    compare(page)
    assert page.locator("#compare [role=alert]").count() == 0


def test_a_key_is_asked_for_and_used(browser):
    with serving(keys=Keys.of([KEY])) as served:
        page = open_page(browser, served)
        assert "API key" in page.locator("#about").inner_text()
        page.locator("#key-text").fill("wrong-key")
        page.keyboard.press("Enter")
        page.locator("#key [role=alert]").wait_for()
        page.locator("#key-text").fill(KEY)
        page.keyboard.press("Enter")
        page.locator("#key").wait_for(state="hidden")
        assert TINY in page.locator("#about").inner_text()
        compare(page)
        page.locator("#compare summary").click()
        shown = page.locator("#compare pre").all_inner_texts()
        assert all("LLM2COMP_API_KEY" in line and KEY not in line for line in shown)
        assert "--with-lm" not in page.locator("#memory").inner_text()
        look(page)
        assert "--with-lm" in page.locator("#memory").inner_text()
        page.close()


@pytest.mark.parametrize("size", SIZES)
def test_nothing_runs_over(browser, served, size):
    page = open_page(browser, served, size)
    compare(page, [f"{i} a rather long text, {'word ' * 30}" for i in range(9)])
    look(page)
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    for caption in page.locator("figcaption").all():
        assert caption.evaluate("e => e.scrollWidth <= e.clientWidth")
        box = caption.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= SIZES[size][0]
    assert min(b.bounding_box()["height"] for b in page.locator("button:visible").all()) >= 44
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_legible(browser, served, scheme):
    page = open_page(browser, served, scheme=scheme)
    compare(page)
    page.locator("#compare summary").click()
    for selector in ("h1", "h2", "#about", "label", "figcaption", "tbody th", "pre", "summary"):
        colour, paper = page.locator(f"{selector}:visible").first.evaluate(
            """e => { let box = e; const clear = 'rgba(0, 0, 0, 0)';
            while (getComputedStyle(box).backgroundColor === clear) box = box.parentElement;
            return [getComputedStyle(e).color, getComputedStyle(box).backgroundColor] }"""
        )
        assert contrast(colour, paper) >= 4.5, (selector, colour, paper)
    button = page.locator("#compare button").evaluate(
        "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"
    )
    assert contrast(*button) >= 4.5
    page.close()


def test_the_keyboard_reaches_everything(browser, served):
    page = open_page(browser, served)
    page.evaluate("document.querySelector('#compare form').requestSubmit()")
    page.locator("#compare table").wait_for()
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("[document.activeElement.id, document.activeElement.tagName].join(' ')")
        )
        if reached[-1] != " BODY":
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    expected = ["compare-text TEXTAREA", " BUTTON", " DIV", " SUMMARY", "memory-text TEXTAREA"]
    assert [name for name in reached if name in expected][:5] == expected
    page.close()


def test_the_page_is_one_file_and_allows_nothing_else(served):
    answer = served.client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)=\"(?!data:,)|https?://|@import|url\(", answer.text)


def screenshots(folder):
    """The page after use, on a wide screen and a phone; JPEG files, small."""
    place, model = tempfile.mkdtemp(), llm2comp.load(GENERAL, "cpu")
    index = llm2comp.Index(place, GENERAL)
    index.lend(GENERAL, model)
    index.add(folder.parent / "search.md")
    settings = {"index": index, "lens": True, "deadline_seconds": 900.0}
    with serving(model, GENERAL, **settings) as served, chromium() as browser:
        for size, scheme in (("desktop", "light"), ("phone", "dark")):
            page = open_page(browser, served, size, scheme)
            page.locator("#search-text").fill("how are words and meaning fused?")
            page.locator("#search-k").fill("2")
            for name, what in (("search", "li"), ("compare", "table"), ("memory", "table")):
                page.locator(f"#{name} button").click()
                page.locator(f"#{name} {what}").first.wait_for(timeout=900_000)
            file = folder / f"serve-{size}-{scheme}.jpg"
            page.screenshot(path=file, full_page=True, type="jpeg", quality=60)
            yield file
            page.close()
    shutil.rmtree(place)


if __name__ == "__main__":
    for file in screenshots(Path(sys.argv[1])):
        sys.stdout.write(f"{file}\n")
