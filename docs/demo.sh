#!/bin/sh
# The main job as the README teaches it; every command is shown before it runs.
set -eu
PORT="${PORT:-8000}"
UI_PORT="${UI_PORT:-5000}"
run() {
    printf '\n$ %s\n' "$*"
    "$@"
}
trap 'orchestrator stop' EXIT
run orchestrator validate tasks/*.yaml
run orchestrator submit tasks/*.yaml
run orchestrator report
run orchestrator serve --port "$PORT"
run orchestrator query client-talk "I have been thinking about cutting down."
run orchestrator query restaurant-reviews "The soup was cold and nobody said sorry."
run orchestrator query support-intent "My parcel was due on Monday and there is no sign of it."
run orchestrator query message-urgency "Water is coming through the ceiling onto the fuse box."
run orchestrator query question-type "Whose idea was the weekend?"
run orchestrator ui --port "$UI_PORT"
printf '\nA second submit sees that nothing changed:\n'
run orchestrator submit tasks/*.yaml
printf '\nThe same five tasks over t5-mini, a T5 that is part of this project, in a workspace of their own. The gate may hold some back:\n'
run orchestrator submit tasks/*.yaml --base t5-mini --workspace .orchestrator-t5-mini || [ $? -eq 3 ]
printf '\n'
