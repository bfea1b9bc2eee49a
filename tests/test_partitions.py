"""Every sample lands on exactly one client, or the settings are refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.testing import assert_array_equal

from autoflip_flwr.app.data import partitions
from autoflip_flwr.errors import SettingsError

PARTITIONS = ("iid", "pathological", "dirichlet", "natural")

labels_of_up_to_six_classes = npst.arrays(
    np.int64, st.integers(1, 60), elements=st.integers(0, 5)
)
BALANCED = np.repeat(np.arange(10), 30)


def divide(labels, users=None, **chosen):
    return partitions.divide(labels, partitions.Division(**chosen), users=users)


def assert_each_sample_is_on_one_client(clients, count):
    assert_array_equal(np.sort(np.concatenate(clients)), np.arange(count))
    assert all(len(rows) for rows in clients)


@settings(max_examples=150)
@given(
    labels=labels_of_up_to_six_classes,
    partition=st.sampled_from(PARTITIONS),
    num_partitions=st.integers(1, 12),
    alpha=st.floats(0.01, 100),
    classes_per_client=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_every_sample_lands_on_exactly_one_client(
    labels, partition, num_partitions, alpha, classes_per_client, seed
):
    chosen = {
        "num_partitions": num_partitions,
        "partition": partition,
        "alpha": alpha,
        "classes_per_client": classes_per_client,
        "seed": seed,
        "users": labels * 7 + 3,
    }
    try:
        clients = divide(labels, **chosen)
    except SettingsError:  # refused as a whole: nothing is lost either
        return
    assert len(clients) == num_partitions
    assert_each_sample_is_on_one_client(clients, len(labels))
    for again, rows in zip(divide(labels, **chosen), clients, strict=True):
        assert_array_equal(again, rows)


@pytest.mark.parametrize("num_partitions", [1, 3, 5, 9, 10, 11, 30])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_ordinary_settings_are_not_refused(partition, num_partitions):
    clients = divide(
        BALANCED,
        num_partitions=num_partitions,
        partition=partition,
        alpha=1.0,
        classes_per_client=10 if num_partitions == 1 else 4,
        users=np.arange(len(BALANCED)) % 40,
    )
    assert_each_sample_is_on_one_client(clients, len(BALANCED))


@pytest.mark.parametrize("partition", ["iid", "pathological", "dirichlet"])
def test_the_seed_decides(partition):
    one, two = (
        divide(
            BALANCED,
            num_partitions=5,
            partition=partition,
            classes_per_client=3,
            alpha=1.0,
            seed=seed,
        )
        for seed in (0, 1)
    )
    assert any(
        set(a.tolist()) != set(b.tolist()) for a, b in zip(one, two, strict=True)
    )


def test_global_randomness_is_neither_used_nor_changed():
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    for partition in PARTITIONS:
        divide(
            BALANCED,
            num_partitions=10,
            partition=partition,
            users=BALANCED,
            alpha=1.0,
        )
    assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize("num_partitions", [5, 7, 10, 12])
def test_pathological_clients_hold_so_many_classes_and_together_all(num_partitions):
    clients = divide(BALANCED, num_partitions=num_partitions, partition="pathological")
    held = [np.unique(BALANCED[rows]) for rows in clients]
    assert [len(classes) for classes in held] == [2] * num_partitions
    assert_array_equal(np.unique(np.concatenate(held)), np.arange(10))


def test_a_small_alpha_skews_the_classes_and_a_large_one_does_not():
    def skew(alpha):
        clients = divide(BALANCED, num_partitions=4, partition="dirichlet", alpha=alpha)
        counts = [np.bincount(BALANCED[rows], minlength=10) for rows in clients]
        return float(np.std(counts))

    assert skew(0.1) > 3 * skew(1000.0)


def test_natural_users_are_dealt_round_robin_and_never_divided():
    users = np.array([5, 9, 5, 7, 9, 11, 7, 5])
    clients = divide(
        np.zeros(8, dtype=np.int64), num_partitions=2, partition="natural", users=users
    )
    assert [sorted(set(users[rows].tolist())) for rows in clients] == [[5, 9], [7, 11]]


def test_as_many_clients_as_users_gives_each_user_a_client(capfd):
    users = np.array([2, 0, 1, 1, 0])
    clients = divide(
        np.zeros(5, dtype=np.int64), num_partitions=3, partition="natural", users=users
    )
    assert [set(users[rows].tolist()) for rows in clients] == [{0}, {1}, {2}]
    assert capfd.readouterr().err == ""  # no progress bar


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            {"partition": "idd"},
            r"partition: expected one of \['iid', 'patho.* got 'idd'.* mean 'iid'",
        ),
        ({"num_partitions": 0}, "num_partitions: expected a whole .* >= 1, got 0"),
        ({"num_partitions": 301}, "301 clients cannot each get one of 300 samples"),
        ({"alpha": 0.0}, "alpha: expected a number > 0, got 0.0"),
        ({"alpha": -1.0}, "alpha: expected a number > 0, got -1.0"),
        ({"alpha": float("nan")}, "alpha: expected a number > 0, got nan"),
        ({"classes_per_client": 0}, "classes_per_client: expected .* >= 1, got 0"),
        ({"seed": -1}, "seed: expected a whole number >= 0, got -1"),
        (
            {"partition": "pathological", "classes_per_client": 11},
            r"classes_per_client must be 1\.\.10, .* got 11",
        ),
        (
            {"partition": "pathological", "num_partitions": 4},
            "4 clients x 2 classes per client = 8 < 10 classes.* at least 3",
        ),
        (
            {"partition": "pathological", "num_partitions": 300},
            "a class has fewer samples than clients that hold it",
        ),
        (
            {"partition": "dirichlet", "alpha": 0.001, "num_partitions": 200},
            "alpha=0.001 left one of 200 clients without samples .* raise alpha",
        ),
        ({"partition": "natural"}, "needs a dataset that says whose each sample is"),
        (
            {"partition": "natural", "users": BALANCED, "num_partitions": 11},
            "has 10 users for 11 clients; use at most 10",
        ),
    ],
)
def test_impossible_settings_say_what_is_possible(chosen, message):
    with pytest.raises(SettingsError, match=message):
        divide(BALANCED, **{"num_partitions": 5, **chosen})


def test_clients_left_without_samples_are_refused_by_number():
    with pytest.raises(SettingsError, match=r"leaves the clients \[2, 3\] without"):
        divide(
            np.arange(5),
            num_partitions=4,
            partition="pathological",
            classes_per_client=4,
        )
