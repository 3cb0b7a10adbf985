"""torchrun --nproc-per-node 2 .bench/two.py: guidance branches on two GPUs, one branch's tokens on two."""
import os, sys, time
sys.path.insert(0, ".")
import torch, torch.distributed as dist
import vino
rank = int(os.environ["RANK"]); cuda = torch.cuda.is_available()
if cuda: torch.cuda.set_device(rank)
dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
dev = f"cuda:{rank}" if cuda else "cpu"
def clock():
    if cuda: torch.cuda.synchronize()
    dist.barrier(); return time.perf_counter()
C = vino.Config() if cuda else vino.Config.from_file("tiny_config.json")
m = vino.Vino.load("random", C, dev, torch.bfloat16)
world = dist.group.WORLD
comp = "eager" not in sys.argv
if comp and cuda:
    for block in m.transformer.blocks(): block.forward = vino.compiled(block.forward)
prompt, negative = "a large red circle on a white background, a small blue square to the left", "low quality, blurry"
shapes = {"clip": ((22, 60, 106), 3)}
if not cuda: shapes = {"image640": ((1, 8, 8), 2), "clip": ((3, 8, 8), 2)}
with torch.no_grad():
    conditions = [(7.0, m.mm_encoder([prompt], [])), (-6.0, m.mm_encoder([negative], []))]
    for name, (shape, repeat) in shapes.items():
        x, t = torch.randn(1, 16, *shape, generator=torch.Generator().manual_seed(0)).to(dev), torch.tensor([0.5], device=dev)
        results = {}
        for how, branches in (("one branch", conditions[:1]), ("two branches", conditions)):
            for group in (None, world):
                own, parallel = vino.share_branches(branches, group)
                def step():
                    v = sum(w * m.transformer(x, t, c, parallel).float() for w, c in own)
                    if group: dist.all_reduce(v)
                    return v
                v = step(); step(); times = []
                for _ in range(repeat):
                    b = clock(); step(); times.append(clock() - b)
                times.sort(); results[how, group is None] = times[len(times) // 2], v
            (alone, v1), (both, v2) = results[how, True], results[how, False]
            err = ((v1 - v2).norm() / v1.norm()).item()
            if rank == 0: print(f"two {name} {how}: one GPU {1000 * alone:.1f} ms, two {1000 * both:.1f} ms, {alone / both:.2f} times; difference {err:.1e}", flush=True)
dist.destroy_process_group()
