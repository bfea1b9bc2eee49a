"""Simulated runs without a SuperLink: clients are Ray tasks, one per core or GPU share.

Several runs can share the cores of one or many machines. Flower's `run_simulation` is
deprecated, starts Ray for each run and takes no run config; `flwr run` needs a
SuperLink. All three give the same weights.
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

#: Node ids must not be 0, or 1, which is the SuperLink's.
_FIRST_NODE = 100

#: Tasks per client that runs: that one, and the next one.
_QUEUED = 2

#: Clients that share a GPU. Each is a process, and they take turns on it.
_CLIENTS_A_GPU = 4


def clients_at_once() -> int:
    """Return how many clients Ray runs at once: a core each, and a share of a GPU.

    Without a GPU, or with ``CUDA_VISIBLE_DEVICES=`` empty, the cores alone count.
    """
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cores = max(1, int(resources.get("CPU", 1)))
    gpus = int(resources.get("GPU", 0))
    return min(cores, gpus * _CLIENTS_A_GPU) if gpus else cores


class RayGrid(Grid):
    """A Grid whose nodes are Ray tasks, as many at once as `clients_at_once`.

    `run_config` is that of both apps, as with `flwr run`; `client_app` returns the app
    of a node.
    """

    def __init__(
        self,
        num_nodes: int,
        run_config: Mapping[str, Any],
        client_app: Callable[[], ClientAppCallable] = our_client_app,
    ) -> None:
        become_task()
        self._client_app = client_app
        # Ray names a task the GPU that it has a share of.
        gpus = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
        share = 1 / _CLIENTS_A_GPU if gpus else 0
        self._task = _answer.options(num_gpus=share)
        self._waiting: deque[Message] = deque()
        self._running: dict[Any, Message] = {}  # task -> the message it answers
        self._contexts: dict[int, Context] = {}
        for index in range(num_nodes):
            node_id = _FIRST_NODE + index
            config = {"partition-id": index, "num-partitions": num_nodes}
            self._contexts[node_id] = _context(node_id, config, run_config)

    def get_node_ids(self) -> list[int]:
        """Return the nodes."""
        return list(self._contexts)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Return the replies that arrive within `timeout` seconds."""
        return list(stream(self, messages, timeout=timeout))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages to their nodes; return the ids.

        Earlier messages are given up: nobody waits for their replies any more, and
        their tasks would take the cores from the new ones.
        """
        batch = list(messages)
        self.give_up()
        for message in batch:
            set_message_id(message, str(uuid.uuid4()))
        self._waiting.extend(batch)
        self._feed()
        return [message.metadata.message_id for message in batch]

    def give_up(self) -> None:
        """Cancel all tasks."""
        self._waiting.clear()
        for task in self._running:
            ray.cancel(task, force=True)
        self._running.clear()

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have arrived, each once."""
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
        """Start only as many tasks as keep all cores busy.

        Ray copies the messages of its tasks: a thousand explorers at once would put a
        thousand models into its object store.
        """
        if not self._waiting:
            return
        most = _QUEUED * clients_at_once()
        while self._waiting and len(self._running) < most:
            message = self._waiting.popleft()
            context = self._contexts[message.metadata.dst_node_id]
            task = self._task.remote(self._client_app, message, context)
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

    run: Run = empty_run()

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self.run = run


@ray.remote(num_cpus=1, max_retries=0)
def _answer(
    client_app: Callable[[], ClientAppCallable], message: Message, context: Context
) -> tuple[Message, Context]:
    """Act as a node: an exception becomes an error reply, as with a SuperNode."""
    become_task()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    try:
        return client_app()(message, context), context
    except Exception as error:
        return error_reply(message, error), context


def simulate(num_nodes: int, run_config: Mapping[str, Any], log: str) -> Any:
    """Start one run; return the Ray task of its ServerApp.

    The ServerApp takes no core and runs on this machine, so its files are here.
    Flower's log goes to the file `log`.
    """
    node_id = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return _serve.options(scheduling_strategy=here).remote(num_nodes, run_config, log)


@ray.remote(num_cpus=0, max_retries=0)
def _serve(num_nodes: int, run_config: Mapping[str, Any], log: str) -> None:
    grid = RayGrid(num_nodes, run_config)
    logger, file = logging.getLogger("flwr"), logging.FileHandler(log)
    logger.handlers = [file]
    logger.setLevel(logging.INFO)
    try:
        serve(grid, _context(1, {}, run_config))
    except Exception:
        logger.exception("the run failed")
        raise
    finally:  # Ray may use the process for a node next
        grid.give_up()
        logger.handlers = []
        file.close()


def _context(
    node_id: int, node_config: dict[str, Any], run_config: Mapping[str, Any]
) -> Context:
    return Context(1, node_id, node_config, RecordDict(), dict(run_config))
