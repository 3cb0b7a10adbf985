"""Times the full size with random weights: python .bench/one.py [new|old] [eager] [compiled] [offload] [vae]"""
import os, sys, time, json
house, parts = sys.argv[1], sys.argv[2:]
sys.path.insert(0, "." if house == "new" else ".bench")
import torch
if house == "new":
    import vino
else:
    import old_vino as vino
    vino.byte_tokenizer
torch.backends.cudnn.deterministic = True
dev = "cuda"
begin = time.perf_counter()
def log(*a): print(house, *a, flush=True)
def clock():
    torch.cuda.synchronize(); return time.perf_counter()
offload = "offload" in parts
small = "small" in parts
C = vino.Config()
if small:
    C = vino.Config.from_file("tiny_config.json")
    dev = "cpu" if not torch.cuda.is_available() else "cuda"
    if dev == "cpu":
        clock = time.perf_counter
m = vino.Vino.load("random", C, dev, torch.bfloat16)
if os.environ.get("VARIANT") == "split":
    import torch.nn.functional as F
    def forward(self, x, embedding, attention):
        shift, scale, gate = self.norm(embedding)
        normed = vino.modulate(x, shift, scale)
        attended = attention(*self.attn.qkv(normed))
        of_attention, of_mlp = self.proj_out.weight.split([attended.shape[-1], self.proj_mlp.out_features], 1)
        output = F.linear(attended, of_attention, self.proj_out.bias)
        return x + gate * (output + F.linear(F.gelu(self.proj_mlp(normed), approximate="tanh"), of_mlp))
    vino.SingleBlock.forward = forward
log("load", round(time.perf_counter() - begin, 1))
if offload:
    m.to("cpu"); torch.cuda.empty_cache(); log("on the host", round(time.perf_counter() - begin, 1))
    m.offload(dev); log("offload set up", round(time.perf_counter() - begin, 1))
S = (16, 16) if small else None
def condition(ref_hw):
    prompts = "a large red circle on a white background, a small blue square to the left"
    refs = []
    if ref_hw:
        h, w = ref_hw
        from PIL import Image
        import numpy as np
        im = Image.fromarray(np.random.default_rng(0).integers(0, 255, (h, w, 3), dtype=np.uint8))
        refs = [m.encode(vino.Reference.image(im, h * w, C.vision))]
    full = m.mm_encoder([prompts], refs)
    dropped = m.mm_encoder(["low quality, blurry"], refs)
    none = m.mm_encoder(["low quality, blurry"], [])
    return [full, dropped, none]
if house == "new":
    def step(conditions, x, t):
        return [m.transformer(x, t, c) for c in conditions]
    prepare = lambda conditions, shape: conditions
else:
    def step(contexts, x, t):
        return [v for c in contexts for v in m.transformer(x, t, c)]
    prepare = lambda conditions, shape: vino.arrange(m.transformer, conditions, shape, vino.Crew())
sizes = {"image640": ((1, 80, 80), None, 2, 12), "edit640": ((1, 80, 80), (640, 640), 3, 12), "clip": ((22, 60, 106), None, 1, 3)}
if small: sizes = {"image640": ((1, 8, 8), None, 2, 3), "edit640": ((1, 8, 8), (64, 64), 3, 3), "clip": ((3, 8, 8), None, 1, 2)}
@torch.no_grad()
def measure(label):
    for name, (shape, ref, count, repeat) in sizes.items():
        conditions = prepare(condition(ref)[:count], shape)
        x, t = torch.randn(1, 16, *shape, device=dev), torch.tensor([0.5], device=dev)
        first = clock(); step(conditions, x, t); step(conditions, x, t); first = clock() - first
        if dev == "cuda": torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(repeat):
            b = clock(); step(conditions, x, t); times.append(clock() - b)
        times.sort()
        peak = torch.cuda.max_memory_allocated() / 2**30 if dev == "cuda" else 0
        log(f"{label:9} {name:9} step {1000 * times[len(times) // 2]:8.1f} ms  (first two {first:5.1f} s)  peak {peak:.1f} GiB")
with torch.no_grad():
    b = clock(); condition(None); log("VLM first", round(clock() - b, 2))
    b = clock(); condition(None); log("VLM again, 3 prompts", round(clock() - b, 3))
    if "eager" in parts or offload: measure("offload" if offload else "eager")
    if "vae" in parts:
        z = torch.randn(1, 16, *sizes["clip"][0], device=dev)
        for tiles in (False, True):
            if house == "old" and tiles: continue
            if tiles: m.vae.config.untiled_area = 0
            for name, f in (("decode", lambda: m.vae.decode(z)), ("encode", lambda: m.vae.encode(torch.rand(1, 3, 4 * (z.shape[2] - 1) + 1, 8 * z.shape[3], 8 * z.shape[4], device=dev)))):
                if dev == "cuda": torch.cuda.reset_peak_memory_stats(); base = torch.cuda.memory_allocated()
                f(); b = clock(); f(); s = clock() - b
                if dev == "cuda": log(f"vae {name} tiles {tiles}: {s:.2f} s, peak over weights {(torch.cuda.max_memory_allocated() - base) / 2**30:.1f} GiB")
        m.vae.config.untiled_area = 2**19
    if "compiled" in parts:
        if house == "old":
            import logging
            torch._dynamo.config.recompile_limit = 64
            option = "triton.mix_order_reduction"
            options = {option: False} if option in torch._inductor.list_options() else {}
            comp = lambda f: torch.compile(f, dynamic=True, options=options)
        else: comp = vino.compiled
        for block in m.transformer.blocks(): block.forward = comp(block.forward)
        measure("compiled")
log("total", round(time.perf_counter() - begin, 1))
