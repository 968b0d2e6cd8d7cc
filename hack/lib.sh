# Shared by the scripts in hack/. Source it; it defines functions and the paths below.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Built and downloaded programs: kept between runs, never committed.
BIN=${SKERRY_BIN:-$ROOT/bin}

say() { printf '%s %s\n' "$(date +%T)" "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# born PID: when that process began, in clock ticks since boot; nothing when it has ended. With the pid it names one
# process for good.
born() { awk '{ sub(/.*\) /, "") } $1 != "Z" { print $20 }' "/proc/$1/stat" 2>/dev/null; }

# alive PIDFILE: the recorded process runs and is the one that was started.
alive() {
  local pid time
  [[ -r $1 ]] && read -r pid time <"$1" && [[ -n $time && $(born "$pid") == "$time" ]]
}

# start DIR NAME COMMAND...: runs COMMAND in the background as a session of its own, unless it runs already.
# Writes DIR/NAME.pid and appends to DIR/NAME.log.
start() {
  local dir=$1 name=$2; shift 2
  if alive "$dir/$name.pid"; then return; fi
  setsid "$@" </dev/null >>"$dir/$name.log" 2>&1 &
  echo "$! $(born $!)" >"$dir/$name.pid"
}

# stop DIR NAME [SECONDS]: TERM, then KILL after SECONDS (10).
stop() {
  local file=$1/$2.pid pid deadline=$((SECONDS + ${3:-10}))
  if alive "$file"; then
    read -r pid _ <"$file"
    kill "$pid" 2>/dev/null || true
    while alive "$file" && ((SECONDS < deadline)); do sleep 0.05; done
    if alive "$file"; then kill -9 "$pid" 2>/dev/null || true; fi
  fi
  rm -f "$file"
}

# wait_for SECONDS WHAT LOG COMMAND...: until COMMAND succeeds; on failure shows the end of LOG ('' for none).
wait_for() {
  local deadline=$((SECONDS + $1)) what=$2 log=$3; shift 3
  until "$@" >/dev/null 2>&1; do
    if ((SECONDS >= deadline)); then
      if [[ -n $log ]]; then tail -n 20 "$log" >&2 || true; fi
      die "$what did not happen in time${log:+; its log is $log}"
    fi
    sleep 0.2
  done
}

# need_packages PROGRAM=PACKAGE...: apt-installs the packages whose programs are missing, or says what to install.
need_packages() {
  local pair missing=()
  for pair in "$@"; do
    # Names with a slash are files, others are looked up on PATH and in the sbin directories.
    if [[ ${pair%%=*} == */* ]]; then [[ -e ${pair%%=*} ]] && continue
    elif PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%=*}" >/dev/null; then continue; fi
    missing+=("${pair#*=}")
  done
  if ((${#missing[@]} == 0)); then return; fi
  [[ $(id -u) == 0 ]] || die "not installed: ${missing[*]}; run as root: apt-get install ${missing[*]}"
  command -v apt-get >/dev/null || die "not installed: ${missing[*]}; install them with this system's package manager"
  say "installing ${missing[*]}"
  # Services that Debian would start on installation are not wanted: the scripts run their own instances.
  local policy=/usr/sbin/policy-rc.d made=
  if [[ ! -e $policy ]]; then printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; made=1; fi
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
    >"$BIN/apt.log" 2>&1 </dev/null || { tail -n 20 "$BIN/apt.log" >&2; [[ $made ]] && rm -f $policy; die "apt-get could not install ${missing[*]}"; }
  if [[ $made ]]; then rm -f $policy; fi
}

# need_pymodbus: the Modbus server that the sandbox and the tests talk to, in $BIN/python.
need_pymodbus() {
  if PYTHONPATH=$BIN/python python3 -c 'import pymodbus' 2>/dev/null; then return; fi
  command -v python3 >/dev/null || need_packages python3=python3
  python3 -m pip --version >/dev/null 2>&1 || need_packages pip3=python3-pip
  say "installing pymodbus"
  python3 -m pip install -q --target "$BIN/python" 'pymodbus==3.16.*' >&2
}

# program NAME: one of Skerry's own, where cargo put it.
program() { echo "${CARGO_TARGET_DIR:-$ROOT/target}/${SKERRY_PROFILE:-debug}/$1"; }

# node_interface NAME ADDRESS: a bridge of this machine with ADDRESS, for Node status: the API server dials the node there
# for logs and exec, and refuses loopback.
node_interface() {
  ip link show "$1" >/dev/null 2>&1 || ip link add "$1" type bridge
  ip address replace "$2/32" dev "$1"
  ip link set "$1" up
}

mkdir -p "$BIN"
