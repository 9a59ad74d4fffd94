"""The training loop, and what differs when adapters are trained instead of a model.

Legend: B batch, T tokens, P prefix positions, C channels, L layers, K adapters.
"""

from __future__ import annotations

import itertools
import logging
import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mingpt import distributed
from mingpt.adapters import Adapter, PrefixAdapter
from mingpt.datasets import IGNORED
from mingpt.decoding.generation import CausalModel
from mingpt.distributed.sharding import data_shard, distribute_like, full_tensor, fully_shard
from mingpt.evaluation import evaluate
from mingpt.model import GPT
from mingpt.prefix import Prefix, as_prefix
from mingpt.storage import checkpoint
from mingpt.storage.cache import verify
from mingpt.storage.files import locked, parsing
from mingpt.training import batches
from mingpt.training.metrics import RUNTIME_KEYS, MetricsLogger
from mingpt.training.optimizers import OPTIMIZERS, SCHEDULES, build_optimizer, learning_rate_factor
from mingpt.training.precision import PRECISIONS, autocast, resolve_precision
from mingpt.training.signals import StopSignals
from mingpt.utils import CfgNode

logger = logging.getLogger("mingpt")

AnyDataset = batches.MapDataset | batches.BatchedDataset
OneOrMore = batches.TaskDataset | Sequence[batches.TaskDataset]
"""What a Trainer trains on; what an AdapterTrainer trains on, a dataset for each adapter."""

LEAST: dict[str, int] = dict.fromkeys(
    ("batch_size", "checkpoint_every", "log_every", "validate_every", "validation_rows"), 1
)
MOST = {"betas": 1, "muon_momentum": 1, "decay_fraction": 1}
"""The bounds of the configuration's numbers; from 0 without bound where nothing is said."""


MAX_ROWS = 512
"""Rows that adapters train on at once."""


class DivergedError(ArithmeticError):
    """A training whose loss or gradient is no longer finite; the message says when, and what to try."""


def check_config(config: CfgNode) -> None:
    """Check a Trainer's configuration, before anything is moved or written, and give its values their defaults' types.

    Args:
        config: see ``Trainer.get_default_config``.

    Raises:
        ValueError: with a line for each mistake: the key, what it must be, and what was given.
    """
    typed, mistakes = Trainer.get_default_config(), []
    typed.max_iters, typed.checkpoint_every, typed.validate_every = 0, 1, 1  # integers, although None by default
    for key in typed.to_dict():
        try:
            if key == "device":
                distributed.resolve_device(config.device)
            elif not key.endswith("_path"):
                typed.override(key, getattr(config, key))
                setattr(config, key, getattr(typed, key))
        except ValueError as error:
            mistakes.append(str(error))
        value, least, most = getattr(typed, key), LEAST.get(key, 0), MOST.get(key, math.inf)
        numbers = [each for each in (value if isinstance(value, tuple) else [value]) if isinstance(each, int | float)]
        if not all(least <= number <= most for number in numbers):
            mistakes.append(f"configuration key {key!r} must be from {least} to {most}, got {value!r}")
    if config.checkpoint_every and not config.checkpoint_path:
        mistakes.append("checkpoint_every is set and checkpoint_path is not; set both or neither")
    if config.lr_schedule != "constant" and config.max_iters is None:
        mistakes.append(f"lr_schedule = {config.lr_schedule!r} needs max_iters, where the decay ends")
    if config.validate_every and (config.max_iters is None or config.decay_fraction == 1 or config.num_workers):
        mistakes.append("validate_every needs max_iters, a decay_fraction below 1, and num_workers = 0")
    if config.parallel == "fsdp" and config.optimizer == "muon":
        mistakes.append("parallel = 'fsdp' splits the matrices that optimizer = 'muon' needs full; use adamw")
    if mistakes:
        raise ValueError("\n".join(mistakes))


def recipe(config: CfgNode) -> dict[str, Any]:
    """The settings of a Trainer's configuration that its result is a function of, where they are not the defaults.

    A setting that is new, and changes nothing by default, leaves what is stored valid.
    """
    defaults = Trainer.get_default_config().to_dict()
    unused = RUNTIME_KEYS if config.validate_every else {*RUNTIME_KEYS, "validation_rows", "patience"}
    return {k: value for k, value in config.to_dict().items() if k not in unused and value != defaults.get(k)}


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
            validate_every: iterations after which each adapter answers validation_rows rows of its validation split.
                One that answers all of them right, or has not got better for ``patience`` iterations, is at its
                plateau: its own rate decays then as at the end of a run, and then it leaves the batch.
            precision: "float32", "bfloat16", or "auto" for bfloat16 where the hardware multiplies it natively.
            compile: pass the model through torch.compile.
            parallel: what each process has of the model: "ddp" all of it (DistributedDataParallel), "fsdp" a shard of
                every parameter (fully_shard; only with adamw, and the model stays sharded after the run).
            checkpoint_path: a file that a run is resumed from where it exists, and saved to every checkpoint_every
                iterations, at the end, and when a signal asks to stop.
            metrics_path: a JSON-lines file that gets a line every log_every iterations.
            tensorboard_path: a folder for TensorBoard's events, where the package tensorboard is installed.
            progress: show a progress bar; "auto" shows it on a terminal, and elsewhere logs a line now and then.
        """
        loop = {"device": "auto", "num_workers": 0, "max_iters": None, "batch_size": 64}
        adamw = {"learning_rate": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "grad_norm_clip": 1.0}
        muon = {"optimizer": "adamw", "muon_learning_rate": 5e-3, "muon_momentum": 0.95}
        schedule = {"lr_schedule": "constant", "warmup_iters": 0, "decay_fraction": 0.4}
        validation = {"validate_every": None, "validation_rows": 256, "patience": 1000}
        hardware = {"precision": "auto", "compile": False, "parallel": "ddp"}
        files = dict.fromkeys(("checkpoint_path", "checkpoint_every", "metrics_path", "tensorboard_path"))
        config = CfgNode(
            **loop, **adamw, **muon, **schedule, **validation, **hardware, **files, log_every=10, progress="auto"
        )
        choices = {"optimizer": OPTIMIZERS, "lr_schedule": SCHEDULES, "precision": PRECISIONS}
        return config.close(**choices, parallel=("ddp", "fsdp"), progress=("auto", True, False))

    def __init__(self, config: CfgNode, model: nn.Module, train_dataset: AnyDataset):
        """Move the model to its device and get ready; ``run`` does the work.

        Args:
            config: see ``get_default_config``.
            model: called as ``model(x, y)``, returns (logits, loss); has ``configure_optimizers(config)``.
            train_dataset: a map-style dataset of pairs of tensors. One with a method ``batch(indices)``, as
                CustomDataset, is walked without end or repetition; from any other, examples are drawn at random with
                replacement.

        Raises:
            ValueError: for a mistake in the configuration (see ``check_config``), fewer rows in a batch than
                processes, or a CustomDataset that does not fit a ``CausalModel``'s vocabulary or block size.
        """
        check_config(config)
        self.device = distributed.resolve_device(config.device)
        n_processes = distributed.world_size()
        if config.batch_size < n_processes:
            raise ValueError(f"{n_processes} processes cannot share {config.batch_size} rows; raise batch_size")
        self._hints: dict[str, int] = {}  # padding is the same in every row, and only solutions are scored
        if isinstance(model, CausalModel) and isinstance(train_dataset, batches.OwnDataset):
            train_dataset.check_fits(model.config.vocab_size, model.config.block_size)
            self._hints = {"n_shared": train_dataset.prefix_padding, "n_last": train_dataset.length}
        self.config, self.model, self.train_dataset = config, model.to(self.device), train_dataset
        self.precision = resolve_precision(config.precision, self.device)
        self.callbacks: dict[str, list[Callable[[Trainer], None]]] = defaultdict(list)
        self.cache_key: dict[str, Any] = {}
        self.optimizer = cast(torch.optim.Optimizer, None)  # made by run
        self.loss: Tensor = torch.tensor(float("nan"))
        self._validated: dict[str, Any] = {}  # what the iteration's line in the metrics file has beside the loss
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
        return dict(itertools.chain(self.model.named_parameters(), self.model.named_buffers()))

    def build_optimizer(self) -> torch.optim.Optimizer:
        """A fresh optimizer for the trainable parameters."""
        return build_optimizer(cast(GPT, self.model), self.config)

    def index_batches(self) -> Iterator[Sequence[Any]]:
        """For each iteration from ``iter_num`` on, what this process's batch is made of: indices into the dataset."""
        data = self.train_dataset
        n_examples = None if batches.is_batched(data) else len(cast(batches.MapDataset, data))
        shard = data_shard(self.model)
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
        """Scale the gradients down to a norm of at most ``grad_norm_clip``, and have a look at them.

        Raises:
            DivergedError: if the loss or the norm is not finite.
        """
        norm = full_tensor(nn.utils.clip_grad_norm_(self.trainable_parameters(), self.config.grad_norm_clip))
        if self._looks() and not torch.isfinite(self.loss + norm):
            raise self._diverged(f"its loss is {self.loss.item()}, its gradient's norm {norm.item()}")

    def _looks(self) -> bool:
        """Whether to see if an iteration's numbers are finite: on a GPU it would wait for all that was launched."""
        return self.device.type == "cpu" or (self.iter_num + 1) % self.config.log_every == 0

    def _diverged(self, reason: str) -> DivergedError:
        config = self.config
        names = ["learning_rate"] + ["muon_learning_rate"] * (config.optimizer == "muon")
        settings = " or ".join(f"{name} = {getattr(config, name)}" for name in names)
        is_saved = config.checkpoint_path and Path(config.checkpoint_path).exists()
        return DivergedError(
            f"the training has diverged at iteration {self.iter_num + 1}, of which nothing is kept: {reason}; "
            f"lower {settings}, or raise warmup_iters = {config.warmup_iters}"
            + (f"; {config.checkpoint_path} has an earlier state" if is_saved else "")
        )

    def trainable_parameters(self) -> list[Tensor]:
        """Those of the trained tensors that get a gradient."""
        return [tensor for tensor in self.trained_tensors().values() if tensor.requires_grad]

    # --------------------------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        """Train until ``max_iters``, from the beginning or from ``checkpoint_path`` where that file exists.

        A signal to stop (SIGINT, SIGTERM, SIGHUP) is obeyed after the iteration that is going on, and after saving to
        ``checkpoint_path``; a second one at once.

        Raises:
            CheckpointError: if that file is damaged or belongs to another run.
            DivergedError: before an update that is not finite.
            LockedError: if another process trains to that file.
        """
        path = self.config.checkpoint_path and Path(self.config.checkpoint_path)
        with locked(path.with_name(f".{path.name}.lock")) if path else nullcontext():
            self._run()

    def _run(self) -> None:
        config = self.config
        self.iter_num, self.seconds = 0, 0.0
        # It follows set_seed, as minGPT's sampler does.
        self._data_seed = distributed.run_on_main(lambda: int(torch.randint(2**62, ())))
        tensors = [*self.model.parameters(), *self.trained_tensors().values()]
        distributed.broadcast(tensor for tensor in tensors if not isinstance(tensor, DTensor))
        if config.checkpoint_path:  # a frozen model is hashed for it, so once a run
            self._identity = self.describe() | self.cache_key
        self._forward = self._wrap_model()
        self.optimizer = self.build_optimizer()
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        if distributed.rank():  # each process has its own dropout
            torch.manual_seed(self._data_seed + distributed.rank())
        if config.checkpoint_path and distributed.run_on_main(lambda: Path(config.checkpoint_path).exists()):
            self._resume(config.checkpoint_path)
        self.model.train(any(p.requires_grad for p in self.model.parameters()))  # a frozen one is without dropout
        stop_signal = 0
        with StopSignals() as signals, MetricsLogger(config, self.iter_num) as metrics:
            self.iter_time = time.perf_counter()
            iterator = self._batches()
            while not self.is_finished() and not stop_signal:
                x, y = next(iterator)
                self._step(x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True))
                self.trigger_callbacks("on_batch_end")
                self.iter_num += 1
                now = time.perf_counter()
                self.iter_dt, self.iter_time = now - self.iter_time, now
                self.seconds += self.iter_dt
                rate = self.optimizer.param_groups[-1]["lr"]
                metrics.log_step(self.iter_num, self.loss, rate, self.iter_dt, self._validated)
                stop_signal = distributed.all_reduce_max(signals.received)
                is_due = config.checkpoint_every and self.iter_num % config.checkpoint_every == 0
                if is_due and not self.is_finished() and not stop_signal:
                    self.save()
            if config.checkpoint_path:
                self.save()
        if stop_signal:
            state = f"{config.checkpoint_path} has the state, and the same call goes on from it"
            logger.warning(
                "stopped by %s after %d of %s iterations; %s",
                signal.Signals(stop_signal).name,
                self.iter_num,
                config.max_iters,
                state if config.checkpoint_path else "nothing is saved, as there is no checkpoint_path",
            )
            signal.raise_signal(stop_signal)
            if not self.is_finished():  # a handler let the process live, and what is half trained is not done
                raise SystemExit(128 + stop_signal)

    def _step(self, x: Tensor, y: Tensor) -> None:
        factor = learning_rate_factor(self.iter_num, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        self._validated = {}
        # The gradient of the mean over all processes' targets is the mean of theirs, weighted by how many each has.
        self._weight = self._weight_of(y)
        self.loss = self.mean(self.backward(x, y))
        self.average_gradients()
        self.clip_gradients()
        self.optimizer.step()

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the loss's gradients to those of the trained tensors, and return it."""
        with autocast(self.precision, self.device):
            loss = self.compute_loss(x, y)
        (loss * self._weight).backward()
        return loss.detach()

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
            fully_shard(model, cast(GPT, model).blocks, self.device.type)
        wrapped = torch.compile(model) if self.config.compile else model
        if is_alone or self.config.parallel == "fsdp" or not any(p.requires_grad for p in model.parameters()):
            return wrapped
        return nn.parallel.DistributedDataParallel(wrapped)

    def _batches(self) -> Iterator[batches.Batch]:
        """The batches from iteration ``iter_num`` on; which rows they hold does not depend on where it started."""
        dataset, indices = cast(Any, self.train_dataset), cast(Any, self.index_batches())
        if batches.is_batched(self.train_dataset) and not self.config.num_workers:
            return (dataset.batch(each) for each in indices)
        generator = torch.Generator().manual_seed(self._data_seed)  # else it draws from the global one
        options = {"num_workers": self.config.num_workers, "pin_memory": self.device.type == "cuda"}
        return iter(torch.utils.data.DataLoader(dataset, batch_sampler=indices, generator=generator, **options))

    # ------------------------------------------------------------------------------------------------ checkpoints

    def describe(self) -> dict[str, Any]:
        """What identifies the run, together with ``cache_key``: a checkpoint of one run does not resume another."""
        config, data = getattr(self.model, "config", None), cast(Any, self.train_dataset)
        is_described, n_examples = callable(getattr(data, "describe", None)), getattr(data, "__len__", lambda: None)()
        return {
            "trainer": type(self).__name__,
            "recipe": recipe(self.config) | {"precision": self.precision},
            "model": config.to_dict() if isinstance(config, CfgNode) else None,
            "data": data.describe() if is_described else {"type": type(data).__name__, "n_examples": n_examples},
            "trained": {name: list(tensor.shape) for name, tensor in self.trained_tensors().items()},
        }

    def save(self) -> None:
        """Write all that the rest of the run depends on to ``checkpoint_path``; all processes must get here.

        Raises:
            DivergedError: rather than writing what is not finite.
        """
        if not all(torch.isfinite(full_tensor(tensor)).all() for tensor in self.trainable_parameters()):
            raise self._diverged("what is trained is not finite")
        optimizer, skeleton = checkpoint.flatten_state(self.optimizer.state_dict(), "optimizer")
        tensors = {f"trained.{name}": tensor for name, tensor in self.trained_tensors().items()} | optimizer
        for states in distributed.all_gather({name: rng.get_rng_state() for name, rng in self._rngs().items()}):
            tensors |= states
        state = {"iter_num": self.iter_num, "seconds": self.seconds, "data_seed": self._data_seed}
        description = {"cache_key": self._identity, "state": state | {"optimizer": skeleton}}
        checkpoint.save_checkpoint(self.config.checkpoint_path, tensors | {"loss": self.loss}, description)

    def _resume(self, path: str | Path) -> None:
        tensors, description = checkpoint.load_checkpoint(path)
        verify(path, description.get("cache_key"), self._identity)
        with parsing(path, "the state of a training"):
            self._restore(tensors, description["state"], path)

    def _restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], path: str | Path) -> None:
        trained = {name: tensors[f"trained.{name}"] for name in self.trained_tensors()}
        checkpoint.check_finite({name: each for name, each in trained.items() if name != "curves"}, path)
        with torch.no_grad():
            for name, tensor in self.trained_tensors().items():
                tensor.copy_(distribute_like(trained[name], tensor))
        self.optimizer.load_state_dict(checkpoint.unflatten_state(state["optimizer"], tensors))
        if self.config.parallel == "fsdp":
            for parameter, own in self.optimizer.state.items():
                own |= {k: distribute_like(v, parameter) for k, v in own.items() if v.shape == parameter.shape}
        self.iter_num, self.seconds, self._data_seed = state["iter_num"], state["seconds"], state["data_seed"]
        self.loss = tensors["loss"].to(self.device)
        for name, rng in self._rngs().items():
            if name in tensors:  # fewer processes may have saved it
                rng.set_rng_state(tensors[name])

    def _rngs(self) -> dict[str, Any]:
        """The modules that hold the states of torch's generators, by what a checkpoint calls those of this process."""
        rngs = {"cpu": torch} | ({"cuda": torch.cuda} if self.device.type == "cuda" else {})
        return {f"rng.{kind}.{distributed.rank()}": rng for kind, rng in rngs.items()}


class AdapterTrainer(Trainer):
    """Trains adapters of a frozen model, one or several at once.

    K adapters are trained on one batch, ``batch_size`` rows of each one's own dataset. Their losses are added, their
    gradients clipped and their learning rates decayed one by one, so each ends as if it had been trained alone.

    Attributes:
        adapter: what is trained.
        learning_rates: K of them.
        n_iters: (K,) of int64, after how many iterations each adapter ends; below what was asked where it is at its
            plateau.
        curves: (K, N) of float64, each adapter's accuracy on validation rows after every ``validate_every`` iterations;
            NaN where it has ended.
        is_diverged: (K,) of bool, which adapters have ended because their gradients were not finite, with the values
            before that.
    """

    def __init__(
        self,
        config: CfgNode,
        model: GPT,
        train_dataset: OneOrMore,
        adapter: Adapter,
        learning_rates: Sequence[float] | None = None,
    ):
        """Get ready to train ``adapter`` in place.

        Args:
            config: see ``Trainer.get_default_config``; weight decay does not apply to adapters.
            model: that the adapter was made for.
            train_dataset: one dataset, or a list of one for each of the K adapters.
            adapter: moves to the model's device.
            learning_rates: of each adapter, the configuration's by default.

        Raises:
            TypeError: if a list holds anything but a CustomDataset or a TextDataset.
            ValueError: if the adapter does not fit the model or its datasets, or as for ``Trainer``.
        """
        data = batches.JointDataset(train_dataset if isinstance(train_dataset, Sequence) else [train_dataset])
        super().__init__(config, model, data)
        self.adapter, self._n_adapters = adapter.to(self.device), adapter.n_adapters
        self.learning_rates = list(learning_rates or [config.learning_rate] * self._n_adapters)
        for what, own in (("datasets", data.datasets), ("learning_rates", self.learning_rates)):
            if len(own) != self._n_adapters:
                raise ValueError(f"{self._n_adapters} adapters for {len(own)} {what}; give each adapter one")
        n_placeholders, padding = adapter.n_placeholders, data.prefix_padding
        if n_placeholders > padding:
            raise ValueError(f"prefix_padding = {padding} is too short for {n_placeholders} prefix positions")
        self._validation = [dataset.with_split("validation") for dataset in data.datasets]
        names = [", ".join(map(str, dataset.tasks)) for dataset in data.datasets]
        self._names = [f"{name} ({k})" if names.count(name) > 1 else name for k, name in enumerate(names)]

    def describe(self) -> dict[str, Any]:
        model = checkpoint.checksum(self.model.state_dict())
        own = {"learning_rates": self.learning_rates, "model_checksum": model}
        return super().describe() | self.adapter.describe() | own

    def build_optimizer(self) -> torch.optim.Optimizer:
        rate, betas = self.config.learning_rate, tuple(self.config.betas)
        return torch.optim.AdamW(self.trainable_parameters(), lr=rate, betas=betas, weight_decay=0.0)

    def trained_tensors(self) -> dict[str, Tensor]:
        state = {"n_iters": self.n_iters, "curves": self.curves, "is_diverged": self.is_diverged}
        return dict(self.adapter.named_parameters()) | state

    def run(self) -> None:
        """Train the adapters; the model's weights get no gradient and do not change.

        Raises:
            DivergedError: when all have ended, if one has diverged; see ``Trainer.run`` for others.
        """
        forever, n_iters = torch.iinfo(torch.int64).max, self.config.max_iters
        self.n_iters = torch.full((self._n_adapters,), forever if n_iters is None else n_iters)
        n_validations = (n_iters or 0) // (self.config.validate_every or forever)
        self.curves = torch.full((self._n_adapters, n_validations), torch.nan, dtype=torch.float64)
        self.is_diverged = torch.zeros(self._n_adapters, dtype=torch.bool)
        self._is_bad = torch.zeros(self._n_adapters, dtype=torch.bool, device=self.device)  # before it is looked at
        required = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in required:
            parameter.requires_grad_(False)
        try:
            super().run()
        finally:
            for parameter in required:
                parameter.requires_grad_(True)
        if self.is_diverged.any():
            found = zip(self._names, self.n_iters.tolist(), self.learning_rates, self.is_diverged, strict=True)
            which = [
                f"{name} at iteration {n + 1} (rate {rate})" for name, n, rate, is_diverged in found if is_diverged
            ]
            raise DivergedError(f"diverged, with the values before that kept: {', '.join(which)}; lower learning_rate")

    def _restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], path: str | Path) -> None:
        super()._restore(tensors, state, path)
        self._is_bad = self.is_diverged.to(self.device)

    @property
    def _numbers(self) -> list[int]:
        """Which adapters still learn."""
        return [number for number, n in enumerate(self.n_iters.tolist()) if n > self.iter_num]

    def is_finished(self) -> bool:
        return not self._numbers

    def index_batches(self) -> Iterator[Sequence[Any]]:
        """For each iteration, (a dataset's number, its indices) for each adapter that learns."""
        for own in super().index_batches():
            yield [(number, own) for number in self._numbers]

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        """As many adapters at once as have ``MAX_ROWS``, beyond which activations only wait for memory.

        Returns:
            The mean over the adapters that learn of each one's mean cross-entropy, in nats.
        """
        numbers, n_rows = self._numbers, self.config.batch_size
        size, losses = max(1, MAX_ROWS // n_rows), []
        for first in range(0, len(numbers), size):
            own, rows = numbers[first : first + size], slice(first * n_rows, (first + size) * n_rows)
            with self.adapter.attached(own) as prefix, autocast(self.precision, self.device):
                loss = self._forward(x[rows], y[rows], prefixes=prefix, **self._hints)[1] * len(own) / len(numbers)
                (loss * self._weight).backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def average_gradients(self) -> None:
        for tensor in self.trainable_parameters():
            assert tensor.grad is not None
            distributed.all_reduce_sum(tensor.grad.div_(distributed.world_size()))

    def _step(self, x: Tensor, y: Tensor) -> None:
        tensors = self.trainable_parameters()
        before = [tensor.detach().clone() for tensor in tensors]
        super()._step(x, y)
        # Without weight decay, AdamW's step is proportional to the rate: each adapter takes its share of the step.
        if common := self.config.learning_rate * learning_rate_factor(self.iter_num, self.config):
            ends = self.n_iters.tolist()
            factors = [learning_rate_factor(self.iter_num, self.config, n) * (n > self.iter_num) for n in ends]
            rates = [rate * factor for rate, factor in zip(self.learning_rates, factors, strict=True)]
            shares = (torch.tensor(rates, device=self.device) / common).clamp(min=0)
            with torch.no_grad():
                for tensor, old in zip(tensors, before, strict=True):
                    axes = [-1, *[1] * (tensor.ndim - 1)]
                    new = old.lerp(tensor, shares.view(axes))
                    self._is_bad |= ~torch.isfinite(new).flatten(1).all(dim=1)
                    tensor.copy_(torch.where(self._is_bad.view(axes), old, new))
            if self._looks():
                is_new = self._is_bad.cpu() & ~self.is_diverged
                self.n_iters[is_new], self.is_diverged[is_new] = self.iter_num, True
        if self.config.validate_every and (self.iter_num + 1) % self.config.validate_every == 0:
            self._validate()

    @torch.no_grad()
    def _validate(self) -> None:
        """Let the adapters that learn answer validation rows, and end those at their plateau."""
        config, n_done = self.config, self.iter_num + 1
        kept = 0.0 if config.lr_schedule == "constant" else config.decay_fraction
        for number in self._numbers:
            n_rows, data = config.validation_rows, self._validation[number]
            with self.adapter.attached([number]) as prefix:
                score = evaluate(cast(GPT, self.model), data, prefix, n_rows, precision=self.precision)
            accuracy = distributed.all_gather(score.accuracy)[0]
            self._validated[self._names[number]] = accuracy
            self.curves[number, n_done // config.validate_every - 1] = accuracy
            best_at = config.validate_every * (1 + int(self.curves[number].nan_to_num(-1).argmax()))
            is_plateau = accuracy == 1 or n_done - best_at >= config.patience
            if is_plateau and int(self.n_iters[number]) == config.max_iters:
                self.n_iters[number] = min(config.max_iters, math.ceil(n_done / (1 - kept)))

    def clip_gradients(self) -> None:
        """Scale each adapter's gradient down to a norm of at most ``grad_norm_clip``, as if it were alone.

        One that is not finite ends its adapter.
        """
        # The loss is the mean over the adapters that learn; a lone adapter's is its own.
        gradients = [tensor.grad for tensor in self.trainable_parameters() if tensor.grad is not None]
        norms = torch.stack([each.reshape(self._n_adapters, -1).norm(dim=1) for each in gradients]).norm(dim=0)
        n_learning, self._is_bad = len(self._numbers), self._is_bad | ~torch.isfinite(norms)
        scale = n_learning * (self.config.grad_norm_clip / (n_learning * norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient *= scale.view(-1, *[1] * (gradient.ndim - 1))


class PrefixTrainer(AdapterTrainer):
    """Trains one prefix, or several at once, for a frozen model.

    A prefix tensor is trained in place; as the model, it moves to the trainer's device.

    Attributes:
        prefixes: what was given.
    """

    def __init__(self, config: CfgNode, model: GPT, train_dataset: OneOrMore, prefixes: Tensor | Prefix):
        """Get ready to train ``prefixes`` in place.

        Args:
            config: see ``Trainer.get_default_config``; weight decay does not apply to prefixes.
            model: a GPT or another ``CausalModel``.
            train_dataset: one dataset for one prefix, or a list of K.
            prefixes: a leaf tensor, see ``mingpt.prefix.as_prefix``, or (K, L, P, C) for a list of K datasets; or a
                Prefix of any kind, whose ``values`` hold K prefixes.

        Raises:
            TypeError: if the prefix is no tensor.
            ValueError: if the prefix does not fit the model or its dataset, or as for ``Trainer``.
        """
        prefix = prefixes
        if isinstance(train_dataset, Sequence) and not isinstance(prefix, Prefix):
            prefix = Prefix("activation", prefix)
        prefix = as_prefix(prefix, model, prefix.n_prefixes if isinstance(prefix, Prefix) else 1)
        check_config(config)
        self.prefixes = prefixes.values if isinstance(prefixes, Prefix) else prefixes
        if not self.prefixes.is_leaf:
            raise ValueError("the prefix is trained in place, so it must be a leaf tensor, got is_leaf = False")
        self.prefixes.data = self.prefixes.data.to(distributed.resolve_device(config.device))
        values = self.prefixes.detach().view(prefix.values.shape)  # of the same memory
        super().__init__(config, model, train_dataset, PrefixAdapter(model, replace(prefix, values=values)))


def batch_end_callback(trainer: Trainer) -> None:
    """Print the time and the loss every 1000 iterations, as the seed notebook's callback does."""
    number = trainer.iter_num + 1
    if number % 1000 == 0:
        print(f"iter_dt {trainer.iter_dt * 1000:>6.2f}ms; iter {number:>6}: train loss {trainer.loss.item():.5f}")
