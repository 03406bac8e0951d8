"""The order in which a mix takes the documents of several sources.

A weight is a share: of weights 3 and 1, three documents in four come from the first source. Document j (from 0) of a
source of weight w is due at the time (j + 1/2) / w, and documents are taken in the order of their times. The shares are
right to within a document after any number of them, not on average as with random draws:

    weights 3, 1   a due at 0.17 0.50 0.83 1.17 1.50 1.83 ...   b due at 0.50 1.50 ...   taken: a a b a a a b a ...

"first_exhausted" ends before the first document that would have to be repeated. "all_exhausted" ends when every source
has been taken whole, and starts a shorter one again. The names are those of ``datasets.interleave_datasets``.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from ..errors import DataError, is_number, plain_value, short_repr

T = TypeVar("T")
STRATEGIES = ("first_exhausted", "all_exhausted")
_MOST_DOCUMENTS = 10**8


def weighted_sources(weights: Mapping[Any, float] | Iterable[tuple[Any, float]]) -> tuple[list[Any], list[float]]:
    """Return the sources and the weights of a dict, or of pairs, scaled to a sum of 1."""
    pairs = list(weights.items() if isinstance(weights, Mapping) else weights) if _is_iterable(weights) else []
    if not pairs or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise DataError(f"a mix of {short_repr(weights, 100)}; allowed: {{source: weight}} or (source, weight) pairs")
    pairs = [(source, plain_value(weight)) for source, weight in pairs]
    for source, weight in pairs:
        if not is_number(weight) or weight <= 0:
            what = f"the weight of {short_repr(source, 100)} is {short_repr(weight, 60)}"
            raise DataError(f"{what}; allowed: a number > 0. Leave out sources that you do not want")
    total = sum(float(weight) for _, weight in pairs)
    return [source for source, _ in pairs], [float(weight) / total for _, weight in pairs]


def _is_iterable(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes))


def due_order(sizes: Sequence[int], weights: Sequence[float], strategy: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each document of a mix, and its number in that source, counted on when it starts again.

    Example:
        >>> [part.tolist() for part in due_order([6, 1], [0.75, 0.25], "first_exhausted")]
        [[0, 0, 1, 0, 0, 0], [0, 1, 0, 2, 3, 4]]
    """
    if strategy == "first_exhausted":
        counts = [size + 1 for size in sizes]  # one more, which ends the mix
    else:
        end = max((size - 0.5) / weight for size, weight in zip(sizes, weights, strict=True))
        counts = [max(size, int(end * weight) + 2) for size, weight in zip(sizes, weights, strict=True)]
        if sum(counts) > _MOST_DOCUMENTS:
            raise DataError(
                f"a mix of {sum(counts):,} documents; allowed: {_MOST_DOCUMENTS:,}. Make the weights closer"
            )
    sources = np.repeat(np.arange(len(sizes)), counts)
    numbers = np.concatenate([np.arange(count) for count in counts])
    due = (numbers + 0.5) / np.asarray(weights)[sources]
    is_missing = (numbers == np.asarray(sizes)[sources]) & (strategy == "first_exhausted")
    order = np.lexsort((sources, ~is_missing, due))  # of those due at one time, a missing one comes first
    sources, numbers = sources[order], numbers[order]
    if strategy == "first_exhausted":
        end_at = int(np.argmax(is_missing[order]))
    else:
        end_at = int(np.flatnonzero(numbers == np.asarray(sizes)[sources] - 1)[-1]) + 1
    return sources[:end_at], numbers[:end_at]


def interleaved(openers: Sequence[Callable[[], Iterator[T]]], weights: Sequence[float], strategy: str) -> Iterator[T]:
    """Yield the items of several iterators in the order of :func:`due_order`. ``openers`` start them."""
    readers = [opener() for opener in openers]
    nothing = object()
    ahead: list[Any] = [next(reader, nothing) for reader in readers]
    whole: set[int] = set()
    taken = [0] * len(readers)
    due = [(0.5 / weight, ahead[i] is not nothing, i) for i, weight in enumerate(weights)]
    heapq.heapify(due)
    while True:
        _, _, i = heapq.heappop(due)
        if ahead[i] is nothing:
            return
        yield ahead[i]
        taken[i] += 1
        ahead[i] = next(readers[i], nothing)
        if ahead[i] is nothing and strategy == "all_exhausted":
            whole.add(i)
            if len(whole) == len(readers):
                return
            readers[i] = openers[i]()
            ahead[i] = next(readers[i], nothing)
        heapq.heappush(due, ((taken[i] + 0.5) / weights[i], ahead[i] is not nothing, i))
