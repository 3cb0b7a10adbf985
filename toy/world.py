"""The toy world: coloured shapes on flat backgrounds, made on the fly. It stands in for the paper's data.

Scenes are drawn in Python from a seed, put into words, and rendered in torch. Lengths are pixels of a
64-pixel frame; time runs from 0 (first frame) to 1 (last). A target follows from text and references alone:
what is not mentioned stays as it is shown.
"""

import math
import random
import re
from collections import namedtuple
from itertools import chain, combinations, product

import torch

import train
from train import HERE, Batch, Source, Task, chance
from vino import (
    SYSTEM_PROMPT,
    Config,
    EncodedReference,
    Reference,
    byte_tokenizer,
    patchify,
    resize,
    spread_frames,
    vlm_size,
)

# The last four are stage 0's: the VLM puts what it sees, or a short prompt, into words.
TASKS = train.TASKS | {
    "look": Task((1, 2, 3)),
    "watch": Task((0,), video=True, clip=True),
    "rewrite": Task((0,)),
    "rewrite_clip": Task((0,), clip=True),
}
METHODS = {  # of SampleMaker
    "t2i": "caption", "t2v": "caption", "i2v": "caption", "ti2i": "edit", "ti2i_ref": "edit", "ti2v": "cast",
    "tv2v": "edit", "tiv2v": "edit", "motion": "clone", "reconstruction": "copy", "selection": "copy",
    "look": "look", "watch": "look", "rewrite": "rewrite", "rewrite_clip": "rewrite",
}  # fmt: skip
REWRITE_PREFIX = Config.from_file(HERE / "tiny_config.json").sampling.rewrite_prefix

# fmt: off
SHAPES = {  # signed distance from (±x, y) to the edge of a shape of radius r around (0, 0)
    "circle": lambda x, y, r: torch.hypot(x, y) - r,
    "square": lambda x, y, r: torch.maximum(x, y.abs()) - 0.9 * r,
    "triangle": lambda x, y, r: torch.maximum(y, (3 ** 0.5 * x - y) / 2) - r / 2,
    "diamond": lambda x, y, r: (x + y.abs() - r) / 2 ** 0.5,
    "cross": lambda x, y, r: torch.maximum(torch.maximum(x, y.abs()) - r, torch.minimum(x, y.abs()) - r / 3)}
COLORS = {"red": (230, 40, 40), "green": (40, 180, 60), "blue": (50, 90, 230),
          "yellow": (245, 210, 40), "purple": (150, 60, 200), "cyan": (40, 200, 220)}
BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "gray": (128, 128, 128)}
SIZES = {"small": 8, "large": 14}
CELLS = {"top left": (16, 16), "top": (32, 16), "top right": (48, 16),
         "left": (16, 32), "center": (32, 32), "right": (48, 32),
         "bottom left": (16, 48), "bottom": (32, 48), "bottom right": (48, 48)}
Motion = namedtuple("Motion", "does start change")  # which side keeps it in the frame; d(x, y, r)
MOTIONS = {"standing still": Motion("stands still", "", (0, 0, 0)),
           "moving left": Motion("moves left", "right", (-24, 0, 0)),
           "moving right": Motion("moves right", "left", (24, 0, 0)),
           "moving up": Motion("moves up", "bottom", (0, -24, 0)),
           "moving down": Motion("moves down", "top", (0, 24, 0)),
           "growing": Motion("grows", "", (0, 0, 6)),
           "shrinking": Motion("shrinks", "", (0, 0, -6))}
TOLD = {"recolor": "[Make|Paint] {it}( in {base}) {new.color}.",  # edits, told or shown; see SampleMaker.say
        "replace": "Replace {it}( in {base}) [with|by] a {new.color} {new.shape}.",
        "add": "[Add|Put] a {new.size} {new.color} {new.shape} at the {cell}( of {base}).",
        "remove": "[Remove|Delete] {it}( from {base}).",
        "background": "[Make|Paint] the background( of {base}) {ground}.",
        "move": "[Move|Shift] {it}( in {base}) to the {cell}.",
        "resize": "[Make|Draw] {it}( in {base}) {new.size}."}
SHOWN = {"recolor": "[Make|Paint] {it}( in {base}) the [color|colour] of the object in {donor}.",
         "replace": "Replace {it}( in {base}) [with|by] the object of {donor}.",
         "add": "[Add|Put] the object of {donor} at the {cell}( of {base}).",
         "background": "[Use|Show] the background of {donor}( in {base}).",
         "compose": "[Put|Show] the object of {donor} on the background of {base}."}
# fmt: on
Object = namedtuple("Object", "shape color size cell motion jitter")  # size, cell, jitter: in the first frame
Scene = namedtuple("Scene", "background objects")  # of a clip, or of an image, which shows its first frame
# kind of edit, texts, scenes; its number, if what the encoders make of it is kept
Sample = namedtuple("Sample", "kind prompt short_prompt images video target number", defaults=[None])


def trace(item, time):
    """Centre and radius (x, y, r) of an object."""
    (x, y), (dx, dy, dr) = CELLS[item.cell], MOTIONS[item.motion].change
    return x + item.jitter[0] + time * dx, y + item.jitter[1] + time * dy, SIZES[item.size] + time * dr


def describe(sample, clip):
    """A target in words, always the same ones: what the VLM learns to answer. Objects come in reading order;
    where there is only a text to expand, in the text's, so that copying is enough."""
    objects = sample.target.objects
    if sample.images or sample.video:
        objects = sorted(objects, key=lambda item: [*CELLS].index(item.cell))
    sentences = [f"{'A video' if clip else 'An image'} on a {sample.target.background} background."]
    for item in objects:
        place = f"starts at the {item.cell} and is {item.motion}" if clip else f"is at the {item.cell}"
        sentences.append(f"A {item.size} {item.color} {item.shape} {place}.")
    return " ".join(sentences)


def is_clear(objects):
    """True if no two objects come near each other in any of nine frames."""
    for (a, b), frame in product(combinations(objects, 2), range(9)):
        (x, y, r), (u, v, q) = trace(a, frame / 8), trace(b, frame / 8)
        # Two pixels between their boxes will do, or between circles that hold even a square.
        if max(abs(x - u), abs(y - v)) < r + q + 2 and math.hypot(x - u, y - v) < 1.28 * (r + q) + 2:
            return False
    return True


class SampleMaker(random.Random):
    """Draws scenes from a seed and puts them into words. The method of a task (METHODS) takes the number of
    reference images and whether the target is a clip, and returns a Sample."""

    def say(self, text, short=False):
        """[this|that] becomes one of the two; (this) is left out of a short text."""
        text = re.sub(r"\((.*?)\)", "" if short else r"\1", text)
        return re.sub(r"\[(.*?)\]", lambda match: self.choice(match[1].split("|")), text)

    def object(self, motion="standing still", jitter=2):
        size = {"growing": "small", "shrinking": "large"}.get(motion) or self.choice([*SIZES])
        cell = self.choice([cell for cell in CELLS if MOTIONS[motion].start in cell])
        offset = (self.uniform(-jitter, jitter), self.uniform(-jitter, jitter))
        return Object(self.choice([*SHAPES]), self.choice([*COLORS]), size, cell, motion, offset)

    def scene(self, count, clip=False, jitter=2, alike=False):
        """Objects that keep apart: no two of the same shape and colour, or all `alike`."""
        motions = [*MOTIONS] if clip else ["standing still"]
        while True:
            objects = [self.object(self.choice(motions), jitter) for _ in range(count)]
            if alike:
                objects = [Object(*objects[0][:3], *item[3:]) for item in objects]
            if is_clear(objects) and len({item[:2] for item in objects}) == (1 if alike else count):
                return Scene(self.choice([*BACKGROUNDS]), objects)

    def place(self, name, item, clip):
        """Where an object is and, in a clip, what it does."""
        does, start, _ = MOTIONS[item.motion]
        begins, at = ("starts", "from") if start else ("is", "at")
        told = f"[{begins} at the {item.cell} and is {item.motion}|{does} {at} the {item.cell}]"
        return self.say(f"{name} {told if clip else f'[is|stands] at the {item.cell}'}.")

    def caption(self, images, clip):
        """Text -> image or video. With an image, which is the first frame: image -> video."""
        kind = self.choice(["", "", "counting", "position"]) if not clip else ""
        number = {"": self.randint(1, 2 if clip else 3), "counting": self.randint(2, 3), "position": 2}[kind]
        scene = self.scene(number, clip, alike=kind == "counting")
        ground, article = f"a {scene.background} background", self.choice(["", "a ", "the "])
        sentences, names = [self.say(f"{'A video' if clip else 'An image'} [on|with] {ground}.")], []
        for item in scene.objects:
            sentences.append(self.place(f"A {item.size} {item.color} {item.shape}", item, clip))
            action = MOTIONS[item.motion].does if images else item.motion
            detail = f" {action}" if clip else "" if kind else f"[ at the {item.cell}||]"
            names.append(f"{article}[{item.size} |]{item.color} {item.shape}{detail}")
        short = " and ".join(names)
        if kind == "counting":
            size, color, shape = (getattr(scene.objects[0], name) for name in ("size", "color", "shape"))
            plural = f"{color} {shape}{'es' if shape == 'cross' else 's'}"
            short = f"{['two', 'three'][number - 2]} [{size} |]{plural}"
        if kind == "position":
            short = f"{names[0]} {self.relation(*scene.objects)} {names[1]}"
        prompt, short = " ".join(sentences), self.say(f"{short}[ on {ground}|]")
        if images:
            prompt = self.choice([prompt, f"Animate Image 1: {short}."])
        return Sample(kind, prompt, short, [scene] * images, None, scene)

    def relation(self, first, second):
        """Where the first object is, seen from the second."""
        (x, y, _), (u, v, _) = trace(first, 0), trace(second, 0)
        true = {"left of": u - x, "right of": x - u, "above": v - y, "below": y - v}
        return self.choice([words for words, distance in true.items() if distance > 8])

    def edit(self, images, clip):
        """The video or the last image, changed as told or as another image shows. Replacing keeps size."""
        donors = images if clip else images - 1
        edits = SHOWN if donors else TOLD
        kind = self.choice([kind for kind in edits if not clip or kind not in ("move", "resize", "compose")])
        while True:
            shown = [self.scene(1) for _ in range(donors or 1)]
            number = self.randrange(len(shown))
            scene = self.scene(self.randint(1, (2 if clip else 3) - (kind == "add")), clip)
            (ground, [new]), (here, [*others, it]) = shown[number], scene
            cell = self.choice([cell for cell in CELLS if cell != it.cell])
            # fmt: off
            target = {"recolor": Scene(here, [*others, it._replace(color=new.color)]),
                      "replace": Scene(here, [*others, it._replace(color=new.color, shape=new.shape)]),
                      "add": Scene(here, [*others, it, new._replace(cell=cell, jitter=(0, 0))]),
                      "remove": Scene(here, others),
                      "background": Scene(ground, [*others, it]),
                      "move": Scene(here, [*others, it._replace(cell=cell, jitter=(0, 0))]),
                      "resize": Scene(here, [*others, it._replace(size=new.size)]),
                      "compose": Scene(here, [new])}[kind]
            # fmt: on
            if is_clear(target.objects) and target not in [scene, *shown]:
                break
        color = f"{it.color} " if any(item.shape == it.shape for item in others) else f"[{it.color} |]"
        base, donor = "Video 1" if clip else f"Image {images}", f"Image {number + 1}"
        it = f"the {color}{it.shape}"
        text = edits[kind].format(it=it, base=base, donor=donor, new=new, ground=ground, cell=cell)
        video, shown = (scene, shown[:donors]) if clip else (None, [*shown[:donors], scene])
        return Sample(kind, self.say(text), self.say(text, short=True), shown, video, target)

    def cast(self, images, clip):
        """Images of one object each -> video of one or two of these objects."""
        order = self.sample(range(images), images)
        names = [f"object of Image {number + 1}" for number in order]
        ground, objects = self.scene(self.randint(max(1, images - 1), min(images, 2)), clip, jitter=0)
        told = " ".join(self.place(f"The {name}", item, clip) for name, item in zip(names, objects))[:-1]
        does, start, _ = MOTIONS[objects[0].motion]
        if len(objects) == 1 and self.random() < 0.5:  # where it starts goes without saying
            objects = [objects[0]._replace(cell=start or "center")]
            told = f"The {names[0]} {does}"
        elif len(objects) == 2 and start in ("top", "bottom"):
            first, second = objects
            second = second._replace(cell="left", motion="standing still")
            objects = [first._replace(cell=f"{start} right"), second]
            told = f"The {names[0]} {does} beside the {names[1]}"
        shown = [self.scene(1) for _ in range(images)]
        for number, item in zip(order, objects):
            shown[number] = shown[number]._replace(objects=[Object(*item[:3], *self.object()[3:])])
        if images > len(objects):
            ground = shown[order[-1]].background
            told += f" on the background of Image {order[-1] + 1}"
        elif self.random() < 0.5:
            told += f" on a {ground} background"
        else:
            ground = shown[0].background
        return Sample("", told + ".", told + ".", shown, None, Scene(ground, objects))

    def clone(self, images, clip):
        """The object of an image moves as another one does in a video."""
        motion = self.choice([*MOTIONS][1:])
        scene, video = (Scene(self.choice([*BACKGROUNDS]), [self.object(motion)]) for _ in range(2))
        text = self.say("[Move|Animate] the object of Image 1 [as|like the object] in Video 1.")
        return Sample("", text, "Image 1 moves as in Video 1.", [scene], video, scene)

    def look(self, images, clip):
        """One of the images, or the video, to put into words."""
        shown = [self.scene(self.randint(0, 2 if clip else 3), clip) for _ in range(images or 1)]
        number = self.randrange(len(shown))
        text = "Describe Video 1." if clip else f"Describe Image {number + 1}."
        video, shown = (shown[0], []) if clip else (None, shown)
        return Sample("", text, text, shown, video, video or shown[number])

    def rewrite(self, images, clip):
        """A prompt, most often a short one, to make a long one of that says everything."""
        sample = self.caption(0, clip)
        text = REWRITE_PREFIX + self.choice([sample.prompt, *[sample.short_prompt] * 3])
        return sample._replace(prompt=text, short_prompt=text)

    def copy(self, images, clip):
        """One of the images again."""
        shown = [self.scene(self.randint(1, 3)) for _ in range(images)]
        number = self.randrange(images)
        text = f"Reconstruct Image {number + 1}."
        return Sample("", text, text, shown, None, shown[number])


def make_sample(seed, task, images):
    """A Sample of a task with so many reference images: the same for the same seed."""
    return getattr(SampleMaker(seed), METHODS[task])(images, TASKS[task].clip)


class ToyWorld(Source):
    """A source of samples that needs no files and has no end. Given a Vino, it draws from the stage's
    `encode_once` samples of each layout, and keeps what the frozen encoders make of them."""

    def __init__(self, stage, config, seed, vino=None):
        super().__init__(stage, config, seed)
        self.vino, self.count = vino, stage.encode_once if vino else 0
        self.samples, self.encoded = {}, {}

    def draw(self, task, position, index):
        """Sample `index` of a task, as scenes. How many images it has depends only on `position`, where the
        step begins: all samples of a step have one layout."""
        most = self.images_that_fit(TASKS[task].video)
        fitting = [number for number in TASKS[task].images if number <= most]
        images = chance(self.seed, task, "images", position).choice(fitting)
        if index < 0 or not self.count:
            return make_sample(f"{self.seed} {task} {index}", task, images)
        key = task, images, index % self.count
        if key not in self.samples:
            sample = make_sample(f"{self.seed} {task} {key[2]}", task, images)
            self.samples[key] = sample._replace(number=key[2])
        return self.samples[key]

    def collate(self, task, samples, device):
        """Samples -> Batch."""
        if samples[0].number is None:
            return self.render(task, samples, device)
        images = len(samples[0].images)
        known, kept, references = self.encoded.setdefault((task, images), (set(), [], []))
        unknown = {s.number: s for s in samples if s.number not in known}
        if unknown:
            batch = self.render(task, [*unknown.values()], device)
            encoded = [self.vino.encode(reference) for reference in batch.references]
            with torch.no_grad():
                parts = [self.vino.vae.encode(batch.target)]
            for reference in encoded:
                parts += [reference.latents, reference.features, *reference.deepstack]
            if not kept:
                kept += [part.new_empty(self.count, *part.shape[1:]) for part in parts]
                references += [(len(r.deepstack), r.grid, r.is_video) for r in encoded]
            rows = torch.tensor([*unknown], device=device)
            for tensor, part in zip(kept, parts):
                tensor[rows] = part
            known.update(unknown)
        rows = torch.tensor([s.number for s in samples], device=device)
        latents, *parts = [tensor[rows] for tensor in kept]
        encoded = []
        for layers, grid, is_video in references:
            own, features, *deepstack = parts[: layers + 2]
            encoded.append(EncodedReference(own, features, deepstack, grid, is_video))
            del parts[: layers + 2]
        prompts, short_prompts = [s.prompt for s in samples], [s.short_prompt for s in samples]
        return Batch(task, prompts, short_prompts, encoded, None, latents=latents)

    def render(self, task, samples, device):
        """Samples -> Batch of their pixels, drawn on the device."""
        images, video, clip = len(samples[0].images), TASKS[task].video, TASKS[task].clip
        frames = self.frames_that_fit(images, video)
        size = max(16, round(math.sqrt(self.stage.area) / 16) * 16)
        shown = [render(scenes, 1, size, device) for scenes in zip(*[s.images for s in samples])]
        if video:
            shown.append(render([s.video for s in samples], frames, size, device))
        references = [reference_of(pixels, self.config.vision) for pixels in shown]
        target = render([s.target for s in samples], frames if clip else 1, size, device)
        prompts, short_prompts = [s.prompt for s in samples], [s.short_prompt for s in samples]
        answers = [describe(s, clip) for s in samples]
        return Batch(task, prompts, short_prompts, references, target, answers)


def render(scenes, frames, size, device):
    """B scenes -> [B, 3, T, H, W] in [-1, 1]. Objects do not overlap, so each adds its own difference."""
    # The copies do not block: that would wait for all the work that the device still has to do.
    ground = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], dtype=torch.float32)
    ground = ground.to(device, non_blocking=True)[..., None, None, None]  # [B, 3, 1, 1, 1]
    canvas = ground.repeat(1, 1, frames, size, size)
    time = torch.linspace(0, 1, frames, device=device)[:, None, None]
    pixel = torch.arange(size, device=device) + 0.5
    rows = {shape: [] for shape in SHAPES}
    for b, scene in enumerate(scenes):
        for item in scene.objects:
            rows[item.shape].append([b, *COLORS[item.color], *trace(item, 0), *trace(item, 1)])
    table = torch.tensor([*chain(*rows.values())], dtype=torch.float32).to(device, non_blocking=True)
    index, color, start, end = table.view(-1, 10, 1, 1, 1).split([1, 3, 3, 3], dim=1)
    places = (torch.lerp(start, end, time) * size / 64).split([*map(len, rows.values())])
    index, coverage = index.flatten().long(), []
    for edge, place in zip(SHAPES.values(), places):
        x, y, r = place.unbind(1)  # each [N, T, 1, 1]
        coverage.append((0.5 - edge((pixel - x).abs(), pixel[:, None] - y, r)).clamp(0, 1))
    canvas.index_add_(0, index, torch.cat(coverage)[:, None] * (color - ground[index]))
    return canvas / 127.5 - 1


def reference_of(pixels, config):
    """Pixels [B, 3, T, H, W] that are on the device already -> Reference: a video, or with T = 1 an image."""
    seen, rules = pixels, config.image_resize
    if pixels.shape[2] > 1:
        seen, rules = pixels[:, :, spread_frames(pixels.shape[2], config.video_frames)], config.video_resize
    size = vlm_size(*vlm_size(*pixels.shape[3:], *rules[0]), *rules[1], frames=seen.shape[2])
    seen = resize(seen.transpose(1, 2).flatten(0, 1), size).unflatten(0, (len(pixels), -1)).transpose(1, 2)
    patches, grid = patchify(seen, config)
    return Reference(pixels, patches, grid, is_video=pixels.shape[2] > 1)


def toy_tokenizer():
    """A tokenizer to which each word of the toy world is one token."""
    maker = SampleMaker("words")
    texts = [SYSTEM_PROMPT, REWRITE_PREFIX, "system\nuser\nassistant\n", "<0.1 seconds>"]
    for name, task in TASKS.items():
        for _ in range(300):
            sample = getattr(maker, METHODS[name])(max(task.images), task.clip)
            texts += [sample.prompt, sample.short_prompt, describe(sample, task.clip)]
    return byte_tokenizer(texts=texts)
