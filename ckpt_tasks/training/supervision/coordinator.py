"""What the supervisors of one attempt tell one another, where torchrun starts each rank by itself.

Each is connected to rank 0's, the coordinator, for as long as it lives. So a rank's end is known
at once on all machines, with its reason, also where nobody is left in it to say so: whoever
supervised a trainer tells how it ended, and a supervisor whose connection closes is gone itself.
And all end with one outcome: torchrun starts ranks again together or not at all.

torchrun's agents keep a store of messages over their restarts, and their count of restarts differs
between machines. Neither tells one generation of ranks from the one before; being accepted by a
coordinator does.

Messages are JSON, one on a line. The coordinator looks at its connections when it is asked to:
there is no thread.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import time
from collections.abc import Iterator

import msgspec

from ckpt_tasks.training.spec import AttemptFolder, Leader, RankPlace, TrainOutcome
from ckpt_tasks.types import EXIT_FAILED

__all__ = ["Coordinator", "Ended", "Member"]

_MAX_LINE_BYTES = 64 * 1024
_MAX_STRANGERS = 1000
"""Connections that have not said who they are; more than ranks that join at once."""
_SEND_SECONDS = 5.0
_CONNECT_SECONDS = 2.0
_RETRY_SECONDS = 0.5
_SILENT_SECONDS = 20  # after which a connection is probed
_PROBE_SECONDS, _PROBES = 10, 4


class _Join(msgspec.Struct, frozen=True, tag=True):
    """A rank's first word."""

    generation: str
    rank: int


class _Accepted(msgspec.Struct, frozen=True, tag=True):
    pass


class _Refused(msgspec.Struct, frozen=True, tag=True):
    """Followed by the end of the connection."""


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A rank's trainer has ended.

    Parameters
    ----------
    returncode
        As `subprocess.Popen.returncode`: negative for a signal.
    outcome
        What it said itself, if it could.
    """

    returncode: int
    outcome: TrainOutcome | None = None


class _Over(msgspec.Struct, frozen=True, tag=True):
    """Nothing of the rank runs any more: no part of a save will come."""


class _Failed(msgspec.Struct, frozen=True, tag=True):
    """To the others: this rank has failed."""

    rank: int


class _Final(msgspec.Struct, frozen=True, tag=True):
    """To the others: how the attempt has ended."""

    outcome: TrainOutcome


_Word = _Join | _Accepted | _Refused | Ended | _Over | _Failed | _Final


class _Connection:
    """Words over a socket; `is_lost` once the other end is gone, or has said what is no word."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.is_lost = False
        self._received = b""
        channel.setblocking(False)
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine without power closes nothing.
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_KEEPIDLE, _SILENT_SECONDS),
            (socket.TCP_KEEPINTVL, _PROBE_SECONDS),
            (socket.TCP_KEEPCNT, _PROBES),
        ):
            channel.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, word: _Word) -> None:
        self.channel.settimeout(_SEND_SECONDS)
        try:
            self.channel.sendall(msgspec.json.encode(word) + b"\n")
        except OSError:
            self.is_lost = True
        self.channel.setblocking(False)

    def read(self) -> Iterator[_Word]:
        """What has come; returns at once."""
        while not self.is_lost and self._receive():
            *lines, self._received = self._received.split(b"\n")
            try:
                for line in lines:
                    yield msgspec.json.decode(line, type=_Word)
            except (msgspec.DecodeError, RecursionError):  # the latter: nested without end
                self.is_lost = True
            if len(self._received) > _MAX_LINE_BYTES:
                self.is_lost = True

    def _receive(self) -> bool:
        try:
            data = self.channel.recv(_MAX_LINE_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self._received += data
        self.is_lost = not data
        return bool(data)

    def close(self) -> None:
        self.channel.close()


class Coordinator:
    """Rank 0's side.

    Parameters
    ----------
    place
        Rank 0's.
    run
        Name of what is trained.
    """

    def __init__(self, place: RankPlace, run: str) -> None:
        self._run = run
        self._ranks = place.ranks
        self._server = _listen(place)
        self._server.setblocking(False)
        self.leader = Leader(
            # By its name, a machine may not be reached from itself.
            host="127.0.0.1" if place.one_machine else place.host,
            port=self._server.getsockname()[1],
            generation=secrets.token_hex(16),
        )
        """What the other ranks' trainers are told, wherever they look for it."""
        self.ends: dict[int, Ended] = {}
        """Of the ranks whose trainers have ended, in that order."""
        self._over: set[int] = set()
        self._members: dict[int, _Connection] = {}
        self._strangers: list[_Connection] = []
        self._refuses = False

    @property
    def running(self) -> list[int]:
        """The ranks that have joined, and not ended."""
        return [rank for rank in self._members if rank not in self.ends]

    @property
    def all_are_over(self) -> bool:
        """Of no rank that has joined, anything runs any more."""
        return self._over.issuperset(self._members)

    def look(self) -> None:
        """Take note of what has come; to be called again and again."""
        # Nobody waits; or who did has gone, or this process has no descriptor left for now.
        with contextlib.suppress(OSError):
            while True:
                channel, _ = self._server.accept()
                self._strangers.append(_Connection(channel))
                if len(self._strangers) > _MAX_STRANGERS:
                    self._strangers.pop(0).close()
        for stranger in list(self._strangers):
            self._meet(stranger)
        for rank, member in self._members.items():
            for word in member.read():
                self._note(rank, word)
            if member.is_lost:
                self._over.add(rank)
                self._lose(rank, "the process that supervises it, or its machine, is gone")

    def refuse(self) -> None:
        """Let nobody join any more: this generation ends."""
        self._refuses = True

    def give_up(self) -> None:
        """Wait for no rank any more."""
        for rank in self.running:
            self._lose(rank, "its end was not told in time")

    def tell_failed(self, rank: int) -> None:
        self._tell_all(_Failed(rank))

    def tell_final(self, outcome: TrainOutcome) -> None:
        self._tell_all(_Final(outcome))

    def close(self) -> None:
        for connection in (*self._strangers, *self._members.values()):
            connection.close()
        self._server.close()

    def _tell_all(self, word: _Word) -> None:
        for member in self._members.values():
            member.send(word)

    def _meet(self, stranger: _Connection) -> None:
        for word in stranger.read():
            self._strangers.remove(stranger)
            if isinstance(word, _Join) and self._accepts(word):
                self._members[word.rank] = stranger
                stranger.send(_Accepted())
            else:
                stranger.send(_Refused())
                stranger.close()
            return
        if stranger.is_lost:
            self._strangers.remove(stranger)
            stranger.close()

    def _accepts(self, word: _Join) -> bool:
        # As bytes: of texts, it takes ASCII only, and raises for a stranger's others.
        known = hmac.compare_digest(word.generation.encode(), self.leader.generation.encode())
        missing = 0 < word.rank < self._ranks and word.rank not in self._members
        return known and missing and not self._refuses

    def _note(self, rank: int, word: _Word) -> None:
        if isinstance(word, Ended):
            self.ends.setdefault(rank, word)
        elif isinstance(word, _Over):
            self._over.add(rank)

    def _lose(self, rank: int, why: str) -> None:
        if rank not in self.ends:
            lost = TrainOutcome(code=EXIT_FAILED, message=why, run=self._run)
            self.ends[rank] = Ended(EXIT_FAILED, lost)


class Member:
    """Any other rank's side.

    Parameters
    ----------
    folder
        In which the trainer says where it has found the coordinator, and is told that this has
        accepted.
    """

    def __init__(self, folder: AttemptFolder, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self._leader: Leader | None = None
        self._connection: _Connection | None = None
        self._retry_at = 0.0
        self.has_joined = False
        self.is_lost = False
        """The coordinator is gone; perhaps after it has told the final outcome."""
        self.failed: int | None = None
        """A rank that has failed, once it is told of one."""
        self.final: TrainOutcome | None = None
        """How the attempt has ended, once that is told."""

    def look(self) -> None:
        """Take note of what has come; to be called again and again."""
        if not self.has_joined:
            self._join()
        if self._connection is None:
            return
        for word in self._connection.read():
            self._note(word)
        if self._connection.is_lost:
            self._leave()

    def tell_ended(self, end: Ended) -> None:
        self._tell(end)

    def tell_over(self) -> None:
        self._tell(_Over())

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _join(self) -> None:
        """Knock where the trainer has found a coordinator, until one of them accepts."""
        found = self._folder.read_leader(self._folder.leader)
        if found is not None and found != self._leader:
            self._leader, self._retry_at = found, 0.0
            self.close()
            self._connection = None
        if self._leader is None or self._connection or time.monotonic() < self._retry_at:
            return
        self._retry_at = time.monotonic() + _RETRY_SECONDS
        address = self._leader.host, self._leader.port
        with contextlib.suppress(OSError):  # one that is gone, or not reached from here
            self._connection = _Connection(socket.create_connection(address, _CONNECT_SECONDS))
            self._connection.send(_Join(self._leader.generation, self._rank))

    def _note(self, word: _Word) -> None:
        if isinstance(word, _Accepted) and self._leader is not None:
            self.has_joined = True
            self._folder.write_leader(self._leader, self._folder.joined)
        elif isinstance(word, _Failed):
            self.failed = word.rank
        elif isinstance(word, _Final):
            self.final = word.outcome

    def _leave(self) -> None:
        self.close()
        self._connection = None
        self.is_lost = self.has_joined

    def _tell(self, word: _Word) -> None:
        if self.has_joined and self._connection is not None:
            self._connection.send(word)


def _listen(place: RankPlace) -> socket.socket:
    """On all of the machine's addresses, as the store of messages, where others are to reach it."""
    if place.one_machine:
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))
