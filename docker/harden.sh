#!/bin/sh
# Last stages only: harden.sh FOLDER... removes pip from the base image, adds the user that the service runs as, and
# makes the folders of its volumes: a new volume takes their owner.
set -eu
python -c 'import ensurepip, os; print(os.path.dirname(ensurepip.__file__))' 2>/dev/null | xargs -r rm -rf
for package in pip setuptools wheel pkg_resources _distutils_hack; do
    rm -rf /usr/lib/python3*/dist-packages/"$package" /usr/lib/python3*/dist-packages/"$package"-* \
        /usr/local/lib/python3*/site-packages/"$package" /usr/local/lib/python3*/site-packages/"$package"-*
done
rm -rf /usr/share/python-wheels /usr/bin/pip* /usr/local/bin/pip* /usr/local/bin/wheel /usr/local/lib/python3*/site-packages/distutils-precedence.pth
groupadd --gid 10001 mulligan
useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin mulligan
for folder in "$@"; do
    install -d -o mulligan -g mulligan -m 0750 "$folder"
done
