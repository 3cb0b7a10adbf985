"""home.py FOLDER: what has been trained so far, into $OUT: enough to go on from, on another machine."""
import glob, json, os, sys, tarfile
from safetensors import safe_open
from safetensors.torch import load_file, save_file
W, out = sys.argv[1], os.environ["OUT"]
def put(name, tensors, meta=None):
    save_file({k: v.half() if v.dtype.is_floating_point and not k.endswith(("exp_avg", "exp_avg_sq")) else v.bfloat16() for k, v in tensors.items()}, f"{out}/{name}.safetensors", meta)
    print(name, len(tensors))
mine = lambda t: {k: v for k, v in t.items() if not k.startswith(("vae.", "mm_encoder.mm_encoder."))}
done = {n: os.path.exists(f"{W}/{n}/final.safetensors") for n in ("stage0-vlm", "stage1", "stage2", "stage3")}
def sent(n):
    """Twice is enough."""
    with open(f"{W}/sent-{n}", "a+") as f:
        f.write("x"); f.seek(0); return len(f.read()) > 2
for n, cut in (("stage1", mine), ("stage2", mine), ("stage3", mine), ("stage0-vlm", lambda t: {k: v for k, v in t.items() if k.startswith("mm_encoder.mm_encoder.")})):
    if done[n] and not sent(n):
        with safe_open(f"{W}/{n}/final.safetensors", "pt") as f: meta = f.metadata()
        put(n, cut(load_file(f"{W}/{n}/final.safetensors")), meta)
for n in ("stage0-vlm", "stage3"):
    if not done[n]:
        for d in sorted(glob.glob(f"{W}/{n}/checkpoints/step_????????"))[-1:]:
            t = load_file(d + "/0.safetensors"); keys = sorted(t)
            size, parts = 0, [{}]
            for k in keys:
                if size > 6_000_000: size, parts = 0, [*parts, {}]
                parts[-1][k] = t[k]; size += t[k].numel()
            if len(parts) <= 4:
                for i, p in enumerate(parts): put(f"{n}-{d[-8:]}-{i}", p)
                open(f"{out}/{n}.json", "w").write(open(d + "/state.json").read())
with tarfile.open(out + "/logs.tar.gz", "w:gz") as tar:
    for f in glob.glob(W + "/*/metrics.jsonl") + glob.glob(W + "/*.log") + glob.glob(W + "/*.txt") + glob.glob(W + "/bench-?/*") + glob.glob(W + "/*/spent"): tar.add(f, f[len(W) + 1:])
