"""AutoFLIP for projects on Flower's older API (`flwr.server.strategy`).

State, guidance, mask and checks of replies are those of `autoflip_flwr.AutoFLIP`.
Clients use the same `AutoFlipMod`::

    from autoflip_flwr.legacy import AutoFLIP

    strategy = AutoFLIP(FedAvg(...), model=Net())

This API has no checkpoints.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.common import (
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
from flwr.server.strategy import FedAvg, FedAvgM, FedOpt, QFedAvg, Strategy

from autoflip_flwr.errors import SettingsError, WireError
from autoflip_flwr.pruners.store import Answer
from autoflip_flwr.server.replies import EXAMPLES, Reply, check_metrics, check_size
from autoflip_flwr.server.savings import Direction, log_savings, savings_of
from autoflip_flwr.server.wrapper import Wrapper
from autoflip_flwr.types import Array, Params
from autoflip_flwr.wire.records import NO_MOD, Phase, Plan

_TENSOR_TYPE = "numpy.ndarray"

_Fit = tuple[ClientProxy, FitRes]
_Evaluation = tuple[ClientProxy, EvaluateRes]
_Pair = TypeVar("_Pair", _Fit, _Evaluation)
_Ins = TypeVar("_Ins", FitIns, EvaluateIns)


class AutoFLIP(Wrapper[Strategy], Strategy):  # noqa: D101 - Wrapper's
    __doc__ = Wrapper.__doc__

    _api = Strategy
    _default = FedAvg
    _other_api = "strategies of flwr.serverapp.strategy go into autoflip_flwr.AutoFLIP"
    _sampling = (
        ("fraction_fit", "min_fit_clients"),
        ("fraction_evaluate", "min_evaluate_clients"),
    )

    def _begin(self) -> None:
        # Without a model arrays have numbers, and buffers look like weights.
        self._names = None if self.model is None else list(self.model.state_dict())
        self._returned: list[bytes] | None = None
        self._asked: tuple[Parameters, ClientManager] | None = None
        self._values = b""  # the frame of kept values that was sent
        # This API does not tell a strategy that the run is over, and Flower may keep
        # it until the log has ended: told once, after the last round if we know it.
        known = self.rounds, self.traffic, self.model, self._example_inputs
        self._tell = weakref.finalize(self, lambda: log_savings(savings_of(*known)))

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Return the inner strategy's initial parameters."""
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
        current = _parameters_of(self.rounds.arrays)
        instructions = self.strategy.configure_fit(
            server_round, current, client_manager
        )
        self._asked = (parameters, client_manager) if instructions else None
        if not instructions:
            return []
        sampled = [_id(client) for client, _ in instructions]
        self._explore(server_round, sampled, instructions[0][1], client_manager)
        plan = self.rounds.begin(server_round, sampled)
        self._update_inner()
        packed = self._packed(instructions, self.rounds.arrays, plan, "train")
        self._values = packed[0][1].parameters.tensors[0]
        return packed

    def aggregate_fit(
        self,
        server_round: int,
        results: list[_Fit],
        failures: list[_Fit | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Unpack the valid results and let the inner strategy aggregate them.

        Without any, or with too few, the round begins again.
        """
        valid = self._trained(server_round, results, failures)
        while not valid and self._asked:
            self._try_again(server_round)
            again = self.configure_fit(server_round, *self._asked)
            results, failures = fit_clients(again, None, self.timeout, server_round)
            valid = self._trained(server_round, results, failures)
        if not valid:
            self._update_inner()
            if server_round == self.rounds.total:
                self.check_trained()
            return None, {}
        dense = [
            (client, replace(result, parameters=_parameters_of(reply.arrays)))
            for reply in valid
            for client, result in [_weighed(reply)]
        ]
        taken = {reply.node_id for reply in valid}
        dropped = [pair for pair in results if _id(pair[0]) not in taken]
        aggregated, metrics = self._replies.aggregated(
            server_round,
            self.strategy,
            lambda: self.strategy.aggregate_fit(
                server_round, dense, [*failures, *dropped]
            ),
            self._named,
        )
        self._update_inner()
        if aggregated is None:
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
        plan = self.rounds.plan
        if plan is None or not instructions:
            self._tell_if_last(server_round)
            return instructions
        return self._packed(instructions, self._named(parameters), plan, "evaluate")

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[_Evaluation],
        failures: list[_Evaluation | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Let the inner strategy aggregate the valid results."""
        self._count_all("evaluate", "up", [result for _, result in results])
        valid = self._replies.readable(server_round, _by_id(results), self._read)
        pairs = [_weighed(reply) for reply in valid]
        self._tell_if_last(server_round)
        return self.strategy.aggregate_evaluate(server_round, pairs, failures)

    def _tell_if_last(self, server_round: int) -> None:
        if server_round == self.rounds.total:
            self._tell()

    def _explore(
        self,
        server_round: int,
        sampled: Sequence[int],
        like: FitIns,
        client_manager: ClientManager,
    ) -> bool:
        proxies = {_id(client): client for client in client_manager.all().values()}
        timeout = self.rounds.exploration.timeout

        def send(
            record: ArrayRecord, entries: Mapping[str, Any], nodes: Sequence[int]
        ) -> Iterator[tuple[int, Answer | str]]:
            ins = FitIns(_as_parameters(record), {**like.config, **entries})
            self._count_all("explore", "down", [ins] * len(nodes))

            def one(node_id: int) -> tuple[int, FitRes | str]:
                try:
                    return node_id, proxies[node_id].fit(ins, timeout, server_round)
                except Exception as error:  # a client's proxy may raise anything
                    return node_id, str(error)

            with ThreadPoolExecutor(max_workers=len(nodes)) as pool:
                tasks = [pool.submit(one, node_id) for node_id in nodes]
                for task in as_completed(tasks):
                    node_id, result = task.result()
                    if isinstance(result, FitRes):
                        self._count_all("explore", "up", [result])
                        yield node_id, self._answer_of(result)
                    else:
                        yield node_id, result

        return self._intake.explore(
            server_round, connected=sorted(proxies), sampled=sampled, send=send
        )

    def _packed(
        self,
        instructions: list[tuple[ClientProxy, _Ins]],
        arrays: Params,
        plan: Plan,
        phase: Phase,
    ) -> list[tuple[ClientProxy, _Ins]]:
        """Replace the parameters of instructions by the packed arrays and the plan."""
        sent, held = _as_parameters(plan.pack(arrays)), self.rounds.held
        packed = [
            (client, type(ins)(sent, {**ins.config, **entries}))
            for client, ins in instructions
            for entries in [held.entries(_id(client), plan, phase)]
        ]
        self._count_all(phase, "down", [ins for _, ins in packed])
        return packed

    def _count_all(
        self,
        phase: Phase,
        direction: Direction,
        parts: Sequence[FitIns | FitRes | EvaluateIns | EvaluateRes],
    ) -> None:
        for part in parts:
            self._count(phase, direction, _content(part))

    def _trained(
        self,
        server_round: int,
        results: list[_Fit],
        failures: Sequence[_Fit | BaseException],
    ) -> list[Reply[_Fit]]:
        self._count_all("train", "up", [result for _, result in results])
        return self._replies.trained(
            server_round,
            _by_id(results),
            self._read,
            sent=self._values,
            failures=failures,
        )

    def _read(self, node_id: int, pair: _Pair) -> Reply[_Pair]:
        result = pair[1]
        self._check_size(result)
        sizes = check_metrics(_metrics_of(result))
        metrics = result.metrics = result.metrics or {}
        tensors = result.parameters.tensors if isinstance(result, FitRes) else []
        return Reply(
            node_id,
            pair,
            _record_of(tensors),
            result.num_examples,
            numbers=sizes,
            extras={
                f"{name} ({_kind_of(value)})": partial(metrics.pop, name)
                for name, value in metrics.items()
            },
        )

    def _answer_of(self, result: FitRes) -> Answer | str:
        """Return an explorer's guidance frame and signs, or why there are none."""
        tensors = result.parameters.tensors
        if len(tensors) not in (1, 2):
            return NO_MOD
        try:
            self._check_size(result)
            check_metrics(_metrics_of(result))
        except WireError as error:
            return str(error)
        frame, *signs = tensors
        return Answer(frame, signs[0] if signs else None, result.num_examples)

    def _check_size(self, result: FitRes | EvaluateRes) -> None:
        texts = [
            v for v in (result.metrics or {}).values() if isinstance(v, str | bytes)
        ]
        tensors = result.parameters.tensors if isinstance(result, FitRes) else []
        size = sum(map(len, (*texts, *tensors)))
        check_size(size, self.rounds.manifest.largest_message)

    def _update_inner(self) -> None:
        """Set the global model inside strategies that have a server optimizer."""
        arrays = list(self.rounds.arrays.values())
        if isinstance(self.strategy, FedAvgM):
            self.strategy.initial_parameters = ndarrays_to_parameters(arrays)
        if isinstance(self.strategy, FedOpt):
            self.strategy.current_weights = arrays
        if isinstance(self.strategy, QFedAvg):
            self.strategy.pre_weights = arrays

    def _named(self, parameters: Parameters) -> dict[str, Array]:
        arrays = parameters_to_ndarrays(parameters)
        names = self._names or [str(index) for index in range(len(arrays))]
        if len(names) != len(arrays):
            raise SettingsError(
                f"expected {len(names)} arrays ({names}), the model has {len(arrays)}"
            )
        return dict(zip(names, arrays, strict=True))


def _as_parameters(record: ArrayRecord) -> Parameters:
    return Parameters([array.data for array in record.values()], _TENSOR_TYPE)


def _weighed(reply: Reply[_Pair]) -> _Pair:
    """Return a client and its result, with what its examples count for."""
    client, result = reply.origin
    weighed: Any = client, replace(result, num_examples=int(reply.examples))
    return cast(_Pair, weighed)


def _metrics_of(result: FitRes | EvaluateRes) -> dict[str, Any]:
    """Return all that a result tells beside its arrays."""
    told: dict[str, Any] = {**(result.metrics or {}), EXAMPLES: result.num_examples}
    return told if isinstance(result, FitRes) else {**told, "loss": result.loss}


def _kind_of(value: Scalar) -> str:
    return "number" if isinstance(value, int | float) else type(value).__name__


def _record_of(tensors: Sequence[bytes]) -> ArrayRecord:
    return ArrayRecord(
        {
            str(index): FlowerArray(dtype="", shape=(), stype=_TENSOR_TYPE, data=tensor)
            for index, tensor in enumerate(tensors)
        }
    )


def _content(part: FitIns | FitRes | EvaluateIns | EvaluateRes) -> RecordDict:
    """Return the records that Flower makes of an instruction or a result."""
    entries = part.config if isinstance(part, FitIns | EvaluateIns) else part.metrics
    content = RecordDict({"config": ConfigRecord(dict(entries or {}))})
    if not isinstance(part, EvaluateRes):
        content["arrays"] = _record_of(part.parameters.tensors)
    return content


def _by_id(results: list[_Pair]) -> list[tuple[int, _Pair]]:
    """Return (node id, result) in the order of the ids."""
    pairs = [(_id(pair[0]), pair) for pair in results]
    return sorted(pairs, key=lambda pair: pair[0])


def _parameters_of(arrays: Params) -> Parameters:
    return ndarrays_to_parameters(list(arrays.values()))


def _id(client: ClientProxy) -> int:
    if not client.cid.isdecimal():
        raise SettingsError(f"expected a client id of digits, got {client.cid!r}")
    return int(client.cid)
