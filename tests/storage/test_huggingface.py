"""To Hugging Face and back: the same weights, logits and tokens."""

from __future__ import annotations

import pytest
import torch
from reference import random_model

from mingpt.adapters import METHODS, LoRA
from mingpt.datasets import CustomDataset
from mingpt.model import GPT
from mingpt.prefix import Prefix
from mingpt.storage.huggingface import as_key_value, export_peft, import_peft, to_huggingface
from mingpt.tasks import Add1

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

L, P, C, V = 3, 4, 32, 13
KINDS = {"activation": (1, L, P, C), "key_value": (1, L, 2, P, C), "prompt": (1, P, C)}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of theirs among themselves


def new_model(**options):
    sizes = {"n_layer": L, "n_embd": C, "vocab_size": V, "block_size": 30}
    return random_model(std=0.15, **(sizes | options))


def rows(n=1000, length=12):
    return torch.randint(V, (n, length), generator=torch.Generator().manual_seed(1))


def with_placeholders(x):
    return torch.cat([x.new_zeros(len(x), P), x], dim=1)


@pytest.mark.parametrize("gelu", ["tanh", "none"])
@torch.no_grad()
def test_there_and_back_is_exact(gelu):
    model, x = new_model(gelu_approximate=gelu), rows()
    other = to_huggingface(model)
    assert (other(x).logits - model(x)[0]).abs().max() <= 1e-5
    back = GPT.from_huggingface(other)
    assert back.config.gelu_approximate == gelu
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.state_dict().items())
    assert torch.equal(back(x)[0], model(x)[0])


def test_a_model_that_is_no_gpt2_is_refused():
    with pytest.raises(ValueError, match="skip_layer_norm"):
        to_huggingface(new_model(skip_layer_norm=True))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_exported_prefix_gives_the_same_logits_and_tokens(tmp_path, kind):
    model, x = new_model(), rows()
    prefix = Prefix(kind, torch.randn(KINDS[kind], generator=torch.Generator().manual_seed(2)))
    expected = model(with_placeholders(x), prefixes=prefix)[0][:, P:]
    assert (expected - model(x)[0]).abs().max() > 0.1  # it does something
    export_peft(model, prefix, tmp_path)
    loaded = peft.PeftModel.from_pretrained(to_huggingface(model), str(tmp_path)).eval()
    assert (loaded(x).logits - expected).abs().max() <= 1e-5
    ours = model.generate(with_placeholders(x[:50]), 6, prefixes=prefix)[:, -6:]
    attended = torch.ones_like(x[:50])
    theirs = loaded.generate(input_ids=x[:50], attention_mask=attended, max_new_tokens=6, do_sample=False)[:, -6:]
    assert torch.equal(ours, theirs)
    imported = import_peft(tmp_path, model)
    assert imported.kind == "key_value"
    assert torch.equal(imported.values[0], as_key_value(model, prefix))
    if kind == "key_value":
        assert torch.equal(imported.values, prefix.values)
    assert (model(with_placeholders(x), prefixes=imported)[0][:, P:] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("targets", [r"mlp\.c_", "attn", r"h\.1\.mlp\.c_fc"])
@torch.no_grad()
def test_an_exported_lora_gives_the_same_logits(tmp_path, targets):
    model, x = new_model(), rows()
    before = model(x)[0]
    torch.manual_seed(3)
    lora = LoRA(model, 2, targets, alpha=3.0)
    for b in lora.b:
        b.normal_(std=0.3, generator=torch.Generator().manual_seed(4))
    expected = model(x)[0]
    assert (expected - before).abs().max() > 1e-3
    export_peft(model, lora, tmp_path)
    loaded = peft.PeftModel.from_pretrained(to_huggingface(model), str(tmp_path)).eval()
    assert (loaded(x).logits - expected).abs().max() <= 1e-5
    lora.detach()
    imported = import_peft(tmp_path, model)
    assert imported.names == lora.names
    assert torch.equal(model(x)[0], expected)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_a_method_that_peft_has_is_exported_and_another_is_refused(tmp_path, name):
    """In PEFT each gives the same logits on the same weights."""
    model, x = new_model(), with_placeholders(rows(200))
    data = CustomDataset("train", [Add1()], length=4, num_digits=9, prefix_padding=P)
    adapter = METHODS[name](model, data, 2 if METHODS[name].unit == "rank" else P)
    adapter.detach()
    drawn = torch.Generator().manual_seed(5)
    for parameter in adapter.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=drawn)
    before = model(x)[0]
    with adapter.attached() as prefix:
        expected = model(x, prefixes=prefix)[0]
    assert (expected - before)[:, P:].abs().max() > 0.01
    if name in ("full", "bitfit", "loreft", "gated", "prefix-tuning+", "prefix+lora"):
        with pytest.raises(ValueError, match=f"PEFT has no {type(adapter).__name__}; save_adapter keeps it"):
            export_peft(model, adapter, tmp_path)
        assert not list(tmp_path.iterdir())
        return
    export_peft(model, adapter, tmp_path)
    loaded = peft.PeftModel.from_pretrained(to_huggingface(model), str(tmp_path)).eval()
    is_prefix = loaded.active_peft_config.is_prompt_learning
    assert is_prefix == (METHODS[name].unit == "positions")
    logits = loaded(x[:, P:]).logits if is_prefix else loaded(x).logits[:, P:]
    assert (logits - expected[:, P:]).abs().max() <= 1e-5
    adapter.extend([METHODS[name](model, data, 2 if METHODS[name].unit == "rank" else P)])
    with pytest.raises(ValueError, match="expected one adapter, got 2"):
        export_peft(model, adapter, tmp_path)


def test_adapters_of_another_size_or_kind_are_refused(tmp_path):
    model = new_model()
    export_peft(model, torch.randn(P, C), tmp_path / "prefix")
    with pytest.raises(ValueError, match=r"\(4, 192\), a model of 2 layers and 32 channels needs 128 numbers"):
        import_peft(tmp_path / "prefix", new_model(n_layer=2))
    other = peft.get_peft_model(to_huggingface(model), peft.IA3Config(task_type="CAUSAL_LM"))
    other.save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(ValueError, match="IA3"):
        import_peft(tmp_path / "ia3", model)
