"""Baselines that ask nodes for gradients, at fixed weights and over one epoch.

All are pruned to the density of the settings. Biases and scales of normalization are
kept, as in the sources.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.errors import ExplorationError, MaskError, SettingsError
from autoflip_flwr.method.exchange import EVERY, adjusted, cosine_share, due, top
from autoflip_flwr.method.mean import WeightedMean
from autoflip_flwr.pruners.base import Ask, FixedPruner, Problem
from autoflip_flwr.pruners.store import Measured
from autoflip_flwr.pruners.weights import but_vectors, magnitudes
from autoflip_flwr.settings import BaselineSettings
from autoflip_flwr.types import Masks, Params


class GradientPruner(FixedPruner):
    """Means what nodes measure, weighted by their examples."""

    def prepare(self, problem: Problem) -> None:
        """Begin without a measurement."""
        super().prepare(problem)
        self._measured = WeightedMean()

    def state(self) -> dict[str, Any]:
        """Return the mask, and what has not gone into it."""
        return {**super().state(), "measured": self._measured.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        super().restore(state)
        self._measured.restore(state["measured"])

    def add(self, node_id: int, measured: Measured, start: Params) -> None:
        """Add to the weighted mean."""
        del node_id, start
        self._measured.add(measured.guidance().dense(), measured.examples)

    def check(self, reasons: Mapping[int, str]) -> None:
        """Refuse to go on without any mask."""
        if self._chosen is None and not self._measured.weight:
            raise ExplorationError(
                f"none of {len(reasons)} nodes measured its gradients, so no mask can "
                f"be made; reasons by node: {dict(reasons)}"
            )


class SSFL(GradientPruner):
    """One mask from the saliency |gradient x weight| of all clients at the start.

    Ohib et al., SSFL: Discovering Sparse Unified Subnetworks at Initialization for
    Efficient Federated Learning (arXiv:2405.09037): ranked over all layers, the mean
    weighted by the clients' examples; here the gradient is the mean over the batches
    of all local samples.
    """

    def asks(
        self, server_round: int, *, connected: Sequence[int], sampled: Sequence[int]
    ) -> Ask | None:
        """Ask all nodes, once."""
        del server_round, sampled
        if self._chosen is not None:
            return None
        return Ask(nodes=connected, measure="saliency")

    def masks(
        self, sampled: Sequence[int], weights: Params, server_round: int
    ) -> Masks:
        """Return the one mask."""
        del sampled, weights, server_round
        if self._chosen is None:
            measured = self._measured.take()
            self._chosen = self.cut(but_vectors(measured), overwrite=True)
        return self._chosen


class PruneFL(GradientPruner):
    """Squared gradient over time: first at one client, then with regrowth.

    Jiang et al., Model Pruning Enables Efficient Federated Learning on Edge Devices
    (arXiv:1909.12326; jiangyuang/PruneFL). Importance is ``g^2 / t``; `t` is the time
    a parameter costs, here one share for its bytes and one for each thirty
    multiplications it is used for, which fits the authors' constants for the second
    convolution of their FEMNIST network; as in their constants the first layer costs
    bytes alone. In an adjustment all pruned weights compete with the smallest 30 % of
    each layer's kept ones; a weight that comes back has the value it had.

    Notes
    -----
    The authors let the number of weights follow from the importance; here it is the
    density asked for. Their first client prunes step by step for hundreds of steps;
    here it measures once, at `W0`.
    """

    takes_units = True
    restores = True
    _competing = 0.3
    _uses_per_share = 30.0

    def __init__(self, *, every: int = EVERY) -> None:
        self.every = int(BaselineSettings(every=every).every or EVERY)

    def prepare(self, problem: Problem) -> None:
        """Note what each parameter costs."""
        super().prepare(problem)
        # Without the model all cost the same. Weights stand in the order of their use.
        uses = dict(self.units.uses) if self.units else {}
        uses.pop(next(iter(uses), ""), None)
        self._time = {
            name: 1 + uses.get(name, 0) / self._uses_per_share for name in self.shapes
        }

    def asks(
        self, server_round: int, *, connected: Sequence[int], sampled: Sequence[int]
    ) -> Ask | None:
        """Ask one node at the start, and those sampled at every adjustment."""
        if self._chosen is None:
            return Ask(nodes=connected[:1], measure="squared-gradient")
        if due(server_round, self.every):
            return Ask(nodes=sampled, measure="squared-gradient", current=True)
        return None

    def masks(
        self, sampled: Sequence[int], weights: Params, server_round: int
    ) -> Masks:
        """Return the mask, adjusted where new gradients have come."""
        del sampled, server_round
        if self._measured.weight:
            scores = {
                name: squared / np.float32(self._time[name])
                for name, squared in self._measured.take().items()
            }
            if self._chosen is not None:
                self._protect(scores, weights, self._chosen)
            self._chosen = self.cut(but_vectors(scores), overwrite=True)
        assert self._chosen is not None
        return self._chosen

    def _protect(
        self, scores: dict[str, NDArray[np.float32]], weights: Params, kept: Masks
    ) -> None:
        """Keep all but the smallest kept weights out of the contest."""
        for name, keep in kept.items():
            size = magnitudes({name: weights[name]})[name]
            active = size[keep]
            going = int(self._competing * active.size)
            if going < active.size:
                bar = np.partition(active, going)[going]
                scores[name][keep & (size >= bar)] = np.inf


class FedDST(GradientPruner):
    """A sparse mask that drops by magnitude and grows by gradient.

    Bibikar et al., Federated Dynamic Sparse Training: Computing Less, Communicating
    Less, Yet Learning Better (arXiv:2112.09824; bibikar/feddst). It starts with the
    largest weights of the random start, layer by layer at the densities of
    Erdos-Renyi-Kernel (Evci et al., arXiv:1911.11134). Every `every` rounds, until
    round `until`, the smallest weights of a layer are dropped and as many grow, from
    zero, where the mean gradient is largest; what was just dropped may come back. The
    share falls as a cosine from `replaced` to 0.

    Notes
    -----
    In the paper clients adjust their own masks and the server cuts their union back.
    Here the server adjusts the one mask by the gradients of the sampled clients, so
    that both sides know it and only kept values travel. A weight that comes back at
    once keeps its value, which the authors' code sets to zero.
    """

    def __init__(
        self, *, every: int = EVERY, replaced: float = 0.5, until: int | None = None
    ) -> None:
        checked = BaselineSettings(every=every, replaced=replaced, until=until)
        self.every, self.until = int(checked.every or EVERY), checked.until
        self.replaced = checked.replaced

    def prepare(self, problem: Problem) -> None:
        """Begin with the largest weights of the random start."""
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
        self, server_round: int, *, connected: Sequence[int], sampled: Sequence[int]
    ) -> Ask | None:
        """Ask those sampled, at every adjustment."""
        del connected
        if due(server_round, self.every) and self._share(server_round) > 0:
            return Ask(nodes=sampled, measure="gradient", current=True)
        return None

    def masks(
        self, sampled: Sequence[int], weights: Params, server_round: int
    ) -> Masks:
        """Return the mask, adjusted where new gradients have come."""
        del sampled
        assert self._chosen is not None
        if self._measured.weight:
            share, gradients = self._share(server_round), self._measured.take()
            sizes = magnitudes(weights)
            self._chosen = {
                name: adjusted(keep, sizes[name], gradients[name], share, back=True)
                for name, keep in self._chosen.items()
            }
        return self._chosen

    def _share(self, server_round: int) -> float:
        return cosine_share(self.replaced, server_round, until=self.until)


def layer_budgets(
    shapes: Mapping[str, tuple[int, ...]], kept: int, *, floor: float = 0.0
) -> dict[str, int]:
    """Divide kept weights among layers: Erdos-Renyi-Kernel.

    A layer's density is in proportion to the sum of its dimensions over their product
    (arXiv:1911.11134, section 3), at least `floor` and one weight, at most 1; vectors
    are kept whole.

    Returns
    -------
    dict of name -> int
        Their sum is `kept`.

    Raises
    ------
    MaskError
        If `kept` is not enough for the vectors and the least of every layer.
    """
    sizes = np.array([math.prod(shape) for shape in shapes.values()], np.int64)
    whole = np.array([len(shape) < 2 for shape in shapes.values()])
    least = np.where(whole, sizes, np.maximum(1, np.ceil(floor * sizes))).astype(int)
    least = np.minimum(least, sizes)
    if not least.sum() <= kept <= sizes.sum():
        raise MaskError(
            f"expected to keep {least.sum()} (the vectors, and the least of every "
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
