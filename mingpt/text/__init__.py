"""Tasks over text for a language model: what is posed, as which tokens, and what it reads beside them.

``tasks`` has the tasks and their ``+``, ``tokenizers`` turns text into tokens, ``datasets`` makes examples of
tasks with or without demonstrations, and ``corpus`` reads Python's own documentation.
"""

from mingpt.text.corpus import CorpusDataset, MixtureDataset, python_documentation
from mingpt.text.datasets import TextDataset
from mingpt.text.tasks import SIMPLE_TEXT_TASKS, TEXT_PRETRAINING_TASKS, TEXT_TEST_TASKS, TextTask
from mingpt.text.tokenizers import CHARACTERS, CharacterTokenizer, FileTokenizer

__all__ = [
    "CHARACTERS", "SIMPLE_TEXT_TASKS", "TEXT_PRETRAINING_TASKS", "TEXT_TEST_TASKS", "CharacterTokenizer",
    "CorpusDataset", "FileTokenizer", "MixtureDataset", "TextDataset", "TextTask", "python_documentation",
]  # fmt: skip
