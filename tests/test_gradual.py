"""A density that falls: Eq. 1 of Zhu and Gupta, and the masks that follow it."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inprocess import LocalGrid, net, run, seeded, toy_app
from preparing import prepared
from torch import nn

from autoflip_flwr import AutoFLIP, Checkpointed, Magnitude, Pruner, PruningSettings
from autoflip_flwr.method.mask import density as density_of
from autoflip_flwr.method.schedule import density

NODES = [11, 12, 13]


@pytest.mark.parametrize(
    ("server_round", "expected"),
    [(1, 0.6), (2, 0.36875), (3, 0.25), (4, 0.20625), (5, 0.2), (9, 0.2)],
)
def test_the_density_by_hand(server_round, expected):
    """0.2 + 0.4 * (1, 27/64, 1/8, 1/64, 0)."""
    found = density(server_round, first=0.6, final=0.2, rounds=4)
    assert found == pytest.approx(expected)


@given(first=st.floats(0.01, 1), final=st.floats(0.01, 1), rounds=st.integers(0, 30))
def test_it_never_rises_and_ends_at_the_final_one(first, final, rounds):
    every = [density(n, first=first, final=final, rounds=rounds) for n in range(1, 33)]
    assert all(a >= b >= final for a, b in pairwise(every))
    assert every[-1] == final
    assert rounds == 0 or every[0] == pytest.approx(max(first, final))


class Smallest(Pruner):
    """Cuts at the threshold of the round."""

    def masks(self, sampled, weights, server_round):
        sizes = {name: np.abs(value) for name, value in weights.items()}
        return self.cut(sizes, threshold=self.threshold_of(server_round))


WEIGHTS = {
    "w": np.arange(1, 81, dtype=np.float32).reshape(8, 10),
    "b": np.zeros(20, np.float32),
}


def kept(pruner, server_round):
    masks = pruner.masks([1], WEIGHTS, server_round)
    return {name: int(keep.sum()) for name, keep in masks.items()}


def test_a_mask_of_each_round_keeps_vectors_and_the_largest():
    """80, 57, 45, 41 and 40 of 100, of which the 20 biases are kept first."""
    settings = PruningSettings(threshold=0.6, initial_density=0.8, gradual_rounds=4)
    pruner = prepared(Smallest(), WEIGHTS, settings)
    found = [kept(pruner, n) for n in range(1, 6)]
    assert found == [{"w": n, "b": 20} for n in (60, 37, 25, 21, 20)]
    last = pruner.masks([1], WEIGHTS, 9)["w"]
    assert np.flatnonzero(last).tolist() == [*range(60, 80)]


def test_vectors_can_be_pruned_and_a_ratio_can_fall_too():
    settings = PruningSettings(
        threshold=4.0, mode="compression", gradual_rounds=2, vectors=True, floor=0.05
    )
    pruner = prepared(Smallest(), WEIGHTS, settings)
    assert [kept(pruner, n) for n in (1, 2, 3)] == [
        {"w": 59, "b": 1},
        {"w": 28, "b": 1},
        {"w": 24, "b": 1},
    ]


@pytest.mark.parametrize(
    ("rounds", "falling"),
    [(150, 75), (41, 20), (40, 20), (27, 20), (20, 15), (3, 2), (1, 0), (None, 0)],
)
def test_the_density_falls_in_half_of_a_long_run_and_longer_in_a_short_one(
    rounds, falling
):
    settings = PruningSettings(threshold=0.75)
    pruner = prepared(Smallest(), WEIGHTS, settings, rounds=rounds)
    assert settings.falling_rounds(rounds) == falling
    assert pruner.threshold_of(falling + 1) == 0.75
    assert falling == 0 or pruner.threshold_of(falling) < 0.75


def test_vectors_that_are_most_of_what_is_kept_are_pruned_too():
    """20 biases are half of 40 kept parameters, and more than half of 39."""
    some, most = (
        kept(prepared(Smallest(), WEIGHTS, PruningSettings(threshold=t)), 99)
        for t in (0.6, 0.61)
    )
    assert some == {"w": 20, "b": 20}
    assert most == {"w": 38, "b": 1}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_start_tells_the_number_of_rounds(tmp_path, checkpointed):
    strategy = AutoFLIP(threshold=0.5)
    densities = []

    def note(server_round, arrays):
        if server_round:
            densities.append(density_of(strategy.rounds.plan.masks))

    whole = Checkpointed(strategy, tmp_path / "run") if checkpointed else strategy
    run(whole, LocalGrid(toy_app(), NODES), net(), 6, after_round=note)
    expected = [0.6, 0.5422, 0.5125, 0.5016, 0.5, 0.5]
    assert densities == pytest.approx(expected, abs=0.003)


def test_a_baseline_has_its_own_schedule():
    strategy = AutoFLIP(pruner=Magnitude(dense_rounds=1))
    run(strategy, LocalGrid(toy_app(), NODES), net(), 2)
    assert strategy.rounds.density == pytest.approx(0.2, abs=0.01)


def test_vectors_are_pruned_where_the_floor_leaves_no_room_for_them():
    """700 biases are under half of 1,510 kept, but the floor takes 1,000."""
    weights = {"w": np.ones((1000, 100), np.float32), "b": np.ones(700, np.float32)}
    pruner = prepared(Smallest(), weights, PruningSettings(threshold=0.985))
    assert sum(int(k.sum()) for k in pruner.masks([1], weights, 99).values()) == 1510


def test_a_density_that_has_nothing_to_fall_is_the_final_one_exactly():
    pruner = prepared(Smallest(), WEIGHTS, PruningSettings(threshold=0.3))
    assert {pruner.threshold_of(n) for n in range(1, 30)} == {0.3}


class Words(nn.Module):
    """Looks six of forty words up, of which the others are larger."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, 8)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            self.words.weight[6:] *= 4

    def forward(self, x):
        return self.head(self.words(x.argmax(dim=1)).tanh())


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2),
        partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
    ],
    ids=["sgd", "sgd with weight decay", "adamw"],
)
def test_words_that_no_client_has_go_first_whatever_their_size(optimizer):
    def words():
        return seeded(Words)

    strategy = AutoFLIP(threshold=0.8, seed=0)
    run(strategy, LocalGrid(toy_app(words, optimizer=optimizer), NODES), words(), 6)
    keep = strategy.rounds.plan.masks["words.weight"]
    assert not keep[6:].any()
    assert keep[:6].mean() > 0.8


def test_a_run_that_goes_on_knows_which_words_no_client_has(tmp_path):
    def after(folder, rounds):
        strategy = AutoFLIP(
            threshold=0.8,
            seed=0,
            pruning=PruningSettings(gradual_rounds=3),
            store=folder / "guidance",
        )
        app = toy_app(lambda: seeded(Words))
        grid = LocalGrid(app, NODES)
        seen, _ = run(Checkpointed(strategy, folder), grid, seeded(Words), rounds)
        return seen[-1]

    expected = after(tmp_path / "whole", 6)
    after(tmp_path / "parts", 2)
    for name, value in after(tmp_path / "parts", 6).items():
        np.testing.assert_array_equal(value, expected[name])
    words = expected["words.weight"]
    assert words[:6].any()
    assert not words[6:].any()
