"""[torchrun ...] .bench/tr.py FOLDER name:steps[:profile] ... -- TRAIN-ARGUMENTS
Times the loop of train.py on manifests FOLDER/name.jsonl, and profiles a step. DEADLINE: unix seconds."""
import json, os, re, statistics, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
begin = time.time()
sys.path.insert(0, os.environ.get("CODE", "."))
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function
import train
from train import RANK, WORLD, Manifest, sums, learning_rate

cut = sys.argv.index("--")
folder, parts, arguments = Path(sys.argv[1]), sys.argv[2:cut], sys.argv[cut + 1 :]
deadline = float(os.environ.get("DEADLINE", "inf"))
TRACE = os.environ.get("TRACE", "/tmp")
cuda = torch.cuda.is_available()
NAME = os.environ.get("NAME", "train")

def log(*a):
    if RANK == 0:
        print(f"[{NAME} {time.time() - begin:6.1f}]", *a, flush=True)

def sync():
    if cuda:
        torch.cuda.synchronize()

def region(name, function):
    def call(*a, **k):
        with record_function("R:" + name):
            return function(*a, **k)
    return call

def instrument(run):
    vino = run.vino
    vino.vae.encode = region("VAE", vino.vae.encode)
    vino.mm_encoder.encode_vision = region("VLM", vino.mm_encoder.encode_vision)
    forward = vino.mm_encoder.forward
    def condition(*a, **k):
        with record_function("R:VLM"):
            result = forward(*a, **k)
        def mark(g):
            with record_function("M:tokens"):
                pass
        if result.tokens.requires_grad:
            result.tokens.register_hook(mark)
        return result
    vino.mm_encoder.forward = condition
    run.optimizer.step = region("optimiser", run.optimizer.step)
    run.clip_gradients = region("clipping", run.clip_gradients)
    run.averages.update = region("EMA", run.averages.update)

def one_step(run, task, batches):
    """The body of train.train's loop."""
    loss = 0.0
    for first, samples in batches.items():
        batch = run.source.collate(task, samples, run.device)
        batch.key = (run.args.seed, run.step, first)
        part = run.model(train.drop_conditions(batch, run.stage)).mean() / run.args.accumulate
        part.backward()
        loss += part.detach()
    norm = run.clip_gradients()
    loss, signals = sums(float(loss) / WORLD, run.signal)
    run.optimizer.param_groups[0]["lr"] = learning_rate(run.stage, run.step)
    run.optimizer.step()
    run.averages.update(run.step)
    run.optimizer.zero_grad()
    target = batch.target.shape
    return loss, norm, tuple(target[2:]), [tuple(r.pixels.shape[2:]) for r in batch.references], len(batch.prompts[0])

def union(intervals):
    total, end = 0.0, -1e30
    merged = []
    for a, b in sorted(intervals):
        if merged and a <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], b)
        else:
            merged.append([a, b])
    return merged

def length(merged):
    return sum(b - a for a, b in merged)

ATTENTION = re.compile(r"flash|fmha|sdpa|attention", re.I)
PRODUCT = re.compile(r"gemm|nvjet|cutlass|xmma|cublas|splitk|gemv", re.I)

def breakdown(path, wall, name):
    events = json.load(open(path))["traceEvents"]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    launches = {e["args"]["correlation"]: e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})}
    notes = [e for e in events if e.get("cat") == "user_annotation"]
    spans, marks = {}, []
    for e in notes:
        if e["name"].startswith(("R:", "FSDP::all_gather", "FSDP::reduce", "FSDP::post_backward_reduce")):
            spans.setdefault(e["tid"], []).append((e["ts"], e["ts"] + e["dur"], e["name"]))
        if e["name"] == "M:tokens":
            marks.append((e["tid"], e["ts"]))
    for tid in spans:
        spans[tid].sort()
    shares, busy, compute, top = {}, [], [], {}
    for k in kernels:
        launch = launches.get(k.get("args", {}).get("correlation"))
        inside, after = None, False
        if launch is not None:
            t = launch["ts"]
            for a, b, label in spans.get(launch["tid"], ()):
                if a > t:
                    break
                if t < b:
                    inside = label  # the innermost: sorted by begin
            after = any(tid == launch["tid"] and t > ts for tid, ts in marks)
        kname = k["name"]
        if "nccl" in kname.lower():
            kind = "NCCL"
        elif inside and inside.startswith("FSDP"):
            kind = "FSDP's copies"
        elif inside:
            kind = inside[2:]
        elif after and inside is None:
            kind = "VLM, backward (and after)"
        elif ATTENTION.search(kname):
            kind = "MMDiT attention"
        elif PRODUCT.search(kname):
            kind = "MMDiT products"
        elif k["cat"] != "kernel":
            kind = "copies"
        else:
            kind = "MMDiT elementwise"
        span = (k["ts"], k["ts"] + k["dur"])
        busy.append(span)
        if kind not in ("NCCL",):
            compute.append(span)
        shares[kind] = shares.get(kind, 0) + k["dur"]
        entry = top.setdefault((kind, kname[:70]), [0, 0])
        entry[0] += k["dur"]; entry[1] += 1
    all_busy, own = length(union(busy)), length(union(compute))
    log(f"{name}: profiled step {wall:.2f} s (wall, with profiler); GPU busy {all_busy / 1e6:.3f}, without NCCL {own / 1e6:.3f}, NCCL alone (exposed) {(all_busy - own) / 1e6:.3f} s")
    if busy:
        extent = (max(b for _, b in busy) - min(a for a, _ in busy)) / 1e6
        log(f"{name}: first to last kernel {extent:.3f} s, idle inside {extent - all_busy / 1e6:.3f} s")
    for kind, us in sorted(shares.items(), key=lambda x: -x[1]):
        log(f"{name}:   {kind:<28} {us / 1e6:7.3f} s")
    for (kind, kname), (us, n) in sorted(top.items(), key=lambda x: -x[1][0])[:22]:
        log(f"{name}:     {us / 1e6:7.3f} s {n:5d}x  {kind[:20]:<20} {kname}")

def do_part(run, name, steps, profiled):
    run.source = Manifest(folder / f"{name}.jsonl", run.stage, run.vino.config, f"{run.args.seed} {run.args.stage}")
    run.drawn = dict.fromkeys(run.source.tasks, 0)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times, tasks = [], {}
    with ThreadPoolExecutor(1) as loader:
        upcoming = loader.submit(run.load, run.step + 1)
        for number in range(steps + profiled):
            b = time.perf_counter()
            run.step += 1
            w = time.perf_counter()
            task, batches = upcoming.result()
            waited = time.perf_counter() - w
            run.drawn[task] += run.step_size
            upcoming = loader.submit(run.load, run.step + 1)
            now = profiled and number == steps
            if now:
                sync()
                prof = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) if RANK == 0 else None
                if prof: prof.__enter__()
                b = time.perf_counter()
            loss, norm, shape, refs, words = one_step(run, task, batches)
            seconds = time.perf_counter() - b
            sync()
            synced = time.perf_counter() - b
            if now:
                if prof:
                    prof.__exit__(None, None, None)
                    path = f"{TRACE}/trace_{NAME}_{name}.json"
                    prof.export_chrome_trace(path)
                    try:
                        breakdown(path, synced, name)
                    except Exception as error:
                        log("breakdown failed", repr(error))
            else:
                times.append(synced)
                tasks.setdefault(task, []).append(synced)
            peak = [torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30] if cuda else [0, 0]
            log(f"{name} step {run.step} {task} {seconds:.3f} ({synced:.3f}) s, waited {waited:.2f}, loss {loss:.4f} |g| {norm:.3f} {shape} {refs} prompt {words} chars; peak {peak[0]:.1f}/{peak[1]:.1f} GiB" + (" EMA" if run.step % 10 == 0 else ""))
            if sums(RANK == 0 and time.time() > deadline)[0] > 0:
                log("deadline"); break
    used = times[2:] or times
    log(f"RESULT {name}: median of last {len(used)} of {len(times)} steps {statistics.median(used):.3f} s, of the last half {statistics.median(times[len(times) // 2 :]):.3f}, min {min(used):.3f}, max {max(used):.3f}; peak {peak[0]:.1f} GiB allocated, {peak[1]:.1f} reserved")
    for task, values in tasks.items():
        log(f"RESULT {name} {task}: median of {len(values)} {statistics.median(values):.3f} s")

try:
    run = train.prepare(train.parse_arguments(arguments))
    sync()
    log(f"ready; {sum(p.numel() for p in run.parameters.values()) / 1e9:.2f} billion trained; allocated {torch.cuda.memory_allocated() / 2**30 if cuda else 0:.1f} GiB; peak {torch.cuda.max_memory_allocated() / 2**30 if cuda else 0:.1f}")
    instrument(run)
    if not os.environ.get('NOFREEZE'): train.gc.freeze()
    for part in parts:
        name, steps, *profiled = part.split(":")
        if time.time() < deadline:
            do_part(run, name, int(steps), len(profiled))
    log("done")
except Exception as error:
    print(f"[{NAME} rank {RANK}] FAILED {type(error).__name__}: {str(error)[:600]}", flush=True)
    import traceback; traceback.print_exc()
sys.stdout.flush(); sys.stderr.flush()
os._exit(0)
