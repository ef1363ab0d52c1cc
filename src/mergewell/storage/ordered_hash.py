"""OrderedHash: the hash of a file whose pieces are written in any order by many threads."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from mergewell.errors import MergewellError
from mergewell.storage.manifest import Algorithm, new_hasher

_CHUNK = 1 << 20


class OrderedHash:
    """Hashes pieces as they come while they come in order; late ones are read back in turn.

    The hash can only get past a byte that was announced, so `position` also proves coverage: it
    reaches the end of the file if and only if every byte was written exactly once.
    """

    def __init__(self, algorithm: Algorithm, read_back: Callable[[int, int], bytes]) -> None:
        """Start at byte 0; `read_back(count, offset)` returns what was written there."""
        self._algorithm: Algorithm = algorithm
        self._hasher = new_hasher(algorithm)
        self._read_back = read_back
        self._lock = Lock()
        self._busy = False
        self._waiting: dict[int, int] = {}
        self.position = 0

    def add(self, offset: int, content: memoryview) -> None:
        """Take in a piece that stands in the file already.

        Raises:
            MergewellError: the piece, or its begin, was added before.
        """
        with self._lock:
            if offset < self.position or offset in self._waiting:
                raise MergewellError(f"Byte {offset} was written twice.")
            if self._busy or offset > self.position:
                self._waiting[offset] = len(content)
                return
            self._busy = True
            self.position += len(content)
        self._hasher.update(content)
        while piece := self._next_waiting():
            self._update_from_file(*piece)

    def value(self) -> str:
        """Return the hash of all bytes before `position`, as "algorithm:hexadecimal"."""
        return f"{self._algorithm}:{self._hasher.hexdigest()}"

    def _next_waiting(self) -> tuple[int, int] | None:
        with self._lock:
            length = self._waiting.pop(self.position, None)
            if length is None:
                self._busy = False
                return None
            offset = self.position
            self.position += length
            return offset, length

    def _update_from_file(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            chunk = self._read_back(min(_CHUNK, end - offset), offset)
            if not chunk:
                raise OSError(f"byte {offset} cannot be read back")
            self._hasher.update(chunk)
            offset += len(chunk)
