#!/usr/bin/env bash
# Measures this machine from a bare checkout, with nothing installed and no network: see bench/campaign.py. All options go
# there.
# PYTHON names the interpreter [python3]; OUT the folder of results [bench/results/<device>-<date>].
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
exec "$PYTHON" -u -m bench.campaign "$@"
