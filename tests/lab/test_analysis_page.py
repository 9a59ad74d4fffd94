"""The page of ``mingpt analyze`` in a real browser: its numbers are those of the analysis."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from huggingface.hf_models import random_hf_model, random_values, tokens, with_peft_prefix
from lab.conftest import opened, serious_faults

from mingpt import cli
from mingpt.huggingface.adapters import load_causal_lm, load_peft
from mingpt.huggingface.analysis import analyze
from mingpt.huggingface.comparison import Candidate, Comparison
from mingpt.lab import report, write_analysis

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PEFT's, of transformers

MAPS = ["share", "movement", "distance", "rank", "effective_rank", "direction_share"]
COLUMNS = ["share", "deviation", *MAPS[1:], "attention_perplexity"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama, a prefix and a LoRA of PEFT for it, and a file of rows."""
    folder = tmp_path_factory.mktemp("analysis")
    random_hf_model("llama").save_pretrained(folder / "llama")
    lm = load_causal_lm(folder / "llama")
    with_peft_prefix(lm.model, random_values(lm)[0])[0].save_pretrained(folder / "prefix")
    lm = load_causal_lm(folder / "llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    peft.get_peft_model(lm.model, config).save_pretrained(folder / "lora")
    (folder / "rows.jsonl").write_text("".join(f"{row}\n" for row in tokens(5, 12).tolist()))
    return folder


def mingpt(*arguments):
    """Call the command; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mingpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    return exit_.value.code or 0


def run(folder, adapter, *options):
    """``mingpt analyze``; returns its exit code."""
    return mingpt("analyze", folder / "llama", folder / adapter, "--text", folder / "rows.jsonl", *options)


@pytest.fixture(scope="module")
def pages(folder):
    """The page of each adapter, and what the analysis says of it."""
    found = {}
    for name in ("prefix", "lora"):
        path = folder / f"{name}.html"
        assert run(folder, name, "--page", path) == 0
        lm = load_causal_lm(folder / "llama")
        found[name] = path, analyze(lm, load_peft(folder / name, lm), tokens(5, 12))
    return found


def words(name):
    return name.replace("_", " ")


def four_digits(value):
    return float(f"{value:.4g}")


def cells(region):
    """The body of a table, its lines as lists of text."""
    return [line.split("\t") for line in region.locator("tbody tr").all_inner_texts()]


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("adapter", ["prefix", "lora"])
def test_the_page_has_the_numbers_of_the_analysis(browser, pages, tmp_path, adapter, width, color_scheme):
    """It fits the screen, and axe-core finds no serious fault in it. The photograph is kept with pytest's files."""
    path, analysis = pages[adapter]
    expected = analysis.to_dict()
    names = [name for name in COLUMNS if name in expected["attention"]]
    with opened(browser, path, viewport={"width": width, "height": 900}, color_scheme=color_scheme) as page:
        page.screenshot(path=tmp_path / f"{adapter}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert serious_faults(page) == []
        assert page.get_by_role("heading", level=1).inner_text() == expected["title"]
        *logits, agreement = [line[1] for line in cells(page.get_by_role("region", name="predictions"))]
        assert [float(text) for text in logits] == [
            four_digits(expected["logits"][name]) for name in ("loss", "base_loss", "kl")
        ]
        assert agreement == f"{expected['logits']['agreement']:.1%}"

        numbers = page.get_by_role("region", name="all numbers")
        head = numbers.get_by_role("columnheader").all_inner_texts()
        assert head == ["layer, head", *map(words, names)]
        n_layer, n_head = analysis.attention.movement.shape
        assert len(cells(numbers)) == n_layer * n_head
        for place, *values in cells(numbers):
            layer, head = (int(number) - 1 for number in place.split(", "))
            found = dict(zip(names, map(float, values), strict=True))
            assert found == {name: four_digits(expected["attention"][name][layer][head]) for name in names}

        text = page.locator("main").inner_text()
        assert all(sentence in text for sentence in analysis.checks())
        assert ("How exactly the theory holds" in text) == (adapter == "prefix")
        assert f"mingpt analyze {path.parent / 'llama'}" in text
        assert f"peft {peft.__version__}" in text


def test_a_map_says_what_is_under_the_pointer(browser, pages):
    """On each map, by the pointer, a finger and the keyboard; the other maps then show the same head."""
    path, analysis = pages["prefix"]
    expected = analysis.to_dict()["attention"]
    with opened(browser, path, has_touch=True) as page:
        figures = page.locator("figure")
        assert figures.locator("figcaption").all_inner_texts() == [*map(words, MAPS)]

        def check(layer, head):
            for name, text in zip(MAPS, figures.locator("[aria-live]").all_inner_texts(), strict=True):
                place, value = text.split(": ")
                assert place == f"layer {layer + 1}, head {head + 1}"
                assert float(value) == four_digits(expected[name][layer][head]), (name, place)

        check(0, 0)
        n_layer, n_head = analysis.attention.movement.shape
        for number in range(len(MAPS)):
            canvas = figures.nth(number).get_by_role("img")
            canvas.scroll_into_view_if_needed()
            box = canvas.bounding_box()
            for layer, head in ((0, 1), (n_layer - 1, number % n_head)):
                position = {"x": (head + 0.5) * box["width"] / n_head, "y": (layer + 0.5) * box["height"] / n_layer}
                canvas.hover(position=position)
                check(layer, head)
            canvas.tap(position={"x": 1, "y": 1})
            check(0, 0)
            canvas.focus()
            for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowUp", "ArrowLeft"):
                page.keyboard.press(key)
            check(0, 1)
            live = figures.locator("[aria-live]").evaluate_all("(all) => all.map((each) => each.ariaLive)")
            assert live == ["polite" if each == number else "off" for each in range(len(MAPS))]


def test_a_map_is_darkest_where_its_number_is_largest(browser, pages):
    """And an almost empty grey where it is 0, as it is in the first layer's movement; in either colour scheme."""
    path, analysis = pages["prefix"]
    with opened(browser, path) as page:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            for name, figure in zip(MAPS, page.locator("figure").all(), strict=True):
                found = figure.evaluate(
                    """async (figure) => {
                        await new Promise(requestAnimationFrame);
                        const canvas = figure.querySelector("canvas");
                        const context = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");
                        context.drawImage(canvas, 0, 0);
                        const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
                        return Array.from({ length: data.length / 4 }, (_, i) => data[4 * i]);
                    }"""
                )
                values = analysis.attention.named()[name].double().flatten()
                end, low = {"light": (0x0B, 0xF1), "dark": (0x8C, 0x1D)}[scheme]
                red = low + values / values.max() * (end - low)
                assert torch.tensor(found).sub(red).abs().max() <= 1, (name, scheme)


def test_the_keyboard_reaches_the_maps_and_the_tables(browser, pages):
    path, _ = pages["prefix"]
    with opened(browser, path) as page:
        reached = []
        for _ in range(len(MAPS) + 3):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.tagName"))
    assert reached[0] == "predictions"
    assert [each.split(" by layer")[0] for each in reached[1:-2]] == [*map(words, MAPS)]
    assert reached[-2:] == ["all numbers", "PRE"]


def test_many_heads_have_room(browser, pages, tmp_path):
    """Of 40 layers and 32 heads, on a narrow screen; the table scrolls in its box, its names in sight."""
    _, analysis = pages["prefix"]
    generator = torch.Generator().manual_seed(0)

    def enlarged(part):
        return part._replace(**{name: torch.rand(40, 32, generator=generator) for name in part._fields})

    attention = enlarged(analysis.attention)
    attention = attention._replace(
        **{name: enlarged(getattr(analysis.attention, name)) for name in ("invariance", "bias")}
    )
    write_analysis(analysis._replace(attention=attention), tmp_path / "large.html", "mingpt analyze")
    assert (tmp_path / "large.html").stat().st_size < 1e6
    with opened(browser, tmp_path / "large.html", viewport={"width": 390, "height": 900}) as page:
        page.screenshot(path=tmp_path / "large.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert serious_faults(page) == []
        numbers = page.get_by_role("region", name="all numbers")
        assert numbers.bounding_box()["height"] < 600
        assert cells(numbers)[-1][0] == "40, 32"
        numbers.evaluate("(box) => { box.scrollTop = 1e6; box.scrollLeft = 1e6; }")
        for cell in (numbers.get_by_role("columnheader").first, numbers.get_by_role("rowheader").last):
            covers = cell.evaluate(
                """(cell) => {
                    cell.closest(".scroll").scrollIntoView({ block: "center" });
                    const { left, right, top, bottom } = cell.getBoundingClientRect();
                    return document.elementFromPoint((left + right) / 2, (top + bottom) / 2) === cell;
                }"""
            )
            assert covers


def test_what_is_not_finite_and_what_is_hostile(browser, pages, tmp_path):
    """A loss that is no number is a dash, and a name cannot become code."""
    _, analysis = pages["prefix"]
    hostile = "</script><img src=x onerror=alert(1)>{{BLOB}}"
    analysis = analysis._replace(title=hostile, logits=analysis.logits._replace(loss=float("nan"), kl=float("inf")))
    write_analysis(analysis, tmp_path / "page.html", hostile)
    with opened(browser, tmp_path / "page.html") as page:
        assert page.get_by_role("heading", level=1).inner_text() == hostile
        values = [line[1] for line in cells(page.get_by_role("region", name="predictions"))]
        assert [values[0], values[2]] == ["\N{EN DASH}"] * 2
        assert page.locator("img").count() == 0


def test_the_file_asks_for_nothing_and_json_stays_json(folder, pages, capsys):
    path, analysis = pages["prefix"]
    text = path.read_text()
    assert len(text) < 100e3
    assert not re.search(r"(?:src|href)=\"(?!data:)|https?://(?!www\.w3\.org/2000/svg)", text)
    capsys.readouterr()
    assert run(folder, "prefix", "--page", path, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == analysis.to_dict()
    assert err == f"{path}, {len(path.read_bytes()) / 1e3:.0f} kB; open it in a browser\n"
    assert not list(folder.glob(".*.tmp"))


def test_a_page_that_cannot_be_written_is_one_line(folder, capsys):
    (folder / "file").write_text("")
    for place in (folder, folder / "file" / "page.html"):
        capsys.readouterr()
        assert run(folder, "prefix", "--page", place) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert (folder / "file").read_text() == ""


COMPARISON = Comparison(
    [
        Candidate("the base model", 3.21, 0, 0),
        Candidate("the adapter", 2.21, 1024, 4),
        Candidate("2 demonstrations", 2.96, 0, 14),
        Candidate("a LoRA of rank 1", 2.3, 900, 0),
    ],
    n_scored=3, n_examples=40, lora_iters=200, validation_losses={"0.0001": 3.0, "0.001": 2.5, "0.01": None},
)  # fmt: skip


@pytest.fixture(scope="module")
def lab_page(pages, tmp_path_factory):
    """The lab page of a run without a model, which has the analyses of both adapters."""
    folder = tmp_path_factory.mktemp("lab")
    for name, (_, analysis) in pages.items():
        own = analysis._replace(comparison=COMPARISON) if name == "lora" else analysis
        (folder / f"{name}.json").write_text(json.dumps(own.to_dict()))
    (folder / "run").mkdir()
    options = [option for name in pages for option in ("--analysis", folder / f"{name}.json")]
    assert mingpt("report", "--run", folder / "run", "--out", folder / "lab.html", *options) == 0
    return folder / "lab.html"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_lab_has_a_view_of_adapters(browser, pages, lab_page, tmp_path, width):
    """It shows what the analysis' own page does, one analysis at a time, in the page's colours."""
    path, analysis = pages["prefix"]
    with opened(browser, path) as page:
        expected = {name: cells(page.get_by_role("region", name=name)) for name in ("predictions", "all numbers")}
        image = page.locator("canvas").nth(1).screenshot()
    with opened(browser, lab_page, viewport={"width": width, "height": 900}) as page:
        page.get_by_role("tab", name="Adapters").click()
        assert page.get_by_role("heading", level=2).first.inner_text() == analysis.title
        for name, lines in expected.items():
            assert cells(page.get_by_role("region", name=name)) == lines
        if width == 1280:
            assert page.locator("canvas").nth(1).screenshot() == image
        page.get_by_label("Analysis").select_option("lora")
        assert page.get_by_role("heading", level=2).first.inner_text() == pages["lora"][1].title
        assert cells(page.get_by_role("region", name="comparison")) == COMPARISON.cells()[1:]
        text = page.get_by_role("tabpanel").last.inner_text()
        assert all(sentence in text for sentence in COMPARISON.sentences())
        assert page.locator("canvas").count() == 2
        page.screenshot(path=tmp_path / "adapters.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert serious_faults(page) == []


def test_a_page_without_analyses_has_no_part_of_them(tmp_path):
    data = report.run_data(tmp_path)
    assert "analyses" not in data
    assert "showAnalysis" not in report.page(data)
    assert "showAnalysis" in report.page(data | {"analyses": []})


@pytest.mark.parametrize(
    "change",
    [
        lambda found: "[",
        lambda found: json.dumps(found)[:-9],
        lambda found: json.dumps([found]),
        lambda found: json.dumps(found | {"logits": {}}),
        lambda found: json.dumps(found | {"logits": dict.fromkeys(found["logits"], "x")}),
        lambda found: json.dumps(found | {"attention": {}}),
        lambda found: json.dumps(found | {"attention": found["attention"] | {"rank": [[1.0], [2.0, 3.0]]}}),
        lambda found: json.dumps(found | {"attention": found["attention"] | {"movement": [[0.5]]}}),
        lambda found: json.dumps(found | {"comparison": {"candidates": []}}),
    ],
)
def test_a_damaged_analysis_is_one_line(pages, tmp_path, capsys, change):
    (tmp_path / "bad.json").write_text(change(pages["prefix"][1].to_dict()))
    capsys.readouterr()
    for command in ("report", "lab"):
        assert mingpt(command, "--run", tmp_path, "--analysis", tmp_path / "bad.json") == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"error: {tmp_path / 'bad.json'}: it does not hold what 'mingpt analyze --json' prints: ")
