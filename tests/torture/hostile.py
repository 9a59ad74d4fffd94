"""Mutations of files, and what reads each kind of file. It runs in a process with a bound on memory and time."""

from __future__ import annotations

import json
import math
import random
import resource
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from mingpt import cli
from mingpt.experiments import pipeline, reproduction
from mingpt.experiments.predictor import _collect
from mingpt.experiments.presets import run_config
from mingpt.experiments.sweep import Study
from mingpt.storage import import_peft
from mingpt.storage.cache import cached_json, read_cached_json
from mingpt.storage.checkpoint import _HEADER, _read, checksum, json_checksum
from mingpt.storage.weights import load_adapter, load_model, load_prefix
from mingpt.tasks import Add1
from mingpt.training.metrics import read_metrics
from torture.calls import new_trainer

LIMIT_S, LIMIT_BYTES = 10, 2**30


def _study(path: Path) -> Any:
    study = Study.read("study.toml")
    scored = study.scored()
    return study.cells, scored and scored.results().to_json(), study.results().to_json()


def _reproduced(path: Path) -> Any:
    value = reproduction.check_results(read_cached_json(path)["value"], path)
    return reproduction.format_table(value)


def _resume(path: Path) -> Any:
    trainer = new_trainer(path)
    trainer.run()
    return checksum(trainer.trained_tensors())


def _use(model: torch.nn.Module, *rest: Any) -> Any:
    return checksum(model.state_dict()), json.dumps(rest, default=str)


def _model() -> Any:
    return load_model("run/model.safetensors")[0]


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "model": ("run/model.safetensors", lambda path: _use(*load_model(path))),
    "run": ("run/model.safetensors", lambda path: _use(pipeline.load_run(path.parent)[0])),
    "prefix": ("run/prefixes/Add1.safetensors", lambda path: str(load_prefix(path, _model()))),
    "adapter": ("adapter.safetensors", lambda path: _use(load_adapter(path, _model())[0])),
    "state": ("trainer/state.safetensors", _resume),
    "config": ("run/config.json", lambda path: str(run_config(path.parent))),
    "results": ("run/results.json", _reproduced),
    "metrics": ("run/pretraining/metrics.jsonl", read_metrics),
    "study": ("study.toml", _study),
    "table": ("study/results.csv", _study),
    "rates": ("study/rates.json", _study),
    "rows": ("in.jsonl", lambda path: cli.answers.read_rows(path, Add1(), 10, 13)),
    "parts": ("parts/0123456789abcdef-0-0.jsonl", lambda path: _collect(path.parent / "0123456789abcdef-", 5)),
    "step": ("step.json", lambda path: cached_json(path, {"a": 1}, lambda: 0)),
    "PEFT's weights": ("out/Add1/adapter_model.safetensors", lambda path: str(import_peft(path.parent, _model()))),
    "PEFT's settings": ("out/Add1/adapter_config.json", lambda path: str(import_peft(path.parent, _model()))),
}
"""By kind, a file in the folder that the test makes, and what reads it."""

SEALED = {"model", "run", "prefix", "adapter", "state", "results", "step"}
"""Kinds with a checksum: what is read is what was written, or nothing, unless the checksum was made anew."""

WORDS = [
    None,
    True,
    -1,
    0,
    1,
    0.5,
    2**63,
    10**12,
    10**40,
    1e308,
    math.inf,
    math.nan,
    "",
    "x" * 1000,
    "../../x",
    [],
    {},
    [[]],
]


def mutate_bytes(data: bytes, moments: random.Random) -> bytes:
    """Damage that a disk or a person does."""
    n = len(data)
    first, size = moments.randrange(n), moments.randrange(1, min(n, 200) + 1)
    kind = moments.randrange(9)
    if kind == 0:
        return data[:first] + bytes([data[first] ^ 1 << moments.randrange(8)]) + data[first + 1 :]
    if kind == 1:
        return data[:first]
    if kind == 2:
        return data[:first] + bytes(size) + data[first + size :]
    if kind == 3:
        return data[:first] + moments.randbytes(size) + data[first:]
    if kind == 4:
        return data[:first] + data[first + size :]
    if kind == 5:
        return data[: first + size] + data[first:]
    if kind == 6:
        return moments.choice(
            [b"", b"{}", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\xff\xfe", b"\n"]
        )
    if kind == 7:
        return data[:first] + moments.choice([b"[" * 100_000, b"9" * 5000, b"NaN", b"1e400", b"\\u0000"]) + data[first:]
    return moments.randbytes(moments.randrange(1000))


def mutate_json(value: Any, moments: random.Random) -> Any:
    """One node of a JSON value is another, or gone."""
    value = json.loads(json.dumps(value))
    nodes: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            nodes.append((node, key))
            walk(node[key])

    walk(value)
    if not nodes:
        return moments.choice(WORDS)
    node, key = moments.choice(nodes)
    if moments.random() < 0.2:
        del node[key]
    else:
        node[key] = moments.choice(WORDS)
    return value


def reseal(path: Path, moments: random.Random) -> bytes:
    """Another content with a right checksum, as an attacker or a program with a bug writes it."""
    if path.suffix == ".safetensors":
        try:
            header, tensors = _read(path)
            header.pop("checksum")
        except ValueError:  # PEFT's
            from safetensors.torch import load_file

            header, tensors = None, load_file(path)
        name = moments.choice(sorted(tensors))
        kind = moments.randrange(6)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            tensors[name] = tensors[name].flatten()[: moments.randrange(tensors[name].numel() + 1)].clone()
        elif kind == 2:
            tensors[name] = tensors[name].to(moments.choice([torch.float64, torch.int8, torch.bool, torch.bfloat16]))
        elif kind == 3 and tensors[name].is_floating_point():
            tensors[name] = torch.full_like(tensors[name], moments.choice([math.nan, math.inf, 1e38]))
        elif kind == 4:
            tensors[moments.choice(["x", "trained.x", "../x"])] = tensors[name].clone()
        elif header is not None:
            header["description"] = mutate_json(header["description"], moments)
        if header is None:
            return save(tensors, metadata={"format": "pt"})
        return save(tensors, metadata={_HEADER: json.dumps(header | {"checksum": checksum(tensors, header)})})
    if path.suffix == ".json":
        found = mutate_json(json.loads(path.read_text()), moments)
        if isinstance(found, dict) and "checksum" in found:
            found["checksum"] = json_checksum({key: value for key, value in found.items() if key != "checksum"})
        return json.dumps(found).encode()
    lines = path.read_bytes().splitlines()
    line = moments.randrange(len(lines))
    try:
        lines[line] = json.dumps(mutate_json(json.loads(lines[line]), moments)).encode()
    except ValueError:
        lines[line] = json.dumps(moments.choice(WORDS)).encode()
    return b"\n".join(lines) + b"\n"


def mutations(folder: str, kind: str, seed: int, n: int) -> None:
    """Read n mutations of a kind of file, and print a line for each that was taken badly."""
    name, read = READERS[kind]
    path = Path(folder) / name
    original, moments = path.read_bytes(), random.Random(f"{seed} {kind}")
    beside = path.with_name(path.name + ".original")
    shutil.copy(path, beside)
    expected = read(path)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES,) * 2)

    def hang(*_: object) -> None:
        raise SystemError("it hangs")

    signal.signal(signal.SIGALRM, hang)
    for number in range(n):
        is_resealed = moments.random() < 0.5
        shutil.copy(beside, path)
        data = reseal(path, moments) if is_resealed else mutate_bytes(original, moments)
        path.write_bytes(data)
        signal.alarm(LIMIT_S)
        try:
            found = read(path)
            if not is_resealed and kind in SEALED and found != expected:
                raise SystemError("a wrong result")
        except OSError:  # of a file that another name or path leads to
            pass
        except ValueError as error:
            if not any(each in str(error) for each in (path.name, path.parent.name)):
                print(f"mutation {number} of {kind}: no file is named: {str(error)[:300]!r}")
            elif len(str(error)) > 2000:
                print(f"mutation {number} of {kind}: a message of {len(str(error))} characters")
        except BaseException as error:
            lines = traceback.format_exc().splitlines()
            text = " | ".join(lines[-7:])[-600:]
            print(f"mutation {number} of {kind}, resealed {is_resealed}: {str(error)[:200]!r}; {text}")
        finally:
            signal.alarm(0)
    shutil.copy(beside, path)
