#!/bin/sh
# What every process runs, the same on every machine; README.md says what the variables are.
#
# Whether a run begins or goes on is for the launcher to say (RESUME): process 0 creates the folder of the run while
# others still start, so that they cannot see it from there.
set -eu
# shellcheck disable=SC2086 # SETTINGS has several words
if [ -n "${RESUME:-}" ]; then
    exec garrulax train --resume "$RUN" --mesh "$MESH" --distributed${PEERS:+=$PEERS}
else
    exec garrulax train "$MODEL" corpus="$CORPUS" ${SETTINGS:-} --run "$RUN" --mesh "$MESH" --distributed${PEERS:+=$PEERS}
fi
