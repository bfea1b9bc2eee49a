"""The store keeps what it was given, or says why not and keeps what it had."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from preparing import measured

from autoflip_flwr.method.guidance import statistics
from autoflip_flwr.pruners.store import Answer, Answers, GuidanceStore
from autoflip_flwr.wire import codec

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
    given = measured(frame(7), SHAPES)
    store.put(7, given)
    store.put(2**64 - 1, measured(frame(8), SHAPES))
    expected = codec.dequantize(frame(7), SHAPES).dense()
    for found in (given.guidance(), store.get(7)):
        for name, values in found.dense().items():
            assert_array_equal(values, expected[name])
    assert len(store) == 2
    assert set(store) == {7, 2**64 - 1}
    assert 7 in store
    assert 8 not in store


def test_statistics_are_those_of_the_dense_matrix(store):
    store.put(7, measured(frame(7), SHAPES))
    expected = statistics(codec.dequantize(frame(7), SHAPES).dense().items())
    found = store.statistics(7)
    assert_allclose(found.mean, expected.mean, rtol=1e-6)
    assert found.low == expected.low
    assert found.high == expected.high


def test_a_tensor_without_entries_is_no_reason_to_fail(tmp_path):
    shapes = {"w": (2,), "empty": (0, 3)}
    guidance = {"w": np.ones(2, np.float32), "empty": np.ones((0, 3), np.float32)}
    answers = Answers(tmp_path, shapes)
    answers.begin(1)
    answers.put(7, Answer(codec.quantize(guidance)))
    found = answers.get(7)
    assert found is not None
    assert found.statistics.mean == 1
    assert found.statistics.high == {"w": 1, "empty": 0}


@pytest.mark.parametrize(
    "bad", [b"", frame()[:-1], frame() + b"\0", b"\xff" * len(frame())]
)
def test_a_bad_frame_is_nothing_but_a_reason(tmp_path, bad):
    answers = Answers(tmp_path, SHAPES)
    answers.begin(1)
    answers.put(7, Answer(bad))
    assert 7 in answers, "it is not asked again"
    assert answers.get(7) is None
    assert "expected" in answers.failure(7)
    assert [path.name for path in tmp_path.iterdir()] == ["1-7.answerless"]


@pytest.mark.parametrize("examples", [0, -1, float("nan"), float("inf"), "many", None])
def test_an_answer_that_stands_for_no_examples_is_nothing_but_a_reason(
    tmp_path, examples
):
    answers = Answers(tmp_path, SHAPES)
    answers.begin(1)
    answers.put(7, Answer(frame(), None, examples))
    assert answers.get(7) is None
    assert answers.failure(7)


def test_a_frame_is_written_once_and_has_two_names(store, tmp_path):
    given = measured(frame(7), SHAPES)
    store.put(7, given)
    (kept,) = tmp_path.rglob("*.guidance")
    assert kept.samefile(given.path)
    given.path.unlink()
    assert_array_equal(
        store.get(7).dense()["w"], codec.dequantize(frame(7), SHAPES).dense()["w"]
    )


def test_where_there_are_no_links_a_frame_is_copied(store, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    store.put(7, measured(frame(7), SHAPES))
    expected = codec.dequantize(frame(7), SHAPES).dense()
    assert_array_equal(store.get(7).dense()["w"], expected["w"])


def test_a_later_frame_replaces_the_earlier(store, tmp_path):
    store.put(7, measured(frame(1), SHAPES))
    store.put(7, measured(frame(2), SHAPES))
    assert len(store) == 1
    expected = codec.dequantize(frame(2), SHAPES).dense()
    assert_array_equal(store.get(7).dense()["w"], expected["w"])
    assert_allclose(
        store.statistics(7).mean, statistics(expected.items()).mean, rtol=1e-6
    )


def test_two_frames_before_stay_on_the_disk_for_earlier_checkpoints(store, tmp_path):
    for seed in (1, 2, 3, 4):
        store.put(7, measured(frame(seed), SHAPES))
    files = [path.read_bytes() for path in tmp_path.rglob("*.guidance")]
    assert len(files) == 3
    for seed in (2, 3, 4):
        assert any(frame(seed) in data for data in files)


def test_a_store_goes_on_with_the_rows_of_another(store, tmp_path):
    for node_id in range(40):  # more than the table had room for at first
        store.put(node_id, measured(frame(node_id), SHAPES))
    store.put(3, measured(frame(99), SHAPES))
    later = GuidanceStore(tmp_path / "guidance", SHAPES)
    later.restore(store.state())
    assert list(later) == list(range(40))
    for node_id in (0, 3, 39):
        assert later.statistics(node_id) == store.statistics(node_id)
    expected = codec.dequantize(frame(99), SHAPES).dense()
    assert_array_equal(later.get(3).dense()["w"], expected["w"])
    later.put(40, measured(frame(40), SHAPES))
    assert len(later) == 41
    assert len(store) == 40


def test_tensors_of_many_nodes_are_read_block_by_block(store):
    for node_id in range(5):
        store.put(node_id, measured(frame(node_id), SHAPES))
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
        store.put(node_id, measured(frame(node_id), SHAPES))
    each = [store.statistics(node_id) for node_id in store]
    overall = store.overall()
    assert_allclose(overall.mean, np.mean(store.means()))
    for name in SHAPES:
        assert overall.low[name] == min(one.low[name] for one in each)
        assert overall.high[name] == max(one.high[name] for one in each)


def test_answers_are_those_of_their_round_and_of_the_one_before(tmp_path):
    signs = codec.pack_mask({n: np.ones(s, np.bool_) for n, s in SHAPES.items()})
    answers = Answers(tmp_path, SHAPES)
    for server_round in (1, 2, 3):
        answers.begin(server_round)
        answers.put(7, Answer(frame(server_round), signs, server_round))
        answers.fail(8, f"reason {server_round}")
    later = Answers(tmp_path, SHAPES)
    later.begin(2)
    assert len(list(tmp_path.iterdir())) == 2, "later ones are not to be trusted"
    assert 7 in later
    assert 8 in later
    assert 9 not in later
    found = later.get(7)
    expected = codec.dequantize(frame(2), SHAPES).dense()
    assert_array_equal(found.guidance().dense()["w"], expected["w"])
    assert found.signs()["b"].all()
    assert found.examples == 2
    assert found.statistics == measured(frame(2), SHAPES).statistics
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
    store.put(7, measured(frame(1), SHAPES))
    store.put(8, measured(frame(2), SHAPES))
    store.clear()
    assert len(store) == 0
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    with pytest.raises(KeyError, match="no local guidance of node 7"):
        store.get(7)
    store.put(7, measured(frame(3), SHAPES))
    assert list(store) == [7]


def test_a_node_without_guidance_is_a_key_error(store):
    with pytest.raises(KeyError, match="no local guidance of node 9"):
        store.get(9)


def test_memory_does_not_grow_with_the_explorers(tmp_path):
    store = GuidanceStore(tmp_path, {"w": (1000, 100)})
    matrix = np.ones((1000, 100), np.float32)
    shapes = {"w": (1000, 100)}
    store.put(0, measured(codec.quantize({"w": matrix}), shapes))
    tracemalloc.start()
    try:
        for node_id in range(1, 21):
            frame = codec.quantize({"w": node_id * matrix})
            store.put(node_id, measured(frame, shapes))
            del frame
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 100_000  # one frame alone has 100,008 B
