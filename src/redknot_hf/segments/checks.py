"""Checksums that are computed while a prompt is being built from what they guard.

Reading and hashing gigabytes takes about as long as the forward of a GPU does. So entries are used as soon as they are
there, several threads hash their bytes meanwhile, and a prompt is handed out only when every checksum has matched. If
one has not, the prompt is built again without that entry.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from .codec import CorruptEntry, SegmentEntry
from .keys import SegmentKey
from .transfer import Upload

__all__ = ["Checks"]

WORKERS = 16


class Checks:
    """The checksums of one build. Use as a context, which ends threads and uploads.

    Attributes:
        distrusted: keys (hex) whose entries have failed: not to be read again in this build.
    """

    def __init__(self) -> None:
        self.distrusted: set[str] = set()
        self._pool: ThreadPoolExecutor | None = None
        self._uploads: list[Upload] = []
        self._running: list[tuple[SegmentKey, str, Future[None]]] = []

    def start(self, entries: Sequence[tuple[SegmentKey, SegmentEntry]], upload: Upload) -> None:
        """Hash what has not been hashed; what goes to a GPU is hashed on its way."""
        self._uploads.append(upload)
        for (key, entry), verdict in zip(entries, upload.verdicts, strict=True):
            if entry.check is not None and verdict is None:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(max(1, min(WORKERS, os.cpu_count() or 1)))
                verdict = self._pool.submit(entry.check)
            if verdict is not None:
                self._running.append((key, entry.tier, verdict))

    def wait(self) -> None:
        """Until all are done, whatever they find."""
        for _, _, future in self._running:
            future.exception()

    def failures(self) -> list[tuple[SegmentKey, str, CorruptEntry]]:
        """(key, tier, error) of the entries that are damaged; they are distrusted from now on."""
        found = []
        for key, tier, future in self._running:
            error = future.exception()
            if isinstance(error, CorruptEntry):
                found.append((key, tier, error))
                self.distrusted.add(key.hex)
            elif error is not None:
                raise error
        for upload in self._uploads:  # all of it is hashed
            upload.close()
        self._uploads, self._running = [], []
        return found

    def __enter__(self) -> Checks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for upload in self._uploads:
            upload.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
