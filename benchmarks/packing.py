"""Time to pack and unpack 23.7 M parameters / time of Flower's own dense path.

    python benchmarks/packing.py

Our path turns values and mask into a Flower Array and bytes, and back into dense
arrays. The dense path is `Array(...)` and `.numpy()` of the same tensors.
"""

import numpy as np
from common import arrays_of, paired, random_mask, report
from flwr.app import Array

from autoflip_flwr.wire import codec

DENSITY = 0.2


def main() -> None:
    """Print the paired timings."""
    arrays, names = arrays_of()
    values = {name: value for name, value in arrays.items() if name in names}
    masks = random_mask(arrays, names, DENSITY)
    shapes = {name: keep.shape for name, keep in masks.items()}

    def dense() -> list[np.ndarray]:
        packed = [Array(value) for value in values.values()]
        return [array.numpy() for array in packed]

    def ours() -> dict[str, np.ndarray]:
        frame = codec.encode(values, masks)
        array = Array(dtype="float32", shape=(1,), stype="raw", data=frame)
        bits = codec.pack_mask(masks)
        return codec.decode(array.data, codec.unpack_mask(bits, shapes))

    kept = codec.indices(masks)

    def known() -> dict[str, np.ndarray]:
        frame = codec.encode(values, masks, kept=kept)
        array = Array(dtype="float32", shape=(1,), stype="raw", data=frame)
        return codec.decode(array.data, masks, kept=kept)

    for mask, path in (("new", ours), ("seen before, indices kept", known)):
        report(
            {
                "parameters": sum(value.size for value in values.values()),
                "density": DENSITY,
                "mask": mask,
                **paired(path, dense, pairs=41),
            }
        )


if __name__ == "__main__":
    main()
