#!/usr/bin/env bash
# Makes .venv with the pinned set and this package; does nothing if it is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/.installed
wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

for python in python3.12 python3.11 python3; do
    command -v "$python" >/dev/null && "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && break
    python=
done
if [ -z "$python" ]; then
    echo "eagle_train needs Python 3.11 or 3.12; found $(python3 --version 2>&1 || echo none)" >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "$python has no venv module; install it, for example: apt-get install -y python3-venv" >&2
    exit 1
fi

echo "installing into .venv with $("$python" --version) (a few minutes the first time)"
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
echo "$wanted" >"$stamp"
