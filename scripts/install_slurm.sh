#!/usr/bin/env bash
# Installs the programs of SLURM that tests/test_slurm.py starts a cluster from, where that is allowed: for root, with
# apt. Does nothing if they are there; fails, and says why, where it cannot. No service is started or changed.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
programs=(slurmctld slurmd sbatch munged)

missing() {
    for program in "${programs[@]}"; do
        command -v "$program" >/dev/null || echo "$program"
    done
}

[ -z "$(missing)" ] && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "cannot install SLURM's programs ($(missing | xargs) missing): that takes root and apt" >&2
    exit 1
fi
echo "installing slurmctld, slurmd, slurm-client and munge"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { timeout 120 apt-get update && timeout 300 apt-get install -y --no-install-recommends \
    -o DPkg::Lock::Timeout=60 slurmctld slurmd slurm-client munge; } </dev/null >"$log" 2>&1; then
    echo "apt-get failed:" >&2
    tail -n 5 "$log" >&2
    exit 1
fi
[ -z "$(missing)" ]
