"""How much memory of its own does this process take? Anonymous pages: mapped files, which the system may drop, are left out.

Linux tells it (/proc/self/status, RssAnon), asked a hundred times a second; elsewhere nothing is said.
"""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

STATUS = Path("/proc/self/status")


class Private:
    """with Private() as memory: …; memory.rise is then the highest rise in bytes, or None."""

    rise: int | None = None

    def __enter__(self) -> Self:
        self._done = threading.Event()
        self._before = anonymous()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._before is not None:
            self.rise = 0
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            now = anonymous()
            if now is not None and self._before is not None:
                self.rise = max(self.rise or 0, now - self._before)


def anonymous() -> int | None:
    """Bytes of anonymous memory of this process, or None."""
    if not STATUS.exists():
        return None
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)
