"""What a constraint costs: a step by itself, as a part of a decode, and at a large vocabulary beside others.

    python benchmarks/bench_constraints.py [--rounds 7]

All figures are medians of the rounds, taken in turn in one process. "A step" is what a processor does for one token of
every row: advance each row's state, find what may follow, and mask the logits.

The baselines, at GPT-2's vocabulary size with random spellings (nothing is downloaded), on the same regular expression:
    llguidance     its matchers, filled in parallel, and its mask unpacked and applied to the logits
    transformers   PrefixConstrainedLogitsProcessor, whose function looks the row's state up in the same automaton
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import random
import statistics
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

from mingpt.decoding.automata import DFA, PDA
from mingpt.decoding.constraints import MultisetConstraint, PushdownConstraint, RegularConstraint
from mingpt.decoding.generation import generate
from mingpt.decoding.logits_processors import Context, LogitsProcessor
from mingpt.experiments import pipeline, presets

EXPRESSION = "[1-10]* (2|3)+ [4-12]*"
"""Over the laptop preset's tokens; it forces nothing, so that no step of the model is skipped."""


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="times that each work is measured in turn")
    rounds = parser.parse_args().rounds
    logging.disable(logging.INFO)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of {rounds} rounds\n")
    regular = RegularConstraint(DFA.from_regex(EXPRESSION, 13))
    brackets = PushdownConstraint(PDA.balanced([(1, 2), (3, 4)], 13))
    print("a step by itself, 13 tokens, 10 to generate")
    for name, constraint in (("finite", regular), ("pushdown", brackets), ("permutation", MultisetConstraint())):
        times = [each(rounds, step_of(constraint, n_rows, 13)) for n_rows in (1, 100, 1600)]
        print(
            f"  {name:14}"
            + "".join(f"{1e6 * t:10.1f} us at {n} rows" for t, n in zip(times, (1, 100, 1600), strict=True))
        )
    in_a_decode(rounds, regular)
    at_a_large_vocabulary(rounds)


def each(rounds: int, call: Callable[[], object], number: int = 200) -> float:
    """Seconds of one call: the median of the rounds."""
    call()
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return statistics.median(timer.timeit(number).median for _ in range(rounds))


def step_of(processor: LogitsProcessor, n_rows: int, vocab_size: int, n_new: int = 10) -> Callable[[], object]:
    """The processor's step after its first token."""
    prompts = torch.randint(1, min(vocab_size, 11), (n_rows, n_new))
    first = Context(prompts, n_new, n_new, vocab_size)
    logits = torch.randn(n_rows, vocab_size)
    state, processed = processor.process(processor.init(first), logits, first)
    context = Context(torch.cat([prompts, processed.argmax(dim=-1, keepdim=True)], dim=1), n_new, n_new, vocab_size)
    return lambda: processor.process(state, logits, context)


def in_a_decode(rounds: int, constraint: RegularConstraint) -> None:
    """How much longer the laptop preset takes to generate ten tokens for 100 rows."""
    model = pipeline.build_model(presets.get_default_config("laptop")).eval()
    prompts = torch.randint(1, 11, (100, 20))
    works = {"free": [], "constrained": [constraint]}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(3 * rounds):
        for name, processors in works.items():
            timer = Timer(
                "call()", globals={"call": lambda p=processors: generate(model, prompts, 10, logits_processors=p)}
            )
            times[name].append(timer.timeit(1).median)
    free, constrained = (statistics.median(values) for values in times.values())
    own = each(rounds, step_of(constraint, 100, 13))
    print("\na decode of 100 rows and 10 tokens by the laptop preset")
    print(
        f"  {1e3 * free / 10:.2f} ms a token, constrained {1e3 * constrained / 10:.2f}: {constrained / free - 1:+.1%}"
    )
    print(f"  the constraint's step by itself: {1e6 * own:.0f} us, {10 * own / free:.2%} of a token")


def spelled_by(dfa: DFA, spellings: list[str], names: list[str]) -> DFA:
    """Read longer tokens through an automaton: token v is the sequence of its tokens, by name, that v spells."""
    refused, number = len(dfa.next), {name: token for token, name in enumerate(names)}
    table = torch.cat([dfa.next, torch.full((1, dfa.vocab_size), refused)])
    columns = []
    for spelling in spellings:
        states = torch.arange(refused + 1)
        for character in spelling:
            states = table[states, number[character]] if character in number else torch.full_like(states, refused)
        columns.append(states)
    return DFA(torch.stack(columns, dim=1), torch.cat([dfa.is_accepting, torch.tensor([False])]))


def at_a_large_vocabulary(rounds: int, vocab_size: int = 50_257, n_rows: int = 32) -> None:
    """The same language over spellings of GPT-2's number, beside llguidance and transformers."""
    letters = "abcdefghij"
    chance = random.Random(0)
    spellings = ["".join(chance.choices(letters, k=1 + place % 6)) for place in range(vocab_size - 1)]
    names = [*letters, "end"]
    by_letter = DFA.from_regex("[a-e]* (f|g)+ [a-j]*", len(names), names)
    dfa = spelled_by(by_letter, [*spellings, "?"], names)
    constraint = RegularConstraint(dfa)
    print(f"\na step at {vocab_size:,} tokens, {n_rows} rows")
    step = step_of(constraint, n_rows, vocab_size)
    print(f"  {'this package':14}{1e3 * each(rounds, step, 10):8.2f} ms")
    logits = torch.randn(n_rows, vocab_size)
    print(f"  {'the mask alone':14}{1e3 * each(rounds, lambda: logits.masked_fill(logits > 9, 0.0), 10):8.2f} ms")
    if importlib.util.find_spec("llguidance"):
        from mingpt.decoding.grammar import GrammarConstraint, tokenizer_of

        grammar = GrammarConstraint("regex", "[a-e]*[fg]+[a-j]*", tokenizer_of([*spellings, "end"], vocab_size - 1))
        print(f"  {'llguidance':14}{1e3 * each(rounds, step_of(grammar, n_rows, vocab_size), 10):8.2f} ms")
    if importlib.util.find_spec("transformers"):
        from transformers import PrefixConstrainedLogitsProcessor

        away = dfa.completable(64).any(dim=0)
        allowed = [away[row].nonzero().flatten().tolist() for row in dfa.next]
        tokens = torch.full((n_rows, 2), allowed[0][0])

        def may_follow(_: int, sequence: torch.Tensor) -> list[int]:
            state = 0
            for token in sequence[1:].tolist():
                state = int(dfa.next[state, token])
            return allowed[state]

        theirs = PrefixConstrainedLogitsProcessor(may_follow, num_beams=1)
        print(f"  {'transformers':14}{1e3 * each(rounds, lambda: theirs(tokens, logits), 10):8.2f} ms")


if __name__ == "__main__":
    main()
