#!/bin/bash
# Gets Debian's kernels, OVMF and ACPI disassembler for the tests, with the distribution's own package tool, into
# artefacts/: vmlinuz, vmlinuz-6.1, OVMF.fd, iasl, and ARTEFACTS.txt that says what they are. Gets only what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

kernel=linux-image-6.12.117+deb12-cloud-amd64
old_kernel=linux-image-6.1.0-56-cloud-amd64
ovmf=ovmf
iasl=acpica-tools
files=(artefacts/vmlinuz artefacts/vmlinuz-6.1 artefacts/OVMF.fd artefacts/iasl)
options=(-qq -o Acquire::Retries=1 -o Acquire::http::Timeout=30)
if [ "$(id -u)" = 0 ]; then
    options+=(-o APT::Sandbox::User=root) # or apt warns that it cannot give up root for a download into here
fi

stop() {
    echo "artefacts: $1; tests marked 'artefacts' need ${files[*]} and are left out" >&2
    exit 1
}

is_known() {
    apt-cache show "$1" >/dev/null 2>&1
}

# newest_kernel PREFIX: the newest cloud kernel whose package name begins so
newest_kernel() {
    apt-cache pkgnames "linux-image-$1" | { grep -E -- '-cloud-amd64$' || true; } | sort -V | tail -n 1
}

update() {
    [ "$(id -u)" = 0 ] || stop "apt's package lists are missing or old (run 'apt-get update' as root)"
    apt-get "${options[@]}" update >>artefacts/apt.log 2>&1 || stop "apt cannot get its package lists (artefacts/apt.log)"
}

download() {
    rm -rf artefacts/new
    mkdir artefacts/new
    (cd artefacts/new && apt-get "${options[@]}" download "$1" >>../apt.log 2>&1)
}

# get PACKAGE FILE NAME: the one file of PACKAGE that matches FILE becomes artefacts/NAME, unless that is there
get() {
    local package=$1 file=$2 name=$3 version sum origin
    [ ! -e "artefacts/$name" ] || return 0
    download "$package" || { update && download "$package"; } || stop "$package cannot be had (artefacts/apt.log)"
    dpkg-deb -x artefacts/new/*.deb artefacts/new/root
    version=$(dpkg-deb -f artefacts/new/*.deb Version)
    sum=$(sha256sum artefacts/new/root/$file | cut -d ' ' -f 1)
    origin="not the version whose numbers the tests know"
    if grep -q "^$sum  $name\$" tests/artefacts.sha256; then
        origin="the version whose numbers the tests know"
    fi
    mv artefacts/new/root/$file "artefacts/$name"
    rm -rf artefacts/new
    echo "$name: $package $version, sha256 $sum, $origin" | tee -a artefacts/ARTEFACTS.txt
}

missing=0
for file in "${files[@]}"; do
    [ -e "$file" ] || missing=1
done
if [ $missing = 0 ]; then
    echo "artefacts: already there (artefacts/ARTEFACTS.txt)"
    exit 0
fi
if ! command -v apt-get dpkg-deb >/dev/null; then
    stop "this is no Debian, there is no apt-get"
fi
mkdir -p artefacts
rm -f artefacts/apt.log

if ! is_known "$ovmf" || ! is_known "$iasl" || [ -z "$(newest_kernel 6.12.)" ] || [ -z "$(newest_kernel 6.1.0-)" ]; then
    update
fi
is_known "$kernel" || kernel=$(newest_kernel 6.12.)
is_known "$old_kernel" || old_kernel=$(newest_kernel 6.1.0-)
if [ -z "$kernel" ] || [ -z "$old_kernel" ] || ! is_known "$ovmf" || ! is_known "$iasl"; then
    stop "apt offers no linux-image-6.12.*-cloud-amd64, no linux-image-6.1.0-*-cloud-amd64, no $ovmf or no $iasl (artefacts/apt.log)"
fi
get "$kernel" 'boot/vmlinuz-*' vmlinuz
get "$old_kernel" 'boot/vmlinuz-*' vmlinuz-6.1
get "$ovmf" usr/share/ovmf/OVMF.fd OVMF.fd
get "$iasl" usr/bin/iasl iasl
