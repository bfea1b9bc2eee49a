"""Runs in simulation, without a server: clients as Ray tasks, one a core.

Several runs may share the cores, which may be those of many machines. Flower's own
`run_simulation` is deprecated, starts Ray anew for each run and takes no run config;
`flwr run` needs a SuperLink. Both give the same weights as this.
"""

import logging
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autoflip_flwr.app.client import client_app as our_client_app
from autoflip_flwr.app.server import serve
from autoflip_flwr.server.messages import stream
from autoflip_flwr.wire.flower import (
    ClientAppCallable,
    Run,
    become_task,
    empty_run,
    error_reply,
    set_message_id,
)

#: A node id must not be 0, nor the SuperLink's, which is 1.
_FIRST_NODE = 100

#: Tasks a core: one that runs, one that is there when it ends.
_QUEUED = 2


class RayGrid(Grid):
    """A Grid whose nodes are tasks of Ray, each on a core of its own.

    Parameters
    ----------
    num_nodes : int
    run_config : mapping
        As `flwr run` would hand it to the apps.
    client_app : callable
        Makes the app of every node.
    """

    def __init__(
        self,
        num_nodes: int,
        run_config: Mapping[str, Any],
        client_app: Callable[[], ClientAppCallable] = our_client_app,
    ) -> None:
        become_task()
        self._client_app = client_app
        self._run = empty_run()
        self._waiting: deque[Message] = deque()
        self._running: dict[Any, Message] = {}  # task -> what it answers
        self._contexts = {
            _FIRST_NODE + index: Context(
                run_id=1,
                node_id=_FIRST_NODE + index,
                node_config={"partition-id": index, "num-partitions": num_nodes},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for index in range(num_nodes)
        }

    def get_node_ids(self) -> list[int]:
        """Return the nodes."""
        return list(self._contexts)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Let nodes answer; those that take longer than `timeout` seconds are left."""
        return list(stream(self, messages, timeout=timeout))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand messages to their nodes; return their ids.

        What nodes are still busy with is given up: nobody waits for it any more, and
        it would keep the cores from those who are asked now.
        """
        batch = list(messages)
        self.give_up()
        for message in batch:
            set_message_id(message, str(uuid.uuid4()))
        self._waiting.extend(batch)
        self._feed()
        return [message.metadata.message_id for message in batch]

    def give_up(self) -> None:
        """End what nodes are still busy with."""
        self._waiting.clear()
        for task in self._running:
            ray.cancel(task, force=True)
        self._running.clear()

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there, each once."""
        asked = set(message_ids)
        tasks = [t for t, m in self._running.items() if m.metadata.message_id in asked]
        replies = []
        if tasks:
            tasks, _ = ray.wait(tasks, num_returns=len(tasks), timeout=0)
        for task in tasks:
            message = self._running.pop(task)
            try:
                reply, context = ray.get(task)
                self._contexts[message.metadata.dst_node_id] = context
            except ray.exceptions.RayError as error:  # its worker died
                reply = error_reply(message, error)
            replies.append(reply)
        if replies:
            self._feed()
        return replies

    def _feed(self) -> None:
        """Start no more tasks than keep all cores busy: Ray copies what they are given.

        A thousand explorers at once would be a thousand models in its object store.
        """
        if not self._waiting:
            return
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        most = _QUEUED * max(1, int(resources.get("CPU", 1)))
        while self._waiting and len(self._running) < most:
            message = self._waiting.popleft()
            context = self._contexts[message.metadata.dst_node_id]
            task = _answer.remote(self._client_app, message, context)
            self._running[task] = message

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    @property
    def run(self) -> Run:
        """The run, an empty one unless it is set."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run


@ray.remote(num_cpus=1, max_retries=0)
def _answer(
    client_app: Callable[[], ClientAppCallable], message: Message, context: Context
) -> tuple[Message, Context]:
    """Be a node; an exception becomes an error reply, as a SuperNode's does."""
    become_task()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    try:
        return client_app()(message, context), context
    except Exception as error:
        return error_reply(message, error), context


def simulate(num_nodes: int, run_config: Mapping[str, Any], log: str) -> Any:
    """Start one run, its log in a file; return the Ray task that is its ServerApp.

    The cores of the cluster are for its clients. The ServerApp is on this machine,
    where its files are wanted.

    Parameters
    ----------
    num_nodes : int
    run_config : mapping
        `preset`, `overrides` and `output-dir`.
    log : str
        Path of the file for Flower's log.
    """
    here = NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    return _serve.options(scheduling_strategy=here).remote(num_nodes, run_config, log)


@ray.remote(num_cpus=0, max_retries=0)
def _serve(num_nodes: int, run_config: Mapping[str, Any], log: str) -> None:
    grid = RayGrid(num_nodes, run_config)
    logger, file = logging.getLogger("flwr"), logging.FileHandler(log)
    logger.handlers = [file]
    logger.setLevel(logging.INFO)
    context = Context(
        run_id=1,
        node_id=1,
        node_config={},
        state=RecordDict(),
        run_config=dict(run_config),
    )
    try:
        serve(grid, context)
    except Exception:
        logger.exception("the run failed")
        raise
    finally:  # the process may be a node's next
        grid.give_up()
        logger.handlers = []
        file.close()
