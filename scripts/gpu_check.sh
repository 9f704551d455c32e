#!/bin/sh
# Everything that needs a CUDA device, in steps of under ten minutes: scripts/gpu_check.sh [--list] [step ...]
# What teaches most in a stay of so many seconds: scripts/gpu_check.sh --budget 840
# The Python that runs it (PYTHON=..., else python3) needs torch with CUDA, transformers and accelerate, and no network.
# WHEELS=FOLDER brings what else there is to install: wheels go into a folder of their own, never into that Python.
# See docs/notes/gpu_check.md.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
path=$root
if [ -n "${WHEELS:-}" ]; then
    wheels=$(cd "$WHEELS" && pwd)
    site=${SITE:-$root/.cache/gpu-check-site}
    # A baseline that needs a folder of its own fetches its wheel itself, from here.
    export PIP_NO_INDEX=1 PIP_FIND_LINKS="$wheels"
    if [ ! -e "$site/.installed" ] || [ "$wheels" -nt "$site/.installed" ]; then
        list=$(find "$wheels" -maxdepth 1 -type f -name '*.whl' ! -name 'flexgen-*' | sort)
        # shellcheck disable=SC2086  (names of wheels hold no spaces)
        "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$site" $list
        touch "$site/.installed"
    fi
    path=$path:$site
fi
PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
exec "$python" "$root/scripts/gpu_check.py" "$@"
