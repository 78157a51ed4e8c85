"""Beside: a search, the random search with an equal budget beside it, and both finds saved as sizes that anyone can train."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convince import parts
from convince.data import Data
from convince.errors import Mistake
from convince.fit.state import write_atomic
from convince.kinds import Search
from convince.search.lab import Lab, Say, Spent

APART = 1_000_003  # the random search draws by another seed than a search that draws too


@dataclass
class Find:
    """What a search came to: options of the network, how they scored on the validation part where they were trained, and what it took."""

    options: dict[str, Any]
    images: float
    seconds: float
    trials: list[tuple[dict[str, Any], float]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


def look(search: Search, lab: Lab) -> Find:
    """Let a search work in its lab; options that the network does not have are refused."""
    try:
        options = search.find(lab)
    except Spent as spent:
        raise Mistake(f"{type(search).__name__}: {spent}; give a larger --budget") from spent
    parts.check_options(parts.get(search.network), options)
    return Find(options, lab.spent, lab.seconds, list(lab.trials), dict(search.notes()))


def at_random(search: Search, lab: Lab) -> Find:
    """Draw settings of the search's space at random and train each for its ``trial_epochs``, until the budget is spent; the best one."""
    space = search.space(lab.data)
    seen: set[str] = set()
    for genes in space.draws(lab.seed + APART):
        options = space.options(genes)
        spec = parts.spell(search.network, options)
        if not lab.afford(lab.of_training(search.trial_epochs)) or len(seen) >= min(space.size, 10_000):
            break
        if spec not in seen:
            lab.train(options, search.trial_epochs)
        seen.add(spec)
    return Find(lab.best(), lab.spent, lab.seconds, list(lab.trials))


def beside(search: Search, data: Data, budget: float, *, seed: int = 0, folder: Path | None = None, say: Say | None = None, **usual: Any) -> tuple[Find, Find]:
    """The search's find and the random search's, in labs of one budget; the random one gets what the search spent, in whole trials, and one at least.

    ``usual`` are settings of every training in the labs (batch, lr, size ...). With ``folder`` an interrupted search goes on.
    """
    labs = [Lab(search.network, data, budget, seed, None if folder is None else folder / name, say, **usual) for name in ("search", "random")]
    found = look(search, labs[0])
    trial = labs[1].of_training(search.trial_epochs)
    whole = math.ceil(found.images / trial - 1e-6) * trial  # a search that ends a fraction of a look short is not worth a trial less
    labs[1].budget = max(min(whole, budget), trial)
    return found, at_random(search, labs[1])


def card_text(name: str, network: str, title: str, sizes: dict[str, dict[str, Any]]) -> str:
    """A file that makes ``sizes`` of a network known by name: a card and nothing that runs. A Mistake where a name is not allowed."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise Mistake(f"{name!r}: a network's name is lower-case letters, digits and hyphens")
    known = {plain for row in parts.find() if isinstance(row, parts.Part) for plain in map(parts.plain, (row.name, *row.card.variants))}
    for word in (name, *sizes):
        if parts.plain(word) in known:
            raise Mistake(f"{word!r} is the name of a part already; choose another --name")
    of = parts.get(network).card
    lines = [f'"""{title}."""', "", "from convince.parts import Card", "", "CARD = Card("]
    lines += [f"    part={name!r},", '    kind="backbone",', f"    title={title!r},", f"    of={network!r},", f"    accepts={of.accepts!r},"]
    lines += ["    variants={", *(f"        {size!r}: {_literal(options)}," for size, options in sizes.items()), "    },"]
    lines += [f"    small={tuple(sizes)!r},", *([f"    optimizer={of.optimizer!r},"] if of.optimizer else []), ")", ""]
    return "\n".join(lines)


def _literal(value: Any) -> str:
    """JSON values as a Python literal."""
    text = repr(json.loads(json.dumps(value)))
    if "inf" in text or "nan" in text:
        raise Mistake(f"{value!r} cannot be written to a card")
    return text


def save_found(path: Path, name: str, search: Search, found: Find, random: Find) -> None:
    """Write both finds as the sizes ``NAME`` and ``NAME-random`` of the search's network; ``--parts PATH`` makes them known."""
    part = re.sub(r"(?<!^)(?=[A-Z])", "-", type(search).__name__).lower()
    title = f"Found by {part}, and by a random search of the same budget"
    write_atomic(path, card_text(f"{name}-networks", search.network, title, {name: found.options, f"{name}-random": random.options}))
