"""Results that are computed once: a file says by its cache key what it is of, and is read only where that is asked for.

A cache key is JSON: everything that a result is a function of, such as the model's configuration or the hash of its
weights, the description of the data with a hash of its first rows, the recipe, the seed and the method. It is written
into every file that a run leaves, and compared on every read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mingpt.distributed import run_on_main
from mingpt.storage import checkpoint
from mingpt.storage.checkpoint import CheckpointError, verify

T = TypeVar("T")
CacheKey = Mapping[str, Any]


def cached(
    path: Path, cache_key: CacheKey, compute: Callable[[], None], load: Callable[[Path], tuple[T, dict[str, Any]]]
) -> tuple[T, dict[str, Any]]:
    """Read a result, after computing it where its file is missing. All processes must get here.

    Args:
        path: the file of the result.
        cache_key: what the result is a function of.
        compute: computes the result and leaves the file.
        load: reads the file: the value, and a description that has its "cache_key".

    Returns:
        The value as it was read, also where it was computed just now, and the description.

    Raises:
        CheckpointError: if the file is of another cache key, or damaged.
    """
    if not run_on_main(path.exists):
        compute()
    value, description = load(path)
    verify(path, description.get("cache_key"), cache_key)
    return value, description


def cached_json(path: str | Path, cache_key: CacheKey, compute: Callable[[], Any]) -> Any:
    """Compute a JSON value and write it to a file with its cache key, or read it where that is done."""
    path = Path(path)

    def write() -> None:
        content = json.dumps({"cache_key": cache_key, "value": compute()}, indent=1)
        run_on_main(lambda: checkpoint.write_atomic(path, content.encode()))

    def load(path: Path) -> tuple[Any, dict[str, Any]]:
        found = read_json(path, "cache_key", "value")
        return found["value"], found

    return cached(path, cache_key, write, load)[0]


def beside(path: Path, cache_key: CacheKey) -> Path:
    """The file for a result: ``path``, or ``<stem>-<hash>`` beside it where that is of another cache key.

    So what is asked beyond a run's own settings never replaces what is there, and is not refused.
    """

    def choose() -> Path:
        if not path.exists():
            return path
        found = (read_json(path) if path.suffix == ".json" else checkpoint.read_description(path)).get("cache_key")
        if not checkpoint.first_difference(found or {}, json.loads(json.dumps(cache_key)), ""):
            return path
        return path.with_name(f"{path.stem}-{checkpoint.json_checksum(cache_key)[:8]}{path.suffix}")

    return run_on_main(choose)


def read_json(path: str | Path, *fields: str) -> dict[str, Any]:
    """Read a JSON file that holds an object with these fields.

    Raises:
        CheckpointError: if it is damaged, naming the file.
    """
    try:
        found = json.loads(Path(path).read_text())
        if not (isinstance(found, dict) and found.keys() >= set(fields)):
            raise ValueError(f"expecting an object with the fields ({', '.join(fields)})")
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged, not the right JSON ({error}); delete it to make it anew") from None
    return found
