#!/usr/bin/env bash
# Runs the tests of ferroflash on this machine. The last line counts them: `N passed, N failed, N skipped`.
#
#   run.sh              everything
#   run.sh --gpu-only   only what needs a GPU: tests with `gpu` or `cuda` in their names, and `ferroflash` on it
#
# A test that needs a GPU is skipped where there is none. Where there is one, it fails if it cannot use it. The tests of
# the Python package are skipped without PyTorch and pytest.
set -uo pipefail
shopt -s nullglob
cd "$(dirname "$0")" || exit 1

only_gpu=false
case "${1-}" in
    "") ;;
    --gpu-only) only_gpu=true ;;
    *) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

export FERROFLASH_BUNDLE=$PWD FERROFLASH_EXAMPLES=$PWD/examples FERROFLASH_BIN=$PWD/ferroflash
kernels=(auto standard flash1 flash2)
passed=0 failed=0 skipped=0
if [[ -e /dev/nvidia0 || -e /dev/nvidiactl || -e /dev/dxg ]]; then gpu=1; else gpu=0; fi
counts=$(mktemp)
trap 'rm -f "$counts"' EXIT

# Passes on what a test binary prints, less what successful tests print, and leaves its counts in $counts. A test that
# finds no GPU says `skipped:` and succeeds.
count() {
    awk -v counts="$counts" -v gpu="$gpu" '
        /^successes:$/                { successes = 1 }
        /^failures:$/ || /^test result:/ { successes = 0 }
        /^---- /                      { counted = 0 }
        successes {
            if (/^skipped:/) { print; if (!counted) { counted = 1; passed--; if (gpu) failed++; else skipped++ } }
            next
        }
        /^test .* \.\.\. ok$/         { passed++ }
        /^test .* \.\.\. FAILED$/     { failed++ }
        /^test .* \.\.\. ignored/     { skipped++ }
        { print }
        END { print passed + 0, failed + 0, skipped + 0 > counts }'
}

# Runs one test binary.
tests() {
    local binary=$1 filters=() p f s
    if $only_gpu && [[ $binary != *gpu* ]]; then
        filters=(gpu cuda)
    fi
    echo "== $binary"
    # A kernel that hangs is not to hang all that follows.
    timeout 300 "$binary" --show-output "${filters[@]}" 2>&1 | count
    local status=${PIPESTATUS[0]}
    read -r p f s <"$counts"
    if ((status != 0 && f == 0)); then
        echo "$binary: exit status $status (124: it took more than 300 s)"
        f=1
    fi
    ((passed += p, failed += f, skipped += s))
}

# The tests of the Python package, of a wheel that is installed beside them and nowhere else. Where torch finds no GPU they
# skip what needs one.
python_tests() {
    local wheels=(python/*.whl) filter=() missing
    echo "== python"
    if ((${#wheels[@]} == 0)); then
        missing="no wheel here"
    elif ! missing=$(python3 -c 'import pip, pytest, torch' 2>&1); then
        missing="${missing##*$'\n'}"
    fi
    if [[ -n $missing ]]; then
        echo "skipped: the Python package: $missing"
        ((skipped += 1))
        return
    fi
    python3 -m pip install --quiet --no-index --no-deps --upgrade --target python/installed "${wheels[@]}"
    if $only_gpu; then filter=(-k "cuda"); fi
    PYTHONPATH=$PWD/python/installed timeout 1200 python3 -m pytest -q -p no:cacheprovider "${filter[@]}" python/tests \
        2>&1 | tee "$counts"
    local status=${PIPESTATUS[0]} line
    line=$(grep -E '^=* ?([0-9]+ [a-z]+,? )+in [0-9.]+s' "$counts" | tail -1)
    local p f e s
    p=$(grep -Eo '[0-9]+ passed' <<<"$line"); f=$(grep -Eo '[0-9]+ failed' <<<"$line")
    e=$(grep -Eo '[0-9]+ errors?' <<<"$line"); s=$(grep -Eo '[0-9]+ skipped' <<<"$line")
    ((passed += ${p%% *} + 0, failed += ${f%% *} + 0, failed += ${e%% *} + 0, skipped += ${s%% *} + 0))
    # Nothing collected, or the whole process gone.
    if ((status != 0)) && [[ -z $f$e ]]; then
        echo "python: exit status $status (124: it took more than 1200 s)"
        ((failed += 1))
    fi
}

# Computes attention on one file: one count.
attention() {
    echo "== ferroflash run $*"
    if ./ferroflash run "$@"; then ((passed += 1)); else ((failed += 1)); fi
}

# Counts the cases of a self-test, of which there is at least one.
selftest() {
    echo "== ferroflash selftest $*"
    ./ferroflash selftest "$@" | tee "$counts"
    local line
    if line=$(grep -Eo '^[0-9]+ passed, [0-9]+ failed' "$counts"); then
        ((passed += ${line%% *}))
        line=${line#*, }
        ((failed += ${line%% *}))
    else
        ((failed += 1))
    fi
}

# ferroflash on one backend, with some kernels.
ferroflash() {
    local backend=$1 example kernel
    selftest --backend "$backend"
    for example in examples/*.safetensors; do
        for kernel in "${@:2}"; do
            attention "$example" --backend "$backend" --kernel "$kernel" --verify
        done
    done
}

./ferroflash info
for binary in tests/*; do
    tests "$binary"
done
python_tests
if ! $only_gpu; then
    ferroflash cpu auto
    ferroflash simulator auto
fi
if ((gpu)); then
    ferroflash cuda "${kernels[@]}"
else
    echo "skipped: no GPU here"
    ((skipped += 1 + ${#kernels[@]}))
fi

echo "$passed passed, $failed failed, $skipped skipped"
((failed == 0))
