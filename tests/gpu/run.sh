#!/usr/bin/env bash
# All that only a GPU shows: `bash tests/gpu/run.sh` runs the tests, then the benchmark; with `tests` or `speed` one of them,
# each in less than ten minutes on an H200. Results go to benchmarks/results, or to the folder that $OUT names.
# PYTHON has torch, and what pip install -e '.[test]' brings; the benchmark's peer needs trl too.
# Where nothing can be fetched, WHEELS is a folder with what PYTHON lacks (pip download --no-deps -d FOLDER NAME==VERSION ...;
# beside CUDA images of torch and transformers mostly bitsandbytes, trl, datasets, dill and multiprocess).
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} out=${OUT:-benchmarks/results} part=${1:-all}
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-build-isolation --target "$site" "$WHEELS"/*.whl .
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
failed=0
if [ "$part" != speed ]; then
    "$python" -P -m corefit doctor 2>&1 | tee "$out/gpu.txt" || true
    # -P: not the checkout, which has no compiled kernel
    "$python" -P -m pytest -n 4 -rfEs --durations=8 tests/gpu 2>&1 | tee -a "$out/gpu.txt" || failed=1
fi
if [ "$part" != tests ]; then
    "$python" -P -m corefit --version
    PYTHONUNBUFFERED=1 "$python" benchmarks/train_gpu.py --seconds "${SECONDS_LEFT:-360}" --out "$out/train_gpu.json" || failed=1
fi
exit $failed
