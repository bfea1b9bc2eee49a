"""The server's half of the method, without Flower: frames in, masks out.

Data moves one way: exploration replies -> guidance -> scores -> mask.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr import mask as masking
from autoflip_flwr.codec import QuantizedGuidance
from autoflip_flwr.errors import ExplorationError, SettingsError
from autoflip_flwr.groups import Limits, Units
from autoflip_flwr.guidance import Rescaling, Statistics, rescaling
from autoflip_flwr.parallel import parallel_map
from autoflip_flwr.scores import SCORES
from autoflip_flwr.settings import PruningSettings
from autoflip_flwr.store import GuidanceStore
from autoflip_flwr.types import Masks, Params, Scores


class Pruner:
    """Holds what the explorers found and makes the mask of a round.

    Parameters
    ----------
    initial : mapping of name -> array
        The prunable weights everyone explored from (`W0`).
    settings : PruningSettings
    directory : Path
        Where the local guidance lives.
    units : Units, optional
        The model's units, where whole ones are to be pruned.

    Notes
    -----
    Memory does not grow with the number of explorers: their matrices stay on disk,
    and the mean over all of them is kept as one running sum. A round's guidance is
    summed tensor by tensor out of the explorers' one-byte codes.
    """

    def __init__(
        self,
        initial: Params,
        settings: PruningSettings,
        directory: Path,
        units: Units | None = None,
    ) -> None:
        self.settings = settings
        self._units = units
        self._initial: dict[str, NDArray[np.generic]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._directory = directory
        self._masks: Masks | None = None
        self.restart(initial)

    @property
    def explorers(self) -> int:
        """How many nodes have explored."""
        return len(self._store)

    def still(self) -> list[str]:
        """Return the names of tensors that moved for no explorer."""
        found = [self._store.statistics(node_id) for node_id in self._store]
        return [n for n in self._shapes if not any(each.high[n] for each in found)]

    def restart(self, initial: Params) -> None:
        """Forget all guidance: everyone explores again, from `initial`."""
        masking.check_floor(
            [np.size(value) for value in initial.values()],
            threshold=self.settings.threshold,
            mode=self.settings.mode,
            floor=self.settings.floor,
        )
        self._check_units(initial)
        self._initial = dict(initial)
        self._shapes = {name: np.shape(value) for name, value in initial.items()}
        self._store = GuidanceStore(self._directory, self._shapes)
        self._store.clear()
        self._population: dict[str, NDArray[np.float32]] | None = None
        self._masks = None

    def add(self, node_id: int, frame: bytes) -> None:
        """Take a node's local guidance.

        Raises
        ------
        WireError
            If the frame does not fit the model; nothing has changed.
        """
        replaced = node_id in self._store
        guidance = self._store.put(node_id, frame)
        self._masks = None
        if replaced:
            self._population = None  # summed anew from disk when next needed
        elif self._population is not None or len(self._store) == 1:
            self._add_to_population(node_id, guidance)

    def masks(self, node_ids: Sequence[int]) -> Masks:
        """Make the mask for the sampled nodes (Eq. 3, Eq. 4).

        The guidance is ``(1 - mu) * mean over the sampled + mu * mean over all
        explorers``. A sampled node that never explored counts as the mean of all.

        Raises
        ------
        ExplorationError
            If nobody has explored.
        MaskError
            If the mask would cut a layer off.
        """
        if self.explorers == 0:
            raise ExplorationError("expected local guidance of one node or more, got 0")
        sampled = [node_id for node_id in node_ids if node_id in self._store]
        missing = 1 - len(sampled) / len(node_ids) if node_ids else 1.0
        mu = self.settings.population_weight
        share = mu + (1 - mu) * missing
        if share == 1.0 and self._masks is not None:
            return self._masks  # one mask for all rounds until somebody explores
        scores = self._scores(sampled, share)
        masks = masking.from_scores(
            scores,
            threshold=self.settings.threshold,
            mode=self.settings.mode,
            floor=self.settings.floor,
            units=self._unit_masks(scores),
            overwrite=True,
        )
        masking.check_layers(masks)
        self._masks = masks if share == 1.0 else None
        return masks

    def _unit_masks(self, scores: Scores) -> Masks | None:
        """Spend the units' share of what is pruned; None without units."""
        if self._units is None:
            return None
        settings = self.settings
        count = masking.pruned_count(
            scores, threshold=settings.threshold, mode=settings.mode
        )
        keep = self._units.choose(
            scores, budget=int(settings.units * count), limits=_limits(settings)
        )
        return self._units.masks(keep, scores)

    def _check_units(self, initial: Params) -> None:
        """Refuse units that are unknown, or too many, before there are scores."""
        settings, units = self.settings, self._units
        if settings.units == 0:
            self._units = None
            return
        if units is None:
            raise SettingsError(
                f"pruning.units {settings.units} prunes whole units, for which the "
                "strategy needs the model: AutoFLIP(..., model=Net(), "
                "example_inputs=one_batch)"
            )
        if settings.mode != "value":  # there the scores say how many
            count = masking.pruned_count(
                initial, threshold=settings.threshold, mode=settings.mode
            )
            budget = int(settings.units * count)
            units.check_budget(initial, budget=budget, limits=_limits(settings))

    def _scores(
        self, sampled: Sequence[int], population_share: float
    ) -> dict[str, NDArray[np.float32]]:
        score = SCORES[self.settings.score]
        local = [self._store.get(n) for n in sampled] if population_share < 1 else []
        found = [self._store.statistics(n) for n in sampled]
        everyone = self._population_sum() if population_share > 0 else {}
        every = [self._store.statistics(node_id) for node_id in self._store]

        def one(name: str) -> NDArray[np.float32]:
            total = np.zeros(self._size(name), np.float32)
            if local:
                scale = self._rescaling(found, name)
                _accumulate(total, name, local, scale, 1 - population_share)
            if everyone:
                mean = self._population_rescaling(every, name)
                total += np.float32(population_share * mean.scales[0]) * everyone[name]
                total += np.float32(population_share * mean.offset)
            np.maximum(total, 0, out=total)  # rounding may leave a hair below zero
            initial = self._initial[name].reshape(-1)
            return score(total, initial).reshape(self._shapes[name])

        return dict(zip(self._shapes, parallel_map(one, self._shapes), strict=True))

    def _population_sum(self) -> Mapping[str, NDArray[np.float32]]:
        """Sum of all explorers' matrices, for `client` each divided by its mean."""
        if self._population is None:
            for node_id in self._store:
                self._add_to_population(node_id, self._store.get(node_id))
        assert self._population is not None
        return self._population

    def _add_to_population(self, node_id: int, guidance: QuantizedGuidance) -> None:
        if self._population is None:
            self._population = {
                name: np.zeros(self._size(name), np.float32) for name in self._shapes
            }
        population = self._population
        if self.settings.normalization == "client":
            alone = [self._store.statistics(node_id)]
            scale = rescaling(alone, next(iter(self._shapes)), normalization="client")
        else:
            scale = Rescaling([1.0], 0.0)
        parallel_map(
            lambda name: _accumulate(population[name], name, [guidance], scale, 1.0),
            self._shapes,
        )

    def _rescaling(self, explorers: Sequence[Statistics], name: str) -> Rescaling:
        return rescaling(explorers, name, normalization=self.settings.normalization)

    def _population_rescaling(
        self, explorers: Sequence[Statistics], name: str
    ) -> Rescaling:
        """How the running sum becomes the normalized mean over all explorers."""
        if self.settings.normalization == "client":
            return Rescaling([1.0 / len(explorers)], 0.0)
        return self._rescaling(explorers, name)

    def _size(self, name: str) -> int:
        return int(np.prod(self._shapes[name], dtype=np.int64))


def _limits(settings: PruningSettings) -> Limits:
    return Limits(
        floor=settings.floor,
        min_units=settings.min_units,
        multiple=settings.unit_multiple,
    )


def _accumulate(
    total: NDArray[np.float32],
    name: str,
    matrices: Sequence[QuantizedGuidance],
    rescale: Rescaling,
    weight: float,
) -> None:
    """Add ``weight * (sum_k scale_k * G_k + offset)`` to `total`, flat, in place."""
    block = 1 << 17  # in the cache, and long enough for threads not to wait in turn
    tables = [
        (matrix.tables[name] * np.float32(scale * weight), matrix.codes[name])
        for scale, matrix in zip(rescale.scales, matrices, strict=True)
    ]
    buffer = np.empty(min(block, total.size), np.float32)
    for start in range(0, total.size, block):
        part = total[start : start + block]
        part += np.float32(rescale.offset * weight)
        values = buffer[: part.size]
        for table, codes in tables:
            np.take(table, codes[start : start + block], out=values, mode="clip")
            part += values
