"""Machines of a deployment as folders and processes, on the loopback."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from flower import ROOT, Flower, app, free_port

DOCKER = ROOT / "docker"
GUIDE = (ROOT / "docs" / "deployment.md").read_text()
ON_SERVER = "docker compose -f server.yaml exec superlink "
ON_ONE_MACHINE = "docker compose exec superlink "
LISTENING = "Uvicorn running on https://"


def compose(name: str, **environment: str) -> dict:
    """Read a compose file with its `${NAME:-default}` and `${NAME:?message}`."""

    def value(match: re.Match) -> str:
        variable, kind, text = match.groups()
        if variable not in environment and kind == "?":
            raise KeyError(f"{variable}: {text}")
        return environment.get(variable, text)

    text = (DOCKER / f"{name}.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{(\w+):([-?])([^}]*)\}", value, text))


def service(name: str, of: str, **environment: str) -> dict:
    known = {"TORCH_INDEX": "default", "SERVER": "localhost", "CLIENT_ID": "none"}
    return compose(of, **(known | environment))["services"][name]


def in_guide(start: str) -> Iterator[list[str]]:
    """Yield the guide's shell commands that begin with `start`, without it."""
    for line in GUIDE.splitlines():
        if line.startswith(start):
            yield shlex.split(line.removeprefix(start))


class Machine:
    """What a machine has beside a checkout, in a folder: keys/, data/ and volumes.

    And what its container has: Flower's home.
    """

    def __init__(self, folder: Path, flower: Flower, ports: dict[str, int]) -> None:
        self.folder = folder
        self.name = folder.name
        self.superlink: Started
        self.flower = flower
        self.ports = {**ports, "9094": free_port()}
        for name in ("keys", "data", "state", "home", "faults"):
            (folder / name).mkdir(parents=True)
        self.environment = {
            **flower.environment,
            "FLWR_HOME": f"{folder}/home",
            "KEYS": f"{folder}/keys",
        }

    def placed(self, text: str, found: dict) -> str:
        """Say for a process what `found` says for a container: the only difference.

        Volumes are folders of this machine. Servers listen on the loopback, each on a
        port of its own.
        """
        places = {}
        for volume in found["volumes"]:
            source, target = volume.split(":")[:2]
            places[f"{target}/"] = f"{self.folder / source}/"
        places |= {
            "/app/docker/nginx.conf": str(self.folder / "nginx.conf"),
            "/app": str(app()),
            "0.0.0.0": "127.0.0.1",
            "superlink:": "localhost:",
        }
        places |= {port: str(actual) for port, actual in self.ports.items()}
        pattern = "|".join(map(re.escape, places))
        return re.sub(pattern, lambda match: places[match[0]], text)

    def start(self, found: dict, name: str, *, again: bool = False) -> "Started":
        """Start a service's command; `again` and again, as its `restart` says."""
        command = [self.placed(word, found) for word in found["command"]]
        if command[0] == "behind-gate":
            self.write_gate(found)
        if again:
            assert found["restart"] == "unless-stopped"
            command = ["bash", "-c", 'while :; do "$@"; sleep 1; done', "", *command]
        environment = self.environment | {
            key: self.placed(text, found)
            for key, text in found.get("environment", {}).items()
        }
        process = self.flower._start(command, name, **environment)
        return Started(process, self.flower.home / f"{name}.log")

    @contextlib.contextmanager
    def fault(self, call: str, status: int) -> Iterator[None]:
        """Let the gate answer a call of nodes so; 444 closes the connection."""
        file = self.folder / "faults" / f"{call}-{status}"
        file.touch()
        yield
        file.unlink()

    def write_gate(self, found: dict) -> None:
        """Write the gate's configuration, with a log of all calls and with faults."""
        gate = self.placed((DOCKER / "nginx.conf").read_text(), found)
        place, log = "limit_except POST { deny all; }", "access_log off;"
        assert place in gate
        assert log in gate
        faults = "".join(
            f'if (-f "{self.folder}/faults/$1-{status}") {{ return {status}; }}'
            for status in (444, 500, 502, 503)
        )
        times = "log_format times '$remote_addr $uri $status $request_time';"
        times += f"access_log {self.folder}/calls.log times;"
        gate = gate.replace(place, place + faults).replace(log, times)
        root = "user root;" if os.geteuid() == 0 else ""  # not nobody
        (self.folder / "nginx.conf").write_text(root + gate)

    def run(self, command: list[str], **more: str) -> str:
        """Run a command to its end; returns what it printed."""
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=self.flower.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
            **more,
        )
        return done.stdout

    def script(self, name: str, *arguments: str) -> str:
        return self.run([str(DOCKER / name), *arguments])

    def samples(self, part: int, parts: int) -> None:
        """Write a node's samples with the guide's program."""
        (program,) = re.findall(r"python - 0 2 <<'EOF'\n(.*?)\nEOF", GUIDE, re.DOTALL)
        program = program.replace("/out/", f"{self.folder}/data/")
        out = self.run([sys.executable, "-", str(part), str(parts)], input=program)
        assert (self.folder / "data" / "train.npz").exists(), out


class Started:
    """A process and its log."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self.process = process
        self.path = path
        self.heard = 0

    @property
    def log(self) -> str:
        return self.path.read_text()

    def says(self, text: str, seconds: float = 60) -> None:
        """Wait until the log has `text`, after what was waited for before."""
        deadline = time.monotonic() + seconds
        while (at := self.log.find(text, self.heard)) < 0:
            ended = self.process.poll() is not None
            assert not ended or text in self.log, f"ended:\n{self.log}"
            assert time.monotonic() < deadline, f"no {text!r}:\n{self.log}"
            time.sleep(0.2)
        self.heard = at + len(text)

    def ends(self, seconds: float = 60) -> int:
        return self.process.wait(timeout=seconds)


class Processes(Flower):
    """Processes in a home of their own, ended on exit; none is started for us."""

    def __init__(self, home: Path) -> None:
        super().__init__(home, simulation=False)
        path = [f"{DOCKER}/bin", self.environment["PATH"], "/usr/sbin"]
        self.environment["PATH"] = os.pathsep.join(path)

    def __enter__(self) -> "Processes":
        self.home.mkdir(parents=True)
        return self


def started_server(folder: Path, flower: Flower) -> Machine:
    """Start a SuperLink as server.yaml does."""
    machine = Machine(folder, flower, {"8000": free_port(), "8443": free_port()})
    machine.script("make-certificates", "localhost")
    start_superlink(machine, service("superlink", "server"))
    return machine


def start_superlink(machine: Machine, found: dict) -> None:
    """Start a SuperLink and its gate, with `flwr` configured as in their image."""
    if not shutil.which("nginx", path=machine.environment["PATH"]):
        pytest.skip("needs nginx: apt-get install nginx")
    config = (DOCKER / "flower.toml").read_text()
    (machine.folder / "home/config.toml").write_text(machine.placed(config, found))
    machine.superlink = machine.start(found, "superlink")
    machine.superlink.says(LISTENING)


def new_edge(server: Machine, name: str) -> Machine:
    """Set up a node's machine as the guide does, but for key and samples."""
    ports = {"8443": server.ports["8443"]}
    machine = Machine(server.folder.parent / name, server.flower, ports)
    (machine.folder / "keys" / "edge").mkdir()
    copy_key(server, "edge/ca.crt", machine)
    return machine


def copy_key(source: Machine, name: str, target: Machine) -> None:
    """Copy a file of keys/ to keys/server/ of the server, keys/edge/ of a node."""
    to = "server" if (target.folder / "keys" / "server").exists() else "edge"
    shutil.copy(source.folder / "keys" / name, target.folder / "keys" / to)


def supernode(name: str) -> dict:
    return service("supernode", "edge", CLIENT_ID=name)


def commands(server: Machine) -> list[list[str]]:
    """Return what the guide runs in the server's container."""
    found = service("superlink", "server")
    return [
        [server.placed(word, found) for word in command]
        for command in in_guide(ON_SERVER)
    ]


def registered(server: Machine, name: str, part: int, parts: int) -> Machine:
    """Set up a node's machine as the guide does, with samples and a registered key."""
    machine = new_edge(server, name)
    machine.script("make-node-key", name)
    machine.samples(part, parts)
    copy_key(machine, f"edge/{name}.pub", server)
    first, *_ = commands(server)
    said = server.run([word.replace("edge-1", name) for word in first])
    assert "registered successfully" in said, said
    return machine


def memory(process: int, field: str) -> int:
    """Return a field of a process's status, in kB: its memory now or at most."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1])
