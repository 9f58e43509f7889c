"""Edit distance and dynamic time warping as a textbook writes them, in plain Python: slow, and easy to check."""

from collections.abc import Callable, Sequence
from functools import cache


@cache
def edit_distance(left: str, right: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        above, row[0] = row[:], i
        for j, b in enumerate(right, 1):
            row[j] = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b))
    return row[-1]


def warping(
    source: Sequence[str], target: Sequence[str], *, cost: Callable[[str, str], int] = edit_distance
) -> tuple[int, list[list[int]]]:
    """Cost of the cheapest path, and for each target the sources that are matched with it; see `align/dtw.py` on equal costs."""
    infinite = float("inf")
    total = [[infinite] * (len(target) + 1) for _ in range(len(source) + 1)]
    total[0][0] = 0
    for i, a in enumerate(source, 1):
        for j, b in enumerate(target, 1):
            total[i][j] = cost(a, b) + min(total[i - 1][j - 1], total[i - 1][j], total[i][j - 1])
    matched: list[list[int]] = [[] for _ in target]
    i, j = len(source), len(target)
    while (i, j) != (0, 0):
        matched[j - 1].append(i - 1)
        steps = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        i, j = min(steps, key=lambda step: total[step[0]][step[1]])  # the first of equals
    return int(total[len(source)][len(target)]), [sources[::-1] for sources in matched]
