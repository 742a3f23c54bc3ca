"""Stratified splits from a seed of their own."""

import numpy as np
from numpy.typing import NDArray


def stratified_split(labels: NDArray[np.uint8], sizes: list[int], seed: int) -> list[NDArray[np.int64]]:
    """Row numbers of len(sizes) + 1 disjoint parts that together hold every row: of exactly `sizes`, then the rest.

    labels (N,). Each class has its share in each part, to within one row (largest remainders; ties go to the lower
    class). Each part is in ascending order. Raises ValueError when sizes leave no row for the rest.

    The order within a class comes from the raw output of PCG64, which numpy keeps the same on every platform and in
    every version; it gives no such promise for Generator.permutation.
    """
    if sum(sizes) >= len(labels):
        raise ValueError(f"parts of {sizes} rows leave none of {len(labels)}")
    keys = np.random.PCG64(seed).random_raw(len(labels))
    by_class = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        by_class.append(rows[np.argsort(keys[rows], kind="stable")])
    taken = np.zeros(len(by_class), dtype=np.int64)
    parts = []
    for size in sizes:
        left = np.array([len(rows) for rows in by_class]) - taken
        counts = _shares(left, size)
        chosen = [rows[t : t + n] for rows, t, n in zip(by_class, taken, counts, strict=True)]
        parts.append(np.sort(np.concatenate(chosen)).astype(np.int64))
        taken += counts
    rest = np.concatenate([rows[t:] for rows, t in zip(by_class, taken, strict=True)])
    return [*parts, np.sort(rest).astype(np.int64)]


def _shares(available: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """`size` shared out in proportion to `available`, in whole numbers, by the method of the largest remainder."""
    total = int(available.sum())
    # Whole-number arithmetic: no rounding that could differ between machines.
    shares = available * size // total
    remainders = available * size % total
    shares[np.argsort(-remainders, kind="stable")[: size - int(shares.sum())]] += 1
    return shares
