"""AutoFLIP for projects on Flower's older API (`flwr.server.strategy`).

The same state, guidance, mask and codec as `autoflip_flwr.AutoFLIP`, behind
``configure_fit`` / ``aggregate_fit``; clients use the same `AutoFlipMod`::

    from autoflip_flwr.legacy import AutoFLIP

    strategy = AutoFLIP(FedAvg(...), names=list(Net().state_dict()))
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord
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
from flwr.server.strategy import FedAvg, FedAvgM, FedOpt, Strategy
from torch import nn

from autoflip_flwr import wire
from autoflip_flwr.errors import AutoFlipError, SettingsError, WireError
from autoflip_flwr.rounds import Rounds
from autoflip_flwr.settings import (
    ExplorationSettings,
    PruningSettings,
    RivalSettings,
)
from autoflip_flwr.store import Answer
from autoflip_flwr.strategy import check_warm_start, prunable_of, units_of
from autoflip_flwr.types import Array, MethodName, Params, ValueType
from autoflip_flwr.units import ExampleInputs

_log = logging.getLogger("flwr")

_TENSOR_TYPE = "numpy.ndarray"


class AutoFLIP(Strategy):
    """Federated pruning from the clients' exploration, around an older strategy.

    Parameters
    ----------
    strategy : Strategy, optional
        Any strategy of `flwr.server.strategy`; ``FedAvg()`` by default.
    names : sequence of str, optional
        Names of the arrays in their order, ``list(model.state_dict())``. The older
        API numbers arrays; without names, BatchNorm's running statistics cannot be
        told from weights, and `prunable` and `exclude` see numbers.
    prunable : sequence of str, optional
        Names of the trainable parameters; see `autoflip_flwr.AutoFLIP`.
    values : {"float32", "float16"}
        Type of the kept values on the wire.
    exploration : ExplorationSettings, optional
    store : Path, optional
        Where the local guidance lives; a temporary folder by default.
    seed : int, optional
    method, rivals
        What makes the masks: see `autoflip_flwr.AutoFLIP`.
    model : nn.Module, optional
        Tells `names` and `prunable`, and, with `example_inputs`, the units.
    example_inputs : torch.Tensor or tuple, optional
        One sample that the model runs on.
    **pruning
        ``threshold``, ``mode``, ``score``, ``normalization``, ``population_weight``,
        ``floor``, ``exclude``, ``pruned_weights``, ``agreement``,
        ``agreement_weight``, ``refresh``, ``refresh_every``, ``refresh_until``,
        ``units``, ``min_units``,
        ``unit_multiple``: see `autoflip_flwr.AutoFLIP`.

    Attributes
    ----------
    rounds : Rounds
        The state: global arrays, current mask, diagnostics.
    """

    def __init__(
        self,
        strategy: Strategy | None = None,
        *,
        names: Sequence[str] | None = None,
        prunable: Sequence[str] | None = None,
        values: ValueType = "float32",
        exploration: ExplorationSettings | None = None,
        store: Path | None = None,
        seed: int | None = None,
        method: MethodName = "autoflip",
        rivals: RivalSettings | None = None,
        model: nn.Module | None = None,
        example_inputs: ExampleInputs | None = None,
        **pruning: Any,
    ) -> None:
        super().__init__()
        self.strategy = strategy if strategy is not None else FedAvg()
        if exploration is not None and exploration.warm_start:
            check_warm_start(self.strategy)
        if names is None and model is not None:
            names = list(model.state_dict())
        self.rounds = Rounds(
            PruningSettings(**pruning),
            exploration or ExplorationSettings(),
            values=values,
            prunable=prunable_of(prunable, model),
            store=store,
            seed=seed,
            method=method,
            rivals=rivals,
            units=units_of(
                pruning.get("units", 0.0), model, example_inputs, method=method
            ),
        )
        self._names = None if names is None else list(names)
        self._returned: list[bytes] | None = None
        self._sent = b""

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
        if not instructions:
            return []
        sampled = [client for client, _ in instructions]
        self._explore(server_round, sampled, instructions[0][1], client_manager)
        plan = self.rounds.begin(server_round, [_id(client) for client in sampled])
        packed = self._pack(self.rounds.arrays)
        self._sent = packed.tensors[0]
        return [
            (client, FitIns(packed, {**ins.config, **plan.entries("train")}))
            for client, ins in instructions
        ]

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Unpack the valid results and let the inner strategy aggregate them."""
        valid: list[tuple[ClientProxy, FitRes]] = []
        frames: dict[int, bytes] = {}
        replies: dict[int, tuple[Params, float]] = {}
        dropped: list[tuple[ClientProxy, FitRes] | BaseException] = []
        for client, result in sorted(results, key=lambda pair: _id(pair[0])):
            try:
                unpacked = self._unpack(result)
                frames[id(unpacked)] = result.parameters.tensors[0]
                named = self._named(unpacked.parameters)
                replies[id(unpacked)] = named, result.num_examples
                valid.append((client, unpacked))
            except (AutoFlipError, ValueError, TypeError) as error:
                self.rounds.drop(server_round, _id(client), str(error))
                dropped.append((client, result))
        odd = self.rounds.outliers(replies)
        for client, result in valid:
            if id(result) in odd:
                self.rounds.drop(server_round, _id(client), odd[id(result)])
                dropped.append((client, result))
            else:
                frame = frames[id(result)]
                self.rounds.observe(self._sent, frame, result.num_examples)
        valid = [pair for pair in valid if id(pair[1]) not in odd]
        if not valid:
            self.rounds.abandon(server_round, "no valid reply")
            return None, {}
        if not any(result.num_examples for _, result in valid):
            self.rounds.abandon(server_round, "no valid reply trained on any example")
            return None, {}
        aggregated, metrics = self.strategy.aggregate_fit(
            server_round, valid, [*failures, *dropped]
        )
        if aggregated is None:
            self.rounds.abandon(server_round, "the inner strategy aggregated nothing")
            return None, metrics
        self.rounds.finish(self._named(aggregated))
        self._hand_over(list(self.rounds.arrays.values()))
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
            return instructions
        packed = self._pack(self._named(parameters))
        return [
            (client, EvaluateIns(packed, {**ins.config, **plan.entries("evaluate")}))
            for client, ins in instructions
        ]

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Let the inner strategy aggregate."""
        return self.strategy.aggregate_evaluate(server_round, results, failures)

    def _explore(
        self,
        server_round: int,
        sampled: Sequence[ClientProxy],
        like: FitIns,
        client_manager: ClientManager,
    ) -> None:
        proxies = {_id(client): client for client in client_manager.all().values()}
        ask = self.rounds.asks(
            server_round,
            connected=sorted(proxies),
            sampled=[_id(client) for client in sampled],
        )
        if ask is None:
            return
        record, entries = self.rounds.exploration_of(ask)
        start = Parameters([array.data for array in record.values()], _TENSOR_TYPE)
        ins = FitIns(start, {**like.config, **entries})
        timeout = self.rounds.exploration.timeout

        def one(node_id: int) -> None:
            answer: Answer | str
            try:
                result = proxies[node_id].fit(ins, timeout, server_round)
                answer = Answer(*_frames(result.parameters), result.num_examples)
            except Exception as error:  # whatever a client's proxy raises
                answer = str(error)
            self.rounds.answer(node_id, answer)

        for batch in self.rounds.batches(ask.nodes):
            _log.info("exploration: %d clients explore", len(batch))
            with ThreadPoolExecutor(max_workers=len(batch)) as pool:
                list(pool.map(one, batch))
        if self.rounds.explored(ask):
            self._hand_over(list(self.rounds.arrays.values()))

    def _hand_over(self, arrays: list[Array]) -> None:
        """Set what the strategies with a server optimizer take for the global model."""
        if isinstance(self.strategy, FedAvgM):
            self.strategy.initial_parameters = ndarrays_to_parameters(arrays)
        if isinstance(self.strategy, FedOpt):
            self.strategy.current_weights = arrays

    def _pack(self, arrays: Params) -> Parameters:
        assert self.rounds.plan is not None
        record = self.rounds.plan.pack(arrays)
        return Parameters([array.data for array in record.values()], _TENSOR_TYPE)

    def _unpack(self, result: FitRes) -> FitRes:
        plan = self.rounds.plan
        assert plan is not None
        if not isinstance(result.num_examples, int) or result.num_examples < 0:
            raise WireError(f"expected num_examples >= 0, got {result.num_examples!r}")
        record = ArrayRecord(
            {
                str(index): FlowerArray(
                    dtype="", shape=(), stype=_TENSOR_TYPE, data=tensor
                )
                for index, tensor in enumerate(result.parameters.tensors)
            }
        )
        arrays = plan.unpack(wire.named(record, plan), fill=self.rounds.arrays)
        return FitRes(
            status=result.status,
            parameters=_parameters_of(arrays),
            num_examples=result.num_examples,
            metrics=result.metrics,
        )

    def _named(self, parameters: Parameters) -> dict[str, Array]:
        arrays = parameters_to_ndarrays(parameters)
        names = self._names or [str(index) for index in range(len(arrays))]
        if len(names) != len(arrays):
            raise SettingsError(
                f"expected {len(names)} arrays ({names}), the model has {len(arrays)}"
            )
        return dict(zip(names, arrays, strict=True))


def _parameters_of(arrays: Params) -> Parameters:
    return ndarrays_to_parameters(list(arrays.values()))


def _frames(parameters: Parameters) -> tuple[bytes, bytes | None]:
    """Return an explorer's guidance frame, and the signs' if it sent them."""
    if len(parameters.tensors) not in (1, 2):
        raise WireError(f"expected 1 guidance frame, got {len(parameters.tensors)}")
    frame, *signs = parameters.tensors
    return frame, signs[0] if signs else None


def _id(client: ClientProxy) -> int:
    if not client.cid.isdecimal():
        raise SettingsError(f"expected a client id of digits, got {client.cid!r}")
    return int(client.cid)
