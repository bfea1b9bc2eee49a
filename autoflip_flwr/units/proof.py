"""Try whether a model without some units computes what the masked model does.

The dependency graph guesses at operations it does not know; this finds wrong guesses.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from autoflip_flwr.errors import ModelError
from autoflip_flwr.method.structured import Group, Keep, Units
from autoflip_flwr.units.surgery import (
    ExampleInputs,
    arguments,
    mapped,
    shrink,
    tensors_of,
    twin,
)

_log = logging.getLogger("flwr")

#: Of the largest output. float32 is for models whose own code asks for it.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}

#: Random numbers that are drawn and then repeated: a prime, so that no row is another.
_DRAWN = 65_537

_SAMPLES = 3  # BatchNorm trains on more than one


def prove(model: nn.Module, example_inputs: ExampleInputs, units: Units) -> Units:
    """Compare masked and smaller model: random weights and inputs, both modes.

    Returns
    -------
    Units
        Without the groups that do not work; `Units.whole` says why.

    Raises
    ------
    ModelError
        If the model does not run on random inputs of the examples' shapes and types.
    """
    if not units.groups:
        return units
    trial = _Trial.of(model, example_inputs)
    reasons: dict[str, str] = {}
    for clusters in trial.failing(units, units.clusters()):
        for group, reason in clusters:
            reasons[group.name] = f"the graph cannot follow its channels: {reason}"
    if not reasons:
        return units
    _log.warning("left whole: %s", reasons)
    return units.without(reasons)


class _Trial:
    """Random weights for a model, and random inputs that it runs on.

    One copy of the model and a smaller one are held at a time: a client makes this
    trial, too.
    """

    def __init__(
        self, model: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._dtype = dtype
        self.reason = ""
        trial = _randomized(model, dtype)
        self.modes = [mode for mode in (False, True) if self._runs(trial, mode)]

    @classmethod
    def of(cls, model: nn.Module, example_inputs: ExampleInputs) -> "_Trial":
        """Find a type and a number of samples that the model runs on."""
        given = arguments(example_inputs, like=model)
        for dtype in _TOLERANCES:
            for samples in (_SAMPLES, 1):
                trial = cls(model, _noise(given, dtype, samples), dtype)
                if False in trial.modes:
                    return trial
        raise ModelError(
            f"{type(model).__name__} does not run on random inputs like the example "
            f"inputs, so that its units cannot be tried: {trial.reason}"
        )

    def _runs(self, trial: nn.Module, mode: bool) -> bool:
        try:
            self._outputs(trial, mode)
        except Exception as error:  # whatever the model's own code raises
            self.reason = _first_line(error)
            return False
        return True

    def failing(
        self, units: Units, clusters: Sequence[Sequence[Group]]
    ) -> Iterator[list[tuple[Group, str]]]:
        """Find by halves the clusters of groups that do not work."""
        groups = [group for cluster in clusters for group in cluster]
        reason = self._difference(units, groups)
        if reason is None:
            return
        if len(clusters) == 1:
            yield [(group, reason) for group in groups]
            return
        middle = len(clusters) // 2
        halves = [
            *self.failing(units, clusters[:middle]),
            *self.failing(units, clusters[middle:]),
        ]
        if not halves:  # only together
            yield [(group, reason) for group in groups]
        yield from halves

    def _difference(self, units: Units, groups: Sequence[Group]) -> str | None:
        """Return None, or how taking units out fails.

        Two fifths, then the others; and a third of other draws, as a wrong guess may
        agree on some units by chance.
        """
        for share, rest in itertools.product((2 / 5, 1 / 3), (False, True)):
            keep: Keep = np.ones(units.count, np.bool_)
            rng = np.random.default_rng(round(100 * share))
            for group in groups:
                order = rng.permutation(group.size)
                count = max(1, int(share * group.size)) if group.size > 1 else 0
                lost = order[count:] if rest else order[:count]
                if len(lost) < group.size:
                    keep[group.start + lost] = False
            reason = self._compared(units, _evenly(units, keep, groups))
            if reason is not None:
                return reason
        return None

    def _compared(self, units: Units, keep: Keep) -> str | None:
        masked = _randomized(self._model, self._dtype)
        masks = units.masks(keep, units.parameters)
        for name, parameter in masked.named_parameters():
            if name in masks:
                pruned = torch.from_numpy(~masks[name]).to(parameter.device)
                parameter.masked_fill_(pruned, 0)
        small = shrink(masked, units, keep)
        for mode in self.modes:
            expected = self._outputs(masked, mode)
            try:
                got = self._outputs(small, mode)
            except Exception as error:  # whatever the model's own code raises
                return _first_line(error)
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
        found = tensors_of(self._inputs)
        devices = {value.device for value in found if value.is_cuda}
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            torch.manual_seed(0)
            outputs = tensors_of(model.train(mode)(*self._inputs))
            return [value.double() for value in outputs if value.numel()]


def _evenly(units: Units, keep: Keep, groups: Sequence[Group]) -> Keep:
    """Let rows that stay equally long lose equally many, or none would go."""
    keep = keep.copy()
    tried = {unit for group in groups for unit in range(group.start, group.stop)}
    for rows in units.level:
        if all(set(row.tolist()) <= tried for row in rows):
            fewest = min(int(np.count_nonzero(~keep[row])) for row in rows)
            fewest = max(1, fewest) if len(rows[0]) > 1 else 0
            for row in rows:
                lost = row[~keep[row]]
                kept = row[keep[row]]
                keep[lost[fewest:]] = True
                keep[kept[: max(0, fewest - len(lost))]] = False
    return keep


def _randomized(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a model with weights and statistics that hide nothing, as zeros would."""
    random = torch.Generator().manual_seed(0)
    pool = torch.randn(_DRAWN, generator=random, dtype=dtype)
    parameters = {id(parameter) for parameter in model.parameters()}
    variances = {
        id(buffer) for name, buffer in model.named_buffers() if name.endswith("_var")
    }

    shifts = itertools.count(1)  # so that no two tensors are equal

    def drawn(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().clone()
        shape, longest = tensor.shape, max(tensor.shape, default=1)
        size = tensor.numel()
        own = pool.roll(17 * next(shifts))
        value = own.repeat(size // _DRAWN + 1)[:size].view(shape)
        if id(tensor) in variances:
            value = 0.5 + value.abs()
        elif id(tensor) in parameters and tensor.numel() > longest:
            value *= (shape[0] / tensor.numel()) ** 0.5
        value = value.to(tensor.device)
        if id(tensor) in parameters:
            return nn.Parameter(value, requires_grad=False)
        return value

    trial = twin(model, drawn)
    for module in trial.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0  # its draws depend on the width
        elif isinstance(module, nn.RNNBase):
            module.dropout = 0.0
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

    found: tuple[Any, ...] = mapped(drawn, given)
    return found


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
