"""The lab: a run's model and prefixes in one page that a reader can touch.

``report`` makes the page, and the one of ``mingpt analyze``. ``server`` shows it while a run is trained, ``widget`` has
it in a notebook (it needs the extra ``widget``, so it is not imported here). ``static`` has the pages' source: plain ES
modules, and one loop in WebAssembly.
"""

from mingpt.lab.report import write_analysis, write_report
from mingpt.lab.server import LabServer

__all__ = ["LabServer", "write_analysis", "write_report"]
