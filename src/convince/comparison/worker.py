"""A worker process: jobs come as JSON lines on standard input, results leave as JSON lines; nothing else is written there."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback


def leave_with_parent(parent: int) -> None:
    """End this process once the one that started it is gone, so that a killed comparison leaves none behind."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Do jobs until the input ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a part prints goes to stderr
    threading.Thread(target=leave_with_parent, args=(os.getppid(),), daemon=True).start()
    from convince import parts
    from convince.comparison.arm import Desk

    desk = Desk()
    for line in sys.stdin:
        job = json.loads(line)
        for path in job.get("own", ()):
            parts.add_path(path)
        try:
            result = desk.do(job)
        except Exception:  # a defect of a part or ours: it must not take the other arms with it
            result = {"defect": traceback.format_exc()}
        out.write(json.dumps(result) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
