"""Ceph's object gateway for tests: a monitor, one OSD that keeps all in memory, and `radosgw`.

It honours ``If-None-Match`` of a single PUT and no other condition: all that a commit needs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

from support.s3_servers import (
    ACCESS_KEY,
    SECRET_KEY,
    S3Server,
    answers,
    free_port,
    process_group,
    wait_until,
)

PACKAGES = "ceph-base, ceph-common, ceph-mon, ceph-osd and radosgw"
_PROGRAMS = ("ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin", "ceph")
_TRIES = 5
_CONFIGURATION = """
[global]
fsid = {fsid}
mon_host = v1:127.0.0.1:{port}
run_dir = {folder}
log_file = {folder}/$name.log
admin_socket = {folder}/$name.asok
pid_file =
mon_data = {folder}/mon
osd_data = {folder}/osd
keyring = {folder}/keyring
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr2 = false
osd_objectstore = memstore
memstore_device_bytes = 2147483648
osd_crush_chooseleaf_type = 0
osd_crush_update_on_start = false
osd_class_update_on_start = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 2000
paxos_propose_interval = 0.02
ms_mon_client_mode = crc

[client]
auth_client_required = none
ms_mon_client_mode = crc
"""


def is_installed() -> bool:
    """Whether the programs are there."""
    return all(shutil.which(program) for program in _PROGRAMS)


@contextlib.contextmanager
def ceph_server(folder: Path) -> Iterator[S3Server]:
    """Start all three; raises `RuntimeError` with a log where one of them does not come up."""
    port, gateway = free_port(), free_port()
    fsid, conf = str(uuid.uuid4()), folder / "ceph.conf"
    conf.write_text(_CONFIGURATION.format(fsid=fsid, port=port, folder=folder))
    for name in ("mon", "osd"):
        (folder / name).mkdir()
    (folder / "keyring").touch()
    log = folder / "servers.log"

    def succeeds(*command: str) -> bool:
        with log.open("ab") as output:
            done = subprocess.run(
                [command[0], "-c", str(conf), *command[1:]],
                check=False,
                timeout=60,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "CEPH_CONF": str(conf)},
            )
        return done.returncode == 0

    def ceph(*command: str) -> None:
        """A monitor that has just come up refuses some at first."""
        for _ in range(_TRIES):
            if succeeds(*command):
                return
        raise RuntimeError(f"{command}:\n{log.read_text(errors='replace')[-4000:]}")

    monmap = str(folder / "monmap")
    ceph("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{port}]", monmap)
    ceph("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
    with contextlib.ExitStack() as stack:

        def serve(*command: str) -> subprocess.Popen:
            whole = [command[0], "-f", "-c", str(conf), *command[1:]]
            return stack.enter_context(process_group(whole, log))

        serve("ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        ceph("ceph", "osd", "new", osd)
        ceph("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        serve("ceph-osd", "-i", "0")
        ceph("ceph", "osd", "crush", "add", "osd.0", "1.0", "host=here", "root=default")
        frontend = f"beast endpoint=127.0.0.1:{gateway}"
        rgw = serve("radosgw", "-n", "client.rgw", f"--rgw_frontends={frontend}")
        wait_until(lambda: answers(gateway, "/"), rgw, log)
        keys = (f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}")
        ceph("radosgw-admin", "user", "create", "--uid=tests", "--display-name=tests", *keys)
        server = S3Server(f"http://127.0.0.1:{gateway}")
        server.client().create_bucket(Bucket=server.bucket)
        yield server
