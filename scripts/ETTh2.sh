#!/usr/bin/env bash
# Horizons 96, 192, 336 and 720 of ETTh2, or some: scripts/ETTh2.sh 96 192 --seed 1 (--help says more)
# The LLM: --llm_model_path, else TIME_LLM_PATH (export TIME_LLM_PATH=/data/llm)
set -eu
exec python "$(dirname "$0")/launch.py" ETTh2 "$@"
