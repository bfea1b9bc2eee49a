"""Ray nodes on the loopback, each with one core, as `ray start` makes them."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flower import free_port, start, stop

from autoflip_flwr.app.launch import RAY_TIMED_OUT

_RAY = Path(sys.executable).parent / "ray"
_UP = "Ray runtime started"


@dataclass(frozen=True)
class Cluster:
    address: str
    nodes: list[subprocess.Popen[bytes]]

    def raylets(self) -> list[int]:
        """Ids of the processes that stand for the nodes: workers know theirs."""
        found = []
        for node in self.nodes:
            for child in children(node.pid):
                name = Path(f"/proc/{child}/comm").read_text().strip()
                found += [child] if name == "raylet" else []
        return found


def children(pid: int) -> list[int]:
    """Ids of the processes that a process has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


@contextlib.contextmanager
def cluster(count: int) -> Iterator[Cluster]:
    address = f"127.0.0.1:{free_port()}"
    common = ["--block", "--node-ip-address=127.0.0.1", "--num-cpus=1"]
    common += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    nodes: list[subprocess.Popen[bytes]] = []
    # Its sockets' names must be short.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        head = ["--head", f"--port={address.partition(':')[2]}", f"--temp-dir={folder}"]
        try:
            for number in range(count):
                own = [f"--address={address}"] if number else head
                own += [f"--dashboard-agent-listen-port={free_port()}"]
                if not number:
                    own += ["--include-dashboard=false"]
                    own += [f"--ray-client-server-port={free_port()}"]
                # Ray's processes have 15 s to start, see flower.py.
                command = ["nice", "-n", "-10", str(_RAY), "start", *own, *common]
                nodes.append(_started(command, folder / f"{number}.log", environment))
            yield Cluster(address, nodes)
        finally:
            stop(*reversed(nodes))


def _started(
    command: list[str], log: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start a node; again, twice at most, where Ray's own processes were late."""
    for _ in range(3):
        node = start(command, log, environment)
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and node.poll() is None:
            if _UP in log.read_text():
                return node
            time.sleep(0.2)
        stop(node)
        if RAY_TIMED_OUT not in log.read_text():
            break
    raise RuntimeError(f"a Ray node did not start:\n{log.read_text()}")
