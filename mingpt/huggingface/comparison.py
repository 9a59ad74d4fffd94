"""Whether an adapter elicits or teaches: what demonstrations, and a LoRA trained here, reach of its gain.

Where a model learns in context, demonstrations can replace an adapter that only elicits what the model knows. They
cannot replace one that teaches; training on the same kind of rows shows whether they are learned with as many numbers.

Legend: B rows, T tokens, N examples, S tokens of an example.
"""

from __future__ import annotations

import contextlib
import math
import textwrap
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from mingpt.datasets import IGNORED
from mingpt.huggingface.adapters import PeftAdapter
from mingpt.huggingface.causal_lm import CausalLM
from mingpt.prefix import Prefix, evaluation_mode
from mingpt.trainer import DivergedError, Trainer

LEAST_GAIN = 0.01
"""Nats a token; of a smaller gain of the adapter, no share is given."""

MAX_EXAMPLES = 1024
"""The most examples that ``mingpt analyze`` reads."""

RATES = (1e-4, 1e-3, 1e-2)
"""The LoRA's learning rates; where the best is the least or the largest, one beyond it is tried too."""


class Candidate(NamedTuple):
    """One of those that are compared.

    Attributes:
        name: in words.
        loss: cross-entropy in nats, a mean over the scored tokens.
        n_parameters: numbers that were trained.
        n_positions: positions in the cache before a row.
    """

    name: str
    loss: float
    n_parameters: int
    n_positions: int


class Comparison(NamedTuple):
    """The losses of a base model, of an adapter, and of what could take its place, on the same tokens.

    Attributes:
        candidates: the base model, the adapter, then demonstrations and a LoRA, those of the two that were asked for.
        n_scored: the last tokens of each row, whose loss counts.
        n_examples: rows that demonstrations and LoRA were taken from.
        lora_iters: iterations of the LoRA's training.
        validation_losses: by the LoRA's rate; the least is that of the LoRA which is scored, None of one that diverged.
    """

    candidates: list[Candidate]
    n_scored: int
    n_examples: int
    lora_iters: int
    validation_losses: dict[str, float | None]

    def shares(self) -> list[float | None]:
        """Each candidate's share of the adapter's gain: (base loss - its loss) / (base loss - the adapter's).

        None for all where the adapter's gain is below ``LEAST_GAIN``.
        """
        base, gain = self.candidates[0].loss, self.candidates[0].loss - self.candidates[1].loss
        return [(base - each.loss) / gain if gain >= LEAST_GAIN else None for each in self.candidates]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        own = {"candidates": [each._asdict() for each in self.candidates]}
        return self._asdict() | own | {"shares": self.shares(), "sentences": self.sentences()}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Comparison:
        """What ``to_dict`` gave; anything else is a KeyError, a TypeError or a ValueError."""
        types = {"name": str, "loss": float, "n_parameters": int, "n_positions": int}
        candidates = [Candidate(**{k: read(each[k]) for k, read in types.items()}) for each in found["candidates"]]
        if len(candidates) < 2:
            raise ValueError("candidates are at least the base model and the adapter")
        n_scored, n_examples, lora_iters = (int(found[name]) for name in ("n_scored", "n_examples", "lora_iters"))
        return cls(candidates, n_scored, n_examples, lora_iters, dict(found["validation_losses"]))

    def cells(self) -> list[list[str]]:
        """A table as text, its first line the names of the columns."""
        shares = ["none" if share is None else f"{share:.0%}" for share in self.shares()]
        lines = [
            [each.name, f"{each.loss:.4f}", share, f"{each.n_parameters:,}", f"{each.n_positions:,}"]
            for each, share in zip(self.candidates, shares, strict=True)
        ]
        return [["loss of", "nats", "share", "parameters", "positions"], *lines]

    def sentences(self) -> list[str]:
        """What follows from the numbers, and for what it holds."""
        base, adapter, *others = self.candidates
        gain = f"The adapter's gain over the base model is {base.loss - adapter.loss:.4f} nats a token"
        parts = [
            f"{f'{share:.0%}' if share > 0 else 'nothing'} is reached by {each.name}"
            for each, share in zip(others, self.shares()[2:], strict=True)
            if share is not None
        ]
        found = [
            f"{gain}; {'of it, ' + ', and '.join(parts) if parts else f'of less than {LEAST_GAIN}, no share is given'}."
        ]
        if self.validation_losses:
            tried = ", ".join(
                f"{rate} ({'diverged' if loss is None else f'{loss:.4f}'})"
                for rate, loss in self.validation_losses.items()
            )
            found.append(
                f"The LoRA had {self.lora_iters} iterations, and of these rates the best by the loss on "
                f"{_n_validation(self.n_examples)} of {self.n_examples} examples, kept from its training: {tried}."
            )
        return [*found, "Other or more demonstrations, examples and iterations may reach another share."]

    def table(self) -> str:
        """``cells`` in columns, and ``sentences``."""
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join([name.ljust(widths[0]), *map(str.rjust, others, widths[1:])]) for name, *others in cells]
        text = [textwrap.fill(each, 96) for each in self.sentences()]
        return "\n".join([f"on the last {self.n_scored} tokens of each row:", *lines, *text])


def compare(
    lm: CausalLM,
    adapter: PeftAdapter,
    x: Tensor,
    examples: Tensor,
    n_scored: int | None = None,
    n_demonstrations: int | None = None,
    lora_iters: int = 200,
) -> Comparison:
    """Compare an adapter with demonstrations in the context, and with a LoRA of about as many parameters.

    All are scored on the same tokens. The demonstrations are the first examples, the same before each row. They move
    the row to later positions; where positions are learned, that is a part of what they do. The LoRA is in all linear
    layers. It is trained on four fifths of the examples, and its learning rate is chosen on the others. It is seeded,
    so the result is a function of the arguments. The model stays as it is.

    Args:
        lm: the model that the adapter was read for.
        adapter: of ``load_peft``.
        x: (B, T) of int64, the rows to score, without placeholders.
        examples: (N, S) of int64, none of them a row of ``x``.
        n_scored: of a row, the last tokens that are scored, and of an example, those that the LoRA is trained on; all
            but the first by default.
        n_demonstrations: by default as many as fit into ``block_size``, at most 8; 0 for none.
        lora_iters: 0 for no LoRA.

    Raises:
        DivergedError: if the LoRA diverges at each rate.
        ValueError: if there is nothing to compare, there are too few examples, a row is among them, a row does not fit
            after its demonstrations, or PEFT cannot take the adapter off the model.
    """
    (n_rows, n_tokens), (n_examples, n_own) = x.shape, examples.shape
    n_scored = n_tokens - 1 if n_scored is None else n_scored
    if not 1 <= n_scored < n_tokens:
        raise ValueError(f"of a row of {n_tokens} tokens the last 1 to {n_tokens - 1} can be scored, got {n_scored}")
    shorter = min(n_tokens, n_own)
    known = {tuple(row) for row in examples[:, :shorter].tolist()}
    if n_known := sum(tuple(row) in known for row in x[:, :shorter].tolist()):
        raise ValueError(f"{n_known} of {n_rows} rows are among the examples; give examples that are not scored")
    n_fit = (lm.block_size - n_tokens) // n_own
    if (1 if n_demonstrations is None else n_demonstrations) > n_fit:
        raise ValueError(
            f"demonstrations of {n_own} tokens: {n_fit} of them fit into block_size = {lm.block_size} before a row of "
            f"{n_tokens}, {n_demonstrations or 'at least 1'} are needed; give shorter rows, or 0 for no demonstrations"
        )
    n_demonstrations = min(8, n_fit, n_examples) if n_demonstrations is None else n_demonstrations
    if not n_demonstrations and not lora_iters:
        raise ValueError("without demonstrations and without a LoRA there is nothing to compare")
    if n_examples < (least := max(n_demonstrations, 2 if lora_iters else 1)):
        raise ValueError(f"there are {n_examples} examples, at least {least} are needed")

    base, prefix = adapter.base_model(lm), adapter.prefix
    shared = {id(each) for each in base.parameters()}
    n_positions = prefix.n_positions if prefix else 0
    n_parameters = prefix.values.numel() if prefix else sum(p.numel() for p in lm.parameters() if id(p) not in shared)
    candidates = [
        Candidate("the base model", _loss(base, x, n_scored), 0, 0),
        Candidate("the adapter", _loss(lm, x, n_scored, prefix=prefix), n_parameters, n_positions),
    ]
    if n_demonstrations:
        context = examples[:n_demonstrations].flatten()
        name = f"{n_demonstrations} demonstration{'s' * (n_demonstrations != 1)}"
        candidates.append(Candidate(name, _loss(base, x, n_scored, context), 0, len(context)))
    losses: dict[str, float | None] = {}
    if lora_iters:
        required = [each for each in lm.parameters() if each.requires_grad]
        try:
            with torch.random.fork_rng():
                n_of_rank_1 = _add_lora(base, 1)
                rank = max(1, round(n_parameters / n_of_rank_1))
                lora, losses = _train_lora(lm, adapter, examples, n_scored, rank, lora_iters)
        finally:
            for each in required:  # PEFT has frozen the weights, which the copies share
                each.requires_grad_(True)
        candidates.append(Candidate(f"a LoRA of rank {rank}", _loss(lora, x, n_scored), rank * n_of_rank_1, 0))
    return Comparison(candidates, n_scored, n_examples, lora_iters, losses)


@torch.no_grad()
def _loss(
    lm: CausalLM, rows: Tensor, n_scored: int, context: Tensor | None = None, prefix: Prefix | None = None
) -> float:
    """The mean cross-entropy in nats of the last tokens of rows (B, T), after a context (P,) or after a prefix."""
    total = 0.0
    before = rows.new_zeros(prefix.n_placeholders if prefix else 0) if context is None else context
    with evaluation_mode(lm):
        for own in rows.split(4):
            tokens = torch.cat([before.expand(len(own), -1), own], dim=1)
            loss = lm(tokens[:, :-1], tokens[:, 1:], prefixes=prefix, n_last=n_scored)[1]
            total += loss.item() * len(own)
    return total / len(rows)


def _add_lora(lm: CausalLM, rank: int) -> int:
    """Put an untrained LoRA into all linear layers of a model; returns how many parameters it has."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT's calls to transformers, and of GPT-2's layers
        return peft.get_peft_model(lm.model, config).get_nb_trainable_parameters()[0]


class _LoraTrainer(Trainer):
    """Trains what requires a gradient."""

    def trained_tensors(self) -> dict[str, Tensor]:
        return {name: each for name, each in self.model.named_parameters() if each.requires_grad}

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.trainable_parameters(), lr=self.config.learning_rate, weight_decay=0.0)


def _train_lora(
    lm: CausalLM, adapter: PeftAdapter, examples: Tensor, n_scored: int, rank: int, n_iters: int
) -> tuple[CausalLM, dict[str, float | None]]:
    """A copy of the base model with a LoRA, trained at the rate that is best on validation rows; all rates' losses."""
    n_validation = _n_validation(len(examples))
    rows, validation = examples[:-n_validation], examples[-n_validation:]
    targets = rows[:, 1:].clone()
    targets[:, :-n_scored] = IGNORED
    data: Any = TensorDataset(rows[:, :-1], targets)
    config = Trainer.get_default_config()
    config.device, config.precision, config.lr_schedule = str(lm.device), "float32", "linear"
    config.max_iters, config.batch_size = n_iters, 16
    rates, losses, trained = list(RATES), dict[float, float](), dict[float, CausalLM]()
    for rate in rates:
        config.learning_rate, losses[rate], trained[rate] = rate, math.inf, adapter.base_model(lm)
        torch.manual_seed(0)
        with contextlib.suppress(DivergedError):
            _add_lora(trained[rate], rank)
            _LoraTrainer(config, trained[rate], data).run()
            if math.isfinite(loss := _loss(trained[rate], validation, n_scored)):
                losses[rate] = loss
        best = min(losses, key=losses.__getitem__)
        if len(losses) == len(rates) and 1e-6 < best < 1 and best in (min(rates), max(rates)):
            rates.append(best / 10 if best == min(rates) else best * 10)
    names = {f"{rate:g}": loss if loss < math.inf else None for rate, loss in sorted(losses.items())}
    if losses[best] == math.inf:
        raise DivergedError(f"the LoRA diverged at each of the rates {', '.join(names)}; 0 iterations leave it out")
    return trained[best], names


def _n_validation(n_examples: int) -> int:
    return max(1, n_examples // 5)
