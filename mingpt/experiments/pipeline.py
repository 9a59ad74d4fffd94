"""The pipeline of an experiment: each stage trains one thing, leaves a file of it, and from then on reads that file.

A run is a folder. A stage that was cut off goes on from its last state, in a folder beside its file. Every file says by
its cache key what it was made of. A model of other settings is refused, since all else in the folder is for it;
a prefix, a LoRA or a fine-tuned model of other settings is made beside the one that is there.

    config.json                        the run's settings, the default of every command on the folder
    model.safetensors                  the pretrained model
    pretraining/                       metrics.jsonl, and state.safetensors until the stage is done
    prefixes/<task>.safetensors        one prefix each
    prefixes/training-<hash>/          the same of the prefixes that were trained together
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mingpt.datasets import CustomDataset
from mingpt.distributed import resolve_device, run_on_main
from mingpt.lora import LoRA
from mingpt.model import GPT
from mingpt.prefix import AXES, Prefix, Reparametrization, initial_prefix
from mingpt.storage.cache import CacheKey, beside, cached
from mingpt.storage.checkpoint import checksum, json_checksum, weights_hash, write_atomic
from mingpt.storage.weights import load_lora, load_model, load_prefix, load_prefixes, save_lora, save_model, save_prefix
from mingpt.tasks import PRETRAINING_TASKS, TEST_TASKS, Task
from mingpt.trainer import LoRATrainer, PrefixTrainer, Trainer, check_config
from mingpt.training.metrics import RUNTIME_KEYS
from mingpt.utils import CfgNode, set_seed

logger = logging.getLogger("mingpt")

Init = str | Sequence[int] | Tensor
"""What a prefix is initialised from: see ``mingpt.prefix.initial_prefix``; or a prefix, or K of them."""


def dataset(config: CfgNode, split: str, tasks: Sequence[Task]) -> CustomDataset:
    """The run's examples of some tasks."""
    data = config.data
    return CustomDataset(
        split, list(tasks), data.length, data.num_digits, prefix_padding=data.prefix_size, seed=config.seed
    )


def build_model(config: CfgNode, tasks: Sequence[Task] = (*PRETRAINING_TASKS, *TEST_TASKS)) -> GPT:
    """A fresh model with a token for everything that one of the tasks reads or produces."""
    data = dataset(config, "train", tasks)
    model_config = GPT.get_default_config()
    model_config.merge_from_dict(
        {
            "model_type": None,
            "vocab_size": data.get_vocab_size(),
            "block_size": data.get_block_size(),
            **{name: value for name, value in config.model.to_dict().items() if name != "dropout"},
            **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), config.model.dropout),
        }
    )
    return GPT(model_config)


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
    for part in (config.trainer, config.prefix):
        check_config(_trainer_config(part, path.parent))
    for name in ("n_rows", "n_matrix_rows"):
        if config.evaluation.to_dict()[name] < 1:
            raise ValueError(f"evaluation.{name} must be at least 1, got {config.evaluation.to_dict()[name]}")

    def build() -> GPT:
        set_seed(config.seed)
        model = build_model(config, [*tasks, *later_tasks])
        content = json.dumps(config.to_dict(), indent=1).encode()
        run_on_main(lambda: write_atomic(path.with_name("config.json"), content))
        return model

    return _train_model(config, build, tasks, path, "pretraining", {"init": config.model.to_dict()})


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

    def build() -> GPT:
        set_seed(config.seed + 1)
        return copy.deepcopy(model)

    return _train_model(config, build, tasks, Path(run) / f"{name}.safetensors", name, {"init": weights_hash(model)})


def _train_model(
    config: CfgNode, build: Callable[[], GPT], tasks: Sequence[Task], path: Path, name: str, own: dict[str, Any]
) -> tuple[GPT, float]:
    data = dataset(config, "train", tasks)
    key = _cache_key(name, config, config.trainer, data) | own
    if name != "pretraining":
        path = beside(path, key)

    def compute() -> None:
        model, folder = build(), path.with_name(name if path.stem in ("model", name) else path.stem)
        trainer = Trainer(_trainer_config(config.trainer, folder), model, data)
        size, budget = f"{model.n_parameters / 1e6:.2f}M parameters", config.trainer
        logger.info("%s: %s, %d iterations of %d rows", name, size, budget.max_iters, budget.batch_size)
        logger.info("on %s in %s", trainer.device, trainer.precision)
        _train(trainer, key, lambda **about: save_model(path, model.eval(), cache_key=key, **about))

    device = resolve_device(config.trainer.device)
    return _value_and_seconds(cached(path, key, compute, lambda path: load_model(path, device)))


# --------------------------------------------------------------------------------- what is beside a frozen model


def train_prefixes(
    config: CfgNode,
    model: GPT,
    tasks: Sequence[Task],
    run: str | Path,
    name: str = "prefixes",
    kind: str = "activation",
    n_positions: int | None = None,
    init: Init = "padding",
    is_reparametrized: bool = False,
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
        init: see ``Init``.
        is_reparametrized: trains key_value prefixes through ``mingpt.prefix.Reparametrization``.

    Returns:
        The prefixes by task, and how many seconds the training took.
    """
    folder, tasks, model_hash = Path(run) / name, list(dict.fromkeys(tasks)), weights_hash(model)
    size = init.shape[-2] if isinstance(init, Tensor) else n_positions or config.data.prefix_size
    inits = list(init) if isinstance(init, Tensor) and init.ndim > len(AXES[kind]) else [init] * len(tasks)
    shared = {"kind": kind, "n_positions": size, "is_reparametrized": is_reparametrized, "model": model_hash}
    # Where a converged prefix gives its rows to the others, each depends on which were trained with it.
    shared["trained_with"] = [str(task) for task in tasks] if config.prefix.converged_loss else None
    keys = {
        str(task): _cache_key("prefix", config, config.prefix, dataset(config, "train", [task]))
        | shared
        | {"init": checksum({"init": own}) if isinstance(own, Tensor) else own}
        for task, own in zip(tasks, inits, strict=True)
    }
    paths = {each: beside(folder / f"{each}.safetensors", key) for each, key in keys.items()}
    missing = run_on_main(lambda: [number for number, each in enumerate(keys) if not paths[each].exists()])
    if missing and config.prefix.converged_loss:
        missing = list(range(len(tasks)))
    if missing:
        asked = [tasks[number] for number in missing]
        own_keys = {str(task): keys[str(task)] for task in asked}
        training = folder / f"training-{json_checksum(own_keys)[:8]}"
        set_seed(config.seed + 1)
        if isinstance(init, Tensor):
            values = torch.stack([torch.as_tensor(inits[number]) for number in missing]).detach()
        else:
            values = initial_prefix(model, size, init, kind=kind).detach()[None].repeat_interleave(len(asked), 0)
        trained = Reparametrization(values) if is_reparametrized else Prefix(kind, values.requires_grad_())
        data = [dataset(config, "train", [task]) for task in asked]
        trainer = PrefixTrainer(_trainer_config(config.prefix, training), model, data, trained)
        budget = config.prefix
        logger.info("%d prefixes: %d iterations of %d rows each", len(asked), budget.max_iters, budget.batch_size)

        def save(**about: Any) -> None:
            final = (trained() if isinstance(trained, Reparametrization) else trained.values).detach()
            for each, value in zip(own_keys, final, strict=True):
                about |= {"task": each, "training": training.name, "cache_key": own_keys[each]}
                save_prefix(paths[each], Prefix(kind, value[None]), model, **about)

        _train(trainer, {"prefixes": own_keys}, save)
    load = partial(load_prefix, model=model, model_hash=model_hash)
    found = {each: cached(paths[each], keys[each], _nothing, load) for each in keys}
    # The prefixes of one training share its time.
    seconds = {description["training"]: description["metrics"]["seconds"] for _, description in found.values()}
    return {each: prefix for each, (prefix, _) in found.items()}, sum(seconds.values())


def train_lora(
    config: CfgNode,
    model: GPT,
    task: Task,
    run: str | Path,
    name: str = "lora",
    rank: int = 1,
    targets: str = r"mlp\.c_",
) -> tuple[LoRA, float]:
    """Train a LoRA for a task, or read it where that is done.

    Args:
        config: ``prefix`` is the budget, as for whatever is trained beside the frozen model.
        model: stays as it is.
        task: any.
        run: the folder.
        name: of the file in it.
        rank: see ``mingpt.lora.LoRA``.
        targets: likewise.

    Returns:
        The LoRA, detached from the model, and how many seconds its training took.
    """
    data = dataset(config, "train", [task])
    key = _cache_key("lora", config, config.prefix, data)
    key |= {"rank": rank, "targets": targets, "model": weights_hash(model)}
    path = beside(Path(run) / f"{name}.safetensors", key)

    def compute() -> None:
        set_seed(config.seed + 1)
        lora = LoRA(model, rank, targets)
        try:
            trainer = LoRATrainer(_trainer_config(config.prefix, path.with_suffix("")), model, data, lora)
            logger.info("a LoRA of %d parameters for %s", lora.n_parameters, task)
            _train(trainer, key, lambda **about: save_lora(path, lora, model, cache_key=key, **about))
        finally:
            lora.detach()

    def load(path: Path) -> tuple[LoRA, dict[str, Any]]:
        lora, description = load_lora(path, model)
        lora.detach()
        return lora, description

    return _value_and_seconds(cached(path, key, compute, load))


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
    data = description.get("cache_key", {}).get("data")
    if data is None:
        raise ValueError(f"{run}/model.safetensors was saved without a description of its data; pretrain it as a run")
    return model, load_prefixes(Path(run) / "prefixes", model), description | {"data": data}


# ------------------------------------------------------------------------------------------------------ one stage


def _cache_key(stage: str, config: CfgNode, budget: CfgNode, data: CustomDataset) -> dict[str, Any]:
    recipe = {key: value for key, value in budget.to_dict().items() if key not in RUNTIME_KEYS}
    return {"stage": stage, "seed": config.seed, "data": data.describe(), "recipe": recipe}


def _trainer_config(config: CfgNode, folder: Path) -> CfgNode:
    config = config.copy()
    config.checkpoint_path, config.metrics_path = folder / "state.safetensors", folder / "metrics.jsonl"
    return config


def _train(trainer: Trainer, cache_key: CacheKey, save: Callable[..., None]) -> None:
    """Train and save; then the state goes, so that deleting the file that was saved has it made anew."""
    trainer.cache_key = dict(cache_key)
    trainer.run()
    save(metrics={"loss": trainer.loss.item(), "seconds": trainer.seconds})
    run_on_main(lambda: Path(trainer.config.checkpoint_path).unlink(missing_ok=True))


def _value_and_seconds(found: tuple[Any, dict[str, Any]]) -> tuple[Any, float]:
    value, description = found
    return value, description["metrics"]["seconds"]


def _nothing() -> None:
    raise AssertionError("the file was written just now")
