#!/usr/bin/env bash
# A GPU pod from zero. Each step looks, does what is missing and verifies; a table of versions and verdicts comes
# last. Safe to run twice. Exit code: 0 when all that is required is there, 2 for a mistake of the user, 3 if not.
set -euo pipefail

show_help() {
  cat <<'TEXT'
usage: ./setup_pod.sh [--check] [NAME=value ...]

--check            only look: install and download nothing
PYTHON=FILE        interpreter to build on; a CUDA torch of 2.9 or later in it is kept
                   (default: the first Python on the PATH that has one, else what ./run.sh finds)
VARIANT=NAME       variant of the challenge's data: caseops (default; presets sixteen and caseops), sp8192
                   (ternary, chimera), sp1024 (the others), sp4096
TRAIN_SHARDS=N     training shards to download (default: 80)
DATA=0             download no data
SPEED=0            do not time a training step (minutes: it is compiled first)
MIN_DISK_GB=N      disk space that must be free or already filled by this set-up
                   (default: 12, and a fifth for each training shard)
TEXT
}

say() { printf '%s\n' "$*" >&2; }
fail() { say "$*"; exit 2; }
step() { say "== $*"; }
check_number() {  # $1=$2 must be a whole number of at least $3
  if ! [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] || (($2 < $3)); then
    fail "$1=$2: must be a whole number of at least $3"
  fi
}

table=() failed=0
row() {  # name, verdict (ok, missing, optional), what was found
  table+=("$(printf '%-17s %-9s %s' "$1" "$2" "$3")")
  if [[ $2 == missing ]]; then failed=1; fi
}
add_rows() {  # the same from lines name|verdict|found on the input
  local name verdict found
  while IFS='|' read -r name verdict found; do row "$name" "$verdict" "$found"; done
}
may_act() { ((!check && !failed)); }  # nothing is installed where something required is missing already

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
is_own_venv() { [[ $("$1" -c 'import sys; print(sys.prefix)') -ef .venv ]]; }

find_cuda_torch() {  # prints version and folder of interpreter $1's CUDA torch of 2.9 or later, or fails
  "$1" - 2>/dev/null <<'CODE'
import importlib.metadata, os, re, sys
import torch
if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 9) or not torch.version.cuda:
    sys.exit(1)
print(importlib.metadata.version("torch"), os.path.dirname(torch.__file__))
CODE
}

choose_python() {  # sets base (an interpreter, or empty) and kept (its CUDA torch, or empty)
  local name names=(python3 python3.11 python3.12 python3.13 python)
  base='' kept=''
  if [[ -n ${PYTHON:-} ]]; then
    names=("$PYTHON")
  elif [[ -f .venv/kept_torch.txt ]] && kept=$(find_cuda_torch .venv/bin/python); then
    base=.venv/bin/python  # an earlier run has chosen
    return
  fi
  for name in "${names[@]}"; do
    is_new_enough "$name" || continue
    if is_own_venv "$name"; then continue; fi
    base=${base:-$name}
    if kept=$(find_cuda_torch "$name"); then base=$name; return; fi
  done
}

make_venv() {  # makes .venv from base; with a torch to keep, .venv sees every package of base
  local options=(--clear) folder
  if [[ -n $kept ]]; then options+=(--system-site-packages); fi
  # Some images ship Python without ensurepip; the pip of base, which .venv sees, does as well then.
  if ! "$base" -c 'import ensurepip' 2>/dev/null; then options+=(--without-pip); fi
  say "making .venv from $base"
  "$base" -m venv "${options[@]}" .venv || return 1
  [[ -n $kept ]] || return 0
  # Where base is a virtual environment itself, --system-site-packages reaches past it to the Python below.
  folder=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$base" -c 'import site, sys; print("\n".join(site.getsitepackages() * (sys.prefix != sys.base_prefix)))' \
    >"$folder/given_python.pth"
  echo "torch==${kept%% *}" >.venv/kept_torch.txt
}

list_versions() {  # prints rows for interpreter $1 and its packages; flash attention and Triton are optional
  "$1" - <<'CODE'
import importlib, importlib.metadata, re, sys

def row(*cells: object) -> None:
    print(*(" ".join(str(cell).split()).replace("|", "/") for cell in cells), sep="|")

row("python", "ok", f"{sys.version.split()[0]}, {sys.executable}")
for name in re.findall(r"(?m)^([\w-]+)==[^;\n]*$", open("requirements.txt", encoding="utf-8").read()):
    found = next(iter(importlib.metadata.distributions(name=name)), None)
    row(name, "ok" if found else "missing", found.version if found else "not installed")
try:
    import torch
except ImportError as error:
    row("CUDA", "missing", f"torch does not load: {error}")
    sys.exit()
usable = torch.cuda.is_available()
if usable:
    count = torch.cuda.device_count()
    row("CUDA", "ok", f"{torch.version.cuda}, {count} x {torch.cuda.get_device_name(0)}")
    row("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
else:
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "not a CUDA build"
    row("CUDA", "missing", f"torch {torch.__version__} ({build}) can use no GPU here")
optional = {"triton": "Triton", "flash_attn_interface": "FlashAttention 3", "flash_attn": "FlashAttention 2"}
for name, title in optional.items():
    try:
        module = importlib.import_module(name)
        row(title, "ok", getattr(module, "__version__", "loads"))
    except (ImportError, OSError, RuntimeError) as error:  # the ways of a wheel for another torch
        row(title, "optional", str(error) or type(error).__name__)
CODE
}

ALL_REDUCE='
import os, sys, torch, torch.distributed as dist
device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
torch.cuda.set_device(device)
dist.init_process_group("nccl", device_id=device)
ranks = dist.get_world_size()
total = torch.full((1024,), dist.get_rank() + 1.0, device=device)
dist.all_reduce(total)
right = bool((total == ranks * (ranks + 1) / 2).all())
dist.destroy_process_group()
sys.exit(0 if right else "the all-reduce gave a wrong sum")
'

check=0
for word in "$@"; do
  case $word in
    --help | -h) show_help; exit 0 ;;
    --check) check=1 ;;
    PYTHON=* | VARIANT=* | TRAIN_SHARDS=* | DATA=* | SPEED=* | MIN_DISK_GB=*) export "${word?}" ;;
    *) fail "$word: must be --check or one of the settings that ./setup_pod.sh --help lists" ;;
  esac
done
: "${VARIANT:=caseops}" "${TRAIN_SHARDS:=80}" "${DATA:=1}" "${SPEED:=1}"
check_number TRAIN_SHARDS "$TRAIN_SHARDS" 1
[[ $DATA == [01] ]] || fail "DATA=$DATA: must be 0 or 1"
[[ $SPEED == [01] ]] || fail "SPEED=$SPEED: must be 0 or 1"
: "${MIN_DISK_GB:=$((12 + DATA * TRAIN_SHARDS / 5))}"
check_number MIN_DISK_GB "$MIN_DISK_GB" 0
if [[ ${PYTHON:-} == */* && $PYTHON != /* ]]; then PYTHON=$PWD/$PYTHON; fi
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
if [[ -n ${PYTHON:-} ]]; then
  is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON: must be a Python of version 3.11 or later"
  if is_own_venv "$PYTHON"; then fail "PYTHON=$PYTHON: is made by this script; leave PYTHON out"; fi
fi

step "1 driver"
cards=$(nvidia-smi --query-gpu=driver_version,name --format=csv,noheader 2>/dev/null) || cards=''
if [[ -n $cards ]]; then
  row driver ok "${cards%%$'\n'*}, $(wc -l <<<"$cards") GPU(s)"
else
  row driver missing "nvidia-smi finds no NVIDIA GPU"
  say "no NVIDIA GPU on this machine: nothing will be installed, the rest is only looked at"
fi

step "2 disk space"
read -r _ _ _ free_kb _ < <(df -Pk . | tail -n 1)
read -r filled_kb _ < <(du -skc .venv data/datasets 2>/dev/null | tail -n 1)
disk_gb=$(((free_kb + filled_kb) / 1000000))
if ((disk_gb >= MIN_DISK_GB)); then verdict=ok; else verdict=missing; fi
row disk "$verdict" "$disk_gb GB free or filled by this set-up, $MIN_DISK_GB GB needed (MIN_DISK_GB)"

step "3 compilers"
for pair in "C compiler:cc gcc clang" "C++ compiler:c++ g++ clang++"; do
  verdict=optional found="none, so no torch.compile (on Debian: apt install build-essential)"
  for name in ${pair#*:}; do
    if version=$("$name" --version 2>/dev/null); then verdict=ok found=${version%%$'\n'*}; break; fi
  done
  row "${pair%%:*}" "$verdict" "$found"
done

step "4 Python and its torch"
choose_python
if [[ -n $kept ]]; then say "torch ${kept%% *} of $base is a CUDA build and will be kept"; fi

step "5 .venv and requirements.txt"
if may_act; then
  made=1
  if [[ -n $kept && ! (-f .venv/kept_torch.txt && $(find_cuda_torch .venv/bin/python) == "$kept") ]]; then
    make_venv || made=0
  elif [[ -z $kept && -n ${PYTHON:-} ]] && ! is_new_enough .venv/bin/python; then
    make_venv || made=0
  fi
  if ((!made)) || ! env -u PYTHON ./run.sh setup; then
    row requirements missing "could not be installed into .venv, see above"
  elif [[ -n $kept && $(find_cuda_torch .venv/bin/python) != "$kept" ]]; then
    row "kept torch" missing "torch ${kept%% *} of $base is hidden by another one in .venv"
  fi
fi

step "6 versions, CUDA, FlashAttention"
python=$base
if is_new_enough .venv/bin/python; then python=$PWD/.venv/bin/python; fi
if [[ -z $python ]]; then
  row python missing "no Python 3.11 or later on the PATH"
elif rows=$(list_versions "$python"); then
  add_rows <<<"$rows"
else
  row torch missing "$python could not list its packages, see above"
fi

step "7 all GPUs together"
if ((failed)); then
  row all-reduce optional "not tried: something above is missing"
else
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  if ((gpus == 1)); then
    row all-reduce optional "not needed on one GPU"
  elif timeout 180 "$python" tools/launch.py --standalone --nproc_per_node "$gpus" \
    --no-python "$python" -c "$ALL_REDUCE"; then
    row all-reduce ok "right sum over $gpus GPUs"
  else
    row all-reduce missing "NCCL over $gpus GPUs failed, see above"
  fi
fi

step "8 data"
dataset=data/datasets/fineweb10B_${VARIANT/#caseops/sp8192_lossless_caps_caseops_v1_reserved}
if ((!DATA)); then
  row data optional "skipped (DATA=0)"
elif may_act && "$python" data/prepare.py fineweb --variant "$VARIANT" --train-shards "$TRAIN_SHARDS"; then
  row data ok "$VARIANT, downloaded and verified"
elif ! may_act && [[ -f $dataset/manifest.json ]]; then
  row data ok "$dataset"
else
  row data missing "$dataset is not there or not complete"
fi

step "9 attention and the step"
if ((failed || check || !SPEED)); then
  row step optional "not timed: SPEED=0, --check, or something above is missing"
elif rows=$("$python" tools/preflight.py); then
  add_rows <<<"$rows"
else
  row step missing "tools/preflight.py failed, see above"
fi

printf '%-17s %-9s %s\n' "what" "verdict" "found"
printf '%s\n' "${table[@]}"
if ((failed)); then
  say "not ready: every line that says missing is required"
  exit 3
fi
say "ready: ./run.sh"
