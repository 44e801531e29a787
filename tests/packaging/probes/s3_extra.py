"""With s3fs, an S3 store is opened for writing and gives back what it was given."""

from __future__ import annotations

import os

import boto3
from moto.server import ThreadedMotoServer

from ckpt_tasks.config import StoreConfig
from ckpt_tasks.store import open_store

for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
    os.environ[name] = "probe"
os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
host, port = server.get_host_and_port()
endpoint = f"http://{host}:{port}"
boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="probe")
config = StoreConfig(url="s3://probe/root", options={"endpoint_url": endpoint})
store = open_store(config, for_writing=True)
store.create("object", b"x")
assert store.read("object") == b"x"
store.close()
server.stop()
