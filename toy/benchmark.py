"""Small counterparts of the paper's benchmarks, on held-out samples of the toy world, scored by pixels.

    python -m toy.benchmark                       all suites (tables 2 to 9)
    python -m toy.benchmark geneval openve --samples 20
    python -m toy.benchmark queries               figure 13: what the learnable queries do in the end

It writes benchmark.md and benchmark.png.
"""

import argparse
import math
import re
import sys
from collections import defaultdict, namedtuple
from functools import partial
from itertools import count, islice, permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from toy.world import (
    BACKGROUNDS, CELLS, COLORS, MOTIONS, SHAPES, SIZES, Object, ToyWorld, describe, make_sample, trace,
)  # fmt: skip
from train import TINY, contact_sheet, make_stage, panels
from vino import InputError, Vino, apply_rope, attend

# how: a key of `ways`, see `measure`; mean: the name of a last row, of all the others
Suite = namedtuple("Suite", "score rows how mean", defaults=["generate", None])
# layouts: (task of the toy world, number of images); the rest says which samples: see `belongs`
Row = namedtuple("Row", "name layouts kind objects differ moves", defaults=["", None, (), False])
Thing = namedtuple("Thing", "shape color x y r")  # what stands in a frame; lengths are the toy world's
Seen = namedtuple("Seen", "background things ground")  # ground: [64, 64], True where no thing is near


def shrink(frames):
    """Frames [N, 3, H, W] in [-1, 1] -> [N, 3, 64, 64] in [0, 255]."""
    return F.interpolate((frames.float().clamp(-1, 1) + 1) * 127.5, (64, 64), mode="area")


def detect(frames):
    """What frames [N, 3, H, W] in [-1, 1] show -> N Seens. A colour, a shape or a background that is none of
    the toy world's is "unclear"."""
    names, grounds = [*BACKGROUNDS, *COLORS], len(BACKGROUNDS)
    palette = torch.tensor([*BACKGROUNDS.values(), *COLORS.values()], dtype=torch.float32)
    distance = torch.cdist(shrink(frames).flatten(2).transpose(1, 2), palette)  # [N, 64 * 64, colours]
    least, nearest = distance.min(2)
    sure = F.one_hot(nearest, len(names)).bool() & (least < 60)[..., None]
    present = sure.sum(1) >= 20  # edges mix colours: they are taken for those that cover an area
    ground = sure[..., :grounds].sum(1).argmax(1)
    present[:, :grounds] = F.one_hot(ground, grounds).bool()
    nearest = distance.masked_fill(~present[:, None], math.inf).argmin(2)
    labels, sure = components((nearest >= grounds).view(-1, 1, 64, 64)), sure.unflatten(1, (64, 64))
    found = []
    for label, pure, number in zip(labels[:, 0], sure, ground):
        values, areas = label.unique(return_counts=True)
        masks = [label == value for value, area in zip(values, areas) if value and area >= 25]
        covered = sum(masks, torch.zeros(1, 64, 64, dtype=torch.bool)).float()
        free = F.max_pool2d(covered, 5, 1, 2)[0] == 0
        stains = (free & ~pure[..., number]).sum()
        background = names[number] if stains < 0.01 * 64 * 64 else "unclear"
        found.append(Seen(background, sorted(identify(mask, pure, names) for mask in masks), free))
    return found


def components(mask):
    """Number the connected parts of a mask [N, 1, H, W]; 0 is outside. The largest number spreads."""
    labels = torch.arange(1.0, mask[0].numel() + 1).view(mask[:1].shape) * mask
    while True:
        spread = F.max_pool2d(labels, 3, 1, 1) * mask
        if torch.equal(spread, labels):
            return labels
        labels = spread


def identify(mask, sure, names):
    """The Thing that covers a mask [64, 64]: of the colour that most of it surely [64, 64, colours] has, and
    of the shape that, drawn with the same centre and area, overlaps it most."""
    shares = sure[mask].float().mean(0)
    color = names[shares.argmax()] if shares.max() > 0.6 else "unclear"
    (y, x), area, pixel = (mask.nonzero() + 0.5).mean(0), mask.sum(), torch.arange(64) + 0.5
    choices = [(0.75, "unclear", (area / math.pi).sqrt())]
    for shape, edge in SHAPES.items():
        unit = (edge((pixel - 32).abs(), pixel[:, None] - 32, 28) < 0).sum() / 28**2
        r = (area / unit).sqrt()
        drawn = edge((pixel - x).abs(), pixel[:, None] - y, r) < 0
        if r > 6.5:  # a small diamond is no tiny circle
            choices.append(((drawn & mask).sum() / (drawn | mask).sum(), shape, r))
    _, shape, r = max(choices)
    return Thing(shape, color, x.item(), y.item(), r.item())


def looks(things):
    """Shape and colour of each, in a fixed order."""
    return sorted((thing.shape, thing.color) for thing in things)


def fits(seen, scene, time=0.0, sizes=True):
    """Is a frame that moment of the scene? One thing for each object, within 4 pixels of its place and, if
    sizes count, 3 of its radius: half the way from small to large."""

    def same(thing, item):
        x, y, r = trace(item, time)
        near = math.hypot(thing.x - x, thing.y - y) < 4 and (not sizes or abs(thing.r - r) < 3)
        return near and (thing.shape, thing.color) == (item.shape, item.color)

    orders = permutations(seen.things) if len(seen.things) == len(scene.objects) else ()
    everything = any(all(map(same, order, scene.objects)) for order in orders)
    return everything and seen.background == scene.background


def score_image(row, sample, output, target, source):
    """GenEval. Every score gets a Sample, its output, target and source [3, T, H, W] (the source is what is
    edited) and gives {(row, column): True, False or a number}."""
    told, things = sample.target.objects, detect(output[:, 0][None])[0].things
    right = looks(things) == looks(told)
    if row in ("single object", "two objects"):  # their colours are another row's
        right = sorted(thing.shape for thing in things) == sorted(item.shape for item in told)
    right = right and (row != "position" or is_placed(sample.prompt, told, things))
    length = "short prompts" if sample.prompt == sample.short_prompt else "long prompts"
    return {(row, "right"): right, (row, length): right}


def is_placed(prompt, told, things):
    """Does the relation hold that a prompt states, or is each object in its cell?"""
    things = {(thing.shape, thing.color): thing for thing in things}
    told = sorted(told, key=lambda item: prompt.find(f"{item.color} {item.shape}"))
    ours = [things[item[:2]] for item in told]
    relation = re.search("left of|right of|above|below", prompt)
    if relation:
        dx, dy = ours[1].x - ours[0].x, ours[1].y - ours[0].y
        return {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation[0]] > 4
    cells = [min(CELLS, key=lambda name: math.dist(CELLS[name], (t.x, t.y))) for t in ours]
    return cells == [item.cell for item in told]


def score_clip(row, sample, output, target, source):
    """VBench. Consistency, smoothness, flickering and dynamics are of what is seen, whatever the text."""
    frames, scene = shrink(output.transpose(0, 1)), sample.target
    seen = detect(output.transpose(0, 1))
    path, time = tracks(seen), np.linspace(0, 1, len(seen))
    grounds = {s.background for s in seen}
    still = torch.stack([a.ground & b.ground for a, b in zip(seen, seen[1:])])
    pairs = [(a[2:], b[2:]) for a in seen[0].things for b in seen[-1].things if a[:2] == b[:2]]
    return {
        ("subject consistency", "right"): path is not None,
        ("background consistency", "right"): len(grounds) == 1 and "unclear" not in grounds,
        ("motion smoothness", "right"): path is not None and bool(bend(path, time) < 1.5),
        ("temporal flickering", "gray levels"): frames.diff(dim=0).abs().mean(1)[still].mean().item(),
        ("dynamic degree", "right"): any(math.dist(*pair) > 3 for pair in pairs),
        ("motion class", "right"): all(motion_of(item, seen) == item.motion for item in scene.objects),
    }


def tracks(seen):
    """[T, 3 * things]: x, y and r in each frame. None if the frames do not show the same things."""
    if not seen[0].things or any(looks(s.things) != looks(seen[0].things) for s in seen):
        return None
    return np.array([[length for thing in s.things for length in thing[2:]] for s in seen])


def bend(path, time):
    """How far, at the most, tracks leave the straight line that is nearest to them, in pixels."""
    slope, start = np.polyfit(time, path, 1)
    return abs(path - np.outer(time, slope) - start).max()


def motion_of(item, seen):
    """The motion, out of MOTIONS, that is nearest to what an object did; None if it is not there."""
    begin, end = ([t[2:] for t in seen[time].things if t[:2] == item[:2]] for time in (0, -1))
    if (len(begin), len(end)) != (1, 1):
        return None
    scale = np.array((1, 1, 4))  # 6 pixels of radius are as much as 24 of way
    change = np.subtract(end[0], begin[0]) * scale
    return min(MOTIONS, key=lambda name: math.dist(change, MOTIONS[name].change * scale))


def psnr(output, target):
    """Of pixels in [-1, 1], in dB; 60 at most, and NaN of none."""
    error = (output.clamp(-1, 1) - target).square().mean() / 4
    return -10 * error.clamp(1e-6).log10().item()


def keeps(seen, scene):
    """Does every frame show the scene's shapes in their colours, wherever they are?"""
    return all(looks(frame.things) == looks(scene.objects) for frame in seen)


def score_cast(row, sample, output, target, source):
    """OpenS2V. An identity is shape and colour; with two objects, each has a place of its own."""
    seen, scene = detect(output.transpose(0, 1)), sample.target
    values = {(row, "identities kept"): keeps(seen, scene)}
    values[row, "motion class"] = all(motion_of(item, seen) == item.motion for item in scene.objects)
    values[row, "first frame, dB"] = psnr(output[:, 0], target[:, 0])
    if len(scene.objects) == 2:
        a, b = scene.objects
        swapped = scene._replace(objects=[Object(*b[:3], *a[3:]), Object(*a[:3], *b[3:])])
        for name, told in (("right", scene), ("swapped", swapped)):
            values[row, f"identities {name}"] = all(
                fits(s._replace(background=scene.background), told, time, sizes=False)
                for s, time in zip(seen, np.linspace(0, 1, len(seen)))
            )
    return values


def score_edit(row, sample, output, target, source):
    """GEdit and OpenVE: is the target's scene there, and what shall not change, does it stay (PSNR)?"""
    last = output.shape[1] - 1
    moments = sorted({0, last // 2, last})
    seen = detect(output[:, moments].transpose(0, 1))
    done = all(fits(s, sample.target, t / max(last, 1)) for s, t in zip(seen, moments))
    changed = ((target - source).abs().amax(0) > 1e-3).float()  # [T, H, W]
    same = F.max_pool2d(changed[:, None], 5, 1, 2)[:, 0] == 0
    values = {(row, "success"): done, (row, "rest, dB"): psnr(output[:, same], target[:, same])}
    if last:
        values[row, "first frame, dB"] = psnr(output[:, 0], target[:, 0])
    return values


def score_answer(row, sample, answer, target, source):
    """Understanding: which words of the toy world does an answer name? Only the right one counts."""
    [item], ground = sample.target.objects, sample.target.background
    does = {motion.does: name for name, motion in MOTIONS.items()}
    grounds = {f"{name} background": name for name in BACKGROUNDS}
    aliases, values = does | grounds, {}
    for name, words, right in [
        ("motion", [*MOTIONS, *does], item.motion),
        ("background", grounds, ground),
        ("colour", COLORS, item.color),
        ("shape", SHAPES, item.shape),
        ("size", SIZES, item.size),
        ("cell", CELLS, item.cell),
    ]:
        pattern = rf"\b({'|'.join(sorted(words, key=len, reverse=True))})\b"
        found = re.findall(pattern, answer)
        answer = re.sub(pattern, "", answer)  # once read, "moving left" names no cell
        if name != "motion" or sample.video:
            values[name, "right"] = {aliases.get(word, word) for word in found} == {right}
    return values


def score_told(row, sample, answer, target, source):
    """Instructions: does the VLM say what their result shall show, in the very words that it has learned?"""
    return {(row, "right"): answer == describe(sample, clip=target.shape[1] > 1)}


def score_copy(row, sample, output, target, source):
    """The autoencoder alone: are the pixels near, and do the shapes stay? That bounds the other suites."""
    kept = keeps(detect(output.transpose(0, 1)), sample.target)
    return {(row, "PSNR, dB"): psnr(output, target), (row, "identities kept"): kept}


def belongs(sample, row):
    """Is a sample one of a row's: of its kind of edit or caption, with so many objects, that differ in all of
    these fields, and, if it says so, with something that moves?"""
    items = sample.target.objects
    apart = all(len({getattr(item, name) for item in items}) == len(items) for name in row.differ)
    stirs = any(item.motion != "standing still" for item in items) or not row.moves
    return sample.kind == row.kind and apart and stirs and row.objects in (None, len(items))


IMAGE, CLIP = [("t2i", 0)], [("t2v", 0)]
EDIT, VIDEO_EDIT = [("ti2i", 1)], [("tv2v", 0), ("tiv2v", 1)]
CASTS = [
    Row("1 image", [("ti2v", 1)], objects=1),
    Row("2 images", [("ti2v", 2)], objects=2),
    Row("3 images", [("ti2v", 3)], objects=2),
]
VIDEO_EDITS = [
    Row("recolor", VIDEO_EDIT, "recolor"),
    Row("replace", VIDEO_EDIT, "replace"),
    Row("background", VIDEO_EDIT, "background"),
    Row("remove", [("tv2v", 0)], "remove"),
    Row("add", VIDEO_EDIT, "add"),
    Row("clone motion", [("motion", 1)]),
]
SUITES = {
    "geneval": Suite(score_image, mean="overall", rows=[
        Row("single object", IMAGE, objects=1),
        Row("two objects", IMAGE, objects=2, differ=["shape"]),
        Row("counting", IMAGE, "counting"),
        Row("colours", IMAGE, objects=1),
        Row("position", IMAGE, "position"),
        Row("colour attribution", IMAGE, objects=2, differ=["shape", "color"]),
    ]),
    "vbench": Suite(score_clip, [Row("clips", CLIP, moves=True)]),
    "opens2v": Suite(score_cast, CASTS),
    "gedit": Suite(score_edit, mean="mean", rows=[
        Row("adjust colour", EDIT, "recolor"),
        Row("replace", EDIT, "replace"),
        Row("add", EDIT, "add"),
        Row("remove", EDIT, "remove"),
        Row("compose", [("ti2i_ref", 2)], "compose"),
        Row("move", EDIT, "move"),
    ]),
    "openve": Suite(score_edit, VIDEO_EDITS, mean="mean"),
    "understanding": Suite(score_answer, how="answer", mean="mean", rows=[
        Row("images", [("look", 1)], objects=1),
        Row("clips", [("watch", 0)], objects=1),
    ]),
    "instructions": Suite(score_told, [*CASTS, *VIDEO_EDITS], how="answer", mean="mean"),
    "autoencoder": Suite(score_copy, how="autoencode", rows=[Row("images", IMAGE), Row("clips", CLIP)]),
}  # fmt: skip
BATCH, SHOWN = 100, 2  # samples that are made together; that the picture shows of each row and layout


def draw_batches(row, samples, world, device):
    """A row's samples, half of them with their short prompts, as pairs (Samples, Batch of one layout). No
    training run draws from these seeds."""
    for number, (task, images) in enumerate(row.layouts):
        share = (samples + number) // len(row.layouts)
        seeds = (f"benchmark {row.name} {world.seed} {task} {i}" for i in count())
        kept = (
            sample for sample in (make_sample(seed, task, images) for seed in seeds) if belongs(sample, row)
        )
        for first in range(0, share, BATCH):
            drawn = [*islice(kept, min(BATCH, share - first))]
            drawn[1::2] = [sample._replace(prompt=sample.short_prompt) for sample in drawn[1::2]]
            batch = world.collate(task, drawn, device)
            batch.keys = [world.seed + first + i for i in range(len(drawn))]  # seeds of the noise
            yield drawn, batch


def measure(suites, samples, world, device, ways):
    """Run suites, `samples` for each row, on a ToyWorld's samples. `ways` are functions of a Batch:
    "generate" and "autoencode" give pixels [B, 3, T, H, W], "answer" the VLM's B texts.

    Returns: {suite: {(row, column): values}}, and rows for `contact_sheet`."""
    results, sheet = {suite: defaultdict(list) for suite in suites}, []
    rows = [(suite, row) for suite in results for row in SUITES[suite].rows]  # a suite given twice runs once
    bar = tqdm(total=samples * len(rows), unit="sample")
    for suite, row in rows:
        score, how = SUITES[suite].score, SUITES[suite].how
        bar.set_description(f"{suite}, {row.name}")
        for drawn, batch in draw_batches(row, samples, world, device):
            outputs, is_text = ways[how](batch), how == "answer"
            targets, references = batch.target.cpu(), [r.pixels.cpu() for r in batch.references]
            sources = references[0 if batch.task == "motion" else -1] if references else targets
            for i, sample in enumerate(drawn):
                values = score(row.name, sample, outputs[i], targets[i], sources[i])
                for key, value in values.items():
                    results[suite][key] += [value] if value == value else []  # NaN: nothing to measure
                if batch.keys[i] < world.seed + SHOWN:
                    wrong = any(v is False for (_, name), v in values.items() if name != "identities swapped")
                    told = outputs[i] if is_text else sample.prompt
                    label = f"{suite} {row.name}, {'wrong' if wrong else 'right'}: {told}"
                    columns = {f"Image {k}": panels(r[i]) for k, r in enumerate(references, 1)}
                    sheet.append((label, columns if is_text else columns | {"output": panels(outputs[i])}))
            bar.update(len(drawn))
    bar.close()
    return results, sheet


def interval(values):
    """Mean and 95% interval as text: Wilson's for a rate, 1.96 standard errors for numbers. One has none."""
    if not values:
        return ""
    n, mean, z = len(values), sum(values) / len(values), 1.96
    if not isinstance(values[0], bool):
        return f"{mean:.2f}" + (f" ± {z * np.std(values) / math.sqrt(n):.2f}" if n > 1 else "")
    middle, scale = mean + z**2 / (2 * n), 1 + z**2 / n
    half = z * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    return f"{mean:.1%} ({abs(middle - half) / scale:.1%} to {(middle + half) / scale:.1%})"  # abs: no -0.0


def table(results):
    """The results of `measure` as Markdown."""
    lines = []
    for suite, values in results.items():
        columns = [*dict.fromkeys(column for _, column in values)]
        rows = [*dict.fromkeys(row for row, _ in values)]
        mean = SUITES[suite].mean
        if mean:
            values |= {(mean, name): sum((values[row, name] for row in rows), []) for name in columns}
            rows.append(mean)
        lines += ["", f"| {' | '.join([suite, 'samples', *columns])} |"]
        lines += [f"| --- | {' | '.join(['---:'] * (1 + len(columns)))} |"]
        for row in rows:
            own = [values[row, name] for name in columns]
            cells = [row, str(max(map(len, own))), *map(interval, own)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def generate(vino, batch, **settings):
    """What the model makes of a Batch, with guidance -> pixels [B, 3, T, H, W]. Prompts of text alone are
    expanded first, if the config says so."""
    images = [reference for reference in batch.references if not reference.is_video]
    videos = batch.references[len(images) :]
    prompts = batch.prompts
    if vino.config.sampling.rewrite and not batch.references:
        prompts = vino.rewrite(prompts)
    size, base = tuple(batch.target.shape[2:]), batch.task == "ti2i_ref"
    return vino.generate(prompts, images, *videos, size=size, base=base, **settings)


# ----------------------------------------------------------------------------------------------------------
# Figure 13: the learnable queries in the finished model
# ----------------------------------------------------------------------------------------------------------


class AttentionShares:
    """Stands where a SequenceParallel would, and measures how much of the target's attention goes to the text
    stream and, of that, to the learnable queries."""

    def __init__(self, target, queries):
        self.target, self.queries = target, queries  # how many tokens
        self.text, self.of_queries = [], []

    def shard(self, x, text, rope, mask):
        return x, text, partial(self.attend, rope=rope, mask=mask, visual=x.shape[1])

    def gather(self, x, length):
        return x

    def attend(self, q, k, v, rope, mask, visual):
        looking = apply_rope(q, rope)[:, visual - self.target : visual].transpose(1, 2)  # [B, heads, T, head]
        keys = apply_rope(k, rope).transpose(1, 2)
        shares = (looking @ keys.mT / math.sqrt(q.shape[-1])).softmax(-1)  # [B, heads, target, L]
        self.text.append(shares[..., visual:].sum(-1).mean().item())
        self.of_queries.append(shares[..., -self.queries :].sum(-1).mean().item())
        return attend(q, k, v, rope, mask)


@torch.no_grad()
def queries_share(vino, prompt, size, steps=10):
    """The learnable queries' share of the attention that the target pays to the text stream, over all blocks
    and the `steps` of one sample without guidance. size: (frames, height, width)."""
    shape = (16, (size[0] - 1) // 4 + 1, size[1] // 8, size[2] // 8)
    tokens = math.prod(shape[1:]) // math.prod(vino.transformer.patch)
    recorder = AttentionShares(tokens, vino.config.num_queries)
    condition = vino.mm_encoder([prompt], [])
    device = condition.tokens.device
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    for time in torch.linspace(1, 1 / steps, steps):
        velocity = vino.transformer(latents, time.expand(1).to(device), condition, recorder)
        latents = latents - velocity / steps
    return sum(recorder.of_queries) / sum(recorder.text)


def compare_queries(vino, world, samples, device, settings):
    """Figure 13 as a Markdown table: images right with and without the queries, and their share of attention,
    for long and for short prompts, which are not expanded. Takes the queries away from `vino`."""
    rewrite, vino.config.sampling.rewrite = vino.config.sampling.rewrite, False
    batches = [pair for row in SUITES["geneval"].rows for pair in draw_batches(row, samples, world, device)]
    kinds = ("long prompts", "short prompts")
    shares, right = {kind: [] for kind in kinds}, {}
    for drawn, _ in batches:
        for number, sample in enumerate(drawn[:4]):
            shares[kinds[number % 2]].append(queries_share(vino, sample.prompt, (1, 64, 64)))
    for label in ("with", "without"):
        if label == "without":
            vino.remove_queries()
        for drawn, batch in tqdm(batches, desc=f"{label} queries", unit="batch"):
            outputs = generate(vino, batch, seed=batch.keys[0], **settings).cpu()
            for number, (sample, output) in enumerate(zip(drawn, outputs)):
                [(_, value), *_] = score_image("", sample, output, None, None).items()
                right.setdefault((kinds[number % 2], label), []).append(value)
    vino.config.sampling.rewrite = rewrite
    lines = ["| queries | samples | right with | right without | share of attention on text |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for kind in kinds:
        both = [right[kind, label] for label in ("with", "without")]
        cells = [kind, len(both[0]), *map(interval, both), f"{np.mean(shares[kind]):.1%}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------


def parse_arguments(arguments):
    parser = argparse.ArgumentParser("toy.benchmark", "python -m toy.benchmark [SUITE ...] [options]")
    names = [*SUITES, "queries"]
    parser.add_argument(
        "suites", metavar="SUITE", nargs="*", help=f"{', '.join(names)} (default: the tables)"
    )
    add = parser.add_argument
    add("--samples", metavar="N", type=int, default=100, help="of each row (default: 100)")
    add("--weights", default=str(TINY), help="a .safetensors (default: assets/tiny.safetensors)")
    add("--out", default="benchmark", help="folder of benchmark.md and .png (default: benchmark)")
    add("--seed", type=int, default=0, help="of samples and noise")
    add("--steps", type=int, help="of the sampler")
    add("--cfg-text", type=float)
    add("--cfg-image", type=float)
    add("--rewrite", action=argparse.BooleanOptionalAction, help="expand prompts (default: the config's)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.suites if name not in names]
    if unknown:
        parser.error(f"unknown suite '{unknown[0]}'; known: {', '.join(names)}")
    return args


def benchmark(args):
    """Run the suites, print the table, and write it and a picture."""
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    model = Vino.load(args.weights, device=args.device)
    world = ToyWorld(make_stage("3", model.config, {}), model.config, args.seed)
    settings = {"steps": args.steps, "cfg_text": args.cfg_text, "cfg_image": args.cfg_image}
    if args.rewrite is not None:
        model.config.sampling.rewrite = args.rewrite

    def make(batch):
        return generate(model, batch, seed=batch.keys[0], **settings).cpu()

    def answer(batch):
        return model.mm_encoder.answer(batch.prompts, [*map(model.encode, batch.references)])

    @torch.no_grad()
    def autoencode(batch):
        return model.vae.decode(model.vae.encode(batch.target)).float().cpu()

    ways = {"generate": make, "answer": answer, "autoencode": autoencode}
    suites = [name for name in args.suites or SUITES if name != "queries"]
    results, sheet = measure(suites, args.samples, world, args.device, ways)
    text = table(results) + "\nIn brackets and behind ±: 95% intervals.\n"
    if "queries" in args.suites:
        text += "\n" + compare_queries(model, world, args.samples, args.device, settings)
    (folder / "benchmark.md").write_text(text)
    if sheet:
        contact_sheet(sheet, folder / "benchmark.png")
    print(text)


def main(arguments=None):
    args = parse_arguments(arguments)
    try:
        benchmark(args)
    except (InputError, OSError) as error:
        print(f"toy.benchmark: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
