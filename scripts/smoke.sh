#!/usr/bin/env bash
# The whole pipeline on made-up data and a tiny LLM, in seconds: scripts/smoke.sh
set -eu
exec python "$(dirname "$0")/launch.py" smoke "$@"
