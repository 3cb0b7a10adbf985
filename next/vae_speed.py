import sys, time; sys.path.insert(0, ".")
import torch, train
from toy import pretrain
from toy.world import ToyWorld
import torch.nn.functional as F
torch.set_float32_matmul_precision("high")
torch.backends.cudnn.allow_tf32 = True
def go(label, batch, dtype, compile=False, cl=False, bench=False, part="vae", extra=()):
    torch.backends.cudnn.benchmark = bench
    import shutil; shutil.rmtree("/tmp/runs/x-" + part, ignore_errors=True)
    args = pretrain.parse_arguments([f"--part={part}", "--validate-every=0", f"--batch={batch}", f"--dtype={dtype}", "--out=/tmp/runs/x", *extra])
    import os
    from pathlib import Path
    run = pretrain.prepare(args, part, args.weights, Path("/tmp/runs/x-" + part))
    vae = run.vino.vae
    if cl: vae.to(memory_format=torch.channels_last_3d)
    if compile:
        if part == "vae":
            vae.encoder.forward = torch.compile(vae.encoder.forward, dynamic=False)
            vae.decoder.forward = torch.compile(vae.decoder.forward, dynamic=False)
    tasks = [t for t in run.source.tasks]
    for task in (["t2v"] if part == "vae" else ["tiv2v", "rewrite"]):
        samples = [run.source.draw(task, 0, i) for i in range(batch)]
        times = []
        for i in range(8):
            run.step = i + 1
            torch.cuda.synchronize(); a = time.perf_counter()
            b = run.make_batch(task, 0, samples)
            if cl: b.target = b.target.contiguous(memory_format=torch.channels_last_3d)
            loss = run.model(b).mean(); torch.cuda.synchronize(); c = time.perf_counter()
            loss.backward(); torch.cuda.synchronize(); d = time.perf_counter()
            run.clip_gradients(); run.optimizer.step(); run.optimizer.zero_grad(); torch.cuda.synchronize()
            times.append((time.perf_counter() - a, c - a, d - c))
        t = sorted(times)[len(times) // 2 - 1]
        print(f"{label} {task} batch {batch} {dtype} compile {compile} cl {cl} bench {bench}: step {t[0]*1000:.1f} ms (fwd {t[1]*1000:.1f} bwd {t[2]*1000:.1f}), {batch/t[0]:.0f}/s, first {times[0][0]:.1f} s, peak {torch.cuda.max_memory_allocated()/2**30:.1f}", flush=True)
    if label == "profile":
        from torch.profiler import profile, ProfilerActivity
        with profile(activities=[ProfilerActivity.CUDA]) as p:
            run.model(b).mean().backward(); torch.cuda.synchronize()
        print(p.key_averages().table(sort_by="cuda_time_total", row_limit=16, max_name_column_width=70))
    del run; torch.cuda.empty_cache()
if sys.argv[1] == "vae":
    for kw in ([dict(dtype="bfloat16"), dict(dtype="bfloat16", bench=True), dict(dtype="bfloat16", cl=True, bench=True), dict(dtype="bfloat16", compile=True, bench=True), dict(dtype="bfloat16", compile=True, cl=True, bench=True), dict(dtype="float32", compile=True, cl=True, bench=True), dict(dtype="float32", bench=True)]):
        try: go("vae", 48, **kw)
        except Exception as e: print("FAILED", kw, repr(e)[:300], flush=True)
    try: go("profile", 48, "bfloat16", cl=True, bench=True)
    except Exception as e: print("FAILED", repr(e)[:300])
    try: go("vae", 192, "bfloat16", compile=True, cl=True, bench=True)
    except Exception as e: print("FAILED", repr(e)[:300])
else:
    for b in (32, 256, 512):
        go("vlm", b, "bfloat16", part="vlm", extra=("--weights=assets/tiny.safetensors",))
    go("vlm", 256, "float32", part="vlm", extra=("--weights=assets/tiny.safetensors",))
    go("profile", 256, "bfloat16", part="vlm", extra=("--weights=assets/tiny.safetensors",))
