"""Tasks over text: each maps a short text to a short text, and they compose with ``+`` as the tasks on rows do.

A task says which kind of text it reads (``reads``) and which it writes (``output_kind``), as a task on rows says its
values. So a composition in which a later task would meet a text of another kind is refused when it is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import ClassVar, cast

import numpy as np

from mingpt.algebra import AnyTask

KINDS = {
    "letters": r"[a-z]+",
    "words": r"[a-z]+( [a-z]+)*",
    "capitals": r"[A-Z]+",
    "number": r"\d+",
    "sum": r"\d+\+\d+",
    "pairs": r"([a-z]\d )+[a-z]",
    "brackets": r"[()\[\]{}]+",
    "closing": r"[)\]}]*",
    "text": r"[ -~]+",
}
"""The kinds of text, and the regular expression that a text of each kind matches as a whole."""

_WIDER = {"letters": {"words"}}  # beside "text", which every text is

_WORDS = (
    "act add age air all and any ape arm art ask axe bag ball band bank bat bed bell bird blue boat body bone book "
    "box bread cake call camp card cat chin city coat code cold cow cup dark day desk dog door dust eagle ear earth "
    "egg end face farm fire fish flag flat fox frog game gate gold good green hand hat hill home ice iron jar jump "
    "key king lake lamp leaf lion milk moon name nest nine nose oak oil one owl page pear pen pig rain red ring "
    "road rock salt sand sea ship snow song star sun tea ten tree two wall wave west wind wolf wood yard year zoo"
)
WORDS = tuple(_WORDS.split())
"""What texts of words are drawn from."""

_CLOSING = dict(zip("([{", ")]}", strict=True))


class RandomText:
    """Random numbers for the texts of one block: numpy's counter-based Philox, the same on every machine."""

    def __init__(self, bits: np.random.Philox):
        self._bits, self._words = bits, cast(Iterator[int], iter(()))

    def below(self, n: int) -> int:
        """An integer from 0 to n - 1, uniform up to n / 2^32."""
        for word in self._words:
            return ((word >> 32) * n) >> 32
        self._words = iter(self._bits.random_raw(1024).tolist())
        return self.below(n)

    def between(self, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[str]) -> str:
        """One of the items."""
        return items[self.below(len(items))]

    def letters(self, low: int, high: int) -> str:
        """From ``low`` to ``high`` lower-case letters; every second time from few different ones."""
        n, few = self.between(low, high), 26 if self.below(2) else 4
        start = self.below(26)
        return "".join(chr(97 + (start + 7 * self.below(few)) % 26) for _ in range(n))

    def distinct_letters(self, n: int) -> str:
        """n different lower-case letters."""
        left = [chr(97 + number) for number in range(26)]
        return "".join(left.pop(self.below(len(left))) for _ in range(n))

    def words(self, low: int, high: int) -> str:
        """From ``low`` to ``high`` words with a space between them."""
        return " ".join(self.choice(WORDS) for _ in range(self.between(low, high)))


class TextTask(AnyTask):
    """A function on short texts; subclass it and write ``solve`` to add one.

    Tasks are values with names, and compose with ``+``: see ``mingpt.algebra``.
    """

    reads: ClassVar[str] = "letters"
    """The kind of text that it is defined on, see ``KINDS``."""

    writes: ClassVar[str | None] = None
    """The kind of text that ``solve`` gives; None where that is the kind it was given."""

    def draw(self, rng: RandomText) -> str:
        """A text that the task is posed on; from the kind that it reads, if a subclass does not say otherwise."""
        return _draw(self.reads, rng)

    def solve(self, text: str) -> str:
        """The answer to a text of the kind that the task reads."""
        raise TypeError(f"{type(self).__name__} must define solve(self, text)")

    def output_kind(self, kind: str) -> str:
        """The kind of the answer to a text of ``kind``.

        Raises:
            ValueError: if the task is not defined on every text of that kind; the message is the reason.
        """
        if kind != self.reads and self.reads != "text" and self.reads not in _WIDER.get(kind, ()):
            raise ValueError(f"it reads {self.reads}, and its input can be any {kind}")
        return self.writes or kind

    def __call__(self, text: str) -> str:
        """Solve one text.

        Raises:
            TypeError: if it is no text.
            ValueError: if it is not of the kind that the task reads.
        """
        if not isinstance(text, str):
            raise TypeError(f"{self} works on text, got {type(text).__name__}")
        if not re.fullmatch(KINDS[self.reads], text):
            raise ValueError(f"{self} reads {self.reads} ({KINDS[self.reads]}), got {text!r}")
        return self.solve(text)


class CompositeTextTask(TextTask):
    """Several text tasks in a row; made with ``+``, flat, and checked when it is built."""

    _composite = TextTask

    def __init__(self, *tasks: TextTask):
        """Compose ``tasks``, the first one first.

        Raises:
            ValueError: if a later one would meet a text of a kind that it does not read.
        """
        if not tasks:
            raise ValueError("a composition needs at least one task")
        self.tasks = tuple(simple for task in tasks for simple in task.tasks)
        self.reads = self.tasks[0].reads  # pyright: ignore[reportAttributeAccessIssue]
        self.output_kind(self.reads)

    def draw(self, rng: RandomText) -> str:
        return self.tasks[0].draw(rng)

    def solve(self, text: str) -> str:
        for task in self.tasks:
            text = task.solve(text)
        return text

    def output_kind(self, kind: str) -> str:
        for before, task in zip(("the input", *self.tasks), self.tasks, strict=False):
            try:
                kind = task.output_kind(kind)
            except ValueError as reason:
                raise ValueError(f"{self} is not defined: after {before}, {task} cannot follow, {reason}") from None
        return kind


# ---------------------------------------------------------------------------------------------------- of letters


class Copy(TextTask):
    """The text itself."""

    def solve(self, text):
        return text


class Reverse(TextTask):
    """The text from its end to its beginning."""

    def solve(self, text):
        return text[::-1]


class SortLetters(TextTask):
    """The letters in the order of the alphabet."""

    def solve(self, text):
        return "".join(sorted(text))


class NextLetter(TextTask):
    """Each letter's next one in the alphabet; "a" follows "z"."""

    def solve(self, text):
        return text.translate(_NEXT)


class Upper(TextTask):
    """The letters as capitals."""

    writes = "capitals"

    def solve(self, text):
        return text.upper()


class RotateLetters(TextTask):
    """The first letter put behind the others."""

    def solve(self, text):
        return text[1:] + text[0]


class EveryOtherLetter(TextTask):
    """The first letter, the third, the fifth, ..."""

    def solve(self, text):
        return text[::2]


# ------------------------------------------------------------------------------------------------------ of words


class SortWords(TextTask):
    """The words in the order of the dictionary."""

    reads = "words"

    def solve(self, text):
        return " ".join(sorted(text.split()))


class CountWords(TextTask):
    """How many words there are."""

    reads, writes = "words", "number"

    def solve(self, text):
        return str(len(text.split()))


class FirstLetters(TextTask):
    """Each word's first letter."""

    reads, writes = "words", "letters"

    def solve(self, text):
        return "".join(word[0] for word in text.split())


# ------------------------------------------------------------------------------------------------- of other kinds


class Recall(TextTask):
    """The digit that stands behind the last letter where it came first: ``"a3 k7 c1 k"`` gives ``"7"``."""

    reads, writes = "pairs", "number"

    def solve(self, text):
        *pairs, key = text.split()
        return next((pair[1:] for pair in pairs if pair[0] == key), "0")


class CloseBrackets(TextTask):
    """The brackets that close those still open: ``"([]{"`` gives ``"})"``. One that closes none is passed over."""

    reads, writes = "brackets", "closing"

    def solve(self, text):
        still_open: list[str] = []
        for bracket in text:
            if bracket in _CLOSING:
                still_open.append(_CLOSING[bracket])
            elif still_open and still_open[-1] == bracket:
                still_open.pop()
        return "".join(reversed(still_open))


class AddNumbers(TextTask):
    """The sum of two numbers: ``"27+5"`` gives ``"32"``."""

    reads, writes = "sum", "number"

    def solve(self, text):
        return str(sum(map(int, text.split("+"))))


_NEXT = str.maketrans("abcdefghijklmnopqrstuvwxyz", "bcdefghijklmnopqrstuvwxyza")


def _draw(kind: str, rng: RandomText) -> str:
    """A text of a kind."""
    if kind == "letters" or kind == "text":
        return rng.letters(3, 7)
    if kind == "capitals":
        return rng.letters(3, 7).upper()
    if kind == "words":
        return rng.words(1, 4)
    if kind == "number":
        return str(rng.below(100))
    if kind == "sum":
        return f"{rng.below(100)}+{rng.below(100)}"
    if kind == "pairs":
        keys = rng.distinct_letters(rng.between(2, 4))
        return "".join(f"{key}{rng.below(10)} " for key in keys) + rng.choice(keys)
    if kind == "brackets":
        return _brackets(rng)
    raise ValueError(f"unknown kind of text {kind!r}; the kinds are {', '.join(KINDS)}")


def _brackets(rng: RandomText) -> str:
    """From 2 to 7 brackets, of which at least one is still open and each that closes closes the last one."""
    text, still_open = "", []
    for n_left in range(rng.between(2, 7), 0, -1):
        if still_open and n_left > 1 and rng.below(3) == 0:
            text += still_open.pop()
        else:
            text += (opening := rng.choice("([{"))
            still_open.append(_CLOSING[opening])
    return text


SIMPLE_TEXT_TASKS = tuple(cls() for cls in TextTask.classes().values())
"""The thirteen tasks that compositions are made of."""

TEXT_PRETRAINING_TASKS = (
    *(each for each in SIMPLE_TEXT_TASKS if not isinstance(each, RotateLetters | EveryOtherLetter)),
    *(Reverse() + Upper(), SortLetters() + Reverse(), NextLetter() + Upper(), SortWords() + FirstLetters()),
)
"""The tasks whose demonstrations the language model is pretrained on: eleven simple ones and four compositions."""

TEXT_TEST_TASKS = (
    *(SortLetters() + Upper(), NextLetter() + Reverse(), FirstLetters() + Upper()),
    *(RotateLetters(), EveryOtherLetter()),
)
"""Tasks that the language model is not pretrained on: three compositions of known ones, and two new ones."""
