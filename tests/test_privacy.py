"""Epsilon against a table made with dp-accounting 0.6, and against the closed form of the Gaussian mechanism."""

import builtins

import pytest

from gdjax import batching, privacy

TABLE = [
    (60000, 256, 1.1, 14062, 1e-5, 2.3817, 2.5966),
    (60000, 256, 0.7, 3515, 1e-5, 3.4040, 4.0646),
    (50000, 1024, 1, 4882, 1e-5, 9.5377, 10.3345),
    (50000, 4096, 2, 1220, 1e-5, 7.3402, 7.9360),
    (1440, 32, 1.5, 1350, 1e-4, 2.2118, 2.4629),
]
RUN = {"num_examples": 1440, "batch_size": 32, "num_updates": 1350, "delta": 1e-4}


@pytest.mark.parametrize(("num_examples", "batch_size", "sigma", "num_updates", "delta", "pld", "rdp"), TABLE)
def test_epsilon_of_a_run(num_examples, batch_size, sigma, num_updates, delta, pld, rdp):
    pytest.importorskip("dp_accounting")
    run = {"num_examples": num_examples, "batch_size": batch_size, "num_updates": num_updates, "delta": delta}
    for accountant, expected in (("pld", pld), ("rdp", rdp)):
        found = privacy.epsilon(noise_multiplier=sigma, accountant=accountant, **run)
        assert found == pytest.approx(expected, abs=1e-4)


def test_without_sampling_it_is_the_gaussian_mechanism():
    pytest.importorskip("dp_accounting")
    run = {"num_examples": 10, "batch_size": 10, "num_updates": 100, "delta": 1e-5}
    assert privacy.epsilon(noise_multiplier=20, **run) == pytest.approx(1.993091, abs=2e-6)


@pytest.mark.slow
def test_the_noise_for_an_epsilon_is_its_inverse():
    pytest.importorskip("dp_accounting")
    unsampled = {"num_examples": 10, "batch_size": 10, "num_updates": 100, "delta": 1e-5}
    assert privacy.noise_multiplier(epsilon=1.993091, **unsampled) == pytest.approx(20, abs=2e-4)
    rdp = privacy.noise_multiplier(epsilon=2.4629, accountant="rdp", **RUN)
    assert rdp == pytest.approx(1.5, abs=2e-4)


NOISE = [(256, 0.7894), (16384, 3.7458)]
NOISE += [pytest.param(*row, marks=pytest.mark.nightly) for row in [(1024, 1.1594), (4096, 1.9952)]]


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "sigma"), NOISE)
def test_the_noise_for_20_epochs_at_epsilon_3(batch_size, sigma):
    pytest.importorskip("dp_accounting")
    run = {"num_examples": 50000, "batch_size": batch_size, "num_updates": 10**6 // batch_size, "delta": 1e-5}
    assert privacy.noise_multiplier(epsilon=3, **run) == pytest.approx(sigma, abs=2e-4)


def test_no_noise_is_no_privacy():
    assert privacy.epsilon(noise_multiplier=0, **RUN) == float("inf")


@pytest.mark.parametrize("stream", [batching.reshuffled, batching.shuffled_once, batching.with_replacement, "poisson"])
def test_streams_that_are_not_poisson_are_refused(stream):
    for function, number in ((privacy.epsilon, "noise_multiplier"), (privacy.noise_multiplier, "epsilon")):
        with pytest.raises(ValueError, match=r"must be batching\.poisson"):
            function(**{number: 1.0}, **RUN, stream=stream)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_multiplier": -1}, "noise_multiplier=-1 must be at least 0"),
        ({"batch_size": 1441}, "batch_size=1441 must be positive and at most num_examples=1440"),
        ({"num_updates": 0}, "num_updates=0"),
        ({"delta": 0.0}, "delta=0.0 must be between 0 and 1"),
        ({"accountant": "moments"}, "accountant='moments' must be one of pld, rdp"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        privacy.epsilon(**({"noise_multiplier": 1.0} | RUN | arguments))
    if "noise_multiplier" not in arguments:
        with pytest.raises(ValueError, match=message):
            privacy.noise_multiplier(**({"epsilon": 1.0} | RUN | arguments))


def test_an_epsilon_that_cannot_be_is_refused():
    for epsilon in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="must be positive and finite"):
            privacy.noise_multiplier(epsilon=epsilon, **RUN)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    imported = builtins.__import__

    def without(name, *arguments):
        if name.startswith("dp_accounting"):
            raise ModuleNotFoundError(name)
        return imported(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gdjax\[privacy\]'"):
        privacy.epsilon(noise_multiplier=1.0, **RUN)
