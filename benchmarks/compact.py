"""Compact and dense networks, at half the FLOPs and at other shares.

    python benchmarks/compact.py                 # all models and shares
    python benchmarks/compact.py resnet50 0.5    # one of them
    python benchmarks/compact.py --multiple 1    # widths of any size

The script removes units by random scores, in multiples of 16 (the floats of an AVX-512
register) by default, until thop's FLOPs reach the share. Then it measures, in pairs of
dense and compact within one process: a training step (forward, backward, SGD with
momentum), inference of a batch, and the cost of `compact` plus `expand` in training
steps of the dense model. It measures the peak memory of training in a process for each.
Ratios are dense / compact: larger is better.
"""

import argparse
import ctypes
import gc
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DEVICE, Trainer, paired, report, wait
from networks import Transformer
from torch import nn

from autoflip_flwr import units
from autoflip_flwr.app import costs, models
from autoflip_flwr.method.structured import Keep, Limits, Units

#: Model -> input shape and batch size.
CASES: dict[str, tuple[tuple[int, int, int], int]] = {
    "cnn6": ((3, 32, 32), 32),
    "resnet50": ((3, 64, 64), 32),
    "efficientnet_b3": ((3, 128, 128), 16),
    "transformer": ((1, 28, 28), 32),
}
ON_GPU: dict[str, tuple[tuple[int, int, int], int]] = {
    "cnn6": ((3, 32, 32), 512),
    "resnet50": ((3, 224, 224), 128),
    "efficientnet_b3": ((3, 224, 224), 128),
    "transformer": ((1, 28, 28), 512),
}
SHARES = (0.5, 0.25, 0.8)


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def build(name: str) -> tuple[nn.Module, tuple[int, ...], int]:
    shape, batch = (ON_GPU if DEVICE.type == "cuda" else CASES)[name]
    torch.manual_seed(0)
    if name == "transformer":  # 4 heads of 32 channels read the rows of an image
        return Transformer(shape, 10, width=128), shape, batch
    return models.build(name, num_classes=10, input_shape=shape, seed=0), shape, batch


def keep_at(
    found: Units, model: nn.Module, share: float, multiple: int, example: torch.Tensor
) -> Keep:
    """Return the units left at a share of thop's FLOPs, by bisection."""
    rng = np.random.default_rng(0)
    scores = {n: rng.random(tuple(p.shape)) for n, p in model.named_parameters()}
    total = sum(score.size for score in scores.values())
    limits = Limits(multiple=multiple)
    dense = costs.flops(model, example)
    low, high = 0, total
    while high - low > total // 1000:
        middle = (low + high) // 2
        keep = found.choose(scores, budget=middle, limits=limits)
        # The units' count agrees with thop's except for normalization.
        if found.operations(keep) > share * found.operations():
            low = middle
        else:
            high = middle
    keep = found.choose(scores, budget=high, limits=limits)
    while costs.flops(units.shrink(model, found, keep), example) > share * dense:
        high += total // 500
        keep = found.choose(scores, budget=high, limits=limits)
    return keep


def measure(name: str, share: float, multiple: int, pairs: int) -> dict[str, Any]:
    """Return one row of the table."""
    model, shape, batch = build(name)
    example = torch.randn(1, *shape)
    found = units.trace(model, example)
    keep = keep_at(found, model, share, multiple, example)
    small = units.shrink(model, found, keep)
    flops = costs.flops(small, example) / costs.flops(model, example)
    size = costs.parameters(small) / costs.parameters(model)
    masks = found.masks(keep, dict(model.named_parameters()))
    dense, compact = Trainer(model, shape, batch), Trainer(small, shape, batch)

    def there_and_back() -> None:
        units.expand(units.compact(model, masks, example), model)
        wait()

    step = paired(dense.step, compact.step, pairs=pairs)
    inference = paired(dense.infer, compact.infer, pairs=pairs)
    back = paired(there_and_back, dense.step, pairs=5)
    return {
        "batch": [batch, *shape],
        "flops": flops,
        "parameters": size,
        "bytes": [_bytes(model), _bytes(small)],
        "step": step["ratio"],
        "step_spread": [step["ratio_least"], step["ratio_largest"]],
        "step_ms": [step["ms"], step["baseline_ms"]],
        "inference": inference["ratio"],
        "inference_spread": [inference["ratio_least"], inference["ratio_largest"]],
        "inference_ms": [inference["ms"], inference["baseline_ms"]],
        "compact_and_expand_in_steps": back["ratio"],
    }


def peak_of(
    name: str, share: float, multiple: int, compact: bool, results: Any
) -> None:
    """Train one model for three steps; put its peak memory in MB into `results`."""
    base = _resident("VmRSS")
    model, shape, batch = build(name)
    net = model
    if compact:
        example = torch.randn(1, *shape)
        found = units.trace(model, example)
        keep = keep_at(found, model, share, multiple, example)
        net = units.shrink(model, found, keep)  # the whole model stays in memory
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    trainer = Trainer(net, shape, batch)
    for _ in range(3):
        trainer.step()
    if DEVICE.type == "cuda":
        results.put(torch.cuda.max_memory_allocated() / 1e6)
    else:
        results.put(_resident("VmHWM") - base)


def _resident(key: str) -> float:
    """Return a figure of the kernel about this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(key))


def peaks(name: str, share: float, multiple: int) -> list[Any]:
    """Return the peak of dense and compact training, each in a new process."""
    context = multiprocessing.get_context("spawn")
    found = []
    for compact in (False, True):
        results = context.Queue()
        child = context.Process(
            target=peak_of, args=(name, share, multiple, compact, results)
        )
        child.start()
        found.append(results.get())
        child.join()
    return found


def main() -> None:
    """Print the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", choices=tuple(CASES))
    parser.add_argument("share", nargs="?", type=float)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--multiple", type=int, default=16)
    chosen = parser.parse_args()
    names = [chosen.model] if chosen.model else list(CASES)
    shares = [chosen.share] if chosen.share else SHARES
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    rows = {"device": device, "threads": torch.get_num_threads()}
    for name in names:
        for share in shares:
            row = measure(name, share, chosen.multiple, chosen.pairs)
            row["peak_mb"] = peaks(name, share, chosen.multiple)
            rows[f"{name}, {share}"] = row
    report(rows)


if __name__ == "__main__":
    main()
