#!/bin/sh
# Builds ./client with Debian's packages instead of modules, without a network:
#   apt-get install golang-go golang-google-grpc-dev golang-google-protobuf-dev golang-github-golang-protobuf-1-5-dev \
#       protobuf-compiler protoc-gen-go protoc-gen-go-grpc
set -eu
cd "$(dirname "$0")"
./generate.sh
mkdir -p build/src
ln -sfn ../.. build/src/mulligan-client # where Go looks for a package of this name without modules
GO111MODULE=off GOFLAGS='' GOPATH="$PWD/build:/usr/share/gocode" exec go build -o client mulligan-client
