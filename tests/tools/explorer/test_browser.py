"""The page in Chromium: controls work, no request leaves this machine, and a reader may leave at any time.

`make test-browser`; with SCREENSHOTS=DIR it also keeps pictures of the page there.
"""

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import train
from tests.tools.explorer.test_page import get, serving

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("tiny")]
PICTURES = "[data-testid=stImage] img:visible"
BUSY = "[data-testid=stStatusWidget], [data-stale=true]"


@pytest.fixture(scope="module")
def chromium():
    api, path = pytest.importorskip("playwright.sync_api"), shutil.which("chromium")
    if path is None:
        pytest.skip("there is no Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A folder with two runs, or EXPLORER_OUTPUT."""
    if given := os.environ.get("EXPLORER_OUTPUT"):
        return Path(given)
    root = tmp_path_factory.mktemp("output")
    model = {"model": "JiT-Demo/8", "img_size": 32, "num_sampling_steps": 10, "eval_freq": 1}
    train(root / "forcing", **model)
    train(root / "plain", disable_dct_patchify=True, **model)
    return root


@pytest.fixture
def page(chromium, output):
    """The page of a server; at the end nothing was asked of other machines, and there were no errors."""
    with serving(output) as port:
        page, address, seen = chromium.new_page(viewport={"width": 1366, "height": 900}), f"http://127.0.0.1:{port}", []
        page.on("request", lambda r: seen.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
        page.on("websocket", lambda s: seen.append(s.url) if f"//127.0.0.1:{port}/" not in s.url else None)
        page.on("console", lambda message: seen.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.port = port
        page.goto(address)
        yield page
        assert seen == []
        page.close()
        assert get(port, "/_stcore/health")[0] == 200


def settled(page):
    """Wait until the page is complete, and return the addresses of its pictures."""
    page.wait_for_timeout(800)
    page.wait_for_function(f"!document.querySelector('{BUSY}')", timeout=120_000)
    page.wait_for_timeout(300)
    assert page.locator("[data-testid=stException]").count() == 0
    return [picture.get_attribute("src") for picture in page.locator(PICTURES).all()]


def keep(page, name):
    """Keep a picture of the whole page if SCREENSHOTS names a folder."""
    if folder := os.environ.get("SCREENSHOTS"):
        height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
        page.set_viewport_size({"width": 1366, "height": height})
        page.wait_for_timeout(500)
        page.screenshot(path=f"{folder}/{name}.png")
        page.set_viewport_size({"width": 1366, "height": 900})


def test_frequency_and_time(page, tmp_path):
    page.get_by_text("Frequency and time").wait_for(timeout=60_000)
    page.locator(PICTURES).nth(1).wait_for(timeout=60_000)
    before = settled(page)
    keep(page, "plane")
    slider = page.get_by_role("slider", name="c_min")
    for _ in range(10):
        slider.press("ArrowRight")
    assert slider.input_value() == "0.15"
    moved = settled(page)
    assert len(before) == len(moved) == 2 and not set(before) & set(moved)
    page.get_by_text("budget", exact=True).click()
    budget = settled(page)
    assert not set(budget) & set(moved)
    (tmp_path / "broken.png").write_text("no picture")
    page.locator("input[type=file]").set_input_files(tmp_path / "broken.png")
    page.get_by_text("The file cannot be used").wait_for(timeout=30_000)
    keep(page, "broken")


def test_two_networks(page):
    page.get_by_role("tab", name="A network").click()
    page.get_by_role("button", name="Sample").wait_for(timeout=60_000)
    page.get_by_role("button", name="Sample").click()
    page.locator(PICTURES).nth(0).wait_for(timeout=60_000)
    assert len(settled(page)) == 1
    keep(page, "network")
    page.get_by_text("Compare two").click()
    page.get_by_role("combobox", name="Network").nth(1).wait_for(timeout=30_000)
    settled(page)
    page.get_by_role("button", name="Sample").click()
    page.get_by_text("The images differ by").wait_for(timeout=120_000)
    pictures = settled(page)
    assert len(pictures) == 2 and len(set(pictures)) == 2
    keep(page, "compare")
    steps = page.get_by_role("spinbutton", name="Steps").first
    steps.fill("1000")
    steps.press("Enter")
    settled(page)
    page.get_by_role("button", name="Sample").click()
    page.get_by_text("Sampling with").wait_for(timeout=30_000)
    page.goto("about:blank")  # in the middle of the computation
    page.goto(f"http://127.0.0.1:{page.port}")
    page.get_by_role("tab", name="A network").click()
    page.get_by_role("button", name="Sample").wait_for(timeout=60_000)
    page.get_by_role("button", name="Sample").click()  # which waits for the lock if the other one still goes on
    page.locator(PICTURES).nth(0).wait_for(timeout=60_000)


def test_runs(page, output):
    page.get_by_role("tab", name="Runs").click()
    page.get_by_text("Samples over epochs").wait_for(timeout=60_000)
    pictures = settled(page)
    assert len(pictures) == 3  # curves, and the newest samples of two runs
    keep(page, "runs")
    slider = page.get_by_role("tabpanel", name="Runs").get_by_role("slider").first
    slider.press("ArrowLeft")
    assert len(set(settled(page)) - set(pictures)) == 1
