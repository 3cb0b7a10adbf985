import sys; sys.path.insert(0,'/tmp/root')
import torch, vino
from safetensors import safe_open
from toy.language import toy_tokenizer
from toy import pretrain
m=vino.Vino.load("random", vino.read_config("/tmp/root/tiny_config.json","random"))
m.mm_encoder.tokenizer=toy_tokenizer(); pretrain.quieten(m)
own=dict(m.named_parameters())|dict(m.named_buffers())
for path in sys.argv[2:]:
    n=0
    with safe_open(path,"pt") as f, torch.no_grad():
        for k in f.keys():
            own[k].copy_(f.get_tensor(k).float()); n+=1
        print(path,n,f.metadata())
        if "vae" in path: m.config.vae.scaling_factor=m.vae.config.scaling_factor=float(f.metadata()["scale"])
m.half().save(sys.argv[1])
m=vino.Vino.load(sys.argv[1])
for p in ("a red circle moving left","RED CIRCLE","Two green crosses","a blue square moves to the right"):
    print(p,"->",m.mm_encoder.answer([p],[],m.config.sampling.rewrite_system))
from toy.world import *
N=24
with torch.no_grad():
  for task in ("t2i","t2v"):
    ss=[make_sample(f"eval {i}",task,0) for i in range(N)]
    x=render([s.target for s in ss],9 if task=="t2v" else 1,64,"cpu"); y=m.vae.decode(m.vae.encode(x)).clamp(-1,1)
    print(task, (10*torch.log10(4/(x-y).square().flatten(1).mean(1))).mean().item())
