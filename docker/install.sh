#!/bin/sh
# Builds only: install.sh VENV REQUIREMENT... makes a virtual environment at the versions of constraints.txt, or adds to
# one, and removes what no service runs. Packages of /opt/torch, where that is there, count as installed.
set -eu
venv=$1
shift
python -m venv --without-pip "$venv"
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if [ -d /opt/torch ] && [ "$venv" != /opt/torch ]; then
    echo "/opt/torch/${packages#"$venv"/}" >"$packages/torch.pth"
fi
case ${WHEELS:+$(ls "$WHEELS")} in
*torch-*) TORCH_INDEX= ;; # it is there already
esac
# PIP_BUILD_CONSTRAINT is what newer versions of pip ask for.
PIP_CONSTRAINT=$PWD/constraints.txt PIP_BUILD_CONSTRAINT=$PWD/constraints.txt \
    pip --python "$venv/bin/python" install --disable-pip-version-check --root-user-action=ignore --progress-bar=off \
    --quiet ${WHEELS:+--find-links "$WHEELS"} ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$@"

cd "$packages"
rm -rf setuptools setuptools-*.dist-info pkg_resources _distutils_hack distutils-precedence.pth # torch builds with it
rm -rf torch/test torch/include torch/share torch/lib/*test*.so torch/lib/libaoti_custom_ops.so \
    torch/lib/libbackend_with_compiler.so
find torch/bin -type f ! -name torch_shm_manager -delete 2>/dev/null || true
find . -name '*.a' -delete
find . -type d \( -name test -o -name tests \) -prune -exec rm -rf {} +
