"""The pictures of the READMEs, from held-out samples of the toy world; none is picked by hand.

python -m toy.figures                                    assets/tasks.png and assets/guidance.png
python -m toy.figures curves with=runs/a without=runs/b  figure 8: two runs' losses and gradients
python -m toy.figures gallery full=a.safetensors ablated=b.safetensors --out both.png
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from toy.benchmark import generate
from toy.world import ToyWorld
from train import HERE, TINY, chart, contact_sheet, make_stage, panels, read_losses, with_headings
from vino import InputError, Vino


def gallery(columns, path, tasks=(), device="cpu"):
    """A picture at `path`: for a held-out sample of each task its references and its target, and what models
    make of it.

    Args: columns, {heading: (weights, settings of Vino.generate)}; tasks, by default stage 3's. One that is
    named twice gets two samples."""
    models = {name: (Vino.load(weights, device=device), more) for name, (weights, more) in columns.items()}
    config = next(iter(models.values()))[0].config
    stage, rows = make_stage("3", config, {}), []
    world = ToyWorld(stage, config, seed=6)
    for number, task in enumerate(tqdm(tasks or stage.mixture, unit="row")):
        batch = world.collate(task, [world.draw(task, 1, 1 + number)], torch.device(device))
        if task in ("t2i", "t2v", "i2v"):
            batch.prompts = batch.short_prompts
        shown = with_headings(batch, batch.target)
        del shown["output"]
        for name, (model, settings) in models.items():
            shown[name] = panels(generate(model, batch, **settings)[0])
        rows.append((f"{task}: {batch.prompts[0]}", shown))
    contact_sheet(rows, path)


def compare(folders, path):
    """Loss and gradient norm of runs {label: folder} as a picture at `path` (figure 8), and as a table of the
    last half of their steps: means for each task, and the variance of the gradient's norm."""
    runs = {label: read_losses(Path(folder)) for label, folder in folders.items()}
    titles = {"loss": "loss", "grad_norm": "norm of the gradient"}
    pictures = [chart(runs, name, title) for name, title in titles.items()]
    Image.fromarray(np.vstack(pictures)).save(path)
    lines = ["| run | task | loss | gradient norm | its variance |", "|---|---|---|---|---|"]
    for label, records in runs.items():
        late = records[len(records) // 2 :]
        for task in [*sorted({r["task"] for r in late}), "all"]:
            losses, norms = zip(*[(r["loss"], r["grad_norm"]) for r in late if task in (r["task"], "all")])
            values = f"{np.mean(losses):.4f} | {np.mean(norms):.3f} | {np.var(norms):.4f}"
            lines.append(f"| {label} | {task} | {values} |")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser("toy.figures", "python -m toy.figures [curves|gallery] [NAME=PATH ...]")
    parser.add_argument("what", nargs="?", choices=["all", "curves", "gallery"], default="all")
    parser.add_argument("runs", nargs="*", metavar="NAME=PATH", help="folders of runs, or weights")
    parser.add_argument("--tasks", nargs="+", default=(), help="of a gallery; by default stage 3's")
    parser.add_argument("--out", default="figure.png")
    args = parser.parse_args(arguments)
    named = dict(run.split("=", 1) for run in args.runs)
    try:
        if args.what == "curves":
            print(compare(named, args.out))
        elif args.what == "gallery":
            gallery({name: (path, {}) for name, path in named.items()}, args.out, args.tasks)
        else:
            gallery({"output": (TINY, {})}, HERE / "assets" / "tasks.png")
            scales = {f"image cfg {scale:g}": (TINY, {"cfg_image": scale}) for scale in (1.0, 1.5, 3.0, 6.0)}
            gallery(scales, HERE / "assets" / "guidance.png", tasks=("ti2i_ref", "ti2v", "ti2v", "tiv2v"))
    except (InputError, OSError) as error:
        print(f"toy.figures: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
