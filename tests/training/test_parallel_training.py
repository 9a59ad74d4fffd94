"""Training on several processes: the same losses, with full models and sharded ones, and checkpoints between them."""

from __future__ import annotations

import pytest
from distributed_script import run_job, small_trainer


@pytest.fixture(scope="module")
def losses_alone(tmp_path_factory):
    """The losses of one process by kind, each trained once."""
    found = {}

    def losses(kind):
        if kind not in found:
            found[kind] = run_job("train", 1, tmp_path_factory.mktemp("alone"), kind=kind, n_iters=50)[0]
        return found[kind]

    return losses


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "examples", "prefix", "prefix plateau"])
@pytest.mark.parametrize("n_processes", [2, 5])
def test_losses_do_not_depend_on_the_number_of_processes(tmp_path, losses_alone, kind, n_processes):
    """Of equal batches: 12 rows, which 5 processes share unevenly."""
    alone = losses_alone(kind)
    for result in run_job("train", n_processes, tmp_path, kind=kind, n_iters=50):
        assert result["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        if kind == "prefix plateau":
            assert result["n_iters"] == alone["n_iters"]
            assert min(alone["n_iters"]) < max(alone["n_iters"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "prefix"])
def test_a_sharded_model_trains_as_a_full_one(tmp_path, losses_alone, kind):
    for result in run_job("train", 2, tmp_path, kind=kind, n_iters=50, parallel="fsdp"):
        assert result["losses"] == pytest.approx(losses_alone(kind)["losses"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, "ddp"), (1, "ddp")), ((1, "ddp"), (2, "fsdp")), ((2, "fsdp"), (1, "ddp")), ((2, "fsdp"), (3, "fsdp"))],
)
def test_a_checkpoint_resumes_at_another_number_of_processes(tmp_path, losses_alone, before, after):
    options = {"kind": "model", "n_iters": 50}
    first = run_job("train", before[0], tmp_path, end=20, parallel=before[1], **options)[0]["losses"]
    second = run_job("train", after[0], tmp_path, parallel=after[1], **options)[0]["losses"]
    assert (len(first), len(second)) == (20, 30)
    assert first + second == pytest.approx(losses_alone("model")["losses"], abs=1e-5)


@pytest.mark.slow
def test_more_processes_than_rows_are_refused(tmp_path):
    with pytest.raises(AssertionError, match="2 processes cannot share 1 rows; raise batch_size"):
        run_job("train", 2, tmp_path, kind="model", n_iters=1, batch_size=1)


def test_muon_needs_full_matrices():
    with pytest.raises(ValueError, match="use adamw"):
        small_trainer("model", 1, None, parallel="fsdp", optimizer="muon")
