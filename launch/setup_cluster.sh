#!/bin/sh
# Installs what the tests of several machines need: Slurm and munge for a queue, openssh and pdsh for hosts, iproute2 for
# network namespaces. Without root and apt it says what is missing, and those tests are skipped. Called by `make test`;
# once all is there it does nothing.
set -eu

packages=
for pair in slurmctld:slurm-wlm munged:munge sshd:openssh-server ssh:openssh-client pdsh:pdsh ip:iproute2; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%%:*}" >/dev/null 2>&1 || packages="$packages ${pair#*:}"
done
[ -n "$packages" ] || exit 0

say() { printf 'setup: %s\n' "$*" >&2; }
if ! command -v apt-get >/dev/null 2>&1 || [ "$(id -u)" != 0 ]; then
    say "tests of several machines will be skipped; they need root and the packages:$packages"
    exit 0
fi
say "installing with apt:$packages"
# Their services must not start: the tests run daemons of their own.
policy=/usr/sbin/policy-rc.d
[ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod 755 "$policy" && trap 'rm -f "$policy"' EXIT; }
# shellcheck disable=SC2086  # a list of words
if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages; } \
    >/dev/null; then
    say "apt could not install$packages; tests of several machines will be skipped"
fi
