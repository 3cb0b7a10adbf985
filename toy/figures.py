"""The pictures of the READMEs, from held-out samples of the toy world; none is picked by hand.

python -m toy.figures                                    assets/: hero.gif, tasks.png, guidance.png
python -m toy.figures examples                           assets/examples/: the inputs of the README's commands
python -m toy.figures curves with=runs/a without=runs/b  runs' losses and gradients (figure 8)
python -m toy.figures gallery full=a.safetensors ablated=b.safetensors --out both.png
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from sample import encode, write
from toy.benchmark import generate
from toy.world import Object, Scene, ToyWorld, make_sample, render
from train import HERE, TASKS, TINY, check_known, contact_sheet, make_stage, read_metrics, shown
from vino import InputError, Vino


# The inputs of the README's commands: file, side in pixels, scene
EXAMPLES = [
    ("circle.png", 64, Scene("white", [Object("circle", "red", "small", "bottom left")])),
    ("cross.png", 96, Scene("black", [Object("cross", "yellow", "small", "right")])),
    ("two.mp4", 128, Scene("gray", [
        Object("circle", "blue", "large", "bottom left", "moving right"),
        Object("square", "green", "small", "top"),
    ])),
    ("rising.mp4", 160, Scene("white", [Object("triangle", "purple", "large", "bottom", "moving up")])),
]  # fmt: skip


def examples():
    """Write EXAMPLES to assets/examples."""
    for name, size, scene in EXAMPLES:
        path = HERE / "assets" / "examples" / name
        [pixels] = render([scene], 9 if path.suffix == ".mp4" else 1, size, "cpu")
        write(path, encode(path.suffix, pixels, 8, {}))


def gallery(columns, path, tasks=()):
    """Write a picture to `path`: one held-out sample of each task, in phrases that training never sees, with
    its references and its target, and what each model makes of it. A .gif moves, and shows no targets.

    Args: columns, {heading: (weights, settings of Vino.generate)}; tasks, by default stage 3's. A task that
    is named twice gets two samples."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    models = {name: (Vino.load(weights), more) for name, (weights, more) in columns.items()}
    config = next(iter(models.values()))[0].config
    stage, rows = make_stage("3", config, {}), []
    world = ToyWorld(stage, config, seed=6)
    for number, task in enumerate(tqdm(tasks or stage.mixture, unit="row")):
        sample = make_sample(f"figure {number}", task, world.images(task, 1), "unknown")
        batch = world.collate(task, [sample], "cpu")
        batch.prompts = batch.short_prompts
        outputs = {name: generate(model, batch, **more)[0] for name, (model, more) in models.items()}
        rows.append((f"{task}: {batch.prompts[0]}", shown(batch) | outputs))
    if Path(path).suffix != ".gif":
        contact_sheet(rows).save(path)
        return
    frames = []
    for time in range(world.frames_that_fit(0, False)):
        frames.append(contact_sheet([(label, moment(row, time)) for label, row in rows], least=128))
    more, timing = frames[1:] + [frames[-1]] * 6, {"duration": 1000 / config.sampling.fps, "loop": 0}
    frames[0].save(path, save_all=True, append_images=more, **timing)


def moment(row, time):
    """One frame of each clip in a row, {heading: [3, 1, H, W]}, and its images, but not its target."""
    return {name: p[:, [min(time, p.shape[1] - 1)]] for name, p in row.items() if name != "target"}


def chart(curves, name):
    """Draw one number of {label: records} on a log scale, as running means over a fiftieth of each run."""
    width, height = 900, 400
    lines = {}
    for label, records in curves.items():
        window = math.ceil(len(records) / 50)
        logs = np.log10([max(record[name], 1e-6) for record in records])
        steps = [record["step"] for record in records[window - 1 :]]
        lines[label] = steps, np.convolve(logs, np.ones(window) / window, "valid")
    last = max(steps[-1] for steps, _ in lines.values())
    values = np.concatenate([means for _, means in lines.values()])
    low, high = values.min() - 0.02, values.max() + 0.02
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)

    def point(step, value):
        return 60 + step / last * (width - 80), (high - value) / (high - low) * (height - 40) + 10

    for tick in np.linspace(low, high, 6):
        draw.line([point(0, tick), point(last, tick)], fill="lightgray")
        draw.text((5, point(0, tick)[1] - 6), f"{10**tick:.3g}", fill="black")
    draw.text((60, height - 18), f"{name.replace('_', ' ')}, step 1 to {last}", fill="black")
    for number, (label, line) in enumerate(lines.items()):
        color = f"hsl({number * 360 // len(lines)}, 80%, 40%)"
        draw.line([point(*pair) for pair in zip(*line)], fill=color, width=2)
        draw.text((width - 110, 12 + 14 * number), label, fill=color)
    return picture


def compare(folders, path):
    """Draw loss and gradient norm of runs {label: folder} to `path` (figure 8) -> Markdown table of the last
    half of their steps: means for each task, and the variance of the gradient norm."""
    runs = {}
    for label, folder in folders.items():
        runs[label] = [record for record in read_metrics(Path(folder)) if record.get("loss") is not None]
        if not runs[label]:
            raise InputError(f"{folder} holds no run: there are no losses in its metrics.jsonl")
    Image.fromarray(np.vstack([chart(runs, "loss"), chart(runs, "grad_norm")])).save(path)
    lines = ["| run | task | loss | gradient norm | its variance |", "|---|---|---|---|---|"]
    for label, records in runs.items():
        late = records[len(records) // 2 :]
        for task in [*sorted({r["task"] for r in late}), "all"]:
            losses, norms = zip(*[(r["loss"], r["grad_norm"]) for r in late if task in (r["task"], "all")])
            values = f"{np.mean(losses):.4f} | {np.mean(norms):.3f} | {np.var(norms):.4f}"
            lines.append(f"| {label} | {task} | {values} |")
    return "\n".join(lines)


EXAMPLE = {"curves": "mine=runs/stage3", "gallery": "mine=runs/stage3/final.safetensors"}


def parse_arguments(arguments):
    usage = "python -m toy.figures [examples|curves|gallery] [NAME=PATH ...]"
    parser = argparse.ArgumentParser("toy.figures", usage)
    choices = ["all", "examples", "curves", "gallery"]
    about = "by default all, which redraws hero.gif, tasks.png and guidance.png in assets/"
    parser.add_argument("what", nargs="?", choices=choices, default="all", help=about)
    parser.add_argument("runs", nargs="*", metavar="NAME=PATH", help="folders of runs, or weights")
    parser.add_argument("--tasks", nargs="+", default=(), help="rows of a gallery; by default stage 3's")
    parser.add_argument("--out", help="default: figure.png")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse_arguments(arguments)
    named = dict(run.split("=", 1) for run in args.runs if "=" in run)
    try:
        check_known("task", args.tasks, TASKS)
        out = args.out or "figure.png"
        if Path(out).suffix not in (".png", ".gif"):
            raise InputError(f"--out {out} should end in .png or .gif")
        if args.what not in ("curves", "gallery") and (args.runs or args.tasks or args.out):
            raise InputError(f"{args.what} takes no NAME=PATH, --tasks or --out")
        if args.what in ("curves", "gallery") and len(named) < max(1, len(args.runs)):
            raise InputError(f"{args.what} needs NAME=PATH, each name once, such as {EXAMPLE[args.what]}")
        if not {"", "target"}.isdisjoint(named):
            raise InputError("a NAME is empty, or 'target', which is a column of its own")
        if args.what == "curves":
            print(compare(named, out))
        elif args.what == "examples":
            examples()
        elif args.what == "gallery":
            gallery({name: (path, {}) for name, path in named.items()}, out, args.tasks)
        else:
            moving = ("t2v", "i2v", "ti2v", "tv2v", "tiv2v", "motion")
            gallery({"output": (TINY, {})}, HERE / "assets" / "hero.gif", moving)
            gallery({"output": (TINY, {})}, HERE / "assets" / "tasks.png")
            scales = {f"image cfg {scale:g}": (TINY, {"cfg_image": scale}) for scale in (1.0, 1.5, 3.0, 6.0)}
            gallery(scales, HERE / "assets" / "guidance.png", tasks=("ti2i_ref", "ti2v", "ti2v", "tiv2v"))
    except (InputError, OSError) as error:
        print(f"toy.figures: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
