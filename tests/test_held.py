"""A mask that a client holds is not sent to it again."""

import math

import numpy as np
import pytest
from flat import flat
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st
from inprocess import LocalGrid, masks_in, run, seeded, toy_app
from torch import nn

from autoflip_flwr import AutoFLIP
from autoflip_flwr.errors import WireError
from autoflip_flwr.server.held import HeldMasks
from autoflip_flwr.wire import codec
from autoflip_flwr.wire.manifest import Manifest
from autoflip_flwr.wire.records import HELD, MASK, Plan, complete_mask

NODES = [11, 12, 13]


def wide():
    """1763 parameters: naming a mask is less than sending it."""
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(6, 160, bias=False),
            nn.BatchNorm1d(160),
            nn.ReLU(),
            nn.Linear(160, 3),
        )
    )


WHOLE = math.ceil(1763 / 8)
STEPWISE = {"threshold": 0.8, "gradual_rounds": 2}


def packed(text):
    return codec.pack_mask({"w": np.array([c == "1" for c in text])})


# --- bits within a mask ---------------------------------------------------------------


def test_a_mask_within_another_has_a_bit_for_each_entry_that_one_keeps():
    held, mask = packed("1101011011"), packed("1000011001")
    #              kept by held:               11 1 11 11
    assert codec.pack_mask_within(mask, held) == packed("1001101")
    assert codec.unpack_mask_within(packed("1001101"), held) == mask


def test_an_equal_mask_is_empty_and_a_wider_one_is_not_within():
    assert codec.pack_mask_within(packed("101"), packed("101")) == b""
    assert codec.pack_mask_within(packed("111"), packed("101")) is None
    assert codec.pack_mask_within(packed("1" * 8), packed("1" * 9)) is None


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=70))
def test_what_is_written_within_a_mask_is_read_back(pairs):
    held = codec.pack_mask({"w": np.array([a for a, _ in pairs])})
    mask = codec.pack_mask({"w": np.array([a and b for a, b in pairs])})
    frame = codec.pack_mask_within(mask, held)
    assert len(frame) <= math.ceil(sum(a for a, _ in pairs) / 8)
    assert codec.unpack_mask_within(frame, held) == mask


@pytest.mark.parametrize(
    ("frame", "text"),
    [(b"\x80\x00", r"expected 1 B \(5 entries / 8\), got 2 B"), (b"\x81", "canonical")],
)
def test_a_frame_that_does_not_fit_the_held_mask_is_refused(frame, text):
    with pytest.raises(WireError, match=text):
        codec.unpack_mask_within(frame, packed("110111"))


# --- what a client does ---------------------------------------------------------------


def config_of(mask, **more):
    plan = Plan(Manifest.of({"w": np.zeros(len(mask), np.float32)}), {"w": mask})
    return ConfigRecord({**plan.entries("train"), **more})


def test_a_client_completes_a_mask_from_the_one_it_holds():
    state = RecordDict()
    first = config_of(np.array([True, True, False, True]))
    complete_mask(first, state)
    config = ConfigRecord({HELD: codec.digest(packed("1101")), MASK: packed("101")})
    complete_mask(config, state)
    assert config == ConfigRecord({MASK: packed("1001")})
    again = ConfigRecord({HELD: codec.digest(packed("1001"))})
    complete_mask(again, state)
    assert again[MASK] == packed("1001")


def test_a_client_without_the_mask_says_so():
    config = ConfigRecord({HELD: codec.digest(packed("1101"))})
    with pytest.raises(WireError, match="a mask that this client does not hold"):
        complete_mask(config, RecordDict())


# --- whole runs -----------------------------------------------------------------------


def sizes(grid, node_id):
    return [
        len(s.config.get(MASK, b""))
        for s in grid.down
        if s.node_id == node_id and s.phase in ("train", "evaluate")
    ]


def test_over_a_run_a_node_gets_all_of_one_mask_and_then_what_is_left():
    grid = LocalGrid(toy_app(wide), NODES)
    run(AutoFLIP(**flat(**STEPWISE)), grid, wide(), 5)
    train = [s for s in grid.down if s.phase == "train" and s.node_id == 11]
    kept = [sum(int(m.sum()) for m in masks_in(s, wide()).values()) for s in train]
    falls = [math.ceil(k / 8) for k in kept]
    # train, evaluate, train, evaluate, ...
    assert kept[0] > kept[1] > kept[2] == kept[3] == kept[4]
    assert sizes(grid, 11) == [WHOLE, 0, falls[0], 0, falls[1], 0, 0, 0, 0, 0]


def ends_of(grid, rounds=5):
    strategy = AutoFLIP(FedAvg(fraction_evaluate=0), **flat(seed=0, **STEPWISE))
    return run(strategy, grid, wide(), rounds)[0]


def test_a_client_that_forgets_costs_one_reply_and_gets_whole_masks_from_then_on():
    class Forgetful(LocalGrid):
        def push_messages(self, messages):
            self.contexts[12].state = RecordDict()
            return super().push_messages(messages)

    grid = Forgetful(toy_app(wide), NODES)
    ends_of(grid)
    failed = [r.metadata.src_node_id for r in grid.replies if r.has_error()]
    assert len(failed) == 1
    first, second, *others = sizes(grid, 12)
    assert first == WHOLE > second
    assert others == [WHOLE] * 3


def test_a_node_whose_reply_was_lost_gets_all_of_the_next_mask():
    lost = []

    def tamper(message, reply):
        train = any(
            "autoflip.mask" in c for c in message.content.config_records.values()
        )
        if message.metadata.dst_node_id == 13 and train and not lost:
            lost.append(reply)
            return None
        return reply

    grid = LocalGrid(toy_app(wide), NODES, tamper=tamper)
    ends_of(grid)
    first, second, third, *_ = sizes(grid, 13)
    assert first == second == WHOLE > third


def test_a_mask_that_grows_again_is_sent_whole():
    grid = LocalGrid(toy_app(wide), NODES)
    growing = flat(threshold=0.5, population_weight=0.0, score="guidance", seed=0)
    strategy = AutoFLIP(FedAvg(fraction_train=0.67, fraction_evaluate=0), **growing)
    run(strategy, grid, wide(), 6)
    train = [s for s in grid.down if s.phase == "train"]
    masks = [s.mask for s in train]
    assert len(set(masks)) > 2
    for sent in train:  # read by hand from what travelled: the apps got the same
        if HELD not in sent.config:
            assert len(sent.config[MASK]) == WHOLE


def test_an_answer_that_comes_when_the_mask_is_another_is_of_the_mask_that_was_sent():
    keep, fewer = np.arange(400) < 200, np.arange(400) < 100
    manifest = Manifest.of({"w": np.zeros(400, np.float32)})
    first, second = (Plan(manifest, {"w": mask}) for mask in (keep, fewer))
    held = HeldMasks()
    held.entries(11, first, "train")
    held.entries(12, second, "train")
    held.answered(11)  # late
    told = held.entries(11, second, "train")
    assert told[HELD] == codec.digest(codec.pack_mask({"w": keep}))
    assert told[MASK] == codec.pack_mask({"w": fewer[:200]})
