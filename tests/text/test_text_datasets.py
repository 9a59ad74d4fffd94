"""Examples of text tasks: what is in them, what is scored, and that an index alone decides."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from mingpt.datasets import IGNORED, CustomDataset
from mingpt.tasks import Add1
from mingpt.text import CHARACTERS, CorpusDataset, FileTokenizer, MixtureDataset, TextDataset
from mingpt.text.datasets import split_of_text
from mingpt.text.tasks import NextLetter, Reverse, SortWords, Upper
from mingpt.training.batches import JointDataset

TASKS = [Reverse(), SortWords()]


def scored(x: torch.Tensor, y: torch.Tensor, tokenizer=CHARACTERS) -> str:
    return tokenizer.decode(y[y != IGNORED].tolist())


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_an_example_is_demonstrations_and_a_text_whose_answer_is_scored(split, n):
    data = TextDataset(split, TASKS, length=160, n_demonstrations=n, prefix_padding=3)
    for index in (0, 1, 7):
        texts, (x, y) = data.texts(index), data[index]
        assert len(texts) == n + 1
        assert x.shape == y.shape == (163,)
        assert all(answer == TASKS[index % 2](text) for text, answer in texts)
        whole = "".join(f"{text}>{answer}\n" for text, answer in texts)
        assert CHARACTERS.decode(x.tolist()) == whole
        assert scored(x, y) == texts[-1][1] + "\n"
        first = int(torch.nonzero(y != IGNORED)[0])  # the token there is read before the target
        assert CHARACTERS.decode(x[: first + 1].tolist()).endswith(">")
        assert not x[:3].any()
        assert split_of_text(texts[-1][0]) == split
        assert all(split_of_text(text) == "train" for text, _ in texts[:-1])


def test_a_full_example_scores_every_answer_and_is_cut():
    x, y = TextDataset("train", [Reverse()], length=60, n_demonstrations=None)[0]
    text = CHARACTERS.decode(x.tolist()) + CHARACTERS.decode(y[-1:].clamp(min=0).tolist())
    lines = [line.split(">") for line in text.split("\n")]
    assert len(lines) > 2
    assert all(answer == given[::-1] for given, answer in lines[:-1])
    assert scored(x, y).startswith("".join(answer + "\n" for _, answer in lines[:-1]))


def test_an_index_alone_decides():
    data = TextDataset("train", TASKS, length=160, n_demonstrations=2)
    x, y = data.batch([900, 3, 7])
    assert torch.equal(x[1], data[3][0])
    assert torch.equal(y[2], data[7][1])
    assert not torch.equal(x[1], data.with_changes(seed=1)[3][0])
    code = (
        "from mingpt.text import *; from mingpt.text.tasks import *;"
        "print(TextDataset('train', [Reverse(), SortWords()], length=160, n_demonstrations=2).describe()['rows_hash'])"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    described = data.describe()
    assert other.stdout.strip() == described["rows_hash"]
    again = TextDataset.from_description(described)
    assert torch.equal(again.batch([900])[0][0], x[0])
    assert TextDataset.from_description(described, split="test").split == "test"
    with pytest.raises(ValueError, match="a task's code or the tokenizer has changed"):
        TextDataset.from_description(described | {"rows_hash": "0"})


def test_the_splits_have_no_text_in_common_whatever_the_task():
    found = {
        split: {data.texts(index)[-1][0] for index in range(400)}
        for split in ("train", "validation", "test")
        for data in [TextDataset(split, [Reverse(), NextLetter(), Upper(), SortWords()])]
    }
    assert not (found["train"] & found["test"])
    assert not (found["train"] & found["validation"])
    assert not found["validation"] & found["test"]


def test_tasks_on_the_same_texts_differ_in_answers_only():
    one, other = (TextDataset("test", [task]).texts(5)[0] for task in (Reverse(), Reverse() + Upper()))
    assert one[0] == other[0]
    assert one[1].upper() == other[1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tasks": [Add1()]}, TypeError, "list of text tasks"),
        ({"tasks": []}, TypeError, "at least one"),
        ({"split": "dev"}, ValueError, "split must be one of"),
        ({"length": 1}, ValueError, "length must be at least 2"),
        ({"n_demonstrations": -1}, ValueError, "n_demonstrations must be at least 0"),
    ],
)
def test_mistakes_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        TextDataset(**{"split": "train", "tasks": TASKS} | arguments)


def test_an_example_that_is_too_long_is_refused_and_a_negative_index_too():
    with pytest.raises(ValueError, match="length = 12 has room for one more"):
        TextDataset("train", TASKS, length=12).batch(range(50))
    with pytest.raises(IndexError, match="negative"):
        TextDataset("train", TASKS)[-1]


def test_characters_round_trip_and_others_are_named():
    text = "ab Z>{}~\n 09"
    assert CHARACTERS.decode(CHARACTERS.encode(text)) == text
    for unknown in ("é", "\t", "→"):
        with pytest.raises(ValueError, match="has no token"):
            CHARACTERS.encode(f"ab{unknown}")


def test_any_file_of_tokenizers_will_do(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    own = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None, byte_fallback=False))
    own.train_from_iterator(
        ["abc>cba\n"] * 5 + ["".join(map(chr, range(10, 127)))],
        tokenizers.trainers.BpeTrainer(vocab_size=160, initial_alphabet=list(map(chr, range(10, 127)))),
    )
    own.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    data = TextDataset("train", [Reverse()], tokenizer=tokenizer)
    for index in range(20):
        (_, answer), (x, y) = data.texts(index)[0], data[index]
        assert scored(x, y, tokenizer).replace(" ", "").strip() == answer
        assert int(x.max()) < data.get_vocab_size() == tokenizer.vocab_size
    described = data.describe()
    assert described["tokenizer"] != TextDataset("train", [Reverse()]).describe()["tokenizer"]
    assert TextDataset.from_description(described, tokenizer=tokenizer).describe() == described
    with pytest.raises(ValueError, match=r"give it, tokenizer=FileTokenizer\(FILE\)"):
        TextDataset.from_description(described)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json"):
        FileTokenizer(tmp_path / "bad.json")


# ---------------------------------------------------------------------------------------------- corpus and mixture

TEXT = "".join(chr(97 + (7 * i) % 26) if i % 5 else " " for i in range(20_000))


def test_windows_are_of_their_split_and_every_token_is_scored():
    parts = {}
    for split in ("train", "validation", "test"):
        data = CorpusDataset(split, TEXT, length=20)
        x, y = data.batch(range(200))
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert x.shape == (200, 20)
        assert bool((y > 0).all())
        parts[split] = CHARACTERS.decode(data._tokens)
    assert len(parts["test"]) == len(parts["validation"]) == 20_000 // 64
    assert parts["test"] + parts["validation"] + parts["train"] == TEXT
    again = CorpusDataset("train", TEXT, length=20).batch([5])[0]
    assert torch.equal(again[0], CorpusDataset("train", TEXT, length=20).batch([9, 5])[0][1])
    with pytest.raises(ValueError, match="give more text"):
        CorpusDataset("test", TEXT, length=400).batch([0])


def test_a_mixture_keeps_its_shares_and_the_order_of_indices():
    corpus, tasks = CorpusDataset("train", TEXT, length=40), TextDataset("train", TASKS, 40, n_demonstrations=None)
    mixture = MixtureDataset([corpus, tasks], [1, 3])
    x, y = mixture.batch([8, 1, 4, 2, 3])
    for row, (dataset, own) in enumerate([(corpus, 2), (tasks, 0), (corpus, 1), (tasks, 1), (tasks, 2)]):
        expected = dataset.batch([own])
        assert torch.equal(x[row], expected[0][0])
        assert torch.equal(y[row], expected[1][0])
    with pytest.raises(ValueError, match="one size"):
        MixtureDataset([corpus, tasks.with_changes(length=50)], [1, 3])


def test_rows_and_text_do_not_share_batches_when_their_sizes_differ():
    with pytest.raises(ValueError, match="one length"):
        JointDataset([TextDataset("train", TASKS), CustomDataset("train", [Add1()])])
    context = TextDataset("train", TASKS).context(9)
    assert context.shape == (9,)
    assert context.dtype == np.int64
    assert context.all()
