"""The command line of VINO: read prompts, pictures and clips, call the model, write .png, .mp4 or .gif.

    python sample.py --prompt "a large red circle"
    python sample.py --help

What the user gets wrong is one line on stderr and exit status 2, and found before the model is loaded.
`torchrun --nproc-per-node N sample.py ...` spreads each sample over N GPUs.
"""

import argparse
import functools
import json
import math
import os
import re
import resource
import shlex
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

# Before torch starts: its idle threads shall sleep, not spin. On a busy machine that is many times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

try:
    import imageio.v3 as imageio
    import torch
    import torch.distributed as dist
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    from tqdm import tqdm

    import vino
    from vino import Config, InputError, Reference, Vino
except KeyboardInterrupt:  # the imports take seconds
    print("sample.py: stopped", file=sys.stderr)
    sys.exit(130)

MISTAKES = (InputError, OSError, torch.OutOfMemoryError)  # the user's: one line tells them
HERE = Path(__file__).parent
TINY = HERE / "assets" / "tiny.safetensors"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
TASKS = {  # the release's names: what goes in (text, image, video), what comes out
    "t2i": "text to image", "t2v": "text to video", "i2v": "image to video", "ti2i": "image edit",
    "ti2v": "images to video", "tv2v": "video edit", "tiv2v": "video edit with images",
}  # fmt: skip
ITEM = {  # the fields of an item of a task file, with the values of those that are left out
    "index": "", "task": "", "caption": "", "ref_image_paths": [], "ref_video_path": "",
    "ref_image_have_base": False,
}  # fmt: skip
USAGE = """sample.py --prompt TEXT [--image FILE ...] [--video FILE] [--out PATH] [options]
       sample.py --tasks FILE.json --out DIR [options]
       sample.py --tasks FILE.json --rewrite-only --out FILE.json [options]"""
EPILOG = """the task follows from what you give:
  only a prompt         an image, or a video if --frames is above 1 or --out ends in .mp4 or .gif
  one image             an edit of it, or (as above) a video that begins with it
  several images        an edit of the last one, or a video of what they show
  a video, or with      an edit of the video; images guide it, or it lends an image its motion
    images              or its camera
an edit has the shape of what it edits: --height and --width then set its area only
a file that exists is kept, unless the very same command has made it

examples:
  python sample.py --prompt "a large red circle moving right" --out circle.mp4
  python sample.py --prompt "Put the hat of Image 1 on the man in Image 2." --image hat.jpg man.jpg --base
"""

# --- Arguments ----------------------------------------------------------------------------------------------


def say(*lines):
    """Print to stderr, above a progress bar: only the first process."""
    if RANK == 0:
        with tqdm.external_write_mode():
            print(*lines, sep="\n", file=sys.stderr, flush=True)


def bounded(kind, least, most):
    """An argument's type: an int or a float from `least` to `most`."""

    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} ({least} to {most})"  # argparse reports "invalid {__name__} value"
    return parse


class Parser(argparse.ArgumentParser):
    """One that reports an error in a single line."""

    def error(self, message):
        line = " ".join(message.split())[:600]
        say(f"sample.py: error: {line}")
        sys.exit(2)


def build_parser():
    parser = Parser("sample.py", USAGE, epilog=EPILOG, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    side, scale = bounded(int, 16, 4096), bounded(float, 0, 1000)

    add = parser.add_argument_group("what to make").add_argument
    add("--prompt", metavar="TEXT", help="what to make, or what to change")
    add("--image", metavar="FILE", nargs="+", action="extend", default=[], help="Image 1, Image 2, ...")
    add("--video", metavar="FILE", help="Video 1")
    add("--base", action="store_true", help="the last image is the one to edit, the others guide the edit")
    expand = "let the VLM turn the prompt into a caption first (default: the config's, without references)"
    add("--rewrite", action=argparse.BooleanOptionalAction, help=expand)
    add("--tasks", metavar="FILE", help="many of these from a .json in the release's format")
    add("--rewrite-only", action="store_true", help="write the task file again, with the VLM's captions")

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
    add("--cfg-text", metavar="X", type=scale, help="how much the prompt counts; up to 1 is no guidance")
    add("--cfg-image", metavar="X", type=scale, help="how much the images count: 1 to 3; 1 is fastest")
    add("--shift", metavar="X", type=bounded(float, 0.01, 1000), help="above 1: more steps at high noise")
    add("--negative-prompt", metavar="TEXT", help="what the guidance leads away from")
    add("--no-queries", action="store_true", help="without the learnable queries (figure 13)")

    add = parser.add_argument_group("the model").add_argument
    add("--weights", metavar="W", help="a .safetensors, a folder of the public weights, 'hub' or 'random'")
    add("--config", metavar="FILE", help="a .json with the fields of the config to change")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16, on a cpu float32")
    add("--offload", action="store_true", help="keep most weights in the host's memory: for a small GPU")
    add("--compile", action="store_true", help="torch.compile: a minute first, then faster; for clips")
    add("--profile", action="store_true", help="at the end print where time and memory went")
    add("--explain", action="store_true", help="only print the packed sequence: figure 5 for this call")
    return parser


def check_arguments(args, config):
    """Round sizes down to legal ones and settle device and dtype, in place. Raises InputError."""
    if (args.prompt is None) == (args.tasks is None):
        raise InputError("give either --prompt TEXT or --tasks FILE; --help tells more")
    single = args.image or args.video or args.base or args.explain or args.num > 1
    if args.tasks is not None and (single or not args.out):
        raise InputError("--tasks needs --out and excludes --image, --video, --base, --num and --explain")
    if args.rewrite_only and (args.tasks is None or not args.out.endswith(".json")):
        raise InputError("--rewrite-only goes with --tasks FILE.json and --out FILE.json")
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
    if heads % WORLD:
        raise InputError(f"{WORLD} processes cannot share {heads} attention heads evenly")
    choose_device(args)


def choose_device(args):
    """Settle --device and --dtype, in place."""
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
    if weights == "hub":
        folder = vino.download(vlm, ["tokenizer.json"])
    else:
        folder = vino.existing(weights) / Path(vlm).name
    return weights, config or Config(), vino.read_tokenizer(folder)


# --- Jobs ---------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One prompt with its references and its results."""

    prompt: str
    task: str  # one of TASKS
    images: list  # paths
    video: str  # path, or empty
    base: bool
    outputs: dict  # seed: path


def single_job(args):
    """The job of --prompt. The task follows from the references, the suffix of --out, and --frames."""
    out = Path(args.out or ".")
    is_folder, suffix = out.is_dir() or not out.suffix, out.suffix.lower()
    is_video = bool(args.video) or (args.frames > 1 if args.frames else suffix in (".mp4", ".gif"))
    task = f"t{'i' * bool(args.image)}{'v' * bool(args.video)}2{'v' if is_video else 'i'}"
    task = "i2v" if task == "ti2v" and len(args.image) == 1 else task
    legal = (".mp4", ".gif") if is_video else (".png",)
    if is_folder:
        slug = re.sub(r"[\W_]+", "-", args.prompt.lower())[:48].strip("-") or "vino"
        out = out / f"{slug}{legal[0]}"
    elif suffix not in legal:
        raise InputError(f"--out {out}: {TASKS[task]} goes to a {' or '.join(legal)}, or a folder")
    outputs = {}
    for seed in range(args.seed, args.seed + args.num):
        outputs[seed] = out.with_stem(f"{out.stem}_{seed}") if is_folder or args.num > 1 else out
    return checked(Job(args.prompt, task, args.image, args.video or "", args.base, outputs))


def read_tasks(args):
    """The items of --tasks and their jobs. An InputError names the line or the item that is wrong."""
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
    return items, jobs


def read_item(item, folder, args):
    """The job of one item of a task file. Its paths start in the working directory, else in `folder`."""
    if not isinstance(item, dict):
        raise InputError("should be an object in braces")
    item = ITEM | {name: value for name, value in item.items() if value is not None}
    item["index"] = str(item["index"])
    for name, default in ITEM.items():
        if type(item[name]) is not type(default):
            shown = json.dumps(item[name])[:60]
            raise InputError(f"'{name}' is {shown}, should be a {type(default).__name__}")
    index = item["index"]
    if index in ("", ".", "..") or "/" in index or "\0" in index or not is_text(index) or len(index) > 200:
        raise InputError(f"'index' should be a file's name, and is {json.dumps(index)[:60]}")
    paths = [*item["ref_image_paths"], item["ref_video_path"]]
    if not all(isinstance(path, str) and "\0" not in path and is_text(path) for path in paths):
        raise InputError("'ref_image_paths' and 'ref_video_path' should be paths")
    *images, video = [path if Path(path).exists() else folder / path for path in paths]
    suffix = ".mp4" if item["task"].endswith("v") else ".png"
    outputs = {args.seed: Path(args.out, index + suffix)}
    return checked(Job(item["caption"], item["task"], images, video, item["ref_image_have_base"], outputs))


def is_text(text):
    """False if a text holds what no UTF-8 can: the bytes of another encoding, or half a surrogate pair."""
    return text == text.encode("utf-8", "ignore").decode()


def checked(job):
    """The job, or an InputError where its parts do not fit together."""
    if job.task not in TASKS:
        raise InputError(f"unknown task '{job.task[:60]}', known: {', '.join(TASKS)}")
    source = job.task.split("2")[0]
    if ("i" in source, "v" in source) != (bool(job.images), bool(job.video)):
        raise InputError(f"task {job.task} ({TASKS[job.task]}) does not go with these references")
    if not job.prompt.strip():
        raise InputError("the prompt is empty")
    if not is_text(job.prompt):
        raise InputError("the prompt is not valid UTF-8")
    if job.base and len(job.images) < 2:
        raise InputError("--base needs two images or more: the last is edited, the others guide")
    return job


# --- From the references to the files -----------------------------------------------------------------------


def prepare(job, args, config):
    """Read the references and settle the size of the result -> (images, video, (frames, height, width)).

    An edit has the shape of what it edits; --height and --width are then its area."""
    sampling, is_video = config.sampling, job.task.endswith("v")
    frames = (args.frames or sampling.frames) if is_video else 1
    size = sampling.video_size if is_video else sampling.image_size
    if args.height:
        size = (args.height, args.width)
    if is_video and frames == 1:
        raise InputError(f"--frames 1 is an image, and {TASKS[job.task]} makes a video")
    if len(job.images) > sampling.max_images:
        raise InputError(f"{len(job.images)} images, and the config allows {sampling.max_images}")
    is_edit = job.task not in ("t2i", "t2v", "ti2v")
    area = math.prod(size) if args.height and is_edit else sampling.reference_area
    images = [Reference.image(vino.read_image(path), area, config.vision) for path in job.images]
    video = vino.read_video(job.video, frames, area, config.vision) if job.video else None
    if is_edit:
        size = (video or images[-1]).pixels.shape[3:]
    frames = video.pixels.shape[2] if video else frames
    return images, video, (frames, *size)


def strange_words(prompt, tokenizer):
    """The words that a tiny model cannot know. Its tokenizer has one token for each word that it has seen."""
    if tokenizer.token_to_id("Ġcircle") is None or tokenizer.get_vocab_size() > 1000:
        return []

    def is_known(word):
        forms = word.lower(), word.capitalize()
        return any(len(tokenizer.encode(space + form).ids) == 1 for form in forms for space in ("", " "))

    return [word for word in re.findall("[a-z]+", prompt, re.IGNORECASE) if not is_known(word)]


def notices(job, tokenizer, images, video):
    """What the user may not have meant, a line each."""
    strange = dict.fromkeys(strange_words(job.prompt, tokenizer))
    if strange:
        names = ", ".join(f"'{word}'" for word in strange)
        verb = "means" if len(strange) == 1 else "mean"
        advice = "these weights know coloured shapes only; the README tells how to get the real ones"
        yield f"{names} {verb} nothing to this model: {advice}"
    given = {f"Image {k}" for k in range(1, len(images) + 1)} | ({"Video 1"} if video else set())
    for name in sorted({*re.findall(r"\b(?:Image|Video) \d+", job.prompt)} - given):
        yield f"the prompt names {name}, which is not given"


def problem(error):
    """What to tell the user of an error."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "too large for the GPU's memory: try --offload, fewer --frames, or a smaller --height and --width"
        )
    return str(error)


def run(job, args, config, tokenizer, load):
    """Do a job, from its references to its files. `load` gives the model."""
    for seed, path in job.outputs.items():
        if not args.explain:
            check_writable(path, args, seed)
    images, video, size = prepare(job, args, config)
    say(*args.notices, *notices(job, tokenizer, images, video))  # behind all that could be a line of error
    args.notices = []
    references = [*images, video] if video else images
    by_default = config.sampling.rewrite and not references and args.weights != "random"
    if by_default if args.rewrite is None else args.rewrite:
        job.prompt = load().rewrite([job.prompt], images, video)[0] or job.prompt
        say(f"rewritten: {job.prompt}")
    if args.explain:
        show(explain(job.prompt, references, size, tokenizer, config))
        return
    for seed, path in job.outputs.items():
        say("{}: {} frame(s) of {} x {}, seed {}".format(TASKS[job.task], *size, seed))
        pixels = load().generate(
            [job.prompt], images, video, size=size, base=job.base, steps=args.steps, shift=args.shift,
            cfg_text=args.cfg_text, cfg_image=args.cfg_image, negative_prompt=args.negative_prompt,
            seed=seed, group=dist.group.WORLD if WORLD > 1 else None, progress=RANK == 0,
        )  # fmt: skip
        if pixels is not None:
            facts = {"command": args.command, "seed": seed, "prompt": job.prompt}
            write(path, pixels[0], config.sampling.fps, facts)
            show(path)


def check_writable(path, args, seed):
    """What cannot be written fails here, before the work. What this very command has made may be replaced."""
    if path.exists() and not args.overwrite and made_by(path) != (args.command, seed):
        raise InputError(f"{path} exists; --overwrite replaces it")
    partial = Path(f"{path}.{RANK}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.touch()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    partial.unlink()


def made_by(path):
    """The command and the seed that made a result, or None for any other file."""
    try:
        if path.suffix.lower() == ".mp4":
            facts = json.loads(imageio.immeta(path, plugin="pyav")["comment"])
        else:
            with Image.open(path) as file:
                facts = json.loads(file.info["comment"])
        return facts["command"], facts["seed"]
    except Exception:  # a damaged file can fail anywhere in a decoder; nobody's command has made it
        return None


@contextmanager
def completing(path):
    """Give a path to write to, of a file that is named `path` when it is complete, and else removed."""
    partial = Path(f"{path}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write(path, pixels, fps, facts):
    """Write pixels [3, T, H, W] in [-1, 1] as the path's suffix says, with `facts` in the metadata."""
    frames = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()
    comment = json.dumps(facts, ensure_ascii=False)
    with completing(path) as partial:
        if path.suffix.lower() == ".mp4":
            partial.write_bytes(encode_mp4(frames, fps, comment))
        elif path.suffix.lower() == ".gif":
            first, *rest = map(Image.fromarray, frames)
            timing = {"duration": 1000 / fps, "loop": 0, "comment": comment.encode()}
            first.save(partial, "GIF", save_all=True, append_images=rest, **timing)
        else:
            info = PngInfo()
            info.add_itxt("comment", comment)
            Image.fromarray(frames[0]).save(partial, "PNG", pnginfo=info)


def encode_mp4(frames, fps, comment):
    """H.264 as every player knows it: yuv420p, whose colours have half the height and width."""
    file = BytesIO()
    with imageio.imopen(file, "w", plugin="pyav", extension=".mp4") as video:
        video.container_metadata["comment"] = comment
        video.write(frames, codec="libx264", fps=fps, out_pixel_format="yuv420p")
    return file.getvalue()


def show(text):
    """Print to stdout. A full disk or a closed pipe there is no error of the result, which has a file."""
    if RANK == 0:
        try:
            print(text, flush=True)
        except OSError as error:
            say(f"cannot print to stdout: {error.strerror}")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- --explain and --profile --------------------------------------------------------------------------------


def explain(text, references, size, tokenizer, config):
    """Figure 5 for this call: the packed sequence as a table."""
    merge = config.vision.spatial_merge_size
    prompt = vino.build_prompts(tokenizer, [text], references, merge)
    patch, patch_t = config.mmdit.patch_size, config.mmdit.patch_size_t
    rows, time = [("source", "tokens", "time", "in the VLM")], 0

    def add(name, place, pixels=None):
        """One boundary token, or the latents of pixels of a size (frames, height, width)."""
        nonlocal time
        frames, tokens = 1, 1
        if pixels:
            frames = ((pixels[0] - 1) // 4 + 1) // patch_t
            tokens = frames * (pixels[1] // 8 // patch) * (pixels[2] // 8 // patch)
        rows.append((name, tokens, f"{time}-{time + frames - 1}", place))
        time += frames

    for k, (reference, start, end) in enumerate(zip(references, prompt.starts, prompt.ends), 1):
        name = "Video 1" if reference.is_video else f"Image {k}"
        if config.boundary_tokens:
            add(f"{name}, start token", start)
        add(f"{name}, latents", f"{start + 1}-{end - 1}", reference.pixels.shape[2:])
        if config.boundary_tokens:
            add(f"{name}, end token", end)
    add("target", "-", size)
    length, queries = prompt.ids.shape[1], config.num_queries
    rows.append(("prompt", length, "-", f"0-{length - 1}"))
    rows.append(("learnable queries", queries, "-", f"{length}-{length + queries - 1}" if queries else "-"))
    rows.append(("total", sum(row[1] for row in rows[1:]), "-", "-"))
    return "\n".join("{:<20}  {:>7}  {:<7}  {}".format(*row) for row in rows)


def watch(model, device):
    """Measure the parts of the model around their forward passes: {name: seconds of each call}."""
    vlm = model.mm_encoder.mm_encoder.model
    parts = {"vision tower": vlm.visual, "language model": vlm.language_model, "MMDiT": model.transformer}
    parts |= {"VAE, encoder": model.vae.encoder, "VAE, decoder": model.vae.decoder}

    def clock():
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    calls = {name: [] for name in parts}
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, own=calls[name]: own.append(-clock()))
        part.register_forward_hook(lambda *_, own=calls[name]: own.append(own.pop() + clock()))
    return calls


def profile(calls, device):
    """What `watch` has measured, as a table. The first call of the MMDiT includes compiling."""
    lines = ["part             calls  first s  others s"]
    for name, seconds in calls.items():
        first, others = sum(seconds[:1]), sum(seconds[1:])
        lines.append(f"{name:<16} {len(seconds):>5} {first:>8.2f} {others:>9.2f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated() / 2**30
    return "\n".join([*lines, f"most memory: {peak:.1f} GiB"])


# --- Main ---------------------------------------------------------------------------------------------------


def do_all(jobs, args, do):
    """do(job) for each job of --tasks -> whether any failed; these are named at the end."""
    failed = []
    for position, job in enumerate(jobs, 1):
        name = job.outputs[args.seed].name
        say(f"[{position}/{len(jobs)}] {name}")
        try:
            do(job)
        except MISTAKES as error:
            if isinstance(error, torch.OutOfMemoryError) and WORLD > 1:
                raise  # the other processes wait in this sample, until torchrun ends them
            failed.append(f"  {name}: {problem(error)}")
    say(f"{len(failed)} of {len(jobs)} failed", *failed)
    return bool(failed)


def rewrite_tasks(items, jobs, args, config, load):
    """Write the task file again: `caption` is the VLM's, `caption_raw` the user's. An item that fails keeps
    its caption. Returns whether any failed."""
    out = Path(args.out)
    check_writable(out, args, args.seed)

    def rewrite(job):
        images, video, _ = prepare(job, args, config)
        job.prompt = load().rewrite([job.prompt], images, video)[0] or job.prompt

    failed = do_all(jobs, args, rewrite)
    for item, job in zip(items, jobs, strict=True):
        item["caption_raw"] = item["caption"]
        item["caption"] = job.prompt
    if RANK == 0:
        with completing(out) as partial:
            partial.write_text(json.dumps(items, indent=2, ensure_ascii=False) + "\n", "utf-8")
        show(out)
    return failed


def load_model(weights, config, args):
    """The model as the arguments want it: offloaded, compiled, without queries, watched."""
    model = Vino.load(weights, config, "cpu" if args.offload else args.device, args.dtype)
    if args.offload:
        model.offload(args.device)
    if args.no_queries:
        model.remove_queries()
    for block in model.transformer.blocks() if args.compile else ():
        block.forward = vino.compiled(block.forward)  # without hooks: these fetch offloaded weights
    if args.profile:
        args.calls = watch(model, args.device)
    return model


def work(args):
    """Do what the arguments ask for -> whether any item of a task file failed. Raises InputError."""
    weights, config, tokenizer = choose_weights(args)
    check_arguments(args, config)
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.startswith("cuda") else "gloo")
    items, jobs = read_tasks(args) if args.tasks is not None else (None, [single_job(args)])
    load = functools.cache(functools.partial(load_model, weights, config, args))
    failed = False
    if args.rewrite_only:
        failed = rewrite_tasks(items, jobs, args, config, load)
    elif args.tasks is not None:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        failed = do_all(jobs, args, lambda job: run(job, args, config, tokenizer, load))
    else:
        run(jobs[0], args, config, tokenizer, load)
    if args.calls:
        show(profile(args.calls, args.device))
    return failed


def main(argv=None):
    """Run the command line `argv` -> exit status."""
    argv = sys.argv[1:] if argv is None else argv
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not know the letters of a name
    parser = build_parser()
    args = parser.parse_args(argv)
    args.command, args.notices, args.calls = shlex.join(["python", "sample.py", *argv]), [], {}
    torch.backends.cudnn.deterministic = True  # the same command gives the same picture
    try:
        failed = work(args)
    except MISTAKES as error:
        parser.error(problem(error))
    except KeyboardInterrupt:
        say("sample.py: stopped")
        return 130
    if dist.is_initialized():
        dist.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
