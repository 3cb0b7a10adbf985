"""Train VINO as the paper does: three stages, all tasks in one model, on one CPU or on many GPUs.

    python train.py --stage 1                                     tiny model, toy world, this machine
    torchrun --nproc-per-node 8 train.py --stage 3 --shard zero2 --weights FOLDER --data samples.jsonl

    1. Table 1            hyperparameters of the three stages
    2. Tasks              (figure 6, appendix B)  what is learned when, condition dropout
    3. Toy world          samples of every task, made on the fly
    4. Manifests          samples from files, in buckets of one layout (3.1)
    5. The loss           (appendix B)  one module, from a batch to its losses
    6. Memory, many GPUs  (3.1)  gradient checkpointing, DDP, ZeRO-2, FSDP
    7. Watching           metrics, validation, pictures
    8. The loop, its checkpoints (all that a run needs to go on exactly where it was), and the command line

No random generator lives on from step to step: each choice is drawn from a generator of its own, seeded with
what it is for (the run's seed, the step, the sample's number). So a run that is resumed, or spread over
more processes, sees the same samples and the same noise, and the step is all of the random state.
"""

import argparse
import json
import logging
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
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from itertools import chain, combinations, count, cycle, islice, product
from pathlib import Path
from types import MethodType

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import DynamicCache

from vino import (
    REWRITE_PROMPT, SYSTEM_PROMPT, Condition, EncodedReference, InputError, MMDiT, Modulation,
    Reference, Vino, agree, bicubic, build_prompt, byte_tokenizer, fit_clip, flow_loss, letterbox, normalize,
    override, patchify, read_config, read_frames, read_image, read_json, sample, to_frames, vlm_size,
)  # fmt: skip

HERE = Path(__file__).parent
TINY = HERE / "assets" / "tiny.safetensors"

# ----------------------------------------------------------------------------------------------------------
# 1. Table 1
# ----------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """A column of table 1, and below it what the paper does not number. A config's "training" section and the
    command line can change any of it."""

    lr: float  # constant, but for `warmup` and `cooldown`
    betas: list
    steps: int
    ema: float  # decay; 0 is none
    area: int  # height * width of a frame
    shift: float  # of the timesteps
    trainable: list  # keys of MODULES
    weight_decay: float = 0.01
    clip: float = 1.0  # the gradient's norm; 0 is none
    mixture: dict = field(default_factory=dict)  # task: share; MIXTURES has the defaults
    short: float = 0.5  # share of prompts in their short form (2.3); the numbers are ours
    drop: float = 0.1  # probability to drop the text, the images, the video: each on its own (appendix B)
    batch: int = 1  # samples per process: "a local batch size of 1" (3.1)
    checkpointing: bool = True  # of the MMDiT's blocks (3.1)
    latent_frames: int = 30  # ours: how many fit with a local batch of 1, references included
    warmup: int = 0  # ours: steps in which the learning rate rises from 0
    cooldown: int = 0  # ours: steps at the end in which it falls to 0


ALIGN, ALL = ["connectors", "learnable tokens"], ["connectors", "learnable tokens", "MMDiT"]
TOY = {"ema": 0.0, "area": 64**2, "drop": 0.0, "warmup": 200, "betas": [0.9, 0.99], "checkpointing": False}
STAGES = {
    # Stand-ins for what the paper downloads, in the toy world; the numbers are ours.
    "0-vae": Stage(lr=1.5e-3, steps=9_600, cooldown=6_000, shift=1.0, batch=48, trainable=["VAE"], **TOY),
    "0-vlm": Stage(lr=1e-3, steps=20_000, cooldown=14_000, shift=1.0, batch=32, trainable=["VLM"], **TOY),
    "0-mmdit": Stage(lr=2e-3, steps=4_900, cooldown=1_600, shift=3.0, batch=128,
                     trainable=["native text", "MMDiT"], **TOY | {"drop": 0.1}),
    "1": Stage(lr=1e-4, betas=[0.9, 0.99], steps=20_000, ema=0.0, area=320**2, shift=3.0, trainable=ALIGN,
               short=0.0),
    "2": Stage(lr=4e-5, betas=[0.9, 0.95], steps=4_000, ema=0.9999, area=640**2, shift=5.0, trainable=ALL),
    "3": Stage(lr=2e-5, betas=[0.9, 0.95], steps=16_000, ema=0.9999, area=640**2, shift=5.0, trainable=ALL),
}  # fmt: skip
LIMITS = {  # least and most of a field, where these are not 0 and infinity
    "steps": (1, math.inf), "batch": (1, math.inf), "latent_frames": (1, math.inf), "area": (256, math.inf),
    "shift": (0.01, math.inf), "short": (0, 1), "drop": (0, 1), "ema": (0, 1),
}  # fmt: skip
MODULES = {  # how the names of their parameters begin
    "connectors": "mm_encoder.connector", "learnable tokens": "mm_encoder.metaquery", "MMDiT": "transformer.",
    "VAE": "vae.", "VLM": "mm_encoder.mm_encoder.", "native text": "native_text.",
}  # fmt: skip


def make_stage(number, config, arguments):
    """Table 1's column, changed by the config's "training" section, then by the command line's arguments."""
    stage = replace(STAGES[number], mixture=MIXTURES[number])
    check_known("config field", [f"training.{n}" for n in config.training], [f"training.{n}" for n in STAGES])
    override(stage, config.training.get(number, {}), f"training.{number}.")
    given = {f.name: arguments[f.name] for f in fields(Stage) if arguments.get(f.name) is not None}
    override(stage, given, "--")
    check_known("task", stage.mixture, TASKS)
    check_known("module", stage.trainable, MODULES)
    if number in "123" and {"VAE", "VLM"} & {*stage.trainable}:
        raise InputError("field 'trainable': VAE and VLM are frozen but in stage 0 (figure 3)")
    shares = [*stage.mixture.values()]
    if not all(type(share) in (int, float) and share >= 0 for share in shares) or not sum(shares):
        raise InputError("field 'mixture' should be shares, none below 0 and not all of them 0")
    if len(stage.betas) != 2 or not all(type(b) in (int, float) and 0 <= b < 1 for b in stage.betas):
        raise InputError("field 'betas' should be two numbers from 0 to below 1")
    for f in fields(Stage):
        least, most = LIMITS.get(f.name, (0, math.inf))
        if f.type in (int, float) and not least <= getattr(stage, f.name) <= most:  # nan is not
            limit = f"at least {least}" + (f" and at most {most}" if most < math.inf else "")
            raise InputError(f"field '{f.name}' should be {limit}")
    return stage


def check_known(what, names, known):
    for name in names:
        if name not in [*known]:  # a list: what stands in a JSON file need not be hashable
            raise InputError(f"unknown {what} '{name}'; known: {', '.join(known)}")


# ----------------------------------------------------------------------------------------------------------
# 2. Tasks, and how often each stage draws them
# ----------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """What goes in and what comes out."""

    script: str  # Teller's method that makes the toy world's samples
    images: tuple  # possible numbers of reference images
    video: bool = False  # is there a reference video?
    clip: bool = False  # is the target a clip?
    framed: bool = False  # does the target lie on the last image, pixel for pixel?


TASKS = {
    "t2i": Task("caption", (0,)),
    "t2v": Task("caption", (0,), clip=True),
    "i2v": Task("caption", (1,), clip=True, framed=True),
    "ti2i": Task("edit", (1,), framed=True),  # an edit of the image
    "ti2i_ref": Task("edit", (2, 3), framed=True),  # of the last image, guided by the others
    "ti2v": Task("cast", (1, 2, 3), clip=True),  # a clip of what the images show
    "tv2v": Task("edit", (0,), video=True, clip=True),  # an edit of the video
    "tiv2v": Task("edit", (1,), video=True, clip=True),  # an edit of the video, guided by the image
    "motion": Task("clone", (1,), video=True, clip=True),  # the image's object moves as in the video
    # Proxy tasks (appendix B): the image again, seen by the VLM only; image i of k again.
    "reconstruction": Task("copy", (1,), framed=True),
    "selection": Task("copy", (2, 3), framed=True),
    # Stage 0 only: what the VLM learns to put into words, see `describe`.
    "look": Task("look", (1, 2, 3)),
    "watch": Task("look", (0,), video=True, clip=True),
    "rewrite": Task("rewrite", (0,)),
    "rewrite_clip": Task("rewrite", (0,), clip=True),
}
MIXTURES = {  # the shares are ours: figure 6 shows the paper's as a drawing only
    "0-vae": {"t2i": 0.3, "t2v": 0.7},
    "0-vlm": {"look": 0.08, "watch": 0.06, "rewrite": 0.06, "rewrite_clip": 0.12, "motion": 0.02}
    | {"ti2i": 0.13, "ti2i_ref": 0.06, "ti2v": 0.22, "tv2v": 0.15, "tiv2v": 0.07}
    | {"t2i": 0.01, "t2v": 0.01, "i2v": 0.01},
    "0-mmdit": {"t2i": 0.5, "t2v": 0.5},
    "1": {"t2i": 0.4, "t2v": 0.4, "reconstruction": 0.2},
    "2": {"t2i": 0.4, "t2v": 0.4, "selection": 0.2},
    "3": {"t2i": 0.05, "t2v": 0.05, "i2v": 0.1, "motion": 0.05}
    | {"ti2i": 0.2, "ti2i_ref": 0.15, "ti2v": 0.15, "tv2v": 0.15, "tiv2v": 0.1},
}


@dataclass
class Batch:
    """Samples of one task and one layout."""

    task: str
    prompts: list
    short_prompts: list
    references: list  # References of batch size B: images, then the video
    target: Tensor  # [B, 3, T, H, W] in [-1, 1]
    answers: list = field(default_factory=list)  # the target in words; the toy world has them
    keys: list = field(default_factory=list)  # for each sample, what its noise and its dropout are drawn from
    broken: list = field(default_factory=list)  # (line, problem) of unreadable samples that these replace


def chance(*key):
    """A generator for one purpose: the same key gives the same choices, in every process and every run."""
    return random.Random(" ".join(map(str, key)))


def drop_conditions(batch, seed, step, stage):
    """Choose long or short prompts, and drop conditions for classifier-free guidance (appendix B). Text is
    decided for each sample; images and video for the whole step, in all processes alike, so that they have
    equally much to do."""
    shared = chance(seed, step, "references")
    no_images, no_video = shared.random() < stage.drop, shared.random() < stage.drop
    references = [r for r in batch.references if not (no_video if r.is_video else no_images)]
    prompts = []
    for key, long, brief in zip(batch.keys, batch.prompts, batch.short_prompts):
        own = chance(*key, "text")
        text = brief if own.random() < stage.short else long
        prompts.append("" if own.random() < stage.drop else text)
    return replace(batch, prompts=prompts, references=references)


class Source(Dataset):
    """What the toy world and a manifest share. `draw` makes a sample, `collate` makes a Batch of several."""

    def __init__(self, stage, config, seed):
        self.stage, self.config, self.seed = stage, config, seed
        self.tasks = [task for task, share in stage.mixture.items() if share]

    def frames_that_fit(self, images, video):
        """Frames of a target that leave room for its references: "we dynamically adjust the number of video
        frames" (3.1). All together fill the stage's `latent_frames`, a video as many as the target."""
        most = (self.stage.latent_frames - images) // (2 if video else 1)
        return max(5, min(self.config.sampling.frames, 4 * (most - 1) + 1))

    def __getitem__(self, key):  # task, number of the first sample of the step, number of this sample
        return self.draw(*key)

    def loader(self, task, start, accumulate, workers):
        """This process's endless samples of a task, one dataloader each (appendix B), from number `start` on:
        for each step `accumulate` lists. Numbers do not depend on how many processes share a step."""

        def keys():
            for position in count(start, self.stage.batch * accumulate * world()):
                for micro in range(accumulate):
                    first = position + (micro * world() + rank()) * self.stage.batch
                    yield [(task, position, index) for index in range(first, first + self.stage.batch)]

        options = {"num_workers": workers, "worker_init_fn": set_up_worker}
        return iter(DataLoader(self, batch_sampler=keys(), collate_fn=list, **options))


def set_up_worker(number):
    """A loader's process. Signals that the keyboard and torchrun send to our process group are for the main
    process, which finishes its step first; what that one sends still ends this one."""
    os.setsid()
    # Tensors travel as files with names: a batch has more than a process may have open ones.
    torch.multiprocessing.set_sharing_strategy("file_system")


# ----------------------------------------------------------------------------------------------------------
# 3. Toy world: coloured shapes on flat backgrounds, made on the fly. Scenes are drawn in Python from a seed,
# told in words and rendered in torch. Lengths are pixels of a 64-pixel frame; time runs from 0 (first frame)
# to 1 (last). A target follows from text and references alone: what is not mentioned stays as it is shown.
# ----------------------------------------------------------------------------------------------------------

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
        text = REWRITE_PROMPT + self.choice([sample.prompt, *[sample.short_prompt] * 3])
        return sample._replace(prompt=text, short_prompt=text)

    def copy(self, images, clip):
        """One of the images again."""
        shown = [self.scene(self.randint(1, 3)) for _ in range(images)]
        number = self.randrange(images)
        text = f"Reconstruct Image {number + 1}."
        return Sample("", text, text, shown, None, shown[number])


class ToyWorld(Source):
    """A source of samples that needs no files and has no end."""

    def draw(self, task, position, index):
        """Sample `index` of a task, as scenes. How many images it has depends only on `position`, where the
        step begins: all samples of a step have one layout."""
        images = chance(self.seed, task, "images", position).choice(TASKS[task].images)
        script = getattr(Teller(f"{self.seed} {task} {index}"), TASKS[task].script)
        return script(images, TASKS[task].clip)

    def collate(self, task, samples, device):
        """Samples -> Batch: draws their scenes, on the device."""
        images, video, clip = len(samples[0].images), TASKS[task].video, TASKS[task].clip
        frames = self.frames_that_fit(images, video)
        shown = [self.render(scenes, 1, device) for scenes in zip(*[s.images for s in samples])]
        if video:
            shown.append(self.render([s.video for s in samples], frames, device))
        references = [reference_of(pixels, self.config.vision) for pixels in shown]
        target = self.render([s.target for s in samples], frames if clip else 1, device)
        texts = [s.prompt for s in samples], [s.short_prompt for s in samples]
        return Batch(task, *texts, references, target, [describe(s, clip) for s in samples])

    def render(self, scenes, frames, device):
        """B scenes -> [B, 3, T, H, W] in [-1, 1]. Objects do not overlap, so each adds its own difference."""
        size = max(16, round(math.sqrt(self.stage.area) / 16) * 16)
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


def toy_tokenizer():
    """A tokenizer to which each word of the toy world is one token."""
    teller = Teller("words")
    texts = [SYSTEM_PROMPT, REWRITE_PROMPT, "system\nuser\nassistant\n", "<0.1 seconds>"]
    for task in TASKS.values():
        for _ in range(300):
            sample = getattr(teller, task.script)(max(task.images), task.clip)
            texts += [sample.prompt, sample.short_prompt, describe(sample, task.clip)]
    return byte_tokenizer(texts=texts)


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
class Entry:
    """A line of a manifest; paths are relative to the manifest."""

    task: str = ""
    prompt: str = ""
    target: str = ""
    short_prompt: str = ""  # by default the prompt
    images: list = field(default_factory=list)
    video: str = ""
    line = 0  # its number; not a field


class Manifest(Source):
    """Samples from files: JSON lines, one sample a line, with the fields of Entry."""

    def __init__(self, path, stage, config, seed):
        super().__init__(stage, config, seed)
        self.path, self.held, self.buckets = Path(path), {}, {}
        entries = read_manifest(self.path, config.sampling.max_images)
        self.count = len(entries)
        for task in self.tasks:
            own = [entry for entry in entries if entry.task == task]
            held = min(VALIDATION, math.ceil(len(own) / 100), len(own) - 1)
            if own:
                self.held[task] = own[:held] or own  # for validation
                self.buckets[task] = self.sort(own[held:])
        self.tasks = list(self.buckets)

    def sort(self, entries):
        """Entries by bucket. A local batch of 1 does not need it; else each sample is opened once, here."""
        if self.stage.batch == 1:
            return [entries]

        def bucket_of(entry):
            try:
                one = self.load(entry)
                return one.target.shape, *[(r.pixels.shape, r.grid) for r in one.references]
            except UNREADABLE:
                return None

        buckets = defaultdict(list)
        with ThreadPoolExecutor() as pool:
            for entry, bucket in zip(entries, pool.map(bucket_of, entries)):
                buckets[bucket].append(entry)
        unreadable = buckets.pop(None, [])  # any bucket will do: `draw` replaces and reports them there
        first, *others = buckets.values() or [[]]
        return [first + unreadable, *others]

    def draw(self, task, position, index):
        """Sample `index` of a task's endless stream; negative ones are for validation. An unreadable sample
        is replaced by the next one of its bucket."""
        if index < 0:
            held = self.held[task]
            bucket, place = [*held, *chain(*self.buckets[task])], (-1 - index) % len(held)
        else:
            batches = sum(math.ceil(len(bucket) / self.stage.batch) for bucket in self.buckets[task])
            epoch, number = divmod(index, batches * self.stage.batch)
            bucket, place = self.order(task, epoch)[number]
        broken = []
        for entry in chain(islice(bucket, place, None), islice(bucket, place)):
            try:
                return replace(self.load(entry), broken=broken)
            except UNREADABLE as error:
                broken.append((entry.line, one_line(error)))
        line, problem = broken[0]
        raise InputError(f"{self.path}: no sample of '{task}' can be read (line {line}: {problem})")

    @lru_cache(maxsize=len(TASKS))  # every task's present epoch
    def order(self, task, epoch):
        """An epoch's samples, as (bucket, place in it): batches of neighbours from one bucket, in random
        order. A bucket's last batch is filled up with its first samples."""
        rng, batches, size = chance(self.seed, task, "epoch", epoch), [], self.stage.batch
        for bucket in self.buckets[task]:
            bucket = rng.sample(bucket, len(bucket))
            for start in range(0, len(bucket), size):
                batches.append([(bucket, k % len(bucket)) for k in range(start, start + size)])
        rng.shuffle(batches)
        return list(chain(*batches))

    def load(self, entry):
        """Decode a line -> Batch of one, at the stage's area and its own aspect ratio, with 4k + 1 frames."""
        area, vision, task, folder = self.stage.area, self.config.vision, TASKS[entry.task], self.path.parent
        references = [Reference.image(read_image(folder / path), area, vision) for path in entry.images]
        frames = self.frames_that_fit(len(references), task.video)
        if task.clip:
            target = read_clip(folder / entry.target, frames)
        else:
            target = np.asarray(read_image(folder / entry.target))[None]
        if task.video:  # both its readers see as much of the video as the target is long
            video = read_clip(folder / entry.video, len(target))
            target = target[: len(video)]
            references.append(Reference.video(video, frames, vision, area))
        target = normalize(fit(target, area, task.framed))
        return Batch(entry.task, [entry.prompt], [entry.short_prompt or entry.prompt], references, target)

    def collate(self, task, ones, device):
        """Batches of one, all from one bucket -> Batch."""
        references = []
        for same in zip(*[one.references for one in ones]):
            pixels, patches = torch.cat([r.pixels for r in same]), torch.cat([r.patches for r in same])
            references.append(replace(same[0], pixels=pixels, patches=patches))
        texts = [one.prompts[0] for one in ones], [one.short_prompts[0] for one in ones]
        target = torch.cat([one.target for one in ones]).to(device)
        broken = list(chain(*[one.broken for one in ones]))
        return Batch(task, *texts, references, target, broken=broken)


def read_manifest(path, max_images):
    """The lines of a manifest as Entries. An InputError names the first wrong one."""
    try:
        lines = path.read_text("utf-8").split("\n")  # splitlines() would also cut inside JSON's strings
    except UNREADABLE as error:
        raise InputError(f"cannot read {path}: {error}") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entries.append(read_entry(json.loads(line), max_images))
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error.msg})") from error
            except InputError as error:
                raise InputError(f"{path}, line {number}: {error}") from error
            entries[-1].line = number
    return entries


def read_entry(given, max_images):
    """A manifest's line as an Entry, if it has what its task needs."""
    entry = Entry()
    override(entry, given, "")
    for name in ("task", "prompt", "target"):
        if name not in given:
            raise InputError(f"'{name}' is missing")
    check_known("task", [entry.task], TASKS)
    if not all(isinstance(image, str) for image in entry.images):
        raise InputError("'images' should be a list of paths")
    task = TASKS[entry.task]
    least, most = min(task.images), max_images if max(task.images) > 1 else max(task.images)
    if not least <= len(entry.images) <= most:
        raise InputError(f"'{entry.task}' takes {least} to {most} images, not {len(entry.images)}")
    if task.video != bool(entry.video):
        raise InputError(f"'{entry.task}' {'needs a' if task.video else 'takes no'} video")
    return entry


def one_line(error):
    return " ".join(str(error).split())


def read_clip(path, frames):  # -> uint8 [T, H, W, 3], T = 4k + 1 up to `frames`
    clip = list(islice(read_frames(path), frames))
    if len(clip) < 5:
        raise InputError(f"{path} has {len(clip)} frame(s), and the VAE needs at least 5")
    return np.stack(clip[: (len(clip) - 1) // 4 * 4 + 1])


def fit(frames, area, framed):
    """A target uint8 [T, H, W, 3] -> [T, 3, h, w], multiples of 16 with about `area` pixels: treated like a
    reference image if it has to lie on one (`framed`), else like a reference video."""
    if framed:
        return to_frames([letterbox(Image.fromarray(frame), area) for frame in frames])
    return fit_clip(frames, area)


# ----------------------------------------------------------------------------------------------------------
# 5. The loss (appendix B)
# ----------------------------------------------------------------------------------------------------------


KL = 3e-5  # weight of the posterior's distance to the normal distribution, against the squared error


def draw_noise(keys, shape):
    """Uniform times [B] and noise [B, *shape]: for each sample from a generator of its own."""
    times, noises, generator = torch.empty(len(keys)), torch.empty(len(keys), *shape), torch.Generator()
    for key, u, noise in zip(keys, times, noises):
        generator.manual_seed(chance(*key, "noise").getrandbits(63))
        u.uniform_(generator=generator)
        noise.normal_(generator=generator)
    return times, noises


class NativeText(nn.Module):
    """The text encoder that the tiny text-to-video model is born with: a table of words and one of places. It
    is thrown away after stage 0, so that stage 1 has to align the VLM with the model (2.3)."""

    def __init__(self, config, tokenizer, length=256):
        super().__init__()
        self.tokenizer, self.start = tokenizer, tokenizer.token_to_id("<|im_start|>")
        self.words = nn.Embedding(config.text.vocab_size, config.mmdit.text_embed_dim)
        self.places = nn.Embedding(length, config.mmdit.text_embed_dim)

    def forward(self, prompts):
        """B texts -> Condition."""
        ids = [[self.start, *encoding.ids] for encoding in self.tokenizer.encode_batch(prompts)]
        lengths, device = torch.tensor([len(row) for row in ids]), self.words.weight.device
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True).to(device)
        places = torch.arange(ids.shape[1], device=device)
        return Condition(self.words(ids) + self.places(places), places < lengths.to(device)[:, None], [], [])


class Objective(nn.Module):
    """From a batch to its losses. DDP or FSDP wraps this module: only inside it are sharded weights whole."""

    def __init__(self, vino, name, shift):
        super().__init__()
        self.vino, self.name, self.shift = vino, name, shift
        self.autocast = None  # bfloat16 over float32 weights, where FSDP does not see to it
        if name == "0-mmdit":
            self.native_text = NativeText(vino.config, vino.mm_encoder.tokenizer)

    def forward(self, batch, picture=False):
        """The loss of each sample, [B]; or, to look at, what `picture` gives."""
        loss = {"0-vae": self.autoencoding, "0-vlm": self.captioning}.get(self.name, self.flow)
        with torch.autocast(batch.target.device.type, self.autocast, enabled=self.autocast is not None):
            return self.picture(batch) if picture else loss(batch)

    def autoencoding(self, batch):
        """The VAE's: squared error, and a little of the posterior's distance to the normal distribution."""
        vae = self.vino.vae
        mean, log_variance = (part.float() for part in vae.moments(batch.target))
        noise = draw_noise(batch.keys, mean.shape[1:])[1].to(mean.device)
        output = vae.decode((mean + noise * (log_variance / 2).exp()) * vae.config.scaling_factor)
        surplus = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
        return (output.float() - batch.target).square().flatten(1).mean(1) + KL * surplus.flatten(1).mean(1)

    def captioning(self, batch):
        """The VLM's: next-token cross-entropy of the answer."""
        vlm = self.vino.mm_encoder
        references = [EncodedReference(None, *vlm.look(r), r.grid, r.is_video) for r in batch.references]
        prompts, end = [], vlm.tokenizer.token_to_id("<|im_end|>")
        answers = [[*vlm.tokenizer.encode(text).ids, end] for text in batch.answers]
        for text, answer in zip(batch.prompts, answers):
            prompt = build_prompt(vlm.tokenizer, text, references, vlm.merge)
            prompts.append(replace(prompt, ids=prompt.ids + answer))
        most = max(map(len, answers))
        last = vlm.prefill(prompts, references, DynamicCache())[0][:, -most - 1 : -1]
        wanted = [[-100] * (most - len(answer)) + answer for answer in answers]  # -100: padding and prompt
        wanted = torch.tensor(wanted, device=last.device)
        losses = F.cross_entropy(vlm.mm_encoder.lm_head(last).mT.float(), wanted, reduction="none")
        return losses.sum(1) / (wanted >= 0).sum(1)

    def flow(self, batch):
        """Rectified flow on the target's tokens (appendix B)."""
        with torch.no_grad():
            data = self.vino.vae.encode(batch.target).float()  # the posterior's mean, [B, C, T, H, W]
        u, noise = (x.to(data.device) for x in draw_noise(batch.keys, data.shape[1:]))
        velocity = partial(self.vino.velocity, condition=self.condition(batch))
        return flow_loss(velocity, data, noise, u, self.shift)

    def condition(self, batch):
        if self.name == "0-mmdit":
            return self.native_text(batch.prompts)
        references = [self.vino.encode(reference) for reference in batch.references]
        # Reconstruction bypasses the VAE: the MMDiT has to find the image in what the VLM says.
        return self.vino.mm_encoder(batch.prompts, references, vae_branch=batch.task != "reconstruction")

    def picture(self, batch):
        """What the model makes of a batch, without guidance -> pixels [B, 3, T, H, W] and B texts."""
        vino, output, words = self.vino, batch.target, batch.prompts
        if self.name == "0-vae":
            output = vino.vae.decode(vino.vae.encode(batch.target))
        elif self.name == "0-vlm":
            references = [vino.encode(reference) for reference in batch.references]
            words = vino.mm_encoder.answer(batch.prompts, references)
        else:
            velocity = partial(vino.velocity, condition=self.condition(batch))
            shape = vino.vae.encode(batch.target).shape[1:]
            noise = draw_noise(batch.keys, shape)[1].to(batch.target.device)
            output = vino.vae.decode(sample(velocity, noise, PICTURE_STEPS, self.shift))
        return output.float(), words


# ----------------------------------------------------------------------------------------------------------
# 6. Memory, and many GPUs (3.1): gradient checkpointing, DDP, ZeRO-2, FSDP
# ----------------------------------------------------------------------------------------------------------


KERNELS = [  # of attention
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
]


# Tokens. At full size all that the blocks compute for so few takes 36 GiB; what is kept of 35,600 takes 24.
SHORT = 4096


def checkpointed(block, *inputs):
    """A block's forward that keeps its inputs and what its attention gives, and computes all else again for
    the backward. Attention is most of a long sequence's work, and its result little of the memory. Of `SHORT`
    sequences all is kept."""
    forward = partial(type(block).forward, block)
    if inputs[0].shape[:2].numel() < SHORT:
        return forward(*inputs)
    keep = partial(create_selective_checkpoint_contexts, KERNELS)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=keep)


def compiled(forward):
    """torch.compile, once for all lengths, and with right gradients: at batch 1 and over thousands of tokens
    torch 2.10 to 2.13 lose those of `Modulation`'s chunks (pytorch issue 193061; 2.8 lacks the option)."""
    # It warns of operations in place in what is checkpointed; the blocks have none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    # All blocks share one function's graphs: of both kinds, for short, long and longest sequences, with masks
    # and without, with gradients and without. After eight of them torch would go on without compiling.
    torch._dynamo.config.recompile_limit = 64
    wrong = "triton.mix_order_reduction"
    options = {wrong: False} if wrong in torch._inductor.list_options() else {}
    return torch.compile(forward, dynamic=True, options=options)


def rank():
    return int(os.environ.get("RANK", 0))  # torchrun sets it


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def to_masters(module):
    """float32 for what trains. What is frozen stays in the type that it computes in."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def distribute(objective, how, dtype):
    """The module to call in training. how: "ddp"; "zero2", the paper's, where weights stay whole from forward
    to backward, and gradients, averages and AdamW's state are sharded; or "fsdp", where weights are gathered
    anew for the backward."""
    if how == "ddp" or not dist.is_initialized():
        objective.autocast = None if dtype == torch.float32 else dtype
        to_masters(objective)
        # A task without references leaves one connector unused.
        options = {"broadcast_buffers": False, "find_unused_parameters": True}
        return DistributedDataParallel(objective, **options) if world() > 1 else objective
    mesh = init_device_mesh(next(objective.parameters()).device.type, (world(),))
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {"mesh": mesh, "mp_policy": mixed, "reshard_after_forward": how == "fsdp"}
    for block in objective.vino.transformer.blocks():
        to_masters(block)  # one by one: all of them in float32 at once need not fit
        fully_shard(block, **options)
    to_masters(objective)
    unsharded = {*objective.vino.mm_encoder.mm_encoder.parameters(), *objective.vino.vae.parameters()}
    unsharded |= {parameter for parameter in objective.parameters() if parameter.numel() == 0}
    return fully_shard(objective, **options, ignored_params=unsharded)


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
# 7. Watching
# ----------------------------------------------------------------------------------------------------------

VALIDATION = 4  # fixed samples of each task, with fixed noise
PICTURE_STEPS = 20


def panels(pixels):
    """[3, T, H, W] in [-1, 1] -> PIL images of the first, the middle and the last frame."""
    frames = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
    return [Image.fromarray(frames[t]) for t in sorted({0, len(frames) // 2, len(frames) - 1})]


def contact_sheet(rows, room=20):
    """A picture of rows (label, groups of PIL images), with some room on the right for long labels."""
    tall = max(image.height for _, groups in rows for group in groups for image in group) + 18
    wide = max(sum(image.width + 6 for group in groups for image in group) for _, groups in rows) + room
    sheet = Image.new("RGB", (wide, tall * len(rows)), "lightsteelblue")  # no background of the toy world
    for row, (label, groups) in enumerate(rows):
        ImageDraw.Draw(sheet).text((2, row * tall + 2), label[: wide // 5], fill="black")
        left = 0
        for group in groups:
            for image in group:
                sheet.paste(image, (left, row * tall + 16))
                left += image.width + 2
            left += 4
    return sheet


def chart(runs, name, title, width=900, height=400):
    """A picture of one number of runs {label: records}: running means over a fiftieth of each, log scale."""
    picture, curves = Image.new("RGB", (width, height), "white"), {}
    draw, last = ImageDraw.Draw(picture), max(records[-1]["step"] for records in runs.values())
    for label, records in runs.items():
        window = math.ceil(len(records) / 50)
        logs = np.log10([max(record[name], 1e-6) for record in records])
        steps = np.array([record["step"] for record in records[window - 1 :]])
        curves[label] = steps, np.convolve(logs, np.ones(window) / window, "valid")
    low = min(means.min() for _, means in curves.values()) - 0.02
    high = max(means.max() for _, means in curves.values()) + 0.02

    def points(steps, values):
        return [*zip(60 + steps / last * (width - 70), (high - values) / (high - low) * (height - 40) + 10)]

    for tick in np.linspace(low, high, 6):
        left, right = points(np.array([0, last]), np.array([tick, tick]))
        draw.line([left, right], fill="lightgray")
        draw.text((5, left[1] - 6), f"{10**tick:.3g}", fill="black")
    draw.text((60, height - 18), f"{title}, step 1 to {last}", fill="black")
    for number, (label, curve) in enumerate(curves.items()):
        color = f"hsl({number * 360 // len(runs)}, 80%, 40%)"
        draw.line(points(*curve), fill=color, width=2)
        draw.text((width - 110, 12 + 14 * number), label, fill=color)
    return picture


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
            told = f"{np.mean(losses):.4f} | {np.mean(norms):.3f} | {np.var(norms):.4f}"
            lines.append(f"| {label} | {task} | {told} |")
    return "\n".join(lines)


def generate(vino, batch, **settings):
    """What the model makes of a Batch, with guidance -> pixels [B, 3, T, H, W]. Prompts of text alone are
    expanded first, if the config says so."""
    images = [reference for reference in batch.references if not reference.is_video]
    size, base, prompts = tuple(batch.target.shape[2:]), batch.task == "ti2i_ref", batch.prompts
    if vino.config.sampling.rewrite and not batch.references:
        prompts = vino.mm_encoder.rewrite(prompts)
    videos = batch.references[len(images) :]
    return vino.generate(prompts, images, *videos, size=size, base=base, **settings)


def gallery(columns, path, tasks=(), device="cpu"):
    """A picture at `path`: for a held-out sample of each task its references and its target, and what models
    make of it. columns: (weights, settings of Vino.generate) of each. tasks: by default stage 3's; one that
    is named twice gets two samples."""
    models = [(Vino.load(weights, device=device), settings) for weights, settings in columns]
    config, rows = models[0][0].config, []
    stage = make_stage("3", config, {})
    toys = ToyWorld(stage, config, seed=6)
    for number, task in enumerate(tqdm(tasks or stage.mixture, unit="row")):
        batch = toys.collate(task, [toys.draw(task, 1, 1 + number)], torch.device(device))
        if task in ("t2i", "t2v", "i2v"):
            batch.prompts = batch.short_prompts
        outputs = [generate(model, batch, **settings) for model, settings in models]
        shown = [*[reference.pixels for reference in batch.references], batch.target, *outputs]
        rows.append((f"{task}: {batch.prompts[0]}", [panels(pixels[0]) for pixels in shown]))
    contact_sheet(rows).save(path)


def read_metrics(folder):
    """A run's records; a last line that was cut short does not count."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_losses(folder):
    """Those of its training steps, but for the skipped ones."""
    return [record for record in read_metrics(folder) if record.get("loss") is not None]


def peak_memory(device):
    """MiB so far at the most: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def say(*lines, file=None):
    """Print to stderr, or to `file`, above a progress bar: only the first process."""
    if rank() == 0:
        with tqdm.external_write_mode():
            print(*lines, sep="\n", file=file or sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------
# 8. The loop, its checkpoints, and the command line
# ----------------------------------------------------------------------------------------------------------


class Trainer:
    """A run of one stage, with all of its state."""

    def __init__(self, args):
        for name, given in (("--data", args.data), ("--shard", args.shard != "ddp")):
            # A manifest has no answers for the VLM to learn, and `distribute` does not shard VLM and VAE.
            if args.stage.startswith("0-") and given:
                raise InputError(f"stage 0 takes no {name}: it trains small models in the toy world")
        self.args, self.out = args, Path(args.out or f"runs/stage{args.stage}")
        self.device, self.dtype = start_device(args.dtype)
        found = complete_checkpoints(self.out / "checkpoints")[-1:]
        if found and not args.resume:
            raise InputError(f"{self.out} holds a run: continue it with --resume, or choose another --out")
        saved = read_json(found[0] / "state.json") if found else {}
        self.weights = str(args.weights or saved.get("weights") or default_weights(args.stage, self.out))
        self.vino = build(args, self.weights, self.device, self.dtype)
        self.stage = make_stage(args.stage, self.vino.config, vars(args))
        given = self.stage, self.vino.config, f"{args.seed} {args.stage}"
        self.source = Manifest(args.data, *given) if args.data else ToyWorld(*given)
        self.tasks = self.source.tasks
        if not self.tasks:
            names = ", ".join(self.stage.mixture)
            raise InputError(f"{args.data} has no sample of stage {args.stage}'s tasks ({names})")
        self.set_up()
        self.step, self.failed, self.broken, self.signal = 0, 0, {}, 0  # broken: {line: problem} in --data
        self.drawn = dict.fromkeys(self.tasks, 0)  # for each task: samples used
        if found:
            self.restore(found[0], saved)
        self.streams = {task: self.stream(task) for task in self.tasks}
        run = f"stage {args.stage} on {world()} x {self.device.type}: {', '.join(self.tasks)}"
        say(f"{run}; from {found[0] if found else self.weights}")
        if args.resume and not found:
            say(f"--resume: {self.out} has no checkpoint, so this run begins anew")
        if self.stage.warmup + self.stage.cooldown > self.stage.steps:
            say(f"the learning rate stays below {self.stage.lr}: warmup and cooldown are longer than the run")

    def set_up(self):
        """The module to train, its parameters by name, AdamW, and the averaged weights."""
        args, stage = self.args, self.stage
        for block in self.vino.transformer.blocks():
            if stage.checkpointing:  # inside what is compiled: around it attention would be computed again
                block.forward = MethodType(checkpointed, block)
            if args.compile:
                block.forward = compiled(block.forward)
        self.objective = Objective(self.vino, args.stage, stage.shift).to(self.device)
        prefixes = tuple(MODULES[name] for name in stage.trainable)
        for name, p in self.named_parameters():  # table 1's last row; the ablated queries are empty
            unused = name.startswith("transformer." + MMDiT.UNUSED) or p.numel() == 0
            p.requires_grad_(name.startswith(prefixes) and not unused)
        if not any(p.requires_grad for p in self.objective.parameters()):
            raise InputError(f"field 'trainable': there is nothing to train in {stage.trainable}")
        self.model = distribute(self.objective, args.shard, self.dtype)
        self.parameters = {name: p for name, p in self.named_parameters() if p.requires_grad}
        rule = {"lr": stage.lr, "betas": stage.betas, "weight_decay": stage.weight_decay, "fused": True}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), **rule)
        for p in self.parameters.values():  # from the start, so that a checkpoint can be read into it
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        to_host = args.ema_on_host and self.device.type == "cuda"
        self.ema, self.ema_streams = {}, [torch.cuda.Stream() for _ in range(3)] if to_host else []
        for name, p in self.parameters.items() if stage.ema else ():
            self.ema[name] = p.detach().cpu() if to_host else p.detach().clone()
            if to_host:  # pinned, so that copies keep nobody waiting; torch takes up to half as much again
                with torch.no_grad():  # so that `local` gives the tensor, not a view of it
                    own = local(self.ema[name])
                own.data = own.data.pin_memory()

    def named_parameters(self):
        """Of the model, under its own names, and of the native text encoder."""
        return [(name.removeprefix("vino."), p) for name, p in self.objective.named_parameters()]

    def train(self):
        """All steps that are left, then the export. Returns the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        if rank() == 0:  # drop what came after the checkpoint
            self.out.mkdir(parents=True, exist_ok=True)
            records = [r for r in read_metrics(self.out) if r["step"] <= self.step]
            partial = self.out / "metrics.partial"
            partial.write_text("".join(f"{json.dumps(record)}\n" for record in records))
            partial.replace(self.out / "metrics.jsonl")
        with tqdm(total=self.stage.steps, initial=self.step, unit="step", disable=rank() > 0) as bar:
            while self.step < self.stage.steps:
                stop = self.one_step(bar)
                last = self.step == self.stage.steps
                if last or self.step % self.args.validate_every == 0:
                    self.validate()  # before the checkpoint, so that a resumed run lacks none
                if last or stop or self.step % self.args.save_every == 0:
                    self.save()
                if self.failed >= 10:
                    advice = "stopped after a checkpoint; try a lower --lr, or --dtype float32"
                    raise InputError(f"step {self.step}: not finite for the tenth time in a row; {advice}")
                if stop:
                    say(f"stopped by a signal after step {self.step}; continue with --resume")
                    return 128 + self.signal
        self.export()
        [signals] = sums(self.signal)  # nobody goes on before the file is there: stage 0's next part reads it
        return 128 + self.signal if signals else 0

    def one_step(self, bar):
        """One step, of one task in all processes (appendix B). True if the run has to stop."""
        begin, self.step = time.perf_counter(), self.step + 1
        task, loss, broken = self.draw_task(), 0.0, []
        for micro in range(self.args.accumulate):
            batch = self.next_batch(task, micro)
            part = self.model(batch).mean() / self.args.accumulate
            part.backward()  # DDP and FSDP average over the processes
            loss, broken = loss + part.detach(), broken + batch.broken
        samples = self.stage.batch * self.args.accumulate * world()
        self.drawn[task] += samples
        norm = self.clip_gradients()
        loss, signals, unreadable = sums(float(loss) / world(), self.signal, len(broken))
        finite = math.isfinite(loss) and math.isfinite(norm)
        lr = self.learning_rate()
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.finish_ema()
            self.optimizer.step()
            self.update_ema()
        self.optimizer.zero_grad()
        self.failed = 0 if finite else self.failed + 1
        if unreadable:
            self.report(broken)
        seconds, mib = time.perf_counter() - begin, peak_memory(self.device)
        record = {"step": self.step, "task": task, "skipped": not finite, "lr": lr}
        record |= {"loss": loss, "grad_norm": norm} if finite else {"loss": None, "grad_norm": None}
        self.log(record | {"samples": samples, "seconds": seconds, "peak_mib": mib})
        speed = f"{samples / seconds:.1f} samples/s, {mib / 1024:.1f} GiB"
        bar.set_postfix_str(f"{task} loss {loss:.4f}, |g| {norm:.2f}, {speed}" + ", skipped" * (not finite))
        bar.update()
        return signals > 0 or self.failed >= 10

    def learning_rate(self):
        stage = self.stage
        left = stage.steps - self.step + 1
        return stage.lr * min(1, self.step / max(1, stage.warmup), left / max(1, stage.cooldown))

    def draw_task(self):
        """The step's task: all processes draw the same one, so that they do equal work (appendix B)."""
        shares = [self.stage.mixture[task] for task in self.tasks]
        return chance(self.args.seed, self.step, "task").choices(self.tasks, shares)[0]

    def stream(self, task):
        """A task's samples that have not been used."""
        start = math.ceil(self.drawn[task] / self.stage.batch) * self.stage.batch  # if its size has changed
        return self.source.loader(task, start, self.args.accumulate, self.args.workers)

    def next_batch(self, task, micro):
        """This process's next Batch of a task, with its conditions dropped."""
        seed, size = self.args.seed, self.stage.batch
        try:
            samples = next(self.streams[task])
        except InputError as error:  # a loader's process puts its traceback around the message
            raise InputError(str(error).strip().splitlines()[-1].split("InputError: ")[-1]) from error
        batch = self.source.collate(task, samples, self.device)
        first = (micro * world() + rank()) * size
        batch.keys = [(seed, self.step, number) for number in range(first, first + size)]
        return drop_conditions(batch, seed, self.step, self.stage)

    def close(self):
        """End the loaders' processes, which hold NCCL's connections open."""
        self.streams.clear()

    def clip_gradients(self):
        """Clip the gradient's norm, and return it. What a task does not use gets a gradient of zero, so that
        AdamW treats all parameters alike in every step, as it does with ZeRO's flat buffers."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        most = self.stage.clip or math.inf
        return whole(nn.utils.clip_grad_norm_(self.parameters.values(), most)).item()

    @torch.no_grad()
    def update_ema(self):
        """Averages in the host's memory visit the GPU while it computes the next step: on three streams, so
        that one comes while another one goes. On two, all weights take one and all biases the other."""
        pairs = [(local(average), local(self.parameters[name])) for name, average in self.ema.items()]
        if pairs and not self.ema_streams:
            torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - self.stage.ema)
            return
        for stream in self.ema_streams:
            stream.wait_stream(torch.cuda.current_stream())  # until AdamW is done
        for (average, parameter), stream in zip(pairs, cycle(self.ema_streams)):
            with torch.cuda.stream(stream):
                visitor = average.to(self.device, non_blocking=True)
                average.copy_(visitor.lerp_(parameter, 1 - self.stage.ema), non_blocking=True)

    def finish_ema(self):
        for stream in self.ema_streams:
            stream.synchronize()

    def report(self, broken):
        """Name unreadable samples, once each. More than 1% of them end the run."""
        everyones = [broken] * world()
        if dist.is_initialized():
            dist.all_gather_object(everyones, broken)
        for line, problem in chain(*everyones):
            if line not in self.broken:
                self.broken[line] = problem
                say(f"{self.args.data}, line {line}: skipped: {problem}")
        if len(self.broken) > self.source.count / 100:
            share = f"{len(self.broken)} of {self.source.count} samples cannot be read"
            raise InputError(f"{self.args.data}: {share}, more than 1%; the last is line {line}: {problem}")

    def tensors(self):
        """All that has been learned: weights, their averages, AdamW's moments."""
        self.finish_ema()
        weights = {name: p.detach() for name, p in self.parameters.items()}
        optimizer = {name: self.optimizer.state[p] for name, p in self.parameters.items()}
        return {"weights": weights, "ema": self.ema, "optimizer": optimizer}

    def identity(self):
        """What a checkpoint has in common with the run that continues it."""
        config = asdict(self.vino.config)
        parts = ("text", "vision", "mmdit", "vae", "num_queries", "boundary_tokens")
        own = {"stage": self.args.stage, "seed": self.args.seed, "data": self.args.data}
        own |= {"trainable": self.stage.trainable, "has_ema": self.stage.ema > 0}
        return own | {name: config[name] for name in parts}

    def save(self):
        """Write a checkpoint, which gets its name when it is complete, and remove all but the newest."""
        folder, state = self.out / "checkpoints", {"step": self.step, "drawn": self.drawn}
        state |= {"broken": self.broken, "weights": self.weights}
        state |= {"identity": self.identity(), "stage": asdict(self.stage)}
        final = folder / f"step_{self.step:08d}"
        partial = final.with_suffix(".partial")
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        sums(0)  # all processes wait here for the first
        try:
            partial.mkdir(parents=True, exist_ok=True)
            (partial / "state.json").write_text(json.dumps(state, indent=1))
            dcp.save(self.tensors(), checkpoint_id=partial, no_dist=not dist.is_initialized())
        except (OSError, RuntimeError, CheckpointException) as error:
            shutil.rmtree(partial, ignore_errors=True)
            free, reason = shutil.disk_usage(self.out).free >> 20, one_line(error)[-200:]
            raise InputError(f"cannot write {final} ({free} MiB free): {reason}; older ones stay") from error
        if rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in complete_checkpoints(folder)[: -self.args.keep]:
                shutil.rmtree(old)

    def restore(self, path, saved):
        """Continue from a checkpoint, written by any number of processes."""
        for name, value in self.identity().items():
            agree(value, saved["identity"][name], name, path)
        for name, value in asdict(self.stage).items():
            if value != saved["stage"][name]:
                say(f"going on with {name} {value}; until here it was {saved['stage'][name]}")
        try:
            dcp.load(self.tensors(), checkpoint_id=path, no_dist=not dist.is_initialized())  # in place
        except (OSError, EOFError, RuntimeError, CheckpointException) as error:
            advice = "if it is damaged, remove it, and --resume takes the one before"
            raise InputError(f"cannot read {path}: {one_line(error)[-200:]}; {advice}") from error
        self.step, self.drawn = saved["step"], self.drawn | saved["drawn"]
        self.broken = {int(line): problem for line, problem in saved["broken"].items()}

    @torch.no_grad()
    def validate(self):
        """Loss of each task on fixed samples with fixed noise, and a picture: inputs, target, output."""
        losses, rows = {}, []
        for task in tqdm(self.tasks, desc="validating", unit="task", leave=False, disable=rank() > 0):
            parts = []
            for number in range(VALIDATION):
                fixed = [self.source.draw(task, -1 - number, -1 - number)]
                batch = self.source.collate(task, fixed, self.device)
                batch.keys = [("validation", task, number)]
                if batch.broken:
                    self.report(batch.broken)
                parts.append(self.objective(batch).item())
                if number == 0:
                    output, words = self.objective(batch, picture=True)
                    shown = [*[r.pixels for r in batch.references], batch.target, output]
                    rows.append((f"{task}: {words[0]}", [panels(pixels[0]) for pixels in shown]))
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
        if self.args.stage == "0-vae":  # rectified flow wants latents as wide as its noise
            self.vino.config.vae.scaling_factor /= self.latent_std()
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
            tasks = defaultdict(list)
            for record in read_losses(self.out):
                tasks[record["task"]].append(record)
            if tasks:
                chart(dict(sorted(tasks.items())), "loss", "loss").save(self.out / "loss.png")
        say(f"wrote {path}: python sample.py --weights {path}")

    @torch.no_grad()
    def latent_std(self):
        """Standard deviation of the latents of held-out samples."""
        latents = []
        for task in self.tasks:
            drawn = [self.source.draw(task, 0, -1 - number) for number in range(64)]
            target = self.source.collate(task, drawn, self.device).target
            latents.append(self.vino.vae.encode(target).float().flatten())
        return torch.cat(latents).std().item()

    def on_signal(self, number, frame):
        """Finish the step, save and stop. A second signal does what it always does."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)


def complete_checkpoints(folder):
    """Oldest first. A save that was cut short has another name."""
    return sorted(folder.glob("step_????????"))


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
    """The export of the stage before, beside `out`, else the tiny weights; the first stage starts anew."""
    if stage == "0-vae":
        return "random"
    before = [*STAGES][[*STAGES].index(stage) - 1]
    export = out.parent / f"stage{before}" / "final.safetensors"
    return export if export.exists() else TINY


def build(args, weights, device, dtype):
    """The model that the run starts from. The ablations (3.4) take away what its weights may have."""
    path = args.config or (HERE / "tiny_config.json" if weights == "random" else None)
    vino = Vino.load(weights, read_config(path, weights) if path else None, device, dtype)
    if args.stage.startswith("0-") and weights == "random":
        vino.mm_encoder.tokenizer = toy_tokenizer()
        quieten(vino)
    if args.no_queries:
        vino.config.num_queries = 0
        vino.mm_encoder.metaquery = nn.Parameter(vino.mm_encoder.metaquery[:0].detach().clone())
    if args.no_boundary_tokens:
        vino.config.boundary_tokens = vino.mm_encoder.boundary_tokens = False
    return vino


@torch.no_grad()
def quieten(vino):
    """Residual branches add nothing at first: their last matrix or their gate is zero. So is the velocity."""
    ends = ("conv2.conv", "attentions.0.to_out.0", "o_proj", "down_proj", "attn.proj", "mlp.linear_fc2")
    for name, module in vino.named_modules():
        if name.endswith((*ends, "transformer.proj_out")) or isinstance(module, Modulation):
            for parameter in module.parameters():
                parameter.zero_()


def bounded(kind, least, most):
    """An argument's type: an int or a float from `least` to `most`."""

    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} ({least} to {most})"  # argparse reports "invalid {__name__} value"
    return parse


def parse_arguments(arguments):
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser("train.py", "train.py --stage STAGE [options]", about)
    add, flag = parser.add_argument, {"action": "store_true"}
    stages = "column of table 1; 0 makes the tiny model that the others start from, in the three steps 0-..."
    add("--stage", required=True, choices=["0", *STAGES], help=stages)
    start = "a .safetensors, a folder of public weights, 'hub' or 'random'"
    add("--weights", help=f"{start}; by default the export of the stage before, else assets/tiny.safetensors")
    add("--config", help="JSON with the fields of the weights' Config to change")
    add("--data", help="JSON lines, one sample a line; by default the toy world")
    add("--out", help="folder for all output; by default runs/stageN")
    add("--resume", **flag, help="continue from the newest complete checkpoint in --out")
    add("--seed", type=int, default=0)
    shards = "under torchrun: copies of everything; gradients and AdamW sharded (the paper's); weights too"
    add("--shard", choices=["ddp", "zero2", "fsdp"], default="ddp", help=shards)
    add("--dtype", choices=["bfloat16", "float32"], help="to compute in; by default bfloat16 on a GPU")
    positive = bounded(int, 1, 10**9)
    add("--accumulate", type=positive, default=1, help="batches of a process in a step")
    add("--ema-on-host", **flag, help="keep the averaged weights in the host's memory")
    add("--compile", **flag, help="torch.compile the MMDiT's blocks")
    workers = int(torch.cuda.is_available())
    loaders = "loader processes of each task (default: %(default)s)"
    add("--workers", type=bounded(int, 0, 1000), default=workers, help=loaders)
    add("--save-every", type=positive, default=500, help="steps between checkpoints (default: %(default)s)")
    add("--keep", type=positive, default=3, help="checkpoints to keep (default: %(default)s)")
    pictures = "steps between validations, with their pictures (default: %(default)s)"
    add("--validate-every", type=positive, default=500, help=pictures)
    add("--no-queries", **flag, help="ablation: no learnable tokens (figure 8)")
    add("--no-boundary-tokens", **flag, help="ablation: no tokens between latents (figure 11)")
    table = parser.add_argument_group("table 1", "changes to the stage's column")
    for f in fields(Stage):
        if f.type in (int, float):
            table.add_argument("--" + f.name.replace("_", "-"), type=f.type, metavar="X")
    table.add_argument("--betas", type=float, nargs=2, metavar="X")
    table.add_argument("--checkpointing", action=argparse.BooleanOptionalAction)
    return parser.parse_args(arguments)


def parts(args):
    """The runs that the command asks for: one, or stage 0's three, each from what the one before has made."""
    if args.stage == "0":
        folder, weights = Path(args.out or "runs/stage0"), args.weights
        for name in [*STAGES][:3]:
            args.stage, args.out = name, f"{folder}{name[1:]}"
            args.weights, weights = weights, f"{args.out}/final.safetensors"
            yield args
    else:
        yield args


def main(arguments=None):
    """Run the command line `arguments` -> exit status."""
    args = parse_arguments(arguments)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process needs none
    try:
        for args in parts(args):
            with closing(Trainer(args)) as trainer:
                status = trainer.train()
            if status:
                break
    except (InputError, OSError) as error:  # OSError: a full disk, at any file but a checkpoint's
        advice = "" if isinstance(error, InputError) else "; older checkpoints stay: continue with --resume"
        print(f"train.py: {error}{advice}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
