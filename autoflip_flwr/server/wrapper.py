"""AutoFLIP's constructor, for both of Flower's APIs: a strategy around another."""

import logging
import shutil
import tempfile
import weakref
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from flwr.serverapp.strategy import Result
from torch import nn
from torch.nn.parameter import is_lazy

from autoflip_flwr.errors import ModelError, SettingsError
from autoflip_flwr.method.structured import Units
from autoflip_flwr.pruners import AutoFlipPruner, Pruner
from autoflip_flwr.server.flow import Flow, S
from autoflip_flwr.server.intake import Intake
from autoflip_flwr.server.preview import Federation, Preview, preview
from autoflip_flwr.server.replies import PRIVATE, Replies, kinds_of, setting
from autoflip_flwr.server.rounds import Rounds
from autoflip_flwr.server.savings import Savings, Traffic, log_savings, savings_of
from autoflip_flwr.settings import ExplorationSettings, PruningSettings, WireSettings
from autoflip_flwr.units import ExampleInputs, trace
from autoflip_flwr.units.enforce import ties, trainable_names

_log = logging.getLogger("flwr")

#: Strategies of both APIs that do not average the replies.
_ROBUST = ("Bulyan", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum")

#: Seconds to wait for a round's replies; Flower's default.
TIMEOUT = 3600.0


class Wrapper(Flow[S]):
    """Federated pruning guided by the clients' exploration, around any strategy.

    The inner strategy samples nodes, writes its messages and aggregates dense replies
    as without AutoFLIP. AutoFLIP lets the nodes explore first, makes the mask of each
    round, and sends only the kept values (Internò et al., arXiv:2405.10271, Alg. 1).

    Parameters
    ----------
    strategy : Strategy, optional
        Any strategy of the same API; ``FedAvg()`` by default.
    threshold : float, optional
        With the default mode, the share of the parameters to prune, in [0, 1]. At 0
        nothing is pruned; without a warm start the weights are the inner strategy's,
        in `wire`'s type of values.
        Overrides the one in `pruning`; 0.8 by default.
    units : float, optional
        Share of the pruned parameters, in [0, 1], to prune as whole units (filters,
        neurons, hidden units), so that clients can train a smaller network. The rest
        are single weights. Above 0 it needs `model` and `example_inputs`. Overrides
        the one in `pruning`; 0 by default.
    model : nn.Module, optional
        Tells which parameters are trainable or tied and, with `example_inputs`, what
        the units are. The older API numbers arrays; there the model gives their names,
        too.
    example_inputs : torch.Tensor or tuple, optional
        One sample that the model runs on.
    pruner : Pruner, optional
        What makes the masks; AutoFLIP's own by default. Otherwise a baseline
        (``pruner=Magnitude()``, see `autoflip_flwr.pruners`) or your own.
    pruning : PruningSettings, optional
        How guidance becomes a mask.
    exploration : ExplorationSettings, optional
        Who explores, when, and for how long.
    wire : WireSettings, optional
        What is sent, and which replies are accepted.
    store : Path or str, optional
        A folder for the local guidance of this run alone, emptied at the start. By
        default a temporary one or, in `Checkpointed`, one beside the checkpoints.
    seed : int, optional
        Seed of all random choices: which nodes explore, random masks.

    Attributes
    ----------
    strategy : Strategy
        The inner one.
    rounds : Rounds
        The state: global arrays, current mask, diagnostics.
    savings : Savings or None
        What the run has saved so far, beside FedAvg; None before the first round.
    traffic : Traffic or None
        The bytes of all messages; None: the caller counts, and reports.

    Raises
    ------
    SettingsError
        If a value is out of range or has the wrong type.
    """

    _api: ClassVar[type[Any]]
    _default: ClassVar[type[Any]]
    _other_api: ClassVar[str]  # the remedy for a strategy of the other API
    # The inner strategy's fraction and minimum of nodes that train, and that evaluate.
    _sampling: ClassVar[tuple[tuple[str, str], tuple[str, str]]]

    def __init__(
        self,
        strategy: S | None = None,
        *,
        threshold: float | None = None,
        units: float | None = None,
        model: nn.Module | None = None,
        example_inputs: ExampleInputs | None = None,
        pruner: Pruner | None = None,
        pruning: PruningSettings | None = None,
        exploration: ExplorationSettings | None = None,
        wire: WireSettings | None = None,
        store: Path | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.strategy = cast(S, self._default() if strategy is None else strategy)
        self._check_inner(self.strategy)
        sample = "one sample that the model runs on, a tensor or tuple of arguments"
        for name, value, kind, expected in (
            ("model", model, nn.Module, "an nn.Module such as Net()"),
            ("example_inputs", example_inputs, torch.Tensor | tuple, sample),
            ("pruner", pruner, Pruner, "a Pruner such as Magnitude()"),
            ("pruning", pruning, PruningSettings, "PruningSettings(...)"),
            ("exploration", exploration, ExplorationSettings, "ExplorationSettings()"),
            ("wire", wire, WireSettings, "WireSettings(...)"),
            ("store", store, Path | str, "a Path"),
            ("seed", seed, int, "a whole number"),
        ):
            fits = isinstance(value, kind) and not isinstance(value, bool)
            if value is not None and not fits:
                raise SettingsError(f"{name}: expected {expected}, got {value!r}")
        values: dict[str, Any] = (pruning or PruningSettings()).model_dump()
        given = {"threshold": threshold, "units": units}
        values |= {key: value for key, value in given.items() if value is not None}
        if model is not None and values["prunable"] is None:
            values["prunable"] = tuple(trainable_names(model))
        pruning = PruningSettings(**values)
        exploration = exploration or ExplorationSettings()
        wire = wire or WireSettings()
        if store is not None and Path(store).is_file():
            raise SettingsError(f"store: expected a folder, {store} is a file")
        self._keeps = store is not None  # guidance, for a run that goes on
        if store is None:
            store = Path(tempfile.mkdtemp("-autoflip"))
            weakref.finalize(self, shutil.rmtree, store, ignore_errors=True)
        if model is not None:
            _check_shapes(model)
        self.model, self._example_inputs = model, example_inputs
        self.traffic = Traffic()
        self.pruner = AutoFlipPruner() if pruner is None else pruner
        self._settings = {"pruning": pruning, "exploration": exploration, "wire": wire}
        self._make_rounds = partial(
            Rounds,
            self.pruner,
            pruning,
            _with_warm_start(exploration, self.strategy, self.pruner),
            directory=Path(store),
            values=wire.values,
            units=_units_of(self.pruner, pruning, model, example_inputs),
            ties={} if model is None else ties(model),
            shapes={} if model is None else _shapes_of(model),
            seed=seed,
        )
        self._wire = wire
        self.timeout: float | None = TIMEOUT  # of a round that begins again
        self._begin()

    def keep_guidance(self, folder: Path) -> None:
        """Keep the guidance in a folder, unless `store` names one: before the start."""
        if not self._keeps:
            self._make_rounds = partial(self._make_rounds, directory=folder)
            self._begin(self.rounds.total)

    def _begin(self, total: int | None = None) -> None:
        """Begin a run, of `total` rounds, in which nobody has explored."""
        self.rounds = self._make_rounds()
        self.rounds.total = total
        self._intake = Intake(self.rounds, self._wire)
        self._replies = Replies(self.rounds, self._wire)

    def _reopen(self, total: int | None = None) -> None:
        """Begin another run if there has been one."""
        if self.rounds.adopted:
            if self.traffic is not None:
                self.traffic = Traffic()
            self._begin(total)

    def expect(self, num_rounds: int, timeout: float | None = TIMEOUT) -> Self:
        """Tell how many rounds the run has, before it starts, and how long one waits.

        On the Message API `start` does. On the older API you may, so that the density
        falls in the first rounds, not at once:
        ``strategy = AutoFLIP(strategy).expect(num_rounds)``.
        """
        self.rounds.total = num_rounds
        self.timeout = timeout
        return self

    def preview(
        self,
        model: nn.Module | None = None,
        example_inputs: ExampleInputs | None = None,
        *,
        clients: int = 10,
        rounds: int = 20,
        sampled: int | None = None,
        evaluated: int | None = None,
    ) -> Preview:
        """Tell what a run will take, without data; `print` shows it on a screen.

        Parameters
        ----------
        model, example_inputs : optional
            By default the strategy's own.
        clients, rounds : int
            Connected clients, and rounds of the run.
        sampled, evaluated : int, optional
            Clients that train and evaluate in a round. By default as many as the inner
            strategy's fractions of the clients.

        Raises
        ------
        ModelError
            If the model does not run on the inputs.
        SettingsError
            If a number is impossible, or the settings do not tell how much is pruned.
        """
        model = self.model if model is None else model
        given = self._example_inputs if example_inputs is None else example_inputs
        if model is None or given is None:
            raise SettingsError(
                "preview: expected a model and one sample that it runs on: "
                "preview(Net(), torch.zeros(1, 3, 32, 32))"
            )

        def many(fraction: str, least: str) -> int:
            share = setting(self.strategy, fraction, int | float, 1.0)
            wanted = max(int(share * clients), setting(self.strategy, least, int, 1))
            return min(clients, wanted) if share else 0

        train, evaluate = self._sampling
        return preview(
            self.rounds,
            model,
            given,
            Federation(
                clients=clients,
                sampled=many(*train) if sampled is None else sampled,
                evaluated=many(*evaluate) if evaluated is None else evaluated,
                rounds=rounds,
            ),
        )

    @property
    def savings(self) -> Savings | None:
        """What the run has saved so far; None before its first round."""
        return savings_of(self.rounds, self.traffic, self.model, self._example_inputs)

    def finish(self, result: object) -> None:
        """End a run: its result gets the attribute `savings`, the log three lines.

        Raises
        ------
        ReplyError
            If no round changed the model.
        """
        self.check_trained()
        savings = self.savings
        if savings is not None and isinstance(result, Result):
            vars(result)["savings"] = savings  # else: what a start of the user's gives
        log_savings(savings)

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The settings that the weights depend on, by group and name."""
        return {name: chosen.model_dump() for name, chosen in self._settings.items()}

    def __getattr__(self, name: str) -> Any:
        """Return the inner strategy's own attributes and methods."""
        inner = vars(self).get("strategy")
        if inner is None or name.startswith("__"):
            raise AttributeError(name)
        return getattr(inner, name)

    def __repr__(self) -> str:
        """Show the arguments that are not the defaults."""
        parts = [f"{type(self.strategy).__name__}()"]
        pruning = self.rounds.pruning
        parts.append(f"threshold={pruning.threshold:g}")
        if pruning.units:
            parts.append(f"units={pruning.units:g}")
        if self.model is not None:
            parts.append(f"model={type(self.model).__name__}()")
        if not isinstance(self.pruner, AutoFlipPruner):
            parts.append(f"pruner={type(self.pruner).__name__}()")
        for name, chosen in self._settings.items():
            own = chosen.model_dump(
                exclude_defaults=True, exclude={"threshold", "units", "prunable"}
            )
            if shown := ", ".join(f"{key}={value!r}" for key, value in own.items()):
                parts.append(f"{name}={type(chosen).__name__}({shown})")
        return f"{type(self).__name__}({', '.join(parts)})"

    def _check_inner(self, strategy: object) -> None:
        """Refuse what cannot be the inner strategy, with the remedy."""
        name = type(strategy).__name__
        if isinstance(strategy, type):
            raise SettingsError(
                f"strategy: expected a strategy, got the class {strategy.__name__}; "
                f"make one: AutoFLIP({strategy.__name__}())"
            )
        if isinstance(strategy, Wrapper):
            raise SettingsError("strategy: AutoFLIP is around one already; use it once")
        if name == "Checkpointed":
            raise SettingsError(
                "strategy: Checkpointed goes around AutoFLIP, not inside it: "
                "Checkpointed(AutoFLIP(FedAvg()), directory)"
            )
        if not isinstance(strategy, self._api):
            older = hasattr(strategy, "aggregate_fit")
            newer = hasattr(strategy, "aggregate_train")
            hint = f"; {self._other_api}" if older or newer else ""
            raise SettingsError(
                "strategy: expected a strategy such as FedAvg(), got "
                f"{strategy!r}{hint}"
            )


def _check_shapes(model: nn.Module) -> None:
    if lazy := [n for n, value in model.state_dict().items() if is_lazy(value)]:
        raise ModelError(
            f"{type(model).__name__}: expected parameters with shapes, got lazy ones "
            f"({', '.join(lazy)}); run the model once on a sample before"
        )


def _shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    arrays = {n: v for n, v in model.state_dict().items() if hasattr(v, "shape")}
    return {name: tuple(value.shape) for name, value in arrays.items()}


def _with_warm_start(
    exploration: ExplorationSettings, inner: object, pruner: Pruner
) -> ExplorationSettings:
    """Decide on a warm start; refuse one that bypasses the inner strategy's protection.

    If it is left open, an exploration for the mask gives one where nothing is bypassed.
    """
    reason = ""
    for name in sorted(kinds_of(inner)):
        if name.startswith(PRIVATE):
            reason = f"explorers' updates, without the clipping and noise of {name}"
        elif name in _ROBUST:
            reason = (
                "mean of all explorers' updates, which one of them can ruin before "
                f"{name} sees a reply"
            )
    if exploration.warm_start and reason:
        raise SettingsError(
            f"warm_start would move the model by the {reason}; use one or the other"
        )
    warm = exploration.warm_start
    if warm is None:
        warm = pruner.explores and not reason and not exploration.privacy_noise
    return exploration.model_copy(update={"warm_start": warm})


def _units_of(
    pruner: Pruner,
    pruning: PruningSettings,
    model: nn.Module | None,
    example_inputs: ExampleInputs | None,
) -> Units | None:
    """Trace the units of the model if the pruner needs them or can use them."""
    asked = "units" if pruning.units else "operations" if pruning.operations else ""
    ours = isinstance(pruner, AutoFlipPruner)
    needed = pruner.needs_units or (bool(asked) and ours)
    if not needed and not pruner.takes_units:
        return None
    if model is None or example_inputs is None:
        if not needed:
            return None
        missing = "model=Net(), " if model is None else ""
        raise SettingsError(
            f"{asked or type(pruner).__name__}: pruning whole units needs "
            f"the model and one sample that it runs on: AutoFLIP(..., {missing}"
            "example_inputs=next(iter(loader))[0][:1])"
        )
    try:
        return trace(model, example_inputs)
    except ModelError as error:
        if needed:
            raise
        _log.warning(
            "%s: all weights count as equally slow: %s", type(pruner).__name__, error
        )
        return None
