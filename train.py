"""Train VINO as the paper does: three stages, all tasks in one model, on one CPU or on many GPUs.

    python train.py --stage 1                                     tiny model, toy world, this machine
    torchrun --nproc-per-node 8 train.py --stage 3 --shard zero2 --weights FOLDER --data samples.jsonl

    1. Table 1            hyperparameters of the three stages
    2. Tasks              (figure 6, appendix B)  what is learned when, condition dropout
    3. Toy world          samples of every task, made on the fly
    4. Manifests          samples from files, in buckets of one layout (3.1)
    5. The loss           (appendix B)  one module, from a batch to its losses
    6. Many GPUs          (3.1)  DDP, ZeRO-2, FSDP
    7. Checkpoints        all that a run needs to go on exactly where it was
    8. Watching           metrics, validation, pictures
    9. The loop, and the command line

No random generator lives on from step to step: each choice is drawn from a generator of its own, seeded with
what it is for (the run's seed, the step, the sample's number). So a run that is resumed, or spread over
more processes, sees the same samples and the same noise, and the step is all of the random state.
"""

import argparse
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from collections import defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import combinations, islice, product
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vino import Config, InputError, MMDiT, Reference, Vino
from vino import (
    bicubic,
    flow_loss,
    letterbox,
    normalize,
    override,
    patchify,
    sample,
    to_frames,
    video_size,
    vlm_size,
)

HERE = Path(__file__).parent

# ----------------------------------------------------------------------------------------------------------
# 1. Table 1
# ----------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """A column of table 1, and below it what the paper does not number. A config's "training" section and the
    command line can change any of it."""

    lr: float  # constant
    betas: list
    steps: int
    ema: float  # decay; 0 is none
    area: int  # height * width of a frame
    shift: float  # of the timesteps
    trainable: list  # keys of MODULES
    weight_decay: float = 0.01
    clip: float = 1.0  # the gradient's norm
    mixture: dict = field(default_factory=dict)  # task: share; MIXTURES has the defaults
    batch: int = 1  # samples per process: "a local batch size of 1" (3.1)
    checkpointing: bool = True  # of the MMDiT's blocks (3.1)
    latent_frames: int = 30  # ours: how many fit with a local batch of 1, references included


ALIGN, ALL = ["connectors", "learnable tokens"], ["connectors", "learnable tokens", "MMDiT"]
# fmt: off
STAGES = {
    1: Stage(lr=1e-4, betas=[0.9, 0.99], steps=20_000, ema=0.0,    area=320**2, shift=3.0, trainable=ALIGN),
    2: Stage(lr=4e-5, betas=[0.9, 0.95], steps=4_000,  ema=0.9999, area=640**2, shift=5.0, trainable=ALL),
    3: Stage(lr=2e-5, betas=[0.9, 0.95], steps=16_000, ema=0.9999, area=640**2, shift=5.0, trainable=ALL),
}
# fmt: on
MODULES = {  # how the names of their parameters begin; the VLM and the VAE never train
    "connectors": "mm_encoder.connector",
    "learnable tokens": "mm_encoder.metaquery",
    "MMDiT": "transformer.",
}


def make_stage(number, config, arguments):
    """Table 1's column, changed by the config's "training" section, then by the command line's arguments."""
    stage, changes = deepcopy(STAGES[number]), {str(n): {} for n in STAGES}
    stage.mixture = dict(MIXTURES[number])
    for name in config.training:
        if name not in changes:
            raise InputError(f"config: unknown field 'training.{name}'; known here: {', '.join(changes)}")
    override(stage, config.training.get(str(number), {}), f"training.{number}.")
    given = {f.name: arguments.get(f.name) for f in fields(Stage)}
    override(stage, {name: value for name, value in given.items() if value is not None}, "--")
    for kind, known in (("mixture", TASKS), ("trainable", MODULES)):
        for name in getattr(stage, kind):
            if name not in known:
                raise InputError(
                    f"config: '{name}' in training.{number}.{kind} is none of {', '.join(known)}"
                )
    return stage


# ----------------------------------------------------------------------------------------------------------
# 2. Tasks, and how often each stage draws them
# ----------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """What goes in and what comes out."""

    images: tuple  # possible numbers of reference images
    video: bool  # is there a reference video?
    clip: bool  # is the target a clip?
    framed: bool = False  # does the target lie on the last image, pixel for pixel?


TASKS = {
    "t2i": Task((0,), video=False, clip=False),
    "t2v": Task((0,), video=False, clip=True),
    "i2v": Task((1,), video=False, clip=True, framed=True),
    "ti2i": Task((1,), video=False, clip=False, framed=True),  # an edit of the image
    "ti2i_ref": Task((2, 3), video=False, clip=False, framed=True),  # of the last image, guided by the others
    "ti2v": Task((1, 2, 3), video=False, clip=True),  # a clip of what the images show
    "tv2v": Task((0,), video=True, clip=True),  # an edit of the video
    "tiv2v": Task((1,), video=True, clip=True),  # an edit of the video, guided by the image
    "motion": Task((1,), video=True, clip=True),  # the image's object moves as in the video
    # Proxy tasks (appendix B): the image again, seen by the VLM only; image i of k again.
    "reconstruction": Task((1,), video=False, clip=False, framed=True),
    "selection": Task((2, 3), video=False, clip=False, framed=True),
}
MIXTURES = {  # the shares are ours: figure 6 shows the paper's as a drawing only
    1: {"t2i": 0.4, "t2v": 0.4, "reconstruction": 0.2},
    2: {"t2i": 0.4, "t2v": 0.4, "selection": 0.2},
    3: {"t2i": 0.05, "t2v": 0.05, "i2v": 0.1, "motion": 0.05}
    | {"ti2i": 0.2, "ti2i_ref": 0.15, "ti2v": 0.15, "tv2v": 0.15, "tiv2v": 0.1},
}
SHORT = {1: 0.0, 2: 0.5, 3: 0.5}  # share of prompts in their short form (2.3); the numbers are ours
DROP = 0.1  # probability to drop the text, the images, the video: each on its own (appendix B)


@dataclass
class Batch:
    """Samples of one task and one layout."""

    task: str
    prompts: list
    short_prompts: list
    references: list  # References of batch size B: images, then the video
    target: Tensor  # [B, 3, T, H, W] in [-1, 1]
    keys: list = field(default_factory=list)  # for each sample, what its noise and its dropout are drawn from


def chance(*key):
    """A generator for one purpose: the same key gives the same choices, in every process and every run."""
    return random.Random(" ".join(map(str, key)))


def frames_that_fit(frames, latent_frames, images, video):
    """Frames of a target, at most `frames`, that leave room for its references: "we dynamically adjust the
    number of video frames" (3.1). All together fill `latent_frames`, a video as many as the target."""
    most = (latent_frames - images) // (2 if video else 1)
    return max(5, min(frames, 4 * (most - 1) + 1))


def drop_conditions(batch, seed, step, short):
    """Choose long or short prompts, and drop conditions for classifier-free guidance (appendix B).

    Text is decided for each sample; images and video for the whole step, in all processes alike, so that they
    have equally much to do. short: the share of short prompts."""
    shared = chance(seed, step, "references")
    no_images, no_video = shared.random() < DROP, shared.random() < DROP
    references = [r for r in batch.references if not (no_video if r.is_video else no_images)]
    prompts = []
    for key, long, brief in zip(batch.keys, batch.prompts, batch.short_prompts):
        own = chance(*key, "text")
        text = brief if own.random() < short else long
        prompts.append("" if own.random() < DROP else text)
    return replace(batch, prompts=prompts, references=references)


# ----------------------------------------------------------------------------------------------------------
# 3. Toy world: samples of every task, made on the fly
# ----------------------------------------------------------------------------------------------------------

# The toy world: coloured shapes on flat backgrounds, made on the fly. Scenes are drawn in Python from a seed,
# told in words and rendered in torch. Lengths are pixels of a 64-pixel frame; time runs from 0 (first frame)
# to 1 (last). A target follows from text and references alone: what is not mentioned stays as it is shown.

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
TOLD = {"recolor": "[Make|Paint] {it}( in {base}) {new.color}.",  # edits, told or shown: see `Teller.say`
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
Sample = namedtuple("Sample", "kind prompt short_prompt images video target")  # kind of edit, texts, scenes


def trace(item, time):
    """Centre and radius (x, y, r) of an object."""
    (x, y), (dx, dy, dr) = CELLS[item.cell], MOTIONS[item.motion].change
    return x + item.jitter[0] + time * dx, y + item.jitter[1] + time * dy, SIZES[item.size] + time * dr


def is_clear(objects):
    """True if no two objects come near each other in any of nine frames."""
    for (a, b), frame in product(combinations(objects, 2), range(9)):
        (x, y, r), (u, v, q) = trace(a, frame / 8), trace(b, frame / 8)
        # Two pixels between their boxes will do, or between circles that hold even a square.
        if max(abs(x - u), abs(y - v)) < r + q + 2 and math.hypot(x - u, y - v) < 1.28 * (r + q) + 2:
            return False
    return True


class Teller(random.Random):
    """Draws scenes and tells of them. A task's method gets the number of images and if it makes a clip."""

    def say(self, text, short=False):
        """[this|that] becomes one of the two; (this) is left out of a short text."""
        text = re.sub(r"\((.*?)\)", "" if short else r"\1", text)
        return re.sub(r"\[(.*?)\]", lambda match: self.choice(match[1].split("|")), text)

    def object(self, motion="standing still", jitter=2):
        size = {"growing": "small", "shrinking": "large"}.get(motion) or self.choice([*SIZES])
        cell = self.choice([cell for cell in CELLS if MOTIONS[motion].start in cell])
        offset = (self.uniform(-jitter, jitter), self.uniform(-jitter, jitter))
        return Object(self.choice([*SHAPES]), self.choice([*COLORS]), size, cell, motion, offset)

    def scene(self, count, clip=False, jitter=2):
        """Objects that keep apart, no two of the same shape and colour."""
        motions = [*MOTIONS] if clip else ["standing still"]
        while True:
            objects = [self.object(self.choice(motions), jitter) for _ in range(count)]
            if is_clear(objects) and len({item[:2] for item in objects}) == count:
                return Scene(self.choice([*BACKGROUNDS]), objects)

    def place(self, name, item, clip):
        """Where an object is and, in a clip, what it does."""
        does, start, _ = MOTIONS[item.motion]
        begins, at = ("starts", "from") if start else ("is", "at")
        told = f"[{begins} at the {item.cell} and is {item.motion}|{does} {at} the {item.cell}]"
        return self.say(f"{name} {told if clip else f'[is|stands] at the {item.cell}'}.")

    def caption(self, images, clip):
        """Text -> image or video. With an image, which is the first frame: image -> video."""
        scene = self.scene(self.randint(1, 2 if clip else 3), clip)
        ground, article = f"a {scene.background} background", self.choice(["", "a ", "the "])
        sentences, names = [self.say(f"{'A video' if clip else 'An image'} [on|with] {ground}.")], []
        for item in scene.objects:
            sentences.append(self.place(f"A {item.size} {item.color} {item.shape}", item, clip))
            action = MOTIONS[item.motion].does if images else item.motion
            detail = f" {action}" if clip else f"[ at the {item.cell}||]"
            names.append(f"{article}[{item.size} |]{item.color} {item.shape}{detail}")
        prompt, short = " ".join(sentences), self.say(" and ".join(names) + f"[ on {ground}|]")
        if images:
            prompt = self.choice([prompt, f"Animate Image 1: {short}."])
        return Sample("", prompt, short, [scene] * images, None, scene)

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
            target = {
                "recolor": Scene(here, [*others, it._replace(color=new.color)]),
                "replace": Scene(here, [*others, it._replace(color=new.color, shape=new.shape)]),
                "add": Scene(here, [*others, it, new._replace(cell=cell, jitter=(0, 0))]),
                "remove": Scene(here, others),
                "background": Scene(ground, [*others, it]),
                "move": Scene(here, [*others, it._replace(cell=cell, jitter=(0, 0))]),
                "resize": Scene(here, [*others, it._replace(size=new.size)]),
                "compose": Scene(here, [new]),
            }[kind]
            if is_clear(target.objects) and target not in [scene, *shown]:
                break
        color = f"{it.color} " if any(item.shape == it.shape for item in others) else f"[{it.color} |]"
        text = edits[kind].format(
            it=f"the {color}{it.shape}",
            base="Video 1" if clip else f"Image {images}",
            donor=f"Image {number + 1}",
            new=new,
            ground=ground,
            cell=cell,
        )
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
            objects = [
                objects[0]._replace(cell=f"{start} right"),
                objects[1]._replace(cell="left", motion="standing still"),
            ]
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

    def copy(self, images, clip):
        """One of the images again."""
        shown = [self.scene(self.randint(1, 3)) for _ in range(images)]
        number = self.randrange(images)
        text = f"Reconstruct Image {number + 1}."
        return Sample("", text, text, shown, None, shown[number])


SCRIPTS = {"ti2v": Teller.cast, "motion": Teller.clone}  # how the samples of a task are told
SCRIPTS |= dict.fromkeys(["t2i", "t2v", "i2v"], Teller.caption)
SCRIPTS |= dict.fromkeys(["ti2i", "ti2i_ref", "tv2v", "tiv2v"], Teller.edit)
SCRIPTS |= dict.fromkeys(["reconstruction", "selection"], Teller.copy)


class ToyWorld:
    """A source of samples that needs no files and has no end."""

    def __init__(self, stage, config, seed):
        self.stage, self.config, self.seed, self.tasks = stage, config, seed, list(stage.mixture)
        self.size = max(16, round(math.sqrt(stage.area) / 16) * 16)

    def draw(self, task, position, index):
        """Sample `index` of a task, as scenes. How many images it has depends only on `position`, where the
        step begins: all samples of a step have one layout."""
        images = chance(self.seed, task, "images", position).choice(TASKS[task].images)
        return SCRIPTS[task](Teller(f"{self.seed} {task} {index}"), images, TASKS[task].clip)

    def collate(self, task, samples, device):
        """Samples -> Batch: draws their scenes, on the device."""
        images, video, clip = len(samples[0].images), TASKS[task].video, TASKS[task].clip
        frames = frames_that_fit(self.config.sampling.frames, self.stage.latent_frames, images, video)
        shown = [self.render(scenes, 1, device) for scenes in zip(*[s.images for s in samples])]
        if video:
            shown.append(self.render([s.video for s in samples], frames, device))
        references = [reference_of(pixels, self.config.vision) for pixels in shown]
        target = self.render([s.target for s in samples], frames if clip else 1, device)
        return Batch(task, [s.prompt for s in samples], [s.short_prompt for s in samples], references, target)

    def render(self, scenes, frames, device):
        """B scenes -> [B, 3, T, H, W] in [-1, 1]. Objects do not overlap, so each adds its own difference."""
        # The copies do not block: that would wait for all the work that the device still has to do.
        ground = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], dtype=torch.float32)
        ground = ground.to(device, non_blocking=True)[..., None, None, None]  # [B, 3, 1, 1, 1]
        canvas = ground.repeat(1, 1, frames, self.size, self.size)
        time = torch.linspace(0, 1, frames, device=device)[:, None, None]
        pixel = torch.arange(self.size, device=device) + 0.5
        for shape, edge in SHAPES.items():
            rows = [
                [b, *COLORS[item.color], *trace(item, 0), *trace(item, 1)]
                for b, scene in enumerate(scenes)
                for item in scene.objects
                if item.shape == shape
            ]
            rows = torch.tensor(rows, dtype=torch.float32).to(device, non_blocking=True)
            index, color, start, end = rows.view(-1, 10, 1, 1, 1).split([1, 3, 3, 3], dim=1)
            index = index.flatten().long()  # [N] of one shape
            x, y, r = (torch.lerp(start, end, time) * self.size / 64).unbind(1)  # each [N, T, 1, 1]
            coverage = (0.5 - edge((pixel - x).abs(), pixel[:, None] - y, r)).clamp(0, 1)  # [N, T, H, W]
            canvas.index_add_(0, index, coverage[:, None] * (color - ground[index]))
        return canvas / 127.5 - 1


def reference_of(pixels, config):
    """Pixels [B, 3, T, H, W] that are on the device already -> Reference: a video, or with T = 1 an image."""
    seen, rules = pixels, config.image_resize
    if pixels.shape[2] > 1:
        spread = torch.linspace(0, pixels.shape[2] - 1, config.video_frames).round().long()
        seen, rules = pixels[:, :, spread], config.video_resize
    size = vlm_size(*vlm_size(*pixels.shape[3:], *rules[0]), *rules[1], frames=seen.shape[2])
    seen = bicubic(seen.transpose(1, 2).flatten(0, 1), size).unflatten(0, (len(pixels), -1)).transpose(1, 2)
    return Reference(pixels, *patchify(seen, config), is_video=pixels.shape[2] > 1)


# ----------------------------------------------------------------------------------------------------------
# 4. Manifests: samples from files, in buckets (3.1)
# ----------------------------------------------------------------------------------------------------------

UNREADABLE = (OSError, ValueError)  # what Pillow, PyAV and vino raise at a bad file


@dataclass
class Item:
    """A sample of a manifest, decoded."""

    prompt: str
    short_prompt: str
    references: list  # References of batch size 1
    target: Tensor  # uint8 [T, 3, H, W]
    broken: list = field(default_factory=list)  # (line, problem) of unreadable samples that this one replaces

    @property
    def bucket(self):
        """What the samples of a batch have in common."""
        return self.target.shape, tuple((r.pixels.shape, r.grid) for r in self.references)


class Manifest:
    """A source of samples: a JSON-lines file with one sample a line, paths relative to it:
    {"task", "prompt", "short_prompt"?, "images"?: [paths], "video"?: path, "target": path}"""

    def __init__(self, path, stage, config, seed):
        self.path, self.stage, self.config, self.seed = Path(path), stage, config, seed
        entries = read_manifest(self.path, config.sampling.max_images)
        self.count, self.held, self.buckets, self.orders = len(entries), {}, {}, {}
        for task in stage.mixture:
            own = [entry for entry in entries if entry["task"] == task]
            held = min(VALIDATION, math.ceil(len(own) / 100)) if len(own) > 1 else 0  # kept for validation
            if own:
                self.held[task] = own[len(own) - held :] or own
                self.buckets[task] = self.sort(own[: len(own) - held])

    @property
    def tasks(self):
        return list(self.buckets)

    def sort(self, entries):
        """Entries by bucket. A local batch of 1 does not need it; else each sample is opened once, here."""
        if self.stage.batch == 1:
            return [entries]
        buckets = defaultdict(list)
        with ThreadPoolExecutor() as pool:
            for entry, bucket in zip(entries, pool.map(self.bucket_of, entries)):
                buckets[bucket].append(entry)
        unreadable = buckets.pop(None, [])  # any bucket will do: `draw` replaces and reports them there
        first, *others = buckets.values() or [[]]
        return [first + unreadable, *others]

    def bucket_of(self, entry):
        try:
            return self.load(entry).bucket
        except UNREADABLE:
            return None

    def draw(self, task, position, index):
        """Sample `index` of a task's endless stream; negative ones are for validation. An unreadable sample
        is replaced by the next one of its bucket."""
        if index < 0:
            bucket, place = self.held[task], (-1 - index) % len(self.held[task])
        else:
            batches = sum(math.ceil(len(bucket) / self.stage.batch) for bucket in self.buckets[task])
            epoch, number = divmod(index, batches * self.stage.batch)
            bucket, place = self.order(task, epoch)[number]
        broken = []
        for entry in bucket[place:] + bucket[:place]:
            try:
                return replace(self.load(entry), broken=broken)
            except UNREADABLE as error:
                broken.append((entry["line"], " ".join(str(error).split())))
        line, problem = broken[0]
        raise InputError(f"{self.path}: no sample of '{task}' can be read (line {line}: {problem})")

    def order(self, task, epoch):
        """An epoch's samples, as (bucket, place in it): batches of neighbours from one bucket, in random
        order. A bucket's last batch is filled up with its first samples."""
        if self.orders.get(task, (None,))[0] != epoch:
            rng, batches, size = chance(self.seed, task, "epoch", epoch), [], self.stage.batch
            for bucket in self.buckets[task]:
                bucket = rng.sample(bucket, len(bucket))
                for start in range(0, len(bucket), size):
                    batches.append([(bucket, k % len(bucket)) for k in range(start, start + size)])
            rng.shuffle(batches)
            self.orders[task] = epoch, list(itertools.chain(*batches))
        return self.orders[task][1]

    def load(self, entry):
        """Decode a line -> Item: everything at the stage's area and its own aspect ratio, frames 4k + 1."""
        area, vision, task = self.stage.area, self.config.vision, TASKS[entry["task"]]
        references = [Reference.image(Image.open(path), area, vision) for path in entry["images"]]
        room = self.config.sampling.frames, self.stage.latent_frames
        frames = frames_that_fit(*room, len(references), task.video)
        target = read_clip(entry["target"], frames) if task.clip else read_image(entry["target"])
        if task.video:  # both its readers see as much of the video as the target is long
            video = read_clip(entry["video"], len(target))
            target = target[: len(video)]
            references.append(Reference.video(video, frames, vision, area))
        return Item(entry["prompt"], entry["short_prompt"], references, fit(target, area, task.framed))

    def collate(self, task, items, device):
        """Items of one bucket -> Batch."""
        references = []
        for same in zip(*[item.references for item in items]):
            pixels, patches = (torch.cat(parts) for parts in zip(*[(r.pixels, r.patches) for r in same]))
            references.append(replace(same[0], pixels=pixels, patches=patches))
        target = torch.cat([normalize(item.target.to(device)) for item in items])
        return Batch(task, [i.prompt for i in items], [i.short_prompt for i in items], references, target)


def read_manifest(path, max_images):
    """The manifest's lines as dictionaries, with whole paths. An InputError names the first wrong line."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error.msg})") from error
            problem = problem_of(entry, max_images)
            if problem:
                raise InputError(f"{path}, line {number}: {problem}")
            entry = {"short_prompt": entry["prompt"], "images": [], "video": "", "line": number} | entry
            entry["images"] = [path.parent / image for image in entry["images"]]
            entries.append(entry | {name: path.parent / entry[name] for name in ("video", "target")})
    return entries


def problem_of(entry, max_images):
    """What is wrong with a line of a manifest, or None."""
    text = ("task", "prompt", "target", "short_prompt", "video")
    if not isinstance(entry, dict):
        return "not a JSON object"
    missing = [name for name in text[:3] if name not in entry]
    if missing:
        return f"'{missing[0]}' is missing"
    for name, value in entry.items():
        if name not in (*text, "images"):
            return f"unknown field '{name}'; known: {', '.join(text)}, images"
        if not isinstance(value, list if name == "images" else str):
            return f"'{name}' should be {'a list of paths' if name == 'images' else 'text'}"
    images = entry.get("images", [])
    if not all(isinstance(image, str) for image in images):
        return "'images' should be a list of paths"
    if entry["task"] not in TASKS:
        return f"unknown task '{entry['task']}'; known: {', '.join(TASKS)}"
    task = TASKS[entry["task"]]
    most = max_images if max(task.images) > 1 else max(task.images)
    if not min(task.images) <= len(images) <= most:
        return f"'{entry['task']}' takes {min(task.images)} to {most} images, not {len(images)}"
    if task.video != ("video" in entry):
        return f"'{entry['task']}' {'needs a' if task.video else 'takes no'} video"
    return None


def read_image(path):  # -> uint8 [1, H, W, 3]
    return np.asarray(Image.open(path).convert("RGB"))[None]


def read_clip(path, frames):  # -> uint8 [T, H, W, 3], T = 4k + 1 up to `frames`
    clip = list(islice(imageio.imiter(path, plugin="pyav"), frames))
    if len(clip) < 5:
        raise InputError(f"{path} has {len(clip)} frame(s), and the VAE needs at least 5")
    return np.stack(clip[: (len(clip) - 1) // 4 * 4 + 1])


def fit(frames, area, framed):
    """A target uint8 [T, H, W, 3] -> [T, 3, h, w], multiples of 16 with about `area` pixels: treated like a
    reference image if it has to lie on one (`framed`), else like a reference video."""
    if framed:
        return to_frames([letterbox(Image.fromarray(frame), area) for frame in frames])
    size = video_size(frames.shape[2], frames.shape[1], area)
    frames = bicubic(to_frames(frames).float(), size).round().clamp(0, 255).to(torch.uint8)
    return frames[..., : frames.shape[2] // 16 * 16, : frames.shape[3] // 16 * 16]


class Stream(Dataset):
    """A task's endless samples from a source, toy world or manifest: a dataloader for each task (app. B)."""

    def __init__(self, source, task):
        self.source, self.task = source, task

    def __getitem__(self, key):  # (number of the first sample of the step, number of this sample)
        return self.source.draw(self.task, *key)

    def loader(self, start, batch, accumulate, workers):
        """This process's samples from number `start` on: for each step `accumulate` lists of `batch`. Numbers
        do not depend on how many processes share a step."""

        def keys():
            for position in itertools.count(start, batch * accumulate * world()):
                for micro in range(accumulate):
                    first = position + (micro * world() + rank()) * batch
                    yield [(position, index) for index in range(first, first + batch)]

        options = {"num_workers": workers, "worker_init_fn": ignore_interrupts}
        return iter(DataLoader(self, batch_sampler=keys(), collate_fn=list, **options))


def ignore_interrupts(worker):
    """Ctrl-C is for the main process, which finishes its step first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ----------------------------------------------------------------------------------------------------------
# 5. The loss (appendix B)
# ----------------------------------------------------------------------------------------------------------


def draw_noise(keys, shape):
    """Uniform times [B] and noise [B, *shape]: for each sample from a generator of its own."""
    times, noises = [], []
    for key in keys:
        generator = torch.Generator().manual_seed(chance(*key, "noise").getrandbits(63))
        times.append(torch.rand((), generator=generator))
        noises.append(torch.randn(shape, generator=generator))
    return torch.stack(times), torch.stack(noises)


class Objective(nn.Module):
    """From a batch to its losses. DDP or FSDP wraps this module: only inside it are sharded weights whole."""

    def __init__(self, vino, shift, autocast=None):
        super().__init__()
        self.vino, self.shift, self.autocast = vino, shift, autocast

    def prepare(self, batch):
        """Target latents (the posterior's mean), uniform times, noise and Condition. Reconstruction bypasses
        the VAE: the MMDiT has to find the image in what the VLM says (appendix B)."""
        with torch.no_grad():
            data = self.vino.vae.encode(batch.target).float()
        u, noise = (x.to(data.device) for x in draw_noise(batch.keys, data.shape[1:]))
        references = [self.vino.encode(reference) for reference in batch.references]
        through_vae = batch.task != "reconstruction"
        return data, u, noise, self.vino.mm_encoder(batch.prompts, references, vae_branch=through_vae)

    def mixed(self, batch):
        """bfloat16 over float32 weights, where FSDP does not see to it."""
        return torch.autocast(batch.target.device.type, self.autocast, enabled=self.autocast is not None)

    def forward(self, batch):
        """Rectified flow on the target's tokens -> the loss of each sample, [B]."""
        with self.mixed(batch):
            data, u, noise, condition = self.prepare(batch)
            return flow_loss(lambda x, t: self.vino.velocity(x, t, condition), data, noise, u, self.shift)

    @torch.no_grad()
    def picture(self, batch, steps):
        """What the model makes of the batch's conditions, without guidance -> pixels [B, 3, T, H, W]."""
        with self.mixed(batch):
            _, _, noise, condition = self.prepare(batch)
            latents = sample(lambda x, t: self.vino.velocity(x, t, condition), noise, steps, self.shift)
            return self.vino.vae.decode(latents).float()


# ----------------------------------------------------------------------------------------------------------
# 6. Many GPUs (3.1): what trains, and where it is kept
# ----------------------------------------------------------------------------------------------------------


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def set_trainable(vino, names):
    """Table 1's last row; everything else is frozen."""
    prefixes = tuple(MODULES[name] for name in names)
    for name, parameter in vino.named_parameters():
        unused = name.startswith("transformer." + MMDiT.UNUSED)
        nothing = parameter.numel() == 0  # the queries, in the ablation without
        parameter.requires_grad_(name.startswith(prefixes) and not unused and not nothing)


def to_masters(module):
    """float32 for what trains. What is frozen stays in the type that it computes in."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def blocks_of(vino):
    return [*vino.transformer.transformer_blocks, *vino.transformer.single_transformer_blocks]


def distribute(objective, how, dtype):
    """The module to call in training.

    Args: how: "ddp"; "zero2", the paper's, where weights stay whole from forward to backward, and gradients,
    averages and AdamW's state are sharded; or "fsdp", where weights are gathered anew for the backward."""
    if how == "ddp" or not dist.is_initialized():
        to_masters(objective)
        if world() == 1:
            return objective
        # A task without references leaves one connector unused.
        return DistributedDataParallel(objective, broadcast_buffers=False, find_unused_parameters=True)
    mesh = init_device_mesh(next(objective.parameters()).device.type, (world(),))
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {"mesh": mesh, "mp_policy": mixed, "reshard_after_forward": how == "fsdp"}
    for block in blocks_of(objective.vino):
        to_masters(block)  # one by one: all of them in float32 at once need not fit
        fully_shard(block, **options)
    to_masters(objective)
    unsharded = {*objective.vino.mm_encoder.mm_encoder.parameters(), *objective.vino.vae.parameters()}
    unsharded |= {parameter for parameter in objective.parameters() if parameter.numel() == 0}
    fully_shard(objective, **options, ignored_params=unsharded)
    register_fsdp_forward_method(objective, "picture")
    return objective


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sums(*values):
    """Each number, added up over all processes."""
    total = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


# ----------------------------------------------------------------------------------------------------------
# 7. Checkpoints
# ----------------------------------------------------------------------------------------------------------


def write_checkpoint(folder, step, tensors, state, keep):
    """Write `folder/step_N`, which gets its name when it is complete, and remove all but the newest `keep`.

    Args: tensors: nested dictionaries of this process's (shards of) tensors. state: for state.json."""
    final = folder / f"step_{step:08d}"
    partial = final.with_suffix(".partial")
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    sums(0)  # all processes wait here for the first
    try:
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        dcp.save(tensors, checkpoint_id=partial, no_dist=not dist.is_initialized())
    except (OSError, RuntimeError, CheckpointException) as error:
        free, reason = shutil.disk_usage(final.anchor).free >> 20, " ".join(str(error).split())[-200:]
        shutil.rmtree(partial, ignore_errors=True)
        told = f"cannot write {final} ({free} MiB free): {reason}; older checkpoints stay"
        raise InputError(told) from error
    if rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in complete_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)


def complete_checkpoints(folder):
    """Oldest first. A save that was cut short has another name."""
    return sorted(folder.glob("step_????????"))


def check_identity(ours, theirs, path):
    """Name the first field in which a run and the checkpoint that it should continue differ."""
    for name, value in ours.items():
        if isinstance(value, dict):
            inner = ({f"{name}.{key}": x for key, x in both.items()} for both in (value, theirs[name]))
            check_identity(*inner, path)
        elif value != theirs.get(name):
            raise InputError(f"cannot resume: field '{name}' is {value}, and {theirs.get(name)} in {path}")


# ----------------------------------------------------------------------------------------------------------
# 8. Watching
# ----------------------------------------------------------------------------------------------------------

VALIDATION = 4  # fixed samples of each task, with fixed noise
PICTURE_STEPS = 20


def panels(pixels):
    """[3, T, H, W] in [-1, 1] -> PIL images of the first, the middle and the last frame."""
    frames = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
    return [Image.fromarray(frames[t]) for t in sorted({0, len(frames) // 2, len(frames) - 1})]


def contact_sheet(rows):
    """A picture of rows (label, groups of PIL images)."""
    tall = max(image.height for _, groups in rows for group in groups for image in group) + 18
    wide = max(sum(image.width + 6 for group in groups for image in group) for _, groups in rows) + 20
    sheet = Image.new("RGB", (wide, tall * len(rows)), "white")
    for row, (label, groups) in enumerate(rows):
        ImageDraw.Draw(sheet).text((2, row * tall + 2), label[: wide // 6], fill="black")
        left = 0
        for group in groups:
            for image in group:
                sheet.paste(image, (left, row * tall + 16))
                left += image.width + 2
            left += 4
    return sheet


def loss_curves(records, width=900, height=500):
    """A picture of each task's training loss: running means over a fiftieth of its steps, on a log scale."""
    curves = {}
    for task in sorted({record["task"] for record in records}):
        steps, losses = np.array([(r["step"], r["loss"]) for r in records if r["task"] == task]).T
        window = math.ceil(len(losses) / 50)
        curves[task] = steps[window - 1 :], np.convolve(np.log10(losses), np.ones(window) / window, "valid")
    steps, losses = (np.concatenate(part) for part in zip(*curves.values()))
    last, low, high = steps.max(), losses.min() - 0.02, losses.max() + 0.02
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)

    def down(y):
        return (high - y) / (high - low) * (height - 40) + 10

    for tick in np.linspace(low, high, 6):
        draw.line([(60, down(tick)), (width, down(tick))], fill="lightgray")
        draw.text((5, down(tick) - 6), f"{10**tick:.3g}", fill="black")
    draw.text((60, height - 18), f"loss, step 1 to {last:.0f}", fill="black")
    for number, (task, (steps, losses)) in enumerate(curves.items()):
        color = f"hsl({number * 360 // len(curves)}, 80%, 40%)"
        right = 60 + steps / last * (width - 70)
        draw.line([*zip(right.tolist(), down(losses).tolist())], fill=color, width=2)
        draw.text((width - 110, 12 + 14 * number), task, fill=color)
    return picture


def read_metrics(path):
    """A run's records; a last line that was cut short does not count."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def peak_memory(device):
    """MiB so far at the most: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def say(text):
    if rank() == 0:
        tqdm.write(text, file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------
# 9. The loop, and the command line
# ----------------------------------------------------------------------------------------------------------


class Trainer:
    """A run of one stage, with all of its state."""

    def __init__(self, args):
        self.args, self.out = args, Path(args.out or f"runs/stage{args.stage}")
        self.device, self.dtype = start_device(args.dtype)
        self.folder = self.out / "checkpoints"
        found = complete_checkpoints(self.folder)[-1:]
        if found and not args.resume:
            raise InputError(f"{self.out} holds a run: continue it with --resume, or choose another --out")
        saved = json.loads((found[0] / "state.json").read_text()) if found else {}
        self.weights = str(args.weights or saved.get("weights") or default_weights(args.stage, self.out))
        self.vino = build(args, self.weights, self.device, self.dtype)
        self.stage = make_stage(args.stage, self.vino.config, vars(args))
        given = self.stage, self.vino.config, f"{args.seed} {args.stage}"
        self.source = Manifest(args.data, *given) if args.data else ToyWorld(*given)
        self.tasks = [task for task in self.source.tasks if self.stage.mixture[task] > 0]
        if not self.tasks:
            names = ", ".join(self.stage.mixture)
            raise InputError(f"{args.data} has no sample of stage {args.stage}'s tasks ({names})")
        self.set_up()
        self.step, self.failed, self.broken, self.signal = 0, 0, {}, 0
        self.drawn, self.streams = dict.fromkeys(self.tasks, 0), {}
        if found:
            self.restore(found[0], saved)
        elif args.resume:
            say(f"no checkpoint in {self.folder} yet: starting at step 1")
        tasks = ", ".join(self.tasks)
        say(f"stage {args.stage} on {world()} x {self.device.type}, from {self.weights}: {tasks}")

    def set_up(self):
        """The module to train, its parameters by name, AdamW, and the averaged weights."""
        args, stage = self.args, self.stage
        set_trainable(self.vino, stage.trainable)
        self.vino.transformer.checkpointing = stage.checkpointing
        for block in blocks_of(self.vino) if args.compile else ():
            block.compile()
        mixed = self.dtype != torch.float32 and (args.shard == "ddp" or not dist.is_initialized())
        self.objective = Objective(self.vino, stage.shift, self.dtype if mixed else None)
        self.model = distribute(self.objective, args.shard, self.dtype)
        self.parameters = {name: p for name, p in self.vino.named_parameters() if p.requires_grad}
        rule = {"lr": stage.lr, "betas": stage.betas, "weight_decay": stage.weight_decay, "fused": True}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), **rule)
        for p in self.parameters.values():  # from the start, so that a checkpoint can be read into it
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        home = torch.device("cpu") if args.ema_on_host else self.device
        self.ema = {name: p.detach().clone().to(home) for name, p in self.parameters.items() if stage.ema}

    def train(self):
        """All steps that are left, then the export. Returns the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        if rank() == 0:  # drop what came after the checkpoint
            self.out.mkdir(parents=True, exist_ok=True)
            records = [r for r in read_metrics(self.out / "metrics.jsonl") if r["step"] <= self.step]
            (self.out / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
        with tqdm(total=self.stage.steps, initial=self.step, unit="step", disable=rank() > 0) as bar:
            while self.step < self.stage.steps:
                stop = self.one_step(bar)
                last = self.step == self.stage.steps
                if last or stop or self.step % self.args.save_every == 0:
                    self.save()
                if self.failed == 10:
                    advice = "stopped after a checkpoint; try a lower --lr, or --dtype float32"
                    raise InputError(f"step {self.step}: not finite for the tenth time in a row; {advice}")
                if stop:
                    say(f"stopped by a signal after step {self.step}; continue with --resume")
                    return 128 + self.signal
                if last or self.step % self.args.validate_every == 0:
                    self.validate()
        self.export()
        self.streams.clear()  # end the loaders' processes first: they hold NCCL's connections open
        return 0

    def one_step(self, bar):
        """One step, of one task in all processes. True if the run has to stop."""
        begin, self.step = time.perf_counter(), self.step + 1
        task, loss, broken = self.draw_task(), 0.0, []
        samples = self.stage.batch * self.args.accumulate * world()
        for micro in range(self.args.accumulate):
            batch, unreadable = self.next_batch(task, micro)
            part = self.model(batch).mean() / self.args.accumulate
            part.backward()  # DDP and FSDP average over the processes
            loss, broken = loss + part.detach(), broken + unreadable
        self.drawn[task] += samples
        norm = self.clip_gradients()
        loss, signals, unreadable = sums(float(loss) / world(), self.signal, len(broken))
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
            self.update_ema()
        self.optimizer.zero_grad()
        self.failed = 0 if finite else self.failed + 1
        if unreadable:
            self.report(broken)
        seconds, mib = time.perf_counter() - begin, peak_memory(self.device)
        record = {"loss": loss, "grad_norm": norm} if finite else {"loss": None, "grad_norm": None}
        record |= {"lr": self.stage.lr, "samples": samples, "seconds": seconds, "peak_mib": mib}
        self.log({"step": self.step, "task": task, "skipped": not finite, **record})
        speed = f"{samples / seconds:.1f} samples/s, {mib / 1024:.1f} GiB"
        bar.set_postfix_str(f"{task} loss {loss:.4f}, |g| {norm:.2f}, {speed}" + ", skipped" * (not finite))
        bar.update()
        return signals > 0 or self.failed == 10

    def draw_task(self):
        """The step's task: drawn by the first process, for all, so that they do equal work (appendix B)."""
        shares = [self.stage.mixture[task] for task in self.tasks]
        choice = torch.tensor(chance(self.args.seed, self.step, "task").choices(range(len(shares)), shares))
        if dist.is_initialized():
            dist.broadcast(choice, 0)
        return self.tasks[choice.item()]

    def next_batch(self, task, micro):
        """This process's next samples of a task as a Batch, and the unreadable ones among them."""
        args, size = self.args, self.stage.batch
        if task not in self.streams:
            start = math.ceil(self.drawn[task] / size) * size
            self.streams[task] = Stream(self.source, task).loader(start, size, args.accumulate, args.workers)
        items = next(self.streams[task])
        batch = self.source.collate(task, items, self.device)
        first = (micro * world() + rank()) * size
        batch.keys = [(args.seed, self.step, number) for number in range(first, first + size)]
        unreadable = [broken for item in items for broken in getattr(item, "broken", [])]
        return drop_conditions(batch, args.seed, self.step, SHORT[args.stage]), unreadable

    def clip_gradients(self):
        """Clip the gradient's norm, and return it. What a task does not use gets a gradient of zero, so that
        AdamW treats all parameters alike in every step, as it does with ZeRO's flat buffers."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return whole(nn.utils.clip_grad_norm_(self.parameters.values(), self.stage.clip)).item()

    @torch.no_grad()
    def update_ema(self):
        if self.ema:
            averages = [local(average) for average in self.ema.values()]
            current = [local(p.detach()).to(averages[0].device) for p in self.parameters.values()]
            torch._foreach_lerp_(averages, current, 1 - self.stage.ema)

    def report(self, broken):
        """Name unreadable samples, once each. More than 1% of them end the run."""
        everyones = [broken] * world()
        if dist.is_initialized():
            dist.all_gather_object(everyones, broken)
        for line, problem in itertools.chain(*everyones):
            if line not in self.broken:
                self.broken[line] = problem
                say(f"{self.args.data}, line {line}: skipped: {problem}")
        if len(self.broken) > self.source.count / 100:
            share = f"{len(self.broken)} of {self.source.count} samples cannot be read"
            raise InputError(f"{self.args.data}: {share}, more than 1%; the last is line {line}: {problem}")

    def tensors(self):
        """All that has been learned: weights, their averages, AdamW's moments."""
        weights = {name: p.detach() for name, p in self.parameters.items()}
        optimizer = {name: self.optimizer.state[p] for name, p in self.parameters.items()}
        return {"weights": weights, "ema": self.ema, "optimizer": optimizer}

    def identity(self):
        """What a checkpoint has in common with the run that continues it."""
        args, config = self.args, asdict(self.vino.config)
        parts = ("text", "vision", "mmdit", "vae", "num_queries", "boundary_tokens")
        own = {"stage": args.stage, "seed": args.seed, "data": args.data, "has_ema": self.stage.ema > 0}
        return own | {"trainable": self.stage.trainable} | {name: config[name] for name in parts}

    def save(self):
        state = {"step": self.step, "drawn": self.drawn, "failed": self.failed, "broken": self.broken}
        state |= {"weights": self.weights, "identity": self.identity()}
        write_checkpoint(self.folder, self.step, self.tensors(), state, self.args.keep)

    def restore(self, path, saved):
        """Continue from a checkpoint, written by any number of processes."""
        check_identity(self.identity(), saved["identity"], path)
        dcp.load(self.tensors(), checkpoint_id=path, no_dist=not dist.is_initialized())  # in place
        self.step, self.failed, self.drawn = saved["step"], saved["failed"], self.drawn | saved["drawn"]
        self.broken = {int(line): problem for line, problem in saved["broken"].items()}
        say(f"resumed from {path}")

    @torch.no_grad()
    def validate(self):
        """Loss of each task on fixed samples with fixed noise, and a picture: inputs, target, output."""
        losses, rows = {}, []
        for task in self.tasks:
            parts = []
            for number in range(VALIDATION):
                items = [self.source.draw(task, -1 - number, -1 - number)]
                batch = self.source.collate(task, items, self.device)
                batch.keys = [("validation", task, number)]
                parts.append(self.objective(batch).item())
                if number == 0:
                    output = self.objective.picture(batch, PICTURE_STEPS)
                    shown = [*[r.pixels for r in batch.references], batch.target, output]
                    rows.append((f"{task}: {batch.prompts[0]}", [panels(pixels[0]) for pixels in shown]))
            losses[task] = sum(parts) / len(parts)
        self.log({"step": self.step, "validation": losses})
        if rank() == 0:
            contact_sheet(rows).save(self.out / f"step_{self.step:08d}.png")

    def log(self, record):
        if rank() == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(f"{json.dumps(record)}\n")

    def export(self):
        """One file for `sample.py --weights` and the next stage: averaged weights where there are any, in the
        type that the model computes in. And the curves."""
        tensors, path = {}, self.out / "final.safetensors"
        for name, tensor in self.vino.saved_tensors().items():  # every process gathers, the first one keeps
            tensor = whole(self.ema.get(name, tensor).detach().to(self.device))
            if rank() == 0:
                tensors[name] = tensor.to("cpu", self.dtype)
        if rank() == 0:
            try:
                self.vino.save(path, tensors)
            except (OSError, SafetensorError) as error:
                advice = "the last checkpoint has it all: make room, then --resume"
                raise InputError(f"cannot write {path} ({error}); {advice}") from error
            records = [r for r in read_metrics(self.out / "metrics.jsonl") if r.get("loss")]
            if records:
                loss_curves(records).save(self.out / "loss.png")
        say(f"wrote {path}: python sample.py --weights {path}")

    def on_signal(self, number, frame):
        """Finish the step, save and stop. A second signal does what it always does."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)


def start_device(dtype):
    """Join the other processes if torchrun started us. Returns the device and the type to compute in."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return device, getattr(torch, dtype or ("bfloat16" if cuda else "float32"))


def default_weights(stage, out):
    """The export of the stage before, beside `out`; else the repository's tiny weights; else random ones."""
    before = out.parent / f"stage{stage - 1}" / "final.safetensors"
    for path in (before, HERE / "assets" / "tiny.safetensors"):
        if path.exists():
            return path
    say("no trained weights yet: starting from random ones")
    return "random"


def build(args, weights, device, dtype):
    """The model that the run starts from. The ablations (3.4) take away what its weights may have."""
    path = args.config or (HERE / "tiny_config.json" if weights == "random" else None)
    vino = Vino.load(weights, Config.from_file(path) if path else None, device, dtype)
    if args.no_queries:
        vino.config.num_queries = 0
        vino.mm_encoder.metaquery = nn.Parameter(vino.mm_encoder.metaquery[:0].detach().clone())
    if args.no_boundary_tokens:
        vino.config.boundary_tokens = vino.mm_encoder.boundary_tokens = False
    return vino


def positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse_arguments(arguments):
    about = "Train a stage of VINO; with no other flag the tiny model on the toy world, on this machine."
    parser = argparse.ArgumentParser(description=about)
    add, flag = parser.add_argument, {"action": "store_true"}
    add("--stage", type=int, required=True, choices=STAGES, help="column of table 1")
    start = "a .safetensors, a folder of public weights, 'hub' or 'random'"
    add("--weights", help=f"{start}; by default the export of the stage before, else assets/tiny.safetensors")
    add("--config", help="JSON of a Config; by default the weights' own")
    add("--data", help="JSON lines, one sample a line; by default the toy world")
    add("--out", help="folder for all output; by default runs/stageN")
    add("--resume", **flag, help="continue from the newest complete checkpoint in --out")
    add("--seed", type=int, default=0)
    shards = "under torchrun: copies of everything; gradients and AdamW sharded (the paper's); weights too"
    add("--shard", choices=["ddp", "zero2", "fsdp"], default="ddp", help=shards)
    add("--dtype", choices=["bfloat16", "float32"], help="to compute in; by default bfloat16 on a GPU")
    add("--accumulate", type=positive, default=1, help="batches of a process in a step")
    add("--ema-on-host", **flag, help="keep the averaged weights in the host's memory")
    add("--compile", **flag, help="torch.compile the MMDiT's blocks")
    add("--workers", type=int, default=int(torch.cuda.is_available()), help="loader processes of each task")
    add("--save-every", type=positive, default=500, help="steps between checkpoints")
    add("--keep", type=positive, default=3, help="checkpoints to keep")
    add("--validate-every", type=positive, default=500, help="steps between validations, with their pictures")
    add("--no-queries", **flag, help="ablation: no learnable tokens (figure 8)")
    add("--no-boundary-tokens", **flag, help="ablation: no tokens between latents (figure 11)")
    table = parser.add_argument_group("table 1", "changes to the stage's column")
    for f in fields(Stage):
        name = "--" + f.name.replace("_", "-")
        if f.type in (int, float):
            table.add_argument(name, type=positive if f.type is int else float)
    table.add_argument("--betas", type=float, nargs=2)
    table.add_argument("--checkpointing", action=argparse.BooleanOptionalAction)
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse_arguments(arguments)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process needs none
    try:
        status = Trainer(args).train()
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
