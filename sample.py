"""The command line of VINO: read prompts, pictures and clips, call the model, write .png, .mp4 or .gif.

    python sample.py --prompt "a large red circle moving right" --out circle.mp4
    python sample.py --prompt "Put the hat of Image 1 on the man in Image 2." --image hat.jpg man.jpg --base
    torchrun --nproc-per-node 4 sample.py ...        (each sample on 4 GPUs)

The task follows from what you give:

    only a prompt       an image, or a video if --frames is above 1 or --out ends in .mp4 or .gif
    one image           an edit of it, or (as above) a video that begins with it
    several images      an edit of the last one, or a video of what they show
    a video             an edit of it; images guide the edit, or get the video's motion or camera

An edit has the shape of what it edits: --height and --width then set its area only.
An existing result is kept, unless the very same command made it or --overwrite is given.
A wrong command gets one line on stderr and exit status 2, before the model is loaded.
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
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

# Before torch starts: idle threads then sleep, not spin, which is many times faster on a busy machine.
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
    from vino import InputError, Reference, Vino
except KeyboardInterrupt:  # the imports take seconds
    print("sample.py: stopped", file=sys.stderr)
    sys.exit(130)

HERE = Path(__file__).parent
RANK = int(os.environ.get("RANK", 0))  # torchrun sets these two
WORLD = int(os.environ.get("WORLD_SIZE", 1))
TASKS = {  # the release's names: what goes in (text, image, video), what comes out
    "t2i": "text to image", "t2v": "text to video", "i2v": "image to video", "ti2i": "image edit",
    "ti2v": "images to video", "tv2v": "video edit", "tiv2v": "video edit with images",
}  # fmt: skip
TOO_LARGE = "too large for the GPU's memory: try --offload, fewer --frames, smaller --height and --width"


def say(*lines):
    """Print to stderr, above a progress bar: only the first process."""
    if RANK == 0:
        for line in lines:
            tqdm.write(line, file=sys.stderr)


def fail(message):
    """End with one line and status 2."""
    line, rank = " ".join(message.split())[:600], f" (rank {RANK})" if RANK else ""
    tqdm.write(f"sample.py: error{rank}: {line}", file=sys.stderr)
    sys.exit(2)


def show(text):
    """Print to stdout. A full disk or a closed pipe there does not harm the result, which is a file."""
    if RANK == 0:
        try:
            print(text, flush=True)
        except OSError as error:
            say(f"cannot print to stdout: {error.strerror}")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- Arguments ----------------------------------------------------------------------------------------------


def bounded(kind, least, most):
    """An argument's type: an int or a float from `least` to `most`."""

    def parse(text):
        if not least <= kind(text) <= most:
            raise ValueError
        return kind(text)

    parse.__name__ = f"{kind.__name__} ({least} to {most})"  # argparse reports "invalid {__name__} value"
    return parse


def build_parser():
    usage = "sample.py (--prompt TEXT | --tasks FILE.json) [options]"
    parser = argparse.ArgumentParser("sample.py", usage, __doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = fail
    side, scale = bounded(int, 16, 4096), bounded(float, 0, 1000)

    group = parser.add_argument_group("what to make")
    either, add = group.add_mutually_exclusive_group().add_argument, group.add_argument
    either("--prompt", metavar="TEXT", help="what to make, or what to change")
    either("--tasks", metavar="FILE", help="a .json of many jobs in the release's format; --out is a folder")
    add("--image", metavar="FILE", nargs="+", action="extend", default=[], help="Image 1, Image 2, ...")
    add("--video", metavar="FILE", nargs="+", action="extend", default=[], help="Video 1, the only one")
    add("--base", action="store_true", help="the last image is the one to edit, the others guide the edit")
    add("--rewrite", action=argparse.BooleanOptionalAction, help="let the VLM expand the prompt first")
    add("--rewrite-only", action="store_true", help="only write the task file, with the VLM's captions")

    add = parser.add_argument_group("the result").add_argument
    add("--out", metavar="PATH", help=".png, .mp4, .gif or a folder (default: named by prompt and seed)")
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--frames", metavar="N", type=bounded(int, 1, 10**6), help="4k + 1; 1 is an image")
    add("--height", metavar="H", type=side, help="a multiple of 16, together with --width")
    add("--width", metavar="W", type=side, help="a multiple of 16, together with --height")
    seed = bounded(int, 0, 2**32 - 1)  # torch's generator on the CPU uses 32 bits
    add("--seed", metavar="S", type=seed, default=0, help="of the noise and the VLM's caption (default: 0)")
    add("--count", metavar="K", type=bounded(int, 1, 10000), default=1, help="make K: seeds S, S + 1, ...")

    add = parser.add_argument_group("sampling (the config has defaults for images and videos)").add_argument
    add("--steps", metavar="N", type=bounded(int, 1, 1000), help="of the sampler")
    add("--cfg-text", metavar="X", type=scale, help="scale of text guidance; 1 or less turns it off")
    add("--cfg-image", metavar="X", type=scale, help="scale of image guidance, 1 to 3; 1 is off and fastest")
    add("--shift", metavar="X", type=bounded(float, 0.01, 1000), help="above 1: more steps at high noise")
    add("--negative-prompt", metavar="TEXT", help="what the guidance leads away from")
    add("--no-queries", action="store_true", help="without the learnable queries (figure 13)")

    add = parser.add_argument_group("the model").add_argument
    add("--weights", metavar="W", help="a .safetensors, a folder of the public weights, 'hub' or 'random'")
    add("--config", metavar="FILE", help="a .json with the fields of the config to change")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16, on a cpu float32")
    add("--offload", action="store_true", help="keep most weights in the host's memory: for a small GPU")
    add("--compile", action="store_true", help="torch.compile: half a minute first, then faster; for clips")
    add("--profile", action="store_true", help="at the end print where time and memory went")
    add("--explain", action="store_true", help="only print the packed sequence: figure 5 for this call")
    return parser


def check_arguments(args):
    """Refuse arguments that exclude each other, and round sizes down to legal ones, in place."""
    if args.prompt is None and args.tasks is None:
        raise InputError("say what to make: --prompt TEXT or --tasks FILE.json")
    if len(args.video) > 1:
        raise InputError(f"--video takes one file, not {len(args.video)}")
    single = args.image or args.video or args.base or args.explain or args.count > 1
    if args.prompt is None and not args.out:
        raise InputError("--tasks needs --out, a folder for what it makes")
    if args.prompt is None and single:
        raise InputError("--tasks excludes --image, --video, --base, --count and --explain")
    if args.rewrite_only and (args.prompt is not None or not args.out.endswith(".json")):
        raise InputError("--rewrite-only goes with --tasks FILE.json and --out FILE.json")
    if (args.height is None) != (args.width is None):
        raise InputError("--height and --width go together")
    for name, multiple, least in (("height", 16, 0), ("width", 16, 0), ("frames", 4, 1)):
        asked = getattr(args, name) or least
        legal = asked - (asked - least) % multiple
        if legal != asked:
            setattr(args, name, legal)
            say(f"--{name} {asked} is rounded down to {legal}")


def choose_device(args):
    """Settle --device and --dtype, in place."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # fails on "meta"
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} is not here") from error
    args.device = str(probe.device) if probe.is_cuda else probe.device.type  # safetensors knows no "cpu:0"
    if probe.is_cuda:
        torch.cuda.set_device(probe.device)
    elif args.offload:
        raise InputError("--offload needs a GPU")
    args.dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))


def choose_weights(args):
    """Settle --weights, in place -> their Config and tokenizer, without reading a tensor."""
    args.weights = args.weights or str(HERE / "assets/tiny.safetensors")
    path = args.config or (HERE / "tiny_config.json" if args.weights == "random" else None)
    config = vino.read_config(path, args.weights) if path else None
    if args.weights == "hub":  # --explain needs no more, and all else is checked before 60 GB are fetched
        vlm = vino.download(next(iter(vino.HUB)), ["tokenizer.json"])
        return config or vino.Config(), vino.read_tokenizer(vlm)
    config, tokenizer, _ = vino.open_weights(args.weights, config, args.device)
    return config, tokenizer


# --- Jobs ---------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One prompt with its references and results: the command line's, or an item of a task file, whose
    fields are all but the last."""

    index: str = ""  # the name of an item's result
    task: str = ""  # one of TASKS
    caption: str = ""
    ref_image_paths: list = vino.items()
    ref_video_path: str = ""
    ref_image_have_base: bool = False  # the last image is the one to edit
    caption_raw: str = ""  # what the user wrote, if `caption` is the VLM's
    outputs: dict | None = None  # by seed, their paths


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
        hint = "" if is_video else "; .mp4 and .gif make a video of 5 frames or more"
        raise InputError(f"--out {out}: {TASKS[task]} goes to a {' or '.join(legal)}, or a folder{hint}")
    outputs = {}
    for seed in range(args.seed, args.seed + args.count):
        outputs[seed] = out.with_stem(f"{out.stem}_{seed}") if is_folder or args.count > 1 else out
    return Job("", task, args.prompt, args.image, *(args.video or [""]), args.base, outputs=outputs)


def read_jobs(items, args):
    """The jobs of the items of --tasks. An InputError names the item that is wrong."""
    if not isinstance(items, list) or not items:
        raise InputError(f"{args.tasks}: should be a list of items")
    jobs = []
    for position, item in enumerate(items, 1):
        try:
            job = read_item(item, args)
            if any(job.outputs == other.outputs for other in jobs):
                raise InputError("an item before it has the same index")
        except InputError as error:
            raise InputError(f"{args.tasks}, item {position}: {error}") from error
        jobs.append(job)
    return jobs


def read_item(item, args):
    """The job of one item. Paths are relative to the working directory or, if not found, to the task file."""
    job = Job()
    if isinstance(item, dict):
        item = {name: value for name, value in item.items() if name in vars(job) and value is not None}
        item["index"] = str(item.get("index", ""))
        for name in ("index", "task", "caption"):
            if not item.get(name):
                raise InputError(f"'{name}' is missing or empty")
    vino.override(job, item, "")
    if not re.fullmatch(r"(?!\.\.?$)[^/\0\ud800-\udfff]{1,200}", job.index):
        raise InputError(f"'index' should be a file's name, and is {json.dumps(job.index)[:60]}")
    paths = [*job.ref_image_paths, job.ref_video_path]
    if not all(isinstance(path, str) for path in paths):
        raise InputError("'ref_image_paths' should be paths")
    paths = [path if Path(path).exists() else Path(args.tasks).parent / path for path in paths]
    *job.ref_image_paths, job.ref_video_path = paths
    if job.task not in TASKS:
        raise InputError(f"unknown task '{job.task[:60]}', known: {', '.join(TASKS)}")
    source, result = job.task.split("2")
    if ("i" in source, "v" in source) != (bool(job.ref_image_paths), bool(job.ref_video_path)):
        raise InputError(f"task {job.task} ({TASKS[job.task]}) does not go with these references")
    job.outputs = {args.seed: Path(args.out, f"{job.index}{'.mp4' if result == 'v' else '.png'}")}
    return job


# --- From the references to the files -----------------------------------------------------------------------


def prepare(job, args, config):
    """Check a job and read its references -> (images, video, (frames, height, width) of the result)."""
    if not job.caption.strip():
        raise InputError("the prompt is empty")
    if re.search(r"[\ud800-\udfff]", f"{job.caption}{args.negative_prompt}"):  # half of a surrogate pair
        raise InputError("the prompt is not valid UTF-8")
    if job.ref_image_have_base and len(job.ref_image_paths) < 2:
        raise InputError("--base needs two images or more: the last is edited, the others guide")
    sampling, is_video = config.sampling, job.task.endswith("v")
    if len(job.ref_image_paths) > sampling.max_images:
        raise InputError(f"{len(job.ref_image_paths)} images, and the config allows {sampling.max_images}")
    frames = (args.frames or sampling.frames) if is_video else 1
    if frames > sampling.max_frames:
        raise InputError(f"--frames {frames}: the config allows {sampling.max_frames}")
    if is_video and frames == 1:
        raise InputError(f"--frames 1 is an image, and {TASKS[job.task]} makes a video")

    size = sampling.video_size if is_video else sampling.image_size
    area, is_edit = sampling.reference_area, job.task not in ("t2i", "t2v", "ti2v")
    if args.height:
        size = (args.height, args.width)
        area = math.prod(size) if is_edit else area
    images = [Reference.image(vino.read_image(path), area, config.vision) for path in job.ref_image_paths]
    video = None
    if job.ref_video_path:
        video = vino.read_video(job.ref_video_path, frames, area, config.vision)
        frames = video.pixels.shape[2]
    if is_edit:
        size = (video or images[-1]).pixels.shape[3:]
    return images, video, (frames, *size)


def notices(job, tokenizer):
    """What the user may not have meant, a line each."""
    words = dict.fromkeys(re.findall(r"[^\W\d_]+", job.caption))
    strange = [f"'{word}'" for word in words if "[UNK]" in tokenizer.encode(word).tokens]
    if strange:
        mean = "means" if len(strange) == 1 else "mean"
        advice = "these weights know coloured shapes only; the README tells how to get the real ones"
        yield f"{', '.join(strange)} {mean} nothing to this model: {advice}"
    given = {f"Image {k}" for k in range(1, len(job.ref_image_paths) + 1)}
    given |= {"Video 1"} if job.ref_video_path else set()
    for name in sorted({*re.findall(r"\b(?:Image|Video) \d+", job.caption)} - given):
        yield f"the prompt names {name}, which is not given"


def run(job, args, config, tokenizer, load):
    """Do a job, from its references to its files. `load` gives the model."""
    images, video, size = prepare(job, args, config)
    outputs = {} if args.explain or args.rewrite_only else job.outputs
    for seed, path in outputs.items():
        check_writable(path, args, seed, job.caption)
    say(*notices(job, tokenizer))  # after all that may end in an error line
    by_default = config.sampling.rewrite and job.task in ("t2i", "t2v") and args.weights != "random"
    by_default = by_default and not job.caption_raw
    rewrites = args.rewrite_only or (by_default if args.rewrite is None else args.rewrite)

    def caption(seed):
        if not rewrites:
            return job.caption
        text = load().rewrite([job.caption_raw or job.caption], images, video, seed)[0] or job.caption
        say(f"rewritten: {text}")
        return text

    if args.rewrite_only:
        job.caption = caption(args.seed)
    if args.explain:
        references = [*images, video] if video else images
        config = replace(config, num_queries=0) if args.no_queries else config
        show(explain(caption(args.seed), references, size, tokenizer, config))
    for seed, path in outputs.items():
        say("{}: {} frame(s) of {} x {}, seed {}".format(TASKS[job.task], *size, seed))
        prompt = caption(seed)
        pixels = load().generate(
            [prompt], images, video, size=size, base=job.ref_image_have_base, steps=args.steps,
            shift=args.shift, cfg_text=args.cfg_text, cfg_image=args.cfg_image, seed=seed,
            negative_prompt=args.negative_prompt, progress=RANK == 0,
            group=dist.group.WORLD if WORLD > 1 else None,
        )  # fmt: skip
        if pixels is not None:
            facts = {"command": args.command, "seed": seed, "asked": job.caption, "prompt": prompt}
            write(path, encode(path.suffix.lower(), pixels[0], config.sampling.fps, facts))
            show(path)


def check_writable(path, args, *made):
    """Fail before the work if a file cannot be written. Results of this very command may be replaced: `made`
    is the seed and the prompt."""
    if path.exists() and not args.overwrite and made_by(path) != (args.command, *made):
        raise InputError(f"{path} exists; --overwrite replaces it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.{os.getpid()}.partial")
    partial.touch()
    partial.unlink()


def made_by(path):
    """The command, the seed and the prompt that made a result, or None for any other file."""
    plugin = "pyav" if path.suffix.lower() == ".mp4" else "pillow"
    try:
        facts = json.loads(imageio.immeta(path, plugin=plugin)["comment"])
        return facts["command"], facts["seed"], facts["asked"]
    except Exception:  # a damaged file can fail anywhere in a decoder; nobody's command has made it
        return None


def encode(suffix, pixels, fps, facts):
    """Pixels [3, T, H, W] in [-1, 1] as the bytes of a .png, .mp4 or .gif, with `facts` in the metadata."""
    frames = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()
    file, comment = BytesIO(), json.dumps(facts)
    if suffix == ".mp4":  # H.264 in yuv420p, which every player knows: half the colours' height and width
        with imageio.imopen(file, "w", plugin="pyav", extension=suffix) as video:
            video.container_metadata["comment"] = comment
            video.write(frames, codec="libx264", fps=fps, out_pixel_format="yuv420p")
    elif suffix == ".gif":
        first, *rest = map(Image.fromarray, frames)
        timing = {"duration": 1000 / fps, "loop": 0, "comment": comment.encode()}
        first.save(file, "GIF", save_all=True, append_images=rest, **timing)
    else:
        info = PngInfo()
        info.add_text("comment", comment)
        Image.fromarray(frames[0]).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def write(path, content):
    """Write bytes to a file that has its name only when it is complete, and else is removed."""
    partial = Path(f"{path}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# --- --explain and --profile --------------------------------------------------------------------------------


def explain(text, references, size, tokenizer, config):
    """Figure 5 for this call: the packed sequence as a table."""
    prompt = vino.build_prompts(tokenizer, [text], references, config.vision.spatial_merge_size)
    side = 8 * config.mmdit.patch_size  # pixels of a token
    token = (1, side, side)
    parts = []  # of the MMDiT's sequence: source, size in pixels, place in the VLM
    for k, (reference, start, end) in enumerate(zip(references, prompt.starts, prompt.ends), 1):
        name = "Video 1" if reference.is_video else f"Image {k}"
        first = (f"{name}, start token", token, start)
        latents = (f"{name}, latents", reference.pixels.shape[2:], f"{start + 1}-{end - 1}")
        last = (f"{name}, end token", token, end)
        parts += [first, latents, last] if config.boundary_tokens else [latents]
    parts.append(("target", size, "-"))

    rows, begin = [("source", "tokens", "time", "in the VLM")], 0
    for source, (frames, height, width), place in parts:
        times = ((frames - 1) // 4 + 1) // config.mmdit.patch_size_t
        tokens = times * (height // side) * (width // side)
        rows.append((source, tokens, f"{begin}-{begin + times - 1}", place))
        begin += times
    length, queries = prompt.ids.shape[1], config.num_queries
    rows.append(("prompt", length, "-", f"0-{length - 1}"))
    rows.append(("learnable queries", queries, "-", f"{length}-{length + queries - 1}" if queries else "-"))
    rows.append(("total", sum(row[1] for row in rows[1:]), "-", "-"))
    return "\n".join("{:<20}  {:>7}  {:<7}  {}".format(*row) for row in rows)


def watch(model, device, seconds):
    """From here on, append the seconds of each forward pass of a part of the model to seconds[name]."""
    vlm = model.mm_encoder.mm_encoder.model
    parts = {"vision tower": vlm.visual, "language model": vlm.language_model, "MMDiT": model.transformer}
    parts |= {"VAE, encoder": model.vae.encoder, "VAE, decoder": model.vae.decoder}

    def clock():
        torch.get_device_module(device).synchronize()
        return time.perf_counter()

    for name, part in parts.items():
        calls = seconds[name] = []
        part.register_forward_pre_hook(lambda *_, calls=calls: calls.append(-clock()))
        part.register_forward_hook(lambda *_, calls=calls: calls.append(calls.pop() + clock()))


def profile(seconds, device):
    """What `watch` has measured, as a table. The first call of the MMDiT includes compiling."""
    lines = ["part             calls  first s  others s"]
    for name, calls in seconds.items():
        lines.append(f"{name:<16} {len(calls):>5} {sum(calls[:1]):>8.2f} {sum(calls[1:]):>9.2f}")
    if device.startswith("cuda"):
        lines.append(f"most memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    return "\n".join(lines)


# --- Main ---------------------------------------------------------------------------------------------------


def run_tasks(args, do, load):
    """do(job) for each item of --tasks -> whether any failed; these are named at the end. --rewrite-only then
    writes the file again: `caption` is the VLM's, `caption_raw` the user's."""
    items, out = vino.read_json(args.tasks), Path(args.out)
    jobs, failed = read_jobs(items, args), []
    if args.rewrite_only:
        check_writable(out, args)
    elif out.is_file():
        raise InputError(f"--out {out} is a file; --tasks needs a folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
    load()  # what fails here fails every item
    for position, job in enumerate(jobs, 1):
        name = job.outputs[args.seed].name
        say(f"[{position}/{len(jobs)}] {name}")
        try:
            do(job)
        except (InputError, OSError) as error:
            failed.append(f"  {name}: {error}")
        except torch.OutOfMemoryError:
            if WORLD > 1:
                raise  # the other processes wait in this sample, until torchrun ends them
            failed.append(f"  {name}: {TOO_LARGE}")
    say(f"{len(jobs) - len(failed)} of {len(jobs)} made", *failed)
    if args.rewrite_only and RANK == 0:
        for item, job in zip(items, jobs, strict=True):
            item |= {"caption_raw": job.caption_raw or item["caption"], "caption": job.caption}
        text = json.dumps(items, indent=2, ensure_ascii=False) + "\n"
        write(out, text.encode("utf-8", "surrogatepass"))
        show(out)
    return bool(failed)


def work(args):
    """Do what the arguments ask for -> whether any item of a task file failed."""
    check_arguments(args)
    choose_device(args)
    config, tokenizer = choose_weights(args)
    heads = config.mmdit.num_attention_heads
    if heads % WORLD:
        raise InputError(f"{WORLD} processes cannot share {heads} attention heads evenly")
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.startswith("cuda") else "gloo")
    seconds = {}  # for --profile

    @functools.cache
    def load():
        model = Vino.load(args.weights, config, "cpu" if args.offload else args.device, args.dtype)
        if args.offload:
            model.offload(args.device)
        if args.no_queries:
            model.remove_queries()
        for block in model.transformer.blocks() if args.compile else ():
            block.forward = vino.compiled(block.forward)  # without hooks: these fetch offloaded weights
        if args.profile:
            watch(model, args.device, seconds)
        return model

    do = functools.partial(run, args=args, config=config, tokenizer=tokenizer, load=load)
    failed = run_tasks(args, do, load) if args.prompt is None else do(single_job(args))
    if seconds:
        show(profile(seconds, args.device))
    return bool(failed)


def main(argv=None):
    """Run the command line `argv` -> exit status."""
    argv = sys.argv[1:] if argv is None else argv
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know the letters of a name
    args = build_parser().parse_args(argv)
    args.command = shlex.join(["python", "sample.py", *argv])
    torch.backends.cudnn.deterministic = True  # the same command gives the same picture
    try:
        failed = work(args)
    except InputError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except torch.OutOfMemoryError:
        fail(TOO_LARGE)
    except KeyboardInterrupt:
        say("sample.py: stopped")
        return 130
    if dist.is_initialized():
        dist.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
