"""Messages out, replies in as they arrive, and which node sent a reply."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

#: Seconds between two polls for replies: the first pause and the longest.
_SOON, _LATER = 0.02, 1.0


def stream(
    grid: Grid,
    messages: Iterable[Message],
    *,
    timeout: float | None = None,
    at_once: int | None = None,
) -> Iterator[Message]:
    """Send messages and yield the replies as they arrive, for `timeout` seconds.

    At most `at_once` replies are held; the others wait at the SuperLink.
    """
    left = [n for n in grid.push_messages(list(messages)) if n is not None]
    end = math.inf if timeout is None else time.monotonic() + timeout
    pause = _SOON
    while left:
        expected = set(left)  # a grid may return replies twice, or of an earlier round
        size = at_once or len(left)
        for start in range(0, len(left), size):
            for reply in grid.pull_messages(left[start : start + size]):
                if reply.metadata.reply_to_message_id in expected:
                    expected.remove(reply.metadata.reply_to_message_id)
                    yield reply
        came = len(left) - len(expected)
        left = [n for n in left if n in expected]
        if time.monotonic() >= end:
            return
        if left:
            pause = _SOON if came else min(_LATER, 1.5 * pause)
            time.sleep(min(pause, max(0.0, end - time.monotonic())))


def nodes_by_message(sent: Iterable[Message]) -> dict[str, int]:
    """Return message id -> node of messages that were sent."""
    return {
        message.metadata.message_id: message.metadata.dst_node_id
        for message in sent
        if message.metadata.message_id
    }


def node_of(reply: Message, nodes: Mapping[str, int]) -> int:
    """Return the node that a reply is for.

    If a node is gone, the SuperLink replies in its place, under its own id.
    """
    metadata = reply.metadata
    return nodes.get(metadata.reply_to_message_id, metadata.src_node_id)
