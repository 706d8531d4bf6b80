#!/usr/bin/env bash
# Collect in a folder what the Python of a machine with a GPU lacks for gpu.py --wheels FOLDER, on one with a network:
#
#   benchmarks/gpu_wheels.sh FOLDER [--python 3.12] [--platform manylinux_2_28_x86_64] [--cuequivariance cu12] [--has FILE]
#
# --python, --platform: of the machine with the GPU; here they are this machine's Python and glibc 2.28.
# --cuequivariance: cuEquivariance with its kernels for that CUDA, cu12 or cu13; cpu: without them.
# --has: what `pip list --format=freeze` prints there. Without it torch alone is taken to be there, with its own needs
#   for CUDA, and a few wheels are collected for nothing.
set -euo pipefail
fail() { echo "gpu_wheels.sh: error: $1" >&2; exit 2; }

root=$(cd "$(dirname "$0")/.." && pwd)
usage="give a folder for the wheels, see the first lines of this script"
[[ $# -ge 1 && $1 != -* ]] || fail "$usage"
folder=$1; shift
python=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
platform=manylinux_2_28_x86_64 has="" wanted=()
while [[ $# -gt 0 ]]; do
    [[ $# -ge 2 ]] || fail "$1 needs a value: $usage"
    case $1 in
        --python) python=$2 ;;
        --platform) platform=$2 ;;
        --has) has=$2; grep -qi '^torch==' "$has" || fail "--has $has names no torch: write there what pip list --format=freeze prints" ;;
        --cuequivariance)
            wanted=(cuequivariance-torch)
            case $2 in
                cpu) ;;
                cu12 | cu13) wanted+=("cuequivariance-ops-torch-$2") ;;
                *) fail "--cuequivariance $2 is not known: use cu12, cu13 or cpu" ;;
            esac ;;
        *) fail "$1 is not known: $usage" ;;
    esac
    shift 2
done
[[ $platform =~ ^manylinux_2_([0-9]+)_(.+)$ ]] || fail "--platform $platform is not known: use one such as manylinux_2_28_x86_64"
glibc=${BASH_REMATCH[1]} processor=${BASH_REMATCH[2]}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder"

# The tags that the machine takes: pip takes those that it is given alone.
tags=(--python-version "$python" --implementation cp --only-binary=:all: --find-links "$folder")
for ((minor = glibc; minor >= 5; minor--)); do tags+=(--platform "manylinux_2_${minor}_$processor"); done
for old in manylinux2014 manylinux2010 manylinux1; do tags+=(--platform "${old}_$processor"); done

# An environment that pretends to have what the machine has: what pip would still install there is what it lacks.
python3 -m venv "$work/env"
pip=("$work/env/bin/python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install --upgrade pip  # older ones find out what they would install for this machine alone
packages=$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if [[ -n $has ]]; then cat "$has"; else echo "torch==2.3"; fi | while IFS= read -r line; do
    [[ $line =~ ^([A-Za-z0-9._-]+)==([^ ;]+) ]] || continue
    name=${BASH_REMATCH[1]} version=${BASH_REMATCH[2]}
    info="$packages/$(tr '.-' '__' <<<"$name")-$version.dist-info"
    mkdir -p "$info"
    printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "$name" "$version" >"$info/METADATA"
done

# Pure Python that its index has as source alone, and mace-peft, of which the machine builds its own from the clone.
"${pip[@]}" wheel --no-deps --wheel-dir "$folder" python-hostlist
"${pip[@]}" wheel --no-deps --wheel-dir "$work" "$root"
"${pip[@]}" install --dry-run --report "$work/report.json" "${tags[@]}" "$work"/mace_peft-*.whl "${wanted[@]}"
lacking=$(python3 - "$work/report.json" <<'PYTHON'
import json, sys
for found in json.load(open(sys.argv[1]))["install"]:
    if found["metadata"]["name"] != "mace-peft":
        print(f"{found['metadata']['name']}=={found['metadata']['version']}")
PYTHON
)
# with what builds it
"${pip[@]}" download --no-deps "${tags[@]}" --dest "$folder" $lacking "setuptools>=64" wheel
ls -l "$folder"
