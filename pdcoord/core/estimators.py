"""Online estimators: bounded, robust to outliers, and finite whatever they are fed."""

import math
from collections.abc import Sequence

OUTLIER_SCALES = 2.5
"""Log residuals further than this many scales from nothing are outliers: one observation in eighty, were
they normal."""
SCALE_MIN = 0.05
SCALE_MAX = 1.0
SCALE_FIRST = 0.6
"""Of log residuals before anything was seen: a seed may be wrong by a factor of four without looking odd."""

LOG_RESIDUAL_MAX = 5.0
"""What one observation can say at most: 150 times as long."""

_FORGETTING = 0.98
_PRIOR_VARIANCE = 2.0
"""Of the seed's time at the reference point, in an observation's: the seed counts as half of one."""
_SHARE_FREE = 0.1
"""Of that time: how far a coefficient that the seed has at nearly nothing may be from it."""
_VARIANCE_MAX = 4.0
"""Times the prior's: beyond it forgetting would make noise of what nothing was heard of lately."""
_SCALE_GAIN_MIN = 0.05
_SCALE_OF_MEDIAN = 1.48
"""A normal distribution's standard deviation beside the median of what is off."""
_SPREAD_GAIN = 0.1
_TIME_S_MIN = 1e-6
_TIME_S_MAX = 3_600.0

Row = tuple[float, float, float]


class RobustScale:
    """How far log residuals usually are from nothing, by what is not an outlier.

    Attributes:
        scale: about one standard deviation; starts wide, so that a wrong seed is found out.
        spread: the same, but starts at nothing: what was seen, and no doubt in what was not.
    """

    def __init__(self) -> None:
        self.scale = SCALE_FIRST
        self.spread = 0.0
        self._seen = 0.0

    @property
    def limit(self) -> float:
        """Log residuals up to here are taken as they are."""
        return OUTLIER_SCALES * self.scale

    def restart(self, residuals: Sequence[float]) -> None:
        """Begin again from all that was seen so far: its median does not mind outliers."""
        middle = sorted(abs(residual) for residual in residuals)[len(residuals) // 2]
        self.scale = min(max(_SCALE_OF_MEDIAN * middle, SCALE_MIN), SCALE_MAX)

    def clip(self, residual: float) -> float:
        """Huber's: an outlier counts as much as the furthest residual that is none."""
        limit = self.limit
        return max(-limit, min(limit, residual))

    def learn(self, residual: float, weight: float) -> None:
        self._seen += weight
        squared = self.clip(residual) ** 2
        gain = weight * max(1.0 / (self._seen + 2.0), _SCALE_GAIN_MIN)
        variance = self.scale * self.scale
        self.scale = min(max(math.sqrt(variance + gain * (squared - variance)), SCALE_MIN), SCALE_MAX)
        spread = self.spread * self.spread
        self.spread = min(math.sqrt(spread + _SPREAD_GAIN * weight * (squared - spread)), SCALE_MAX)


class LinearTime:
    """A time that is a sum of three features times coefficients that are at least 0.

    Recursive least squares with forgetting (Ljung, System Identification, 2nd ed., 11.2), on rows divided by
    the time itself: errors of a time grow with it. Coefficients below 0 are projected onto the rest in the
    metric of the covariance. The covariance is bounded from above by the prior's and, by the forgetting,
    from below, so that it neither blows up nor freezes.

    Args:
        seed: the coefficients to begin with; at least 0, finite.
        reference: a usual point; makes the features commensurable, which keeps the covariance sound.
    """

    def __init__(self, seed: Row, reference: Row) -> None:
        self._reference = reference
        scaled = [s * r for s, r in zip(seed, reference, strict=True)]
        usual_s = max(sum(scaled), 1e-3)
        self._floor_s = max(usual_s * 1e-3, _TIME_S_MIN)
        # Shares of the prior: most of it in the coefficients that make up most of the time.
        freedom = [max(part, _SHARE_FREE * usual_s) for part in scaled]
        norm = sum(part * part for part in freedom)
        self._variance = [_PRIOR_VARIANCE * usual_s * usual_s * part * part / norm for part in freedom]
        self._variance_max = [_VARIANCE_MAX * variance for variance in self._variance]
        self._theta = scaled
        self._covariance = _diagonal(self._variance)

    @property
    def coefficients(self) -> Row:
        """Finite and at least 0, in units of the features."""
        a, b, c = (t / r for t, r in zip(self._theta, self._reference, strict=True))
        return a, b, c

    def time_s(self, features: Row) -> float:
        """Predicted; above 0."""
        (t0, t1, t2), (f0, f1, f2), (r0, r1, r2) = self._theta, features, self._reference
        return max(t0 * f0 / r0 + t1 * f1 / r1 + t2 * f2 / r2, self._floor_s)

    def learn(self, features: Row, log_residual: float, weight: float) -> None:
        """Move towards a time that was `exp(log_residual)` times the predicted one.

        Args:
            weight: 1.0 for an observation of the usual worth, less for a doubtful one; above 0.
        """
        predicted_s = self.time_s(features)
        seen_s = predicted_s * math.exp(max(-LOG_RESIDUAL_MAX, min(LOG_RESIDUAL_MAX, log_residual)))
        # Errors are relative to the true time, which is somewhere between the two.
        unit_s = math.sqrt(predicted_s * seen_s)
        (f0, f1, f2), (r0, r1, r2) = features, self._reference
        x0, x1, x2 = f0 / r0 / unit_s, f1 / r1 / unit_s, f2 / r2 / unit_s
        gains = [p0 * x0 + p1 * x1 + p2 * x2 for p0, p1, p2 in self._covariance]
        total = 1.0 / weight + x0 * gains[0] + x1 * gains[1] + x2 * gains[2]
        error = (seen_s - predicted_s) / unit_s / total
        theta = [t + g * error for t, g in zip(self._theta, gains, strict=True)]
        updated = [
            [(p - own * gain / total) / _FORGETTING for p, gain in zip(line, gains, strict=True)]
            for line, own in zip(self._covariance, gains, strict=True)
        ]
        self._take(theta, updated)

    def scale_by(self, factor: float) -> None:
        """Every time is `factor` times what it was; above 0."""
        theta = [t * factor for t in self._theta]
        self._take(theta, [[p * factor * factor for p in line] for line in self._covariance])

    def _take(self, theta: list[float], covariance: list[list[float]]) -> None:
        if not math.isfinite(sum(theta) + sum(map(sum, covariance))):
            self._covariance = _diagonal(self._variance)
            return
        self._covariance = _bounded(covariance, self._variance_max)
        self._theta = [min(t, _TIME_S_MAX) for t in _projected(theta, self._covariance)]


def _diagonal(values: Sequence[float]) -> list[list[float]]:
    return [[value if i == j else 0.0 for j in range(3)] for i, value in enumerate(values)]


def _bounded(covariance: list[list[float]], variance_max: Sequence[float]) -> list[list[float]]:
    """The covariance with no variance above its bound; correlations stay what they are."""
    (a, ab, ac), (_, b, bc), (_, _, c) = covariance
    least = [1e-9 * bound for bound in variance_max]
    is_low = a <= variance_max[0] and b <= variance_max[1] and c <= variance_max[2]
    is_high = a >= least[0] and b >= least[1] and c >= least[2]
    if is_low and is_high and ab * ab <= a * b and ac * ac <= a * c and bc * bc <= b * c:
        return covariance
    shrink = [
        math.sqrt(min(1.0, bound / max(covariance[i][i], least[i]))) for i, bound in enumerate(variance_max)
    ]
    made = [[covariance[i][j] * shrink[i] * shrink[j] for j in range(3)] for i in range(3)]
    for i in range(3):
        made[i][i] = max(made[i][i], least[i])
        for j in range(i):
            # Rounding must make it neither lopsided nor indefinite.
            bound = math.sqrt(made[i][i] * max(made[j][j], least[j]))
            made[i][j] = made[j][i] = max(-bound, min(bound, (made[i][j] + made[j][i]) / 2.0))
    return made


def _projected(theta: list[float], covariance: list[list[float]]) -> list[float]:
    """The nearest coefficients that are at least 0, one after the other."""
    if min(theta) >= 0.0:
        return theta
    for _ in range(3):
        worst = min(range(3), key=lambda index: theta[index])
        if theta[worst] >= 0.0:
            break
        share = theta[worst] / covariance[worst][worst]
        theta = [t - covariance[i][worst] * share for i, t in enumerate(theta)]
        theta[worst] = 0.0
    return [max(t, 0.0) for t in theta]


_FACTOR_GAIN = 0.1
_SETTLING_GAIN = 0.4
_SETTLING_COUNT = 6
_OUTLIERS_IN_A_ROW = 3
_SETTLING_MAX = 1.0
_LOG_FACTOR_MAX = math.log(20.0)


class Slowness:
    """How many times slower than its pool one endpoint is, followed on a logarithmic scale.

    One outlier may be chance, and so may two. From the third in a row on the same side the endpoint is taken
    to have changed: it is followed fast, and teaches its pool nothing until it has settled.

    Attributes:
        log_factor: 0.0 for an endpoint like its pool, above for a slower one.
        seen_count: observations so far.
    """

    def __init__(self) -> None:
        self.log_factor = 0.0
        self.seen_count = 0
        self._streak = 0
        self._settling_left = 0

    def learn(self, residual: float, limit: float, weight: float) -> bool:
        """Take in a log residual from this endpoint's own prediction; whether its pool may learn from it.

        Where it may not, `is_changing` tells chance from change.

        Args:
            limit: residuals further from nothing are outliers.
        """
        self.seen_count += 1
        is_outlier = abs(residual) > limit
        if not is_outlier:
            self._streak = 0
        else:
            side = 1 if residual > 0.0 else -1
            self._streak = self._streak + side if self._streak * side > 0 else side
        if abs(self._streak) >= _OUTLIERS_IN_A_ROW:
            self._settling_left = _SETTLING_COUNT
        if self._settling_left:
            self._settling_left -= 1
            self._move(_SETTLING_GAIN * math.sqrt(weight) * max(-_SETTLING_MAX, min(_SETTLING_MAX, residual)))
            return False
        self._move(_FACTOR_GAIN * weight * max(-limit, min(limit, residual)))
        return not is_outlier

    @property
    def is_changing(self) -> bool:
        """Whether what was seen last may be a change of this endpoint, and says nothing of others."""
        return self._settling_left > 0 or abs(self._streak) > 1

    def restart(self) -> None:
        """The pool has been told all that was seen so far."""
        self.log_factor = 0.0
        self._streak = self._settling_left = 0

    def shift(self, log_factor: float) -> None:
        """The pool takes over what is common to all."""
        self._move(-log_factor)

    def fade(self, share: float) -> None:
        """Nothing was heard of it for a while: come nearer to the pool again."""
        self.log_factor *= share

    def _move(self, by: float) -> None:
        self.log_factor = max(-_LOG_FACTOR_MAX, min(_LOG_FACTOR_MAX, self.log_factor + by))


_RISE_GAIN = 0.5
_FALL_GAIN = 0.15
_FALL_MAX = 1.5


class PathBandwidth:
    """What one path carries, by transfers whose times have other delays in them too.

    A good transfer proves that the path can; a slow one may have waited for something else. So it rises
    fast and falls slowly: to half after four slow ones in a row at the earliest.

    Attributes:
        bytes_per_s: above 0, no more than seeded.
        until_s: what was learned holds until then.
    """

    def __init__(self, seeded_bytes_per_s: float) -> None:
        self.bytes_per_s = seeded_bytes_per_s
        self.until_s = 0.0

    def learn(self, bytes_per_s: float, seeded_bytes_per_s: float) -> None:
        """Take in one transfer; both above 0."""
        change = math.log(bytes_per_s / self.bytes_per_s)
        change = _RISE_GAIN * change if change > 0.0 else _FALL_GAIN * max(change, -_FALL_MAX)
        self.bytes_per_s = min(max(self.bytes_per_s * math.exp(change), 1.0), seeded_bytes_per_s)


_MEDIAN_STEP = 0.1
_MEDIAN_FULL = 0.5


class MedianTime:
    """About the median of a time: each observation moves it by so much at most, however far off it is.

    Attributes:
        time_s: within the bounds.
    """

    def __init__(self, seed_s: float, time_s_min: float, time_s_max: float) -> None:
        self.time_s = seed_s
        self._bounds = time_s_min, time_s_max

    def learn(self, seen_s: float) -> None:
        least, most = self._bounds
        change = math.log(min(max(seen_s, least), most) / self.time_s) / _MEDIAN_FULL
        moved = self.time_s * math.exp(_MEDIAN_STEP * max(-1.0, min(1.0, change)))
        self.time_s = min(max(moved, least), most)


class Mean:
    """A mean that forgets: of all at first, of about the last `memory` later."""

    def __init__(self, memory: int) -> None:
        self.value = 0.0
        self.count = 0
        self._memory = memory

    def learn(self, value: float) -> None:
        self.count = min(self.count + 1, self._memory)
        self.value += (value - self.value) / self.count
