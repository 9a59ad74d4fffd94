"""Text for a language model to read: Python's own documentation, which lies wherever Python does.

It is the language reference that ``help()`` shows (``pydoc_data/topics.py``) and the docstrings of the standard
library.
Python's documentation is under the licence of the Python Software Foundation. The text depends on Python's version, so
a model's file has a checksum of it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mingpt.datasets import check_fits, check_split, integer
from mingpt.text.datasets import TextDataset
from mingpt.text.tokenizers import CHARACTERS, Tokenizer

N_PARTS = 64
"""A corpus is cut into parts, of which the first is for testing and the second for validation."""


@functools.cache
def python_documentation() -> str:
    """The text of this Python's documentation in printable ASCII, about two million characters."""
    from pydoc_data.topics import topics

    library, texts = Path(sysconfig.get_path("stdlib")), [text for _, text in sorted(topics.items())]
    for path in sorted([*library.glob("*.py"), *library.glob("*/*.py")]):
        if any("test" in part or part == "site-packages" for part in path.relative_to(library).parts):
            continue
        try:
            module = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # some are made to be unreadable
        nodes = [each for each in ast.walk(module) if isinstance(each, _DOCUMENTED)]
        texts += [ast.get_docstring(node) or "" for node in nodes]
    return re.sub(r"[^\n -~]", "", "\n\n".join(text for text in texts if text.strip()))


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class CorpusDataset(torch.utils.data.Dataset):
    """Windows of a text, all of whose tokens are scored. Example ``i`` begins at a random place that ``i`` decides."""

    def __init__(
        self,
        split: str,
        text: str | Callable[[], str],
        length: int = 192,
        seed: int = 0,
        tokenizer: Tokenizer = CHARACTERS,
    ):
        """Cut a text into splits.

        Args:
            split: "train", "validation" or "test", which have no character in common.
            text: at least 64 times as long as a window; or a function that is called when the text is needed.
            length: T, tokens of a window.
            seed: of the windows.
            tokenizer: see ``mingpt.text.tokenizers``.

        Raises:
            ValueError: for an unknown split; for a text that is too short, when it is needed.
        """
        check_split(split)
        self.split, self.length, self.seed = split, integer("length", length, 2), integer("seed", seed)
        self.tokenizer, self.prefix_padding = tokenizer, 0
        self._text = text

    @functools.cached_property
    def _tokens(self) -> np.ndarray:
        text = self._text if isinstance(self._text, str) else self._text()
        size = len(text) // N_PARTS
        parts = {"test": (0, size), "validation": (size, 2 * size), "train": (2 * size, len(text))}
        tokens = self.tokenizer.encode(text[slice(*parts[self.split])])
        if len(tokens) <= self.length:
            found = f"the {self.split} split has {len(tokens)} tokens, a window has {self.length}"
            raise ValueError(f"{found}; give more text")
        return tokens

    def batch(self, indices: Sequence[int] | np.ndarray | range) -> tuple[Tensor, Tensor]:
        """Build the examples of these indices: ``x`` and ``y``, (N, T) of int64 each."""
        starts = [
            np.random.Philox(key=self.seed % 2**64, counter=[0, 0, 0, int(index)]).random_raw()
            % (len(self._tokens) - self.length)
            for index in indices
        ]
        windows = torch.from_numpy(
            self._tokens[np.asarray(starts)[:, None] + np.arange(self.length + 1)].astype(np.int64)
        )
        return windows[:, :-1], windows[:, 1:]

    def check_fits(self, vocab_size: int, block_size: int) -> None:
        """Check that a model of these sizes can read every example; see ``CustomDataset.check_fits``."""
        check_fits(self.tokenizer.vocab_size, self.length, vocab_size, block_size)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint records of the data, with a checksum of the text, as JSON values."""
        checksum = hashlib.blake2b(self._tokens.astype("<i8").tobytes(), digest_size=16).hexdigest()
        own = {"split": self.split, "length": self.length, "seed": self.seed, "text": checksum}
        return own | self.tokenizer.describe()


class MixtureDataset(torch.utils.data.Dataset):
    """Several datasets of one length by turns: of each ``sum(shares)`` examples, so many of each."""

    def __init__(self, datasets: Sequence[TextDataset | CorpusDataset], shares: Sequence[int]):
        """Mix ``datasets``, each with an integer share of at least 1.

        Raises:
            ValueError: if there are not as many shares as datasets, or they differ in length or placeholders.
        """
        sizes = {(each.length, each.prefix_padding) for each in datasets}
        if len(sizes) != 1 or len(shares) != len(datasets):
            raise ValueError(f"a mixture needs datasets of one size and as many shares, got {sizes} and {shares}")
        self.datasets, self.shares = tuple(datasets), tuple(integer("shares", each, 1) for each in shares)
        ((self.length, self.prefix_padding),) = sizes
        self._turns = np.repeat(np.arange(len(shares)), self.shares)
        self._own = np.concatenate([np.arange(share) for share in self.shares])

    def batch(self, indices: Sequence[int] | np.ndarray | range) -> tuple[Tensor, Tensor]:
        """Build the examples of these indices, in their order: ``x`` and ``y``, (N, T) of int64 each."""
        rounds, turns = np.divmod(np.asarray(indices, dtype=np.int64), len(self._turns))
        parts: list[tuple[Tensor, Tensor]] = []
        order: list[np.ndarray] = []
        for number, dataset in enumerate(self.datasets):
            rows = np.flatnonzero(self._turns[turns] == number)
            parts.append(dataset.batch(rounds[rows] * self.shares[number] + self._own[turns[rows]]))
            order.append(rows)
        back = torch.from_numpy(np.argsort(np.concatenate(order)))
        return torch.cat([x for x, _ in parts])[back], torch.cat([y for _, y in parts])[back]

    def check_fits(self, vocab_size: int, block_size: int) -> None:
        """Check that each dataset fits a model, as ``CustomDataset.check_fits`` does."""
        for dataset in self.datasets:
            dataset.check_fits(vocab_size, block_size)

    def describe(self) -> dict[str, Any]:
        """Each dataset's description and the shares, as JSON values."""
        return {"mixture": [each.describe() for each in self.datasets], "shares": list(self.shares)}
