#!/usr/bin/env bash
# The launcher: sets up a fresh machine, prepares the data, packs the script and trains. It sets no training
# setting, and skips what is there already. Exit code: the training's own, or 2 for a mistake of the user.
set -euo pipefail

show_help() {
  cat <<'TEXT'
usage: ./run.sh [NAME=value ...]             train, write the artifact, score it (the main job)
       ./run.sh test [PYTEST ARGUMENT ...]   lint and tests
       ./run.sh bench gptq|codec|formats|fit|schedule|ttt|ngram|generate [RUN_FOLDER] [NAME=value ...]
                                             benchmarks; bench --help says more
       ./run.sh bench presets|parts|crawler|ternary|hybrid [NAME=value ...]
                                             systems, or changes of one, trained on equal terms and compared in pairs
       ./run.sh bench speed [NAME=value ...] step time, kernels and optimizer of a preset against this machine's peaks
       ./run.sh sweep [NAME] NAME=value,value ... [--trials N] [--jobs N]
                                             grids, searches and named sweeps; sweep --help says more
       ./run.sh watch [RUN]                  a live run: loss, bits per byte, speed, time left, bytes
       ./run.sh plan [--gpus N] [--price P] [--speed FILE] [NAME=value ...]
                                             steps, bytes, seconds and money before anything is rented
       ./run.sh generate FROM=RUN_FOLDER PROMPT=TEXT [NAME=value ...]
                                             text from a run's artifact; generate --help says more
       ./run.sh record make|verify|compare|report ...
                                             folders of records; record --help says more
       ./run.sh setup                        only make .venv and install requirements.txt
       ./run.sh --plan [NAME=value ...]      layer plan, parameters and predicted bytes, without training
       ./run.sh --presets                    what each preset changes
       ./run.sh --explain chimera            what of a published plan is realised, how, and what is not
       ./run.sh --help                       this text, then every setting

A setting is a word NAME=value here or an environment variable. Paths are relative to this folder.
The launcher's own settings:
  PYTHON=FILE   an interpreter that has everything in requirements.txt already; nothing is installed then
  NPROC=N       processes on this machine (default: one a GPU, else 1)
  PACK=0        run the readable train_gpt.py instead of the packed file (default: 1)
  NNODES=N NODE_RANK=I MASTER_ADDR=HOST MASTER_PORT=P
                several machines: the same command on each, with its own NODE_RANK from 0 (default: NNODES=1)
TEXT
}

say() { printf '%s\n' "$*" >&2; }
fail() { say "$*"; exit 2; }
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {  # prints the first Python on the PATH that is new enough and can make a virtual environment
  local name lacking=
  for name in python3.11 python3.12 python3.13 python3 python; do
    is_new_enough "$name" || continue
    if "$name" -c 'import ensurepip, venv' >/dev/null 2>&1; then echo "$name"; return; fi
    lacking=${lacking:-$name}
  done
  [[ -z $lacking ]] || fail "$lacking: cannot make a .venv with pip (on Debian: apt install python3-venv)"
  fail "no Python 3.11 or later on the PATH: install one, or name one that has everything with PYTHON=FILE"
}

# The stamp is a copy of the requirements that were installed, written last: an interruption leaves none.
is_set_up() { cmp -s requirements.txt .venv/installed.txt && .venv/bin/python -c '' 2>/dev/null; }

install_requirements() {
  local base log pins=(-r requirements.txt)
  if ! { is_new_enough .venv/bin/python && .venv/bin/python -m pip --version; } >/dev/null 2>&1; then
    base=$(find_python)
    log=$("$base" -m venv --clear .venv 2>&1) || fail "$log"$'\n'"$base: could not make .venv, see above"
  fi
  if [[ -f .venv/kept_torch.txt ]]; then  # setup_pod.sh wrote it: the pod's own CUDA build of torch stays
    grep -vE '^(torch|triton)==' requirements.txt >.venv/without_torch.txt
    pins=(-r .venv/without_torch.txt -c .venv/kept_torch.txt)
  fi
  say "installing requirements into .venv (once)"
  log=$(.venv/bin/python -m pip install -q --disable-pip-version-check "${pins[@]}" 2>&1) ||
    fail "$log"$'\n'"requirements.txt: pip could not install it into .venv, see above"
  cp requirements.txt .venv/installed.txt
}

check_given_python() {  # refuses a PYTHON= that lacks a package; "test" wants the test tools too
  is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON: must be a Python of version 3.11 or later"
  "$PYTHON" - "$PYTHON" "$1" <<'CODE'
import re, sys
from importlib import metadata
text = open("requirements.txt", encoding="utf-8").read()
text = text if sys.argv[2] == "test" else text.split("# Tests:")[0]
wanted = re.findall(r"(?m)^([\w-]+)==[^;\n]*$", text)
have = {name: next(iter(metadata.distributions(name=name)), None) for name in wanted}
if lacking := [name for name, found in have.items() if not found]:
    sys.stderr.write(f"PYTHON={sys.argv[1]}: lacks {', '.join(lacking)} of requirements.txt\n")
elif tuple(map(int, re.findall(r"\d+", have["torch"].version)[:2])) < (2, 9):
    sys.stderr.write(f"PYTHON={sys.argv[1]}: its torch must be 2.9 or later, is {have['torch'].version}\n")
else:
    sys.exit(0)
sys.exit(2)
CODE
}

set_up() {  # sets PY, the interpreter that runs everything else, for the command $1
  if [[ -n ${PYTHON:-} ]]; then check_given_python "$1"; PY=$PYTHON; return; fi
  PY=$PWD/.venv/bin/python
  if is_set_up; then return; fi
  # Of two first runs side by side, or on two nodes with one file system, one installs and one waits.
  exec 9>.setup.lock
  if command -v flock >/dev/null; then flock 9; fi
  is_set_up || install_requirements
  exec 9>&-
}

count_processes() {  # sets NPROC where it is not set: what torch may use, so CUDA_VISIBLE_DEVICES counts
  [[ -z ${NPROC:-} ]] || return 0
  NPROC=1
  [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]] || return 0
  NPROC=$("$PY" -c 'import torch; print(torch.cuda.device_count())')
  if ((NPROC == 0)); then
    say "nvidia-smi lists a GPU, torch can use none (CPU build, driver, CUDA_VISIBLE_DEVICES): using the CPU"
    NPROC=1
  fi
}

check_number() {  # $1=$2 must be a whole number of at least $3
  if ! [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3)); then
    fail "$1=$2: must be a whole number of at least $3"
  fi
}

task="job"
if [[ ${1:-} == test || ${1:-} == record || ${1:-} == --explain ]]; then
  task=$1
  shift
else
  case ${1:-} in bench | sweep | watch | plan | generate) task=$1 && shift ;; esac
  tool=$task  # what its own words are for
  if [[ $task == job && ${STAGES:-} == generate ]]; then task=generate; fi
  for word in "$@"; do  # afterwards "$@" holds the settings for train_gpt.py, or a tool's words, in their order
    shift
    if [[ $tool != job && $word != PYTHON=* ]]; then
      set -- "$@" "$word"
      continue
    fi
    case $word in
      PYTHON=* | NPROC=* | PACK=* | NNODES=* | NODE_RANK=* | MASTER_ADDR=* | MASTER_PORT=*)
        export "${word?}"
        ;;
      setup | --plan | --presets | --help) task=$word ;;
      STAGES=generate) task=generate ;;
      -h) task=--help ;;
      [A-Za-z_]*=*) set -- "$@" "$word" ;;
      *) fail "$word: must be a setting NAME=value or a command (./run.sh --help lists both)" ;;
    esac
  done
fi
if [[ ${PYTHON:-} == */* && $PYTHON != /* ]]; then PYTHON=$PWD/$PYTHON; fi
[[ -z ${NPROC:-} ]] || check_number NPROC "$NPROC" 1
NNODES=${NNODES:-1} MASTER_PORT=${MASTER_PORT:-29500}
check_number NNODES "$NNODES" 1
[[ ${PACK:=1} == [01] ]] || fail "PACK=$PACK: must be 0 or 1"
if ((NNODES > 1)); then
  check_number NODE_RANK "${NODE_RANK:-}" 0
  ((NODE_RANK < NNODES)) || fail "NODE_RANK=$NODE_RANK: must be below NNODES=$NNODES"
  check_number MASTER_PORT "$MASTER_PORT" 1
  [[ -n ${MASTER_ADDR:-} ]] || fail "MASTER_ADDR=: NNODES=$NNODES needs the address of node 0"
fi
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

case $task in
  --help)
    show_help
    if [[ -n ${PYTHON:-} ]] || is_set_up; then
      set_up "$task"
      echo
      exec "$PY" train_gpt.py --help
    fi
    printf '\nThe settings of training are listed here after ./run.sh setup.\n'
    ;;
  setup) set_up "$task" ;;
  --plan | --presets)
    set_up "$task"
    exec "$PY" train_gpt.py "$task" "$@"
    ;;
  bench | sweep | watch | generate)
    set_up "$task"
    exec "$PY" "tools/$task.py" "$@"
    ;;
  plan)
    set_up "$task"
    exec "$PY" tools/cost.py "$@"
    ;;
  --explain)
    set_up "$task"
    exec "$PY" tools/explain.py "$@"
    ;;
  record)
    set_up "$task"
    exec "$PY" records/submit.py "$@"
    ;;
  test)
    set_up "$task"
    failed=0
    "$PY" -m ruff check . || failed=$?
    workers=()  # whole files side by side, where all are run
    cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    if (($# == 0 && cores > 1)); then workers=(-n "$((cores < 4 ? cores : 4))" --dist loadfile); fi
    "$PY" -m pytest -q ${workers[@]+"${workers[@]}"} "$@" || failed=$?
    exit "$failed"
    ;;
  job)
    set_up "$task"
    "$PY" data/prepare.py ensure "$@"
    script=train_gpt.py
    if ((PACK)); then script=$("$PY" tools/pack.py "$@"); fi
    count_processes
    # Threads that wait must sleep: spinning takes the core from the one they wait for wherever something else runs.
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
    if ((NNODES * NPROC == 1)); then exec "$PY" "$script" "$@"; fi
    nodes=(--standalone)
    if ((NNODES > 1)); then
      nodes=(--nnodes "$NNODES" --node_rank "$NODE_RANK")
      nodes+=(--master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
    fi
    exec "$PY" tools/launch.py "${nodes[@]}" --nproc_per_node "$NPROC" "$script" "$@"
    ;;
esac
