"""Prefixes on models of transformers: PEFT's logits, gradients and tokens, and those of our own GPT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hf_models import (
    ARCHITECTURES,
    P,
    T,
    V,
    random_hf_model,
    random_values,
    tokens,
    with_peft_prefix,
    with_peft_prompt,
    with_placeholders,
)
from reference import random_model

from mingpt.adapters.prefixes import PrefixAdapter
from mingpt.datasets import IGNORED, CustomDataset
from mingpt.decoding.constraints import MultisetConstraint
from mingpt.decoding.generation import beam_search
from mingpt.evaluation import evaluate
from mingpt.experiments.multistep import Plan, plan_from_composition, predict
from mingpt.huggingface.cache import layer_pairs
from mingpt.huggingface.causal_lm import CausalLM
from mingpt.prefix import Prefix, concatenate
from mingpt.storage.huggingface import to_huggingface
from mingpt.tasks import Add1, SortAscending
from mingpt.text import CHARACTERS, TextDataset
from mingpt.text.tasks import Upper
from mingpt.trainer import AdapterTrainer, PrefixTrainer

N_NEW = 9
theirs = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PEFT's, of transformers


def close(one, other, tolerance=1e-5):
    return (one - other).abs().max() <= tolerance


def targets_of(x):
    return torch.cat([x.new_full((len(x), P), -1), x], dim=1)


# --------------------------------------------------------------------------------------------------------- PEFT


@theirs
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_gradients_and_tokens_are_those_of_peft(architecture):
    model, x = random_hf_model(architecture), tokens()
    lm = CausalLM(model)
    with torch.no_grad():
        base = model(x).logits
    values = random_values(lm)[0].requires_grad_()
    logits, loss = lm(with_placeholders(x), targets_of(x), values)
    loss.backward()
    assert not logits[:, :P].any()
    ours = lm.generate(with_placeholders(x), N_NEW, prefixes=values.detach())

    adapted, table = with_peft_prefix(model, values.detach())
    expected = adapted(x).logits
    expected_loss = F.cross_entropy(expected.flatten(0, 1), x.flatten())
    expected_loss.backward()
    gradient = table.grad.unflatten(1, (len(values), 2, -1)).permute(1, 2, 0, 3)
    assert (expected - base).abs().max() > 0.5  # the prefix does something
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 1e-3  # in every layer
    assert close(logits[:, P:], expected)
    assert close(loss, expected_loss)
    assert close(values.grad, gradient)
    attended = torch.ones_like(x)
    generated = adapted.generate(input_ids=x, attention_mask=attended, max_new_tokens=N_NEW, do_sample=False)
    assert torch.equal(ours[:, P:], generated)


@theirs
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_soft_prompt_is_that_of_peft(architecture):
    model, x = random_hf_model(architecture), tokens()
    lm = CausalLM(model)
    values = random_values(lm, kind="prompt")[0].requires_grad_()
    logits, loss = lm(with_placeholders(x), targets_of(x), values)
    loss.backward()
    ours = lm.generate(with_placeholders(x), N_NEW, prefixes=values.detach())

    adapted, table = with_peft_prompt(model, values.detach())
    expected = adapted(x).logits[:, P:]
    F.cross_entropy(expected.flatten(0, 1), x.flatten()).backward()
    assert close(logits[:, P:], expected)
    assert table.grad.abs().max() > 1e-3
    assert close(values.grad, table.grad, 1e-5 * max(1, table.grad.abs().max()))
    attended = torch.ones_like(x)
    generated = adapted.generate(input_ids=x, attention_mask=attended, max_new_tokens=N_NEW, do_sample=False)
    assert torch.equal(ours[:, P + T :], generated[:, -N_NEW:])


@theirs
@pytest.mark.parametrize("kind", ["key_value", "prompt"])
@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3_text"])
@torch.no_grad()
def test_a_prefix_longer_than_a_window_is_that_of_peft(architecture, kind):
    """A layer with a window of 6 keeps 5 of its 10 positions."""
    model, x = random_hf_model(architecture), tokens()
    lm = CausalLM(model)
    values = random_values(lm, n_positions=10, kind=kind)[0]
    sizes = {keys.shape[-2] for keys, _ in layer_pairs(lm.transformers_cache(Prefix(kind, values[None]), 1))}
    assert sizes == ({5, 10} if architecture == "gemma2" else {5})  # every second layer of Gemma 2 has no window
    logits = lm(with_placeholders(x, 10), prefixes=values)[0][:, 10:]
    ours = lm.generate(with_placeholders(x, 10), N_NEW, prefixes=values)[:, 10 + T :]
    adapted, _ = with_peft_prefix(model, values) if kind == "key_value" else with_peft_prompt(model, values)
    assert close(logits, adapted(x).logits[:, -T:])
    attended = torch.ones_like(x)
    generated = adapted.generate(input_ids=x, attention_mask=attended, max_new_tokens=N_NEW, do_sample=False)
    assert torch.equal(ours, generated[:, -N_NEW:])


@theirs
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
@torch.no_grad()
def test_padding_is_masked_as_in_peft(architecture):
    model, x = random_hf_model(architecture), tokens()
    lm, mask = CausalLM(model), torch.ones(len(x), P + T, dtype=torch.int64)
    mask[1, P : P + 3] = 0  # the second row is shorter
    mask[:, :P] = torch.arange(P) % 2  # does not matter
    values = random_values(lm)[0]
    logits = lm(with_placeholders(x), prefixes=values, attention_mask=mask)[0][:, P:]
    other = x.clone()
    other[1, :3] = (x[1, :3] + 1) % V
    changed = lm(with_placeholders(other), prefixes=values, attention_mask=mask)[0][:, P:]
    assert close(changed[1, 3:], logits[1, 3:])
    assert not close(lm(with_placeholders(other), prefixes=values)[0][1, P + 3 :], logits[1, 3:], 0.1)
    ours = lm.generate(with_placeholders(x), N_NEW, prefixes=values, attention_mask=mask)

    adapted, _ = with_peft_prefix(model, values)
    assert close(logits, adapted(x, attention_mask=mask[:, P:]).logits)
    options = {"attention_mask": mask[:, P:], "max_new_tokens": N_NEW, "do_sample": False}
    assert torch.equal(ours[:, P:], adapted.generate(input_ids=x, **options))


# ---------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("kind", ["key_value", "prompt"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "gpt_neox"])
@torch.no_grad()
def test_fifty_prefixes_in_one_batch_are_fifty_runs(architecture, kind):
    lm, x = CausalLM(random_hf_model(architecture)), with_placeholders(tokens(50))
    values = random_values(lm, 50, kind=kind)
    together = lm(x, prefixes=Prefix(kind, values))[0]
    alone = torch.cat([lm(x[row : row + 1], prefixes=values[row])[0] for row in range(50)])
    assert close(together, alone)
    assert (alone[1:] - lm(x[1:], prefixes=values[0])[0]).abs().amax(dim=(1, 2)).min() > 0.05  # each is another one
    order = torch.arange(50).flip(0)
    assert close(lm(x[order], prefixes=Prefix(kind, values, order))[0], alone[order])
    generated = lm.generate(x, 3, prefixes=Prefix(kind, values))
    assert torch.equal(generated[7], lm.generate(x[7:8], 3, prefixes=values[7])[0])


@pytest.mark.parametrize("architecture", ["gpt2", "mistral"])
def test_gradients_of_prefixes_in_one_batch_are_their_own(architecture):
    lm, x = CausalLM(random_hf_model(architecture)), tokens(6)
    values = random_values(lm, 3).requires_grad_()
    lm(with_placeholders(x), targets_of(x), Prefix("key_value", values))[1].backward()
    for k in range(3):
        own = values[k].detach().clone().requires_grad_()
        rows = slice(2 * k, 2 * k + 2)
        lm(with_placeholders(x[rows]), targets_of(x[rows]), own)[1].backward()
        assert close(values.grad[k], own.grad / 3)


# ------------------------------------------------------------------------------------------------------- our GPT


@pytest.mark.parametrize("kind", ["key_value", "prompt"])
@pytest.mark.parametrize("n_placeholders", [P, P - 2, P + 3])
@torch.no_grad()
def test_it_is_called_as_our_gpt_is_and_gives_the_same(kind, n_placeholders):
    model = random_model(block_size=30, vocab_size=V)
    lm, x = CausalLM(to_huggingface(model)), with_placeholders(tokens(6), n_placeholders)
    shape = (2, 2, P, 24) if kind == "key_value" else (P, 24)
    values = torch.randn(3, *shape, generator=torch.Generator().manual_seed(3))
    targets = x.roll(-1, dims=1).masked_fill(x % 3 == 0, -1)
    assert lm.block_size == model.block_size
    for prefix in (
        Prefix(kind, values, n_placeholders=n_placeholders),
        Prefix(kind, values, torch.tensor([2, 2, 0, 1, 2, 0]), n_placeholders=n_placeholders),
        concatenate([values[0], values[1]], n_placeholders=n_placeholders),
        None,
    ):
        for n_last in (None, 3):
            expected, expected_loss = model(x, targets, prefix, n_last=n_last)
            logits, loss = lm(x, targets, prefix, n_last=n_last)
            assert logits.shape == expected.shape
            assert close(logits, expected)
            assert close(loss, expected_loss)
        if prefix is None or prefix.n_placeholders == prefix.n_positions:
            assert torch.equal(lm.generate(x, N_NEW, prefixes=prefix), model.generate(x, N_NEW, prefixes=prefix))
    assert lm(x, prefixes=prefix)[1] is None


@pytest.mark.parametrize("kind", ["key_value", "prompt"])
@pytest.mark.parametrize("is_constrained", [True, False])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 2.0}, {"stop_token": 3}], ids=str)
def test_plans_have_the_outputs_of_our_gpt(tmp_path, kind, is_constrained, options):
    """Whatever the batch size and the model's own end-of-text token, and after an interruption."""
    model = random_model(block_size=30, vocab_size=13)
    lm = CausalLM(to_huggingface(model))
    lm.model.generation_config.eos_token_id = 4
    values = torch.randn(
        2, *((2, 2, P, 24) if kind == "key_value" else (P, 24)), generator=torch.Generator().manual_seed(3)
    )
    prefixes = {name: Prefix(kind, own[None]) for name, own in zip(("SortAscending", "Add1"), values, strict=True)}
    rows = CustomDataset("test", [SortAscending()], length=6).rows(range(8))[0].tolist()

    def outputs(model, batch_size, folder=None):
        plan = plan_from_composition(SortAscending() + Add1(), model, prefixes, 6, 10, P, is_constrained)
        plan = Plan(model, [replace(step, options=options) for step in plan.steps])
        return predict(plan, rows, batch_size, seed=5, folder=folder)

    expected = outputs(model, 100)
    assert outputs(lm, 3) == outputs(lm, 100) == expected
    assert any(4 in row for step in expected.values() for row in step)

    generate, n_rows = lm.generate, []

    def interrupted(prompts, *arguments, **options):
        n_rows.append(len(prompts))
        if len(n_rows) == 5:  # the second batch of the second step
            raise KeyboardInterrupt
        return generate(prompts, *arguments, **options)

    lm.generate = interrupted
    with pytest.raises(KeyboardInterrupt):
        outputs(lm, 3, tmp_path)
    assert outputs(lm, 3, tmp_path) == expected
    assert n_rows == [3, 3, 2, 3, 3, 3, 2]


@pytest.mark.parametrize("kind", ["key_value", "prompt"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_generation_takes_the_likeliest_token_of_forward(architecture, kind):
    """Past the windows of 6, so the prefix leaves them. Placeholders are not looked at."""
    lm, x = CausalLM(random_hf_model(architecture)), with_placeholders(tokens())
    values = random_values(lm, kind=kind)[0]
    expected = x
    for _ in range(N_NEW):
        best = lm(expected, prefixes=values, n_last=1)[0][:, -1].argmax(dim=-1, keepdim=True)
        expected = torch.cat([expected, best], dim=1)
    assert torch.equal(lm.generate(x, N_NEW, prefixes=values), expected)
    others = torch.cat([torch.full_like(x[:, :P], V - 1), x[:, P:]], dim=1)
    assert torch.equal(lm(others, prefixes=values)[0], lm(x, prefixes=values)[0])


@torch.no_grad()
def test_functions_process_logits():
    lm, x = CausalLM(random_hf_model()), with_placeholders(tokens())
    values = random_values(lm)[0]
    chosen = lm.generate(x, 4, prefixes=values, logits_processors=[lambda tokens, logits: -logits])[:, P + T]
    assert torch.equal(chosen, lm(x, prefixes=values, n_last=1)[0][:, -1].argmin(dim=-1))


# ------------------------------------------------------------------------------------------ gradient checkpointing


def turn_on_checkpointing(model):
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def gradient_and_saved_numbers(lm, kind, is_training):
    """The gradient of three prefixes, and how many numbers autograd keeps until then outside of checkpoints."""
    x, n_saved = tokens(6), 0

    def pack(tensor):
        nonlocal n_saved
        n_saved += tensor.numel()
        return tensor

    lm.train(is_training)
    values = random_values(lm, 3, kind=kind).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = lm(with_placeholders(x), targets_of(x), Prefix(kind, values))[1]
    loss.backward()
    return values.grad, n_saved


@theirs
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("kind", ["key_value", "prompt"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing_gives_the_same_gradients(architecture, kind, is_training):
    """PEFT raises a ValueError, and transformers takes the cache from layers that train."""
    lm = CausalLM(random_hf_model(architecture, attention_dropout=0.0))
    expected, n_expected = gradient_and_saved_numbers(lm, kind, is_training)
    turn_on_checkpointing(lm.model)
    found, n_found = gradient_and_saved_numbers(lm, kind, is_training)
    assert expected.abs().amax() > 1e-3
    assert close(found, expected)
    assert n_found < n_expected / (2 if kind == "prompt" else 5)  # a prompt's own run is not computed again
    flags = [each.gradient_checkpointing for each in lm.model.modules() if hasattr(each, "gradient_checkpointing")]
    assert all(flags)  # it is as it was
    assert not any("forward" in vars(module) for module in lm.model.modules())


@theirs
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_peft_refuses_gradient_checkpointing(architecture):
    model = random_hf_model(architecture)
    turn_on_checkpointing(model)
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        with_peft_prefix(model, random_values(CausalLM(model))[0])


@theirs
@torch.no_grad()
def test_a_model_in_training_mode_with_checkpointing_generates_the_same():
    lm, x = CausalLM(random_hf_model()), with_placeholders(tokens())
    values = random_values(lm)[0]
    expected = lm.generate(x, 5, prefixes=values)
    turn_on_checkpointing(lm.model)
    assert torch.equal(lm.train().generate(x, 5, prefixes=values), expected)
    assert torch.equal(lm.generate(x, 5, prefixes=values, forbidden_mass_record=[]), expected)


# ------------------------------------------------------------------------------------------------------ training


def trained(lm, data, prefix, max_iters):
    """A PrefixTrainer that has run, validated twice, and made the loss smaller."""
    config, losses = PrefixTrainer.get_default_config(), []
    config.merge_from_dict({"device": "cpu", "max_iters": max_iters, "batch_size": 8, "learning_rate": 0.03})
    config.merge_from_dict({"progress": False, "validate_every": max_iters // 2, "validation_rows": 4})
    trainer = PrefixTrainer(config, lm, data, prefix)
    trainer.add_callback("on_batch_end", lambda trainer: losses.append(trainer.loss.item()))
    trainer.run()
    assert losses[-1] < losses[0] - 0.1
    return trainer


@theirs
@pytest.mark.parametrize(("architecture", "kind"), [("llama", "key_value"), ("gpt2", "prompt")])
def test_prefix_trainer_trains_it_and_evaluate_scores_it(architecture, kind):
    lm = CausalLM(random_hf_model(architecture, std=0.1))
    turn_on_checkpointing(lm.model)
    data = CustomDataset("train", [Add1()], length=4, num_digits=9, prefix_padding=P)
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    prefix = Prefix(kind, 0.1 * random_values(lm, kind=kind))
    trainer = trained(lm, data, prefix, max_iters=30)
    assert trainer.curves.shape == (1, 2)
    assert not trainer.curves.isnan().any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())
    assert evaluate(lm, data.with_split("validation"), prefix, 12).n_rows == 12


@pytest.mark.parametrize("shape", ["tensor", "Prefix"])
def test_prompts_of_a_model_with_grouped_queries_are_read_everywhere(shape):
    """Their width is not that of the keys."""
    lm = CausalLM(random_hf_model("llama", std=0.1))
    assert lm.config.hidden_size != lm.config.n_embd
    data = CustomDataset("train", [Add1()], length=4, num_digits=9, prefix_padding=P)
    values = random_values(lm, kind="prompt")
    adapter = PrefixAdapter(lm, Prefix("prompt", values.clone()))
    config = AdapterTrainer.get_default_config()
    config.merge_from_dict({"device": "cpu", "max_iters": 3, "batch_size": 4, "progress": False})
    AdapterTrainer(config, lm, data, adapter).run()
    prompt = values[0].clone() if shape == "tensor" else Prefix("prompt", values.clone())
    trainer = PrefixTrainer(config, lm, data, prompt)
    trainer.run()
    assert (trainer.prefixes.view_as(values) - values).abs().min() > 0
    assert close(trainer.prefixes.view_as(values), adapter.values)

    key_value, x = lm.as_key_value(Prefix("prompt", values)), with_placeholders(tokens())
    prompt = values[0] if shape == "tensor" else Prefix("prompt", values)
    assert close(lm(x, prefixes=prompt)[0], lm(x, prefixes=key_value)[0])
    for own in ({}, {"seed": 0}):
        assert torch.equal(lm.generate(x, 5, prompt, **own), lm.generate(x, 5, key_value, **own))
    beams, expected = (beam_search(lm, x, 5, 3, prefixes=each)[0] for each in (prompt, key_value))
    assert torch.equal(beams, expected)
    same = [evaluate(lm, data, each, 20, logits_processors=[MultisetConstraint()]) for each in (prompt, key_value)]
    assert same[0] == same[1]


def test_a_dataset_that_does_not_fit_is_refused_before_training():
    lm, config = CausalLM(random_hf_model()), PrefixTrainer.get_default_config()
    data = CustomDataset("train", [Add1()], length=4, num_digits=V, prefix_padding=P)
    with pytest.raises(ValueError, match="the model's vocabulary is 19, and the data need 22"):
        PrefixTrainer(config, lm, data, random_values(lm)[0])


def test_text_is_learned_and_scored():
    lm = CausalLM(random_hf_model("llama", std=0.1, vocab_size=CHARACTERS.vocab_size))
    data = TextDataset("train", [Upper()], length=30, prefix_padding=P)
    prefix = Prefix("prompt", 0.1 * random_values(lm, kind="prompt"))
    trained(lm, data, prefix, max_iters=20)
    score = evaluate(lm, data.with_split("test"), prefix, 12, batch_size=5)
    x, y = data.with_split("test").batch(range(12))
    is_right = (lm(x, prefixes=prefix)[0].argmax(dim=-1) == y) | (y == IGNORED)
    assert (score.n_rows, score.n_correct) == (12, is_right.all(dim=1).sum())
    first = (y != IGNORED).int().argmax(dim=1, keepdim=True)
    assert score.by_position[0] == is_right.gather(1, first).double().mean()


# -------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        (torch.zeros(3, 2, P, 24), "the prefix has 24 channels, the model has 12 in a key_value prefix"),
        (torch.zeros(P, 12), "the prefix has 12 channels, the model has 24 in a prompt prefix"),
        (torch.zeros(4, 2, P, 12), "the prefix has 4 layers, the model has 3"),
        (torch.zeros(3, P, 12), "of kind key_value or prompt, got activation"),
        (Prefix("activation", torch.zeros(1, 3, P, 24)), "of kind key_value or prompt, got activation"),
        (Prefix("key_value", torch.zeros(2, 3, 2, P, 12)), "3 rows cannot be shared out evenly to 2 prefixes"),
        (Prefix("prompt", torch.zeros(2, P, 24), torch.tensor([0, 1])), "rows has shape"),
        (torch.zeros(3, 2, P + T, 12), "11 prefix positions leave no content in 11 tokens"),
        (torch.zeros(3, 2, P, 12, device="meta"), "the prefix is on meta, the model on cpu; move one of them"),
    ],
)
def test_a_prefix_that_does_not_fit_is_refused(prefixes, message):
    lm, x = CausalLM(random_hf_model("llama")), with_placeholders(tokens())
    for call in (lm, lambda idx, prefixes: lm.generate(idx, 2, prefixes=prefixes)):
        with pytest.raises(ValueError, match=message):
            call(x, prefixes=prefixes)


def test_other_mistakes_are_named():
    lm, x = CausalLM(random_hf_model("llama")), with_placeholders(tokens())
    with pytest.raises(TypeError, match="a tensor or a Prefix, got list"):
        lm(x, prefixes=[1])
    with pytest.raises(ValueError, match="41 tokens do not fit into block_size = 40"):
        lm(torch.zeros(1, 41, dtype=torch.int64))
    with pytest.raises(ValueError, match="tokens go from 0 to 18"):
        lm(x + V)
    with pytest.raises(ValueError, match=r"attention_mask has the shape of idx, \(3, 11\), got \(3, 7\)"):
        lm(x, attention_mask=torch.ones(3, T))
    with pytest.raises(ValueError, match="4 positions and 2 placeholders; transformers' generate needs as many"):
        lm.generate(x, 2, Prefix("key_value", random_values(lm), n_placeholders=2))
