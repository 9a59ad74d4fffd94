"""What an adapter does to a model on a text: to its attention, its logits and its loss.

Legend: B rows, T tokens, P prefix positions, V vocabulary, L layers, H heads, D channels of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mingpt.analysis.figures import head_heatmap
from mingpt.huggingface.adapters import PeftAdapter
from mingpt.huggingface.causal_lm import CausalLM
from mingpt.huggingface.comparison import Comparison
from mingpt.huggingface.measure import Measurement, measure
from mingpt.prefix import evaluation_mode
from mingpt.storage.files import CheckpointError, parsing, read_json_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_LINES = 64
"""The most lines in a table that has one for each head; beyond, there is one for each layer."""


class LogitEffect(NamedTuple):
    """What an adapter does to a model's predictions on a text, as means over its tokens.

    The base model reads the text from its first position on, as one would use it. Where positions are learned, a prefix
    that does nothing has an effect too, since it moves the text by P positions.

    Attributes:
        loss: cross-entropy of the next token in nats, with the adapter.
        base_loss: without it.
        kl: divergence of the predictions with the adapter from those of the base model, KL(with || base), in nats.
        agreement: the share of tokens at which both have the same likeliest next token, 0 to 1.
    """

    loss: float
    base_loss: float
    kl: float
    agreement: float


class Analysis(NamedTuple):
    """What an adapter does to a model on a text; and, where asked for, what could take its place."""

    title: str
    logits: LogitEffect
    attention: Measurement
    comparison: Comparison | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values: numbers, and lists (L, H) by layer and head, (L, H, D) for the direction, (L,) for the error."""
        attention = {name: each.tolist() for name, each in self.attention.named().items()}
        found = {"title": self.title, "logits": self.logits._asdict(), "attention": attention}
        return found | ({"comparison": self.comparison.to_dict()} if self.comparison else {})

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Analysis:
        """What ``to_dict`` gave, in float64; anything else is a KeyError, a TypeError or a ValueError."""
        tensors = {name: torch.tensor(each, dtype=torch.float64) for name, each in found["attention"].items()}
        logits = LogitEffect(*(float(found["logits"][name]) for name in LogitEffect._fields))
        comparison = Comparison.from_dict(found["comparison"]) if "comparison" in found else None
        analysis = cls(str(found["title"]), logits, Measurement.from_named(tensors), comparison)
        shapes = {tuple(tensors[each["name"]].shape) for each in analysis.columns()}
        if len(shapes) != 1 or len(min(shapes)) != 2 or 0 in min(shapes):
            raise ValueError(f"what there is by layer and head has one shape (L, H), got {sorted(shapes)}")
        return analysis

    def columns(self) -> list[dict[str, Any]]:
        """What there is by layer and head: each one's name, what it means, and its values, a list (L, H)."""
        named = self.attention.named()
        return [
            {"name": name, "meaning": meaning, "values": named[name].tolist()}
            for name, _, _, _, meaning in _COLUMNS
            if name in named
        ]

    def checks(self) -> list[str]:
        """How exactly a prefix does what theory says, in words: a sentence each; none without a prefix."""
        bias = self.attention.bias
        if bias is None:
            return []
        error, largest = bias.error.max(), bias.magnitude.max()
        return [
            f"An attention output is (1 - share) * output without + bias, up to {error:.0e} of {largest:.3g}.",
            f"A bias is in the span of the prefix's values, up to {bias.out_of_span.max():.0e} of its length.",
        ]

    def table(self) -> str:
        """The numbers as text: a line for each head, or for each layer where there are many heads."""
        named, effect = self.attention.named(), self.logits
        columns = [(named[name], *rest) for name, *rest in _COLUMNS if name in named]
        lines = ["layer head  " + " ".join(f"{heading:>5}" for _, heading, *_ in columns)]
        n_layer, n_head = self.attention.movement.shape
        heads: list[Any] = [*range(n_head)] if n_layer * n_head <= MAX_LINES else [slice(None)]
        for layer, head in itertools.product(range(n_layer), heads):
            cells = [
                form.format(getattr(values[layer, head].double(), how)().item()).rjust(max(5, len(heading)))
                for values, heading, form, how, _ in columns
            ]
            name = head + 1 if isinstance(head, int) else "all"
            lines.append(f"{layer + 1:<5} {name:<4}  " + " ".join(cells))
        legend = [f"{heading:10} {meaning}" for _, heading, _, _, meaning in columns]
        legend += self.checks()
        logits = [
            f"loss on the text  {effect.loss:.4f} nats a token with the adapter, {effect.base_loss:.4f} without",
            f"predictions       {effect.kl:.4f} nats from the base model's (KL); the likeliest token is the same",
            f"                  at {effect.agreement:.1%} of tokens",
        ]
        comparison = ["", self.comparison.table()] if self.comparison else []
        return "\n".join([self.title, "", *logits, *comparison, "", *lines, "", *legend])

    def figures(self) -> dict[str, Figure]:
        """Heatmaps by layer and head, by the name of a file: attention and bias with a prefix, and movement."""
        found = self.attention
        moved = {"largest change of a weight": found.movement, "mean total variation distance": found.distance}
        figures = {"movement": head_heatmap(moved, "How far relative attention moves from the base model's")}
        if found.invariance and found.bias:
            figures |= {"attention": found.invariance.figure(), "bias": found.bias.figure()}
        return figures


_COLUMNS = [
    ("share", "share", "{:.3f}", "mean", "mean attention that a token pays to the prefix"),
    ("deviation", "deviation", "{:.0e}", "amax", "of relative attention on the same queries and keys; theory says 0"),
    ("movement", "moves", "{:.3f}", "amax", "largest change of relative attention; 0 in layer 1 with a prefix"),
    ("distance", "distance", "{:.3f}", "mean", "mean total variation distance of relative attention"),
    ("rank", "rank", "{:.3g}", "mean", "dimensions that the prefix's values span"),
    ("effective_rank", "effective", "{:.3g}", "mean", "dimensions that hold 99% of the biases' squared length"),
    ("direction_share", "direction", "{:.2f}", "mean", "share of the biases' squared length along one direction"),
    ("attention_perplexity", "positions", "{:.1f}", "mean", "how many prefix positions attention is spread over"),
]
"""Of a table: the tensor's name, the heading, the format, how heads are put together, and what it means."""


def analyze(lm: CausalLM, adapter: PeftAdapter, x: Tensor, batch_size: int = 4) -> Analysis:
    """Measure what an adapter does to a model on rows of a text.

    Args:
        lm: the model that the adapter was read for.
        adapter: of ``load_peft``.
        x: (B, T) of int64, the rows, without placeholders; T at least 2.
        batch_size: rows at a time.

    Raises:
        ValueError: if the rows do not fit, or the model's attention cannot be measured.
    """
    prefix, (n_rows, n_tokens) = adapter.prefix, x.shape
    if n_tokens < 2:
        raise ValueError(f"a row needs at least 2 tokens to predict one, got {n_tokens}")
    n_positions = 0 if prefix is None else prefix.n_placeholders
    padded = F.pad(x, (n_positions, 0))
    size = f" of {n_positions} positions" if prefix else ""
    title = (
        f"{adapter.method}{size} on {lm.config.architecture}, {n_rows} row{'s' * (n_rows != 1)} of {n_tokens} tokens"
    )
    logits = _logit_effect(lm, adapter, x, padded, batch_size)
    return Analysis(title, logits, measure(lm, padded, prefix, adapter.disabled, batch_size))


@torch.no_grad()
def _logit_effect(lm: CausalLM, adapter: PeftAdapter, x: Tensor, padded: Tensor, batch_size: int) -> LogitEffect:
    sums: list[Tensor] = []
    n_tokens = x.shape[1]
    with evaluation_mode(lm):  # pyright: ignore[reportArgumentType]
        for own, rows in zip(x.split(batch_size), padded.split(batch_size), strict=True):
            logits = lm(rows, prefixes=adapter.prefix, n_last=n_tokens)[0]
            with adapter.disabled():
                base = lm(own)[0]
            log_p, log_base = (each.float().log_softmax(dim=-1) for each in (logits, base))  # (B, T, V)
            losses = [F.nll_loss(each[:, :-1].flatten(0, 1), own[:, 1:].flatten()) for each in (log_p, log_base)]
            kl = F.kl_div(log_base, log_p, log_target=True, reduction="sum") / own.numel()
            same = (log_p.argmax(dim=-1) == log_base.argmax(dim=-1)).float().mean()
            sums.append(torch.stack([*losses, kl, same]) * len(own))
    return LogitEffect(*(torch.stack(sums).sum(dim=0) / len(x)).tolist())


def read_rows(file: str | Path, folder: str | Path, n_rows: int, length: int) -> Tensor:
    """Read a text as rows of tokens, by the tokenizer of a model's folder, or token ids where that has none.

    Args:
        file: a text of UTF-8, which is cut into rows; without a tokenizer, a list of token ids as JSON in each line,
            the same number in all, such as ``[6, 2, 7]``.
        folder: of the model.
        n_rows: the most rows, the first of the file.
        length: tokens in a row; fewer where the text has fewer. A row of token ids is cut to it.

    Returns:
        (B, T) of int64.

    Raises:
        CheckpointError: if the tokenizer cannot be read.
        ValueError: if the file is no text, or its lines are not such lists.
    """
    if any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        from transformers import AutoTokenizer

        with parsing(folder, "a tokenizer of transformers"):
            tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        try:
            text = Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text: {error}") from None
        tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
        length = min(length, len(tokens))
        if length < 2:
            raise ValueError(f"{file} has {len(tokens)} tokens, at least 2 are needed")
        return tokens[: len(tokens) // length * length].view(-1, length)[:n_rows]
    need = "without a tokenizer in the model's folder, each line is a list of token ids, at least 2, as many in all"
    try:
        rows = read_json_lines(file)[:n_rows]
    except CheckpointError:
        raise ValueError(f"{file} has lines that are no JSON; {need}") from None
    for number, row in enumerate(rows, start=1):
        is_row = isinstance(row, list) and all(type(each) is int and 0 <= each < 2**31 for each in row)
        if not is_row or len(row) < 2 or len(row) != len(rows[0]):
            raise ValueError(f"{file}, row {number}: {need}, such as [6, 2, 7]")
    if not rows:
        raise ValueError(f"{file} has no rows; {need}")
    return torch.tensor(rows, dtype=torch.int64)[:, :length]
