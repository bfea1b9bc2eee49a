"""What a run leaves behind: settings, a line a round, a summary, model and mask."""

import fcntl
import json
import logging
import math
import os
import shutil
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors.numpy import save_file

from autoflip_flwr.app.build import guidance_privacy
from autoflip_flwr.app.costs import Operations
from autoflip_flwr.app.folder import check_usable, is_finished
from autoflip_flwr.app.grid import RunGrid
from autoflip_flwr.app.training import Evaluation
from autoflip_flwr.errors import SettingsError, needs_extra
from autoflip_flwr.pruners.store import write
from autoflip_flwr.server.diagnostics import Diagnostics
from autoflip_flwr.server.rounds import Rounds
from autoflip_flwr.server.savings import Savings, megabytes
from autoflip_flwr.settings import Settings
from autoflip_flwr.types import Masks, Params

_log = logging.getLogger("flwr")

#: The delta of every epsilon.
DELTA = 1e-5

#: A step that takes a larger share of a dense one does not count as faster.
_FASTER = 0.95


class RunLog:
    """Writes a run's folder; one that holds another run is an error.

    The grid counts bytes and seconds. `rounds` are those of a pruning strategy, None
    for a dense one. With `resume` the folder may hold a run that is not finished.
    """

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        grid: RunGrid,
        rounds: Rounds | None,
        operations: Operations,
        *,
        resume: bool = False,
    ) -> None:
        if settings.log.tensorboard:  # asked for in vain, nothing is written
            with needs_extra("tensorboard", "log.tensorboard"):
                from torch.utils.tensorboard import SummaryWriter
        self.directory = directory
        self._metrics = directory / "metrics.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        if is_finished(directory):  # and was killed before it had cleared up
            shutil.rmtree(directory / "guidance", ignore_errors=True)
        check_usable(directory, resume=resume)
        self._let_go = weakref.finalize(self, os.close, _held(directory))
        (directory / "settings.yaml").touch()
        self._settings = settings
        self._grid = grid
        self._rounds = rounds
        self._operations = operations
        self._private = guidance_privacy(settings)
        self._board: Any = None
        if settings.log.tensorboard:
            self._board = SummaryWriter(str(directory))
        self._started = self._last = time.monotonic()
        # When this process began, with which seconds of exploration, after which round.
        self._begun = (self._started, grid.seconds["explore"], 0)
        self._starting = True
        # After the last line: how many there are, it itself, and the sums until then.
        self._past: dict[str, Any] = {
            "lines": 0,
            "row": {},
            "counted": {},  # bytes, by phase and direction
            "samples": {},
            "flops": 0,
        }

    def begin(self) -> None:
        """Note the settings of a new run, over what a try without a round left."""
        (self.directory / "settings.yaml").write_text(self._settings.as_yaml())
        self._metrics.unlink(missing_ok=True)
        chosen = self._settings
        _log.info(
            f"{chosen.strategy.name}, preset {chosen.preset}, {chosen.rounds} rounds; "
            f"results go to {self.directory}"
        )

    def state(self) -> dict[str, Any]:
        """Return what a process that goes on has to know."""
        return {**self._past, "seconds": time.monotonic() - self._started}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after the round of `state`; later lines are dropped."""
        self._past = {key: state[key] for key in self._past}
        now, lines = time.monotonic(), self._past["lines"]
        self._begun = (now, self._grid.seconds["explore"], lines)
        self._started = now - state["seconds"]
        if lines:
            written = self._metrics.read_text().splitlines(keepends=True)
            write(self._metrics, "".join(written[:lines]).encode())
        else:
            self._metrics.unlink(missing_ok=True)

    @property
    def masks(self) -> Masks:
        """The masks of the last round; none of a dense strategy."""
        return self._rounds.plan.masks if self._rounds and self._rounds.plan else {}

    def round(self, server_round: int, evaluation: Evaluation) -> None:
        """Append a line to ``metrics.jsonl``."""
        now, past, rounds = time.monotonic(), self._past, self._rounds
        diagnostics = rounds.diagnostics if rounds else Diagnostics(signs=False)
        counted, trained = dict(self._grid.sent), self._trained_samples()
        sent, samples = Counter(counted), Counter(trained)
        sent.subtract(past["counted"])
        samples.subtract(past["samples"])
        flops = self._operations.trained(self.masks, **samples)
        row = {
            "round": server_round,
            "accuracy": evaluation.accuracy,
            "accuracy_top5": evaluation.accuracy_top5,
            "loss": evaluation.loss if math.isfinite(evaluation.loss) else None,
            "density": rounds.density if rounds else 1.0,
            "bytes_down": sent["explore", "down"] + sent["train", "down"],
            "bytes_up": sent["explore", "up"] + sent["train", "up"],
            "bytes_evaluate": sent["evaluate", "down"] + sent["evaluate", "up"],
            "mask_change": diagnostics.mask_change,
            "update_variance": diagnostics.update_variance,
            "guidance_cosine": diagnostics.guidance_cosine,
            "flops": flops,
            "dropped": len(rounds.dropped) if rounds else None,
            "missing": self._grid.missing,
            "seconds": round(now - self._last, 3),
        }
        with self._metrics.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        _log.info("%s", self._line(row, now))
        self._last = now
        self._past = {
            "lines": past["lines"] + 1,
            "row": row,
            "counted": counted,
            "samples": trained,
            "flops": past["flops"] + flops,
        }
        if self._board is not None:
            for key, value in row.items():
                if isinstance(value, int | float) and key != "round":
                    self._board.add_scalar(key, value, server_round)
            self._board.flush()

    def _line(self, row: Mapping[str, Any], now: float) -> str:
        """Return what a round tells on the terminal."""
        done, total = row["round"], self._settings.rounds
        sent = f"sent {sum(self._grid.sent.values()) / 1e6:.1f} MB"
        if self._rounds:
            dense = sum(self._grid.dense.values()) / 1e6
            sent += f" (FedAvg {dense:.1f})  density {row['density']:.2f}"
        begun, explored, before = self._begun
        seconds = now - begun - (self._grid.seconds["explore"] - explored)
        left = round(seconds / (done - before) * (total - done))
        if self._starting:  # the first round may have started Ray: count from here
            self._begun = (now, self._grid.seconds["explore"], done)
            self._starting = False
        return (
            f"{done:{len(str(total))}}/{total}  acc {row['accuracy']:.3f}  {sent}  "
            f"{left // 60}:{left % 60:02} left"
        )

    def _trained_samples(self) -> dict[str, float]:
        """Return samples times epochs so far, by phase."""
        counted = self._grid.samples
        epochs = self._settings.training.epochs
        return {"explore": counted["explore"], "train": epochs * counted["train"]}

    def _privacy(self) -> dict[str, float]:
        """Return what all explorations of a client together tell about its data."""
        assert self._private is not None
        most = max(self._grid.explored.values(), default=0)
        return {
            "delta": DELTA,
            "epsilon": self._private.epsilon(DELTA),  # of one exploration
            "explorations": most,  # of the client that was asked most often
            "epsilon_total": self._private.epsilon(DELTA, releases=max(1, most)),
        }

    def finish(self, arrays: Params, costs: Mapping[str, Any]) -> dict[str, Any]:
        """Write summary, model and mask; return the summary.

        `costs` is what `costs.summary` returns.
        """
        sent, grid, rounds = self._grid.sent, self._grid, self._rounds
        row = self._past["row"]
        phases = ("explore", "train", "evaluate")
        parameters = costs["networks"]["dense"]["parameters"]
        summary = {
            "strategy": self._settings.strategy.name,
            "preset": self._settings.preset,
            "rounds": self._settings.rounds,
            **{key: row.get(key) for key in ("accuracy", "accuracy_top5", "loss")},
            "parameters": parameters,
            "kept_parameters": parameters - (rounds.pruned if rounds else 0),
            "density": rounds.density if rounds else 1.0,
            "bytes": {
                **{f"{p}_{d}": sent[p, d] for p in phases for d in ("down", "up")},
                "roll_call": sent["roll-call", "up"],
                "total": sum(sent.values()),
                "dense_equivalent": sum(grid.dense.values()),
            },
            **costs,
            "flops": {**costs["flops"], "trained": self._past["flops"]},
            "samples": self._trained_samples(),
            **({"privacy": self._privacy()} if self._private else {}),
            "seconds": {
                "explore": round(grid.seconds["explore"], 3),
                "train": round(grid.seconds["train"], 3),
                "total": round(time.monotonic() - self._started, 3),
            },
        }
        save_file(
            {name: np.ascontiguousarray(value) for name, value in arrays.items()},
            self.directory / "model.safetensors",
        )
        if masks := cast(Any, dict(self.masks)):
            np.savez_compressed(self.directory / "mask.npz", **masks)
        if self._settings.log.guidance and rounds is not None:
            guidance = cast(Any, rounds.pruner.guidance())
            if guidance:
                np.savez_compressed(self.directory / "guidance.npz", **guidance)
        # Whoever sees it may take the run for finished, so it is there whole or not.
        text = json.dumps(summary, indent=2) + "\n"
        write(self.directory / "summary.json", text.encode())
        shutil.rmtree(self.directory / "guidance", ignore_errors=True)
        (self.directory / ".lock").unlink()
        self._let_go()
        if self._board is not None:
            self._board.close()
        return summary


def _held(directory: Path) -> int:
    """Hold a run's folder until the descriptor is closed, or the process ends."""
    lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise SettingsError(
            f"another server is at work in {directory}; end it first, or name a new "
            "folder"
        ) from error
    return lock


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Flower's own lines, and those of strategy and masks, out of a run's log.

    Warnings stay. A round is a line of `RunLog`.
    """
    ours = Path(__file__).parents[1]

    def tells(record: logging.LogRecord) -> bool:
        told = ours in Path(record.pathname).parents
        told = told and record.module not in ("rounds", "strategy")
        return told or record.levelno > logging.INFO

    _log.addFilter(tells)
    try:
        yield
    finally:
        _log.removeFilter(tells)


def log_summary(summary: dict[str, Any], directory: Path) -> None:
    """Log the last lines of a run."""
    sent, flops, seconds = summary["bytes"], summary["flops"], summary["seconds"]
    dense, pruned = summary["networks"]["dense"], summary["networks"]["pruned"]
    accuracy = math.nan if summary["accuracy"] is None else summary["accuracy"]
    every = max(1, flops["dense"])
    saved = Savings(
        parameters=summary["parameters"],
        kept=summary["kept_parameters"],
        sent=sent["total"],
        explored=sent["explore_down"] + sent["explore_up"],
        dense=sent["dense_equivalent"],
    )
    rows = {
        "top-1 accuracy": f"{accuracy:.4f} on held-out data, after {summary['rounds']} "
        f"rounds of {summary['strategy']}",
        **saved.rows(),
        "clients train": f"{pruned['parameters']} of {dense['parameters']} parameters, "
        f"{megabytes(pruned['bytes'])} of {megabytes(dense['bytes'])}, "
        f"{flops['pruned'] / every:.3f} of the FLOPs (skipping every zero would be "
        f"{flops['unstructured_in_theory'] / every:.3f}, in theory)",
        "measured here": f"training step {1e3 * pruned['step_seconds']:.2f} ms, dense "
        f"{1e3 * dense['step_seconds']:.2f} ms; inference "
        f"{1e3 * pruned['inference_seconds']:.2f} ms, dense "
        f"{1e3 * dense['inference_seconds']:.2f} ms; peak memory "
        f"{megabytes(pruned['peak_bytes'])}, dense {megabytes(dense['peak_bytes'])}",
        "training took": f"{flops['trained']:.3g} multiply-accumulates, exploration "
        "included",
        "seconds": f"{seconds['total']:.1f} (exploration {seconds['explore']:.1f})",
    }
    if pruned["step_seconds"] > _FASTER * dense["step_seconds"]:
        rows["measured here"] += (
            ". At this size the step is not faster; from about a million "
            "multiply-accumulates a sample it is (docs/savings.md)"
        )
    _log.info("AutoFLIP run finished: %s", directory)
    if private := summary.get("privacy"):
        rows["privacy"] = (
            f"({private['epsilon_total']:.3g}, {private['delta']:g})-differentially "
            f"private for a client's data, in {private['explorations']} explorations"
        )
    for label, text in rows.items():
        _log.info("  %-15s %s", label, text)
