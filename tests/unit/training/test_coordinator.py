"""What the supervisors of one attempt's ranks tell one another, and how they find each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.launches import wait_until
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.training.ranks.generation import connect_generation
from ckpt_tasks.training.ranks.messages import connect_ranks
from ckpt_tasks.training.spec import AttemptFolder, RankPlace, TrainOutcome, TrainSpec
from ckpt_tasks.training.supervision.coordinator import Coordinator, Ended, Member
from ckpt_tasks.training.supervision.torchrun import (
    tell_torchrun,
    torchrun_invocation,
    torchrun_place,
)
from ckpt_tasks.types import EXIT_FAILED

KILLED = Ended(-9)
FINAL = TrainOutcome(code=EXIT_FAILED, message="rank 1: the trainer was killed", run="toy")


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    made = Coordinator(RankPlace(rank=0, ranks=3), "toy")
    yield made
    made.close()


def _member(path: Path, rank: int, coordinator: Coordinator) -> Member:
    """One whose trainer has found the coordinator."""
    path.mkdir()
    folder = AttemptFolder(path)
    folder.write_leader(coordinator.leader, folder.leader)
    return Member(folder, rank)


def _joined(path: Path, rank: int, coordinator: Coordinator) -> Member:
    member = _member(path, rank, coordinator)

    def look() -> bool:
        member.look()
        coordinator.look()
        return member.has_joined

    wait_until(look, f"rank {rank} to join")
    return member


def test_one_end_for_all(tmp_path: Path, coordinator: Coordinator) -> None:
    """A rank tells how its trainer ended, the others that one has failed, all the outcome."""
    members = [_joined(tmp_path / str(rank), rank, coordinator) for rank in (1, 2)]
    assert coordinator.running == [1, 2]
    members[0].tell_ended(KILLED)
    wait_until(lambda: coordinator.look() or coordinator.ends == {1: KILLED}, "its end")
    coordinator.tell_failed(1)
    wait_until(lambda: members[1].look() or members[1].failed == 1, "the word of it")
    members[1].tell_ended(Ended(0))
    for member in members:
        assert not coordinator.all_are_over
        member.tell_over()
        wait_until(lambda: coordinator.look() or not coordinator.running, "an end")
    wait_until(lambda: coordinator.look() or coordinator.all_are_over, "both to be over")
    coordinator.tell_final(FINAL)
    coordinator.close()
    for member in members:
        wait_until(lambda member=member: member.look() or member.is_lost, "the end")
        assert member.final == FINAL
        member.close()


def test_a_machine_that_is_gone(tmp_path: Path, coordinator: Coordinator) -> None:
    """Its connection closes without a word: its rank has failed, for a reason that is no error of
    the training's. One that does not answer is given up.
    """
    member = _joined(tmp_path / "1", 1, coordinator)
    frozen = _joined(tmp_path / "2", 2, coordinator)
    member.close()
    wait_until(lambda: coordinator.look() or 1 in coordinator.ends, "its end")
    outcome = coordinator.ends[1].outcome
    assert outcome is not None
    assert outcome.ended_with is None
    assert "is gone" in outcome.message
    assert coordinator.running == [2]
    coordinator.give_up()
    assert coordinator.running == []
    assert not coordinator.all_are_over
    frozen.close()


@pytest.mark.parametrize(
    "said",
    [
        b'{"type":"_Join","generation":"\xc3\xa9","rank":1}\n',
        b'{"type":"_Join","generation":"x","rank":-1}\n',
        b'{"type":"_Join","generation":"x","rank":1' + b"0" * 5000 + b"}\n",
        b'{"type":"_Join","x":' + b"[" * 20_000 + b"]" * 20_000 + b"}\n",
        b"x" * 200_000,
        b'"\xff"\n\x00\n\n',
        b"",
    ],
)
def test_strangers_do_no_harm(tmp_path: Path, coordinator: Coordinator, said: bytes) -> None:
    """Whoever reaches the port may say anything: the ranks join all the same."""
    address = coordinator.leader.host, coordinator.leader.port
    with socket.create_connection(address) as stranger:
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        member = _joined(tmp_path / "1", 1, coordinator)
        wait_until(lambda: coordinator.look() or not coordinator._strangers, "the stranger's end")
    assert coordinator.running == [1]
    member.close()


def test_who_is_let_in(tmp_path: Path, coordinator: Coordinator) -> None:
    """Each rank once, while none has failed; others who connect change nothing."""
    address = coordinator.leader.host, coordinator.leader.port
    first = _joined(tmp_path / "first", 1, coordinator)
    twice = _member(tmp_path / "twice", 1, coordinator)
    stranger = Coordinator(RankPlace(rank=0, ranks=3), "toy")
    other_generation = _member(tmp_path / "other", 2, stranger)
    folder = AttemptFolder(tmp_path / "other")
    leader = coordinator.leader
    with socket.create_connection(address) as garbage:
        garbage.sendall(b"GET / HTTP/1.1\r\n\r\n")
        folder.write_leader(
            type(leader)(host=leader.host, port=leader.port, generation="guessed"), folder.leader
        )
        for _ in range(5):
            for member in (twice, other_generation):
                member.look()
            coordinator.look()
        coordinator.refuse()
        late = _member(tmp_path / "late", 2, coordinator)
        for _ in range(5):
            late.look()
            coordinator.look()
        assert garbage.recv(1000) == b""
    assert not any(member.has_joined for member in (twice, other_generation, late))
    assert coordinator.running == [1]
    assert coordinator.ends == {}
    for member in (first, twice, other_generation, late):
        member.close()
    stranger.close()


def test_an_earlier_start_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it left in torchrun's store, which is kept over restarts, is followed by nobody; and the
    user's process group gets a store of its own.
    """
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    board = connect_ranks("127.0.0.1", 0, serve=True)
    places = [RankPlace(rank=rank, ranks=2, port=board.port, served=True) for rank in (0, 1)]
    stores = []
    for generation in ("earlier", "later"):
        coordinator = Coordinator(places[0], "toy")
        (tmp_path / generation).mkdir()
        folder = AttemptFolder(tmp_path / generation)
        folder.write_leader(coordinator.leader, folder.leader)
        if generation == "earlier":
            stores.append(connect_generation(folder, places[0], seconds=60))
            coordinator.close()
    (tmp_path / "1").mkdir()
    following = AttemptFolder(tmp_path / "1")
    member = Member(following, 1)
    with ThreadPoolExecutor() as pool:
        follows = pool.submit(connect_generation, following, places[1], seconds=60)
        wait_until(lambda: following.leader.exists(), "the earlier one to be found")
        member.look()
        assert not member.has_joined
        stores.append(connect_generation(folder, places[0], seconds=60))
        wait_until(lambda: member.look() or coordinator.look() or follows.done(), "the later one")
        assert follows.result().port == stores[1].port != board.port
    assert os.environ["MASTER_PORT"] == str(stores[1].port)
    assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "False"
    coordinator.close()


def test_torchrun_shows_why(tmp_path: Path) -> None:
    """Its agent reads it as its own form; what the training has written there is left alone."""
    path = tmp_path / "error.json"
    tell_torchrun(FINAL, {"TORCHELASTIC_ERROR_FILE": str(path)})
    read = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(path))
    assert read.error_file_data["message"]["message"] == FINAL.message
    path.write_text("the training's own", encoding="utf-8")
    tell_torchrun(FINAL, {"TORCHELASTIC_ERROR_FILE": str(path)})
    assert path.read_text(encoding="utf-8") == "the training's own"


def test_what_torchrun_tells() -> None:
    """Its variables, as its agents set them; one worker alone has nobody to agree with."""
    told = {
        "TORCHELASTIC_RUN_ID": "job",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "host",
        "MASTER_PORT": "29500",
    }
    assert torchrun_place(told) == RankPlace(
        rank=3, ranks=4, host="host", port=29500, served=True, one_machine=False
    )
    assert torchrun_place({**told, "WORLD_SIZE": "1"}) is None
    assert torchrun_invocation(told) == "torchrun-job"
    agent = torchrun_invocation({**told, "TORCHELASTIC_RUN_ID": "none"})
    assert str(os.getppid()) in agent
    with pytest.raises(ConfigError, match="RANK"):
        torchrun_place({name: told[name] for name in told if name != "RANK"})
    with pytest.raises(ConfigError, match="torchrun"):
        TrainSpec(entrypoint="m:f", run="toy", invocation="i", nproc=2, place=torchrun_place(told))
