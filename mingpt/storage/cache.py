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
from mingpt.storage.checkpoint import json_checksum, verify
from mingpt.storage.files import CheckpointError, locked, read_json, write_atomic

T = TypeVar("T")
CacheKey = Mapping[str, Any]


def cached(
    path: Path,
    cache_key: CacheKey,
    compute: Callable[[], None],
    load: Callable[[Path], tuple[T, dict[str, Any]]],
    lock: Path | None = None,
) -> tuple[T, dict[str, Any]]:
    """Read a result, after computing it where its file is missing. All processes must get here.

    While it computes, it holds a lock.

    Args:
        path: the file of the result.
        cache_key: what the result is a function of.
        compute: computes the result and leaves the file.
        load: reads the file: the value, and a description that has its "cache_key".
        lock: the file of the lock, that of the result's folder by default.

    Returns:
        The value as it was read, also where it was computed just now, and the description.

    Raises:
        CheckpointError: if the file is of another cache key, or damaged.
        LockedError: if it is missing, and another process writes into the folder.
    """
    if not run_on_main(path.exists):
        with locked(lock or path.with_name(".lock")):
            if not run_on_main(path.exists):  # another process may have been faster
                compute()
    value, description = load(path)
    verify(path, description.get("cache_key"), cache_key)
    return value, description


def cached_json(path: str | Path, cache_key: CacheKey, compute: Callable[[], Any], lock: Path | None = None) -> Any:
    """Compute a JSON value and write it to a file with its cache key, or read it where that is done."""
    path = Path(path)

    def write() -> None:
        found = json.loads(json.dumps({"cache_key": cache_key, "value": compute()}, allow_nan=False))
        content = json.dumps({"checksum": json_checksum(found)} | found, indent=1)
        run_on_main(lambda: write_atomic(path, content.encode()))

    def load(path: Path) -> tuple[Any, dict[str, Any]]:
        found = read_cached_json(path)
        return found["value"], found

    return cached(path, cache_key, write, load, lock)[0]


def beside(path: Path, cache_key: CacheKey) -> Path:
    """The file for a result: ``path``, or ``<stem>-<hash>`` beside it where that is of another cache key.

    So what is asked beyond a run's own settings never replaces what is there, and is not refused.
    """

    def choose() -> Path:
        if not path.exists():
            return path
        found = (read_json(path) if path.suffix == ".json" else checkpoint.read_description(path)).get("cache_key")
        if not checkpoint.key_difference(found, cache_key):
            return path
        return path.with_name(f"{path.stem}-{checkpoint.json_checksum(cache_key)[:8]}{path.suffix}")

    return run_on_main(choose)


def read_cached_json(path: str | Path) -> dict[str, Any]:
    """What ``cached_json`` has written: "cache_key" and "value".

    Raises:
        CheckpointError: if it is damaged, or was changed.
    """
    found = read_json(path, "checksum", "cache_key", "value")
    if found.pop("checksum") != json_checksum(found):
        raise CheckpointError(
            f"{path}: field 'checksum' does not match; the file is damaged, delete it to make it anew"
        )
    return found
