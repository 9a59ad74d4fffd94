"""The small language model: trained once, scored in context, and what a study of text tasks comes to."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from mingpt.adapters import METHODS
from mingpt.evaluation import evaluate
from mingpt.experiments import Study, get_default_config, pipeline, run_study
from mingpt.experiments.language_model import in_context_scores, pretrain_language_model, smallest_caches
from mingpt.experiments.sweep import read_model
from mingpt.model import GPT
from mingpt.prefix import as_key_value
from mingpt.storage.files import CheckpointError
from mingpt.text import CHARACTERS, TextDataset
from mingpt.text.tasks import CountWords, Reverse, SortWords
from mingpt.trainer import PrefixTrainer, Trainer
from mingpt.utils import set_seed


def small_config(max_iters: int = 2):
    config = get_default_config("text")
    config.model.merge_from_dict({"n_layer": 1, "n_head": 2, "n_embd": 16})
    config.trainer.merge_from_dict({"max_iters": max_iters, "batch_size": 4, "progress": False})
    config.prefix.merge_from_dict({"max_iters": 2, "progress": False})
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "text"
    pretrain_language_model(small_config(), folder)
    return folder


@pytest.fixture(scope="module")
def counts():
    """A model that counts words in some of the texts."""
    set_seed(0)
    config = GPT.get_default_config()
    config.merge_from_dict({"model_type": "gpt-nano", "vocab_size": CHARACTERS.vocab_size, "block_size": 64})
    model = GPT(config)
    settings = Trainer.get_default_config()
    settings.merge_from_dict({"max_iters": 10, "batch_size": 16, "learning_rate": 3e-3, "progress": False})
    Trainer(settings, model, TextDataset("train", [CountWords()], length=32)).run()
    return model.eval()


def is_right(model: GPT, text: str, solution: str) -> bool:
    """Whether the greedy answer to one text, token by token, is its solution and the end of the line."""
    tokens, expected = CHARACTERS.encode(text + ">").tolist(), CHARACTERS.encode(solution + "\n").tolist()
    for _ in expected:
        tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    return tokens[-len(expected) :] == expected


@torch.no_grad()
def test_evaluation_in_one_pass_is_that_of_answers_written_out(counts):
    data = TextDataset("test", [CountWords()], length=32)
    score = evaluate(counts, data, n_rows=60, precision="float32")
    assert score.n_correct == sum(is_right(counts, *data.texts(index)[0]) for index in range(60))
    assert 0.1 < score.accuracy < 0.9, "of a model that is always right, or never, the test would say nothing"
    assert score.by_position[-1] == pytest.approx(score.accuracy)
    assert list(score.by_position) == sorted(score.by_position, reverse=True)
    with pytest.raises(ValueError, match="n_rows must be at least 1"):
        evaluate(counts, data, n_rows=0)


def test_a_prefix_learns_a_text_task_and_leaves_the_model_alone(counts):
    before = {name: each.clone() for name, each in counts.state_dict().items()}
    data = TextDataset("train", [Reverse() + Reverse()], length=32, prefix_padding=4)
    prefix = torch.randn(3, 2, 4, 48).requires_grad_()
    settings = Trainer.get_default_config()
    settings.merge_from_dict({"max_iters": 1, "batch_size": 8, "learning_rate": 0.1, "progress": False})
    losses = []
    for max_iters in (1, 150):
        settings.max_iters = max_iters
        trainer = PrefixTrainer(settings, counts, data, prefix)
        trainer.run()
        losses.append(trainer.loss.item())
    assert losses[1] < losses[0] - 0.1
    assert all(torch.equal(each, before[name]) for name, each in counts.state_dict().items())
    with pytest.raises(ValueError, match="prefix_padding has 3"):
        evaluate(counts, data.with_changes(prefix_padding=3), prefix)


def test_a_cartridge_begins_as_the_cache_of_demonstrations(counts):
    data = TextDataset("train", [Reverse()], length=32, prefix_padding=8)
    cartridge = METHODS["cartridge"](counts, data, 8)
    context, first = data.context(8), data.with_changes(n_demonstrations=None, length=8).texts(0)[0]
    assert CHARACTERS.decode(context.tolist()) == f"{first[0]}>{first[1]}\n"[:8].ljust(8, "?")[:8]
    embeddings = counts.transformer.wte(torch.from_numpy(context))
    assert torch.equal(cartridge.prefix().values[0], as_key_value(counts, embeddings))


def test_it_is_trained_once_and_other_settings_are_refused(run):
    model, seconds = pretrain_language_model(small_config(), run)
    again, same = pretrain_language_model(small_config(), run)
    assert seconds == same > 0
    assert all(torch.equal(each, again.state_dict()[name]) for name, each in model.state_dict().items())
    with pytest.raises(CheckpointError, match="max_iters"):
        pretrain_language_model(small_config(max_iters=3), run)
    with pytest.raises(ValueError, match="mingpt pretrain --preset text"):
        pipeline.pretrain(small_config(), run)


def test_scores_in_context_are_of_what_fits(run):
    model, _ = pretrain_language_model(small_config(), run)
    found = in_context_scores(model, [Reverse(), SortWords()], [0, 1, 6], n_rows=30)
    assert found.groupby("task")["n_demonstrations"].agg(list).to_dict() == {"Reverse": [0, 1, 6], "SortWords": [0, 1]}
    assert found.loc[found["n_demonstrations"] == 0, "cache_size"].tolist() == [0, 0]
    data = TextDataset("test", [Reverse()], 128, 1)
    shown = [sum(map(len, data.texts(index)[0])) + 2 for index in range(30)]
    assert found.loc[1, "cache_size"] == pytest.approx(sum(shown) / 30)


def test_the_smallest_cache_is_the_first_that_is_as_good():
    context = pd.DataFrame(
        {
            "task": "Copy",
            "n_demonstrations": [0, 1, 2, 4],
            "cache_size": [0, 12, 24, 48],
            "accuracy": [0.1, 0.8, 0.955, 0.96],
        }
    )
    results = pd.DataFrame(
        {
            "task": "Copy",
            "method": ["a"] * 4 + ["b"],
            "size": [1, 1, 4, 8, 1],
            "accuracy": [0.9, 0.92, 0.951, 0.99, 0.5],
        }
    )
    row = smallest_caches(context, results).loc["Copy"]
    assert row["in context"] == 24
    assert row["a"] == 4
    assert np.isnan(row["b"])


def test_a_study_of_text_tasks(run, tmp_path, monkeypatch):
    study = Study(
        tmp_path / "study", [str(run)], ["cartridge", "lora-attention"], ["Reverse", "Reverse+Upper"], [0], [0.3], [2],
        sizes={"cartridge": [3], "lora-attention": [1]}, prefix={"batch_size": 2}, n_rows=10, keep=True,
    )  # fmt: skip
    table = run_study(study, n_processes=1)
    assert table["n_rows"].eq(10).all()
    assert len(table) == 4
    assert table["loss"].notna().all()
    model = read_model(str(run))[0]
    for cell, loss in zip(study.cells, table["loss"], strict=True):  # what was kept is what was scored
        rows = study.data(cell).with_split("validation").batch(range(10))
        with torch.no_grad(), study.adapter(cell).attached() as prefix:
            assert model(*rows, prefixes=prefix)[1].item() == pytest.approx(loss, abs=1e-6)
