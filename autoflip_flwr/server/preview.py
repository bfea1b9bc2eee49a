"""What a run will take, told from the model and the settings alone, without data.

Messages are those of `wire` and their sizes follow the schedule of `pruners`, which a
run uses, too. Which weights go is not known before clients explore; where it matters,
for whole units, random guidance stands in.
"""

import math
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import nn

from autoflip_flwr.errors import MaskError, ModelError, SettingsError
from autoflip_flwr.method.structured import Units
from autoflip_flwr.pruners import AutoFlipPruner
from autoflip_flwr.pruners.store import Answer, Answers
from autoflip_flwr.server.intake import Intake
from autoflip_flwr.server.rounds import Rounds
from autoflip_flwr.server.savings import amount
from autoflip_flwr.settings import WireSettings
from autoflip_flwr.units import ExampleInputs, compact_if_it_pays, tensors_of, trace
from autoflip_flwr.units.enforce import ties
from autoflip_flwr.units.layers import join
from autoflip_flwr.units.measure import backward_bytes, operations
from autoflip_flwr.wire import codec, records

#: What is suggested: a share of the operations, and of the clients that explore.
_OPERATIONS, _FRACTION = 0.33, 0.2

#: Write a number of bytes.
_bytes = partial(amount, unit="B")


@dataclass(frozen=True, slots=True)
class Layer:
    """A module with parameters of its own."""

    name: str  # its path in the model
    kind: str  # its class
    parameters: int  # shared ones count where they are first
    operations: int  # multiply-accumulates for the example inputs
    prunable: str  # its tensors that may lose single weights, or why none may
    units: str  # how many whole units it has, whose it has, or why it has none


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What a network takes on a client; sizes in bytes."""

    operations: int  # multiply-accumulates of a forward pass of the example inputs
    fixed: int  # weights, buffers, gradients and masks
    gradients: int  # momentum takes as much as they, Adam twice as much
    per_sample: int  # what a forward pass keeps for the backward pass

    @property
    def memory(self) -> str:
        """Its memory without an optimizer, as text."""
        return f"{_bytes(self.fixed)} + {_bytes(self.per_sample)} a sample"


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """How many clients are connected, and train and evaluate in each round."""

    clients: int
    sampled: int
    evaluated: int
    rounds: int

    def __post_init__(self) -> None:
        fits = 1 <= self.sampled <= self.clients and 0 <= self.evaluated <= self.clients
        if not fits or self.rounds < 1:
            raise SettingsError(
                "expected 1 <= sampled <= clients, 0 <= evaluated <= clients and "
                f"rounds >= 1, got {self}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """The bytes of a run, both ways."""

    rounds: tuple[int, ...]  # of each round, the exploration before it included
    dense_round: int  # of a round of FedAvg
    explored: int  # of the explorations alone
    explorers: int  # explorations of one client, over all rounds
    pruned: int  # parameters that the last mask prunes

    @property
    def sent(self) -> int:
        """Bytes of the whole run."""
        return sum(self.rounds)

    @property
    def dense_sent(self) -> int:
        """Bytes of as many rounds of FedAvg."""
        return self.dense_round * len(self.rounds)

    @property
    def paid_after(self) -> int | None:
        """The first round after which no more is sent than by FedAvg; None: never."""
        for server_round, total in enumerate(accumulate(self.rounds), 1):
            if total <= server_round * self.dense_round:
                return server_round
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview(Course):
    """What a run will take."""

    model: str  # its class
    layers: tuple[Layer, ...]
    parameters: int  # trainable ones
    federation: Federation
    dense: Network  # the whole model, as FedAvg trains it
    client: Network  # what a client trains in the end
    warnings: tuple[str, ...]
    suggestions: tuple[str, ...]

    @property
    def kept(self) -> int:
        """Trainable parameters that the last mask keeps."""
        return self.parameters - self.pruned

    def __str__(self) -> str:
        """Return it as text."""
        head = ("layer", "kind", "parameters", "operations", "prunable", "units")
        rows = [
            (
                *(layer.name or "(model)", layer.kind),
                *(amount(layer.parameters), amount(layer.operations)),
                *(layer.prunable, layer.units),
            )
            for layer in self.layers
        ]
        of = self.federation
        lines = [
            f"{self.model}: {amount(self.parameters)} parameters, "
            f"{amount(self.dense.operations)} multiply-accumulates a forward pass",
            *("", *_table([head, *rows]), ""),
            f"{of.rounds} rounds; {of.clients} clients, of which {of.sampled} train "
            f"and {of.evaluated} evaluate in each",
            *(f"  {label:<13} {text}" for label, text in self._costs().items()),
        ]
        for label, texts in (
            ("warnings", self.warnings),
            ("suggested settings", self.suggestions),
        ):
            lines += ["", label, *(f"  {text}" for text in texts)] if texts else []
        return "\n".join(lines)

    def _costs(self) -> dict[str, str]:
        dense, client, paid = self.dense, self.client, self.paid_after
        paid_text = f"paid for after round {paid}" if paid else "never paid for"
        return {
            "kept": f"{amount(self.kept)} of {amount(self.parameters)} parameters, "
            "in the end",
            "bytes sent": f"{_bytes(self.sent)}; FedAvg {_bytes(self.dense_sent)}"
            f": {self.sent / self.dense_sent:.3f} of it",
            "- exploration": f"{_bytes(self.explored)} for {self.explorers} "
            f"explorations, {paid_text}",
            "- last round": f"{_bytes(self.rounds[-1])}; FedAvg "
            f"{_bytes(self.dense_round)}",
            "operations": f"{amount(client.operations)}, in the end; FedAvg "
            f"{amount(dense.operations)}: "
            f"{client.operations / max(1, dense.operations):.3f} of it",
            "memory": f"{client.memory}; FedAvg {dense.memory}; momentum adds "
            f"{_bytes(client.gradients)}, Adam {_bytes(2 * client.gradients)}",
        }


def preview(
    rounds: Rounds,
    model: nn.Module,
    example_inputs: ExampleInputs,
    federation: Federation,
) -> Preview:
    """Predict a run with the settings of `rounds`, which stays as it is.

    It is a ModelError if the model does not run on the inputs, and a SettingsError if
    the clients' guidance alone will decide how much is pruned.
    """
    pruning = rounds.pruning
    if not isinstance(rounds.pruner, AutoFlipPruner) or pruning.mode == "value":
        raise SettingsError(
            "preview knows how many weights AutoFLIP keeps with mode quantile or "
            f"compression, got {type(rounds.pruner).__name__} and mode {pruning.mode}"
        )
    by_module = operations(model, example_inputs)
    dense = _network(model, example_inputs, by_module[""])
    warnings, units = _warnings(rounds, model), None
    try:
        units = trace(model, example_inputs)
    except ModelError as error:
        warnings.append(f"no whole units: {error}")

    def begin(**changes: Any) -> Rounds:
        """Begin a run, in which nobody will answer."""
        chosen = {"pruning": pruning, "units": units, **changes}
        run = replace(rounds, pruner=AutoFlipPruner(), directory=Path(folder), **chosen)
        run.total = federation.rounds
        run.adopt(records.arrays_of(ArrayRecord(model.state_dict())))
        return run

    def client_of(run: Rounds) -> Network:
        return _client(run, model, example_inputs, dense)

    with tempfile.TemporaryDirectory(suffix="-autoflip") as folder:
        asked = bool(pruning.units or pruning.operations)
        try:
            run = begin()
        except (MaskError, SettingsError) as error:
            if not asked:
                raise
            warnings.append(f"the run would not start, so here units=0: {error}")
            pruning = pruning.model_copy(update={"units": 0.0, "operations": None})
            run = begin()
        course, client = _course(run, federation), client_of(run)
        suggestions: list[str] = []
        if units is not None and not asked:
            update = {"operations": _OPERATIONS}
            try:
                few = client_of(begin(pruning=pruning.model_copy(update=update)))
                share = few.operations / max(1, dense.operations)
                suggestions.append(
                    f"pruning.operations={_OPERATIONS}: about {share:.2f} of the "
                    f"operations, {few.memory}"
                )
            except MaskError as error:
                warnings.append(f"too narrow to prune whole units: {error}")
        for kind in ("float16", "int8") if rounds.values == "float32" else ():
            total = _course(begin(values=kind), federation).sent
            suggestions.append(f"wire.values={kind}: {_bytes(total)} sent")
        if (course.paid_after or math.inf) > federation.rounds // 2:
            fewer = rounds.exploration.model_copy(update={"fraction": _FRACTION})
            less = _course(begin(exploration=fewer), federation)
            if less.paid_after and less.explored < course.explored:
                suggestions.append(
                    f"exploration.fraction={_FRACTION}: paid for after round "
                    f"{less.paid_after}"
                )
        layers = tuple(_layers(model, by_module, run))
    return Preview(
        **asdict(course),
        model=type(model).__name__,
        layers=layers,
        parameters=sum(e.size for e in run.manifest.entries if e.trainable),
        federation=federation,
        dense=dense,
        client=client,
        warnings=tuple(warnings),
        suggestions=tuple(suggestions),
    )


def _course(run: Rounds, of: Federation) -> Course:
    """Make the requests of a run, and count the bytes of all messages."""
    pruner, shapes = run.pruner, run.manifest.shapes
    intake = Intake(run, WireSettings())
    empty = {name: np.zeros(shape, np.bool_) for name, shape in shapes.items()}
    total = sum(map(np.size, empty.values()))
    # A message, and a reply, without what depends on the mask.
    plan = records.Plan(run.manifest, empty, run.values)
    packed, dense = plan.pack(run.arrays), records.record_of(run.arrays)
    trained = _message(packed, plan.entries("train", {})) + _reply(packed)
    evaluated = _message(packed, plan.entries("evaluate", {})) + _reply()
    dense_trained = _message(dense, {}) + _reply(dense)
    dense_evaluated = _message(dense, {}) + _reply()
    in_rounds, explored, explorers, pruned = [], 0, 0, 0
    held: dict[int, int] = {}  # client -> entries that the mask it holds keeps
    rng = np.random.default_rng(run.seed or 0)  # samples clients
    for server_round in range(1, of.rounds + 1):
        exploration = 0
        ask = pruner.asks(
            server_round, connected=range(of.clients), sampled=range(of.sampled)
        )
        if ask is not None:
            before = intake.state()
            intake.restore({**before, "built": before["built"] and not ask.renew})
            arrays, entries = intake.request(ask)
            signs = entries[records.MEASURE] == "update"
            answer = records.guidance_record(
                bytes(codec.frame_bytes(shapes)),
                codec.pack_mask(empty) if signs else None,
            )
            each = _message(arrays, entries) + _reply(answer, {records.EPOCHS: 1})
            exploration = len(ask.nodes) * each
            explorers += len(ask.nodes)
            intake.restore({**intake.state(), "warm": True})  # signs are sent once
        explored += exploration
        threshold = pruner.threshold_of(server_round)
        pruned = pruner.pruned_count(pruner.initial, threshold)
        kept = int(total - pruned)
        down = codec.values_bytes([kept], dtype=plan.down)
        up = codec.values_bytes([kept], dtype=plan.values)
        masks = 0
        for count in (of.sampled, of.evaluated):
            for node_id in rng.choice(of.clients, count, replace=False).tolist():
                masks += _mask_bytes(held.get(node_id), kept, total)
                held[node_id] = kept
        evaluations = of.evaluated * (evaluated + down)
        trainings = of.sampled * (trained + down + up)
        in_rounds.append(exploration + trainings + evaluations + masks)
    return Course(
        rounds=tuple(in_rounds),
        dense_round=of.sampled * dense_trained + of.evaluated * dense_evaluated,
        explored=explored,
        explorers=explorers,
        pruned=pruned,
    )


def _client(
    run: Rounds, model: nn.Module, example_inputs: ExampleInputs, dense: Network
) -> Network:
    """Return what a client trains after the last round, with random guidance."""
    shapes, small = run.manifest.shapes, None
    if run.pruning.units or run.pruning.operations:
        rng = np.random.default_rng(run.seed or 0)
        guidance = {n: rng.random(shape, np.float32) for n, shape in shapes.items()}
        answers = Answers(run.directory / "rehearsed", shapes)
        answers.put(0, Answer(codec.quantize(guidance)))
        measured = answers.get(0)
        assert measured is not None, "the frame fits"
        run.pruner.add(0, measured, run.pruner.initial)
        masks = run.pruner.masks([0], run.pruner.initial, run.total or 1)
        small = compact_if_it_pays(model, masks, example_inputs)
    own, trained = dense, model
    if small is not None:
        left = operations(small, example_inputs)[""]
        own, trained = _network(small, example_inputs, left), small
    masked = _size(p for name, p in trained.named_parameters() if name in shapes)
    beside = 0 if small is None else _held(model)
    return replace(own, fixed=own.fixed + masked + beside)


def _mask_bytes(held: int | None, kept: int, total: int) -> int:
    """Return the bytes of a mask's entries in a message, as `server.held` writes them.

    `held` entries are kept by the mask that the client holds; every mask is within the
    one before.
    """
    entries: dict[str, Any] = {records.MASK: bytes(-(-total // 8))}
    if held is not None:
        digest = codec.digest(b"")
        within = b"" if held == kept else bytes(-(-held // 8))
        if len(digest) + len(within) < len(entries[records.MASK]):
            entries = {records.HELD: digest}
            if within:
                entries[records.MASK] = within
    return int(ConfigRecord(entries).count_bytes())


def _message(arrays: ArrayRecord, entries: Mapping[str, Any]) -> int:
    """Return the size of a message to a client."""
    config = ConfigRecord({"server-round": 1, **entries})
    return records.count_bytes(RecordDict({"arrays": arrays, "config": config}))


def _reply(arrays: ArrayRecord | None = None, metrics: Mapping[str, int] = {}) -> int:
    """Return the size of a reply that tells its examples."""
    told = MetricRecord({"num-examples": 1, **metrics})
    content = RecordDict({"metrics": told})
    if arrays is not None:
        content["arrays"] = arrays
    return records.count_bytes(content)


def _network(
    model: nn.Module, example_inputs: ExampleInputs, operations: int
) -> Network:
    """Measure a network that is trained without masks."""
    gradients = _size(p for p in model.parameters() if p.requires_grad)
    first = next(tensors_of(example_inputs), None)
    samples = 1 if first is None or first.ndim == 0 else max(1, len(first))
    return Network(
        operations=operations,
        fixed=_held(model) + gradients,
        gradients=gradients,
        per_sample=backward_bytes(model, example_inputs) // samples,
    )


def _held(model: nn.Module) -> int:
    return _size([*model.parameters(), *model.buffers()])


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _warnings(rounds: Rounds, model: nn.Module) -> list[str]:
    """Say what is unusual, and what AutoFLIP does not know without the model."""
    known = rounds.pruning.prunable is not None
    frozen = [p for p in model.parameters() if not p.requires_grad]
    warnings = [
        f"tied: {name} is {first}; "
        + (
            "it is pruned, counted and sent once"
            if rounds.ties
            else "AutoFLIP takes them for two: give it the model"
        )
        for name, first in ties(model).items()
    ]
    if frozen:
        cure = "" if known else "; AutoFLIP takes them for trained: give it the model"
        warnings.append(
            f"frozen: {len(frozen)} tensors, {_bytes(_size(frozen))}, are not "
            f"trained; they are not pruned, and travel whole{cure}"
        )
    return warnings


def _layers(
    model: nn.Module, by_module: Mapping[str, int], rounds: Rounds
) -> Iterator[Layer]:
    tied = ties(model)

    def below(path: str) -> int:
        """Count what the children of a module do."""
        children = model.get_submodule(path).named_children()
        paths = [join(path, name) for name, _ in children]
        return sum(by_module.get(each) or below(each) for each in paths)

    def reason(name: str, parameter: nn.Parameter) -> str:
        if name in tied:
            return f"tied to {tied[name]}"
        if not parameter.requires_grad:
            return "frozen"
        return "kept whole" if name in rounds.pruner.spared else "excluded"

    for path, module in model.named_modules():
        own = {join(path, n): p for n, p in module.named_parameters(recurse=False)}
        if not own:
            continue
        prunable = [
            name.removeprefix(f"{path}.")
            for name in own
            if name in rounds.manifest.shapes
            and name not in rounds.pruner.spared
            and name not in tied
        ]
        reasons = dict.fromkeys(reason(name, p) for name, p in own.items())
        yield Layer(
            name=path,
            kind=type(module).__name__,
            parameters=sum(p.numel() for name, p in own.items() if name not in tied),
            operations=by_module[path] - below(path),
            prunable=", ".join(prunable or reasons),
            units=_units_of(path, own, by_module, rounds.manifest.shapes, rounds.units),
        )


def _units_of(
    path: str,
    own: Iterable[str],
    paths: Collection[str],
    prunable: Iterable[str],
    units: Units | None,
) -> str:
    """Say how many units a module has, whose it shares, or why it has none."""

    def of(name: str) -> bool:  # a recurrent module's groups have names below its own
        return name == path or (name not in paths and name.rpartition(".")[0] == path)

    if units is None:
        return "none"
    if groups := [group for group in units.groups if of(group.name)]:
        free = [group for group in units.only(prunable).groups if group in groups]
        return str(sum(group.size for group in free) or "none: not all is pruned")
    for name, why in units.whole.items():
        if of(name):
            return f"none: {why}"
    for name in own:
        owners = units.parameters.get(name, {}).get(int(name in units.columns), [-1])
        for group in units.groups:
            if np.isin(owners, group.numbers).any():
                return f"those of {group.name}"
    return "none"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Align columns; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if 2 <= index <= 3 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
