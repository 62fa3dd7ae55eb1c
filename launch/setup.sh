#!/bin/sh
# Makes .venv with everything the project needs, on Debian or Ubuntu with Python >= 3.11 and nothing else.
# A second call, with nothing changed, does nothing. Called by make; reads PYTHON (default python3) and FFCV: 1 installs
# FFCV, 0 leaves it out, empty keeps what is installed and otherwise means 1.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
stamp=.venv/.installed
if [ -z "${FFCV:-}" ]; then
    FFCV=1
    if [ -f "$stamp" ]; then
        case "$(cat "$stamp")" in *ffcv=0) FFCV=0 ;; esac
    fi
fi

wanted="$(cksum < pyproject.toml) ffcv=$FFCV"
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

say() { printf 'setup: %s\n' "$*" >&2; }
has_venv() { "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; }
has_headers() { "$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; }

packages=
if ! command -v "$PYTHON" >/dev/null 2>&1; then
    packages="python3 python3-venv python3-dev"
else
    has_venv || packages="python3-venv"
    if [ "$FFCV" != 0 ]; then
        has_headers || packages="$packages python3-dev"
    fi
fi
if [ "$FFCV" != 0 ]; then
    command -v c++ >/dev/null 2>&1 || packages="$packages g++"
    command -v pkg-config >/dev/null 2>&1 || packages="$packages pkg-config"
    pkg-config --exists opencv4 2>/dev/null || packages="$packages libopencv-dev"
    pkg-config --exists libturbojpeg 2>/dev/null || packages="$packages libturbojpeg0-dev"
fi
if [ -n "$packages" ]; then
    as_root=
    [ "$(id -u)" = 0 ] || as_root=sudo
    if ! command -v apt-get >/dev/null 2>&1 || { [ -n "$as_root" ] && ! command -v sudo >/dev/null 2>&1; }; then
        say "these system packages are missing and apt (with root or sudo) is not there to install them: $packages"
        say "install them by other means, or run 'make setup FFCV=0' and train with data.loader=memory"
        exit 1
    fi
    say "installing with apt: $packages"
    $as_root apt-get update -qq
    # shellcheck disable=SC2086  # a list of words
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
fi
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    say "$PYTHON is $("$PYTHON" --version 2>&1), but Python 3.11 or newer is needed: make PYTHON=python3.11 ..."
    exit 1
fi

extras=dev
[ "$FFCV" = 0 ] || extras=dev,ffcv
say "installing Python packages into .venv (some minutes the first time)"
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$extras]"
printf '%s' "$wanted" > "$stamp"
say "done"
