"""Agreement of clients: votes, signs, and how they mix with the score."""

import numpy as np
import pytest
from flat import PLAIN
from numpy.testing import assert_allclose, assert_array_equal
from preparing import added, prepared

from autoflip_flwr.errors import SettingsError
from autoflip_flwr.method import mask
from autoflip_flwr.method.agreement import MEMORY, Signs, mixed
from autoflip_flwr.pruners import AutoFlipPruner
from autoflip_flwr.settings import PruningSettings
from autoflip_flwr.wire import codec

INITIAL = {"w": np.ones((2, 2), np.float32), "b": np.ones(2, np.float32)}


def explorer(*values):
    w, b = np.float32(values[:4]).reshape(2, 2), np.float32(values[4:])
    return codec.quantize({"w": w, "b": b})


def pruner_of(directory, explorers, **settings):
    chosen = {
        **PLAIN,
        "threshold": 0.5,
        "population_weight": 1.0,
        "floor": 0.0,
        **settings,
    }
    pruner = prepared(AutoFlipPruner(), INITIAL, PruningSettings(**chosen), directory)
    for node_id, frame in enumerate(explorers):
        added(pruner, node_id, frame, 1.0, INITIAL)
    return pruner


def kept(pruner):
    masks = pruner.masks([0], INITIAL, 1)
    return [*masks["w"].ravel().tolist(), *masks["b"].tolist()]


#: Three of four explorers move the first three entries, a little; the last one moves
#: the other three a hundred times as far as anything else it or they moved.
FEW_SHOUT = [explorer(5, 6, 7, 1, 2, 3)] * 3 + [explorer(1, 2, 3, 500, 600, 700)]


def test_votes_count_explorers_not_how_far_they_went(tmp_path):
    by_guidance = pruner_of(tmp_path / "a", FEW_SHOUT, normalization="global")
    assert kept(by_guidance) == [False] * 3 + [True] * 3
    by_vote = pruner_of(
        tmp_path / "b",
        FEW_SHOUT,
        normalization="global",
        agreement="vote",
        agreement_weight=1.0,
    )
    assert kept(by_vote) == [True] * 3 + [False] * 3


def test_a_vote_of_no_weight_changes_nothing(tmp_path):
    plain = pruner_of(tmp_path / "a", FEW_SHOUT)
    voted = pruner_of(tmp_path / "b", FEW_SHOUT, agreement="vote", agreement_weight=0.0)
    assert kept(plain) == kept(voted)


def test_who_explores_again_votes_again(tmp_path):
    pruner = pruner_of(tmp_path, FEW_SHOUT, agreement="vote", agreement_weight=1.0)
    kept(pruner)
    for node_id in (0, 1, 2):
        added(pruner, node_id, FEW_SHOUT[3], 1.0, INITIAL)
    assert kept(pruner) == [False] * 3 + [True] * 3


def test_signs_average_over_the_rounds_that_kept_an_entry():
    signs = Signs({"w": (3,)})
    assert signs.of() is None
    signs.learn(np.float32([1.0, 0.5]), {"w": np.array([True, True, False])})
    # the third was never kept: the mean of the others, (1 + 0.5) / 2
    assert_allclose(signs.of()["w"], [1.0, 0.5, 0.75])
    signs.learn(np.float32([0.0, 0.2]), {"w": np.array([True, False, True])})
    # the first: 0.8 * 1 + 0.2 * 0; the second rests; the third begins
    assert MEMORY == 0.8
    assert_allclose(signs.of()["w"], [0.8, 0.5, 0.2], rtol=1e-6)


def test_entries_that_clients_pull_apart_make_room(tmp_path):
    """Kept at first by their guidance; no two clients move them the same way."""
    frames = [explorer(5, 6, 7, 4, 4.5, 4.9)]
    pruner = pruner_of(tmp_path, frames, agreement="sign", agreement_weight=0.9)
    assert kept(pruner) == [True] * 3 + [False] * 3
    masks = pruner.masks([0], INITIAL, 1)
    pruner.learn(np.float32([0.0, 1.0, 1.0]), masks)
    # neutral is 2/3 for those never kept: the best of them takes the first's place
    assert kept(pruner) == [False, True, True, False, False, True]


def test_a_mixture_by_hand():
    scores = {"w": np.float32([0.0, 1.0, 5.0])}  # mean 2
    found = mixed(scores, {"w": np.float32([1.0, 0.0, 0.5])}, weight=0.25)
    # 0.75 * s / (s + 2) + 0.25 * a
    expected = [0.25, 0.75 * 1 / 3, 0.75 * 5 / 7 + 0.125]
    assert_allclose(found["w"], expected, rtol=1e-6)
    assert_array_equal(scores["w"], np.float32([0.0, 1.0, 5.0]))


@pytest.mark.parametrize("agreement", ["vote", "sign"])
def test_the_density_is_kept(tmp_path, agreement):
    pruner = pruner_of(tmp_path, FEW_SHOUT, agreement=agreement, threshold=1 / 3)
    masks = pruner.masks([0], INITIAL, 1)
    assert mask.density(masks) == pytest.approx(2 / 3)
    pruner.learn(np.float32([0.1, 0.9, 0.3, 0.2]), masks)
    assert mask.density(pruner.masks([0], INITIAL, 2)) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"agreement": "quorum"}, r"agreement: expected one of .*'vote'"),
        ({"agreement_weight": 1.5}, "agreement_weight: expected a number"),
        ({"agreement": "vote", "mode": "value"}, "needs a number of weights to keep"),
    ],
)
def test_impossible_agreements_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        PruningSettings(**settings)
