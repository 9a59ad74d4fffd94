"""The decode loop: what a cache remembers is what a full run would compute, and sampling follows the softmax.

Legend: B batch, T tokens of the prompt, P prefix positions, C channels, L layers, V vocabulary.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from properties import Forbid
from reference import random_model, reference_forward, reference_generate

from mingpt.decoding.automata import DFA
from mingpt.decoding.constraints import MonotoneConstraint, MultisetConstraint, RegularConstraint
from mingpt.decoding.generation import beam_search, generate, uniform
from mingpt.decoding.logits_processors import LogitsProcessor
from mingpt.kv_cache import n_positions
from mingpt.model import GPT
from mingpt.prefix import Prefix
from mingpt.training.precision import autocast

B, L, H, P, C, V = 3, 2, 4, 5, 24, 11  # random_model's sizes
T, N_NEW, BLOCK = 8, 6, 13  # of T + 6 tokens the model reads all but the last

SHAPES = {"activation": (L, P, C), "key_value": (L, 2, P, C), "prompt": (P, C)}
KINDS = sorted(SHAPES)


def random_prompts(n_rows=B, n_tokens=T, seed=1, n_shared=0):
    tokens = torch.randint(V, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))
    tokens[:, :n_shared] = tokens[:1, :n_shared]
    return tokens


def random_values(kind, n=None, seed=3):
    shape = SHAPES[kind] if n is None else (n, *SHAPES[kind])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------- cached equals uncached


@pytest.mark.parametrize("n_shared", [0, 3, T])
@pytest.mark.parametrize("n_new", [1, N_NEW, 15])
def test_greedy_generation_is_the_uncached_one(n_new, n_shared):
    """With 15 new tokens the sequence outgrows block_size, and the window moves with every token."""
    model, prompts = random_model(), random_prompts(n_shared=n_shared)
    tokens = model.generate(prompts, n_new)
    assert tokens.shape == (B, T + n_new)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, reference_generate(model, prompts, n_new))
    assert n_new == 1 or len(tokens[:, T:].unique()) > 2  # not one token for ever


@pytest.mark.parametrize("n_tokens", [1, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 4])
@pytest.mark.parametrize("n_shared", [0, 3, 99])
def test_prompts_of_every_length_around_the_block(n_tokens, n_shared):
    model, prompts = random_model(), random_prompts(n_tokens=n_tokens, n_shared=n_shared)
    assert torch.equal(model.generate(prompts, 4), reference_generate(model, prompts, 4))


@pytest.mark.parametrize("n_new", [N_NEW, 15])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_with_a_prefix_is_the_uncached_one(kind, n_new):
    model, prompts, values = random_model(), random_prompts(), random_values(kind)
    tokens = model.generate(prompts, n_new, prefixes=values)
    assert torch.equal(tokens, reference_generate(model, prompts, n_new, values, kind))
    assert not torch.equal(tokens, reference_generate(model, prompts, n_new))


@pytest.mark.parametrize("n_new", [N_NEW, 15])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_with_a_prefix_per_row_is_the_uncached_one(kind, n_new):
    model, prompts = random_model(), random_prompts(n_shared=T)  # equal rows, that only their prefixes tell apart
    values, rows = random_values(kind, 4), torch.tensor([2, 0, 3])
    expected = reference_generate(model, prompts, n_new, values[rows], kind)
    forms = [Prefix(kind, values, rows), Prefix(kind, values[rows])]
    for prefixes in [*forms, values[rows]] if kind == "activation" else forms:
        assert torch.equal(model.generate(prompts, n_new, prefixes=prefixes), expected)
    assert len({tuple(row) for row in expected.tolist()}) == B


@pytest.mark.parametrize("skip_layer_norm", [False, True])
def test_generation_without_ln_1_is_the_uncached_one(skip_layer_norm):
    model, prompts = random_model(skip_layer_norm=skip_layer_norm), random_prompts()
    values = random_values("activation")
    expected = reference_generate(model, prompts, N_NEW, values)
    assert torch.equal(model.generate(prompts, N_NEW, prefixes=values), expected)


def test_the_function_takes_the_model_that_the_method_is_of():
    model, prompts = random_model(), random_prompts()
    assert torch.equal(generate(model, prompts, N_NEW), model.generate(prompts, N_NEW))


@pytest.mark.parametrize("prefixes", [None, *KINDS])
def test_a_rows_continuation_does_not_depend_on_the_others(prefixes):
    model, prompts = random_model(), random_prompts(n_shared=2)
    values = None if prefixes is None else random_values(prefixes)
    together = model.generate(prompts, 15, prefixes=values)
    for row in range(B):
        assert torch.equal(model.generate(prompts[row : row + 1], 15, prefixes=values), together[row : row + 1])
    order = torch.tensor([1, 2, 0, 1])
    assert torch.equal(model.generate(prompts[order], 15, prefixes=values), together[order])


@pytest.mark.parametrize("n_prefix", [0, P])
def test_each_token_is_read_once(monkeypatch, n_prefix):
    model, prompts = random_model(), random_prompts(n_shared=4)
    n_read, forward_cached = 0, model.forward_cached

    def count(tokens, *arguments, **options):
        nonlocal n_read
        n_read += tokens.numel()
        return forward_cached(tokens, *arguments, **options)

    monkeypatch.setattr(model, "forward_cached", count)
    model.generate(prompts, N_NEW, prefixes=random_values("activation") if n_prefix else None)
    n_shared = 0 if n_prefix else 4
    assert n_read == n_shared + B * (T - n_prefix - n_shared) + B * (N_NEW - 1)


# ------------------------------------------------------------------------------------------------------ edges


def test_no_new_tokens_give_the_prompts():
    model, prompts, record = random_model(), random_prompts(), []
    assert torch.equal(model.generate(prompts, 0, activations_record=record), prompts)
    assert record == []


def test_the_prompts_stay_as_they_are():
    prompts = random_prompts()
    before = prompts.clone()
    random_model().generate(prompts, N_NEW)
    assert torch.equal(prompts, before)


def test_generation_needs_no_gradients():
    model, values = random_model(), random_values("activation").requires_grad_()
    seen = []

    def watch(tokens, logits):
        seen.append(logits.requires_grad or tokens.requires_grad)
        return logits

    model.generate(random_prompts(), 2, prefixes=values, logits_processors=[watch])
    assert seen == [False, False]
    assert torch.is_grad_enabled()


def test_dropout_is_off_in_evaluation_and_the_mode_is_the_callers():
    torch.manual_seed(0)
    model, prompts = random_model(embd_pdrop=0.5, resid_pdrop=0.5, attn_pdrop=0.5), random_prompts()
    assert torch.equal(model.generate(prompts, N_NEW), reference_generate(model, prompts, N_NEW))
    assert not model.training
    model.train()
    assert not torch.equal(model.generate(prompts, N_NEW), model.generate(prompts, N_NEW))
    assert model.training


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": -1}, "max_new_tokens must not be negative, got -1"),
        ({"temperature": -1.0}, r"temperature is 0 or more .* got -1\.0"),
        ({"top_k": 0}, r"top_k 1 or more, got 1\.0 and 0"),
        ({"prefixes": torch.zeros(L, T, C)}, "8 prefix positions leave nothing to continue in a prompt of 8 tokens"),
        ({"prefixes": torch.zeros(L + 1, P, C)}, "3 layers, the model has 2"),
        ({"prefixes": torch.zeros(B + 1, L, P, C)}, "4 prefixes for 3 rows"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        random_model().generate(random_prompts(), **{"max_new_tokens": 2} | options)


def test_a_prefix_that_fills_the_block_is_refused():
    """A longer prompt is cropped to the block, and that would leave no token to continue."""
    with pytest.raises(ValueError, match="block_size"):
        random_model().generate(random_prompts(n_tokens=BLOCK + 2), 1, prefixes=torch.zeros(L, BLOCK, C))


def test_bfloat16_generates():
    """A wider model would differ in near ties only; here it is enough that most tokens agree."""
    model, prompts = random_model(), random_prompts(n_rows=50)
    with autocast("bfloat16", "cpu"):
        for kind in KINDS:
            values = random_values(kind)
            tokens = model.generate(prompts, 3, prefixes=values)
            with autocast("float32", "cpu"):
                expected = model.generate(prompts, 3, prefixes=values)
            assert (tokens == expected).all(dim=1).float().mean() > 0.8


# -------------------------------------------------------------------------------------------------- the record


@pytest.mark.parametrize("kind", [None, "activation", "prompt"])
@pytest.mark.parametrize("n_new", [N_NEW, 9])
def test_the_record_is_one_full_pass_over_all_tokens_but_the_last(kind, n_new):
    model, prompts = random_model(), random_prompts()
    values = None if kind is None else random_values(kind)
    record, expected = [("before", torch.zeros(1))], []
    tokens = model.generate(prompts, n_new, prefixes=values, activations_record=record)
    assert torch.equal(tokens, model.generate(prompts, n_new, prefixes=values))
    reference_forward(model, tokens[:, :-1][:, -BLOCK:], values, kind or "activation", expected)
    assert record.pop(0)[0] == "before"
    assert [name for name, _ in record] == ["attention", "attn_block_output"] * L
    n_read = min(T + n_new - 1, BLOCK)
    assert record[0][1].shape == (B, H, n_read, n_read)
    for (_, found), (_, naive) in zip(record, expected, strict=True):
        torch.testing.assert_close(found, naive, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- sampling


def chi_square(tokens, probabilities):
    """Pearson's statistic of tokens (N,) against probabilities (V,), over those that can occur."""
    counts = torch.bincount(tokens, minlength=V).double()
    assert (counts[probabilities == 0] == 0).all()
    expected = len(tokens) * probabilities[probabilities > 0].double()
    assert expected.min() > 5  # the statistic is of no use otherwise
    return ((counts[probabilities > 0] - expected) ** 2 / expected).sum().item()


def only_top(logits, k):
    kept = logits.clone()
    kept[logits.argsort(descending=True)[k:]] = float("-inf")
    return kept


@pytest.mark.parametrize(
    "options, adjust",
    [
        ({}, lambda logits: logits),
        ({"temperature": 0.5}, lambda logits: logits / 0.5),
        ({"temperature": 3.0}, lambda logits: logits / 3.0),
        ({"top_k": 4}, lambda logits: only_top(logits, 4)),
        ({"top_k": 99}, lambda logits: logits),
        ({"top_k": 3, "temperature": 2.0}, lambda logits: only_top(logits / 2.0, 3)),
        ({"logits_processors": [lambda _, logits: -logits]}, lambda logits: -logits),
    ],
)
def test_samples_follow_the_softmax(options, adjust):
    """The 99.9% quantile of the chi-square distribution is 29.6 for 10 degrees of freedom."""
    n_samples = 20_000
    model, prompt = random_model(std=0.15), random_prompts(n_rows=1)
    tokens = model.generate(prompt.expand(n_samples, -1), 1, do_sample=True, seed=0, **options)
    logits = reference_forward(model, prompt)[0, -1].detach()
    assert logits.std() > 0.3
    assert chi_square(tokens[:, -1], F.softmax(adjust(logits), dim=-1)) < 29.6


def test_the_statistic_tells_distributions_apart():
    """So that the tests above can fail: samples at one temperature do not pass for those at another."""
    model, prompt = random_model(std=0.15), random_prompts(n_rows=1)
    tokens = model.generate(prompt.expand(20_000, -1), 1, do_sample=True, seed=0, temperature=1.2)
    logits = reference_forward(model, prompt)[0, -1].detach()
    assert chi_square(tokens[:, -1], F.softmax(logits / 1.2, dim=-1)) < 29.6
    assert chi_square(tokens[:, -1], F.softmax(logits, dim=-1)) > 50


def test_every_sampled_token_is_read_by_the_next():
    """The second token is distributed as the first one says."""
    n_samples = 20_000
    model, prompt = random_model(std=0.15), random_prompts(n_rows=1)
    tokens = model.generate(prompt.expand(n_samples, -1), 2, do_sample=True, seed=0)
    first = tokens[:, T].bincount().argmax()
    second = tokens[tokens[:, T] == first, T + 1]
    logits = reference_forward(model, torch.cat([prompt, first.view(1, 1)], dim=1))[0, -1].detach()
    assert chi_square(second, F.softmax(logits, dim=-1)) < 29.6


def test_sampling_among_the_one_likeliest_is_greedy():
    model, prompts = random_model(), random_prompts()
    assert torch.equal(model.generate(prompts, 15, do_sample=True, top_k=1), model.generate(prompts, 15))


@pytest.mark.parametrize("options", [{"temperature": 7.0}, {"temperature": 0.1}, {"top_k": 3}])
def test_greedy_generation_does_not_depend_on_what_is_for_sampling(options):
    model, prompts = random_model(), random_prompts()
    assert torch.equal(model.generate(prompts, N_NEW, **options), model.generate(prompts, N_NEW))


def test_samples_are_a_function_of_the_seed():
    model, prompts = random_model(std=0.1), random_prompts()

    def sample(seed):
        return model.generate(prompts, N_NEW, do_sample=True, seed=seed)

    torch.manual_seed(0)
    one, state = sample(1), torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(sample(1), one)
    assert not torch.equal(sample(2), one)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched


def test_without_a_seed_samples_follow_the_global_one():
    model, prompts = random_model(std=0.1), random_prompts()
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(model.generate(prompts, N_NEW, do_sample=True))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


@pytest.mark.parametrize("first", [0, 3, 4, 1001])
def test_a_rows_sample_does_not_depend_on_its_batch(first):
    """It is a function of the seed and the row's number, whatever else is sampled with it."""
    model, prompts = random_model(std=0.1), random_prompts(n_rows=7)

    def sample(rows, seed=5, first=first):
        numbers = [first + row for row in rows]
        return model.generate(prompts[list(rows)], N_NEW, do_sample=True, seed=seed, row_numbers=numbers)

    whole = sample(range(7))
    for parts in ([[i] for i in range(7)], [[0, 1], [2, 3, 4, 5, 6]], [[5, 0, 3], [6, 4, 1, 2]]):
        for rows in parts:
            assert torch.equal(sample(rows), whole[rows])
    assert not torch.equal(sample(range(7), seed=6), whole)
    assert not torch.equal(sample(range(7), first=first + 1), whole)
    if first == 0:
        assert torch.equal(model.generate(prompts, N_NEW, do_sample=True, seed=5), whole)
    with pytest.raises(ValueError, match="2 row_numbers for 7 rows"):
        model.generate(prompts, N_NEW, do_sample=True, row_numbers=[0, 1])


def test_rows_with_the_same_prompt_are_sampled_independently():
    model, prompt = random_model(std=0.1), random_prompts(n_rows=1)
    tokens = model.generate(prompt.expand(200, -1), 2, do_sample=True, seed=0)[:, T:]
    assert len(tokens.unique(dim=0)) > 50


@pytest.mark.parametrize("seed", [0, 7, 2**62 + 3, -1])
def test_draws_are_uniform(seed):
    """Within a step, across steps, and between neighbouring rows: the 99.9% quantile is 149.4 for 99 degrees."""
    numbers = torch.arange(20_000)
    first, second = uniform(seed, 0, numbers), uniform(seed, 1, numbers)
    assert first.dtype == torch.float64
    assert first.min() >= 0
    assert first.max() < 1
    strided = uniform(seed, 0, numbers * 2**40)
    of_steps = torch.stack([uniform(seed, step, numbers[:200]) for step in range(100)]).flatten()
    for draws in (first, second, strided, of_steps):
        counts = torch.histc(draws, 100, 0, 1)
        assert ((counts - 200) ** 2 / 200).sum() < 149.4
    for one, other in ((first[:-1], first[1:]), (first, second), (first, uniform(seed + 1, 0, numbers))):
        cells = (one * 10).long() * 10 + (other * 10).long()
        counts = torch.bincount(cells, minlength=100)
        assert ((counts - len(cells) / 100) ** 2 / (len(cells) / 100)).sum() < 149.4


def test_draws_are_those_of_splitmix64():
    """In Python's integers; 0xE220A8397B1DCDAF is the published first output of seed 0."""

    def splitmix(seed, number):
        mask = 2**64 - 1
        z = seed + (number + 1) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    assert splitmix(0, 0) == 0xE220A8397B1DCDAF
    numbers = [0, 1, 5, 10**9, 2**62]
    for seed, step in ((0, 0), (3, 2), (2**63 + 5, 100)):
        expected = [(splitmix(splitmix(seed, step), number) >> 11) / 2**53 for number in numbers]
        assert uniform(seed, step, torch.tensor(numbers)).tolist() == expected


def test_distant_row_numbers_cost_nothing():
    """Memory does not grow with their distance: 8 GB would be needed for all numbers in between."""
    model, prompts = random_model(std=0.1), random_prompts(n_rows=2)
    together = model.generate(prompts, 3, do_sample=True, seed=1, row_numbers=[0, 10**12])
    alone = model.generate(prompts[1:], 3, do_sample=True, seed=1, row_numbers=[10**12])
    assert torch.equal(together[1:], alone)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"do_sample": True, "prefixes": torch.zeros(L, P, C)}])
def test_zero_rows_are_continued_too(options):
    prompts = random_prompts()[:0]
    assert random_model().generate(prompts, N_NEW, **options).shape == (0, T + N_NEW)


def test_temperature_zero_is_greedy():
    model, prompts = random_model(std=0.1), random_prompts()
    greedy = model.generate(prompts, N_NEW)
    assert torch.equal(model.generate(prompts, N_NEW, temperature=0, do_sample=True, seed=1), greedy)
    assert torch.equal(model.generate(prompts, N_NEW, temperature=0), greedy)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_that_names_row_and_step(options, value):
    def spoil(tokens, logits):
        if tokens.shape[1] == T + 2:
            logits[1, 3] = value
        return logits

    model, prompts = random_model(), random_prompts()
    if value == float("inf") and not options:  # the likeliest token is plain
        assert model.generate(prompts, N_NEW, logits_processors=[spoil])[1, T + 2] == 3
        return
    with pytest.raises(ValueError, match=r"row 1 at step 2, after .*best logit is (nan|inf)"):
        model.generate(prompts, N_NEW, logits_processors=[spoil], **options)


def test_weights_that_are_not_numbers_are_an_error_and_no_token():
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight[2, 0] = float("nan")
    with pytest.raises(ValueError, match="row 0 at step 0"):
        model.generate(random_prompts(), N_NEW)
    with pytest.raises(ValueError, match="row 0 at step 0"):
        beam_search(model, random_prompts(), N_NEW, 3)


@pytest.mark.parametrize(
    "tokens, message",
    [
        (torch.zeros(T, dtype=torch.int64), r"shape \(B, T\), got torch.int64 of shape \(8,\)"),
        (torch.zeros(B, T), "tokens are integers .* got torch.float32"),
        (torch.full((B, T), V), f"from 0 to {V - 1} .* got {V} to {V}"),
        (torch.full((B, T), -1), f"from 0 to {V - 1} .* got -1 to -1"),
    ],
)
def test_prompts_that_are_no_tokens_are_refused(tokens, message):
    for use in (lambda: random_model().generate(tokens, 2), lambda: beam_search(random_model(), tokens, 2, 2)):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.parametrize("kind", KINDS)
def test_one_prefix_with_explicit_rows_follows_rows_that_leave(kind):
    """Rows end at different steps, and the window moves."""
    model, prompts = random_model(), random_prompts(n_rows=9, seed=4)
    values = random_values(kind, 1)
    options = {"do_sample": True, "seed": 1, "stop_token": 3}
    expected = model.generate(prompts, 15, prefixes=Prefix(kind, values), **options)
    rows = torch.zeros(9, dtype=torch.int64)
    assert (expected == 3).any()
    assert torch.equal(model.generate(prompts, 15, prefixes=Prefix(kind, values, rows), **options), expected)


@pytest.mark.parametrize("is_training", [False, True])
def test_in_training_mode_every_row_has_dropout_masks_of_its_own(monkeypatch, is_training):
    """So what the rows have in common is read once for each of them then."""
    model, prompt, n_rows = random_model(embd_pdrop=0.5).train(is_training), random_prompts(n_rows=1), []
    forward_cached = model.forward_cached

    def watch(tokens, *arguments, **options):
        n_rows.append(len(tokens))
        return forward_cached(tokens, *arguments, **options)

    monkeypatch.setattr(model, "forward_cached", watch)
    model.generate(prompt.expand(4, -1), 1)
    assert n_rows == ([4] if is_training else [1, 4])


def test_the_signature_names_every_option():
    names = list(inspect.signature(GPT.generate).parameters)
    first = ["idx", "max_new_tokens", "temperature", "do_sample", "top_k"]
    assert names[1:9] == [*first, "prefixes", "activations_record", "logits_processors"]
    assert {"seed", "row_numbers", "stop_token", "forbidden_mass_record"} <= set(names)
    assert "temperature" in (GPT.generate.__doc__ or "")


# ---------------------------------------------------------------------------------------------------- stop token


class Counting:
    """A model that counts how many rows and tokens it reads for the sake of a next token."""

    def __init__(self, model):
        self.model, self.read = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def forward_cached(self, tokens, kv_cache=None, **options):
        if "n_last" in options:
            self.read.append((len(tokens), n_positions(kv_cache) + tokens.shape[1]))
        return self.model.forward_cached(tokens, kv_cache, **options)


@pytest.mark.parametrize("n_new", [N_NEW, 15])
@pytest.mark.parametrize("per_row", [False, True])
def test_a_stop_token_ends_a_row_and_fills_it_up(n_new, per_row):
    """The others go on as if nobody had left, also where the window moves, each with its own prefix."""
    model, prompts = random_model(), random_prompts(n_rows=9, seed=4)
    values = random_values("activation", 9) if per_row else None
    free = model.generate(prompts, n_new, prefixes=values, do_sample=True, seed=1)
    stop = free[:, T:].flatten().bincount().argmax().item()
    expected = free.clone()
    for row in expected[:, T:]:
        if (row == stop).any():
            row[(row == stop).nonzero()[0, 0] :] = stop
    assert not torch.equal(expected, free)
    counting = Counting(model)
    tokens = generate(counting, prompts, n_new, prefixes=values, do_sample=True, seed=1, stop_token=stop)
    assert torch.equal(tokens, expected)
    alive = [9, *((expected[:, T : T + step + 1] != stop).all(dim=1).sum().item() for step in range(n_new))]
    assert [n_rows for n_rows, _ in counting.read] == [n for n in alive[:n_new] if n]  # nobody who has ended is read


def test_when_all_rows_have_ended_nothing_is_read():
    model, prompts = Counting(random_model()), random_prompts()
    tokens = generate(
        model, prompts, N_NEW, stop_token=3, logits_processors=[lambda _, logits: -abs(logits - logits[:, 3:4])]
    )
    assert (tokens[:, T:] == 3).all()
    assert len(model.read) == 1


# -------------------------------------------------------------------------------------------------- jump-forward


def test_where_only_one_token_may_follow_the_model_is_not_asked():
    model, prompts = random_model(), random_prompts()
    constraint = RegularConstraint(DFA.from_regex("(1|2) 3 3 3 (4|5) 6", V))
    counting = Counting(model)
    tokens = generate(counting, prompts, 6, logits_processors=[constraint])
    assert counting.read == [(B, T), (B, T + 4)]  # for the first and the fifth
    every_step = generate(model, prompts, 6, logits_processors=[constraint], forbidden_mass_record=[])
    assert torch.equal(tokens, every_step)
    assert torch.equal(tokens, naive_masked(model, prompts, 6, constraint))


def naive_masked(model, prompts, n_new, constraint):
    """Every token by a full run, over what the automaton can still complete."""
    tokens, dfa = prompts, constraint.dfa
    away = dfa.completable(n_new)
    state = torch.zeros(len(prompts), dtype=torch.int64)
    for step in range(n_new):
        logits = reference_forward(model, tokens[:, -BLOCK:])[:, -1].detach()
        allowed = away[n_new - step - 1][dfa.next[state]]
        chosen = logits.masked_fill(~allowed, float("-inf")).argmax(dim=-1)
        tokens, state = torch.cat([tokens, chosen[:, None]], dim=1), dfa.next[state, chosen]
    return tokens


class CountingSteps(LogitsProcessor):
    def init(self, context):
        return {"steps": torch.zeros(len(context.tokens))}

    def process(self, state, logits, context):
        assert state["steps"].unique().tolist() == [context.step]
        return {"steps": state["steps"] + 1}, logits


def test_a_processor_with_a_state_misses_no_step():
    constraint = RegularConstraint(DFA.from_regex("(1|2) 3 3 3 (4|5) 6", V))
    counting = Counting(random_model())
    generate(counting, random_prompts(), 6, logits_processors=[constraint, CountingSteps()])
    assert len(counting.read) == 6


# ------------------------------------------------------------------------------------------ forbidden mass


def test_the_forbidden_mass_is_the_probability_that_is_forbidden():
    model, prompts, record = random_model(), random_prompts(), []
    constraints = [Forbid([0, 1, 2]), lambda _, logits: logits / 2, Forbid([2, 3])]
    tokens = generate(model, prompts, N_NEW, logits_processors=constraints, forbidden_mass_record=record)
    assert torch.equal(tokens, generate(model, prompts, N_NEW, logits_processors=constraints))
    assert [each.shape for each in record] == [(B, 2)] * N_NEW
    for step, forbidden_mass in enumerate(record):
        logits = reference_forward(model, tokens[:, : T + step][:, -BLOCK:])[:, -1].detach()
        first = F.softmax(logits, dim=-1)[:, :3].sum(dim=-1)
        logits[:, :3] = float("-inf")
        second = F.softmax(logits / 2, dim=-1)[:, 3]
        torch.testing.assert_close(forbidden_mass, torch.stack([first, second], dim=1), atol=1e-5, rtol=1e-5)


def test_rows_that_have_ended_have_no_forbidden_mass():
    model, prompts, record = random_model(), random_prompts(n_rows=6), []
    options = {"do_sample": True, "seed": 4, "stop_token": 4, "logits_processors": [Forbid([0])]}
    tokens = generate(model, prompts, N_NEW, forbidden_mass_record=record, **options)
    has_ended = F.pad((tokens[:, T:] == 4).cumsum(dim=1) > 0, (1, 0))[:, : len(record)]
    assert has_ended.any()
    assert torch.equal(torch.stack(record)[..., 0].isnan().T, has_ended)


# -------------------------------------------------------------------------------------------------- beam search


def log_likelihoods(model, prompts, continuations):
    """(B, M) the log-probability of each of M continuations (M, N) of each prompt, by full runs."""
    scores = []
    for prompt in prompts:
        tokens = torch.cat([prompt.expand(len(continuations), -1), continuations], dim=1)
        log_p = F.log_softmax(reference_forward(model, tokens).detach(), dim=-1)[:, len(prompt) - 1 : -1]
        scores.append(log_p.gather(2, continuations[:, :, None]).sum(dim=(1, 2)))
    return torch.stack(scores)


def every_continuation(n_tokens):
    return torch.cartesian_prod(*[torch.arange(V)] * n_tokens).view(-1, n_tokens)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("n_new", [N_NEW, 15])
def test_one_beam_is_greedy(n_new, per_row):
    model, prompts = random_model(), random_prompts()
    values = random_values("activation", B) if per_row else None
    tokens, scores = beam_search(model, prompts, n_new, 1, prefixes=values)
    assert torch.equal(tokens[:, 0], model.generate(prompts, n_new, prefixes=values))
    assert scores.shape == (B, 1)


def test_enough_beams_find_the_best_of_all_continuations():
    model, prompts = random_model(std=0.1), random_prompts()
    likelihoods = log_likelihoods(model, prompts, every_continuation(3))
    best = likelihoods.topk(5, dim=1)
    tokens, scores = beam_search(model, prompts, 3, V**2)  # nothing that could become the best is ever dropped
    torch.testing.assert_close(scores[:, :5], best.values, atol=1e-4, rtol=1e-4)
    assert torch.equal(tokens[:, :5, T:], every_continuation(3)[best.indices])
    assert (scores.diff(dim=1) <= 0).all()


def test_the_scores_of_few_beams_are_those_of_their_continuations():
    model, prompts = random_model(std=0.1), random_prompts()
    tokens, scores = beam_search(model, prompts, 4, 3)
    for row in range(B):
        expected = log_likelihoods(model, prompts[row : row + 1], tokens[row, :, T:])[0]
        torch.testing.assert_close(scores[row], expected, atol=1e-4, rtol=1e-4)
        assert len(tokens[row].unique(dim=0)) == 3


def test_beams_under_a_constraint_are_the_best_of_its_language():
    model, prompts = random_model(std=0.1), random_prompts()
    everything = every_continuation(3)
    constraint = RegularConstraint(DFA.from_regex("(1|2)* 3 [4-6]*", V))
    members = everything[constraint.dfa.accepts(everything)]
    tokens, scores = beam_search(model, prompts, 3, 40, logits_processors=[constraint])
    best = log_likelihoods(model, prompts, members).sort(dim=1, descending=True)
    n_members = len(members)
    assert 3 < n_members < 40
    torch.testing.assert_close(scores[:, :n_members], best.values, atol=1e-4, rtol=1e-4)
    assert torch.equal(tokens[:, :n_members, T:], members[best.indices])
    assert scores[:, n_members:].isneginf().all()


@pytest.mark.parametrize("constraint", [MultisetConstraint(), MonotoneConstraint()])
def test_beams_carry_their_own_states(constraint):
    model, prompts = random_model(), random_prompts()
    tokens, scores = beam_search(model, prompts, 4, 5, logits_processors=[constraint])
    rows = tokens[:, :, T:][scores.isfinite()]
    if isinstance(constraint, MonotoneConstraint):
        assert (rows.diff(dim=1) >= 0).all()
    else:
        given = prompts[:, None, -4:].expand(-1, 5, -1)[scores.isfinite()]
        assert torch.equal(rows.sort(dim=1).values, given.sort(dim=1).values)


def test_beams_leave_a_dead_end():
    """Sorted and a permutation: after any output but the smallest left, the two contradict each other later on."""
    model, prompts = random_model(), random_prompts(n_rows=6, seed=3)
    both = [MonotoneConstraint(), MultisetConstraint()]
    with pytest.raises(ValueError, match=r"nothing may follow in row \d at step \d, after .*MultisetConstraint"):
        generate(model, prompts, 4, logits_processors=both)
    tokens, scores = beam_search(model, prompts, 4, 24, logits_processors=both)
    assert torch.equal(tokens[:, 0, T:], prompts[:, -4:].sort(dim=1).values)
    assert scores[:, 1:].isneginf().all()
    with pytest.raises(ValueError, match="nothing may follow"):
        beam_search(model, prompts, 4, 1, logits_processors=both)


def test_a_beam_that_has_ended_keeps_its_score():
    """The best of all continuations, where those that stop early are scored up to the stop token."""
    model, prompts, stop = random_model(std=0.1), random_prompts(), 4
    everything = every_continuation(3)
    is_after = F.pad((everything == stop).cumsum(dim=1) > 0, (1, 0))[:, :3]
    kept = everything[(~is_after | (everything == stop)).all(dim=1)]
    is_after = F.pad((kept == stop).cumsum(dim=1) > 0, (1, 0))[:, :3]
    scores = []
    for prompt in prompts:
        tokens = torch.cat([prompt.expand(len(kept), -1), kept], dim=1)
        log_p = F.log_softmax(reference_forward(model, tokens).detach(), dim=-1)[:, T - 1 : -1]
        scores.append((log_p.gather(2, kept[:, :, None])[..., 0] * ~is_after).sum(dim=1))
    best = torch.stack(scores).topk(5, dim=1)
    tokens, found = beam_search(model, prompts, 3, V**2, stop_token=stop)
    torch.testing.assert_close(found[:, :5], best.values, atol=1e-4, rtol=1e-4)
    assert torch.equal(tokens[:, :5, T:], kept[best.indices])


def test_without_new_tokens_there_is_one_beam():
    prompts = random_prompts()
    tokens, scores = beam_search(random_model(), prompts, 0, 3)
    assert torch.equal(tokens, prompts[:, None].expand(-1, 3, -1))
    assert scores.tolist() == [[0.0, float("-inf"), float("-inf")]] * B


def test_no_beams_are_refused():
    with pytest.raises(ValueError, match="n_beams must be at least 1, got 0"):
        beam_search(random_model(), random_prompts(), 3, 0)


# -------------------------------------------------------------------------------------------- logits processors


def naive_processed(model, prompts, n_new, processors):
    tokens = prompts
    for _ in range(n_new):
        logits = reference_forward(model, tokens[:, -BLOCK:])[:, -1].detach()
        for process in processors:
            logits = process(tokens, logits)
        tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return tokens


def test_processors_are_applied_in_their_order():
    bias = 2.0 * torch.randn(V, generator=torch.Generator().manual_seed(0))
    model, prompts = random_model(), random_prompts()

    def negate(_, logits):
        return -logits

    def add(_, logits):
        return logits + bias

    results = []
    for processors in ([negate, add], [add, negate]):
        results.append(model.generate(prompts, N_NEW, logits_processors=processors))
        assert torch.equal(results[-1], naive_processed(model, prompts, N_NEW, processors))
    assert not torch.equal(*results)


def test_processors_see_all_tokens_so_far_and_raw_logits():
    model, prompts, seen = random_model(), random_prompts(), []

    def watch(tokens, logits):
        seen.append((tokens.clone(), logits.clone()))
        return logits

    tokens = model.generate(prompts, 9, temperature=3.0, top_k=2, do_sample=True, logits_processors=(watch,))
    assert len(seen) == 9
    for step, (so_far, logits) in enumerate(seen):
        assert torch.equal(so_far, tokens[:, : T + step])
        expected = reference_forward(model, so_far[:, -BLOCK:])[:, -1].detach()
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_processor_that_depends_on_the_tokens():
    def never_again(tokens, logits):
        return logits.scatter(1, tokens, float("-inf"))

    model, prompts = random_model(), random_prompts(n_tokens=3)
    tokens = model.generate(prompts, N_NEW, logits_processors=[never_again])
    for row, prompt in zip(tokens.tolist(), prompts.tolist(), strict=True):
        assert len(set(row)) == len(set(prompt)) + N_NEW
    assert torch.equal(tokens, naive_processed(model, prompts, N_NEW, [never_again]))


def test_processors_from_an_iterator_are_applied_at_every_step():
    model, prompts = random_model(), random_prompts()
    only_7 = F.one_hot(torch.tensor(7), V) * 1e9
    tokens = model.generate(prompts, N_NEW, logits_processors=iter([lambda _, logits: logits + only_7]))
    assert (tokens[:, T:] == 7).all()
