"""How often the small language model is right after demonstrations, on test texts.

python studies/in_context.py      # the model of checkpoints/text; writes studies/cache_size/in_context.csv
"""

from __future__ import annotations

from pathlib import Path

from mingpt.experiments.language_model import in_context_scores
from mingpt.storage.files import write_atomic
from mingpt.storage.weights import load_model
from mingpt.text import TEXT_PRETRAINING_TASKS, TEXT_TEST_TASKS

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Score all tasks after 0 to 8 demonstrations."""
    model, _ = load_model(ROOT / "checkpoints/text/model.safetensors")
    found = in_context_scores(model, [*TEXT_PRETRAINING_TASKS, *TEXT_TEST_TASKS], [0, 1, 2, 3, 4, 6, 8])
    write_atomic(ROOT / "studies/cache_size/in_context.csv", found.to_csv(index=False).encode())
    print(found.pivot_table("accuracy", "task", "n_demonstrations", sort=False).to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
