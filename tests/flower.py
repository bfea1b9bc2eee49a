"""Real Flower processes on the loopback, in a home of their own."""

import atexit
import contextlib
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[1]
_BIN = Path(sys.executable).parent


@functools.cache
def app() -> Path:
    """Return a folder with our app, as an image has it.

    Of a checkout Flower looks at each file, also in .venv: seven seconds a run.
    """
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        name = line.removeprefix("!")
        if (ROOT / name).is_dir() and "/" not in name:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        elif (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


#: Below those that the kernel gives to whoever asks for any, above Ray's.
PORTS = range(20_000, 32_000)
_given: set[int] = set()


def free_port() -> int:
    """Return a port for a server that starts later, and that no other test gets."""
    for port in random.SystemRandom().sample(PORTS, 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port
    raise RuntimeError("no port is free")


def start(
    command: list[str], log: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start a process in a group of its own, in the folder of its log."""
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            env=environment,
            cwd=log.parent,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )


def stop(*processes: subprocess.Popen[bytes]) -> None:
    """End processes and what they started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def named(*names: str) -> list[int]:
    """Return the ids of processes with these names, be they forks or not."""
    found, short = [], [name[:15] for name in names]  # as the kernel keeps them
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            process = int(folder.name)
            found += [process] if (folder / "comm").read_text()[:-1] in short else []
    return found


def wait_for(condition: Callable[[], bool], running: Future[str]) -> None:
    """Wait until something is so, while `flwr run` goes on."""
    while not condition():
        assert not running.done(), running.result()
        time.sleep(0.05)


class Flower:
    """A SuperLink, its SuperNodes, and `flwr run` against them.

    Everything is started in one group per process and ended, by its id, on exit.
    """

    def __init__(self, home: Path, *, simulation: bool) -> None:
        self.home = home
        self.simulation = simulation
        self.port = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(home),
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",  # seconds; 1 otherwise
            "PYTHONDONTWRITEBYTECODE": "",  # a process per message compiles the app
            "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> "Flower":
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "config.toml").write_text(
            '[superlink]\ndefault = "test"\n\n[superlink.test]\n'
            f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        # Ray's processes have 15 s to start (ray-project/ray issue 65983): before other
        # tests, where that is allowed.
        command = ["nice", "-n", "-10"] if self.simulation else []
        command += ["flower-superlink", "--insecure", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--isolation", "subprocess"]
        command += ["--disable-runtime-dependency-installation"]
        if self.simulation:
            command += ["--simulation"]
        else:
            forks = self.warm_up()
        superlink = self._start(command, "superlink")
        self._wait_for(self._listens, superlink, "superlink")
        if not self.simulation:
            self._wait_for(forks.exists, self.processes[0], "warm")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stop(*reversed(self.processes))

    def warm_up(self) -> Path:
        """Let processes be forks of one, as soon as the returned file exists."""
        folder = self.home / "warm"
        path = f"{folder}{os.pathsep}{self.environment['PATH']}"
        self.environment["PATH"] = path
        script = Path(__file__).with_name("warm.py")
        self._start([sys.executable, str(script), str(folder)], "warm")
        return folder / "flower-supernode"

    def supernode(self, node_config: str) -> subprocess.Popen[bytes]:
        command = ["flower-supernode", "--insecure", "--host", "127.0.0.1"]
        command += ["--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port())]
        command += ["--node-config", node_config]
        return self._start(command, f"supernode-{len(self.processes)}")

    def run(
        self,
        app: Path,
        run_config: str = "",
        *,
        federation: str = "",
        timeout: float = 600,
    ) -> str:
        """`flwr run --stream`; returns what it printed."""
        command = ["flwr", "run", str(app), "--stream"]
        if run_config:
            command += ["--run-config", run_config]
        if federation:
            command += ["--federation-config", federation]
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.stdout + done.stderr

    def server_apps(self) -> list[int]:
        """Ids of the processes in which this home's SuperLink runs ServerApps."""
        home, found = f"FLWR_HOME={self.home}".encode(), []
        for process in named("flwr-serverapp", "flwr-simulation"):
            with contextlib.suppress(OSError):
                environ = Path(f"/proc/{process}/environ").read_bytes()
                found += [process] if home in environ.split(b"\0") else []
        return found

    def log_of(self, process: subprocess.Popen[bytes]) -> Path:
        """Return the log of a SuperNode."""
        return self.home / f"supernode-{self.processes.index(process)}.log"

    def _start(
        self, command: list[str], name: str, **environment: str
    ) -> subprocess.Popen[bytes]:
        process = start(
            command, self.home / f"{name}.log", {**self.environment, **environment}
        )
        self.processes.append(process)
        return process

    def _listens(self) -> bool:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port), timeout=1),
        ):
            return True
        return False

    def _wait_for(
        self, ready: Callable[[], bool], process: subprocess.Popen[bytes], name: str
    ) -> None:
        deadline = time.monotonic() + 180
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                log = (self.home / f"{name}.log").read_text()
                raise RuntimeError(f"{name} did not start:\n{log}")
            time.sleep(0.2)


@contextlib.contextmanager
def simulation(home: Path) -> Iterator[Flower]:
    with Flower(home, simulation=True) as flower:
        yield flower


@contextlib.contextmanager
def deployment(home: Path, node_configs: list[str]) -> Iterator[Flower]:
    with Flower(home, simulation=False) as flower:
        for node_config in node_configs:
            flower.supernode(node_config)
        yield flower
