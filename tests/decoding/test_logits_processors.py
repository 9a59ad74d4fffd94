"""Logits processors: each keeps the laws, is what transformers has by that name, and the loop threads its state.

Legend: B batch, T tokens of the prompt, V vocabulary.
"""

import re
from pathlib import Path

import pytest
import torch
from properties import check_processor_laws
from reference import random_model

from mingpt.decoding.generation import generate
from mingpt.decoding.logits_processors import (
    Context,
    ForcedTokens,
    FromTransformers,
    LogitsProcessor,
    MinimumLength,
    MinP,
    RepetitionPenalty,
    Stateless,
    SuppressedTokens,
    Temperature,
    TopK,
    TopP,
    as_processors,
)

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
    "temperature": Temperature(0.7),
    "top_k": TopK(3),
    "top_p": TopP(0.8),
    "min_p": MinP(0.1),
    "repetition": RepetitionPenalty(1.7),
    "forced": ForcedTokens({0: 3, 2: 5, -1: 7}),
    "suppressed": SuppressedTokens([0, 4, 9]),
    "minimum length": MinimumLength(3, 2),
    "function": Stateless(lambda tokens, logits: logits - tokens[:, -1:]),
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
        (SuppressedTokens(range(V)), "no token left"),
    ],
)
def test_the_laws_find_what_breaks_them(lawless, message):
    with pytest.raises(AssertionError, match=message):
        check_processor_laws(lawless, vocab_size=V)


def test_the_example_of_the_contributing_page_keeps_the_laws():
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    code = re.search(r"```python\n(class AtMostOnce.*?)```", page, re.DOTALL)
    assert code
    namespace = {"LogitsProcessor": LogitsProcessor, "torch": torch}
    exec(code[1], namespace)
    check_processor_laws(namespace["AtMostOnce"](), vocab_size=V)
    tokens = generate(random_model(), random_prompts(), V - 1, logits_processors=[namespace["AtMostOnce"]()])
    assert all(len(set(row)) == V - 1 for row in tokens[:, T:].tolist())


# ---------------------------------------------------------------------------------------------- as in transformers


def theirs():
    from transformers import generation as hf

    return {
        "temperature": hf.TemperatureLogitsWarper(0.7),
        "top_k": hf.TopKLogitsWarper(3),
        "top_p": hf.TopPLogitsWarper(0.8),
        "min_p": hf.MinPLogitsWarper(0.1),
        "repetition": hf.RepetitionPenaltyLogitsProcessor(1.7),
        "suppressed": hf.SuppressTokensLogitsProcessor([0, 4, 9], device="cpu"),
        "minimum length": hf.MinNewTokensLengthLogitsProcessor(T, 3, 2, device="cpu"),
        "forced": hf.ForcedEOSTokenLogitsProcessor(T + 3, 7, device="cpu"),
    }


@pytest.mark.parametrize(
    "name", ["temperature", "top_k", "top_p", "min_p", "repetition", "suppressed", "minimum length", "forced"]
)
def test_each_is_the_one_of_transformers(name):
    ours = PROCESSORS[name] if name != "forced" else ForcedTokens({-1: 7})
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logits = 4 * torch.randn(B, V, generator=generator)
        for n_more in range(4):
            tokens = torch.randint(V, (B, T + n_more), generator=generator)
            found = apply(ours, logits, tokens, n_prompt=T, n_new=3)
            expected = theirs()[name](tokens, logits.clone())
            if name == "forced" and n_more == 2:  # theirs leaves the forced one at 0, which is the same choice
                expected[:, 7] = logits[:, 7]
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_a_processor_of_transformers_is_welcome():
    from transformers.generation import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper

    model, prompts = random_model(), random_prompts()
    for ours, other in (
        (RepetitionPenalty(3.0), RepetitionPenaltyLogitsProcessor(3.0)),
        (TopK(2), TopKLogitsWarper(2)),
    ):
        expected = generate(model, prompts, N_NEW, logits_processors=[ours], do_sample=True, seed=3)
        for adapted in (other, FromTransformers(other)):
            assert torch.equal(
                generate(model, prompts, N_NEW, logits_processors=[adapted], do_sample=True, seed=3), expected
            )
    assert isinstance(as_processors([other])[0], FromTransformers)
    check_processor_laws(FromTransformers(other), vocab_size=V)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Temperature(0.0), "temperature must be positive"),
        (lambda: TopK(0), "top_k must be at least 1"),
        (lambda: TopP(0.0), "top_p must be above 0"),
        (lambda: TopP(1.1), "top_p must be above 0"),
        (lambda: MinP(-0.1), "min_p must be from 0"),
        (lambda: RepetitionPenalty(0), "penalty must be positive"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_no_processor_is_refused():
    with pytest.raises(TypeError, match="init, process and reorder, or is a function"):
        as_processors([3])


# ------------------------------------------------------------------------------------------------------- the loop


def test_the_loop_threads_each_processors_own_state():
    """The first processor's rows are forced; of the second, which has a state of the same name, nothing is seen."""
    model, prompts = random_model(), random_prompts()
    for processors in ([NextForced(4)], [NextForced(9), NextForced(4)], [NextForced(1), TopK(2), NextForced(4)]):
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


def test_no_token_left_is_an_error_that_names_row_step_and_state():
    model, prompts = random_model(), random_prompts()

    class Stuck(NextForced):
        def process(self, state, logits, context):
            logits = logits.clone()
            if context.step == 2:
                logits[1] = float("-inf")
            return {"next": state["next"] + 1}, logits

    with pytest.raises(ValueError, match=r"row 1 at step 2, after \[.*\].*Stuck\(next = 7\)"):
        generate(model, prompts, N_NEW, logits_processors=[Stuck(4)])
