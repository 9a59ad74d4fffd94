"""Models of transformers that are split over processes, by FSDP2 and by rules, do what whole ones do."""

from __future__ import annotations

import pytest
import torch
from distributed_script import run_job, train_on_causal_lms

pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "kinds"), [([1, 2], {"llama": "key_value", "gpt2": "prompt"}), ([2, 2], {"llama": "key_value"})]
)
def test_split_models_train_and_predict_as_whole_ones(tmp_path, shape, kinds):
    n_data, n_model = shape
    n_processes, whole = n_data * n_model, train_on_causal_lms(tmp_path, kinds)
    results = run_job("train_on_causal_lms", n_processes, tmp_path / "split", shape=shape, kinds=kinds)
    for rank, result in enumerate(results):
        assert len(result) == 2 * len(kinds)
        for name, found in result.items():
            expected, is_fsdp = whole[f"{name.split()[0]} whole"], "fsdp" in name
            for what, numbers in expected["numbers"].items():
                difference = torch.tensor(found["numbers"][what]) - torch.tensor(numbers)
                assert difference.abs().max() < 1e-5, (name, what)
            assert found["is_unchanged"]
            share = found["n_parameters"] / expected["n_parameters"]
            assert share == pytest.approx(1 / n_processes if is_fsdp else 1 / n_model, abs=0.03)
            assert found["data_shard"] == ([rank, n_processes] if is_fsdp else [rank // n_model, n_data])
