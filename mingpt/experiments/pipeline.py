"""The pipeline of an experiment: each stage trains one thing, leaves a file of it, and from then on reads that file.

A run is a folder. A stage that was cut off goes on from its last state, in a folder beside its file. Every file says by
its cache key what it was made of. A model of other settings is refused, since all else in the folder is for it;
a prefix or a fine-tuned model of other settings is made beside the one that is there::

    config.json                        the run's settings, the default of every command on the folder
    model.safetensors                  the pretrained model
    pretraining/                       metrics.jsonl, and state.safetensors until the stage is done
    prefixes/<task>.safetensors        one key_value prefix each, what the commands use
    prefixes/training-<hash>/          the same of the prefixes that were trained together
    activation_prefixes/               the same of the experiment's activation prefixes
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast, overload

from torch import Tensor

from mingpt.adapters import PrefixAdapter
from mingpt.algebra import AnyTask
from mingpt.datasets import CustomDataset
from mingpt.distributed import resolve_device, run_on_main
from mingpt.model import GPT
from mingpt.prefix import AXES, Prefix, initial_prefix
from mingpt.storage.cache import CacheKey, beside, cached
from mingpt.storage.checkpoint import checksum, json_checksum, key_difference, read_description, weights_hash
from mingpt.storage.files import parsing, write_atomic
from mingpt.storage.weights import load_model, load_prefix, load_prefixes, save_model, save_prefix
from mingpt.tasks import PRETRAINING_TASKS, TEST_TASKS, Task
from mingpt.text import MixtureDataset, TextDataset, TextTask
from mingpt.trainer import AdapterTrainer, DivergedError, Trainer, check_config, recipe
from mingpt.training.batches import TaskDataset
from mingpt.utils import CfgNode, set_seed

logger = logging.getLogger("mingpt")

EVERY_TASK = (*PRETRAINING_TASKS, *TEST_TASKS)
"""The sixteen tasks of the experiment."""

KINDS = {"activation": "activation_prefixes", "key_value": "prefixes"}
"""The kinds of prefix of the experiment, the seed notebook's first, and the folder in a run that each has."""

Init = str | Sequence[int] | Tensor
"""What a prefix is initialised from: see ``mingpt.prefix.initial_prefix``; or a prefix, or K of them."""


@overload
def dataset(config: CfgNode, split: str, tasks: Sequence[Task]) -> CustomDataset: ...
@overload
def dataset(config: CfgNode, split: str, tasks: Sequence[AnyTask]) -> TaskDataset: ...
def dataset(config: CfgNode, split: str, tasks: Sequence[Any]) -> TaskDataset:
    """The run's examples of some tasks, all on rows or all on text."""
    data = config.data
    if any(isinstance(task, TextTask) for task in tasks):
        text_tasks = cast(Sequence[TextTask], tasks)
        return TextDataset(split, list(text_tasks), data.length, prefix_padding=data.prefix_size, seed=config.seed)
    return CustomDataset(
        split, list(tasks), data.length, data.num_digits, prefix_padding=data.prefix_size, seed=config.seed
    )


def build_model(config: CfgNode, tasks: Sequence[Task] = EVERY_TASK) -> GPT:
    """A fresh model with a token for everything that one of the tasks reads or produces."""
    data = dataset(config, "train", tasks)
    return new_model(config, data.get_vocab_size(), data.get_block_size())


def new_model(config: CfgNode, vocab_size: int, block_size: int) -> GPT:
    """A fresh model of the run's configuration with so many tokens, which reads so many at a time."""
    model_config = GPT.get_default_config()
    model_config.merge_from_dict(
        {
            "model_type": None,
            "vocab_size": vocab_size,
            "block_size": block_size,
            **{name: value for name, value in config.model.to_dict().items() if name != "dropout"},
            **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), config.model.dropout),
        }
    )
    model = GPT(model_config)
    logger.info("number of parameters: %.2fM", model.n_parameters / 1e6)
    return model


# -------------------------------------------------------------------------------------------------- whole models


def pretrain(
    config: CfgNode,
    run: str | Path,
    tasks: Sequence[Task] = PRETRAINING_TASKS,
    later_tasks: Sequence[Task] = TEST_TASKS,
) -> tuple[GPT, float]:
    """Train a new model on tasks mixed, or read it where that is done.

    Args:
        config: see ``mingpt.experiments.presets``; ``trainer`` is the budget.
        run: the folder; a new one gets the configuration as its config.json.
        tasks: any, with no token naming the task.
        later_tasks: that the model is to have the vocabulary for too.

    Returns:
        The model in evaluation mode, and how many seconds its training took.

    Raises:
        CheckpointError: if the model there is of other tasks or settings.
        ValueError: for a configuration that makes no sense; nothing is written then.
    """
    path = Path(run) / "model.safetensors"
    if config.preset == "text":
        raise ValueError(f"{run} is of the language model, preset 'text'; 'mingpt pretrain --preset text' trains it")
    for part in (config.trainer, config.prefix):
        check_config(_trainer_config(part, path.parent))
    if min(config.evaluation.n_rows, config.evaluation.n_matrix_rows) < 1:
        raise ValueError(f"n_rows and n_matrix_rows must be at least 1, got evaluation = {config.evaluation.to_dict()}")
    data = dataset(config, "train", tasks)
    key = _cache_key("pretraining", config, config.trainer, data) | {"init": config.model.to_dict()}

    def build() -> GPT:
        set_seed(config.seed)
        model = build_model(config, [*tasks, *later_tasks])
        write_config(config, path.parent)
        return model

    return train_model(config, build, data, key, path, "pretraining")


def write_config(config: CfgNode, run: Path) -> None:
    """Make the configuration that of a run's folder, unless its pretraining was cut off and goes on."""
    file = run / "config.json"
    is_interrupted = (run / "pretraining" / "state.safetensors").exists() and file.exists()
    content = json.dumps(config.to_dict(), indent=1).encode()
    run_on_main(lambda: None if is_interrupted else write_atomic(file, content))


def fine_tune(
    config: CfgNode, model: GPT, tasks: Sequence[Task], run: str | Path, name: str = "fine_tuned"
) -> tuple[GPT, float]:
    """Train all weights of a copy of a model further, or read the result where that is done.

    Args:
        config: ``trainer`` is the budget.
        model: stays as it is.
        tasks: any.
        run: the folder.
        name: of the file in it.

    Returns:
        The copy in evaluation mode, and how many seconds its training took.
    """
    data = dataset(config, "train", tasks)
    key = _cache_key(name, config, config.trainer, data) | {"init": weights_hash(model)}
    path = beside(Path(run) / f"{name}.safetensors", key)

    def build() -> GPT:
        set_seed(config.seed + 1)
        return copy.deepcopy(model)

    return train_model(config, build, data, key, path, path.stem)


def train_model(
    config: CfgNode,
    build: Callable[[], GPT],
    data: CustomDataset | MixtureDataset,
    key: dict[str, Any],
    path: Path,
    folder: str,
) -> tuple[GPT, float]:
    """Train the model that ``build`` makes on ``data``, or read it from ``path`` where that is done.

    Args:
        config: ``trainer`` is the budget.
        build: called only where there is something to train.
        data: what it is trained on.
        key: identifies the result.
        path: of the weights.
        folder: beside them, for the state of a training that was cut off.

    Returns:
        The model in evaluation mode, and how many seconds its training took.
    """

    def compute() -> None:
        model = build()
        trainer = Trainer(_trainer_config(config.trainer, path.with_name(folder)), model, data)
        _train(trainer, key, partial(save_model, path, model, cache_key=key))

    load = partial(load_model, device=resolve_device(config.trainer.device))
    model, description = cached(path, key, compute, load)
    _discard_state(path.with_name(folder))
    with parsing(path, "a model with the seconds of its training"):
        return model, float(description["metrics"]["seconds"])


# --------------------------------------------------------------------------------- what is beside a frozen model


def train_prefixes(
    config: CfgNode,
    model: GPT,
    tasks: Sequence[Task],
    run: str | Path,
    name: str = "prefixes",
    kind: str = "key_value",
    n_positions: int | None = None,
    init: Init | None = None,
    metrics: dict[str, dict[str, Any]] | None = None,
) -> tuple[dict[str, Prefix], float]:
    """Train a prefix for each task, those that are missing at once, or read them where that is done.

    Args:
        config: ``prefix`` is the budget.
        model: stays as it is.
        tasks: any, K of them, also ones it was not pretrained on.
        run: the folder.
        name: of the folder in it, which has a file for each task.
        kind: of prefix, see ``mingpt.prefix.Prefix``.
        n_positions: of each prefix, ``data.prefix_size`` by default; the placeholders beyond keep their padding.
        init: see ``Init``; "random" by default for key_value prefixes, "padding" for the others.
        metrics: a dictionary that receives for each task n_iters, after how many iterations its prefix ended (below
            ``prefix.max_iters``: at its plateau, see ``PrefixTrainer``), training, the folder's name, loss and seconds.

    Returns:
        The prefixes by task, and how many seconds the training took.

    Raises:
        DivergedError: if the training of one diverges; the others are trained and saved then.
        LockedError: if another process writes into the run.
    """
    folder, model_hash = Path(run) / name, weights_hash(model)
    init = ("random" if kind == "key_value" else "padding") if init is None else init
    data = {str(task): dataset(config, "train", [task]) for task in tasks}
    size = init.shape[-2] if isinstance(init, Tensor) else n_positions or config.data.prefix_size
    inits = list(init) if isinstance(init, Tensor) and init.ndim > len(AXES[kind]) else [init] * len(data)
    shared = {"kind": kind, "n_positions": size, "model": model_hash}
    keys = {
        task: _cache_key("prefix", config, config.prefix, data[task])
        | shared
        | {"init": checksum({"init": own}) if isinstance(own, Tensor) else own}
        for task, own in zip(data, inits, strict=True)
    }
    paths = {task: beside(folder / f"{task}.safetensors", key) for task, key in keys.items()}

    def train() -> None:
        missing = run_on_main(lambda: [task for task in keys if not paths[task].exists()])
        training, own_keys = run_on_main(partial(_training_of, folder, keys, missing))
        set_seed(config.seed + 1)
        initial = init if isinstance(init, Tensor) else initial_prefix(model, size, init, kind=kind)
        initial = initial.detach().expand(len(data), *initial.shape[-len(AXES[kind]) :])
        values = initial[[task in own_keys for task in data]]
        trained = PrefixAdapter(model, Prefix(kind, values))
        own_data = [data[task] for task in own_keys]
        trainer = AdapterTrainer(_trainer_config(config.prefix, training), model, own_data, trained)

        def save(metrics: dict[str, float]) -> None:
            final = trained.prefix().values.detach()
            for n, (task, key) in enumerate(own_keys.items()):
                if task in missing and not trainer.is_diverged[n]:
                    own = metrics | {"n_iters": int(trainer.n_iters[n]), "training": training.name}
                    prefix = Prefix(kind, final[n : n + 1])
                    save_prefix(paths[task], prefix, model, task=task, metrics=own, cache_key=key)

        _train(trainer, {"prefixes": own_keys}, save)

    # The first one that is missing has all trained that are.
    load, lock = partial(load_prefix, model=model, model_hash=model_hash), Path(run) / ".lock"
    found = {task: cached(paths[task], key, train, load, lock) for task, key in keys.items()}
    own_metrics: dict[str, dict[str, Any]] = {}
    for task, (_, description) in found.items():
        with parsing(paths[task], "a prefix with the metrics of its training"):
            own_metrics[task] = {
                name: description["metrics"][name] for name in ("loss", "seconds", "n_iters", "training")
            }
    if metrics is not None:
        metrics |= own_metrics
    # The prefixes of one training share its time.
    seconds = {each["training"]: each["seconds"] for each in own_metrics.values()}
    for training in seconds:
        _discard_state(folder / training)
    return {task: prefix for task, (prefix, _) in found.items()}, sum(seconds.values())


def _training_of(
    folder: Path, keys: Mapping[str, CacheKey], missing: Sequence[str]
) -> tuple[Path, dict[str, CacheKey]]:
    """The folder of the training of the prefixes that are missing, and the cache keys of all that it trains.

    One that was cut off when it had saved some of its prefixes goes on, so that the others become the same.
    """
    for state in sorted(folder.glob("training-*/state.safetensors")):
        found = read_description(state).get("cache_key", {}).get("prefixes", {})
        own_keys = {task: key for task, key in keys.items() if task in found}
        if own_keys.keys() == found.keys() >= set(missing) and not key_difference(found, own_keys):
            return state.parent, own_keys
    own_keys = {task: keys[task] for task in missing}
    return folder / f"training-{json_checksum(own_keys)[:8]}", own_keys


def task_of(name: str) -> Task:
    """The task of a prefix, by the name of its file: Add1, or Add1-1a2b3c4d of one that is beside it.

    Raises:
        ValueError: for a name that is no task's.
    """
    return Task.parse(re.sub(r"-[0-9a-f]+$", "", name))


def find_task(name: str) -> Task | None:
    """As ``task_of``, but None for a name that is no task's."""
    try:
        return task_of(name)
    except ValueError:
        return None


def load_run(run: str | Path, device: str = "auto") -> tuple[GPT, dict[str, Prefix], dict[str, Any]]:
    """Read what a run has trained.

    Args:
        run: the folder.
        device: where to put it, see ``mingpt.distributed.resolve_device``.

    Returns:
        The model in evaluation mode, its prefixes by name, and the model's description, whose "data" is for
        ``CustomDataset.from_description``.

    Raises:
        FileNotFoundError: if there is no model.
        ValueError: if the model was saved without saying what data it was trained on.
    """
    model, description = load_model(Path(run) / "model.safetensors", resolve_device(device))
    with parsing(Path(run) / "model.safetensors", "a description of the model's data"):
        data = description.get("cache_key", {}).get("data")
        if data is None:
            raise ValueError("it was saved without a description of its data; pretrain it as a run")
        sizes = {name: data[name] for name in ("length", "num_digits", "prefix_padding", "seed")}
        CustomDataset("test", [Task.parse(name) for name in data["tasks"]], **sizes).check_fits(
            model.config.vocab_size, model.config.block_size
        )
    return model, load_prefixes(Path(run) / "prefixes", model), description | {"data": data}


# ------------------------------------------------------------------------------------------------------ one stage


def _cache_key(stage: str, config: CfgNode, budget: CfgNode, data: CustomDataset) -> dict[str, Any]:
    return {"stage": stage, "seed": config.seed, "data": data.describe(), "recipe": recipe(budget)}


def _trainer_config(config: CfgNode, folder: Path) -> CfgNode:
    config = config.copy()
    config.checkpoint_path, config.metrics_path = folder / "state.safetensors", folder / "metrics.jsonl"
    return config


def _train(trainer: Trainer, cache_key: CacheKey, save: Callable[..., None]) -> None:
    """Train and save; then the state goes, so that deleting the file that was saved has it made anew.

    Raises:
        DivergedError: with the state left; of adapters, those that did not diverge are saved instead.
    """
    path, n_iterations = Path(trainer.config.checkpoint_path), trainer.config.max_iters
    logger.info("%s: %d iterations on %s in %s", path.parent.name, n_iterations, trainer.device, trainer.precision)
    trainer.cache_key = dict(cache_key)
    error = None
    try:
        trainer.run()
    except DivergedError as raised:
        if not isinstance(trainer, AdapterTrainer):
            raise
        error = raised
    loss = trainer.loss.item()
    save(metrics={"loss": loss if math.isfinite(loss) else None, "seconds": trainer.seconds})
    _discard_state(path.parent)
    if error:
        raise error


def _discard_state(folder: Path) -> None:
    """Remove the state of a training whose result is there; it may be gone, and where it must stay it does no harm."""
    with contextlib.suppress(OSError):
        run_on_main(lambda: (folder / "state.safetensors").unlink(missing_ok=True))
