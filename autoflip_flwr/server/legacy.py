"""AutoFLIP for projects on Flower's older API (`flwr.server.strategy`).

State, guidance, mask and checks of replies are those of `autoflip_flwr.AutoFLIP`.
Clients use the same `AutoFlipMod`::

    from autoflip_flwr.legacy import AutoFLIP

    strategy = AutoFLIP(FedAvg(...), model=Net())

This API has no checkpoints.
"""

import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common import (
    Code,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.server import fit_clients
from flwr.server.strategy import FedAvg, FedAvgM, Strategy

from autoflip_flwr.errors import SettingsError
from autoflip_flwr.server.flow import Received, Request
from autoflip_flwr.server.replies import EXAMPLES, Reply, chain
from autoflip_flwr.server.savings import log_savings, savings_of
from autoflip_flwr.server.wrapper import Wrapper
from autoflip_flwr.types import Array, Params
from autoflip_flwr.wire.records import Phase

_TENSOR_TYPE = "numpy.ndarray"

#: Nodes that explore at a time: this API keeps a thread for each.
_EXPLORERS = 64

#: Where strategies of Flower keep the global model, as a list of arrays.
_HELD = {"current_weights", "pre_weights", "current_round_params"}

_Ins = TypeVar("_Ins", FitIns, EvaluateIns)
_Res: TypeAlias = FitRes | EvaluateRes
_Pair = TypeVar("_Pair", bound=tuple[ClientProxy, _Res])


class AutoFLIP(Wrapper[Strategy], Strategy):  # noqa: D101 - Wrapper's
    __doc__ = Wrapper.__doc__

    _api = Strategy
    _default = FedAvg
    _other_api = "strategies of flwr.serverapp.strategy go into autoflip_flwr.AutoFLIP"
    _sampling = (
        ("fraction_fit", "min_fit_clients"),
        ("fraction_evaluate", "min_evaluate_clients"),
    )

    def _begin(self, total: int | None = None) -> None:
        if tell := vars(self).get("_tell"):
            tell()
        super()._begin(total)
        self._returned: list[bytes] | None = None
        # This API does not tell a strategy that the run is over, and Flower may keep
        # it until the log has ended: told once, after the last round if we know it.
        known = self.rounds, self.traffic, self.model, self._example_inputs
        self._tell = weakref.finalize(self, lambda: log_savings(savings_of(*known)))

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Begin a run; return the inner strategy's initial parameters."""
        self._reopen(self.rounds.total)
        return self.strategy.initialize_parameters(client_manager)

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """Evaluate the masked global model with the inner strategy."""
        return self.strategy.evaluate(server_round, parameters)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Let new clients explore, make the mask, pack the inner instructions."""
        if parameters.tensors != self._returned:
            self.rounds.adopt(self._named(parameters))
            self._returned = parameters.tensors
        self._asked = parameters, client_manager
        instructions: list[tuple[ClientProxy, FitIns]] = []
        proxies: dict[int, ClientProxy] = {}

        def connected() -> list[int]:
            proxies.update({_id(each): each for each in client_manager.all().values()})
            return sorted(proxies)

        def ask_inner() -> list[Request]:
            nonlocal instructions
            current = _parameters_of(self.rounds.arrays)
            instructions = self.strategy.configure_fit(
                server_round, current, client_manager
            )
            return _requests(instructions, current)

        def ask(
            requests: Sequence[Request],
        ) -> Iterator[tuple[int, RecordDict | str]]:
            timeout = self.rounds.exploration.timeout

            def one(node_id: int, content: RecordDict) -> RecordDict | str:
                try:
                    ins = _ins(FitIns, content)
                    result = proxies[node_id].fit(ins, timeout, server_round)
                except Exception as error:  # a client's proxy may raise anything
                    return str(error)
                failed = result.status.code is not Code.OK
                return result.status.message if failed else _content(result)

            workers = min(len(requests), _EXPLORERS)
            with ThreadPoolExecutor(max_workers=workers) as pool:
                tasks = {pool.submit(one, *each): each[0] for each in requests}
                for task in as_completed(tasks):
                    yield tasks.pop(task), task.result()

        contents = self._configured(server_round, ask_inner, ask, connected)
        return _filled(instructions, contents)

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Unpack the valid results and let the inner strategy aggregate them.

        Without any, or with too few, the round begins again.
        """
        received = self._received("train", results, failures)
        valid, failures = self._valid(server_round, received)
        if not valid:
            if server_round == self.rounds.total:
                self.check_trained()
            return None, {}
        dense = [
            (client, replace(result, parameters=_parameters_of(reply.arrays)))
            for reply in valid
            for client, result in [_weighed(reply)]
        ]
        made, metrics = self._replies.aggregated(
            self.strategy,
            lambda: self.strategy.aggregate_fit(server_round, dense, failures),
            self._named,
            valid,
        )
        self._hold(self.rounds.arrays)
        if made is None:
            return None, metrics
        masked = _parameters_of(self.rounds.masked_arrays())
        self._returned = masked.tensors
        return masked, metrics

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Pack the inner strategy's instructions with the round's mask."""
        instructions = self.strategy.configure_evaluate(
            server_round, parameters, client_manager
        )
        if not instructions:
            self._tell_if_last(server_round)
        requests = _requests(instructions, parameters)
        return _filled(instructions, self._packed(requests, "evaluate"))

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Let the inner strategy aggregate the valid results."""
        received, _ = self._received("evaluate", results, failures)
        valid = self._evaluated(received, self._read)
        pairs = [_weighed(reply) for reply in valid]
        self._tell_if_last(server_round)
        return self.strategy.aggregate_evaluate(server_round, pairs, failures)

    def _tell_if_last(self, server_round: int) -> None:
        if server_round == self.rounds.total:
            self._tell()

    # --- between instructions, results and records -----------------------------------

    def _hold(self, arrays: Params) -> None:
        values = list(arrays.values())
        for one in chain(self.strategy):
            for name in vars(one).keys() & _HELD:
                vars(one)[name] = [*values]
            if isinstance(one, FedAvgM):
                one.initial_parameters = ndarrays_to_parameters(values)

    def _again(self, server_round: int) -> Received:
        instructions = self.configure_fit(server_round, *self._asked)
        found = fit_clients(instructions, None, self.timeout, server_round)
        return self._received("train", *found)

    def _received(
        self, phase: Phase, results: Sequence[_Pair], failures: Sequence[Any]
    ) -> Received:
        """Count results; return them in the order of the ids."""
        for _, result in results:
            self._count(phase, "up", _content(result))
        pairs = [(_id(pair[0]), pair) for pair in results]
        return sorted(pairs, key=lambda pair: pair[0]), failures

    def _read(self, node_id: int, origin: _Pair) -> Reply[_Pair]:
        _, result = origin
        content = _content(result)
        reply = self._reply(node_id, origin, content)
        reply.record = content.array_records.get("arrays", reply.record)
        metrics = result.metrics = result.metrics or {}
        reply.extras = {
            f"{name} ({_kind_of(value)})": partial(metrics.pop, name)
            for name, value in metrics.items()
        }
        return reply

    def _named(self, parameters: Parameters) -> dict[str, Array]:
        arrays = parameters_to_ndarrays(parameters)
        # Without a model arrays have numbers, and buffers look like weights.
        names = [str(index) for index in range(len(arrays))]
        if self.model is not None:
            names = list(self.model.state_dict())
        if len(names) != len(arrays):
            raise SettingsError(
                f"expected {len(names)} arrays ({names}), the model has {len(arrays)}"
            )
        return dict(zip(names, arrays, strict=True))


def _content(part: FitIns | EvaluateIns | _Res) -> RecordDict:
    """Return an instruction, or a result, as records."""
    content = RecordDict()
    if not isinstance(part, EvaluateRes):
        content["arrays"] = ArrayRecord(
            {
                str(i): FlowerArray(dtype="", shape=(), stype=_TENSOR_TYPE, data=tensor)
                for i, tensor in enumerate(part.parameters.tensors)
            }
        )
    if isinstance(part, FitIns | EvaluateIns):
        content["config"] = ConfigRecord(dict(part.config))
        return content
    told = part.metrics or {}
    numbers: dict[str, Any] = {k: v for k, v in told.items() if _kind_of(v) == "number"}
    content["config"] = ConfigRecord({k: told[k] for k in told if k not in numbers})
    numbers[EXAMPLES] = part.num_examples
    if isinstance(part, EvaluateRes):
        numbers["loss"] = part.loss
    content["metrics"] = MetricRecord(numbers)
    return content


def _kind_of(value: Scalar) -> str:
    return "number" if type(value) in (int, float) else type(value).__name__


def _ins(kind: type[_Ins], content: RecordDict) -> _Ins:
    """Return the instruction that has these records."""
    tensors = [array.data for array in content.array_records["arrays"].values()]
    config = dict(content.config_records["config"])
    return kind(Parameters(tensors, _TENSOR_TYPE), cast(dict[str, Scalar], config))


def _requests(
    instructions: Sequence[tuple[ClientProxy, _Ins]], whole: Parameters
) -> list[Request]:
    """Return the records of instructions; what is no whole model becomes `whole`."""
    for _, ins in instructions:
        if len(ins.parameters.tensors) != len(whole.tensors):
            ins.parameters = whole
    return [(_id(client), _content(ins)) for client, ins in instructions]


def _filled(
    instructions: Sequence[tuple[ClientProxy, _Ins]], contents: Sequence[RecordDict]
) -> list[tuple[ClientProxy, _Ins]]:
    """Return the inner strategy's instructions with other records."""
    pairs = zip(instructions, contents, strict=True)
    return [(client, _ins(type(ins), content)) for (client, ins), content in pairs]


def _weighed(reply: Reply[Any]) -> tuple[ClientProxy, Any]:
    """Return a client and its result, with what its examples count for."""
    client, result = reply.origin
    return client, replace(result, num_examples=int(reply.examples))


def _parameters_of(arrays: Params) -> Parameters:
    return ndarrays_to_parameters(list(arrays.values()))


def _id(client: ClientProxy) -> int:
    if not client.cid.isdecimal():
        raise SettingsError(f"expected a client id of digits, got {client.cid!r}")
    return int(client.cid)
