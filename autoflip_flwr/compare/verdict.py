"""What came of an experiment, in a sentence for each arm."""

from collections.abc import Sequence

from scipy.special import stdtrit

from autoflip_flwr.compare.results import Arm, Experiment, mean_and_error

#: Values of an arm and of the one that it is compared with, a pair for each seed.
_Pairs = Sequence[tuple[float | None, float | None]]


def verdicts(experiment: Experiment) -> list[str]:
    """Compare each arm with the first one, which is FedAvg where that was run.

    ``autoflip: 4.2 x fewer bytes, 3.1 x fewer operations than fedavg, -0.4 points (95 %
    interval -1.1 to +0.3, 5 seeds): undecided``. Bytes and operations are
    those of whole runs, exploration included. Points are percentage points of accuracy
    after the last round. All come from the seeds that both arms have. The interval is
    Student's, of the differences seed by seed.
    """
    base, *others = experiment.arms
    return [f"{arm.name}: {_beside(arm, base)}" for arm in others]


def _beside(arm: Arm, base: Arm) -> str:
    ours, theirs = (
        {run.settings.seed: run.summary for run in each.runs} for each in (arm, base)
    )
    both = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    if not both:
        return f"no seed in common with {base.name}, so no comparison"
    sent = [(a.bytes.total, b.bytes.total) for a, b in both]
    trained = [(a.flops.get("trained"), b.flops.get("trained")) for a, b in both]
    costs = [*_times(sent, "bytes"), *_times(trained, "operations")]
    than = f"{', '.join(costs)} than {base.name}" if costs else f"beside {base.name}"
    return f"{than}, {_points([(a.accuracy, b.accuracy) for a, b in both])}"


def _times(pairs: _Pairs, what: str) -> list[str]:
    """Say how many times fewer or more; nothing of what is zero or unknown."""
    known = [(ours, theirs) for ours, theirs in pairs if ours and theirs]
    if len(known) < len(pairs):
        return []
    ratio = sum(theirs for _, theirs in known) / sum(ours for ours, _ in known)
    times = max(ratio, 1 / ratio)
    number = f"{times:.1f}" if times >= 1.1 else f"{times:.2f}"
    if number == "1.00":
        return [f"no fewer {what}"]
    return [f"{number} x {'fewer' if ratio > 1 else 'more'} {what}"]


def _points(pairs: _Pairs) -> str:
    """Give the difference in accuracy, its interval, and what that shows."""
    gains = [100 * (a - b) for a, b in pairs if a is not None and b is not None]
    if len(gains) < len(pairs):
        return "accuracy unknown"
    mean, error = mean_and_error(gains)
    if error is None:
        return f"{mean:+z.1f} points (1 seed, so no interval)"
    half = error * float(stdtrit(len(gains) - 1, 0.975))
    low, high = mean - half, mean + half
    shown = "a loss" if high < 0 else "a gain" if low > 0 else "undecided"
    return (
        f"{mean:+z.1f} points (95 % interval {low:+z.1f} to {high:+z.1f}, "
        f"{len(gains)} seeds): {shown}"
    )
