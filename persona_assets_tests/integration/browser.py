"""A headless Chromium that waits for what it is told to find: pages, used as people use them.

Debian's chromium and chromium-driver, by path: nothing is downloaded.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")

#: No sandbox, since CI is root; and nothing that would look for a network.
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--window-size=1600,1000", "--hide-scrollbars"),
)
#: What a page does while it renders again; looked at once more.
_PASSING = (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)


class Browser:
    """One window with a profile of its own; ``shots`` is where pictures of it go."""

    def __init__(self, profile: Path, shots: Path, *flags: str):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*_FLAGS, f"--user-data-dir={profile}", *flags):
            options.add_argument(flag)
        self.driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
        self.shots = shots
        shots.mkdir(parents=True, exist_ok=True)

    def quit(self) -> None:
        self.driver.quit()

    def open(self, url: str) -> None:
        self.driver.get(url)

    def until(self, condition, what: str, seconds: float = 30):
        """What ``condition`` returns, as soon as it is true.

        Raises:
            TimeoutException: it never was; names ``what``.
        """
        wait = WebDriverWait(self.driver, seconds, 0.2, ignored_exceptions=_PASSING)
        return wait.until(lambda _: condition(), f"{what}, at {self.driver.current_url}")

    def see(self, xpath: str, seconds: float = 30) -> WebElement:
        """The first visible element of that XPath."""

        def visible() -> WebElement | None:
            found = self.driver.find_elements(By.XPATH, xpath)
            return next((element for element in found if element.is_displayed()), None)

        return self.until(visible, f"no {xpath}", seconds)

    def click(self, xpath: str, seconds: float = 30) -> None:
        """Click it as soon as it can be clicked."""

        def clicked() -> bool:
            self.see(xpath, seconds).click()
            return True

        self.until(clicked, f"cannot click {xpath}", seconds)

    def text(self) -> str:
        """All text of the page that can be seen."""
        return self.driver.find_element(By.TAG_NAME, "body").text

    def shot(self, name: str) -> Path:
        """A picture of the window."""
        path = self.shots / f"{name}.png"
        self.driver.save_screenshot(str(path))
        return path


def text(words: str, tag: str = "*") -> str:
    """XPath of the innermost element whose text is ``words``."""
    is_text = f"normalize-space(.)={_quoted(words)}"
    return f"//{tag}[{is_text} and not(*[{is_text}])]"


def _quoted(words: str) -> str:
    assert '"' not in words
    return f'"{words}"'
