#!/usr/bin/env bash
# From nothing to a model that sees: installs, builds the toy data, trains, evaluates, exports, reports.
# Arguments are config overrides. Run it again at any time: what is done is not done twice.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
eagle="$PWD/.venv/bin/python -m eagle_train"
run=runs/toy
$eagle data build recipe=toy
$eagle +experiment=toy run_dir="$run" "$@"
export_dir=$($eagle export "$run" | tail -n 1)
report=$($eagle report "$run" | tail -n 1)
.venv/bin/python - "$run" "$report" "$export_dir" <<'PYTHON'
import json
import sys
from pathlib import Path

run, report, export = sys.argv[1:]
last = json.loads((Path(run) / "metrics.jsonl").read_text().splitlines()[-1])
accuracy = {kind: last[f"{kind}/exact_match/simple"] for kind in ("eval", "eval_grey", "eval_chance")}
gallery = json.loads((Path(run) / "gallery/gallery.json").read_text())
shown = next(entry for entry in gallery if entry["type"] == "count")
print(f"""
run folder         {run}
report             {report}
exported model     {export}
held-out accuracy  {accuracy["eval"]:.1%} on simple questions ({accuracy["eval_grey"]:.1%} with grey images, """
      f"""{accuracy["eval_chance"]:.1%} by chance)
ask it             .venv/bin/python -m eagle_train chat {export} --image {run}/gallery/{shown["images"][0]} "{shown["question"]}"
""")
PYTHON
