"""The judge: looks at the differences of several changes, keeps the error rate, and says who may leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from convince.comparison import statistics as stats
from convince.comparison.statistics import Looks, Paired, Verdict


class Judge:
    """Differences (positive is better) go in at each look; verdicts, and changes that need no further runs, come out.

    ``looks``: the pairs after which it is planned to look. All changes count in the correction, also those that have left
    or could not be tried to the end, so that the chance of any false "better" or "worse" stays below ``alpha``.
    ``settles``: being equivalent ends a change's runs; not where the margin is only what the pairs can detect, which more
    pairs would narrow.
    """

    def __init__(self, changes: Sequence[str], looks: Sequence[int], alpha: float, margin: float, race: bool = False, settles: bool = True) -> None:
        self.changes, self.looks, self.alpha, self.margin, self.race, self.settles = list(changes), tuple(looks), alpha, margin, race, settles
        self.out: dict[str, str] = {}  # who has left, and why
        self.found: dict[str, Paired] = {}
        self.seen: dict[str, list[float]] = {text: [] for text in changes}  # p-values at the looks that were
        self.at: dict[str, list[int]] = {text: [] for text in changes}  # pairs at the looks that were
        self.ended = False

    def look(self, differences: Mapping[str, Sequence[float]], *, last: bool) -> dict[str, str]:
        """Test every change that is still in; those decided, or in a race without hope of being the best, leave.

        Returns who leaves now, and why. ``last``: no further look will come, whatever was planned; that must not
        depend on the differences.
        """
        self.ended = last
        inside = [text for text in self.changes if text not in self.out and len(differences.get(text, ())) > 1]
        for text in inside:
            self.found[text] = stats.paired(differences[text])
            if not self.at[text] or self.found[text].n > self.at[text][-1]:
                self.seen[text].append(self.found[text].p)
                self.at[text].append(self.found[text].n)
        if last:
            return {}
        leaving, decided = {}, self.decided()
        for text in inside:
            found = self._verdict(text, decided)
            if found == "worse" or (found == "equivalent" and self.settles) or (found == "better" and not self.race):
                leaving[text] = f"{found} after {self.found[text].n} pairs"
        if self.race and inside:
            bounds = {text: self.found[text].interval(self.level(text)) for text in inside}
            best = max(low for low, _ in bounds.values())
            for text, (_, high) in bounds.items():
                if high < best and text not in leaving:
                    leaving[text] = f"behind the best after {self.found[text].n} pairs"
        self.out |= leaving
        return leaving

    def schedule(self, text: str) -> Looks:
        """The looks of a change: those that were, then those planned; where time has ended, those that were."""
        were = self.at[text]
        coming = [n for n in self.looks if not were or n > were[-1]]
        if self.ended and were and text not in self.out:
            return Looks(tuple(were))
        return Looks((*were, *coming))

    def decided(self) -> set[str]:
        """Changes that are better or worse: Holm's method, each test a group-sequential one at its share of alpha."""
        out: set[str] = set()
        while True:
            share = self.alpha / max(len(self.changes) - len(out), 1)
            more = {
                text
                for text in self.changes
                if text not in out and any(p <= limit for p, limit in zip(self.seen[text], self.schedule(text).limits(share), strict=False))
            }
            if not more:
                return out
            out |= more

    def corrected(self) -> dict[str, float]:
        """P-values corrected for the looks, then for the number of changes (Holm)."""
        texts = [text for text in self.changes if self.seen[text]]
        one = [self.schedule(text).sequential_p(self.seen[text]) for text in texts]
        return dict(zip(texts, stats.holm([*one, *[1.0] * (len(self.changes) - len(texts))]), strict=False))

    def level(self, text: str) -> float:
        """Confidence of a change's interval at its latest look, so that ``1 - alpha`` holds over all looks."""
        return 1 - self.schedule(text).limits(self.alpha)[max(len(self.at[text]) - 1, 0)]

    def verdict(self, text: str) -> Verdict:
        """What the differences of a change say so far."""
        return self._verdict(text, self.decided())

    def _verdict(self, text: str, decided: set[str]) -> Verdict:
        return stats.verdict(self.found[text], text in decided, self.margin, self.level(text))
