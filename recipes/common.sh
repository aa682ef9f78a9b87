# shellcheck shell=bash
# What the recipes share. A recipe sources it with the choices of METHOD, the first one by default, and the variables that
# each one sets: name:"VARIABLE=value ...". It sets its own with `default`, and ends with `launch "$@"`.
set -euo pipefail
folder=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
name=$(basename -- "$0" .sh)
method=${METHOD:-${1%%:*}}
settings=unknown
for choice; do
    if [[ $method == "${choice%%:*}" ]]; then settings=${choice#*:}; fi
done
if [[ $settings == unknown ]]; then
    echo "$name: METHOD is '$method'; it must be one of: ${*%%:*}" >&2
    exit 2
fi
unset METHOD
own=${MODEL:+-${MODEL//\//-}}  # another network gets another folder

# default VARIABLE=value ...: what the environment does not set already
default() {
    local pair variable
    for pair; do
        variable=${pair%%=*}
        export "$variable=${!variable:-${pair#*=}}"
    done
}

launch() {
    # shellcheck disable=SC2086 # several variables
    default $settings OUTPUT_DIR="output/$name$own-$method-$EPOCHS"
    exec bash "$folder/run_jit_multinode.sh" "$@"
}
