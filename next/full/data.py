"""python .bench/data.py FOLDER [tiny]: pictures, clips and manifests: edit, 33 and 85 frames, stage 1."""
import json, random, sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import imageio.v3 as imageio
import numpy as np
from PIL import Image
out, tiny = Path(sys.argv[1]), "tiny" in sys.argv
base = 64 if tiny else 640
WORDS = "a large red circle moves slowly to the left over a green wall while the small blue square turns and the light falls".split()
def prompt(n, seed):
    return " ".join(random.Random(seed).choices(WORDS, k=n))
def size(k):
    w = base + (16 if tiny else 16) * (k % 7)
    h = base - (8 if tiny else 16) * (k % 5)
    return h, w
def picture(k):
    h, w = size(k)
    small = np.random.default_rng(k).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(small).resize((w, h), Image.BICUBIC).save(out / f"p{k}.png", compress_level=1)
def clip(args):
    k, frames = args
    h, w = (2 * (x // 2) for x in size(k))
    small = np.random.default_rng(k).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    whole = np.asarray(Image.fromarray(small).resize((w + 2 * frames, h), Image.BICUBIC))
    data = np.stack([whole[:, 2 * f : 2 * f + w] for f in range(frames)])
    imageio.imwrite(out / f"c{frames}_{k}.mp4", data, plugin="pyav", codec="libx264", fps=24, out_pixel_format="yuv420p")
if __name__ == "__main__":
    out.mkdir(parents=True, exist_ok=True)
    lengths = [5, 9] if tiny else [33, 85]
    with ProcessPoolExecutor(4 if tiny else 16) as pool:
        list(pool.map(picture, range(40)))
        list(pool.map(clip, [(k, f) for f in lengths for k in range(12)]))
    def manifest(name, lines):
        (out / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    n = (lambda k: 3 + k % 9) if tiny else (lambda k: 30 + 7 * k)
    edit = [{"task": "ti2i", "prompt": prompt(n(k), k), "images": [f"p{k}.png"], "target": f"p{k}.png"} for k in range(40)]
    clips = {f: [{"task": "t2v", "prompt": prompt(n(k), k), "target": f"c{f}_{k % 12}.mp4"} for k in range(40)] for f in lengths}
    manifest("edit.jsonl", edit)
    manifest("c33.jsonl", clips[lengths[0]])
    manifest("c85.jsonl", clips[lengths[1]])
    one = [{"task": "t2i", "prompt": prompt(n(k), k), "target": f"p{k}.png"} for k in range(40)]
    one += [{"task": "reconstruction", "prompt": prompt(n(k), k), "images": [f"p{k}.png"], "target": f"p{k}.png"} for k in range(40)]
    one += [{"task": "i2v", "prompt": prompt(n(k), k), "images": [f"p{k}.png"], "target": f"c{lengths[1]}_{k % 12}.mp4"} for k in range(40)]
    manifest("one.jsonl", one + clips[lengths[1]])
    print("data written", len(list(out.iterdir())), "files", flush=True)
