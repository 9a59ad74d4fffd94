"""The training loop, and what differs when a prefix or a LoRA is trained instead of a model.

Legend: B batch, T tokens, P prefix positions, C channels, L layers, K prefixes.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mingpt import distributed
from mingpt.datasets import IGNORED, CustomDataset
from mingpt.distributed.sharding import distribute_like, fully_shard
from mingpt.lora import LoRA
from mingpt.model import GPT
from mingpt.prefix import Prefix, Reparametrization, as_prefix
from mingpt.storage import checkpoint
from mingpt.storage.cache import verify
from mingpt.training import batches
from mingpt.training.batches import Batch, BatchedDataset, JointDataset, MapDataset, is_batched
from mingpt.training.metrics import RUNTIME_KEYS, MetricsLogger
from mingpt.training.optimizers import SCHEDULES, build_optimizer, learning_rate_factor
from mingpt.training.precision import PRECISIONS, autocast, resolve_precision
from mingpt.utils import CfgNode

CHOICES = {
    "optimizer": ("adamw", "muon"), "lr_schedule": SCHEDULES, "precision": PRECISIONS, "parallel": ("ddp", "fsdp"),
    "compile": (True, False), "progress": ("auto", True, False),
}  # fmt: skip
LEAST = {"num_workers": 0, "max_iters": 0, "batch_size": 1, "warmup_iters": 0, "checkpoint_every": 1, "log_every": 1}
"""The configuration keys that take one of a few values; and those that take an integer, with the least of each."""


def check_config(config: CfgNode) -> None:
    """Check a Trainer's configuration, before anything is moved or written.

    Args:
        config: see ``Trainer.get_default_config``.

    Raises:
        ValueError: with a line for each mistake: the key, what it must be, and what was given.
    """
    mistakes = []
    for key, default in Trainer.get_default_config().to_dict().items():
        value = getattr(config, key)
        if key in CHOICES:
            expected, is_right = f"one of {', '.join(map(str, CHOICES[key]))}", value in CHOICES[key]
        elif key == "device":
            expected, is_right = "auto, or a device such as cpu, cuda or cuda:0", _is_device(value)
        elif key.endswith("_path"):
            expected, is_right = "a path or None", isinstance(value, str | Path | None)
        elif key == "betas":
            is_right = isinstance(value, list | tuple) and [_is_number(b, 0, 1) and b < 1 for b in value] == [
                True,
                True,
            ]
            expected = "two numbers from 0 to below 1"
        elif key in LEAST:
            expected = f"an integer of at least {LEAST[key]}" + " or None" * (default is None)
            is_right = _is_number(value, LEAST[key], kind=Integral) or (value is None and default is None)
        else:
            most = 1 if key in ("muon_momentum", "decay_fraction") else math.inf
            expected, is_right = "a number of at least 0" + " and at most 1" * (most == 1), _is_number(value, 0, most)
        if not is_right:
            mistakes.append(f"{key} must be {expected}, got {value!r}")
    if config.checkpoint_every and not config.checkpoint_path:
        mistakes.append("checkpoint_every is set and checkpoint_path is not; set both or neither")
    if config.lr_schedule != "constant" and config.max_iters is None:
        mistakes.append(f"lr_schedule = {config.lr_schedule!r} needs max_iters, where the decay ends")
    if config.parallel == "fsdp" and config.optimizer == "muon":
        mistakes.append("parallel = 'fsdp' splits the matrices that optimizer = 'muon' needs full; use adamw")
    if mistakes:
        raise ValueError("\n".join(mistakes))


def _is_number(value: object, least: float, most: float = math.inf, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and least <= cast(float, value) <= most


def _is_device(value: Any) -> bool:
    try:
        return value == "auto" or bool(torch.device(value))
    except (RuntimeError, TypeError):
        return False


class Trainer:
    """Trains a model on a map-style dataset of (x, y) pairs.

    ``run`` is the only loop. A subclass says which tensors are trained (``trained_tensors``), by which optimizer, and
    how the loss of a batch is computed.

    Processes that torchrun started share each batch and average their gradients, weighted by how many targets each
    has. Without dropout the loss then agrees with one process's up to rounding; rounding differences grow from step to
    step. With dropout each process draws masks of its own, so the results differ.

    Attributes:
        device: where the model is.
        optimizer: made by ``run``.
        loss: the last batch's loss, a scalar tensor.
        iter_num: how many iterations are done; during the callbacks of an iteration, its number from 0.
        iter_dt: seconds the last iteration took.
        seconds: what all iterations took, those before a resumption included.
        cache_key: JSON values that identify the run beside those of ``describe``, such as a seed; set it before
            ``run``. A checkpoint is resumed only where all of them are equal.
    """

    @staticmethod
    def get_default_config() -> CfgNode:
        """minGPT's settings and this package's own, which change nothing until they are set.

        Keys:
            device: "auto" is a GPU where there is one.
            num_workers: processes that make batches; 0 makes them in this one, which is fastest for CustomDataset.
            max_iters: when to stop; None goes on for ever.
            batch_size, learning_rate, betas, weight_decay (on weights of linear layers), grad_norm_clip: as in minGPT.
                Several processes share a batch.
            optimizer: "adamw", or "muon" for the blocks' matrices, at muon_learning_rate with muon_momentum.
            lr_schedule: "constant", "linear" or "cosine": how the rate decays over the last decay_fraction of the run.
            warmup_iters: iterations of linear warm-up.
            converged_loss: of prefixes trained together, one whose smoothed loss (nats per scored token) falls below
                this has converged: it does not change any more, and the others get its rows. With 0 none does.
            precision: "float32", "bfloat16", or "auto" for bfloat16 where the hardware multiplies it natively.
            compile: pass the model through torch.compile.
            parallel: what each process has of the model: "ddp" all of it (DistributedDataParallel), "fsdp" a shard of
                every parameter (fully_shard; only with adamw, and the model stays sharded after the run).
            checkpoint_path: a file that a run is resumed from where it exists, and saved to every checkpoint_every
                iterations and at the end.
            metrics_path: a JSON-lines file that gets a line every log_every iterations.
            tensorboard_path: a folder for TensorBoard's events, where the package tensorboard is installed.
            progress: show a progress bar; "auto" shows it on a terminal.
        """
        return CfgNode(
            device="auto", num_workers=0, max_iters=None, batch_size=64,
            learning_rate=3e-4, betas=(0.9, 0.95), weight_decay=0.1, grad_norm_clip=1.0,
            optimizer="adamw", muon_learning_rate=5e-3, muon_momentum=0.95,
            lr_schedule="constant", warmup_iters=0, decay_fraction=0.4, converged_loss=0.0,
            precision="auto", compile=False, parallel="ddp",
            checkpoint_path=None, checkpoint_every=None,
            metrics_path=None, tensorboard_path=None, log_every=10, progress="auto",
        ).close(progress=("auto", True, False), converged_loss=None)  # fmt: skip

    def __init__(self, config: CfgNode, model: nn.Module, train_dataset: MapDataset | BatchedDataset):
        """Move the model to its device and get ready; ``run`` does the work.

        Args:
            config: see ``get_default_config``.
            model: called as ``model(x, y)``, returns (logits, loss); has ``configure_optimizers(config)``.
            train_dataset: a map-style dataset of pairs of tensors. One with a method ``batch(indices)``, as
                CustomDataset, is walked without end or repetition; from any other, examples are drawn at random with
                replacement.

        Raises:
            ValueError: for a mistake in the configuration (see ``check_config``), fewer rows in a batch than
                processes, or a CustomDataset that does not fit a GPT's vocabulary or block size.
        """
        check_config(config)
        self.device = distributed.resolve_device(config.device)
        n_processes = distributed.world_size()
        if config.batch_size < n_processes:
            raise ValueError(f"{n_processes} processes cannot share {config.batch_size} rows; raise batch_size")
        self._hints: dict[str, int] = {}  # padding is the same in every row, and only solutions are scored
        if isinstance(model, GPT) and isinstance(train_dataset, CustomDataset | JointDataset):
            train_dataset.check_fits(model.config.vocab_size, model.config.block_size)
            self._hints = {"n_shared": train_dataset.prefix_padding, "n_last": train_dataset.length}
        self.config, self.model, self.train_dataset = config, model.to(self.device), train_dataset
        self.precision = resolve_precision(config.precision, self.device)
        self.callbacks: dict[str, list[Callable[[Trainer], None]]] = defaultdict(list)
        self.cache_key: dict[str, Any] = {}
        self.optimizer = cast(torch.optim.Optimizer, None)  # made by run
        self.loss: Tensor = torch.tensor(float("nan"))
        self.iter_num, self.iter_time, self.iter_dt, self.seconds = 0, 0.0, 0.0, 0.0

    def add_callback(self, onevent: str, callback: Callable[[Trainer], None]) -> None:
        """Call ``callback(trainer)`` too when the event happens; the event is "on_batch_end"."""
        self.callbacks[onevent].append(callback)

    def set_callback(self, onevent: str, callback: Callable[[Trainer], None]) -> None:
        """Call only ``callback(trainer)`` when the event happens."""
        self.callbacks[onevent] = [callback]

    def trigger_callbacks(self, onevent: str) -> None:
        """Call what was set and added for an event."""
        for callback in self.callbacks.get(onevent, []):
            callback(self)

    # ------------------------------------------------------------------------- the steps a subclass may override

    def trained_tensors(self) -> dict[str, Tensor]:
        """What training changes, by the name a checkpoint keeps it under."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def build_optimizer(self) -> torch.optim.Optimizer:
        """A fresh optimizer for the trainable parameters."""
        return build_optimizer(cast(GPT, self.model), self.config)

    def set_mode(self) -> None:
        """Put the model into the mode that it is trained in."""
        self.model.train()

    def index_batches(self) -> Iterator[Sequence[Any]]:
        """For each iteration from ``iter_num`` on, what this process's batch is made of: indices into the dataset."""
        n_examples = None if is_batched(self.train_dataset) else len(cast(MapDataset, self.train_dataset))
        shard = distributed.rank(), distributed.world_size()
        return batches.index_batches(n_examples, self.config.batch_size, self.iter_num, self._data_seed, shard)

    def compute_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The scalar to descend on."""
        return self._forward(x, y, **self._hints)[1]

    def average_gradients(self) -> None:
        """Make every process's gradients the mean of all; the wrapped model's backward pass has done it here."""

    def is_finished(self) -> bool:
        """Whether there is no further iteration to do."""
        return self.config.max_iters is not None and self.iter_num >= self.config.max_iters

    def clip_gradients(self) -> None:
        """Scale the gradients down to a norm of at most ``grad_norm_clip``."""
        nn.utils.clip_grad_norm_(self.trainable_parameters(), self.config.grad_norm_clip)

    def trainable_parameters(self) -> list[Tensor]:
        """Those of the trained tensors that get a gradient."""
        return [tensor for tensor in self.trained_tensors().values() if tensor.requires_grad]

    # --------------------------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        """Train until ``max_iters``, from the beginning or from ``checkpoint_path`` where that file exists.

        Raises:
            CheckpointError: if that file is damaged or belongs to another run.
        """
        config = self.config
        self.iter_num, self.seconds = 0, 0.0
        # It follows set_seed, as minGPT's sampler does.
        self._data_seed = distributed.run_on_main(lambda: int(torch.randint(2**62, ())))
        tensors = [*self.model.parameters(), *self.trained_tensors().values()]
        distributed.broadcast(tensor for tensor in tensors if not isinstance(tensor, DTensor))
        if config.checkpoint_path:  # a frozen model is hashed for it, so once a run
            self._identity = json.loads(json.dumps(self.describe() | self.cache_key))  # lists, no tuples, as in a file
        self._forward = self._wrap_model()
        self.optimizer = self.build_optimizer()
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        if distributed.rank():  # each process has its own dropout
            torch.manual_seed(self._data_seed + distributed.rank())
        if config.checkpoint_path and distributed.run_on_main(lambda: Path(config.checkpoint_path).exists()):
            self._resume(config.checkpoint_path)
        self.set_mode()
        with MetricsLogger(config, self.iter_num) as logger:
            self.iter_time = time.perf_counter()
            iterator = self._batches()
            while not self.is_finished():
                x, y = next(iterator)
                self._step(x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True))
                self.trigger_callbacks("on_batch_end")
                self.iter_num += 1
                now = time.perf_counter()
                self.iter_dt, self.iter_time = now - self.iter_time, now
                self.seconds += self.iter_dt
                logger.log_step(self.iter_num, self.loss, self.optimizer.param_groups[-1]["lr"], self.iter_dt)
                is_due = config.checkpoint_every and self.iter_num % config.checkpoint_every == 0
                if is_due and not self.is_finished():
                    self.save()
        if config.checkpoint_path:
            self.save()

    def _step(self, x: Tensor, y: Tensor) -> None:
        factor = learning_rate_factor(self.iter_num, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        # The gradient of the mean over all processes' targets is the mean of theirs, weighted by how many each has.
        self._weight = self._weight_of(y)
        with autocast(self.precision, self.device):
            loss = self.compute_loss(x, y)
        (loss * self._weight).backward()
        self.loss = self.mean(loss.detach())
        self.average_gradients()
        self.clip_gradients()
        self.optimizer.step()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of every process's value, weighted by its share of the batch's targets."""
        return distributed.all_reduce_sum(value * self._weight) / distributed.world_size()

    def _weight_of(self, y: Tensor) -> Tensor | float:
        """How many times the average number of targets this process has, of all in the batch."""
        if distributed.world_size() == 1:
            return 1.0
        own = (y != IGNORED).sum().float()
        return own * distributed.world_size() / distributed.all_reduce_sum(own.clone())

    def _wrap_model(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """What is called in the place of the model: it keeps the processes' gradients or parameters in step."""
        model, is_alone = self.model, distributed.world_size() == 1
        if self.config.parallel == "fsdp" and not is_alone:
            fully_shard(cast(GPT, model), self.device.type)
        wrapped = torch.compile(model) if self.config.compile else model
        if is_alone or self.config.parallel == "fsdp" or not any(p.requires_grad for p in model.parameters()):
            return wrapped
        return nn.parallel.DistributedDataParallel(wrapped)

    def _batches(self) -> Iterator[Batch]:
        """The batches from iteration ``iter_num`` on; which rows they hold does not depend on where it started."""
        dataset, indices = self.train_dataset, self.index_batches()
        if is_batched(dataset) and not self.config.num_workers:
            return (dataset.batch(each) for each in indices)
        return iter(
            torch.utils.data.DataLoader(
                cast(torch.utils.data.Dataset[Batch], dataset),
                batch_sampler=cast(Iterator[list[Any]], indices),
                num_workers=self.config.num_workers,
                generator=torch.Generator().manual_seed(self._data_seed),  # else it draws from the global one
                pin_memory=self.device.type == "cuda",
            )
        )

    # ------------------------------------------------------------------------------------------------ checkpoints

    def describe(self) -> dict[str, Any]:
        """What identifies the run, together with ``cache_key``: a checkpoint of one run does not resume another."""
        recipe = {key: value for key, value in self.config.to_dict().items() if key not in RUNTIME_KEYS}
        config, data = getattr(self.model, "config", None), cast(Any, self.train_dataset)
        is_described, n_examples = callable(getattr(data, "describe", None)), getattr(data, "__len__", lambda: None)()
        return {
            "trainer": type(self).__name__,
            "recipe": recipe | {"precision": self.precision},
            "model": config.to_dict() if isinstance(config, CfgNode) else None,
            "data": data.describe() if is_described else {"type": type(data).__name__, "n_examples": n_examples},
        }

    def save(self) -> None:
        """Write all that the rest of the run depends on to ``checkpoint_path``; all processes must get here."""
        optimizer, skeleton = checkpoint.flatten_state(self.optimizer.state_dict(), "optimizer")
        tensors = {f"trained.{name}": tensor for name, tensor in self.trained_tensors().items()} | optimizer
        for number, states in enumerate(distributed.all_gather(self._rng_states())):
            tensors |= {f"rng.{kind}{number or ''}": state for kind, state in states.items()}
        state = {"iter_num": self.iter_num, "seconds": self.seconds, "data_seed": self._data_seed}
        description = {"cache_key": self._identity, "state": state | {"optimizer": skeleton}}
        checkpoint.save_checkpoint(self.config.checkpoint_path, tensors | {"loss": self.loss}, description)

    def _resume(self, path: str | Path) -> None:
        tensors, description = checkpoint.load_checkpoint(path)
        verify(path, description.get("cache_key"), self._identity)
        state = description["state"]
        own = self.trained_tensors()
        saved = {k.removeprefix("trained."): t for k, t in tensors.items() if k.startswith("trained.")}
        shapes, own_shapes = ({name: list(t.shape) for name, t in each.items()} for each in (saved, own))
        verify(path, {"trained": shapes}, {"trained": own_shapes})
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(distribute_like(saved[name], tensor))
        self.optimizer.load_state_dict(checkpoint.unflatten_state(state["optimizer"], tensors))
        if self.config.parallel == "fsdp":
            for parameter, own in self.optimizer.state.items():
                own |= {k: distribute_like(v, parameter) for k, v in own.items() if v.shape == parameter.shape}
        self.iter_num, self.seconds, self._data_seed = state["iter_num"], state["seconds"], state["data_seed"]
        self.loss = tensors["loss"].to(self.device)
        number = distributed.rank() or ""
        if f"rng.cpu{number}" in tensors:  # fewer processes may have saved it
            torch.set_rng_state(tensors[f"rng.cpu{number}"])
        if self.device.type == "cuda" and f"rng.cuda{number}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda{number}"])

    def _rng_states(self) -> dict[str, Tensor]:
        """The states of torch's generators in this process."""
        states = {"cpu": torch.get_rng_state()}
        return states | ({"cuda": torch.cuda.get_rng_state()} if self.device.type == "cuda" else {})


class AdapterTrainer(Trainer):
    """Trains something beside a frozen model; a subclass says which tensors, in ``trained_tensors``."""

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"model_checksum": checkpoint.checksum(self.model.state_dict())}

    def build_optimizer(self) -> torch.optim.Optimizer:
        rate, betas = self.config.learning_rate, tuple(self.config.betas)
        return torch.optim.AdamW(self.trainable_parameters(), lr=rate, betas=betas, weight_decay=0.0)

    def set_mode(self) -> None:
        self.model.eval()

    def run(self) -> None:
        """Train; the model's weights get no gradient and do not change."""
        required = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in required:
            parameter.requires_grad_(False)
        try:
            super().run()
        finally:
            for parameter in required:
                parameter.requires_grad_(True)

    def average_gradients(self) -> None:
        for tensor in self.trainable_parameters():
            assert tensor.grad is not None
            distributed.all_reduce_sum(tensor.grad.div_(distributed.world_size()))


class LoRATrainer(AdapterTrainer):
    """Trains a LoRA that is attached to a frozen model."""

    def __init__(self, config: CfgNode, model: GPT, train_dataset: MapDataset | BatchedDataset, lora: LoRA):
        """Get ready to train ``lora`` in place.

        Args:
            config: see ``Trainer.get_default_config``; weight decay does not apply to a LoRA.
            model: the GPT that the LoRA was made for.
            train_dataset: see ``Trainer``.
            lora: attached; it moves to the model's device.
        """
        super().__init__(config, model, train_dataset)
        self.lora = lora.to(self.device)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"layers": list(self.lora.names), "scale": self.lora.scale}

    def trained_tensors(self) -> dict[str, Tensor]:
        return dict(self.lora.named_parameters())


class PrefixTrainer(AdapterTrainer):
    """Trains one prefix, or several at once, for a frozen model.

    Several prefixes are trained on one batch, ``batch_size`` rows of each one's own dataset. Their losses are added and
    their gradients clipped one by one, so each ends as if it had been trained alone; with ``converged_loss``, those
    that have not converged share the rows of those that have.

    A prefix tensor is trained in place. Where it is on another device than the model, a copy is trained on the model's,
    and copied back before the callbacks of an iteration and whenever ``run`` ends; gradients are the copy's.

    Attributes:
        prefixes: the tensor or the Reparametrization that was given.
    """

    def __init__(
        self,
        config: CfgNode,
        model: GPT,
        train_dataset: CustomDataset | Sequence[CustomDataset],
        prefixes: Tensor | Prefix | Reparametrization,
    ):
        """Get ready to train ``prefixes`` in place.

        Args:
            config: see ``Trainer.get_default_config``; weight decay does not apply to prefixes.
            model: a GPT.
            train_dataset: one dataset for one prefix, or a list of K.
            prefixes: a leaf tensor (L, P, C), or (K, L, P, C) for a list of K datasets; or a Prefix of any kind, whose
                ``values`` hold K prefixes; or the Reparametrization that K prefixes are trained through, which moves
                to the model's device.

        Raises:
            TypeError: if the prefix is no tensor, or a list holds anything but CustomDatasets.
            ValueError: if the prefix does not fit the model or its dataset, or as for ``Trainer``.
        """
        data = JointDataset(train_dataset) if isinstance(train_dataset, Sequence) else train_dataset
        super().__init__(config, model, data)
        n_layer, n_embd = model.config.n_layer, model.config.n_embd
        if isinstance(prefixes, Prefix):
            prefix = prefixes
        elif isinstance(prefixes, Reparametrization):
            prefix = Prefix("key_value", prefixes.to(self.device)().detach())
        elif isinstance(data, JointDataset):
            prefix = Prefix("activation", prefixes)
        else:
            prefix = as_prefix(prefixes, n_layer, n_embd, batch_size=1)
        prefix.check(n_layer, n_embd, prefix.n_prefixes)
        n_datasets = len(data.datasets) if isinstance(data, JointDataset) else 1
        if prefix.n_prefixes != n_datasets:
            raise ValueError(f"{prefix.n_prefixes} prefixes for {n_datasets} datasets; give one prefix a dataset")
        padding = getattr(data, "prefix_padding", prefix.n_placeholders)
        if padding < prefix.n_placeholders:
            raise ValueError(f"prefix_padding = {padding} is too short for {prefix.n_placeholders} prefix positions")
        if config.converged_loss and (config.num_workers or not isinstance(data, JointDataset)):
            raise ValueError(
                "converged_loss needs a list of datasets and num_workers = 0: which rows are next depends on the losses"
            )
        self._prefix = prefix  # its kind, placeholders and shape, which has the axis of K in front
        self.prefixes = own = prefixes.values if isinstance(prefixes, Prefix) else prefixes
        if isinstance(own, Tensor) and not (own.is_leaf and own.is_floating_point() and not own.is_meta):
            raise ValueError(
                "the prefix is trained in place, so it must be a leaf tensor of a floating dtype that has values; "
                f"got {own.dtype} on {own.device}, is_leaf = {own.is_leaf}"
            )

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"kind": self._prefix.kind, "n_placeholders": self._prefix.n_placeholders}

    def trained_tensors(self) -> dict[str, Tensor]:
        return self._trained | ({"loss": self._smoothed_loss} if self.config.converged_loss else {})

    def run(self) -> None:
        """Train the prefixes; the model's weights get no gradient and do not change."""
        own = self.prefixes
        self._trained = {"prefixes": self._on_device(own)} if isinstance(own, Tensor) else dict(own.named_parameters())
        # Each prefix's loss, smoothed from 1 nat on, so that none converges in the first iterations; 0 once it has.
        self._smoothed_loss = torch.ones(self._prefix.n_prefixes, device=self.device)
        self._share_rows()
        try:
            super().run()
        finally:
            self._write_back()

    def _on_device(self, tensor: Tensor) -> Tensor:
        """What is trained for the user's tensor: itself where it is on the trainer's device, else a copy there."""
        moved = tensor.requires_grad_().to(self.device)
        return moved if moved is tensor else moved.detach().requires_grad_()

    @torch.no_grad()
    def _write_back(self) -> None:
        """Copy what was trained to the user's tensor, where it is another."""
        if isinstance(self.prefixes, Tensor) and self.prefixes is not self._trained["prefixes"]:
            self.prefixes.copy_(self._trained["prefixes"])

    def is_finished(self) -> bool:
        return super().is_finished() or not self._numbers

    def index_batches(self) -> Iterator[Sequence[Any]]:
        """As a Trainer's; for a list of datasets, (a dataset's number, its indices) for each prefix that learns."""
        if not isinstance(self.train_dataset, JointDataset):
            yield from super().index_batches()
            return
        n_rows = self.config.batch_size * self._prefix.n_prefixes  # of the batch, whoever has them
        # Where rows are shared, a batch is numbered as if one dataset had all of it, so that no row is used twice.
        stride = n_rows if self.config.converged_loss else self.config.batch_size
        for iteration in itertools.count(self.iter_num):
            rows = range(iteration * stride, iteration * stride + n_rows // len(self._numbers))
            own = batches.shard_indices(rows, (distributed.rank(), distributed.world_size()))
            yield [(number, own) for number in self._numbers]

    def compute_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean over the prefixes that learn of each one's mean cross-entropy, in nats."""
        values = self._trained["prefixes"] if isinstance(self.prefixes, Tensor) else self.prefixes()
        values = values.view(self._prefix.values.shape).index_select(0, self._learning)
        logits, loss = self._forward(x, y, prefixes=replace(self._prefix, values=values), **self._hints)
        if self.config.converged_loss:
            with torch.no_grad():
                scored = y[:, -logits.shape[1] :].flatten()
                losses = F.cross_entropy(logits.flatten(0, 1).float(), scored, reduction="none")
                own = self.mean(losses.view(len(self._numbers), -1).mean(dim=1))
                self._smoothed_loss[self._learning] = self._smoothed_loss[self._learning].lerp(own, 0.1)
        return loss

    def _step(self, x: Tensor, y: Tensor) -> None:
        super()._step(x, y)
        if self.callbacks:  # they may look at the user's tensor
            self._write_back()
        if self.config.converged_loss and (self.iter_num + 1) % 10 == 0:  # seldom, a GPU has to be waited for
            converged = self._smoothed_loss < self.config.converged_loss
            self._smoothed_loss[converged] = 0
            # Without a gradient and without momentum, Adam leaves a prefix as it is.
            for tensor in self.trainable_parameters():
                self.optimizer.state[tensor]["exp_avg"][converged] = 0
            self._share_rows()

    def _resume(self, path: str | Path) -> None:
        super()._resume(path)
        self._share_rows()

    def _share_rows(self) -> None:
        """Find which prefixes still learn: the next batches are made of rows of theirs."""
        self._learning = self._smoothed_loss.nonzero().flatten()
        self._numbers: list[int] = self._learning.tolist()

    def clip_gradients(self) -> None:
        """Scale each prefix's gradient down to a norm of at most ``grad_norm_clip``, as if it were alone."""
        # The loss is the mean over the prefixes that learn; a lone prefix's is its own.
        gradients = [tensor.grad for tensor in self.trainable_parameters() if tensor.grad is not None]
        norms = torch.stack([each.reshape(self._prefix.n_prefixes, -1).norm(dim=1) for each in gradients]).norm(dim=0)
        n_learning = len(self._numbers)
        scale = n_learning * (self.config.grad_norm_clip / (n_learning * norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient *= scale.view(-1, *[1] * (gradient.ndim - 1))


def batch_end_callback(trainer: Trainer) -> None:
    """Print the time and the loss every 1000 iterations, as the seed notebook's callback does."""
    number = trainer.iter_num + 1
    if number % 1000 == 0:
        print(f"iter_dt {trainer.iter_dt * 1000:>6.2f}ms; iter {number:>6}: train loss {trainer.loss.item():.5f}")
