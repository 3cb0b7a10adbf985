"""pilot.py ROOT PART SECONDS LABEL [pretrain arguments]: train one part for so many seconds."""
import sys, time, os, json, shutil, warnings
root, part, seconds, label, more = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4], sys.argv[5:]
sys.path.insert(0, root); warnings.filterwarnings("ignore")
import torch, train
from pathlib import Path
from toy import pretrain
from safetensors.torch import save_file
begin = time.perf_counter()
torch.backends.cudnn.benchmark = True
sync = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
if os.environ.get("EDGE"):
    import torch.nn.functional as F
    from train import draw_noise
    def loss(self, batch):
        vae, target = self.vino.vae, batch.target
        mean, log_variance = (p.float() for p in vae.moments(target))
        noise = draw_noise(batch.key, mean)[1]
        output = vae.decode((mean + noise * (log_variance / 2).exp()) * vae.config.scaling_factor)
        surplus = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
        near = F.max_pool3d((target - F.avg_pool3d(target, (1, 3, 3), 1, (0, 1, 1))).abs().amax(1, keepdim=True), (1, 3, 3), 1, (0, 1, 1))
        weight = 1 + float(os.environ["EDGE"]) * (near > 0.05)
        error = (output.float() - target).square() * weight / weight.mean()
        return error.flatten(1).mean(1) + pretrain.KL * surplus.flatten(1).mean(1)
    pretrain.Autoencoding.loss = loss
def make(steps, cl, name):
    args = pretrain.parse_arguments([f"--part={part}", "--validate-every=0", "--save-every=1000000", f"--steps={steps}", *more])
    out = Path(f"/tmp/runs/{label}-{name}"); shutil.rmtree(out, ignore_errors=True)
    run = pretrain.prepare(args, part, args.weights, out)
    if cl:
        run.vino.vae.to(memory_format=torch.channels_last_3d)
    return run
def probe(cl, count=40):
    run = make(1000, cl, f"probe{cl}"); times = []
    for i in range(count):
        task, batches = run.load(i + 1); run.step = i + 1; run.drawn[task] += run.step_size
        sync(); a = time.perf_counter()
        run.model(run.make_batch(task, 0, batches[0])).mean().backward(); run.clip_gradients(); run.optimizer.step(); run.optimizer.zero_grad(); sync()
        times.append(time.perf_counter() - a)
    late = times[count // 2:]
    return sum(late) / len(late)
n = int(os.environ.get("PROBE", 40))
speeds = {cl: probe(cl, n) for cl in (False,)}
best = min(speeds, key=speeds.get)
left = seconds - (time.perf_counter() - begin)
steps = max(2, int(left * 0.93 / speeds[best]))
print(label, "probe", speeds, "steps", steps, flush=True)
run = make(steps, best, "run")
if part == "vae" and best:
    collate = run.source.collate
    def cl_collate(*a):
        b = collate(*a); b.target = b.target.contiguous(memory_format=torch.channels_last_3d); return b
    run.source.collate = cl_collate
train.train(run)
if part == "vae":
    pretrain.scale_latents(run)
prefix = {"vae": "vae.", "vlm": "mm_encoder.mm_encoder."}[part]
tensors = {k: v.detach().half().cpu().contiguous() for k, v in run.vino.saved_tensors().items() if k.startswith(prefix)}
out = Path(os.environ.get("OUT", "/tmp/plan"))
save_file(tensors, out / f"{label}.safetensors", {"scale": str(run.vino.config.vae.scaling_factor)})
rows = [r for r in train.read_metrics(Path(f"/tmp/runs/{label}-run")) if r.get("loss") is not None]
import statistics as st
for a in range(0, len(rows), max(1, len(rows) // 12)):
    part_rows = rows[a:a + max(1, len(rows) // 12)]
    tasks = {}
    for r in part_rows: tasks.setdefault(r["task"], []).append(r["loss"])
    print(label, "step", part_rows[-1]["step"], "lr %.2g" % part_rows[-1]["lr"], {t: round(sum(v) / len(v), 5) for t, v in tasks.items()}, "s/step %.4f" % st.median(r["seconds"] for r in part_rows), flush=True)
print(label, "total", time.perf_counter() - begin)
