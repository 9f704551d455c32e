"""A real browser for tests of the page: Debian's chromium, driven by selenium, with nothing of the user's."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Set by .ci/run: there a test that finds no browser fails.
REQUIRED = os.environ.get("FLEXGEN_BENCH_BROWSER") == "required"
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
_PATIENCE_S = 20


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Skips the test where there is no chromium, unless one is required."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        what = "chromium and chromium-driver are not installed: apt-get install chromium chromium-driver"
        if REQUIRED:
            pytest.fail(what)
        pytest.skip(what)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    try:
        driver.set_script_timeout(_PATIENCE_S)
        driver.set_page_load_timeout(_PATIENCE_S)
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """A page in a browser, by what a reader does with it."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def open(self, address: str, view: str) -> None:
        """Load an address anew and wait for a view of the page."""
        self._driver.get("about:blank")
        self._driver.get_log("browser")
        self._driver.get(address)
        self.wait_for(view)

    def leave(self) -> None:
        """Go away from the page, so that it asks its server no more."""
        self._driver.get("about:blank")

    def wait_for(self, view: str) -> None:
        self.until(lambda: self.run("return document.body && document.body.dataset.shown") == view)

    def until(self, holds: Callable[[], Any]) -> Any:
        """What ``holds`` returns once it is true. Fails after a while."""
        end = time.monotonic() + _PATIENCE_S
        while not (found := holds()):
            assert time.monotonic() < end, self.text()
            time.sleep(0.02)
        return found

    def run(self, script: str, *arguments: Any) -> Any:
        return self._driver.execute_script(script, *arguments)

    def find(self, css: str) -> Any:
        return self._driver.find_element("css selector", css)

    def texts(self, css: str) -> list[str]:
        """The text of every element that fits, as it stands in the document."""
        return list(self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", css))

    def text(self) -> str:
        return str(self.run("return document.body ? document.body.innerText : ''"))

    def press(self, *keys: str) -> None:
        """Keys by their names of ``selenium.webdriver.Keys``, or text, to whatever has the focus."""
        from selenium.webdriver import ActionChains, Keys

        chain = ActionChains(self._driver)
        for key in keys:
            chain = chain.send_keys(getattr(Keys, key, key))
        chain.perform()

    def focused(self) -> str:
        """The text of what has the focus."""
        return str(
            self.run("const e = document.activeElement; return e.textContent || e.getAttribute('aria-label') || e.id")
        )

    def tab_to(self, text: str, most: int = 80) -> None:
        """Press Tab until what has the focus says ``text``; each thing on the way must show that it has it."""
        for _ in range(most):
            self.press("TAB")
            shown = self.run("const s = getComputedStyle(document.activeElement); return s.outlineStyle")
            assert shown != "none", f"nothing shows that {self.focused()!r} has the focus"
            if text in self.focused():
                return
        raise AssertionError(f"Tab never came to {text!r}")

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def dark(self, wanted: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if wanted else "light"}]
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def complaints(self) -> list[str]:
        """What the browser's console says since the page was opened."""
        return [entry["message"] for entry in self._driver.get_log("browser")]
