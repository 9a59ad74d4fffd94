"""A small laboratory for prefix-tuning: what can a prefix teach a frozen transformer?"""

__version__ = "0.1.0"
