#!/usr/bin/env bash
# The whole pipeline, from nothing:
#
#   bash run.sh                      the laptop demo (configs/demo.py)
#   bash run.sh test [ARGUMENTS]     the tests (ARGUMENTS go to pytest)
#   bash run.sh CONFIG [N_GPUS] [--section.name=value ...]
#                                    the same pipeline for any config; through torchrun where N_GPUS > 1
#   bash run.sh setup                only the environment
#
# Makes .venv beside this file and installs requirements.txt into it once. A later call reuses it, and the
# tokenizer, dataset, checkpoints and results that exist. PYTHON=python3.12 bash run.sh chooses .venv's
# interpreter. All other paths are relative to the folder you are in, as in the scripts: CONFIG, the paths in it
# and in settings, and runs/, datasets/ and tokenizers/, which are made there.
#
# Ctrl-C or SIGTERM stops the stage that runs and ends the pipeline, with exit code 130 or 143; the same
# command continues. A stage that fails ends the pipeline with its own exit code.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

setup() {  # setup REQUIREMENTS_FILE...: installs them into .venv, unless this was done with the same files
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
    [ $# -eq 1 ] || touch ".venv/installed-$(cat "$1" | cksum | tr ' ' '-')"  # the first file is installed too
  fi
}

# Each stage is a job with a process group of its own (set -m), for two reasons: a signal to this script alone,
# not from a terminal, reaches the stage too; and a background job without one would ignore Ctrl-C.
child=0 stopped=0 signal=TERM
stop() {  # stop CODE SIGNAL
  stopped=$1 signal=$2
  if [ "$child" = 0 ]; then exit "$1"; fi
  if [ "$child" != starting ]; then kill -s "$2" -- "-$child" 2>/dev/null || true; fi
}
pause() {  # Ctrl-Z: the stage pauses, then this script; both continue together
  # There is no trap for CONT: bash 5.2 drops a TERM that comes with a trapped CONT, as `timeout` sends them.
  case $child in 0|starting) ;; *) kill -s TSTP -- "-$child" 2>/dev/null || true ;; esac
  kill -s STOP $$
  case $child in 0|starting) ;; *) kill -s CONT -- "-$child" 2>/dev/null || true ;; esac
}

stage() {  # stage SCRIPT [ARGUMENT...]: runs it to its end; a training that is stopped saves first
  local code
  child=starting
  set -m; "$python" "$@" & child=$!; set +m
  if [ "$stopped" != 0 ]; then stop "$stopped" "$signal"; fi  # the signal came before its number was known
  while true; do
    code=0; wait "$child" || code=$?  # a signal ends the waiting, and not the stage
    if ! kill -0 "$child" 2>/dev/null; then break; fi
  done
  child=0
  if [ "$stopped" != 0 ]; then exit "$stopped"; fi
  if [ "$code" != 0 ]; then exit "$code"; fi
}

pipeline() {  # pipeline CONFIG N_GPUS [OVERRIDE...]
  local config=$1 n_gpus=$2 settings run; shift 2
  trap 'stop 130 INT' INT; trap 'stop 143 TERM' TERM; trap 'stop 129 TERM' HUP  # training saves at TERM
  trap pause TSTP
  # a mistake in the config ends here, before any work
  settings=$("$python" "$here/config.py" "$config" "$@" --print-config)
  run=$(sed -n "s/^run = ['\"]\(.*\)['\"]$/\1/p" <<< "$settings")
  echo "== tokenizer"; stage "$here/tokenizer.py" train "$config" "$@"
  echo "== data";      stage "$here/data.py" "$config" "$@"
  echo "== train"
  if [ "$n_gpus" -gt 1 ]; then
    stage -m torch.distributed.run --standalone --nproc_per_node="$n_gpus" -- "$here/train.py" "$config" "$@"
  else
    stage "$here/train.py" "$config" "$@"
  fi
  echo "== eval";      stage "$here/eval.py" "$run"
  echo "== samples"
  stage "$here/sample.py" "$run" --prompt def --prompt The --prompt class --tokens 80 --seed 1 --save
  echo "== report";    stage "$here/report.py" "$run"
  # Where the config says what it expects of the result, a worse result is an error.
  if grep -q "^eval.expect_bits_per_byte = {.*:" <<< "$settings"; then
    echo "== check";   stage "$here/eval.py" "$run" --check
  fi
}

python=$here/.venv/bin/python
case "${1:-demo}" in
  setup) cd "$here"; setup requirements.txt requirements-dev.txt ;;
  test)
    shift; cd "$here"; setup requirements.txt requirements-dev.txt
    # Without arguments, all tests run: two processes, each with one thread, take a whole file at a time.
    [ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder
    OMP_NUM_THREADS=1 exec "$python" -m pytest "$@"
    ;;
  -h|--help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" ;;
  *)
    config=${1:-demo}; [ $# -eq 0 ] || shift
    n_gpus=1; if [[ "${1:-}" =~ ^[0-9]+$ ]]; then n_gpus=$1; shift; fi
    (cd "$here"; setup requirements.txt)
    pipeline "$config" "$n_gpus" "$@"
    ;;
esac
