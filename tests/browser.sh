#!/bin/sh
# Installs Chromium for the tests of the page, where apt can do so without asking. Without it they are skipped.
set -u
for name in chromium-headless-shell chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null 2>&1 && exit 0
done

say() { printf 'browser: %s\n' "$*" >&2; }
as_root=
[ "$(id -u)" = 0 ] || as_root="sudo -n"
if ! command -v apt-get >/dev/null 2>&1 || { [ -n "$as_root" ] && ! $as_root true 2>/dev/null; }; then
    say "no Chromium, and no apt (with root or sudo) to install it: the tests of the page will be skipped"
    exit 0
fi
say "installing Chromium with apt, for the tests of the page"
$as_root apt-get update -qq >/dev/null 2>&1
# The shell alone is smaller, where the distribution has it. It draws text only with a font.
for name in chromium-headless-shell chromium; do
    $as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "$name" fonts-dejavu-core >/dev/null 2>&1 && exit 0
done
say "apt could not install it: the tests of the page will be skipped"
