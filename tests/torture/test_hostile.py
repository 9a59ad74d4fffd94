"""Files that are damaged, or changed with a right checksum: an error that names the file, or no harm."""

from __future__ import annotations

import shutil

import pytest

from mingpt.adapters import METHODS
from mingpt.experiments import pipeline
from mingpt.experiments.presets import run_config
from mingpt.storage.cache import cached_json
from mingpt.storage.weights import load_model, save_adapter
from mingpt.tasks import Add1
from torture.harness import IS_ALL, SEED, tally
from torture.hostile import READERS, SEALED

pytestmark = pytest.mark.torture


@pytest.fixture(scope="module")
def folder(bench, tmp_path_factory):
    """A folder with a file of every kind."""
    folder = tmp_path_factory.mktemp("hostile") / "all"
    shutil.copytree(bench.done("export"), folder)
    shutil.copytree(bench.done("reproduce") / "run", folder / "run", dirs_exist_ok=True)
    shutil.copytree(bench.done("Trainer") / "run", folder / "trainer")
    for name in ("study.toml", "study"):
        source = bench.done("sweep, its tables") / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    shutil.rmtree(folder / "study" / "cells")
    with (folder / "study.toml").open("a") as file:
        file.write("[search]\nseeds = [0]\n")
    (folder / "study" / "rates.json").write_text('{"key_value": 0.1, "lora-mlp": 0.1}')
    (folder / "in.jsonl").write_text("[1, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n" * 5)
    (folder / "parts").mkdir()
    (folder / "parts" / "0123456789abcdef-0-0.jsonl").write_text("".join(f"[{n}, [1, 2]]\n" for n in range(5)))
    cached_json(folder / "step.json", {"a": 1}, lambda: [[1, 2]] * 5)
    model, _ = load_model(folder / "run" / "model.safetensors")
    data = pipeline.dataset(run_config(folder / "run"), "train", [Add1()])
    save_adapter(folder / "adapter.safetensors", METHODS["lora-mlp"](model, data, 1), "lora-mlp", 1, data)
    return folder


def test_every_sealed_kind_is_read():
    assert READERS.keys() > SEALED


@pytest.mark.parametrize("kind", READERS)
def test_a_hostile_file_does_no_harm(bench, folder, kind):
    n = 650 if IS_ALL else 25
    found = bench.server.run(call="mutations", args=[str(folder), kind, SEED, n], cwd=str(folder), limit_s=600)
    failures = [line for line in found["out"].splitlines() if line.startswith("mutation")]
    if found["rc"]:
        failures.append(f"{kind}: exit code {found['rc']}: {found['err'][-1500:]}")
    tally("a hostile file", n, failures)
