"""A Grid without a server: calls a ClientApp in this process, a Context per node."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Handler = Callable[[Message, Context], Message]


class LocalGrid(Grid):
    """Delivers each message to `client_app`; an exception becomes an error reply.

    `tamper(message, reply)` may return another reply, or None: no reply in time.
    """

    def __init__(
        self,
        client_app: Handler,
        node_ids: Iterable[int],
        *,
        run_config: Mapping[str, Any] | None = None,
        tamper: Callable[[Message, Message], Message | None] | None = None,
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.client_app = client_app
        self.tamper = tamper
        self.sent: list[Message] = []
        self.replies: list[Message] = []
        ids = list(node_ids)
        self.contexts = {
            node_id: Context(
                run_id=1,
                node_id=node_id,
                node_config={"partition-id": i, "num-partitions": len(ids)},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for i, node_id in enumerate(ids)
        }

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        replies = []
        for message in messages:
            self.sent.append(message)
            delivered = Message(
                RecordDict(dict(message.content)),
                dst_node_id=message.metadata.dst_node_id,
                message_type=message.metadata.message_type,
            )
            try:
                context = self.contexts[message.metadata.dst_node_id]
                reply = self.client_app(delivered, context)
            except Exception as error:  # as a SuperNode does
                reply = Message(Error(2, f"{error}"), reply_to=message)
            answer = self.tamper(message, reply) if self.tamper else reply
            if answer is not None:
                replies.append(answer)
                self.replies.append(answer)
        return replies

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError
