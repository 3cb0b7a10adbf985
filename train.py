"""Train VINO as the paper does: three stages, all tasks in one model, on one CPU or on many GPUs.

python train.py --stage 3                                     tiny model, toy world, this machine
torchrun --nproc-per-node 8 train.py --stage 3 --weights FOLDER --data samples.jsonl

1. Tasks              figure 6, appendix B: what is learned when
2. Table 1            hyperparameters of the three stages
3. Samples            3.1, appendix B: condition dropout; a local batch of 1; files
4. The loss           appendix B
5. Memory, many GPUs  3.1: gradient checkpointing, ZeRO-2, averaged weights
6. The loop
7. Checkpoints        and the export: averaged weights (EMA), which the next stage starts from
8. Validation         losses and a picture
9. The command line
"""

import argparse
import gc
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from types import MethodType

# Before torch starts: idle threads then sleep instead of spinning, which is much faster on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm

from vino import (
    InputError, MMDiT, Reference, Vino, agree, compiled, crop16, existing, flow_loss, letterbox, normalize,
    open_safetensors, override, read_config, read_frames, read_image, read_json, read_video, reading, sample,
    scaled_size, to_frames,
)  # fmt: skip

HERE = Path(__file__).parent
TINY = HERE / "assets" / "tiny.safetensors"
RANK = int(os.environ.get("RANK", 0))  # torchrun sets these two
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def say(text):
    """Print to stderr, above a progress bar: only the first process."""
    if RANK == 0:
        tqdm.write(text, file=sys.stderr)


def one_line(error):
    return " ".join(str(error).split())[-200:]


# --- 1. Tasks, and how often each stage draws them (figure 6, appendix B) -----------------------------------


@dataclass
class Task:
    """What goes in and what comes out."""

    images: tuple  # how many reference images; where it can be several, a manifest may have more
    video: bool = False  # is there a reference video?
    clip: bool = False  # is the target a clip?
    framed: bool = False  # is the target aligned with the last image, pixel for pixel?


TASKS = {
    "t2i": Task((0,)),
    "t2v": Task((0,), clip=True),
    "i2v": Task((1,), clip=True, framed=True),
    "ti2i": Task((1,), framed=True),  # an edit of the image
    "ti2i_ref": Task((2, 3), framed=True),  # of the last image, guided by the others
    "ti2v": Task((1, 2, 3), clip=True),  # a clip of what the images show
    "tv2v": Task((0,), video=True, clip=True),  # an edit of the video
    "tiv2v": Task((1,), video=True, clip=True),  # an edit of the video, guided by the image
    "motion": Task((1,), video=True, clip=True),  # the image's object moves as in the video
    # Proxy tasks (appendix B): reproduce the image, which only the VLM sees; reproduce image i of k.
    "reconstruction": Task((1,), framed=True),
    "selection": Task((2, 3), framed=True),
}
MIXTURES = {  # figure 6 shows the paper's shares as a drawing only; stage 1's tasks are figure 8's
    "1": {"t2i": 0.35, "t2v": 0.35, "i2v": 0.1, "reconstruction": 0.2},
    "2": {"t2i": 0.4, "t2v": 0.4, "selection": 0.2},
    "3": {"t2i": 0.05, "t2v": 0.05, "i2v": 0.1, "motion": 0.05, "ti2i": 0.2, "ti2i_ref": 0.15, "ti2v": 0.15,
          "tv2v": 0.15, "tiv2v": 0.1},
}  # fmt: skip


# --- 2. Table 1 ---------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """A column of table 1, then what the paper does not quantify. A config's "training" section and the
    command line can change any of it."""

    lr: float  # constant, but for `warmup` and `cooldown`
    beta1: float  # of AdamW
    beta2: float
    steps: int
    ema: float  # decay; 0 is none
    area: int  # height * width of a frame
    shift: float  # of the timesteps
    trainable: list  # prefixes of the parameters' names
    mixture: dict  # task: share
    weight_decay: float = 0.01
    clip: float = 1.0  # the gradient's norm; 0 is none
    drop: float = 0.1  # probability of dropping text, images, video, each independently (appendix B)
    batch: int = 1  # samples per process: "a local batch size of 1" (3.1)
    checkpointing: bool = True  # of the MMDiT's blocks (3.1)
    # In the paper, but without numbers:
    short: float = 0.5  # share of prompts in their short form (2.3)
    sync_drop_images: int = 2  # with more images than this all processes share one choice (appendix B)
    latent_frames: int = 30  # how many fit with a local batch of 1, references included (3.1)
    # Not in the paper:
    warmup: int = 0  # steps in which the learning rate rises from 0
    cooldown: int = 0  # steps at the end in which it falls to 0
    encode_once: int = 0  # toy world on a GPU: distinct samples of a layout, encoded once each; 0: no end


ALIGN = ["mm_encoder.connector", "mm_encoder.metaquery"]  # connectors and learnable tokens
ALL = [*ALIGN, "transformer."]  # and the MMDiT
STAGES = {
    "1": Stage(1e-4, 0.9, 0.99, 20_000, 0.0, 320**2, 3.0, ALIGN, MIXTURES["1"], short=0.0),
    "2": Stage(4e-5, 0.9, 0.95, 4_000, 0.9999, 640**2, 5.0, ALL, MIXTURES["2"]),
    "3": Stage(2e-5, 0.9, 0.95, 16_000, 0.9999, 640**2, 5.0, ALL, MIXTURES["3"]),
}
LEAST = {"latent_frames": 5, "area": 256, "shift": 0.01}  # of numbers that may not be as small as 0
LEAST |= dict.fromkeys(("steps", "batch", "accumulate", "save_every", "keep"), 1)
MOST = {"short": 1, "drop": 1, "ema": 1, "beta1": 0.9999, "beta2": 0.9999}


def make_stage(number, config, arguments, stages=STAGES):
    """A column of table 1, changed by the config's "training" section, then by the command line's arguments.
    An InputError names the first field that makes no sense."""
    check_known("config field", [f"training.{n}" for n in config.training], [f"training.{n}" for n in STAGES])
    stage, changes = replace(stages[number]), config.training.get(number, {})
    override(stage, changes, f"training.{number}.")
    check_known("task", changes.get("mixture", ()), TASKS)
    steps = arguments.get("steps") or stage.steps
    if steps < stage.steps:  # a shorter run warms up, cools down and averages over fewer steps
        stage.warmup = min(stage.warmup, steps // 10)
        stage.cooldown = min(stage.cooldown, steps // 4)
        stage.ema = stage.ema and max(0.5, 1 - (1 - stage.ema) * stage.steps / steps)
    given = {name: value for name, value in arguments.items() if hasattr(stage, name) and value is not None}
    stage = replace(stage, **given)
    if arguments.get("tasks"):
        check_known(f"task of stage {number}", arguments["tasks"], stage.mixture)
        stage.mixture = {task: share for task, share in stage.mixture.items() if task in arguments["tasks"]}
    settings = (arguments | asdict(stage)).items()
    numbers = {name: value for name, value in settings if isinstance(value, (int, float))} | stage.mixture
    for name, value in numbers.items():
        least, most = LEAST.get(name, 0), MOST.get(name, math.inf)
        finite = isinstance(value, (int, float)) and math.isfinite(value)
        if not finite or not least <= value <= most:
            limit = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise InputError(f"'{name}' should be {limit}")
    return stage


def check_known(what, names, known):
    for name in names:
        if name not in [*known]:  # a list: what stands in a JSON file need not be hashable
            raise InputError(f"unknown {what} '{name}'; known: {', '.join(known)}")


def learning_rate(stage, step):
    """Table 1's constant rate, with our rise at the beginning and fall at the end."""
    left = stage.steps - step + 1
    return stage.lr * min(1, step / max(1, stage.warmup), left / max(1, stage.cooldown))


# --- 3. Samples: condition dropout (appendix B); what fits into a local batch of 1 (3.1); files -------------


@dataclass
class Batch:
    """Samples of one task and one layout."""

    task: str
    prompts: list
    short_prompts: list
    references: list  # References of batch size B: images, then the video
    target: Tensor  # [B, 3, T, H, W] in [-1, 1]
    answers: list = field(default_factory=list)  # the target in words; the toy world has them
    key: tuple = ()  # seed, step, and which local batch: what its noise and its dropout are drawn from
    latents: Tensor | None = None  # of the target, if known; the references are then EncodedReferences


def chance(*key):
    """A generator for one purpose, such as the noise of one local batch of one step: a run that is resumed,
    or spread over more processes, makes the same choices."""
    return random.Random(" ".join(map(str, key)))


def drop_conditions(batch, stage):
    """Choose long or short prompts, and drop conditions for classifier-free guidance, each on its own
    (appendix B). Text is chosen for each sample, the images and the video for each process's batch. In tasks
    of many images all processes share the step's choice, so that they do equal work."""
    images = TASKS[batch.task].images if batch.task in TASKS else ()  # stage 0 has tasks of its own
    key = batch.key[:2] if max(images, default=0) > stage.sync_drop_images else batch.key  # seed, step
    choice = chance(*key, "references")
    no_images = choice.random() < stage.drop
    no_video = choice.random() < stage.drop
    references = [r for r in batch.references if not (no_video if r.is_video else no_images)]
    choice, prompts = chance(*batch.key, "text"), []
    for long, short in zip(batch.prompts, batch.short_prompts):
        prompt = short if choice.random() < stage.short else long
        prompts.append("" if choice.random() < stage.drop else prompt)
    return replace(batch, prompts=prompts, references=references)


class Source:
    """What the toy world and a manifest share. `draw(task, position, index)` makes sample `index` of a task's
    endless stream for the step that begins at sample `position`; negative indices are for validation.
    `collate(task, samples, device)` makes a Batch of several."""

    def __init__(self, stage, config, seed):
        self.stage, self.config, self.seed = stage, config, seed
        self.tasks = [task for task, share in stage.mixture.items() if share]

    def images_that_fit(self, video):
        """Reference images that leave room for the shortest clip, of 2 latent frames."""
        return self.stage.latent_frames - (4 if video else 2)

    def frames_that_fit(self, images, video):
        """Frames of a target that leave room for its references: "we dynamically adjust the number of video
        frames and number of reference images" (3.1). Together they fill the stage's `latent_frames`; a
        reference video takes as many as the target."""
        most = (self.stage.latent_frames - images) // (2 if video else 1)
        return max(5, min(self.config.sampling.frames, 4 * (most - 1) + 1))


@dataclass
class Entry:
    """A line of a manifest; paths are relative to the manifest."""

    task: str = ""
    prompt: str = ""
    target: str = ""
    short_prompt: str = ""  # by default the prompt
    images: list = field(default_factory=list)
    video: str = ""
    line: int = 0  # its number


class Manifest(Source):
    """Samples from files: JSON lines, one sample a line, with the fields of Entry. Each sample keeps its own
    aspect ratio, at the stage's area; a local batch of 1 and --accumulate make steps of any size."""

    def __init__(self, path, stage, config, seed):
        super().__init__(stage, config, seed)
        self.path = existing(path)
        self.broken = set()  # lines
        self.all = {}  # task: entries
        for number, line in enumerate(self.path.read_bytes().split(b"\n"), 1):
            try:
                if line.strip():
                    entry = self.read_entry(number, line)
                    self.all.setdefault(entry.task, []).append(entry)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: {one_line(error)}") from error
        self.tasks = [task for task in self.tasks if task in self.all]
        self.training, self.validation = {}, {}  # the first ones are held out for validation
        for task in self.tasks:
            held_out = min(VALIDATION, math.ceil(len(self.all[task]) / 100), len(self.all[task]) - 1)
            self.training[task] = self.all[task][held_out:]
            self.validation[task] = self.all[task][:held_out] or self.all[task]  # of one sample: that one

    def read_entry(self, number, line):
        """A manifest's line as an Entry, if it has what its task needs."""
        given = json.loads(line)
        json.dumps(given, ensure_ascii=False).encode()  # fails where a string ends in half a character
        entry = Entry()
        override(entry, given, "")
        entry.line = number
        for name in ("task", "prompt", "target"):
            if name not in given:
                raise InputError(f"'{name}' is missing")
        check_known("task", [entry.task], TASKS)
        if not all(isinstance(image, str) for image in entry.images):
            raise InputError("'images' should be a list of paths")
        task = TASKS[entry.task]
        least, most = min(task.images), max(task.images)
        if most > 1:
            most = min(self.config.sampling.max_images, self.images_that_fit(task.video))
        if not least <= len(entry.images) <= most:
            raise InputError(f"'{entry.task}' takes {least} to {most} images, not {len(entry.images)}")
        if task.video != bool(entry.video):
            raise InputError(f"'{entry.task}' {'needs a' if task.video else 'takes no'} video")
        return entry

    @lru_cache(maxsize=32)  # an epoch's order serves all its draws
    def shuffled(self, task, epoch):
        own = self.training[task]
        return chance(self.seed, task, "epoch", epoch).sample(own, len(own))

    def draw(self, task, position, index):
        """A Batch of one. A sample that cannot be read is reported once and replaced by the next. If a
        process finds more than 1% of the samples unreadable, the run ends."""
        if index < 0:
            order, place = self.validation[task], -1 - index
        else:
            epoch, place = divmod(index, len(self.training[task]))
            order = self.shuffled(task, epoch)
        for offset in range(len(order)):
            entry = order[(place + offset) % len(order)]
            try:
                return self.load(entry)
            except (OSError, ValueError) as error:  # what Pillow and vino raise at a bad file
                problem = f"{self.path}, line {entry.line}: skipped: {one_line(error)}"
            if entry.line not in self.broken:
                tqdm.write(problem, file=sys.stderr)
                self.broken.add(entry.line)
            count = sum(map(len, self.all.values()))
            if len(self.broken) > count / 100:
                broken = f"{len(self.broken)} of {count} samples cannot be read, more than 1%"
                raise InputError(f"{problem}; {broken}")
        raise InputError(f"{self.path}: no sample of '{task}' can be read")

    def load(self, entry):
        """Decode a line -> Batch of one, at the stage's area and its own aspect ratio, with 4k + 1 frames."""
        area, vision, task, folder = self.stage.area, self.config.vision, TASKS[entry.task], self.path.parent
        references = [Reference.image(read_image(folder / path), area, vision) for path in entry.images]
        frames = self.frames_that_fit(len(references), task.video)
        target = read_target(folder / entry.target, frames if task.clip else 1, area, task.framed)
        if task.video:  # both its readers see as much of the video as the target is long
            video = read_video(folder / entry.video, frames, area, vision, length=target.shape[2])
            target = target[:, :, : video.pixels.shape[2]]
            references.append(video)
        return Batch(entry.task, [entry.prompt], [entry.short_prompt or entry.prompt], references, target)

    def collate(self, task, samples, device):
        """The Batch of the one sample, on the device."""
        [batch] = samples
        return replace(batch, target=batch.target.to(device))


def read_target(path, frames, area, framed):
    """A target [1, 3, T, H, W] with about `area` pixels: an image, or of a clip up to `frames` frames. It is
    treated like a reference image if it has to align with one (`framed`), else like a reference video."""
    if frames == 1:
        image = read_image(path)
        if framed:
            image = letterbox(image, area)
        else:
            h, w = scaled_size(path, *image.size, area)
            image = image.resize((w, h), Image.LANCZOS)
        return normalize(to_frames(crop16(np.asarray(image)[None])))
    clip = list(islice(read_frames(path, None if framed else area), frames))
    if len(clip) < 5:
        raise InputError(f"{path} has {len(clip)} frame(s), and the VAE needs at least 5")
    clip = clip[: (len(clip) - 1) // 4 * 4 + 1]
    if framed:
        clip = [letterbox(Image.fromarray(frame), area) for frame in clip]
    return normalize(to_frames(crop16(np.stack(clip))))


# --- 4. The loss (appendix B) -------------------------------------------------------------------------------


def draw_noise(key, data):
    """Uniform times [B] and noise like the latents `data`: the same for the same key."""
    generator = torch.Generator(data.device).manual_seed(chance(*key, "noise").getrandbits(63))
    times = torch.rand(len(data), generator=generator, device=data.device)
    return times, torch.randn(data.shape, generator=generator, device=data.device)


class Objective(nn.Module):
    """From a batch to its losses. DDP or FSDP wraps this module: only inside it are sharded weights whole."""

    sometimes_used = "mm_encoder.connector_vae_branch"  # takes part only where there are references

    def __init__(self, vino, shift):
        super().__init__()
        self.vino, self.shift = vino, shift
        self.autocast = None  # bfloat16 over float32 weights, where FSDP does not see to it

    def forward(self, batch, picture=False):
        """The loss of each sample, [B]; or, to look at, what `picture` gives."""
        device = self.vino.mm_encoder.metaquery.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            if picture:
                return self.picture(batch)
            # Adds zero, so that all these parameters get gradients: AdamW treats them alike in all steps, and
            # a process that has dropped its references reduces the same gradients as others.
            idle = [p for p in self.vino.get_submodule(self.sometimes_used).parameters() if p.requires_grad]
            return self.loss(batch) + 0 * sum(p.sum() for p in idle)

    def loss(self, batch):
        """Rectified flow on the target's tokens: [B]."""
        data = self.latents(batch)
        u, noise = draw_noise(batch.key, data)
        velocity = partial(self.vino.transformer, condition=self.condition(batch))
        return flow_loss(velocity, data, noise, u, self.shift)

    @torch.no_grad()
    def latents(self, batch):
        """The target's, [B, C, T, H, W]: the posterior's mean."""
        return (self.vino.vae.encode(batch.target) if batch.latents is None else batch.latents).float()

    def condition(self, batch):
        references = batch.references
        if batch.latents is None:
            references = [self.vino.encode(reference) for reference in references]
        # Reconstruction bypasses the VAE: the MMDiT has to find the image in what the VLM says.
        return self.vino.mm_encoder(batch.prompts, references, vae_branch=batch.task != "reconstruction")

    def picture(self, batch):
        """What the model makes of a batch, without guidance -> pixels [B, 3, T, H, W] and B texts."""
        velocity = partial(self.vino.transformer, condition=self.condition(batch))
        _, noise = draw_noise(batch.key, self.latents(batch))
        latents = sample(velocity, noise, PICTURE_STEPS, self.shift)
        return self.vino.vae.decode(latents).float(), batch.prompts


# --- 5. Memory, and many GPUs (3.1): gradient checkpointing, DDP, ZeRO-2, FSDP, averaged weights ------------

KERNELS = [  # of attention
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in ("flash_attention", "efficient_attention", "flash_attention_for_cpu")
]
EMA_EVERY = 10  # steps between updates of averages in the host's memory
SHORT = 4096  # tokens: at full size, keeping all for so few takes 36 GiB; checkpointing 35,600 keeps 24 GiB


def checkpointed(block, *inputs):
    """A block's forward that keeps its inputs and its attention's output, and recomputes the rest for the
    backward. In a long sequence attention is most of the work, and its output little of the memory. A batch
    of fewer than `SHORT` tokens keeps everything."""
    forward = partial(type(block).forward, block)
    if inputs[0].shape[:2].numel() < SHORT:
        return forward(*inputs)
    keep = partial(create_selective_checkpoint_contexts, KERNELS)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=keep)


def distribute(objective, how, dtype):
    """The module to call in training. Trainable weights are float32, frozen ones are of the `dtype` to
    compute in. how: "ddp"; "zero2", the paper's, where weights stay whole from forward to backward, and
    gradients, averages and AdamW's state are sharded; or "fsdp", where weights are gathered anew for the
    backward."""
    sharded = how != "ddp" and dist.is_initialized()
    mesh = init_device_mesh(next(objective.parameters()).device.type, (WORLD,)) if sharded else None
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {"mesh": mesh, "mp_policy": mixed, "reshard_after_forward": how == "fsdp"}
    encoders = [*objective.vino.mm_encoder.mm_encoder.parameters(), *objective.vino.vae.parameters()]
    unsharded = {parameter for parameter in encoders if not parameter.requires_grad}
    unsharded |= {parameter for parameter in objective.parameters() if parameter.numel() == 0}
    for module in (*objective.vino.transformer.blocks(), objective):
        for parameter in module.parameters():
            if parameter.requires_grad:  # block by block: all of them in float32 at once may not fit
                parameter.data = parameter.data.float()
        if sharded:
            fully_shard(module, **options, ignored_params=unsharded)
    if sharded:
        return objective
    objective.autocast = None if dtype == torch.float32 else dtype
    return DistributedDataParallel(objective, gradient_as_bucket_view=True) if WORLD > 1 else objective


def local(tensor):
    """This process's share of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    """The tensor of which each process has a share. All processes take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sums(*values):
    """Each number, added up over all processes."""
    total = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


class Averages:
    """Exponential moving averages of the weights (EMA), each process's share. Next to the weights, they are
    updated in every step; in the host's memory, every EMA_EVERY steps and in the last, with the same decay
    per step: at full size, each of two GPUs then moves 26 GB over PCIe and back."""

    def __init__(self, parameters, decay, on_host):
        self.parameters, self.decay, self.every = parameters, decay, EMA_EVERY if on_host else 1
        self.tensors = {}
        for name, parameter in parameters.items() if decay else ():
            share = local(parameter.detach())
            pinned = on_host and share.is_cuda
            self.tensors[name] = share.cpu().pin_memory() if pinned else share.clone()

    @torch.no_grad()
    def update(self, step, last=False):
        """Follow the weights after a step, if it is time to."""
        passed = step % self.every or self.every  # steps since the last time
        if passed < self.every and not last:
            return
        for name, average in self.tensors.items():
            parameter = local(self.parameters[name])
            nearby = average.to(parameter.device, non_blocking=True)  # itself, if it is there already
            average.copy_(nearby.lerp_(parameter, 1 - self.decay**passed))


# --- 6. The loop --------------------------------------------------------------------------------------------


class Run:
    """A run of one stage: what it trains and with what, and how far it is."""

    def __init__(self, args, out, stage, source, objective, weights, device, dtype):
        self.args, self.out, self.stage, self.source, self.weights = args, out, stage, source, weights
        self.device, self.dtype = device, dtype
        self.objective, self.vino = objective.to(device), objective.vino
        self.step, self.failed, self.signal = 0, 0, 0
        self.drawn = dict.fromkeys(source.tasks, 0)  # for each task: samples used
        self.step_size = stage.batch * args.accumulate * WORLD
        for block in self.vino.transformer.blocks():
            if stage.checkpointing:  # inside what is compiled: around it attention would be computed again
                block.forward = MethodType(checkpointed, block)
            if args.compile:
                block.forward = compiled(block.forward)
        choose_parameters(objective, stage.trainable)
        self.model = distribute(objective, args.shard, dtype)
        named = [(name.removeprefix("vino."), p) for name, p in objective.named_parameters()]
        self.parameters = {name: p for name, p in named if p.requires_grad}
        weights, betas = self.parameters.values(), (stage.beta1, stage.beta2)
        self.optimizer = AdamW(weights, stage.lr, betas, weight_decay=stage.weight_decay, fused=True)
        for p in self.parameters.values():  # from the start, so that a checkpoint can be read into it
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        self.shares = WORLD if any(isinstance(p, DTensor) for p in self.parameters.values()) else 1
        self.averages = Averages(self.parameters, stage.ema, args.ema_on_host)

    def load(self, step):
        """The step's task, and this process's samples for it: a list for each batch. All processes draw the
        same task, so that they do equal work (appendix B). The step's samples are numbered across all
        processes and their batches, so they are the same however many processes share the step."""
        size, source = self.stage.batch, self.source
        shares = [self.stage.mixture[task] for task in source.tasks]
        [task] = chance(self.args.seed, step, "task").choices(source.tasks, shares)
        position = math.ceil(self.drawn[task] / size) * size  # a resumed run may have another batch size
        batches = {}
        for micro in range(self.args.accumulate):
            first = (micro * WORLD + RANK) * size  # of this batch's samples, among the step's
            batches[first] = [source.draw(task, position, position + first + i) for i in range(size)]
        return task, batches

    def clip_gradients(self):
        """Clip the gradient's norm, over all processes, and return it."""
        return whole(nn.utils.clip_grad_norm_(self.parameters.values(), self.stage.clip or math.inf)).item()

    def tensors(self):
        """This process's share of all that has been learned: weights, averages, AdamW's moments."""
        tensors = {f"ema.{name}": average for name, average in self.averages.tensors.items()}
        for name, p in self.parameters.items():
            tensors[f"weights.{name}"] = local(p.detach())
            for key, value in self.optimizer.state[p].items():
                tensors[f"optimizer.{name}.{key}"] = local(value)
        return tensors

    def log(self, record):
        if RANK == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(f"{json.dumps(record)}\n")

    def on_signal(self, number, frame):
        """Finish the step, save and stop. A second signal ends the process at once, but not under torchrun:
        there each signal arrives twice, from the terminal or scheduler and passed on by torchrun."""
        self.signal = number
        if not dist.is_initialized():
            signal.signal(number, signal.SIG_DFL)


def choose_parameters(objective, prefixes):
    """Table 1's last row. Parameters that the model never uses stay frozen."""
    parameters = {name.removeprefix("vino."): p for name, p in objective.named_parameters()}
    unknown = [prefix for prefix in prefixes if not any(name.startswith(str(prefix)) for name in parameters)]
    if unknown or not prefixes:
        raise InputError(f"field 'trainable': no parameter's name begins with {unknown}")
    for name, p in parameters.items():
        unused = name.startswith("transformer." + MMDiT.UNUSED) or p.numel() == 0
        p.requires_grad_(name.startswith(tuple(prefixes)) and not unused)


def train(run):
    """All steps that are left, then the export. Returns the exit status."""
    args, stage = run.args, run.stage
    gc.freeze()  # imageio collects garbage whenever it closes a clip, and all threads wait for that
    bar = tqdm(total=stage.steps, initial=run.step, unit="step", disable=RANK > 0)
    with bar, ThreadPoolExecutor(1) as loader:  # which decodes the next step's samples
        upcoming = loader.submit(run.load, run.step + 1)
        while run.step < stage.steps:
            begin = time.perf_counter()
            run.step += 1
            task, batches = upcoming.result()
            run.drawn[task] += run.step_size
            upcoming = loader.submit(run.load, run.step + 1)
            loss = 0.0
            for first, samples in batches.items():
                batch = run.source.collate(task, samples, run.device)
                batch.key = (args.seed, run.step, first)
                part = run.model(drop_conditions(batch, stage)).mean() / args.accumulate
                part.backward()  # DDP and FSDP average over the processes
                loss += part.detach()
            norm = run.clip_gradients()
            loss, signals = sums(float(loss) / WORLD, run.signal)

            finite = math.isfinite(loss) and math.isfinite(norm)
            run.failed = 0 if finite else run.failed + 1
            lr = learning_rate(stage, run.step)
            if finite:
                run.optimizer.param_groups[0]["lr"] = lr
                run.optimizer.step()
                run.averages.update(run.step, last=run.step == stage.steps)
            run.optimizer.zero_grad()

            seconds = time.perf_counter() - begin
            record = {"step": run.step, "task": task, "samples": run.step_size, "seconds": seconds, "lr": lr}
            record |= {"loss": loss if finite else None, "grad_norm": norm if finite else None}
            run.log(record | {"skipped": not finite, "peak_mib": torch.cuda.max_memory_allocated() >> 20})
            speed = f"{run.step_size / seconds:.1f} samples/s"
            bar.set_postfix_str(f"{task} loss {loss:.4f}, |g| {norm:.2f}, {speed}")
            bar.update()

            last = run.step == stage.steps
            if args.validate_every and (last or run.step % args.validate_every == 0):
                validate(run)  # before the checkpoint, so that a resumed run lacks none
            if last or signals or run.failed == 10 or run.step % args.save_every == 0:
                save(run)
            if run.failed == 10:
                advice = "stopped after a checkpoint; try a lower --lr, or --dtype float32"
                raise InputError(f"step {run.step}: not finite for the tenth time in a row; {advice}")
            if signals:
                say(f"stopped by a signal after step {run.step}; continue with --resume")
                return 128 + run.signal
    export(run)
    return 0


# --- 7. Checkpoints and the export --------------------------------------------------------------------------


def identity(run):
    """What a checkpoint has in common with the run that continues it."""
    own = {"stage": run.args.stage, "seed": run.args.seed, "data": run.args.data}
    own |= {"trainable": run.stage.trainable, "has_ema": run.stage.ema > 0}
    return asdict(run.vino.config) | {"sampling": {}, "training": {}} | own


def settings(run):
    """What may change when a run is resumed; changes are reported."""
    return asdict(run.stage) | {"samples per step": run.step_size, "dtype": str(run.dtype)}


def save(run):
    """Write a checkpoint, which gets its name when it is complete, and remove all but the newest ones. Each
    process writes its share as a `.safetensors`: to open one runs no code, so a stranger's is safe."""
    final = run.out / "checkpoints" / f"step_{run.step:08d}"
    partial = final.with_suffix(".partial")
    state = {"step": run.step, "drawn": run.drawn, "weights": run.weights, "shares": run.shares}
    state |= {"identity": identity(run), "settings": settings(run)}
    problem = ""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if RANK < run.shares:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in run.tensors().items()}
            save_file(tensors, partial / f"{RANK}.safetensors")
        if RANK == 0:
            (partial / "state.json").write_text(json.dumps(state, indent=1))
    except (OSError, SafetensorError) as error:
        problem = one_line(error)
    if sum(sums(bool(problem))):
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"cannot write {final}: {problem or 'another process failed'}; older ones stay")
    if RANK == 0:
        partial.rename(final)
        for old in complete_checkpoints(run.out)[: -run.args.keep]:
            shutil.rmtree(old)


def restore(run, path, saved):
    """Continue from a checkpoint, written by any number of processes; `saved` is its `state.json`."""
    for name, value in identity(run).items():
        agree(value, saved["identity"].get(name), name, path)
    for name, value in settings(run).items():
        before = saved["settings"].get(name)
        if value != before:
            say(f"continuing with {name} {value}; it was {before}")
    files = [open_safetensors(path / f"{share}.safetensors") for share in range(saved["shares"])]
    for name, tensor in run.tensors().items():
        parts = [file.get_tensor(name) for file in files]
        value = torch.cat(parts) if tensor.dim() else parts[0]
        if tensor.dim() and run.shares > 1:  # as FSDP cuts: equal shares, the last ones shorter or empty
            shares = value.chunk(WORLD)
            value = shares[RANK] if RANK < len(shares) else value[:0]
        tensor.copy_(value)
    run.step, run.drawn = saved["step"], run.drawn | saved["drawn"]


def complete_checkpoints(out):
    """Oldest first. A save that was cut short has another name."""
    return sorted((out / "checkpoints").glob("step_????????"))


@torch.no_grad()
def export(run):
    """One file for `sample.py --weights` and the next stage: averaged weights where there are any, in the
    type that the model computes in."""
    path, tensors = run.out / "final.safetensors", {}
    for name, tensor in run.vino.saved_tensors().items():
        if name in run.averages.tensors:
            tensor = tensor.clone()
            local(tensor).copy_(run.averages.tensors[name])
        tensor = whole(tensor)
        if RANK == 0:
            tensors[name] = tensor.to("cpu", run.dtype)
    if RANK == 0:
        run.vino.save(path, tensors)
    say(f"wrote {path}: python sample.py --weights {path} --prompt ...")
    sums(0)  # nobody goes on before the file is there


# --- 8. Validation: losses and a picture --------------------------------------------------------------------

VALIDATION, PICTURE_STEPS = 4, 20  # fixed samples of each task, and the sampler's steps for their picture


@torch.no_grad()
def validate(run):
    """Loss of each task on fixed samples with fixed noise, and a picture: references, target, output."""
    losses, rows = dict.fromkeys(run.source.tasks, 0.0), []
    for task in tqdm(losses, desc="validating", unit="task", leave=False, disable=RANK > 0):
        for number in range(VALIDATION):
            batch = run.source.collate(task, [run.source.draw(task, -1 - number, -1 - number)], run.device)
            batch.key = ("validation", task, number)
            losses[task] += run.objective(batch).item() / VALIDATION
            if number == 0:
                output, words = run.objective(batch, picture=True)
                rows.append((f"{task}: {words[0]}", shown(batch) | {"output": output[0]}))
    run.log({"step": run.step, "validation": losses})
    if RANK == 0:
        contact_sheet(rows).save(run.out / f"step_{run.step:08d}.png")


def shown(batch, number=0):
    """The references and the target of a sample for `contact_sheet`: {heading: pixels}."""
    columns = {}
    for k, reference in enumerate(batch.references, 1):
        heading = "Video 1" if reference.is_video else f"Image {k}"
        columns[heading] = reference.pixels[number].cpu()
    return columns | {"target": batch.target[number].cpu()}


def film_strip(pixels):
    """[3, T, H, W] in [-1, 1] -> a PIL image: the first, the middle and the last frame side by side."""
    count = pixels.shape[1]
    frames = F.pad(pixels[:, sorted({0, count // 2, count - 1})], (0, 2), value=1).unbind(1)
    strip = ((torch.cat(frames, 2)[..., :-2].clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(strip.permute(1, 2, 0).cpu().numpy())


def contact_sheet(rows, least=96):
    """A PIL image of rows (label, {heading: pixels}): film strips, enlarged without blur as long as they are
    no taller than `least` pixels."""
    rows = [(label, {name: film_strip(pixels) for name, pixels in row.items()}) for label, row in rows]
    tallest = max(image.height for _, row in rows for image in row.values())
    scale = max(1, least // tallest)
    height = scale * tallest + 34
    headings = dict.fromkeys(heading for _, row in rows for heading in row)
    references = sorted(name for name in headings if name.startswith(("Image ", "Video ")))
    columns = []
    for heading in dict.fromkeys([*references, *headings]):
        images = {number: row[heading] for number, (_, row) in enumerate(rows) if heading in row}
        width = max(72, 12 + scale * max(image.width for image in images.values()))
        column = Image.new("RGB", (width, height * len(rows)), "lightsteelblue")
        for number, image in images.items():
            ImageDraw.Draw(column).text((8, height * number + 16), heading, fill="dimgray")
            column.paste(ImageOps.scale(image, scale, Image.NEAREST), (8, height * number + 30))
        columns.append(column)
    sheet = Image.fromarray(np.hstack(columns))
    for number, (label, _) in enumerate(rows):
        ImageDraw.Draw(sheet).text((8, height * number + 4), label[: sheet.width // 5], fill="black")
    return sheet


def read_metrics(folder):
    """A run's records; a last line that was cut short does not count."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    with reading(path, "a run's metrics"):
        lines = path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


# --- 9. The command line ------------------------------------------------------------------------------------


def add_common_arguments(parser):
    """What the three stages and toy/pretrain.py share."""
    add = parser.add_argument
    add("--config", help="JSON with the fields of the weights' Config to change")
    add("--resume", action="store_true", help="continue from the newest complete checkpoint in --out")
    add("--seed", type=int, default=0)
    add("--dtype", choices=["bfloat16", "float32"], help="to compute in; by default bfloat16 on a GPU")
    add("--accumulate", type=int, default=1, help="batches per process and step")
    add("--compile", action="store_true", help="torch.compile the MMDiT's blocks")
    add("--save-every", type=int, default=500, help="steps between checkpoints; by default 500")
    add("--keep", type=int, default=3, help="checkpoints to keep; by default 3")
    add("--validate-every", type=int, default=500, help="steps between validations; by default 500; 0: never")


def parse_arguments(arguments):
    usage, about = "train.py --stage STAGE [options]", __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser("train.py", usage, about, allow_abbrev=False)
    add = parser.add_argument
    add("--stage", required=True, choices=list(STAGES), help="column of table 1")
    add("--weights", help="a .safetensors, a folder of public weights, 'hub' or 'random'; by default what "
        "the stage before has exported, else assets/tiny.safetensors")  # fmt: skip
    add("--out", help="folder for all output; by default runs/stageN")
    add("--data", help="JSON lines, one sample a line; by default the toy world")
    add("--tasks", nargs="+", metavar="TASK", help="only these of the stage's mixture")
    add("--shard", choices=["ddp", "zero2", "fsdp"], default="zero2", help="under torchrun: copies of "
        "everything; gradients and AdamW sharded (the paper's, and the default); weights too")  # fmt: skip
    add("--ema-on-host", action="store_true", help="averages in the host's memory, updated every 10 steps")
    add("--no-queries", action="store_true", help="ablation: no learnable tokens (figure 8)")
    add("--no-boundary-tokens", action="store_true", help="ablation: no tokens between latents (figure 11)")
    add_common_arguments(parser)
    add = parser.add_argument_group("table 1", "changes to the stage's column").add_argument
    add("--checkpointing", action=argparse.BooleanOptionalAction)
    for f in fields(Stage):
        if f.type in (int, float):
            add("--" + f.name.replace("_", "-"), type=f.type, metavar="X")
    return parser.parse_args(arguments)


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


def prepare(args):
    """The Run that the command line asks for, at its first step or where it was stopped."""
    out = Path(args.out or f"runs/stage{args.stage}")
    found, saved = find_checkpoint(out, args.resume)
    export = out.parent / f"stage{int(args.stage) - 1}" / "final.safetensors"  # of the stage before
    weights = args.weights or saved.get("weights") or str(export if export.exists() else TINY)
    device, dtype = start_device(args.dtype)
    path = args.config or (HERE / "tiny_config.json" if weights == "random" else None)
    config = read_config(path, weights) if path else None
    vino = Vino.load(weights, config, device, dtype, base=args.stage == "1")
    if args.no_queries:  # the ablations (3.4) take away what the weights may have
        vino.remove_queries()
    if args.no_boundary_tokens:
        vino.config.boundary_tokens = vino.mm_encoder.boundary_tokens = False
    stage = make_stage(args.stage, vino.config, vars(args))
    seed = f"{args.seed} {args.stage}"
    if device.type == "cpu" and args.batch is None:
        stage.batch = min(stage.batch, 8)  # a step within seconds
    if args.data:
        args.accumulate *= stage.batch  # samples of different sizes, one after the other
        stage.batch = 1
        source = Manifest(args.data, stage, vino.config, seed)
    else:
        from toy.world import ToyWorld  # here: who has data does not need it

        source = ToyWorld(stage, vino.config, seed, vino if device.type == "cuda" else None)
    run = Run(args, out, stage, source, Objective(vino, stage.shift), weights, device, dtype)
    start(run, found, saved)
    return run


def find_checkpoint(out, resume):
    """The newest checkpoint in `out` and its `state.json`; None and {} where a run begins."""
    found = complete_checkpoints(out)
    if not found:
        if (out / "final.safetensors").exists():
            raise InputError(f"{out} holds a finished run without its checkpoints; choose another --out")
        if resume:
            say(f"{out} has no checkpoint to resume from: the run starts anew")
        return None, {}
    if not resume:
        raise InputError(f"{out} holds a run: continue it with --resume, or choose another --out")
    saved = read_json(found[-1] / "state.json")
    if not isinstance(saved, dict) or "identity" not in saved:
        raise InputError(f"{found[-1] / 'state.json'} is not a checkpoint's; remove {found[-1].name}")
    return found[-1], saved


def start(run, found, saved):
    """Say what the run does and from where, restore it, and drop the records after its checkpoint."""
    tasks = ", ".join(run.source.tasks)
    if not tasks:
        known = ", ".join(run.stage.mixture)
        raise InputError(f"{run.args.data or 'the mixture'} has no sample of this stage's tasks: {known}")
    say(f"stage {run.args.stage} on {WORLD} x {run.device.type}: {tasks}; {run.step_size} sample(s) a step")
    say(f"from {found or f'{run.weights} (--weights chooses others)'}")
    if run.stage.warmup + run.stage.cooldown > run.stage.steps:
        say(f"the learning rate stays below {run.stage.lr}: --warmup and --cooldown are longer than the run")
    if found:
        try:
            restore(run, found, saved)
        except (AttributeError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            advice = "if it is damaged, remove it, and --resume takes the one before"
            raise InputError(f"cannot read {found}: {one_line(error)}; {advice}") from error
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, run.on_signal)
    if RANK == 0:
        run.out.mkdir(parents=True, exist_ok=True)
        records = [record for record in read_metrics(run.out) if record["step"] <= run.step]
        partial = run.out / "metrics.partial"
        partial.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        partial.replace(run.out / "metrics.jsonl")


def main(arguments=None, name="train.py", parse=parse_arguments, work=lambda args: train(prepare(args))):
    """Run the command line `arguments` -> exit status. What the user got wrong is one line."""
    args = parse(arguments)
    try:
        return work(args)
    except (InputError, OSError, SafetensorError) as error:  # the last two come from the disk
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        advice = "try fewer --latent-frames, --shard fsdp on more GPUs, or --ema-on-host"
        print(f"{name}: {one_line(error)}; {advice}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
