"""A headless Chromium that waits for what it is told to find: pages, used as people use them.

Debian's chromium and chromium-driver, by path: nothing is downloaded.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
    TimeoutException,
)
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")

#: Without a sandbox, since CI is root; and without what would look for a network.
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--window-size=1440,1000"),
)
#: What happens while a page renders again; it is looked at once more.
_PASSING = (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
#: Seconds between looks at a page: each costs some of the processor that draws it.
_POLL = 0.5
_T = TypeVar("_T")


class Browser:
    """One window with a profile of its own; pictures of it go to ``shots``."""

    def __init__(self, profile: Path, shots: Path, *flags: str):
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*_FLAGS, f"--user-data-dir={profile}", *flags):
            options.add_argument(flag)
        self.driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
        self.shots = shots
        shots.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        """Where it is."""
        return self.driver.current_url

    def open(self, url: str) -> None:
        """Go to ``url``."""
        self.driver.get(url)

    def text(self) -> str:
        """All text of the page that can be seen."""
        return self.driver.execute_script("return document.body.innerText")

    def until(self, condition: Callable[[], _T], what: str, seconds: float = 120) -> _T:
        """What ``condition`` returns, as soon as it is true.

        Raises:
            TimeoutException: it never was; names ``what`` and shows the page's text, which is
                kept beside a picture as ``failed``.
        """
        wait = WebDriverWait(self.driver, seconds, _POLL, ignored_exceptions=_PASSING)
        try:
            return wait.until(lambda _: condition())
        except TimeoutException:
            seen = self.text()
            (self.shots / "failed.txt").write_text(f"{self.url}\n{seen}", "utf-8")
            self.shot("failed")
            raise TimeoutException(
                f"not in {seconds} s: {what}; at {self.url}, which shows:\n{seen[:3000]}"
            ) from None

    def see(self, xpath: str, seconds: float = 120) -> WebElement:
        """The first element of that XPath that can be seen."""
        return self.until(lambda: self._visible(xpath), f"there is {xpath}", seconds)

    def click(self, xpath: str, shows: str = "", seconds: float = 120) -> None:
        """Click the first element of that XPath as soon as it can be clicked.

        Args:
            shows: An XPath that the click brings to view. A page that is still being drawn loses
                clicks: it is clicked again every ten seconds until that is there.
        """

        def clicked() -> bool:
            element = self._visible(xpath)
            if element is not None and element.is_enabled():
                element.click()
                return True
            return False

        def shown() -> bool:
            nonlocal last
            if self._visible(shows) is not None:
                return True
            if time.monotonic() - last > 10:
                last = time.monotonic()
                clicked()
            return False

        self.until(clicked, f"{xpath} can be clicked", seconds)
        last = time.monotonic()
        if shows:
            self.until(shown, f"{xpath} shows {shows}", seconds)

    def write(self, xpath: str, text: str) -> None:
        """Write into the first field of that XPath that can be seen."""

        def written() -> bool:
            field = self._visible(xpath)
            if field is None:
                return False
            field.send_keys(text)
            return True

        self.until(written, f"{text!r} can be written into {xpath}")

    def press(self, key: str) -> None:
        """Press a key where the cursor is."""
        self.driver.switch_to.active_element.send_keys(key)

    def says(self, text: str, seconds: float = 120, *, reloads: bool = False) -> None:
        """Wait until the page shows ``text``.

        Args:
            reloads: Load the page again every ten seconds: what it was drawn too early for, it
                may never show by itself.
        """
        last = time.monotonic()

        def said() -> bool:
            nonlocal last
            if reloads and time.monotonic() - last > 10:
                self.driver.refresh()
                last = time.monotonic()
            return text in self.text()

        self.until(said, f"the page says {text!r}", seconds)

    def all_texts(self, xpath: str) -> list[str]:
        """The text of every element of that XPath, of which there is one at least."""

        def found() -> list[str]:
            return [element.text for element in self.driver.find_elements(By.XPATH, xpath)]

        return self.until(found, f"there is {xpath}")

    def shot(self, name: str) -> None:
        """Keep a picture of the window."""
        self.driver.save_screenshot(str(self.shots / f"{name}.png"))

    def quit(self) -> None:
        """Close it."""
        self.driver.quit()

    def _visible(self, xpath: str) -> WebElement | None:
        found = self.driver.find_elements(By.XPATH, xpath)
        return next((element for element in found if element.is_displayed()), None)
