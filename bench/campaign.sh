#!/usr/bin/env bash
# Measures this machine from a bare checkout, with no network: see bench/campaign.py. All options go there.
# PYTHON names the interpreter [python3]; OUT the folder of results [bench/results/<device>-<date>].
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if ! (cd / && "$PYTHON" -c 'import fastres.kernels') 2>/dev/null; then
    "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation -e . ||
        echo "not installed: running from the checkout" >&2
fi
exec "$PYTHON" -u -m bench.campaign "$@"
