"""Run every notebook from top to bottom; in place, or with PRESET=smoke in a scratch folder that is thrown away."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def run(notebook: Path, folder: Path) -> None:
    """Execute one notebook in ``folder``, and write its outputs to where it is."""
    content = nbformat.read(notebook, as_version=4)
    NotebookClient(content, timeout=3600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    for cell in content.cells:
        cell.metadata.pop("execution", None)  # times of day, which only make differences
    nbformat.write(content, notebook)


def main() -> None:
    """Run the notebooks named on the command line, or all of them."""
    preset = os.environ.setdefault("PRESET", "laptop")
    notebooks = [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = HERE
        if preset == "smoke":
            folder = Path(scratch) / "notebooks"
            folder.mkdir()
            notebooks = [Path(shutil.copy(notebook, folder)) for notebook in notebooks]
        for notebook in notebooks:
            print(f"{notebook.name} ({preset})", flush=True)
            run(notebook, folder)


if __name__ == "__main__":
    main()
