#!/bin/bash
# Builds the image with buildah, as root, in container storage of its own:
#   scripts/build_image.sh STORAGE [NAME]
#
# Where no registry answers, the base image is stood in for by one of the same name, made from
# Debian's packages: the Dockerfile is built as it is, on another build of the same Python.
set -eu
mkdir -p "$1"
storage=$(cd "$1" && pwd)
name=${2:-sluicegate:test}
cd "$(dirname "$0")/.."
base=$(sed -n 's/^FROM \([^ ]*\)$/\1/p' Dockerfile)
certificates=/etc/ssl/certs/ca-certificates.crt

container() {
    buildah --root "$storage/root" --runroot "$storage/run" "$@"
}

stand_in() {
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,python3-pip \
        bookworm "$storage/debian"
    # A machine behind a proxy trusts more than Debian does.
    cp "$certificates" "$storage/debian$certificates"
    working=$(container from scratch)
    container add "$working" "$storage/debian" /
    container config --env "PIP_CERT=$certificates" --env PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin "$working"
    container commit --rm "$working" "$base"
    rm -rf "$storage/debian"
}

container inspect --type image "$base" >/dev/null 2>&1 \
    || container pull --quiet "docker://$base" \
    || stand_in
container bud --pull-never --format docker --isolation chroot --network host --tag "$name" .
