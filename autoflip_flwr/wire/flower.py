"""What differs between versions of Flower, and its names that are not public."""

import logging
import re
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from flwr.app import Error, Message
from flwr.clientapp.typing import ClientAppCallable

from autoflip_flwr.errors import FlowerVersionError

if TYPE_CHECKING:
    from flwr.supercore.run import Run
else:
    Run = Any  # where it stands differs

__all__ = [
    "LOGGER",
    "NEWEST",
    "OLDEST",
    "ClientAppCallable",
    "Run",
    "become_task",
    "check_version",
    "empty_run",
    "error_reply",
    "set_message_id",
    "set_source",
]

#: The versions of Flower whose plug-in examples are run by the tests.
OLDEST, NEWEST = "1.22", "1.42"

#: Flower's own logger, which writes to wherever the user reads of a run.
LOGGER = logging.getLogger("flwr")


def check_version(installed: str | None = None) -> None:
    """Refuse a Flower that is too old, and say where one is newer than was tried.

    Raises
    ------
    FlowerVersionError
        Names the version and the range.
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
            "autoflip-flwr was tried with Flower %s to %s, not with %s",
            OLDEST,
            NEWEST,
            installed,
        )


def _numbers(text: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that it was sent with; Flower lets nobody but itself."""
    message.metadata.__dict__["_message_id"] = message_id


def set_source(message: Message, node_id: int) -> None:
    """Name the node that a reply came from."""
    message.metadata.__dict__["_src_node_id"] = node_id


def error_reply(message: Message, error: Exception) -> Message:
    """Return what a SuperNode replies where its app raised an exception."""
    from flwr.common.constant import ErrorCode

    code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    return Message(Error(code, f"{type(error).__name__}: {error}"), reply_to=message)


def become_task() -> None:
    """Let this process make messages, which Flower allows inside a task alone."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def empty_run() -> "Run":
    """Return a run that knows its number alone."""
    from flwr.supercore.run import Run

    return Run.create_empty(run_id=1)


check_version()
