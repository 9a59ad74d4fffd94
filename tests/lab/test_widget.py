"""The widget in a browser, as a notebook shows it but without one."""

from __future__ import annotations

import base64

import pytest
import torch
from lab.conftest import LAPTOP, quiet_page

from mingpt.datasets import CustomDataset
from mingpt.experiments.pipeline import load_run
from mingpt.lab.widget import Lab
from mingpt.tasks import SortDescending

SHOW = """async ({ tensors, _esm, _css, ...state }) => {
    document.head.append(Object.assign(document.createElement("style"), { textContent: _css }));
    const bytes = Uint8Array.from(atob(tensors), (character) => character.charCodeAt(0));
    const message = new Uint8Array(bytes.length + 3); // a notebook's view starts anywhere in a message
    message.set(bytes, 3);
    state.tensors = new DataView(message.buffer, 3);
    const model = {
        get: (name) => state[name],
        set: (name, value) => (state[name] = value),
        on() {}, off() {}, save_changes() {},
    };
    const url = URL.createObjectURL(new Blob([_esm], { type: "text/javascript" }));
    const { default: widget } = await import(url);
    const el = document.createElement("div");
    document.body.append(el);
    await widget.render({ model, el });
}"""


@pytest.fixture(scope="module")
def run():
    return load_run(LAPTOP, "cpu")


@pytest.fixture(scope="module")
def state(run):
    """What the browser gets of the widget."""
    model, prefixes, description = run
    some = {name: prefixes[name] for name in ("SortAscending", "SortDescending", "Divisible")}
    state = Lab(model, some, description["data"], n_rows=5).get_state(["header", "tensors", "_esm", "_css"])
    return state | {"tensors": base64.b64encode(state["tensors"]).decode()}


def test_the_widget_answers_as_torch_does(browser, run, state):
    """Its six views appear, it asks no network for anything, and Ask gives the tokens of the model's generate."""
    model, prefixes, description = run
    data = CustomDataset.from_description(description["data"], split="test", tasks=[SortDescending()])
    rows = torch.from_numpy(data.rows(range(100, 103))[0])
    idx = torch.cat([torch.zeros(len(rows), data.prefix_padding, dtype=torch.int64), rows], dim=1)
    with quiet_page(browser) as (page, requests):
        page.evaluate(SHOW, state)
        tabs = page.get_by_role("tab")
        assert tabs.all_inner_texts() == ["Ask", "Mix", "Look", "Matrix", "Curves", "About"]
        for tab in tabs.all():
            tab.click()
            assert page.get_by_role("tabpanel").locator("section").count() == 1
        tabs.first.click()
        view = page.get_by_role("tabpanel")
        cells = view.get_by_role("group", name="the answer, token by token").get_by_role("button")
        for name in (None, "SortDescending", "Divisible"):
            view.get_by_label("Prefix", exact=True).select_option(name or "no prefix")
            prefix = name and prefixes[name]
            expected = model.generate(idx, data.length, prefixes=prefix)[:, -data.length :]
            for row, answer in zip(rows.tolist(), expected.tolist(), strict=True):
                for number, value in enumerate(row, start=1):
                    view.get_by_label(f"number {number} of the row", exact=True).fill(str(value))
                    view.get_by_label(f"number {number} of the row", exact=True).blur()
                assert [int(text.split()[0]) for text in cells.all_inner_texts()] == answer, (name, row)
        assert [url for url in requests if not url.startswith("blob:")] == []


def test_two_widgets_of_a_notebook_do_not_mix(browser, state):
    """A choice in one leaves the other as it is, and no two elements have the same id."""
    with quiet_page(browser) as (page, _):
        for _ in range(2):
            page.evaluate(SHOW, state)
        for tab in page.get_by_role("tab", name="Look").all():
            tab.click()
        page.get_by_label("the difference").first.check()
        assert page.get_by_role("radio", checked=True).count() == 2
        ids = page.locator("[id]").evaluate_all("(all) => all.map((each) => each.id)")
        assert len(ids) == len(set(ids)) > 12
