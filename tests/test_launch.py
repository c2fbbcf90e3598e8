"""The launcher (run.sh, tools/launch.py), the pod's set-up (setup_pod.sh) and .ci/run, without network.

Scripts run in a copy of the repository whose Python files are stubs that note how they were called. Where an
interpreter is to be set up, it is a shell script that plays Python, or an empty virtual environment with
packages of that name only.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import prepare
import pytest

import train_gpt
from tools.launch import pick_exit_code

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("run.sh", "setup_pod.sh", ".ci/run")

# Plays train_gpt.py, tools/pack.py and data/prepare.py. STUB_<NAME> is its exit code, STUB_<NAME>_<RANK> that
# of one rank.
STUB = """
import json, os, sys, time
name = os.path.basename(__file__)[:-3].upper()
rank = os.environ.get("RANK", "")
call = {"name": name, "argv": sys.argv[1:], "file": __file__, "cwd": os.getcwd(), "rank": rank}
call |= {key: os.environ.get(key) for key in ("WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "PACK")}
with open("calls.jsonl", "a") as log:
    log.write(json.dumps(call) + "\\n")
if name == "PACK":
    os.makedirs("runs/packed/0123", exist_ok=True)
    open("runs/packed/0123/train_gpt.py", "w").write(open("train_gpt.py").read())
    print("runs/packed/0123/train_gpt.py")
time.sleep(float(os.environ.get(f"STUB_{name}_SLEEP", 0)))
code = int(os.environ.get(f"STUB_{name}_{rank}", os.environ.get(f"STUB_{name}", 0)))
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""

# Plays an interpreter: `-m venv` copies the script itself into .venv, `-m pip` only notes that it was called.
FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$FAKE_LOG"
case "$*" in
  *version_info*) exit "${FAKE_OLD:-0}" ;;
  *ensurepip*) exit "${FAKE_NO_PIP:-0}" ;;
  *device_count*) echo "${FAKE_GPUS:-0}" ;;
  "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip install"*)
    sleep "${FAKE_PIP_SLEEP:-0}"
    [[ -z ${FAKE_PIP:-} ]] || { echo "pip: no such release"; exit 1; } ;;
  "-m ruff"*) exit "${FAKE_RUFF:-0}" ;;
  "-m pytest"*) echo "12 passed"; exit "${FAKE_PYTEST:-0}" ;;
  tools/pack.py*) echo packed.py ;;
esac
"""

FAKE_PIP = """
import os, sys
with open(os.environ["FAKE_LOG"], "a") as log:
    print("-m pip", *sys.argv[1:], file=log)
"""

FAKE_TORCH = """
__version__ = "2.9.1+cu128"
class version:
    cuda = "12.8"
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    get_device_name = staticmethod(lambda index: "NVIDIA H100")
    class nccl:
        version = staticmethod(lambda: (2, 27, 5))
"""


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Copy:
    """A copy of the launcher's files beside stubs, in a folder with a space in its name."""

    def __init__(self, folder: Path):
        self.root = folder / "a clone"
        self.bin = folder / "bin"
        for name in (*SCRIPTS, "requirements.txt", "tools/launch.py"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.root / name)
        for name in ("train_gpt.py", "tools/pack.py", "data/prepare.py"):
            write_script(self.root / name, STUB)
        write_script(self.bin / "nvidia-smi", "#!/bin/sh\nexit 9\n")  # no GPU, whatever this machine has
        self.env = {
            "PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "FAKE_LOG": str(folder / "fake.log"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def start(self, script: str, *words: str, cwd: Path | None = None, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            [self.root / script, *words],
            cwd=cwd or self.root,
            env=self.env | env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, script: str, *words: str, **options: object) -> tuple[int, str, str]:
        process = self.start(script, *words, **options)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def calls(self) -> list[dict]:
        path = self.root / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def fake_log(self) -> list[str]:
        path = Path(self.env["FAKE_LOG"])
        return path.read_text().splitlines() if path.exists() else []

    def installs(self) -> list[str]:
        return [line for line in self.fake_log() if line.startswith("-m pip install")]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """A copy whose PYTHON= is the interpreter of the tests."""
    copy = Copy(tmp_path)
    copy.env["PYTHON"] = sys.executable
    return copy


@pytest.fixture
def fresh(tmp_path: Path) -> Copy:
    """A copy on a machine where every Python on the PATH is the fake one."""
    copy = Copy(tmp_path)
    for name in ("python3.11", "python3.12", "python3.13", "python3", "python"):
        write_script(copy.bin / name, FAKE_PYTHON)
    return copy


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse_and_are_executable(name: str):
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / name], check=True)


def test_requirements_are_pinned():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert "torch==2.13.0" in lines
    assert [line for line in lines if not re.fullmatch(r"[\w-]+==[\w.]+(; platform_system == \"Linux\")?", line)] == []


# run.sh: words


def test_help_needs_no_set_up(fresh: Copy):
    code, out, _ = fresh.run("run.sh", "--help")
    assert code == 0 and "NPROC=N" in out and "setup" in out
    assert fresh.installs() == [] and not (fresh.root / ".venv").exists()


def test_help_goes_on_with_the_settings_where_an_interpreter_is(copy: Copy):
    assert copy.run("run.sh", "--help")[0] == 0
    assert [(call["name"], call["argv"]) for call in copy.calls()] == [("TRAIN_GPT", ["--help"])]


@pytest.mark.parametrize("option", ["--plan", "--presets"])
def test_plan_and_presets_need_no_data_and_no_packing(copy: Copy, option: str):
    assert copy.run("run.sh", "A=1", option)[0] == 0
    assert [(call["name"], call["argv"]) for call in copy.calls()] == [("TRAIN_GPT", [option, "A=1"])]


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["tests"], "tests: must be"), (["--plans"], "--plans: must be"), (["A=1", ""], ": must be"),
        (["=1"], "=1: must be"),
        (["NPROC=0"], "NPROC=0: must"), (["NPROC=-1"], "NPROC=-1: must"), (["NPROC=two"], "NPROC=two: must"),
        (["NPROC=08"], "NPROC=08: must"), (["PACK=yes"], "PACK=yes: must"), (["NNODES=0"], "NNODES=0: must"),
        (["NNODES=2"], "NODE_RANK=: must"), (["NNODES=2", "NODE_RANK=2"], "NODE_RANK=2: must"),
        (["NNODES=2", "NODE_RANK=0"], "MASTER_ADDR=: NNODES=2 needs"),
        (["PYTHON=/no/such/python"], "PYTHON=/no/such/python: must"),
    ],
)  # fmt: skip
def test_wrong_words_are_one_line_and_exit_2(copy: Copy, words: list[str], start: str):
    code, out, err = copy.run("run.sh", *words)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(start)
    assert copy.calls() == []


def test_given_python_must_have_the_packages(copy: Copy):
    text = "torch==2.13.0\nno-such-package==1\n\n# Tests: x\nnor-this==1\n"
    (copy.root / "requirements.txt").write_text(text)
    code, _, err = copy.run("run.sh")
    assert code == 2 and len(err.splitlines()) == 1
    assert "no-such-package" in err and "nor-this" not in err and "torch" not in err
    assert "nor-this" in copy.run("run.sh", "test")[2]


# run.sh: the main job


def test_one_process(copy: Copy, tmp_path: Path):
    code, _, err = copy.run("run.sh", "A=1", "NPROC=1", "STACK=(A)*3 B", "RUN_ID=x", cwd=tmp_path)
    assert code == 0, err
    ensure, pack, train = copy.calls()
    settings = ["A=1", "STACK=(A)*3 B", "RUN_ID=x"]
    assert (ensure["name"], ensure["argv"]) == ("PREPARE", ["ensure", *settings])
    assert (pack["name"], pack["argv"]) == ("PACK", settings)
    assert (train["file"].endswith("runs/packed/0123/train_gpt.py"), train["argv"]) == (True, settings)
    assert {call["cwd"] for call in copy.calls()} == {str(copy.root)}
    assert train["WORLD_SIZE"] is None
    assert not (copy.root / ".venv").exists()


@pytest.mark.parametrize("how", ["word", "environment"])
def test_pack_0_runs_the_readable_file(copy: Copy, how: str):
    code, *_ = copy.run("run.sh", "PACK=0") if how == "word" else copy.run("run.sh", PACK="0")
    assert code == 0
    _, train = copy.calls()
    assert (train["name"], train["PACK"], train["argv"]) == ("TRAIN_GPT", "0", [])
    assert "packed" not in train["file"]


@pytest.mark.parametrize("stage", ["PREPARE", "PACK", "TRAIN_GPT"])
def test_exit_codes_come_through(copy: Copy, stage: str):
    assert copy.run("run.sh", **{f"STUB_{stage}": "3"})[0] == 3
    assert copy.calls()[-1]["name"] == stage


@pytest.mark.dist
def test_two_processes_and_their_exit_code(copy: Copy):
    code, _, err = copy.run("run.sh", "NPROC=2", "A=b c", "PACK=0", STUB_TRAIN_GPT_1="3")
    assert (code, err) == (3, "")
    ranks = sorted((call for call in copy.calls() if call["rank"]), key=lambda call: call["rank"])
    assert [(call["rank"], call["WORLD_SIZE"], call["argv"]) for call in ranks] == [
        ("0", "2", ["A=b c"]), ("1", "2", ["A=b c"])]  # fmt: skip
    assert all(int(call["OMP_NUM_THREADS"]) >= 1 for call in ranks)


@pytest.mark.dist
def test_a_signal_stops_all_processes(copy: Copy):
    process = copy.start("run.sh", "NPROC=2", "PACK=0", STUB_TRAIN_GPT_SLEEP="50")
    end = time.monotonic() + 40
    while sum(bool(call["rank"]) for call in copy.calls()) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)  # it ends only when the processes have closed their ends of the pipes
    assert process.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([2, 2], 2), ([1, 3], 3), ([-15, 3], 3), ([-9, 1], 137), ([1, -15], 1), ([-15], 143), ([-6, 2], 2)],
)
def test_the_most_telling_exit_code_wins(codes: list[int], expected: int):
    assert pick_exit_code(codes) == pick_exit_code(codes[::-1]) == expected


def test_one_process_for_each_gpu(fresh: Copy):
    write_script(fresh.bin / "nvidia-smi", "#!/bin/sh\necho GPU 0: x; echo GPU 1: x\n")
    assert fresh.run("run.sh", "A=1", FAKE_GPUS="2")[0] == 0
    assert fresh.fake_log()[-1] == "tools/launch.py --standalone --nproc_per_node 2 packed.py A=1"


def test_gpus_that_torch_cannot_use_are_named(fresh: Copy):
    write_script(fresh.bin / "nvidia-smi", "#!/bin/sh\necho GPU 0: x\n")
    code, _, err = fresh.run("run.sh", FAKE_GPUS="0")
    assert code == 0 and "torch can use none" in err
    assert fresh.fake_log()[-1] == "packed.py"


def test_several_nodes(fresh: Copy):
    assert fresh.run("run.sh", "A=1", NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1", NPROC="8")[0] == 0
    where = "--nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 29500"
    assert fresh.fake_log()[-1] == f"tools/launch.py {where} --nproc_per_node 8 packed.py A=1"


# run.sh: set-up and tests


def test_set_up_happens_once(fresh: Copy):
    code, out, err = fresh.run("run.sh", "setup")
    assert (code, out, err) == (0, "", "installing requirements into .venv (once)\n")
    assert fresh.run("run.sh", "setup") == (0, "", "")
    assert fresh.installs() == ["-m pip install -q --disable-pip-version-check -r requirements.txt"]
    with (fresh.root / "requirements.txt").open("a") as file:
        file.write("more==1\n")
    assert fresh.run("run.sh")[0] == 0
    assert len(fresh.installs()) == 2


def test_a_failed_set_up_shows_pip_and_is_repeated(fresh: Copy):
    code, _, err = fresh.run("run.sh", FAKE_PIP="fails")
    assert code == 2 and "pip: no such release" in err
    assert err.splitlines()[-1].startswith("requirements.txt: ")
    assert fresh.run("run.sh", "setup")[0] == 0
    assert len(fresh.installs()) == 2


@pytest.mark.skipif(not shutil.which("flock"), reason="no flock on this machine")
def test_two_first_runs_side_by_side_install_once(fresh: Copy):
    processes = [fresh.start("run.sh", "setup", FAKE_PIP_SLEEP="0.5") for _ in range(2)]
    assert [process.communicate() and process.returncode for process in processes] == [0, 0]
    assert len(fresh.installs()) == 1


@pytest.mark.parametrize(
    ("env", "text"),
    [({"FAKE_OLD": "1"}, "no Python 3.11"), ({"FAKE_NO_PIP": "1"}, "apt install python3-venv")],
)
def test_an_unfit_python_is_named(fresh: Copy, env: dict, text: str):
    code, _, err = fresh.run("run.sh", **env)
    assert (code, len(err.splitlines())) == (2, 1) and text in err


def test_kept_torch_is_not_replaced(fresh: Copy):
    fresh.run("run.sh", "setup")
    (fresh.root / ".venv/installed.txt").unlink()
    (fresh.root / ".venv/kept_torch.txt").write_text("torch==2.9.1\n")
    assert fresh.run("run.sh", "setup")[0] == 0
    assert fresh.installs()[-1].endswith("-r .venv/without_torch.txt -c .venv/kept_torch.txt")
    rest = (fresh.root / ".venv/without_torch.txt").read_text()
    assert "torch==" not in rest and "numpy==" in rest and "pytest==" in rest


@pytest.mark.parametrize(
    ("ruff", "tests", "expected"), [("0", "0", 0), ("1", "0", 1), ("0", "1", 1), ("1", "4", 4)]
)
def test_ci_run_lints_and_tests(fresh: Copy, ruff: str, tests: str, expected: int):
    code, out, _ = fresh.run(".ci/run", FAKE_RUFF=ruff, FAKE_PYTEST=tests)
    assert code == expected
    assert out.splitlines()[-1] == "12 passed"
    lint, tests = fresh.fake_log()[-2:]
    assert lint == "-m ruff check ." and re.fullmatch(r"-m pytest -q( -n [2-4] --dist loadfile)?", tests)


def test_test_hands_its_words_to_pytest(fresh: Copy):
    assert fresh.run("run.sh", "test", "-k", "a or b", "tests/x.py")[0] == 0
    assert fresh.fake_log()[-1] == "-m pytest -q -k a or b tests/x.py"


def test_bench_hands_its_words_on(fresh: Copy):
    words = ["codec", "runs/a run", "REPEATS=2", "--json", "x.json"]
    assert fresh.run("run.sh", "bench", *words)[0] == 0
    assert fresh.fake_log()[-1] == "tools/bench.py " + " ".join(words)
    assert fresh.calls() == []  # neither data nor packing


def test_bench_takes_an_interpreter(copy: Copy):
    write_script(copy.root / "tools/bench.py", STUB)
    python = copy.env.pop("PYTHON")
    assert copy.run("run.sh", "bench", "gptq", f"PYTHON={python}", STUB_BENCH="2")[0] == 2
    assert [(call["name"], call["argv"]) for call in copy.calls()] == [("BENCH", ["gptq"])]


# setup_pod.sh


@pytest.mark.parametrize("words", [["--check"], []])
def test_pod_without_a_gpu_looks_only(fresh: Copy, words: list[str]):
    code, out, err = fresh.run("setup_pod.sh", *words, MIN_DISK_GB="0", PYTHON=sys.executable)
    assert code == 3
    table = verdicts(out)
    assert [table[name] for name in ("driver", "disk", "python", "data")] == [
        "missing",
        "ok",
        "ok",
        "missing",
    ]
    assert "no NVIDIA GPU" in err
    assert fresh.installs() == fresh.calls() == [] and not (fresh.root / ".venv").exists()


def test_pod_check_without_any_python(fresh: Copy):
    code, out, _ = fresh.run("setup_pod.sh", "--check", FAKE_OLD="1")
    assert (code, verdicts(out)["python"]) == (3, "missing")


@pytest.mark.parametrize(
    "word", ["check", "DATA=no", "TRAIN_SHARDS=0", "MIN_DISK_GB=x", "PYTHON=/no/such", "NPROC=1"]
)
def test_pod_wrong_words(fresh: Copy, word: str):
    code, out, err = fresh.run("setup_pod.sh", word)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"{word}: must be")


def verdicts(table: str) -> dict[str, str]:
    rows = re.findall(r"^(.+?) +(ok|missing|optional) ", table, re.M)
    assert table.startswith("what ") and len(rows) == len(table.splitlines()) - 1
    return dict(rows)


def make_image(folder: Path, torch_version: str) -> str:
    """An interpreter that has the requirements and a CUDA torch, by name at least; a virtual environment itself."""
    venv.create(folder, with_pip=False)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    write_script(site / "torch/__init__.py", FAKE_TORCH)
    for name in re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.M):
        version = torch_version if name == "torch" else "1.0"
        metadata = site / f"{name.replace('-', '_')}-{version}.dist-info/METADATA"
        write_script(metadata, f"Name: {name}\nVersion: {version}\n")
    return str(folder / "bin/python")


@pytest.fixture
def pod(tmp_path: Path) -> Copy:
    """A copy on a machine with one GPU and two images on it, whose Python has no ensurepip and a pip that only
    notes its words."""
    copy = Copy(tmp_path)
    write_script(copy.bin / "nvidia-smi", "#!/bin/sh\necho 550.54, NVIDIA H100\n")
    fakes = tmp_path / "fakes"
    write_script(fakes / "ensurepip.py", "raise ImportError")
    write_script(fakes / "pip.py", FAKE_PIP)
    copy.env |= {"PYTHON": make_image(tmp_path / "image", "2.9.1"), "PYTHONPATH": str(fakes)}
    copy.env |= {"MIN_DISK_GB": "0", "SPEED": "0"}
    return copy


def test_pod_keeps_its_cuda_torch(pod: Copy, tmp_path: Path):
    code, out, err = pod.run("setup_pod.sh", "VARIANT=sp4096", "TRAIN_SHARDS=2")
    assert code == 0, out + err
    table = verdicts(out)
    assert [table[name] for name in ("driver", "torch", "CUDA", "NCCL", "data")] == ["ok"] * 5
    assert table["FlashAttention 3"] == "optional"
    assert re.search(r"^torch +ok +2\.9\.1$", out, re.M) and "12.8, 1 x NVIDIA H100" in out
    assert pod.installs() == ["-m pip install -q --disable-pip-version-check "
                              "-r .venv/without_torch.txt -c .venv/kept_torch.txt"]  # fmt: skip
    assert (pod.root / ".venv/kept_torch.txt").read_text() == "torch==2.9.1\n"
    assert [call["argv"] for call in pod.calls()] == [
        ["fineweb", "--variant", "sp4096", "--train-shards", "2"]
    ]

    assert "include-system-site-packages = true" in (pod.root / ".venv/pyvenv.cfg").read_text()

    # A second time the choice stands, whatever the PATH has, and nothing is installed again.
    del pod.env["PYTHON"]
    other = make_image(tmp_path / "other", "2.10.0")
    pod.env["PATH"] = f"{Path(other).parent}:{pod.env['PATH']}"
    code, out, err = pod.run("setup_pod.sh", "DATA=0")
    assert code == 0, out + err
    assert len(pod.installs()) == 1 and verdicts(out)["data"] == "optional"
    assert re.search(r"^torch +ok +2\.9\.1$", out, re.M)
    assert pod.run("run.sh", "--plan")[0] == 0
    assert len(pod.installs()) == 1


def test_pod_has_the_default_presets_data(pod: Copy):
    """Without a word it fetches what ./run.sh will read, and --check looks for it there."""
    preset = train_gpt.SETTINGS["PRESET"][1].default
    wanted = pod.root / train_gpt.PRESETS[preset].values["DATA_PATH"]
    assert pod.run("setup_pod.sh", "TRAIN_SHARDS=2")[0] == 0
    assert [call["argv"] for call in pod.calls()] == [["fineweb", "--variant", "caseops", "--train-shards", "2"]]
    assert wanted.name == prepare.VARIANTS["caseops"].dataset
    assert verdicts(pod.run("setup_pod.sh", "--check")[1])["data"] == "missing"
    write_script(wanted / "manifest.json", "{}")
    assert verdicts(pod.run("setup_pod.sh", "--check")[1])["data"] == "ok"


def test_pod_builds_on_another_python_when_told(pod: Copy, tmp_path: Path):
    assert pod.run("setup_pod.sh", "DATA=0")[0] == 0
    code, out, err = pod.run("setup_pod.sh", "DATA=0", "PYTHON=" + make_image(tmp_path / "other", "2.10.0"))
    assert code == 0, out + err
    assert re.search(r"^torch +ok +2\.10\.0$", out, re.M)
    assert len(pod.installs()) == 2


def test_pod_reports_what_is_missing(pod: Copy):
    code, out, _ = pod.run("setup_pod.sh", "MIN_DISK_GB=999999")
    assert (code, verdicts(out)["disk"]) == (3, "missing")
    assert pod.installs() == []
    code, out, _ = pod.run("setup_pod.sh", STUB_PREPARE="2")
    assert (code, verdicts(out)["data"]) == (3, "missing")


@pytest.mark.parametrize(("answer", "code", "verdict"), [
    ("print('attention|ok|fa3'); print('step|ok|1,000 tokens/s')", 0, "ok"),
    ("print('attention|ok|sdpa'); print('step|missing|too slow')", 3, "missing"),
    ("raise SystemExit(1)", 3, "missing")])
def test_pod_that_is_slow_is_not_ready(pod: Copy, answer: str, code: int, verdict: str):
    """The rows of tools/preflight.py stand in the table, and one that says missing is exit code 3."""
    write_script(pod.root / "tools/preflight.py", answer)
    pod.env["SPEED"] = "1"
    found, out, err = pod.run("setup_pod.sh", "DATA=0")
    assert found == code, out + err
    assert verdicts(out)["step"] == verdict
    assert pod.run("setup_pod.sh", "DATA=0", "SPEED=2")[0] == 2
