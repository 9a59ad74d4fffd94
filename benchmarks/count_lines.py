"""Count the code lines of the package, of each file and in all: lines that are neither blank, comment nor docstring.

python benchmarks/count_lines.py [FOLDER]
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "mingpt"
NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


def n_code_lines(source: str) -> int:
    """How many lines of a module have code; a string that is a statement of its own counts as a docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def main() -> None:
    """Print a line for each file, and the sum."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE
    counts = {path: n_code_lines(path.read_text()) for path in sorted(folder.rglob("*.py"))}
    for path, count in counts.items():
        print(f"{count:6,} {path.relative_to(folder.parent)}")
    print(f"{sum(counts.values()):6,} in all")


if __name__ == "__main__":
    main()
