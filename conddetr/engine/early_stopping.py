"""Early stopping: the end of a run whose AP no longer rises."""

from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """Counts evaluations without a better AP; checkpoints keep the counts."""

    evaluations: int = 0
    """Evaluations in a row without a better AP, until now."""
    ap: float = -1.0
    """The last AP that counted as better, in [0, 1]; -1: none yet."""

    def update(self, ap: float, min_delta: float) -> None:
        """Count an evaluation. An undefined AP (-1) does not count.

        Args:
            ap: AP of the evaluation, in [0, 1], or -1.
            min_delta: `ap` counts as better if it exceeds the last better one by more than this.
        """
        if ap < 0:
            return
        is_better = self.ap < 0 or ap > self.ap + min_delta
        self.evaluations = 0 if is_better else self.evaluations + 1
        self.ap = ap if is_better else self.ap

    def is_over(self, patience: int) -> bool:
        """Whether the run ends: `patience` evaluations in a row were not better. With 0 it never ends early."""
        return 0 < patience <= self.evaluations

    def describe(self, patience: int) -> str:
        """Why the run ends; empty: it does not."""
        if not self.is_over(patience):
            return ""
        count = self.evaluations
        without = "1 evaluation" if count == 1 else f"{count} evaluations in a row"
        return f"the run ends after {without} without a better AP (patience {patience}; 0: no limit)"
