"""PEFT's folders: read, they give PEFT's logits; one that does not belong to the model is refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hf_models import P, random_hf_model, random_values, tokens, with_peft_prefix, with_peft_prompt, with_placeholders
from safetensors.torch import load_file, save_file

from mingpt.huggingface.adapters import load_causal_lm, load_peft
from mingpt.huggingface.causal_lm import CausalLM
from mingpt.storage.files import CheckpointError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PEFT's, of transformers


def lora_of(model, **changes):
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    torch.manual_seed(5)
    return peft.get_peft_model(model, peft.LoraConfig(**(options | changes))).eval()


def adapted_by(method, model):
    lm = CausalLM(model)
    if method == "prefix":
        return with_peft_prefix(model, random_values(lm)[0])[0]
    if method == "prompt":
        return with_peft_prompt(model, random_values(lm, kind="prompt")[0])[0]
    if method == "lora":
        return lora_of(model)
    torch.manual_seed(6)
    if method == "projected":
        config = peft.PrefixTuningConfig(
            num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=5, task_type="CAUSAL_LM"
        )
    else:
        config = peft.CartridgeConfig(num_virtual_tokens=P, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).eval()
    if method == "cartridge":
        values = random_values(lm)[0].permute(2, 0, 1, 3).flatten(1)
        adapted.prompt_encoder["default"].load_prompt_embeddings(values)
    return adapted


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of a Llama."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    random_hf_model("llama").save_pretrained(folder)
    return folder


def saved(method, base, folder):
    """A folder of an adapter for the model in ``base``, and what PEFT gives with it."""
    adapted = adapted_by(method, load_causal_lm(base).model)
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return adapted(tokens()).logits[:, -tokens().shape[1] :]


@pytest.mark.parametrize("method", ["prefix", "projected", "cartridge", "prompt", "lora"])
@torch.no_grad()
def test_an_adapter_read_from_its_folder_gives_pefts_logits(tmp_path, base, method):
    expected = saved(method, base, tmp_path / "adapter")
    lm, x = load_causal_lm(base), tokens()
    plain = lm(x)[0]
    assert (plain - expected).abs().max() > 0.1 or method == "projected"  # which starts near zero
    adapter = load_peft(tmp_path / "adapter", lm)
    assert adapter.base == str(base)
    if method == "lora":
        assert adapter.prefix is None
        logits = lm(x)[0]
        with adapter.disabled():
            assert torch.equal(lm(x)[0], plain)
    else:
        logits = lm(with_placeholders(x), prefixes=adapter.prefix)[0][:, P:]
    assert (logits - expected).abs().max() <= 1e-5


def test_a_folder_without_a_model_or_an_adapter_is_refused(tmp_path, base):
    lm = load_causal_lm(base)
    for read in (load_causal_lm, lambda folder: load_peft(folder, lm)):
        for folder in (tmp_path / "nothing", tmp_path):
            with pytest.raises(CheckpointError, match=rf"^{folder}: no (adapter_)?config.json; expected a folder that"):
                read(folder)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no adapter_model.safetensors; expected"):
        load_peft(tmp_path, lm)


def test_damaged_files_are_refused(tmp_path, base):
    saved("prefix", base, tmp_path / "adapter")
    lm = load_causal_lm(base)
    weights, config = (tmp_path / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    table = load_file(weights)["prompt_embeddings"]
    save_file({"prompt_embeddings": torch.full_like(table, torch.nan)}, weights)
    with pytest.raises(CheckpointError, match="prompt_embeddings holds NaN or infinity"):
        load_peft(tmp_path / "adapter", lm)
    save_file({"other": table}, weights)
    with pytest.raises(CheckpointError, match="does not hold an adapter of PEFT for this model: KeyError"):
        load_peft(tmp_path / "adapter", lm)
    weights.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="does not hold an adapter of PEFT for this model: Safetensor"):
        load_peft(tmp_path / "adapter", lm)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="does not hold an adapter of PEFT for this model"):
        load_peft(tmp_path / "adapter", lm)
    copy = tmp_path / "model"
    shutil.copytree(base, copy)
    kept = load_file(copy / "model.safetensors")
    kept.pop("model.norm.weight")
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing, such as model\.norm\.weight"):
        load_causal_lm(copy)
    (copy / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="does not hold a causal language model of transformers"):
        load_causal_lm(copy)


@pytest.mark.parametrize("method", ["prefix", "prompt", "lora"])
def test_an_adapter_of_another_size_is_refused(tmp_path, base, method):
    """Its base is not on this disk any more, so only the sizes tell."""
    other = tmp_path / "other"
    random_hf_model("llama", hidden_size=32, num_key_value_heads=4).save_pretrained(other)
    saved(method, other, tmp_path / "adapter")
    shutil.rmtree(other)
    sizes = r"its shape is \(4, \d+\); this llama of 3 layers, 2 key/value heads of 6 channels and 24 channels needs"
    with pytest.raises(CheckpointError, match="size mismatch" if method == "lora" else sizes):
        load_peft(tmp_path / "adapter", load_causal_lm(base))


def test_an_adapter_of_another_base_is_refused(tmp_path, base):
    """Of the same sizes: the base that it names is on the disk, and is another."""
    other, adapter = tmp_path / "other", tmp_path / "adapter"
    random_hf_model("llama", seed=1).save_pretrained(other)
    saved("prefix", other, adapter)
    lm = load_causal_lm(base)
    with pytest.raises(CheckpointError, match=rf"its base is {other}, whose weights are not those of {base}"):
        load_peft(adapter, lm)
    shutil.copy(base / "model.safetensors", other)  # a copy of this model is no other
    assert load_peft(adapter, lm).prefix is not None
    random_hf_model("mistral").save_pretrained(other)
    with pytest.raises(CheckpointError, match=f"its base is {other}, of type mistral, and {base} is of type llama"):
        load_peft(adapter, lm)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "some/name"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert load_peft(adapter, lm).base == "some/name"  # nothing on the disk tells


def test_an_adapter_of_another_architecture_or_method_is_refused(tmp_path, base):
    lora_of(random_hf_model("gpt2"), target_modules=["c_attn"], fan_in_fan_out=True).save_pretrained(tmp_path / "lora")
    with pytest.raises(CheckpointError, match=r"Target modules \{'c_attn'\} not found"):
        load_peft(tmp_path / "lora", load_causal_lm(base))
    lora_of(random_hf_model("llama", num_hidden_layers=2)).save_pretrained(tmp_path / "short")
    with pytest.raises(CheckpointError, match="Found missing adapter keys"):
        load_peft(tmp_path / "short", load_causal_lm(base))
    config = peft.PromptEncoderConfig(num_virtual_tokens=P, encoder_hidden_size=5, task_type="CAUSAL_LM")
    peft.get_peft_model(random_hf_model("llama"), config).save_pretrained(tmp_path / "p-tuning")
    with pytest.raises(CheckpointError, match="its method is P_TUNING; of prompt methods"):
        load_peft(tmp_path / "p-tuning", load_causal_lm(base))
