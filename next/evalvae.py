import sys; sys.path.insert(0,'/tmp/wt/pilot')
import torch, vino
from safetensors import safe_open
from toy.world import *
from toy.benchmark import score_shapes, psnr
from types import SimpleNamespace
def load(path, bf=False):
    cfg="/tmp/plan/wide.json"
    m=vino.Vino.load("random", vino.read_config(cfg,"random"))
    own=dict(m.named_parameters())|dict(m.named_buffers())
    with safe_open(path,"pt") as f:
        with torch.no_grad():
            for n in f.keys():
                t=f.get_tensor(n).float(); own[n].copy_(t.bfloat16() if bf else t)
        m.config.vae.scaling_factor=float(f.metadata()["scale"])
    m.vae.config.scaling_factor=m.config.vae.scaling_factor
    return m.vae
names={"old":lambda: vino.Vino.load("/work/main/assets/tiny.safetensors").vae}
for p in sys.argv[1:]:
    names[p]=lambda p=p: load(p)
    names[p+" bf16"]=lambda p=p: load(p,True)
N=48
with torch.no_grad():
  for name,make in names.items():
    vae=make(); 
    for task in ("t2i","t2v"):
        ss=[make_sample(f"eval {i}",task,0) for i in range(N)]
        out=[]; ps=[]; clean=[]; psc=[]
        for a in range(0,N,16):
            x=render([s.target for s in ss[a:a+16]], 9 if task=="t2v" else 1, 64, "cpu")
            y=vae.decode(vae.encode(x)).clamp(-1,1)
            for s,o,t in zip(ss[a:a+16],y,x):
                r=score_shapes("r",s,o,t,None); out.append(r)
                ps.append(10*torch.log10(4/(o-t).square().mean()).item())
        ov=sum(float(r[("r","overlap")]) for r in out)/N; al=sum(float(r[("r","0.85 in all frames")]) for r in out)/N
        print(f"{name:30s} {task} psnr {sum(ps)/N:.2f} overlap {ov:.3f} all>=.85 {al:.2f}",flush=True)
