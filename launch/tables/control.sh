#!/bin/bash
# The control of the tables: classes shared out at random among verticals of the same sizes (conf/experiment/control.yaml).
#   launch/tables/control.sh                 after run.sh table4, from the root of the repository: it takes the shards of runs/tables
#   SEEDS=0 launch/tables/control.sh KEY=VALUE ...
set -euo pipefail
folder=$(dirname "$0")
export SEEDS=${SEEDS:-0,1,2} WORKDIR=${WORKDIR:-runs/control}
for seed in ${SEEDS//,/ }; do
    python -m concentration.cli group "workdir=runs/tables/seed-$seed" name=verticals_at_random method=random method.of=null "seed=$seed"
done
"$folder/run.sh" control "$@"
