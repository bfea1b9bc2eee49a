"""What needs a PyTorch model: its units, smaller models, masks kept in training.

`graph` finds the units (`layers` and `recurrent` say what a channel is in each kind of
module, `attention` where heads are), `proof` tries them, `surgery` takes them out and
puts them back (`partial` has the modules that need it), `compaction` says when that
pays. `enforce` keeps pruned weights at zero, `optimizers` reads gradients, `measure`
counts. May import `method`, `types` and `errors`; knows torch, not Flower.
"""

from autoflip_flwr.method.structured import Units
from autoflip_flwr.units.compaction import (
    PAYS,
    compact,
    compact_if_it_pays,
    loses_units,
    mask_units,
    operations_left,
)
from autoflip_flwr.units.graph import trace
from autoflip_flwr.units.inputs import ExampleInputs, tensors_of
from autoflip_flwr.units.surgery import expand, kept_indices, shrink, small_masks

__all__ = [
    "PAYS",
    "ExampleInputs",
    "Units",
    "compact",
    "compact_if_it_pays",
    "expand",
    "kept_indices",
    "loses_units",
    "mask_units",
    "operations_left",
    "shrink",
    "small_masks",
    "tensors_of",
    "trace",
]
