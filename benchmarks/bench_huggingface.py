"""Prefix training of transformers' models: a step through ``CausalLM`` against PEFT's, and what memory training takes.

The steps are on a GPT-2 of about 10M random parameters, in turn in one process: forward, backward and AdamW of one
prefix. Memory is the peak resident set (ru_maxrss) of a child process that trains a GPT-2 of about 100M parameters for
two steps, less what the process had with the model alone.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mingpt.huggingface import CausalLM
from mingpt.prefix import Prefix
from mingpt.utils import set_seed

SMALL = {"n_layer": 7, "n_embd": 320, "n_head": 8, "vocab_size": 5000}
LARGE = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 16000}
WAYS = {
    "full": "all weights",
    "prefix": "a prefix",
    "checkpointed": "a prefix, gradient checkpointing",
    "peft": "a prefix through PEFT",
}


def new_model(sizes: dict[str, int]) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    set_seed(0)
    dropouts = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, **tokens, n_positions=1024)).train()


def step_of(way: str, model: Any, x: Tensor, n_positions: int) -> Callable[[], float]:
    """A function that trains for one step, and returns the loss before it."""
    if way == "full":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return lambda: descend(optimizer, model(x, labels=x, use_cache=False).loss)
    if way == "peft":
        import peft

        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n_positions)
        adapted = peft.get_peft_model(model, config)
        torch.nn.init.zeros_(adapted.prompt_encoder["default"].embedding.weight)
        optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-3)
        return lambda: descend(optimizer, adapted(x, labels=x).loss)
    lm = CausalLM(model.requires_grad_(False))
    if way == "checkpointed":
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    values = torch.zeros(1, lm.config.n_layer, 2, n_positions, lm.config.n_embd, requires_grad=True)
    optimizer = torch.optim.AdamW([values], lr=1e-3)
    idx = F.pad(x, (n_positions, 0))
    targets = F.pad(x[:, 1:], (n_positions, 1), value=-1)
    prefix, n_tokens = Prefix("key_value", values), x.shape[1]  # logits of the content only, as PEFT gives
    return lambda: descend(optimizer, lm(idx, targets, prefix, n_last=n_tokens)[1])


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def peak() -> float:
    """The process's largest resident set until now, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--positions", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--way", choices=WAYS, help="only train the large model so, and print the memory")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    x = torch.randint(5000, (options.rows, options.tokens), generator=torch.Generator().manual_seed(0))
    if options.way:
        model = new_model(LARGE)
        before = peak()
        step = step_of(options.way, model, x, options.positions)
        step()
        step()
        print(f"{peak() - before:.0f} {before:.0f}")
        return

    sizes = f"{options.rows} rows of {options.tokens} tokens, {options.positions} prefix positions"
    n_parameters = sum(each.numel() for each in new_model(SMALL).parameters()) / 1e6
    print(f"{sizes}, {torch.get_num_threads()} threads, float32")
    print(f"\na prefix step on a GPT-2 of {n_parameters:.1f}M parameters, median of {options.rounds} rounds in turn")
    steps = {way: step_of(way, new_model(SMALL), x, options.positions) for way in ("prefix", "peft")}
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    losses: dict[str, float] = {}
    for number in range(options.rounds + 1):
        for way in sorted(steps, reverse=number % 2 == 0):
            start = time.perf_counter()
            losses[way] = steps[way]()
            if number:  # the first round warms up
                seconds[way].append(time.perf_counter() - start)
    for way, each in seconds.items():
        print(f"  {WAYS[way]:34} {1000 * statistics.median(each):7.1f} ms, loss at the end {losses[way]:.6f}")
    ratios = [peft / ours for ours, peft in zip(seconds["prefix"], seconds["peft"], strict=True)]
    low, high = statistics.quantiles(ratios, n=4)[::2]
    print(f"  PEFT takes {statistics.median(ratios):.3f} times as long (quartiles of rounds {low:.3f} to {high:.3f})")

    n_parameters = sum(each.numel() for each in new_model(LARGE).parameters()) / 1e6
    print(f"\npeak memory above the model's own, training a GPT-2 of {n_parameters:.0f}M parameters for two steps")
    for way, name in WAYS.items():
        own = [f"--{key}={getattr(options, key)}" for key in ("rows", "tokens", "positions")]
        command = [sys.executable, __file__, f"--way={way}", *own]
        added, before = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        print(f"  {name:34} {added:>6} MB; {before} MB with the model alone")


if __name__ == "__main__":
    main()
