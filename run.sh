#!/usr/bin/env bash
# The whole pipeline, from nothing:
#
#   bash run.sh                      the laptop demo (configs/demo.py)
#   bash run.sh test [ARGUMENTS]     the tests (ARGUMENTS go to pytest)
#   bash run.sh CONFIG [N_GPUS] [--section.name=value ...]
#                                    the same pipeline for any config; through torchrun where N_GPUS > 1
#   bash run.sh setup                only the environment
#
# Makes .venv and installs requirements.txt into it once. A later call reuses it, and whatever tokenizer,
# dataset, checkpoints and results are there. PYTHON=python3.12 bash run.sh chooses .venv's interpreter.
set -euo pipefail
cd "$(dirname "$0")"

setup() {  # setup REQUIREMENTS_FILE...: into .venv, unless these very files were installed before
  local python="${PYTHON:-}" candidate stamp
  if [ ! -x .venv/bin/python ]; then
    for candidate in $python python3 python3.13 python3.12 python3.11 python3.10; do
      python=$candidate
      if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then break; fi
      python=""
    done
    if [ -z "$python" ]; then
      echo "error: Python 3.10 or newer is needed; set PYTHON=/path/to/python" >&2
      exit 2
    fi
    echo "making .venv with $($python --version)"
    rm -rf .venv
    if ! "$python" -m venv .venv; then
      rm -rf .venv
      echo "error: '$python -m venv' failed (Debian: apt install python3-venv)" >&2
      exit 2
    fi
  fi
  stamp=".venv/installed-$(cat "$@" | cksum | tr ' ' '-')"
  if [ ! -e "$stamp" ]; then
    echo "installing $*"
    local file arguments=()
    for file in "$@"; do arguments+=(-r "$file"); done
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${arguments[@]}"
    touch "$stamp"
    [ $# -eq 1 ] || touch ".venv/installed-$(cat "$1" | cksum | tr ' ' '-')"  # and so is the first file alone
  fi
}

pipeline() {  # pipeline CONFIG N_GPUS [OVERRIDE...]
  local config=$1 n_gpus=$2 settings run; shift 2
  # a mistake in the config ends here, before any work
  settings=$("$python" config.py "$config" "$@" --print-config)
  run=$(sed -n "s/^run = '\(.*\)'$/\1/p" <<< "$settings")
  echo "== tokenizer"; "$python" tokenizer.py train "$config" "$@"
  echo "== data";      "$python" data.py "$config" "$@"
  echo "== train"
  if [ "$n_gpus" -gt 1 ]; then
    "$python" -m torch.distributed.run --standalone --nproc_per_node="$n_gpus" -- train.py "$config" "$@"
  else
    "$python" train.py "$config" "$@"
  fi
  echo "== eval";      "$python" eval.py "$run"
  echo "== samples"
  local prompt
  for prompt in "def" "The" "class"; do
    "$python" sample.py "$run" --prompt "$prompt" --tokens 80 --temperature 0.8 --seed 1 --save
  done
  echo "== report";    "$python" report.py "$run"
  # A config that says what it expects of its result is held to it.
  if grep -q "^eval.expect_bits_per_byte = {.*:" <<< "$settings"; then
    echo "== check";   "$python" eval.py "$run" --check
  fi
}

python=.venv/bin/python
case "${1:-demo}" in
  setup) setup requirements.txt requirements-dev.txt ;;
  test)
    shift; setup requirements.txt requirements-dev.txt
    # All of them: a file at a time in each of two processes, of one thread, which is as much as they use.
    [ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder
    OMP_NUM_THREADS=1 exec "$python" -m pytest "$@"
    ;;
  -h|--help) sed -n '2,12s/^# \{0,1\}//p' "$0" ;;
  *)
    config=${1:-demo}; [ $# -eq 0 ] || shift
    n_gpus=1; if [[ "${1:-}" =~ ^[0-9]+$ ]]; then n_gpus=$1; shift; fi
    setup requirements.txt
    pipeline "$config" "$n_gpus" "$@"
    ;;
esac
