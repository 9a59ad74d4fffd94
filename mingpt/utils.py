"""Seeds, configurations and the bookkeeping of a script's run."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import random
import re
import sys
import textwrap
import warnings
from ast import literal_eval
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch


def set_seed(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators.

    The datasets do not depend on it: their rows are a function of their own arguments.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the global generator is the one to seed)
    torch.manual_seed(seed)


def derived_seed(seed: int, name: object) -> int:
    """A seed below 2^56 for one of several things that share ``seed``: a hash of it and of the thing's name."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "little")


def setup_logging(config: CfgNode) -> None:
    """Write the command line and the configuration into ``config.system.work_dir``.

    Args:
        config: has ``system.work_dir``, the folder to write ``args.txt`` and ``config.json`` to.
    """
    work_dir = Path(config.system.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    (work_dir / "args.txt").write_text(" ".join(sys.argv))
    (work_dir / "config.json").write_text(json.dumps(config.to_dict(), indent=4))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name closest to ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def match_rules(
    rules: Iterable[str], names: Iterable[str], kind: str, is_match: Callable[[str, str], object] = re.search
) -> dict[str, int]:
    """Find the rule that holds for each name: the first that matches it.

    Args:
        rules: regular expressions that are searched for in a name, or what ``is_match`` takes.
        names: of layers or parameters.
        kind: what the names are of, for the message.
        is_match: whether a rule, its first argument, matches a name.

    Returns:
        The number of its rule for each name that has one.

    Raises:
        ValueError: for a rule that matches no name.
    """
    names, numbers = list(names), {}
    for number, rule in enumerate(rules):
        matching = [name for name in names if is_match(rule, name)]
        if not matching:
            there_are = f"there are {names[0]} ... {names[-1]}" if names else "there are none"
            raise ValueError(f"no {kind}'s name matches the rule {rule!r}{nearest(rule, names)}; {there_are}")
        numbers = dict.fromkeys(matching, number) | numbers
    return numbers


class CfgNode:
    """A configuration that knows its keys: attributes in a fixed set, nested nodes allowed.

    The keys are those given to the constructor and those set while the node is open, as minGPT's scripts build their
    nodes attribute by attribute. ``close()`` ends that. A closed node keeps an unknown key, so that old scripts run,
    and warns with the nearest known key.

    Assigning an attribute is free. What comes from outside is checked: ``override``, ``merge_from_args`` and
    ``update_from`` accept only known keys and values of the type that the key's default has.
    """

    def __init__(self, **kwargs: Any):
        self.__dict__.update(_defaults=None, _choices={}, **kwargs)  # the defaults are the values when it was closed

    def close(self, **choices: Sequence[Any]) -> CfgNode:
        """Fix the set of keys and their defaults; a new key set after this is warned about.

        Args:
            choices: the only values that some keys take, ``close(progress=("auto", True, False))``. Any other key
                takes values of its default's type, and any value where the default is None.

        Returns:
            The node itself.
        """
        self.__dict__.update(_defaults=self.to_dict(), _choices=choices)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if self._defaults is not None and name not in self.__dict__:
            known = f"{nearest(name, self._defaults)}. Known: {', '.join(self._defaults)}"
            warnings.warn(f"unknown configuration key {name!r} has no effect{known}", stacklevel=2)
        self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the configuration has no key {name!r}{nearest(name, self.__dict__)}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CfgNode) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return "".join(
            f"{key}:\n{textwrap.indent(str(value), '    ')}" if isinstance(value, CfgNode) else f"{key}: {value}\n"
            for key, value in self._items()
        )

    def _items(self) -> list[tuple[str, Any]]:
        return [(k, v) for k, v in self.__dict__.items() if k not in ("_defaults", "_choices")]

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as nested dictionaries."""
        return {k: v.to_dict() if isinstance(v, CfgNode) else v for k, v in self._items()}

    def copy(self) -> CfgNode:
        """Return a copy whose nested nodes and values are copies too."""
        return copy.deepcopy(self)

    def changed(self, values: Mapping[str, Any]) -> CfgNode:
        """A copy with some dotted keys overridden, ``changed({"trainer.max_iters": 10})``; see ``override``."""
        other = self.copy()
        for key, value in values.items():
            other.override(key, value)
        return other

    def merge_from_dict(self, values: Mapping[str, Any]) -> None:
        """Set each key to its value, as assignment would."""
        for key, value in values.items():
            setattr(self, key, value)

    def override(self, key: str, value: Any) -> None:
        """Set a dotted key that must exist, ``override("trainer.max_iters", 10)``.

        The value is stored in the type of the key's default, or of its value where the default is None: an integer
        becomes a float, an integral float an integer, a list a tuple. A key whose default is None or text takes None.

        Raises:
            ValueError: for an unknown key, with the nearest known one, or a value of another type.
        """
        node, leaf, default, takes_none = self._find(key)
        choices = node._choices.get(leaf)
        try:
            if choices:
                value = next(choice for choice in choices if repr(choice) == repr(value))
            elif value is not None or not takes_none:
                value = _of_type(value, default)
        except (StopIteration, TypeError, ValueError):
            expected = f"one of {', '.join(map(str, choices))}" if choices else _NAMES.get(type(default))
            raise ValueError(f"configuration key {key!r} takes {expected}, got {value!r}") from None
        node.__dict__[leaf] = value

    def merge_from_args(self, args: Iterable[str]) -> None:
        """Apply command-line overrides, ``--model.n_layer=10``.

        true, false and none are read as Python's True, False and None are. A key whose default is text takes the text
        as it stands; only ``None``, as Python writes it, is None there.

        Raises:
            ValueError: for an argument that is not ``--key=value``, an unknown key, or a value of another type than
                the key's default.
        """
        for arg in args:
            key, equals, text = arg.partition("=")
            if not equals or not key.startswith("--"):
                raise ValueError(f"expected an override of the form --key=value, got {arg!r}")
            node, leaf, default, _ = self._find(key[2:])
            is_text = isinstance(default, str) and leaf not in node._choices and text != "None"
            self.override(key[2:], text if is_text else parse_value(text))

    def update_from(self, values: Mapping[str, Any], source: str, group: str = "") -> None:
        """Set the keys of nested dictionaries, as a saved configuration has them; other keys keep their values.

        Args:
            values: as ``to_dict`` gives them, also after a journey through JSON.
            source: where they come from, for error messages.
            group: what each key begins with, such as "trainer.".

        Raises:
            ValueError: for an unknown key or a value of another type, naming ``source``, the key and the value.
        """
        for key, value in values.items():
            if isinstance(value, Mapping):
                self.update_from(value, source, f"{group}{key}.")
                continue
            try:
                self.override(f"{group}{key}", value)
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None

    def _find(self, key: str) -> tuple[CfgNode, str, Any, bool]:
        """The node that a dotted key is in, the key's last part, a value of its type, and whether it takes None."""
        node, value, name, group = self, self, "", ""
        for name in key.split("."):
            known = value.to_dict() if isinstance(value, CfgNode) else {}
            if name not in known:
                here = f"{self._nearest(key, group)}. Known here: {', '.join(known) or 'none'}"
                raise ValueError(f"unknown configuration key {key!r}{here}")
            group += f"{name}."
            node, value = value, getattr(value, name)
        if isinstance(value, CfgNode):
            raise ValueError(f"configuration key {key!r} is a group; set one of {', '.join(value.to_dict())}")
        declared = (node._defaults or node.__dict__).get(name)
        return node, name, value if declared is None else declared, isinstance(declared, str | None)

    def _nearest(self, key: str, group: str) -> str:
        """As ``nearest``, for a dotted key that is wrong after ``group``: all known ones with the nearest last part."""
        known = [name for name in self._keys() if name.startswith(group)]
        parts = [name.rpartition(".")[2] for name in known]
        close = difflib.get_close_matches(key.rpartition(".")[2], parts, n=1, cutoff=0.5)
        found = [repr(name) for name, part in zip(known, parts, strict=True) if part in close]
        return f" (did you mean {' or '.join(found)}?)" if found else ""

    def _keys(self, group: str = "") -> Iterator[str]:
        """Every dotted key, also of groups."""
        for name, value in self._items():
            yield group + name
            if isinstance(value, CfgNode):
                yield from value._keys(f"{group}{name}.")


_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", tuple: "a list of as many values"}


def _of_type(value: Any, default: Any) -> Any:
    """``value`` in the type of ``default``; a TypeError or ValueError where that would lose something."""
    kind = type(default)
    if kind is tuple:
        return tuple(_of_type(*pair) for pair in zip(value, default, strict=True))
    is_number = issubclass(type(value), Real) and type(value) is not bool
    if is_number and (kind is float or (kind is int and value % 1 == 0)):
        return kind(value)
    if kind not in (type(value), type(None)):
        raise TypeError
    return value


def parse_value(text: str) -> Any:
    """Read true, false, none or a Python literal (``3``, ``1e-3``, ``[1, 2]``, ``True``); other text stays a string."""
    try:
        return literal_eval({"true": "True", "false": "False", "none": "None"}.get(text, text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
