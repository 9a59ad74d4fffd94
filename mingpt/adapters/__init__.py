"""Methods that fit a frozen model to a task: each is an ``Adapter``, and trains in a batch with others of its kind.

``adapter`` has the interface, ``methods`` all methods by name; ``prefixes`` train what the content attends to, ``lora``
changes linear layers, and ``others`` what flows between them.
"""

from mingpt.adapters.adapter import Adapter, size_for
from mingpt.adapters.lora import LoRA
from mingpt.adapters.methods import METHODS
from mingpt.adapters.prefixes import PrefixAdapter, Reparametrization

__all__ = ["METHODS", "Adapter", "LoRA", "PrefixAdapter", "Reparametrization", "size_for"]
