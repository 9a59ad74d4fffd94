"""``mingpt analyze``: the numbers of our own analysis, a table that can be read, and one line for a mistake."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from hf_models import P, V, random_hf_model, random_values, tokens, with_peft_prefix, with_placeholders

from mingpt import cli
from mingpt.analysis.theory import attention_invariance, bias_subspace, random_case
from mingpt.huggingface.adapters import PeftAdapter, load_causal_lm, load_peft
from mingpt.huggingface.analysis import analyze, read_rows
from mingpt.huggingface.causal_lm import CausalLM
from mingpt.prefix import Prefix
from mingpt.storage.huggingface import export_peft, to_huggingface

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PEFT's, of transformers


@pytest.fixture
def run(monkeypatch, capsys):
    """Call ``mingpt analyze``; returns its exit code, its standard output and its standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mingpt", "analyze", *map(str, arguments)])
        capsys.readouterr()  # what was printed before
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        printed = capsys.readouterr()
        return exit_.value.code or 0, printed.out, printed.err

    return call


def write_rows(path, rows):
    path.write_text("".join(f"{row}\n" for row in rows.tolist()))
    return path


@pytest.fixture
def llama(tmp_path):
    """A Llama, an adapter of PEFT for it, and a file of rows."""
    model, adapter = tmp_path / "llama", tmp_path / "prefix"
    random_hf_model("llama").save_pretrained(model)
    lm = load_causal_lm(model)
    with_peft_prefix(lm.model, random_values(lm)[0])[0].save_pretrained(adapter)
    return model, adapter, write_rows(tmp_path / "rows.jsonl", tokens(5, 12))


def test_a_gpt_of_ours_gives_the_numbers_of_our_own_analysis(tmp_path, run):
    model, prefix, x = random_case(0, 3, 4, 6, P, 9, "key_value")
    to_huggingface(model).save_pretrained(tmp_path / "model")
    export_peft(model, prefix, tmp_path / "prefix")
    rows = write_rows(tmp_path / "rows.jsonl", x[:, P:])
    code, out, err = run(tmp_path / "model", tmp_path / "prefix", "--text", rows, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    expected = attention_invariance(model, prefix, x)._asdict() | bias_subspace(model, prefix, x)._asdict()
    for name, values in expected.items():
        assert torch.tensor(found["attention"][name]).sub(values).abs().max() <= 1e-5, name
    with torch.no_grad():
        logits, base = model(x, prefixes=prefix)[0][:, P:], model(x[:, P:])[0]
    for name, each in (("loss", logits), ("base_loss", base)):
        goal = F.cross_entropy(each[:, :-1].flatten(0, 1), x[:, P + 1 :].flatten()).item()
        assert found["logits"][name] == pytest.approx(goal, abs=1e-5)
    p, q = logits.softmax(dim=-1), base.softmax(dim=-1)
    assert found["logits"]["kl"] == pytest.approx((p * (p / q).log()).sum(dim=-1).mean().item(), abs=1e-5)
    agreement = (p.argmax(dim=-1) == q.argmax(dim=-1)).float().mean().item()
    assert found["logits"]["agreement"] == pytest.approx(agreement, abs=1e-6)


def test_a_llama_with_pefts_prefix_gives_a_table_and_figures(tmp_path, llama, run):
    model, adapter, rows = llama
    code, out, err = run(model, adapter, "--text", rows, "--figures", tmp_path / "figures")
    assert code == 0
    assert err == f"figures are in {tmp_path / 'figures'}\n"
    lines = out.splitlines()
    assert lines[0] == "PREFIX_TUNING of 4 positions on llama, 5 rows of 12 tokens"
    header = next(number for number, line in enumerate(lines) if line.startswith("layer head"))
    table = [line.split() for line in lines[header + 1 : header + 13]]
    assert [row[:2] for row in table] == [[str(1 + k // 4), str(1 + k % 4)] for k in range(12)]
    assert all(0 < float(row[2]) < 1 and float(row[3]) < 1e-5 for row in table)
    assert all(row[4] == "0.000" for row in table[:4])
    assert max(map(len, lines)) <= 96
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "attention.png", "bias.png", "movement.png"
    ]  # fmt: skip


def test_many_heads_have_a_line_for_each_layer():
    lm = CausalLM(random_hf_model("gpt_neox", hidden_size=48, num_attention_heads=24))
    values = random_values(lm)
    lines = analyze(lm, PeftAdapter("PREFIX_TUNING", None, Prefix("key_value", values)), tokens()).table().splitlines()
    assert [line[:10] for line in lines if line[:1].isdigit()] == ["1     all ", "2     all ", "3     all "]


def test_a_lora_moves_attention_and_has_no_share(tmp_path, llama, run):
    model, _, rows = llama
    lm = load_causal_lm(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    peft.get_peft_model(lm.model, config).save_pretrained(tmp_path / "lora")
    code, out, _ = run(model, tmp_path / "lora", "--text", rows, "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found["attention"]) == {"movement", "distance"}
    assert torch.tensor(found["attention"]["movement"]).min() > 0.01
    assert found["logits"]["kl"] > 0.01
    assert "share" not in run(model, tmp_path / "lora", "--text", rows)[1]


def test_an_adapter_that_does_nothing_changes_nothing():
    lm = CausalLM(random_hf_model("llama"))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")  # B is zero at first
    adapter = PeftAdapter("LORA", None, peft_model=peft.get_peft_model(lm.model, config))
    found = analyze(lm, adapter, tokens())
    assert found.logits.loss == found.logits.base_loss
    assert found.logits.kl == pytest.approx(0, abs=1e-7)
    assert found.logits.agreement == 1
    assert found.attention.movement.max() <= 1e-6


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_numbers_do_not_depend_on_the_batch_size(batch_size):
    lm = CausalLM(random_hf_model("gemma2"))
    adapter = PeftAdapter("PREFIX_TUNING", None, Prefix("key_value", random_values(lm)))
    found, expected = (analyze(lm, adapter, tokens(5), size) for size in (batch_size, 4))
    assert found.logits == pytest.approx(expected.logits, abs=1e-5)
    for name, expected_values in expected.attention.named().items():
        assert found.attention.named()[name].double().allclose(expected_values.double(), atol=1e-5), name


def test_the_models_own_tokenizer_reads_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "a": 1, "b": 2, "c": 3}, unk_token="?"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=own, unk_token="?").save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("a b c\nc b a é b")
    assert read_rows(text, tmp_path, 9, 3).tolist() == [[1, 2, 3], [3, 2, 1]]
    assert read_rows(text, tmp_path, 1, 3).tolist() == [[1, 2, 3]]
    assert read_rows(text, tmp_path, 9, 100).tolist() == [[1, 2, 3, 3, 2, 1, 0, 2]]
    text.write_text("a")
    with pytest.raises(ValueError, match="has 1 tokens, at least 2 are needed"):
        read_rows(text, tmp_path, 9, 3)
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no text"):
        read_rows(text, tmp_path, 9, 3)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="does not hold a tokenizer of transformers"):
        read_rows(text, tmp_path, 9, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a text\n", "has lines that are no JSON; without a tokenizer in the model's folder, each line is a list of"),
        ("[1, 2]\n[1, 2, 3]\n", "row 2: without a tokenizer in the model's folder, each line is a list of token ids"),
        ("[1]\n", "row 1: without a tokenizer"),
        ("[1, -2]\n", "row 1: without a tokenizer"),
        ("[1, true]\n", "row 1: without a tokenizer"),
        ("{}\n", "row 1: without a tokenizer"),
        ("", "has no rows"),
        (f"[1, {V}]\n", f"tokens go from 0 to {V - 1} in this vocabulary"),
    ],
)
def test_a_file_that_has_no_rows_of_tokens_is_one_line(llama, run, content, message):
    model, adapter, rows = llama
    rows.write_text(content)
    code, out, err = run(model, adapter, "--text", rows)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_folders_that_do_not_belong_together_are_one_line(tmp_path, llama, run):
    model, adapter, rows = llama
    other, nothing = tmp_path / "other", tmp_path / "nothing"
    random_hf_model("qwen2", num_hidden_layers=2).save_pretrained(other)
    for arguments in ((nothing, adapter), (model, nothing), (adapter, adapter), (model, model), (other, adapter)):
        code, out, err = run(*arguments, "--text", rows)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert run(model, adapter, "--text", nothing)[0] == 2


def test_a_base_that_is_only_named_is_told(tmp_path, llama, run):
    model, adapter, rows = llama
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "some/name"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    code, _, err = run(model, adapter, "--text", rows, "--rows", 2)
    assert code == 0
    assert err == f"the adapter names some/name as its base; that {model} is this model was not checked\n"
    assert load_peft(adapter, load_causal_lm(model)).base == "some/name"


def test_long_rows_are_cut_to_what_the_model_can_read(tmp_path, llama, run):
    model, adapter, _ = llama
    rows = write_rows(tmp_path / "long.jsonl", tokens(2, 60))
    code, out, _ = run(model, adapter, "--text", rows)
    assert code == 0
    assert out.startswith("PREFIX_TUNING of 4 positions on llama, 2 rows of 36 tokens\n")  # of 40 positions
    assert with_placeholders(tokens(2, 36)).shape == (2, 40)
