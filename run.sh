#!/usr/bin/env bash
# ./run.sh VERB [arguments]: find or create the Python environment, then run the verb in it.
# ./run.sh --help lists the verbs. From any folder; paths are relative to the caller's.
#
#   PYTHON               the Python 3.10-3.13 for .venv
#   VIT_STATIC_DEVICE    cpu or gpu, instead of asking nvidia-smi
#   VIT_STATIC_MAX_CPU_ISA   avx2: a CPU with larger instruction sets behaves like one with AVX2 only
#   VIT_STATIC_PADDLE_INDEX   where to get Paddle's GPU build, instead of choosing by the driver
#   NPROC                processes on this machine; default: one, or one per visible GPU
#   CUDA_VISIBLE_DEVICES, PADDLE_NNODES, PADDLE_MASTER   as for paddle.distributed.launch
set -euo pipefail

root=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
lock=$root/.requirements/lock.txt

say() { echo "vit_static: $*" >&2; }
fail() { say "${*:2}"; exit "$1"; }

# ---- which environment, which build of Paddle ----

active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
[[ $active -ef $root/.venv ]] && active=
env=${active:-$root/.venv}
python=$env/bin/python
stamp=$env/.vit_static-setup # written last: identifies what is installed
log=$env/vit_static-setup.log

case ${VIT_STATIC_DEVICE:-} in
    cpu | gpu) ;;
    "") if nvidia-smi -L > /dev/null 2>&1; then VIT_STATIC_DEVICE=gpu; else VIT_STATIC_DEVICE=cpu; fi ;;
    *) fail 2 "VIT_STATIC_DEVICE=$VIT_STATIC_DEVICE: it must be cpu or gpu" ;;
esac
export VIT_STATIC_DEVICE # the launcher need not ask nvidia-smi again

# The interpreter's real path identifies its version without starting it.
wanted_stamp() { echo "$(sha256sum < "$lock") $VIT_STATIC_DEVICE $(readlink -f -- "$python")"; }

is_set_up() {
    [[ -x $python && -f $stamp && $(< "$stamp") == "$(wanted_stamp)" ]] || return 1
    [[ -n $active || -z ${PYTHON:-} ]] || [[ $(real_path_of "$PYTHON") == $(readlink -f -- "$python") ]]
}

# ---- creating it ----

real_path_of() { "$1" -c 'import os, sys; print(os.path.realpath(sys.executable))' 2> /dev/null; }
is_supported() { "$1" -c 'import sys; assert (3, 10) <= sys.version_info[:2] <= (3, 13)' 2> /dev/null; }

find_python() {
    local candidate without_ensurepip=
    local candidates=(python3 python3.13 python3.12 python3.11 python3.10)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        is_supported "$candidate" || continue
        if "$candidate" -c 'import ensurepip, venv' 2> /dev/null; then
            echo "$candidate"
            return
        fi
        without_ensurepip=$candidate
    done
    [[ -z $without_ensurepip ]] ||
        fail 2 "$without_ensurepip can't create environments (no ensurepip): apt install python3-venv"
    fail 2 "no Python 3.10, 3.11, 3.12 or 3.13 found (tried ${candidates[*]}); name one with PYTHON=/path/to/python3"
}

# Paddle's own index has one folder per CUDA version; 3.3.1 is in cu118, cu126, cu129 and cu130. DALI's build is for
# CUDA 12, any release of which runs on any driver of 12.0 or later. Only cu129 has kernels for Blackwell (compute
# capability 10 and 12), whose drivers may report CUDA 12.8. GPUs older than Turing (7.5) get cu126.
paddle_index() {
    local cuda capabilities folder=cu126
    cuda=$(nvidia-smi 2> /dev/null | sed -nE 's/.*CUDA [A-Za-z ]*Version: *([0-9]+)\.([0-9]).*/\1\2/p' || true)
    [[ -n $cuda ]] || fail 2 "nvidia-smi reports no CUDA version; choose a folder of" \
        "https://www.paddlepaddle.org.cn/packages/stable/ with VIT_STATIC_PADDLE_INDEX=URL"
    ((cuda >= 120)) || fail 2 "the NVIDIA driver is too old: CUDA ${cuda%?}.${cuda: -1}, and DALI needs 12.0;" \
        "update it, or set VIT_STATIC_DEVICE=cpu"
    # 75 for 7.5, in ascending order; drivers before 510 don't know this query.
    capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null |
        sed -nE 's/^ *([0-9]+)\.([0-9]) *$/\1\2/p' | sort -n || true)
    local oldest newest
    oldest=$(head -n 1 <<< "$capabilities")
    newest=$(tail -n 1 <<< "$capabilities")
    if ((${newest:-0} >= 100 || (cuda >= 129 && ${oldest:-75} >= 75))); then folder=cu129; fi
    echo "https://www.paddlepaddle.org.cn/packages/stable/$folder/"
}

pip_install() {
    local output status reason
    # Through a variable too: on a full disk the log is empty. Wheels only: no compiler is needed. pip would compile the
    # packages' bytecode on one core: see compile_bytecode.
    output=$("$python" -m pip install --no-input --disable-pip-version-check --progress-bar off --no-compile \
        --only-binary=:all: "$@" 2>&1 | tee -a -- "$log" 2> /dev/null) && return
    status=$?
    reason=$(grep -E '^ERROR: ' <<< "$output" | tail -n 1 || true)
    reason=${reason#ERROR: }
    [[ $output != *"Retrying ("* ]] || reason+=" (pip could not reach the package index)"
    fail 1 "could not install: ${reason:-pip ended with exit code $status} (all of pip's output: $log)"
}

install_packages() {
    local reinstall=()
    # A package that a killed pip has half copied looks installed.
    [[ ! -e $stamp.unfinished ]] || reinstall=(--force-reinstall)
    rm -f -- "$stamp"
    touch -- "$stamp.unfinished"
    if [[ $VIT_STATIC_DEVICE == cpu ]]; then
        pip_install "${reinstall[@]}" --require-hashes -r "$lock"
        return
    fi
    local index version
    index=${VIT_STATIC_PADDLE_INDEX:-$(paddle_index)}
    version=$(sed -nE 's/^paddlepaddle==([^ ;]+).*/\1/p' "$lock")
    pip_install "${reinstall[@]}" --require-hashes \
        -r <(awk '/^[^ #]/ { is_paddle = /^paddlepaddle==/ } !is_paddle' "$lock")
    # PyPI has no GPU build of Paddle 3. What it needs of PyPI's keeps the lock's versions.
    pip_install "${reinstall[@]}" --extra-index-url "$index" "paddlepaddle-gpu==$version" \
        -c <(sed -nE '/^paddlepaddle==/d; s/^([a-z0-9].*==[^\\]*).*/\1/p' "$lock")
}

# On all cores, without the packages' own tests. What can't be compiled, such as a template, is no failure: Python
# compiles it when it is imported.
compile_bytecode() {
    "$python" -m compileall -q -j 0 -x '/tests?/' "$env"/lib/python3.*/site-packages > /dev/null 2>&1 || true
}

# In a subshell, whose end releases the lock; after a kill the kernel releases it.
make_environment() (
    [[ -z $active ]] || is_supported "$python" ||
        fail 2 "the active environment $env has no Python 3.10-3.13: deactivate it"
    exec 9> "${active:-$root/.venv}${active:+/.vit_static}.lock"
    flock -n 9 || { say "waiting for another setup to end ..." && flock 9; }
    ! is_set_up || exit 0 # the other setup has done it

    if [[ -n $active ]]; then
        : > "$log"
        "$python" -m pip --version >> "$log" 2>&1 || "$python" -m ensurepip >> "$log" 2>&1 ||
            fail 1 "the active environment $env has no pip (see $log)"
    else
        local base
        base=$(find_python)
        [[ ! -L $env ]] || fail 2 "$env is a link to an environment that doesn't match $lock;" \
            "remove the link, or activate that environment"
        mkdir -p -- "$env"
        find "$env/" -mindepth 1 -delete # what a killed setup, another Python or device left
        "$base" -m venv "$env" > "$log" 2>&1 || fail 1 "$base can't create $env (see $log)"
    fi
    say "installing Paddle ($VIT_STATIC_DEVICE build), DALI and the rest into ${env/#$root\//}" \
        "(2 GB, with CUDA more; a minute or two) ..."
    if [[ -n $active ]]; then # both builds of Paddle are one Python package: they exclude each other
        local other=paddlepaddle-gpu
        [[ $VIT_STATIC_DEVICE == cpu ]] || other=paddlepaddle
        "$python" -m pip uninstall -y "$other" >> "$log" 2>&1
    fi
    install_packages
    compile_bytecode
    wanted_stamp > "$stamp.new"
    mv -- "$stamp.new" "$stamp"
    rm -f -- "$stamp.unfinished"
    say "installed"
)

# ---- the verb ----

is_set_up || make_environment

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1   # from Python 3.11: a yaml.py in the caller's folder is not taken for the package
export PYTHONNOUSERSITE=1 # nor are packages in ~/.local, which a Conda environment would prefer

case ${1:-} in
    setup) ;;
    test)
        unset PYTHONDONTWRITEBYTECODE # every one of many processes would compile the package and its tests again
        cd -- "$root" && exec "$python" -m pytest "${@:2}"
        ;;
    *)
        # Ctrl-C waits until the program's first line: Python would print a traceback while it starts.
        block=(env --block-signal=INT)
        "${block[@]}" true 2> /dev/null || block=()
        exec ${block[@]+"${block[@]}"} "$python" -m vit_static "$@"
        ;;
esac
