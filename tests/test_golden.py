"""Fifty iterations of pretraining and of prefixes give the losses that they gave, to the last bit.

The bits depend on the processor's vendor and instructions, and on torch: tests/data/golden_losses.json has an entry for
each kind of machine. On another kind the losses are compared up to rounding. ``python tests/test_golden.py`` renews the
entry of the machine that it runs on; a change of any digit is to be explained.
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path

import pytest
import torch

from mingpt.experiments import get_default_config, pipeline
from mingpt.tasks import Add1, SortAscending
from mingpt.training import read_metrics

FILE = Path(__file__).parent / "data" / "golden_losses.json"
N_ITERATIONS = 50


def machine() -> str:
    """What the bits depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    vendor = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "")
    extras = "".join(f" {name}" for name in ("avx512_bf16", "amx_bf16") if name in flags)
    return f"{vendor} {torch.backends.cpu.get_cpu_capability()}{extras}, torch {torch.__version__.partition('+')[0]}"


def losses(folder: Path) -> dict[str, list[str]]:
    """The loss after each iteration, in hexadecimal, which has all bits."""
    config = get_default_config("smoke")
    for part in (config.trainer, config.prefix):
        part.merge_from_dict({"max_iters": N_ITERATIONS, "precision": "float32", "log_every": 1, "progress": False})
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, _ = pipeline.pretrain(config, folder)
        pipeline.train_prefixes(config, model, [SortAscending(), SortAscending() + Add1()], folder)
    finally:
        torch.set_num_threads(n_threads)
    files = {
        "pretraining": folder / "pretraining" / "metrics.jsonl",
        "prefixes": next(folder.glob("prefixes/*/*.jsonl")),
    }
    return {name: [line["loss"].hex() for line in read_metrics(path)] for name, path in files.items()}


def test_the_losses_are_those_that_were_stored(tmp_path):
    stored, found = json.loads(FILE.read_text()), losses(tmp_path)
    assert [len(each) for each in found.values()] == [N_ITERATIONS, N_ITERATIONS]
    if machine() in stored:
        assert found == stored[machine()], f"another loss on {machine()}; python {Path(__file__).name} renews them"
    for other in stored.values():
        for name, values in other.items():
            expected = [float.fromhex(value) for value in values]
            assert [float.fromhex(value) for value in found[name]] == pytest.approx(expected, rel=1e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        entries = json.loads(FILE.read_text()) if FILE.exists() else {}
        FILE.write_text(json.dumps(entries | {machine(): losses(Path(folder))}, indent=1) + "\n")
    print(f"stored the losses of {machine()} in {FILE}")
