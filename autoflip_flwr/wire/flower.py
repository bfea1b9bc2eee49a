"""Differences between versions of Flower, and its private names."""

import logging
import re
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from flwr.app import Error, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable as ClientAppCallable
from flwr.serverapp import Grid

from autoflip_flwr.errors import FlowerVersionError

if TYPE_CHECKING:
    from flwr.proto.node_pb2 import NodeInfo as NodeInfo
    from flwr.supercore.run import Run as Run
else:
    NodeInfo = Run = Any  # their modules depend on the version

#: The range of versions with which the tests run the plug-in examples.
OLDEST, NEWEST = "1.22", "1.42"

#: Flower's own logger, so that our lines appear among Flower's.
LOGGER = logging.getLogger("flwr")

#: Bytes that an object of a reply counts at least: asking for it costs that much.
_LEAST = 1 << 10


def check_version(installed: str | None = None) -> None:
    """Raise a FlowerVersionError if Flower is too old.

    If it is newer than any tested version, log a warning.
    """
    if installed is None:
        try:
            installed = version("flwr")
        except PackageNotFoundError:  # a source tree on the path
            return
    if _numbers(installed) < _numbers(OLDEST):
        raise FlowerVersionError(
            f"expected Flower (flwr) {OLDEST} to {NEWEST}, got {installed}: "
            f"pip install 'flwr>={OLDEST}'"
        )
    if _numbers(installed) > _numbers(NEWEST):
        LOGGER.warning(
            "autoflip-flwr is tested with Flower %s to %s, not with %s",
            *(OLDEST, NEWEST, installed),
        )


def _numbers(text: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def set_message_id(message: Message, message_id: str) -> None:
    """Set the id of a message, for which Flower has no public way."""
    message.metadata.__dict__["_message_id"] = message_id


def set_source(message: Message, node_id: int) -> None:
    """Set the node that a reply comes from."""
    message.metadata.__dict__["_src_node_id"] = node_id


def error_reply(message: Message, error: Exception) -> Message:
    """Return the reply of a SuperNode whose app raised an exception."""
    from flwr.common.constant import ErrorCode

    code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    return Message(Error(code, f"{type(error).__name__}: {error}"), reply_to=message)


def error_about(message_id: str, error: Exception) -> Message:
    """Return an error in place of the reply to a message of this id."""
    asked = Message(RecordDict(), 1, "train")
    set_message_id(asked, message_id)
    return error_reply(asked, error)


def forget_round(strategy: object, server_round: int) -> None:
    """Let a strategy that accounts for privacy be asked for a round again."""
    vars(strategy).get("_pending_events", {}).pop(server_round, None)


def bound_replies(grid: Grid, largest: int, seconds: Callable[[], float]) -> None:
    """Let Flower's grid return an error in place of a reply that it should not take.

    It would raise at an unreadable one and end the run of all nodes. It would pull all
    of a reply of more than `largest` bytes, and wait for hours for the objects of one
    whose node still sends; now for as many `seconds` as are left when it begins. A
    reply that is given up is confirmed as if it were read, so the SuperLink deletes
    what has come and refuses what is still to come.
    """
    from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
    from flwr.supercore.inflatable.inflatable_object import (
        get_object_children_ids_from_object_content as children_of,
    )
    from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
    from flwr.superlink.grid import http_grid

    module: Any = http_grid
    flower: Any = grid
    pull = getattr(module.pull_objects, "__wrapped__", module.pull_objects)
    inflate = module.inflate_object_from_contents
    inflate = getattr(inflate, "__wrapped__", inflate)

    @wraps(pull)
    def pull_within(object_ids: list[str], pull_object_fn: Any) -> Any:
        sizes: list[int] = []

        def within(object_id: str) -> bytes:
            content: bytes = pull_object_fn(object_id)
            sizes.append(max(len(content), _LEAST))
            if sum(sizes) > largest:
                raise OverflowError
            return content

        try:  # an object that the node has not sent yet is soon asked for again
            return pull(
                object_ids,
                within,
                max_time=seconds(),
                max_tries_per_object=None,
                initial_backoff=0.1,
                backoff_cap=1.0,
            )
        except (OverflowError, ObjectPullError) as error:
            *_, message_id = object_ids  # its children come first
            flower._runtime_client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(
                    node=flower.node,
                    run_id=flower.run.run_id,
                    message_object_id=message_id,
                )
            )
            if isinstance(error, ObjectPullError):
                raise
            reason = f"expected a whole reply of at most {largest} B"
            raise ObjectPullError(message_id, reason) from None

    @wraps(inflate)
    def read(message_id: str, contents: dict[str, bytes]) -> Message:
        own = contents[message_id]
        try:
            reply = inflate(message_id, contents)
            if not isinstance(reply, Message):
                raise TypeError(f"expected a Message, got {type(reply).__name__}")
            if reply.has_content() and not isinstance(reply.content, RecordDict):
                raise TypeError(f"expected records, got {type(reply.content).__name__}")
            return reply
        except Exception as error:  # hostile bytes can raise any error
            answers = ""
            with suppress(Exception):  # it may not even say what it answers
                empty: Any = dict.fromkeys(children_of(own), RecordDict())
                answers = Message.inflate(own, empty).metadata.reply_to_message_id
            return error_about(answers, error)

    module.pull_objects, module.inflate_object_from_contents = pull_within, read


def become_task() -> None:
    """Let this process make messages; Flower allows that only in a task."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def empty_run() -> "Run":
    """Return a run with a number and nothing else."""
    from flwr.supercore.run import Run

    return Run.create_empty(run_id=1)


check_version()
