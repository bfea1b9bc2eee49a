"""Frames in, masks out: the same as Eq. 2-4 on dense matrices."""

import tracemalloc

import numpy as np
import pytest
from flat import PLAIN
from numpy.testing import assert_array_equal
from preparing import added, prepared, rows

from autoflip_flwr.errors import ExplorationError, MaskError, WireError
from autoflip_flwr.method import mask
from autoflip_flwr.method.guidance import NORMALIZATIONS, combine
from autoflip_flwr.pruners import AutoFlipPruner
from autoflip_flwr.settings import ExplorationSettings, PruningSettings
from autoflip_flwr.wire import codec

SHAPES = {"conv": (6, 3, 3, 3), "fc": (40, 30), "bias": (40,)}
INITIAL = {
    name: np.random.default_rng(9).normal(size=shape).astype(np.float32)
    for name, shape in SHAPES.items()
}


def frame(node_id, shapes=SHAPES):
    """Guidance of one node; nodes differ in where and how far they move."""
    rng = np.random.default_rng(100 + node_id)
    return codec.quantize(
        {
            name: (10.0**-node_id * rng.lognormal(-6, 1.5, shape)).astype(np.float32)
            for name, shape in shapes.items()
        }
    )


def dense(node_id):
    return codec.dequantize(frame(node_id), SHAPES).dense()


def pruner_of(directory, explorers=(), **settings):
    chosen = {**PLAIN, "threshold": 0.7, "floor": 0.0, **settings}
    pruner = prepared(AutoFlipPruner(), INITIAL, PruningSettings(**chosen), directory)
    for node_id in explorers:
        added(pruner, node_id, frame(node_id), 1.0, INITIAL)
    return pruner


def masks_of(pruner, sampled):
    return pruner.masks(sampled, INITIAL, 1)


def reference_scores(explorers, sampled, normalization, mu, score="guidance"):
    """Score of each parameter in float64, as the equations have it."""
    everyone = combine([dense(n) for n in explorers], normalization=normalization)
    known = [n for n in sampled if n in explorers]
    local = (
        combine([dense(n) for n in known], normalization=normalization)
        if known
        else everyone
    )
    guidance = {}
    for name in SHAPES:
        population = everyone[name].astype(np.float64)
        # the mean over the sampled, those who never explored counting as everyone
        mean = (
            len(known) * local[name].astype(np.float64)
            + (len(sampled) - len(known)) * population
        ) / len(sampled)
        guidance[name] = (1 - mu) * mean + mu * population
    if score == "saliency":
        return {
            n: np.sqrt(g) * (np.abs(INITIAL[n]) + 1e-4) for n, g in guidance.items()
        }
    return guidance


def assert_keeps_the_best(masks, scores, *, pruned):
    """Exactly `pruned` entries go, none of which clearly beats one that is kept."""
    keep = np.concatenate([masks[name].ravel() for name in scores])
    score = np.concatenate([values.ravel() for values in scores.values()])
    assert int((~keep).sum()) == pruned
    assert score[~keep].max() <= score[keep].min() * (1 + 1e-4)


TOTAL = 6 * 27 + 1200 + 40


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(
    "sampled", [[0, 2], [1, 7, 3, 8], [7, 8]], ids=["known", "mixed", "unknown"]
)
def test_masks_agree_with_dense_matrices(tmp_path, sampled, normalization, mu):
    explorers = [0, 1, 2, 3]
    pruner = pruner_of(
        tmp_path, explorers, normalization=normalization, population_weight=mu
    )
    expected = reference_scores(explorers, sampled, normalization, mu)
    found = masks_of(pruner, sampled)
    assert {n: k.shape for n, k in found.items()} == SHAPES
    assert_keeps_the_best(found, expected, pruned=round(0.7 * TOTAL))


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_saliency_weighs_the_guidance_with_the_initial_weights(tmp_path, mu):
    pruner = pruner_of(tmp_path, [0, 1], score="saliency", population_weight=mu)
    expected = reference_scores([0, 1], [1], "client", mu, score="saliency")
    assert_keeps_the_best(masks_of(pruner, [1]), expected, pruned=round(0.7 * TOTAL))
    again = masks_of(pruner, [1])  # scores are written in place: not into what is held
    assert_keeps_the_best(again, expected, pruned=round(0.7 * TOTAL))


def test_staged_masks_go_by_saliency_first_and_by_the_weights_later(tmp_path):
    """Density 0.6, then 0.3; a weight that was pruned is zero and stays pruned."""
    settings = {"score": "staged", "gradual_rounds": 1, "population_weight": 1.0}
    pruner = pruner_of(tmp_path, [0, 1], **settings)
    assert pruner.asks(1, connected=[0], sampled=[0]) is not None
    first = pruner.masks([0], INITIAL, 1)
    expected = reference_scores([0, 1], [0], "client", 1.0, score="saliency")
    assert_keeps_the_best(first, expected, pruned=round(0.4 * TOTAL))
    second = pruner.masks(
        [0], INITIAL, 2
    )  # nobody trained in round 1: guidance decides
    assert_keeps_the_best(second, expected, pruned=round(0.7 * TOTAL))
    first = pruner.masks([0], INITIAL, 1)
    pruner.learn(None, first)  # this round has trained it
    assert pruner.asks(2, connected=[0], sampled=[0, 9]) is None, "9 need not explore"
    rng = np.random.default_rng(3)
    trained = {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    trained = mask.apply(trained, first)
    later = pruner.masks([0], trained, 2)
    sizes = {name: np.abs(value) for name, value in trained.items()}
    assert_keeps_the_best(later, sizes, pruned=round(0.7 * TOTAL))
    assert all((first[name] | ~keep).all() for name, keep in later.items())
    assert pruner.kept_guidance.size == TOTAL - round(0.7 * TOTAL)
    assert pruner.masks([0], INITIAL, 3) is later, "the density does not fall any more"


def test_in_a_table_of_which_clients_use_a_part_later_masks_see_what_moved(tmp_path):
    """Words 2 and 3 did not move; in 0 and 1 every second entry moved 3 times as far.

    Factors (mean 1) times sizes, in tenths: 0.33 * 1, 1 * 1 and 0.67 * 0.8, 2 * 0.8. By
    size alone word 0 would stay whole. A matrix of which all rows moved goes by size.
    """
    moved = np.tile(rows(0.05, 0.15), 4)
    initial = {"words": rows(*np.outer([0.1, 0.08, 0.5, 0.5], np.ones(8)))}
    squares = {"words": np.square(rows(moved, 2 * moved, 0 * moved, 0 * moved))}
    initial["other"], squares["other"] = initial["words"][:2], squares["words"][:2]
    settings = PruningSettings(threshold=2 / 3, gradual_rounds=1, balance="global")
    pruner = prepared(AutoFlipPruner(), initial, settings, tmp_path)
    pruner.asks(1, connected=[0], sampled=[0])
    added(pruner, 0, codec.quantize(squares), 1.0, initial)
    pruner.learn(None, pruner.masks([0], initial, 1))
    masks = pruner.masks([0], initial, 2)
    often, none = [False, True] * 4, [False] * 8
    assert_array_equal(masks["words"], [often, often, none, none])
    assert_array_equal(masks["other"], [[True] * 8, none])


def test_value_and_floor_reach_the_mask(tmp_path):
    pruner = pruner_of(
        tmp_path,
        [0],
        normalization="layer",
        mode="value",
        threshold=0.999,
        floor=0.25,
        population_weight=0.0,
    )
    found = masks_of(pruner, [0])
    # next to nothing comes near a tensor's maximum, so the floor decides: ceil(n / 4)
    assert {n: int(k.sum()) for n, k in found.items()} == {
        "conv": 41,  # ceil(162 / 4)
        "fc": 300,
        "bias": 10,
    }


def test_a_different_sample_makes_a_different_mask_without_population(tmp_path):
    pruner = pruner_of(tmp_path, [0, 1, 2], population_weight=0.0)
    assert mask.change(masks_of(pruner, [0]), masks_of(pruner, [1])) > 0.05


def test_at_population_weight_one_the_mask_is_made_once(tmp_path):
    pruner = pruner_of(tmp_path, [0, 1], population_weight=1.0)
    first = masks_of(pruner, [0])
    assert masks_of(pruner, [1, 5]) is first
    added(pruner, 2, frame(2), 1.0, INITIAL)
    later = masks_of(pruner, [0])
    expected = reference_scores([0, 1, 2], [0], "client", 1.0)
    assert_keeps_the_best(later, expected, pruned=round(0.7 * TOTAL))
    assert mask.change(first, later) > 0


def test_strangers_and_explorers_are_not_served_each_others_mask(tmp_path):
    pruner = pruner_of(tmp_path, [0, 1], population_weight=0.3)
    for sampled in ([7, 8], [1], [7, 8], [0]):  # 7 and 8 never explored
        expected = reference_scores([0, 1], sampled, "client", 0.3)
        assert_keeps_the_best(
            masks_of(pruner, sampled), expected, pruned=round(0.7 * TOTAL)
        )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("asked_before", [False, True])
def test_an_explorer_that_explores_again_replaces_its_guidance(
    tmp_path, asked_before, normalization
):
    pruner = pruner_of(
        tmp_path, [0, 1], normalization=normalization, population_weight=0.5
    )
    if asked_before:
        masks_of(pruner, [0])
    added(pruner, 0, frame(2), 1.0, INITIAL)
    added(pruner, 3, frame(3), 1.0, INITIAL)
    fresh = pruner_of(
        tmp_path / "fresh", normalization=normalization, population_weight=0.5
    )
    for node_id, explored in ((0, 2), (1, 1), (3, 3)):
        added(fresh, node_id, frame(explored), 1.0, INITIAL)
    assert pruner.explorers == 3
    assert mask.change(masks_of(fresh, [0, 3]), masks_of(pruner, [0, 3])) < 2 / TOTAL


def test_a_single_explorer_may_explore_again(tmp_path):
    pruner = pruner_of(tmp_path, [0], population_weight=1.0)
    added(pruner, 0, frame(4), 1.0, INITIAL)
    fresh = pruner_of(tmp_path / "fresh", population_weight=1.0)
    added(fresh, 0, frame(4), 1.0, INITIAL)
    for name, keep in masks_of(fresh, [0]).items():
        assert_array_equal(masks_of(pruner, [0])[name], keep)


def test_a_bad_frame_changes_nothing(tmp_path):
    pruner = pruner_of(tmp_path, [0, 1], population_weight=0.8)
    before = masks_of(pruner, [0])
    for node_id in (0, 5):
        with pytest.raises(WireError):
            added(pruner, node_id, frame(3)[:-1], 1.0, INITIAL)
    assert pruner.explorers == 2
    assert mask.change(before, masks_of(pruner, [0])) == 0


def test_without_explorers_there_is_no_mask(tmp_path):
    with pytest.raises(ExplorationError, match="one node or more, got 0"):
        masks_of(pruner_of(tmp_path), [0])


def test_a_mask_that_cuts_a_layer_off_is_refused(tmp_path):
    pruner = pruner_of(tmp_path, [0], threshold=1.0)
    with pytest.raises(MaskError, match=r"conv.*floor"):
        masks_of(pruner, [0])


def test_exploring_again_forgets_everyone_once_somebody_has(tmp_path):
    pruner = pruner_of(tmp_path, population_weight=1.0)
    pruner = prepared(
        AutoFlipPruner(),
        INITIAL,
        pruner.settings,
        tmp_path,
        exploration=ExplorationSettings(every=2),
    )
    ask = pruner.asks(1, connected=[0, 1], sampled=[0])
    assert (list(ask.nodes), ask.renew) == ([0, 1], False)
    for node_id in ask.nodes:
        added(pruner, node_id, frame(node_id), 1.0, INITIAL)
    before = masks_of(pruner, [0])
    assert pruner.asks(2, connected=[0, 1], sampled=[0]) is None
    ask = pruner.asks(3, connected=[4], sampled=[4])
    assert (list(ask.nodes), ask.renew) == ([4], True)
    assert mask.change(masks_of(pruner, [0]), before) == 0, "nobody's came yet"
    with pytest.raises(WireError):
        added(pruner, 4, frame(4)[:-1], 1.0, INITIAL)
    assert pruner.explorers == 2
    added(pruner, 4, frame(4), 1.0, INITIAL)
    fresh = pruner_of(tmp_path / "fresh", [4], population_weight=1.0)
    assert mask.change(masks_of(fresh, [4]), masks_of(pruner, [4])) == 0


def test_exploring_again_that_nobody_answers_is_asked_again_of_all(tmp_path):
    """Or the guidance of one node that joins would take the place of all."""
    exploration = ExplorationSettings(every=2)
    settings = PruningSettings(**PLAIN)
    pruner = prepared(
        AutoFlipPruner(), INITIAL, settings, tmp_path, exploration=exploration
    )
    for node_id in pruner.asks(1, connected=[0, 1], sampled=[0]).nodes:
        added(pruner, node_id, frame(node_id), 1.0, INITIAL)
    assert pruner.asks(3, connected=[0, 1], sampled=[0]).renew
    for server_round in (3, 4):  # the round begins again; the one after it
        pruner.check({0: "no reply in time", 1: "no reply in time"})
        ask = pruner.asks(server_round, connected=[0, 1, 9], sampled=[9])
        assert (list(ask.nodes), ask.renew) == ([0, 1, 9], True)
        assert pruner.explorers == 2
    added(pruner, 9, frame(9), 1.0, INITIAL)
    assert pruner.explorers == 1
    assert pruner.asks(4, connected=[0, 1, 9], sampled=[9]) is None


def test_no_sample_is_served_everyones_mask(tmp_path):
    pruner = pruner_of(tmp_path, [0, 1], population_weight=0.0)
    expected = reference_scores([0, 1], [0], "client", 1.0)
    assert_keeps_the_best(masks_of(pruner, []), expected, pruned=round(0.7 * TOTAL))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_memory_does_not_grow_with_the_explorers(tmp_path, normalization):
    shapes = {"w": (600, 400)}  # 240,000 B quantised, 960,000 B dense
    pruner = prepared(
        AutoFlipPruner(),
        {"w": np.ones((600, 400), np.float32)},
        PruningSettings(normalization=normalization),
        tmp_path,
    )
    frames = [frame(0, shapes), frame(1, shapes)]
    added(pruner, 0, frames[0], 1.0, INITIAL)
    masks_of(pruner, [0])
    tracemalloc.start()
    try:
        for node_id in range(1, 51):
            added(pruner, node_id, frames[node_id % 2], 1.0, INITIAL)
        peak = tracemalloc.get_traced_memory()[1]
        traces = tracemalloc.take_snapshot().filter_traces(
            # It interns names: the interpreter's own table may grow by megabytes here.
            [tracemalloc.Filter(False, "*/pathlib.py")]
        )
    finally:
        tracemalloc.stop()
    held = sum(trace.size for trace in traces.statistics("filename"))
    assert held < 480_000  # statistics, not even two of the fifty frames
    assert peak < 8_000_000  # a few dense matrices at a time, not fifty


def test_a_matrix_that_began_large_goes_by_its_growth_in_later_masks(tmp_path):
    """Entry 0 of each word is the largest and has shrunk, entry 1 has grown."""
    initial = {"words": rows([2, 1, 1], [-2, 1, 1], [2, -1, 1], [2, 1, -1])}
    trained = {"words": initial["words"] * rows([0.9, 1.2, 0.9])}
    settings = PruningSettings(threshold=2 / 3, gradual_rounds=1, balance="global")
    pruner = prepared(AutoFlipPruner(), initial, settings, tmp_path)
    added(pruner, 0, codec.quantize({"words": np.ones((4, 3))}), 1.0, initial)
    pruner.learn(None, pruner.masks([0], initial, 1))
    masks = pruner.masks([0], trained, 2)
    assert_array_equal(masks["words"], [[False, True, False]] * 4)
