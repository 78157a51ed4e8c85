"""Where benchmarks write their tables: a section of RESULTS.md each, with machine and versions."""

from __future__ import annotations

import time
from pathlib import Path

PATH = Path(__file__).resolve().parent / "RESULTS.md"


def write(title: str, command: str, lines: list[str]) -> None:
    """Put the section ``title`` into RESULTS.md in place of an older one."""
    from convince.fit.folder import environment

    e = environment()
    units = "AMX" if e["amx"] else "AVX512-BF16, no AMX" if e["avx512_bf16"] else "no bf16 units"
    head = [f"## {title}", "", f"`python benchmarks/{command}`, {time.strftime('%Y-%m-%d')}, {e['processor']} ({units}), {e['threads']} threads;"]
    head += [f"torch {e['versions']['torch']}, torchvision {e['versions']['torchvision']}, Python {e['python']}.", ""]
    old = PATH.read_text(encoding="utf-8") if PATH.exists() else "# Results\n\nEvery table is written by the script it names; none is typed.\n"
    before, found, rest = old.partition(f"## {title}\n")
    after = ("\n## " + rest.partition("\n## ")[2]) if found and "\n## " in rest else ""
    PATH.write_text(before.rstrip() + "\n\n" + "\n".join(head + lines).rstrip() + "\n" + after, encoding="utf-8")
