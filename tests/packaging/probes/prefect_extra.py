"""With the newest Prefect, a flow is built, and a server that knows our blocks comes up."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

Path("job.py").write_text("def train(run, lr: float = 0.1): ...\n")
sys.path.insert(0, os.getcwd())

from prefect.plugins import load_prefect_collections  # noqa: E402

import ckpt_tasks.integrations.prefect as integration  # noqa: E402 - finds job.py

flow = integration.resumable_flow("job:train", name="probe", store="store")
assert "lr" in flow.parameters.properties, flow.parameters

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
finally:
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(timeout=60)
