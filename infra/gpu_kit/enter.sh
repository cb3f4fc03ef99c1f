#!/usr/bin/env bash
# Create an environment from the machine's own Python and torch; the kit's wheels override its packages.
set -euo pipefail
KIT=${1:?folder created by fill.sh}
ENVIRONMENT=${2:?folder of the new environment}
python3 -m venv --without-pip "$ENVIRONMENT"
SITE=$("$ENVIRONMENT/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# A .pth file, because ranks and subprocesses lose PYTHONPATH more easily.
python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$SITE/machine.pth"
python3 -m pip --python "$ENVIRONMENT/bin/python" install --quiet --no-index --no-deps --no-compile --no-cache-dir "$KIT"/*.whl
"$ENVIRONMENT/bin/python" -c '
import torch, transformers, trl, deepspeed, peft
for module in (torch, transformers, trl, deepspeed, peft):
    print(module.__name__, module.__version__)
'
