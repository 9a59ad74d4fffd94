"""The field's terms: words that this code made up earlier are gone from code, messages, docs and notebooks."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

OLD = [
    r"make_same|shared_out|split_like|own_part|\bPart\b(?! (one|two))",
    r"\bWATCHING\b|import watch\b|def report\b",
    r"\bstages?\.(?!py)|made_of|fingerprint|\bremember\(",
    r"\bpast\b|\bLayerCache\b|\bLayerPast\b|past_of_prefix|\.extend\((tokens|None|idx)",
    r"\bn?_?places\b|\bplaces=",
    r"\bteach\(|\b_teach\b|\btaught\b|\bOutcomes?\b|\boutcomes\b|learned numbers|numbers learned",
    r"best_loss|\.interval\b",
    r"\bpressures?\b|pressure_|\bDraws\b",
    r"\bplan_for\b|row_step\([^)]*before=",
    r"points_figure|layers_heads_figure|prefix_effect_figure",
    r"\b_undo\b|\b_say\b|peak_lr|\bpeers\b|\blaws\b",
    r"[Rr]eason(ing)? in (several )?steps",
    r"told apart by nothing",
]
"""What must not occur: identifiers, and words in prose that stand for one of them."""

SKIPPED = {"CHANGELOG.md", "tests/test_glossary.py"}
"""The change log says which name became which."""


def texts() -> list[tuple[str, str]]:
    """Every tracked text file but those of results, by its name; of a notebook its cells without their outputs."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    found = []
    for name in names:
        path = ROOT / name
        if name in SKIPPED or path.suffix not in (".py", ".md", ".ipynb", ".toml") or not path.is_file():
            continue
        text = path.read_text()
        if path.suffix == ".ipynb":
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        found.append((name, text))
    return found


@pytest.mark.parametrize("pattern", OLD)
def test_an_old_word_is_gone(pattern):
    found = [
        f"{name}: ...{text[max(0, match.start() - 30) : match.end() + 30]!r}"
        for name, text in texts()
        for match in re.finditer(pattern, text)
    ]
    assert not found, "\n".join(found)
