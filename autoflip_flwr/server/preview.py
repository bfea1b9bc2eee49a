"""What a run will take, told from the model and the settings alone, without data.

Messages are those of `wire` and their sizes follow the schedule of `pruners`, which a
run uses, too. Which weights go is not known before clients explore; where it matters,
for whole units, random guidance stands in.
"""

import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from autoflip_flwr.types import Masks
from autoflip_flwr.units import ExampleInputs, compact_if_it_pays, tensors_of, trace
from autoflip_flwr.units.layers import join
from autoflip_flwr.units.measure import backward_bytes, operations
from autoflip_flwr.wire import codec, records

#: What is suggested: a share of the operations, and of the clients that explore.
_OPERATIONS, _FRACTION = 0.33, 0.2


@dataclass(frozen=True, slots=True)
class Layer:
    """A module with parameters of its own.

    Attributes
    ----------
    name, kind : str
        Its path in the model, and its class.
    parameters : int
        Shared ones count where they are first.
    operations : int
        Multiply-accumulates for the example inputs.
    prunable : str
        Its tensors that may lose single weights, or why none may.
    units : str
        How many whole units it has, whose units it has, or why it has none.
    """

    name: str
    kind: str
    parameters: int
    operations: int
    prunable: str
    units: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What a network takes on a client.

    Attributes
    ----------
    operations : int
        Multiply-accumulates of a forward pass of the example inputs.
    fixed : int
        Bytes of weights, buffers, gradients and masks.
    gradients : int
        Bytes of the gradients. Momentum takes as much, Adam twice as much.
    per_sample : int
        Bytes that a forward pass keeps for the backward pass, of each sample.
    """

    operations: int
    fixed: int
    gradients: int
    per_sample: int


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
class Preview:
    """What a run will take.

    Attributes
    ----------
    model : str
        The class of the model.
    layers : tuple of Layer
    parameters, kept : int
        Trainable parameters, and those that the last mask keeps.
    federation : Federation
    explorers : int
        Explorations of one client, over all rounds.
    explored : int
        Bytes of the explorations, both ways.
    rounds : tuple of int
        Bytes of each round, both ways, the exploration before it included.
    dense_round : int
        Bytes of a round of FedAvg, both ways.
    dense, client : Network
        The whole model as FedAvg trains it, and what a client trains in the end.
    warnings, suggestions : tuple of str
    """

    model: str
    layers: tuple[Layer, ...]
    parameters: int
    kept: int
    federation: Federation
    explorers: int
    explored: int
    rounds: tuple[int, ...]
    dense_round: int
    dense: Network
    client: Network
    warnings: tuple[str, ...]
    suggestions: tuple[str, ...]

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
        return _paid_after(self.rounds, self.dense_round)

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
            "bytes sent": f"{_size_of(self.sent)}; FedAvg {_size_of(self.dense_sent)}"
            f": {self.sent / self.dense_sent:.3f} of it",
            "- exploration": f"{_size_of(self.explored)} for {self.explorers} "
            f"explorations, {paid_text}",
            "- last round": f"{_size_of(self.rounds[-1])}; FedAvg "
            f"{_size_of(self.dense_round)}",
            "operations": f"{amount(client.operations)}, in the end; FedAvg "
            f"{amount(dense.operations)}: "
            f"{client.operations / max(1, dense.operations):.3f} of it",
            "memory": f"{_size_of(client.fixed)} + {_size_of(client.per_sample)} a "
            f"sample; FedAvg {_size_of(dense.fixed)} + {_size_of(dense.per_sample)}; "
            f"momentum adds {_size_of(client.gradients)}, Adam "
            f"{_size_of(2 * client.gradients)}",
        }


def preview(
    rounds: Rounds,
    model: nn.Module,
    example_inputs: ExampleInputs,
    federation: Federation,
) -> Preview:
    """Predict a run with the settings of `rounds`, which stays as it is.

    Raises
    ------
    ModelError
        If the model does not run on the inputs.
    SettingsError
        If the clients' guidance alone will decide how much is pruned.
    """
    pruning = rounds.pruning
    if not isinstance(rounds.pruner, AutoFlipPruner) or pruning.mode == "value":
        raise SettingsError(
            "preview knows how many weights AutoFLIP keeps with mode quantile or "
            f"compression, got {type(rounds.pruner).__name__} and mode {pruning.mode}"
        )
    by_module = operations(model, example_inputs)
    dense = _network(model, example_inputs, by_module[""])
    warnings, units = _warnings(model, known=pruning.prunable is not None), None
    try:
        units = trace(model, example_inputs)
    except ModelError as error:
        warnings.append(f"no whole units: {error}")
    with tempfile.TemporaryDirectory(suffix="-autoflip") as folder:

        def rehearsed(**changes: Any) -> _Rehearsal:
            settings = {"pruning": pruning, "units": units, "directory": Path(folder)}
            own = replace(rounds, pruner=AutoFlipPruner(), **{**settings, **changes})
            return _Rehearsal(own, model, example_inputs, federation, dense)

        asked = bool(pruning.units or pruning.operations)
        try:
            run = rehearsed()
        except (MaskError, SettingsError) as error:
            if not asked:
                raise
            warnings.append(f"the run would not start, so here units=0: {error}")
            pruning = pruning.model_copy(update={"units": 0.0, "operations": None})
            run = rehearsed()
        sent, client = run.sent(), run.client()
        suggestions: list[str] = []
        if units is not None and not asked:
            update = {"operations": _OPERATIONS}
            try:
                few = rehearsed(pruning=pruning.model_copy(update=update)).client()
                share = few.operations / max(1, dense.operations)
                suggestions.append(
                    f"pruning.operations={_OPERATIONS}: about {share:.2f} of the "
                    f"operations, {_size_of(few.fixed)} + {_size_of(few.per_sample)} "
                    "a sample"
                )
            except MaskError as error:
                warnings.append(f"too narrow to prune whole units: {error}")
        for kind in ("float16", "int8") if rounds.values == "float32" else ():
            total = sum(rehearsed(values=kind).sent().rounds)
            suggestions.append(f"wire.values={kind}: {_size_of(total)} sent")
        paid = _paid_after(sent.rounds, sent.dense_round)
        if paid is None or paid > federation.rounds // 2:
            update = {"fraction": _FRACTION}
            fewer = rounds.exploration.model_copy(update=update)
            less = rehearsed(exploration=fewer).sent()
            paid = _paid_after(less.rounds, less.dense_round)
            if paid is not None and less.explored < sent.explored:
                suggestions.append(
                    f"exploration.fraction={_FRACTION}: paid for after round {paid}"
                )
        layers = tuple(_layers(model, by_module, run.rounds))
    trainable = sum(e.size for e in run.rounds.manifest.entries if e.trainable)
    return Preview(
        model=type(model).__name__,
        layers=layers,
        parameters=trainable,
        kept=trainable - sent.pruned,
        federation=federation,
        explorers=sent.explorers,
        explored=sent.explored,
        rounds=sent.rounds,
        dense_round=sent.dense_round,
        dense=dense,
        client=client,
        warnings=tuple(warnings),
        suggestions=tuple(suggestions),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    """The bytes of a run."""

    rounds: tuple[int, ...]
    dense_round: int
    explored: int
    explorers: int
    pruned: int  # weights, in the last round


class _Rehearsal:
    """A run without clients: its requests and masks are made, and nobody answers."""

    def __init__(
        self,
        rounds: Rounds,
        model: nn.Module,
        example_inputs: ExampleInputs,
        federation: Federation,
        dense: Network,
    ) -> None:
        self.rounds, self._federation, self._dense = rounds, federation, dense
        self._model, self._example_inputs = model, example_inputs
        rounds.total = federation.rounds
        rounds.adopt(records.arrays_of(ArrayRecord(model.state_dict())))

    def sent(self) -> _Sent:
        """Count the bytes of all messages."""
        rounds, of = self.rounds, self._federation
        pruner, intake = rounds.pruner, Intake(rounds, WireSettings())
        shapes = rounds.manifest.shapes
        empty = {name: np.zeros(shape, np.bool_) for name, shape in shapes.items()}
        plan, known = records.Plan(rounds.manifest, empty, rounds.values), _Known()
        dense, packed = records.record_of(rounds.arrays), plan.pack(rounds.arrays)
        evaluated = _bytes(None, _EXAMPLES)
        trained = _bytes(packed, plan.entries("train", {})) + _bytes(packed, _EXAMPLES)
        tested = _bytes(packed, plan.entries("evaluate", {})) + evaluated
        dense_round = of.sampled * (_bytes(dense, {}) + _bytes(dense, _EXAMPLES))
        dense_round += of.evaluated * (_bytes(dense, {}) + evaluated)
        in_rounds, explored, explorers, pruned = [], 0, 0, 0
        rng = np.random.default_rng(rounds.seed or 0)  # samples clients
        for server_round in range(1, of.rounds + 1):
            ask = pruner.asks(
                server_round,
                connected=range(of.clients),
                sampled=range(of.sampled),
            )
            exploration = 0
            if ask is not None:
                arrays, entries = intake.request(ask)
                signs = entries[records.MEASURE] == "update"
                answer = records.guidance_record(
                    bytes(codec.frame_bytes(shapes)),
                    codec.pack_mask(empty) if signs else None,
                )
                told = {**_EXAMPLES, records.EPOCHS: 1}
                each = _bytes(arrays, entries) + _bytes(answer, told)
                exploration = len(ask.nodes) * each
                explorers += len(ask.nodes)
                intake.restore({"warm": True})  # signs are sent once
            explored += exploration
            threshold = pruner.threshold_of(server_round)
            pruned = pruner.pruned_count(pruner.initial, threshold)
            total = sum(map(np.size, pruner.initial.values()))
            kept = int(total - pruned)
            down = codec.values_bytes([kept], dtype=plan.down)
            up = codec.values_bytes([kept], dtype=plan.values)
            masks = 0
            for count in (of.sampled, of.evaluated):
                for node_id in rng.choice(of.clients, count, replace=False):
                    masks += known.mask_bytes(int(node_id), kept, total)
            in_rounds.append(
                exploration
                + of.sampled * (trained + down + up)
                + of.evaluated * (tested + down)
                + masks
            )
        return _Sent(
            rounds=tuple(in_rounds),
            dense_round=dense_round,
            explored=explored,
            explorers=explorers,
            pruned=pruned,
        )

    def client(self) -> Network:
        """Return what a client trains after the last round."""
        rounds, small = self.rounds, None
        if rounds.pruning.units or rounds.pruning.operations:
            masks = self._masks()
            small = compact_if_it_pays(self._model, masks, self._example_inputs)
        trained = self._model if small is None else small
        shapes = rounds.manifest.shapes
        extra = _size(p for name, p in trained.named_parameters() if name in shapes)
        if small is None:
            return replace(self._dense, fixed=self._dense.fixed + extra)
        left = operations(small, self._example_inputs)[""]
        own = _network(small, self._example_inputs, left)
        return replace(own, fixed=own.fixed + extra + _held(self._model))

    def _masks(self) -> Masks:
        """Make the last mask, of random guidance."""
        rounds, shapes = self.rounds, self.rounds.manifest.shapes
        rng = np.random.default_rng(rounds.seed or 0)
        guidance = {n: rng.random(shape, np.float32) for n, shape in shapes.items()}
        answers = Answers(rounds.directory / "rehearsed", shapes)
        answers.put(0, Answer(codec.quantize(guidance)))
        measured = answers.get(0)
        assert measured is not None, "the frame fits"
        rounds.pruner.add(0, measured, rounds.pruner.initial)
        return rounds.pruner.masks([0], rounds.pruner.initial, self._federation.rounds)


class _Known:
    """The masks that clients hold (`server.held`), if every mask is within the last."""

    def __init__(self) -> None:
        self._kept: dict[int, int] = {}  # client -> entries that its mask keeps

    def mask_bytes(self, node_id: int, kept: int, total: int) -> int:
        """Return the bytes of the mask's entries in a message to a client."""
        before = self._kept.get(node_id)
        self._kept[node_id] = kept
        whole = -(-total // 8)
        within = 0 if before == kept else -(-(before or 0) // 8)
        entries: dict[str, Any] = {records.MASK: bytes(whole)}
        if before is not None and _DIGEST + within < whole:
            entries = {records.HELD: bytes(_DIGEST)}
            if within:
                entries[records.MASK] = bytes(within)
        return int(ConfigRecord(entries).count_bytes())


_EXAMPLES = {"num-examples": 1}
_DIGEST = len(codec.digest(b""))


def _bytes(arrays: ArrayRecord | None, entries: Mapping[str, Any]) -> int:
    """Return the size of a message to a client, or of a reply with `_EXAMPLES`."""
    reply = "num-examples" in entries
    content = RecordDict() if arrays is None else RecordDict({"arrays": arrays})
    if reply:
        content["metrics"] = MetricRecord(dict(entries))
    else:
        content["config"] = ConfigRecord({"server-round": 1, **entries})
    return records.count_bytes(content)


def _paid_after(in_rounds: tuple[int, ...], dense_round: int) -> int | None:
    for server_round, total in enumerate(accumulate(in_rounds), 1):
        if total <= server_round * dense_round:
            return server_round
    return None


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


def _size_of(count: int) -> str:
    return amount(count, "B")


def _tied(model: nn.Module) -> dict[str, str]:
    """Return name -> first name of parameters that have several."""
    first = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {n: first[id(p)] for n, p in every if first[id(p)] != n}


def _warnings(model: nn.Module, *, known: bool) -> list[str]:
    """Say what is unusual; `known`: AutoFLIP knows which parameters are trained."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    warnings = [
        f"tied: {name} is {first}; it is pruned once, and travels under both names"
        for name, first in _tied(model).items()
    ]
    if frozen:
        cure = "" if known else "; AutoFLIP takes them for trained: give it the model"
        warnings.append(
            f"frozen: {len(frozen)} tensors, {_size_of(_size(frozen))}, are not "
            f"trained; they are not pruned, and travel whole{cure}"
        )
    return warnings


def _layers(
    model: nn.Module, by_module: Mapping[str, int], rounds: Rounds
) -> Iterator[Layer]:
    tied = _tied(model)

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
