"""What attackers of a deployment cost the honest nodes.

    python tests/attacks.py --rounds 3

The processes of docker/server.yaml and docker/edge.yaml on the loopback: SuperLink
behind nginx, three honest SuperNodes, and a fourth one with a registered key, which
lies when it is told to. In each round there is a run under all attacks of strangers at
once, one under all faults, and so on, each between two runs that nobody disturbs; with
--each there is one for each attack. Attackers use the same processors as the nodes.

Prints for each of these runs, in the order of the rounds: its time, divided by the mean
of the two undisturbed ones beside it (their mean in seconds: `usual`); the slowest call
of an honest node, in seconds; the SuperLink's peak memory, divided by that of the
undisturbed run before.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from cluster import children
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.interceptors.http.runtime_version import (
    RuntimeVersionHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import (
    generate_key_pairs,
    public_key_to_bytes,
)
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from machines import (
    Machine,
    Processes,
    Started,
    commands,
    memory,
    registered,
    started_server,
    supernode,
)
from strangers import BAD, HUGE, Strangers

LIAR = Path(__file__).parent / "liar"
HONEST = 3
#: Address and status, in the gate's log, of a node's call that counts.
HONEST_CALL = ("127.0.0.1", "200")
Attack = Callable[[], AbstractContextManager[None]]


class Deployment:
    """A server, three honest nodes and a registered liar."""

    def __init__(self, folder: Path, flower: Processes, rounds: int) -> None:
        self.server = started_server(folder / "server", flower)
        _, self.superlink = children(self.server.superlink.process.pid)
        self.ca = self.server.folder / "keys/edge/ca.crt"
        self.strangers = Strangers(self.server.ports["8443"], self.ca)
        self.calls = self.server.folder / "calls.log"
        self.ended = threading.Event()  # the run that is going on
        self.runs = 0
        self.refused: list[int] = []  # status of each call without a registered key
        *_, self.command, _ = commands(self.server)
        self.command[-1] = self.command[-1].replace("rounds=2", f"rounds={rounds}")
        self.command[-1] = self.command[-1].replace(
            "nodes=2", f"nodes={HONEST + 1} strategy.straggler-factor=1.5"
        )
        self.lie = folder / "lie"
        self.lie.write_text("")
        for part in range(HONEST + 1):
            machine = registered(self.server, f"node-{part}", part, HONEST + 1)
            if part == HONEST:
                path = f"{LIAR}{os.pathsep}{machine.environment['PATH']}"
                machine.environment |= {"LIE": str(self.lie), "PATH": path}
            self.start(machine).says("SuperNode ID")

    def start(self, machine: Machine) -> Started:
        """Start a SuperNode, again and again."""
        return machine.start(supernode(machine.name), machine.name, again=True)

    def run(self, attack: Attack) -> dict[str, float]:
        """Do a run under an attack; return what it took.

        Seconds, those of the slowest honest call, kB at most, and how many calls
        without a registered key were refused a second.
        """
        self.runs += 1
        before = len(self.calls.read_text())
        self.strangers.waited.clear()
        self.ended.clear()
        self.refused.clear()
        Path(f"/proc/{self.superlink}/clear_refs").write_text("5")  # the peak anew
        began = time.monotonic()
        with self.strangers.honest(), attack():
            *command, config = self.command
            config = config.replace("/first", f"/{self.runs}")
            try:
                said = self.server.run([*command, config])
            finally:
                self.ended.set()
            seconds = time.monotonic() - began
        if "AutoFLIP run finished" not in said:
            raise RuntimeError(said)
        calls = [line.split() for line in self.calls.read_text()[before:].splitlines()]
        took = [float(s) for a, _, status, s in calls if (a, status) == HONEST_CALL]
        return {
            "seconds": seconds,
            "slowest": max(*took, *self.strangers.waited),
            "memory": memory(self.superlink, "VmHWM"),
            "refused": len(self.refused) / seconds,
        }

    def attacks(self) -> dict[str, dict[str, Attack]]:
        """Return all attacks, by who attacks; each goes on inside the block."""
        strangers = self.strangers
        return {
            "strangers": {
                "500 idle connections": self.by(self.idle),
                "10,000 bad requests": self.by(
                    lambda: strangers.bad(BAD // 4), threads=4
                ),
                "100 bodies of 1 GB": self.by(
                    lambda: [strangers.huge(number) for number in range(HUGE // 4)],
                    threads=4,
                ),
            },
            "errors to one poll each": {
                "500": self.by(lambda: self.fault(500)),
                "502": self.by(lambda: self.fault(502)),
                "503": self.by(lambda: self.fault(503)),
                "connection closed": self.by(lambda: self.fault(444)),
            },
            "nodes without a registered key": {
                "2 nodes": self.by(self.unregistered, threads=2)
            },
            "a registered liar": {
                "an object that cannot be read": self.lying("unreadable"),
                "values a million times too far": self.lying("far"),
                "empty values and no arrays": self.lying("empty"),
            },
            "a registered flooder": {"300 MB more a reply": self.lying("large")},
        }

    def by(self, work: Callable[[], object], threads: int = 1) -> Attack:
        """Return an attack by threads."""

        @contextmanager
        def attack() -> Iterator[None]:
            with ThreadPoolExecutor(threads) as pool:
                done = [pool.submit(work) for _ in range(threads)]
                yield
            for one in done:
                one.result()

        return attack

    def idle(self) -> None:
        """Hold 500 idle connections; open new ones when the gate has closed them."""
        while not self.ended.is_set():
            with ExitStack() as open_ones, suppress(OSError):
                for one in self.strangers.idle():
                    open_ones.enter_context(one)
                self.ended.wait(10)

    def fault(self, status: int) -> None:
        """Answer one poll with an error, when a node has sent a reply."""
        start = len(self.calls.read_text())

        def until(text: str) -> None:
            while text not in self.calls.read_text()[start:]:
                if self.ended.wait(0.02):
                    raise RuntimeError(f"the run ended before {text}")

        until("push-messages 200")
        with self.server.fault("pull-messages", status):
            until(f"pull-messages {status}")

    def lying(self, lie: str) -> Attack:
        """Return an attack by the registered liar, who tells its lies in turn."""

        @contextmanager
        def attack() -> Iterator[None]:
            before = self.lie.read_text()
            self.lie.write_text(f"{before} {lie}")
            yield
            self.lie.write_text(before)

        return attack

    def unregistered(self) -> None:
        """Try to join with a key of one's own, and to pull, again and again.

        With the client of Flower's SuperNode, each time on a new connection. A
        SuperNode itself tries once in four seconds: its start takes that long, and its
        processor time is the attacker's.
        """
        keys = generate_key_pairs()
        join = ActivateNodeRequest(
            public_key=public_key_to_bytes(keys[1]), heartbeat_interval=30
        )
        while not self.ended.wait(0.1):
            with FleetHttpClient.from_server_address(
                f"localhost:{self.strangers.port}",
                insecure=False,
                root_certificates=self.ca.read_bytes(),
                interceptors=[
                    RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                    NodeAuthHttpInterceptor(*keys),
                ],
            ) as client:
                for call, asked in (
                    (client.ActivateNode, join),
                    (client.PullMessages, PullMessagesRequest(node=Node(node_id=1))),
                ):
                    try:
                        call(asked)
                    except httpx.HTTPStatusError as error:
                        self.refused.append(error.response.status_code)
                    else:
                        raise RuntimeError("a node without a registered key got in")
        if not {401, 403, 404} & set(self.refused):
            raise RuntimeError("all were refused by the gate for their number alone")


def together(attacks: Iterable[Attack]) -> Attack:
    """Return an attack that is several at once."""

    @contextmanager
    def attack() -> Iterator[None]:
        with ExitStack() as stack:
            for one in attacks:
                stack.enter_context(one())
            yield

    return attack


def main() -> None:
    """Do all runs and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rounds-of-a-run", type=int, default=3)
    parser.add_argument("--each", action="store_true", help="each attack on its own")
    parser.add_argument("--only", default="", help="a part of the attacks' names")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the processes, too
    result: dict[str, Any] = {"load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as name, Processes(Path(name, "home")) as flower:
        deployment = Deployment(Path(name), flower, arguments.rounds_of_a_run)
        attacks: dict[str, Attack] = {}
        for who, own in deployment.attacks().items():
            if arguments.each:
                attacks |= {f"{who}: {what}": attack for what, attack in own.items()}
            else:
                attacks[who] = together(own.values())
        attacks = {n: a for n, a in attacks.items() if arguments.only in n}
        nobody = together([])
        deployment.run(nobody)  # nodes install the app
        before = deployment.run(nobody)
        for _ in range(arguments.rounds):
            for attack, action in attacks.items():
                found, after = deployment.run(action), deployment.run(nobody)
                usual = (before["seconds"] + after["seconds"]) / 2
                columns = ("time", "slowest", "memory", "usual", "refused")
                row = result.setdefault(attack, {column: [] for column in columns})
                row["time"].append(round(found["seconds"] / usual, 2))
                row["slowest"].append(round(found["slowest"], 2))
                row["memory"].append(round(found["memory"] / before["memory"], 2))
                row["usual"].append(round(usual, 1))
                row["refused"].append(round(found["refused"], 1))
                print(attack, row, os.getloadavg()[0], file=sys.stderr, flush=True)
                before = after
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
