"""Baselines that prune by nodes' gradients, of one epoch at fixed weights.

All prune to the density of the settings and keep biases and scales of normalization,
as their sources do.
"""

import math
from collections.abc import Mapping

import numpy as np

from autoflip_flwr.errors import ExplorationError, MaskError, SettingsError, by_reason
from autoflip_flwr.method.mean import WeightedMean
from autoflip_flwr.method.schedule import due
from autoflip_flwr.pruners.base import Ask, FixedPruner, Problem
from autoflip_flwr.pruners.store import Measured
from autoflip_flwr.pruners.weights import but_vectors, magnitudes
from autoflip_flwr.settings import BaselineSettings
from autoflip_flwr.types import Float32, Mask, Masks, Nodes, Params

#: Default number of rounds from one adjustment to the next.
EVERY = 10


class GradientPruner(FixedPruner):
    """Averages the nodes' measurements, weighted by their numbers of examples."""

    _saved = ("_chosen", "_measured")

    def prepare(self, problem: Problem) -> None:
        """Start without a measurement."""
        super().prepare(problem)
        self._measured = WeightedMean()

    def add(self, node_id: int, measured: Measured, start: Params) -> None:
        """Add a measurement to the weighted mean."""
        del node_id, start
        self._measured.add(measured.guidance().dense(), measured.examples)

    def check(self, reasons: Mapping[int, str]) -> None:
        """Check that there is a mask or a measurement."""
        if self._chosen is None and not self._measured.weight:
            raise ExplorationError(
                f"none of {len(reasons)} nodes measured its gradients, so no mask can "
                f"be made; reasons with their nodes: {by_reason(reasons)}"
            )


class SSFL(GradientPruner):
    """One mask from the saliency |gradient x weight| of all clients before round 1.

    Ohib et al., SSFL: Discovering Sparse Unified Subnetworks at Initialization for
    Efficient Federated Learning (arXiv:2405.09037). Saliency is ranked over all layers;
    clients are weighted by their numbers of examples. Here the gradient is the mean
    over the batches of all local samples.
    """

    def asks(
        self, server_round: int, *, connected: Nodes, sampled: Nodes
    ) -> Ask | None:
        """Ask all nodes once."""
        del server_round, sampled
        first = self._chosen is None
        return Ask(nodes=connected, measure="saliency") if first else None

    def masks(self, sampled: Nodes, weights: Params, server_round: int) -> Masks:
        """Return the mask."""
        del sampled, weights, server_round
        if self._chosen is None:
            measured = self._measured.take()
            self._chosen = self.cut(but_vectors(measured), overwrite=True)
        return self._chosen


class PruneFL(GradientPruner):
    """Prunes by squared gradient per time, first at one client, then with regrowth.

    Jiang et al., Model Pruning Enables Efficient Federated Learning on Edge Devices
    (arXiv:1909.12326; jiangyuang/PruneFL). The importance is ``g^2 / t``; `t` is the
    time that a parameter costs. Here it is 1 for its bytes plus 1 per 30
    multiplications that use it, which fits the authors' constants for the second
    convolution of their FEMNIST network. As in their constants, the first layer costs
    only its bytes. In an adjustment all pruned weights compete with the smallest 30 %
    of each layer's kept weights. A weight that returns has its last value.

    Notes
    -----
    In the paper the importance decides the number of weights; here the settings do.
    Their first client prunes in many small steps; here it measures once, at `W0`.
    """

    takes_units = True
    restores = True
    _competing = 0.3
    _uses_per_share = 30.0

    def __init__(self, *, every: int = EVERY) -> None:
        self.every = int(BaselineSettings(every=every).every or EVERY)

    def prepare(self, problem: Problem) -> None:
        """Compute the time that each parameter costs."""
        super().prepare(problem)
        # Without the model all times are 1. The first layer has the time 1, too.
        uses = dict(self.units.uses) if self.units else {}
        uses.pop(next(iter(uses), ""), None)
        self._time = {
            name: 1 + uses.get(name, 0) / self._uses_per_share for name in self.shapes
        }

    def asks(
        self, server_round: int, *, connected: Nodes, sampled: Nodes
    ) -> Ask | None:
        """Ask one node before round 1, and the sampled nodes at each adjustment."""
        if self._chosen is None:
            return Ask(nodes=connected[:1], measure="squared-gradient")
        if due(server_round, self.every):
            return Ask(nodes=sampled, measure="squared-gradient", current=True)
        return None

    def masks(self, sampled: Nodes, weights: Params, server_round: int) -> Masks:
        """Return the mask, adjusted if there are new gradients."""
        del sampled, server_round
        if self._measured.weight:
            scores = {
                name: np.asarray(squared / np.float32(self._time[name]))
                for name, squared in self._measured.take().items()
            }
            if self._chosen is not None:
                self._protect(scores, weights, self._chosen)
            self._chosen = self.cut(but_vectors(scores), overwrite=True)
        assert self._chosen is not None
        return self._chosen

    def _protect(
        self, scores: dict[str, Float32], weights: Params, kept: Masks
    ) -> None:
        """Protect all but the smallest kept weights: their scores become infinite."""
        for name, keep in kept.items():
            size = np.abs(weights[name], dtype=np.float32)
            active = size[keep]
            going = int(self._competing * active.size)
            if going < active.size:
                bar = np.partition(active, going)[going]
                scores[name][keep & (size >= bar)] = np.inf


class FedDST(GradientPruner):
    """A sparse mask that drops weights by magnitude and grows them by gradient.

    Bibikar et al., Federated Dynamic Sparse Training: Computing Less, Communicating
    Less, Yet Learning Better (arXiv:2112.09824; bibikar/feddst). The first mask keeps
    the largest initial weights of each layer, at the densities of Erdos-Renyi-Kernel
    (Evci et al., arXiv:1911.11134). Every `every` rounds until `until`, each layer
    drops its smallest weights. As many grow, from zero, where the mean gradient is
    largest; a weight that was just dropped may grow again. The share falls as a cosine
    from `replaced` to 0.

    Notes
    -----
    In the paper clients adjust their own masks and the server prunes their union. Here
    the server adjusts one mask by the gradients of the sampled clients, so that both
    sides know the mask and only kept values travel. A weight that grows again at once
    keeps its value; the authors' code sets it to zero.
    """

    def __init__(
        self, *, every: int = EVERY, replaced: float = 0.5, until: int | None = None
    ) -> None:
        checked = BaselineSettings(every=every, replaced=replaced, until=until)
        self.every, self.until = int(checked.every or EVERY), checked.until
        self.replaced = checked.replaced

    def prepare(self, problem: Problem) -> None:
        """Choose the largest initial weights."""
        super().prepare(problem)
        if self.settings.mode == "value":
            raise SettingsError(
                "feddst needs the number of weights to keep: mode quantile or "
                "compression, got value"
            )
        total = sum(math.prod(shape) for shape in self.shapes.values())
        kept = total - self.pruned_count(self.initial)
        budgets = layer_budgets(self.shapes, kept, floor=self.settings.floor)
        sizes = magnitudes(self.initial)
        self._chosen = {n: top(sizes[n], budgets[n]) for n in self.shapes}

    def asks(
        self, server_round: int, *, connected: Nodes, sampled: Nodes
    ) -> Ask | None:
        """Ask the sampled nodes at each adjustment."""
        del connected
        if due(server_round, self.every) and self._share(server_round) > 0:
            return Ask(nodes=sampled, measure="gradient", current=True)
        return None

    def masks(self, sampled: Nodes, weights: Params, server_round: int) -> Masks:
        """Return the mask, adjusted if there are new gradients."""
        del sampled
        assert self._chosen is not None
        if self._measured.weight:
            share, gradients = self._share(server_round), self._measured.take()
            sizes = magnitudes(weights)
            self._chosen = {
                name: adjusted(keep, sizes[name], gradients[name], share)
                for name, keep in self._chosen.items()
            }
        return self._chosen

    def _share(self, server_round: int) -> float:
        """Return the share to exchange: always the same without an end."""
        if self.until is None:
            return self.replaced
        if server_round > self.until:
            return 0.0
        past = (server_round - 1) / max(1, self.until)
        return self.replaced / 2 * (1 + math.cos(math.pi * past))


def layer_budgets(
    shapes: Mapping[str, tuple[int, ...]], kept: int, *, floor: float = 0.0
) -> dict[str, int]:
    """Divide the kept weights among layers by Erdos-Renyi-Kernel.

    A layer's density is proportional to the sum of its dimensions over their product
    (arXiv:1911.11134, section 3), at most 1. A layer keeps at least the share `floor`
    and one weight. Vectors are kept whole. If `kept` is too small for all that, the
    error is a MaskError.
    """
    sizes = np.array([math.prod(shape) for shape in shapes.values()], np.int64)
    whole = np.array([len(shape) < 2 for shape in shapes.values()])
    least = np.where(whole, sizes, np.maximum(1, np.ceil(floor * sizes))).astype(int)
    least = np.minimum(least, sizes)
    if not least.sum() <= kept <= sizes.sum():
        raise MaskError(
            f"expected to keep {least.sum()} (the vectors and the minimum of every "
            f"layer) to {sizes.sum()} weights, got {kept}; prune less, or lower the "
            "floor"
        )
    widths = np.array([sum(shape) for shape in shapes.values()], np.float64)
    low, high = 0.0, float(sizes.sum())
    for _ in range(200):  # bisection for the scale at which the budgets sum to `kept`
        scale = (low + high) / 2
        over = np.clip(scale * widths, least, sizes).sum() > kept
        low, high = (low, scale) if over else (scale, high)
    quotas = np.clip(low * widths, least, sizes)
    budgets = np.floor(quotas + 1e-9).astype(int)
    for index in np.argsort(budgets - quotas, kind="stable"):  # largest remainders
        if budgets.sum() < kept and budgets[index] < sizes[index]:
            budgets[index] += 1
    return dict(zip(shapes, budgets.tolist(), strict=True))


def adjusted(keep: Mask, size: Float32, gradient: Float32, share: float) -> Mask:
    """Drop a share of the smallest kept weights of a tensor and grow as many others.

    They grow where the gradient is largest; one that was dropped may grow again at
    once. `size` and `gradient` are magnitudes.
    """
    kept = int(np.count_nonzero(keep))
    count = int(share * kept)
    if count == 0:
        return keep
    stay = top(np.where(keep, size, -np.inf).astype(np.float32), kept - count)
    grown = top(np.where(stay, -np.inf, gradient).astype(np.float32), count)
    return stay | grown


def top(scores: Float32, count: int) -> Mask:
    """Keep the `count` largest entries; among equal entries the first win."""
    keep = np.zeros(scores.size, np.bool_)
    order = np.argsort(-scores.reshape(-1), kind="stable")
    keep[order[:count]] = True
    return keep.reshape(scores.shape)
