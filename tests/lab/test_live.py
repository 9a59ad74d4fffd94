"""The page of a run that is being trained, in a real browser."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from lab.conftest import quiet_page

from mingpt.experiments import pipeline
from mingpt.experiments.presets import get_default_config
from mingpt.lab import LabServer
from mingpt.tasks import Add1
from mingpt.training.metrics import MetricsLogger


def wait_for_points(page, *numbers):
    """Until the page's curves have so many points."""
    page.wait_for_function(
        """(expected) => {
            const paths = [...document.querySelectorAll(".chart path.line")];
            return paths.map((path) => path.getAttribute("d").match(/[ML]/g).length).join() === expected;
        }""",
        arg=",".join(map(str, numbers)),
        timeout=20_000,
    )


def test_curves_grow_in_the_page_while_a_run_is_trained(browser, tmp_path, monkeypatch):
    """A real training, which waits at iteration 20 until the page has seen that far. Nothing is loaded again."""
    config = get_default_config("smoke")
    config.trainer.log_every = config.prefix.validate_every = 1
    seen = threading.Event()
    log_step = MetricsLogger.log_step

    def log_and_wait(self, iter_num, *args):
        log_step(self, iter_num, *args)
        assert iter_num != 20 or seen.wait(60)

    monkeypatch.setattr(MetricsLogger, "log_step", log_and_wait)
    (tmp_path / "run").mkdir()
    with LabServer(tmp_path / "run") as server, ThreadPoolExecutor() as threads:
        threads.submit(server.serve_forever)
        try:
            with quiet_page(browser) as (page, requests):
                page.goto(server.url)
                page.get_by_text("There is no log of the pretraining.").wait_for()
                training = threads.submit(pipeline.pretrain, config, tmp_path / "run")
                wait_for_points(page, 20)
                assert not training.done()
                seen.set()
                wait_for_points(page, 30)
                model, _ = training.result()
                pipeline.train_prefixes(config, model, [Add1()], tmp_path / "run", "prefixes", "key_value")
                wait_for_points(page, 30, 10)
                page.close()
                assert requests[0] == server.url
                assert set(requests[1:]) == {f"{server.url}curves.json"}
        finally:
            seen.set()
            server.shutdown()


def test_a_browser_without_the_token_gets_no_page(browser, tmp_path):
    with LabServer(tmp_path) as server, ThreadPoolExecutor() as threads:
        threads.submit(server.serve_forever)
        try:
            page = browser.new_page()
            for url, status in {
                server.url: 200,
                server.url.replace(server.token, "x" * len(server.token)): 404,
                server.url.replace(server.token + "/", ""): 404,
                server.url.replace("127.0.0.1", "localhost"): 403,
            }.items():
                assert page.goto(url).status == status
                assert (page.locator("#lab").count() == 1) == (status == 200)
                assert server.token not in page.content()
            page.close()
        finally:
            server.shutdown()
