#!/bin/sh
# Every benchmark with a bar, one after the other, on a machine that does nothing else; figures go to results/benchmarks.
# benchmarks/run_all.sh [--quick]
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
failed=""
for name in step_overhead host_cost cpu_attention link_bound balanced disk_stream compression continuous memory latency capped_disk; do
    out="--out results/benchmarks/$name.json"
    case " $* " in *" --quick "*) out="" ;; esac # quick figures are not kept
    # shellcheck disable=SC2086
    "$python" "benchmarks/$name.py" "$@" $out || failed="$failed $name"
done
[ -z "$failed" ] || { echo "ended with an error:$failed" >&2; exit 1; }
