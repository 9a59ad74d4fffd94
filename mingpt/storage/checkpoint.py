"""Checkpoints: one safetensors file each, with a JSON description in its header; atomic to write, verified to read.

The description and the tensors are one file, so that they cannot come apart. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import platform
import textwrap
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

import mingpt
from mingpt import distributed
from mingpt.distributed.sharding import full_tensor
from mingpt.storage.files import CheckpointError, parse_json, write_atomic

FORMAT = 1
_HEADER = "mingpt"


def first_difference(old: Any, new: Any, name: str) -> tuple[str, Any, Any] | None:
    """Where nested values first differ, and how: the dotted name, the old value and the new one."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return None if old == new else (name, old, new)
    differences = (first_difference(old.get(key), new.get(key), f"{name}.{key}".lstrip(".")) for key in {**new, **old})
    return next(filter(None, differences), None)


def key_difference(found: Mapping[str, Any] | None, expected: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """``first_difference`` of what a file says of itself, None where it says nothing, and what is asked for."""
    return first_difference(found or {}, json.loads(json.dumps(expected)), "")


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write tensors and what they are. All processes of a job must get here; the main one writes.

    Args:
        path: the file, by custom ``*.safetensors``.
        tensors: any dtypes; written from whatever device they are on.
        description: JSON values; versions and a checksum are added to it.
    """
    from safetensors.torch import save

    full = {name: full_tensor(tensor) for name, tensor in tensors.items()}

    def write() -> None:
        # Copies: safetensors refuses tensors that share memory.
        own = {name: each.cpu().clone(memory_format=torch.contiguous_format) for name, each in full.items()}
        header = {
            "format": FORMAT,
            "versions": {"mingpt": mingpt.__version__, "torch": torch.__version__, "python": platform.python_version()},
            # As it will be read: with strings as keys, and lists.
            "description": json.loads(json.dumps(description, allow_nan=False)),
        }
        header["checksum"] = checksum(own, header)
        write_atomic(path, save(own, metadata={_HEADER: json.dumps(header)}))

    distributed.run_on_main(write)


def load_checkpoint(path: str | Path, **expected: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_checkpoint`` wrote: the tensors, on the CPU, and the description.

    Args:
        path: the file.
        expected: fields of the description and what each must be, such as its kind.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged, was not written by ``save_checkpoint``, or is of something else.
    """
    header, tensors = _read(path)
    found = header.pop("checksum")
    if found != checksum(tensors, header):
        raise CheckpointError(f"{path}: field 'checksum' does not match; the file is damaged")
    description = header["description"]
    verify(path, {name: description.get(name) for name in expected}, expected)
    return tensors, description | {"versions": header["versions"]}


def read_description(path: str | Path) -> dict[str, Any]:
    """Read the description of a checkpoint without its tensors, and so without checking the file as a whole.

    Raises:
        FileNotFoundError, CheckpointError: see ``load_checkpoint``.
    """
    return _read(path, with_tensors=False)[0]["description"]


def _read(path: str | Path, with_tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint's header, checked, and its tensors."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = parse_json((file.metadata() or {}).get(_HEADER, "null"))
            tensors = {name: file.get_tensor(name).clone() for name in file.keys() if with_tensors}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged, not a readable safetensors file ({error})") from None
    if not isinstance(header, dict) or not {"format", "checksum", "versions", "description"} <= header.keys():
        raise CheckpointError(f"{path}: its header has no complete field '{_HEADER}'; not written by mingpt")
    if header["format"] != FORMAT:
        raise CheckpointError(f"{path}: field 'format' is {_short(header['format'])}, this version reads {FORMAT}")
    if not isinstance(header["description"], dict):
        raise CheckpointError(f"{path}: field 'description' is no object; not written by mingpt")
    return header, tensors


def verify(path: str | Path, found: Mapping[str, Any] | None, expected: Mapping[str, Any]) -> None:
    """Check that a file is of what is asked for.

    Args:
        path: the file.
        found: what it says of itself, None where it says nothing.
        expected: what is asked for; tuples equal lists, as in a file.

    Raises:
        CheckpointError: naming the file, the first field that differs, both values, and what to do.
    """
    difference = key_difference(found, expected)
    if difference:
        name, old, new = difference
        raise CheckpointError(
            f"{path}: it was made with {name} = {_short(old)}, asked for is {_short(new)}; choose another folder or "
            "file, or delete this one to make it anew"
        )


def _short(value: Any) -> str:
    """A value as a message shows it."""
    return textwrap.shorten(repr(value), 200, placeholder=" ...")


def check_finite(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Check that weights are numbers.

    Raises:
        CheckpointError: naming the file and the first tensor with a NaN or an infinity.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity; what made it has diverged, make it anew")


def verify_shapes(module: torch.nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Check that tensors are all of a module's, by names and shapes; a CheckpointError names the first difference."""
    shapes = [{name: list(tensor.shape) for name, tensor in each.items()} for each in (tensors, module.state_dict())]
    verify(path, {"shapes": shapes[0]}, {"shapes": shapes[1]})


def load_weights(module: torch.nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Load a module's weights, all of them, checking names and shapes first.

    Raises:
        CheckpointError: naming the file and the first tensor that is missing, unknown, of another shape, or not finite.
    """
    verify_shapes(module, tensors, path)
    check_finite(tensors, path)
    module.load_state_dict(dict(tensors))


def flatten_state(state: Any, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Separate nested dictionaries, lists and tuples into tensors, named ``<prefix>.<number>``, and JSON."""
    leaves, spec = tree_flatten(state)
    tensors = {f"{prefix}.{number}": leaf for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return tensors, {"spec": treespec_dumps(spec), "leaves": others, "prefix": prefix}


def unflatten_state(skeleton: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Undo ``flatten_state``."""
    leaves = [tensors.get(f"{skeleton['prefix']}.{n}", leaf) for n, leaf in enumerate(skeleton["leaves"])]
    return tree_unflatten(leaves, treespec_loads(skeleton["spec"]))


def checksum(tensors: Mapping[str, Tensor], header: Any = None) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of tensors, and over JSON values, in hexadecimal.

    All processes must get here where a tensor is split over them.
    """
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = full_tensor(tensors[name]).cpu().clone(memory_format=torch.contiguous_format)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def json_checksum(value: Any) -> str:
    """SHA-256 of a JSON value, or of nearly any other: the same in every process, another where a field differs.

    Arrays and tensors count as lists, functions by their code and what it closes over, other objects by their type and
    fields.
    """
    return hashlib.sha256(json.dumps(value, default=_as_json).encode()).hexdigest()


def _as_json(value: Any) -> Any:
    """What ``json_checksum`` takes for a value that is no JSON; what is in it may be no JSON either."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [value.__qualname__, value.__code__, value.__defaults__, cells]
    if isinstance(value, CodeType):
        return [value.co_code.hex(), value.co_names, value.co_consts]
    return [type(value).__qualname__, vars(value) if hasattr(value, "__dict__") else repr(value)]


def weights_hash(model: torch.nn.Module) -> str:
    """A checksum of a model's weights."""
    return checksum(model.state_dict())
