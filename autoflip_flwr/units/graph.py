"""Find the units of a PyTorch model with Torch-Pruning's dependency graph.

Torch-Pruning (github.com/VainF/Torch-Pruning, arXiv:2301.12900) tells which channels of
which modules are coupled; `layers` tells what a channel is in a module's tensors.
"""

import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch_pruning
from numpy.typing import NDArray
from torch import nn

from autoflip_flwr.errors import ModelError
from autoflip_flwr.method.structured import Group, Units
from autoflip_flwr.units import layers, recurrent
from autoflip_flwr.units.proof import prove
from autoflip_flwr.units.signature import signature
from autoflip_flwr.units.surgery import ExampleInputs, arguments, join, tensors_of, twin

_Owners = dict[str, dict[int, NDArray[np.int64]]]

_REMEDY = "use pruning.units=0, which prunes single weights and needs no graph"

_CACHED = 8  # models whose units a process remembers
_cache: OrderedDict[Hashable, Units | ModelError] = OrderedDict()


def trace(model: nn.Module, example_inputs: ExampleInputs) -> Units:
    """Return the units of a model.

    Parameters
    ----------
    model : nn.Module
        Left as it is: copies of it are run on its device, in both modes.
    example_inputs : torch.Tensor, or tuple of arguments of the model
        One sample is enough. Equal models (classes, sizes, inputs) are traced once
        in a process.

    Returns
    -------
    Units
        Without the units that make the model's outputs, and those that cannot be
        taken out exactly; `Units.whole` says which and why.

    Raises
    ------
    ModelError
        If the model does not run on the inputs (or on random ones like them), cannot
        be followed, or holds a module that there is no rule for. Names the module.
    """
    with torch.inference_mode(False), torch.enable_grad():
        key = signature(model, example_inputs)
        found = None if key is None else _cache.get(key)
        if found is None:
            found = _found(model, example_inputs)
    if key is not None:
        _cache[key] = found
        _cache.move_to_end(key)
        if len(_cache) > _CACHED:
            _cache.popitem(last=False)
    if isinstance(found, ModelError):
        raise found
    return found


def _found(model: nn.Module, example_inputs: ExampleInputs) -> Units | ModelError:
    """Return the units, or why there are none to be had."""
    try:
        for path, module in model.named_modules():
            layers.check(path, module)
        return prove(model, example_inputs, _Tracer(model, example_inputs).units())
    except ModelError as error:
        return error
    except Exception as error:  # whatever the model's own code or the graph raises
        inputs = [_described(value) for value in arguments(example_inputs)]
        return ModelError(
            f"{type(model).__name__} could not be traced with the example inputs "
            f"{inputs}: {type(error).__name__}: {error}; {_REMEDY}"
        )


class _Tracer:
    """One trace: numbers the units and notes whose each index is."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        self._shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        self._shared = _shared(model)
        self._groups: list[Group] = []
        self._count = 0
        self._whole: dict[str, str] = {}
        self._owners: _Owners = {}
        self._uses: dict[str, int] = {}
        # A copy that shares the weights, all of them visible to autograd.
        self._model = twin(model, _visible)
        self._recurrent = recurrent.replace(self._model)
        self._paths: dict[nn.Module, str] = {
            module: path for path, module in self._model.named_modules()
        }
        self._graph = self._build(example_inputs)

    def _build(self, example_inputs: ExampleInputs) -> Any:
        inputs = arguments(example_inputs, like=self._model)
        handles = [
            module.register_forward_hook(self._count_uses)
            for module in self._model.modules()
            if isinstance(module, layers.WEIGHTED)
        ]
        try:
            self._model.eval()(*inputs)  # so that its own errors are not hidden
        except Exception as error:
            raise ModelError(
                f"{type(self._model).__name__} must run on the example inputs, here "
                f"{[_described(value) for value in inputs]}: {error}; {_REMEDY}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on torch's own deprecations
            return torch_pruning.DependencyGraph().build_dependency(
                self._model,
                inputs,
                customized_pruners={recurrent.Steps: recurrent.StepsPruner()},
                # One more operation, so that a last layer is not the output itself.
                output_transform=lambda out: [t * 1 for t in tensors_of(out)],
                verbose=False,
            )

    def _count_uses(self, module: nn.Module, inputs: Any, output: Any) -> None:
        del inputs
        for name, uses in layers.uses(module, output):
            key = join(self._paths[module], name)
            self._uses[key] = self._uses.get(key, 0) + uses

    def units(self) -> Units:
        """Walk over all modules that make channels."""
        for module, path in self._paths.items():
            if isinstance(module, layers.ROOTS) and not layers.is_depthwise(module):
                self._add_groups(path, module)
        level = []
        for path, original in self._recurrent.items():
            rows = self._add_hidden(path, original)
            if rows:
                level.append(rows)
        buffers = {name for name, _ in self._model.named_buffers()}
        owners: _Owners = {}
        for name, dimensions in self._owners.items():
            for dim, owner in dimensions.items():
                if (owner >= 0).any():
                    owners.setdefault(name, {})[dim] = owner
        return Units(
            groups=tuple(self._groups),
            parameters={n: v for n, v in owners.items() if n not in buffers},
            buffers={n: v for n, v in owners.items() if n in buffers},
            shapes=self._shapes,
            uses=self._renamed_uses(),
            level=tuple(level),
            whole=self._whole,
            columns=frozenset(
                join(path, "weight")
                for module, path in self._paths.items()
                if isinstance(module, layers.COLUMNS)
            ),
        )

    def _add_groups(self, path: str, module: nn.Module) -> None:
        """Add what is coupled with a module's output channels, unless it is known."""
        pruner = self._graph.get_pruner_of_module(module)
        if module not in self._graph.module2node:
            self._whole[path] = "the outputs do not depend on it"
            return
        free = self._free(path, module, pruner.get_out_channels(module))
        if not len(free):
            return
        coupled = self._graph.get_pruning_group(
            module, pruner.prune_out_channels, free.tolist()
        )
        found: list[tuple[str, int, NDArray[np.int64], NDArray[np.int64]]] = []
        for item in coupled:
            node = item.dep.target
            if node.type == torch_pruning.ops.OPTYPE.OUTPUT:
                self._whole[path] = "its channels are the model's outputs"
                return
            if node.type in layers.WITHOUT_TENSORS:
                continue
            indices = np.asarray(item.idxs, np.int64)
            roots = np.asarray(item.root_idxs, np.int64)
            out = self._graph.is_out_channel_pruning_fn(item.dep.handler)
            where = self._where(node.module)
            reason = layers.reason_to_stay_whole(node.module, out)
            if reason is not None:
                self._whole[path] = f"{where} {reason}"
                return
            for name, dim, rows, places in self._tensors(
                node.module, where, out, indices
            ):
                if name in self._shared:
                    self._whole[path] = f"{name} is shared between modules"
                    return
                if rows.size and rows.max() >= self._shapes[name][dim]:
                    self._whole[path] = f"the graph misreads the channels of {where}"
                    return
                found.append((name, dim, rows, roots[places]))
        number = np.full(int(free.max()) + 1, -1, np.int64)
        number[free] = np.arange(self._count, self._count + len(free))
        for name, dim, rows, roots in found:
            self._owner(name, dim)[rows] = number[roots]
        self._add_group(path, len(free))

    def _add_group(self, name: str, size: int) -> None:
        self._groups.append(Group(name, self._count, size))
        self._count += size

    def _free(self, path: str, module: nn.Module, size: int) -> NDArray[np.int64]:
        """Return the output channels that belong to no unit yet."""
        free = np.ones(size, np.bool_)
        for name, dim, rows, places in self._tensors(
            module, path, True, np.arange(size)
        ):
            free[places[self._owner(name, dim)[rows] >= 0]] = False
        return np.flatnonzero(free)

    def _where(self, module: nn.Module | nn.Parameter) -> str:
        if isinstance(module, nn.Parameter):
            return next(n for n, p in self._model.named_parameters() if p is module)
        return self._paths[module]

    def _tensors(
        self, module: Any, path: str, out: bool, channels: NDArray[np.int64]
    ) -> Iterator[tuple[str, int, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield tensor, dimension, rows, and each row's place in `channels`."""
        places = np.arange(len(channels))
        if isinstance(module, nn.Parameter):
            yield path, layers.vector_dim(module), channels, places
        elif isinstance(module, recurrent.Steps):
            path = path.rpartition(".")[0]
            original = self._recurrent[path]
            for name, dim, rows, sources in recurrent.tensors(original, out, channels):
                yield join(path, name), dim, rows, sources
        else:
            for name, dim in layers.tensors(module, out):
                yield join(path, name), dim, channels, places

    def _add_hidden(
        self, path: str, module: nn.RNNBase
    ) -> tuple[NDArray[np.int64], ...]:
        """Add the hidden units that stay inside a recurrent module."""
        if path in self._whole or join(path, "steps") in self._whole:
            return ()
        for name, inner in recurrent.inner_layers(module):
            numbers = np.arange(self._count, self._count + module.hidden_size)
            for tensor, dim, rows, places in inner:
                self._owner(join(path, tensor), dim)[rows] = numbers[places]
            self._add_group(join(path, name), module.hidden_size)
        return tuple(
            self._owner(join(path, name), 1)
            for name in recurrent.hidden_weights(module)
        )

    def _owner(self, name: str, dim: int) -> NDArray[np.int64]:
        dimensions = self._owners.setdefault(name, {})
        if dim not in dimensions:
            dimensions[dim] = np.full(self._shapes[name][dim], -1, np.int64)
        return dimensions[dim]

    def _renamed_uses(self) -> Mapping[str, int]:
        """Replace a recurrent stand-in's count by those of its module's weights."""
        uses = dict(self._uses)
        for path, module in self._recurrent.items():
            steps = uses.pop(join(path, "steps.weight"), 0)
            for name in recurrent.weights(module):
                uses[join(path, name)] = steps
        return uses


def _visible(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
        return nn.Parameter(tensor.detach())
    return tensor.detach().clone()


def _shared(model: nn.Module) -> set[str]:
    """Return the names of parameters that several modules use."""
    seen: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        seen.setdefault(id(parameter), []).append(name)
    return {name for names in seen.values() if len(names) > 1 for name in names}


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
