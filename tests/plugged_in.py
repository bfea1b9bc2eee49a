"""Run example apps without a server: `python plugged_in.py ROUNDS FOLDER...`.

Needs what the examples and the core of autoflip_flwr need, and no more: the tests run
it with other packages hidden, and with other versions of Flower. Each example has a
process of its own, a fork of one that has imported torch. Prints a JSON object a line.
"""

import contextlib
import functools
import importlib
import io
import json
import logging
import os
import random
import sys
import tomllib
import uuid
from pathlib import Path

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

NODES = 4
SENT: list[tuple[str, str]] = []  # phase and array of every record sent

torch.set_num_threads(1)
with contextlib.suppress(ImportError):  # messages are made inside a task, since 1.40
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def contexts(run_config: dict) -> dict[int, Context]:
    return {
        100 + i: Context(
            run_id=1,
            node_id=100 + i,
            node_config={"partition-id": i, "num-partitions": NODES},
            state=RecordDict(),
            run_config=run_config,
        )
        for i in range(NODES)
    }


def note(content: RecordDict) -> None:
    phases = [c.get("autoflip.phase") for c in content.config_records.values()]
    for record in content.array_records.values():
        SENT.extend((str(phases[0] if phases else None), name) for name in record)


class InProcess(Grid):
    """Calls the ClientApp for every message."""

    def __init__(self, client_app, run_config: dict) -> None:
        self.client_app = client_app
        self.contexts = contexts(run_config)
        self.replies: dict[str, Message] = {}

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            message_id = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = message_id
            note(message.content)
            node_id = message.metadata.dst_node_id
            copied = Message(
                RecordDict(dict(message.content)),
                dst_node_id=node_id,
                message_type=message.metadata.message_type,
            )
            copied.metadata.__dict__["_message_id"] = message_id
            try:
                reply = self.client_app(copied, self.contexts[node_id])
            except Exception as error:  # as a SuperNode does
                reply = Message(Error(2, f"{error!r}"), reply_to=copied)
            self.replies[message_id] = reply
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids):
        return [self.replies.pop(n) for n in list(message_ids) if n in self.replies]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))

    def create_message(self, content, message_type, dst_node_id, *more, **named):
        return Message(content, dst_node_id, message_type)

    def set_run(self, run) -> None: ...

    @property
    def run(self): ...


def on_the_older_api(server_module, client_app, run_config: dict, rounds: int) -> None:
    """Run Flower's older Server with proxies that call the ClientApp."""
    from flwr.server import Server, SimpleClientManager
    from flwr.server.client_proxy import ClientProxy

    try:
        compat = importlib.import_module("flwr.compat.common.recorddict_compat")
    except ImportError:
        compat = importlib.import_module("flwr.common.recorddict_compat")

    class Proxy(ClientProxy):
        def __init__(self, context: Context) -> None:
            super().__init__(str(context.node_id))
            self.context = context

        def call(self, content: RecordDict, kind: str) -> RecordDict:
            note(content)
            reply = client_app(Message(content, int(self.cid), kind), self.context)
            if reply.has_error():
                raise RuntimeError(reply.error.reason)
            return reply.content

        def fit(self, ins, timeout, group_id):
            content = self.call(compat.fitins_to_recorddict(ins, True), "train")
            return compat.recorddict_to_fitres(content, True)

        def evaluate(self, ins, timeout, group_id):
            asked = compat.evaluateins_to_recorddict(ins, True)
            return compat.recorddict_to_evaluateres(self.call(asked, "evaluate"))

        def get_properties(self, ins, timeout, group_id): ...

        def get_parameters(self, ins, timeout, group_id): ...

        def reconnect(self, ins, timeout, group_id): ...

    context = Context(1, 1, {}, RecordDict(), run_config)
    components = server_module.server_fn(context)
    manager = SimpleClientManager()
    for each in contexts(run_config).values():
        manager.register(Proxy(each))
    server = Server(client_manager=manager, strategy=components.strategy)
    server.set_max_workers(1)
    server.fit(num_rounds=rounds, timeout=None)


def main(folder: Path, rounds: int) -> None:
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    run_config = dict(project["tool"]["flwr"]["app"]["config"])
    run_config["num-server-rounds"] = rounds
    sys.path.insert(0, str(folder))
    server_module = importlib.import_module("digits_app.server_app")
    client_app = importlib.import_module("digits_app.client_app").app
    logged = io.StringIO()
    logger = logging.getLogger("flwr")
    logger.handlers = [logging.StreamHandler(logged)]
    random.seed(0)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if hasattr(server_module, "server_fn"):
            on_the_older_api(server_module, client_app, run_config, rounds)
        else:
            grid = InProcess(client_app, run_config)
            server_module.app(grid, Context(1, 1, {}, RecordDict(), run_config))
    from importlib.metadata import version

    accuracies = [
        float(line.split()[-1])
        for line in printed.getvalue().splitlines()
        if "final accuracy" in line
    ]
    print(
        json.dumps(
            {
                "flwr": version("flwr"),
                "accuracy": accuracies[-1],
                "warnings": [
                    line
                    for line in logged.getvalue().splitlines()
                    if "dropped" in line or "left out" in line
                ],
                "masked": "mask: density 0.2000" in logged.getvalue(),
                "sent": sorted({f"{phase}:{name}" for phase, name in SENT}),
                "imported": sorted({name.partition(".")[0] for name in sys.modules}),
            }
        )
    )


def forked(folder: Path, rounds: int) -> int:
    """Run one in a process of its own; returns its exit status."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        main(folder, rounds)
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


if __name__ == "__main__":
    importlib.import_module("torch._dynamo")  # each of them trains
    datasets = importlib.import_module("sklearn.datasets")
    datasets.load_digits = functools.cache(datasets.load_digits)  # per message, else
    rounds, *folders = sys.argv[1:]
    sys.exit(any(forked(Path(folder), int(rounds)) for folder in folders))
