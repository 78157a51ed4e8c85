"""Write docs/parts.md: every part, its paper and the verdict of its stored evidence, from cards and evidence alone.

python docs/make_parts_page.py
"""

import json
from pathlib import Path

from convince.parts import PACKAGE, Part, find


def evidence(paper: str | None) -> dict | None:
    path = PACKAGE / "evidence" / f"{paper}.json"
    return json.loads(path.read_text(encoding="utf-8")) if paper and path.exists() else None


def interval(proof: dict) -> str:
    """The first comparison of the evidence, in numbers."""
    for c in proof["comparisons"]:
        if "mean" in c:
            return f"{c['what']}: {c['mean']:+.3g} ({c['low']:+.3g} to {c['high']:+.3g}, n = {c['n']})"
    return ""


def page() -> str:
    rows = sorted((row for row in find() if isinstance(row, Part)), key=lambda row: (row.room, row.name))
    lines = ["# Parts", "", "Written by `make docs` from the cards and the stored evidence.", ""]
    lines += ["| part | kind | paper | verdict | first comparison |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        card, proof = row.card, evidence(row.card.paper)
        title = f"[{card.title}]({card.url}), {card.year}" if card.url else card.title
        verdict = proof["verdict"] if proof else ""
        lines.append(f"| `{row.name}` ({row.room}) | {card.kind} | {title} | {verdict} | {interval(proof) if proof else ''} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "parts.md").write_text(page(), encoding="utf-8")
