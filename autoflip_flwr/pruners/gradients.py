"""Baselines that prune by nodes' gradients, of one epoch at fixed weights.

All prune to the density of the settings and keep biases and scales of normalization,
as their sources do.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from autoflip_flwr.errors import ExplorationError, by_reason
from autoflip_flwr.method.mean import WeightedMean
from autoflip_flwr.method.schedule import due
from autoflip_flwr.pruners.base import Ask, FixedPruner, Problem
from autoflip_flwr.pruners.store import Measured
from autoflip_flwr.pruners.weights import but_vectors
from autoflip_flwr.settings import BaselineSettings
from autoflip_flwr.types import Float32, Masks, Nodes, Params

#: Default number of rounds from one adjustment to the next.
EVERY = 10


class GradientPruner(FixedPruner):
    """Averages the nodes' measurements, weighted by their numbers of examples."""

    _saved: ClassVar[tuple[str, ...]] = ("_chosen", "_measured")

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
    over the batches of all local samples. It has no parameters.
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

    Parameters
    ----------
    every : int
        Rounds, 1 or more, from one adjustment to the next.

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
