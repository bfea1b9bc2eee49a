"""Runs in simulation, without a server: clients as Ray tasks, one a core.

Several runs may share the cores. Flower's own `run_simulation` is deprecated, starts
Ray anew for each run and takes no run config; `flwr run` needs a SuperLink. Both give
the same weights as this.
"""

import logging
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from autoflip_flwr import apps

#: A node id must not be 0, nor the SuperLink's, which is 1.
_FIRST_NODE = 100


class RayGrid(Grid):
    """A Grid whose nodes are tasks of Ray, each on a core of its own.

    Parameters
    ----------
    num_nodes : int
    run_config : mapping
        As `flwr run` would hand it to the apps.
    """

    def __init__(self, num_nodes: int, run_config: Mapping[str, Any]) -> None:
        _identify()
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
        tasks = {}
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            node_id = message.metadata.dst_node_id
            tasks[_answer.remote(message, self._contexts[node_id])] = node_id
        done, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=timeout)
        for task in late:
            ray.cancel(task, force=True)
        replies = []
        for task in done:
            reply, context = ray.get(task)
            self._contexts[tasks[task]] = context
            replies.append(reply)
        return replies

    # What no strategy calls on its grid, and simulated runs do not have.

    def set_run(self, run: Run) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Run:
        """Refuse: there is no run of a SuperLink."""
        raise NotImplementedError("a simulated run is none of a SuperLink's")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Refuse: use Message()."""
        raise NotImplementedError("use flwr.app.Message")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Refuse: use `send_and_receive`."""
        raise NotImplementedError("use send_and_receive")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Refuse: use `send_and_receive`."""
        raise NotImplementedError("use send_and_receive")


@ray.remote(num_cpus=1)
def _answer(message: Message, context: Context) -> tuple[Message, Context]:
    """Be a node; an exception becomes an error reply, as a SuperNode's does."""
    _identify()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    try:
        return apps.client_app()(message, context), context
    except Exception as error:
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        reason = f"{type(error).__name__}: {error}"
        return Message(Error(code, reason), reply_to=message), context


@ray.remote(num_cpus=0)
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
    logger = logging.getLogger("flwr")
    logger.handlers = [logging.FileHandler(log)]
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


def _identify() -> None:
    """Let this process make messages, which Flower allows inside a task alone."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
