"""The page as a file, and the server that shows a run while it is trained."""

from __future__ import annotations

import http.client
import json
import re
import threading

import numpy as np
import pytest
from lab.conftest import LAPTOP

from mingpt.evaluation import accuracy_matrix
from mingpt.experiments import pipeline
from mingpt.experiments.presets import get_default_config
from mingpt.lab import LabServer, report, write_report
from mingpt.storage.checkpoint import CheckpointError
from mingpt.tasks import Add1, Task


def header_of(text):
    found = re.search(r'id="header">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_laptops_page_is_small_and_asks_for_nothing(laptop_page):
    text = laptop_page.read_text()
    assert len(text) < 10e6
    script = report.script()
    assert not re.search(r"\b(?:import|export)\s", script)
    assert not re.search(r"(?:src|href)=\"(?!data:)|https?://(?!www\.w3\.org/2000/svg)", text.replace(script, ""))


def test_every_module_is_in_the_page_after_those_it_imports():
    bundles = [report.MODULES, report.ANALYSIS_MODULES, report.MODULES + report.ADAPTERS_MODULES]
    assert {f"{name}.js" for modules in bundles for name in modules} == {
        path.name for path in report.STATIC.glob("*.js")
    }
    for modules, number in ((each, number) for each in bundles for number in range(len(each))):
        source = (report.STATIC / f"{modules[number]}.js").read_text()
        imports = re.findall(r'^import .* from "\./(\w+)\.js";$', source, re.MULTILINE)
        assert len(imports) == len(re.findall("^import", source, re.MULTILINE))
        assert set(imports) <= set(modules[:number])


def test_the_matrix_is_that_of_the_evaluation(laptop_data):
    model, prefixes, description = pipeline.load_run(LAPTOP, "cpu")
    sets = [pipeline.CustomDataset.from_description(description["data"], split="test", tasks=[Add1()])]
    expected = accuracy_matrix(model, {"Modulo": prefixes["Modulo"]}, sets, 200, precision="float32")
    assert laptop_data["matrix"]["n_right"]["key_value"]["Modulo"]["Add1"] == expected.iloc[0, 0].n_correct
    rows = laptop_data["rows"]["SortAscending+Add1"]
    assert Task.parse("SortAscending+Add1")(np.array(rows["inputs"])).tolist() == rows["solutions"]


def test_half_precision_halves_the_page(laptop_data):
    full, half = (len(report.pack(laptop_data, use_half)[1]) for use_half in (False, True))
    assert full == 2 * half > 4e6


@pytest.fixture
def young_run(tmp_path):
    """A run that has a model and one prefix of each of two kinds, and no results."""
    config = get_default_config("smoke")
    config.trainer.max_iters = config.prefix.max_iters = 2
    config.trainer.log_every = config.prefix.log_every = config.prefix.validate_every = 1
    model, _ = pipeline.pretrain(config, tmp_path / "run")
    for kind, name in pipeline.KINDS.items():
        pipeline.train_prefixes(config, model, [Add1()], tmp_path / "run", name, kind)
    return tmp_path / "run"


def test_a_run_has_a_page_at_any_time(young_run, tmp_path):
    write_report(young_run, tmp_path / "lab.html")
    header = header_of((tmp_path / "lab.html").read_text())
    assert [f"{each['name']} {each['kind']}" for each in header["prefixes"]] == ["Add1 activation", "Add1 key_value"]
    assert [point[0] for point in header["curves"]["pretraining"]] == [1, 2]
    assert header["about"]["results"] is None
    for path in young_run.glob("*prefixes/*.safetensors"):
        path.unlink()
    (young_run / "model.safetensors").unlink()
    write_report(young_run, tmp_path / "lab.html")
    assert "config" not in header_of((tmp_path / "lab.html").read_text())


def test_a_prefix_that_was_trained_again_has_its_task_and_its_own_curve(young_run):
    folder = young_run / "prefixes"
    (folder / "Add1.safetensors").rename(folder / "Add1-1a2b3c4d.safetensors")
    (folder / "training-later").mkdir()
    (folder / "training-later" / "metrics.jsonl").write_text('{"iter": 7, "accuracies": {"Add1": 0.5}}\n')
    found = report.run_data(young_run)
    assert [each["task"] for each in found["prefixes"] if each["name"] == "Add1-1a2b3c4d"] == ["Add1"]
    assert "Add1-1a2b3c4d" not in found["rows"]
    assert found["curves"]["prefixes"]["key_value"] == {"Add1": [(7, 0.5)]}


def test_mistakes_are_said(young_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no run"):
        write_report(tmp_path / "other", tmp_path / "lab.html")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "results.csv").write_text("method,task\na,b\n")
    with pytest.raises(CheckpointError, match=r"results\.csv"):
        write_report(young_run, tmp_path / "lab.html", [tmp_path / "study"])
    (young_run / "results.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"results\.json"):
        write_report(young_run, tmp_path / "lab.html")
    assert not (tmp_path / "lab.html").exists()


@pytest.fixture
def server(young_run):
    with LabServer(young_run) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def get(server, path, host=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request("GET", path, headers={"Host": host or server.host})
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    return response.status, content, response.headers


def test_only_who_knows_the_address_gets_the_page(server):
    status, content, headers = get(server, f"/{server.token}/")
    assert (status, headers["Cache-Control"], headers["X-Frame-Options"]) == (200, "no-store", "DENY")
    assert header_of(content)["live"] == "curves.json"
    assert server.token not in content
    for path in ("/", "/x/", f"/{server.token}", f"/{server.token}/../x"):
        assert get(server, path)[0] == 404
    assert get(server, f"/{server.token}/", host="lab.example:80")[0] == 403
    assert server.server_address[0] == "127.0.0.1"


def test_the_curves_grow(server, young_run):
    path = f"/{server.token}/curves.json"
    before = json.loads(get(server, path)[1])["pretraining"]
    with (young_run / "pretraining" / "metrics.jsonl").open("a") as file:
        file.write('{"iter": 3, "loss": 0.5}\n{"iter": 4, "lo')  # the last line is being written
    assert json.loads(get(server, path)[1])["pretraining"] == [*before, [3, 0.5]]


def test_the_widget_has_the_model_and_the_rows(young_run):
    from mingpt.lab.widget import Lab

    model, prefixes, description = pipeline.load_run(young_run, "cpu")
    widget = Lab(model, {"Add1": prefixes["Add1"], "mine": prefixes["Add1"].values[0]}, description["data"], n_rows=3)
    assert [each["name"] for each in widget.header["prefixes"]] == ["Add1", "mine"]
    assert len(widget.tensors) == 4 * sum(np.prod(each["shape"]) for each in widget.header["tensors"].values())
    assert len(widget.header["rows"]["Add1"]["inputs"]) == 3
