"""Whether a GPU does what such a GPU should: one training step of `caseops` at full size, timed.

    python tools/preflight.py        rows name|verdict|found, for the table of setup_pod.sh; verdicts ok, missing (too
                                     slow: something is wrong) and optional (nothing to compare with)

The step is that of `./run.sh bench speed PRESET=caseops OVERLAY= PARTS=step`, on random tokens, so no data are needed.
What it is compared with was measured (records/LOG.md); an attention back end that is missing shows as a slow step.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt as gpt  # noqa: E402

WORDS = ("PRESET=caseops", "OVERLAY=", "PARTS=step", "BUDGET_SECONDS=240")
VISITS, CONTEXT = 11, 2048  # the phase that is compared
# Pattern of a GPU's name -> tokens a second of that phase on one of them, and whose figure it is.
EXPECTED: dict[str, tuple[float, str]] = {
    r"\bH200\b": (969_000, "measured with torch's varlen attention"),
    r"\bH100 80GB HBM3\b": (1_020_000, "published, FlashAttention 3")}
LEAST_SHARE = 0.85  # of it; without FlashAttention 3 the challenge's pods were at 0.84


def judge(name: str, rate: float | None, note: str) -> tuple[str, str]:
    """Verdict and text for a GPU's tokens a second; None where the step could not be timed."""
    if rate is None:
        return "missing", f"the step could not be timed: {note or 'no such row'}"
    known = next(((wanted, source) for part, (wanted, source) in EXPECTED.items()
                  if re.search(part, name)), None)
    said = f"{rate:,.0f} tokens/s a GPU"
    if known is None:
        return "optional", f"{said}; nothing to compare an {name} with"
    share = rate / known[0]
    said += f", {share:.0%} of the {known[0]:,.0f} of such a GPU ({known[1]})"
    return ("ok", said) if share >= LEAST_SHARE else ("missing", f"{said}: too slow, at least {LEAST_SHARE:.0%}")


def step_of(tables: list[dict[str, Any]]) -> tuple[float | None, str]:
    """Tokens a second of the phase that is compared, from the tables of the benchmark, and the note beside them."""
    rows = [row for table in tables for row in table["rows"] if "tokens/s" in row]
    found = [row for row in rows if (row["visits"], row["context"]) == (VISITS, CONTEXT)]
    return (found[0]["tokens/s"], found[0]["note"]) if found else (None, "; ".join(row["note"] for row in rows))


def main(argv: list[str]) -> int:
    """Prints the rows; returns 0, 2 for a mistake of the user."""
    import torch

    if argv:
        print(__doc__, file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    config = gpt.load_config(["PRESET=caseops", "OVERLAY="], {})
    _, lines = gpt.pick_kernels(config.system.kernels, device, torch.bfloat16, config.model)
    print(f"attention|ok|{lines[0].removeprefix('kernel:attention ')}")
    plain = {name: value for name, value in os.environ.items() if name not in gpt.SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speed.json"
        done = subprocess.run([sys.executable, str(ROOT / "tools" / "bench.py"), "speed", *WORDS, "--json", str(path)],
                              capture_output=True, text=True, env=plain)
        tables = json.loads(path.read_text())["tables"] if path.exists() else []
    rate, note = step_of(tables)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    print("step|{}|{}".format(*judge(torch.cuda.get_device_name(0), rate, note or last)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
