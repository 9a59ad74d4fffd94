"""Predictions for a list of examples by all processes of a job, in order, whatever their number.

Legend: N examples, B examples of a batch, W processes that share the batches.

Batch b is process b mod W's, and the processes meet only once, when all is predicted: uneven work cannot hang. Batches
do not depend on W, and random draws are a function of (seed, index of the example), so neither do the predictions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map

from mingpt import distributed
from mingpt.distributed.sharding import Rules, is_fully_sharded, shard
from mingpt.storage.cache import cached_json
from mingpt.storage.checkpoint import json_checksum
from mingpt.storage.files import naming, parsing, read_json_lines, scratch_folder, write_atomic


@dataclass(frozen=True)
class SampleSeeds:
    """Where the random numbers of a batch come from; each example has its own.

    Attributes:
        seed: of the predictor.
        indices: of the batch's B examples; ``generate(seed=sample_seeds.seed, row_numbers=sample_seeds.indices)``
            samples by them.
    """

    seed: int
    indices: tuple[int, ...]


class Predictor:
    """Manages prediction on one process or many: under torchrun each takes its share of the examples.

    Attributes:
        mesh: the DeviceMesh, or None where every process has the full model.
    """

    def __init__(
        self,
        collate_fn: Callable[[list[Any]], Any],
        pred_fn: Callable[[Any, SampleSeeds], Any],
        output_fn: Callable[[Any], list[Any]] | None = None,
        mesh: DeviceMesh | None = None,
        sharding_rules: Rules | None = None,
        *,
        model: nn.Module | None = None,
        seed: int = 0,
    ):
        """Say how to predict; nothing is set up before the first examples come.

        Args:
            collate_fn: makes the input of a batch from B raw examples.
            pred_fn: predicts from that input and the SampleSeeds of the batch, without gradients; it uses the model by
                itself.
            output_fn: makes a list of B predictions of what ``pred_fn`` gave; by default a tensor becomes nested lists,
                and a list stays as it is.
            mesh: with a dimension "data", over which the batches are distributed, or "model", over which the model's
                parameters are split, or both.
            sharding_rules: (pattern, placement) pairs on the names of the model's parameters, see
                ``mingpt.distributed.sharding``; without them every process has the full model.
            model: the module that ``pred_fn`` uses: it is what the rules are for, and inputs go to its device.
            seed: of random draws.

        Raises:
            ValueError: for sharding rules without a model or without a mesh that has a dimension "model".
        """
        names = () if mesh is None else mesh.mesh_dim_names or ()
        if mesh is not None and not {"data", "model"} >= set(names) > set():
            raise ValueError(f"the mesh's dimensions must be named data, model or both, got {names or 'no names'}")
        if sharding_rules and (model is None or "model" not in names):
            raise ValueError("sharding_rules need the model, and a mesh with a dimension named model to split it over")
        self.mesh, self.model, self.seed = mesh, model, seed
        self._collate_fn, self._pred_fn, self._sharding_rules = collate_fn, pred_fn, sharding_rules
        self._output_fn = output_fn or (lambda found: found.tolist() if isinstance(found, Tensor) else found)

    def predict(
        self,
        examples: Sequence[Any],
        per_device_batch_size: int,
        desc: str | None = None,
        path: str | Path | None = None,
        cache_key: Any = None,
    ) -> list[Any]:
        """Predict for examples. All processes must get here, with the same examples.

        Args:
            examples: N of whatever ``collate_fn`` takes, none is fine.
            per_device_batch_size: how many are predicted at a time by a process.
            desc: what the progress bar says after "Predicting".
            path: a file that gets the predictions, a line of JSON each in the order of the examples. It appears when it
                is complete; until then they gather in the folder ``path.parts``, and after an interruption the same
                call, with any number of processes, predicts what is missing. What is there is replaced.
            cache_key: a JSON value that says what else the predictions depend on, such as the hash of a model's
                weights; what another call has left in ``path.parts`` is not continued.

        Returns:
            N predictions in the order of the examples, on every process.

        Raises:
            CheckpointError: if ``path.parts`` is of other examples or another cache key.
            LockedError: if another process predicts to the same path.
            ValueError: if ``output_fn`` gave another number of predictions than it got, or the model is split by FSDP2.
        """
        if self.model is not None and is_fully_sharded(self.model):
            raise ValueError(
                "the model is split by FSDP2, so all processes must read the same rows, and a Predictor gives each its "
                "own; read the whole model from its file, or split it by sharding_rules"
            )
        if per_device_batch_size < 1:
            raise ValueError(f"per_device_batch_size must be at least 1, got {per_device_batch_size}")
        if path is None:
            return self._predict(examples, per_device_batch_size, desc, None)
        folder = Path(path).with_name(Path(path).name + ".parts")
        with scratch_folder(folder):
            key = {"examples": json_checksum(list(examples)), "seed": self.seed, "other": cache_key}
            cached_json(folder / "cache_key.json", key, lambda: None)
            # The hash is in the files' names too: what is left of a folder that was being removed is not mistaken.
            parts = folder / f"{json_checksum(key)[:16]}-"
            predictions = self._predict(examples, per_device_batch_size, desc, parts)
            distributed.run_on_main(lambda: write_atomic(path, json_lines(predictions)))
        return predictions

    def _predict(self, examples: Sequence[Any], batch_size: int, desc: str | None, parts: Path | None) -> list[Any]:
        """The predictions, those that files whose names begin with ``parts`` have, and those that are missing there."""
        from tqdm import tqdm

        share, n_shares, is_writer = self._set_up()
        done, attempt = ({}, 0) if parts is None else distributed.run_on_main(lambda: _collect(parts, len(examples)))
        missing = [index for index in range(len(examples)) if index not in done]
        batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
        own: dict[int, Any] = {}
        title = "Predicting" if desc is None else f"Predicting ({desc})"
        hidden = None if distributed.is_main() else True
        for batch in tqdm(batches[share::n_shares], title, disable=hidden, unit="batch"):
            predicted = list(zip(batch, self._predict_batch(examples, batch), strict=True))
            if parts is not None and is_writer:
                lines = json_lines(predicted)
                log = parts.with_name(f"{parts.name}{distributed.rank()}-{attempt}.jsonl")
                with naming(log), log.open("ab") as file:
                    file.write(lines)
                predicted = map(json.loads, lines.splitlines())  # as an interrupted run would find them
            own.update(predicted)
        # A process that only helps to compute a share leaves reporting it to the one that writes.
        for other in distributed.all_gather(own if is_writer else {}):
            done.update(other)
        return [done[index] for index in range(len(examples))]

    def _set_up(self) -> tuple[int, int, bool]:
        """Split the model where that is asked for. Returns which share is this process's, of how many, and whether it
        is the one to report it."""
        if self.mesh is None:
            return distributed.rank(), distributed.world_size(), True
        names = self.mesh.mesh_dim_names or ()
        if self._sharding_rules and self.model is not None:
            shard(self.model, self.mesh["model"], self._sharding_rules)
        share, n_shares = (self.mesh.get_local_rank("data"), self.mesh["data"].size()) if "data" in names else (0, 1)
        return share, n_shares, "model" not in names or self.mesh.get_local_rank("model") == 0

    @torch.no_grad()
    def _predict_batch(self, examples: Sequence[Any], indices: list[int]) -> list[Any]:
        batch = self._collate_fn([examples[index] for index in indices])
        if self.model is not None:
            device = next(self.model.parameters()).device
            batch = tree_map(lambda each: each.to(device) if isinstance(each, Tensor) else each, batch)
        predictions = self._output_fn(self._pred_fn(batch, SampleSeeds(self.seed, tuple(indices))))
        if not isinstance(predictions, list) or len(predictions) != len(indices):
            got = f"a list of {len(predictions)}" if isinstance(predictions, list) else type(predictions).__name__
            raise ValueError(f"output_fn must give a list of {len(indices)} predictions, one an example, got {got}")
        return predictions


def _collect(parts: Path, n_examples: int) -> tuple[dict[int, Any], int]:
    """What interrupted calls have left: predictions by index, and how many files of them there are.

    A line is ``[index, prediction]``; the last one of a process that was killed may be torn.
    """
    done: dict[int, Any] = {}
    files = sorted(parts.parent.glob(f"{parts.name}*.jsonl"))
    for file in files:
        with parsing(file, "predictions with their indices"):
            for index, prediction in read_json_lines(file):
                if type(index) is not int or not 0 <= index < n_examples:
                    raise ValueError(f"index {index!r}")
                done[index] = prediction
    return done, len(files)


def json_lines(predictions: Iterable[Any]) -> bytes:
    """Predictions as JSON, a line each.

    Raises:
        TypeError: for one that is not JSON.
    """
    try:
        return "".join(json.dumps(each) + "\n" for each in predictions).encode()
    except TypeError as error:
        raise TypeError(f"predictions are written as JSON ({error}); give an output_fn that makes JSON") from None
