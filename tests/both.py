"""One run with tampered replies, on either of Flower's APIs."""

import pytest
from autoflip_flwr.legacy import AutoFLIP as OlderAutoFLIP
from flat import flat
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import FitRes, Parameters, bytes_to_ndarray
from flwr.server.strategy import FedAvg as OlderFedAvg
from flwr.serverapp.strategy import FedAvg
from inprocess import LocalGrid, net, run, state_of, toy_app
from test_legacy import CIDS, options, serve

from autoflip_flwr import AutoFLIP
from autoflip_flwr.wire.records import GUIDANCE, SIGNS, VALUES

NODES = [int(cid) for cid in CIDS]


def newer(tamper=None, *, rounds=1, inner=None, app=None, **settings):
    """Run with tampered replies; return the strategy and the last model."""
    strategy = AutoFLIP(inner or FedAvg(fraction_evaluate=0), **flat(**settings))
    grid = LocalGrid(app or toy_app(), NODES, tamper=tamper)
    return strategy, run(strategy, grid, net(), rounds)[0][-1]


def older(tamper=None, *, rounds=1, **settings):
    """Do the same on the older API: results are tampered with as the replies are."""
    seen = []
    inner = OlderFedAvg(**options(net, seen, fraction_evaluate=0))
    strategy = OlderAutoFLIP(inner, **flat(model=net(), **settings))

    def change(ins, result):
        node_id = NODES[(result.num_examples - 24) // 4]
        asked = RecordDict({"config": ConfigRecord(ins.config)})
        message = Message(asked, node_id, "train")
        if ins.config["autoflip.phase"] == "explore":
            names = [GUIDANCE, SIGNS]
        else:
            entries = strategy.rounds.manifest.entries
            names = [VALUES, *(entry.name for entry in entries if not entry.masked)]
        tensors = zip(names, result.parameters.tensors, strict=False)
        arrays = {name: array_of(name, data) for name, data in tensors}
        metrics = {
            "num-examples": result.num_examples,
            "train-loss": result.metrics["loss"],
        }
        content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics)}
        reply = tamper(message, Message(RecordDict(content), reply_to=message))
        if reply is None or reply.has_error():
            raise OSError("gone")
        return result_of(result, reply.content)

    serve(strategy, rounds=rounds, tamper=tamper and change)
    return strategy, dict(zip(state_of(net()), seen[-1], strict=True))


def array_of(name, data):
    """Return a tensor of a result as the array of a reply."""
    if name not in (VALUES, GUIDANCE, SIGNS):
        return Array(bytes_to_ndarray(data))
    dtype, size = ("float32", 4) if name == VALUES else ("uint8", 1)
    return Array(dtype, (len(data) // size,), "autoflip.raw", data)


def result_of(result, content):
    """Return the result that tells what the records of a reply do."""
    metrics = dict(content["metrics"])
    examples = metrics.pop("num-examples")
    for record in content.config_records.values():
        metrics |= record
    tensors = [array.data for array in content["arrays"].values()]
    parameters = Parameters(tensors, result.parameters.tensor_type)
    return FitRes(result.status, parameters, examples, metrics)


both = pytest.mark.parametrize("changed", [newer, older])
