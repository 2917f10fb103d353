#!/usr/bin/env bash
# The C kernel under AddressSanitizer, UndefinedBehaviorSanitizer and valgrind: tests/full/sanitize.sh [PYTHON]
# Needs gcc and valgrind. One verdict a tool; exit code 1 if either found something or a test failed. Minutes.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=$(command -v "${1:-python}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
units=(tests/unit/test_rows.py tests/unit/test_jsonl.py tests/unit/test_pack.py)

# Python runs this first: here, and in every process that a test starts, the build under test is already loaded.
cat >"$work/sitecustomize.py" <<'END'
import importlib.util
import os
import sys

spec = importlib.util.spec_from_file_location("corefit.data.kernel._kernel", os.environ["KERNEL_UNDER_TEST"])
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
END

# A pytest plugin: valgrind makes everything fifty times slower.
cat >"$work/examples.py" <<'END'
from hypothesis import settings

settings.register_profile("few", settings.get_profile("ci"), max_examples=20)
END

# What valgrind says of the interpreter, its other extensions and the dynamic loader, with any kernel or none.
for kind in Cond Value8; do
  printf '{\n  not ours\n  Memcheck:%s\n  obj:*python*\n}\n' "$kind"
done >"$work/suppressions"
for functions in Addr8:strncmp:is_dst Addr32:__wmemcmp*:unicode_compare; do
  IFS=: read -r kind called caller <<<"$functions"
  printf '{\n  not ours\n  Memcheck:%s\n  fun:%s\n  fun:%s\n}\n' "$kind" "$called" "$caller"
done >>"$work/suppressions"

check() { # NAME, FLAGS of the compiler, PROFILE of hypothesis, FILES, the COMMAND that runs Python
  local kernel="$work/$1/_kernel.abi3.so" log="$work/$1.log"
  local run=(env PYTHONPATH="$work" KERNEL_UNDER_TEST="$kernel" PYTHONMALLOC=malloc "${@:5}" "$python")
  mkdir "$work/$1"
  # shellcheck disable=SC2086 # FLAGS and FILES are several
  if gcc -std=c11 -Wall -Wextra -g -O1 $2 -shared -fPIC corefit/data/kernel/*.c -o "$kernel" \
    -I"$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')" &&
    "${run[@]}" -c "from corefit.data import kernel; assert kernel.compiled.__file__ == '$kernel'" &&
    "${run[@]}" -m pytest -p no:cacheprovider -p examples --hypothesis-profile="$3" --capture=sys \
      -m "not full and not measured" "${units[@]}" $4 >"$log" 2>&1; then
    echo "$1: nothing found in $(grep -oE '[0-9]+ passed.*' "$log")"
  else
    [ -f "$log" ] && tail -n 60 "$log"
    echo "$1: FAILED"
    failed=1
  fi
}

check sanitizers "-fsanitize=address,undefined -fno-sanitize-recover" ci tests/property \
  LD_PRELOAD="$(gcc -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0
check valgrind "" few "tests/property/test_jsonl.py tests/property/test_pack.py" \
  valgrind --quiet --suppressions="$work/suppressions" --error-exitcode=9
exit "$failed"
