"""With Prefect and without torch: a server comes up that knows our blocks, and a flow trains.

Its training runs in another interpreter, the one named by ``TRAINING_PYTHON``, which has torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from prefect.plugins import load_prefect_collections

import ckpt_tasks.integrations.prefect as integration

Path("job.py").write_text(
    """
import torch

def train(run, lr: float = 0.1):
    model = torch.nn.Linear(1, 1)
    loader = torch.utils.data.DataLoader(torch.ones(2, 1))
    run.track(model=model, loader=loader)
    for epoch in run.epochs(2):
        for batch in run.steps(loader):
            model(batch).backward()
"""
)
Path("flow.py").write_text(
    """
import os
from ckpt_tasks.integrations.prefect import resumable_flow

flow = resumable_flow(
    "job.py:train", name="probe", store="store", python=os.environ["TRAINING_PYTHON"]
)
assert "lr" in flow.parameters.properties, flow.parameters
outcome = flow(lr=0.2)
assert (outcome["code"], outcome["position"]["step"]) == (0, 4), outcome
"""
)

collection = load_prefect_collections()["ckpt_tasks"]
assert not isinstance(collection, Exception), collection

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
server = subprocess.Popen(
    [Path(sys.executable).with_name("prefect"), "server", "start", "--port", str(port)],
    start_new_session=True,
)
try:
    deadline = time.monotonic() + 120
    while True:
        assert server.poll() is None, f"the server ended with {server.returncode}"
        assert time.monotonic() < deadline, "the server did not answer in two minutes"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health") as answer:
                assert answer.status == 200
                break
        except OSError:
            time.sleep(0.5)
    question = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/block_types/filter",
        data=b"{}",
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(question) as answer:  # noqa: S310 - our own address
        slugs = {block_type["slug"] for block_type in json.load(answer)}
    for block in (integration.CheckpointStore, integration.ModelRegistry):
        assert block.get_block_type_slug() in slugs, slugs
    assert importlib.util.find_spec("torch") is None
    # In a process of its own, which sends its last logs while the server is there.
    environment = {**os.environ, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    subprocess.run([sys.executable, "flow.py"], env=environment, check=True)
finally:
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(timeout=60)
