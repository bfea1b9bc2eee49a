"""Find the units of a PyTorch model with Torch-Pruning's dependency graph.

Torch-Pruning (github.com/VainF/Torch-Pruning, arXiv:2301.12900) tells which channels of
which modules are coupled; `layers` tells what a channel is in a module's tensors.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from autoflip_flwr.errors import ModelError
from autoflip_flwr.method.structured import Group, Numbers, Units
from autoflip_flwr.units import attention, layers, recurrent
from autoflip_flwr.units.inputs import (
    ExampleInputs,
    arguments,
    described,
    mapped,
    tensors_of,
)
from autoflip_flwr.units.layers import join
from autoflip_flwr.units.measure import Products
from autoflip_flwr.units.proof import prove
from autoflip_flwr.units.signature import signature
from autoflip_flwr.units.surgery import twin

_Owners = dict[str, dict[int, Numbers]]

_STREAM = ".stream"  # stands for all channels that go into an attention module

_CACHED = 8  # models whose units a process remembers
_cache: dict[Hashable, Units | ModelError] = {}  # the latest used last


def trace(model: nn.Module, example_inputs: ExampleInputs) -> Units:
    """Return the units of a model, of which copies run on its device, in both modes.

    Units that make the model's outputs, and those that we cannot take out exactly, are
    left whole; `Units.whole` says which and why. One sample as example is enough. Equal
    models (classes, sizes, inputs) are traced once in a process.

    Raises
    ------
    ModelError
        If the model does not run on the inputs (or on random ones like them), or the
        graph fails on it, or we have no rule for a module. Names the module.
    """
    with torch.inference_mode(False), torch.enable_grad():
        key = signature(model, example_inputs)
        units = _cache.get(key) or _traced(model, example_inputs)
    if key is not None:
        _cache.pop(key, None)
        _cache[key] = units
        if len(_cache) > _CACHED:
            del _cache[next(iter(_cache))]
    if isinstance(units, ModelError):
        raise units
    return units


def _traced(model: nn.Module, example_inputs: ExampleInputs) -> Units | ModelError:
    """Return the units, or why they cannot be told."""
    try:
        for path, module in model.named_modules():
            layers.check(path, module)
        return prove(model, example_inputs, _Tracer(model, example_inputs).units())
    except ModelError as error:
        return error
    except (torch.OutOfMemoryError, MemoryError, OSError):
        raise  # it may pass, so nobody remembers it
    except Exception as error:  # whatever the model's own code or the graph raises
        return ModelError(
            f"{type(model).__name__} could not be traced with the example inputs "
            f"{described(arguments(example_inputs))}: {type(error).__name__}: {error}; "
            "use pruning.units=0, which prunes single weights and needs no graph"
        )


class _Tracer:
    """One trace: numbers the units and notes whose each index is."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        if isinstance(model, nn.RNNBase | nn.MultiheadAttention):
            raise ModelError(
                f"{type(model).__name__}: expected a model that holds it, got the "
                "layer alone; put it into a module"
            )
        self._shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        self._shared = _shared(model)
        self._groups: list[Group] = []
        self._count = 0
        self._whole: dict[str, str] = {}
        self._owners: _Owners = {}
        # A copy that shares the weights, all of them visible to autograd.
        self._model = twin(model, _visible)
        self._recurrent = recurrent.replace(self._model)
        for path, module in list(self._model.named_modules()):
            if layers.is_conv1d(module):
                self._model.set_submodule(path, layers.Transposed(module))
        for path, module in list(self._model.named_modules(remove_duplicate=False)):
            if isinstance(module, nn.PReLU) and module.num_parameters == 1:
                # To the graph a PReLU has a number of channels.
                self._model.set_submodule(path, nn.LeakyReLU())
        self._paths: dict[nn.Module, str] = {
            module: path for path, module in self._model.named_modules()
        }
        self._heads = attention.find(model)
        self._projections = set().union(*(h.projections for h in self._heads.values()))
        self._products = Products(
            self._model, {self._model.get_submodule(path): path for path in self._heads}
        )
        for path in self._heads:
            _cut(self._model.get_submodule(path))
        self._graph = self._build(example_inputs)

    def _build(self, example_inputs: ExampleInputs) -> Any:
        # Imported here, since only a trace needs it, and without timm: that takes
        # seconds in each message's process, and is for Torch-Pruning's counts alone.
        with _hidden("timm"):
            from torch_pruning import DependencyGraph

        inputs = arguments(example_inputs, like=self._model)
        with self._products:
            self._model.eval()(*inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on torch's own deprecations
            graph = DependencyGraph().build_dependency(
                self._model,
                inputs,
                # One more operation, so that a last layer is not the output itself.
                output_transform=lambda out: [t * 1 for t in tensors_of(out)],
                verbose=False,
            )
        _keep_channels_of_rows(graph)
        return graph

    def _uses(self) -> dict[str, float]:
        """Return the multiply-accumulates per entry of each weight."""
        uses: dict[str, float] = {}
        for (place, name), made in self._products.made.items():
            if name is None and place is not None:  # queries and keys, and with values
                name = self._heads[place].output
            if name is None:
                continue
            each = made / self._model.get_parameter(name).numel()
            names, path = [name], name.removesuffix(".steps.weight")
            if path in self._recurrent:  # one step stands for all its matrices
                own = self._recurrent[path].named_parameters()
                names = [join(path, n) for n, matrix in own if matrix.ndim == 2]
            for name in names:
                uses[name] = uses.get(name, 0) + each
        return uses

    def units(self) -> Units:
        """Walk over all modules that make channels."""
        for module, path in self._paths.items():
            makes = layers.is_root(module) and not layers.is_depthwise(module)
            if makes and path not in self._projections:
                self._add_groups(path, module)
        for path, heads in self._heads.items():
            self._add_heads(path, heads)
        level = [self._add_hidden(*each) for each in self._recurrent.items()]
        buffers = {name for name, _ in self._model.named_buffers()}
        owners: _Owners = {}
        equal: dict[bytes, Numbers] = {}  # one array for all that have the same units
        for name, dimensions in self._owners.items():
            for dim, owner in dimensions.items():
                if (owner >= 0).any():
                    own = equal.setdefault(owner.tobytes(), owner)
                    owners.setdefault(name, {})[dim] = own
        return Units(
            groups=tuple(self._groups),
            parameters={n: v for n, v in owners.items() if n not in buffers},
            buffers={n: v for n, v in owners.items() if n in buffers},
            shapes=self._shapes,
            uses=self._uses(),
            level=tuple(rows for rows in level if rows),
            whole=self._whole,
            columns=frozenset(
                join(path, "weight")
                for module, path in self._paths.items()
                if layers.has_columns(module)
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
        owned: list[tuple[str, int, Numbers, Numbers]] = []
        for item in coupled:
            node = item.dep.target
            if node.type.name == "OUTPUT":
                self._whole[path] = "its channels are the model's outputs"
                return
            indices = np.asarray(item.idxs, np.int64)
            roots = np.asarray(item.root_idxs, np.int64)
            out = self._graph.is_out_channel_pruning_fn(item.dep.handler)
            where = self._where(node.module)
            reason = layers.reason_to_stay_whole(node.module, out)
            if where.removesuffix(_STREAM) in self._heads:
                where = where.removesuffix(_STREAM)
                reason = "is attention, whose inputs and outputs stay whole"
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
                owned.append((name, dim, rows, roots[places]))
        number = np.full(int(free.max()) + 1, -1, np.int64)
        number[free] = np.arange(self._count, self._count + len(free))
        for name, dim, rows, roots in owned:
            self._owner(name, dim)[rows] = number[roots]
        self._add_group(path, len(free))

    def _add_heads(self, path: str, heads: attention.Heads) -> None:
        """Add the heads of an attention module."""
        shared = [name for name, _, _ in heads.owners if name in self._shared]
        if shared:
            self._whole[path] = f"{shared[0]} is shared between modules"
            return
        for name, dim, owner in heads.owners:
            self._owner(name, dim)[:] = owner + self._count
        self._add_group(path, heads.count, heads.width)

    def _add_group(self, name: str, size: int, width: int = 1) -> None:
        self._groups.append(Group(name, self._count, size, width))
        self._count += size

    def _free(self, path: str, module: nn.Module, size: int) -> Numbers:
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
        return self._paths.get(module, "")  # operations have no path, and no tensors

    def _tensors(
        self, module: Any, path: str, out: bool, channels: Numbers
    ) -> Iterator[tuple[str, int, Numbers, Numbers]]:
        """Yield tensor, dimension, rows, and each row's place in `channels`."""
        places = np.arange(len(channels))
        if isinstance(module, nn.Parameter):
            yield path, int(np.argmax(module.shape)), channels, places
        elif isinstance(module, recurrent.Steps):
            path = path.rpartition(".")[0]
            original = self._recurrent[path]
            for name, dim, rows, sources in recurrent.tensors(original, out, channels):
                yield join(path, name), dim, rows, sources
        else:
            for name, dim in layers.tensors(module, out):
                yield join(path, name), dim, channels, places

    def _add_hidden(self, path: str, module: nn.RNNBase) -> tuple[Numbers, ...]:
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
            for name, _ in module.named_parameters()
            if name.startswith("weight_hh")  # its columns are the hidden units
        )

    def _owner(self, name: str, dim: int) -> Numbers:
        dimensions = self._owners.setdefault(name, {})
        if dim not in dimensions:
            dimensions[dim] = np.full(self._shapes[name][dim], -1, np.int64)
        return dimensions[dim]


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Let imports of a module fail for a while, if it is not loaded yet."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def _keep_channels_of_rows(graph: Any) -> None:
    """Let a slice of a matrix's rows keep all channels.

    Torch-Pruning takes it for a slice of channels. `pad_packed_sequence` has some.
    """
    from torch_pruning.ops import OPTYPE

    for node in graph.module2node.values():
        if node.type == OPTYPE.SLICE and node.grad_fn._saved_dim == 0:
            node.type = OPTYPE.ELEMENTWISE  # or every group maps its channels anew
            for each in node.inputs:
                for link in (*node.dependencies, *each.dependencies):
                    if {link.source, link.target} == {node, each}:
                        link.index_mapping[0] = None


def _visible(_: str, tensor: torch.Tensor) -> torch.Tensor:
    differentiable = tensor.is_floating_point() or tensor.is_complex()
    if isinstance(tensor, nn.Parameter) and differentiable:
        return nn.Parameter(tensor.detach())
    return tensor.detach().clone()


def _cut(module: nn.Module) -> None:
    """Hide what an attention module does with its inputs from the graph.

    All of them go through one parameter, where `_add_groups` finds them.
    """
    stream = nn.Parameter(torch.zeros(2, 2))  # adds nothing, but to the graph
    module.register_parameter(_STREAM[1:], stream)

    def cut(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        inputs = tensors_of([*args, *kwargs.values()])
        link = stream.sum() * sum(x.sum() for x in inputs if x.requires_grad)
        return mapped(
            lambda x: x.detach() + link if x.is_floating_point() else x, output
        )

    module.register_forward_hook(cut, with_kwargs=True)


def _shared(model: nn.Module) -> set[str]:
    """Return the names of parameters that several modules use."""
    named = list(model.named_parameters(remove_duplicate=False))
    modules = Counter(id(parameter) for _, parameter in named)
    return {name for name, parameter in named if modules[id(parameter)] > 1}
