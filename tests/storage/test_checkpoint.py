"""Checkpoints: what was saved comes back exactly, or an error says what is wrong."""

import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from mingpt.model import GPT
from mingpt.storage.checkpoint import (
    CheckpointError,
    flatten_state,
    load_checkpoint,
    load_weights,
    read_description,
    save_checkpoint,
    unflatten_state,
    write_atomic,
)

DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64),
]


def to_bytes(tensor):
    tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(tensors, others):
    """The same names, and under each the same type, shape and bits (so that NaN equals itself)."""

    def key(tensor):
        return tensor.dtype, tuple(tensor.shape), to_bytes(tensor)

    return {name: key(tensor) for name, tensor in tensors.items()} == {k: key(v) for k, v in others.items()}


# ------------------------------------------------------------------------------------------------- round trips


@st.composite
def tensors_of_any_kind(draw):
    """A tensor of any type, shape (empty and 0-dimensional ones too), bits and memory layout."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    n_bytes = int(np.prod(shape, dtype=int)) * dtype.itemsize
    raw = np.frombuffer(draw(st.binary(min_size=n_bytes, max_size=n_bytes)), dtype=np.uint8).copy()
    flat = torch.from_numpy(raw) & 1 if dtype is torch.bool else torch.from_numpy(raw)
    tensor = flat.view(dtype).view(shape) if n_bytes else torch.empty(shape, dtype=dtype)
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided", "expanded"]))
    if layout == "transposed" and tensor.ndim >= 2:
        return tensor.transpose(0, -1)
    if layout == "strided" and tensor.ndim >= 1:
        return tensor[::2]
    if layout == "expanded":
        return tensor.expand(2, *shape)
    return tensor


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.dictionaries(names, tensors_of_any_kind(), max_size=4),
    description=st.dictionaries(st.text(max_size=5).filter(lambda key: key != "versions"), json_values, max_size=4),
)
def test_what_was_saved_comes_back(tmp_path, tensors, description):
    path = tmp_path / "some.safetensors"
    save_checkpoint(path, tensors, description)
    found, found_description = load_checkpoint(path)
    assert same(found, tensors)
    assert all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in found.values())
    versions = found_description.pop("versions")
    assert found_description == description
    assert versions["torch"] == torch.__version__


def test_a_description_with_integer_keys_is_not_damage(tmp_path):
    """JSON sorts 9 after 10 once they are strings; the file has strings from the beginning."""
    save_checkpoint(tmp_path / "some.safetensors", {"a": torch.ones(1)}, {"by_size": {9: (1, 2), 10: {11: 0}}})
    _, description = load_checkpoint(tmp_path / "some.safetensors")
    assert description["by_size"] == {"9": [1, 2], "10": {"11": 0}}
    assert read_description(tmp_path / "some.safetensors")["by_size"] == description["by_size"]


def test_tensors_that_share_memory_come_back(tmp_path):
    """Tied weights, and views of one tensor that overlap."""
    tensor = torch.arange(12.0)
    tensors = {"full": tensor, "again": tensor, "start": tensor[:8], "end": tensor[4:], "grid": tensor.view(3, 4)}
    save_checkpoint(tmp_path / "some.safetensors", tensors, {})
    assert same(load_checkpoint(tmp_path / "some.safetensors")[0], tensors)


def test_a_single_element_of_any_stride_comes_back(tmp_path):
    """Torch calls these contiguous, for all their strides."""
    tensors = {"column": torch.ones(1, 5)[:, 0], "every_other": torch.ones(1)[::2]}
    save_checkpoint(tmp_path / "some.safetensors", tensors, {})
    assert same(load_checkpoint(tmp_path / "some.safetensors")[0], tensors)


def test_a_parameter_comes_back_without_its_graph(tmp_path):
    module = nn.Linear(2, 3)
    save_checkpoint(tmp_path / "some.safetensors", dict(module.named_parameters()), {})
    assert same(load_checkpoint(tmp_path / "some.safetensors")[0], module.state_dict())


def test_the_same_content_is_the_same_file(tmp_path):
    tensors = {"b": torch.arange(3), "a": torch.ones(2)}
    for name, order in (("one", "ab"), ("other", "ba")):
        save_checkpoint(tmp_path / name, {key: tensors[key] for key in order}, {"x": [1, 2]})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_saving_does_not_change_or_keep_the_tensors(tmp_path):
    tensor = torch.ones(3)
    save_checkpoint(tmp_path / "some.safetensors", {"a": tensor}, {})
    found, _ = load_checkpoint(tmp_path / "some.safetensors")
    tensor.zero_()
    assert found["a"].tolist() == [1, 1, 1]
    path = tmp_path / "some.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)  # in place, as cp does
    assert found["a"].tolist() == [1, 1, 1]


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)
keys = st.integers(0, 3) | st.text(max_size=3) | st.sampled_from(["a", "a.b", "b", "0"])
states = st.recursive(
    leaves | tensors_of_any_kind(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=10,
)


def normal(state):
    """A state with lists for its tuples and comparable values for its tensors."""
    if isinstance(state, torch.Tensor):
        return "tensor", str(state.dtype), tuple(state.shape), to_bytes(state)
    if isinstance(state, dict):
        return {"items": [(key, normal(value)) for key, value in state.items()]}
    return [normal(value) for value in state] if isinstance(state, list | tuple) else (type(state), state)


@settings(max_examples=100, deadline=None)
@given(states)
@example({"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)})
@example({0: torch.ones(1), "0": torch.zeros(1)})
@example({"tensor": "a", "items": [], "value": {"list": torch.ones(())}})
def test_states_are_flattened_and_back(state):
    """Through JSON, with the keys' types, their order, and keys that have dots in them or look like each other."""
    tensors, skeleton = flatten_state(state, "optimizer")
    assert all(name.startswith("optimizer") for name in tensors)
    skeleton = json.loads(json.dumps(skeleton))
    assert normal(unflatten_state(skeleton, tensors)) == normal(state)


def test_an_optimizer_goes_through_a_file(tmp_path):
    def new(seed):
        torch.manual_seed(seed)
        module = nn.Linear(3, 2)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1, betas=(0.8, 0.9))

    def step(module, optimizer, n):
        for i in range(n):
            optimizer.zero_grad()
            module(torch.full((1, 3), i + 1.0)).square().sum().backward()
            optimizer.step()

    module, optimizer = new(0)
    step(module, optimizer, 3)
    tensors, skeleton = flatten_state(optimizer.state_dict(), "optimizer")
    save_checkpoint(tmp_path / "some", tensors | module.state_dict(), {"skeleton": skeleton})
    step(module, optimizer, 3)

    other, other_optimizer = new(1)
    tensors, description = load_checkpoint(tmp_path / "some")
    load_weights(other, {name: tensors[name] for name in other.state_dict()}, tmp_path / "some")
    other_optimizer.load_state_dict(unflatten_state(description["skeleton"], tensors))
    for i in range(3):
        other_optimizer.zero_grad()
        other(torch.full((1, 3), i + 1.0)).square().sum().backward()
        other_optimizer.step()
    assert same(other.state_dict(), module.state_dict())


# ---------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A small checkpoint: its bytes, tensors, and description."""
    path = tmp_path_factory.mktemp("intact") / "some.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "weight": torch.randn(2, 3, generator=generator),
        "steps": torch.tensor(7),
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
    }
    save_checkpoint(path, tensors, {"recipe": {"lr": 0.001, "n": 12}, "data": ["SortAscending"], "flag": True})
    return path.read_bytes(), *load_checkpoint(path)


def check_damaged(path, data, tensors, description):
    """Whatever became of the file: the same content or a CheckpointError that names it, and nothing else."""
    path.write_bytes(data)
    try:
        found, found_description = load_checkpoint(path)
    except CheckpointError as error:
        if str(path) in str(error):
            return
        raise
    assert same(found, tensors)
    assert found_description == description


def parts_of(data):
    """The file's parts: length of its header, header, and tensors."""
    (size,) = struct.unpack("<Q", data[:8])
    return {"length": range(8), "header": range(8, 8 + size), "tensors": range(8 + size, len(data))}


@pytest.mark.parametrize("mask", [0x01, 0x04, 0x20, 0x80, 0xFF])
@pytest.mark.parametrize("part", ["length", "header", "tensors"])
def test_a_changed_byte_anywhere_is_noticed(tmp_path, intact, part, mask):
    data, tensors, description = intact
    wrong = {}
    for place in parts_of(data)[part]:
        damaged = bytearray(data)
        damaged[place] ^= mask
        try:
            check_damaged(tmp_path / "some.safetensors", bytes(damaged), tensors, description)
        except Exception as error:
            around = bytes(damaged[max(0, place - 12) : place + 12])
            wrong.setdefault(type(error).__name__, []).append((place, around))
    assert not wrong, {name: (len(offsets), offsets[:5]) for name, offsets in wrong.items()}


def test_a_file_cut_off_anywhere_is_noticed(tmp_path, intact):
    data, _, _ = intact
    path = tmp_path / "some.safetensors"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"some\.safetensors"):
            load_checkpoint(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_of_any_kind_is_noticed(tmp_path, intact, choices):
    """Bytes overwritten, put in, taken out, or swapped."""
    data, tensors, description = intact
    damaged = bytearray(data)
    start = choices.draw(st.integers(0, len(data)))
    end = choices.draw(st.integers(start, min(len(data), start + 64)))
    damaged[start:end] = choices.draw(st.binary(max_size=64) | st.just(bytes(reversed(data[start:end]))))
    check_damaged(tmp_path / "some.safetensors", bytes(damaged), tensors, description)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 64,
        b"{}",
        safetensors.torch.save({"a": torch.ones(2)}),
        safetensors.torch.save({"a": torch.ones(2)}, metadata={"format": "pt"}),
        *(
            safetensors.torch.save({"a": torch.ones(2)}, metadata={"mingpt": text})
            for text in ("", "{", "null", "1", "[]", "{}", '{"format": 1}', '{"format": 99}', '{"format": {}}')
        ),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        load_checkpoint(path)


def test_the_format_of_another_version_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("mingpt.storage.checkpoint.FORMAT", 99)
    save_checkpoint(tmp_path / "new", {"a": torch.ones(2)}, {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"new.*format.*99"):
        load_checkpoint(tmp_path / "new")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        load_checkpoint(tmp_path)


class Bomb:
    """Something whose unpickling is noticed."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_nothing_is_unpickled(tmp_path, monkeypatch, intact):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "bomb": Bomb()}, "bomb.pth")
    Path("bomb.pkl").write_bytes(pickle.dumps(Bomb()))

    def refuse(*args, **kwargs):
        pytest.fail("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    for name in ("bomb.pth", "bomb.pkl"):
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(name)
    assert not Path("exploded").exists()
    data, tensors, _ = intact
    Path("good").write_bytes(data)
    assert same(load_checkpoint("good")[0], tensors)


# ------------------------------------------------------------------------------------------- weights of a model


def new_model(**options):
    config = GPT.get_default_config()
    config.model_type = None
    config.merge_from_dict({"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 9, "block_size": 7} | options)
    return GPT(config)


def test_weights_come_back(tmp_path):
    model, other = new_model(), new_model()
    save_checkpoint(tmp_path / "model", model.state_dict(), {"model": model.config.to_dict()})
    tensors, description = load_checkpoint(tmp_path / "model")
    load_weights(other, tensors, tmp_path / "model")
    assert same(other.state_dict(), model.state_dict())
    assert description["model"] == model.config.to_dict()


@pytest.mark.parametrize(
    "saved, field",
    [
        ({"n_layer": 2}, r"transformer\.h\.1\..*asked for is None"),
        ({"vocab_size": 12}, r"shapes\.\S+(wte|lm_head)\.weight.*12.*9"),
        ({"block_size": 6}, r"shapes\.\S+wpe\.weight.*6.*7"),
        ({"n_embd": 4}, r"shape.*4.*8"),
        ({"skip_layer_norm": True}, r"ln_1\.(weight|bias) = None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_weights_of_another_model_are_refused(saved, field):
    own = new_model()
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"some\.safetensors.*{field}"):
        load_weights(own, new_model(**saved).state_dict(), "some.safetensors")
    assert same(own.state_dict(), before)


def test_a_missing_and_an_unknown_tensor_are_named():
    model = new_model()
    weights = model.state_dict()
    with pytest.raises(CheckpointError, match=r"file.*shapes\.extra = \[1\], asked for is None"):
        load_weights(model, weights | {"extra": torch.ones(1)}, "file")
    weights.pop("transformer.ln_f.bias")
    with pytest.raises(CheckpointError, match=r"file.*shapes\.transformer\.ln_f\.bias = None, asked for is \[8\]"):
        load_weights(model, weights, "file")


def test_fields_of_the_description_are_compared(tmp_path):
    path = tmp_path / "some.safetensors"
    save_checkpoint(path, {}, {"kind": "model", "sizes": [1]})
    load_checkpoint(path, kind="model", sizes=(1,))
    for expected, match in (
        ({"kind": "lora"}, "kind = 'model', asked for is 'lora'"),
        ({"kind": "model", "model": "a"}, "model = None, asked for is 'a'"),
    ):
        with pytest.raises(CheckpointError, match=rf"some\.safetensors: it was made with {match}"):
            load_checkpoint(path, **expected)


# --------------------------------------------------------------------------------------------------- atomicity


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "deep" / "folder" / "file"
    for data in (b"first", b"", b"second" * 1000):
        write_atomic(path, data)
        assert path.read_bytes() == data
        assert [p.name for p in path.parent.iterdir()] == ["file"]
    write_atomic(str(path), b"third")
    assert path.read_bytes() == b"third"


def test_a_new_file_has_the_usual_permissions(tmp_path):
    previous = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", b"data")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(previous)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("is_new", [True, False])
def test_what_goes_wrong_leaves_the_old_file(tmp_path, monkeypatch, function, error, is_new):
    path = tmp_path / "file"
    if not is_new:
        path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({} if is_new else {"file": b"old"})


def test_nobody_sees_half_a_file(tmp_path, monkeypatch):
    """Until the moment of the renaming the old file is there, whole, and the new one is on the disk before it."""
    path, events = tmp_path / "file", []
    path.write_bytes(b"old")
    fsync, replace = os.fsync, os.replace

    def look(name, function, *args):
        events.append((name, path.read_bytes()))
        function(*args)

    monkeypatch.setattr(os, "fsync", lambda *args: look("fsync", fsync, *args))
    monkeypatch.setattr(os, "replace", lambda *args: look("replace", replace, *args))
    write_atomic(path, b"new")
    assert events == [("fsync", b"old"), ("replace", b"old"), ("fsync", b"new")]


@pytest.mark.parametrize(
    "tensors, description, error",
    [({"a": torch.ones(2)}, {"x": object()}, TypeError), ({"a": [1.0]}, {}, AttributeError)],
)
def test_a_checkpoint_that_cannot_be_saved_leaves_the_old_one(tmp_path, tensors, description, error):
    save_checkpoint(tmp_path / "file", {"a": torch.zeros(2)}, {})
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(error):
        save_checkpoint(tmp_path / "file", tensors, description)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": before}
