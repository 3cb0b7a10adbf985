"""Seconds of the phases of a step: python speed.py LABEL BATCH ARGS..."""
import sys, time, json, os
root, label, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
sys.path.insert(0, root)
import torch, train
import warnings; warnings.filterwarnings("ignore")
args = train.parse_arguments(["--stage=3", f"--out=/tmp/runs/{label}", "--validate-every=0", *arguments])
run = train.prepare(args)
from collections import defaultdict
t = defaultdict(lambda: defaultdict(list))
def clock():
    torch.cuda.synchronize(); return time.perf_counter()
total = defaultdict(list)
limit = float(os.environ.get("LIMIT", 60)); begin = time.perf_counter()
step = 0
while time.perf_counter() - begin < limit:
    step += 1; run.step = step
    a = clock()
    task, batches = run.load(step); run.drawn[task] += run.step_size
    b = clock()
    batch = run.make_batch(task, 0, batches[0])
    c = clock()
    loss = run.model(batch).mean()
    d = clock()
    loss.backward()
    e = clock()
    run.clip_gradients(); run.optimizer.step(); run.averages.update(step); run.optimizer.zero_grad()
    f = clock()
    for k, v in zip(("load", "collate", "forward", "backward", "update"), (b-a, c-b, d-c, e-d, f-e)):
        t[task][k].append(v)
print(label, "steps", step, "batch", run.step_size, "peak GiB", torch.cuda.max_memory_allocated() / 2**30)
import statistics as st
mean = defaultdict(float)
for task in t:
    row = {k: st.median(v[len(v)//2:]) * 1000 for k, v in t[task].items()}
    share = run.stage.mixture[task] / sum(run.stage.mixture.values())
    for k in row: mean[k] += share * row[k]
    print(f"{label} {task:10}", " ".join(f"{k} {v:7.1f}" for k, v in row.items()), "n", len(t[task]["load"]))
rest = sum(v for k, v in mean.items() if k != "load")
print(f"{label} MEAN      ", " ".join(f"{k} {v:7.1f}" for k, v in mean.items()), f"without load {rest:.1f} ms, {run.step_size/rest*1000:.0f} samples/s")
if len(sys.argv) and os.environ.get("PROFILE"):
    import cProfile, pstats
    for task in ("t2v", "tiv2v"):
        pos = run.drawn[task]
        samples = [run.source.draw(task, 0, i) for i in range(run.stage.batch)]
        pr = cProfile.Profile(); pr.enable()
        for _ in range(3):
            batch = run.make_batch(task, 0, samples); loss = run.model(batch).mean(); loss.backward(); torch.cuda.synchronize()
        pr.disable(); pstats.Stats(pr).sort_stats("cumtime").print_stats(45)
        from torch.profiler import profile, ProfilerActivity
        with profile(activities=[ProfilerActivity.CUDA]) as p:
            batch = run.make_batch(task, 0, samples); loss = run.model(batch).mean(); loss.backward(); torch.cuda.synchronize()
        print(p.key_averages().table(sort_by="cuda_time_total", row_limit=14, max_name_column_width=60))
