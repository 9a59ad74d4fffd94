"""``mingpt analyze --examples``: demonstrations and a LoRA in the place of an adapter, all on the same tokens."""

from __future__ import annotations

import json

import pytest
import torch
from hf_models import P, random_hf_model, random_values, tokens, with_peft_prefix, with_placeholders
from huggingface.test_analyze import run, write_rows  # noqa: F401 (a fixture)

from mingpt.huggingface import comparison
from mingpt.huggingface.adapters import PeftAdapter, load_causal_lm, load_peft
from mingpt.huggingface.analysis import Analysis, analyze
from mingpt.huggingface.causal_lm import CausalLM
from mingpt.huggingface.comparison import Candidate, Comparison, compare
from mingpt.prefix import Prefix
from mingpt.trainer import DivergedError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PEFT's, of transformers

S = 5


def prefix_case(architecture="llama"):
    lm = CausalLM(random_hf_model(architecture))
    return lm, PeftAdapter("PREFIX_TUNING", None, Prefix("key_value", random_values(lm)))


def lora_case(**options):
    lm = CausalLM(random_hf_model("llama", tie_word_embeddings=False))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(lm.model, config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for each in (each for each in adapted.parameters() if each.requires_grad):
            each.add_(0.3 * torch.randn(each.shape, generator=generator))
    return lm, PeftAdapter("LORA", None, peft_model=adapted)


def loss_of(model, rows, n_scored, start=0):
    """Of the last tokens of rows, written out; what is before them is ``start`` tokens longer than the logits."""
    with torch.no_grad():
        log_p = model(rows).log_softmax(dim=-1)
    n = rows.shape[1]
    picked = [log_p[:, k - 1 - start].gather(1, rows[:, k, None]) for k in range(n - n_scored, n)]
    return -torch.cat(picked).mean().item()


@pytest.mark.parametrize("case", [prefix_case, lora_case, lambda: lora_case(modules_to_save=["lm_head"])])
def test_losses_are_of_the_same_tokens(case):
    """Without the adapter, with it, and after demonstrations without it: each as it is written out."""
    plain = random_hf_model("llama", tie_word_embeddings=case is prefix_case)
    lm, adapter = case()
    x, examples = tokens(6), tokens(4, S, seed=5)
    found = compare(lm, adapter, x, examples, n_scored=3, n_demonstrations=2, lora_iters=0)
    base, with_adapter, demonstrations = found.candidates
    shown = examples[:2].flatten().expand(6, -1)
    assert base.loss == pytest.approx(loss_of(lambda rows: plain(rows).logits, x, 3), abs=1e-5)
    assert demonstrations.loss == pytest.approx(
        loss_of(lambda rows: plain(rows).logits, torch.cat([shown, x], dim=1), 3), abs=1e-5
    )
    rows = x if adapter.prefix is None else with_placeholders(x)
    assert with_adapter.loss == pytest.approx(
        loss_of(lambda own: lm(own, prefixes=adapter.prefix)[0], rows, 3), abs=1e-5
    )
    assert (demonstrations.name, demonstrations.n_positions) == ("2 demonstrations", 2 * S)
    own = adapter.peft_model
    n_parameters = random_values(lm).numel() if own is None else own.get_nb_trainable_parameters()[0]
    assert (with_adapter.n_parameters, with_adapter.n_positions) == (n_parameters, P if own is None else 0)
    everything = compare(lm, adapter, x, examples, lora_iters=0)
    logits = analyze(lm, adapter, x).logits
    assert everything.n_scored == x.shape[1] - 1
    assert [each.loss for each in everything.candidates[:2]] == pytest.approx([logits.base_loss, logits.loss], abs=1e-5)
    assert everything.candidates[2].name == "4 demonstrations"


@pytest.mark.parametrize("case", [prefix_case, lora_case])
def test_a_lora_learns_the_examples_and_leaves_the_model_alone(case):
    """It is as large as the adapter and seeded; weights, what is trainable and the modules stay as they were."""
    lm, adapter = case()
    x, examples = tokens(5)[:, :1] + torch.arange(7), tokens(40, seed=5)[:, :1] + torch.arange(7)
    x, examples = x.remainder(19), examples.remainder(19)  # each token is one more than that before it
    examples = examples[~torch.isin(examples[:, 0], x[:, 0])]
    before = {name: (each.detach().clone(), each.requires_grad) for name, each in lm.named_parameters()}
    modules, state, out = list(lm.modules()), torch.get_rng_state(), lm(x)[0]
    found = compare(lm, adapter, x, examples, n_demonstrations=0, lora_iters=20)
    base, own, lora = found.candidates
    assert lora.loss < base.loss - 0.5
    assert lora.name == f"a LoRA of rank {max(1, round(own.n_parameters / 900))}"  # of all linear layers
    assert lora.n_parameters == 900 * int(lora.name.split()[-1])
    assert {"0.0001", "0.001", "0.01"} <= found.validation_losses.keys()
    assert list(lm.modules()) == modules
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(lm(x)[0], out)
    for name, each in lm.named_parameters():
        assert torch.equal(each, before[name][0]), name
        assert each.requires_grad == before[name][1], name
        assert each.grad is None
    torch.manual_seed(1)
    assert compare(lm, adapter, x, examples, n_demonstrations=0, lora_iters=20) == found


def test_the_rate_is_chosen_on_validation_rows_and_the_grid_grows(monkeypatch):
    """The last fifth of the examples chooses, never the scored rows; a best rate at the edge is not the end."""
    lm, adapter = prefix_case()
    seen, rates = [], []
    x, examples = tokens(3), tokens(10, S, seed=5)

    class FakeTrainer:
        def __init__(self, config, model, data):
            rates.append(config.learning_rate)
            self.inputs, self.targets = data.tensors

        def run(self):
            assert torch.equal(self.inputs, examples[:8, :-1])
            assert torch.equal(self.targets[:, -2:], examples[:8, -2:])
            assert (self.targets[:, :-2] == -1).all()

    def loss(model, rows, n_scored, *_, **__):
        seen.append(rows)
        return {0.01: 1.0, 0.1: 0.5, 1.0: 0.75}.get(rates[-1] if rates else 0, 2.0)

    monkeypatch.setattr(comparison, "_loss", loss)
    monkeypatch.setattr(comparison, "_LoraTrainer", FakeTrainer)
    found = compare(lm, adapter, x, examples, n_scored=2, n_demonstrations=0)
    assert found.validation_losses == {"0.0001": 2.0, "0.001": 2.0, "0.01": 1.0, "0.1": 0.5, "1": 0.75}
    assert all(torch.equal(rows, examples[8:]) for rows in seen[2:-1])
    assert torch.equal(seen[-1], x)


def test_a_lora_that_diverges_is_one_line():
    lm, adapter = prefix_case()
    with torch.no_grad():
        lm.model.lm_head.weight[0] = torch.nan
    with pytest.raises(DivergedError, match=r"^the LoRA diverged at each of the rates 1e-05, .* 0.01; 0 iterations"):
        compare(lm, adapter, tokens(), tokens(4, seed=5), n_demonstrations=0, lora_iters=2)


def comparison_of(*losses):
    names = ["the base model", "the adapter", "1 demonstration", "a LoRA of rank 2"]
    candidates = [Candidate(name, loss, 0, 0) for name, loss in zip(names, losses, strict=True)]
    return Comparison(candidates, 3, 10, 5, {"0.001": 1.5, "0.01": None})


@pytest.mark.parametrize(
    ("losses", "shares", "sentence"),
    [
        (
            (3, 1, 2.5, 0.8),
            [0, 1, 0.25, 1.1],
            "2.0000 nats a token; of it, 25% is reached by 1 demonstration, and 110% is",
        ),
        (
            (3, 1, 3.5, 1),
            [0, 1, -0.25, 1],
            "2.0000 nats a token; of it, nothing is reached by 1 demonstration, and 100% ",
        ),
        ((1, 3, 2, 0.5), [None] * 4, "-2.0000 nats a token; of less than 0.01, no share is given."),
        ((1, 0.995, 0.5, 0.5), [None] * 4, "0.0050 nats a token; of less than 0.01, no share is given."),
        ((1, float("nan"), 0.5, 0.5), [None] * 4, "nan nats a token; of less than 0.01, no share is given."),
    ],
)
def test_the_sentence_follows_from_the_numbers(losses, shares, sentence):
    found = comparison_of(*losses)
    assert found.shares() == pytest.approx(shares)
    assert found.sentences()[0].startswith(f"The adapter's gain over the base model is {sentence}")
    assert found.sentences()[1].endswith(
        "on 2 of 10 examples, kept from its training: 0.001 (1.5000), 0.01 (diverged)."
    )
    assert max(map(len, found.table().splitlines())) <= 96


def test_an_analysis_is_read_back():
    lm, adapter = prefix_case()
    for analysis in (
        analyze(lm, adapter, tokens()),
        analyze(*lora_case(), tokens())._replace(comparison=comparison_of(3, 1, 2, 1)),
    ):
        found = Analysis.from_dict(json.loads(json.dumps(analysis.to_dict())))
        assert found.to_dict() == analysis.to_dict()
        assert found.table() == analysis.table()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": tokens(9)}, "3 of 3 rows are among the examples"),
        (
            {"examples": tokens(9, 20, seed=5), "n_demonstrations": 2},
            "1 of them fit into block_size = 40 before a row of 7, 2",
        ),
        (
            {"examples": tokens(9, 34, seed=5)},
            "0 of them fit into block_size = 40 before a row of 7, at least 1 are needed",
        ),
        ({"examples": tokens(2, seed=5), "n_demonstrations": 3}, "there are 2 examples, at least 3 are needed"),
        ({"examples": tokens(1, seed=5), "lora_iters": 1}, "there are 1 examples, at least 2 are needed"),
        ({"n_demonstrations": 0}, "nothing to compare"),
        ({"n_scored": 7}, "of a row of 7 tokens the last 1 to 6 can be scored, got 7"),
    ],
)
def test_what_cannot_be_compared_is_said(options, message):
    lm, adapter = prefix_case()
    with pytest.raises(ValueError, match=message):
        compare(lm, adapter, tokens(), **({"examples": tokens(4, seed=5), "lora_iters": 0} | options))


def test_the_command_compares(tmp_path, run):  # noqa: F811
    random_hf_model("llama").save_pretrained(tmp_path / "llama")
    lm = load_causal_lm(tmp_path / "llama")
    with_peft_prefix(lm.model, random_values(lm)[0])[0].save_pretrained(tmp_path / "prefix")
    rows, examples = (write_rows(tmp_path / f"{seed}.jsonl", tokens(5, 7, seed)) for seed in (1, 2))
    given = (tmp_path / "llama", tmp_path / "prefix", "--text", rows)
    options = ("--examples", examples, "--demonstrations", 2, "--lora-iters", 2, "--score-last", 3)
    code, out, err = run(*given, *options, "--json")
    assert (code, err) == (0, "")
    lm = load_causal_lm(tmp_path / "llama")
    expected = compare(lm, load_peft(tmp_path / "prefix", lm), tokens(5), tokens(5, seed=2), 3, 2, 2)
    assert json.loads(out)["comparison"] == expected.to_dict()
    assert "2 demonstrations " in run(*given, *options)[1]
    for wrong in (("--lora-iters", 2), ("--examples", tmp_path / "nothing"), ("--examples", rows)):
        code, out, err = run(*given, *wrong)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ")
