"""Write docs/models.md, the table of networks, and docs/faithfulness.md, our counts beside the published ones; from cards and measured figures alone.

python docs/make_models_pages.py
"""

from __future__ import annotations

from pathlib import Path

from convince.cli.models import recipe
from convince.models.counting import Counts, count_named
from convince.models.table import HEAD, SETS, SHIPPED, cells, read_store, rows
from convince.parts import Part, find

HERE = Path(__file__).parent


def line(words: list[str]) -> str:
    return "| " + " | ".join(words) + " |"


def models() -> str:
    store = read_store(SHIPPED)
    found = rows(store)
    machine, budget = store["machine"], store["budget"]
    out = ["# Networks", "", "Written by `make docs` from the cards and from what `convince models --measure` measured.", ""]
    out += [f"{machine['processor']}, {machine['threads']} threads, torch {machine['versions']['torch']}, {store['date']}; {recipe(budget)}.", ""]
    out += ["Speed: images a second at the size's own side (px), in the layout and by the kernels that a run uses. Memory: the peak of a training step in fp32"]
    out += ["above what an empty process holds. Multiply-adds: convolutions and matrix products. A star: the file changed since it was measured.", ""]
    cells_of = [len(values) for row in found if row.small for values in (row.accuracy.get(name, {}) for name in SETS)]
    have, want = sum(cells_of), len(cells_of) * len(budget["seeds"])
    paced = sum(bool(row.speed or row.failed) for row in found)
    rest = "" if (have, paced) == (want, len(found)) else "; `make models` goes on"
    out += [f"Measured: the speed of {paced} of {len(found)} sizes, {have} of {want} trainings of small ones{rest}.", ""]
    head = list(HEAD)
    for title, part_of_it in (("For pictures of 28 to 64 pixels", True), ("The papers' own sizes, and larger ones", False)):
        table = [row for row in found if row.small == part_of_it]
        columns = head if part_of_it else head[:-2]
        out += [f"## {title}", "", line(columns), line(["---"] * len(columns)), *(line(cells(row)[: len(columns)]) for row in table), ""]
    return "\n".join(out)


def faithfulness() -> str:
    out = [
        "# Our counts beside the published ones",
        "",
        "Written by `make docs`: every size counted on the meta device beside its card's figures; conformance refuses a gap above 1 % without a reason.",
        "",
    ]
    out += [line(["size", "px", "classes", "parameters", "published", "difference", "multiply-adds", "published", "difference", "why"]), line(["---"] * 10)]
    for part in find():
        if isinstance(part, Part):
            for name, row in part.card.published.items():
                side = (row["size"], row["size"])
                out.append(line([f"`{name}`", *compared(count_named(name, num_classes=row["classes"], size=side), row)]))
    return "\n".join(out) + "\n"


def compared(ours: Counts, published: dict) -> list[str]:
    words = [str(published["size"]), str(published["classes"])]
    for key, mine in (("parameters", ours.parameters), ("macs", ours.macs)):
        theirs = published.get(key)
        words += [f"{mine:,}", f"{theirs:,.0f}" if theirs else "", f"{100 * (mine / theirs - 1):+.2f} %" if theirs else ""]
    return [*words, published.get("why", "")]


if __name__ == "__main__":
    (HERE / "models.md").write_text(models(), encoding="utf-8")
    (HERE / "faithfulness.md").write_text(faithfulness(), encoding="utf-8")
