"""Seeds, configurations and the bookkeeping of a script's run."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import random
import re
import sys
import warnings
from ast import literal_eval
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch


def set_seed(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators.

    The datasets do not depend on it: their rows are a function of their own arguments.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the global one is what is to be seeded)
    torch.manual_seed(seed)


def derived_seed(seed: int, name: object) -> int:
    """A seed, below 2^56, for one of several things that share ``seed``: a hash of it and of the thing's name."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "little")


def setup_logging(config: CfgNode) -> None:
    """Write the command line and the configuration into ``config.system.work_dir``.

    Args:
        config: has ``system.work_dir``, the folder to write ``args.txt`` and ``config.json`` to.
    """
    work_dir = config.system.work_dir
    os.makedirs(work_dir, exist_ok=True)
    with open(os.path.join(work_dir, "args.txt"), "w") as file:
        file.write(" ".join(sys.argv))
    with open(os.path.join(work_dir, "config.json"), "w") as file:
        json.dump(config.to_dict(), file, indent=4)


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

    The keys are those given to the constructor and those set while the node is still open, as
    minGPT's scripts build their nodes attribute by attribute; ``close()`` ends that. On a closed node an unknown
    key is kept, so that old scripts run, but warned about with the nearest known key.
    """

    def __init__(self, **kwargs: Any):
        self.__dict__["_is_closed"] = False
        self.__dict__.update(kwargs)

    def close(self) -> CfgNode:
        """Fix the set of keys; a new one set after this is warned about. Returns the node itself."""
        self.__dict__["_is_closed"] = True
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_closed and name not in self.__dict__:
            known = self.to_dict()
            warnings.warn(
                f"unknown configuration key {name!r} has no effect{nearest(name, known)}. Known: {', '.join(known)}",
                stacklevel=2,
            )
        self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for these before there are any keys
            raise AttributeError(name)
        raise AttributeError(f"the configuration has no key {name!r}{nearest(name, self.__dict__)}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CfgNode) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"CfgNode({', '.join(f'{k}={v!r}' for k, v in self._items())})"

    def __str__(self) -> str:
        return "".join(self._lines(0))

    def _items(self) -> list[tuple[str, Any]]:
        return [(k, v) for k, v in self.__dict__.items() if k != "_is_closed"]

    def _lines(self, indent: int) -> Iterable[str]:
        for key, value in self._items():
            if isinstance(value, CfgNode):
                yield f"{'    ' * indent}{key}:\n"
                yield from value._lines(indent + 1)
            else:
                yield f"{'    ' * indent}{key}: {value}\n"

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as nested dictionaries."""
        return {k: v.to_dict() if isinstance(v, CfgNode) else v for k, v in self._items()}

    def copy(self) -> CfgNode:
        """Return a copy whose nested nodes are copies too; values are shared."""
        node = CfgNode(**{k: v.copy() if isinstance(v, CfgNode) else v for k, v in self._items()})
        return node.close() if self._is_closed else node

    def merge_from_dict(self, values: Mapping[str, Any]) -> None:
        """Set each key to its value, as assignment would."""
        for key, value in values.items():
            setattr(self, key, value)

    def override(self, key: str, value: Any) -> None:
        """Set a dotted key that must exist, ``override("trainer.max_iters", 10)``.

        Raises:
            ValueError: for an unknown key, with the nearest known one.
        """
        node: Any = self
        *parents, leaf = key.split(".")
        for depth, name in enumerate([*parents, leaf]):
            if not isinstance(node, CfgNode) or name not in node.to_dict():
                known = node.to_dict() if isinstance(node, CfgNode) else {}
                raise ValueError(
                    f"unknown configuration key {key!r}{nearest(name, known)}. Known here: {', '.join(known) or 'none'}"
                )
            if depth < len(parents):
                node = getattr(node, name)
        if isinstance(getattr(node, leaf), CfgNode):
            raise ValueError(
                f"configuration key {key!r} is a group; set one of {', '.join(getattr(node, leaf).to_dict())}"
            )
        setattr(node, leaf, value)

    def merge_from_args(self, args: Iterable[str]) -> None:
        """Apply command-line overrides, ``--model.n_layer=10``.

        Raises:
            ValueError: for an argument that is not ``--key=value`` or whose key does not exist.
        """
        for arg in args:
            key, equals, value = arg.partition("=")
            if not equals or not key.startswith("--"):
                raise ValueError(f"expected an override of the form --key=value, got {arg!r}")
            self.override(key[2:], parse_value(value))


def parse_value(text: str) -> Any:
    """Read a Python literal (``3``, ``1e-3``, ``[1, 2]``, ``None``, ``True``); other text stays a string."""
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
