"""The stages of an experiment: each trains one thing, leaves a file of it, and from then on reads that file.

A stage that was cut off goes on from its last checkpoint, in the stage's own folder beside the file. A file that was
made with other settings or from other data than are now asked for is refused, never quietly used.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mingpt import distributed
from mingpt.datasets import CustomDataset
from mingpt.lora import LoRA
from mingpt.model import GPT
from mingpt.prefix import N_AXES, Prefix, Reparametrization, initial_prefix
from mingpt.storage import checkpoint, weights
from mingpt.storage.checkpoint import CheckpointError
from mingpt.tasks import PRETRAINING_TASKS, TEST_TASKS, Task
from mingpt.trainer import LoRATrainer, PrefixTrainer, Trainer
from mingpt.training.metrics import RUNTIME_KEYS
from mingpt.utils import CfgNode, set_seed

logger = logging.getLogger("mingpt")


def dataset(config: CfgNode, split: str, tasks: Sequence[Task]) -> CustomDataset:
    """The run's examples of some tasks."""
    data = config.data
    return CustomDataset(
        split, list(tasks), data.length, data.num_digits, prefix_padding=data.prefix_size, seed=config.seed
    )


def build_model(config: CfgNode) -> GPT:
    """A fresh model for the run, which has a token for everything that any of the sixteen tasks can produce."""
    everything = dataset(config, "train", [*PRETRAINING_TASKS, *TEST_TASKS])
    model_config = GPT.get_default_config()
    model_config.merge_from_dict(
        {
            "model_type": None,
            "vocab_size": everything.get_vocab_size(),
            "block_size": everything.get_block_size(),
            **{name: value for name, value in config.model.to_dict().items() if name != "dropout"},
            **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), config.model.dropout),
        }
    )
    return GPT(model_config)


def pretrain(config: CfgNode, folder: str | Path, tasks: Sequence[Task] = PRETRAINING_TASKS) -> tuple[GPT, float]:
    """Train a new model on tasks mixed, or read it where that is done.

    Args:
        config: see ``mingpt.experiments.reproduction.get_default_config``; ``trainer`` is the budget.
        folder: of the run; the file is ``model.safetensors``.
        tasks: any, which the model is not told apart.

    Returns:
        The model in evaluation mode, and how many seconds its training took.

    Raises:
        CheckpointError: if the file there is of other tasks or settings.
    """

    def build() -> GPT:
        set_seed(config.seed)
        return build_model(config)

    return _train_model(config, build, tasks, Path(folder) / "model.safetensors", "pretraining", {})


def fine_tune(
    config: CfgNode, model: GPT, tasks: Sequence[Task], folder: str | Path, file: str = "fine_tuned"
) -> tuple[GPT, float]:
    """Train all weights of a copy of a model further, or read the result where that is done.

    Args:
        config: ``trainer`` is the budget.
        model: stays as it is.
        tasks: any.
        folder: of the run.
        file: the name, in it, of the stage's folder and of its file.

    Returns:
        The copy in evaluation mode, and how many seconds its training took.

    Raises:
        CheckpointError: if the file there is of other tasks or settings, or of another model.
    """

    def build() -> GPT:
        set_seed(config.seed + 1)
        return copy.deepcopy(model)

    cache_key = {"start": weights.weights_hash(model)}
    return _train_model(config, build, tasks, Path(folder) / f"{file}.safetensors", file, cache_key)


def _train_model(
    config: CfgNode, build: Callable[[], GPT], tasks: Sequence[Task], path: Path, stage: str, cache_key: dict[str, Any]
) -> tuple[GPT, float]:
    if path.name == "model.safetensors":
        verify(config, path.parent)
    data = dataset(config, "train", tasks)
    cache_key = cache_key | {"data": data.describe(), "recipe": _recipe(config.trainer)}
    device = _device(config.trainer)
    if distributed.run_on_main(path.exists):
        model, description = weights.load_model(path, device)
        _verify(path, description, cache_key)
        seconds = description["metrics"]["seconds"]
        logger.info("the model is in %s, trained in %.0f s", path, seconds)
        return model, seconds
    model = build()
    trainer = Trainer(_trainer_config(config.trainer, path.parent / stage), model, data)
    logger.info(
        "%s: %.2fM parameters on %d tasks, %d iterations of %d rows on %s in %s",
        stage,
        model.n_parameters / 1e6,
        len(data.tasks),
        config.trainer.max_iters,
        config.trainer.batch_size,
        trainer.device,
        trainer.precision,
    )
    trainer.run()
    weights.save_model(path, model.eval(), **cache_key, metrics=_metrics(trainer))
    if config.trainer.parallel == "fsdp":  # it is split; what comes next needs a whole one
        model, _ = weights.load_model(path, device)
    return model, trainer.seconds


def _train_prefixes(
    config: CfgNode,
    model: GPT,
    tasks: Sequence[Task],
    folder: str | Path,
    file: str = "prefixes",
    kind: str = "activation",
    n_positions: int | None = None,
    start: str | Sequence[int] | Tensor = "padding",
    is_reparametrized: bool = False,
) -> tuple[dict[str, Tensor], float]:
    """Learn a prefix for each task, all at once, or read them where that is done.

    Args:
        config: ``prefix`` is the budget.
        model: stays as it is.
        tasks: any, K of them, also ones it was not pretrained on.
        folder: of the run.
        file: the name, in it, of the stage's folder and of the file of prefixes.
        kind: of prefix, see ``mingpt.prefix.Prefix``.
        n_positions: of each prefix, ``data.prefix_size`` by default; the places beyond keep their padding.
        start: see ``mingpt.prefix.initial_prefix``; or a prefix to start from, or K of them.
        is_reparametrized: trains key_value prefixes through ``mingpt.prefix.Reparametrization``.

    Returns:
        The prefixes by task name, (L, P, C), (L, 2, P, C) or (P, C) each, and how many seconds the training took.

    Raises:
        CheckpointError: if the file there is of other tasks, settings, kinds, sizes or starts, or for another model.
    """
    path = Path(folder) / f"{file}.safetensors"
    data = [dataset(config, "train", [task]) for task in tasks]
    size = start.shape[-2] if isinstance(start, Tensor) else n_positions or config.data.prefix_size
    cache_key = {
        "n_axes": N_AXES[kind],
        "n_positions": size,
        "data": [each.describe() for each in data],
        "recipe": _recipe(config.prefix),
        "start": checkpoint.checksum({"start": start}) if isinstance(start, Tensor) else start,
        "is_reparametrized": is_reparametrized,
    }
    if distributed.run_on_main(path.exists):
        prefixes, description = weights.load_prefixes(path, model)
        tensor = next(iter(prefixes.values()))
        found = {"n_axes": tensor.ndim, "n_positions": tensor.shape[-2], "start": "padding", "is_reparametrized": False}
        _verify(path, found | description, cache_key)
        seconds = description["metrics"]["seconds"]
        logger.info("%d prefixes are in %s, trained in %.0f s", len(prefixes), path, seconds)
        return prefixes, seconds
    set_seed(config.seed + 1)
    if not isinstance(start, Tensor):
        start = initial_prefix(model, size, start, kind=kind)
    values = start.detach() if start.ndim > N_AXES[kind] else start.detach()[None]
    values = values.repeat(len(tasks) // len(values), *[1] * N_AXES[kind])
    trained = Reparametrization(values) if is_reparametrized else Prefix(kind, values.requires_grad_())
    trainer = PrefixTrainer(_trainer_config(config.prefix, path.parent / file), model, data, trained)
    logger.info(
        "learning %d prefixes at once: %d iterations of %d rows each",
        len(tasks),
        config.prefix.max_iters,
        config.prefix.batch_size,
    )
    trainer.run()
    learned = (trained() if isinstance(trained, Reparametrization) else trained.values).detach().clone()
    prefixes = {str(task): value for task, value in zip(tasks, learned, strict=True)}
    weights.save_prefixes(path, prefixes, model, **cache_key, metrics=_metrics(trainer))
    return prefixes, trainer.seconds


def train_prefixes(
    config: CfgNode,
    model: GPT,
    tasks: Sequence[Task],
    run: str | Path,
    name: str = "prefixes",
    kind: str = "activation",
    **options: Any,
) -> tuple[dict[str, Any], float]:
    """Learn a prefix for each task, a file each (stand-in until the merge)."""
    folder, found, missing = Path(run) / name, {}, []
    for task in tasks:
        identity = {"data": dataset(config, "train", [task]).describe(), "recipe": _recipe(config.prefix), "kind": kind}
        path = folder / f"{task}.safetensors"
        if path.exists() and json.loads(json.dumps(identity)) != checkpoint.load_checkpoint(path)[1]["identity"]:
            path = folder / f"{task}-{checkpoint.json_checksum(identity)[:8]}.safetensors"
        if path.exists():
            found[str(task)] = next(iter(weights.load_prefixes(path, model)[0].values()))
        else:
            missing.append((task, path, identity))
    seconds = 0.0
    if missing:
        stage = checkpoint.json_checksum([each[2] for each in missing])[:8]
        learned, seconds = _train_prefixes(
            config, model, [each[0] for each in missing], Path(run) / "stage", stage, kind, **options
        )
        for task, path, identity in missing:
            found[str(task)] = learned[str(task)]
            weights.save_prefixes(path, {str(task): learned[str(task)]}, model, identity=identity, prefix_kind=kind)
    return {str(task): Prefix(kind, found[str(task)][None]) for task in tasks}, seconds


def load_run(run: str | Path, device: str = "auto") -> tuple[GPT, dict[str, Any], dict[str, Any]]:
    """Read a run's model, prefixes by name, and the model's description (stand-in until the merge)."""
    run = Path(run)
    model, description = weights.load_model(run / "model.safetensors", distributed.resolve_device(device))
    prefixes: dict[str, Any] = {}
    if (run / "prefixes.safetensors").exists():
        prefixes = weights.load_prefixes(run / "prefixes.safetensors", model)[0]
    for path in sorted((run / "prefixes").glob("*.safetensors")):
        if path.stem != "state":
            tensors, about = weights.load_prefixes(path, model)
            prefixes[path.stem] = Prefix(about["prefix_kind"], next(iter(tensors.values()))[None])
    return model, prefixes, description


def train_lora(
    config: CfgNode,
    model: GPT,
    task: Task,
    folder: str | Path,
    file: str = "lora",
    rank: int = 1,
    targets: str = r"mlp\.c_",
) -> tuple[LoRA, float]:
    """Learn a LoRA for a task, or read it where that is done.

    Args:
        config: ``prefix`` is the budget, as for whatever is learned beside the frozen model.
        model: stays as it is.
        task: any.
        folder: of the run.
        file: the name, in it, of the stage's folder and of its file.
        rank: see ``mingpt.lora.LoRA``.
        targets: likewise.

    Returns:
        The LoRA, detached from the model, and how many seconds its training took.

    Raises:
        CheckpointError: if the file there is of another task, other settings or layers, or for another model.
    """
    path = Path(folder) / f"{file}.safetensors"
    data = dataset(config, "train", [task])
    cache_key = {"data": data.describe(), "recipe": _recipe(config.prefix), "rank": rank, "targets": targets}
    if distributed.run_on_main(path.exists):
        lora, description = weights.load_lora(path, model)
        lora.detach()
        _verify(path, description, cache_key)
        return lora, description["metrics"]["seconds"]
    set_seed(config.seed + 1)
    lora = LoRA(model, rank, targets)
    try:
        trainer = LoRATrainer(_trainer_config(config.prefix, path.parent / file), model, data, lora)
        logger.info("learning a LoRA of %d numbers for %s", lora.n_parameters, task)
        trainer.run()
    finally:
        lora.detach()
    weights.save_lora(path, lora, model, **cache_key, metrics=_metrics(trainer))
    return lora, trainer.seconds


def cached(path: str | Path, cache_key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """Compute a JSON value and write it to a file, or read it where that is done.

    Args:
        path: the file.
        cache_key: JSON values that say what it depends on, such as settings.
        compute: makes the value.

    Raises:
        CheckpointError: if the file there is of something else.
    """
    path = Path(path)
    if distributed.run_on_main(path.exists):
        found = json.loads(path.read_text())
        _verify(path, found["cache_key"], cache_key)
        return found["value"]
    value = compute()
    content = json.dumps({"cache_key": cache_key, "value": value}, indent=1)
    distributed.run_on_main(lambda: checkpoint.write_atomic(path, content.encode()))
    return json.loads(content)["value"]


# --------------------------------------------------------------------------------------------------- bookkeeping


def verify(config: CfgNode, folder: Path) -> None:
    """Write the configuration into the folder, or check that it is the one that is there."""
    path = folder / "config.json"
    if distributed.run_on_main(lambda: not path.exists()):
        distributed.run_on_main(lambda: checkpoint.verify(path, config.to_dict(), RUNTIME_KEYS))


def _verify(path: Path, description: Mapping[str, Any], cache_key: Mapping[str, Any]) -> None:
    try:
        for field, expected in json.loads(json.dumps(cache_key)).items():  # as a file has it: lists, no tuples
            checkpoint.require_equal(path, field, description.get(field), expected)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; take another folder, or delete the file to have it made anew") from None


def _metrics(trainer: Trainer) -> dict[str, float]:
    return {"loss": trainer.loss.item(), "seconds": trainer.seconds}


def _trainer_config(config: CfgNode, folder: Path) -> CfgNode:
    config = config.copy()
    config.checkpoint_path = folder / "state.safetensors"
    config.metrics_path = folder / "metrics.jsonl"
    return config


def _recipe(config: CfgNode) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in RUNTIME_KEYS}


def _device(config: CfgNode) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)
