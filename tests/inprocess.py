"""A Grid without a server: calls a ClientApp in this process, a Context per node."""

import hashlib
import importlib.util
import itertools
import math
import random
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore.task_identity import TaskIdentity
from numpy.testing import assert_array_equal
from torch import nn
from torch.nn import functional

from autoflip_flwr import AutoFlipMod, masked

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)  # the models are tiny

Handler = Callable[[Message, Context], Message]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Sent:
    """What one message carried, either way, as it crossed the wire."""

    phase: str  # explore, train, evaluate, query
    node_id: int
    content: RecordDict
    mask: bytes = b""  # all of it, also where the message names one that was sent

    @property
    def arrays(self) -> ArrayRecord:
        (record,) = self.content.array_records.values()
        return record

    @property
    def config(self) -> ConfigRecord:
        (record,) = self.content.config_records.values()
        return record

    @property
    def metrics(self) -> MetricRecord:
        (record,) = self.content.metric_records.values()
        return record


class LocalGrid(Grid):
    """Delivers each message to `client_app`; an exception becomes an error reply.

    Records are serialized and read back on the way, as by Flower.
    `tamper(message, reply)` may return another reply, or None: no reply in time.
    """

    def __init__(
        self,
        client_app: Handler,
        node_ids: Iterable[int],
        *,
        run_config: Mapping[str, Any] | None = None,
        node_configs: Mapping[int, Mapping[str, Any]] | None = None,
        tamper: Callable[[Message, Message], Message | None] | None = None,
        shuffle: Callable[[list[Message]], None] | None = None,
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.client_app = client_app
        self.tamper = tamper
        self.shuffle = shuffle
        self.sent: list[Message] = []
        self.replies: list[Message] = []
        self.down: list[Sent] = []
        self.up: list[Sent] = []
        self._answers: dict[str, Message] = {}
        self._masks: dict[int, bytes] = {}  # what each node was sent last
        self.run_config = dict(run_config or {})
        self.contexts: dict[int, Context] = {}
        ids = list(node_ids)
        for i, node_id in enumerate(ids):
            config = {"partition-id": i, "num-partitions": len(ids)}
            self.join(node_id, (node_configs or {}).get(node_id, config))

    def join(self, node_id: int, node_config: Mapping[str, Any]) -> None:
        self.contexts[node_id] = Context(
            run_id=1,
            node_id=node_id,
            node_config=dict(node_config),
            state=RecordDict(),
            run_config=dict(self.run_config),
        )

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Let every node answer; whose reply is lost has its id in no later pull."""
        message_ids = []
        for message in messages:
            # Flower's grids, too, number the very object that is sent.
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            message_ids.append(message.metadata.message_id)
            self.sent.append(message)
            node_id = message.metadata.dst_node_id
            phase = _phase(message)
            content = RecordDict(dict(message.content))
            mask = whole_mask(message.content, self._masks.get(node_id, b""))
            if phase != "explore":  # nobody holds the mask of an exploration
                self._masks[node_id] = mask
            self.down.append(Sent(phase, node_id, content, mask))
            delivered = Message(
                _carried(message.content),
                dst_node_id=node_id,
                message_type=message.metadata.message_type,
            )
            delivered.metadata.__dict__["_message_id"] = message.metadata.message_id
            try:
                reply = self.client_app(delivered, self.contexts[node_id])
                if reply.has_content():
                    reply.content = _carried(reply.content)
            except Exception as error:  # as a SuperNode does
                reason = f"{type(error)}:<'{error}'>"
                reply = Message(Error(2, reason), reply_to=delivered)
            answer = self.tamper(message, reply) if self.tamper else reply
            if answer is not None:
                self._answers[message.metadata.message_id] = answer
                self.replies.append(answer)
                if answer.has_content():
                    content = RecordDict(dict(answer.content))
                    self.up.append(Sent(phase, node_id, content))
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = [self._answers.pop(i) for i in message_ids if i in self._answers]
        if self.shuffle:
            self.shuffle(found)
        return found

    def nodes(self, phase: str) -> list[int]:
        """Whom the messages of a phase went to, in order."""
        return [sent.node_id for sent in self.down if sent.phase == phase]

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, *args: Any
    ) -> Message:
        return Message(content, dst_node_id, message_type)


class OneByOne(LocalGrid):
    """Every look for replies lets one node more answer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._left: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        for message in messages:
            message_id = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = message_id
            self._left[message_id] = message
        return list(self._left)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = set(message_ids)
        message_id = next((i for i in self._left if i in wanted), None)
        if message_id is None:
            return []
        message = self._left.pop(message_id)
        replies = super().pull_messages(super().push_messages([message]))
        message.metadata.__dict__["_message_id"] = message_id
        for reply in replies:
            reply.metadata.__dict__["_reply_to_message_id"] = message_id
        return replies


def _carried(content: RecordDict) -> RecordDict:
    return recorddict_from_proto(recorddict_to_proto(content))


def _phase(message: Message) -> str:
    for config in message.content.config_records.values():
        if "autoflip.phase" in config:
            return str(config["autoflip.phase"])
    return message.metadata.message_type


def only_in(phase: str, node_ids: Iterable[int], change: Callable[[Message], Any]):
    """A `tamper` that changes the replies of some nodes in one phase.

    `change` writes to the reply, or returns another one; the text "lost" stands for
    no reply in time.
    """
    chosen = set(node_ids)

    def tamper(message: Message, reply: Message) -> Message | None:
        if _phase(message) != phase or message.metadata.dst_node_id not in chosen:
            return reply
        changed = change(reply)
        if changed == "lost":
            return None
        return changed if isinstance(changed, Message) else reply

    return tamper


# --- small models and apps ------------------------------------------------------------


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU: a third of the time
        return make()


def net(seed: int = 0) -> nn.Module:
    """Six inputs, three classes, a BatchNorm: 5 arrays that train, 3 that do not."""
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(6, 16, bias=False),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Linear(16, 3),
        ),
        seed,
    )


def plain_net() -> nn.Module:
    """Without buffers."""
    return seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)))


def samples(partition_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of one node; every node has another number of them."""
    generator = torch.Generator().manual_seed(1000 + partition_id)
    count = 24 + 4 * partition_id
    y = torch.randint(3, (count,), generator=generator)
    x = torch.randn(count, 6, generator=generator)
    x[:, :3] += 2 * functional.one_hot(y, 3)
    return x, y


def arrays_of(record: ArrayRecord) -> Arrays:
    return {name: array.numpy() for name, array in record.items()}


def state_of(model: nn.Module) -> Arrays:
    return {name: v.detach().numpy().copy() for name, v in model.state_dict().items()}


def fit(
    model: nn.Module,
    partition_id: int,
    *,
    seed: int,
    lr: float = 0.1,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    after_step: Callable[[nn.Module], None] | None = None,
) -> float:
    """One local epoch of SGD with momentum, repeatable by `seed`."""
    x, y = samples(partition_id)
    if optimizer is None:
        made = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    else:
        made = optimizer(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    model.train()
    total = 0.0
    for rows in torch.split(torch.randperm(len(y), generator=generator), 8):
        made.zero_grad()
        loss = functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        made.step()
        total += loss.item() * len(rows)
        if after_step:
            after_step(model)
    return total / len(y)


def call_seed(config: Mapping[str, Any], partition_id: int) -> int:
    """Another seed for every round, exploration epoch and node."""
    epoch = int(config.get("autoflip.epoch", -1)) + 1
    return 10_000 * int(config["server-round"]) + 100 * epoch + partition_id


def toy_app(
    make: Callable[[], nn.Module] = net,
    *,
    mods: Iterable[Any] | None = None,
    use_masked: bool = True,
    example_inputs: torch.Tensor | None = None,
    calls: list[dict[str, Any]] | None = None,
    **training: Any,
) -> ClientApp:
    """A ClientApp as a Flower user writes it; `calls` takes what train was given."""
    app = ClientApp(mods=[AutoFlipMod()] if mods is None else list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        (record,) = message.content.array_records.values()
        (config,) = message.content.config_records.values()
        if calls is not None:
            calls.append(
                {
                    "node": context.node_id,
                    "config": dict(config),
                    "arrays": {k: v.copy() for k, v in arrays_of(record).items()},
                }
            )
        model = make()
        model.load_state_dict(record.to_torch_state_dict())
        partition_id = int(context.node_config["partition-id"])
        seed = call_seed(config, partition_id)
        with masked(model, message if use_masked else {}, example_inputs) as trained:
            loss = fit(trained, partition_id, seed=seed, **training)
        count = len(samples(partition_id)[1])
        metrics = MetricRecord({"num-examples": count, "train-loss": loss})
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        (record,) = message.content.array_records.values()
        model = make()
        model.load_state_dict(record.to_torch_state_dict())
        model.eval()
        x, y = samples(int(context.node_config["partition-id"]))
        with torch.no_grad():
            loss = functional.cross_entropy(model(x), y).item()
        total = float(sum(np.abs(v).sum() for v in arrays_of(record).values()))
        metrics = {"num-examples": len(y), "eval-loss": loss, "sum": total}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        partition_id = int(context.node_config.get("partition-id", -1))
        config = ConfigRecord({"client-id": partition_id})
        return Message(RecordDict({"config": config}), reply_to=message)

    return app


def nudging_app(*, mods: Iterable[Any] | None = None, scale: float = 0.01) -> ClientApp:
    """Fits any model: 'training' moves every float by a little, without torch."""
    app = ClientApp(mods=[AutoFlipMod()] if mods is None else list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        (key,) = message.content.array_records
        (config,) = message.content.config_records.values()
        rng = np.random.default_rng([context.node_id, int(config["server-round"])])
        moved = {
            name: value + rng.normal(0, scale, value.shape).astype(value.dtype)
            if value.dtype.kind == "f"
            else value + 1
            for name, value in arrays_of(message.content[key]).items()
        }
        content = {
            key: ArrayRecord(_record(moved)),
            "metrics": MetricRecord({"num-examples": 8 + context.node_id, "loss": 1.0}),
        }
        return Message(RecordDict(content), reply_to=message)

    return app


def _record(arrays: Arrays) -> dict[str, Any]:
    return {name: Array(np.asarray(value)) for name, value in arrays.items()}


def run(
    strategy: Strategy,
    grid: Grid,
    model: nn.Module,
    rounds: int = 3,
    *,
    seed: int = 0,
    config: ConfigRecord | None = None,
    after_round: Callable[[int, Arrays], None] | None = None,
) -> tuple[list[Arrays], Result]:
    """Run a strategy; return the global model before and after each round."""
    seen: list[Arrays] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        seen.append({k: v.copy() for k, v in arrays_of(arrays).items()})
        if after_round:
            after_round(server_round, seen[-1])
        return None

    random.seed(seed)
    result = strategy.start(
        grid,
        ArrayRecord(model.state_dict()),
        num_rounds=rounds,
        train_config=config,
        evaluate_fn=evaluate,
    )
    return seen, result


def whole_mask(content: RecordDict, last: bytes) -> bytes:
    """Read a message's mask by hand; `last` is the one that its node has."""
    for config in content.config_records.values():
        if "autoflip.mask-held" not in config:
            return config.get("autoflip.mask", last)
        name = hashlib.blake2b(last, digest_size=16).digest()
        assert config["autoflip.mask-held"] == name
        if "autoflip.mask" not in config:
            return last
        within = iter(np.unpackbits(np.frombuffer(config["autoflip.mask"], np.uint8)))
        bits = np.unpackbits(np.frombuffer(last, np.uint8))
        return np.packbits([bit and next(within) for bit in bits]).tobytes()
    return last


def masks_in(sent: Sent, model: nn.Module) -> dict[str, np.ndarray]:
    """Read a message's mask by hand: bits of the parameters, in their order."""
    bits = np.unpackbits(np.frombuffer(sent.mask, np.uint8))
    masks, start = {}, 0
    for name, value in model.named_parameters():
        end = start + value.numel()
        masks[name] = bits[start:end].astype(bool).reshape(tuple(value.shape))
        start = end
    assert len(bits) - start < 8
    return masks


def values_in(
    sent: Sent, masks: Mapping[str, np.ndarray], dtype: str = "<f4"
) -> dict[str, np.ndarray]:
    """Read a message's kept values by hand; zeros where pruned."""
    flat = np.frombuffer(sent.arrays["autoflip.values"].data, dtype)
    dense, start = {}, 0
    for name, keep in masks.items():
        dense[name] = np.zeros(keep.shape, np.float32)
        end = start + int(keep.sum())
        dense[name][keep] = flat[start:end]
        start = end
    assert start == len(flat)
    return dense


def load_script(name: str, path: Path) -> ModuleType:
    """Import a file that is in no package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# --- what tests of both strategies expect --------------------------------------------

#: Masks that differ from round to round, where few of the nodes are sampled.
CHANGING = {"threshold": 0.5, "population_weight": 0.0, "score": "guidance"}


def assert_masks_change(masks):
    """Entries leave and come back, or the test shows nothing."""
    flat = [np.concatenate([m.ravel() for m in each.values()]) for each in masks]
    assert sum((a != b).any() for a, b in itertools.pairwise(flat)) > 1
    assert any(
        (a & ~b & c).any() for a, b, c in zip(flat, flat[1:], flat[2:], strict=False)
    )


def momentum_reference(initial, masks, averages, *, lr, beta):
    """SGD with momentum on a pseudo-gradient that is zero where a round pruned."""
    weights = {n: initial[n].astype(float) for n in masks[0]}
    momentum = {n: np.zeros_like(v) for n, v in weights.items()}
    for mask, average in zip(masks, averages, strict=True):
        for name, keep in mask.items():
            gradient = np.where(keep, weights[name] - average[name], 0.0)
            momentum[name] = beta * momentum[name] + gradient
            weights[name] = np.where(keep, weights[name] - lr * momentum[name], 0.0)
        yield {n: v.copy() for n, v in weights.items()}


def adam_reference(initial, masks, averages, *, eta, tau, beta_1=0.9, beta_2=0.99):
    """Flower's FedAdam, with a zero difference where a round pruned."""
    weights = {n: initial[n].astype(float) for n in masks[0]}
    first = {n: np.zeros_like(v) for n, v in weights.items()}
    second = {n: np.zeros_like(v) for n, v in weights.items()}
    for t, (mask, average) in enumerate(zip(masks, averages, strict=True), start=1):
        rate = eta * math.sqrt(1 - beta_2 ** (t + 1)) / (1 - beta_1 ** (t + 1))
        for name, keep in mask.items():
            delta = np.where(keep, average[name] - weights[name], 0.0)
            first[name] = beta_1 * first[name] + (1 - beta_1) * delta
            second[name] = beta_2 * second[name] + (1 - beta_2) * delta**2
            step = rate * first[name] / (np.sqrt(second[name]) + tau)
            weights[name] = np.where(keep, weights[name] + step, 0.0)
        yield {n: v.copy() for n, v in weights.items()}


def npy(header):
    """An npy array whose header is any text."""
    text = header.encode("latin1")
    text += b" " * (63 - (10 + len(text)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)


def masks_by_round(grid, model):
    """The mask of each round, and that it was the same for all of its nodes."""
    by_round = {}
    for sent in grid.down:
        if sent.phase == "train":
            server_round = sent.config["server-round"]
            masks = masks_in(sent, model)
            if server_round in by_round:
                assert_same_arrays(masks, by_round[server_round])
            by_round[server_round] = masks
    return [by_round[i + 1] for i in range(len(by_round))]


def poison(value):
    def change(reply):
        array = reply.content["arrays"]["autoflip.values"]
        values = np.frombuffer(array.data, np.float32).copy()
        values[-1] = value
        reply.content["arrays"] = with_values(reply, values.tobytes())

    return change


def assert_same_arrays(actual, expected):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert_array_equal(actual[name], value, err_msg=name)


def with_values(reply, data, *, dtype="float32", stype="autoflip.raw", shape=None):
    record = dict(reply.content["arrays"])
    size = (len(data) // 4,) if shape is None else shape
    record["autoflip.values"] = Array(dtype=dtype, shape=size, stype=stype, data=data)
    return ArrayRecord(record)
