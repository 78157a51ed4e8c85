"""The one error a person can mend: it names the thing, the rule, the value and the remedy."""


class Mistake(ValueError):
    """A person's input breaks a rule. The command line prints the sentence and exits with 2."""


def nearest(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """``"; did you mean 'x'?"`` for the closest of ``known``, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
