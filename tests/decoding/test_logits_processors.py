"""Logits processors: each keeps the properties, is what transformers has by that name, and the loop threads its state.

Legend: B batch, T tokens of the prompt, V vocabulary.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from properties import Forbid, check_processor_laws
from reference import random_model

from mingpt.decoding.automata import DFA
from mingpt.decoding.constraints import RegularConstraint
from mingpt.decoding.generation import generate
from mingpt.decoding.logits_processors import Context, FunctionProcessor, LogitsProcessor
from mingpt.prefix import Prefix

B, T, V, N_NEW = 4, 8, 11, 5  # V is random_model's


class NextForced(LogitsProcessor):
    """The seed's example: it forces a token, and the token after it at the next step."""

    def __init__(self, first):
        self.first = first

    def init(self, context):
        return {"next": torch.full((len(context.tokens),), self.first)}

    def process(self, state, logits, context):
        forced = torch.full_like(logits, float("-inf"))
        forced.scatter_(1, state["next"][:, None], 0.0)
        return {"next": (state["next"] + 1) % context.vocab_size}, forced


PROCESSORS = {
    "function": FunctionProcessor(lambda tokens, logits: logits - tokens[:, -1:]),
    "constraint": Forbid([0, 4, 9]),
    "stateful": NextForced(4),
}


def random_prompts(n_rows=B, seed=1):
    return torch.randint(V, (n_rows, T), generator=torch.Generator().manual_seed(seed))


def apply(processor, logits, tokens, n_prompt=None, n_new=N_NEW):
    context = Context(tokens, tokens.shape[1] if n_prompt is None else n_prompt, n_new, logits.shape[1])
    return processor.process(processor.init(context), logits, context)[1]


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_laws(name, seed):
    check_processor_laws(PROCESSORS[name], vocab_size=V, seed=seed)


class Leaking(NextForced):
    """It keeps its state to itself, so two generations at a time share it."""

    def process(self, state, logits, context):
        self.first += 1
        return super().process(state | {"next": state["next"] * 0 + self.first % V}, logits, context)


class Growing(NextForced):
    def process(self, state, logits, context):
        return {"next": torch.cat([state["next"], state["next"]])}, logits


class OfTheBatch(LogitsProcessor):
    def process(self, state, logits, context):
        return state, logits - logits.mean(dim=0)


class Forgetful(NextForced):
    """Each row has its own count, which does not follow it."""

    def init(self, context):
        return {"next": context.tokens[:, 0]}

    def reorder(self, state, rows):
        return {"next": state["next"][: len(rows)]}


class Overwriting(LogitsProcessor):
    def process(self, state, logits, context):
        return state, logits.mul_(2)


@pytest.mark.parametrize(
    "lawless, message",
    [
        (Leaking(1), "used again|alone|other"),
        (Growing(1), "the state changed"),
        (OfTheBatch(), "alone"),
        (Forgetful(1), "reordered before step"),
        (Overwriting(), "written to"),
        (Forbid(range(V)), "no token left"),
    ],
)
def test_the_laws_find_what_breaks_them(lawless, message):
    with pytest.raises(AssertionError, match=message):
        check_processor_laws(lawless, vocab_size=V)


def test_the_example_of_the_manual_keeps_the_laws():
    page = (Path(__file__).parents[2] / "docs" / "how_to" / "constrain.md").read_text()
    code = re.search(r"^(class AtMostOnce.*?)\n\nprint", page, re.DOTALL | re.MULTILINE)
    assert code
    namespace = {"LogitsProcessor": LogitsProcessor, "torch": torch}
    exec(code[1], namespace)
    check_processor_laws(namespace["AtMostOnce"](), vocab_size=V)
    tokens = generate(random_model(), random_prompts(), V - 1, logits_processors=[namespace["AtMostOnce"]()])
    assert all(len(set(row)) == V - 1 for row in tokens[:, T:].tolist())


# ---------------------------------------------------------------------------------------------- as in transformers


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 3}, {"temperature": 1.6, "top_k": 4}])
def test_temperature_and_top_k_are_those_of_transformers(options):
    from transformers import generation as hf

    theirs = [hf.TemperatureLogitsWarper(options["temperature"])] if "temperature" in options else []
    theirs += [hf.TopKLogitsWarper(options["top_k"])] if "top_k" in options else []
    model, prompts = random_model(std=0.1), random_prompts(n_rows=200)
    tokens = generate(model, prompts, N_NEW, do_sample=True, seed=3, **options)
    assert torch.equal(tokens, generate(model, prompts, N_NEW, do_sample=True, seed=3, logits_processors=theirs))
    assert not torch.equal(tokens, generate(model, prompts, N_NEW, do_sample=True, seed=3))


def transformers_processors():
    """What this package does not have itself, for prompts of T tokens and N_NEW new ones."""
    from transformers import generation as hf

    return {
        "top_p": hf.TopPLogitsWarper(0.8),
        "min_p": hf.MinPLogitsWarper(0.1),
        "repetition": hf.RepetitionPenaltyLogitsProcessor(1.7),
        "suppressed": hf.SuppressTokensLogitsProcessor([0, 4, 9], device="cpu"),
        "minimum length": hf.MinNewTokensLengthLogitsProcessor(T, 3, 2, device="cpu"),
        "forced at the end": hf.ForcedEOSTokenLogitsProcessor(T + N_NEW, 7, device="cpu"),
    }


@pytest.mark.parametrize("name", ["top_p", "min_p", "repetition", "suppressed", "minimum length", "forced at the end"])
def test_a_processor_of_transformers_is_called_with_all_tokens_at_every_step(name):
    """Greedily and sampled, it does what it does to the logits of a full run."""
    model, prompts, processor = random_model(), random_prompts(), transformers_processors()[name]
    check_processor_laws(FunctionProcessor(processor), vocab_size=V, n_new=N_NEW)
    seen = []

    def watch(tokens, logits):
        seen.append((tokens.clone(), logits.clone()))
        return logits

    for options in ({}, {"do_sample": True, "seed": 3}):
        seen.clear()
        tokens = generate(model, prompts, N_NEW, logits_processors=[watch, processor, watch], **options)
        assert len(seen) == 2 * N_NEW
        for step in range(N_NEW):
            (before, raw), (after, processed) = seen[2 * step : 2 * step + 2]
            assert torch.equal(before, tokens[:, : T + step])
            assert torch.equal(after, before)
            assert torch.equal(processed, processor(before, raw.clone()))
            assert options or torch.equal(tokens[:, T + step], processed.argmax(dim=-1))
    if name == "suppressed":
        assert not torch.isin(tokens[:, T:], torch.tensor([0, 4, 9])).any()
    if name == "forced at the end":
        assert (tokens[:, -1] == 7).all()


def test_transformers_processors_and_functions_get_no_placeholders():
    """A penalty on what was said does not fall on token 0 because the prefix's placeholders are zeros."""
    from transformers.generation import RepetitionPenaltyLogitsProcessor

    n_prefix, model, seen = 4, random_model(), []
    content = torch.randint(1, V, (B, T - n_prefix), generator=torch.Generator().manual_seed(1))
    prompts = torch.cat([torch.zeros(B, n_prefix, dtype=torch.int64), content], dim=1)
    prefix = Prefix("key_value", torch.randn(1, 2, 2, n_prefix, 24, generator=torch.Generator().manual_seed(2)))

    def watch(tokens, logits):
        seen.append((tokens, logits.clone()))
        return logits

    processors = [watch, RepetitionPenaltyLogitsProcessor(50.0), watch]
    generate(model, prompts, N_NEW, prefixes=prefix, logits_processors=processors)
    for step in range(N_NEW):
        (tokens, raw), (_, processed) = seen[2 * step : 2 * step + 2]
        assert torch.equal(tokens[:, : T - n_prefix], content)
        assert tokens.shape == (B, T - n_prefix + step)
        unsaid = ~F.one_hot(tokens, V).any(dim=1)
        assert torch.equal(raw[unsaid], processed[unsaid])
        assert (raw != processed).any()
    assert unsaid[:, 0].any()  # there are rows in which nobody said 0


def test_no_step_is_skipped_for_a_processor_with_private_state():
    class Remembering:
        """As transformers' SequenceBias or watermarks: it keeps to itself what it saw."""

        def __init__(self):
            self.lengths = []

        def __call__(self, tokens, logits):
            self.lengths.append(tokens.shape[1])
            return logits

    remembering, constraint = Remembering(), RegularConstraint(DFA.from_regex("1 2 3 (4|5) 6", V))
    generate(random_model(), random_prompts(), N_NEW, logits_processors=[constraint, remembering])
    assert remembering.lengths == list(range(T, T + N_NEW))


def test_what_is_no_processor_is_refused():
    with pytest.raises(TypeError, match=r"neither a LogitsProcessor nor a function \(tokens, logits\) -> logits: 3"):
        generate(random_model(), random_prompts(), N_NEW, logits_processors=[3])


def test_contexts_are_compared_by_identity():
    """Their tensors have no single truth value."""
    tokens = random_prompts()
    one, other = Context(tokens, T, N_NEW, V), Context(tokens, T, N_NEW, V)
    assert one == one
    assert one != other


# ------------------------------------------------------------------------------------------------------- the loop


def test_the_loop_threads_each_processors_own_state():
    """The first processor's rows are forced; of the second, which has a state of the same name, nothing is seen."""
    model, prompts = random_model(), random_prompts()
    for processors in ([NextForced(4)], [NextForced(9), NextForced(4)], [NextForced(1), Forbid([2]), NextForced(4)]):
        tokens = generate(model, prompts, N_NEW, logits_processors=processors)
        assert tokens[:, T:].tolist() == [[4, 5, 6, 7, 8]] * B


def test_the_same_object_may_be_in_the_list_twice():
    model, prompts, seen = random_model(), random_prompts(), []

    class Watching(NextForced):
        def process(self, state, logits, context):
            seen.append(state["next"][0].item())
            return super().process(state, logits, context)

    processor = Watching(4)
    generate(model, prompts, 2, logits_processors=[processor, processor])
    assert seen == [4, 4, 5, 5]


def test_no_token_left_is_an_error_that_names_row_step_and_processors():
    model, prompts = random_model(), random_prompts()

    class Stuck(NextForced):
        def process(self, state, logits, context):
            logits = logits.clone()
            if context.step == 2:
                logits[1] = float("-inf")
            return {"next": state["next"] + 1}, logits

    with pytest.raises(ValueError, match=r"row 1 at step 2, after \[.*\].*processors: Stuck"):
        generate(model, prompts, N_NEW, logits_processors=[Stuck(4)])
