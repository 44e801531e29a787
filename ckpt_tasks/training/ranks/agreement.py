"""Agreement of ranks on what to save, with nothing but a store of torch.distributed between them.

No collective, and nothing in the training's way: a rank's boundary compares two numbers, while
its threads talk to one another through the store (a ``TCPStore``, served by rank 0 or by whoever
started the ranks).

**Between steps.** Any rank may ask for a save (a signal came, time is up). Rank 0 proposes a step
that lies beyond all that it knows to be done. Each rank answers: it will not pass that step until
it knows more, or it has passed it already and is so far. If all will wait, rank 0 says so, and
that step is saved by all. Else it says that too, and proposes one farther on. A rank that comes
to the proposed step before the verdict waits there, for as long as two messages take; longer than
`seconds` it never waits.

**At an epoch's end, and at the end of training,** all ranks come to the same place by themselves,
and rank 0 decides there for all: `meet`.

**Numbers.** Saves of an attempt are numbered in the order of their places, alike on all ranks. A
rank that missed one is told the number with the next.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import queue
import secrets
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ckpt_tasks.errors import StoreError
from ckpt_tasks.training.ranks.letters import (
    AgreedSave,
    Answer,
    Closed,
    Due,
    Letter,
    Proposal,
    Request,
    Verdict,
)
from ckpt_tasks.training.ranks.messages import RankMessages
from ckpt_tasks.types import SaveDecision

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["RankAgreement"]

_ALWAYS = 7 * 24 * 3600.0  # seconds; whoever waits so long is woken by a message
_FAREWELL_SECONDS = 5.0
_LARGEST_MARGIN = 1 << 20  # steps


class RankAgreement:
    """One rank's side of it. Every rank of an attempt makes one, on the same store.

    Parameters
    ----------
    store
        Of torch.distributed, reached by all ranks (see `rank_messages.connect_ranks`). Each
        thread works on a clone of its own.
    rank, world_size
        Of this process.
    attempt
        Number of the attempt: keys of another one on the same store do not matter.
    seconds
        The longest that this rank waits for another one. Longer than ranks run apart.
    on_failure
        Called on rank 0, in a thread, with a save's number and why it will not be whole.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        attempt: int = 1,
        seconds: float = 120.0,
        on_failure: Callable[[int, str], None] = lambda number, why: None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._messages = RankMessages(store, f"ckpt_tasks/{attempt}/")
        self._seconds = seconds
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._step = 0
        self._held = math.inf  # the first step that may need a word with the others
        self._proposed: Proposal | None = None
        self._due: deque[Due] = deque()
        self._ended = False
        self._last = 0
        self._fresh = False
        self._read = 0  # number of the letter that is waited for
        self._wishes: queue.SimpleQueue[Request] = queue.SimpleQueue()
        tasks = [self._send_wishes, self._read_inbox, *([self._decide] if rank == 0 else [])]
        self._threads = [
            threading.Thread(
                target=self._until_closed,
                args=(task, self._messages.clone()),
                name=f"ranks{task.__name__}",
                daemon=True,
            )
            for task in tasks
        ]
        for thread in self._threads:
            thread.start()

    # -- what training calls ------------------------------------------------------------------

    def at_step(self, step: int) -> AgreedSave | None:
        """`step` is done, and the next one not begun: the save that is agreed for here.

        Costs next to nothing, unless a save is near.
        """
        self._step = step
        return None if step < self._held else self._settle(step)

    def ask(self, decision: SaveDecision, *, step: int | None = None) -> None:
        """Ask for a save by all, soon, or at a `step` that lies ahead. Returns at once.

        May be called by any rank, from any thread, or by a signal's handler. A step that some
        rank has passed by the time it is proposed is dropped.
        """
        request = Request(self.rank, decision.trigger, decision.reason, step)
        self._wishes.put(request)

    def meet(
        self, place: str, decision: SaveDecision | None, *, last: bool = False
    ) -> AgreedSave | None:
        """Every rank is at this place, or will be: what rank 0 decides there.

        Parameters
        ----------
        place
            Its name, which no other place of the attempt has.
        decision
            Counts on rank 0.
        last
            No step follows.

        Raises
        ------
        StoreError
            Rank 0 has not come to the place in time.
        """
        if last:
            self._end()
        key = f"meet/{place}"
        if self.rank == 0:
            save = None
            if decision is not None:
                with self._changed:
                    save = self._numbered(decision)
            self._messages.put(key, Verdict(save))
        else:
            verdict = self._messages.get(key, Verdict, seconds=self._seconds)
            if verdict is None:
                raise StoreError(
                    f"rank {self.rank} has waited {self._seconds:.0f} s at {place} for rank 0"
                )
            save = verdict.save
        if save is not None:
            with self._changed:
                self._last = save.number
        return save

    def tell_failure(self, number: int, why: str) -> None:
        """Save `number` will lack this rank's part: nobody need wait for it. Returns at once."""
        self._wishes.put(Request(self.rank, reason=why, failed=number))

    def plan_anew(self) -> None:
        """At a later save all ranks plan anew what they share. Returns at once."""
        if self.rank == 0:
            with self._changed:
                self._fresh = True
        else:
            self._wishes.put(Request(self.rank, anew=True))

    def tell_all(
        self, topic: str, message: bytes, *, seconds: float | None = None
    ) -> list[bytes] | None:
        """Every rank's message about a topic that has not been talked of before, by rank.

        ``None`` where one did not come in `seconds`; default: those of the agreement.
        """
        keys = [f"{topic}/{rank}" for rank in range(self.world_size)]
        self._messages.put_bytes(keys[self.rank], message)
        return self._messages.get_all(keys, seconds=self._seconds if seconds is None else seconds)

    def from_rank_0(
        self, topic: str, message: bytes = b"", *, seconds: float | None = None
    ) -> bytes:
        """What rank 0 says about a topic that has not been talked of before.

        Parameters
        ----------
        message
            Counts on rank 0.
        seconds
            How long to wait for it; default: those of the agreement.

        Raises
        ------
        StoreError
            It did not come in time.
        """
        if self.rank == 0:
            self._messages.put_bytes(topic, message)
            return message
        seconds = self._seconds if seconds is None else seconds
        found = self._messages.get_all([topic], seconds=seconds)
        if found is None:
            raise StoreError(
                f"rank {self.rank} has waited {seconds:.0f} s for rank 0's word on {topic}"
            )
        return found[0]

    def nonce(self) -> str:
        """A text for names of writes, the same on all ranks and in no other start of them.

        Raises `StoreError` where rank 0 has not given one in time.
        """
        return self.from_rank_0("nonce", secrets.token_hex(6).encode("ascii")).decode("ascii")

    def close(self) -> None:
        """End the threads. Rank 0, which may serve the store, does so after the others."""
        self._closed.set()
        self._wishes.put(Request(self.rank, closes=True))
        with contextlib.suppress(StoreError):  # then nobody waits for a letter either
            self._messages.put(f"inbox/{self.rank}/{self._read}", Closed())
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(StoreError):
            self._messages.put(f"closed/{self.rank}", Closed())
            if self.rank == 0:
                keys = [f"closed/{rank}" for rank in range(self.world_size)]
                self._messages.get_all(keys, seconds=_FAREWELL_SECONDS)

    # -- at a boundary --------------------------------------------------------------------------

    def _settle(self, step: int) -> AgreedSave | None:
        """Something may be due at `step`: wait until it is known, and say what."""
        with self._changed:
            while step >= self._held:
                if self._due and step >= self._due[0].step:
                    due = self._due.popleft()
                    self._hold()
                    if due.step == step:
                        return msgspec.structs.replace(due.save, number=self._take_number(due))
                    self._missed(due)
                    continue
                proposed = self._proposed
                self._changed.wait_for(
                    lambda proposed=proposed: self._proposed is not proposed,  # type: ignore[misc]
                    timeout=self._seconds,
                )
                if self._proposed is proposed:
                    self._proposed = None  # should the verdict come yet, it comes too late
                    self._hold()
            return None

    def _add(self, due: Due) -> None:
        """Keep what is due in the order of steps, of two saves at one step the one that stops."""
        by_step = {other.step: other for other in self._due}
        if due.step not in by_step or due.save.trigger == "signal":
            by_step[due.step] = due
        self._due = deque(by_step[step] for step in sorted(by_step))

    def _hold(self) -> None:
        """Set the first step at which `_settle` has something to do."""
        due = self._due[0].step if self._due else math.inf
        self._held = due if self._proposed is None else min(due, self._proposed.step)

    def _missed(self, due: Due) -> None:
        self.tell_failure(
            self._take_number(due),
            f"rank {self.rank} was beyond step {due.step} when it was agreed",
        )

    def _take_number(self, due: Due) -> int:
        """The number of a save at its step: others may have been made since it was agreed."""
        self._last = max(due.save.number, self._last + 1)
        return self._last

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            for due in self._due:
                self.tell_failure(
                    self._take_number(due),  # no other save may have it
                    f"rank {self.rank} ended at step {self._step}, before step {due.step}",
                )
            self._due.clear()
            self._proposed = None
            self._hold()

    def _numbered(self, decision: SaveDecision) -> AgreedSave:
        fresh, self._fresh = self._fresh, False
        return AgreedSave(self._last + 1, decision.trigger, decision.reason, fresh)

    # -- threads --------------------------------------------------------------------------------

    def _until_closed(self, task: Callable[[RankMessages], None], messages: RankMessages) -> None:
        try:
            task(messages)
        except StoreError:
            # The store is gone, and with it whoever served it. Training need not wait for words
            # that cannot come; the next meeting says so.
            with self._changed:
                self._proposed = None
                self._hold()
                self._changed.notify_all()

    def _send_wishes(self, messages: RankMessages) -> None:
        while True:
            wish = self._wishes.get()
            if not wish.closes or self.rank == 0:
                messages.put(f"request/{messages.count('requests')}", wish)
            if wish.closes:
                return

    def _read_inbox(self, messages: RankMessages) -> None:
        proposal: Proposal | None = None
        for self._read in itertools.count(1):
            if self._closed.is_set():
                return
            letter: Letter | None = messages.get(
                f"inbox/{self.rank}/{self._read}", Letter, seconds=_ALWAYS
            )
            if isinstance(letter, Proposal):
                proposal = letter
                messages.put(f"answer/{letter.number}/{self.rank}", self._answer(letter))
            elif isinstance(letter, Verdict) and proposal is not None:
                self._take(proposal, letter)

    def _answer(self, proposal: Proposal) -> Answer:
        with self._changed:
            if self._ended:
                return Answer(self._step, waits=False, ended=True)
            self._proposed = proposal
            self._hold()
            # The boundary sets the step before it looks at `_held`, this the other way round: at
            # least one of the two sees the other.
            if self._step < proposal.step:
                return Answer(self._step, waits=True)
            self._proposed = None
            self._hold()
            return Answer(self._step, waits=False)

    def _take(self, proposal: Proposal, verdict: Verdict) -> None:
        with self._changed:
            waited = self._proposed is proposal
            self._proposed = None
            if verdict.save is not None:
                due = Due(proposal.step, verdict.save)
                if waited:
                    self._add(due)
                else:
                    self._missed(due)
            self._hold()
            self._changed.notify_all()

    # -- rank 0 ---------------------------------------------------------------------------------

    def _decide(self, messages: RankMessages) -> None:
        self._sent = self._proposals = 0
        signalled = False
        for number in itertools.count(1):
            request = messages.get(f"request/{number}", Request, seconds=_ALWAYS)
            if request is None or request.closes:
                return
            if request.anew or request.failed is not None:
                self.plan_anew()
            if request.anew:
                continue
            if request.failed is not None:
                self._on_failure(request.failed, f"rank {request.rank}: {request.reason}")
            elif not (signalled and request.trigger == "signal"):
                agreed = self._agree(messages, request)
                signalled = signalled or (agreed and request.trigger == "signal")

    def _agree(self, messages: RankMessages, request: Request) -> bool:
        """Propose steps until all ranks will wait at one; whether they do."""
        furthest, margin = self._step, 1
        while not self._closed.is_set():
            step = request.step if request.step is not None else furthest + margin
            answers = self._ask_all(messages, step)
            if answers and all(answer.waits for answer in answers):
                with self._changed:
                    save = self._numbered(SaveDecision(request.trigger, request.reason))
                self._send_all(messages, Verdict(save))
                return True
            self._send_all(messages, Verdict(None))
            if not answers or request.step is not None or any(a.ended for a in answers):
                return False  # a rank is lost, the step has gone by, or the end is near
            furthest = max(furthest, *(answer.step for answer in answers))
            margin = min(2 * margin, _LARGEST_MARGIN)
        return False

    def _ask_all(self, messages: RankMessages, step: int) -> list[Answer]:
        """Every rank's answer to a proposal; none where one has not answered in time."""
        self._proposals += 1
        self._send_all(messages, Proposal(self._proposals, step))
        keys = [f"answer/{self._proposals}/{rank}" for rank in range(self.world_size)]
        found = messages.get_all(keys, seconds=self._seconds)
        return [msgspec.msgpack.decode(data, type=Answer) for data in found or []]

    def _send_all(self, messages: RankMessages, letter: Letter) -> None:
        self._sent += 1
        for rank in range(self.world_size):
            messages.put(f"inbox/{rank}/{self._sent}", letter)
