#!/bin/bash
# A table of the papers on several seeds, at the sizes of the data: conf/experiment/TABLE.yaml says which rows.
#   launch/tables/run.sh table1                                  the demo's 1,231 characters: minutes a row and seed on two cores
#   launch/tables/run.sh glyphs_gpu,table4 data=glyphs_30k       on Glyph-30K, at the sizes of experiment=glyphs_gpu
#   SEEDS=0 WORKDIR=runs/tiny launch/tables/run.sh fig5 data.num_drawings=4 trainer.max_epochs=1   to see it run; not collected beside others
# Stopped and started again it goes on: what is finished is skipped, and the tables share generalists, teachers and targets.
# At the end docs/results/TABLE.json and docs/tables.md are written.
set -euo pipefail
table=${1:?a table: table1 ... table6, fig5}
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
workdir=${WORKDIR:-runs/tables}
# One thread a process; several processes are the run's own business (num_processes).
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m concentration.cli run -m "experiment=[$table]" "seed=${SEEDS:-0,1,2}" "workdir=$workdir/seed-\${seed}" "$@"
python "$root/docs/tables.py" collect "$table" "$workdir" "$@"
