"""timed.py ROOT SECONDS COOLDOWN train|pretrain ARGUMENTS: a run of so many seconds, all ranks alike. The
rate rises over the stage's warmup and falls over the last COOLDOWN of the time. A run that was stopped by a
signal goes on with --resume; the seconds that it has spent stand in its folder."""
import os, sys, time, warnings
root, seconds, cooldown, what, *more = sys.argv[1:]
sys.path.insert(0, root); warnings.filterwarnings("ignore")
import statistics as st
from pathlib import Path
import torch, train
if torch.cuda.is_available():
    torch.set_num_threads(1)
part = [a.split("=")[1] for a in more if a.startswith("--part=")]
out = Path([a.split("=")[1] for a in more if a.startswith("--out=")][0] + "".join(f"-{p}" for p in part))
spent = float((out / "spent").read_text()) if "--resume" in more and (out / "spent").exists() else 0.0
length, cooldown, start = [float(seconds)], float(cooldown), []
def by_time(stage, step):
    now = time.perf_counter()
    if not start:
        start.append(now)
    wanted = out / "span"  # another length of the run, written while it runs
    if step % 20 == 0 and wanted.exists():
        length[0] = float(wanted.read_text())
    mine = now - start[0] + spent
    done = train.sums(mine / length[0])[0] / train.WORLD
    if train.RANK == 0 and step % 5 == 0:
        (out / "spent").write_text(str(mine))
    if done >= 1:
        stage.steps = step
    return stage.lr * max(0, min(1, step / max(1, stage.warmup), (1 - done) / max(1e-6, cooldown)))
train.learning_rate = by_time
begin = time.time()
more = [*more, "--steps=1000000", "--save-every=" + os.environ.get("SAVE", "1000000"), "--validate-every=0"]
if what == "pretrain":
    from toy import pretrain
    status = pretrain.main(more)
else:
    status = train.main(more)
if train.RANK == 0:
    rows = [r for r in train.read_metrics(out) if r.get("loss") is not None]
    n = max(1, len(rows) // int(os.environ.get("ROWS", 8)))
    for a in range(0, len(rows), n):
        tasks = {}
        for r in rows[a:a + n]: tasks.setdefault(r["task"], []).append(r["loss"])
        print(out.name, "step", rows[min(a + n, len(rows)) - 1]["step"], {t: round(sum(v) / len(v), 4) for t, v in sorted(tasks.items())},
              "s/step %.4f" % st.median(r["seconds"] for r in rows[a:a + n]), "norm %.2f" % st.median(r["grad_norm"] for r in rows[a:a + n]), flush=True)
    print(out.name, "total", round(time.time() - begin, 1), "s", len(rows), "steps of", rows[-1]["samples"], "status", status, flush=True)
sys.exit(status)
