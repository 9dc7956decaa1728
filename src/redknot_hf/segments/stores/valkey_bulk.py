"""Large values from a Valkey server straight into their place.

A client library hands out each value as a bytes object, which it has put together from 64 KB pieces: three copies
before the value can be joined with others, and most of the time of a large read. Here the requests go out over a
connection of the client, and the replies are received into one buffer.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["read_values"]

LARGEST_VALUE = 512 << 20  # a server has none above
LONGEST_LINE = 1 << 16
READ_AHEAD = 64  # bytes read for a reply's first line; what follows the line belongs to the value


def read_values(client: Any, names: Sequence[Sequence[str]], sizes: Sequence[int]) -> list[memoryview | None]:
    """The values of each group of names, end to end.

    Args:
        client: a `valkey.Valkey`.
        names: groups of names.
        sizes: bytes of each group together, as the server has just said.

    Returns:
        A writable buffer per group; None for a group whose values are gone or have other sizes by now.

    Raises:
        OSError: the server does not answer, or hangs up.
        valkey.exceptions.ValkeyError: it answers with an error.
    """
    if not names:
        return []
    pool = client.connection_pool
    connection = pool.get_connection("GET")
    whole = False
    try:
        connection.send_packed_command(connection.pack_commands([("GET", name) for group in names for name in group]))
        replies = _Replies(connection._sock)
        found = [replies.group(len(group), size) for group, size in zip(names, sizes, strict=True)]
        whole = not replies.ahead
        if replies.error is not None:
            from valkey.exceptions import ResponseError

            raise ResponseError(replies.error)
        return found
    finally:
        if not whole:  # replies are left over that nobody will read
            connection.disconnect()
        pool.release(connection)


class _Replies:
    """Reads bulk strings from a socket.

    Attributes:
        ahead: received and not yet used.
        error: the first error among the replies.
    """

    def __init__(self, sock: socket.socket):
        self.sock, self.ahead = sock, b""
        self.error: str | None = None

    def group(self, count: int, size: int) -> memoryview | None:
        buffer, at, complete = np.empty(size, np.uint8).data, 0, True
        for _ in range(count):
            length = self._length()
            if length is None:
                complete = False
            elif at + length > size:
                complete = False
                self._receive(memoryview(bytearray(length)))
                self._end()
            else:
                self._receive(buffer[at : at + length])
                self._end()
                at += length
        return buffer if complete and at == size else None

    def _length(self) -> int | None:
        """Of the next value; None if there is none."""
        while b"\r\n" not in self.ahead:
            if len(self.ahead) > LONGEST_LINE:
                raise ConnectionError(f"a reply of the server does not begin: {self.ahead[:40]!r}")
            self._more(READ_AHEAD)
        line, self.ahead = self.ahead.split(b"\r\n", 1)
        if line[:1] == b"-":
            self.error = self.error or line[1:].decode(errors="replace")
            return None
        if line[:1] == b"_" or line == b"$-1":
            return None
        if line[:1] != b"$" or not line[1:].isdigit():
            raise ConnectionError(f"unexpected reply of the server: {line[:40]!r}")
        if len(line) > 12 or int(line[1:]) > LARGEST_VALUE:  # memory is taken for no such promise
            raise ConnectionError(f"the server announces an impossible value: {line[:40]!r}")
        return int(line[1:])

    def _receive(self, into: memoryview) -> None:
        known = min(len(self.ahead), into.nbytes)
        into[:known] = self.ahead[:known]
        self.ahead = self.ahead[known:]
        while known < into.nbytes:
            count = self.sock.recv_into(into[known:])
            if not count:
                raise ConnectionError("the server has closed the connection")
            known += count

    def _end(self) -> None:
        while len(self.ahead) < 2:
            self._more(2 - len(self.ahead))
        if self.ahead[:2] != b"\r\n":
            raise ConnectionError("a reply of the server does not end where it said")
        self.ahead = self.ahead[2:]

    def _more(self, size: int) -> None:
        received = self.sock.recv(size)
        if not received:
            raise ConnectionError("the server has closed the connection")
        self.ahead += received
