"""Runs in simulation, without a server: clients as Ray tasks, one a core.

Several runs may share the cores. Flower's own `run_simulation` is deprecated, starts
Ray anew for each run and takes no run config; `flwr run` needs a SuperLink. Both give
the same weights as this.
"""

import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from autoflip_flwr import apps
from autoflip_flwr.grid import stream

#: A node id must not be 0, nor the SuperLink's, which is 1.
_FIRST_NODE = 100


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
        client_app: Callable[[], ClientAppCallable] = apps.client_app,
    ) -> None:
        _identify()
        self._client_app = client_app
        self._run = Run.create_empty(run_id=1)
        self._pending: dict[str, tuple[Any, Message]] = {}
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

        A node that is still busy with an earlier message gives that one up.
        """
        message_ids = []
        for message in messages:
            self.give_up(message.metadata.dst_node_id)
            message_id = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = message_id
            context = self._contexts[message.metadata.dst_node_id]
            task = _answer.remote(self._client_app, message, context)
            self._pending[message_id] = (task, message)
            message_ids.append(message_id)
        return message_ids

    def give_up(self, node_id: int | None = None) -> None:
        """End what a node is still busy with; None: what any is."""
        late = [
            message_id
            for message_id, (_, message) in self._pending.items()
            if node_id in (None, message.metadata.dst_node_id)
        ]
        for message_id in late:
            task, _ = self._pending.pop(message_id)
            ray.cancel(task, force=True)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there, each once, in the order of the ids."""
        replies = []
        for message_id in message_ids:
            if message_id not in self._pending:
                continue
            task, message = self._pending[message_id]
            ready, _ = ray.wait([task], timeout=0)
            if not ready:
                continue
            del self._pending[message_id]
            try:
                reply, context = ray.get(task)
                self._contexts[message.metadata.dst_node_id] = context
            except ray.exceptions.RayError as error:  # its worker died
                reply = _error(message, error)
            replies.append(reply)
        return replies

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
    _identify()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    try:
        return client_app()(message, context), context
    except Exception as error:
        return _error(message, error), context


def _error(message: Message, error: Exception) -> Message:
    code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    return Message(Error(code, f"{type(error).__name__}: {error}"), reply_to=message)


@ray.remote(num_cpus=0, max_retries=0)
def simulate(num_nodes: int, run_config: Mapping[str, Any], log: str) -> None:
    """Run the ServerApp of one run, its log in a file; the cores are for its clients.

    Parameters
    ----------
    num_nodes : int
    run_config : mapping
        `preset`, `overrides` and `output-dir`.
    log : str
        Path of the file for Flower's log.
    """
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
        apps.serve(grid, context)
    except Exception:
        logger.exception("the run failed")
        raise
    finally:  # the process may be a node's next
        grid.give_up()
        logger.handlers = []
        file.close()


def _identify() -> None:
    """Let this process make messages, which Flower allows inside a task alone."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
