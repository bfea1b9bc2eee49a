"""Baselines that exchange weights of a sparse mask, from round to round.

All begin with the largest weights of each layer, keep biases and scales of
normalization, and never change the number of kept weights in a layer.
"""

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np

from autoflip_flwr.errors import MaskError, SettingsError
from autoflip_flwr.method.mean import WeightedMean
from autoflip_flwr.method.schedule import due
from autoflip_flwr.pruners.base import Ask, Problem
from autoflip_flwr.pruners.gradients import EVERY, GradientPruner
from autoflip_flwr.pruners.store import Measured
from autoflip_flwr.pruners.weights import magnitudes
from autoflip_flwr.settings import REPLACED, BaselineSettings
from autoflip_flwr.types import Float32, FloatArray, Mask, Masks, Nodes, Params


class DynamicPruner(GradientPruner):
    """Exchanges a share of each layer's kept weights, every so many rounds."""

    _replaced: ClassVar[float]

    def __init__(
        self,
        *,
        every: int = EVERY,
        replaced: float | None = None,
        until: int | None = None,
    ) -> None:
        checked = BaselineSettings(every=every, replaced=replaced, until=until)
        self.every, self.until = int(checked.every or EVERY), checked.until
        share = checked.replaced
        self.replaced = self._replaced if share is None else share

    def prepare(self, problem: Problem) -> None:
        """Check that there can be a mask."""
        super().prepare(problem)
        if self.settings.mode == "value":
            raise SettingsError(
                f"{type(self).__name__.lower()} needs the number of weights to keep: "
                "mode quantile or compression, got value"
            )
        self._largest(self.initial)

    def asks(
        self, server_round: int, *, connected: Nodes, sampled: Nodes
    ) -> Ask | None:
        """Ask the sampled nodes at each adjustment."""
        del connected
        if due(server_round, self.every) and self._share(server_round) > 0:
            return Ask(nodes=sampled, measure="gradient", current=True)
        return None

    def _largest(
        self, weights: Params, factors: Mapping[str, float] | None = None
    ) -> dict[str, Mask]:
        """Keep the largest weights of each layer; see `layer_budgets`."""
        total = sum(math.prod(shape) for shape in self.shapes.values())
        kept = total - self.pruned_count(self.initial)
        floor, sizes = self.settings.floor, magnitudes(weights)
        budgets = layer_budgets(self.shapes, kept, floor=floor, factors=factors)
        return {n: top(sizes[n], budgets[n]) for n in self.shapes}

    def _share(self, server_round: int) -> float:
        """Return the share to exchange: always the same without an end."""
        if self.until is None:
            return self.replaced
        if server_round > self.until:
            return 0.0
        past = (server_round - 1) / max(1, self.until)
        return self.replaced / 2 * (1 + math.cos(math.pi * past))


class FedDST(DynamicPruner):
    """A sparse mask that drops weights by magnitude and grows them by gradient.

    Bibikar et al., Federated Dynamic Sparse Training: Computing Less, Communicating
    Less, Yet Learning Better (arXiv:2112.09824; bibikar/feddst). The first mask keeps
    the largest weights of each layer, at the densities of Erdos-Renyi-Kernel (Evci et
    al., arXiv:1911.11134). Every `every` rounds until `until`, each layer drops its
    smallest weights. As many grow, from zero, where the mean gradient is largest; a
    weight that was just dropped may grow again. The share falls as a cosine from
    `replaced` (0.5) to 0. The authors' readme has ``replaced=0.01, every=15`` on
    CIFAR-10.

    Parameters
    ----------
    every : int
        Rounds, 1 or more, from one adjustment to the next.
    replaced : float, optional
        Share of a layer's kept weights, in [0, 1], that is exchanged at first; 0.5 by
        default.
    until : int, optional
        Last round that may adjust. None: all may, and the share stays as it is.

    Notes
    -----
    In the paper clients adjust their own masks and the server prunes their union. Here
    the server adjusts one mask by the gradients of the sampled clients, so that both
    sides know the mask and only kept values travel. A weight that grows again at once
    keeps its value; the authors' code sets it to zero.
    """

    _replaced = REPLACED["feddst"]

    def masks(self, sampled: Nodes, weights: Params, server_round: int) -> Masks:
        """Return the mask, adjusted if there are new gradients."""
        del sampled
        if self._chosen is None:
            self._chosen = self._largest(weights)
        if self._measured.weight:
            share, gradients = self._share(server_round), self._measured.take()
            sizes = magnitudes(weights)
            self._chosen = {
                name: adjusted(keep, sizes[name], gradients[name], share)
                for name, keep in self._chosen.items()
            }
        return self._chosen


class TopGradientPruner(DynamicPruner):
    """Hears of a node's gradients only the largest of each layer's pruned weights."""

    _now = 0.0  # the share to exchange in this round

    def asks(
        self, server_round: int, *, connected: Nodes, sampled: Nodes
    ) -> Ask | None:
        """Ask the sampled nodes at each adjustment."""
        self._now = self._share(server_round)
        return super().asks(server_round, connected=connected, sampled=sampled)

    def add(self, node_id: int, measured: Measured, start: Params) -> None:
        """Add the largest gradients of the weights that may return; others are 0."""
        if self._chosen is None:
            super().add(node_id, measured, start)
            return
        gradients = measured.guidance().dense()
        heard = {
            name: self._heard(
                gradients[name],
                best(~keep, gradients[name], exchanged(keep, self._now)),
            )
            for name, keep in self._chosen.items()
        }
        self._measured.add(heard, measured.examples)

    def _heard(self, gradient: Float32, largest: Mask) -> Float32:
        return np.where(largest, gradient, np.float32(0))


class FedRTS(TopGradientPruner):
    """Draws the mask from what is believed of each weight, by Thompson sampling.

    Huang et al., FedRTS: Federated Robust Pruning via Combinatorial Thompson Sampling
    (arXiv:2501.19122, TSAdj; FedPruning/FedPruning, api/distributed/fedrts). The first
    mask is that of `FedDST`. The server holds a Beta distribution for each weight,
    ``Beta(1, 1)`` at first. After a round a kept weight has the outcome

    ``x = (1 - gamma) [core of the global model] + gamma sum_k p_k [core of client k]``

    where the core are the largest kept weights of a layer, all but the share to
    exchange, and `p_k` the client's share of the examples. At an adjustment a pruned
    weight has ``x = (1 - gamma) / 2 + gamma sum_k p_k [top gradient of client k]``; as
    many are top as are to be exchanged. Then ``alpha += scale x`` and ``beta += scale
    (1 - x)``; one draw of each weight is made, and each layer keeps the largest draws,
    as many as before. The share falls as in `FedDST`.

    Its parameters are those of `FedDST`; `replaced` is 0.2 by default.

    Notes
    -----
    `gamma` 0.5, `scale` 10 and `replaced` 0.2 are the defaults of the authors' code;
    it adjusts every 10 rounds, in the first 300 of 500. There clients send the indices
    of their top gradients, of one batch after training. Here they send all gradients,
    a byte each, of one epoch before training, and the server takes the top.
    """

    _saved = (*DynamicPruner._saved, "_alpha", "_beta", "_voted")
    _replaced = REPLACED["fedrts"]
    _gamma, _scale = 0.5, 10.0

    def prepare(self, problem: Problem) -> None:
        """Believe nothing."""
        super().prepare(problem)
        self._alpha, self._beta = (
            {name: np.ones(shape, np.float32) for name, shape in self.shapes.items()}
            for _ in range(2)
        )
        self._votes = WeightedMean()  # of the clients in an open round
        self._voted: dict[str, Float32] = {}  # in the round before
        self._round = 0

    def observe(self, weights: Params, examples: float) -> None:
        """Let a client vote for the core of its own weights."""
        self._votes.add(self._core(weights, self._round + 1), examples)

    def learn(self, agreement: Float32 | None, masks: Masks) -> None:
        """Take the votes of a round that changed the model."""
        del agreement, masks
        self._voted = self._votes.take()

    def masks(self, sampled: Nodes, weights: Params, server_round: int) -> Masks:
        """Return the mask, drawn anew if there are new gradients."""
        del sampled
        if self._chosen is None:
            self._chosen = self._largest(weights)
        self._round = server_round
        self._votes.take()  # of a round that changed nothing
        voted, self._voted = self._voted, {}
        if voted and self._share(server_round) > 0:
            self._believe(self._chosen, self._core(weights, server_round), voted)
        if self._measured.weight:
            others = {name: ~keep for name, keep in self._chosen.items()}
            half = dict.fromkeys(others, np.array(0.5, np.float32))
            self._believe(others, half, self._measured.take())
            self._chosen = {n: self._drawn(n, k) for n, k in self._chosen.items()}
        return self._chosen

    def _core(self, weights: Params, server_round: int) -> dict[str, Float32]:
        """Return 1 for the largest kept weights of a layer, 0 for all others."""
        assert self._chosen is not None
        share, cores = self._share(server_round), {}
        for name, keep in self._chosen.items():
            count = int(np.count_nonzero(keep)) - exchanged(keep, share)
            cores[name] = best(keep, np.abs(weights[name]), count).astype(np.float32)
        return cores

    def _heard(self, gradient: Float32, largest: Mask) -> Float32:
        del gradient  # where it is large, not how large
        return largest.astype(np.float32)

    def _believe(self, where: Masks, own: Params, votes: Params) -> None:
        """Add the outcomes of some weights to their distributions."""
        for name, these in where.items():
            outcome = (1 - self._gamma) * own[name] + self._gamma * votes[name]
            self._alpha[name][these] += self._scale * outcome[these]
            self._beta[name][these] += self._scale * (1 - outcome[these])

    def _drawn(self, name: str, keep: Mask) -> Mask:
        """Keep the largest draws of a tensor, as many as before."""
        if keep.all():
            return keep
        draws = self.rng.beta(self._alpha[name], self._beta[name])
        return top(draws, int(np.count_nonzero(keep)))


class FedTiny(TopGradientPruner):
    """Chooses among coarsely pruned candidates, then adjusts one block at a time.

    Huang et al., Distributed Pruning Towards Tiny Neural Networks in Federated Learning
    (arXiv:2212.01977; FedPruning/FedPruning, api/distributed/fedtiny in its history and
    fedtinyclean). Candidates keep the largest weights, with other densities of the
    layers each; the clients' data say which is taken. Then, every `every` rounds until
    `until`, one of five blocks of layers is adjusted, the last one first. Each client
    names the largest gradients of pruned weights, as many as may be exchanged; their
    mean says which grow, from zero, and as many of the smallest weights go. The share
    falls as in `FedDST`.

    Its parameters are those of `FedDST`; `replaced` is 0.2 by default.

    Notes
    -----
    In the source clients send BatchNorm statistics of each candidate, get their mean
    and send each candidate's loss. Here a measurement is of one model and has one
    number for each weight. So all clients measure ``|gradient x weight|`` of the
    initial model once, and the candidate is chosen whose pruned weights have the least
    sum: the loss to the first order, with the statistics of the batches. The ten
    candidates are the densities of Erdos-Renyi-Kernel, and nine times these with a
    random factor of 0.5 to 1.5 for each layer. Gradients are magnitudes, of one epoch
    before training; the source averages them with their signs, of one batch. `replaced`
    0.2 is the authors'; they adjust every 10 rounds.
    """

    _replaced = REPLACED["fedtiny"]
    _candidates, _blocks = 10, 5

    def asks(
        self, server_round: int, *, connected: Nodes, sampled: Nodes
    ) -> Ask | None:
        """Ask all nodes once, then the sampled ones at each adjustment."""
        if self._chosen is None:
            return Ask(nodes=connected, measure="saliency")
        return super().asks(server_round, connected=connected, sampled=sampled)

    def masks(self, sampled: Nodes, weights: Params, server_round: int) -> Masks:
        """Return the best candidate, later the mask with one block adjusted."""
        del sampled
        if self._chosen is None:
            saliency = self._measured.take()

            def kept(masks: Masks) -> float:
                return sum(float(saliency[n][keep].sum()) for n, keep in masks.items())

            self._chosen = max(self._pool(weights), key=kept)
        elif self._measured.weight:
            share, gradients = self._share(server_round), self._measured.take()
            sizes = magnitudes(weights)
            self._chosen = dict(self._chosen)
            for name in self._block((server_round - 1) // self.every - 1):
                keep = self._chosen[name]
                self._chosen[name] = adjusted(keep, sizes[name], gradients[name], share)
        return self._chosen

    def _pool(self, weights: Params) -> Iterator[dict[str, Mask]]:
        yield self._largest(weights)
        for _ in range(self._candidates - 1):
            drawn = self.rng.uniform(0.5, 1.5, len(self.shapes)).tolist()
            yield self._largest(weights, dict(zip(self.shapes, drawn, strict=True)))

    def _block(self, adjustment: int) -> list[str]:
        """Return the layers of an adjustment, numbered from 0: the last ones first."""
        layers = [name for name, shape in self.shapes.items() if len(shape) > 1]
        count = min(self._blocks, len(layers)) or 1
        ends = [len(layers) * i // count for i in range(count + 1)]
        index = count - 1 - adjustment % count
        return layers[ends[index] : ends[index + 1]]


def layer_budgets(
    shapes: Mapping[str, tuple[int, ...]],
    kept: int,
    *,
    floor: float = 0.0,
    factors: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Divide the kept weights among layers by Erdos-Renyi-Kernel.

    A layer's density is proportional to the sum of its dimensions over their product
    (arXiv:1911.11134, section 3), and to its factor if there are any; at most 1. A
    layer keeps at least the share `floor` and one weight. Vectors are kept whole. If
    `kept` is too small for all that, the error is a MaskError.
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
    if factors is not None:
        widths *= [factors[name] for name in shapes]
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
    count = int(share * np.count_nonzero(keep))
    if count == 0:
        return keep
    stay = best(keep, size, int(np.count_nonzero(keep)) - count)
    return stay | best(~stay, gradient, count)


def exchanged(keep: Mask, share: float) -> int:
    """Return how many weights of a tensor may go, and as many pruned ones return."""
    kept = int(np.count_nonzero(keep))
    return min(int(share * kept), keep.size - kept)


def best(where: Mask, scores: FloatArray, count: int) -> Mask:
    """Keep the `count` largest of some entries."""
    return top(np.where(where, scores, -np.inf), count)


def top(scores: FloatArray, count: int) -> Mask:
    """Keep the `count` largest entries; among equal entries the first win."""
    keep = np.zeros(scores.size, np.bool_)
    order = np.argsort(-scores.reshape(-1), kind="stable")
    keep[order[:count]] = True
    return keep.reshape(scores.shape)
