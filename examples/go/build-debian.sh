#!/bin/sh
# Builds ./client with Debian's packages instead of modules, without a network:
#   xargs apt-get install --yes < debian-packages.txt
set -eu
cd "$(dirname "$0")"
./generate.sh
mkdir -p build/src
ln -sfn ../.. build/src/mulligan-client # where Go looks for a package of this name without modules
GO111MODULE=off GOFLAGS='' GOPATH="$PWD/build:/usr/share/gocode" exec go build -o client mulligan-client
