"""The command line of VINO: read prompts, pictures and clips, call the model, write .png, .mp4 or .gif.

    python sample.py --prompt "a large red circle"
    python sample.py --benchmark
    python sample.py --help

From top to bottom: arguments, jobs, from the references to the files, the table of --explain, the benchmarks,
--profile, main.
What the user gets wrong is one line on stderr and exit status 2, and found before the model is loaded.
`torchrun --nproc-per-node N sample.py ...` spreads each sample over N GPUs.
"""

import argparse
import functools
import json
import math
import os
import re
import shlex
import sys
import time
from collections import defaultdict, namedtuple
from contextlib import contextmanager, nullcontext
from itertools import count, islice, permutations
from pathlib import Path

# Before torch starts: its idle threads shall sleep, not spin. On a busy machine that is many times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import train
import vino
from train import HERE, TINY, bounded, one_line, rank, say
from vino import Config, InputError, Reference, Vino, read_frames, read_image

TASKS = {  # the release's names: what goes in (text, image, video), what comes out
    "t2i": "text to image", "t2v": "text to video", "i2v": "image to video", "ti2i": "image edit",
    "ti2v": "images to video", "tv2v": "video edit", "tiv2v": "video edit with images",
}  # fmt: skip
ITEM = {  # the fields of an item of a task file, with the values of those that are left out
    "index": "", "task": "", "caption": "", "ref_image_paths": [], "ref_video_path": "",
    "ref_image_have_base": False,
}  # fmt: skip
SETTINGS = ("steps", "shift", "cfg_text", "cfg_image", "negative_prompt")  # as Vino.generate calls them
USAGE = """sample.py --prompt TEXT [--image FILE ...] [--video FILE] [--out PATH] [options]
       sample.py --tasks FILE.json --out DIR [options]
       sample.py --benchmark [SUITE ...] [--out DIR] [options]"""
EPILOG = """the task follows from what you give:
  only a prompt         an image, or a video if --frames is above 1 or --out ends in .mp4 or .gif
  one image             an edit of it, or (as above) a video that begins with it
  several images        an edit of the last one, or a video of what they show
  a video, or with      an edit of the video; images guide it, or it lends an image its motion
    images              or its camera
an edit has the shape of what it edits: --height and --width then set its area only

examples:
  python sample.py --prompt "a large red circle moving right" --out circle.mp4
  python sample.py --prompt "Put the hat of Image 1 on the man in Image 2." --image hat.jpg man.jpg --base
"""


# ----------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------


def build_parser():
    parser = argparse.ArgumentParser("sample.py", USAGE, epilog=EPILOG, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    def refuse(message):
        if rank() == 0 or isinstance(message, OutOfMemory):  # which need not befall the first process
            with tqdm.external_write_mode():
                print(f"sample.py: error: {one_line(message)}", file=sys.stderr)
        sys.exit(2)

    parser.error = refuse
    side, scale = bounded(int, 16, 10**6), bounded(float, 0, 1000)

    add = parser.add_argument_group("what to make").add_argument
    add("--prompt", metavar="TEXT", help="what to make, or what to change")
    add("--image", metavar="FILE", nargs="+", action="extend", default=[], help="Image 1, Image 2, ...")
    add("--video", metavar="FILE", help="Video 1")
    add("--base", action="store_true", help="the last image is the one to edit, the others guide the edit")
    told = "let the VLM expand the prompt first (default: the config's, without references)"
    add("--rewrite", action=argparse.BooleanOptionalAction, help=told)
    add("--tasks", metavar="FILE", help="many of these from a .json in the release's format")

    add = parser.add_argument_group("benchmarks of the toy world: a table and a picture").add_argument
    add("--benchmark", metavar="SUITE", nargs="*", choices=SUITES, help=f"{', '.join(SUITES)} (default: all)")
    add("--samples", metavar="N", type=bounded(int, 1, 10**5), default=100, help="of each row (default: 100)")

    add = parser.add_argument_group("the result").add_argument
    add("--out", metavar="PATH", help=".png, .mp4, .gif or a folder (default: named by prompt and seed)")
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--frames", metavar="N", type=bounded(int, 1, 10**6), help="4k + 1; 1 is an image")
    add("--height", metavar="H", type=side, help="a multiple of 16, together with --width")
    add("--width", metavar="W", type=side, help="a multiple of 16, together with --height")
    add("--seed", metavar="S", type=bounded(int, 0, 2**62), default=0, help="of the noise (default: 0)")
    add("--num", metavar="K", type=bounded(int, 1, 10000), default=1, help="make K: seeds S, S + 1, ...")

    add = parser.add_argument_group("sampling (the config has defaults for images and videos)").add_argument
    add("--steps", metavar="N", type=bounded(int, 1, 1000), help="of the sampler")
    add("--cfg-text", metavar="X", type=scale, help="how much the prompt counts")
    add("--cfg-image", metavar="X", type=scale, help="how much the images count: 1 to 3; 1 is fastest")
    add("--shift", metavar="X", type=bounded(float, 0.01, 1000), help="above 1: more steps at high noise")
    add("--negative-prompt", metavar="TEXT", help="what the guidance leads away from")

    add = parser.add_argument_group("the model").add_argument
    add("--weights", metavar="W", help="a .safetensors, a folder of the public weights, 'hub' or 'random'")
    add("--config", metavar="FILE", help="a .json with the fields of the config to change")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16, on a cpu float32")
    add("--offload", action="store_true", help="keep most weights in the host's memory: for a small GPU")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: where it pays)")
    add("--profile", action="store_true", help="at the end print where time and memory went")
    add("--explain", action="store_true", help="only print the packed sequence: figure 5 for this call")
    return parser


def check_arguments(args, config):
    """Round sizes down to legal ones and settle device and dtype, in place. Raises InputError."""
    if [args.prompt, args.tasks, args.benchmark].count(None) != 2:
        raise InputError("give either --prompt TEXT or --tasks FILE or --benchmark; --help tells more")
    single = bool(args.image or args.video or args.base or args.explain or args.num > 1)
    if args.tasks is not None and (single or not args.out):
        raise InputError("--tasks needs --out DIR and excludes --image, --video, --base, --num and --explain")
    if args.benchmark is not None and (single or args.frames or args.height or args.width):
        raise InputError("--benchmark has its own references, and one size: leave out options for these")
    if (args.height is None) != (args.width is None):
        raise InputError("--height and --width go together")
    for name, multiple, rest in (("height", 16, 0), ("width", 16, 0), ("frames", 4, 1)):
        value = getattr(args, name) or rest
        surplus = (value - rest) % multiple
        if surplus:
            setattr(args, name, value - surplus)
            args.notices.append(f"--{name} {value} is rounded down to {value - surplus}")
    if args.frames and args.frames > config.sampling.max_frames:
        raise InputError(f"--frames {args.frames}: the config allows {config.sampling.max_frames}")
    heads = config.mmdit.num_attention_heads
    if heads % train.world():
        raise InputError(f"{train.world()} processes cannot share {heads} attention heads evenly")
    if args.benchmark is not None and train.world() > 1:
        raise InputError("--benchmark runs in one process")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=args.device).item()  # of "meta" there is no item
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\. |\n", str(error))[0]  # some go on for a page
        raise InputError(f"--device {args.device}: not here ({reason})") from error
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    elif args.offload:
        raise InputError("--offload needs a GPU")
    else:
        args.device = torch.device(args.device).type  # "cpu:0": safetensors knows no such name
    args.dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))


def choose_weights(args):
    """What --weights and --config mean -> (weights, Config, tokenizer), without reading a tensor."""
    weights = args.weights or str(TINY)
    config = vino.read_config(args.config, weights) if args.config else None
    if weights == "random":
        return weights, config or Config.from_file(HERE / "tiny_config.json"), vino.byte_tokenizer()
    if weights.endswith(".safetensors"):
        return weights, *vino.read_metadata(weights, config)
    vlm = next(iter(vino.HUB))
    is_hub = weights == "hub"
    folder = vino.download(vlm, ["tokenizer.json"]) if is_hub else vino.existing(weights) / Path(vlm).name
    return weights, config or Config(), vino.read_tokenizer(folder)


# ----------------------------------------------------------------------------------------------------------
# Jobs: the arguments of one call, its task (one of TASKS), and its outputs {seed: path}
# ----------------------------------------------------------------------------------------------------------


def single_job(args):
    """The job of --prompt. The task follows from the references, the suffix of --out, and --frames."""
    out = Path(args.out or ".")
    is_folder, suffix = out.is_dir(), out.suffix.lower()
    is_video = bool(args.video) or (args.frames > 1 if args.frames else suffix in (".mp4", ".gif"))
    task = f"t{'i' * bool(args.image)}{'v' * bool(args.video)}2{'v' if is_video else 'i'}"
    args.task = "i2v" if task == "ti2v" and len(args.image) == 1 else task
    legal = (".mp4", ".gif") if is_video else (".png",)
    if is_folder:
        slug = re.sub(r"[\W_]+", "-", args.prompt.lower())[:48].strip("-") or "vino"
        out = out / f"{slug}{legal[0]}"
    elif suffix not in legal:
        named = " or ".join(legal)
        raise InputError(f"--out {out}: {TASKS[args.task]} goes to a {named}, or a folder that exists")
    seeds, numbered = range(args.seed, args.seed + args.num), is_folder or args.num > 1
    args.outputs = {seed: out.with_stem(f"{out.stem}_{seed}") if numbered else out for seed in seeds}
    return checked(args)


def read_tasks(args):
    """The jobs of --tasks. An InputError names the line or the item that is wrong."""
    path, jobs = Path(args.tasks), []
    items = vino.read_json(path)  # its error tells the line
    if not isinstance(items, list) or not items:
        raise InputError(f"{path}: should be a list of items")
    for position, item in enumerate(items, 1):
        try:
            jobs.append(read_item(item, path.parent, args))
        except InputError as error:
            raise InputError(f"{path}, item {position}: {error}") from error
        if any(job.outputs == jobs[-1].outputs for job in jobs[:-1]):
            raise InputError(f"{path}, item {position}: an item before it has the same index")
    return jobs


def read_item(item, folder, args):
    """The job of one item of a task file. Its paths start in the working directory, else in `folder`."""
    if not isinstance(item, dict):
        raise InputError("should be an object in braces")
    item = ITEM | {name: value for name, value in item.items() if value is not None}
    item["index"] = str(item["index"])
    for name, default in ITEM.items():
        if type(item[name]) is not type(default):
            raise InputError(f"'{name}' is {json.dumps(item[name])}, should be a {type(default).__name__}")
    if not item["index"] or item["index"] != Path(item["index"]).name:
        raise InputError(f"'index' should be a file's name, and is '{item['index']}'")
    paths = [*item["ref_image_paths"], item["ref_video_path"]]
    if not all(isinstance(path, str) for path in paths):
        raise InputError("'ref_image_paths' should be a list of strings")
    *images, video = [path if Path(path).exists() else folder / path for path in paths]
    job = argparse.Namespace(**vars(args))
    job.prompt, job.task, job.base = item["caption"], item["task"], item["ref_image_have_base"]
    job.image, job.video = images, video  # Path("") exists: no video stays ""
    job.outputs = {args.seed: Path(args.out, item["index"] + (".mp4" if job.task.endswith("v") else ".png"))}
    return checked(job)


def checked(job):
    """The job, or an InputError where its parts do not fit together."""
    if job.task not in TASKS:
        raise InputError(f"unknown task '{job.task}', known: {', '.join(TASKS)}")
    source = job.task.split("2")[0]
    if ("i" in source, "v" in source) != (bool(job.image), bool(job.video)):
        raise InputError(f"task {job.task} ({TASKS[job.task]}) does not go with these references")
    if not job.prompt.strip():
        raise InputError("the prompt is empty")
    if job.base and len(job.image) < 2:
        raise InputError("--base needs two images or more: the last is edited, the others guide")
    return job


# ----------------------------------------------------------------------------------------------------------
# From the references to the files
# ----------------------------------------------------------------------------------------------------------


class Clip:
    """A video file that is indexed like an array [T, H, W, 3]. It is decoded anew each time, and only the
    frames asked for stay in memory, however long it is."""

    def __init__(self, path):
        self.path, self.shape = path, (0, 0, 0, 3)
        for length, frame in enumerate(read_frames(path), 1):
            self.shape = (length, *frame.shape)

    def __getitem__(self, index):
        wanted = np.arange(self.shape[0])[index].tolist()
        kept = {i: frame for i, frame in enumerate(read_frames(self.path)) if i in wanted}
        return np.stack([kept[i] for i in wanted])


def requested_size(job, sampling):
    """(frames, height, width) that a job asks for. `sampling` is a SamplingConfig."""
    is_video = job.task.endswith("v")
    size = [job.height, job.width] if job.height else sampling.video_size if is_video else sampling.image_size
    return (job.frames or sampling.frames) if is_video else 1, *size


def prepare(job, config):
    """Read the references and settle the size of the result -> (images, video, (frames, height, width)).

    An edit has the shape of what it edits; --height and --width are then its area."""
    sampling = config.sampling
    frames, *size = requested_size(job, sampling)
    if job.task.endswith("v") and frames == 1:
        raise InputError(f"--frames 1 is an image, and {TASKS[job.task]} makes a video")
    if len(job.image) > sampling.max_images:
        raise InputError(f"{len(job.image)} images, and the config allows {sampling.max_images}")
    check_memory((frames, *size), job, config.mmdit)
    is_edit = job.task not in ("t2i", "t2v", "ti2v")
    area = math.prod(size) if job.height and is_edit else sampling.reference_area
    images = [Reference.image(read_image(path), area, config.vision) for path in job.image]
    video = Reference.video(Clip(job.video), frames, config.vision, area) if job.video else None
    if is_edit:
        size = (video or images[-1]).pixels.shape[3:]
        check_memory((frames, *size), job, config.mmdit)  # a very wide picture is larger than asked for
    frames = video.pixels.shape[2] if video else frames
    return images, video, (frames, *size)


def check_memory(size, job, mmdit):
    """Refuse a result that cannot fit. A lower bound: the widest point of a single-stream block (its input as
    it is and modulated, attention, and the feed-forward's activation with its input), and the pixels."""
    tokens = ((size[0] - 1) // 4 + 1) * size[1] * size[2] // 256 // train.world()
    need = tokens * mmdit.width * (3 + 2 * mmdit.mlp_ratio) * job.dtype.itemsize + 12 * math.prod(size)
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if job.device.startswith("cuda"):
        have = torch.cuda.get_device_properties(job.device).total_memory
    if need > have:
        shape = f"{size} (frames, height, width)"
        raise InputError(f"{shape} needs over {need / 2**30:.0f} of {have / 2**30:.0f} GiB of memory")


def pays_to_compile(jobs, config):
    """Does torch.compile save more seconds than it takes? On an H100 it took up to 25 a process, and the full
    model then needed about 9 microseconds less for each token of a forward, clip or image: for what stands
    between the matrix products, which grows with width and depth. References count nothing here."""
    mmdit, saved = config.mmdit, 0.0
    for job in jobs:
        frames, height, width = requested_size(job, config.sampling)
        tokens = ((frames - 1) // 4 + 1) * height * width // 256
        forwards = 2 * len(job.outputs) * (job.steps or config.sampling.steps)  # two guidance branches
        saved += 9e-6 * tokens * forwards
    depth = mmdit.num_layers + mmdit.num_single_layers
    return saved * mmdit.width * depth / (3072 * 60) > 25


def check_writable(path, overwrite):
    """What cannot be written fails here, before the work."""
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; --overwrite replaces it")
    partial = Path(f"{path}.{rank()}.partial")
    try:
        partial.touch()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    partial.unlink()


class OutOfMemory(InputError):
    """What a process cannot go on from if others wait for it."""


@contextmanager
def telling_what_is_too_large(what, device):
    """Make one line of running out of memory."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        raise OutOfMemory(f"too large for the memory of {device}: {what}") from error


def strange_words(prompt, tokenizer):
    """The words that a tiny model cannot know. Its tokenizer has one token for each word that it has seen."""
    if tokenizer.token_to_id("Ġcircle") is None or tokenizer.get_vocab_size() > 1000:
        return []

    def is_known(word):
        forms = word.lower(), word.capitalize()
        return any(len(tokenizer.encode(space + form).ids) == 1 for form in forms for space in ("", " "))

    return [word for word in re.findall("[a-z]+", prompt, re.IGNORECASE) if not is_known(word)]


def rewrites(job, config, references):
    """Is the prompt to be expanded (the paper's dagger)? As told, else as the config says for text alone."""
    default = config.sampling.rewrite and not references and job.weights != "random"
    return default if job.rewrite is None else job.rewrite


def run(job, config, tokenizer, load):
    """Do a job, from its references to its files. `load` gives the model."""
    for path in () if job.explain else job.outputs.values():
        check_writable(path, job.overwrite)
    images, video, size = prepare(job, config)
    references = [*images, video] if video else images
    for word in strange_words(job.prompt, tokenizer)[:1]:
        told = "these weights know coloured shapes only; the README tells how to get the real ones"
        job.notices.append(f"'{word}' means nothing to this model: {told}")
    given = {f"Image {k}" for k in range(1, len(images) + 1)} | ({"Video 1"} if video else set())
    for name in sorted({*re.findall(r"\b(?:Image|Video) \d+", job.prompt)} - given):
        job.notices.append(f"the prompt names {name}, which is not given")
    while job.notices:  # now that nothing is left that could be one line of error
        say(job.notices.pop(0))
    if rewrites(job, config, references):
        job.prompt = load().mm_encoder.rewrite([job.prompt])[0] or job.prompt
        say(f"rewritten: {job.prompt}")
    if job.explain:
        return say(explain(job.prompt, references, size, tokenizer, config), file=sys.stdout)
    told = "{} frame(s) of {} x {}".format(*size)
    settings = {name: getattr(job, name) for name in SETTINGS} | {"size": size, "base": job.base}
    settings["progress"] = rank() == 0
    settings["group"] = dist.group.WORLD if dist.is_initialized() else None
    for seed, path in job.outputs.items():
        say(f"{TASKS[job.task]}: {told}, seed {seed}")
        with telling_what_is_too_large(told, job.device):
            pixels = load().generate([job.prompt], images, video, seed=seed, **settings)
        if pixels is not None:
            facts = {"command": job.command, "seed": seed, "prompt": job.prompt}
            with job.phase("write"):
                write(path, pixels[0], config.sampling.fps, facts)
            say(path, file=sys.stdout)


def write(path, pixels, fps, facts):
    """Write pixels [3, T, H, W] in [-1, 1] as the path's suffix says, with `facts` in the metadata. The file
    appears under its name when it is complete."""
    frames = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()
    comment, partial = json.dumps(facts, ensure_ascii=False), Path(f"{path}.partial")
    try:
        if path.suffix.lower() == ".mp4":
            write_mp4(partial, frames, fps, comment)
        elif path.suffix.lower() == ".gif":
            first, *rest = map(Image.fromarray, frames)
            timing = {"duration": 1000 / fps, "loop": 0, "comment": comment.encode()}
            first.save(partial, "GIF", save_all=True, append_images=rest, **timing)
        else:
            info = PngInfo()
            for name, value in facts.items():
                info.add_text(name, str(value))
            Image.fromarray(frames[0]).save(partial, "PNG", pnginfo=info)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # of a write that failed


def write_mp4(path, frames, fps, comment):
    """H.264 as every player knows it: yuv420p, whose colours have half the height and width."""
    import av  # here, so that pictures do without it

    with av.open(str(path), "w", format="mp4") as file:
        file.metadata["comment"] = comment
        stream = file.add_stream("libx264", rate=fps, options={"crf": "17"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            # Converted here, because the encoder's own conversion differs from run to run (av 18).
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")
            file.mux(stream.encode(picture))
        file.mux(stream.encode())


def explain(text, references, size, tokenizer, config):
    """Figure 5 for this call: the packed sequence as a table."""
    prompt = vino.build_prompt(tokenizer, text, references, config.vision.spatial_merge_size)
    labels = []  # the source of each block, and its place in the VLM's sequence
    for k, (reference, start, end) in enumerate(zip(references, prompt.starts, prompt.ends), 1):
        name = "Video 1" if reference.is_video else f"Image {k}"
        middle = (f"{name}, latents", f"{start + 1}-{end - 1}")
        pieces = [(f"{name}, start token", start), middle, (f"{name}, end token", end)]
        labels += pieces if config.boundary_tokens else [middle]
    patch, patch_t = config.mmdit.patch_size, config.mmdit.patch_size_t
    sizes = [*(reference.pixels.shape[2:] for reference in references), size]
    *shapes, target = [(((t - 1) // 4 + 1) // patch_t, h // 8 // patch, w // 8 // patch) for t, h, w in sizes]
    blocks = vino.timeline(shapes, target, config.boundary_tokens)
    rows = []
    for (source, place), block in zip([*labels, ("target", "-")], blocks, strict=True):
        rows.append((source, block.tokens, f"{block.time}-{block.time + block.shape[0] - 1}", place))
    length, queries = len(prompt.ids), config.num_queries
    rows.append(("prompt", length, "-", f"0-{length - 1}"))
    rows.append(("learnable queries", queries, "-", f"{length}-{length + queries - 1}" if queries else "-"))
    rows.append(("total", sum(row[1] for row in rows), "-", "-"))
    table = [("source", "tokens", "time", "in the VLM"), *rows]
    return "\n".join("{:<20}  {:>7}  {:<7}  {}".format(*row) for row in table)


# ----------------------------------------------------------------------------------------------------------
# Benchmarks: small counterparts of the paper's, in train.py's toy world, scored by pixels (tables 2 to 9)
# ----------------------------------------------------------------------------------------------------------

# how: a key of `ways`, see `measure`; mean: the name of a last row, of all the others
Suite = namedtuple("Suite", "score rows how mean", defaults=["generate", None])
# layouts: (task of train.TASKS, number of images); the rest says which samples: see `belongs`
Row = namedtuple("Row", "name layouts kind objects differ moves", defaults=["", None, (), False])
Thing = namedtuple("Thing", "shape color x y r")  # what stands in a frame; lengths are the toy world's
Seen = namedtuple("Seen", "background things ground")  # ground: [64, 64], True where no thing is near


def shrink(frames):
    """Frames [N, 3, H, W] in [-1, 1] -> [N, 3, 64, 64] in [0, 255]."""
    return F.interpolate((frames.float().clamp(-1, 1) + 1) * 127.5, (64, 64), mode="area")


def detect(frames):
    """What frames [N, 3, H, W] in [-1, 1] show -> N Seens. A colour, a shape or a background that is none of
    the toy world's is "unclear"."""
    names, grounds = [*train.BACKGROUNDS, *train.COLORS], len(train.BACKGROUNDS)
    palette = torch.tensor([*train.BACKGROUNDS.values(), *train.COLORS.values()], dtype=torch.float32)
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
    for shape, edge in train.SHAPES.items():
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
        x, y, r = train.trace(item, time)
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
    cells = [min(train.CELLS, key=lambda name: math.dist(train.CELLS[name], (t.x, t.y))) for t in ours]
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
    """The motion, out of train.MOTIONS, that is nearest to what an object did; None if it is not there."""
    begin, end = ([t[2:] for t in seen[time].things if t[:2] == item[:2]] for time in (0, -1))
    if (len(begin), len(end)) != (1, 1):
        return None
    scale = np.array((1, 1, 4))  # 6 pixels of radius are as much as 24 of way
    change = np.subtract(end[0], begin[0]) * scale
    return min(train.MOTIONS, key=lambda name: math.dist(change, train.MOTIONS[name].change * scale))


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
        swapped = scene._replace(objects=[train.Object(*b[:3], *a[3:]), train.Object(*a[:3], *b[3:])])
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
    does = {motion.does: name for name, motion in train.MOTIONS.items()}
    grounds = {f"{name} background": name for name in train.BACKGROUNDS}
    aliases, values = does | grounds, {}
    for name, words, right in [
        ("motion", [*train.MOTIONS, *does], item.motion),
        ("background", grounds, ground),
        ("colour", train.COLORS, item.color),
        ("shape", train.SHAPES, item.shape),
        ("size", train.SIZES, item.size),
        ("cell", train.CELLS, item.cell),
    ]:
        pattern = rf"\b({'|'.join(sorted(words, key=len, reverse=True))})\b"
        found = re.findall(pattern, answer)
        answer = re.sub(pattern, "", answer)  # once read, "moving left" names no cell
        if name != "motion" or sample.video:
            values[name, "right"] = {aliases.get(word, word) for word in found} == {right}
    return values


def score_told(row, sample, answer, target, source):
    """Instructions: does the VLM say what their result shall show, in the very words that it has learned?"""
    return {(row, "right"): answer == train.describe(sample, clip=target.shape[1] > 1)}


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
        script, clip = train.TASKS[task].script, train.TASKS[task].clip
        tellers = (train.Teller(f"benchmark {row.name} {world.seed} {task} {i}") for i in count())
        told = (getattr(teller, script)(images, clip) for teller in tellers)
        kept = (sample for sample in told if belongs(sample, row))
        for first in range(0, share, BATCH):
            drawn = [*islice(kept, min(BATCH, share - first))]
            drawn[1::2] = [sample._replace(prompt=sample.short_prompt) for sample in drawn[1::2]]
            batch = world.collate(task, drawn, device)
            batch.keys = [world.seed + first + i for i in range(len(drawn))]  # seeds of the noise
            yield drawn, batch


def measure(suites, samples, world, device, ways):
    """Run suites, `samples` for each row, on a ToyWorld's samples. `ways` are functions of a Batch:
    "generate" and "autoencode" give pixels [B, 3, T, H, W], "answer" the VLM's B texts.

    Returns: {suite: {(row, column): values}}, and rows for train.contact_sheet."""
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
                    shown = references if is_text else [*references, outputs]
                    sheet.append((label, [train.panels(pixels[i]) for pixels in shown]))
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


def benchmark(args, config, load):
    """Do --benchmark: write and print the table, and write the picture."""
    folder = Path(args.out or "benchmark")
    folder.mkdir(exist_ok=True)
    for name in ("benchmark.md", "benchmark.png"):
        check_writable(folder / name, args.overwrite)
    world = train.ToyWorld(train.make_stage("3", config, {}), config, args.seed)
    settings, model = {name: getattr(args, name) for name in SETTINGS}, load()
    model.config.sampling.rewrite = rewrites(args, config, [])

    def generate(batch):
        return train.generate(model, batch, seed=batch.keys[0], **settings).cpu()

    def answer(batch):
        return model.mm_encoder.answer(batch.prompts, [*map(model.encode, batch.references)])

    @torch.no_grad()
    def autoencode(batch):
        return model.vae.decode(model.vae.encode(batch.target)).float().cpu()

    ways = {"generate": generate, "answer": answer, "autoencode": autoencode}
    with telling_what_is_too_large(f"{BATCH} samples at once", args.device):
        results, sheet = measure(args.benchmark or SUITES, args.samples, world, args.device, ways)
    text = f"`{args.command}`\n{table(results)}\nIn brackets and behind ±: 95% intervals.\n"
    (folder / "benchmark.md").write_text(text)
    train.contact_sheet(sheet, room=500).save(folder / "benchmark.png")
    print(text)


# ----------------------------------------------------------------------------------------------------------
# --profile
# ----------------------------------------------------------------------------------------------------------


class Profile:
    """Seconds, memory and operations of a run's phases. The model does not know: its methods are wrapped.
    Memory is what torch had allocated on the GPU at most, without one what the process had used so far."""

    def __init__(self, device, dtype):
        self.device, self.dtype, self.cuda = torch.device(device), dtype, device.startswith("cuda")
        self.phases = defaultdict(list)  # name -> (seconds, MiB at the peak, operations) of each call
        self.begin, self.time, self.forwards = time.perf_counter(), None, 0

    def clock(self):
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def phase(self, name, operations=0):
        """What runs in this context is one call of the phase."""
        begin = self.clock()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        self.phases[name].append((self.clock() - begin, train.peak_memory(self.device), operations))

    def watch(self, model):
        """Make phases of what the model does from now on."""
        vlm, vae, mmdit = model.mm_encoder, model.vae, model.transformer
        for module, method, name in [
            (vae, "encode", "VAE, references"),
            (vlm, "look", "VLM, references"),
            (vlm, "answer", "VLM, rewriting"),
            (vlm, "forward", "VLM, prompts and queries"),
            (vae, "decode", "VAE, result"),
        ]:
            setattr(module, method, self.phase(name)(getattr(module, method)))
        forward = mmdit.forward

        def step(latents, t, context):
            now = t[0].item()
            self.forwards = self.forwards + 1 if now == self.time else 1  # in the guidance branches' order
            self.time, which = now, "first step" if now == 1 else "other steps"
            with self.phase(f"MMDiT, {which}, forward {self.forwards}", mmdit.flops(context)):
                return forward(latents, t, context)

        mmdit.forward = step

    def best(self):
        """Operations a second in one large matrix product."""
        size, seconds = 8192 if self.cuda else 1024, []
        matrix = torch.randn(size, size, device=self.device, dtype=self.dtype)
        for _ in range(10):
            begin = self.clock()
            matrix @ matrix
            seconds.append(self.clock() - begin)
        return 2 * size**3 / min(seconds)

    def table(self):
        """The phases in the order in which they first ended. First steps include compiling."""
        left, best = self.clock() - self.begin, self.best()
        row = "{:<34} {:>5} {:>8} {:>8} {:>6} {:>8} {:>7}".format
        lines = [row("phase", "calls", "seconds", "a call", "GiB", "TFLOP/s", "of best")]
        for name, calls in self.phases.items():
            seconds, peaks, operations = zip(*calls)
            spent, work = sum(seconds), sum(operations)
            rate = (f"{work / spent / 1e12:.3g}", f"{work / spent / best:.0%}") if work else ("", "")
            numbers = f"{spent:.2f}", f"{spent / len(calls):.3f}", f"{max(peaks) / 1024:.1f}"
            lines.append(row(name, len(calls), *numbers, *rate))
            left -= spent
        lines.append(row("rest", "", f"{left:.2f}", "", "", "", ""))
        told = f"best: a matrix product in {str(self.dtype).removeprefix('torch.')}"
        return "\n".join([*lines, row(told, "", "", "", "", f"{best / 1e12:.3g}", "")])


# ----------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------


def run_all(jobs, config, tokenizer, load):
    """Do the jobs of --tasks -> whether any failed; these are named at the end."""
    Path(jobs[0].out).mkdir(parents=True, exist_ok=True)
    load()
    failed = []
    for position, job in enumerate(jobs, 1):
        name = job.outputs[job.seed].name
        say(f"[{position}/{len(jobs)}] {name}")
        try:
            run(job, config, tokenizer, load)
        except (InputError, OSError) as error:
            if isinstance(error, OutOfMemory) and train.world() > 1:
                raise  # the other processes wait in this sample, until torchrun ends them
            failed.append(f"  {name}: {error}")
    say(f"{len(failed)} of {len(jobs)} failed", *failed)
    return bool(failed)


def load_model(weights, config, args, profile):
    with args.phase("load"), telling_what_is_too_large("the weights", args.device):
        model = Vino.load(weights, config, "cpu" if args.offload else args.device, args.dtype)
        if args.offload:
            model.offload(args.device)
    for block in model.transformer.blocks() if args.compile else ():
        block.forward = train.compiled(block.forward)  # without its hooks, which fetch offloaded weights
    if profile:
        profile.watch(model)
    return model


def main(argv=None):
    """Run the command line `argv` -> exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    args.command, args.notices = shlex.join(["python", "sample.py", *argv]), []
    torch.backends.cudnn.deterministic = True  # the same command gives the same picture
    try:
        weights, config, tokenizer = choose_weights(args)
        check_arguments(args, config)
        if train.world() > 1:
            dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        profile = Profile(args.device, args.dtype) if args.profile else None
        args.phase = profile.phase if profile else lambda name: nullcontext()
        load = functools.cache(lambda: load_model(weights, config, args, profile))
        jobs, failed = [], False
        if args.benchmark is None:
            jobs = [single_job(args)] if args.tasks is None else read_tasks(args)
        if args.compile is None:
            args.compile = args.device.startswith("cuda") and pays_to_compile(jobs, config)
        if args.benchmark is not None:
            benchmark(args, config, load)
        elif args.tasks is None:
            run(jobs[0], config, tokenizer, load)
        else:
            failed = run_all(jobs, config, tokenizer, load)
    except (InputError, OSError) as error:
        parser.error(error)
    if profile and not args.explain:
        say(profile.table(), file=sys.stdout)
    if dist.is_initialized():
        dist.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
