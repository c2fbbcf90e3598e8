"""README: generated parts are fresh, and what it names exists."""

import re
import subprocess
import sys

from conftest import ROOT

import train_gpt
from tools import generate


def test_generated_parts_are_fresh():
    done = subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, "run: python tools/readme.py"


def test_readme_names_only_settings_and_files_that_exist():
    text = (ROOT / "README.md").read_text()
    launcher = {"PYTHON", "NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "OMP_WAIT_POLICY", "NAME",
                "VARIANT", "TRAIN_SHARDS", "TERNARY"}  # of setup_pod.sh and of a benchmark
    assert set(re.findall(r"\b([A-Z][A-Z_]+)=", text)) <= {*train_gpt.SETTINGS, *launcher, *generate.OPTIONS, "PROMPT"}
    for name in re.findall(r"`?((?:data|tools|records|tests)/[\w.]+\.\w+|\w+\.(?:sh|md))`?", text):
        assert (ROOT / name).exists(), name


def test_readme_quotes_error_messages_that_exist():
    """The troubleshooting table names lines that the code really prints."""
    code = re.sub(r'"\s*f?"', "", "".join((ROOT / name).read_text() for name in ("train_gpt.py", "tools/pack.py")))
    section = (ROOT / "README.md").read_text().split("## When something goes wrong")[1].split("\n## ")[0]
    for quoted in re.findall(r"^\| `([^`]+)` \|", section, re.M):
        for part in filter(None, quoted.split("...")):
            if len(part) > 12 and "=" not in part:
                assert part.strip("; ") in code, part
