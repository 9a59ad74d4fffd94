"""The names that the notebooks import, gathered from where they live. Nothing inside the package imports this."""
# ruff: noqa: I001, F401 (names to import from here; the tasks' take a line each otherwise)

from mingpt.analysis.figures import attention_visualization
from mingpt.datasets import CustomDataset
from mingpt.evaluation import eval, label_batch  # noqa: A004 (the seed notebook's name)
from mingpt.tasks import (
    PRETRAINING_TASKS, SIMPLE_TASKS, TEST_TASKS, Add1, CompositeTask, Divisible, DoubleHistogram, FilterAtLeastNTimes,
    InverseBinary, LessThan, Modulo, MoreThanEqual, NotDivisible, SortAscending, SortDescending, Task,
)  # fmt: skip
from mingpt.trainer import batch_end_callback
