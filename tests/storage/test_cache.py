"""Results that are computed once, and read for their own cache key only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from mingpt.decoding.automata import DFA
from mingpt.decoding.constraints import RegularConstraint
from mingpt.storage.cache import beside, cached_json, verify
from mingpt.storage.checkpoint import CheckpointError, json_checksum


def test_a_value_is_computed_once_and_for_its_key_only(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {1: [0.5, None]}

    for _ in range(2):
        assert cached_json(tmp_path / "v.json", {"values": (1, 2)}, compute) == {"1": [0.5, None]}
    assert len(calls) == 1
    with pytest.raises(CheckpointError, match=r"v\.json: it was made with values = \[1, 2\], asked for is \[1, 3\]"):
        cached_json(tmp_path / "v.json", {"values": (1, 3)}, compute)
    (tmp_path / "v.json").unlink()
    cached_json(tmp_path / "v.json", {"values": (1, 3)}, compute)
    assert len(calls) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "1", '{"value": 1}', '{"cache_key": {}}', "\x00"])
def test_a_file_without_a_cache_key_is_never_believed(tmp_path, content):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"v\.json: .*delete it"):
        cached_json(tmp_path / "v.json", {}, lambda: 1)
    assert (tmp_path / "v.json").read_text() == content


@pytest.mark.parametrize(
    ("found", "expected", "message"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, r"a\.b = 1, asked for is 2"),
        ({"a": {}}, {"a": {"b": 2}}, r"a\.b = None, asked for is 2"),
        ({"a": {"b": 1}}, {"a": {}}, r"a\.b = 1, asked for is None"),
        (None, {"a": 1}, "a = None, asked for is 1"),
        ({"a": [1]}, {"a": (1, 2)}, r"a = \[1\], asked for is \[1, 2\]"),
    ],
)
def test_the_first_difference_is_named(found, expected, message):
    with pytest.raises(CheckpointError, match=rf"file: it was made with {message}; choose another folder .*or delete"):
        verify("file", found, expected)
    verify("file", json.loads(json.dumps(expected)), expected)


def test_another_key_goes_beside_what_is_there(tmp_path):
    path = tmp_path / "v.json"
    assert beside(path, {"n": 1}) == path
    cached_json(path, {"n": 1}, lambda: "one")
    assert beside(path, {"n": 1}) == path
    other = beside(path, {"n": 2})
    assert other != path
    assert other.name.startswith("v-")
    assert other == beside(path, {"n": 2}) != beside(path, {"n": 3})
    assert cached_json(other, {"n": 2}, lambda: "two") == "two"
    assert cached_json(path, {"n": 1}, pytest.fail) == "one"


@dataclass
class Point:
    x: int
    others: tuple = ()


def scaled(factor):
    return lambda tokens, logits: factor * logits


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.arange(3), torch.arange(4)),
        (torch.zeros(2000), torch.zeros(2000).index_fill(0, torch.tensor([1000]), 1.0)),
        (Point(1), Point(2)),
        (Point(1, (Point(2),)), Point(1, (Point(3),))),
        (scaled(1.0), scaled(2.0)),
        (lambda x: x + 1, lambda x: x - 1),
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x: [y + 1 for y in x], lambda x: [y + 2 for y in x]),
        (lambda x: x.min(), lambda x: x.max()),
        (partial(scaled, 1), partial(scaled, 2)),
        (RegularConstraint(DFA.from_regex("1* 2", 5)), RegularConstraint(DFA.from_regex("1* 3", 5))),
        ({"do_sample": True}, {"do_sample": False}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_objects_that_differ_have_another_checksum(one, other):
    assert json_checksum(one) != json_checksum(other)
    assert json_checksum(one) == json_checksum(one)


def test_objects_that_are_the_same_have_one_checksum():
    for make in (lambda: Point(1), lambda: scaled(2.0), lambda: RegularConstraint(DFA.from_regex("1* 2", 5))):
        assert json_checksum(make()) == json_checksum(make())


def test_a_checksum_is_the_same_in_every_process():
    """Whatever the hash seed is, and wherever an object lies in memory."""
    script = (
        "from mingpt.storage.checkpoint import json_checksum\n"
        "print(json_checksum([lambda x: x in {'a', 'b', 'c', 'd'} and (lambda: x), {'a', 'b', 'c'}, b'1', 1j]))"
    )
    found = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        found.add(done.stdout)
    assert len(found) == 1
