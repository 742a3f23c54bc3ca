"""How far a measured accuracy can be trusted."""

from math import sqrt

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % interval for a share of ``correct`` in ``n`` (Wilson 1927, JASA 22, 209-212).

    Unlike the textbook p ± 1.96 s it stays within [0, 1] and does not collapse at 0 % or 100 %.
    Raises ValueError unless 0 <= correct <= n and n > 0.
    """
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"wilson_interval needs 0 <= correct <= n and n > 0, got correct={correct}, n={n}")
    share = correct / n
    spread = Z_95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 * sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    # At the ends the formula gives exactly 0 and 1 but for rounding.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == n else centre + half)
