"""The store keeps what it was given, or says why not and keeps what it had."""

import tracemalloc

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from autoflip_flwr import codec
from autoflip_flwr.errors import WireError
from autoflip_flwr.guidance import statistics
from autoflip_flwr.store import Answer, Answers, GuidanceStore

SHAPES = {"w": (2, 3), "b": (2,)}


def frame(seed=0):
    rng = np.random.default_rng(seed)
    return codec.quantize(
        {n: rng.lognormal(-8, 2, s).astype(np.float32) for n, s in SHAPES.items()}
    )


@pytest.fixture
def store(tmp_path):
    return GuidanceStore(tmp_path / "guidance", SHAPES)


def test_what_is_put_comes_back(store):
    given = store.put(7, frame(7))
    store.put(2**64 - 1, frame(8))
    expected = codec.dequantize(frame(7), SHAPES).dense()
    for found in (given, store.get(7)):
        for name, values in found.dense().items():
            assert_array_equal(values, expected[name])
    assert len(store) == 2
    assert set(store) == {7, 2**64 - 1}
    assert 7 in store
    assert 8 not in store


def test_statistics_are_those_of_the_dense_matrix(store):
    store.put(7, frame(7))
    expected = statistics(codec.dequantize(frame(7), SHAPES).dense())
    found = store.statistics(7)
    assert_allclose(found.mean, expected.mean, rtol=1e-6)
    assert found.low == expected.low
    assert found.high == expected.high


@pytest.mark.parametrize(
    "bad", [b"", frame()[:-1], frame() + b"\0", b"\xff" * len(frame())]
)
def test_a_bad_frame_changes_nothing(store, tmp_path, bad):
    store.put(7, frame(7))
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    mean = store.statistics(7).mean
    for node_id in (7, 8):
        with pytest.raises(WireError):
            store.put(node_id, bad)
    assert list(store) == [7]
    assert store.statistics(7).mean == mean
    assert files == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_later_frame_replaces_the_earlier(store, tmp_path):
    store.put(7, frame(1))
    store.put(7, frame(2))
    assert len(store) == 1
    expected = codec.dequantize(frame(2), SHAPES).dense()
    assert_array_equal(store.get(7).dense()["w"], expected["w"])
    assert_allclose(store.statistics(7).mean, statistics(expected).mean, rtol=1e-6)


def test_two_frames_before_stay_on_the_disk_for_earlier_checkpoints(store, tmp_path):
    for seed in (1, 2, 3, 4):
        store.put(7, frame(seed))
    files = sorted(path.read_bytes() for path in tmp_path.rglob("*.guidance"))
    assert files == sorted([frame(2), frame(3), frame(4)])


def test_a_store_goes_on_with_the_rows_of_another(store, tmp_path):
    for node_id in range(40):  # more than the table had room for at first
        store.put(node_id, frame(node_id))
    store.put(3, frame(99))
    later = GuidanceStore(tmp_path / "guidance", SHAPES)
    later.restore(store.state())
    assert list(later) == list(range(40))
    for node_id in (0, 3, 39):
        assert later.statistics(node_id) == store.statistics(node_id)
    expected = codec.dequantize(frame(99), SHAPES).dense()
    assert_array_equal(later.get(3).dense()["w"], expected["w"])
    later.put(40, frame(40))
    assert len(later) == 41
    assert len(store) == 40


def test_tensors_of_many_nodes_are_read_block_by_block(store):
    for node_id in range(5):
        store.put(node_id, frame(node_id))
    for name, shape in SHAPES.items():
        dense = np.zeros((3, int(np.prod(shape))), np.float32)
        tables = store.tables([4, 0, 2], name)
        for start, codes in store.codes([4, 0, 2], name, 4):
            found = np.take_along_axis(tables, codes, axis=1)
            dense[:, start : start + codes.shape[1]] = found
        for row, node_id in zip(dense, (4, 0, 2), strict=True):
            expected = store.get(node_id).dense()[name]
            assert_array_equal(row, expected.reshape(-1))


def test_overall_statistics_are_those_of_all_nodes(store):
    for node_id in range(20):
        store.put(node_id, frame(node_id))
    each = [store.statistics(node_id) for node_id in store]
    overall = store.overall()
    assert_allclose(overall.mean, np.mean(store.means()))
    for name in SHAPES:
        assert overall.low[name] == min(one.low[name] for one in each)
        assert overall.high[name] == max(one.high[name] for one in each)


def test_answers_are_those_of_their_round_and_of_the_one_before(tmp_path):
    answers = Answers(tmp_path)
    for server_round in (1, 2, 3):
        answers.begin(server_round)
        answers.put(7, Answer(b"frame", b"signs", server_round))
        answers.fail(8, f"reason {server_round}")
    later = Answers(tmp_path)
    later.begin(2)
    assert len(list(tmp_path.iterdir())) == 2, "later ones are not to be trusted"
    assert 7 in later
    assert 8 in later
    assert 9 not in later
    assert later.get(7) == Answer(b"frame", b"signs", 2)
    assert later.failure(8) == "reason 2"
    (path,) = tmp_path.glob("*-7.answer")
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "2-9.partial").write_bytes(b"of a server that was killed")
    later.begin(2)
    assert 7 not in later, "torn: asked again"
    assert not list(tmp_path.glob("*.partial"))
    later.begin(4)
    assert not list(tmp_path.iterdir())


def test_clear_forgets_and_frees_the_disk(store, tmp_path):
    store.put(7, frame(1))
    store.put(8, frame(2))
    store.clear()
    assert len(store) == 0
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    with pytest.raises(KeyError, match="no local guidance of node 7"):
        store.get(7)
    store.put(7, frame(3))
    assert list(store) == [7]


def test_a_node_without_guidance_is_a_key_error(store):
    with pytest.raises(KeyError, match="no local guidance of node 9"):
        store.get(9)


def test_memory_does_not_grow_with_the_explorers(tmp_path):
    store = GuidanceStore(tmp_path, {"w": (1000, 100)})
    matrix = np.ones((1000, 100), np.float32)
    store.put(0, codec.quantize({"w": matrix}))
    tracemalloc.start()
    try:
        for node_id in range(1, 21):
            store.put(node_id, codec.quantize({"w": node_id * matrix}))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 100_000  # one frame alone has 100,008 B
