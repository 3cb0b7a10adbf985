"""mkbase.py ROOT OUT PART...: random weights under today's tokenizer, with the parts that are trained already."""
import sys
root, out, *parts = sys.argv[1:]; sys.path.insert(0, root)
import torch, vino
from safetensors import safe_open
from toy import pretrain
from toy.language import toy_tokenizer
from toy.world import make_sample, render
torch.manual_seed(0)
m = vino.Vino.load("random", vino.read_config(root + "/tiny_config.json", "random"))
m.mm_encoder.tokenizer = toy_tokenizer(); pretrain.quieten(m)
own = dict(m.named_parameters()) | dict(m.named_buffers())
for path in parts:
    with safe_open(path, "pt") as f, torch.no_grad():
        for k in f.keys(): own[k].copy_(f.get_tensor(k).float())
        print(path, len(f.keys()))
        if "scale" in f.metadata(): m.config.vae.scaling_factor = m.vae.config.scaling_factor = float(f.metadata()["scale"])
m.half().save(out)
m = vino.Vino.load(out)
with torch.no_grad():
    for task in ("t2i", "t2v"):
        x = render([make_sample(f"eval {i}", task, 0).target for i in range(24)], 9 if task == "t2v" else 1, 64, "cpu")
        y = m.vae.decode(m.vae.encode(x)).clamp(-1, 1)
        print(task, (10 * torch.log10(4 / (x - y).square().flatten(1).mean(1))).mean().item(), "dB; latents' std", m.vae.encode(x).std().item())
