"""A browser, and the lab page of the stored run."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mingpt.lab import report

LAPTOP = Path(__file__).parents[2] / "checkpoints" / "laptop"


@pytest.fixture(scope="package")
def laptop_data():
    return report.run_data(LAPTOP, [LAPTOP.parents[1] / "studies" / "methods"])


@pytest.fixture(scope="package")
def laptop_page(laptop_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("lab") / "lab.html"
    path.write_text(report.page(laptop_data), encoding="utf-8")
    return path


@pytest.fixture(scope="package")
def browser():
    """Debian's chromium; a machine without one skips these tests, CI fails."""
    found = shutil.which("chromium")
    if found is None:
        reason = "no chromium on this machine: apt-get install chromium"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def quiet_page(browser, **options) -> Iterator[tuple[Any, list[str]]]:
    """An empty page, on whose console nothing may be said and in which nothing may go wrong; and the list of what it
    asks a network for."""
    context = browser.new_context(reduced_motion="reduce", **options)
    page, noise, requests = context.new_page(), [], []
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    yield page, requests
    assert noise == []
    context.close()


@contextlib.contextmanager
def opened(browser, path, **options) -> Iterator:
    """The page, on which nothing may be asked of a network, nothing said on the console, and nothing go wrong."""
    with quiet_page(browser, **options) as (page, requests):
        page.goto(path.as_uri())
        page.wait_for_selector("[data-is-ready]")
        yield page
        assert requests == [path.as_uri()]


def serious_faults(page) -> list[str]:
    """What axe-core finds that would stop someone, each in a line."""
    from axe_playwright_python.sync_playwright import Axe

    return [
        f"{each['id']}: {node['html'][:200]} {node['failureSummary'][:200]}"
        for each in Axe().run(page).response["violations"]
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


@pytest.fixture(scope="package")
def module(browser, laptop_data):
    """The page's modules in an empty page: ``module(source, argument)`` computes with everything that is in them.

    ``lab`` is the stored run's.
    """
    page = browser.new_page()
    header, blob = report.pack(laptop_data)
    source = base64.b64encode((report.script() + "\nexport const evaluate = (text) => eval(text);").encode()).decode()
    page.evaluate(
        """async ([source, header, blob]) => {
            globalThis.lab_module = await import("data:text/javascript;base64," + source);
            const [decode, kernels, Lab] = ["decodeBase64", "KERNELS", "Lab"].map(lab_module.evaluate);
            globalThis.lab = await Lab.load(header, decode(blob).buffer, decode(kernels));
        }""",
        [source, header, base64.b64encode(blob).decode()],
    )
    yield lambda function, argument=None: page.evaluate(
        "([source, argument]) => lab_module.evaluate(source)(argument)", [function, argument]
    )
    page.close()
