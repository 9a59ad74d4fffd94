"""Our decode loop on models of transformers: their greedy tokens, constraints, grammars and beams."""

from __future__ import annotations

import json
import re
import warnings

import numpy as np
import pytest
import torch
from hf_models import ARCHITECTURES, P, T, V, random_hf_model, random_values, tokens, with_placeholders
from reference import random_model

from mingpt.datasets import CustomDataset
from mingpt.decoding.automata import DFA, PDA
from mingpt.decoding.constraints import MultisetConstraint, PushdownConstraint, RegularConstraint
from mingpt.decoding.generation import beam_search
from mingpt.decoding.grammar import GrammarConstraint
from mingpt.decoding.logits_processors import Constraint, Context, LogitsProcessor
from mingpt.evaluation import Score, evaluate, predict
from mingpt.huggingface.causal_lm import CausalLM
from mingpt.prefix import Prefix
from mingpt.storage.huggingface import to_huggingface
from mingpt.tasks import SortAscending

N_NEW = 9
ROWS = torch.tensor([2, 0, 1, 2, 0])  # the prefixes of five rows


class Neutral(LogitsProcessor):
    """Changes nothing, but is one of ours."""

    def process(self, state, logits, context):
        return state, logits


def prefix_of(lm, case):
    """No prefix, one for five rows, or one of three for each."""
    if case == "none":
        return None
    kind, is_per_row = case.split(" ")[0], case.endswith("a row")
    values = random_values(lm, 3 if is_per_row else 1, kind=kind)
    return Prefix(kind, values, ROWS if is_per_row else None)


def greedy(lm, x, n_new, prefix, constraint=None):
    """The likeliest of the allowed tokens, step by step, from a pass over all tokens each."""
    start = 0 if prefix is None else prefix.n_placeholders
    context = Context(x, x.shape[1], n_new, lm.config.vocab_size, start)
    state = constraint.init(context) if constraint else {}
    for _ in range(n_new):
        logits = lm(context.tokens[:, -lm.block_size :], prefixes=prefix, n_last=1)[0][:, -1]
        if constraint:
            state, logits = constraint.process(state, logits, context)
        chosen = torch.cat([context.tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
        context = Context(chosen, x.shape[1], n_new, lm.config.vocab_size, start)
    return context.tokens


# --------------------------------------------------------------------------------------------- the same tokens


@pytest.mark.parametrize("case", ["none", "key_value", "prompt", "key_value a row", "prompt a row"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers(architecture, case):
    """Past the windows of 6. The first two tokens of the content are the same in all rows, which are read once."""
    lm, x = CausalLM(random_hf_model(architecture)), tokens(len(ROWS))
    x[:, :2] = x[:1, :2]
    prefix = prefix_of(lm, case)
    if prefix is not None:
        x = with_placeholders(x)
    record = []
    found = lm.generate(x, N_NEW, prefix, logits_processors=[Neutral()], forbidden_mass_record=record)
    assert len(record) == N_NEW  # it is our loop
    assert torch.equal(found, lm.generate(x, N_NEW, prefix))
    assert torch.equal(found, lm.generate(x, N_NEW, prefix, torch.ones_like(x), [Neutral()]))


@pytest.mark.parametrize("with_pad", [True, False])
@pytest.mark.parametrize("n_new", [N_NEW, 3])
@pytest.mark.parametrize("case", ["none", "key_value a row"])
@torch.no_grad()
def test_end_of_text_is_that_of_transformers(case, n_new, with_pad):
    """Rows end with different tokens at different steps; as options, and in the generation config."""
    lm, x = CausalLM(random_hf_model()), with_placeholders(tokens(len(ROWS)))
    prefix = prefix_of(lm, case)
    free = lm.generate(x, N_NEW, prefix)[:, P + T :]
    some, all_ends = free[:2, 1:2].flatten().tolist(), free[:, 4].tolist()
    lengths = set()
    for ends in (some[0], some, all_ends):
        options = {"eos_token_id": ends} | ({"pad_token_id": V - 1} if with_pad else {})
        with warnings.catch_warnings(action="ignore"):
            expected = lm.generate(x, n_new, prefix, **options)
        record = []
        assert torch.equal(lm.generate(x, n_new, prefix, forbidden_mass_record=record, **options), expected)
        assert len(record) == expected.shape[1] - x.shape[1]  # rows leave with any of the end tokens
        for name, value in options.items():
            setattr(lm.model.generation_config, name, value)
        assert torch.equal(lm.generate(x, n_new, prefix, logits_processors=[Neutral()]), expected)
        lengths.add(expected.shape[1] - x.shape[1])
    assert min(lengths) <= 5


@pytest.mark.parametrize("n_placeholders", [P - 2, P + 3])
@pytest.mark.parametrize("architecture", ["gpt2", "mistral"])
@torch.no_grad()
def test_placeholders_may_be_more_or_fewer_than_positions(architecture, n_placeholders):
    lm, x = CausalLM(random_hf_model(architecture)), with_placeholders(tokens(5), n_placeholders)
    prefix = Prefix("key_value", random_values(lm, 3), ROWS, n_placeholders)
    found = lm.generate(x, N_NEW, prefix, logits_processors=[Neutral()])
    assert torch.equal(found, greedy(lm, x, N_NEW, prefix))


@pytest.mark.parametrize("case", ["none", "key_value a row"])
@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
@torch.no_grad()
def test_what_outgrows_block_size_is_cropped(architecture, case):
    lm, x = CausalLM(random_hf_model(architecture)), tokens(5, 37)
    prefix = prefix_of(lm, case)
    assert torch.equal(lm.generate(x, 6, prefix, logits_processors=[Neutral()]), greedy(lm, x, 6, prefix))


# ------------------------------------------------------------------------------------------------- constraints


@pytest.mark.parametrize("case", ["none", "key_value", "prompt a row"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize(
    "constraint",
    [
        MultisetConstraint(),
        RegularConstraint(DFA.from_regex("0* [1-9]* (10 | 11)", V)),
        PushdownConstraint(PDA.balanced([(1, 2), (3, 4)], V)),
    ],
    ids=["multiset", "regular", "pushdown"],
)
@torch.no_grad()
def test_constraints_leave_the_likeliest_allowed_token(architecture, case, constraint):
    lm, x = CausalLM(random_hf_model(architecture)), with_placeholders(tokens(len(ROWS), T + 1))
    prefix = prefix_of(lm, case)
    n_new = x.shape[1] if case == "none" else T + 1
    found = lm.generate(x, n_new, prefix, logits_processors=[constraint])
    assert torch.equal(found, greedy(lm, x, n_new, prefix, constraint))
    assert not torch.equal(found, lm.generate(x, n_new, prefix))


@torch.no_grad()
def test_rows_with_their_own_prefixes_do_not_depend_on_each_other():
    lm, x = CausalLM(random_hf_model("mistral")), with_placeholders(tokens(5))
    values, record = random_values(lm, 3), []
    options = {"logits_processors": [MultisetConstraint()], "do_sample": True, "seed": 3}
    together = lm.generate(x, T, Prefix("key_value", values, ROWS), forbidden_mass_record=record, **options)
    assert torch.equal(together[:, P + T :].sort().values, x[:, P:].sort().values)
    assert torch.stack(record).shape == (T, 5, 1)
    for row, own in enumerate(ROWS):
        alone = lm.generate(x[row : row + 1], T, values[own], row_numbers=[row], **options)
        assert torch.equal(alone[0], together[row])


@torch.no_grad()
def test_functions_beside_constraints_get_the_content():
    lm, x, seen = CausalLM(random_hf_model()), with_placeholders(tokens()), []

    def function(tokens, logits):
        seen.append(tokens)
        return -logits

    found = lm.generate(x, 2, random_values(lm)[0], logits_processors=[function, MultisetConstraint()])
    assert torch.equal(seen[0], x[:, P:])
    assert torch.equal(seen[1], found[:, P:-1])


@pytest.mark.parametrize("processors", [(), (MultisetConstraint(),)])
def test_evaluation_takes_constraints(processors):
    """Answers are as long as the rows, whatever tokens end a text of the model."""
    lm = CausalLM(random_hf_model())
    data = CustomDataset("test", [SortAscending()], length=4, num_digits=9, prefix_padding=P)
    inputs, solutions = data.rows(range(12))
    prefix, options = Prefix("key_value", random_values(lm)), {"logits_processors": processors}
    expected = predict(lm, inputs, P, prefix, **options)
    assert np.array_equal(np.sort(expected), solutions) == bool(processors)
    lm.model.generation_config.eos_token_id = [*range(V)]
    assert np.array_equal(predict(lm, inputs, P, prefix, **options), expected)
    assert evaluate(lm, data, prefix, 12, **options) == Score.of(expected, solutions, inputs)


# ----------------------------------------------------------------------------------------------------- padding


PADDING = torch.tensor([3, 0, 5, 1, 3])  # before the content of five rows


def padded(prefix, x):
    """The rows with their placeholders and their mask, and each row alone without padding."""
    start = 0 if prefix is None else P
    mask = torch.arange(T) >= PADDING[:, None]
    mask = torch.cat([mask.new_zeros(len(x), start), mask], dim=1).long()  # placeholders do not matter
    rows = [with_placeholders(row[n:][None], start) for row, n in zip(x, PADDING, strict=True)]
    return with_placeholders(x, start), mask, rows


@pytest.mark.parametrize("case", ["none", "key_value a row", "prompt"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral"])
@torch.no_grad()
def test_padding_changes_nothing(architecture, case):
    """The first token is forced, so the model reads it with the prompt. A window of 6 would count the padding too."""
    changes = {"sliding_window": 30} if architecture == "mistral" and case != "none" else {}
    lm = CausalLM(random_hf_model(architecture, **changes))
    prefix = prefix_of(lm, case)
    x, mask, rows = padded(prefix, tokens(len(PADDING)))
    constraint = RegularConstraint(DFA.from_regex("3 [0-9]* (10 | 11)", V))
    for options in ({}, {"do_sample": True, "seed": 3}):
        found = lm.generate(x, N_NEW, prefix, mask, [constraint], **options)[:, -N_NEW:]
        for number, row in enumerate(rows):
            own = None if prefix is None else prefix.for_rows(slice(number, number + 1), len(x))
            numbers = {"row_numbers": [number]} if options else {}
            alone = lm.generate(row, N_NEW, own, None, [constraint], **options, **numbers)[0, -N_NEW:]
            assert torch.equal(found[number], alone)
    assert len(found[:, 1:].unique(dim=0)) == len(found)


class Echo(Constraint):
    """Begins with the prompt's last token."""

    def allowed(self, state, context):
        last = torch.nn.functional.one_hot(context.tokens[:, -1], context.vocab_size).bool()
        return state, torch.ones_like(last) if context.step else last


@torch.no_grad()
def test_padding_goes_with_its_row_when_another_ends_before_the_model_reads():
    lm, x = CausalLM(random_hf_model()), tokens(len(PADDING))
    x[:, -1] = torch.arange(len(x))
    x, mask, rows = padded(None, x)
    found = lm.generate(x, 5, None, mask, [Echo()], stop_token=0)
    assert not found[0, -5:].any()
    for number, row in enumerate(rows):
        assert torch.equal(found[number, -5:], lm.generate(row, 5, None, None, [Echo()], stop_token=0)[0, -5:])


@pytest.mark.parametrize("case", ["none", "key_value a row", "prompt"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral", "gemma2"])
@torch.no_grad()
def test_padded_rows_are_continued_as_transformers_does(architecture, case):
    """Past the windows of 6; rows end at different steps."""
    lm, x = CausalLM(random_hf_model(architecture)), tokens(len(PADDING))
    prefix = prefix_of(lm, case)
    x, mask, _ = padded(prefix, x)
    free = lm.generate(x, N_NEW, prefix, mask)
    assert torch.equal(lm.generate(x, N_NEW, prefix, mask, seed=0), free)
    assert not torch.equal(lm.generate(x, N_NEW, prefix), free)
    ends = {"eos_token_id": free[:3, -N_NEW + 2].tolist(), "pad_token_id": V - 1}
    expected = lm.generate(x, N_NEW, prefix, mask, **ends)
    assert (expected == V - 1).any()
    assert torch.equal(lm.generate(x, N_NEW, prefix, mask, forbidden_mass_record=[], **ends), expected)


# ------------------------------------------------------------------------------------------------------- beams


@pytest.mark.parametrize("processors", [(), (MultisetConstraint(),)])
@torch.no_grad()
def test_beams_are_those_of_our_gpt(processors):
    model = random_model(block_size=30, vocab_size=V)
    lm, x = CausalLM(to_huggingface(model)), with_placeholders(tokens(6))
    values = torch.randn(3, 2, 2, P, 24, generator=torch.Generator().manual_seed(3))
    for prefix in (None, Prefix("key_value", values), Prefix("key_value", values[:1])):
        expected, expected_scores = beam_search(model, x, 6, 4, prefixes=prefix, logits_processors=processors)
        found, scores = beam_search(lm, x, 6, 4, prefixes=prefix, logits_processors=processors)
        assert torch.equal(found, expected)
        assert torch.allclose(scores, expected_scores, atol=1e-4)
        assert found.unique(dim=1).shape[1] > 1


@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text"])
@torch.no_grad()
def test_scores_of_beams_are_sums_of_log_probabilities(architecture):
    lm, x = CausalLM(random_hf_model(architecture)), with_placeholders(tokens(5))
    values = random_values(lm, 3)
    beams, scores = beam_search(lm, x, N_NEW, 4, prefixes=Prefix("key_value", values, ROWS))
    logits, _ = lm(beams.flatten(0, 1)[:, :-1], prefixes=Prefix("key_value", values, ROWS.repeat_interleave(4)))
    new = beams.flatten(0, 1)[:, -N_NEW:, None]
    expected = logits[:, -N_NEW:].log_softmax(dim=-1).gather(2, new).sum(dim=(1, 2)).view(5, 4)
    assert torch.allclose(scores, expected, atol=1e-3)


# ---------------------------------------------------------------------------------------------------- grammars


TEXT = ['{"name": "anna", "ready": true}', '{"name": "otto", "ready": false}', "count the ripe plums: 3 + 40 * (2 + 1)"]
LARK = """
start: sum
sum: NUMBER (" + " NUMBER)~1..3
NUMBER: /[1-9][0-9]?/
"""
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["anna", "otto", "ida"]}, "ready": {"type": "boolean"}},
    "required": ["name", "ready"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE, trained on a few lines, as those of GPT-2 and Llama 3 are on many."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<begin>", "<end>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<begin>",
        eos_token="<end>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def is_json(text):
    value = json.loads(text)
    return (
        set(value) == {"name", "ready"} and value["name"] in ("anna", "otto", "ida") and value["ready"] in (True, False)
    )


@pytest.mark.parametrize(
    ("form", "grammar", "accepts"),
    [
        (
            "regex",
            r"(the|plums?|[a-cé]{2})( is [0-9]{1,3}){1,2}",
            re.compile(r"(the|plums?|[a-cé]{2})( is [0-9]{1,3}){1,2}").fullmatch,
        ),
        ("lark", LARK, re.compile(r"[1-9][0-9]?( \+ [1-9][0-9]?){1,3}").fullmatch),
        ("json_schema", json.dumps(SCHEMA), is_json),
    ],
    ids=["regex", "lark", "json"],
)
@torch.no_grad()
def test_every_row_is_in_the_grammar_of_a_real_tokenizer(tokenizer, form, grammar, accepts):
    """Twenty rows, each with a prefix of its own; the model has more tokens than the tokenizer, as many have."""
    n_rows, end = 20, tokenizer.eos_token_id
    sizes = {"vocab_size": len(tokenizer) + 5, "max_position_embeddings": 100}
    model = random_hf_model("llama", **sizes, eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    lm = CausalLM(model)
    prompts = with_placeholders(torch.tensor([tokenizer.encode("count the")] * n_rows))
    n_prompt, prefix = prompts.shape[1], Prefix("key_value", random_values(lm, n_rows))
    constraint = GrammarConstraint(form, grammar, tokenizer)
    options = {"logits_processors": [constraint], "do_sample": True, "seed": 0}
    found = lm.generate(prompts, 60, prefix, **options)
    texts = tokenizer.batch_decode(found[:, n_prompt:], skip_special_tokens=True)
    assert all(accepts(text) for text in texts), texts
    assert len(set(texts)) > 5
    assert found.shape[1] < n_prompt + 60  # every row has ended
    is_end = found[:, n_prompt:] == end
    assert (is_end.sum(dim=1) == 1).all()  # and is filled up with the pad token
    alone = lm.generate(prompts[7:8], 60, prefix.values[7], row_numbers=[7], **options)[0]
    assert torch.equal(found[7, : len(alone)], alone)
    beams, scores = beam_search(
        lm, prompts[:3], 60, 2, prefixes=prefix.values[0], logits_processors=[constraint], stop_token=end
    )
    assert scores.isfinite().all()
    assert all(
        accepts(text) for text in tokenizer.batch_decode(beams[:, :, n_prompt:].flatten(0, 1), skip_special_tokens=True)
    )


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="Only fast tokenizers are supported"):
        GrammarConstraint("regex", "a", object())


# ------------------------------------------------------------------------------------------------------ errors


def test_what_our_loop_does_not_do_is_refused():
    lm, x = CausalLM(random_hf_model()), with_placeholders(tokens())
    values, mask = random_values(lm)[0], torch.ones_like(x)
    mask[:, :P] = 0  # does not matter
    lm.generate(x, 1, values, mask, [Neutral()])
    with pytest.raises(ValueError, match=r"our decode loop takes seed, .*; got num_beams, top_p; for beams call"):
        lm.generate(x, 2, values, logits_processors=[Neutral()], num_beams=2, top_p=0.5)
    mask[1, P] = 0
    with pytest.raises(ValueError, match=r"11 tokens and 30 new .* block_size = 40, and rows with padding are not"):
        lm.generate(x, 30, values, mask, [Neutral()])
    for options in ({}, {"seed": 0}):
        with pytest.raises(ValueError, match="row 0 has padding on the right; pad on the left"):
            lm.generate(x, 2, values, mask.flip(1), **options)
