"""How long the laptop run's lab page takes in a browser: until its first view, for a token, for a slider's step.

python benchmarks/bench_lab.py         needs chromium and the extra ``dev``; one thread computes, as in any page
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from mingpt.lab import write_report

LAPTOP = Path(__file__).parent.parent / "checkpoints" / "laptop"
N_REPEATS = 20

TOKEN = """(n) => {
    const { lab } = document.getElementById("lab");
    const { row, prefix } = lab.chosen;
    lab.answer([row], prefix);
    return Array.from({ length: n }, () => {
        const start = performance.now();
        lab.answer([row], prefix);
        return (performance.now() - start) / lab.data.length;
    });
}"""

SLIDER = """async (n) => {
    const slider = document.querySelector("input[type=range]");
    const counted = [...document.querySelectorAll("[data-is-done]")].at(0);
    const times = [];
    for (let k = 0; k < n; k++) {
        const start = performance.now();
        const shown = new Promise((resolve) => {
            const observer = new MutationObserver(() => { observer.disconnect(); resolve(); });
            observer.observe(counted, { childList: true });
        });
        slider.value = k / n;
        slider.dispatchEvent(new Event("input"));
        await shown;
        times.push(performance.now() - start);
    }
    return times;
}"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "lab.html"
        write_report(LAPTOP, path)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(reduced_motion="reduce")
        start = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_selector("[data-is-ready]")
        print(f"page {path.stat().st_size / 1e6:.1f} MB, first view after {time.perf_counter() - start:.2f} s")
        times = page.evaluate(TOKEN, N_REPEATS)
        print(f"a token: median {statistics.median(times):.1f} ms, worst {max(times):.1f} ms")
        page.get_by_role("tab", name="Mix").click()
        page.wait_for_selector("[data-is-done=true]")
        times = page.evaluate(SLIDER, N_REPEATS)
        text = f"median {statistics.median(times):.0f} ms, worst {max(times):.0f} ms"
        print(f"a slider's step, until the answer and the accuracy on the first rows: {text}")
        start = time.perf_counter()
        page.wait_for_selector("[data-is-done=true]")
        print(f"the accuracy on all 200 rows: {1000 * (time.perf_counter() - start):.0f} ms more")
        browser.close()


if __name__ == "__main__":
    main()
