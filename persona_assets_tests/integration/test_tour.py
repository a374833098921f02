"""A tour of Dagster's interface in a real browser: from an empty home to a number of the report.

``PERSONA_ASSETS_SHOTS`` names a folder for the pictures.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from persona_assets.store import Ref
from persona_assets_tests.integration.browser import CHROMEDRIVER, CHROMIUM, Browser
from persona_assets_tests.integration.project import Project
from persona_assets_tests.integration.webserver import Webserver

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER),
    reason="needs Debian's packages chromium and chromium-driver on the PATH",
)

CHAIN = ("training_dataset", "checkpoint", "cell_outcomes", "cell_diagnostics")
TRAINED = "librarian.garbage_cot.42"
CARRIED = ("librarian.persona_cot.42", "comedian.persona_cot.42")
CONTRAST = "persona_cot-garbage_cot.source_loss"
NUMBER = "contrast/persona_cot-garbage_cot/persona_cot/source_loss/macro/question"


@pytest.fixture
def home(project, tmp_path) -> Project:
    """Nothing has ever run in this home; of the tiny study's store, what the tour makes is gone."""
    home = project.copy(tmp_path / "data")
    shutil.rmtree(home.data / "dagster")
    made = [Ref(asset, TRAINED) for asset in CHAIN]
    made += [Ref(asset, key) for key in CARRIED for asset in CHAIN[1:]]
    made += [Ref("contrast_estimate", CONTRAST), Ref("report")]
    for ref in made:
        (home.store.folder(ref) / "manifest.json").unlink()
    return home


@pytest.fixture
def webserver(home) -> Iterator[Webserver]:
    with Webserver(home) as server:
        yield server


@pytest.fixture
def browser(webserver, tmp_path) -> Iterator[Browser]:
    """A browser for which this webserver is at the port that `make ui` uses and reports link to."""
    shots = Path(os.environ.get("PERSONA_ASSETS_SHOTS") or tmp_path / "shots")
    here = f"--host-resolver-rules=MAP 127.0.0.1:3000 127.0.0.1:{webserver.port}"
    browser = Browser(tmp_path / "profile", shots, here)
    try:
        yield browser
    finally:
        browser.quit()


def test_from_an_empty_home_to_a_number_of_the_report(browser, home):
    browser.open("http://127.0.0.1:3000")
    materialize_a_cell(browser, home)
    look_at_the_cell(browser, home)
    run_the_carry_over_backfill(browser, home)
    follow_a_contrast_to_its_cells(browser, home)
    read_the_report(browser, home)
    assert set(home.states().values()) == {"fresh"}


def materialize_a_cell(browser: Browser, home: Project) -> None:
    """From the catalog by the asset to its job, one partition of it; waits until it succeeds."""
    browser.click(navigation("Catalog"))
    browser.says("Never materialized")
    browser.shot("1-catalog")
    browser.click(asset("checkpoint"))
    browser.says("One cell's LoRA adapter")
    browser.click("//a[.='cell' and contains(@href, '/jobs/cell')]")
    browser.click("//button[starts-with(., 'Materialize')]", button("Confirm"))
    browser.says("have not been materialized yet")  # in this home; the store has them
    browser.click(button("Confirm"))
    partitions = "//input[@placeholder='Filter partitions']"
    browser.click("//*[.='Select a partition or create one']", partitions)
    browser.write(partitions, TRAINED)
    browser.says("Select all (1)")
    browser.click(f"//li/*[contains(., {TRAINED!r})]")
    browser.press(Keys.ESCAPE)  # out of the list
    browser.says("1 partition")
    browser.shot("2-partition")
    browser.click(button("Launch 1 run"))
    browser.click("//a[starts-with(@href, '/runs/') and not(contains(@href, '?'))]")
    finished(browser)
    browser.says("Succeeded (4)")
    browser.shot("3-run")
    run_id = browser.url.rpartition("/")[2]
    for name in CHAIN:
        assert home.store.landed(Ref(name, TRAINED)).provenance.run_id == run_id, name


def look_at_the_cell(browser: Browser, home: Project) -> None:
    """The checkpoint's loss curve, and what the checks of its outcomes found."""
    browser.click(navigation("Catalog"))
    browser.click(asset("checkpoint"))
    browser.click(tab("Partitions"), f"//*[.={TRAINED!r}]")
    browser.click(f"//*[.={TRAINED!r}]")
    browser.says("Materialized (1)")
    browser.says(home.store.landed(Ref("checkpoint", TRAINED)).data_version)
    browser.shot("4-partition-page")
    browser.click(metadata("loss_curve"), PICTURE)
    shown(browser)
    browser.shot("5-loss-curve")
    browser.click(button("Close"))
    browser.click(tab("Overview"))
    browser.click(asset("cell_outcomes"))
    browser.click(tab("Checks"), "//*[.='coverage']")
    browser.click("//*[.='coverage']")
    browser.says("exactly the 1056 rows of the grid")
    browser.says(TRAINED)
    browser.shot("6-checks")
    audits = home.store.landed(Ref("cell_outcomes", TRAINED)).audits
    checks = browser.text()
    for audit in audits:
        assert f"{audit.name}\nSucceeded" in checks, audit.name
    assert f"Checks ({len(audits)})" in checks


def run_the_carry_over_backfill(browser: Browser, home: Project) -> None:
    """The job asks for the two carried-over cells that are missing; waits until they are there."""
    kept = home.store.landed(Ref("cell_outcomes", "librarian.generic_cot.42"))
    browser.click(navigation("Jobs"))
    browser.click("//a[contains(@href, '/jobs/carry_over_backfill')]")
    browser.says("for the 5 carried-over cells")
    browser.click(tab("Launchpad"), button("Launch Run"))
    browser.click(button("Launch Run"))
    finished(browser)
    asked_for = f"{DIALOG}//a[contains(@href, '/runs/b/')]"
    browser.click("//td[normalize-space(.)='backfill']/following-sibling::td//a", asked_for)
    browser.click(asked_for)
    browser.says("Status\nSucceeded", 400)
    for name in CHAIN:
        browser.says(f"{name}\n100% completed\n2\n0\n2\n0")
    browser.shot("7-backfill")
    for key in CARRIED:
        assert key in browser.text()
        assert home.store.landed(Ref("cell_outcomes", key))
    assert home.store.landed(kept.ref) == kept


def follow_a_contrast_to_its_cells(browser: Browser, home: Project) -> None:
    """The sensor has estimated the contrast by itself; its partition names exactly its cells."""
    made = browser.until(
        lambda: home.store.manifest(Ref("contrast_estimate", CONTRAST)), "the sensor makes it", 300
    )
    # Dagster hears of it a moment later, and the page of a partition does not wait for news.
    browser.open(page("contrast_estimate", CONTRAST))
    browser.says(made.data_version, reloads=True)
    browser.click(metadata("intervals"), PICTURE)
    shown(browser)
    browser.shot("8-contrast")
    browser.click(button("Close"))
    links = browser.all_texts("//a[contains(@href, '/cell_outcomes?')]")
    cells = home.study.contrast_cells(home.study.contrast(CONTRAST))
    assert sorted(links) == sorted(f"cell_outcomes[{cell.key}]" for cell in cells)
    browser.click(f"//a[.='cell_outcomes[{CARRIED[0]}]']")
    browser.says(home.store.landed(Ref("cell_outcomes", CARRIED[0])).data_version)
    browser.click(tab("Lineage"), "//*[normalize-space(.)='contrast_estimate']")
    browser.shot("9-lineage")


def read_the_report(browser: Browser, home: Project) -> None:
    """From the report in the interface to the file, a number in it, its ledger row, its cell."""
    made = browser.until(
        lambda: home.store.manifest(Ref("report")), "the sensor makes the report", 400
    )
    browser.click(navigation("Catalog"))
    browser.click(asset("report"))
    browser.says(made.provenance.run_id[:8], reloads=True)
    browser.click(metadata("report"), f"{DIALOG}//*[.='Provenance']")
    browser.shot("10-report-in-dagster")
    browser.open(home.store.path(Ref("report"), "report.html").as_uri())
    browser.says(home.study.title)
    browser.shot("11-report")
    browser.click(f"//a[@href='#n-{NUMBER}']")
    row = f"//*[@id='n-{NUMBER}']"
    browser.until(lambda: NUMBER in browser.see(row).text, "the ledger's row is shown")
    browser.shot("12-ledger")
    browser.click(f"{row}//a[.='cells']")
    cells = browser.url.rpartition("#")[2]
    browser.click(f"//*[@id='{cells}']//a[.='{CARRIED[1]}']")
    outcomes = home.store.landed(Ref("cell_outcomes", CARRIED[1]))
    browser.says(outcomes.data_version)
    assert browser.url == page("cell_outcomes", CARRIED[1])
    browser.shot("13-cell")


DIALOG = "//*[contains(@class, 'dialog')]"
PICTURE = "//*[contains(@class, 'overlay-enter-done')]//img"


def navigation(name: str) -> str:
    return f"//a[normalize-space(.)='{name}' and not(@role='tab')]"


def tab(name: str) -> str:
    return f"//*[@role='tab' and normalize-space(.)='{name}']"


def button(name: str) -> str:
    return f"//button[normalize-space(.)='{name}']"


def asset(name: str) -> str:
    return f"//a[contains(@href, '/assets/tiny/{name}') and not(contains(@href, '?'))]"


def metadata(name: str) -> str:
    """What opens the value of a metadata entry."""
    return f"//tr[td[normalize-space(.)='{name}']]//a[contains(., 'Show Markdown')]"


def page(name: str, partition: str) -> str:
    """A partition's page, as the report links to it."""
    return f"http://127.0.0.1:3000/assets/tiny/{name}?view=partitions&partition={partition}"


def finished(browser: Browser) -> None:
    """Wait until the run that is looked at has succeeded."""
    browser.until(lambda: "/runs/" in browser.url, "a run is shown")
    state = browser.until(
        lambda: next((s for s in ("Success", "Failure") if s in browser.text()), None),
        "the run ends",
        400,
    )
    assert state == "Success", browser.text()


def shown(browser: Browser) -> None:
    """Wait until the picture in the dialog, which fades in, is drawn."""
    browser.until(
        lambda: browser.see(PICTURE).get_property("naturalWidth") > 0, "the picture is drawn"
    )
