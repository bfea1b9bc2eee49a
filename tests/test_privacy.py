"""What noise on guidance buys, beside the accountant that Flower ships."""

import numpy as np
import pytest
from flat import flat
from flwr.serverapp import PrivacyConfig, RdpAccountant
from flwr.supercore.privacy_accounting import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    SamplingMethod,
)
from inprocess import LocalGrid, net, run, toy_app
from numpy.testing import assert_allclose
from test_runlog import go, summary_of

from autoflip_flwr import AutoFLIP, AutoFlipMod, GuidancePrivacy, settings
from autoflip_flwr.errors import GuidanceError, SettingsError

NODES = [11, 12, 13]


def accounted(noise, delta, releases):
    accountant = RdpAccountant(
        PrivacyConfig(
            target_delta=delta,
            population_size=100,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
            sampling_method=SamplingMethod.NO_AMPLIFICATION,
        )
    )
    event = GaussianPrivacyEvent(
        noise_multiplier=noise, sample_size=100, population_size=100
    )
    accountant.compose(event, count=releases)
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("releases", [1, 5])
def test_epsilon_is_at_most_what_flowers_accountant_bounds_and_close_to_it(
    noise, releases
):
    privacy = GuidancePrivacy(clip=3.0, noise=noise)
    for delta in (1e-5, 1e-3):
        bound = accounted(noise, delta, releases)
        found = privacy.epsilon(delta, releases=releases, replace=False)
        assert 0.7 * bound - 0.1 <= found <= bound
        stronger = accounted(noise / np.sqrt(2), delta, releases)
        found = privacy.epsilon(delta, releases=releases)
        assert 0.7 * stronger - 0.1 <= found <= stronger


def test_epsilon_by_hand():
    # one standard deviation per distance: Phi(1/2 - e) - exp(e) Phi(-1/2 - e) = delta;
    # at e = 1 that is 0.3085 - 2.7183 x 0.0668 = 0.1269
    privacy = GuidancePrivacy(clip=1.0, noise=1.0)
    assert privacy.epsilon(0.12693674, replace=False) == pytest.approx(1.0, abs=1e-4)
    assert privacy.epsilon(0.5, replace=False) == 0.0


def test_guidance_is_clipped_and_noised_as_told():
    given = {"a": np.full((50, 40), 3.0, np.float32), "b": np.zeros(4000, np.float32)}
    rng = np.random.default_rng(0)
    found = GuidancePrivacy(clip=10.0, noise=0.001).protect(given, rng)
    assert found["a"].dtype == np.float32
    # 3 sqrt(2000) = 134 is scaled to 10
    np.testing.assert_allclose(found["a"], 10 / np.sqrt(2000), atol=0.06)
    noised = found["b"][found["b"] > 0]
    assert 1800 < len(noised) < 2200, "half of the noise is negative, hence zero"
    assert np.sqrt(np.square(noised).mean()) == pytest.approx(0.01, rel=0.05)
    small = {"a": np.full(4, 0.5, np.float32)}
    kept = GuidancePrivacy(clip=10.0, noise=1e-9).protect(small)
    np.testing.assert_allclose(kept["a"], 0.5, rtol=1e-5)


def test_the_noise_cannot_be_foreseen():
    privacy, given = GuidancePrivacy(clip=1.0, noise=1.0), {"a": np.ones(50)}
    np.random.seed(0)  # noqa: NPY002
    first = privacy.protect(given)
    np.random.seed(0)  # noqa: NPY002
    assert (first["a"] != privacy.protect(given)["a"]).any()


@pytest.mark.parametrize(
    "values", [{"clip": 0.0, "noise": 1.0}, {"clip": 1.0, "noise": float("inf")}]
)
def test_impossible_privacy_is_refused(values):
    with pytest.raises(SettingsError, match=r"privacy: expected (clip|noise) > 0"):
        GuidancePrivacy(**values)
    with pytest.raises(SettingsError, match=r"delta in \(0, 1\)"):
        GuidancePrivacy(clip=1.0, noise=1.0).epsilon(0.0)


def guided(privacy, **options):
    app = toy_app(mods=[AutoFlipMod(privacy=privacy)])
    grid = LocalGrid(app, NODES)
    strategy = AutoFLIP(**flat(seed=0, **options))
    run(strategy, grid, net(), 1)
    return [s.arrays["autoflip.guidance"].data for s in grid.up if s.phase == "explore"]


#: What the server is told of the noise: a tensor may then have guidance zero.
NOISY = {"exploration_privacy_clip": 1e-3, "exploration_privacy_noise": 2.0}


def test_what_leaves_the_client_is_noised():
    plain = guided(None)
    assert plain == guided(lambda context: None)
    loud = guided(GuidancePrivacy(clip=1e-3, noise=2.0), **NOISY)
    again = guided(lambda context: GuidancePrivacy(clip=1e-3, noise=2.0), **NOISY)
    assert len({*plain, *loud, *again}) == 9
    tiny = guided(GuidancePrivacy(clip=1e9, noise=1e-20))
    for one, other in zip(plain, tiny, strict=True):
        codes = [np.frombuffer(frame, np.uint8)[40:] for frame in (one, other)]
        assert_allclose(*(code.astype(int) for code in codes), atol=1)


def test_noise_that_hides_a_tensor_ends_no_run_of_a_server_that_knows_of_it():
    class Hiding(GuidancePrivacy):
        """Noise below zero on each entry of one bias, which happens by chance."""

        def protect(self, guidance, **options):
            return {**guidance, "3.bias": np.zeros(3, np.float32)}

    privacy = Hiding(clip=1e-3, noise=2.0)
    assert len(guided(privacy, **NOISY)) == 3
    with pytest.raises(GuidanceError, match=r"\['3.bias'\] moved for none of 3"):
        guided(privacy)


def test_a_private_client_tells_nothing_else(caplog):
    privacy = GuidancePrivacy(clip=1.0, noise=1.0)
    with pytest.raises(RuntimeError, match="tells its guidance alone, with noise"):
        guided(privacy, warm_start=True)
    with pytest.raises(RuntimeError, match="asked for 'saliency'"):
        guided(privacy, method="ssfl")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("exploration.privacy-clip=1", "go together"),
        ("exploration.warm-start=true", "signs of the updates without noise"),
        ("strategy.name=ssfl", "not gradients"),
    ],
)
def test_settings_that_would_tell_more_are_refused(overrides, message):
    both = "exploration.privacy-clip=1 exploration.privacy-noise=1"
    given = overrides if "clip" in overrides else f"{both} {overrides}"
    with pytest.raises(SettingsError, match=message):
        settings.load("quickstart", given)


def test_a_run_says_what_its_noise_buys(tmp_path, caplog):
    go(tmp_path / "run", "exploration.privacy-clip=0.1 exploration.privacy-noise=4")
    epsilon = GuidancePrivacy(clip=0.1, noise=4.0).epsilon(1e-5)
    assert f"({epsilon:.3g}, 1e-05)-differentially private" in caplog.text
    assert summary_of(tmp_path / "run")["density"] == pytest.approx(0.2, abs=0.01)


def test_explorations_add_up_in_log_and_summary(tmp_path, caplog):
    """Rounds 1, 2 and 3 explore: three releases of each client's data."""
    noise = "exploration.privacy-clip=0.1 exploration.privacy-noise=4"
    go(tmp_path / "run", f"{noise} exploration.every=1 rounds=3")
    privacy = GuidancePrivacy(clip=0.1, noise=4.0)
    once, thrice = (privacy.epsilon(1e-5, releases=n) for n in (1, 3))
    assert once < thrice
    assert summary_of(tmp_path / "run")["privacy"] == {
        "delta": 1e-5,
        "epsilon": pytest.approx(once),
        "explorations": 3,
        "epsilon_total": pytest.approx(thrice),
    }
    assert f"a client's 3 together: ({thrice:.3g}, 1e-05)" in caplog.text
    assert f"({thrice:.3g}, 1e-05)-differentially private for a" in caplog.text


@pytest.mark.parametrize("preset", settings.presets())
def test_privacy_is_off_by_default(preset):
    chosen = settings.load(preset).exploration
    assert (chosen.privacy_clip, chosen.privacy_noise) == (0, 0)
