#!/usr/bin/env bash
# Installs with apt what tests/cluster needs besides Python: Slurm, munge, shellcheck and iproute2. If it cannot (no root, no apt,
# no network), it prints why, and the tests that need them are skipped with the reason.
set -uo pipefail

packages=(slurm-wlm munge shellcheck iproute2)
programs=(sbatch slurmctld slurmd munged shellcheck ip)

missing=()
for program in "${programs[@]}"; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null || missing+=("$program")
done
[ "${#missing[@]}" -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed: ${missing[*]} (needs root and apt); tests that need them skip" >&2
    exit 0
fi
echo "installing ${packages[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get -qq -o DPkg::Lock::Timeout=120 update >/dev/null 2>&1
# the services of the system must not start: the tests run their own
policy=/usr/sbin/policy-rc.d
ours=0
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && ours=1
fi
log=$(mktemp)
if ! apt-get -qq -y -o DPkg::Lock::Timeout=120 install --no-install-recommends "${packages[@]}" >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    echo "apt could not install them; tests that need them skip" >&2
fi
rm -f "$log"
[ "$ours" -eq 1 ] && rm -f "$policy"
exit 0
