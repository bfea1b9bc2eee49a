"""A checkpoint after every round, and runs that go on from it, for any strategy."""

import json
import logging
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from autoflip_flwr.errors import CheckpointError
from autoflip_flwr.server.replies import chain
from autoflip_flwr.server.tree import SCALARS, read, storable, write

_log = logging.getLogger("flwr")

#: How many checkpoints a run keeps: the last one, and one to fall back on.
_KEPT = 2


class Part(Protocol):
    """What has a state of its own besides the strategy: a meter, a log."""

    def state(self) -> dict[str, Any]:
        """Return what goes into a checkpoint: plain values, arrays, records."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""


@runtime_checkable
class _Stateful(Protocol):
    """A strategy that says what it has to know to go on."""

    def state(self, arrays: ArrayRecord) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any], arrays: ArrayRecord) -> None: ...


class Checkpointed(Strategy):
    """Any strategy of Flower's Message API, with a checkpoint after every round.

    `start` begins a run, or goes on with the one whose checkpoints it finds: with its
    weights, mask, guidance, optimizer at the server and random states. What a strategy
    holds besides its configuration is found by itself: arrays, records, numbers and
    collections of them, down through strategies inside strategies.

    Parameters
    ----------
    strategy : Strategy
    directory : Path or str
        Where the checkpoints are; made if missing.
    settings : mapping, optional
        What the run depends on. A checkpoint of other settings is refused.
    parts : mapping of name -> Part, optional
        What else goes into the checkpoints.

    Examples
    --------
    ::

        strategy = Checkpointed(AutoFLIP(FedAvg(), store=Path("run/guidance")), "run")
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=100)

    Raises
    ------
    CheckpointError
        By `start`: the checkpoints are another run's, none of them is whole, or one
        cannot be written. Whatever happens, the last whole one stays.
    """

    def __init__(
        self,
        strategy: Strategy,
        directory: Path | str,
        *,
        settings: Mapping[str, Any] | None = None,
        parts: Mapping[str, Part] | None = None,
    ) -> None:
        super().__init__()
        self.strategy = strategy
        self.directory = Path(directory)
        self._settings = _plain(settings or {})
        self._parts = dict(parts or {})
        self._done = 0  # rounds, before this process
        # As `Result` has them; a process that goes on returns them whole.
        self._metrics: dict[str, dict[int, MetricRecord]] = {
            "train_metrics_clientapp": {},
            "evaluate_metrics_clientapp": {},
            "evaluate_metrics_serverapp": {},
        }
        # Strategies from the outermost in, with what they were made with.
        self._built: dict[Any, dict[str, Any]] = {
            one: dict(vars(one)) for one in chain(strategy)
        }
        self._unsaved: set[str] = set()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds that are left; parameters and result are `Strategy.start`'s.

        `initial_arrays` are those of a new run; one that goes on has its own.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        layout = _layout(initial_arrays)
        found = self._go_on(layout)
        arrays = initial_arrays if found is None else found
        if found is not None:
            _log.info(
                "going on after round %d of %d: [ROUND 1] is round %d",
                self._done,
                num_rounds,
                self._done + 1,
            )

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if server_round == 0 and found is not None:
                return None
            current = self._done + server_round
            metrics = evaluate_fn(current, arrays) if evaluate_fn else None
            self._note("evaluate_metrics_serverapp", current, metrics)
            self._save(current, arrays, layout)
            return metrics

        left = max(0, num_rounds - self._done)
        result = super().start(
            grid, arrays, left, timeout, train_config, evaluate_config, evaluate
        )
        if not len(result.arrays):
            result.arrays = arrays
        for name, noted in self._metrics.items():  # of all rounds, by their numbers
            setattr(result, name, dict(noted))
        return result

    def summary(self) -> None:
        """Log the settings of the strategy."""
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy configure the round, by its number in the whole run."""
        return self.strategy.configure_train(
            self._done + server_round, arrays, config, grid
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the strategy aggregate."""
        current = self._done + server_round
        arrays, metrics = self.strategy.aggregate_train(current, replies)
        self._note("train_metrics_clientapp", current, metrics)
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy configure the evaluation."""
        return self.strategy.configure_evaluate(
            self._done + server_round, arrays, config, grid
        )

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Let the strategy aggregate the evaluation."""
        current = self._done + server_round
        metrics = self.strategy.aggregate_evaluate(current, replies)
        self._note("evaluate_metrics_clientapp", current, metrics)
        return metrics

    def _note(self, name: str, server_round: int, found: MetricRecord | None) -> None:
        if found is not None:
            self._metrics[name][server_round] = found

    # --- the checkpoints ---------------------------------------------------------

    def _save(
        self, server_round: int, arrays: ArrayRecord, layout: dict[str, Any]
    ) -> None:
        write(
            self._path(server_round),
            {
                "round": server_round,
                "settings": self._settings,
                "layout": layout,
                "arrays": arrays,
                "strategies": [
                    self._state_of(strategy, arrays) for strategy in self._built
                ],
                "parts": {name: part.state() for name, part in self._parts.items()},
                "metrics": self._metrics,
                "random": _random_states(),
            },
        )
        for path in self._paths()[_KEPT:]:
            path.unlink()

    def _state_of(self, strategy: Strategy, arrays: ArrayRecord) -> dict[str, Any]:
        """Return what a strategy holds besides what it was made with."""
        name = type(strategy).__name__
        if isinstance(strategy, _Stateful):
            return {"name": name, "state": strategy.state(arrays)}
        state = {}
        for key, value in vars(strategy).items():
            if isinstance(value, Strategy) or callable(value):
                continue
            if not storable(value):
                if f"{name}.{key}" not in self._unsaved:
                    _log.warning(
                        "checkpoints leave out %s.%s, a %s; a strategy that needs it "
                        "to go on can have methods state and restore as AutoFLIP has",
                        name,
                        key,
                        type(value).__name__,
                    )
                self._unsaved.add(f"{name}.{key}")
            elif (
                not isinstance(value, SCALARS)
                or key not in self._built[strategy]
                or value != self._built[strategy][key]
            ):
                state[key] = value
        return {"name": name, "state": state}

    def _restore(self, found: dict[str, Any]) -> ArrayRecord:
        """Go on where a checkpoint was written; return the global model."""
        arrays: ArrayRecord = found["arrays"]
        for strategy, saved in zip(self._built, found["strategies"], strict=True):
            if isinstance(strategy, _Stateful):
                strategy.restore(saved["state"], arrays)
            else:
                vars(strategy).update(saved["state"])
        for name, part in self._parts.items():
            part.restore(found["parts"][name])
        _set_random_states(found["random"])
        self._metrics = found["metrics"]
        self._done = found["round"]
        return arrays

    def _go_on(self, layout: dict[str, Any]) -> ArrayRecord | None:
        """Go on with the last checkpoint that is whole; None: there is none at all."""
        torn: list[str] = []
        for path in self._paths():
            try:
                found = read(path)
            except CheckpointError as error:
                torn.append(str(error))
            else:
                self._check(path, found, layout)
                try:
                    return self._restore(found)
                except CheckpointError as error:  # guidance that it stands on
                    torn.append(f"{path}: {error}")
            _log.error("%s; the checkpoint before it is taken", torn[-1])
        if torn:
            raise CheckpointError(
                "no whole checkpoint is left; begin the run anew in another folder: "
                + "; ".join(torn)
            )
        return None

    def _check(self, path: Path, found: dict[str, Any], layout: dict[str, Any]) -> None:
        """Refuse a checkpoint of another run."""
        remedy = "go on with the settings it was made with, or name another folder"
        settings = found["settings"]
        other = [
            f"{key}: {settings.get(key, 'nothing')!r} there, "
            f"{self._settings.get(key, 'nothing')!r} here"
            for key in sorted({*settings, *self._settings})
            if settings.get(key) != self._settings.get(key)
        ]
        if other:
            raise CheckpointError(
                f"{path} is of other settings ({'; '.join(other)}); {remedy}"
            )
        names = [type(strategy).__name__ for strategy in self._built]
        saved = [state["name"] for state in found["strategies"]]
        if names != saved:
            raise CheckpointError(
                f"{path} is of other strategies: {saved} there, {names} here; {remedy}"
            )
        if found["layout"] != layout:
            differ = [
                f"{name}: {found['layout'].get(name, 'nothing')} there, "
                f"{layout.get(name, 'nothing')} here"
                for name in [*layout, *(set(found["layout"]) - set(layout))]
                if found["layout"].get(name) != layout.get(name)
            ]
            raise CheckpointError(
                f"{path} is of another model ({'; '.join(differ[:5])}); {remedy}"
            )

    def _path(self, server_round: int) -> Path:
        return self.directory / f"round-{server_round:06d}.safetensors"

    def _paths(self) -> list[Path]:
        """Return the checkpoints, the newest first."""
        return sorted(self.directory.glob("round-*.safetensors"), reverse=True)


def _layout(arrays: ArrayRecord) -> dict[str, Any]:
    """Return name -> type and shape of a model's arrays."""
    return {n: [array.dtype, list(array.shape)] for n, array in arrays.items()}


def _plain(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted keys, as JSON brings them back."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found.update(_plain(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return found


def _random_states() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    return {
        "python": [version, np.array(words, np.uint64), gauss],
        "numpy": list(np.random.get_state()),  # noqa: NPY002 - DP strategies draw there
        "torch": torch.get_rng_state().numpy(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
    torch.set_rng_state(torch.from_numpy(states["torch"]))
