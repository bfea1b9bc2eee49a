"""Count the multiply-accumulates of matrix products and convolutions."""

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts multiply-accumulates of a model that runs while this is entered.

    Attention then shows its products: torch's fused kernels are off. Causal attention
    counts all pairs of tokens.

    Parameters
    ----------
    model : nn.Module
    places : mapping of module -> label
        Modules of it to tell apart.

    Attributes
    ----------
    made : Counter of (label, parameter)
        The label is that of the innermost labelled module which was running; the
        parameter is the matrix in the product. Each is None where there is none.
    """

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
        self._off.callback(
            torch.backends.mha.set_fastpath_enabled,
            torch.backends.mha.get_fastpath_enabled(),
        )
        torch.backends.mha.set_fastpath_enabled(False)
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
