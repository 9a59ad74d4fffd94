"""Configurations, seeds and logging."""

from __future__ import annotations

import copy
import json
import pickle
import random
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mingpt.utils import CfgNode, parse_value, set_seed, setup_logging


def make_config():
    """A closed configuration with closed groups, as the package's defaults are."""
    return CfgNode(
        system=CfgNode(seed=3, work_dir="out").close(),
        model=CfgNode(n_layer=4, n_head=2, model_type=None).close(),
        betas=(0.9, 0.95),
    ).close()


# --------------------------------------------------------------------------------------------- keys of a CfgNode


def test_a_node_is_built_attribute_by_attribute():
    """As minGPT's scripts do."""
    config = CfgNode()
    config.system = CfgNode()
    config.system.work_dir = "out"
    config.trainer = CfgNode(max_iters=7)
    config.trainer.max_iters = 9
    assert config.to_dict() == {"system": {"work_dir": "out"}, "trainer": {"max_iters": 9}}


def test_known_keys_are_set_without_a_word():
    config = make_config()
    config.model.n_layer = 6
    config.merge_from_dict({"betas": (0.5, 0.6)})
    assert (config.model.n_layer, config.betas) == (6, (0.5, 0.6))


def test_unknown_key_warns_and_names_the_nearest():
    config = make_config()
    with pytest.warns(UserWarning, match=r"'n_layers'.*did you mean 'n_layer'\?") as record:
        config.model.n_layers = 6
    assert record[0].filename == __file__  # it points at the line that made the mistake
    assert config.model.n_layers == 6  # and an old script still runs
    assert config.model.n_layer == 4
    with pytest.warns(UserWarning, match="'learning_rate'") as record:
        config.model.learning_rate = 1.0
    assert "did you mean" not in str(record[0].message)
    assert "n_head" in str(record[0].message)
    with pytest.warns(UserWarning, match=r"'beta'.*'betas'"):
        config.merge_from_dict({"beta": (1, 1)})


def test_missing_key_is_an_attribute_error_with_the_nearest():
    config = make_config()
    with pytest.raises(AttributeError, match=r"'n_heads'.*did you mean 'n_head'\?"):
        config.model.n_heads  # noqa: B018
    assert not hasattr(config, "nothing_like_it")
    assert getattr(config.model, "absent", 5) == 5


def test_a_group_cannot_be_passed_over():
    with pytest.raises(AttributeError, match="'n_layer'"):
        make_config().n_layer  # noqa: B018


# ------------------------------------------------------------------------------------------------------ overrides


def test_merge_from_args_as_minGPT():
    config = make_config()
    config.merge_from_args(
        ["--model.n_layer=10", "--system.work_dir=out/a=b", "--betas=(0.1, 0.2)", "--system.seed=-1"]
    )
    assert config.to_dict() == {
        "system": {"seed": -1, "work_dir": "out/a=b"},
        "model": {"n_layer": 10, "n_head": 2, "model_type": None},
        "betas": (0.1, 0.2),
    }
    config.merge_from_args(["--model.model_type=gpt-mini"])
    assert config.model.model_type == "gpt-mini"
    config.merge_from_args(["--model.model_type=None"])
    assert config.model.model_type is None
    config.merge_from_args([])
    assert config.model.n_layer == 10


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.n_layers=3", r"'model.n_layers'.*did you mean 'model.n_layer'\?"),
        ("--modle.n_layer=3", r"'modle.n_layer'.*did you mean 'model.n_layer'\?"),
        ("--modle=3", r"'modle'.*did you mean 'model'\?"),
        (
            "--n_layer=3",
            r"unknown configuration key 'n_layer' \(did you mean 'model.n_layer'\?\). Known here: system, ",
        ),
        ("--n_layers=3", r"did you mean 'model.n_layer'\?"),
        ("--model.n_layer.deep=3", "unknown configuration key"),
        ("--model=3", r"group.*n_layer"),
        ("--=3", "unknown configuration key"),
        ("--model.=3", "unknown configuration key"),
        ("model.n_layer=3", "--key=value"),
        ("-model.n_layer=3", "--key=value"),
        ("--model.n_layer", "--key=value"),
        ("--_choices={}", "unknown configuration key"),
        ("--_defaults=None", "unknown configuration key"),
        ("--to_dict=3", "unknown configuration key"),
        ("--_is_closed=False", "unknown configuration key"),
    ],
)
def test_wrong_overrides_are_errors(argument, message):
    config = make_config()
    with pytest.raises(ValueError, match=message):
        config.merge_from_args([argument])
    assert config == make_config()


def test_override():
    config = make_config()
    config.override("model.n_head", 8)
    config.override("betas", [1, 2])
    assert (config.model.n_head, config.betas) == (8, (1.0, 2.0))
    with pytest.raises(ValueError, match=r"did you mean 'model.n_head'"):
        config.override("model.n_heads", 8)


def make_typed():
    """A key of every type."""
    return CfgNode(
        flag=False, count=4, rate=0.5, name="adamw", path=None, betas=(0.9, 0.95), gelu="none", bar="auto"
    ).close(bar=("auto", True, False))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("flag=true", True),
        ("flag=True", True),
        ("flag=false", False),
        ("flag=False", False),
        ("count=-3", -3),
        ("count=1e3", 1000),
        ("count=2.0", 2),
        ("rate=2", 2.0),
        ("rate=1e-3", 1e-3),
        ("name=muon", "muon"),
        ("name=3", "3"),
        ("name=false", "false"),
        ("name=None", None),
        ("gelu=none", "none"),
        ("path=runs/1", "runs/1"),
        ("path=none", None),
        ("path=3", 3),
        ("path=true", True),
        ("betas=[1, 0.5]", (1.0, 0.5)),
        ("bar=auto", "auto"),
        ("bar=false", False),
        ("bar=True", True),
    ],
)
def test_an_override_is_read_in_the_type_of_the_default(argument, value):
    config = make_typed()
    config.merge_from_args([f"--{argument}"])
    found = getattr(config, argument.partition("=")[0])
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("flag=yes", "true or false"),
        ("flag=0", "true or false"),
        ("flag=none", "true or false"),
        ("count=abc", "an integer"),
        ("count=1.5", "an integer"),
        ("count=true", "an integer"),
        ("count=none", "an integer"),
        ("count=1e999", "an integer"),
        ("rate=abc", "a number"),
        ("rate=false", "a number"),
        ("rate=[1]", "a number"),
        ("betas=0.5", "a list of as many values"),
        ("betas=(0.5,)", "a list of as many values"),
        ("betas=('a', 'b')", "a list of as many values"),
        ("bar=yes", "one of auto, True, False"),
        ("bar=1", "one of auto, True, False"),
    ],
)
def test_an_override_of_another_type_is_one_line_and_changes_nothing(argument, expected):
    config = make_typed()
    with pytest.raises(ValueError) as error:
        config.merge_from_args([f"--{argument}"])
    key, _, text = argument.partition("=")
    message = str(error.value)
    assert f"{key!r} takes {expected}, got " in message
    assert repr(parse_value(text)).strip("'") in message
    assert "\n" not in message
    assert config == make_typed()


def test_the_defaults_of_the_package_are_typed():
    from mingpt.experiments.presets import get_default_config

    config = get_default_config()
    config.merge_from_args(["--model.skip_layer_norm=false", "--trainer.compile=false", "--trainer.progress=false"])
    assert (config.model.skip_layer_norm, config.trainer.compile, config.trainer.progress) == (False, False, False)
    config.merge_from_args(["--trainer.max_iters=none", "--model.gelu_approximate=none", "--trainer.device=cuda:1"])
    assert (config.trainer.max_iters, config.model.gelu_approximate) == (None, "none")
    assert config.trainer.device == "cuda:1"
    config.override("prefix.validate_every", None)
    assert config.prefix.validate_every is None
    for text in ("abc", "1e-2", "none"):
        with pytest.raises(ValueError, match=r"'trainer.batch_size' takes an integer"):
            config.merge_from_args([f"--trainer.batch_size={text}"])


def test_a_key_without_a_default_keeps_the_type_that_it_was_given():
    config = CfgNode(max_iters=None, path=None).close()
    config.max_iters, config.path = 700, "runs/0"  # as a preset does
    for text, value in (("1e3", 1000), ("none", None)):
        config.merge_from_args([f"--max_iters={text}", "--path=3"])
        assert (config.max_iters, config.path) == (value, "3")
    config.max_iters = 700
    with pytest.raises(ValueError, match="'max_iters' takes an integer, got 'abc'"):
        config.merge_from_args(["--max_iters=abc"])


def test_override_takes_values_of_the_keys_type():
    config = make_typed()
    for key, value in {"count": np.int64(7), "rate": np.float32(0.25), "name": None, "bar": False}.items():
        config.override(key, value)
    assert [type(each) for each in (config.count, config.rate)] == [int, float]
    for key, value in {"count": "7", "rate": "0.5", "name": 3, "flag": 1, "bar": 0, "betas": None}.items():
        with pytest.raises(ValueError, match=f"'{key}' takes "):
            config.override(key, value)


def test_assignment_stays_free():
    """As minGPT's scripts do it."""
    config = make_typed()
    config.count, config.flag = "abc", None
    assert (config.count, config.flag) == ("abc", None)
    config.override("count", 3)  # its default still says what it is
    assert config.count == 3


def test_the_types_survive_copies():
    for config in duplicates(make_typed()).values():
        config.name = None
        config.override("name", "muon")
        config.merge_from_args(["--bar=false"])
        assert config.bar is False
        with pytest.raises(ValueError, match="takes an integer"):
            config.override("count", "abc")


# ---------------------------------------------------------------------------------------- a saved configuration


def test_update_from_reads_what_json_keeps():
    config, saved = make_config(), make_config()
    saved.model.n_layer, saved.betas, saved.system.work_dir = 7, (0.1, 0.2), "elsewhere"
    config.update_from(json.loads(json.dumps(saved.to_dict())), "config.json")
    assert config == saved
    config.update_from({"model": {"n_head": 8}}, "config.json")  # a missing key keeps its value
    assert (config.model.n_head, config.model.n_layer) == (8, 7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"n_layers": 3}}, r"runs/0/config.json: .*'model.n_layers'.*did you mean 'model.n_layer'"),
        ({"model": {"n_layer": "3"}}, r"runs/0/config.json: .*'model.n_layer' takes an integer, got '3'"),
        ({"extra": {"a": 1}}, r"runs/0/config.json: unknown .*'extra.a'"),
        ({"model": 3}, r"runs/0/config.json: .* is a group"),
        ({"betas": {"a": 1}}, "unknown configuration key 'betas.a'"),
        ({"_defaults": {"a": 1}}, "unknown configuration key '_defaults.a'"),
    ],
)
def test_update_from_is_strict(values, message):
    with pytest.raises(ValueError, match=message):
        make_config().update_from(values, "runs/0/config.json")


@pytest.mark.parametrize("name", ["a", "model"])
def test_a_key_may_have_its_groups_name(name):
    config = CfgNode(**{name: CfgNode(**{name: 1})})
    config.override(f"{name}.{name}", 2)
    assert config.to_dict() == {name: {name: 2}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("True", True),
        ("None", None),
        ("true", True),
        ("false", False),
        ("none", None),
        ("[1, 2]", [1, 2]),
        ("'3'", "3"),
        ("gpt-mini", "gpt-mini"),
        ("out/run 1", "out/run 1"),
        ("", ""),
        ("1or2", "1or2"),
        ("{[1]: 2}", "{[1]: 2}"),
        ("a\0b", "a\0b"),
        ("(" * 500, "(" * 500),
    ],
)
def test_parse_value(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(literals)
@settings(deadline=None, max_examples=40)
def test_parse_value_reads_what_repr_writes(value):
    assert parse_value(repr(value)) == value


# ----------------------------------------------------------------------------------------------- copies and text


def duplicates(config):
    return {
        "copy": config.copy(),
        "copy.copy": copy.copy(config),
        "deepcopy": copy.deepcopy(config),
        "pickle": pickle.loads(pickle.dumps(config)),
    }


@pytest.mark.parametrize("kind", ["copy", "copy.copy", "deepcopy", "pickle"])
def test_copies_are_equal_and_still_closed(kind):
    config = make_config()
    other = duplicates(config)[kind]
    assert isinstance(other, CfgNode)
    assert other is not config
    assert other == config
    assert other.to_dict() == config.to_dict()
    with pytest.warns(UserWarning, match="did you mean 'model'"):
        other.models = 1
    assert "models" not in config.to_dict()
    assert other != config


@pytest.mark.parametrize("kind", ["copy", "deepcopy", "pickle"])
def test_copies_are_independent(kind):
    config = make_config()
    other = duplicates(config)[kind]
    other.model.n_layer = 99
    other.override("system.work_dir", "elsewhere")
    other.betas = None
    assert config == make_config()
    with pytest.warns(UserWarning, match="did you mean 'n_layer'"):
        other.model.n_layrs = 1


def test_an_open_node_stays_open_in_copies():
    for other in duplicates(CfgNode(a=CfgNode())).values():
        other.b = 1
        other.a.b = 1


def test_to_dict_is_plain_and_separate():
    config = make_config()
    plain = config.to_dict()
    assert plain == {
        "system": {"seed": 3, "work_dir": "out"},
        "model": {"n_layer": 4, "n_head": 2, "model_type": None},
        "betas": (0.9, 0.95),
    }
    plain["model"]["n_layer"] = 0
    plain["system"] = None
    assert config == make_config()


def test_equality():
    assert make_config() == make_config()
    assert make_config() != make_config().to_dict()
    assert CfgNode(a=1) != CfgNode(a=2)
    assert CfgNode(a=1) != CfgNode(a=1, b=None)
    assert CfgNode() == CfgNode()


def test_text():
    text = str(make_config())
    assert text.splitlines() == [
        "system:",
        "    seed: 3",
        "    work_dir: out",
        "model:",
        "    n_layer: 4",
        "    n_head: 2",
        "    model_type: None",
        "betas: (0.9, 0.95)",
    ]
    assert repr(make_config()) == text


# ----------------------------------------------------------------------------------------------- seeds and logging


@pytest.mark.parametrize("seed", [0, 17, 2**32 + 17, 2**40])
def test_set_seed_makes_runs_repeat(seed):
    def draw():
        return random.random(), float(np.random.rand()), torch.rand(3).tolist()  # noqa: NPY002

    set_seed(seed)
    first, second = draw(), draw()
    set_seed(seed)
    again = draw()
    set_seed(seed + 1)
    other = draw()
    assert again == first
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_setup_logging_writes_arguments_and_configuration(tmp_path, monkeypatch):
    work_dir = tmp_path / "runs" / "first"
    config = make_config()
    config.system.work_dir = str(work_dir)
    monkeypatch.setattr(sys, "argv", ["train.py", "--model.n_layer=10"])
    setup_logging(config)
    assert (work_dir / "args.txt").read_text() == "train.py --model.n_layer=10"
    written = json.loads((work_dir / "config.json").read_text())
    assert written == config.to_dict() | {"betas": [0.9, 0.95]}
    config.model.n_layer = 11
    setup_logging(config)  # a second run into the same folder
    assert json.loads((work_dir / "config.json").read_text())["model"]["n_layer"] == 11
    assert sorted(path.name for path in work_dir.iterdir()) == ["args.txt", "config.json"]


def test_importing_and_building_configs_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_config().copy()
