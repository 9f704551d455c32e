"""The page in a real browser, as a reader uses it: from disk and served, with a mouse, a keyboard and a phone."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexgen_bench.page.build import PageBuilder
from flexgen_bench.page.gather import Gatherer
from flexgen_bench.page.live import open_server
from flexgen_bench.store.running import RunningCell, RunningSuite, write_running
from flexgen_bench.store.writer import write_record
from tests.support.browser import Browser, open_browser
from tests.support.page_records import HOSTILE, break_files, write_results
from tests.support.record_factory import make_record


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("page")
    write_results(base / "results")
    break_files(base / "results", how_many=30)
    PageBuilder(Gatherer([base / "results"]), base / "page", lambda _: None, tables=("t2",)).build()
    return base


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """At a desk's width, and nothing may have been complained about nor run out of a record in the end."""
    chromium.size(1300, 900)
    chromium.dark(False)
    yield chromium
    assert chromium.run("return window.hurt === undefined")
    assert chromium.complaints() == []


@pytest.fixture(scope="module")
def on_disk(folder: Path) -> str:
    return (folder / "page" / "index.html").as_uri()


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[str]:
    builder = PageBuilder(Gatherer([folder / "results"]), folder / "page", lambda _: None)
    with open_server(builder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join(10)


@pytest.fixture(params=["on_disk", "served"])
def address(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


# The least contrast of a text and what it stands on, as WCAG 2 defines it.
CONTRAST = """
const channel = v => (v /= 255, v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(channel);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = e => {
    for (; e; e = e.parentElement) {
        const colour = getComputedStyle(e).backgroundColor;
        if (!/, 0\\)$/.test(colour)) return colour;
    }
};
const texts = [...document.querySelectorAll("main :is(p, dt, dd, small, th, td, a), .badge, nav a")];
return Math.min(...texts.filter(e => e.textContent && e.offsetWidth).map(e => {
    const [a, b] = [getComputedStyle(e).color, ground(e)].map(light).sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
}));
"""


def choose(browser: Browser, value: str) -> None:
    """Tick a value among the filters."""
    labels = "[...document.querySelectorAll('.facet label')]"
    label = f"{labels}.find(l => l.querySelector('.value').textContent === arguments[0])"
    browser.run(f"{label}.querySelector('input').click()", value)


def test_filter_sort_and_address(browser: Browser, address: str) -> None:
    browser.open(address, "records")
    assert browser.texts("h2") == ["7 runs"]
    choose(browser, "flexgen")
    choose(browser, "exact")
    assert browser.texts("h2") == ["3 runs of 7"]
    browser.run("[...document.querySelectorAll('.sort')].find(b => b.textContent.startsWith('Generation')).click()")
    speeds = [float(text) for text in browser.texts("td b")]
    assert speeds == sorted(speeds, reverse=True)
    assert browser.run("return document.querySelector('th[aria-sort=descending]').textContent").startswith("Generation")
    link = browser.run("return location.href")
    browser.open(link, "records")
    assert browser.texts("h2") == ["3 runs of 7"], "a view can be linked"
    browser.run("history.back()")


def test_search_finds_words_in_any_column(browser: Browser, on_disk: str) -> None:
    browser.open(on_disk, "records")
    browser.run("document.getElementById('search').focus()")
    browser.press("flexgen 4-bit")
    browser.until(lambda: browser.texts("h2") == ["1 run of 7"])
    browser.run("document.getElementById('search').select()")
    browser.press("nobody")
    browser.until(lambda: "No run has all of these values" in browser.text())


def test_a_cell_answers_the_four_questions(browser: Browser, address: str) -> None:
    browser.open(f"{address}#cell?run=run2", "cell")
    answers = browser.texts(".answers dd")
    assert browser.texts(".answers dt") == ["Which system", "Which policy", "How sure", "Why"]
    assert answers[0].startswith("flexgen: 3.00 tok/s")
    assert "weights cpu 25 %, disk 75 %" in answers[1]
    assert "chosen by the engine's search" in answers[1]
    assert "2.67 to 4.00 tok/s (range, 3 repetitions" in answers[2]
    assert "Predicted 3.90 tok/s (SIMULATED)" in answers[2]
    assert "cpu 81%" in answers[3]
    assert "reads go through the page cache" in browser.text()
    assert "python -m flexgen_bench system=flexgen" in browser.text()
    browser.until(lambda: len(browser.texts(".lanes canvas")) == 3)
    assert "cpu 81 % busy" in browser.run("return document.querySelector('.lanes canvas').getAttribute('aria-label')")


def test_two_runs_side_by_side(browser: Browser, address: str) -> None:
    browser.open(address, "records")
    boxes = "[...document.querySelectorAll('.pick input')]"
    for run in ("run2", "run3"):
        browser.run(f"{boxes}.find(b => b.dataset.focus === arguments[0]).click()", f"pick {run}")
    browser.find("#basket a").click()
    browser.wait_for("compare")
    assert "B generates 0.52 times as fast as A; their intervals do not meet" in browser.text()
    rows = browser.run(
        "return [...document.querySelectorAll('.compared tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert all(row[1] != row[2] and row[4] == "≠ differs" for row in rows), "only what differs, and marked with a sign"
    assert ["system", "flexgen", "accelerate", "", "≠ differs"] in rows
    browser.run("document.querySelector('[data-focus=only]').click()")
    browser.wait_for("compare")
    browser.until(lambda: any(text.startswith("dtype") for text in browser.texts(".compared tbody tr")))


def test_pictures_are_drawn_and_told_in_words(browser: Browser, address: str) -> None:
    browser.open(f"{address}#pictures", "pictures")
    label = browser.run("return document.querySelector('.chart canvas').getAttribute('aria-label')")
    assert "Throughput against the time of a batch" in label
    assert "Highest: flexgen (4-bit weights)" in label
    inked = browser.until(
        lambda: browser.run(
            "const c = document.querySelector('.chart canvas'); if (!c.width) return 0;"
            "return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter(v => v).length"
        )
    )
    assert inked > 1000
    browser.run("document.querySelector('.chart canvas').focus()")
    browser.press("ARROW_RIGHT")
    assert "tokens/s" in browser.texts(".told")[0]
    browser.press("ENTER")
    browser.wait_for("cell")


def test_keyboard_alone(browser: Browser, on_disk: str) -> None:
    browser.open(on_disk, "records")
    browser.tab_to("Pictures")
    browser.run("document.querySelector('.scroll').focus()")
    browser.press("ARROW_DOWN")
    first = browser.focused()
    browser.press("ARROW_DOWN")
    assert browser.focused() != ""
    browser.press("ARROW_UP")
    assert browser.focused() == first
    browser.press("ENTER")
    browser.wait_for("cell")
    assert browser.run("return document.activeElement.id") == "main", "a new view has the focus"
    browser.tab_to("Compare with another run")
    browser.press("ENTER")
    browser.tab_to("Choose one more")
    browser.press("ENTER")
    browser.wait_for("compare")
    roles = browser.run("return [...document.querySelectorAll('[onclick]')].length")
    assert roles == 0, "only links, buttons and fields are clicked"


VIEWS = ("records", "cell?run=run2", "pictures", "compare?a=run2&b=run3", "papers", "accuracy")


@pytest.mark.parametrize("view", VIEWS)
def test_a_phone_shows_everything_without_scrolling_sideways(browser: Browser, on_disk: str, view: str) -> None:
    browser.size(360, 740)
    browser.open(f"{on_disk}#{view}", view.partition("?")[0])
    wide = browser.run("return document.documentElement.scrollWidth")
    assert wide <= 360, view


def test_hostile_records_are_shown_and_do_not_run(browser: Browser, address: str) -> None:
    browser.open(f"{address}#records?q=script", "records")
    assert browser.texts("h2") == ["1 run of 7"]
    assert HOSTILE in browser.texts("td")
    browser.open(f"{address}#cell?run=run7", "cell")
    assert HOSTILE in browser.texts("code")
    assert browser.run("return document.querySelectorAll('main script, main img').length") == 0
    browser.open(f"{address}#records?f.model=%3Cscript%3E&q=%3Cimg&picture=%22%3E&at=x", "records")
    assert "No run has all of these values" in browser.text()


def test_broken_files_are_counted_everywhere_and_listed(browser: Browser, address: str) -> None:
    browser.open(f"{address}#broken", "broken")
    assert "Unusable files 120" in browser.texts("#views a")
    assert browser.texts("h2") == ["120 files that cannot be used"]
    assert "schema version 99" in browser.text()
    browser.run("document.querySelectorAll('.pager button')[3].click()")
    browser.until(lambda: len(browser.texts(".broken tbody tr")) == 20)


def test_a_running_suite_is_shown_and_its_records_appear(browser: Browser, tmp_path: Path) -> None:
    results = tmp_path / "results"
    write_record(make_record("flexgen"), results)
    cells = (
        RunningCell("ok", "flexgen tiny", 60, 55, "run0"),
        RunningCell("failed", "deepspeed tiny", 30, 2, reason="it broke"),
        RunningCell("running", "accelerate tiny", 30),
        RunningCell(expected_s=20),
    )
    suite = RunningSuite(
        os.getpid(), "default", "2026-01-01T00:00:00", cells, "running", "repetition 1 of 3", "decode", 40
    )
    write_running(suite, results)
    builder = PageBuilder(Gatherer([results]), tmp_path / "page", lambda _: None, tables=())
    builder.build()
    with open_server(builder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        browser.open(f"http://127.0.0.1:{server.server_address[1]}/#live", "live")
        browser.until(lambda: "default: 2 of 4 done, 1 failed" in browser.text())
        for words in ("about 40.0 s left", "repetition 1 of 3", "it broke", "3.00", "(not begun)"):
            assert words in browser.text()
        browser.run("document.querySelector('#live a').focus()")
        write_record(make_record("accelerate", run=1), results)
        browser.until(lambda: browser.run("page.follow()") or "2 records of" in browser.text())
        assert browser.run("return document.activeElement.dataset.focus") == "live run0", "drawing anew keeps the focus"
        browser.leave()
        server.shutdown()
        thread.join(10)


def test_dark_and_light_can_be_read(browser: Browser, on_disk: str) -> None:
    """Text against its background: at least 4.5 to 1 (WCAG AA)."""
    for dark in (False, True):
        browser.dark(dark)
        for view in ("records", "cell?run=run2"):
            browser.open(f"{on_disk}#{view}", view.partition("?")[0])
            assert browser.run(CONTRAST) >= 4.5, (dark, view)
