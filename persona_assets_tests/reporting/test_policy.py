"""The pages' Content-Security-Policy: what it says, and what a browser makes of a page under it."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest

from persona_assets.reporting.policy import guarded
from persona_assets_tests.integration.browser import CHROMEDRIVER, CHROMIUM, Browser

_META = re.compile(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">')


def policy_of(html: str) -> str:
    """The page's policy, which stands before its style sheet and whatever else it governs."""
    (found,) = _META.finditer(html)
    assert found.start() < html.index("<title>") < html.index("<style>")
    return found[1]


def test_the_policy_allows_its_own_style_sheet_and_pictures_and_nothing_else(report):
    sheet = report.html.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    assert policy_of(report.html) == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


@pytest.mark.parametrize(
    "html",
    [
        "<style>a {}</style>",
        "<meta 'sha256-'><style>a {}</style><style>b {}</style>",
        "<meta 'sha256-'>",
    ],
)
def test_a_page_without_one_policy_and_one_sheet_is_none(html):
    with pytest.raises(ValueError, match="style sheets and"):
        guarded(html)


_INTO_THE_PAGE = """
<script>document.title = "run"</script><img src="x" onerror="document.title = 'run'">
<p id="styled" style="color: rgb(1, 2, 3)">x</p><style>#styled { color: rgb(1, 2, 3) }</style>
<img id="out" src="http://127.0.0.1:9/x.png"><iframe src="data:text/html,x"></iframe>
"""
_SEEN = """
const style = (e) => getComputedStyle(e);
const picture = document.querySelector("figure img");
const canvas = Object.assign(document.createElement("canvas"), {width: 400, height: 300});
const context = canvas.getContext("2d");
context.drawImage(picture, 0, 0, 400, 300);
const pixels = context.getImageData(0, 0, 400, 300).data;
const colours = new Set();
for (let i = 0; i < pixels.length; i += 4) colours.add(pixels.slice(i, i + 3).join());
const injected = document.getElementById("styled");
return {
  title: document.title,
  width: style(document.querySelector("main")).maxWidth,
  pictures: [...document.querySelectorAll("figure img")].map((e) => e.naturalWidth > 100),
  colours: colours.size,
  injected: injected && style(injected).color,
  text: document.querySelector("h1").innerText,
};
"""


@pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="no chromium and chromium-driver")
def test_a_browser_shows_the_page_and_runs_nothing_that_got_into_it(report, tmp_path):
    whole, broken = tmp_path / "whole.html", tmp_path / "broken.html"
    whole.write_text(report.html, "utf-8")
    broken.write_text(report.html.replace("<main>", f"<main>{_INTO_THE_PAGE}", 1), "utf-8")
    unguarded = tmp_path / "unguarded.html"
    unguarded.write_text(_META.sub("", broken.read_text("utf-8")), "utf-8")
    browser = Browser(tmp_path / "profile", tmp_path / "shots")
    try:
        seen = {}
        for path in (whole, broken, unguarded):
            browser.open(path.as_uri())
            seen[path.stem] = browser.driver.execute_script(_SEEN)
    finally:
        browser.quit()
    assert seen["whole"]["width"] == "1216px"  # the style sheet's 76rem
    assert seen["whole"]["pictures"] == [True] * 3
    assert seen["whole"]["colours"] > 20  # the figure's own styles, within its picture
    assert seen["whole"]["injected"] is None
    title = seen["whole"]["title"]
    assert (seen["broken"]["title"], seen["broken"]["injected"]) == (title, "rgb(27, 31, 36)")
    assert seen["broken"]["pictures"] == [True] * 3
    assert (seen["unguarded"]["title"], seen["unguarded"]["injected"]) == ("run", "rgb(1, 2, 3)")
