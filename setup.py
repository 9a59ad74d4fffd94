"""Packaging of the sandbox; the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
version = re.search(r'__version__ = "(.*)"', (HERE / "mingpt" / "__init__.py").read_text())

setup(
    name="mingpt-prefix-tuning",
    version=version.group(1),
    description="What can a prefix make a frozen transformer do? A minGPT sandbox for prefix-tuning research",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["mingpt", "mingpt.*"]),
    package_data={"mingpt": ["py.typed"], "mingpt.experiments": ["presets.toml"], "mingpt.lab": ["static/*"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.10",
        "numpy>=1.26",
        "pandas>=2.2",
        "safetensors>=0.4",
        "matplotlib>=3.8",
        "seaborn>=0.13",
        "click>=8.1",
        "automata-lib>=9",
        "tqdm>=4.66",
    ],
    extras_require={
        "hf": ["transformers>=4.57", "peft>=0.14"],
        "grammar": ["llguidance>=1.3"],
        "slurm": ["submitit>=1.5"],
        "widget": ["anywidget>=0.9"],
        "notebooks": ["jupyterlab>=4"],
        "docs": [
            "sphinx>=8.2",
            "myst-nb>=1.2",
            "furo>=2024.8",
            "sphinx-click>=6",
            "sphinx-copybutton>=0.5",
            "latex2mathml>=3.77",
        ],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "pyright>=1.1.390",
            "pre-commit>=4",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "ipykernel>=6.29",
            "playwright>=1.48",
            "axe-playwright-python>=0.1.4",
            "wasmtime>=25",
        ],
    },
    entry_points={"console_scripts": ["mingpt = mingpt.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
