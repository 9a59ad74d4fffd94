"""The lab as a widget in a notebook; needs the extra ``widget``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anywidget
import traitlets
from torch import Tensor

from mingpt.lab.report import STATIC, model_data, pack, script
from mingpt.model import GPT
from mingpt.prefix import Prefix, as_prefix

_RENDER = """
export default {
  async render({ model, el }) {
    const view = model.get("tensors");
    const buffer = view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);
    mount(el, await Lab.load(model.get("header"), buffer, decodeBase64(KERNELS)));
  },
};
"""


class Lab(anywidget.AnyWidget):
    """Ask, mix and look at prefixes of a model beside a notebook's figures; it computes in the browser.

    ``Lab(model, {"SortAscending": prefix}, data)`` as a cell's last line shows it.
    """

    _esm = script() + _RENDER
    _css = (STATIC / "style.css").read_text(encoding="utf-8")
    header = traitlets.Dict().tag(sync=True)
    tensors = traitlets.Bytes().tag(sync=True)

    def __init__(self, model: GPT, prefixes: Mapping[str, Tensor | Prefix], data: Mapping[str, Any], n_rows: int = 50):
        """Copy the model and the prefixes as they are now.

        Args:
            model: on any device.
            prefixes: by name, one prefix each; the name of a task gives it a right answer.
            data: of the model, from ``CustomDataset.describe()``; the tasks that are in it have rows.
            n_rows: test rows of each task.

        Raises:
            ValueError: if a prefix does not fit the model.
        """
        own: dict[str, dict[str, Prefix]] = {}
        for name, each in prefixes.items():
            prefix = as_prefix(each, model, 1)
            own.setdefault(prefix.kind, {})[name] = prefix
        about = {"run": "a model of this notebook", "command": "", "versions": {}, "config": {}, "results": None}
        nothing = {"about": about, "curves": {"pretraining": [], "prefixes": {}}, "studies": {}}
        header, tensors = pack(nothing | model_data(model, own, data, n_rows))
        super().__init__(header=header, tensors=tensors)
