"""What differences between runs say: mean, sample standard deviation, one-sided Welch test, power.

Lower scores are better. A test asks whether ours are lower than theirs by more than a margin; the two bars are the
challenge's written rule and what its maintainers practise (pull requests 1902 and 2146).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from scipy import stats

ENOUGH_POWER = 0.8
MOST_SEEDS = 1000


class Bar(NamedTuple):
    """How much better, in nats a token, at which probability of being wrong."""

    margin_nats: float
    alpha: float
    text: str


BARS: dict[str, Bar] = {
    "rule": Bar(0.005, 0.01, "the written rule"),
    "practice": Bar(0.0, 0.25, "the maintainers' practice")}


class Sample(NamedTuple):
    """Mean, sample standard deviation (None below two values) and number of independent values."""

    mean: float
    deviation: float | None
    count: int


def sample(values: Iterable[float]) -> Sample:
    """The sample of at least one value; ValueError without any."""
    values = list(values)
    if not values:
        raise ValueError("a sample needs a value")
    return Sample(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


class Welch(NamedTuple):
    """A one-sided test: theirs minus ours, t beyond the margin, degrees of freedom, and the probability of such a t
    where the margin is all there is."""

    difference: float
    t: float
    freedom: float
    p: float


def spread(ours: Sample, theirs: Sample) -> tuple[float, float]:
    """The standard error of the difference of the means, and Welch and Satterthwaite's degrees of freedom (infinite
    where nothing varies)."""
    a, b = ours.deviation ** 2 / ours.count, theirs.deviation ** 2 / theirs.count
    below = a ** 2 / (ours.count - 1) + b ** 2 / (theirs.count - 1)
    return math.sqrt(a + b), (a + b) ** 2 / below if below else math.inf


def welch(ours: Sample, theirs: Sample, margin: float = 0.0) -> Welch | None:
    """Whether ours are lower than theirs by more than `margin`; None where a side has fewer than two values."""
    if min(ours.count, theirs.count) < 2:
        return None
    difference = theirs.mean - ours.mean
    error, freedom = spread(ours, theirs)
    beyond = difference - margin
    t = beyond / error if error else math.copysign(math.inf, beyond) if beyond else 0.0
    return Welch(difference, t, freedom, float(stats.t.sf(t, freedom)))


def power(ours: Sample, theirs: Sample, margin: float, alpha: float) -> float:
    """The probability that the test is passed by samples of these counts, where means and deviations are true. The
    degrees of freedom are those of the true deviations; with three or four seeds that promises a few percent much."""
    error, freedom = spread(ours, theirs)
    beyond = theirs.mean - ours.mean - margin
    if not error:
        return float(beyond > 0)
    least, shift = float(stats.t.isf(alpha, freedom)), beyond / error
    found = float(stats.nct.sf(least, freedom, shift))
    # The noncentral t gives up far out, where the normal distribution is the same.
    return found if math.isfinite(found) else float(stats.norm.sf(least - shift))


def more_seeds(ours: Sample, theirs: Sample, margin: float, alpha: float, both: bool = False) -> int | None:
    """How many further seeds (of ours, or of `both`) pass the test with ENOUGH_POWER, if what was seen is the truth;
    None where no number up to MOST_SEEDS does, or a deviation is unknown."""
    if min(ours.count, theirs.count) < 2 or theirs.mean - ours.mean <= margin:
        return None
    for extra in range(MOST_SEEDS):
        others = theirs._replace(count=theirs.count + extra) if both else theirs
        if power(ours._replace(count=ours.count + extra), others, margin, alpha) >= ENOUGH_POWER:
            return extra
    return None


def judge(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> dict[str, dict[str, dict[str, object]]]:
    """Both bars in both units: unit -> bar -> numbers. `ours` and `theirs` hold values by unit, `nats` and `bpb`, where
    known; the margin in bits a byte is the one in nats by our own ratio of the two."""
    found: dict[str, dict[str, dict[str, object]]] = {}
    ratio = statistics.fmean(ours["nats"]) / statistics.fmean(ours["bpb"]) if ours.get("nats") else None
    for unit in ("nats", "bpb"):
        if not (ours.get(unit) and theirs.get(unit)):
            continue
        a, b, found[unit] = sample(ours[unit]), sample(theirs[unit]), {}
        for name, bar in BARS.items():
            if unit == "bpb" and bar.margin_nats and not ratio:
                continue
            margin = bar.margin_nats / (ratio if unit == "bpb" and bar.margin_nats else 1)
            test = welch(a, b, margin)
            found[unit][name] = {
                "margin": margin, "alpha": bar.alpha, "delta": a.mean - b.mean,
                **({"t": test.t, "df": test.freedom, "p": test.p} if test else {}),
                "met": test.p < bar.alpha if test else None,
                "more_seeds": more_seeds(a, b, margin, bar.alpha),
                "more_seeds_of_both": more_seeds(a, b, margin, bar.alpha, both=True)}
    return found
