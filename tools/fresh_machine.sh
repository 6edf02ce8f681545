#!/usr/bin/env bash
# Shows that a machine with nothing but a base system is enough: makes a Debian chroot, puts a fresh clone of this repository in it, and
# runs ./run demo twice (the second time must be quick) and ./run test there. Needs root, debootstrap and git.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: tools/fresh_machine.sh [options] FOLDER

FOLDER is where chroots live. FOLDER/base, the bare system, is made with debootstrap if it is not there; FOLDER/run is a copy of it in
which the commands run, made anew each time; FOLDER/log is everything they print, with their times.

  --suite NAME     release to bootstrap (default: bookworm)
  --mirror URL     where debootstrap takes it from (default: debootstrap's own)
  --env NAME       pass this environment variable on; may be repeated, and end in * for all that begin so
  --copy PATH      copy this file or folder into the chroot, to the same path; may be repeated
  --commands LIST  what to run, separated by semicolons (default: "./run demo;./run demo;./run test")
HELP
}

SUITE=bookworm MIRROR='' COMMANDS='./run demo;./run demo;./run test' FOLDER='' ENVIRONMENT=() COPIES=()
while (($#)); do
  case $1 in
    --suite) SUITE=$2 && shift ;;
    --mirror) MIRROR=$2 && shift ;;
    --env) ENVIRONMENT+=("$2") && shift ;;
    --copy) COPIES+=("$2") && shift ;;
    --commands) COMMANDS=$2 && shift ;;
    -h | --help) usage && exit ;;
    -*) usage >&2 && exit 2 ;;
    *) FOLDER=$1 ;;
  esac
  shift
done
[[ -n $FOLDER ]] || { usage >&2 && exit 2; }
((EUID == 0)) || { echo "error: a chroot takes root" >&2 && exit 1; }

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$FOLDER"
BASE=$(realpath "$FOLDER")/base CHROOT=$(realpath "$FOLDER")/run LOG=$(realpath "$FOLDER")/log

if [[ ! -e $BASE/etc/debian_version ]]; then
  echo "==> making $BASE with debootstrap"
  rm -rf "$BASE"
  # shellcheck disable=SC2086
  debootstrap --variant=minbase "$SUITE" "$BASE" $MIRROR >"$LOG" 2>&1 || { tail "$LOG" >&2 && exit 1; }
fi

unmount() {
  umount "$CHROOT/proc" "$CHROOT/dev" 2>/dev/null || true
}
trap unmount EXIT
unmount
echo "==> copying the base system to $CHROOT"
# A mount left inside would be emptied together with the folder.
if grep -q " $CHROOT/" /proc/mounts; then
  echo "error: something is still mounted in $CHROOT" >&2
  exit 1
fi
rm -rf "$CHROOT"
cp -a "$BASE" "$CHROOT"
git clone -q "$REPOSITORY" "$CHROOT/root/flashdelta"
cp /etc/resolv.conf "$CHROOT/etc/resolv.conf"
for path in "${COPIES[@]}"; do
  mkdir -p "$CHROOT$(dirname "$path")"
  cp -aL "$path" "$CHROOT$(dirname "$path")/"
done
mount -t proc proc "$CHROOT/proc"
mount --bind /dev "$CHROOT/dev"

variables=(HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8)
for pattern in "${ENVIRONMENT[@]}"; do
  while IFS= read -r name; do
    # The pattern is meant as one.
    # shellcheck disable=SC2053
    if [[ $name == $pattern ]]; then variables+=("$name=${!name}"); fi
  done < <(compgen -e)
done

: >"$LOG"
IFS=';' read -ra commands <<<"$COMMANDS"
for command in "${commands[@]}"; do
  echo "==> $command" | tee -a "$LOG"
  start=$SECONDS status=0
  env -i "${variables[@]}" chroot "$CHROOT" bash -c "cd /root/flashdelta && $command" >>"$LOG" 2>&1 </dev/null || status=$?
  echo "==> $command: exit status $status after $((SECONDS - start)) s" | tee -a "$LOG"
  ((status == 0)) || { tail -n 30 "$LOG" >&2 && exit "$status"; }
done
