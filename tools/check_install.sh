#!/usr/bin/env bash
# Installs a built tree into a folder, moves that folder, and builds and runs both examples against it: by CMake package and by pkg-config.
# usage: tools/check_install.sh BUILD_FOLDER
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=$(realpath "${1:?usage: tools/check_install.sh BUILD_FOLDER}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cmake --install "$build" --prefix "$work/first" >/dev/null
# Nothing in the installed tree may name the place it was installed to, or the place it was built at.
if grep -rlF --include='*.cmake' --include='*.pc' --include='*.h' --include='*.hpp' -e "$work" -e "$PWD" "$work/first"; then
  echo "error: the files above name a folder of this machine" >&2
  exit 1
fi
mv "$work/first" "$work/prefix"

cmake -S examples -B "$work/cmake" -DCMAKE_PREFIX_PATH="$work/prefix" -DCMAKE_BUILD_TYPE=Release >/dev/null
cmake --build "$work/cmake" >/dev/null
"$work/cmake/c/prefill_and_decode_c"
"$work/cmake/cpp/prefill_and_decode_cpp"

PKG_CONFIG_PATH=$(dirname "$(find "$work/prefix" -name flashdelta.pc)")
export PKG_CONFIG_PATH
read -ra flags <<<"$(pkg-config --cflags --libs flashdelta)"
warnings=(-Wall -Wextra -Wpedantic -Werror)
"${CC:-cc}" -std=c11 "${warnings[@]}" examples/c/main.c -o "$work/c" "${flags[@]}" -lm
"${CXX:-c++}" -std=c++20 "${warnings[@]}" examples/cpp/main.cpp -o "$work/cpp" "${flags[@]}"
LD_LIBRARY_PATH=$(dirname "$(find "$work/prefix" -name libflashdelta.so)")
export LD_LIBRARY_PATH
"$work/c"
"$work/cpp"
