"""Files, settings and run configs that attack: read for what they are, or refused."""

import gzip
import tracemalloc
import zipfile

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from inprocess import LocalGrid, toy_app

from autoflip_flwr import settings
from autoflip_flwr.app import build, client, data
from autoflip_flwr.app.data import archive, images
from autoflip_flwr.app.folder import masks_of
from autoflip_flwr.errors import DataError, SettingsError


@pytest.fixture
def small(monkeypatch):
    """Let files inflate to a MB, so that a bomb of a MB shows it."""
    monkeypatch.setattr(archive, "LEAST", 1 << 20)


def bomb(path, keys=("x_train", "y_train"), size=20 << 20):
    zeros = np.zeros(size, np.uint8)
    np.savez_compressed(path, **dict.fromkeys(keys, zeros))
    return path


def peak_of(action, error, match):
    tracemalloc.start()
    try:
        with pytest.raises(error, match=match):
            action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


INFLATES = r"\d+ B inflate to \d+ B; expected at most"


def test_an_npz_bomb_is_refused_before_it_fills_the_memory(small, tmp_path):
    path = bomb(tmp_path / "node.npz")
    assert path.stat().st_size < 1e5
    peak = peak_of(lambda: data.load_node("digits", path), DataError, INFLATES)
    assert peak < 2e6


def test_a_bomb_in_place_of_a_runs_mask_is_refused(small, tmp_path):
    bomb(tmp_path / "mask.npz", keys=("0.weight",))
    assert peak_of(lambda: masks_of(tmp_path), DataError, INFLATES) < 2e6


def test_an_archive_that_lies_about_its_sizes_is_refused(small, tmp_path):
    """The header of an array says a TB, and the directory of the archive 128 B."""
    path = tmp_path / "mask.npz"
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (137438953472,), }"
    header += b" " * (117 - len(header)) + b"\n"
    with zipfile.ZipFile(path, "w") as file:
        npy = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        file.writestr("0.weight.npy", npy)
    peak_of(lambda: masks_of(tmp_path), DataError, r"expected the masks")


def test_a_gzip_bomb_is_refused(small, tmp_path):
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(bytes(20 << 20)))
    peak = peak_of(lambda: images.read_idx(path, ndim=1), DataError, INFLATES)
    assert peak < 8e6, "of 20"


def test_a_large_file_may_inflate_a_hundred_times(small, tmp_path):
    noise = np.random.default_rng(0).integers(0, 9, 3 << 20).astype(np.uint8)
    np.savez_compressed(tmp_path / "data.npz", x=noise)
    assert archive.read_npz(tmp_path / "data.npz")["x"].size == 3 << 20
    path = tmp_path / "whole.gz"
    path.write_bytes(gzip.compress(noise.tobytes()))
    assert archive.read_gzip(path) == noise.tobytes()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(EOFError, match="ends before"):
        archive.read_gzip(path)


# --- settings -------------------------------------------------------------------------


CODE = [
    "!!python/object/apply:os.system [touch {}]",
    "!!python/object/new:subprocess.Popen [[touch,{}]]",
    "!!python/name:os.system",
    "$(touch {})",
    "`touch {}`",
    "__import__('os').system('touch {}')",
]


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("key", ["rounds", "data.dir", "pruning.exclude", "model.name"])
def test_overrides_are_values_and_never_code(code, key, tmp_path):
    path = tmp_path / "was-here"
    value = code.format(path)
    try:
        chosen = settings.load("quickstart", f'{key}="{value}"')
        build.build_model(chosen)
    except (SettingsError, ValueError):
        pass
    assert not path.exists()
    with pytest.raises(SettingsError):
        settings.load("quickstart", f'rounds="{value}"')


def test_a_yaml_bomb_is_refused_before_it_is_expanded(tmp_path):
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(30)]
    (tmp_path / "settings.yaml").write_text("preset: quickstart\n" + "\n".join(lines))
    read = lambda: settings.read(tmp_path / "settings.yaml")  # noqa: E731
    assert peak_of(read, SettingsError, r"aliases .* are not allowed") < 4e6
    for bad in ("[&a [x], *a]", "[" * 20_000, "{a: " * 20_000):
        with pytest.raises(SettingsError):
            settings.load("quickstart", f'rounds="{bad}"')


@pytest.mark.parametrize(
    "preset", ["../pyproject", "/etc/passwd", "..", "conf/quickstart", "quickstart\0"]
)
def test_a_preset_is_a_name_and_no_path(preset):
    with pytest.raises(SettingsError, match="unknown preset"):
        settings.load(preset)


# --- a run config on a node -----------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        "data.dir=/etc",
        "data.dir=../../../../etc/passwd",
        "data.hub=somebody/data data.name=femnist",
        "data.dir={theirs}",
    ],
)
def test_a_node_with_data_of_its_own_reads_nothing_that_the_server_names(
    overrides, tmp_path
):
    mine, theirs = tmp_path / "mine.npz", tmp_path / "theirs.npz"
    for path, label in ((mine, 1), (theirs, 2)):
        shape = (6, 28, 28) if "femnist" in overrides else (6, 8, 8)
        np.savez(path, x_train=np.zeros(shape, np.uint8), y_train=np.full(6, label))
    chosen = settings.load("quickstart", overrides.format(theirs=theirs))
    samples, _ = build.node_samples(chosen, {"data-path": str(mine)})
    assert samples.y.tolist() == [1] * 6


@pytest.mark.parametrize("name", ["../x", "os.system", "__class__", "/etc/passwd"])
def test_models_and_data_are_known_names(name):
    with pytest.raises(SettingsError, match="known:"):
        build.build_model(settings.load("quickstart", f"model.name={name}"))
    with pytest.raises(SettingsError, match="known:"):
        build.build_model(settings.load("quickstart", f"data.name={name}"))


def test_a_client_refuses_epochs_without_end_by_run_config():
    LocalGrid(toy_app(), [])  # lets messages be made
    config = {"preset": "quickstart", "overrides": f"training.epochs={2**62}"}
    message = Message(RecordDict(), 1, "train")
    for own, most in (({}, 1000), ({"max-epochs": 4}, 4)):
        context = Context(1, 1, own, RecordDict(), config)
        with pytest.raises(ValueError, match=f"at most {most} local epochs"):
            client.train(message, context)
