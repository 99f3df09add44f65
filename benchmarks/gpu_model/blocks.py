"""Blocks of a kernel on the multiprocessors of a GPU: the time until the last one ends."""

import heapq
from bisect import bisect_left
from collections.abc import Mapping, Sequence

MULTIPROCESSORS, HERTZ = 132, 1.755e9
"""An H100 SXM, at its clock under load."""
PROLOGUE, EPILOGUE = 2500.0, 700.0
"""Assumed clocks of a block before and after its main loop. They are waits for memory, during which other blocks work;
only the last epilogue is not hidden."""
_DONE = 1e-6


def clocks_at(clocks: Mapping[int, float], blocks: int) -> float:
    """Clocks of a quarter for 1024 scores with this many blocks, interpolated between simulated numbers of blocks."""
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
    """Blocks that share a multiprocessor: after their prologues, all advance together."""

    def __init__(self, clocks: Mapping[int, float]) -> None:
        self.clocks = clocks
        self.now = 0.0
        self.waiting: list[tuple[float, float]] = []
        """End of a prologue, and the scores of its block."""
        self.remaining: list[float] = []
        """Scores that running blocks have not computed yet."""

    @property
    def blocks(self) -> int:
        return len(self.waiting) + len(self.remaining)

    def add(self, scores: float) -> None:
        self.waiting.append((self.now + PROLOGUE, scores))

    def _clocks_per_score(self) -> float:
        """Clocks per score of each running block: a quarter computes a fourth of its scores."""
        count = len(self.remaining)
        return count * clocks_at(self.clocks, count) / 4096

    def next(self) -> float:
        """Time of the next change."""
        ends = [end for end, _ in self.waiting]
        if self.remaining:
            ends.append(self.now + min(self.remaining) * self._clocks_per_score())
        return min(ends)

    def advance(self, to: float) -> None:
        """Advance to this time, which is no later than `next`."""
        if self.remaining:
            done = (to - self.now) / self._clocks_per_score()
            self.remaining = [scores - done for scores in self.remaining if scores - done > _DONE * scores]
        self.remaining += [scores for end, scores in self.waiting if end <= to + _DONE]
        self.waiting = [(end, scores) for end, scores in self.waiting if end > to + _DONE]
        self.now = to


def seconds(blocks: Sequence[float], resident: int, clocks: Mapping[int, float]) -> float:
    """Seconds from the first block's start to the last one's end, without the launch.

    Args:
        blocks: scores of each block, in launch order. Blocks without scores take no time.
        resident: blocks of a multiprocessor at once.
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
        # Simultaneous changes are handled together, so that new blocks go to the least loaded multiprocessor.
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
