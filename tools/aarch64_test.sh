#!/usr/bin/env bash
# Cross builds the C++ tests for aarch64 and runs them under qemu-user: tools/aarch64_test.sh [GoogleTest options].
#
# The libraries' arm64 packages are unpacked into build/aarch64-sysroot; the system's own package state stays as it is. A processor
# emulated in software is some 10 to 50 times slower than a real one: --gtest_filter narrows the run down.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SYSROOT=$PWD/build/aarch64-sysroot
PACKAGES=(libhwy-dev libfmt-dev libgtest-dev libdlpack-dev)

./run packages g++-aarch64-linux-gnu qemu-user-static cmake ninja-build ccache

# Downloads the arm64 packages with package lists of its own, in which the system's sources are read for that architecture.
make_sysroot() {
  local state package packages
  state=$(mktemp -d)
  mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
  touch "$state/status"
  local options=(-o "APT::Architecture=arm64" -o "APT::Architectures::=arm64" -o "Dir::State=$state" -o "Dir::State::Lists=$state/lists"
    -o "Dir::State::status=$state/status" -o "Dir::Cache=$state/cache" -o "APT::Sandbox::User=$(id -un)" -o "Acquire::Languages=none")
  echo "==> fetching arm64 packages: ${PACKAGES[*]}"
  apt-get "${options[@]}" -qq update
  # With the run-time libraries that they need, whose package names differ between releases.
  mapfile -t packages < <({
    printf '%s\n' "${PACKAGES[@]}"
    apt-cache "${options[@]}" depends --important "${PACKAGES[@]/%/:arm64}" | sed -nE 's/^ *Depends: (lib(hwy|fmt|gtest|dlpack)[^: ]*).*/\1/p'
  } | sort -u)
  (cd "$state" && apt-get "${options[@]}" -qq download "${packages[@]/%/:arm64}")
  rm -rf "$SYSROOT"
  mkdir -p "$SYSROOT"
  for package in "$state"/*.deb; do dpkg -x "$package" "$SYSROOT"; done
  rm -rf "$state"
  touch "$SYSROOT/.complete"
}

[[ -e $SYSROOT/.complete ]] || make_sysroot
export CMAKE_C_COMPILER_LAUNCHER=ccache CMAKE_CXX_COMPILER_LAUNCHER=ccache
cmake --preset aarch64 >/dev/null
cmake --build --preset aarch64 -j "$(nproc)" --target flashdelta_tests
qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64)
"$qemu" -L /usr/aarch64-linux-gnu -E "LD_LIBRARY_PATH=$SYSROOT/usr/lib/aarch64-linux-gnu" build/aarch64/tests/flashdelta_tests "$@"
