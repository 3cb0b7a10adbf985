"""home.py FOLDER: what the stages have trained so far, into $OUT."""
import glob, os, sys
from safetensors import safe_open
from safetensors.torch import load_file, save_file
W, out = sys.argv[1], os.environ["OUT"]
for n, f in (("base", W + "/pre-mmdit/final.safetensors"), ("stage2", W + "/stage2/final.safetensors"), ("final", W + "/stage3/final.safetensors")):
    if os.path.exists(f) and not (n != "final" and os.path.exists(W + "/sent-" + n)):
        with safe_open(f, "pt") as g: meta = g.metadata()
        t = {k: v for k, v in load_file(f).items() if not k.startswith(("vae.", "mm_encoder.mm_encoder."))}
        save_file({k: v.bfloat16() for k, v in t.items()}, f"{out}/{n}.safetensors", meta); print(n, len(t), meta["config"][:60])
        open(W + "/sent-" + n, "w").close()
for d in sorted(glob.glob(W + "/stage3/checkpoints/step_????????"))[-1:]:
    t = load_file(d + "/0.safetensors"); t = {k[4:]: v.half() for k, v in t.items() if k.startswith("ema.")}
    print(d, len(t)); save_file(t, out + "/ema.safetensors")
