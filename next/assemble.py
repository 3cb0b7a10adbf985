"""assemble.py ROOT FOLDER OUT: a base model of the better VLM (by its last losses) and a VAE."""
import os, sys
root, folder, out = sys.argv[1:4]; sys.path.insert(0, root)
from pathlib import Path
import torch, train, vino
from safetensors import safe_open
losses = {}
for kind in ("vae", "vlm"):
    for label in "DE":
        run = Path(f"{folder}/{label}-{kind}")
        rows = [r for r in train.read_metrics(run) if r.get("loss") is not None][-300:]
        if rows and (run / "final.safetensors").exists():
            tasks = {}
            for r in rows: tasks.setdefault(r["task"], []).append(r["loss"])
            losses[kind, label] = sum(sum(v) / len(v) for v in tasks.values()) / len(tasks)
print(losses)
chosen = {k: os.environ.get(k.upper()) or min((l for kk, l in losses if kk == k), key=lambda l: losses[k, l]) for k in ("vae", "vlm")}
print("chosen", chosen)
m = vino.Vino.load(f"{folder}/{chosen['vlm']}-vlm/final.safetensors")  # its vision config counts
own = dict(m.named_parameters()) | dict(m.named_buffers())
vae = f"{folder}/{chosen['vae']}-vae/final.safetensors"
m.config.vae.scaling_factor = m.vae.config.scaling_factor = vino.read_metadata(vae, None)[0].vae.scaling_factor
with safe_open(vae, "pt") as f, torch.no_grad():
    for name in f.keys():
        if name.startswith("vae."): own[name].copy_(f.get_tensor(name).to(own[name].dtype))
m.save(out)
for p in ("a red circle moving left", "RED CIRCLE", "Two green crosses", "a blue square moves to the right"):
    print(p, "->", m.mm_encoder.answer([p], [], m.config.sampling.rewrite_system))
