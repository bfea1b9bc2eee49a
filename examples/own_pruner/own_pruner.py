"""A pruner of your own: keep the weights that training has moved farthest.

    strategy = AutoFLIP(FedAvg(), threshold=0.8, pruner=LargestMove())

AutoFLIP asks the pruner for the mask of each round and does the rest: it packs what is
kept, drops replies that cannot be used, writes checkpoints.
"""

import numpy as np

from autoflip_flwr import Pruner


class LargestMove(Pruner):
    """Keep what has moved farthest from the start, relative to its layer.

    Before the first aggregation nothing has moved: the largest weights are kept.
    """

    def masks(self, sampled, weights, server_round):
        """Return the mask of a round, name -> bool array (True = keep)."""
        scores = {}
        for name, value in weights.items():
            moved = np.abs(value - self.initial[name])
            size = moved if moved.any() else np.abs(value)
            scores[name] = size / max(float(size.mean()), 1e-12)
        return self.cut(scores)  # at the density, floor and units of the settings
