"""What the page computes is what torch computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import wasmtime
from lab.conftest import LAPTOP
from reference import random_model

from mingpt.datasets import CustomDataset
from mingpt.evaluation import predict
from mingpt.experiments.pipeline import load_run
from mingpt.lab import report
from mingpt.prefix import Prefix, initial_prefix
from mingpt.tasks import SIMPLE_TASKS, TEST_TASKS, Add1, SortAscending, SortDescending, Task

N_ROWS = 3200


@pytest.fixture(scope="module")
def run():
    return load_run(LAPTOP, "cpu")


def test_the_kernel_is_what_its_source_says():
    source = (report.STATIC / "kernels.wat").read_text()
    assert (report.STATIC / "kernels.wasm").read_bytes() == wasmtime.wat2wasm(source), (
        "assemble it again: wasmtime.wat2wasm"
    )


@pytest.mark.slow
def test_greedy_tokens_are_torchs(run, module):
    """Every prefix on 3,200 test rows of its task, in float32."""
    model, prefixes, description = run
    answer = """async ([name, rows]) => {
        const prefix = lab.prefixes.find((each) => each.name === name && each.kind === "key_value");
        const found = [];
        for (let k = 0; k < rows.length; k += 64) found.push(...lab.answer(rows.slice(k, k + 64), prefix).answers);
        return found;
    }"""
    assert len(prefixes) == 16
    differences = {}
    for name, prefix in prefixes.items():
        data = CustomDataset.from_description(description["data"], split="test", tasks=[Task.parse(name)])
        rows = data.rows(range(N_ROWS))[0]
        expected = predict(model, rows, data.prefix_padding, prefix, precision="float32")
        differences[name] = int((np.array(module(answer, [name, rows.tolist()])) != expected).any(axis=1).sum())
    assert not any(differences.values()), differences


def test_without_a_prefix_too(run, module):
    model, _, description = run
    data = CustomDataset.from_description(description["data"], split="test")
    rows = data.rows(range(210))[0]
    expected = predict(model, rows, data.prefix_padding, precision="float32")
    found = []
    for k in range(0, 210, 30):
        found += module("(rows) => lab.answer(rows, lab.none).answers", rows[k : k + 30].tolist())
    assert found == expected.tolist()


@pytest.mark.parametrize("kind", ["activation", "key_value", "prompt"])
@pytest.mark.parametrize(
    "settings",
    [
        {"n_layer": 2, "n_head": 3, "n_embd": 36, "gelu_approximate": "tanh"},
        {"n_layer": 1, "n_head": 2, "n_embd": 20, "gelu_approximate": "none", "skip_layer_norm": True},
    ],
)
def test_logits_and_attention_of_any_model(module, kind, settings):
    """Sizes that are no multiples of four or eight, both GELUs, a model without first LayerNorms, a short prefix."""
    model = random_model(vocab_size=13, block_size=29, **settings)
    prefix = Prefix(kind, initial_prefix(model, 7, "random", kind=kind).detach()[None])
    data = CustomDataset("test", [SortAscending(), Add1()], prefix_padding=7)
    header, blob = report.pack(report.model_data(model, {kind: {"Add1": prefix}}, data.describe(), n_rows=4))
    rows = torch.from_numpy(data.rows([0, 1, 2])[0])
    record = []
    idx = torch.cat([torch.zeros(3, 7, dtype=torch.int64), rows], dim=1)
    logits, _ = model(idx, prefixes=prefix, activations_record=record)
    found = module(
        """async ([header, bytes, rows]) => {
            const own = await Lab.load(header, new Uint8Array(bytes).buffer, decodeBase64(KERNELS));
            const cache = own.model.newCache(own.cacheOf(own.prefixes[0]), 3, 10, 7);
            const logits = own.model.forward(rows.flat(), cache, 10);
            const recorded = { attention: [], stream: [] };
            own.model.forward(rows[0], own.model.newCache(own.cacheOf(own.prefixes[0]), 1, 10, 7), 1, recorded);
            return [Array.from(logits), recorded.attention.map((each) => Array.from(each))];
        }""",
        [header, list(blob), rows.tolist()],
    )
    expected = logits[:, 7:].detach().numpy()
    np.testing.assert_allclose(np.reshape(found[0], expected.shape), expected, rtol=1e-4, atol=1e-4)
    weights = [own for name, own in record if name == "attention"]
    for own, each in zip(weights, found[1], strict=True):
        np.testing.assert_allclose(np.reshape(each, own[0, :, 7:].shape), own[0, :, 7:].detach(), atol=1e-5)


def test_a_half_precision_page_has_the_rounded_weights(module):
    values = np.array([1.5, -(2.0**-20), 1000.3, 0.1, 0.0])  # the second one is subnormal in float16
    header, blob = report.pack({"tensors": {"w": values}}, use_half=True)
    found = module("(bytes) => Array.from(fromHalf(new Uint8Array(bytes).buffer, 0, 5))", list(blob))
    assert header["dtype"] == "float16"
    assert found == values.astype("float16").astype(float).tolist()


def test_erf_is_torchs(module):
    x = np.linspace(-5, 5, 4001)
    found = module("(x) => x.map(erf)", x.tolist())
    np.testing.assert_allclose(found, torch.erf(torch.from_numpy(x)), atol=2e-7)


@pytest.mark.parametrize("task", [*SIMPLE_TASKS, *TEST_TASKS], ids=str)
def test_tasks_are_the_packages(module, task):
    rows = CustomDataset("test", [task]).rows(range(100))[0]
    others = np.random.default_rng(0).integers(0, 11, (100, 10))
    assert (
        module("([name, rows]) => rows.map((row) => solve(name, row))", [str(task), rows.tolist()])
        == task(rows).tolist()
    )
    expected = [task(row).tolist() if task.is_defined(row) else None for row in others]
    assert module("([name, rows]) => rows.map((row) => solve(name, row))", [str(task), others.tolist()]) == expected


def test_mixtures_are_those_of_torch(run, module):
    """A weighted sum, a concatenation, one without some positions, and the keys of another prefix."""
    model, prefixes, description = run
    padding = description["data"]["prefix_padding"]
    rows = CustomDataset.from_description(description["data"], split="test").rows(range(30))[0]
    a, b = (prefixes[str(task)].values for task in (SortAscending(), SortDescending()))
    kept = [0, 2, 3, 9]
    expected = {
        "weightedSum": 0.75 * a - 0.5 * b,
        "concatenate": torch.cat([a, b], dim=-2),
        "keepPositions": a[..., kept, :],
        "withKeysOf": torch.stack([b[:, :, 0], a[:, :, 1]], dim=2),
    }
    found = module(
        """(rows) => {
            const [a, b] = ["SortAscending", "SortDescending"].map((name) =>
                lab.prefixes.find((each) => each.name === name && each.kind === "key_value"));
            const [own, other] = [a, b].map((prefix) => lab.cacheOf(prefix));
            const caches = {
                weightedSum: ofPrefix(lab.model, weightedSum([a, b], [0.75, -0.5])),
                concatenate: concatenate(lab.model, [own, other]),
                keepPositions: keepPositions(lab.model, own, (layer, p) => [0, 2, 3, 9].includes(p)),
                withKeysOf: withKeysOf(own, other),
            };
            for (const name in caches) caches[name] = lab.answer(rows, caches[name]).answers;
            return caches;
        }""",
        rows.tolist(),
    )
    for name, values in expected.items():
        prefix = Prefix("key_value", values, n_placeholders=padding)
        assert found[name] == predict(model, rows, padding, prefix, precision="float32").tolist(), name
