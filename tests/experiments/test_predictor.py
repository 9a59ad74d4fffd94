"""The Predictor: complete, in order, the same for every number of processes; streaming, resumption, split models."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from distributed_script import COUNTS, N_NEW, random_model, random_rows, run_job

from mingpt.experiments.predictor import Predictor, SampleSeeds
from mingpt.utils import derived_seed


def doubling(**options):
    return Predictor(torch.tensor, lambda batch, _: 2 * batch, **options)


def test_every_argument_of_the_documentation():
    """Raw examples, what makes a batch of them, what predicts, what reads the prediction; sizes and a description."""
    seen = []

    def collate_fn(texts):
        seen.append(texts)
        return {"input": torch.tensor([[int(digit) for digit in text] for text in texts])}

    def pred_fn(batch, sample_seeds):
        assert isinstance(sample_seeds, SampleSeeds)
        assert not torch.is_grad_enabled()
        return batch["input"].sum(dim=1)

    def output_fn(sums):
        return [f"sum {value}" for value in sums.tolist()]

    predictor = Predictor(collate_fn, pred_fn, output_fn, mesh=None, sharding_rules=None)
    assert predictor.mesh is None
    predictions = predictor.predict(["123", "456", "777"], per_device_batch_size=2, desc="sums")
    assert predictions == ["sum 6", "sum 15", "sum 21"]
    assert seen == [["123", "456"], ["777"]]  # nothing is repeated to fill the last batch up


def test_the_bar_shows_the_description(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    doubling().predict([1, 2, 3], 2, desc="twice")
    assert "Predicting (twice)" in capsys.readouterr().err


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_nothing_is_lost_or_repeated(count, batch_size):
    assert doubling().predict(range(count), batch_size) == [2 * i for i in range(count)]


def test_each_example_has_its_own_draws():
    def drawn(batch_size, seed=0):
        def pred_fn(batch, sample_seeds):
            seeds = [derived_seed(sample_seeds.seed, index) for index in sample_seeds.indices]
            return [torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist() for seed in seeds]

        return Predictor(list, pred_fn, seed=seed).predict(range(10), batch_size)

    assert drawn(1) == drawn(4) == drawn(10)
    assert len(set(map(tuple, drawn(4)))) == 10
    assert drawn(4) != drawn(4, seed=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"output_fn": lambda batch: batch.tolist()[1:]},
            "list of 3 predictions, one an example, got a list of 2",
        ),
        ({"output_fn": lambda batch: batch}, "got Tensor"),
    ],
)
def test_a_wrong_number_of_predictions_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        doubling(**options).predict([1, 2, 3], 3)


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="per_device_batch_size must be at least 1, got 0"):
        doubling().predict([1], 0)
    with pytest.raises(ValueError, match="sharding_rules need the model, and a mesh"):
        doubling(sharding_rules=[("weight", None)])
    with pytest.raises(TypeError, match="output_fn that makes JSON"):
        Predictor(list, lambda batch, _: [object() for _ in batch]).predict([1], 1, path=tmp_path / "out.jsonl")


def test_predictions_are_written_as_they_come(tmp_path):
    path = tmp_path / "out.jsonl"
    seen = []

    def pred_fn(batch, _):
        parts = (tmp_path / "out.jsonl.parts").glob("*.jsonl")
        seen.append(sum(part.read_text().count("\n") for part in parts))
        assert not path.exists()
        return 2 * batch

    Predictor(torch.tensor, pred_fn).predict([[1], [2], [3], [4], [5]], 2, path=path)
    assert seen == [0, 2, 4]
    assert path.read_text() == "[2]\n[4]\n[6]\n[8]\n[10]\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("torn", ["", "[3, [8", "[3, [8]", "["])
def test_only_what_is_missing_is_predicted_again(tmp_path, torn):
    path, asked = tmp_path / "out.jsonl", []

    def pred_fn(batch, sample_seeds):
        asked.append(sample_seeds.indices)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return [[index, 0.1] for index in sample_seeds.indices]

    examples = list(range(9))
    with pytest.raises(KeyboardInterrupt):
        Predictor(list, pred_fn).predict(examples, 2, path=path)
    with next((tmp_path / "out.jsonl.parts").glob("*-0-0.jsonl")).open("a") as file:
        file.write(torn)
    for other, field in (({"examples": [0]}, "examples"), ({"cache_key": "another model"}, "other")):
        with pytest.raises(ValueError, match=f"it was made with {field} = "):
            Predictor(list, pred_fn).predict(**{"examples": examples, "per_device_batch_size": 2, "path": path} | other)
    predictions = Predictor(list, pred_fn).predict(examples, 3, path=path)
    assert asked == [(0, 1), (2, 3), (4, 5), (4, 5, 6), (7, 8)]
    assert predictions == [[index, 0.1] for index in examples]
    assert [json.loads(line) for line in path.read_text().splitlines()] == predictions
    assert list(tmp_path.iterdir()) == [path]


def test_predictions_with_a_path_are_json_values(tmp_path):
    """As they are read from what an interrupted run has left."""
    predictor = Predictor(list, lambda batch, _: [(value, {1: value}) for value in batch])
    assert predictor.predict([5], 1, path=tmp_path / "out.jsonl") == [[5, {"1": 5}]]
    assert predictor.predict([5], 1) == [(5, {1: 5})]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, run_job("predict_everything", 1, folder)[0]


def test_sampled_and_greedy_are_what_generate_gives(alone):
    folder, _ = alone
    model, rows = random_model(), random_rows(97)
    for is_sampled in (False, True):
        expected = model.generate(torch.tensor(rows), N_NEW, do_sample=is_sampled, seed=3)[:, -N_NEW:].tolist()
        for batch_size in (1, 8):
            lines = (folder / f"97-{batch_size}-{is_sampled}.jsonl").read_text().splitlines()
            assert [json.loads(line) for line in lines] == expected
    assert len({tuple(row) for row in expected}) > 50


@pytest.mark.slow
@pytest.mark.parametrize("n_processes", [2, 3, 4])
def test_files_do_not_depend_on_the_number_of_processes(tmp_path, alone, n_processes):
    folder, lists = alone
    assert run_job("predict_everything", n_processes, tmp_path) == [lists] * n_processes
    for count in COUNTS:
        for batch_size in (1, 8):
            for is_sampled in (False, True):
                name = f"{count}-{batch_size}-{is_sampled}.jsonl"
                assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
                assert (folder / name).read_bytes().count(b"\n") == count
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.slow
def test_processes_meet_once(tmp_path):
    """However many batches there are, and however slow one process is."""
    assert run_job("count_collectives", 2, tmp_path) == [1, 1]


@pytest.mark.slow
def test_a_killed_run_goes_on_with_any_number_of_processes(tmp_path, alone):
    with pytest.raises(AssertionError):
        run_job("predict_and_die", 2, tmp_path, dies_after=4)
    parts = list((tmp_path / "out.jsonl.parts").glob("*.jsonl"))
    n_done = sum(part.read_text().count("\n") for part in parts)
    assert n_done >= 12  # of process 1 alone
    assert not (tmp_path / "out.jsonl").exists()
    assert sum(run_job("predict_and_die", 3, tmp_path, dies_after=None)) == 40 - n_done
    whole = run_job("predict_and_die", 1, tmp_path / "whole", dies_after=None)
    assert whole == [40]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole" / "out.jsonl").read_bytes()


MEGATRON = [
    [r"attn\.c_attn\.weight", 0],
    [r"attn\.c_proj\.weight", 1],
    [r"mlp\.c_fc\.", 0],
    [r"mlp\.c_proj\.weight", 1],
]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [[1, 2], [2, 2]])
@pytest.mark.parametrize("rules", [MEGATRON, [["wte|wpe|lm_head|ln_", 0]], [["weight", 0]]])
def test_a_split_model_gives_the_logits_of_a_whole_one(tmp_path, shape, rules):
    for result in run_job("split_model", shape[0] * shape[1], tmp_path, shape=shape, rules=rules):
        assert result["difference"] < 1e-5
        assert result["names"]
        assert result["share"] < 0.55  # of what is split, a process has its half
        assert result["same"]


@pytest.mark.slow
def test_a_rule_that_matches_nothing_is_an_error(tmp_path):
    with pytest.raises(AssertionError, match="no parameter's name matches the rule 'attention'"):
        run_job("split_model", 2, tmp_path, shape=[1, 2], rules=[["attention", 0]])
