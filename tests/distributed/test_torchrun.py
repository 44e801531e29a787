"""torchrun starts the ranks, on one machine or several, and starts them again when one fails."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
from support import toy_ranks
from support.launches import wait_gone, wait_until
from support.machines import Machine, two_machines
from support.run_checks import check_run
from support.torchruns import Agent, agent_started
from support.toy_runs import toy_spec

from ckpt_tasks.checkpointer.catalog import RunView, view_run
from ckpt_tasks.fencing.attempts import read_attempts
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.store import open_store
from ckpt_tasks.training.launch import launch
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_DONE, EXIT_STOPPED


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The end of the training that nothing ever happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(toy_ranks.__file__).parents[1]))
        patch.setenv("TOY_DIGEST", str(folder / "digest"))
        assert launch(_spec(folder / "store")).code == EXIT_DONE
    return (folder / "digest").read_text("ascii")


@pytest.fixture
def digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the training's end is told; its steps are slow enough to be caught in their midst."""
    path = tmp_path / "digest"
    monkeypatch.setenv("TOY_DIGEST", str(path))
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.1")
    monkeypatch.setenv("CKPT_TASKS_ATTEMPT_NPROC", "3")  # not asked: the workers are the ranks
    return path


def _spec(root: Path) -> TrainSpec:
    return toy_spec(root, entrypoint="support.toy_ranks:ddp", params={}, nproc=2)


def _train(root: Path) -> list[str]:
    """The arguments for torchrun that train what `_spec` does."""
    command = ["-m", "ckpt_tasks", "train", "support.toy_ranks:ddp", "--run-name", "toy"]
    options = ["--store", str(root), "--every-steps", "3"]
    return [*command, *options, "--outcome", str(root.parent / "outcome.json")]


def _view(spec: TrainSpec) -> RunView:
    with open_store(spec.config.store) as store:
        return view_run(store, spec.run)


def _wait_for_checkpoint(spec: TrainSpec, attempt: int, agent: Agent) -> None:
    def found() -> bool:
        run = Path(spec.config.store.url) / "toy"
        return bool(list(run.glob(f"commits/*-a{attempt}-*.json")))

    wait_until(lambda: found() or agent.process.poll() is not None, f"a checkpoint: {agent.said}")
    assert found(), agent.said


def _invocations(spec: TrainSpec) -> list[str]:
    """Of each attempt, in order."""
    with open_store(spec.config.store) as store:
        attempts = read_attempts(store, RunLayout(spec.run))
    return [attempt.claim.invocation for attempt in attempts if attempt.claim is not None]


def _outcome(root: Path) -> dict[str, Any]:
    outcome: dict[str, Any] = json.loads((root.parent / "outcome.json").read_bytes())
    return outcome


def test_one_machine(tmp_path: Path, digest: Path, undisturbed: str) -> None:
    """Its agent is killed: the workers save and stop. Started again, a trainer is killed: torchrun
    starts all of them again, a new attempt at once, which ends as if nothing had happened.
    """
    root = tmp_path / "store"
    spec = _spec(root)
    options = ["--nproc-per-node", "2", "--max-restarts", "2", *_train(root)]
    with agent_started(*options, log=tmp_path / "first") as agent:
        _wait_for_checkpoint(spec, 1, agent)
        workers = agent.members[1:]
        agent.process.kill()
        wait_gone(workers)
        assert _outcome(root)["code"] == EXIT_STOPPED, agent.said
    with agent_started(*options, log=tmp_path / "second") as agent:
        _wait_for_checkpoint(spec, 2, agent)
        before = agent.members[1:]
        agent.trainers[1].kill()
        _wait_for_checkpoint(spec, 3, agent)
        wait_gone(before)
        assert agent.end() == 0, agent.said
    assert "failed: rank 1: the trainer was killed by SIGKILL" in agent.said
    assert digest.read_text("ascii") == undisturbed
    first, *others = _invocations(spec)
    assert len(others) == 2
    assert len({first, *others}) == 2
    assert (_outcome(root)["code"], _outcome(root)["attempt"]) == (EXIT_DONE, 3)
    check_run(spec)


def test_two_machines(
    tmp_path: Path,
    digest: Path,
    undisturbed: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A trainer is killed on one of them, and all are started again; that one's agent is asked to
    stop, and all save one step and stop; both are started once more, and go on.
    """
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.2")
    root = tmp_path / "store"
    spec = _spec(root)
    with two_machines() as machines, ExitStack() as stack:
        agents = [
            stack.enter_context(_agent_on(machine, machines[0], root)) for machine in machines
        ]
        _wait_for_checkpoint(spec, 1, agents[0])
        killed = agents[1].trainers[0]
        rank = killed.environ()["RANK"]
        killed.kill()
        _wait_for_checkpoint(spec, 2, agents[0])
        assert f"failed: rank {rank}: the trainer was killed by SIGKILL" in agents[1].said
        (root.parent / "outcome.json").unlink(missing_ok=True)
        agents[1].process.terminate()
        agents[1].end()
        wait_until((root.parent / "outcome.json").exists, "an outcome")
        assert _outcome(root)["code"] == EXIT_STOPPED, agents[0].said
        newest = _view(spec).newest
        assert newest is not None
        assert newest.record is not None
        assert (newest.record.trigger, newest.record.world_size) == ("signal", 2)
        assert _outcome(root)["checkpoint"] == str(newest.id)
        agents[0].process.terminate()  # it would wait for the other one
        agents[0].end()
        again = [
            stack.enter_context(_agent_on(each, machines[0], root, "again")) for each in machines
        ]
        assert [agent.end() for agent in again] == [0, 0], again[0].said + again[1].said
    assert digest.read_text("ascii") == undisturbed
    assert _outcome(root)["code"] == EXIT_DONE
    assert set(_invocations(spec)) == {"torchrun-job"}
    check_run(spec)


def _agent_on(
    machine: Machine, host: Machine, root: Path, name: str = "log"
) -> AbstractContextManager[Agent]:
    """One agent of two, which meet at `host`; its attempt folders are its own."""
    own = root.parent / machine.name
    own.mkdir(exist_ok=True)
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "job"]
    meeting += ["--rdzv-conf", f"is_host={machine == host}"]
    addresses = ["--rdzv-endpoint", f"{host.address}:29400", "--local-addr", machine.address]
    return agent_started(
        *options,
        *meeting,
        *addresses,
        *_train(root),
        log=own / name,
        before=machine.before,
        environment={"GLOO_SOCKET_IFNAME": machine.card, "TMPDIR": str(own)},
    )
