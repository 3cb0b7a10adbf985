"""Small counterparts of the paper's benchmarks, on held-out samples of the toy world, scored from pixels.

    python -m toy.benchmark                       all suites (tables 2 to 9)
    python -m toy.benchmark geneval openve --samples 20
    python -m toy.benchmark queries               figure 13: learnable queries in the finished model

It writes benchmark.md and benchmark.png.
"""

import argparse
import json
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

from sample import bounded
from toy.detect import detect, fit, in_place, is_related, keeps, moves_as_told, obeys, pairings, shrink
from toy.world import (
    BACKGROUNDS, CELLS, COLORS, GROWTH, MOTIONS, SHAPES, SIZES, STARTS, Object, Sample, SampleMaker, Scene,
    ToyWorld, is_clear, make_sample, relations,
)  # fmt: skip
from train import TASKS, TINY, check_known, contact_sheet, make_stage, shown
from vino import InputError, Vino, apply_rope, attend

# how: the way to make outputs, a key of `ways` in `measure`; mean: the name of a last row, the mean of the
# others; texts: "long" or "short" prompts, or "both", for half of the samples each
Suite = namedtuple("Suite", "score rows how mean texts", defaults=["generate", None, "both"])
# layouts: (task, number of images); kind to moves: which samples, see `belongs`; how: in place of the suite's
FIELDS = "name layouts kind objects differ moves phrasing how"
Row = namedtuple("Row", FIELDS, defaults=["", None, (), False, "known", None])


def score_image(row, sample, output, target, source):
    """GenEval. Every score function takes the row's name, a Sample, and its output, target and source
    [3, T, H, W] (the source is what is edited), and returns {(row, column): True, False or a number}."""
    told, seen = sample.told.objects, detect(output[:, :1])
    if row in ("single object", "two objects"):  # other rows score their colours
        right = sorted(thing.shape for thing in seen[0].things) == sorted(item.shape for item in told)
    else:
        right = any(row != "position" or is_placed(first, sample) for first, _ in pairings(seen, told))
    kind = KINDS[1] if sample.prompt == sample.short_prompt else KINDS[0]
    return {(row, "right"): right, (row, kind): right}


def is_placed(order, sample):
    """Does the relation that the text states hold, and is each object in the cell that it states?"""
    cells = [min(CELLS, key=lambda name: math.dist(CELLS[name], (t.x, t.y))) for t in order]
    placed = all(item.cell in (None, cell) for item, cell in zip(sample.told.objects, cells))
    return placed and is_related(order, sample.relation)


def score_clip(row, sample, output, target, source):
    """VBench. Only the motion class depends on the text; all other rows score the clip by itself."""
    frames, seen = shrink(output), detect(output)
    bent = bend(seen)
    grounds = {s.background for s in seen}
    still = torch.stack([a.ground & b.ground for a, b in zip(seen, seen[1:])])
    pairs = [(a[2:5], b[2:5]) for a in seen[0].things for b in seen[-1].things if a[:2] == b[:2]]
    return {
        ("subject consistency", "right"): bent < math.inf,
        ("background consistency", "right"): len(grounds) == 1 and "unclear" not in grounds,
        ("motion smoothness", "right"): bent < 1.5,
        ("temporal flickering", "gray levels"): frames.diff(dim=0).abs().mean(1)[still].mean().item(),
        ("dynamic degree", "right"): any(math.dist(*pair) > 3 for pair in pairs),
        ("motion class", "right"): moves_as_told(seen, sample.told.objects),
    }


def bend(seen):
    """How far the tracks of things (x, y and r) deviate, at most, from the straight lines that fit them best,
    in pixels. Infinite if the frames show different things, or none."""
    if not seen[0].things or not keeps(seen, seen[0].things):
        return math.inf
    time = np.linspace(0, 1, len(seen))
    tracks = np.array([[length for thing in s.things for length in thing[2:5]] for s in seen])
    slope, start = np.polyfit(time, tracks, 1)
    return float(abs(tracks - np.outer(time, slope) - start).max())


def psnr(output, target):
    """The PSNR of pixels in [-1, 1], in dB: at most 60, and NaN if there are no pixels."""
    error = (output.clamp(-1, 1) - target).square().mean() / 4
    return -10 * error.clamp(1e-6).log10().item()


def score_cast(row, sample, output, target, source):
    """OpenS2V. An identity is a shape and its colour; two of them may be right, or in swapped places."""
    seen, scene = detect(output), sample.target
    values = {(row, "identities kept"): keeps(seen, scene.objects)}
    values[row, "motion class"] = moves_as_told(seen, scene.objects)
    values[row, "first frame, dB"] = psnr(output[:, 0], target[:, 0])
    if len(scene.objects) == 2:
        a, b = scene.objects
        swapped = [Object(*b[:3], *a[3:]), Object(*a[:3], *b[3:])]
        for name, objects in (("right", scene.objects), ("swapped", swapped)):
            moments = zip(seen, np.linspace(0, 1, len(seen)))
            values[row, f"identities {name}"] = all(in_place(s.things, objects, time) for s, time in moments)
    return values


def score_edit(row, sample, output, target, source):
    """GEdit and OpenVE. Does the output show the target's scene, and does the rest stay unchanged? The PSNR
    of the rest is measured only if the text leaves nothing free."""
    last = output.shape[1] - 1
    values = {(row, "success"): obeys(detect(output[:, sorted({0, last // 2, last})]), sample)}
    if sample.told == sample.target:
        changed = ((target - source).abs().amax(0) > 1e-3).float()  # [T, H, W]
        same = F.max_pool2d(changed[:, None], 5, 1, 2)[:, 0] == 0
        values[row, "rest, dB"] = psnr(output[:, same], target[:, same])
        if last:
            values[row, "first frame, dB"] = psnr(output[:, 0], target[:, 0])
    return values


def score_phrasing(row, sample, output, target, source):
    """Does the output show everything that the text states?"""
    what, phrasing = row.split(", ")
    return {(what, phrasing): score_edit(row, sample, output, target, target)[row, "success"]}


def score_answer(row, sample, answer, target, source):
    """Understanding. Is the answer right about each fact of the only object, and about the background?"""
    _, scene = read_caption(answer)
    [item], [found] = sample.target.objects, scene.objects if len(scene.objects) == 1 else [[None] * 5]
    values = {("background", "right"): scene.background == sample.target.background}
    for name, right, said in zip(("shape", "colour", "size", "cell", "motion"), item, found):
        if name != "motion" or sample.video:
            values[name, "right"] = said == right
    return values


def read_caption(text):
    """A caption of `world.describe` -> (is it of a video?, Scene). Any other text -> (None, empty Scene)."""
    text, known = text.lower(), (SIZES, COLORS, SHAPES, CELLS, MOTIONS, BACKGROUNDS)
    size, color, shape, cell, motion, ground = map("|".join, known)
    item = rf" a ({size}) ({color}) ({shape}) (?:is|starts) at the ({cell})(?: and is ({motion}))?\."
    start = re.match(rf"an? (image|video) on an? ({ground}) background\.", text)
    if not start or re.sub(item, "", text) != start[0]:
        return None, Scene(None, [])
    objects = []
    for size, color, shape, cell, moves in re.findall(item, text):
        objects.append(Object(shape, color, size, cell, moves or "standing still"))
    return start[1] == "video", Scene(start[2], objects)


def score_caption(row, sample, answer, target, source):
    """Does the VLM's caption describe the intended result, with every fact that the prompt states?"""
    is_video, scene = read_caption(answer)
    told, (name, _, phrasing) = sample.told, row.partition(", ")

    def is_kept(objects):
        if sample.relation and sample.relation not in relations(*objects[:2]):
            return False
        facts = [pair for item, own in zip(told.objects, objects) for pair in zip(item[:5], own)]
        return all(fact in (None, own) for fact, own in facts)

    kept = is_video == (target.shape[1] > 1) and told.background in (None, scene.background)
    kept = kept and len(scene.objects) == len(told.objects) and any(map(is_kept, permutations(scene.objects)))
    return {(name, phrasing or "right"): kept}


def score_copy(row, sample, output, target, source):
    """The autoencoder alone, which bounds the other suites: are pixels close, and are identities kept?"""
    kept = keeps(detect(output), sample.target.objects)
    return {(row, "PSNR, dB"): psnr(output, target), (row, "identities kept"): kept}


def score_shapes(row, sample, output, target, source):
    """Do shapes keep their corners? Each object's overlap, in each frame, with the outline of its area."""
    overlaps = []
    for frame in detect(output):
        for item in sample.target.objects:
            own = [thing for thing in frame.things if thing.color == item.color]
            overlaps.append(max((fit(t.mask, item.shape, t.x, t.y)[0] for t in own), default=0.0))
    mean = sum(overlaps) / len(overlaps)
    return {(row, "overlap"): mean, (row, "0.85 in all frames"): min(overlaps) >= 0.85}


def belongs(sample, row):
    """Is a sample of the row's kind (of edit or request), with the row's number of objects, which differ in
    each field that the row lists, and, if the row says so, with something that moves?"""
    items = sample.target.objects
    apart = all(len({getattr(item, name) for item in items}) == len(items) for name in row.differ)
    moves = any(item.motion != "standing still" for item in items) or not row.moves
    typed = sample.told != sample.target or sample.images or sample.video  # rather than a caption
    return typed and row.kind in (None, sample.kind) and apart and moves and row.objects in (None, len(items))


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
PHRASINGS = [
    Row(f"{name}, {phrasing}", layouts, None, phrasing=phrasing)
    for name, drawn, written in [("images", IMAGE, IMAGE), ("clips", CLIP, CLIP),
                                 ("image edits", [*EDIT, ("ti2i_ref", 2)], EDIT),
                                 ("video edits", VIDEO_EDIT, [("tv2v", 0)])]
    for phrasing, layouts in [("known", drawn), ("unknown", drawn), ("by others", written)]
]  # fmt: skip
SUITES = {
    "phrasings": Suite(score_phrasing, PHRASINGS, texts="short"),
    "rewriter": Suite(score_caption, PHRASINGS, how="rewrite", texts="short"),
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
        Row("images", [("look", 1)], objects=1), Row("clips", [("watch", 0)], objects=1)]),
    "instructions": Suite(score_caption, [*CASTS, *VIDEO_EDITS], how="answer", mean="mean", texts="short"),
    "shapes": Suite(score_shapes, texts="long", rows=[
        Row("VAE alone", CLIP, how="autoencode"), Row("whole model", CLIP)]),
    "autoencoder": Suite(score_copy, how="autoencode", rows=[Row("images", IMAGE), Row("clips", CLIP)]),
}  # fmt: skip
BATCH, SHOWN = 100, 2  # samples made together; samples that the picture shows of each row and layout
KINDS = ("long prompts", "short prompts")  # in turn, where a suite has both


def requests_by_others(task):
    """The Samples of by_others.json, whose author has not seen the grammar. What a text leaves free is drawn,
    for the target."""
    requests = json.loads(Path(__file__).with_name("by_others.json").read_text())
    maker, still = SampleMaker(f"by others {task}"), ["standing still"] * (not TASKS[task].clip)

    def read_scene(ground, *objects):
        return Scene(ground, [Object(*words, *still, (0, 0)) for words in objects])

    def complete(item):
        motion = item.motion or "standing still"
        free = [maker.choice([*COLORS]), GROWTH.get(motion, "small"), maker.choice(STARTS[motion]), motion]
        return Object(item.shape, *[own or other for own, other in zip(item[1:5], free)], (0, 0))

    for request in requests[task]:
        told = read_scene(*request["target"])
        target = Scene(told.background or "gray", [])
        while not target.objects or not is_clear(target.objects):
            target = target._replace(objects=[complete(item) for item in told.objects])
        source = [read_scene(*request["source"])] if "source" in request else []
        images, video = ([], *source) if task == "tv2v" else (source, None)
        yield Sample("", request["prompt"], request["prompt"], images, video, target, told)


def draw_batches(row, texts, samples, world, device):
    """Yield a row's samples as pairs (Samples, their Batch of one layout). Their `prompt` is the text that is
    used, `told` what that states. No training run draws from these seeds."""
    for number, (task, images) in enumerate(row.layouts):
        share = (samples + number) // len(row.layouts)
        seeds = (f"benchmark {row.name} {world.seed} {task} {i}" for i in count())
        if row.phrasing == "by others":
            kept = requests_by_others(task)
        else:
            made = (make_sample(seed, task, images, row.phrasing) for seed in seeds)
            kept = (sample for sample in made if belongs(sample, row))
        for first in range(0, share, BATCH):
            drawn = [*islice(kept, min(BATCH, share - first))]
            if not drawn:  # the file has no more
                break
            for i, sample in enumerate(drawn):
                if texts == "short" or texts == "both" and i % 2:
                    drawn[i] = sample._replace(prompt=sample.short_prompt)
                else:
                    drawn[i] = sample._replace(told=sample.target, relation="")
            batch = world.collate(task, drawn, device)
            batch.key = (world.seed + first,)  # seed of the first one's noise
            yield drawn, batch


def measure(suites, samples, world, device, ways):
    """Run suites, `samples` for each row, on a ToyWorld's samples. `ways` are functions of a Batch:
    "generate" and "autoencode" give pixels [B, 3, T, H, W], "answer" and "rewrite" the VLM's B texts.

    Returns: {suite: {(row, column): values}}, and rows for `contact_sheet`."""
    results, sheet = {suite: defaultdict(list) for suite in suites}, []
    rows = [(suite, row) for suite in results for row in SUITES[suite].rows]  # a suite given twice runs once
    bar = tqdm(rows, unit="row")
    for suite, row in bar:
        score, how = SUITES[suite].score, row.how or SUITES[suite].how
        bar.set_description(f"{suite}, {row.name}")
        for drawn, batch in draw_batches(row, SUITES[suite].texts, samples, world, device):
            outputs, is_text, targets = ways[how](batch), how in ("answer", "rewrite"), batch.target.cpu()
            sources = targets
            if batch.references:
                sources = batch.references[0 if batch.task == "motion" else -1].pixels.cpu()
            for i, sample in enumerate(drawn):
                values = score(row.name, sample, outputs[i], targets[i], sources[i])
                for key, value in values.items():
                    results[suite][key] += [value] if value == value else []  # NaN: nothing to measure
                if batch.key[0] + i < world.seed + SHOWN:
                    wrong = any(v is False for (_, name), v in values.items() if name != "identities swapped")
                    text = outputs[i] if is_text else sample.prompt
                    label = f"{suite} {row.name}, {'wrong' if wrong else 'right'}: {text}"
                    sheet.append((label, shown(batch, i) | ({} if is_text else {"output": outputs[i]})))
    return results, sheet


def interval(values):
    """Mean and 95% interval as text: Wilson's for a rate, 1.96 standard errors for two or more numbers."""
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
        mean = SUITES[suite].mean if suite in SUITES else None
        if mean:
            values = values | {(mean, name): sum((values[row, name] for row in rows), []) for name in columns}
            rows.append(mean)
        lines += ["", f"| {' | '.join([suite, 'samples', *columns])} |"]
        lines += [f"| --- | {' | '.join(['---:'] * (1 + len(columns)))} |"]
        for row in rows:
            own = [values[row, name] for name in columns]
            cells = [row, str(max(map(len, own))), *map(interval, own)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def generate(vino, batch, seed=0, **settings):
    """What the model makes of a Batch, with guidance -> pixels [B, 3, T, H, W]. Prompts without references
    are expanded first, if the config says so."""
    images = [reference for reference in batch.references if not reference.is_video]
    videos = batch.references[len(images) :]
    prompts = batch.prompts
    if vino.config.sampling.rewrite and not batch.references:
        prompts = vino.rewrite(prompts, seed=seed)
    size, base = tuple(batch.target.shape[2:]), batch.task == "ti2i_ref"
    return vino.generate(prompts, images, *videos, size=size, base=base, seed=seed, **settings)


# --- Figure 13: the learnable queries in the finished model -------------------------------------------------


class AttentionShares:
    """Takes the place of a SequenceParallel, and measures how much of the target's attention goes to the text
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
def queries_share(vino, prompt, steps=10):
    """The learnable queries' share of the attention that the target pays to the text stream, over all blocks
    and the `steps` of one image of 64 x 64 without guidance."""
    recorder = AttentionShares(8 * 8 // math.prod(vino.transformer.patch), vino.config.num_queries)
    condition = vino.mm_encoder([prompt], [])
    device = condition.tokens.device
    latents = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    for time in torch.linspace(1, 1 / steps, steps):
        velocity = vino.transformer(latents, time.expand(1).to(device), condition, recorder)
        latents = latents - velocity / steps
    return sum(recorder.of_queries) / sum(recorder.text)


def compare_queries(vino, world, samples, device, ways):
    """Figure 13: images right with and without the queries, and their share of the attention on text, for
    long and for short prompts, which are not expanded -> {(kind of prompt, column): values}. Removes the
    queries from `vino`, and rewriting."""
    vino.config.sampling.rewrite = False
    values = defaultdict(list)
    for row in SUITES["geneval"].rows:
        [(drawn, _)] = draw_batches(row, "both", 4, world, device)
        for kind, sample in zip(KINDS * 2, drawn):
            values[kind, "share of attention, %"].append(100 * queries_share(vino, sample.prompt))
    for label in ("right with", "right without"):
        if label == "right without":
            vino.remove_queries()
        results, _ = measure(["geneval"], samples, world, device, ways)
        for row in SUITES["geneval"].rows:
            for kind in KINDS:
                values[kind, label] += results["geneval"][row.name, kind]
    return values


# --- The command line ---------------------------------------------------------------------------------------


def parse_arguments(arguments):
    parser = argparse.ArgumentParser("toy.benchmark", "python -m toy.benchmark [SUITE ...] [options]")
    names, add = [*SUITES, "queries"], parser.add_argument
    add("suites", metavar="SUITE", nargs="*", help=f"{', '.join(names)} (default: the tables)")
    add("--samples", metavar="N", type=bounded(int, 1, 10**6), default=100, help="of each row (default: 100)")
    add("--weights", default=str(TINY), help="a .safetensors (default: assets/tiny.safetensors)")
    add("--out", default="benchmark", help="folder for benchmark.md and .png (default: benchmark)")
    add("--seed", metavar="S", type=bounded(int, 0, 2**31), default=0, help="of samples and noise")
    add("--steps", metavar="N", type=bounded(int, 1, 1000), help="of the sampler")
    add("--cfg-text", metavar="X", type=bounded(float, 0, 1000), help="scale of text guidance")
    add("--cfg-image", metavar="X", type=bounded(float, 0, 1000), help="scale of image guidance")
    add("--rewrite", action=argparse.BooleanOptionalAction, help="expand prompts (default: the config's)")
    args = parser.parse_args(arguments)
    check_known("suite", args.suites, names)
    return args


def benchmark(args):
    """Run the suites, print their tables, and write these and a picture."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, folder = Vino.load(args.weights, device=device), Path(args.out)
    if "queries" in args.suites and not model.config.num_queries:
        raise InputError(f"{args.weights} has no learnable queries")
    folder.mkdir(parents=True, exist_ok=True)
    world = ToyWorld(make_stage("3", model.config, {}), model.config, args.seed)
    settings = {"steps": args.steps, "cfg_text": args.cfg_text, "cfg_image": args.cfg_image}
    if args.rewrite is not None:
        model.config.sampling.rewrite = args.rewrite

    def make(batch):
        return generate(model, batch, seed=batch.key[0], **settings).cpu()

    @torch.no_grad()
    def autoencode(batch):
        return model.vae.decode(model.vae.encode(batch.target)).float().cpu()

    ways = {
        "generate": make,
        "answer": lambda batch: model.answer(batch.prompts, batch.references),
        "rewrite": lambda batch: model.rewrite(batch.prompts, batch.references, seed=batch.key[0]),
        "autoencode": autoencode,
    }
    suites = [name for name in args.suites or SUITES if name != "queries"]
    results, sheet = measure(suites, args.samples, world, device, ways)
    if "queries" in args.suites:
        results["queries"] = compare_queries(model, world, args.samples, device, ways)
    text = table(results) + "\nIn brackets and after ±: 95% intervals.\n"
    (folder / "benchmark.md").write_text(text)
    if sheet:
        contact_sheet(sheet).save(folder / "benchmark.png")
    print(text)


def main(arguments=None):
    try:
        benchmark(parse_arguments(arguments))
    except (InputError, OSError) as error:
        print(f"toy.benchmark: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("toy.benchmark: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
