"""Deleting in the background: what was renamed away takes no part in anything, and may take minutes to delete."""

import logging
import queue
import threading
import time
from pathlib import Path

from forgather_ckpt.pruning import delete_trash

logger = logging.getLogger(__name__)


class Deleter:
    """Deletes what it is given, in order, on a thread of its own, which ends with the process.

    What is left then is trash that the next job of the run directory deletes.
    """

    def __init__(self) -> None:
        self._waiting: queue.Queue[Path | None] = queue.Queue()
        self._known: set[Path] = set()
        self._thread: threading.Thread | None = None

    def delete(self, trash: Path) -> None:
        """Delete it, sooner or later. A failure is logged, and it may be given again."""
        if trash in self._known:
            return
        self._known.add(trash)
        self._waiting.put(trash)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="forgather_ckpt deleter", daemon=True)
            self._thread.start()

    def close(self, timeout_seconds: float) -> None:
        """Wait until all is deleted, but no longer than that. A second call does nothing."""
        if self._thread is None:
            return
        self._waiting.put(None)
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            logger.warning(
                "old checkpoints were not all deleted in %g s; the next job deletes the rest", timeout_seconds
            )
        self._thread = None

    def _work(self) -> None:
        while (trash := self._waiting.get()) is not None:
            started = time.monotonic()
            delete_trash(trash)
            self._known.discard(trash)
            logger.debug("deleted %s in %.1f s", trash, time.monotonic() - started)
