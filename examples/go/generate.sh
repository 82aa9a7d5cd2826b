#!/bin/sh
# Generates the stubs in gen/ from the contracts. Needs protoc, protoc-gen-go and protoc-gen-go-grpc on the PATH.
set -eu
cd "$(dirname "$0")"
proto=${PROTO:-../../proto} # the folder of the contracts
module=$(sed -n 's/^module //p' go.mod)
contracts=$(cd "$proto" && find mulligan buf -name '*.proto' | sort)
set -- --proto_path="$proto" --go_out=. --go_opt=module="$module" --go-grpc_out=. --go-grpc_opt=module="$module"
# The contracts name no Go packages: each folder becomes one, such as gen/mulligan/env/v1.
for file in $contracts; do
    package="$module/gen/$(dirname "$file")"
    set -- "$@" --go_opt=M"$file=$package" --go-grpc_opt=M"$file=$package"
done
rm -rf gen
# shellcheck disable=SC2086 # file names without spaces, one argument each
exec protoc "$@" $contracts
