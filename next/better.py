"""better.py FOLDER: print the path of the VLM whose last 300 steps had the lower loss."""
import json, os, sys
W, best = sys.argv[1], []
for name in ("stage0-vlm", "stage0c-vlm"):
    if os.path.exists(f"{W}/{name}/final.safetensors"):
        rows = [json.loads(line) for line in open(f"{W}/{name}/metrics.jsonl")]
        losses = [row["loss"] for row in rows[-300:] if row["loss"] is not None]
        best.append((sum(losses) / len(losses), len(rows), f"{W}/{name}/final.safetensors"))
print(best, file=sys.stderr)
print(min(best)[-1])
