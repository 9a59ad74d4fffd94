"""How time and memory grow: one axis at a time, for a step of the whole model and a step of its prefixes.

    python benchmarks/bench_scale.py [--rounds 5] [--out docs/scale.png] [--json FILE]

Time is of a forward and a backward pass, the median of the rounds, all sizes in turn. Memory is what the forward pass
keeps for the backward pass, counted in bytes of distinct storages and therefore exact, with what training holds beside
it: gradients, and AdamW's two moments of each trainable parameter. The dashed line is the arithmetic: the
multiplications of a step, through the base point of the axis.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from mingpt.datasets import CustomDataset
from mingpt.model import GPT
from mingpt.prefix import Prefix
from mingpt.tasks import SortAscending
from mingpt.training.precision import autocast, resolve_precision
from mingpt.utils import set_seed

BASE = {"P": 10, "K": 16, "L": 10, "depth": 4, "width": 256, "batch": 128}
AXES = {
    "P": ("prefix positions", (1, 10, 50, 100, 200)),
    "K": ("prefixes, of the same rows", (1, 4, 16, 64)),
    "L": ("row length", (5, 10, 20, 40, 80)),
    "depth": ("layers", (1, 2, 4, 8)),
    "width": ("channels", (64, 128, 256, 512)),
    "batch": ("rows", (32, 64, 128, 256)),
}


class Case:
    """A model, its prefixes and a batch of one size, and the step that is measured."""

    def __init__(self, kind: str, sizes: dict[str, int]):
        self.kind, self.sizes = kind, sizes
        self.data = CustomDataset("train", [SortAscending()], sizes["L"], prefix_padding=sizes["P"])
        config = GPT.get_default_config()
        config.model_type = None
        config.merge_from_dict({"n_layer": sizes["depth"], "n_head": 4, "n_embd": sizes["width"]})
        config.merge_from_dict(dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0))
        config.vocab_size, config.block_size = self.data.get_vocab_size(), self.data.get_block_size()
        set_seed(0)
        self.model = GPT(config).requires_grad_(kind == "model")
        self.values = torch.randn(sizes["K"], sizes["depth"], sizes["P"], sizes["width"], requires_grad=True)
        self.x, self.y = self.data.batch(range(sizes["batch"]))

    def forward(self) -> Tensor:
        """The loss."""
        prefix = Prefix("activation", self.values) if self.kind == "prefix" else None
        with autocast("auto", "cpu"):
            _, loss = self.model(
                self.x, self.y, prefix, n_shared=0 if prefix else self.sizes["P"], n_last=self.data.length
            )
        assert loss is not None
        return loss

    def step(self) -> None:
        """A forward and a backward pass."""
        for tensor in (self.values, *self.model.parameters()):
            tensor.grad = None
        self.forward().backward()

    def seconds(self) -> float:
        """Time it once."""
        return Timer("f()", globals={"f": self.step}, num_threads=torch.get_num_threads()).timeit(1).median

    def n_bytes(self) -> int:
        """What a step holds at its largest, the weights apart."""
        weights = {p.untyped_storage().data_ptr() for p in (*self.model.parameters(), self.x, self.y)}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.forward()
        trained = self.values.numel() if self.kind == "prefix" else sum(p.numel() for p in self.model.parameters())
        del loss
        return sum(kept.values()) + 3 * 4 * trained

    def n_products(self) -> float:
        """Multiplications of a forward pass: the matrices' and attention's."""
        s, n_tokens = self.sizes, 2 * self.sizes["L"] - 1
        matrices = 12 * s["width"] ** 2 * s["batch"] * n_tokens
        attention = 2 * s["width"] * s["batch"] * n_tokens * (n_tokens + s["P"])
        cache = 2 * s["width"] ** 2 * s["P"] * s["K"] if self.kind == "prefix" else 12 * s["width"] ** 2 * s["P"]
        return s["depth"] * float(matrices + attention + cache)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/scale.png"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {resolve_precision('auto', 'cpu')}")
    found: dict[str, Any] = {}
    for axis, (title, sizes) in AXES.items():
        cases = {(kind, size): Case(kind, BASE | {axis: size}) for kind in ("model", "prefix") for size in sizes}
        times: dict[tuple[str, int], list[float]] = {key: [] for key in cases}
        for _ in range(options.rounds + 1):
            for key, case in cases.items():
                times[key].append(case.seconds())
        found[axis] = {
            f"{kind} {size}": {
                "seconds": statistics.median(times[kind, size][1:]),
                "bytes": case.n_bytes(),
                "products": case.n_products(),
            }
            for (kind, size), case in cases.items()
        }
        for name, row in found[axis].items():
            print(f"{title:28}{name:>12}{row['seconds'] * 1e3:9.1f} ms{row['bytes'] / 1e6:9.1f} MB", flush=True)
    draw(found).savefig(options.out, dpi=110)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def draw(found: dict[str, Any]) -> Any:
    """Time above, memory below, an axis a column."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.9 * len(AXES), 6), layout="constrained")
    panels = figure.subplots(2, len(AXES), sharey="row")
    colors = {"model": "#c44e52", "prefix": "#4c72b0"}
    for column, (axis, (title, sizes)) in enumerate(AXES.items()):
        for kind, color in colors.items():
            rows = [found[axis][f"{kind} {size}"] for size in sizes]
            base = rows[sizes.index(BASE[axis])]
            expected = [base["seconds"] * 1e3 * row["products"] / base["products"] for row in rows]
            panels[0, column].plot(sizes, [row["seconds"] * 1e3 for row in rows], "o-", color=color, label=kind)
            panels[0, column].plot(sizes, expected, "--", color=color, alpha=0.6, linewidth=1)
            panels[1, column].plot(sizes, [row["bytes"] / 1e6 for row in rows], "o-", color=color, label=kind)
        for panel in panels[:, column]:
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel.set_xlabel(title)
    panels[0, 0].set_ylabel("ms a step (dashed: arithmetic)")
    panels[1, 0].set_ylabel("MB held in a step, weights apart")
    panels[0, 0].legend(title="trained")
    return figure


if __name__ == "__main__":
    main()
