"""Blocks of a kernel over the multiprocessors of a GPU: how long the last one takes."""

import heapq
from bisect import bisect_left
from collections.abc import Mapping, Sequence

MULTIPROCESSORS, HERTZ = 132, 1.755e9
"""Of an H100 SXM, at the clock that it keeps under load."""
PROLOGUE, EPILOGUE = 2500.0, 700.0
"""Clocks of a block before its main loop and after it, assumed: they are waits for memory, while which other blocks
work. The last epilogue nothing covers."""
_DONE = 1e-6


def clocks_at(clocks: Mapping[int, float], blocks: int) -> float:
    """Of a quarter for 1024 scores with so many blocks on the multiprocessor, between those that were simulated."""
    counts = sorted(clocks)
    above = bisect_left(counts, blocks)
    if above == len(counts):
        return clocks[counts[-1]]
    high = counts[above]
    if high == blocks or above == 0:
        return clocks[high]
    low = counts[above - 1]
    return clocks[low] + (clocks[high] - clocks[low]) * (blocks - low) / (high - low)


class _Multiprocessor:
    """Blocks that share it: each waits for its prologue, then all that are past theirs advance together."""

    def __init__(self, clocks: Mapping[int, float]) -> None:
        self.clocks = clocks
        self.now = 0.0
        self.waiting: list[tuple[float, float]] = []
        """When a prologue ends, and the scores of its block."""
        self.left: list[float] = []
        """Scores that blocks at work have still to do."""

    @property
    def blocks(self) -> int:
        return len(self.waiting) + len(self.left)

    def add(self, scores: float) -> None:
        self.waiting.append((self.now + PROLOGUE, scores))

    def _clocks_per_score(self) -> float:
        """Of each block at work: a quarter does a fourth of its scores."""
        count = len(self.left)
        return count * clocks_at(self.clocks, count) / 4096

    def next(self) -> float:
        """When something changes."""
        ends = [end for end, _ in self.waiting]
        if self.left:
            ends.append(self.now + min(self.left) * self._clocks_per_score())
        return min(ends)

    def advance(self, to: float) -> None:
        """To that time, which is no later than `next`."""
        if self.left:
            done = (to - self.now) / self._clocks_per_score()
            self.left = [scores - done for scores in self.left if scores - done > _DONE * scores]
        self.left += [scores for end, scores in self.waiting if end <= to + _DONE]
        self.waiting = [(end, scores) for end, scores in self.waiting if end > to + _DONE]
        self.now = to


def seconds(blocks: Sequence[float], resident: int, clocks: Mapping[int, float]) -> float:
    """From the first block's beginning to the last one's end, without the launch.

    Args:
        blocks: scores of each, in the order in which they are launched. Blocks without any take no time.
        resident: blocks that a multiprocessor has at once.
        clocks: blocks on a multiprocessor → clocks of a quarter for 1024 scores.
    """
    queue = [scores for scores in reversed(blocks) if scores > 0]
    if not queue:
        return 0.0
    multiprocessors = [_Multiprocessor(clocks) for _ in range(MULTIPROCESSORS)]
    events: list[tuple[float, int]] = []
    now, changed = 0.0, list(range(MULTIPROCESSORS))
    while True:
        _fill([multiprocessors[index] for index in changed], queue, resident)
        for index in changed:
            if multiprocessors[index].blocks:
                heapq.heappush(events, (multiprocessors[index].next(), index))
        if not events:
            return (now + EPILOGUE) / HERTZ
        now, changed = events[0][0], []
        # All that changes at once: what is launched then goes to where there is least.
        while events and events[0][0] <= now + _DONE:
            changed.append(heapq.heappop(events)[1])
        for index in changed:
            multiprocessors[index].advance(now)


def _fill(multiprocessors: list[_Multiprocessor], queue: list[float], resident: int) -> None:
    while queue:
        fewest = min(multiprocessors, key=lambda multiprocessor: multiprocessor.blocks)
        if fewest.blocks >= resident:
            return
        fewest.add(queue.pop())
