"""What running a model takes: operations by module, memory for the backward pass."""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from autoflip_flwr.errors import ModelError
from autoflip_flwr.units import recurrent
from autoflip_flwr.units.inputs import ExampleInputs, arguments, described, first_line


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts multiply-accumulates of a model that runs while this is entered.

    Attention then shows its products: torch's fused kernels are off. Causal attention
    counts all pairs of tokens. `made` counts by label, in `places`, of the innermost
    labelled module that was running, and by the name of the matrix in the product. Each
    is None where there is none.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Say that torch.compile need not be kept away: that imports it, in seconds."""
        return False

    def __init__(self, model: nn.Module, places: Mapping[nn.Module, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from torch.utils.flop_counter import flop_registry  # imports Triton

        self._formulas = flop_registry
        self.made: Counter[tuple[str | None, str | None]] = Counter()
        self._names = {
            parameter.untyped_storage().data_ptr(): name
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1
        }
        self._places = places
        self._running: list[str | None] = [None]
        self._off = ExitStack()

    def __enter__(self) -> "Products":
        for module in self._places:
            for hook in (
                module.register_forward_pre_hook(self._begin),
                module.register_forward_hook(self._end, always_call=True),
            ):
                self._off.callback(hook.remove)
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self._off.callback(torch.backends.mha.set_fastpath_enabled, fast)
        self._off.enter_context(sdpa_kernel(SDPBackend.MATH))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._off.close()

    def _begin(self, module: nn.Module, *_: Any) -> None:
        self._running.append(self._places[module])

    def _end(self, *_: Any) -> None:
        self._running.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count it if it is a product."""
        made = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func.overloadpacket)
        if formula is not None:
            operands = [each for each in args if isinstance(each, torch.Tensor)]
            of = (self._names.get(x.untyped_storage().data_ptr()) for x in operands)
            flops = formula(*args, **(kwargs or {}), out_val=made)
            name = next(filter(None, of), None)
            self.made[self._running[-1], name] += flops // 2
        return made


def operations(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, int]:
    """Count the multiply-accumulates of a forward pass of all inputs, by module's path.

    What a module's children do counts for it, too; ``""`` is the model, of which a copy
    is run in evaluation mode. Attention's products count, element-wise operations and
    embeddings do not. It is a `ModelError` if the model cannot be copied, or does not
    run on the inputs.
    """
    copied = _copy(model)
    for parameter in copied.parameters():  # or fused kernels, which are not counted
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    paths = {module: path for path, module in copied.named_modules()}
    with Products(copied, paths) as products, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the switch
        with torch.backends.mkldnn.flags(enabled=False):  # a fused LSTM, the same
            _run(copied, example_inputs)
    totals = dict.fromkeys(paths.values(), 0)
    for (path, _), count in products.made.items():
        totals[""] += count
        while path:
            totals[path] += count
            path = path.rpartition(".")[0]
    return totals


def backward_bytes(model: nn.Module, example_inputs: ExampleInputs) -> int:
    """Return what the forward pass of these inputs keeps for the backward pass."""
    copied = _copy(model)
    with kept_for_backward(copied) as kept:
        _run(copied, example_inputs)
    return sum(kept.values())


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Note what is kept for the backward pass, but parameters: bytes by storage."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _copy(model: nn.Module) -> nn.Module:
    try:
        copied = copy.deepcopy(model).eval()
    except Exception as error:  # whatever the model's own code raises
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {first_line(error)}"
        ) from error
    recurrent.flatten(copied)
    return copied


def _run(model: nn.Module, example_inputs: ExampleInputs) -> None:
    inputs = arguments(example_inputs, like=model)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            model(*inputs)
    except Exception as error:  # whatever the model's own code raises
        raise ModelError(
            f"{type(model).__name__} does not run on the example inputs "
            f"{described(inputs)}: {first_line(error)}"
        ) from error
