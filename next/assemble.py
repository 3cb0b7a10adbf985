"""assemble.py ROOT VLM MMDIT OUT: the base model: MMDIT's, with VLM's VLM."""
import sys
root, vlm, mmdit, out = sys.argv[1:]; sys.path.insert(0, root)
import torch, vino
from safetensors import safe_open
m = vino.Vino.load(mmdit)
own = dict(m.named_parameters()) | dict(m.named_buffers())
with safe_open(vlm, "pt") as f, torch.no_grad():
    for name in f.keys():
        if name.startswith("mm_encoder.mm_encoder."): own[name].copy_(f.get_tensor(name).to(own[name].dtype))
m.save(out)
for p in ("a red circle moving left", "RED CIRCLE", "Two green crosses", "a blue square moves to the right", "a picture of a large cyan box at the top left and a tiny violet plus, white backdrop"):
    print(p, "->", m.mm_encoder.answer([p], [], m.config.sampling.rewrite_system))
