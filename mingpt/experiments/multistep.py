"""Plans of steps: a later step's prompts are built from what earlier steps have generated, so that prefixes chain.

Legend: N examples, L row length, P prefix positions, T tokens of a prompt.

A plan is a graph of named steps without cycles. The prompts of a step are built once, for all examples and on the main
process, and sent to the others; all processes share the prediction; the outputs come back in order.
"""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mingpt import distributed
from mingpt.decoding.automata import DFA
from mingpt.decoding.constraints import MultisetConstraint, RegularConstraint
from mingpt.decoding.generation import CausalModel
from mingpt.decoding.logits_processors import Constraint, LogitsProcessor
from mingpt.evaluation import Score
from mingpt.experiments.predictor import Predictor, SampleSeeds
from mingpt.prefix import Prefix
from mingpt.storage.cache import cached_json
from mingpt.storage.checkpoint import json_checksum, weights_hash
from mingpt.storage.files import CheckpointError
from mingpt.tasks import CompositeTask, SortAscending, SortDescending, Task, Values
from mingpt.training.precision import autocast
from mingpt.utils import derived_seed, nearest

Outputs = dict[str, list[Any]]
"""What each step has generated, N outputs by the step's name."""


@dataclass(frozen=True)
class Step:
    """One step of a plan: what to ask the model, and how to read its answer.

    Attributes:
        name: no two steps of a plan have the same; metrics and files are named by it.
        prompt_fn: ``prompt_fn(examples, outputs)`` makes the N prompts of all N examples at once. ``outputs`` has those
            of the steps in ``depends_on``. A prompt is a row of T tokens, with placeholders where the prefix goes.
        depends_on: names of steps that come before.
        prefix: see ``mingpt.prefix.as_prefix``; one for all examples.
        logits_processors: see ``mingpt.decoding.logits_processors``.
        metric_fn: ``metric_fn(outputs, examples)`` gives numbers by name, of the step's N outputs. It keeps no state.
        max_new_tokens: how many tokens to generate.
        output_fn: makes the output of one example of its generated tokens, a list of integers; by default they are it.
        options: of ``mingpt.decoding.generation.generate``, such as do_sample, temperature or stop_token. Without
            stop_token no token ends a row, whatever a model's generation config says.
    """

    name: str
    prompt_fn: Callable[[Sequence[Any], Outputs], Iterable[Any]]
    depends_on: tuple[str, ...] = ()
    prefix: Tensor | Prefix | None = None
    logits_processors: tuple[LogitsProcessor, ...] = ()
    metric_fn: Callable[[list[Any], Sequence[Any]], Mapping[str, float]] | None = None
    max_new_tokens: int = field(kw_only=True)
    output_fn: Callable[[list[int]], Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class Plan:
    """A model and the steps that it is led through.

    Attributes:
        model: a GPT or another ``CausalModel``, in evaluation mode.
        steps: in an order in which none comes before one that it depends on.
    """

    def __init__(self, model: CausalModel, steps: Sequence[Step]):
        """Check the steps and put them in order.

        Raises:
            ValueError: for a name that two steps have, that no step has, or that steps depend on in a circle.
        """
        by_name: dict[str, Step] = {}
        for step in steps:
            if step.name in by_name:
                raise ValueError(f"two steps are named {step.name!r}; give each its own name")
            if not step.name or "/" in step.name or step.name.startswith("."):
                raise ValueError(f"a step cannot be named {step.name!r}: files are named by it")
            by_name[step.name] = step
        for step in steps:
            for name in step.depends_on:
                if name not in by_name:
                    hint = f"{nearest(name, by_name)}; the steps are {', '.join(by_name)}"
                    raise ValueError(f"step {step.name!r} depends on {name!r}, which no step is named{hint}")
        try:
            order = graphlib.TopologicalSorter({step.name: step.depends_on for step in steps}).static_order()
            self.steps = tuple(by_name[name] for name in order)
        except graphlib.CycleError as error:
            raise ValueError(f"the steps depend on each other in a circle: {' <- '.join(error.args[1])}") from None
        self.model = model


def predict(
    plan: Plan,
    examples: Sequence[Any],
    per_device_batch_size: int = 1600,
    *,
    seed: int = 0,
    precision: str = "float32",
    folder: str | Path | None = None,
) -> Outputs:
    """Lead examples through all steps of a plan. All processes of a job must get here, with the same examples.

    Args:
        plan: the steps.
        examples: N of whatever the prompt functions take.
        per_device_batch_size: rows that a process generates at a time.
        seed: of sampling; a draw is a function of it, the step's name and the example's index.
        precision: see ``mingpt.training.precision``; in "float32" the batch size does not show in the outputs.
        folder: where each step leaves its outputs, ``<name>.json``; after an interruption the same call goes on with
            what is missing there. Outputs must be JSON values then.

    Returns:
        The N outputs of every step, on every process.

    Raises:
        CheckpointError: if the folder has outputs of a step with other prompts, another model or other settings.
        ValueError: if prompts are not one row of tokens for each example.
    """
    outputs: Outputs = {}
    model_hash = None if folder is None else weights_hash(cast(nn.Module, plan.model))
    for step in plan.steps:
        earlier = {name: outputs[name] for name in step.depends_on}
        prompts = distributed.run_on_main(lambda step=step, earlier=earlier: _prompts(step, examples, earlier))
        predict = partial(_predictor(plan.model, step, seed, precision).predict, prompts, per_device_batch_size)
        if folder is None:
            outputs[step.name] = predict(step.name)
        else:
            # What the outputs are a function of; the prompt function counts by the prompts that it makes.
            fields = {name: value for name, value in vars(step).items() if name not in ("prompt_fn", "metric_fn")}
            key = {"stage": "step", "model": model_hash, "seed": seed, "precision": precision}
            key |= {"prompts": json_checksum(prompts), "step": {k: json_checksum(v) for k, v in fields.items()}}
            path, partial_path = (Path(folder) / f"{step.name}{suffix}" for suffix in (".json", ".partial.jsonl"))
            outputs[step.name] = cached_json(path, key, partial(predict, step.name, partial_path, key))
            if len(outputs[step.name]) != len(examples):
                raise CheckpointError(
                    f"{path}: {len(outputs[step.name])} outputs of {len(examples)} examples; delete it"
                )
            distributed.run_on_main(partial(partial_path.unlink, missing_ok=True))
    return outputs


def evaluate(
    plan: Plan, examples: Sequence[Any], outputs: Outputs | None = None, metric_key_prefix: str = "test", **options: Any
) -> dict[str, float]:
    """Measure the steps of a plan that have a ``metric_fn``.

    Args:
        plan: the steps.
        examples: N, with what the metrics compare with.
        outputs: what ``predict`` gave for them; without it the examples are led through the plan first.
        metric_key_prefix: what the metrics' names begin with.
        options: see ``predict``.

    Returns:
        The metrics, each named ``<metric_key_prefix>-<step>_<metric>``, computed on the main process; none of no
        examples.
    """
    found = predict(plan, examples, **options) if outputs is None else outputs
    steps = {step.name: step.metric_fn for step in plan.steps if step.metric_fn and len(examples)}
    metrics = distributed.run_on_main(lambda: {name: metric(found[name], examples) for name, metric in steps.items()})
    return {f"{metric_key_prefix}-{name}_{k}": value for name, own in metrics.items() for k, value in own.items()}


def _prompts(step: Step, examples: Sequence[Any], earlier: Outputs) -> list[np.ndarray]:
    """A step's N prompts, (T,) each, checked: the only place where its prompt function is called."""
    prompts = list(step.prompt_fn(examples, earlier))
    if len(prompts) != len(examples):
        raise ValueError(f"step {step.name!r} made {len(prompts)} prompts for {len(examples)} examples")
    lengths = sorted({len(prompt) for prompt in prompts})
    if len(lengths) > 1:
        raise ValueError(f"step {step.name!r} made prompts of {lengths[0]} to {lengths[-1]} tokens; use one length")
    return list(np.array(prompts, dtype=np.int64))


def _predictor(model: CausalModel, step: Step, seed: int, precision: str) -> Predictor:
    own = {"prefixes": step.prefix, "logits_processors": step.logits_processors}
    options = {"stop_token": None, **step.options}

    def generate(prompts: Tensor, sample_seeds: SampleSeeds) -> list[Any]:
        seeds = {"seed": sample_seeds.seed, "row_numbers": sample_seeds.indices}
        with autocast(precision, model.device):
            tokens = model.generate(prompts, step.max_new_tokens, **own, **seeds, **options)
        return [(step.output_fn or list)(row) for row in tokens[:, prompts.shape[1] :].tolist()]

    module, own_seed = cast(nn.Module, model), derived_seed(seed, step.name)
    return Predictor(lambda rows: torch.from_numpy(np.stack(rows)), generate, model=module, seed=own_seed)


# -------------------------------------------------------------------------------------------- compositions as plans


def row_step(
    name: str,
    prefix: Tensor | Prefix | None,
    length: int,
    prefix_padding: int,
    input_step: str | None = None,
    **fields: Any,
) -> Step:
    """A step that maps rows of L integers to such rows, as the sandbox's tasks do.

    Args:
        name: of the step.
        prefix: of the task that the step solves.
        length: L.
        prefix_padding: P, the zeros in front of a row, where the prefix goes.
        input_step: the step whose outputs are this one's rows; without it they are the examples.
        fields: further ones of ``Step``.
    """

    def prompt_fn(examples: Sequence[Any], outputs: Outputs) -> np.ndarray:
        rows = np.array(examples if input_step is None else outputs[input_step], dtype=np.int64).reshape(-1, length)
        return np.pad(rows, ((0, 0), (prefix_padding, 0)))

    depends_on = () if input_step is None else (input_step,)
    return Step(name, prompt_fn, depends_on, prefix, max_new_tokens=length, **fields)


def plan_from_composition(
    task: Task,
    model: CausalModel,
    prefixes: Mapping[str, Tensor | Prefix | None],
    length: int = 10,
    num_digits: int = 10,
    prefix_padding: int = 10,
    is_constrained: bool = False,
) -> Plan:
    """Turn a composition into a chain: each of its tasks is a step with that task's own prefix.

    The examples are the N input rows, L integers each; a step's output is a row of L integers, the next step's input.
    The metric "accuracy" of a step is the share of rows that are right after it, so the last one's is the chain's.

    Args:
        task: ``SortAscending() + Add1()`` makes the steps "1-SortAscending" and "2-Add1".
        model: a GPT or another ``CausalModel``.
        prefixes: by task name.
        length, num_digits, prefix_padding: as in ``mingpt.datasets.CustomDataset``.
        is_constrained: force each step's output into what is known of it whatever the input, a language that anyone
            could name. A sorted row is a permutation of the step's input. Any other output has its values in the range
            that ``Task.output_values`` gives, for the argument and for the rest.

    Raises:
        ValueError: if one of the tasks has no prefix.
    """
    known = ", ".join(prefixes) or "none"
    steps: list[Step] = []
    values = task.input_values(num_digits)
    for number, each in enumerate(task.tasks, start=1):
        if str(each) not in prefixes:
            raise ValueError(f"no prefix for {each}, a step of {task}; there is one for {known}")
        values = each.output_values(values, length)
        fields: dict[str, Any] = {"metric_fn": partial(_accuracy, CompositeTask(*task.tasks[:number]))}
        if is_constrained:
            fields["logits_processors"] = (_constraint(each, values, length, model.config.vocab_size),)
        before = steps[-1].name if steps else None
        steps.append(row_step(f"{number}-{each}", prefixes[str(each)], length, prefix_padding, before, **fields))
    return Plan(model, steps)


def _accuracy(task: Task, outputs: list[Any], examples: Sequence[Any]) -> dict[str, float]:
    return {"accuracy": Score.of(np.array(outputs), task(np.array(examples))).accuracy}


def _constraint(task: Task, values: Values, length: int, vocab_size: int) -> Constraint:
    """What the outputs of a task, with these values, are known to be in."""
    if isinstance(task, SortAscending | SortDescending):
        return MultisetConstraint()
    first, rest = (f"[{part.low}-{part.high}]" for part in values)
    return RegularConstraint(DFA.from_regex(f"{first} {rest}{{{length - 1}}}", vocab_size))
