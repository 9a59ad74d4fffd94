"""Tokenizers: characters by default, or any file of the library ``tokenizers`` (extra ``hf``)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Tokenizer(Protocol):
    """What a text dataset needs of a tokenizer. Token 0 is padding, which no text contains."""

    vocab_size: int

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str: ...

    def describe(self) -> dict[str, Any]: ...


class CharacterTokenizer:
    """A token for each printable character of ASCII and the end of a line: 97 tokens, 0 for padding."""

    characters = "\n" + "".join(map(chr, range(32, 127)))
    vocab_size = 1 + len(characters)

    def __init__(self) -> None:
        self._tokens = bytes(max(0, self.characters.find(chr(code)) + 1) for code in range(256))

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, (T,) of uint8.

        Raises:
            ValueError: for a character that has no token.
        """
        tokens = text.encode("latin-1", errors="replace").translate(self._tokens)
        if 0 in tokens or not text.isascii():
            unknown = next(each for each in text if each not in self.characters)
            raise ValueError(f"{unknown!r} has no token; the characters are printable ASCII and the end of a line")
        return np.frombuffer(tokens, dtype=np.uint8)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of tokens; padding gives nothing."""
        return "".join(self.characters[token - 1] for token in tokens if token)

    def describe(self) -> dict[str, Any]:
        """What identifies the tokenizer, as JSON values."""
        return {"tokenizer": "characters"}


CHARACTERS = CharacterTokenizer()
"""The default."""


class FileTokenizer:
    """A ``tokenizer.json`` of the library ``tokenizers``, whose tokens are moved up by one to leave 0 for padding."""

    def __init__(self, file: str | Path):
        """Read the file.

        Raises:
            ValueError: if it is no such file.
        """
        import tokenizers

        content = Path(file).read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{file} is no tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._checksum = hashlib.blake2b(content, digest_size=16).hexdigest()
        self.vocab_size = 1 + self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, (T,) of int64, without those that begin or end a document."""
        return 1 + np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of tokens; padding gives nothing."""
        return self._tokenizer.decode([int(token) - 1 for token in tokens if token], skip_special_tokens=False)

    def describe(self) -> dict[str, Any]:
        """What identifies the tokenizer, as JSON values."""
        return {"tokenizer": self._checksum}
