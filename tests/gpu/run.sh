#!/usr/bin/env bash
# What only a GPU can show: two processes train as one there, how seldom the host waits for it, that decoding from a graph
# answers as the plain one does, and how much of the GPU the stages use. `--device cpu` in the first line tries the script without one. The results belong into docs/distributed.md and benchmarks/RESULTS.md.
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=src
status=0
python3 tests/gpu/processes.py "$@" || status=1
if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
	python3 tests/gpu/waits.py || status=1
	python3 tests/gpu/decoding.py || status=1
	python3 benchmarks/gpu.py || status=1
fi
exit $status
