"""Datasets by name: what is read, from where, and how broken files are named."""

import contextlib
import gzip
import hashlib
import io
import json
import pickle
import struct
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from autoflip_flwr.app import data
from autoflip_flwr.app.data.base import SPECS
from autoflip_flwr.app.data.images import read_idx, read_npz
from autoflip_flwr.app.data.leaf import LETTERS, encode_letters
from autoflip_flwr.errors import DataError, SettingsError
from autoflip_flwr.settings import DataSettings

REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real_data = pytest.mark.skipif(
    not REAL.is_dir(), reason="the real datasets are not next to this checkout"
)
rng = np.random.default_rng(0)


def mnist_like(count):
    return rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count) % 10


def cifar_like(count):
    return (
        rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
        np.arange(count) % 10,
    )


def write_npz(path, like=cifar_like, train=30, test=10, **replaced):
    x_train, y_train = like(train)
    x_test, y_test = like(test)
    arrays = {
        "x_train": x_train,
        "y_train": y_train,
        "x_test": x_test,
        "y_test": y_test,
        **replaced,
    }
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def write_leaf(folder, split, users):
    (folder / split).mkdir(parents=True, exist_ok=True)
    content = {
        "users": list(users),
        "num_samples": [len(one["y"]) for one in users.values()],
        "user_data": users,
    }
    (folder / split / "all.json").write_text(json.dumps(content))


def role(count, letter):
    return {"x": [letter * 80] * count, "y": ["e"] * count}


def idx_bytes(array, magic=(0, 0, 8)):
    header = bytes((*magic, array.ndim))
    header += b"".join(struct.pack(">I", size) for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(folder, *, train=20, test=10, zipped=True):
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", train), ("t10k", test)):
        x, y = mnist_like(count)
        for name, array in (("images-idx3", x), ("labels-idx1", y)):
            content = idx_bytes(array)
            if zipped:
                (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(
                    gzip.compress(content)
                )
            else:
                (folder / f"{prefix}-{name}-ubyte").write_bytes(content)


# --- any dataset -----------------------------------------------------------------


def test_names_are_the_documented_ones():
    assert data.names() == (
        "digits",
        "mnist",
        "cifar10",
        "cifar100",
        "femnist",
        "shakespeare",
    )


def test_digits_need_no_files_and_keep_test_apart():
    digits = data.load("digits", num_partitions=4)
    assert (digits.num_classes, digits.input_shape) == (10, (1, 8, 8))
    parts = [digits.partition(i) for i in range(4)]
    assert digits.sizes == tuple(len(part) for part in parts)
    assert sum(digits.sizes) + len(digits.test) == 1797
    assert len(digits.test) == 364
    for samples in (*parts, digits.test):
        assert samples.x.dtype == np.float32
        assert samples.y.dtype == np.int64
        assert samples.x.shape[1:] == (1, 8, 8)
        assert samples.x.min() == 0
        assert samples.x.max() == 1
    shares = np.bincount(digits.test.y) / 364  # stratified
    assert_allclose(shares, 0.1, atol=0.01)


def test_the_same_call_returns_the_same_object():
    again = data.load("digits", num_partitions=3, alpha=1, dir="")
    assert data.load("digits", num_partitions=3, alpha=1.0) is again


def test_the_test_samples_alone_are_those_of_a_division():
    settings = DataSettings(max_test_samples=30, partition="pathological")
    alone = data.held_out(settings, seed=3)
    whole = data.load("digits", num_partitions=4, max_test_samples=30, seed=3).test
    assert_array_equal(alone.x, whole.x)
    assert_array_equal(alone.y, whole.y)
    other = data.load("digits", num_partitions=4, max_test_samples=30, seed=4).test
    assert not np.array_equal(alone.x, other.x)


def test_partitions_are_the_callers_own_copies():
    digits = data.load("digits", num_partitions=2)
    before = digits.partition(0).x.copy()
    digits.partition(0).x[:] = -1
    assert_array_equal(digits.partition(0).x, before)
    torch.from_numpy(before)  # writable: no warning


def test_max_samples_draws_a_seeded_subset():
    def some(seed):
        return data.load(
            "digits", num_partitions=2, max_samples=50, max_test_samples=20, seed=seed
        )

    assert sum(some(0).sizes) == 50
    assert len(some(0).test) == 20
    assert len(np.unique(some(0).test.y)) > 3
    assert not np.array_equal(some(0).partition(0).x, some(1).partition(0).x)
    everything = data.load("digits", num_partitions=2, max_samples=10**6)
    assert sum(everything.sizes) == 1433


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "minst"}, r"unknown dataset 'minst'; known: \['digits', 'mnist'"),
        ({"partition": "natural"}, "'natural' needs a dataset that says whose"),
        ({"partition": "iit"}, r"partition: expected one of \['iid', .* got 'iit'"),
        ({"max_samples": -1}, "max_samples: expected a whole number >= 1, .* got -1"),
        ({"max_test_samples": 0}, "max_test_samples: expected .* >= 1, .* got 0"),
        ({"num_partitions": 0}, "num_partitions: expected a whole .* >= 1, got 0"),
        ({"alpha": 0}, "alpha: expected a number > 0, got 0"),
        ({"alpha": float("nan")}, "alpha: expected a number > 0, got nan"),
        ({"classes_per_client": 0}, "classes_per_client: expected .* >= 1, got 0"),
        ({"seed": -1}, "seed: expected a whole number >= 0, got -1"),
        ({"alhpa": 1.0}, r"unknown keys \['alhpa'\]; known: .*did you mean 'alpha'"),
        ({"holdout": 0.5}, "holdout"),
        ({"hub": "a/b"}, r"hub is for \['femnist', 'shakespeare'\] without dir"),
        ({"name": "femnist", "dir": "x", "hub": "a/b"}, "with dir '.*x'"),
    ],
)
def test_impossible_arguments_are_settings_errors(changed, message):
    arguments = {"name": "digits", "num_partitions": 2, **changed}
    with pytest.raises(SettingsError, match=message):
        data.load(arguments.pop("name"), **arguments)


@pytest.mark.parametrize("partition_id", [-1, 2])
def test_a_client_that_does_not_exist_is_refused(partition_id):
    digits = data.load("digits", num_partitions=2)
    with pytest.raises(SettingsError, match=rf"must be 0\.\.1, got {partition_id}"):
        digits.partition(partition_id)


# --- npz -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10.npz", "cifar10_subset.npz", "file"])
def test_npz_is_found_by_file_and_by_folder(tmp_path, name):
    if name == "file":
        path = write_npz(tmp_path / "any.npz")
    else:
        write_npz(tmp_path / name)
        path = tmp_path
    cifar = data.load("cifar10", num_partitions=3, dir=path)
    assert cifar.sizes == (10, 10, 10)
    assert cifar.partition(0).x.shape == (10, 3, 32, 32)


def test_images_become_channels_first_and_normalised(tmp_path):
    x = cifar_like(10)[0]
    path = write_npz(tmp_path / "a.npz", x_test=x)
    got = data.load("cifar10", num_partitions=1, dir=path).test.x
    mean, std = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
    want = (x / 255 - mean) / std
    assert_allclose(got, want.transpose(0, 3, 1, 2), rtol=1e-4, atol=1e-5)


def test_float_and_uint8_images_give_the_same_samples(tmp_path):
    x, y = mnist_like(10)
    bytes_ = write_npz(tmp_path / "a.npz", mnist_like, x_train=x, y_train=y)
    floats = write_npz(
        tmp_path / "b.npz", mnist_like, x_train=x[:, None] / 255, y_train=y
    )
    one, two = (data.load_node("mnist", path) for path in (bytes_, floats))
    assert_allclose(one.x, two.x, atol=1e-6)
    assert_array_equal(one.y, y)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"y_test": None}, r"missing \['y_test'\], got \['x_test', 'x_train'"),
        ({"y_train": np.arange(5)}, "as many samples as labels, got 30 and 5"),
        ({"y_train": np.full(30, 10)}, r"labels of cifar10 are 0\.\.9, got 10\.\.10"),
        ({"y_train": -np.ones(30, np.int8)}, r"are 0\.\.9, got -1\.\.-1"),
        ({"y_train": np.zeros(30)}, "one integer label per sample, got float64"),
        ({"y_train": np.zeros((30, 1), int)}, r"of shape \(30, 1\)"),
        ({"x_train": np.zeros((30, 28, 28), np.uint8)}, r"has shape \(3, 32, 32\)"),
        ({"x_train": np.zeros((30, 3, 32, 32), int)}, "uint8 or floating, got int64"),
        ({"x_train": np.full((30, 3, 32, 32), np.nan)}, "finite, got 92160 NaN"),
        ({"x_train": np.full((30, 3, 32, 32), 2.0)}, r"lie in \[0, 1\].* got 2\.\.2"),
        (
            {"x_train": np.zeros((0, 3, 32, 32)), "y_train": np.zeros(0, int)},
            "expected samples, got none",
        ),
    ],
)
def test_broken_npz_arrays_are_named(tmp_path, replaced, message):
    path = write_npz(tmp_path / "bad.npz", **replaced)
    with pytest.raises(DataError, match=message) as caught:
        data.load("cifar10", num_partitions=2, dir=path)
    assert str(path) in str(caught.value)


def test_an_npz_never_unpickles(tmp_path):
    path = write_npz(tmp_path / "a.npz", y_train=np.array([{}] * 30, dtype=object))
    with pytest.raises(DataError, match="not a readable npz archive"):
        data.load("cifar10", num_partitions=2, dir=path)


def test_a_single_array_is_not_an_npz(tmp_path):
    path = tmp_path / "a.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="expected an npz archive, got a single array"):
        data.load_node("cifar10", path)


@given(cut=st.integers(0, 49), flipped=st.integers(0, 6000))
def test_damaged_npz_files_load_or_raise_data_errors(tmp_path_factory, cut, flipped):
    file = io.BytesIO()
    np.savez_compressed(file, x_train=np.zeros((2, 28, 28)), y_train=np.arange(2))
    content = bytearray(file.getvalue())
    content[flipped % len(content)] ^= 0x55
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    path.write_bytes(content[: len(content) - cut])
    with contextlib.suppress(DataError):
        read_npz(SPECS["mnist"], path, "train")


def test_digits_of_a_node_are_0_to_16(tmp_path):
    x = np.full((4, 8, 8), 16, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(4))
    assert data.load_node("digits", tmp_path / "a.npz").x.max() == 1
    np.savez(tmp_path / "b.npz", x_train=x + 1, y_train=np.arange(4))
    with pytest.raises(DataError, match=r"pixels of digits are 0\.\.16, got 17"):
        data.load_node("digits", tmp_path / "b.npz")


# --- MNIST and CIFAR as torchvision stores them ------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inner", ["MNIST/raw", "raw", "."])
def test_mnist_is_found_in_any_of_its_folders(tmp_path, inner, zipped):
    write_mnist(tmp_path / inner, zipped=zipped)
    mnist = data.load("mnist", num_partitions=2, dir=tmp_path)
    assert mnist.sizes == (10, 10)
    assert mnist.test.x.shape == (10, 1, 28, 28)


def test_a_missing_mnist_file_is_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"expected t10k-labels-idx1-ubyte or .*\.gz"):
        data.load("mnist", num_partitions=2, dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected the idx magic 00000803, got "),
        (idx_bytes(np.zeros((1, 2))), "idx magic 00000803, got 00000802"),
        (idx_bytes(np.zeros((1, 2, 2)), (0, 0, 9)), "got 00000903"),
        (b"\0\0\x08\x03\0\0", "expected a header of 16 B, got 6 B"),
        (
            idx_bytes(np.zeros((2, 3, 4)))[:-1],
            r"expected 40 B \(16 header \+ 24 for shape \(2, 3, 4\)\), got 39 B",
        ),
        (idx_bytes(np.zeros((2, 3, 4))) + b"\0", "expected 40 B .* got 41 B"),
    ],
)
def test_an_idx_file_with_a_defect_is_named(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path, ndim=3)
    assert str(path) in str(caught.value)


@given(cut=st.integers(0, 60), flipped=st.integers(0, 60))
def test_damaged_gz_files_load_or_raise_data_errors(tmp_path_factory, cut, flipped):
    content = bytearray(gzip.compress(idx_bytes(np.arange(24).reshape(2, 3, 4))))
    content[flipped % len(content)] ^= 0x55
    path = tmp_path_factory.mktemp("idx") / "a.gz"
    path.write_bytes(content[: len(content) - cut % len(content)])
    with contextlib.suppress(DataError):
        read_idx(path, ndim=3)


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """A CIFAR-10 folder in torchvision's layout with two images a batch."""
    from torchvision.datasets import CIFAR10 as kind  # takes seconds

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name, content):
        pickled = pickle.dumps(content)
        (folder / name).write_bytes(pickled)
        return name, hashlib.md5(pickled).hexdigest()

    def batch(name):
        x = rng.integers(0, 256, (2, 3072), dtype=np.uint8)
        return write(name, {"data": x, "labels": [1, 2]})

    meta_name, meta_md5 = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(kind, "train_list", [batch("data_batch_1")])
    monkeypatch.setattr(kind, "test_list", [batch("test_batch")])
    monkeypatch.setattr(
        kind,
        "meta",
        {"filename": meta_name, "key": "label_names", "md5": meta_md5},
    )
    return folder


@pytest.mark.parametrize("of_the_batches", [True, False])
def test_cifar_is_read_as_torchvision_stores_it(small_cifar, of_the_batches):
    folder = small_cifar if of_the_batches else small_cifar.parent
    cifar = data.load("cifar10", num_partitions=1, dir=folder)
    assert_array_equal(np.sort(cifar.partition(0).y), [1, 2])
    assert cifar.test.x.shape == (2, 3, 32, 32)


def test_a_changed_cifar_file_is_refused_before_it_is_unpickled(small_cifar):
    path = small_cifar / "data_batch_1"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"data_batch_1.*published md5.*corrupted"):
        data.load("cifar10", num_partitions=1, dir=small_cifar)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-batches-py/"),
        ("cifar100", "cifar-100-python/"),
    ],
)
def test_an_empty_folder_says_what_it_should_hold(tmp_path, name, expected):
    for path, got in ((tmp_path, "folder without"), (tmp_path / "no", "nothing")):
        with pytest.raises(DataError, match=got) as caught:
            data.load(name, num_partitions=2, dir=path)
        assert expected in str(caught.value)
        assert f"{name}_subset.npz" in str(caught.value)
        assert str(path) in str(caught.value)


def test_another_kind_of_file_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    path.touch()
    with pytest.raises(DataError, match=r"a\.zip: expected an \.npz file"):
        data.load("mnist", num_partitions=2, dir=path)


def test_a_failed_download_says_to_pass_a_folder(tmp_path, monkeypatch):
    def fail(root, train, download):
        (Path(root) / "half").touch()
        raise RuntimeError("Error downloading train-images")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.MNIST", fail)
    with pytest.raises(DataError, match=r"Error downloading.*set data.dir to an .npz"):
        data.load("mnist", num_partitions=7)
    assert list((tmp_path / ".cache" / "autoflip_flwr").iterdir()) == []


def test_a_download_is_done_once(tmp_path, monkeypatch):
    calls = []

    def succeed(root, train, download):
        calls.append(root)
        write_mnist(Path(root) / "MNIST" / "raw")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.MNIST", succeed)
    for seed in (101, 102, 103):
        data.federated._read.cache_clear()
        assert data.load("mnist", num_partitions=2, seed=seed).sizes == (10, 10)
    data.federated._read.cache_clear()
    assert len(calls) == 1


# --- LEAF --------------------------------------------------------------------------


def test_letters_are_leafs_eighty_and_unknown_ones_are_spaces():
    assert len(LETTERS) == len(set(LETTERS)) == 80
    assert_array_equal(encode_letters([LETTERS], length=80)[0], np.arange(80))
    assert encode_letters(["$\u00e9\U0001f600 \t"], length=5).tolist() == [[1] * 5]
    with pytest.raises(DataError, match="expected texts of 5 characters, got 'four'"):
        encode_letters(["four"], length=5)


def test_shakespeare_from_leaf(tmp_path):
    write_leaf(tmp_path, "train", {"B": role(3, "b"), "A": role(2, "a")})
    write_leaf(tmp_path, "test", {"A": role(1, "a")})
    plays = data.load(
        "shakespeare", num_partitions=2, dir=tmp_path, partition="natural"
    )
    assert (plays.num_classes, plays.input_shape) == (80, (80,))
    first = plays.partition(0)  # users in the order of their names
    assert_array_equal(first.x, np.full((2, 80), LETTERS.index("a")))
    assert first.x.dtype == first.y.dtype == np.int64
    assert_array_equal(first.y, [LETTERS.index("e")] * 2)
    assert plays.sizes == (2, 3)
    assert len(plays.test) == 1


def test_more_clients_than_users_left_is_refused(tmp_path):
    write_leaf(tmp_path, "train", {"A": role(2, "a"), "B": role(2, "b")})
    write_leaf(tmp_path, "test", {"A": role(1, "a")})
    with pytest.raises(SettingsError, match="has 2 users for 3 clients"):
        data.load("shakespeare", num_partitions=3, dir=tmp_path, partition="natural")


DRAWING = [1.0] * 784


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({"x": [DRAWING], "y": [1, 2]}, "as many samples as labels, got 1 and 2"),
        ({"x": [DRAWING[1:]], "y": [1]}, r"784 floats a sample, got shape \(783,\)"),
        ({"x": [DRAWING], "y": [62]}, r"labels of femnist are 0\.\.61, got 62"),
        ({"x": [[float("nan")] * 784], "y": [1]}, "finite, got 784 NaN"),
        ({"x": [["a"] * 784], "y": [1]}, "could not convert string"),
        ({"x": [DRAWING], "y": [1.5]}, "one integer label per sample, got float"),
        ({"x": "abc", "y": [1]}, "expected lists x and y"),
        ({"x": [DRAWING]}, r"expected LEAF's user_data.*KeyError: 'y'"),
        ({"x": [], "y": []}, "expected samples, got none"),
    ],
)
def test_a_defect_in_leafs_files_is_named(tmp_path, user, message):
    (tmp_path / "train").mkdir()
    content = {"users": ["f1"], "user_data": {"f1": user}}
    (tmp_path / "train" / "all.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        data.load_node("femnist", tmp_path)
    assert str(tmp_path / "train") in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"user_data": 3}'])
def test_json_that_is_not_leafs_is_named(tmp_path, content):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "all.json").write_text(content)
    with pytest.raises(DataError, match=r"all\.json: (not a readable|expected LEAF)"):
        data.load_node("femnist", tmp_path)


def test_a_folder_without_leafs_files_says_what_is_missing(tmp_path):
    write_leaf(tmp_path, "train", {"A": role(2, "a")})
    with pytest.raises(DataError, match=r"test: expected LEAF's JSON files of shake"):
        data.load("shakespeare", num_partitions=1, dir=tmp_path)
    assert len(data.load_node("shakespeare", tmp_path)) == 2  # needs train/ alone


# --- the hub, from a local folder --------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("flwr_datasets.federated_dataset.event", lambda *_: None)


def write_hub(folder, columns, features=None):
    folder.mkdir()
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(folder / "train.parquet")
    return str(folder)


def test_femnist_from_the_hub_holds_out_a_fifth_of_each_writer(tmp_path, hub_cache):
    greys = np.arange(20, dtype=np.uint8)
    hub = write_hub(
        tmp_path / "femnist",
        {
            "image": [
                Image.fromarray(np.full((28, 28), grey, np.uint8)) for grey in greys
            ],
            "writer_id": ["f1"] * 10 + ["f0"] * 10,
            "hsf_id": [0] * 20,
            "character": (np.arange(20) * 3).tolist(),
        },
        datasets.Features(
            {
                "image": datasets.Image(),
                "writer_id": datasets.Value("string"),
                "hsf_id": datasets.Value("int64"),
                "character": datasets.ClassLabel(num_classes=62),
            }
        ),
    )
    femnist = data.load("femnist", num_partitions=2, partition="natural", hub=hub)
    assert femnist.sizes == (8, 8)
    assert len(femnist.test) == 4
    assert set((femnist.partition(1).y // 3).tolist()) < set(range(10))  # f1
    y = np.concatenate([femnist.partition(i).y for i in (0, 1)] + [femnist.test.y])
    assert_array_equal(np.sort(y), np.arange(20) * 3)  # nothing lost, nothing twice
    got = femnist.test.x[:, 0, 0, 0] * 0.1597 + 0.9637
    assert_allclose(got * 255, femnist.test.y // 3, atol=1e-3)


def test_shakespeare_from_the_hub_holds_out_the_end_of_each_role(tmp_path, hub_cache):
    letters = list("abcdefghij")
    hub = write_hub(
        tmp_path / "shakespeare",
        {"character_id": ["A"] * 10, "x": ["x" * 80] * 10, "y": letters},
    )
    plays = data.load("shakespeare", num_partitions=1, hub=hub)
    assert [LETTERS[label] for label in plays.test.y] == ["i", "j"]
    assert sorted(LETTERS[label] for label in plays.partition(0).y) == letters[:8]


def test_hub_columns_are_checked(tmp_path, hub_cache):
    hub = write_hub(tmp_path / "other", {"x": ["x" * 80], "text": ["y"]})
    with pytest.raises(DataError, match=r"missing \['character_id', 'y'\], got"):
        data.load("shakespeare", num_partitions=1, hub=hub)


def test_a_hub_out_of_reach_says_to_pass_a_folder(tmp_path, hub_cache):
    with pytest.raises(DataError, match=r"could not be read.*set data.dir to a folder"):
        data.load("femnist", num_partitions=1, hub=str(tmp_path / "nothing"))


# --- a node with data of its own ---------------------------------------------------


def test_a_node_reads_all_training_data_at_its_path(tmp_path):
    x, y = cifar_like(12)
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y)  # no test arrays
    node = data.load_node("cifar10", tmp_path / "mine.npz")
    assert_array_equal(node.y, y)
    assert node.x.shape == (12, 3, 32, 32)
    write_mnist(tmp_path)
    assert len(data.load_node("mnist", tmp_path)) == 20


def test_a_femnist_node_may_keep_an_npz(tmp_path):
    write_npz(tmp_path / "writer.npz", mnist_like)
    assert len(data.load_node("femnist", tmp_path / "writer.npz")) == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("minst", "x"), "unknown dataset 'minst'"),
        (("mnist", ""), "needs their path, got none"),
    ],
)
def test_a_node_with_impossible_settings_is_refused(arguments, message):
    with pytest.raises(SettingsError, match=message):
        data.load_node(*arguments)


# --- the real files ----------------------------------------------------------------


@needs_real_data
@pytest.mark.parametrize(
    ("name", "folder", "partition", "train", "test"),
    [
        ("mnist", ".", "dirichlet", 60_000, 10_000),
        ("cifar10", ".", "pathological", 10_000, 2_000),
        ("cifar100", ".", "iid", 10_000, 2_000),
        ("femnist", "femnist", "natural", 7_448, 850),
        ("shakespeare", "shakespeare", "natural", 166_076, 40_463),
    ],
)
def test_the_real_datasets(name, folder, partition, train, test):
    whole = data.load(
        name,
        num_partitions=10,
        dir=REAL / folder,
        partition=partition,
        max_test_samples=None,
    )
    assert (sum(whole.sizes), len(whole.test)) == (train, test)
    assert len(np.unique(whole.test.y)) >= 0.7 * whole.num_classes
    one = whole.partition(9)
    assert one.x.shape == (whole.sizes[9], *whole.input_shape)
    if name != "shakespeare":  # normalised
        assert_allclose([whole.test.x.mean(), whole.test.x.std()], [0, 1], atol=0.06)
