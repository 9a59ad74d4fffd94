"""Files that are whole or not there, JSON that is checked, and one lock a folder.

A file is either the old one or the new one, never half of one: it is written beside its place, flushed to the disk and
renamed. A process that writes into a folder holds its lock, so that two runs never mix.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from mingpt.distributed import is_main, run_on_main

MAX_JSON_BYTES = 2**28
"""The largest JSON file that is read."""

_HOST = socket.gethostname()
_HELD: dict[Path, int | None] = {}  # the lock files of this process, and their descriptors on the main process


class CheckpointError(ValueError):
    """A file that is damaged, or is of something else; the message names the file and the field."""


class LockedError(OSError):
    """A folder that another process writes into; the message says which process."""


# ----------------------------------------------------------------------------------------------------------- writing


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, finds either all of it or what was there before.

    Where the path is a symbolic link, it is the file behind it that is replaced. What processes that are no more have
    left half written beside it is removed.

    Raises:
        OSError: naming the file, if it cannot be written, or if the folder of a lock that this process holds is gone.
    """
    path = Path(os.path.realpath(path))
    for lock in _HELD:
        if _HELD[lock] is not None and path.is_relative_to(lock.parent) and not lock.exists():
            raise FileNotFoundError(
                f"{path}: not written, since {lock.parent} was removed or moved while it was in use"
            )
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}-{_HOST}.tmp")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".*-*-{glob.escape(_HOST)}.tmp"):
            if not _is_running(left.name[1:].partition("-")[0]):
                left.unlink(missing_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # there only where that failed
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Have an error of the system name this file, whichever file or descriptor it came from."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


# ----------------------------------------------------------------------------------------------------------- reading


def parse_json(text: str | bytes) -> Any:
    """Read JSON as the standard has it: without NaN and infinity, and no deeper than Python can follow.

    Raises:
        ValueError: for anything else.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | Path, *fields: str) -> dict[str, Any]:
    """Read a JSON file that holds an object with these fields.

    Raises:
        CheckpointError: if it is damaged or too large, naming the file.
    """
    try:
        size = Path(path).stat().st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"{size} bytes, at most {MAX_JSON_BYTES} are read")
        found = parse_json(Path(path).read_bytes())
        if not (isinstance(found, dict) and found.keys() >= set(fields)):
            raise ValueError(f"expecting an object with the fields ({', '.join(fields)})")
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged, not the right JSON ({error}); delete it to make it anew") from None
    return found


@contextlib.contextmanager
def parsing(path: str | Path, what: str) -> Iterator[None]:
    """Have whatever goes wrong with a file's content be a CheckpointError that names the file and what was expected."""
    try:
        yield
    except (CheckpointError, OSError):
        raise
    except Exception as error:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        text = textwrap.shorten(text, 300, placeholder=" ...")
        raise CheckpointError(f"{path}: it does not hold {what}: {text}") from None


def read_json_lines(path: str | Path) -> list[Any]:
    """Read a file of a JSON value a line, or nothing; the end of the last line may be missing, as a crash leaves it.

    Raises:
        CheckpointError: naming the file and the first line that is no JSON.
    """
    *lines, _ = Path(path).read_bytes().split(b"\n")
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            values += [parse_json(line)] if line.strip() else []
        except ValueError as error:
            raise CheckpointError(f"{path}: damaged, line {number} is no JSON ({error}); delete the file") from None
    return values


# ------------------------------------------------------------------------------------------------------------- locks


@contextlib.contextmanager
def locked(file: str | Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock while something is written; all processes of a job must get here, and the main one holds it.

    The system gives a lock back when its process ends, however it ends. One that this process holds already is no
    obstacle.

    Args:
        file: the lock's, which is there as long as it is held, by custom ``<folder>/.lock``.
        wait: whether to wait for another process that holds it.

    Raises:
        LockedError: if another process holds it; it says which process, where, and since when.
    """
    file = Path(os.path.realpath(file))
    if file in _HELD:
        yield
        return
    made = [folder for folder in file.parents if not folder.exists()]
    _HELD[file] = run_on_main(lambda: _acquire(file, wait))
    try:
        yield
    finally:
        descriptor = _HELD.pop(file)
        if is_main() and descriptor is not None:
            file.unlink(missing_ok=True)  # before it is given back, so that nobody holds a file that is not there
            os.close(descriptor)
            with contextlib.suppress(OSError):  # there is something in them, as a rule
                for folder in made:
                    folder.rmdir()


@contextlib.contextmanager
def scratch_folder(folder: str | Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder of intermediate results, which is removed when all has gone well.

    The lock goes last: no other process takes the folder while it is being removed.

    Args:
        folder: kept where an error or a signal comes out.
        wait: see ``locked``, which says what is raised.
    """
    folder = Path(folder)
    with locked(folder / ".lock", wait):
        yield
        for path in folder.iterdir() if is_main() else ():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _acquire(file: Path, wait: bool) -> int | None:
    """The descriptor of a lock file that this process holds now; None where nothing can be written anyway."""
    is_told = False
    while True:
        with naming(file):
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                    return None
                raise
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, workers do not inherit it
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                break
        except (BlockingIOError, PermissionError):
            owner = os.read(descriptor, 500).decode(errors="replace")
            if not wait:
                raise LockedError(
                    f"{file.parent} is in use by {owner or 'another process'}; wait for it (--wait), or choose another"
                ) from None
            if not is_told:
                print(f"waiting for {owner}, which uses {file.parent}", file=sys.stderr)
            is_told = True
            time.sleep(0.2)
        except FileNotFoundError:  # its owner has just removed it
            pass
        os.close(descriptor)
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
    try:
        owner = f"process {os.getpid()} on {_HOST} since {datetime.now():%Y-%m-%d %H:%M:%S}: {command}"
        os.ftruncate(descriptor, 0)
        os.write(descriptor, owner.encode())
    except OSError as error:
        file.unlink(missing_ok=True)
        os.close(descriptor)
        raise OSError(error.errno, error.strerror, str(file)) from None
    return descriptor


def _is_running(process: str) -> bool:
    """Whether this machine has a process of this number."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # another user's
        return True
    return True
