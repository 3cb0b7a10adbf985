"""The command line of VINO: read prompts, pictures and clips, call the model, write .png, .mp4 or .gif.

    python sample.py --prompt "a large red circle"
    python sample.py --help

From top to bottom: arguments, jobs (what to make), reading, making and writing, the table of --explain, main.
What the user gets wrong is one line on stderr and exit status 2, and found before the model is loaded.
"""

import argparse
import functools
import json
import math
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

# Before torch starts: its idle threads shall sleep, not spin. On a busy machine that is many times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import av
import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from tokenizers import Tokenizer

import vino
from vino import Config, InputError, Reference, Vino

HERE = Path(__file__).resolve().parent
TASKS = {  # the release's names: what goes in (text, image, video), what comes out
    "t2i": "text to image",
    "t2v": "text to video",
    "i2v": "image to video",
    "ti2i": "image edit",
    "ti2v": "images to video",
    "tv2v": "video edit",
    "tiv2v": "video edit with images",
}
USAGE = """sample.py --prompt TEXT [--image FILE ...] [--video FILE] [--out PATH] [options]
       sample.py --tasks FILE.json --out DIR [options]"""
EPILOG = """the task follows from what you give:
  only a prompt         an image, or a video if --frames is above 1 or --out ends in .mp4 or .gif
  one image             an edit of it, or (as above) a video that begins with it
  several images        an edit of the last one, or a video of what they show
  a video, or with      an edit of the video; images guide it, or it lends an image its motion
    images              or its camera

examples:
  python sample.py --prompt "a large red circle" --num 4
  python sample.py --prompt "make it snow" --image street.jpg --cfg-image 1.5 --out snow.png
  python sample.py --prompt "put the hat of Image 1 on the man" --image hat.jpg man.jpg --base
  python sample.py --prompt "as an oil painting" --video clip.mp4 --weights /data/vino
"""


# ----------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")


def number(kind, least, most):
    """An argument's type: an int or a float from `least` to `most`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"'{text}' is not {name} from {least} to {most}")
        return value

    return parse


def build_parser():
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("sample.py", usage=USAGE, epilog=EPILOG, formatter_class=form, allow_abbrev=False)
    size, scale = number(int, 1, 10**6), number(float, 0, 1000)

    add = parser.add_argument_group("what to make").add_argument
    add("--prompt", metavar="TEXT", help="what to make, or what to change")
    add("--image", metavar="FILE", nargs="+", action="extend", default=[], help="Image 1, Image 2, ...")
    add("--video", metavar="FILE", help="Video 1")
    add("--base", action="store_true", help="the last image is the one to edit, the others guide the edit")
    add("--rewrite", action="store_true", help="let the VLM expand the prompt first, and print it")
    add("--tasks", metavar="FILE", help="many of these from a .json in the release's format")

    add = parser.add_argument_group("the result").add_argument
    add("--out", metavar="PATH", help=".png, .mp4, .gif or a folder (default: named by prompt and seed)")
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--frames", metavar="N", type=size, help="4k + 1; 1 is an image")
    add("--height", metavar="H", type=size, help="multiples of 16, given together; an edit has the")
    add("--width", metavar="W", type=size, help="shape of what it edits, and only takes their area")
    add("--seed", metavar="S", type=number(int, 0, 2**62), default=0, help="of the noise (default: 0)")
    add("--num", metavar="K", type=number(int, 1, 10000), default=1, help="make K: seeds S, S + 1, ...")

    add = parser.add_argument_group("sampling (the config has defaults for images and videos)").add_argument
    add("--steps", metavar="N", type=number(int, 1, 1000), help="of the sampler")
    add("--cfg-text", metavar="X", type=scale, help="how much the prompt counts")
    add("--cfg-image", metavar="X", type=scale, help="how much the images count: 1 to 3; 1 is fastest")
    add("--shift", metavar="X", type=number(float, 0.01, 1000), help="above 1: more steps at high noise")
    add("--negative-prompt", metavar="TEXT", help="what the guidance leads away from")

    add = parser.add_argument_group("the model").add_argument
    add("--weights", metavar="W", help="a .safetensors, a folder of the public weights, 'hub' or 'random'")
    add("--config", metavar="FILE", help="a .json with the fields of the config to change")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16, on a cpu float32")
    add("--explain", action="store_true", help="only print the packed sequence: figure 5 for this call")
    return parser


def note(text):
    print(text, file=sys.stderr, flush=True)


def round_down(args, name, multiple, rest):
    """Lower an argument to the nearest multiple * k + rest, with a notice where that is not itself."""
    value = getattr(args, name)
    legal = (value - rest) // multiple * multiple + rest
    if legal < 1:
        raise InputError(f"--{name} {value} is too small: the least is {multiple}")
    if legal != value:
        args.notices.append(f"--{name} {value} is not {multiple}k{' + 1' * rest}: rounded down to {legal}")
    setattr(args, name, legal)


def check_arguments(args, config):
    """Round sizes down to legal ones and settle device and dtype, in place. Raises InputError."""
    if (args.prompt is None) == (args.tasks is None):
        raise InputError("give either --prompt TEXT or --tasks FILE; --help tells more")
    if args.tasks and (args.image or args.video or args.base or args.explain or args.num > 1 or not args.out):
        raise InputError("--tasks needs --out DIR and excludes --image, --video, --base, --num and --explain")
    if (args.height is None) != (args.width is None):
        raise InputError("--height and --width go together")
    if args.height:
        round_down(args, "height", 16, 0)
        round_down(args, "width", 16, 0)
    if args.frames:
        round_down(args, "frames", 4, 1)
        if args.frames > config.sampling.max_frames:
            raise InputError(f"--frames {args.frames}: the config allows {config.sampling.max_frames}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device}: not here ({str(error).splitlines()[0]})") from error
    args.dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))


def choose_weights(args):
    """What --weights and --config mean -> (weights, Config, tokenizer), without reading a tensor."""
    config = Config.from_file(args.config) if args.config else None
    tiny = HERE / "assets" / "tiny.safetensors"
    if args.weights is None and not tiny.exists():
        args.notices.append("assets/tiny.safetensors is missing: random weights instead, so expect noise")
    weights = args.weights or (str(tiny) if tiny.exists() else "random")
    if weights == "random":
        return weights, config or Config.from_file(HERE / "tiny_config.json"), vino.byte_tokenizer()
    if weights.endswith(".safetensors"):
        return weights, *vino.read_metadata(weights, config)
    vlm = next(iter(vino.HUB))
    if weights == "hub":
        return weights, config or Config(), Tokenizer.from_pretrained(vlm)
    file = vino.existing(vino.existing(weights) / Path(vlm).name / "tokenizer.json")
    return weights, config or Config(), Tokenizer.from_file(str(file))


# ----------------------------------------------------------------------------------------------------------
# Jobs: what to make, from the command line or from a task file
# ----------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One prompt with its references, and a call of the model for each of its outputs."""

    prompt: str
    task: str  # one of TASKS
    images: list  # paths
    video: str | None  # path
    base: bool
    outputs: dict  # {seed: path}

    def __post_init__(self):
        """Raise an InputError unless the parts fit together."""
        source = self.task.split("2")[0]
        self.is_video = self.task.endswith("v")
        self.is_edit = self.task in ("ti2i", "i2v", "tv2v", "tiv2v")  # sized by what it edits
        if not self.prompt.strip():
            raise InputError("the prompt is empty")
        if any("\ud800" <= letter <= "\udfff" for letter in self.prompt):
            raise InputError("the prompt is not valid text")
        if ("i" in source, "v" in source) != (bool(self.images), bool(self.video)):
            raise InputError(f"task {self.task} ({TASKS[self.task]}) does not go with these references")
        if self.base and len(self.images) < 2:
            raise InputError("--base needs two images or more: the last is edited, the others guide")


def single_job(args):
    """The Job of --prompt. The task follows from the references, the suffix of --out, and --frames."""
    out, seeds = Path(args.out or "."), range(args.seed, args.seed + args.num)
    is_folder = os.path.isdir(out)
    suffix = "" if is_folder else out.suffix.lower()
    if not is_folder and suffix not in (".png", ".mp4", ".gif"):
        raise InputError(f"--out {out} is not a folder and does not end in .png, .mp4 or .gif")
    is_video = bool(args.video) or (args.frames > 1 if args.frames else suffix in (".mp4", ".gif"))
    if suffix and is_video == (suffix == ".png"):
        fits = "a video: .mp4 or .gif" if is_video else "an image: .png"
        raise InputError(f"--out {out} does not fit the result, which is {fits}")
    task = f"t{'i' * bool(args.image)}{'v' * bool(args.video)}2{'v' if is_video else 'i'}"
    task = "i2v" if task == "ti2v" and len(args.image) == 1 else task
    numbered = is_folder or args.num > 1
    if is_folder:
        slug = re.sub(r"[\W_]+", "-", args.prompt.lower())[:48].strip("-") or "vino"
        out = out / f"{slug}{'.mp4' if is_video else '.png'}"
    outputs = {seed: out.with_stem(f"{out.stem}_{seed}") if numbered else out for seed in seeds}
    return Job(args.prompt, task, args.image, args.video, args.base, outputs)


def read_tasks(args):
    """The Jobs of --tasks, {index: Job}. An InputError names the line or the item that is wrong."""
    path, jobs = vino.existing(args.tasks), {}
    try:
        items = json.loads(path.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text") from error
    if not isinstance(items, list) or not items:
        raise InputError(f"{path}: should be a list of items")
    for position, item in enumerate(items, 1):
        try:
            index, job = read_item(item, path.parent, args)
            if index in jobs:
                raise InputError("an item before it has the same index")
        except InputError as error:
            name = f" ({item['index']})" if isinstance(item, dict) and "index" in item else ""
            raise InputError(f"{path}, item {position}{name}: {error}") from error
        jobs[index] = job
    return jobs


def read_item(item, folder, args):
    """An item of a task file as (index, Job). Its paths start in the working directory, else in `folder`."""

    def get(name, kind, word, default=None):
        value = default if item.get(name) is None else item[name]
        if not isinstance(value, kind):
            given = "missing" if value is None else json.dumps(value)[:40]
            raise InputError(f"'{name}' is {given}, should be {word}")
        return value

    def found(path):
        if not isinstance(path, str):
            raise InputError("'ref_image_paths' should be a list of strings")
        return folder / path if (folder / path).exists() and not Path(path).exists() else path

    if not isinstance(item, dict):
        raise InputError("should be an object in braces")
    index, task = str(get("index", (str, int), "a string")), get("task", str, "a string")
    if not re.fullmatch(r"[^/\\]+", index) or not index.isprintable():
        raise InputError("'index' should be usable as a file's name")
    if task not in TASKS:
        raise InputError(f"unknown task '{task}', known: {', '.join(TASKS)}")
    images = [found(path) for path in get("ref_image_paths", list, "a list of strings", [])]
    video = get("ref_video_path", str, "a string", "")
    base = get("ref_image_have_base", bool, "true or false", False)
    out = Path(args.out, f"{index}{'.mp4' if task.endswith('v') else '.png'}")
    caption = get("caption", str, "a string")
    return index, Job(caption, task, images, video and found(video), base, {args.seed: out})


# ----------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------


def read_image(path):
    """The picture at `path` as RGB: upright, and over white where it is transparent."""
    vino.existing(path)
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not an image, or is cut short") from error
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


class Clip:
    """A video file that is indexed like an array [T, H, W, 3]. It is decoded anew each time, and only the
    frames asked for stay in memory, however long it is."""

    def __init__(self, path):
        self.path, length, size = vino.existing(path), 0, ()
        for length, frame in enumerate(self.frames(), 1):
            size = size or upright(frame).shape
        if not length:
            raise InputError(f"{path} has no frames")
        self.shape = (length, *size)

    def frames(self):
        try:
            with av.open(str(self.path)) as file:
                if file.streams.video and file.format.name != "tty":  # ffmpeg can film a text file
                    file.streams.video[0].thread_type = "AUTO"
                    yield from file.decode(video=0)
        except av.FFmpegError as error:
            raise InputError(f"{self.path} is not a video, or is cut short") from error

    def __getitem__(self, index):
        wanted = np.arange(self.shape[0])[index].tolist()
        kept = {i: upright(frame) for i, frame in enumerate(self.frames()) if i in wanted}
        return np.stack([kept[i] for i in wanted])


def upright(frame):
    """A decoded frame as uint8 [H, W, 3], turned as the camera was."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def prepare(job, args, config):
    """Read the references and settle the size of the result -> (images, video, (frames, height, width)).

    An edit has the shape of what it edits; --height and --width are then its area."""
    sampling = config.sampling
    frames = (args.frames or sampling.frames) if job.is_video else 1
    size = sampling.video_size if job.is_video else sampling.image_size
    if args.height:
        size = (args.height, args.width)
    if job.is_video and frames == 1:
        raise InputError(f"--frames 1 is an image, and {TASKS[job.task]} makes a video")
    if len(job.images) > sampling.max_images:
        raise InputError(f"{len(job.images)} images, and the config allows {sampling.max_images}")
    check_memory((frames, *size), args, config.mmdit)
    area = math.prod(size) if args.height and job.is_edit else sampling.reference_area
    images = [Reference.image(read_image(path), area, config.vision) for path in job.images]
    video = Reference.video(Clip(job.video), frames, config.vision, area) if job.video else None
    if job.is_edit:
        frames, size = video.pixels.shape[2] if video else frames, (video or images[-1]).pixels.shape[3:]
        if 0 in size:
            raise InputError(f"{job.video} is too narrow: less than 16 pixels are left of a side")
        if args.height and tuple(size) != (args.height, args.width):
            args.notices.append(f"an edit keeps the shape of what it edits: {size[0]} x {size[1]}")
    return images, video, (frames, *size)


def check_memory(size, args, mmdit):
    """Refuse a result that cannot fit. A lower bound: the widest point of a single-stream block (its input,
    and attention and feed-forward before and after they are joined), and the pixels as floats."""
    tokens = ((size[0] - 1) // 4 + 1) * size[1] * size[2] // 256
    need = tokens * mmdit.width * (3 + 2 * mmdit.mlp_ratio) * args.dtype.itemsize + 12 * math.prod(size)
    if torch.device(args.device).type == "cuda":
        have = torch.cuda.get_device_properties(args.device).total_memory
    else:
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        shape = f"{size[0]} x {size[1]} x {size[2]} (frames x height x width)"
        raise InputError(f"{shape} needs over {need / 2**30:.0f} GiB, and {have / 2**30:.0f} are there")


# ----------------------------------------------------------------------------------------------------------
# Making and writing
# ----------------------------------------------------------------------------------------------------------


def run(job, args, config, tokenizer, load):
    """Do a job, from its references to its files. `load` gives the model. Raises InputError."""
    if not args.explain:
        check_outputs(job, args.overwrite)
    images, video, size = prepare(job, args, config)
    while args.notices:  # only now, so that an error is one line
        note(args.notices.pop(0))
    if args.rewrite:
        job.prompt = load().mm_encoder.rewrite(job.prompt) or job.prompt
        print(f"rewritten: {job.prompt}", flush=True)
    if args.explain:
        return print(explain(job, [*images, video] if video else images, size, tokenizer, config))
    model, sampling, kind = load(), config.sampling, int(job.is_video)
    settings = {
        "steps": args.steps or sampling.steps,
        "shift": sampling.shift[kind] if args.shift is None else args.shift,
        "cfg_text": sampling.cfg_text[kind] if args.cfg_text is None else args.cfg_text,
        "cfg_image": sampling.cfg_image if args.cfg_image is None else args.cfg_image,
    }
    told = f"{size[1]} x {size[2]}, {size[0]} frame{'s' * kind}, "
    told += ", ".join(f"{name.replace('_', '-')} {value:g}" for name, value in settings.items())
    settings |= {"negative_prompt": args.negative_prompt, "base": job.base, "size": size, "progress": True}
    for seed, path in job.outputs.items():
        note(f"{TASKS[job.task]}: {told}, seed {seed}")
        try:
            pixels = model.generate([job.prompt], images, video, seed=seed, **settings)[0]
        except (RuntimeError, MemoryError) as error:
            if not re.search("out of memory|can't allocate|nable to allocate", str(error)):
                raise
            raise InputError(f"too large for the memory of {args.device}: {told}") from error
        write(path, pixels, sampling.fps, {"command": args.command, "seed": seed, "prompt": job.prompt})
        print(path, flush=True)


def partial_name(path):
    """Where a file stands until it is complete."""
    return path.with_name(f"{path.name}.partial")


def check_outputs(job, overwrite):
    """Raise an InputError where a result cannot be written, before it is made."""
    for path in job.outputs.values():
        try:
            if path.exists() and not overwrite:
                raise InputError(f"{path} exists; --overwrite replaces it")
            partial_name(path).touch()
            partial_name(path).unlink()
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error


def write(path, pixels, fps, facts):
    """Write pixels [3, T, H, W] in [-1, 1] as the path's suffix says, with `facts` in the metadata. The file
    appears under its name when it is complete."""
    frames = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()
    comment, partial = json.dumps(facts, ensure_ascii=False), partial_name(path)
    try:
        if path.suffix.lower() == ".mp4":
            write_mp4(partial, frames, fps, comment)
        elif path.suffix.lower() == ".gif":
            first, *rest = map(Image.fromarray, frames)
            timing = {"duration": 1000 / fps, "loop": 0}
            first.save(partial, "GIF", save_all=True, append_images=rest, comment=comment.encode(), **timing)
        else:
            info = PngInfo()
            for name, value in facts.items():
                info.add_text(name, str(value))
            Image.fromarray(frames[0]).save(partial, "PNG", pnginfo=info)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def write_mp4(path, frames, fps, comment):
    """H.264 as every player knows it: yuv420p, whose colours have half the height and width."""
    with av.open(str(path), "w", format="mp4") as file:
        file.metadata["comment"] = comment
        stream = file.add_stream("libx264", rate=fps, options={"crf": "17"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def explain(job, references, size, tokenizer, config):
    """Figure 5 for this call: the packed sequence as a table."""

    def grid(frames, height, width):  # in patches of latents
        patch = config.mmdit.patch_size
        return ((frames - 1) // 4 + 1) // config.mmdit.patch_size_t, height // 8 // patch, width // 8 // patch

    prompt = vino.build_prompt(tokenizer, job.prompt, references, config.vision.spatial_merge_size)
    names = [f"Image {k}" for k in range(1, len(job.images) + 1)] + ["Video 1"] * bool(job.video)
    labels = []  # of every block: its source, and its place in the VLM's sequence
    for name, start, end in zip(names, prompt.starts, prompt.ends, strict=True):
        pieces = [("start token", start), ("latents", f"{start + 1}-{end - 1}"), ("end token", end)]
        labels += [
            (f"{name}, {piece}", at) for piece, at in pieces if config.boundary_tokens or piece == "latents"
        ]
    labels.append(("target", "-"))

    rows = [("source", "tokens", "t x h x w", "time", "in the VLM")]
    shapes = [grid(*reference.pixels.shape[2:]) for reference in references]
    blocks = vino.timeline(shapes, grid(*size), config.boundary_tokens)
    for (source, at), block in zip(labels, blocks, strict=True):
        last = block.time + block.shape[0] - 1
        time = f"{block.time}-{last}" if last > block.time else block.time
        rows.append((source, block.tokens, " x ".join(map(str, block.shape)), time, at))
    length, queries = len(prompt.ids), config.num_queries
    rows.append(("prompt", length, "-", "-", f"0-{length - 1}"))
    rows.append(
        ("learnable queries", queries, "-", "-", f"{length}-{length + queries - 1}" if queries else "-")
    )
    rows.append(("total", sum(row[1] for row in rows[1:]), "", "", ""))
    rows = [[str(cell) for cell in row] for row in rows]
    wide = [max(map(len, column)) for column in zip(*rows)]
    lines = [[a.ljust(wide[0]), b.rjust(wide[1]), *map(str.ljust, rest, wide[2:])] for a, b, *rest in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


# ----------------------------------------------------------------------------------------------------------


def run_tasks(args, config, tokenizer, load):
    """All jobs of a task file, with one model -> exit status 1 where items failed; the end names them."""
    jobs, failed = read_tasks(args), {}
    try:
        Path(args.out).mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {args.out}: {error.strerror}") from error
    load()
    for position, (index, job) in enumerate(jobs.items(), 1):
        note(f"[{position}/{len(jobs)}] {index}")
        try:
            run(job, args, config, tokenizer, load)
        except InputError as error:
            note(f"failed: {error}")
            failed[index] = error
    lines = [f"{len(failed)} of {len(jobs)} failed:"] + [f"  {index}: {why}" for index, why in failed.items()]
    note("\n".join(lines) if failed else f"all {len(jobs)} done")
    return int(bool(failed))


def main(argv=None):
    """Run the command line `argv` -> exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    args.command, args.notices = shlex.join(["python", "sample.py", *argv]), []
    transformers.logging.set_verbosity_error()
    torch.backends.cudnn.deterministic = True  # the same command gives the same picture
    try:
        weights, config, tokenizer = choose_weights(args)
        check_arguments(args, config)
        load = functools.cache(lambda: Vino.load(weights, config, args.device, args.dtype))
        if args.tasks:
            return run_tasks(args, config, tokenizer, load)
        run(single_job(args), args, config, tokenizer, load)
    except InputError as error:
        parser.error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
