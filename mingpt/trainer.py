"""The training loop, and what differs when a prefix is trained instead of a model.

Legend: B batch, T tokens, P prefix positions, C channels, L layers, K prefixes.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from mingpt.training.batches import Batch, IndexBatches, JointDataset
from mingpt.training.metrics import RUNTIME_KEYS, watch
from mingpt.training.optimizers import build_optimizer, learning_rate_factor
from mingpt.training.precision import autocast, resolve_precision
from mingpt.utils import CfgNode


class Trainer:
    """Trains a model on a map-style dataset of (x, y) pairs.

    ``run`` is the only loop. A subclass says what is trained (``trained_tensors``), by which optimizer, and how the
    loss of a batch is computed; it does not touch the loop.

    Attributes:
        device: where the model is.
        optimizer: made by ``run``.
        loss: the last batch's loss, a scalar tensor.
        iter_num: how many iterations are done; during the callbacks of an iteration, its number from 0.
        iter_dt: seconds the last iteration took.
        seconds: what all iterations took, those before a resumption included.
    """

    @staticmethod
    def get_default_config() -> CfgNode:
        """minGPT's settings, and this package's, which change nothing until they are set.

        Keys:
            device: "auto" is a GPU where there is one.
            num_workers: processes that make batches; 0 makes them in this one, which is fastest for CustomDataset.
            max_iters: when to stop; None goes on for ever.
            batch_size, learning_rate, betas, weight_decay (on weights of linear layers), grad_norm_clip: as in minGPT.
                Several processes share out a batch.
            optimizer: "adamw", or "muon" for the blocks' matrices, at muon_learning_rate with muon_momentum.
            lr_schedule: "constant", "linear" or "cosine", a decay over the last decay_fraction of the run.
            warmup_iters: iterations of linear warm-up.
            converged_loss: of prefixes trained together, one whose smoothed loss (nats per scored token) falls below
                this has converged: it stays as it is, and its rows go to the others. 0 is never.
            precision: "float32", "bfloat16", or "auto" for bfloat16 where the hardware multiplies it natively.
            compile: pass the model through torch.compile.
            parallel: what processes that torchrun started have of the model: "ddp" is all of it
                (DistributedDataParallel), "fsdp" a part of every parameter (fully_shard; the optimizer is adamw then,
                and the model stays split after the run).
            checkpoint_path: a file that a run is resumed from where it exists, and saved to every checkpoint_every
                iterations and at the end.
            metrics_path: a JSON-lines file that gets a line every log_every iterations.
            tensorboard_path: a folder for TensorBoard's events, where the package tensorboard is installed.
            progress: show a progress bar; "auto" shows it on a terminal.
        """
        return CfgNode(
            device="auto",
            num_workers=0,
            max_iters=None,
            batch_size=64,
            learning_rate=3e-4,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            grad_norm_clip=1.0,
            optimizer="adamw",
            muon_learning_rate=5e-3,
            muon_momentum=0.95,
            lr_schedule="constant",
            warmup_iters=0,
            decay_fraction=0.4,
            converged_loss=0.0,
            precision="auto",
            compile=False,
            parallel="ddp",
            checkpoint_path=None,
            checkpoint_every=None,
            metrics_path=None,
            tensorboard_path=None,
            log_every=10,
            progress="auto",
        ).close(progress=("auto", True, False), converged_loss=None)

    def __init__(self, config: CfgNode, model: Any, train_dataset: Any):
        """Move the model to its device and get ready; ``run`` does the work.

        Args:
            config: see ``get_default_config``.
            model: called as ``model(x, y)``, returns (logits, loss); has ``configure_optimizers(config)``.
            train_dataset: a map-style dataset of pairs of tensors. One with ``batch(indices)``, as CustomDataset, is
                walked without end or repetition; from any other, examples are drawn at random with replacement.
        """
        self.config, self.model, self.train_dataset = config, model, train_dataset
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        self.precision = resolve_precision(config.precision, self.device)
        model.to(self.device)
        self.callbacks: dict[str, list[Callable[[Trainer], None]]] = defaultdict(list)
        self.optimizer: Any = None
        self.loss: Tensor = torch.tensor(float("nan"))
        self.iter_num, self.iter_time, self.iter_dt, self.seconds = 0, 0.0, 0.0, 0.0
        self._data_seed = 0
        self._weight: Tensor | float = 1.0

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
        return dict(self.model.named_parameters())

    def build_optimizer(self) -> Any:
        """A fresh optimizer for the trained tensors."""
        return build_optimizer(self.model, self.config)

    def set_mode(self) -> None:
        """Put the model into the mode that it is trained in."""
        self.model.train()

    def compute_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The scalar to descend on."""
        return self._forward(x, y, **self._hints())[1]

    def _hints(self) -> dict[str, int]:
        """What the model need not find out: padding is the same in every row, and only solutions are scored."""
        data = self.train_dataset
        if not isinstance(data, CustomDataset) or not isinstance(self.model, GPT):
            return {}
        return {"n_shared": data.prefix_padding, "n_scored": data.length}

    def average_gradients(self) -> None:
        """Have every process's gradients be the mean of all; the wrapped model's backward pass has done it here."""

    def is_finished(self) -> bool:
        """Whether there is no further iteration to do."""
        return self.config.max_iters is not None and self.iter_num >= self.config.max_iters

    def clip_gradients(self) -> None:
        """Scale the gradients down to a norm of at most ``grad_norm_clip``."""
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_norm_clip)

    # --------------------------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        """Train until ``max_iters``, from the beginning or from ``checkpoint_path`` where that file exists.

        Raises:
            CheckpointError: if that file is damaged or belongs to another run.
            ValueError: for a configuration that makes no sense, or fewer rows in a batch than processes.
        """
        config, n_processes = self.config, distributed.world_size()
        if config.checkpoint_every and not config.checkpoint_path:
            raise ValueError("checkpoint_every is set and checkpoint_path is not; set both or neither")
        if config.batch_size < n_processes:
            raise ValueError(f"{n_processes} processes cannot share {config.batch_size} rows; raise batch_size")
        self.iter_num, self.seconds = 0, 0.0
        # As minGPT's sampler, it follows set_seed.
        self._data_seed = distributed.run_on_main(lambda: int(torch.randint(2**62, ())))
        tensors = [*self.model.parameters(), *self.trained_tensors().values()]
        distributed.broadcast(tensor for tensor in tensors if not isinstance(tensor, DTensor))
        self._forward = self._wrap_model()
        self.optimizer = self.build_optimizer()
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        if distributed.rank():  # each process has its own dropout
            torch.manual_seed(self._data_seed + distributed.rank())
        if config.checkpoint_path and distributed.run_on_main(lambda: Path(config.checkpoint_path).exists()):
            self._resume(config.checkpoint_path)
        self.set_mode()
        with watch(self) as report:
            self.iter_time = time.perf_counter()
            batches = self._batches()
            while not self.is_finished():
                x, y = next(batches)
                self._step(x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True))
                self.trigger_callbacks("on_batch_end")
                self.iter_num += 1
                now = time.perf_counter()
                self.iter_dt, self.iter_time = now - self.iter_time, now
                self.seconds += self.iter_dt
                report()
                if config.checkpoint_every and self.iter_num % config.checkpoint_every == 0:
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

    def _wrap_model(self) -> Any:
        """What is called in the place of the model: it keeps the processes' gradients or parameters in step."""
        config = self.config
        if config.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"unknown parallel = {config.parallel!r}; choose ddp or fsdp")
        if config.parallel == "fsdp" and config.optimizer == "muon":
            raise ValueError("parallel = 'fsdp' splits the matrices that optimizer = 'muon' needs whole; use adamw")
        model, n_processes = self.model, distributed.world_size()
        if config.parallel == "fsdp" and n_processes > 1:
            fully_shard(model, torch.device(self.device).type)
        if config.compile:
            model = torch.compile(model)
        if config.parallel == "fsdp" or n_processes == 1 or not any(p.requires_grad for p in self.model.parameters()):
            return model
        return nn.parallel.DistributedDataParallel(model)

    def _batches(self) -> Iterator[Batch]:
        """The batches from iteration ``iter_num`` on; which rows they hold does not depend on where it started."""
        dataset, config = self.train_dataset, self.config
        part = (
            (0, 1) if isinstance(self.train_dataset, JointDataset) else (distributed.rank(), distributed.world_size())
        )
        indices = IndexBatches(dataset, config.batch_size, self.iter_num, self._data_seed, part)
        if hasattr(dataset, "batch") and config.num_workers == 0:
            return (dataset.batch(batch) for batch in indices)
        return iter(
            torch.utils.data.DataLoader(
                dataset,
                batch_sampler=indices,
                num_workers=config.num_workers,
                generator=torch.Generator().manual_seed(self._data_seed),  # else it draws from the global one
                pin_memory=torch.cuda.is_available(),
            )
        )

    # ------------------------------------------------------------------------------------------------ checkpoints

    def describe(self) -> dict[str, Any]:
        """What identifies the run: a checkpoint of one run does not resume another."""
        config = {k: list(v) if isinstance(v, tuple) else v for k, v in self.config.to_dict().items()}
        model_config, data = getattr(self.model, "config", None), self.train_dataset
        return {
            "trainer": type(self).__name__,
            "recipe": {k: v for k, v in config.items() if k not in RUNTIME_KEYS} | {"precision": self.precision},
            "model": model_config.to_dict() if isinstance(model_config, CfgNode) else None,
            "data": data.describe()
            if hasattr(data, "describe")
            else {"type": type(data).__name__, "n_examples": len(data)},
        }

    def save(self) -> None:
        """Write all that the rest of the run depends on to ``checkpoint_path``; all processes must get here."""
        optimizer, skeleton = checkpoint.flatten_state(self.optimizer.state_dict(), "optimizer")
        tensors = {f"trained.{name}": tensor for name, tensor in self.trained_tensors().items()} | optimizer
        for number, states in enumerate(distributed.all_gather(_rng_states())):
            tensors |= {f"rng.{kind}{number or ''}": state for kind, state in states.items()}
        state = {
            "iter_num": self.iter_num,
            "seconds": self.seconds,
            "data_seed": self._data_seed,
            "optimizer": skeleton,
        }
        checkpoint.save_checkpoint(self.config.checkpoint_path, tensors, self.describe() | {"state": state})

    def _resume(self, path: str | Path) -> None:
        tensors, description = checkpoint.load_checkpoint(path)
        for field, expected in self.describe().items():
            checkpoint.require_equal(path, field, description.get(field), expected)
        state = description["state"]
        own = self.trained_tensors()
        saved = {k.removeprefix("trained."): t for k, t in tensors.items() if k.startswith("trained.")}
        shapes, own_shapes = ({name: list(t.shape) for name, t in each.items()} for each in (saved, own))
        checkpoint.require_equal(path, "trained", shapes, own_shapes)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(distribute_like(saved[name], tensor))
        self.optimizer.load_state_dict(checkpoint.unflatten_state(state["optimizer"], tensors))
        if self.config.parallel == "fsdp":
            for parameter, own in self.optimizer.state.items():
                own |= {k: distribute_like(v, parameter) for k, v in own.items() if v.shape == parameter.shape}
        self.iter_num, self.seconds, self._data_seed = state["iter_num"], state["seconds"], state["data_seed"]
        number = distributed.rank() or ""
        if f"rng.cpu{number}" in tensors:  # fewer processes may have saved it
            torch.set_rng_state(tensors[f"rng.cpu{number}"])
        if torch.cuda.is_available() and f"rng.cuda{number}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda{number}"])


class AdapterTrainer(Trainer):
    """Trains something beside a model that stays as it is; ``trained_tensors`` says what."""

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"model_checksum": checkpoint.checksum(self.model.state_dict())}

    def _learned(self) -> list[Tensor]:
        return [tensor for tensor in self.trained_tensors().values() if tensor.requires_grad]

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self._learned(), lr=self.config.learning_rate, betas=tuple(self.config.betas), weight_decay=0.0
        )

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
        for tensor in self._learned():
            assert tensor.grad is not None
            distributed.all_reduce_sum(tensor.grad.div_(distributed.world_size()))

    def clip_gradients(self) -> None:
        nn.utils.clip_grad_norm_(self._learned(), self.config.grad_norm_clip)


class LoRATrainer(AdapterTrainer):
    """Trains a LoRA, attached to its model, which stays as it is."""

    def __init__(self, config: CfgNode, model: GPT, train_dataset: Any, lora: LoRA):
        """Get ready to train ``lora`` in place.

        Args:
            config: see ``Trainer.get_default_config``; weight decay does not apply to a LoRA.
            model: the GPT that the LoRA was made for.
            train_dataset: see ``Trainer``.
            lora: attached.
        """
        super().__init__(config, model, train_dataset)
        self.lora = lora.to(self.device)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"layers": list(self.lora.names), "scale": self.lora.scale}

    def trained_tensors(self) -> dict[str, Tensor]:
        return dict(self.lora.named_parameters())


class PrefixTrainer(AdapterTrainer):
    """Trains one prefix, or several at once, for a model that stays as it is.

    Several prefixes are trained on one batch, ``batch_size`` rows of each one's own dataset. Their losses are added and
    their gradients clipped one by one, so each ends as if it had been trained alone; with ``converged_loss``, those
    that have not converged share the rows of those that have.
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
                ``values`` hold K prefixes; or the Reparametrization that K prefixes are trained through.

        Raises:
            ValueError: if the prefix does not fit the model, or a dataset leaves no place for it.
        """
        is_joint = isinstance(train_dataset, Sequence)
        datasets = list(train_dataset) if isinstance(train_dataset, Sequence) else [train_dataset]
        super().__init__(
            config,
            model,
            JointDataset(datasets, bool(config.converged_loss), (distributed.rank(), distributed.world_size()))
            if is_joint
            else datasets[0],
        )
        n_layer, n_embd = model.config.n_layer, model.config.n_embd
        if isinstance(prefixes, Prefix):
            prefix = prefixes
        elif isinstance(prefixes, Reparametrization):
            prefix = Prefix("key_value", prefixes.start)
        elif is_joint:
            prefix = Prefix("activation", prefixes)
        else:
            prefix = as_prefix(prefixes, n_layer, n_embd, batch_size=1)
        prefix.check(n_layer, n_embd, prefix.n_prefixes)
        self.prefixes = prefixes.values if isinstance(prefixes, Prefix) else prefixes
        self._trained = (
            {"prefixes": self.prefixes} if isinstance(self.prefixes, Tensor) else dict(self.prefixes.named_parameters())
        )
        if prefix.n_prefixes != len(datasets):
            raise ValueError(f"{prefix.n_prefixes} prefixes for {len(datasets)} datasets; give one prefix a dataset")
        for tensor in self._trained.values():
            if not tensor.is_leaf or not tensor.is_floating_point():
                raise ValueError("the prefix must be a leaf tensor of a floating dtype, it is trained in place")
            if tensor.device.type != torch.device(self.device).type:
                raise ValueError(f"the prefix is on {tensor.device}, training is on {self.device}; move it there first")
            tensor.requires_grad_()
        for dataset in datasets:
            if getattr(dataset, "prefix_padding", prefix.n_placeholders) < prefix.n_placeholders:
                raise ValueError(
                    f"prefix_padding = {dataset.prefix_padding} is too short for {prefix.n_placeholders} prefix positions"
                )
        if len({(getattr(d, "length", None), getattr(d, "prefix_padding", None)) for d in datasets}) > 1:
            raise ValueError("prefixes that are trained together need datasets of one length and one prefix_padding")
        if config.converged_loss and (config.num_workers or not is_joint):
            raise ValueError(
                "converged_loss needs a list of datasets and num_workers = 0: which rows are next depends on the losses"
            )
        self._prefix = prefix  # its kind, places and shape, which has the axis of K in front
        self._n_scored = getattr(datasets[0], "length", None)
        self._n_prefixes = len(datasets)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"kind": self._prefix.kind}

    def trained_tensors(self) -> dict[str, Tensor]:
        return self._trained | ({"loss": self._smoothed_loss} if self.config.converged_loss else {})

    def run(self) -> None:
        """Train the prefixes; the model's weights get no gradient and do not change."""
        # Each prefix's loss, smoothed from 1 nat on, so that none converges in the first iterations; 0 once it has.
        self._smoothed_loss = torch.ones(self._n_prefixes, device=self.device)
        self._share_rows()
        super().run()

    def is_finished(self) -> bool:
        return super().is_finished() or not len(self._learning)

    def compute_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean over the prefixes that are learning of each one's mean cross-entropy, in nats."""
        values = self.prefixes if isinstance(self.prefixes, Tensor) else self.prefixes()
        values = values.view(self._prefix.values.shape).index_select(0, self._learning)
        prefix = replace(self._prefix, values=values)
        logits, loss = self._forward(x, y, prefixes=prefix, n_scored=self._n_scored)
        if self.config.converged_loss:
            with torch.no_grad():
                scored = y[:, -logits.shape[1] :].flatten()
                losses = F.cross_entropy(logits.flatten(0, 1).float(), scored, reduction="none")
                own = self.mean(losses.view(len(self._learning), -1).mean(dim=1))
                self._smoothed_loss[self._learning] = self._smoothed_loss[self._learning].lerp(own, 0.1)
        return loss

    def _step(self, x: Tensor, y: Tensor) -> None:
        super()._step(x, y)
        if self.config.converged_loss and (self.iter_num + 1) % 10 == 0:  # seldom, a GPU has to be waited for
            converged = self._smoothed_loss < self.config.converged_loss
            self._smoothed_loss[converged] = 0
            # Without a gradient and without momentum, Adam leaves a prefix as it is.
            for tensor in self._trained.values():
                self.optimizer.state[tensor]["exp_avg"][converged] = 0
            self._share_rows()

    def _resume(self, path: str | Path) -> None:
        super()._resume(path)
        self._share_rows()

    def _share_rows(self) -> None:
        """Have the batches made of rows of the prefixes that are learning."""
        self._learning = self._smoothed_loss.nonzero().flatten()
        if self._n_prefixes > 1 and len(self._learning):
            self.train_dataset.chosen = self._learning.tolist()

    def clip_gradients(self) -> None:
        """Scale each prefix's gradient down to a norm of at most ``grad_norm_clip``, as if it were alone."""
        # The loss is the mean over the prefixes that learn; a lone prefix's is its own.
        gradients = [tensor.grad for tensor in self._learned() if tensor.grad is not None]
        norms = torch.stack([each.reshape(self._n_prefixes, -1).norm(dim=1) for each in gradients]).norm(dim=0)
        n_learning = len(self._learning)
        scale = n_learning * (self.config.grad_norm_clip / (n_learning * norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient *= scale.view(-1, *[1] * (gradient.ndim - 1))


def batch_end_callback(trainer: Trainer) -> None:
    """Print the time and the loss every 1000 iterations, as the seed notebook's callback does."""
    if (trainer.iter_num + 1) % 1000 == 0:
        print(
            f"iter_dt {trainer.iter_dt * 1000:>6.2f}ms; iter {trainer.iter_num + 1:>6}: "
            f"train loss {trainer.loss.item():.5f}"
        )


def _rng_states() -> dict[str, Tensor]:
    """The states of torch's generators in this process."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
