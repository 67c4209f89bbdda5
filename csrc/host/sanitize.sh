#!/bin/sh
# Run the tests of happyhorse_fast._C under AddressSanitizer and UndefinedBehaviorSanitizer. The first finding ends it.
#   csrc/host/sanitize.sh [python [arguments for pytest]]
# The package is imported through links beside the instrumented module, so that the checkout's own module stays.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$("${1:-"$root/.venv/bin/python"}" -c 'import sys; print(sys.executable)')
[ $# -eq 0 ] || shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

mkdir "$work/happyhorse_fast"
for entry in "$root"/happyhorse_fast/*; do
  case ${entry##*/} in _C.*.so | __pycache__) ;; *) ln -s "$entry" "$work/happyhorse_fast/" ;; esac
done
ln -s "$root/kernels" "$root/csrc" "$work/happyhorse_fast/"
module=$work/happyhorse_fast/_C$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
# The same build as setup.py's.
sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
(cd "$root" && CXX="${CXX:-g++}" LDFLAGS="$sanitizers" \
  CXXFLAGS="-O1 -g $sanitizers -D_GLIBCXX_ASSERTIONS" \
  "$python" -c "from csrc import native; native.build_module(native.Path('$module'))")

export PYTHONPATH="$work" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1
# An uninstrumented interpreter must load the sanitizer's runtime first, and libstdc++, whose exceptions it intercepts.
export LD_PRELOAD="$("${CXX:-g++}" -print-file-name=libasan.so) $("${CXX:-g++}" -print-file-name=libstdc++.so)"
cd "$work"
"$python" -c "from happyhorse_fast import _C; assert _C.__file__ == '$module', _C.__file__"
cd "$root"
# -s, or pytest's capture would lose what a sanitizer writes before it ends the process. The test of speed is left out,
# since instrumented code is several times slower.
"$(dirname "$python")/pytest" -q -s -p no:xdist -p no:cacheprovider -k "not milliseconds" \
  tests/block_map/test_host_module.py "$@"
