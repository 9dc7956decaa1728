"""Replies of a Valkey server are received in place, however they are cut, and nothing of a broken answer is left over."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from redknot_hf.segments.stores.valkey_bulk import read_values

exceptions = pytest.importorskip("valkey.exceptions")


class Client:
    """A client with one connection, whose server answers `reply` in pieces of `step` bytes, then hangs up."""

    def __init__(self, reply: bytes, step: int = 1 << 20):
        self._sock, self.server = socket.socketpair()
        self._sock.settimeout(10)
        self.connection_pool, self.events, self.sent = self, [], []
        thread = threading.Thread(target=self._answer, args=(reply, step), daemon=True)
        thread.start()

    def _answer(self, reply: bytes, step: int) -> None:
        for i in range(0, len(reply), step):
            self.server.sendall(reply[i : i + step])
        self.server.shutdown(socket.SHUT_WR)

    def get_connection(self, name: str) -> Client:
        return self

    def pack_commands(self, commands: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return commands

    def send_packed_command(self, commands: list[tuple[str, str]]) -> None:
        self.sent = commands

    def disconnect(self) -> None:
        self.events.append("disconnect")

    def release(self, connection: Any) -> None:
        self.events.append("release")


def bulk(*values: bytes | None) -> bytes:
    return b"".join(b"$-1\r\n" if v is None else b"$%d\r\n%s\r\n" % (len(v), v) for v in values)


@pytest.mark.parametrize("step", [1, 3, 7, 64, 1 << 20])
def test_values_come_whole_however_they_are_cut(step):
    values = [b"\r\n$3\r\n", b"x" * 200, b"", b"\x00\r\n" * 50]
    client = Client(bulk(*values), step)
    found = read_values(client, [["a", "b"], ["c"], ["d"]], [6 + 200, 0, 150])
    assert [bytes(value) for value in found] == [values[0] + values[1], b"", values[3]]
    assert not found[0].readonly
    assert client.sent == [("GET", name) for name in "abcd"]
    assert client.events == ["release"]


@pytest.mark.parametrize("answer", [(b"123", None), (b"123", b"4"), (b"123", b"45678")])
def test_a_group_that_has_changed_is_none_and_the_next_is_right(answer):
    client = Client(bulk(*answer, b"next"))
    assert [v and bytes(v) for v in read_values(client, [["a", "b"], ["c"]], [5, 4])] == [None, b"next"]
    assert client.events == ["release"]


@pytest.mark.parametrize(
    "reply",
    [b"$4\r\n12", b"$4\r\n1234", b"$4\r\n1234xy", b":5\r\n", b"$x\r\n", b"$-7\r\n", b"", b"$99999999999999\r\n",
     b"$" + b"9" * 5000 + b"\r\n", b"HTTP/1.1 200 OK" * 20000],
)  # fmt: skip
def test_a_broken_answer_costs_the_connection(reply):
    client = Client(reply)
    with pytest.raises(ConnectionError):
        read_values(client, [["a"]], [4])
    assert client.events == ["disconnect", "release"]


def test_an_error_is_raised_after_the_other_replies_are_read():
    client = Client(b"-WRONGTYPE not a string\r\n" + bulk(b"12"))
    with pytest.raises(exceptions.ResponseError, match="WRONGTYPE"):
        read_values(client, [["a"], ["b"]], [3, 2])
    assert client.events == ["release"]
