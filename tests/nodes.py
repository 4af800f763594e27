"""A Ray cluster of several nodes on this machine that share nothing but its network.

Each node has an address, a temporary folder and an environment of its own, and is killed whole.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

from s3_server import free_ports

REPOSITORY = Path(__file__).resolve().parent.parent
MARK = "VITRINE_TEST_NODE"
DEPTH = 8  # of the tree of a node's processes
START_TIMEOUT_S = 60.0
OBJECT_STORE_BYTES = 100 * 2**20
PORTS = (
    "metrics-export-port",
    "runtime-env-agent-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
)
UNSHARE = ("unshare", "--mount", "--propagation=private", "sh", "-c")
RAY = str(Path(sys.executable).with_name("ray"))


def can_hide():
    """Whether this user may hide folders: root, where mounting is allowed."""
    try:
        tried = subprocess.run([*UNSHARE, "mount -t tmpfs none /mnt"], check=False)
    except FileNotFoundError:
        return False
    return tried.returncode == 0


class Node:
    """One node: `ray start --block` and all that descends from it.

    Where a folder is to be hidden from it, it has a mount namespace of its own; see `can_hide`.

    Attributes:
        host: Its address.
        folder: Of its temporary files, Ray's and ours.
    """

    def __init__(self, folder, host, arguments, environment, hidden=None):
        self.host, self.folder, self._mark = host, folder, uuid.uuid4().hex
        folder.mkdir(parents=True)
        self.log = folder / "ray.log"
        # Ports that Ray chooses by itself must be told to the raylet within 15 s.
        ports = [f"--{n}={p}" for n, p in zip(PORTS, free_ports(len(PORTS)), strict=True)]
        command = [
            RAY, "start", "--block", f"--node-ip-address={host}", f"--temp-dir={folder / 'ray'}",
            f"--object-store-memory={OBJECT_STORE_BYTES}", *ports, *arguments,
        ]  # fmt: skip
        if hidden is not None:
            script = f"mount -t tmpfs none {shlex.quote(str(hidden))} && exec {shlex.join(command)}"
            command = [*UNSHARE, script]
        ours = {
            MARK: self._mark,
            "TMPDIR": str(folder),
            "RAY_idle_worker_killing_time_threshold_ms": "300000",
        }
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                command, env=os.environ | environment | ours, stdout=output, stderr=output
            )

    def is_up(self):
        """Whether it has joined the cluster."""
        assert self._process.poll() is None, self.log.read_text()
        return b"Ray runtime started" in self.log.read_bytes()

    def processes(self):
        """List its live processes: what descends from it, and orphans that inherited its mark."""
        mark, parents, found = f"{MARK}={self._mark}".encode(), {}, {self._process.pid}
        for entry in Path("/proc").iterdir():
            with suppress(OSError):  # ended meanwhile, or another user's
                if not entry.name.isdigit():
                    continue
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    parents[int(entry.name)] = int(parent)
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.add(int(entry.name))
        for _ in range(DEPTH):
            found |= {pid for pid, parent in parents.items() if parent in found}
        return found & parents.keys()

    def kill(self):
        """Kill all its processes at once, as a power cut would."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while left := self.processes():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
        self._process.wait()


class Cluster:
    """A head that takes no work, and workers; `with` ends them all.

    Attributes:
        environment: In which a process may use the cluster.
        dashboard: Address that jobs are submitted to.
        workers: Those that were not killed yet.
        commands: Processes that use it.
    """

    def __init__(self, folder, environment):
        self.workers, self.commands, self.port, self.dashboard_port = [], [], *free_ports(2)
        self.address = f"127.0.0.1:{self.port}"
        self.dashboard = f"http://127.0.0.1:{self.dashboard_port}"
        # A token of its own: where the user has one, Ray takes it for a cluster's.
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
        # Even small results lie on the node that made them, and are lost with it.
        lost = {"RAY_max_direct_call_object_size": "64"}
        self.environment = environment | token | lost | {"RAY_ADDRESS": self.address}
        self._folder, self._count = folder, 0
        self.head = None

    def __enter__(self):
        self.head = self._start(
            "127.0.0.1", "--head", f"--port={self.port}", "--num-cpus=0",
            "--include-dashboard=true", f"--dashboard-port={self.dashboard_port}",
        )  # fmt: skip
        self.wait()
        return self

    def wait(self):
        """Wait until all nodes are up."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not all(node.is_up() for node in (self.head, *self.workers)):
            assert time.monotonic() < deadline
            time.sleep(0.2)

    @property
    def next_host(self):
        """Address of the worker that is added next."""
        return f"127.0.0.{self._count + 1}"

    def add(self, *, hidden=None, **environment):
        """Start a worker of one CPU, with more in its environment and a folder hidden from it."""
        host, join = self.next_host, (f"--address={self.address}", "--num-cpus=1")
        node = self._start(host, *join, hidden=hidden, environment=environment)
        self.workers.append(node)
        return node

    def _start(self, host, *arguments, hidden=None, environment=None):
        folder = self._folder / f"n{self._count}"  # short: Ray's sockets lie below it
        self._count += 1
        ours = self.environment | (environment or {})
        del ours["RAY_ADDRESS"]  # `ray start` refuses it
        return Node(folder, host, arguments, ours, hidden)

    def run(self, command):
        """Start a command that uses the cluster, in the repository; return its process."""
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=os.environ | self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.commands.append(process)
        return process

    def end_commands(self):
        """Kill the commands that still run."""
        for process in self.commands:
            process.kill()
            process.communicate()
        self.commands.clear()

    def kill(self, node):
        """Kill a worker."""
        self.workers.remove(node)
        node.kill()

    def __exit__(self, *error):
        for node in (*self.workers, self.head):
            node.kill()
