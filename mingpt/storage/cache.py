"""Whether a file is of what is asked for (a stand-in)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mingpt.storage.checkpoint import CheckpointError, _first_difference


def verify(path: str | Path, found: Mapping[str, Any] | None, expected: Mapping[str, Any]) -> None:
    """Raise a CheckpointError that names the first field in which a file's cache key differs from the expected one."""
    difference = _first_difference(found or {}, json.loads(json.dumps(expected)), "")
    if difference:
        name, old, new = difference
        raise CheckpointError(f"{path}: field '{name}' is {old!r}, expected {new!r}; take another file, or delete this")
