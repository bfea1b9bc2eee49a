"""AutoFLIP's defaults beside baselines, over networks, optimizers, splits and data.

    python benchmarks/proving_ground.py run --data-dir PATH --output runs/ground
    python benchmarks/proving_ground.py table --output runs/ground

`run` does all cells on all cores and goes on where it stopped: a line of results.jsonl
is one run. Every run is the real strategy and the real mod in one process, with the
bytes of the records that a network would carry. docs/proving-ground.md says which cells
are for choosing defaults and which only confirm.

In each cell the learning rate of an arm is the best of a small grid, judged by the
first seed on validation samples: neither a client's nor of the reported test set.
"""

import argparse
import functools
import itertools
import json
import logging
import multiprocessing
import random
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from networks import build
from rich.progress import Progress
from samples import CLIENTS, load
from torch import nn
from torch.nn import functional

from autoflip_flwr import (
    L1,
    L2,
    SSFL,
    AutoFLIP,
    AutoFlipMod,
    BatchNormScale,
    ExplorationSettings,
    FedDST,
    FedRTS,
    FedTiny,
    Magnitude,
    PruneFL,
    Pruner,
    PruningSettings,
    Random,
    Similarity,
)
from autoflip_flwr.app.training import scales
from autoflip_flwr.types import Masks
from autoflip_flwr.units import operations_left
from autoflip_flwr.wire import records
from autoflip_flwr.wire.flower import become_task, set_message_id

SAMPLED, BATCH = 0.5, 32


@dataclass(frozen=True)
class Cell:
    """A task of the kind that a user has."""

    network: str
    optimizer: str
    split: str
    data: str
    role: str  # on `tune` defaults may be chosen; on `confirm` and `others` not
    rounds: int = 20

    @property
    def name(self) -> str:
        """Say all of it."""
        return f"{self.network}/{self.optimizer}/{self.split}/{self.data}"


CELLS = [
    Cell("cnn", "momentum", "two-classes", "mnist", "tune"),
    Cell("cnn", "adam", "iid", "mnist", "tune"),
    Cell("cnn", "adam", "iid", "mnist-turned", "tune"),
    Cell("resnet-gn", "momentum", "iid", "mnist", "tune"),
    Cell("resnet-gn", "adam", "dirichlet", "cifar10", "tune"),
    Cell("transformer", "adam", "iid", "mnist", "tune"),
    Cell("mlp", "adamw", "two-classes", "mnist", "tune"),
    Cell("wide-cnn", "momentum", "dirichlet", "cifar10", "tune"),
    Cell("lstm", "adam", "natural", "shakespeare", "tune", 30),
    Cell("word-transformer", "adamw", "iid", "topics", "tune", 30),
    Cell("cnn", "sgd", "dirichlet", "digits", "confirm", 40),
    Cell("cnn-bn", "momentum", "dirichlet", "cifar10", "confirm"),
    Cell("cnn-bn", "adam", "iid", "mnist", "confirm"),
    Cell("resnet-bn", "momentum", "dirichlet", "mnist", "confirm"),
    Cell("resnet-bn", "adamw", "iid", "cifar10", "confirm"),
    Cell("mlp", "momentum", "iid", "digits", "confirm", 40),
    Cell("transformer", "adamw", "two-classes", "mnist", "confirm"),
    Cell("cnn", "adam", "natural", "femnist", "confirm"),
    Cell("wide-cnn", "adam", "two-classes", "mnist", "confirm"),
    Cell("transformer", "adam", "natural", "shakespeare", "confirm", 30),
    Cell("gru", "adam", "iid", "order", "others", 30),
    Cell("conv1d", "adam", "dirichlet", "waves", "others"),
    Cell("tabular", "adamw", "dirichlet", "table", "others", 30),
    Cell("recommender", "adam", "natural", "likes", "others", 30),
    Cell("mixer", "adam", "two-classes", "mnist", "others"),
    Cell("vit", "adamw", "iid", "mnist", "others"),
    Cell("convnext", "adamw", "iid", "mnist", "others"),
    Cell("mobile", "momentum", "iid", "cifar10", "others"),
]

RATES = {
    "sgd": (0.03, 0.1),
    "momentum": (0.01, 0.05),
    "adam": (0.0005, 0.003),
    "adamw": (0.0005, 0.003),
}

LETTERS = (0.003, 0.01)  # a net over letters learns nothing with the others


def _rates(cell: Cell) -> tuple[float, ...]:
    return LETTERS if cell.data == "shakespeare" else RATES[cell.optimizer]


def _optimizer(name: str, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    parameters = model.parameters()
    if name == "sgd":
        return torch.optim.SGD(parameters, rate)
    if name == "momentum":
        return torch.optim.SGD(parameters, rate, momentum=0.9)
    if name == "adam":
        return torch.optim.Adam(parameters, rate)
    return torch.optim.AdamW(parameters, rate, weight_decay=0.05)


# --- arms -------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a strategy may know of a run."""

    pruned: float
    seed: int
    rounds: int
    model: nn.Module
    example: torch.Tensor

    def strategy(self, *, units: bool = False, **settings: Any) -> AutoFLIP:
        """Return AutoFLIP with settings; it knows the model where units are pruned."""
        known = {"model": self.model, "example_inputs": self.example} if units else {}
        return AutoFLIP(
            _inner(), threshold=self.pruned, seed=self.seed, **known, **settings
        )


Make = Callable[[Task], Any]
WARM = ExplorationSettings(warm_start=True)


def _baseline(
    pruner: Callable[[Task], Pruner], *, warm: bool = False, units: bool = False
) -> Make:
    exploration = WARM if warm else ExplorationSettings()
    return lambda task: task.strategy(
        units=units, pruner=pruner(task), exploration=exploration
    )


def _inner() -> FedAvg:
    return FedAvg(fraction_train=SAMPLED, fraction_evaluate=0.0)


def _as_l1(task: Task, **pruning: Any) -> AutoFLIP:
    """Return AutoFLIP with the operations that `l1` needs, whatever the weights."""
    like = task.strategy(units=True, pruner=L1(dense_rounds=0))
    like.rounds.adopt({n: v.numpy() for n, v in task.model.state_dict().items()})
    share = operations_left(task.model, like.rounds.begin(1, []).masks, task.example)
    settings = PruningSettings(operations=share, **pruning)
    return task.strategy(units=True, pruning=settings)


class Gradual(Pruner):
    """Gradual magnitude pruning (Zhu and Gupta, arXiv:1710.01878), layers as LAMP.

    It has AutoFLIP's schedule, and with a warm start its exploration: what is left of
    AutoFLIP without guidance.
    """

    def masks(self, sampled: Any, weights: Any, server_round: int) -> Any:
        """Judge the weights anew while the density falls."""
        del sampled
        sizes = {name: np.abs(value) for name, value in weights.items()}
        threshold = self.threshold_of(server_round)
        return self.cut(sizes, threshold=threshold, balance="lamp")


def _exchanging(kind: type[FedRTS | FedTiny]) -> Callable[[Task], Pruner]:
    """Adjust in the first 0.6 of the rounds, as the authors' code does."""
    return lambda task: kind(every=task.rounds // 20, until=round(0.6 * task.rounds))


#: Name -> task -> strategy. A warm baseline has the same exploration as AutoFLIP and
#: begins where the explorers on average ended.
ARMS: dict[str, Make] = {
    "dense": lambda _: _inner(),
    "dense-warm": lambda task: AutoFLIP(
        _inner(), threshold=0.0, exploration=WARM, seed=task.seed
    ),
    "autoflip": Task.strategy,
    "autoflip-ops": _as_l1,  # the last network; below, all of the training
    "autoflip-ops-fixed": lambda task: _as_l1(task, gradual_rounds=0),
}
_PRUNERS: dict[str, Callable[[Task], Pruner]] = {
    "gradual": lambda _: Gradual(),
    "random": lambda _: Random(),
    "random-reselect": lambda _: Random(reselect=True),
    "ssfl": lambda _: SSFL(),
    "prunefl": lambda _: PruneFL(every=5),
    "feddst": lambda _: FedDST(every=5, until=10),
    "feddst-authors": lambda _: FedDST(every=15, replaced=0.01),
    "fedrts": _exchanging(FedRTS),
    "fedtiny": _exchanging(FedTiny),
}
for _name, _pruner in _PRUNERS.items():
    ARMS[_name] = _baseline(_pruner)
    ARMS[f"{_name}-warm"] = _baseline(_pruner, warm=True)
_JUDGES = {
    "magnitude": Magnitude,
    "l1": L1,
    "l2": L2,
    "similarity": Similarity,
    "bn": BatchNormScale,
}
for (_name, _kind), _again, _warm in itertools.product(
    _JUDGES.items(), (False, True), (False, True)
):
    _dense = 0 if _warm else 2
    _made = functools.partial(_kind, dense_rounds=_dense, reselect=_again)
    ARMS[_name + "-reselect" * _again + "-warm" * _warm] = _baseline(
        lambda _, made=_made: made(), warm=_warm, units=_name != "magnitude"
    )
#: What network slimming adds to the loss (arXiv:1708.06519): its 1e-4, and more.
#: Channels are judged after a half of the rounds, when it has told them apart.
PENALTIES = {"bn-slimming": 1e-4, "bn-slimming-10": 1e-3, "bn-slimming-100": 1e-2}
for _name in PENALTIES:
    ARMS[_name] = _baseline(
        lambda task: BatchNormScale(dense_rounds=task.rounds // 2), units=True
    )


# --- one run ----------------------------------------------------------------------


class InProcess(Grid):
    """Calls the ClientApp for every message, and counts the bytes of the records."""

    def __init__(self, app: Callable[..., Message], seed: int) -> None:
        self.app, self.seed, self.sent, self.listings = app, seed, 0, 0
        self.replies: dict[str, Message] = {}
        self.contexts = {
            100 + i: Context(1, 100 + i, {"client": i}, RecordDict(), {})
            for i in range(CLIENTS)
        }

    def get_node_ids(self) -> list[int]:
        """Return the nodes, and seed the sampling."""
        self.listings += 1
        random.seed(f"{self.seed}/{self.listings}")
        return list(self.contexts)

    def push_messages(self, messages: Any) -> list[str]:
        """Let every node answer at once."""
        ids = []
        for message in messages:
            set_message_id(message, str(uuid.uuid4()))
            node_id = message.metadata.dst_node_id
            self.sent += records.count_bytes(message.content)
            content = RecordDict(dict(message.content))
            copied = Message(content, node_id, message.metadata.message_type)
            set_message_id(copied, message.metadata.message_id)
            reply = self.app(copied, self.contexts[node_id])
            self.sent += records.count_bytes(reply.content)
            self.replies[message.metadata.message_id] = reply
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Any) -> list[Message]:
        """Return the answers."""
        return [self.replies.pop(n) for n in list(message_ids) if n in self.replies]

    def send_and_receive(
        self, messages: Any, *, timeout: float | None = None
    ) -> list[Message]:
        """Send and pull."""
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def create_message(self, content, message_type, dst_node_id, *_, **__):  # type: ignore[no-untyped-def]
        """Create a message to a node."""
        return Message(content, dst_node_id, message_type)

    def set_run(self, run: Any) -> None:
        """There is no run."""

    @property
    def run(self) -> Any:
        """There is no run."""


class Operations:
    """Counts the multiply-accumulates of a run's training, dense FedAvg's being 1."""

    def __init__(self, task: Task) -> None:
        self.task, self.spent, self.dense = task, 0.0, 0.0
        self._masks: Masks = {}
        self.left = 1.0  # the share that the network of the last mask needs

    def count(self, samples: int, masks: Masks | None) -> None:
        """Count a pass over samples; without masks of the whole model, for pruning."""
        if masks is None:
            self.spent += samples
            return
        if masks is not self._masks:
            self.left = operations_left(self.task.model, masks, self.task.example)
            self._masks = masks
        self.spent += self.left * samples
        self.dense += samples


def _app(
    cell: Cell,
    parts: list[Any],
    model: nn.Module,
    rate: float,
    seed: int,
    penalty: float = 0.0,
) -> ClientApp:
    app = ClientApp(mods=[AutoFlipMod()])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        (record,) = message.content.array_records.values()
        (config,) = message.content.config_records.values()
        model.load_state_dict(record.to_torch_state_dict())
        client = int(context.node_config["client"])
        own = parts[client]
        epoch = int(config.get("autoflip.epoch", -1)) + 1
        words = [seed, int(config["server-round"]), epoch, client]
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence(words).generate_state(1)[0])
        )
        optimizer = _optimizer(cell.optimizer, model, rate)
        model.train()
        total = 0.0
        for rows in torch.randperm(len(own), generator=generator).split(BATCH):
            if len(rows) == 1 and len(own) > 1:
                continue  # BatchNorm cannot train on one sample
            optimizer.zero_grad()
            x, y = torch.from_numpy(own.x[rows]), torch.from_numpy(own.y[rows])
            loss = functional.cross_entropy(model(x), y)
            if penalty:
                loss = loss + penalty * scales(model)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        metrics = {"num-examples": len(own), "train-loss": total / len(own)}
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord(metrics),
        }
        return Message(RecordDict(content), reply_to=message)

    return app


def _accuracy(model: nn.Module, x: Any, y: Any) -> float:
    model.eval()
    with torch.inference_mode():
        hits = [
            (
                model(torch.from_numpy(x[i : i + 250])).argmax(1).numpy()
                == y[i : i + 250]
            )
            for i in range(0, len(y), 250)
        ]
    return float(np.concatenate(hits).mean())


@dataclass(frozen=True)
class Job:
    """One run."""

    cell: str
    arm: str
    pruned: float
    seed: int
    rate: float


def one(job: Job, folder: str) -> dict[str, Any]:
    """Make one run; accuracies are means over its last three rounds."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    become_task()
    cell = next(cell for cell in CELLS if cell.name == job.cell)
    shape, classes, parts, validation, test = load(
        cell.data, cell.split, folder, job.seed
    )
    model = build(cell.network, shape, classes, job.seed)
    initial = ArrayRecord(model.state_dict())
    example = torch.from_numpy(parts[0].x[:1])
    task = Task(job.pruned, job.seed, cell.rounds, model, example)
    strategy, operations = ARMS[job.arm](task), Operations(task)
    penalty = PENALTIES.get(job.arm, 0.0)
    app = _app(cell, parts, model, job.rate, job.seed, penalty)

    def counted(message: Message, context: Context) -> Message:
        (config,) = message.content.config_records.values()
        explores = records.phase_of(config) == "explore"
        plan = strategy.rounds.plan if isinstance(strategy, AutoFLIP) else None
        samples = len(parts[int(context.node_config["client"])])
        operations.count(samples, None if explores else plan.masks if plan else {})
        return app(message, context)

    grid = InProcess(counted, job.seed)
    seen: list[tuple[float, float]] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> None:
        if server_round > cell.rounds - 3:
            model.load_state_dict(arrays.to_torch_state_dict())
            seen.append((_accuracy(model, *validation), _accuracy(model, *test)))

    began = time.monotonic()
    failure = ""
    try:
        strategy.start(
            grid,
            initial,
            num_rounds=cell.rounds,
            train_config=ConfigRecord({}),
            evaluate_fn=evaluate,
        )
    except Exception as error:  # a run that cannot be made is a result, too
        failure = f"{type(error).__name__}: {error}"
    plan = strategy.rounds.plan if isinstance(strategy, AutoFLIP) else None
    masks = plan.masks if plan else {}
    least = {n: float(k.mean()) for n, k in masks.items() if k.ndim > 1}
    chance = [(0.0, 0.0)]
    return {
        **asdict(job),
        "role": cell.role,
        "validation": statistics.mean(v for v, _ in seen or chance),
        "test": statistics.mean(t for _, t in seen or chance),
        "bytes": grid.sent,
        "operations": operations.left,
        "trained": operations.spent / max(1, operations.dense),
        "least_layer": min(least, key=least.__getitem__) if least else "",
        "least_density": min(least.values(), default=1.0),
        "seconds": time.monotonic() - began,
        "failure": failure,
    }


# --- all of them ------------------------------------------------------------------


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row[k] for k in asdict(Job("", "", 0, 0, 0))])


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _run(jobs: list[Job], path: Path, folder: str, workers: int) -> None:
    done = {_key(row) for row in _read(path)}
    left = [job for job in jobs if _key(asdict(job)) not in done]
    work = functools.partial(one, folder=folder)
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as pool, path.open("a") as file, Progress() as bar:
        task = bar.add_task("runs", total=len(left))
        for row in pool.imap_unordered(work, left):
            file.write(json.dumps(row) + "\n")
            file.flush()
            bar.advance(task)


def _best_rates(
    rows: list[dict[str, Any]], seed: int
) -> dict[tuple[str, str, float], float]:
    """Return cell, arm and share -> the rate with the best validation accuracy."""
    best: dict[tuple[str, str, float], dict[str, Any]] = {}
    for row in rows:
        key = row["cell"], row["arm"], row["pruned"]
        worst = {"validation": -1}
        if (
            row["seed"] == seed
            and row["validation"] > best.get(key, worst)["validation"]
        ):
            best[key] = row
    return {key: row["rate"] for key, row in best.items()}


def run(arguments: argparse.Namespace) -> None:
    """Choose the learning rates, then run all seeds."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "results.jsonl"
    cells = [c for c in CELLS if arguments.role in ("all", c.role)]
    cells = [c for c in cells if not arguments.cells or c.name in arguments.cells]
    arms = arguments.arms or list(ARMS)
    wanted = [
        (cell, arm, pruned if not arm.startswith("dense") else 0.0)
        for cell, arm, pruned in itertools.product(cells, arms, arguments.pruned)
    ]
    wanted = list(dict.fromkeys(wanted))
    first = arguments.seeds[0]
    _run(
        [
            Job(cell.name, arm, pruned, first, rate)
            for cell, arm, pruned in wanted
            for rate in _rates(cell)
        ],
        path,
        arguments.data_dir,
        arguments.workers,
    )
    rates = _best_rates(_read(path), first)
    _run(
        [
            Job(cell.name, arm, pruned, seed, rates[cell.name, arm, pruned])
            for seed in arguments.seeds
            for cell, arm, pruned in wanted
        ],
        path,
        arguments.data_dir,
        arguments.workers,
    )


def _cells(
    rows: list[dict[str, Any]], pruned: float, seeds: list[int]
) -> Iterator[tuple[str, str, dict[str, dict[int, Any]]]]:
    """Yield role, cell and arm -> runs by seed, at the chosen rates."""
    rates = _best_rates(rows, seeds[0])
    for cell in CELLS:
        own: dict[str, dict[int, Any]] = {}
        for row in rows:
            key = row["cell"], row["arm"], row["pruned"]
            right = row["seed"] in seeds and row["pruned"] in (pruned, 0.0)
            if row["cell"] == cell.name and right and row["rate"] == rates.get(key):
                own.setdefault(row["arm"], {})[row["seed"]] = row
        if own:
            yield cell.role, cell.name, own


def _of_dense(runs: dict[int, Any]) -> str:
    """Say what an arm's last network and its training need of dense operations."""
    if not all("trained" in row for row in runs.values()):
        return ""  # of an earlier version
    each = [
        statistics.mean(row[key] for row in runs.values())
        for key in ("operations", "trained")
    ]
    return f" ({each[0]:.2f}, trained {each[1]:.2f})"


def table(arguments: argparse.Namespace) -> None:
    """Print each cell's accuracies, AutoFLIP's regret, and its mean rank.

    In brackets: the share of the dense multiply-accumulates that the last network
    needs, and that of all training, exploration included.
    """
    rows = _read(arguments.output / "results.jsonl")
    for pruned in arguments.pruned:
        regrets: dict[str, list[float]] = {}
        ranks: dict[str, list[int]] = {}
        for role, name, runs in _cells(rows, pruned, arguments.seeds):
            if arguments.arms:
                runs = {arm: v for arm, v in runs.items() if arm in arguments.arms}
            own = {a: {s: r["test"] for s, r in v.items()} for a, v in runs.items()}
            means = {arm: statistics.mean(v.values()) for arm, v in own.items()}
            others = ("dense", "autoflip")  # ours in other ways is no baseline
            baselines = {
                arm: mean
                for arm, mean in means.items()
                if arm == arguments.ours or not arm.startswith(others)
            }
            best = max((a for a in baselines if a != arguments.ours), key=baselines.get)
            ours = own[arguments.ours]
            pairs = [own[best][s] - ours[s] for s in ours if s in own[best]]
            error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else 0
            regret = statistics.mean(pairs)
            order = sorted(baselines, key=baselines.get, reverse=True)
            regrets.setdefault(role, []).append(regret)
            ranks.setdefault(role, []).append(1 + order.index(arguments.ours))
            shown = ", ".join(
                f"{a} {m:.3f}{_of_dense(runs[a])}" for a, m in sorted(means.items())
            )
            print(
                f"{pruned:.0%} {role:8} {name:38} ours {means[arguments.ours]:.3f} "
                f"best {best} regret {100 * regret:+.1f} +- {100 * error:.1f} | {shown}"
            )
        for role, own in regrets.items():
            print(
                f"{pruned:.0%} {role}: mean regret {100 * statistics.mean(own):+.2f} "
                f"worst {100 * max(own):+.2f} points, mean rank "
                f"{statistics.mean(ranks[role]):.2f}, {len(own)} cells"
            )


def main() -> None:
    """Run, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--output", type=Path, default=Path("runs/ground"))
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--pruned", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--role", choices=["all", "tune", "confirm", "others"], default="all"
    )
    parser.add_argument("--cells", nargs="+", help="names; default all of the role")
    parser.add_argument("--arms", nargs="+", help=f"of {list(ARMS)}")
    parser.add_argument("--ours", default="autoflip", help="the arm that is judged")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    chosen = parser.parse_args()
    {"run": run, "table": table}[chosen.command](chosen)


if __name__ == "__main__":
    main()
