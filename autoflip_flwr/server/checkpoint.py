"""A checkpoint after every round, and runs that resume from it, for any strategy."""

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

from autoflip_flwr.errors import CheckpointError, ReplyError
from autoflip_flwr.server.replies import chain
from autoflip_flwr.server.tree import SCALARS, read, storable, write
from autoflip_flwr.server.wrapper import Wrapper

_log = logging.getLogger("flwr")

#: Checkpoints that a run keeps: the last one, and one to fall back on.
_KEPT = 2


class Part(Protocol):
    """What has a state besides the strategy, such as a meter or a log."""

    def state(self) -> dict[str, Any]:
        """Return plain values, arrays and records for a checkpoint."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""


@runtime_checkable
class _Stateful(Protocol):
    """A strategy that provides its own state."""

    def state(self, arrays: ArrayRecord) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any], arrays: ArrayRecord) -> None: ...


class Checkpointed(Strategy):
    """Any strategy of Flower's Message API, with a checkpoint after every round.

    `start` begins a run, or resumes it from the checkpoints in `directory`: weights,
    mask, guidance, server optimizer and random states. The state of a strategy is
    whatever it holds besides its configuration: arrays, records, numbers and
    collections of them. Strategies inside it are saved the same way.

    Parameters
    ----------
    strategy : Strategy
    directory : Path or str
        Folder of the checkpoints; created if missing.
    settings : mapping, optional
        What the run depends on. A checkpoint with other settings is refused. By
        default AutoFLIP's own.
    parts : mapping of name -> Part, optional
        Further objects whose state the checkpoints include.

    Examples
    --------
    ::

        strategy = Checkpointed(AutoFLIP(FedAvg()), "run")
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=100)

    Raises
    ------
    CheckpointError
        By `start`: the checkpoints belong to another run, all of them are torn, or one
        cannot be written. The last intact checkpoint always stays.
    ReplyError
        By `start`: a round lost all replies. AutoFLIP first begins it again.
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
        ours = [one for one in chain(strategy) if isinstance(one, Wrapper)]
        for one in ours:
            one.keep_guidance(self.directory / "guidance")
        if settings is None:
            settings = ours[0].settings if ours else {}
        self._settings = _plain(settings)
        self._parts = dict(parts or {})
        self._done = 0  # rounds, before this process
        self._asked = False  # whether the round has messages
        # Named as in `Result`, which gets the metrics of all rounds.
        self._metrics: dict[str, dict[int, MetricRecord]] = {
            "train_metrics_clientapp": {},
            "evaluate_metrics_clientapp": {},
            "evaluate_metrics_serverapp": {},
        }
        # Strategies from the outermost inwards -> their attributes at the start.
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
        """Run the remaining rounds; parameters and result are `Strategy.start`'s.

        A resumed run ignores `initial_arrays`: its weights are in the checkpoint.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        layout = {n: [a.dtype, list(a.shape)] for n, a in initial_arrays.items()}
        ours = [one for one in self._built if isinstance(one, Wrapper)]
        for one in ours:
            one.expect(num_rounds, timeout)
        resumed = self._resume(layout)
        arrays = initial_arrays if resumed is None else resumed
        if resumed is not None:
            _log.info(
                "going on after round %d of %d: [ROUND 1] is round %d",
                *(self._done, num_rounds, self._done + 1),
            )

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if server_round == 0 and resumed is not None:
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
        for one in ours:
            one.finish(result)
        if not len(result.arrays):
            result.arrays = arrays
        for name, metrics in self._metrics.items():
            setattr(result, name, dict(metrics))
        return result

    # The inner strategy gets the number of a round in the whole run.

    def summary(self) -> None:
        """Log the settings of the strategy."""
        self.strategy.summary()

    def configure_train(
        self, server_round: int, *args: Any, **kwargs: Any
    ) -> Iterable[Message]:
        """Let the strategy configure the round."""
        number = self._done + server_round
        messages = list(self.strategy.configure_train(number, *args, **kwargs))
        self._asked = bool(messages)
        return messages

    def configure_evaluate(
        self, server_round: int, *args: Any, **kwargs: Any
    ) -> Iterable[Message]:
        """Let the strategy configure the evaluation."""
        number = self._done + server_round
        return self.strategy.configure_evaluate(number, *args, **kwargs)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the strategy aggregate."""
        current = self._done + server_round
        replies = list(replies)
        lost = self._asked and not any(reply.has_content() for reply in replies)
        if lost and not isinstance(self.strategy, Wrapper):  # which begins again
            raise ReplyError(
                f"round {current} lost all replies; start the run again, and it goes "
                "on after the round before"
            )
        arrays, metrics = self.strategy.aggregate_train(current, replies)
        self._note("train_metrics_clientapp", current, metrics)
        return arrays, metrics

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Let the strategy aggregate the evaluation."""
        current = self._done + server_round
        metrics = self.strategy.aggregate_evaluate(current, replies)
        self._note("evaluate_metrics_clientapp", current, metrics)
        return metrics

    def _note(self, name: str, server_round: int, metrics: MetricRecord | None) -> None:
        if metrics is not None:
            self._metrics[name][server_round] = metrics

    # --- the checkpoints ---------------------------------------------------------

    def _save(
        self, server_round: int, arrays: ArrayRecord, layout: dict[str, Any]
    ) -> None:
        write(
            self.directory / f"round-{server_round:06d}.safetensors",
            {
                "round": server_round,
                "settings": self._settings,
                "layout": layout,
                "arrays": arrays,
                "strategies": [self._state_of(one, arrays) for one in self._built],
                "parts": {name: part.state() for name, part in self._parts.items()},
                "metrics": self._metrics,
                "random": _random_states(),
            },
        )
        for path in self._newest_first()[_KEPT:]:
            path.unlink()

    def _state_of(self, strategy: Strategy, arrays: ArrayRecord) -> dict[str, Any]:
        """Return what a strategy holds besides its configuration."""
        name = type(strategy).__name__
        if isinstance(strategy, _Stateful):
            return {"name": name, "state": strategy.state(arrays)}
        built, state = self._built[strategy], {}
        for key, value in vars(strategy).items():
            if isinstance(value, Strategy) or callable(value):
                continue
            stored = dict(value) if isinstance(value, dict) else value
            if not storable(stored):
                if f"{name}.{key}" not in self._unsaved:
                    _log.warning(
                        "checkpoints leave out %s.%s, a %s; if the strategy needs it "
                        "to go on, give it the methods state and restore, as AutoFLIP "
                        "has them",
                        *(name, key, type(value).__name__),
                    )
                self._unsaved.add(f"{name}.{key}")
            elif not (
                isinstance(value, SCALARS) and key in built and value == built[key]
            ):
                state[key] = stored
        return {"name": name, "state": state}

    def _restore(self, saved: dict[str, Any]) -> ArrayRecord:
        """Go on from the contents of a checkpoint; return the global model."""
        arrays: ArrayRecord = saved["arrays"]
        for strategy, own in zip(self._built, saved["strategies"], strict=True):
            if isinstance(strategy, _Stateful):
                strategy.restore(own["state"], arrays)
            else:
                for key, value in own["state"].items():
                    _put(vars(strategy), key, value)
        for name, part in self._parts.items():
            part.restore(saved["parts"][name])
        _set_random_states(saved["random"])
        self._metrics = saved["metrics"]
        self._done = saved["round"]
        return arrays

    def _resume(self, layout: dict[str, Any]) -> ArrayRecord | None:
        """Go on from the last intact checkpoint; None if there is no checkpoint."""
        torn: list[str] = []
        for path in self._newest_first():
            try:
                saved = read(path)
            except CheckpointError as error:
                torn.append(str(error))
            else:
                self._check(path, saved, layout)
                try:
                    return self._restore(saved)
                except CheckpointError as error:  # its local guidance is missing
                    torn.append(f"{path}: {error}")
                    self._undo()
            _log.error("%s; trying the checkpoint before it", torn[-1])
        if torn:
            raise CheckpointError(
                "no whole checkpoint is left; begin the run again in another folder: "
                + "; ".join(torn)
            )
        return None

    def _undo(self) -> None:
        """Take back what `_restore` has set: checkpoints lack numbers as configured."""
        for strategy, built in self._built.items():
            if not isinstance(strategy, _Stateful):
                vars(strategy).update(built)

    def _check(self, path: Path, saved: dict[str, Any], layout: dict[str, Any]) -> None:
        """Refuse a checkpoint of another run."""
        names = {"strategies": [type(strategy).__name__ for strategy in self._built]}
        saved_names = {"strategies": [one["name"] for one in saved["strategies"]]}
        # The first checkpoints of a strategy without our app had none.
        settings = saved["settings"] or self._settings
        for what, there, here in (
            ("other settings", settings, self._settings),
            ("other strategies", saved_names, names),
            ("another model", saved["layout"], layout),
        ):
            differences = [
                f"{key}: {_shown(there, key)} there, {_shown(here, key)} here"
                for key in {**here, **there}
                if there.get(key) != here.get(key)
            ]
            if differences:
                raise CheckpointError(
                    f"{path} was written with {what} ({'; '.join(differences[:9])}); "
                    "use those, or name another folder"
                )

    def _newest_first(self) -> list[Path]:
        return sorted(self.directory.glob("round-*.safetensors"), reverse=True)


def _put(attributes: dict[str, Any], key: str, value: Any) -> None:
    """Set an attribute; a Counter, say, or a defaultdict stays what it is."""
    own = attributes.get(key)
    if isinstance(own, dict) and type(own) is not dict and isinstance(value, dict):
        own.clear()
        own.update(value)
    else:
        attributes[key] = value


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "nothing"


def _plain(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted keys, with the types JSON gives back."""
    plain: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            plain.update(_plain(value, f"{prefix}{key}."))
        else:
            plain[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return plain


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
