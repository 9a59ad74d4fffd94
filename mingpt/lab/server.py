"""The lab page of a run on this machine, with curves that grow while the run is trained."""

from __future__ import annotations

import http.server
import json
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mingpt.lab.report import page, run_curves, run_data
from mingpt.storage.checkpoint import json_checksum


class LabServer(http.server.ThreadingHTTPServer):
    """Serves one run to this machine's browser, at an address that no other page can guess.

    It listens on 127.0.0.1 only. Every path begins with a random token, and a request must name this address as its
    host, so that a foreign name that is made to point here gets nothing.

    Attributes:
        url: what to open.
    """

    daemon_threads = True

    def __init__(
        self,
        run: str | Path,
        studies: Iterable[str | Path] = (),
        port: int = 0,
        analyses: Iterable[str | Path] = (),
    ):
        """Listen, on any free port by default; ``serve_forever`` then answers.

        Args:
            run: the folder; the page has what is in it when it is asked for.
            studies, analyses: see ``mingpt.lab.report.write_report``.
            port: of 127.0.0.1.

        Raises:
            OSError: if the port is taken.
        """
        super().__init__(("127.0.0.1", port), _Handler)
        self.run, self.studies, self.analyses = Path(run), list(studies), list(analyses)
        self.token = secrets.token_urlsafe(16)
        self.host = f"127.0.0.1:{self.server_address[1]}"
        self.url = f"http://{self.host}/{self.token}/"
        self._pages: dict[str, bytes] = {}  # by what the run's files looked like

    def page(self) -> bytes:
        """The page of the run as it is now; one that is not yet trained has curves only."""
        names = ("model.safetensors", "results.json", "*prefixes/*.safetensors")
        files = {str(path): path.stat().st_mtime for name in names for path in self.run.glob(name)}
        key = json_checksum(files)
        if key not in self._pages:
            text = page(run_data(self.run, self.studies, self.analyses) | {"live": "curves.json"})
            self._pages = {key: text.encode()}
        return self._pages[key]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: LabServer

    def do_GET(self) -> None:
        if self.headers.get("Host") != self.server.host:
            self.send_error(403)
            return
        _, token, *rest = self.path.split("?")[0].split("/")
        is_known = secrets.compare_digest(token.encode(), self.server.token.encode())
        if not is_known or rest not in ([""], ["curves.json"]):
            self.send_error(404)
            return
        try:
            if rest == [""]:
                content, kind = self.server.page(), "text/html; charset=utf-8"
            else:
                content, kind = json.dumps(run_curves(self.server.run)).encode(), "application/json"
        except (OSError, ValueError) as error:  # such as a file that is being replaced
            self.send_error(503, explain=str(error))
            return
        self.send_response(200)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Log nothing: the address has the token."""
