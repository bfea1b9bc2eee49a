"""Try whether a model without some units computes what the masked model does.

The dependency graph guesses at operations it does not know; this finds wrong guesses.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from autoflip_flwr.errors import ModelError
from autoflip_flwr.method.structured import Cluster, Group, Keep, Units
from autoflip_flwr.units import attention, enforce, layers, recurrent
from autoflip_flwr.units.inputs import (
    ExampleInputs,
    arguments,
    first_line,
    mapped,
    tensors_of,
)
from autoflip_flwr.units.layers import join
from autoflip_flwr.units.surgery import shrink, twin

_log = logging.getLogger("flwr")

#: Of the largest output. float32 is for models whose own code asks for it.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}

#: Random numbers that are drawn and then repeated: a prime, so that no row is another.
_DRAWN = 65_537

_SAMPLES = 3  # BatchNorm trains on more than one


def prove(model: nn.Module, example_inputs: ExampleInputs, units: Units) -> Units:
    """Leave whole the groups for which the masked and the smaller model differ.

    Both have random weights and run on random inputs like the examples, in both modes;
    a model that does not run on them is a `ModelError`.
    """
    if not units.groups:
        return units
    trial = _Trial(model, example_inputs)
    unseen = _for_readers(trial.uncalled, units.groups)
    units = units.without(unseen)
    reasons = {
        group.name: f"the graph cannot follow its channels: {reason}"
        for groups, reason in trial.failing(units, units.clusters())
        for group in groups
    }
    if reasons or unseen:
        _log.warning("left whole: %s", unseen | reasons)
    return units.without(reasons)


def _for_readers(readers: Mapping[str, int], groups: Iterable[Group]) -> dict[str, str]:
    """Return the groups that layers may read of which a trial tells nothing, and why.

    They are as wide as a reader's input, or, if none is, of a width that divides it:
    several places of each channel may be read.
    """
    widths = {group.name: group.size * group.width for group in groups}
    found: dict[str, str] = {}
    for reader, width in readers.items():
        equal = [name for name, own in widths.items() if own == width]
        parts = [name for name, own in widths.items() if width % own == 0]
        for name in equal or parts:
            found[name] = f"{reader}, which no sample reaches, may read it"
    return found


class _Trial:
    """Random weights for a model, and random inputs that it runs on.

    One copy of the model and a smaller one are held at a time: a client makes this
    trial, too.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        self._model = model
        given = arguments(example_inputs, like=model)
        self._called: set[str] = set()  # paths of modules
        for dtype, samples in itertools.product(_TOLERANCES, (_SAMPLES, 1)):
            self._dtype, self._inputs = dtype, _noise(given, dtype, samples)
            trial = _randomized(model, dtype)
            self._modes = [mode for mode in (False, True) if self._runs(trial, mode)]
            if False in self._modes:
                return
        raise ModelError(
            f"{type(model).__name__} does not run on random inputs like the example "
            f"inputs, so that its units cannot be tried: {self._reason}"
        )

    def _runs(self, trial: nn.Module, mode: bool) -> bool:
        hooks = [
            module.register_forward_pre_hook(
                lambda *_, path=path: self._called.add(path)
            )
            for path, module in trial.named_modules()
        ]
        try:
            self._outputs(trial, mode)
        except Exception as error:  # whatever the model's own code raises
            self._reason = first_line(error)
            return False
        finally:
            for hook in hooks:
                hook.remove()
        return True

    @property
    def uncalled(self) -> dict[str, int]:
        """The layers that ran in no mode, with the number of channels that they read.

        Without those of attention, whose weights functions use.
        """
        heads = attention.find(self._model).values()
        used = set().union(*(each.projections for each in heads)) | {
            join(path, inner)
            for path, module in self._model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
            for inner, _ in module.named_modules()
        }
        return {
            path: width
            for path, module in self._model.named_modules()
            if path not in self._called | used
            and (width := layers.input_channels(module))
        }

    def failing(
        self, units: Units, clusters: Sequence[Cluster]
    ) -> Iterator[tuple[list[Group], str]]:
        """Find by halves the groups that do not work, and why."""
        reason = self._difference(units, clusters)
        if reason is None:
            return
        halves: list[tuple[list[Group], str]] = []
        if len(clusters) > 1:
            middle = len(clusters) // 2
            for half in (clusters[:middle], clusters[middle:]):
                halves.extend(self.failing(units, half))
        if halves:
            yield from halves
        else:  # one cluster, or clusters that fail only together
            yield [group for groups, _ in clusters for group in groups], reason

    def _difference(self, units: Units, clusters: Sequence[Cluster]) -> str | None:
        """Return None, or how taking units out fails.

        Two fifths, then the others; and a third of other draws, as a wrong guess may
        agree on some units by chance.
        """
        rows = [
            row
            for groups, joined in clusters
            for row in joined or [np.array(group.numbers) for group in groups]
        ]
        for share, rest in itertools.product((2 / 5, 1 / 3), (False, True)):
            keep: Keep = np.ones(units.count, np.bool_)
            rng = np.random.default_rng(round(100 * share))
            for row in rows:
                order = rng.permutation(row)
                count = max(1, int(share * row.size))
                if row.size > 1:
                    keep[order[count:] if rest else order[:count]] = False
            reason = self._compared(units, keep)
            if reason is not None:
                return reason
        return None

    def _compared(self, units: Units, keep: Keep) -> str | None:
        masked = _randomized(self._model, self._dtype)
        enforce.zero(masked, units.masks(keep, units.parameters))
        small = shrink(masked, units, keep)
        for mode in self._modes:
            expected = self._outputs(masked, mode)
            try:
                got = self._outputs(small, mode)
            except Exception as error:  # whatever the model's own code raises
                return first_line(error)
            if len(got) != len(expected):
                return f"it returns {len(got)} tensors, not {len(expected)}"
            for one, other in zip(expected, got, strict=True):
                if one.shape != other.shape:
                    return f"its output has the shape {tuple(other.shape)}"
                limit = _TOLERANCES[self._dtype] * one.abs().max().clamp_min(1e-30)
                if not bool(((one - other).abs() <= limit).all()):
                    return "its output differs"
        return None

    def _outputs(self, model: nn.Module, mode: bool) -> list[torch.Tensor]:
        devices = {x.device for x in tensors_of(self._inputs) if x.is_cuda}
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            torch.manual_seed(0)
            outputs = tensors_of(model.train(mode)(*self._inputs))
            return [value.double() for value in outputs if value.numel()]


def _randomized(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a model with weights and statistics that hide nothing, as zeros would."""
    random = torch.Generator().manual_seed(0)
    pool = torch.randn(_DRAWN, generator=random, dtype=dtype)
    shifts = itertools.count(1)  # so that no two tensors are equal

    def drawn(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().clone()
        shape, size = tensor.shape, tensor.numel()
        own = pool.roll(17 * next(shifts))
        value = own.repeat(size // _DRAWN + 1)[:size].view(shape)
        if isinstance(tensor, nn.Parameter):
            if size > max(shape, default=1):
                value *= (shape[0] / size) ** 0.5
            return nn.Parameter(value.to(tensor.device), requires_grad=False)
        if name.endswith("_var"):
            value = 0.5 + value.abs()
        return value.to(tensor.device)

    trial = twin(model, drawn)
    for module in trial.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0  # its draws depend on the width
        for name, rate in vars(module).copy().items():
            if "drop" in name and isinstance(rate, float):
                setattr(module, name, 0.0)  # of attention, and recurrent layers
    recurrent.flatten(trial)
    return trial


def _noise(given: tuple[Any, ...], dtype: torch.dtype, samples: int) -> tuple[Any, ...]:
    """Put normal noise for floating inputs, and several samples for one."""
    random = torch.Generator().manual_seed(1)

    def drawn(value: torch.Tensor) -> torch.Tensor:
        shape = list(value.shape)
        if shape and shape[0] == 1:
            shape[0] = samples
        if not value.is_floating_point():
            return value.expand(shape) if shape else value
        noise = torch.randn(shape, generator=random, dtype=torch.float64)
        return noise.to(value.device, dtype)

    return tuple(mapped(drawn, value) for value in given)
