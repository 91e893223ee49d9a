#!/usr/bin/env bash
# Installs Chromium with apt, in which a test looks at the report page. Where that cannot be done (no root, no apt, no
# network) it says so and the test skips with the reason.
set -uo pipefail

for program in chromium chromium-browser google-chrome; do
    command -v "$program" >/dev/null && exit 0
done
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed: chromium (needs root and apt); the test that needs it skips" >&2
    exit 0
fi
echo "installing chromium"
export DEBIAN_FRONTEND=noninteractive
apt-get -qq -o DPkg::Lock::Timeout=120 update >/dev/null 2>&1
if ! apt-get -qq -y -o DPkg::Lock::Timeout=120 install --no-install-recommends chromium >/dev/null 2>&1; then
    echo "apt could not install chromium; the test that needs it skips" >&2
fi
exit 0
