"""The lab page in a real browser: every view opened and used, on a wide and a narrow screen, in light and in dark."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
from lab.conftest import LAPTOP, opened, serious_faults

from mingpt.datasets import CustomDataset
from mingpt.evaluation import evaluate, predict
from mingpt.experiments.pipeline import load_run
from mingpt.lab import report
from mingpt.storage.weights import save_prefix
from mingpt.tasks import Task

VIEWS = ["Ask", "Mix", "Look", "Matrix", "Curves", "About"]


def open_view(page, name):
    page.get_by_role("tab", name=name).click()
    return page.get_by_role("tabpanel", name=name)


def use_ask(page):
    view = open_view(page, "Ask")
    view.get_by_label("number 1 of the row", exact=True).fill("9")
    view.get_by_label("number 1 of the row", exact=True).blur()
    view.get_by_role("group", name="the answer, token by token").get_by_role("button").nth(3).click()
    assert "position 4" in view.inner_text()


def use_mix(page):
    view = open_view(page, "Mix")
    view.get_by_role("button", name="Add a prefix").click()
    view.get_by_label("weight of Add1").fill("0.5")
    view.get_by_label("layer 2, position 3").uncheck()
    page.wait_for_selector("[data-is-done=true]")


def use_look(page):
    view = open_view(page, "Look")
    view.get_by_label("the difference").check()
    view.get_by_role("button", name="layer 2, head 3").click()
    view.get_by_role("img", name=re.compile("attention of layer 2, head 3")).hover(position={"x": 30, "y": 30})
    assert " looks at " in view.inner_text()


def use_matrix(page):
    view = open_view(page, "Matrix")
    view.get_by_role("button", name=re.compile("^prefix SortAscending on SortAscending.Add1:")).click()
    assert "SortAscending on SortAscending+Add1" in view.inner_text()


def use_curves(page):
    view = open_view(page, "Curves")
    view.get_by_label("Study").select_option("methods")
    view.get_by_role("group", name="Methods").get_by_label("full", exact=True).uncheck()
    assert view.locator("circle").count() > 50


def use_about(page):
    assert "mingpt reproduce --preset laptop" in open_view(page, "About").inner_text()


USES = dict(zip(VIEWS, (use_ask, use_mix, use_look, use_matrix, use_curves, use_about), strict=True))


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_can_be_used(browser, laptop_page, tmp_path, view, width, color_scheme):
    """It fits the screen, and axe-core finds no serious fault in it. The photograph is kept with pytest's files."""
    with opened(browser, laptop_page, viewport={"width": width, "height": 900}, color_scheme=color_scheme) as page:
        USES[view](page)
        page.screenshot(path=tmp_path / f"{view}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert serious_faults(page) == []


RGB = """
const rgb = (colour) => {
    const context = new OffscreenCanvas(1, 1).getContext("2d");
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
};
"""


def contrast(one, other):
    """The contrast ratio of WCAG 2 of two colours, each red, green and blue of 0 to 255."""

    def luminance(colour):
        share = np.array(colour) / 255
        return np.where(share > 0.04045, ((share + 0.055) / 1.055) ** 2.4, share / 12.92) @ [0.2126, 0.7152, 0.0722]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_maps_follow_the_colour_scheme(browser, laptop_page):
    """A map's 0 is a grey that is almost the page's background, its 1 is not, also when the scheme changes later."""
    with opened(browser, laptop_page) as page:
        view = open_view(page, "Look")
        for mode, head in (("with the prefix", "layer 2, head 3"), ("the difference", "layer 2, head 4")):
            view.get_by_label(mode).check()
            view.get_by_role("button", name=head).click()
            for scheme in ("light", "dark", "light"):
                page.emulate_media(color_scheme=scheme)
                background, *maps = page.evaluate(
                    f"""async () => {{
                        {RGB}
                        await new Promise(requestAnimationFrame);
                        const maps = [...document.querySelectorAll("canvas")].map((canvas) => {{
                            const {{ width, height }} = canvas;
                            const context = new OffscreenCanvas(width, height).getContext("2d");
                            context.drawImage(canvas, 0, 0);
                            const {{ data }} = context.getImageData(0, 0, width, height);
                            const pixel = (i) => [...data.slice(4 * i, 4 * i + 3)];
                            return Array.from({{ length: width * height }}, (_, i) => pixel(i));
                        }});
                        return [rgb(getComputedStyle(document.querySelector(".mingpt-lab")).backgroundColor), ...maps];
                    }}"""
                )
                assert len(maps) == 17
                for pixels in maps:
                    zero = pixels[28]  # the first token of the row does not look at the last
                    assert contrast(zero, background) < 1.2, (mode, scheme)
                    assert max(zero) - min(zero) < 16, (mode, scheme)
                big = maps[-1]
                assert max(contrast(pixel, background) for pixel in big) > 3, (mode, scheme)
                is_difference = mode == "the difference"
                assert any(red > blue + 80 for red, _, blue in big) == is_difference, (mode, scheme)
                assert any(blue > red + 30 for red, _, blue in big), (mode, scheme)


def test_numbers_on_a_map_can_be_read(browser, laptop_page, module):
    """On the colour of every share, and as the views have them, with a contrast of 4.5."""
    shades = module(
        """() => ["high", "bad"].flatMap((end) =>
            Array.from({ length: 101 }, (_, i) => [shade(i / 100, end), onShade(i / 100)]))"""
    )
    with opened(browser, laptop_page) as page:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            for view in ("Look", "Matrix"):
                open_view(page, view)
            found = page.evaluate(
                f"""(shades) => {{
                    {RGB}
                    const root = document.querySelector(".mingpt-lab");
                    const added = shades.map(([background, color]) => {{
                        const element = document.createElement("span");
                        Object.assign(element.style, {{ background, color }});
                        root.append(element);
                        return element;
                    }});
                    return [...added, ...root.querySelectorAll(".heat [style]")].map((element) => {{
                        const {{ color, backgroundColor }} = getComputedStyle(element);
                        return [rgb(color), rgb(backgroundColor)];
                    }});
                }}""",
                shades,
            )
            assert len(found) > 202 + 400
            assert min(contrast(text, background) for text, background in found) >= 4.5, scheme


def test_the_keyboard_reaches_everything(browser, laptop_page):
    """Whatever can be clicked can be focused by the tab key, and the arrow keys go from view to view."""
    with opened(browser, laptop_page, viewport={"width": 1280, "height": 900}) as page:
        page.keyboard.press("Tab")
        for name in VIEWS:
            tab = page.get_by_role("tab", name=name)
            assert tab.get_attribute("aria-selected") == "true"
            assert tab.evaluate("(each) => each === document.activeElement")
            panel = page.get_by_role("tabpanel", name=name)
            parts = panel.locator("button, input, select, summary, [tabindex='0']")
            n_parts = parts.evaluate_all(
                """(all) => {
                    const names = new Set(); // of several radio buttons of one choice, one is in the order
                    return all.filter((each) => each.checkVisibility() && !each.disabled
                        && (each.type !== "radio" || (!names.has(each.name) && names.add(each.name)))).length;
                }"""
            )
            reached = 0
            while True:
                page.keyboard.press("Tab")
                if not panel.evaluate("(each) => each.contains(document.activeElement)"):
                    break
                reached += 1
            assert reached == n_parts, name
            tab.focus()
            page.keyboard.press("ArrowRight")


def test_what_the_page_says_is_what_torch_says(browser, laptop_page):
    """A row that is typed, and a mixture that is made with a slider."""
    model, prefixes, description = load_run(LAPTOP, "cpu")
    row, padding = [9, 3, 3, 1, 7, 10, 2, 2, 5, 4], description["data"]["prefix_padding"]

    def answer(prefix):
        return predict(model, torch.tensor([row]).numpy(), padding, prefix, precision="float32")[0].tolist()

    with opened(browser, laptop_page) as page:
        type_row(page, *row)
        page.get_by_label("Prefix", exact=True).first.select_option("SortDescending (key_value)")
        group = page.get_by_role("group", name="the answer, token by token")
        group.get_by_role("button").nth(9).wait_for()
        found = [int(text.split()[0]) for text in group.get_by_role("button").all_inner_texts()]
        assert found == answer(prefixes["SortDescending"]) == sorted(row, reverse=True)

        view = open_view(page, "Mix")
        view.get_by_label("Prefix 1", exact=True).select_option("SortAscending")
        view.get_by_label("Prefix 2", exact=True).select_option("Add1")
        view.get_by_label("weight of SortAscending").fill("0.4")
        view.get_by_label("weight of Add1").fill("0.6")
        page.wait_for_selector("[data-is-done=true]")
        line = view.get_by_role("status").filter(has_text="becomes").locator(".tokens").nth(1).locator(".token")
        mixed = type(prefixes["Add1"])(
            "key_value", 0.4 * prefixes["SortAscending"].values + 0.6 * prefixes["Add1"].values
        )
        assert [int(text) for text in line.all_inner_texts()] == answer(mixed)


def test_wrong_rows_only(browser, laptop_page):
    """Each row that is shown then is one that the chosen prefix gets wrong."""
    with opened(browser, laptop_page) as page:
        view = page.get_by_role("tabpanel", name="Ask")
        view.get_by_label("Prefix", exact=True).select_option("FilterAtLeastNTimes (key_value)")
        view.get_by_label("only rows it gets wrong").check()
        for _ in range(5):
            view.get_by_text("The answer is wrong.").wait_for()
            view.get_by_role("button", name="Another row").click()


def type_row(view, *values):
    for number, value in enumerate(values, start=1):
        cell = view.get_by_label(f"number {number} of the row", exact=True)
        cell.fill(str(value))
        cell.blur()


def test_a_row_that_is_none_of_the_task_is_not_wrong(browser, laptop_page):
    """A task's rows are those of its Python class."""
    with opened(browser, laptop_page) as page:
        view = page.get_by_role("tabpanel", name="Ask")
        group = view.get_by_role("group", name="the answer, token by token")
        lines = view.get_by_role("region", name="what other prefixes say").get_by_role("row")
        for task, outside, inside in (("Modulo", [9, *[7] * 9], [5, *[7] * 9]), ("InverseBinary", [2] * 10, [1] * 10)):
            values = Task.parse(task).input_values(10)
            assert [values.contain(np.array(row)).all() for row in (outside, inside)] == [False, True]
            view.get_by_label("Prefix", exact=True).select_option(f"{task} (key_value)")
            line = lines.filter(has=page.get_by_role("rowheader", name=task, exact=True))
            type_row(view, *outside)
            assert (
                f"{values.first.low} to {values.first.high}" in view.get_by_text(f"Not a row of {task}: ").inner_text()
            )
            assert "not a row of this task" in line.inner_text()
            assert line.locator(".wrong, .right").count() == 0
            assert view.get_by_text("The answer is wrong.").count() == group.get_by_label("wrong").count() == 0
            type_row(view, *inside)
            view.get_by_text("The answer is right.").wait_for()
            assert line.locator(".right").count() == 10


def test_the_rows_that_look_offers_are_those_of_the_prefix(browser, laptop_page):
    """Whichever view it was chosen in; the reader can still choose others, and has them until the next prefix."""
    with opened(browser, laptop_page) as page:
        ask = page.get_by_role("tabpanel", name="Ask")
        for name in ("Modulo", "Add1"):  # Look is opened for the first time, and again
            open_view(page, "Ask")
            ask.get_by_label("Prefix", exact=True).select_option(f"{name} (key_value)")
            look = open_view(page, "Look")
            rows = look.get_by_label("Rows of")
            assert rows.locator("option:checked").inner_text() == name
        rows.select_option("Divisible")
        look.get_by_role("button", name="Another row").click()
        assert rows.locator("option:checked").inner_text() == "Divisible"
        look.get_by_label("Prefix", exact=True).select_option("InverseBinary (key_value)")
        assert rows.locator("option:checked").inner_text() == "InverseBinary"


@pytest.mark.parametrize("width", [1280, 390])
def test_wide_tables_scroll_in_their_box(browser, laptop_page, width):
    """To their last column, with the names of the lines in sight."""
    with opened(browser, laptop_page, viewport={"width": width, "height": 900}) as page:
        n_wide = 0
        for view in ("Ask", "Mix", "Look", "Matrix", "About"):
            USES[view](page)
            if view == "Mix":
                page.get_by_label("one after the other").check()  # 20 and more positions
                for n in range(3):
                    page.get_by_role("button", name="Add a prefix").click()
                    page.get_by_role("slider").nth(n + 2).fill("1")
                page.wait_for_selector("[data-is-done=true]")
            found = page.locator(".scroll").evaluate_all(
                """(boxes) => boxes.filter((box) => box.checkVisibility()).map((box) => {
                    box.scrollLeft = 1e6;
                    box.scrollIntoView({ block: "center" });
                    const { left, right } = box.getBoundingClientRect();
                    const edges = (selector, edge) =>
                        [...box.querySelectorAll(selector)].map((each) => each.getBoundingClientRect()[edge]);
                    const isCovered = (each) => {
                        const { left, right, top, bottom } = each.getBoundingClientRect();
                        const there = document.elementFromPoint((left + right) / 2, (top + bottom) / 2);
                        return there && !each.contains(there);
                    };
                    return {
                        name: box.ariaLabel, isWide: box.scrollWidth > box.clientWidth, right,
                        isCut: Math.max(...edges("tr > :last-child", "right")) > right + 1,
                        isOut: Math.min(...edges("tbody th", "left")) < left - 1,
                        isHidden: [...box.querySelectorAll("tbody th")].some(isCovered),
                    };
                })"""
            )
            assert found
            n_wide += sum(each["isWide"] for each in found)
            for each in found:
                assert each["right"] <= width, each
                assert not any(each[fault] for fault in ("isCut", "isOut", "isHidden")), each
        assert n_wide == {1280: 1, 390: 3}[width]


def test_a_curve_can_be_told_from_the_others(browser, laptop_page):
    """The pointer on a line, or on its name, or the focus, makes the others fade; a click holds that."""
    with opened(browser, laptop_page) as page:
        chart = open_view(page, "Curves").locator("figure", has_text="Validation accuracy")
        entry = chart.get_by_role("button", name="FilterAtLeastNTimes")
        clear = lambda: chart.locator("g:not(.faded)").evaluate_all("(all) => all.map((g) => g.textContent)")  # noqa: E731
        assert len(clear()) == 16
        entry.hover()
        assert clear() == ["FilterAtLeastNTimes"]
        page.mouse.move(0, 0)
        assert len(clear()) == 16
        entry.click()
        page.mouse.move(0, 0)
        page.get_by_role("tab", name="Curves").focus()
        assert clear() == ["FilterAtLeastNTimes"]
        assert entry.get_attribute("aria-pressed") == "true"


class Backwards(Task):
    """A user's own task."""

    def solve(self, x):
        return x[..., ::-1].copy()


@pytest.fixture(scope="module")
def own_page(tmp_path_factory):
    """The stored run, to which 'mingpt prefix Backwards' added its prefix."""
    run = tmp_path_factory.mktemp("own") / "run"
    (run / "prefixes").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "results.json", "prefixes/Modulo.safetensors"):
        shutil.copy(LAPTOP / name, run / name)
    model, prefixes, _ = load_run(LAPTOP, "cpu")
    path = run / "prefixes" / "Backwards.safetensors"
    save_prefix(path, prefixes["SortAscending"], model, task="Backwards", metrics={"n_iters": 123})
    path = run / "lab.html"
    report.write_report(run, path)
    return path


def test_own_tasks_come_first_and_have_results(browser, own_page):
    with opened(browser, own_page) as page:
        for view in ("Ask", "Look", "Mix"):
            own = open_view(page, view).get_by_label("Rows of").locator("optgroup").first
            assert own.get_attribute("label") == "own tasks"
            assert own.locator("option").all_inner_texts() == ["Backwards"]
        view = open_view(page, "Ask")
        groups = view.get_by_label("Prefix", exact=True).locator("optgroup")
        assert groups.evaluate_all("(all) => all.map((each) => each.label)") == [
            "without one",
            "own tasks",
            "key_value",
        ]
        assert view.get_by_label("Prefix", exact=True).locator("option:checked").inner_text() == "Backwards"
        type_row(view, *range(1, 11))
        view.get_by_text("Of Backwards the page knows the answers to its stored rows only.").wait_for()
        rows = open_view(page, "About").get_by_role("row")
        model, prefixes, description = load_run(LAPTOP, "cpu")
        data = CustomDataset.from_description(description["data"], split="test", tasks=[Backwards()])
        scores = [f"{evaluate(model, data, each).accuracy:.2%}" for each in (None, prefixes["SortAscending"])]
        none = "\N{EN DASH}"
        expected = ["Backwards", "own task", scores[0], none, none, scores[1], "123", none]
        assert rows.nth(1).inner_text().split("\t") == expected
        modulo = rows.filter(has_text=re.compile("^Modulo")).inner_text()
        assert modulo.split("\t")[3:7] == ["100.00%", "200", "100.00%", "200"]


def test_a_name_cannot_become_code(browser, laptop_data, tmp_path):
    hostile = "</script><img src=x onerror=alert(1)>{{BLOB}}"
    path = tmp_path / "lab.html"
    about = laptop_data["about"] | {"run": hostile, "command": hostile}
    path.write_text(report.page(laptop_data | {"about": about}), encoding="utf-8")
    with opened(browser, path) as page:
        assert page.get_by_role("heading", level=1).inner_text() == f"Prefix-tuning lab: {hostile}"
        use_about_text = open_view(page, "About").inner_text()
        assert hostile in use_about_text
        assert page.locator("img").count() == 0
