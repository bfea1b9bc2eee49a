"""The compose files' own commands as processes; certificates and keys; the images."""

import contextlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cluster import children
from flower import ROOT, free_port, named, wait_for
from flwr.app import ArrayRecord
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from machines import (
    DOCKER,
    GUIDE,
    ON_ONE_MACHINE,
    Machine,
    Processes,
    Started,
    commands,
    compose,
    copy_key,
    in_guide,
    memory,
    new_edge,
    registered,
    service,
    start_superlink,
    started_server,
    supernode,
)
from packaging.requirements import Requirement
from strangers import Strangers


def real(test: Callable) -> Callable:
    """Mark a test that starts real processes."""
    return pytest.mark.e2e(pytest.mark.slow(test))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("deployment")
    with Processes(folder / "home") as flower:
        flower.warm_up()
        yield started_server(folder / "server", flower)


@pytest.fixture(scope="module")
def nodes(server: Machine) -> list[tuple[Machine, Started]]:
    """Start the guide's two nodes, with a key and samples each."""
    *register, seen, _, _ = commands(server)
    names = [Path(command[-1]).stem for command in register]
    assert names == ["edge-1", "edge-2"]
    machines = [registered(server, name, part, 2) for part, name in enumerate(names)]
    logs = [
        machine.start(supernode(machine.name), machine.name, again=True)
        for machine in machines
    ]
    for log in logs:
        log.says("SuperNode ID")
    assert server.run(seen).count("online") == 2
    return list(zip(machines, logs, strict=True))


def ask(server: Machine, port: str, path: str, method: str = "POST") -> int:
    """Ask one of the server's ports and return the status."""
    ca = server.folder / "keys" / "edge" / "ca.crt"
    request = urllib.request.Request(
        f"https://localhost:{server.ports[port]}{path}", method=method
    )
    context = ssl.create_default_context(cafile=str(ca))
    try:
        with urllib.request.urlopen(request, context=context, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def on_a_machine_of_its_own(*processes: int) -> None:
    """Let processes go before other tests, which no server has beside it."""
    with contextlib.suppress(PermissionError):
        for process in processes:
            for task in Path(f"/proc/{process}/task").iterdir():
                os.setpriority(os.PRIO_PROCESS, int(task.name), -10)


@real
def test_the_guide_ends_with_a_finished_run_whatever_strangers_send(server, nodes):
    """500 idle connections, 10,000 bad requests and 100 bodies of a gigabyte."""
    *_, run, shrink = commands(server)
    nginx, process = children(server.superlink.process.pid)
    on_a_machine_of_its_own(nginx, *children(nginx), process)
    before = memory(process, "VmRSS")
    strangers = Strangers(server.ports["8443"], server.folder / "keys/edge/ca.crt")
    with ThreadPoolExecutor() as pool:
        attack = pool.submit(strangers.attack)
        out = server.run(run)
        bad, huge = attack.result()
    assert "AutoFLIP run finished" in out, out
    found = json.loads((server.folder / "state" / "first" / "summary.json").read_text())
    assert found["rounds"] == 2
    assert all("Sent successfully" in log.log for _, log in nodes)
    assert set(bad) <= {400, 401, 403, 414, 415, 503}
    assert set(huge) <= {0, 413, 503}
    calls = (server.folder / "calls.log").read_text().splitlines()
    honest = [line.split() for line in calls if line.startswith("127.0.0.1 ")]
    took = [float(seconds) for *_, seconds in honest]
    assert len(took) > 100
    assert max(*took, *strangers.waited) < 5
    assert memory(process, "VmHWM") <= 1.5 * before
    sizes = []
    for command in [["true"], shrink]:
        assert not server.run(command)
        files = (server.folder / "state").glob("superlink.db*")
        sizes.append(sum(file.stat().st_size for file in files))
    assert sizes[1] < sizes[0] / 2


@real
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("keyless", "All SuperNodes must be registered via the CLI"),
        ("stranger", "[code: 2004] Failed to activate SuperNode"),
    ],
)
def test_a_node_without_a_registered_key_is_refused(server, name, reason):
    machine = new_edge(server, name)
    found = supernode(name)
    if name == "stranger":
        machine.script("make-node-key", name)
    else:
        keyed = [word for word in found["command"] if word.startswith("--auth")]
        assert len(keyed) == 1
        found["command"].remove(keyed[0])
    node = machine.start(found, name)
    node.says(reason)
    assert node.ends() != 0
    assert "SuperNode ID" not in node.log


@real
def test_a_node_that_does_not_trust_the_server_does_not_talk_to_it(server):
    machine = new_edge(server, "elsewhere")
    machine.script("make-node-key", "elsewhere")
    other = Machine(server.folder.parent / "other", server.flower, {})
    other.script("make-certificates", "localhost")
    copy_key(other, "server/ca.crt", machine)
    node = machine.start(supernode("elsewhere"), "elsewhere")
    node.says("CERTIFICATE_VERIFY_FAILED")
    assert node.ends() != 0


@real
@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/register-node",
        "/v1/fleet/%2e%2e/control/register-node",
        "/v1/fleet/%2e%2e%2fcontrol%2fregister-node",
        "/v1/fleet/activate-node%0a",
        "//v1/control/register-node",
        "/docs",
    ],
)
def test_only_calls_of_nodes_pass_the_gate(server, path):
    assert ask(server, "8443", path) == 403


@real
def test_nobody_outside_of_its_container_reaches_the_superlink(server):
    port = f"{server.ports['8000']:04X}"
    lines = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    own = re.findall(rf"\d+: (\w+):{port} 0+:0000 0A", lines)
    assert own == ["0100007F"], "127.0.0.1, which every container has for itself"
    for name in ("server", "compose"):
        found = service("superlink", name)
        assert "--host=127.0.0.1" in found["command"]
        assert "network_mode" not in found


@real
def test_nobody_registers_a_key_through_the_gate(server):
    # The SuperLink itself takes a key from whoever reaches it.
    config = server.folder / "home" / "config.toml"
    config.write_text(
        config.read_text()
        + '\n[superlink.gate]\naddress = "localhost:'
        + f'{server.ports["8443"]}"\nroot-certificates = '
        + f'"{server.folder}/keys/server/ca.crt"\n'
    )
    machine = new_edge(server, "intruder")
    machine.script("make-node-key", "intruder")
    key = str(machine.folder / "keys" / "edge" / "intruder.pub")
    register = ["flwr", "supernode", "register", key]
    refused = server.run([*register, "gate"])
    assert "403" in refused, refused
    assert "registered successfully" not in refused
    assert "registered successfully" in server.run(register)


@real
@pytest.mark.parametrize(
    ("ahead", "said"),
    [(0, " answers; "), (8, "expected -240 to 3"), (-600, "expected -240 to 3")],
)
def test_a_node_whose_clock_is_wrong_is_told_before_it_starts(server, ahead, said):
    bin = server.folder / f"clock{ahead}"
    bin.mkdir()
    clock = (
        f'#!/bin/sh\n[ "$*" = +%s ] && exec {shutil.which("date")} -d "{ahead} sec" +%s'
    )
    (bin / "date").write_text(f'{clock}\nexec {shutil.which("date")} "$@"\n')
    (bin / "date").chmod(0o755)
    environment = server.environment | {
        "PATH": f"{bin}:{server.environment['PATH']}",
        "SERVER": "localhost",
        "GATE_PORT": str(server.ports["8443"]),
    }
    checked = subprocess.run(
        [DOCKER / "check-server"], env=environment, capture_output=True, text=True
    )
    assert said in checked.stdout + checked.stderr
    assert bool(checked.returncode) == bool(ahead)


@real
@pytest.mark.parametrize("port", ["8000", "8443"])
def test_the_health_that_the_images_ask_for(server, port):
    assert ask(server, port, "/health", "GET") == 200


@contextlib.contextmanager
def full(folder: Path, room: int = 100_000) -> Iterator[Path]:
    """Mount a disk with that many bytes left; yields the file that fills it."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a disk that fills up")
    try:
        filler = folder / "filler"
        filler.write_bytes(bytes((4 << 20) - room))
        yield filler
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@real
def test_nodes_and_a_run_outlive_faults_a_full_disk_and_a_crash_of_the_server(
    server, nodes
):
    """SuperLink, gate and ServerApp are killed; the run goes on as the guide says."""
    (_, one), (machine, other) = nodes
    outlive_faults(server, one)
    *_, run, _ = commands(server)
    run[-1] = run[-1].replace("/first", "/outlived")
    folder = server.folder / "state" / "outlived"
    with ThreadPoolExecutor() as pool, full(machine.folder / "home") as filler:
        first = pool.submit(server.run, run)
        other.says("No space left on device", 120)
        filler.unlink()
        wait_for((folder / "checkpoints" / "round-000001.safetensors").exists, first)
        _, superlink = children(server.superlink.process.pid)
        os.kill(superlink, signal.SIGKILL)
        assert server.superlink.ends() == 1, "with its gate"
        with contextlib.suppress(ProcessLookupError):  # what else a container had
            os.killpg(server.superlink.process.pid, signal.SIGKILL)
        for process in server.flower.server_apps():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        one.says("Connection attempt failed")
        assert "AutoFLIP run finished" not in first.result()
        start_superlink(server, service("superlink", "server"))
        out = server.run([*run[:-1], f"{run[-1]} resume=true"])
    assert "going on after round" in out, out
    assert "AutoFLIP run finished" in out, out
    metrics = (folder / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in metrics.splitlines()]
    assert len(rows) == 2
    assert rows[-1]["missing"] == []


def outlive_faults(server: Machine, node: Started) -> None:
    """Let the gate answer a node's calls with errors; it comes back from each.

    Flower's SuperNode gives up after a 500, and tries again after the others.
    """
    for status in (502, 503, 444):
        with server.fault("pull-messages", status):
            node.says("Connection attempt failed")
        node.says("Connection successful")
    with server.fault("pull-messages", 500):
        node.says("The SuperNode ends: it no longer asks for messages")
    node.says("SuperNode ID")
    with server.fault("send-node-heartbeat", 500):
        node.says("The SuperNode ends: <Thread")
    node.says("SuperNode ID")
    ended = "The SuperNode ends: its SuperExec has ended"
    while ended not in node.log[node.heard :]:  # the one before may take a while to end
        for process in named("flower-superexec"):
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(process) == node.process.pid:
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.2)
    node.says(ended)
    node.says("SuperNode ID")


@real
def test_one_machine(tmp_path):
    with Processes(tmp_path / "home") as flower:
        ports = {"8000": free_port(), "8443": free_port()}
        machine = Machine(tmp_path / "machine", flower, ports)
        machine.script("make-certificates", "localhost")
        services = compose("compose", TORCH_INDEX="default")["services"]
        superlink = services.pop("superlink")
        start_superlink(machine, superlink)
        for name, found in services.items():
            machine.ports["9094"] = free_port()
            machine.start(found, name)
        (command,) = in_guide(ON_ONE_MACHINE)
        out = machine.run([machine.placed(word, superlink) for word in command])
    assert "AutoFLIP run finished" in out, out
    assert (machine.folder / "state" / "first" / "summary.json").exists()


def test_what_the_compose_files_name_exists(tmp_path):
    with Processes(tmp_path / "home") as flower:
        machine = Machine(tmp_path / "machine", flower, {})
        machine.script("make-certificates", "localhost")
        machine.script("make-node-key", "edge-1")
    stages = re.findall(
        r"^FROM .* AS (\w+)$", (DOCKER / "Dockerfile").read_text(), re.M
    )
    values = {"TORCH_INDEX": "default", "SERVER": "localhost", "CLIENT_ID": "edge-1"}
    for name in ("compose", "server", "edge"):
        whole = compose(name, **values)
        for found in whole["services"].values():
            if "build" in found:
                context = DOCKER / found["build"]["context"]
                assert (context / found["build"]["dockerfile"]).is_file()
                assert found["build"]["target"] in stages
            mounted = {}
            for volume in found["volumes"]:
                source, target = volume.split(":")[:2]
                if source.startswith("."):
                    assert (machine.folder / source).is_dir()
                    mounted[target] = machine.folder / source
                else:
                    assert source in whole["volumes"]
            for word in found["command"]:
                for file in re.findall(r"=(/keys/\S+)", word):
                    assert (mounted["/keys"] / file.removeprefix("/keys/")).is_file()
            assert set(found.get("depends_on", {})) <= set(whole["services"])


@pytest.mark.parametrize("name", ["compose", "server", "edge"])
def test_a_value_that_is_missing_is_asked_for_in_words_of_the_guide(name):
    text = (DOCKER / f"{name}.yaml").read_text()
    for variable in re.findall(r"\$\{(\w+):\?", text):
        others = {"TORCH_INDEX": "x", "SERVER": "x", "CLIENT_ID": "x"}
        del others[variable]
        with pytest.raises(KeyError, match=rf"{variable}: in docker/\.env; "):
            compose(name, **others)
        assert f'echo "{variable}=' in GUIDE


def test_only_the_gate_publishes_a_port():
    values = {"TORCH_INDEX": "default", "SERVER": "localhost", "CLIENT_ID": "edge-1"}
    published = {
        (name, key): found["ports"]
        for name in ("compose", "server", "edge")
        for key, found in compose(name, **values)["services"].items()
        if "ports" in found
    }
    assert published == {("server", "superlink"): ["8443:8443"]}


def test_a_model_of_any_size_passes_the_gate_in_objects():
    (limit,) = re.findall(
        r"client_max_body_size (\d+)m;", (DOCKER / "nginx.conf").read_text()
    )
    arrays = ArrayRecord([np.zeros(2**24, np.float32)])
    sizes = [len(each.deflate()) for each in get_all_nested_objects(arrays).values()]
    assert max(sizes) > 5 << 20
    assert max(sizes) + 1000 < int(limit) << 20, "with the rest of a push-object call"


def test_the_images_get_all_of_the_app_and_no_keys():
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in rules
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert all((ROOT / path).exists() for path in allowed)
    assert {"autoflip_flwr", "conf", "server_app.py", "client_app.py"} <= allowed
    assert not any(path in {"docker", "docker/keys", "docker/data"} for path in allowed)


def test_every_dependency_is_pinned_to_a_version_that_fits():
    lines = [
        line
        for name in ("core.txt", "app.txt")
        for line in (DOCKER / name).read_text().splitlines()
        if not line.startswith("#")
    ]
    assert all(re.search(r" --hash=sha256:[0-9a-f]{64}$", line) for line in lines)
    pins = dict(line.split()[0].split("==") for line in lines)
    dockerfile = (DOCKER / "Dockerfile").read_text()
    for name in ("torch", "torchvision"):
        (pins[name],) = re.findall(rf"^ARG {name.upper()}=(\S+)$", dockerfile, re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for dependency in map(Requirement, project["dependencies"]):
        pinned = pins[dependency.name]
        assert pinned in dependency.specifier, dependency


def names_in(certificate: Path) -> str:
    command = [
        "openssl",
        "x509",
        "-in",
        certificate,
        "-noout",
        "-ext",
        "subjectAltName",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_certificates_have_the_names_given_and_the_authority_stays(tmp_path):
    with Processes(tmp_path / "home") as flower:
        machine = Machine(tmp_path / "machine", flower, {})
        assert "usage: " in machine.script("make-certificates")
        machine.script(
            "make-certificates",
            "server.example.org",
            "localhost",
            "192.0.2.7",
            "fd00::7",
        )
        keys = machine.folder / "keys"
        authority = (keys / "edge" / "ca.crt").read_text()
        found = names_in(keys / "server" / "server.crt")
        for name in ("DNS:server.example.org", "192.0.2.7", "FD00:0:0:0:0:0:0:7"):
            assert name in found
        assert found.count("DNS:localhost") == 1
        machine.script("make-certificates", "new.example.org")
        assert "DNS:new.example.org" in names_in(keys / "server" / "server.crt")
        assert (keys / "edge" / "ca.crt").read_text() == authority
        for secret in ("ca.key", "server/server.key"):
            assert (keys / secret).stat().st_mode & 0o077 == 0
        # What containers mount has no authority to sign.
        assert not list(keys.glob("*/ca.key"))


def test_a_key_of_a_node_is_never_overwritten(tmp_path):
    with Processes(tmp_path / "home") as flower:
        machine = Machine(tmp_path / "machine", flower, {})
        assert "usage: " in machine.script("make-node-key")
        machine.script("make-node-key", "edge-1")
        key = machine.folder / "keys" / "edge" / "node.key"
        before = key.read_text()
        assert "exists" in machine.script("make-node-key", "edge-1")
        assert key.read_text() == before
        assert key.stat().st_mode & 0o077 == 0


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_the_scripts_are_clean():
    scripts = [
        path for path in DOCKER.iterdir() if path.name.startswith(("make", "check"))
    ]
    scripts.append(DOCKER / "bin" / "behind-gate")
    assert len(scripts) == 5
    subprocess.run(["shellcheck", *scripts], check=True)
