# shellcheck shell=bash
# What the recipes share, which source it with the values of METHOD: name=flags ..., the first one is the default.
# `launch` starts run_jit_multinode.sh with the flags of the method, which those given to the recipe may override.
set -euo pipefail
folder=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
name=$(basename -- "$0" .sh)
method=${METHOD:-${1%%=*}}
flags=unknown
for choice; do
    if [[ $method == "${choice%%=*}" ]]; then flags=${choice#*=}; fi
done
if [[ $flags == unknown ]]; then
    echo "$name: METHOD is '$method'; it must be one of: ${*%%=*}" >&2
    exit 2
fi
unset METHOD

launch() {
    export OUTPUT_DIR=${OUTPUT_DIR:-output/$name-$method-$EPOCHS}
    # shellcheck disable=SC2086 # several flags
    exec bash "$folder/run_jit_multinode.sh" $flags "$@"
}
