#!/bin/sh
# Builds only: install.sh VENV REQUIREMENT... makes a virtual environment at the versions of constraints.txt, or adds to
# one, and removes what no service runs. Packages of /opt/torch, where that is there, count as installed.
# Each file must have one of the hashes of requirements.lock, but for torch and what only its builds for GPUs bring.
# A requirement that is `torch` is taken from the wheels in $WHEELS where one is there, else from the index $TORCH_INDEX,
# and from nowhere else; from pip's own index where neither is given.
set -eu
venv=$1
shift

install() {
    pip --python "$venv/bin/python" install --disable-pip-version-check --root-user-action=ignore \
        --progress-bar=off --quiet "$@"
}

# Of a report of pip: the packages to install, as lines of requirements.lock where they are there. Torch, and what a
# package of torch brings along, may be by the version alone; anything else that the lock lacks is refused. The project
# itself is neither.
SELECT='
import json, re, sys
from importlib import metadata
def plain(name): return re.sub("[-_.]+", "-", name).lower()
lock = {re.split("==", block)[0].lower(): block for block in re.split(r"\n(?=[a-zA-Z0-9])", open("requirements.lock").read())}
report = {plain(found["metadata"]["name"]): found for found in json.load(open("report.json"))["install"]}
def needs(name):
    if name in report:
        return report[name]["metadata"].get("requires_dist") or ()
    try:
        return metadata.requires(name) or ()  # it was installed before
    except metadata.PackageNotFoundError:
        return ()
brought, of_torch = ["torch"], set()
while brought:
    name = brought.pop()
    if name not in of_torch:
        of_torch.add(name)
        brought += [plain(re.match("[A-Za-z0-9._-]+", need)[0]) for need in needs(name) if "extra ==" not in need]
refused = []
with open("locked.txt", "w") as locked, open("unlocked.txt", "w") as unlocked:
    for name, found in report.items():
        pin = name + "==" + found["metadata"]["version"]
        block = lock.get(name, "")
        if block.startswith(pin + " "):
            print(block, file=locked)
        elif "dir_info" in found["download_info"]:
            pass
        elif name in of_torch:
            print(pin, file=unlocked)
        else:
            refused.append(pin)
if refused:
    sys.exit("error: requirements.lock has no hash of " + ", ".join(sorted(refused)) + ": pin it in constraints.txt, then `make lock`")
'

# Resolves at the versions of constraints.txt, and installs by hash.
install_locked() {
    PIP_CONSTRAINT=$PWD/constraints.txt install --dry-run --report report.json ${WHEELS:+--find-links "$WHEELS"} "$@"
    "$venv/bin/python" -c "$SELECT"
    if [ -s locked.txt ]; then install --no-deps --require-hashes --requirement locked.txt; fi
    if [ -s unlocked.txt ]; then
        echo "without a hash, at the version alone: $(tr '\n' ' ' <unlocked.txt)"
        install --no-deps ${WHEELS:+--find-links "$WHEELS"} --requirement unlocked.txt
    fi
}

# As it may be shown: without a user's name and password.
shown() { printf '%s' "$1" | sed 's#//[^/@]*@#//***@#'; }

# The index is asked once: pip itself would try for minutes, and then take the build of its own index, which brings CUDA.
index_answers() {
    seconds=${TORCH_INDEX_SECONDS:-10}
    answer=$(timeout $((seconds * 2)) pip --python "$venv/bin/python" index versions torch -vv \
        --index-url "$TORCH_INDEX" --timeout "$seconds" --retries 0 2>&1) && return
    shown "$answer" | grep -E -m 1 'Could not fetch URL|not a trusted or secure host' >&2 || true
    return 1
}

refuse() {
    cat >&2 <<END
error: there is no torch $version for this image's Python in $1
The build of pip's own index was not taken instead: on x86 it brings CUDA with it, gigabytes. Set one of these:
    TORCH_INDEX=https://…/whl/cpu     a mirror of PyTorch's builds for the CPU that can be reached from here
    docker/wheels/                    put torch-$version+cpu-….whl into this folder; no index is asked for torch then
    TORCH_INDEX=                      (empty) pip's own index, with CUDA
As in: TORCH_INDEX= docker compose up --build --wait, or docker build --build-arg TORCH_INDEX= (docs/docker.md, "torch")
END
    exit 1
}

install_torch() {
    version=$(sed -n 's/^torch==//p' constraints.txt)
    if [ -n "${WHEELS:-}" ] && ls "$WHEELS"/torch-*.whl >/dev/null 2>&1; then
        echo "torch $version: from the wheels in $WHEELS"
        TORCH_INDEX=
        install --no-deps --no-index --find-links "$WHEELS" "torch==$version" || refuse "$WHEELS: $(cd "$WHEELS" && echo torch-*.whl)"
    elif [ -n "${TORCH_INDEX:-}" ]; then
        echo "torch $version: from $(shown "$TORCH_INDEX")"
        index_answers && install --no-deps --index-url "$TORCH_INDEX" "torch==$version" || refuse "$(shown "$TORCH_INDEX")"
    else
        echo "torch $version: from pip's own index, on x86 with CUDA, gigabytes (TORCH_INDEX is empty)"
    fi
}

mkdir -p src # the package's import root by pyproject.toml; what is installed here are its dependencies
python -m venv --without-pip "$venv"
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if [ -d /opt/torch ] && [ "$venv" != /opt/torch ]; then
    echo "/opt/torch/${packages#"$venv"/}" >"$packages/torch.pth"
fi
case " $* " in
*" torch "*) install_torch ;;
esac
install_locked "$@"
for project in "$@"; do
    case $project in # its metadata and commands; what builds them is locked, too
    .*) install_locked setuptools && install --no-deps --no-build-isolation "$project" ;;
    esac
done

cd "$packages"
rm -rf setuptools setuptools-*.dist-info pkg_resources _distutils_hack distutils-precedence.pth # torch builds with it
rm -rf torch/test torch/include torch/share torch/lib/*test*.so torch/lib/libaoti_custom_ops.so \
    torch/lib/libbackend_with_compiler.so
find torch/bin -type f ! -name torch_shm_manager -delete 2>/dev/null || true
find . -name '*.a' -delete
find . -type d \( -name test -o -name tests \) -prune -exec rm -rf {} +
