"""Examples of text tasks, with or without demonstrations, as a pure function of (seed, split, task, index).

Legend: N examples, P placeholders, T tokens of content, K tasks.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mingpt.datasets import IGNORED, MAX_LENGTH, Examples, check_split, check_tasks, integer
from mingpt.text.tasks import RandomText, TextTask
from mingpt.text.tokenizers import CHARACTERS, Tokenizer

BLOCK_TEXTS = 256
SEPARATOR, END = ">", "\n"
"""What stands between a text and its answer, and behind the answer."""


class TextDataset(Examples):
    """Examples of one or several text tasks as token sequences for a language model.

    Example ``i`` poses ``tasks[i % K]``. It is ``n_demonstrations`` solved examples of that task and one more text,
    each as ``text>answer`` and the end of the line; only the last answer and the end of its line are scored. Behind it
    comes padding, so all examples have T tokens. Demonstrations are texts of the train split, whatever the split is.

    With ``n_demonstrations=None`` an example has as many texts as fit, and every answer is scored: what a language
    model is pretrained on. The last one is cut at T tokens.
    """

    def __init__(
        self,
        split: str,
        tasks: Sequence[TextTask],
        length: int = 64,
        n_demonstrations: int | None = 0,
        prefix_padding: int = 0,
        seed: int = 0,
        size: int = 10_000,
        tokenizer: Tokenizer = CHARACTERS,
    ):
        """Describe the examples; nothing is drawn yet.

        Args:
            split: "train", "validation" or "test"; no text is in two of them, whatever the tasks.
            tasks: at least one; a mixture gives each an equal share.
            length: T, tokens of content.
            n_demonstrations: before the text that is posed; None for as many as fit.
            prefix_padding: how many zeros come before the content, the placeholders of a prefix.
            seed: another seed gives other texts, and the same split.
            size: what ``len`` says.
            tokenizer: see ``mingpt.text.tokenizers``.

        Raises:
            TypeError: if ``tasks`` is not a list of at least one text task, or a number is no integer.
            ValueError: for an unknown split or a number out of range.
        """
        check_split(split)
        check_tasks(tasks, TextTask, "text tasks such as [Reverse()]")
        self.length = integer("length", length, 2, MAX_LENGTH)
        self.n_demonstrations = n_demonstrations
        if n_demonstrations is not None:
            integer("n_demonstrations", n_demonstrations, 0, MAX_LENGTH)
        self.prefix_padding = integer("prefix_padding", prefix_padding, 0, MAX_LENGTH)
        self.seed, self.size = integer("seed", seed), integer("size", size, 1)
        self.split, self.tasks, self.tokenizer = split, tuple(tasks), tokenizer

    def batch(self, indices: Sequence[int] | np.ndarray | range) -> tuple[Tensor, Tensor]:
        """Build the examples of these indices: ``x`` and ``y``, (N, P + T) of int64 each.

        Raises:
            IndexError: for a negative index.
            ValueError: if an example with its demonstrations has more than ``length + 1`` tokens.
        """
        start = self.prefix_padding
        sequence = np.zeros((len(indices), start + self.length + 1), dtype=np.int64)
        is_scored = np.zeros(sequence.shape, dtype=bool)
        for row, index in enumerate(indices):
            if index < 0:
                raise IndexError(f"index {index} is negative; a dataset's examples are numbered from 0 on without end")
            at, examples = start, self.texts(int(index))
            for number, example in enumerate(examples, start=1):
                is_posed = self.n_demonstrations is None or number == len(examples)
                for part, end in zip(example, (SEPARATOR, END), strict=True):
                    tokens = self.tokenizer.encode(part + end)
                    sequence[row, at : at + len(tokens)] = tokens[: max(0, sequence.shape[1] - at)]
                    is_scored[row, at : at + len(tokens)] = is_posed and end == END
                    at += len(tokens)
            if self.n_demonstrations is not None and at > sequence.shape[1]:
                sizes = f"example {index} has {at - start} tokens, and length = {self.length}"
                raise ValueError(f"{sizes} has room for one more than that; raise length")
        y = np.where(is_scored, sequence, IGNORED)[:, 1:]
        return torch.from_numpy(sequence[:, :-1].copy()), torch.from_numpy(y)

    def texts(self, index: int) -> list[tuple[str, str]]:
        """The texts of an example with their answers, demonstrations first."""
        task, own = self.tasks[index % len(self.tasks)], index // len(self.tasks)
        if (n := self.n_demonstrations) is None:
            n = max(2, self.length // 12)  # an example takes about 12 characters
            return [_text(task, self.seed, self.split, n * own + k) for k in range(n)]
        demonstrations = [_text(task, self.seed, "demonstrations", n * own + k) for k in range(n)]
        return [*demonstrations, _text(task, self.seed, self.split, own)]

    def context(self, n_tokens: int) -> np.ndarray:
        """Tokens that show what the tasks are, (n_tokens,) of int64: demonstrations one after the other, cut."""
        shown = self.with_changes(split="train", length=n_tokens, n_demonstrations=None, prefix_padding=0)
        return shown.batch([0])[0][0].numpy()

    def get_vocab_size(self) -> int:
        """How many tokens the tokenizer has."""
        return self.tokenizer.vocab_size

    def get_block_size(self) -> int:
        """P + T, how many tokens the model reads."""
        return self.prefix_padding + self.length

    def with_split(self, split: str) -> TextDataset:
        """The dataset of another split that is otherwise the same."""
        return self.with_changes(split=split)

    def with_changes(self, **changes: Any) -> TextDataset:
        """The dataset with other arguments."""
        own = {name: getattr(self, name) for name in (*_NUMBERS, "split", "tasks", "tokenizer")}
        return type(self)(**own | changes)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint records of the data, with a checksum of its first examples, as JSON values."""
        x, y = self.batch(range(16 * len(self.tasks)))
        rows = hashlib.blake2b(torch.stack([x, y]).numpy().astype("<i8").tobytes(), digest_size=16).hexdigest()
        own = {name: getattr(self, name) for name in _NUMBERS}
        names = {"split": self.split, "tasks": list(map(str, self.tasks))}
        return names | own | self.tokenizer.describe() | {"rows_hash": rows}

    @classmethod
    def from_description(cls, description: Mapping[str, Any], **changes: Any) -> TextDataset:
        """Build the dataset that ``describe`` described, with ``changes`` to its arguments.

        Without changes, but for the tokenizer, its first examples are checked.

        Raises:
            ValueError: if its tokenizer is a file, which must be given as ``tokenizer``, or the examples are not those.
        """
        arguments = {name: value for name, value in description.items() if name != "rows_hash"}
        arguments["tasks"] = [TextTask.parse(name) for name in arguments["tasks"]]
        if (name := arguments.pop("tokenizer")) != CHARACTERS.describe()["tokenizer"] and "tokenizer" not in changes:
            raise ValueError(f"its tokenizer is a file with the hash {name}; give it, tokenizer=FileTokenizer(FILE)")
        dataset = cls(**arguments | changes)
        if changes.keys() <= {"tokenizer"} and dataset.describe() != dict(description):
            names = ", ".join(description["tasks"])
            raise ValueError(f"{names}: not the texts described; a task's code or the tokenizer has changed")
        return dataset

    def __repr__(self) -> str:
        return f"TextDataset({self.split!r}, {[*self.tasks]}, {', '.join(f'{k}={getattr(self, k)}' for k in _NUMBERS)})"


_NUMBERS = ("length", "n_demonstrations", "prefix_padding", "seed", "size")


def _text(task: TextTask, seed: int, stream: str, index: int) -> tuple[str, str]:
    """The text of this number in a task's stream, and its answer."""
    return _block(task, seed, stream, index // BLOCK_TEXTS)[index % BLOCK_TEXTS]


@functools.lru_cache(maxsize=4096)
def _block(task: TextTask, seed: int, stream: str, number: int) -> list[tuple[str, str]]:
    """Block ``number`` of a stream: texts of one split, those of demonstrations are for training."""
    name = json.dumps(["text", 1, str(task.tasks[0]), seed, stream])
    key = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=16).digest(), dtype="<u8")
    rng = RandomText(np.random.Philox(key=key, counter=[0, 0, 0, number]))
    split, found = ("train" if stream == "demonstrations" else stream), []
    for _ in range(1000 * BLOCK_TEXTS):
        text = task.draw(rng)
        if split_of_text(text) == split:
            found.append((text, task.solve(text)))
            if len(found) == BLOCK_TEXTS:
                return found
    raise ValueError(f"{task} has too few texts for the {split} split; let it draw from more")


def split_of_text(text: str) -> str:
    """The split that a text belongs to: a stable hash of it says so, a quarter for test, a sixteenth for validation."""
    number = hashlib.blake2b(text.encode(), digest_size=1).digest()[0]
    return "test" if number % 4 == 0 else "validation" if number % 16 == 1 else "train"
