"""The one error a person can mend: it names the thing, the rule, the value and the remedy."""


class Mistake(ValueError):
    """A person's input breaks a rule. The command line prints the sentence and exits with 2."""


class Diverged(Mistake):
    """A loss that is not finite any more: the learning rate is too high, or a part does it."""


def nearest(word: str, known: "list[str] | tuple[str, ...]", n: int = 1) -> str:
    """``"; did you mean 'x'?"`` for the ``n`` closest of ``known`` ("'x' or 'y'"), or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, known, n=n, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
