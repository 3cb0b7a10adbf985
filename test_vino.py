"""Each test is a claim of the README or of the paper's method; its name is the claim.

`VINO_GOLDEN` (folders separated by ":") replaces assets/golden by other golden runs of that format.
"""

import contextlib
import copy
import functools
import gc
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import MethodType, SimpleNamespace
from unittest.mock import Mock, patch

# Before torch starts: idle threads that sleep leave a busy machine to those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.run
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import multiprocessing
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import sample as command_line
import train
import vino
from toy import benchmark, figures, pretrain
from toy.test_toy import SMALL
from vino import VAE, Config, InputError, MMDiT, Reference, Vino, build_prompts

gc.freeze()  # imageio collects garbage whenever it closes a file
HERE = Path(__file__).parent
GOLDEN = [Path(folder) for folder in os.environ.get("VINO_GOLDEN", str(HERE / "assets/golden")).split(":")]
CASES = [path.with_suffix("") for folder in GOLDEN for path in sorted(folder.glob("*2*.safetensors"))]


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def tiny_config():
    return vino.read_config(HERE / "tiny_config.json", "random")


@pytest.fixture(scope="session")
def tiny():
    """The tiny architecture with seeded random weights."""
    return Vino.load("random", tiny_config())


@pytest.fixture(scope="session")
def photo(tiny):
    """A reference image with some structure, 48 x 80."""
    ramp = np.linspace(0, 255, 48 * 80 * 3).reshape(48, 80, 3).astype(np.uint8)
    return Reference.image(Image.fromarray(ramp), 48 * 80, tiny.config.vision)


@pytest.fixture(scope="session")
def clip(tiny):
    """A reference video of noise, 9 frames of 64 x 64."""
    frames = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), dtype=np.uint8)
    return Reference.video(frames, frames[vino.spread_frames(9, 8)], tiny.config.vision)


@pytest.fixture(scope="session")
def small_config(tmp_path_factory):
    """A config file of a very small model, with 32 x 32 frames, few tasks, batches of 2, a fast average."""
    tiny = json.loads((HERE / "tiny_config.json").read_text())
    for section, values in SMALL.items():
        tiny[section] = tiny[section] | values if isinstance(values, dict) else values
    stage = {"area": 1024, "batch": 2, "lr": 1e-3, "steps": 6, "warmup": 0, "cooldown": 0}
    few = dict.fromkeys(("t2i", "ti2i", "ti2v", "tiv2v"), 1)  # validation visits every task of a mixture
    tiny["training"] = {"1": stage, "2": stage | {"ema": 0.9}, "3": stage | {"ema": 0.9, "mixture": few}}
    path = tmp_path_factory.mktemp("config") / "small.json"
    path.write_text(json.dumps(tiny))
    return path


def film(path, frames):
    """Write uint8 frames [T, H, W, 3] without loss, 8 a second."""
    with vino.imageio.imopen(path, "w", plugin="pyav") as file:
        file.write(frames, codec="ffv1", fps=8, out_pixel_format="bgr0")


# --- The public release's numbers ---------------------------------------------------------------------------


@functools.cache
def golden_model(folder):
    """The tiny VINO of a golden folder, from its config and weights."""
    golden = json.loads((folder / "config.json").read_text())
    sizes = golden["cfg"]
    text = dict(sizes["text"], vocab_size=golden["vlm_config"]["text_config"]["vocab_size"])
    text["mrope_section"] = text.pop("rope_scaling")["mrope_section"]
    del sizes["mmdit"]["qk_norm"], sizes["mmdit"]["guidance_embeds"]
    parts = {name: sizes[name] for name in ("vision", "mmdit", "vae", "num_queries")}
    config = Config.from_dict({"text": text, **parts})
    assert vino.SPECIAL_TOKENS == sorted(golden["special_tokens"], key=golden["special_tokens"].get)
    names, stream = {"mmdit": "transformer", "vae": "vae", "vlm": "mm_encoder.mm_encoder"}, []
    for name, tensor in load_file(folder / "weights.safetensors").items():
        first, dot, rest = name.partition(".")
        stream.append((names.get(first, f"mm_encoder.{first}") + dot + rest, tensor))
    with torch.device("meta"):
        model = Vino(config, vino.byte_tokenizer())
    model.fill(stream, folder, "cpu", torch.float32)
    return model.eval()


def golden_run(path):
    """A call of the release with its numbers, and the model, images and videos (one or none) that it had."""
    call, golden = json.loads(path.with_suffix(".json").read_text()), load_file(f"{path}.safetensors")
    model, videos = golden_model(path.parent), []
    vision, area = model.config.vision, math.prod(call["letterbox_area_hw"])
    pictures = [golden[f"in.image_{k}"].numpy() for k in range(len(call.get("images", [])))]
    images = [Reference.image(Image.fromarray(picture), area, vision) for picture in pictures]
    if "in.video" in golden:
        frames = golden["in.video"].numpy()
        first = frames[: (min(call["out"][0], len(frames)) - 1) // 4 * 4 + 1]
        videos = [Reference.video(first, frames[vino.spread_frames(len(frames), 8)], vision)]
    return call, golden, model, images, videos


def compare(golden, name, ours, most=1e-4):
    """The error of `ours`. Of large tensors the golden runs hold only every n-th row."""
    [key] = [key for key in golden if key.split(".rows_")[0] == name]
    step = int(key.split(".rows_")[1]) if ".rows_" in key else 1
    error = relative_error(ours[::step] if ours.dim() == 2 else ours[:, ::step], golden[key])
    print(f"{name:24} {error:.1e}")  # shown by pytest -rP
    assert error < most, name
    return error


def compare_conditions(golden, model, call, encoded, negative, guidance):
    """The prompt, what the VLM makes of it, and the condition and the velocity of each guidance branch."""
    encoder, prompts = model.mm_encoder, [call["prompt"]]
    built = build_prompts(encoder.tokenizer, prompts, encoded, encoder.merge)
    assert torch.equal(built.ids, golden["cond.input_ids"])
    assert (built.starts, built.ends) == (call["cond.pos_vs"][0], call["cond.pos_ve"][0][: len(encoded)])
    hidden = encoder.hidden_states(prompts, encoded)[0]
    compare(golden, "cond.penultimate", hidden)
    compare(golden, "cond.embeds_vae", encoder.connector_vae_branch(hidden))
    branches = model.branches(prompts, [negative], encoded, call.get("base", False), **guidance)
    names = {"full": "cond", "text_dropped": "uncond_text", "image_dropped": "uncond_image"}
    for name, (_, condition) in branches.items():
        compare(golden, f"{names[name]}.embeds_vlm", condition.tokens)
        velocity = model.transformer(golden["noise"], golden["timesteps"][:1], condition)
        compare(golden, f"velocity.{names[name]}", velocity)
    for k, (start, _, end) in enumerate(branches["full"][1].references):
        compare(golden, f"boundary_{k}", torch.cat([start, end]))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@torch.no_grad()
def test_every_stage_equals_the_public_release(path):
    call, golden, model, images, videos = golden_run(path)
    for references, name in ((images, "pixel_values"), (videos, "pixel_values_videos")):
        if references:
            patches = torch.cat([reference.patches[0] for reference in references])
            if compare(golden, f"cond.{name}", patches, most=5e-3) > 1e-4:
                pytest.skip("Pillow before 13 resizes some pixels differently")
    for k, image in enumerate(images):
        letterboxed = ((image.pixels[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0)
        assert torch.equal(letterboxed, golden[f"letterboxed_{k}"])
    encoded = [model.encode(reference) for reference in images + videos]
    for k, reference in enumerate(encoded):
        compare(golden, f"ref_latent_{k}", reference.latents)
    negative = call["negative_prompt_video" if call["out"][0] > 1 else "negative_prompt"]
    guidance = {"cfg_text": call["cfg_text"], "cfg_image": call["cfg_image"]}
    compare_conditions(golden, model, call, encoded, negative, guidance)
    with patch.object(model.vae, "decode", wraps=model.vae.decode) as decode:
        settings = {"size": call["out"], "steps": call["steps"], "shift": call["shift"], **guidance}
        settings |= {"base": call.get("base", False), "negative_prompt": negative, "noise": golden["noise"]}
        pixels = model.generate([call["prompt"]], images, *videos, **settings)
    compare(golden, "latents", decode.call_args.args[0])
    compare(golden, "pixels", pixels)


@torch.no_grad()
def test_the_mmdit_in_bfloat16_errs_no_more_than_the_release():
    errors = []
    for call, golden, model, images, videos in map(golden_run, CASES):
        encoded = [model.encode(reference) for reference in images + videos]
        half = copy.deepcopy(model.transformer).bfloat16()
        velocity = half(golden["noise"], golden["timesteps"][:1], model.mm_encoder([call["prompt"]], encoded))
        errors.append(relative_error(velocity.float(), golden["velocity.cond"]))
    assert np.mean(errors) < 1.1 * 0.0106  # 1.06%: the release's own error


def test_sizes_of_references_equal_the_release():
    defaults = Config().vision
    for case in json.loads((HERE / "assets/golden/sizes.json").read_text()):
        h, w = vino.letterbox_size(*case["src_wh"], case["area"])
        assert [h, w] == case["letterbox_hw"]
        once = vino.vlm_size(h, w, *defaults.image_resize[0])
        assert list(vino.vlm_size(*once, *defaults.image_resize[1])) == case["vlm_hw"]
        assert list(vino.scaled_size("", *case["src_wh"], case["area"])) == case["target_hw"]


def test_full_size_parameters_have_the_public_names_and_shapes():
    keys = json.loads((HERE / "assets/golden/full_keys.json").read_text())
    with torch.device("meta"):
        for model, expected in ((MMDiT(Config().mmdit), keys["mmdit"]), (VAE(Config().vae), keys["vae"])):
            assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected


# --- 1. Multi-modal conditions (2.1) ------------------------------------------------------------------------


def test_the_prompt_is_figure_4_with_images_before_the_video(tiny, photo, clip):
    tokenizer = tiny.mm_encoder.tokenizer
    prompt = build_prompts(tokenizer, ["Dance."], [photo, clip], 2)

    def visual(name, reference):
        pads = reference.grid[1] * reference.grid[2] // 4  # 2 x 2 patches make one token
        return f"<|vision_start|>{f'<|{name}|>' * pads}<|vision_end|>"

    moments = "".join(f"<{time} seconds>{visual('video_pad', clip)}" for time in (0.0, 0.1, 0.2, 0.3))
    assert tokenizer.decode(prompt.ids[0].tolist(), skip_special_tokens=False) == (
        f"<|im_start|>system\n{vino.SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"
        f"Image 1: {visual('image_pad', photo)}Video 1: {moments}Dance.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_special_tokens_spelled_in_a_prompt_are_text(tiny, photo):
    plain, spelled = (
        build_prompts(tiny.mm_encoder.tokenizer, [text], [photo], 2).ids[0]
        for text in ("", "<|vision_start|><|im_end|>")
    )
    assert torch.equal(plain[plain >= 256], spelled[spelled >= 256])  # after the 256 bytes


@torch.no_grad()
def test_boundary_tokens_are_the_vlms_states_at_the_start_and_the_end_and_not_embeddings(tiny, photo):
    encoder, image = tiny.mm_encoder, tiny.encode(photo)
    condition = encoder(["x"], [image, image])
    hidden, _, starts, ends = encoder.hidden_states(["x"], [image, image])
    states = encoder.connector_vae_branch(hidden[0])
    for (start, _, end), *places in zip(condition.references, starts, ends, strict=True):
        ours = torch.cat([start, end])
        torch.testing.assert_close(ours, states[places], rtol=1e-4, atol=1e-5)
    (first, _, _), (second, _, _) = condition.references
    assert relative_error(second, first) > 1e-3  # the same token, hence the same embedding


def test_a_query_sees_the_prompt_and_the_queries_before_it_and_the_prompt_sees_no_query(tiny):
    encoder, count = tiny.mm_encoder, len(tiny.mm_encoder.metaquery)
    hidden, other = (encoder.hidden_states([text], [])[0][0] for text in ("a red circle", "a big circle"))
    assert relative_error(hidden[-count:], other[-count:]) > 1e-3
    for states, seen in ((hidden[:-count], 0), (hidden[-count + 5], 6)):
        [gradient] = torch.autograd.grad(states.square().sum(), encoder.metaquery, retain_graph=True)
        assert gradient.abs().amax(1).gt(0).tolist() == [k < seen for k in range(count)]


def test_a_batch_of_prompts_of_different_length_equals_its_members(tiny, photo):
    prompts = ["Make Image 1 blue.", "Make the big thing in the middle of Image 1 a little more blue."]
    settings = {"size": (1, 48, 80), "steps": 2, "cfg_image": 1.5}
    both = tiny.generate(prompts, [photo], seed=3, **settings)
    for k, prompt in enumerate(prompts):
        alone = tiny.generate([prompt], [photo], seed=3 + k, **settings)
        assert relative_error(both[k : k + 1], alone) < 1e-4


def test_answers_are_greedy_and_the_same_alone_and_in_a_batch(tiny, photo):
    encoder, ask = tiny.mm_encoder, functools.partial(tiny.mm_encoder.answer, max_new_tokens=6)
    questions, references = ["What is it?", "And where on earth is it?"], [tiny.encode(photo)]
    alone = [ask([question], references)[0] for question in questions]
    assert ask(questions, references) == alone
    ids = build_prompts(encoder.tokenizer, ["What is it?"], [], 2).ids
    theirs = encoder.mm_encoder.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :]
    assert ask(["What is it?"]) == [encoder.tokenizer.decode(theirs.tolist()).strip()]


def test_each_seed_has_its_own_caption_of_the_likelier_half_of_what_the_vlm_could_write():
    model = Vino.load(train.TINY)
    captions = model.rewrite(["two squares"] * 6, seed=3)
    assert len({*captions}) > 2 and captions[2] == model.rewrite(["two squares"], seed=5)[0]
    logits = torch.tensor([[0.1, 0.3, 0.4, 0.2]]).log()
    generators = [torch.Generator().manual_seed(0)]
    assert {vino.next_token(logits, generators).item() for _ in range(50)} == {1, 2}
    assert vino.next_token(logits, None).item() == 2


def test_rewriting_shows_the_vlm_the_references_and_a_system_line_of_its_own(tiny, photo):
    with patch.object(tiny.mm_encoder, "answer") as answer:
        tiny.rewrite(["Make it blue."], [photo])
    prompts, [reference], system, seed = answer.call_args.args
    assert prompts == ["Make it blue."] and system == tiny.config.sampling.rewrite_system and seed == 0
    assert torch.equal(reference.latents, tiny.encode(photo).latents)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5])
def test_the_vision_tower_sees_each_reference_of_a_batch_as_if_alone(tiny, frames):
    pixels = torch.rand(3, 3, frames, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    patches, grid = vino.patchify(pixels, tiny.config.vision)

    def encode(rows):
        return tiny.mm_encoder.encode_vision(Reference(pixels[rows], patches[rows], grid, frames > 1))

    for together, *alone in zip(encode(slice(None)), *[encode([k]) for k in range(3)]):
        torch.testing.assert_close(together, torch.cat(alone))


# --- 2. Interleaved omnimodal context (2.2) -----------------------------------------------------------------


def test_references_boundary_tokens_and_target_share_one_timeline():
    def block(value, *shape):
        return torch.full((1, 8, *shape), float(value))

    image, video, target = block(1, 1, 2, 3), block(2, 3, 2, 2), block(3, 2, 2, 3)
    tokens, positions = vino.pack([(block(10), image, block(11)), (block(20), video, block(21))], target)
    assert tokens[0, :, 0].tolist() == [10] + [1] * 6 + [11, 20] + [2] * 12 + [21] + [3] * 12
    times = [0] + [1] * 6 + [2, 3] + [4] * 4 + [5] * 4 + [6] * 4 + [7] + [8] * 6 + [9] * 6
    assert positions[:, 0].tolist() == times
    assert positions[0].tolist() == [0, 0, 0] and positions[7].tolist() == [2, 0, 0]
    assert positions[1:7, 1:].tolist() == [[h, w] for h in range(2) for w in range(3)]
    _, plain = vino.pack([(None, image, None), (None, video, None)], target)  # figure 11's ablation
    assert plain[:, 0].unique().tolist() == [0, 1, 2, 3, 4, 5]


# --- 4. VAE -------------------------------------------------------------------------------------------------


def test_tiles_give_the_whole_where_they_agree_and_are_blended_where_they_do_not():
    def grow(part):  # as the decoder does: one frame for the first, four for each other
        return torch.cat([part[:, :, :1], part[:, :, 1:].repeat_interleave(4, 2)], 2)

    x = torch.randn(1, 2, 23, 50, 41)
    torch.testing.assert_close(vino.tiled(torch.abs, x, 3, (16, 12), 1), x.abs())
    torch.testing.assert_close(vino.tiled(grow, x, 2, (16, 12), 4, lead=1), grow(x))
    numbers = itertools.count()
    blended = vino.tiled(lambda part: torch.full_like(part, next(numbers)), torch.zeros(28), 0, (16, 12), 1)
    assert blended.tolist() == [0] * 12 + [0, 0.25, 0.5, 0.75] + [1] * 8 + [1, 1.25, 1.5, 1.75]


@torch.no_grad()
def test_large_frames_are_decoded_in_tiles_of_bounded_size():
    vae, seen = VAE(tiny_config().vae), []
    vae.config.tile_pixels, vae.config.untiled_area = [32, 24], 32 * 32
    vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[2:]))
    assert vae.decode(torch.randn(1, 16, 7, 5, 7)).shape == (1, 3, 25, 40, 56)
    assert max(t for t, _, _ in seen) <= 5 and max(h * w for _, h, w in seen) <= 4 * 4


@torch.no_grad()
def test_latent_frames_depend_on_the_past_only_and_the_first_one_is_an_image_of_its_own(tiny):
    pixels = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    changed = torch.cat([pixels[:, :, :5], -pixels[:, :, 5:]], 2)
    with patch.object(torch.nn.GroupNorm, "forward", lambda self, x: x):  # norms see all frames of a tile
        ours, other, first = (tiny.vae.encode(x) for x in (pixels, changed, pixels[:, :, :1]))
    assert ours.shape == (1, 16, 3, 4, 6)
    torch.testing.assert_close(ours[:, :, :2], other[:, :, :2])
    torch.testing.assert_close(ours[:, :, :1], first)


# --- 5. Rectified flow and guidance (appendix B) ------------------------------------------------------------


def test_the_loss_is_zero_for_the_true_velocity_and_the_sampler_follows_it_to_the_data():
    data, noise = torch.randn(2, 4, 4, 1, 3, 3).bfloat16().float()
    u = torch.tensor([0.2, 0.4, 0.6, 0.8])

    def velocity(x, t):
        assert torch.equal(t, vino.shift_time(u, 5))
        return (x - data) / t.view(-1, 1, 1, 1, 1)  # on the straight line alone this is noise - data

    loss = vino.flow_loss(velocity, data, noise, u, shift=5)
    assert loss.shape == (4,) and loss.max() < 1e-6
    result = vino.sample(lambda x, t: noise - data, noise.bfloat16(), 7, 5.0)  # steps in float32 all the same
    torch.testing.assert_close(result, data, rtol=1e-4, atol=1e-5)


def test_guidance_is_the_papers_formula_and_weights_up_to_1_switch_it_off():
    v, text_dropped, image_dropped = torch.randn(3, 5)
    for cfg_text, cfg_image, w_text, w_image in ((5, 1, 5, 1), (7, 1.5, 7, 1.5), (0.5, 0, 1, 1)):
        weights = vino.guidance_weights(cfg_text, cfg_image).values()
        ours = sum(weight * branch for weight, branch in zip(weights, (v, text_dropped, image_dropped)))
        theirs = image_dropped + w_image * (text_dropped - image_dropped) + w_text * (v - text_dropped)
        torch.testing.assert_close(ours, theirs)


def test_guidance_runs_only_the_branches_that_count(tiny, photo, clip):
    image, other, video = tiny.encode(photo), tiny.encode(photo), tiny.encode(clip)
    assert [*tiny.branches(["x"], [""], [image], False, 1.0, 1.0)] == ["full"]
    assert [*tiny.branches(["x"], [""], [image], False, 5.0, 1.0)] == ["full", "text_dropped"]
    assert [*tiny.branches(["x"], [""], [video], False, 5.0, 3.0)] == ["full", "text_dropped"]
    branches = tiny.branches(["x"], [""], [image, other, video], True, 5.0, 1.5)
    assert [*branches] == ["full", "text_dropped", "image_dropped"]
    kept = [latents.data_ptr() for _, latents, _ in branches["image_dropped"][1].references]
    assert kept == [other.latents.data_ptr(), video.latents.data_ptr()]  # other is the image being edited


# --- 6 and 7. Vino, and several GPUs for one sample ---------------------------------------------------------


def test_bfloat16_rounds_the_vlms_rope_frequencies_as_the_release_does(tiny):
    half = Vino.load("random", tiny.config, dtype=torch.bfloat16)
    for part in ("visual.rotary_pos_emb", "language_model.rotary_emb"):
        ours, exact = (m.get_buffer(f"mm_encoder.mm_encoder.model.{part}.inv_freq") for m in (half, tiny))
        assert exact.dtype == torch.float32
        assert torch.equal(ours.float(), exact.bfloat16().float())


def test_queries_and_connectors_stay_in_float32_beside_a_vlm_in_bfloat16(photo):
    model = Vino.load("random", tiny_config())
    model.mm_encoder.mm_encoder.bfloat16()  # as in training
    condition = model.mm_encoder(["x"], [model.encode(photo)])
    assert condition.tokens.dtype == condition.references[0][0].dtype == torch.float32


def samples(photo, clip, group=None):
    """A picture of two guidance branches; a clip of three, for two prompts of which one is padded. Larger
    patches make 15 visual tokens, which no number of processes shares evenly."""
    config, settings = tiny_config(), {"steps": 2, "seed": 3, "group": group}
    config.mmdit.patch_size = 2
    model = Vino.load("random", config)
    prompts = ["Let it dance.", "Let Image 1 dance as in Video 1."]
    yield model.generate(["a red circle"], size=(1, 48, 80), **settings)
    yield model.generate(prompts, [photo], clip, size=(9, 64, 64), cfg_image=1.5, **settings)


def one_of_four(rank, folder, photo, clip):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=4)
    for group in (dist.group.WORLD, dist.new_group([0, 1])):
        if group is dist.group.WORLD or rank < 2:
            pixels = [*samples(photo, clip, group)]
            assert all(sample is None for sample in pixels) == (rank > 0)
            if rank == 0:
                torch.save(pixels, folder / f"{group.size()}.pt")
    dist.destroy_process_group()


def test_processes_share_branches_or_tokens_and_make_the_sample_of_one(photo, clip, tmp_path):
    multiprocessing.spawn(one_of_four, (tmp_path, photo, clip), nprocs=4)
    alone = [*samples(photo, clip)]
    for size in (4, 2):
        for ours, expected in zip(torch.load(tmp_path / f"{size}.pt"), alone, strict=True):
            assert relative_error(ours, expected) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded_weights_give_the_same_picture_to_the_bit(tiny, photo, clip):
    settings = {"size": (9, 64, 64), "steps": 2, "cfg_image": 1.5}
    resident = Vino.load("random", tiny.config, "cuda")
    model = Vino.load("random", tiny.config)
    model.load_state_dict(resident.state_dict())
    model.offload("cuda")
    assert all(p.device.type == "cpu" for block in model.transformer.blocks() for p in block.parameters())
    assert torch.equal(*(one.generate(["x"], [photo], clip, **settings) for one in (resident, model)))
    dist.destroy_process_group()


# --- 8 and 9. Pixels and files ------------------------------------------------------------------------------


def write_part(folder, tensors, sizes):
    """A public download: a config, two files of weights and their index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(sizes))
    index = {name: f"{k % 2}.safetensors" for k, name in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for file in set(index.values()):
        save_file({name: tensor for name, tensor in tensors.items() if index[name] == file}, folder / file)


def write_public_layout(model, folder):
    """The three public downloads with the tensors of `model`."""
    config, tensors = vino.asdict(model.config), model.saved_tensors()
    vlm, base = folder / "Qwen3-VL-4B-Instruct", folder / "HunyuanVideo"

    def part(prefix):
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    sizes = {"text_config": config["text"], "vision_config": config["vision"]}
    write_part(vlm, part("mm_encoder.mm_encoder."), sizes)
    model.mm_encoder.tokenizer.save(str(vlm / "tokenizer.json"))
    untrained = {name: torch.zeros_like(tensor) for name, tensor in part("transformer.").items()}
    write_part(base / "transformer", untrained, config["mmdit"])
    write_part(base / "vae", part("vae."), config["vae"])
    elsewhere = ("mm_encoder.mm_encoder.", "vae.", f"transformer.{MMDiT.UNUSED}")
    trained = {name: t for name, t in tensors.items() if not name.startswith(elsewhere)}
    trained["mm_encoder.mm_encoder.model.visual.pos_embed.weight"] = torch.zeros(1)  # may be there, too
    torch.save(trained, folder / "vino.ckpt")


def test_public_file_layouts_and_our_own_load_to_the_same_picture(tiny, tmp_path):
    write_public_layout(tiny, tmp_path)
    tiny.save(tmp_path / "own.safetensors")
    public, own = Vino.load(tmp_path, tiny.config), Vino.load(tmp_path / "own.safetensors")
    assert own.config == tiny.config
    settings = {"prompts": ["a red circle"], "size": (1, 64, 64), "steps": 2}
    for model in (public, own):
        assert torch.equal(model.generate(**settings), tiny.generate(**settings))


def test_without_vinos_checkpoint_stage_1_starts_from_the_base_models_with_new_connectors(tiny, tmp_path):
    write_public_layout(tiny, tmp_path)
    (tmp_path / "vino.ckpt").unlink()
    assert "vino.ckpt does not exist" in refusal(tmp_path, tiny.config)
    first, again = (Vino.load(tmp_path, tiny.config, base=True).saved_tensors() for _ in range(2))
    for name, tensor in tiny.saved_tensors().items():
        assert torch.equal(first[name], again[name]), name
        if name.startswith(("mm_encoder.mm_encoder.", "vae.")):
            assert torch.equal(first[name], tensor), name
        elif name.startswith("mm_encoder."):
            assert first[name].isfinite().all() and first[name].any(), name
    (tmp_path / "HunyuanVideo/vae/model.safetensors.index.json").unlink()
    (tmp_path / "HunyuanVideo/vae/0.safetensors").unlink()
    with pytest.raises(InputError, match="'vae.* is missing"):
        Vino.load(tmp_path, tiny.config, base=True)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell of its memory")
def test_a_checkpoint_is_read_tensor_by_tensor_and_never_copied_whole(tmp_path):
    def copied():  # MiB of memory that no file backs
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024

    torch.save({f"{k}": torch.ones(2**24) for k in range(3)}, tmp_path / "a.ckpt")  # 64 MiB each
    before = copied()
    tensors = vino.read_checkpoint(tmp_path / "a.ckpt")
    assert all(tensor.sum() == 2**24 for tensor in tensors.values()) and copied() - before < 50


def refusal(weights, config=None):
    """The line with which weights are refused."""
    with pytest.raises(InputError) as error:
        Vino.load(weights, config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_that_do_not_fit_are_one_line_that_names_the_tensor_or_field(tiny, tmp_path):
    path, name, other = tmp_path / "weights.safetensors", "transformer.proj_out.weight", tiny_config()
    tensors = tiny.saved_tensors()
    for changed, message in (
        ({key: tensors[key] for key in tensors if key != name}, f"'{name}' is missing"),
        (tensors | {"extra": torch.zeros(1)}, "surplus tensor 'extra'"),
        (tensors | {name: torch.zeros(3, 2)}, f"'{name}' has shape [3, 2]"),
    ):
        tiny.save(path, changed)
        assert message in refusal(path)
    other.mmdit.num_layers = 4
    assert "'mmdit.num_layers' does not fit: it is 4 here, and 2 in" in refusal(path, other)
    path.write_bytes(path.read_bytes()[:1000])
    assert "cut short" in refusal(path)
    assert "does not exist" in refusal(tmp_path / "nothing.safetensors")


def test_public_files_that_cannot_be_read_are_one_line_that_names_them(tiny, tmp_path):
    write_public_layout(tiny, tmp_path)
    for file, kind in (("vino.ckpt", "a checkpoint"), ("HunyuanVideo/vae/config.json", "JSON")):
        (tmp_path / file).write_text("neither")
        assert f"{file} is not {kind}" in refusal(tmp_path, tiny.config)


def test_config_errors_name_the_field():
    with pytest.raises(InputError, match="'mmdit.layers'"):
        Config.from_dict({"mmdit": {"layers": 3}})
    with pytest.raises(InputError, match="'num_queries' is str, should be int"):
        Config.from_dict({"num_queries": "many"})


def test_the_vae_gets_a_clips_first_frames_and_the_vlm_eight_spread_over_all(tmp_path):
    assert vino.spread_frames(100, 8) == [0, 14, 28, 42, 57, 71, 85, 99]
    frames = np.arange(0, 240, 12, np.uint8)[:, None, None, None] + np.zeros((1, 96, 128, 3), np.uint8)
    film(tmp_path / "clip.mkv", frames)
    assert np.array_equal(np.stack([*vino.read_frames(tmp_path / "clip.mkv")]), frames)
    reference = vino.read_video(tmp_path / "clip.mkv", 10, 64 * 64, tiny_config().vision)
    assert reference.pixels.shape == (1, 3, 9, 48, 64)
    assert reference.grid == (4, 6, 8)  # of 8 x 8 pixels: the tiny VLM knows 64 x 64
    levels = ((reference.patches + 1) * 127.5).round().unique().tolist()
    assert levels == [12 * frame for frame in (0, 3, 5, 8, 11, 14, 16, 19)]


# ----------------------------------------------------------------------------------------------------------
# train.py: 2.3, 3.1, table 1 and appendix B, and what a run must survive
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def quick_runs_and_old_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with patch.multiple(train, VALIDATION=1, PICTURE_STEPS=1):  # pictures take long
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def flags(config, out, *more, stage="3"):
    run = [f"--stage={stage}", f"--config={config}", f"--out={out}", "--weights=random"]
    return [*run, "--dtype=float32", *more]


def start(config, out, *more, stage="3"):
    return train.prepare(train.parse_arguments(flags(config, out, *more, stage=stage)))


def run(config, out, *more, stage="3"):
    started = start(config, out, *more, stage=stage)
    assert train.train(started) == 0
    return started


def records(folder):
    return train.read_metrics(Path(folder))


def equal(a, b):
    """Dictionaries of tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


SILENT = "--validate-every=0"
PAIRS = ["--batch=1", "--accumulate=2", "--checkpointing"]  # two samples a step


@pytest.fixture(scope="module")
def six_steps(small_config, tmp_path_factory):
    """One process, six steps of stage 3 in one go."""
    out = tmp_path_factory.mktemp("six")
    return run(small_config, out, "--save-every=3", *PAIRS), out


def is_share(count, share, draws=4000):
    """Within four standard deviations."""
    return abs(count / draws - share) < 4 * math.sqrt(share * (1 - share) / draws)


# --- Table 1, mixtures, dropout, the loss -------------------------------------------------------------------


def test_stages_are_the_columns_of_table_1():
    names = ("lr", "beta1", "beta2", "steps", "ema", "area", "shift", "weight_decay", "clip")
    assert [tuple(getattr(stage, name) for name in names) for stage in train.STAGES.values()] == [
        (1e-4, 0.9, 0.99, 20_000, 0, 320**2, 3, 0.01, 1),
        (4e-5, 0.9, 0.95, 4_000, 0.9999, 640**2, 5, 0.01, 1),
        (2e-5, 0.9, 0.95, 16_000, 0.9999, 640**2, 5, 0.01, 1),
    ]


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_a_step_changes_what_table_1_trains_and_nothing_else(stage, small_config, tmp_path):
    started = start(small_config, tmp_path, "--steps=4", SILENT, stage=stage)
    (group,) = started.optimizer.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.9, train.STAGES[stage].beta2), 0.01)
    before = {name: tensor.clone() for name, tensor in started.vino.state_dict().items()}
    train.train(started)  # with and without references
    after = started.vino.state_dict()
    trained = ["mm_encoder.connector", "mm_encoder.metaquery"] + ["transformer."] * (stage > "1")
    for name, tensor in before.items():
        frozen = not name.startswith(tuple(trained)) or "transformer." + MMDiT.UNUSED in name
        assert torch.equal(tensor, after[name]) == frozen, name


def test_the_learning_rate_is_constant_but_for_our_rise_and_fall(small_config, tmp_path):
    stage = replace(train.STAGES["3"], lr=1.0, steps=10)
    assert {train.learning_rate(stage, step) for step in range(1, 11)} == {1.0}
    more = ["--steps=3", "--warmup=2", "--cooldown=2", "--lr=1", SILENT]
    started = run(small_config, tmp_path, *more)
    assert [record["lr"] for record in records(tmp_path)] == [0.5, 1, 0.5]
    assert started.optimizer.param_groups[0]["lr"] == 0.5


def test_a_shorter_run_warms_up_cools_down_and_averages_over_fewer_steps():
    config = vino.read_config(HERE / "tiny_config.json", "random")
    long = train.make_stage("3", config, {})
    short = train.make_stage("3", config, {"steps": 12})
    assert (short.warmup, short.cooldown, short.ema) == (1, 3, 0.5)
    assert max(train.learning_rate(short, step) for step in range(1, 13)) == short.lr
    half = train.make_stage("3", config, {"steps": long.steps // 2, "warmup": 9})
    assert half.warmup == 9 and half.ema == pytest.approx(1 - 2 * (1 - long.ema))


def test_the_command_line_wins_over_the_config_and_the_config_over_table_1(small_config):
    args = train.parse_arguments(["--stage=2", "--shift=2.5", "--beta2=0.8", "--tasks", "t2v"])
    stage = train.make_stage("2", vino.read_config(small_config, "random"), vars(args))
    assert (stage.shift, stage.beta2, stage.area, stage.weight_decay) == (2.5, 0.8, 1024, 0.01)
    assert stage.mixture == {"t2v": 0.4}
    for wrong, named in [({"1": {"rate": 1}}, "training.1.rate"), ({"4": {}}, "training.4"),
                         ({"1": {"batch": 0}}, "'batch' should be at least 1"),
                         ({"1": {"mixture": {"t2x": 1}}}, "unknown task 't2x'"),
                         ({"1": {"mixture": {"t2i": "1"}}}, "'t2i' should be at least 0"),
                         ({"1": {"lr": float("inf")}}, "'lr' should be at least 0"),
                         ({"1": {"drop": 2.0}}, "'drop' should be from 0 to 1")]:  # fmt: skip
        with pytest.raises(InputError, match=named):
            train.make_stage("1", Config.from_dict({"training": wrong}), {})
    for wrong in ([], ["transformer.", ["MMDiT"]]):
        with pytest.raises(InputError, match="no parameter's name begins with"):
            train.choose_parameters(torch.nn.ModuleDict({"transformer": torch.nn.Linear(1, 1)}), wrong)


class Numbers(train.Source):
    """Samples that are their numbers."""

    def draw(self, task, position, index):
        return index


def test_tasks_are_drawn_in_the_shares_of_the_mixture():
    assert {"t2v", "t2i", "i2v", "reconstruction"} == {*train.MIXTURES["1"]}  # figure 8's
    args = SimpleNamespace(seed=0, accumulate=1)
    for number, mixture in train.MIXTURES.items():
        assert math.isclose(sum(mixture.values()), 1)
        stage = replace(train.STAGES[number], mixture=mixture)
        drawn = dict.fromkeys(mixture, 0)
        run = SimpleNamespace(stage=stage, args=args, drawn=drawn, source=Numbers(stage, Config(), 0))
        tasks = Counter(train.Run.load(run, step)[0] for step in range(4000))
        assert all(is_share(tasks[task], share) for task, share in mixture.items()), number


def test_processes_draw_the_same_task_and_share_its_samples(monkeypatch):
    stage = replace(train.STAGES["3"], mixture=train.MIXTURES["3"], batch=2)
    drawn = dict.fromkeys(stage.mixture, 24)
    run = SimpleNamespace(stage=stage, drawn=drawn, source=Numbers(stage, Config(), 0))

    def load(world, rank, accumulate):
        monkeypatch.setattr(train, "WORLD", world)
        monkeypatch.setattr(train, "RANK", rank)
        run.args = SimpleNamespace(seed=0, accumulate=accumulate)
        return train.Run.load(run, step=7)

    task, alone = load(1, 0, accumulate=4)
    assert alone == {0: [24, 25], 2: [26, 27], 4: [28, 29], 6: [30, 31]}
    (first, even), (second, odd) = load(2, 0, accumulate=2), load(2, 1, accumulate=2)
    assert first == second == task and even.keys() == {0, 4} and even | odd == alone


def dropped(step, images, process=0, task="tiv2v"):
    """What is left of two processes' samples: the prompt, the number of images, and of videos."""
    kinds = [False] * images + [True]
    references = [train.Reference(None, None, None, is_video=kind) for kind in kinds]
    batch = train.Batch(task, ["long"], ["short"], references, None, key=(0, step, process))
    kept = train.drop_conditions(batch, train.STAGES["2"])
    videos = sum(reference.is_video for reference in kept.references)
    return kept.prompts[0], len(kept.references) - videos, videos


def test_each_modality_is_dropped_one_time_in_ten_and_on_its_own():
    seen = Counter()
    for step in range(4000):
        prompt, images, videos = dropped(step, images=2)
        assert images in (0, 2)  # all of them or none
        neither = images + videos == 0
        seen.update({prompt: 1, "no images": not images, "no video": not videos, "neither": neither})
    for event, share in [("", 0.1), ("long", 0.45), ("short", 0.45), ("no images", 0.1), ("no video", 0.1),
                         ("neither", 0.01)]:  # fmt: skip
        assert is_share(seen[event], share), event


def test_what_the_model_is_trained_on_has_its_conditions_dropped(small_config, tmp_path):
    for drop, prompts, references in (("0", True, 2), ("1", False, 0)):
        started = start(small_config, tmp_path / drop, f"--drop={drop}", "--tasks=tiv2v", "--steps=1", SILENT)
        with patch.object(started.objective, "loss", wraps=started.objective.loss) as loss:
            train.train(started)
        batch = loss.call_args.args[0]
        assert all(map(bool, batch.prompts)) == prompts and len(batch.references) == references


def test_all_processes_drop_alike_only_in_tasks_of_many_images():
    def differ(task, *images):
        kept = [[dropped(step, n, p, task)[1] > 0 for p, n in enumerate(images)] for step in range(400)]
        return any(a != b for a, b in kept)

    assert differ("tiv2v", 1, 1)
    assert not differ("ti2v", 3, 3) and not differ("ti2v", 1, 3)  # files may differ in number


def test_frames_and_images_adapt_so_that_a_local_batch_of_one_fits():
    source = train.Source(train.STAGES["3"], Config(), 0)
    for images, video in itertools.product(range(9), (False, True)):
        frames = source.frames_that_fit(images, video)
        assert frames % 4 == 1 and frames <= 85
        assert ((frames - 1) // 4 + 1) * (1 + video) + images <= 30
    source.stage = replace(source.stage, latent_frames=6)
    assert (source.images_that_fit(False), source.images_that_fit(True)) == (4, 2)


def test_times_are_uniform_then_shifted():
    pairs = [train.draw_noise((0, step, 0), torch.zeros(4, 2)) for step in range(1000)]
    u, noise = map(torch.cat, zip(*pairs))
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    t = vino.shift_time(u, 3.0)  # t = 3u / (1 + 2u), so P(t < x) = x / (3 - 2x)
    for x in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert is_share((t < x).sum(), x / (3 - 2 * x))


def test_reconstruction_is_seen_by_the_vlm_only(small_config, tmp_path):
    started = start(small_config, tmp_path)
    world = started.source
    for task, latents in (("reconstruction", 0), ("selection", 2)):
        batch = world.collate(task, [world.draw(task, 0, 0)], started.device)
        batch.references = batch.references[:2]
        assert len(started.objective.condition(batch).references) == latents


def test_the_loss_is_the_flow_loss_of_the_posteriors_mean(small_config, tmp_path):
    started = start(small_config, tmp_path, "--shift=5")
    world, model = started.source, started.vino
    batch = world.collate("t2i", [world.draw("t2i", 0, index) for index in range(3)], started.device)
    batch.key = (0, 1, 0)
    data = model.vae.encode(batch.target)
    u, noise = train.draw_noise(batch.key, data)
    t = 5 * u / (1 + 4 * u)
    mixed = (1 - t)[:, None, None, None, None] * data + t[:, None, None, None, None] * noise
    velocity = model.transformer(mixed, t, model.mm_encoder(batch.prompts, []))
    expected = (velocity - (noise - data)).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(started.objective(batch), expected)


def test_the_norm_of_the_gradient_is_clipped_and_0_is_no_limit(small_config, tmp_path):
    for clip in (0.0, 0.5):
        started = start(small_config, tmp_path, f"--clip={clip}")
        for parameter in started.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        norm = math.sqrt(sum(parameter.numel() for parameter in started.parameters.values()))
        assert started.clip_gradients() == pytest.approx(norm)
        left = torch.cat([parameter.grad.flatten() for parameter in started.parameters.values()]).norm()
        assert left == pytest.approx(clip or norm, rel=1e-4)


# --- Memory, and many processes -----------------------------------------------------------------------------


class Counted(TorchDispatchMode):
    """Counts the attentions and the matrix products of what runs inside it."""

    attentions = products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.attentions += "scaled_dot_product" in name and "backward" not in name
        self.products += "addmm" in name
        return function(*args, **(kwargs or {}))


def test_training_never_uses_cudnns_attention():
    x, allowed = torch.zeros(1, 10_000, 1, 1), []

    def kernel(q, *_):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return q

    with patch("torch.nn.functional.scaled_dot_product_attention", kernel):
        vino.attend(x, x, x)
        with torch.no_grad():
            vino.attend(x, x, x)
    assert allowed == [False, True]


def test_checkpointing_gives_the_same_gradients_and_computes_attention_once(small_config, monkeypatch):
    model = Vino.load("random", vino.read_config(small_config, "random")).transformer.requires_grad_(True)
    condition = vino.Condition(torch.randn(2, 9, model.config.text_embed_dim), None, [])
    latents, t = torch.randn(2, 16, 1, 4, 4), torch.rand(2)

    def gradients():
        model.zero_grad()
        with Counted() as counted:
            model(latents, t, condition).square().sum().backward()
        return counted, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain, expected = gradients()
    for block in model.blocks():
        block.forward = MethodType(train.checkpointed, block)
    assert gradients()[0].products == plain.products  # of a short sequence all is kept
    monkeypatch.setattr(train, "SHORT", 0)
    kept, actual = gradients()
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert kept.attentions == plain.attentions and kept.products >= 1.5 * plain.products


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_blocks_have_the_gradients_of_eager_ones_over_33_000_tokens():
    torch.manual_seed(0)
    model = MMDiT(vino.read_config(HERE / "tiny_config.json", "random").mmdit).to("cuda")
    words, latents = torch.randn(1, 20, 64, device="cuda"), torch.randn(1, 16, 9, 60, 62, device="cuda")

    def gradients():
        condition = vino.Condition(words, None, [])
        loss = model(latents, torch.tensor([0.6], device="cuda"), condition).square().mean()
        return torch.autograd.grad(loss, model.parameters(), allow_unused=True)

    expected = gradients()
    for block in model.blocks():
        block.forward = vino.compiled(MethodType(train.checkpointed, block))
    for actual, wanted in zip(gradients(), expected):
        assert wanted is None or (actual - wanted).norm() <= 1e-3 * wanted.norm() + 1e-9


@torch.no_grad()
def test_averages_follow_every_step_or_in_the_hosts_memory_every_tenth_and_the_last_with_the_same_decay():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = {"a": torch.zeros(5, device=device)}
    near, far = train.Averages(weights, 0.9, on_host=False), train.Averages(weights, 0.9, on_host=True)
    weights["a"].fill_(1.0)
    for step in range(1, train.EMA_EVERY + 1):
        assert not far.tensors["a"].any()
        near.update(step)
        far.update(step)
    assert far.tensors["a"].is_pinned() == torch.cuda.is_available()
    torch.testing.assert_close(near.tensors["a"].cpu(), torch.full((5,), 1 - 0.9**10))
    torch.testing.assert_close(near.tensors["a"].cpu(), far.tensors["a"])
    weights["a"].fill_(2.0)
    for step in (11, 12):
        near.update(step)
        far.update(step, last=step == 12)
    torch.testing.assert_close(near.tensors["a"].cpu(), far.tensors["a"])


def test_the_averages_are_what_is_exported(six_steps, small_config):
    started, out = six_steps
    first, exported = Vino.load("random", vino.read_config(small_config, "random")).state_dict(), {}
    exported = load_file(out / "final.safetensors")
    assert started.stage.ema == 0.9 and started.averages.tensors
    for name, average in started.averages.tensors.items():
        last = started.parameters[name].cpu()
        assert torch.equal(average.cpu(), exported[name])
        assert not torch.equal(average.cpu(), first[name]) and not torch.equal(average.cpu(), last)


TWO = """
import os, sys
sys.path.insert(0, {here!r})
import torch, train
torch.set_num_threads(1)
train.VALIDATION = train.PICTURE_STEPS = 1
train.SHORT = 0
for how, port in zip(("ddp", "zero2", "fsdp"), {ports!r}):
    os.environ["MASTER_PORT"] = str(port)
    train.main([*{flags!r}, "--out", {folder!r} + "/" + how, "--shard", how])
"""


@pytest.fixture(scope="module")
def two(small_config, tmp_path_factory):
    """A folder with what two processes make of `six_steps`, in each way to share the work."""
    folder = tmp_path_factory.mktemp("two")
    sockets = [socket.socket() for _ in range(3)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    given = flags(small_config, "", "--save-every=3", "--batch=1", "--checkpointing")
    given = [flag for flag in given if not flag.startswith("--out")]
    script = TWO.format(here=str(HERE), ports=ports, flags=given, folder=str(folder))
    command = [sys.executable, "-W", "error::FutureWarning", "-c", script]
    own = os.environ | {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    calls = []
    for rank in "01":
        environment = own | {"RANK": rank, "LOCAL_RANK": rank}
        calls.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for call in calls:
        _, errors = call.communicate(timeout=300)
        assert call.returncode == 0, errors[-2000:]
    return folder


@pytest.mark.parametrize("how", ["ddp", "zero2", "fsdp"])
def test_two_processes_are_one_and_one_goes_on_where_two_stopped(how, two, six_steps, small_config):
    _, out = six_steps
    alone = load_file(out / "final.safetensors")
    for one, both in zip(records(out), records(two / how), strict=True):
        if "validation" in one:
            assert one["validation"] == pytest.approx(both["validation"], rel=1e-5)
            continue
        assert one["task"] == both["task"] and one["samples"] == both["samples"]
        assert both["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert both["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    for name, tensor in load_file(two / how / "final.safetensors").items():
        assert torch.allclose(tensor, alone[name], atol=1e-4), name
    shutil.rmtree(two / how / "checkpoints" / "step_00000006")
    run(small_config, two / how, "--resume", *PAIRS)
    assert records(two / how)[-2]["loss"] == pytest.approx(records(out)[-2]["loss"], rel=1e-5)


@pytest.mark.parametrize("how", ["zero2", "fsdp"])
def test_zero2_keeps_weights_whole_from_forward_to_backward_and_fsdp_does_not(how, small_config, tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        started = start(small_config, tmp_path, f"--shard={how}")
        batch = started.source.collate("t2i", [started.source.draw("t2i", 0, 0)], started.device)
        started.model(batch)
        weights = [*started.vino.transformer.blocks()[0].parameters()]
    finally:
        dist.destroy_process_group()
    assert {isinstance(weight, train.DTensor) for weight in weights} == {how == "fsdp"}


# --- Samples from files -------------------------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path):
    """A function that writes a manifest of 100 edits; changes: {line: other fields, or other text}."""
    rng = np.random.default_rng(0)
    for k, (height, width) in enumerate([(40, 40), (30, 60)]):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")

    def write(changes):
        files = [f"{k % 2}.png" for k in range(100)]
        lines = [{"task": "ti2i", "prompt": f"p{k}", "images": [f], "target": f} for k, f in enumerate(files)]
        lines = [json.dumps(line) for line in lines]
        for number, change in changes.items():
            old = json.loads(lines[number - 1])
            lines[number - 1] = change if isinstance(change, str) else json.dumps(old | change)
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        return f"--data={tmp_path / 'data.jsonl'}"

    return write


@pytest.fixture
def train_refuses(small_config, capsys):
    """A function that returns the one line with which main refuses a run."""

    def refuses(out, *more, stage="3"):
        with pytest.raises(SystemExit) as stopped:
            train.main(flags(small_config, out, *more, stage=stage))
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and "Traceback" not in error
        assert error.strip().splitlines()[-1].startswith("train.py: ")
        return error.strip().splitlines()[-1]

    return refuses


ONE = ["--batch=1", SILENT, "--ema=0.9"]


def test_a_run_on_files_is_resumed_exactly_and_visits_every_sample_once_an_epoch(
    small_config, manifest, tmp_path
):
    data = manifest({})
    whole = run(small_config, tmp_path / "a", data, "--steps=4", *ONE)
    run(small_config, tmp_path / "b", data, "--steps=2", *ONE)
    again = run(small_config, tmp_path / "b", data, "--steps=4", "--resume", *ONE)
    assert equal(whole.tensors(), again.tensors())
    draw = whole.source.draw
    seen = {draw("ti2i", 0, index).prompts[0] for index in range(99)}
    assert len(seen) == 99  # one is held out for validation
    assert seen.isdisjoint(draw("ti2i", 0, -1 - number).prompts[0] for number in range(train.VALIDATION))


def test_a_resumed_run_names_another_step_size_and_a_finished_one_is_not_overwritten(
    small_config, manifest, tmp_path, capsys, train_refuses
):
    data, out = manifest({}), tmp_path / "run"
    run(small_config, out, data, "--steps=1", "--batch=3", SILENT)
    start(small_config, out, data, "--steps=2", "--resume", SILENT)  # with the config's batch
    assert "continuing with samples per step 2; it was 3" in capsys.readouterr().err
    start(small_config, tmp_path / "none", data, "--resume", SILENT)
    assert "none has no checkpoint to resume from: the run starts anew" in capsys.readouterr().err
    shutil.rmtree(out / "checkpoints")
    content = {path: path.read_bytes() for path in out.iterdir()}
    for more in ([], ["--resume"]):
        assert "holds a finished run without its checkpoints" in train_refuses(out, data, *more, SILENT)
    assert {path: path.read_bytes() for path in out.iterdir()} == content


def test_too_little_gpu_memory_ends_a_run_with_one_line_of_advice(small_config, tmp_path, capsys):
    work = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"))
    with pytest.raises(SystemExit, match="2"):
        train.main(flags(small_config, tmp_path), work=work)
    [line] = capsys.readouterr().err.splitlines()
    assert "Tried to allocate" in line and "--shard fsdp" in line


def test_frames_have_the_stages_area_at_their_own_aspect_ratio(tmp_path):
    for height, width in ((250, 500), (333, 777), (640, 641), (640, 300)):
        Image.new("RGB", (width, height)).save(tmp_path / "a.png")
        h, w = train.read_target(tmp_path / "a.png", 1, 640**2, framed=True).shape[3:]
        exact = 640 * math.sqrt(height / width), 640 * math.sqrt(width / height)
        assert h % 16 == w % 16 == 0 and abs(h - exact[0]) <= 16 and abs(w - exact[1]) <= 16
        unframed = train.read_target(tmp_path / "a.png", 1, 640**2, framed=False)
        assert unframed.max() == -1, "only what lies on a reference image has white bars"
    film(tmp_path / "clip.mkv", np.zeros((15, 96, 128, 3), np.uint8))
    assert train.read_target(tmp_path / "clip.mkv", 85, 64**2, framed=False).shape == (1, 3, 13, 48, 64)
    assert train.read_target(tmp_path / "clip.mkv", 9, 64**2, framed=True).shape == (1, 3, 9, 48, 64)


@pytest.mark.parametrize("line, problem", [
    ("{", "Expecting"), ("[1]", "should be an object"), ('{"task": "", "prompt": ""}', "'target' is missing"),
    ({"task": "t2x"}, "unknown task 't2x'"), ({"size": 3}, "no field 'size'"), ({"images": [1]}, "of paths"),
    ({"images": []}, "takes 1 to 1 images, not 0"), ({"video": "0.mp4"}, "takes no video"),
    ("[" * 100_000, "recursion"), ('{"line": ' + "9" * 5000 + "}", "4300"),
    ({"prompt": "\ud800"}, "surrogates not allowed"),
])  # fmt: skip
def test_a_broken_line_of_a_manifest_is_named(line, problem, manifest, tmp_path, train_refuses):
    message = train_refuses(tmp_path / "run", manifest({7: line}), *ONE)
    assert "data.jsonl, line 7: " in message and problem in message


def test_an_unreadable_sample_is_reported_once_and_skipped_and_more_than_1_percent_stop(
    small_config, manifest, tmp_path, capsys
):
    def read_all(changes):
        path = manifest(changes).removeprefix("--data=")
        stage = replace(train.STAGES["3"], mixture={"ti2i": 1}, area=1024)
        source = train.Manifest(path, stage, vino.read_config(small_config, "random"), "0")
        for index in range(2 * 99):  # two epochs
            source.draw("ti2i", 0, index)

    read_all({3: {"target": "gone.png"}})
    told = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(told) == 1 and "line 3" in told[0] and "gone.png" in told[0]
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(InputError, match="2 of 100 samples cannot be read, more than 1%"):
        read_all({3: {"target": "gone.png"}, 4: {"images": ["empty.png"]}})


# --- What a run must survive --------------------------------------------------------------------------------


def test_a_run_that_is_resumed_is_bit_equal_to_one_that_never_stopped(six_steps, small_config, tmp_path):
    whole, out = six_steps
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)  # as if it had been killed after step 5
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000006")
    (tmp_path / "final.safetensors").unlink()
    with open(tmp_path / "metrics.jsonl", "r+") as file:
        file.truncate(file.read().index('"step": 6') + 12)
    again = run(small_config, tmp_path, "--resume", *PAIRS)
    assert again.step == 6 and equal(whole.tensors(), again.tensors())
    assert equal(load_file(out / "final.safetensors"), load_file(tmp_path / "final.safetensors"))
    clock = {"seconds": 0, "peak_mib": 0}
    assert [r | clock for r in records(out)] == [r | clock for r in records(tmp_path)]
    [*files] = (out / "checkpoints" / "step_00000006").iterdir()  # plain tensors and JSON, which run no code
    assert sorted(file.name for file in files) == ["0.safetensors", "state.json"]


def test_a_step_that_is_not_finite_changes_nothing_and_ten_in_a_row_stop_the_run(small_config, tmp_path):
    more = [SILENT, "--ema=0.9"]
    started = start(small_config, tmp_path, "--steps=20", *more)
    loss = started.objective.loss
    started.objective.loss = lambda batch: loss(batch) * (1 if started.step <= 2 else math.nan)
    with pytest.raises(InputError, match="not finite for the tenth time"):
        train.train(started)
    lines = records(tmp_path)
    assert [r["skipped"] for r in lines] == [False] * 2 + [True] * 10 and lines[-1]["loss"] is None
    short = run(small_config, tmp_path / "short", "--steps=2", *more)
    assert equal(started.tensors(), short.tensors())
    assert train.complete_checkpoints(tmp_path)[-1].name == "step_00000012"


def test_kill_during_a_save_leaves_the_checkpoint_before(small_config, tmp_path):
    given = flags(small_config, tmp_path, "--save-every=2", SILENT)
    script = (f"import sys, os, signal; sys.path[:0] = [{str(HERE)!r}]; import train\n"
              "save = train.save_file\n"
              "def dying(tensors, path):\n"
              "    save(tensors, path)\n"
              "    '00000004' in str(path) and os.kill(os.getpid(), signal.SIGKILL)\n"
              "train.save_file = dying\n"
              f"train.main({given!r})")  # fmt: skip
    killed = subprocess.run([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000004.partial"]
    assert start(small_config, tmp_path, "--resume").step == 2


def test_a_full_disk_is_one_clear_error_and_older_checkpoints_stay(small_config, tmp_path, train_refuses):
    run(small_config, tmp_path, "--steps=2", SILENT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # no file may be larger
        message = train_refuses(tmp_path, "--resume", "--steps=4", "--save-every=3", SILENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert "cannot write" in message and "older ones stay" in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    assert start(small_config, tmp_path, "--resume").step == 2


def test_a_signal_saves_and_stops_and_only_the_newest_checkpoints_stay(small_config, tmp_path):
    started = start(small_config, tmp_path, "--save-every=1", "--keep=2", SILENT)
    clip = started.clip_gradients

    def interrupted():
        if started.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip()

    started.clip_gradients = interrupted
    assert train.train(started) == 128 + signal.SIGTERM and started.step == 4
    names = [path.name for path in train.complete_checkpoints(tmp_path)]
    assert names == ["step_00000003", "step_00000004"] and not (tmp_path / "final.safetensors").exists()


@pytest.mark.parametrize("under_torchrun", [False, True])
def test_a_second_signal_ends_a_run_at_once_unless_torchrun_may_have_passed_it_on(under_torchrun):
    signal.signal(signal.SIGTERM, lambda *_: None)
    with patch.object(train.dist, "is_initialized", return_value=under_torchrun):
        train.Run.on_signal(SimpleNamespace(), signal.SIGTERM, None)
    assert (signal.getsignal(signal.SIGTERM) == signal.SIG_DFL) != under_torchrun


def test_a_damaged_checkpoint_or_one_of_another_run_is_one_clear_error(
    small_config, tmp_path, train_refuses, capsys
):
    run(small_config, tmp_path, "--steps=1", SILENT)
    assert "holds a run" in train_refuses(tmp_path)
    assert "field 'stage' does not fit: it is 2 here, and 3" in train_refuses(tmp_path, "--resume", stage="2")
    message = train_refuses(tmp_path, "--resume", "--no-queries")
    assert "field 'num_queries' does not fit: it is 0 here, and 4" in message
    start(small_config, tmp_path, "--resume", "--lr=0.5")
    assert "continuing with lr 0.5; it was 0.001" in capsys.readouterr().err
    os.truncate(tmp_path / "checkpoints/step_00000001/0.safetensors", 1000)
    told = train_refuses(tmp_path, "--resume", "--steps=2")
    assert "cut short" in told and "step_00000001" in told
    for forged, named in (
        ("[]", "state.json is not a checkpoint's"),
        ('{"step": 1}', "state.json is not a checkpoint's"),
        ("{", "state.json is not JSON"),
        ('{"identity": {}, "stage": []}', "if it is damaged, remove it"),
    ):
        (tmp_path / "checkpoints/step_00000001/state.json").write_text(forged)
        assert named in train_refuses(tmp_path, "--resume", "--steps=2")


@pytest.mark.parametrize("switch", ["--no-queries", "--no-boundary-tokens"])
def test_the_ablations_train_and_their_export_knows_what_is_missing(switch, small_config, tmp_path, photo):
    run(small_config, tmp_path, switch, "--steps=2", SILENT)
    model = Vino.load(tmp_path / "final.safetensors")
    own, [(first, _, _)] = model.config, model.mm_encoder(["x"], [model.encode(photo)]).references
    assert (own.num_queries, own.boundary_tokens) == ((0, True) if switch == "--no-queries" else (4, False))
    assert (first is not None) == own.boundary_tokens
    assert model.generate(["x"], [photo], size=(1, 48, 80), steps=1).isfinite().all()
    start(small_config, tmp_path, switch, "--resume")


def test_a_stage_says_what_it_starts_from_and_takes_the_export_of_the_one_before(
    small_config, tmp_path, capsys
):
    args = train.parse_arguments(["--stage=2", f"--out={tmp_path / 'stage2'}"])
    assert train.prepare(args).weights == str(train.TINY)
    export = tmp_path / "stage1" / "final.safetensors"
    export.parent.mkdir()
    shutil.copy(train.TINY, export)
    assert train.prepare(args).weights == str(export)
    start(small_config, tmp_path / "run", "--steps=9", "--warmup=9", "--cooldown=9")
    told = capsys.readouterr().err
    assert "from random (--weights chooses others)" in told
    assert "stays below 0.001: --warmup and --cooldown are longer" in told


def test_validation_is_the_same_each_time_and_draws_references_target_and_output(six_steps):
    started, out = six_steps
    train.validate(started)
    first, second = [record for record in records(out) if "validation" in record][-2:]
    assert not list(out.glob("step_00000003.png"))  # every 500 steps, and at the end
    assert first == second and set(first["validation"]) == {"t2i", "ti2i", "ti2v", "tiv2v"}
    assert Image.open(out / "step_00000006.png").width > 96 * 9


def test_the_files_depend_on_each_other_as_the_readme_says():
    for module, forbidden in (("vino", "train|sample|toy"), ("sample", "train|toy"), ("train", "sample")):
        source = (HERE / f"{module}.py").read_text()
        assert not re.search(rf"^\s*(import|from) ({forbidden})\b", source, re.MULTILINE), module
    top = re.compile(r"^(import|from) toy\b", re.MULTILINE)
    assert not top.search((HERE / "train.py").read_text())  # only where it is used


# --- sample.py: the command line ----------------------------------------------------------------------------


@pytest.fixture
def media(tmp_path, monkeypatch):
    """A working directory with a wide and a square picture and a wide clip of 13 frames."""
    monkeypatch.chdir(tmp_path)
    t, y, x = np.mgrid[:13, :40, :80]
    frames = np.stack([3 * x, 6 * y, 20 * t], -1).astype(np.uint8)
    Image.fromarray(frames[0]).save("wide.png")
    Image.fromarray(frames[0, :, :40]).save("square.png")
    clip = vino.normalize(vino.to_frames(frames))[0]
    Path("clip.mp4").write_bytes(command_line.encode(".mp4", clip, 8, {}))
    return tmp_path


def sample_py(*arguments):
    """The exit status of a call."""
    try:
        return command_line.main(["--weights=random", "--steps=2", "--device=cpu", *arguments])
    except SystemExit as end:
        return end.code


def files():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def refused(capsys, *arguments):
    """The one line that a call ends with. The folder holds what it held before."""
    before = files()
    assert sample_py(*arguments) == 2 and files() == before
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("sample.py: error: ")
    return line


def pixels(*paths):
    return [np.asarray(Image.open(path), int) for path in paths]


def test_the_quick_start_makes_its_picture_each_time_and_warns_of_nothing(tmp_path, monkeypatch):
    call = [sys.executable, "-W", "error::FutureWarning", "-W", "error::DeprecationWarning"]
    call += [HERE / "sample.py", "--prompt", "A large, red circle!", "--steps", "2"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "a-large-red-circle_0.png"), done.stderr
    monkeypatch.chdir(tmp_path)
    assert command_line.main(call[6:]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a-large-red-circle_0.png"]
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr and "step/s" in done.stderr


TASKS = [  # index, task, images, video, size of the result
    ("text_image", "t2i", [], "", (1, 64, 64)), ("text_video", "t2v", [], "", (5, 64, 64)),
    ("image_video", "i2v", ["./wide.png"], "", (5, 48, 96)), ("edit", "ti2i", ["near.png"], "", (1, 48, 96)),
    ("guided_edit", "ti2i", ["./square.png", "./wide.png"], "", (1, 48, 96)),
    ("images_video", "ti2v", ["./wide.png", "./square.png"], "", (5, 64, 64)),
    ("broken", "ti2i", ["./missing.png"], "", None), ("video_edit", "tv2v", [], "./clip.mp4", (5, 32, 80)),
    ("guided_video_edit", "tiv2v", ["./square.png", "./wide.png"], "./clip.mp4", (5, 32, 80)),
    ("camera", "tiv2v", ["./wide.png"], "./clip.mp4", (5, 32, 80)),
]  # fmt: skip


def test_a_task_file_makes_all_nine_tasks_and_names_the_items_that_fail(media, capsys):
    Path("tasks").mkdir()
    Image.open("wide.png").save("tasks/near.png")  # found beside the task file
    names = ("index", "task", "ref_image_paths", "ref_video_path")
    items = [dict(zip(names, row), caption="x", ref_image_have_base=row[0] == "guided_edit") for row in TASKS]
    Path("tasks/all.json").write_text(json.dumps(items))
    call = "--tasks tasks/all.json --out results --cfg-image 1.5 --frames 5 --steps 1".split()
    with patch.object(Vino, "generate", autospec=True, side_effect=Vino.generate) as generate:
        assert sample_py(*call) == 1
    last = capsys.readouterr().err.splitlines()[-2:]
    assert last == ["9 of 10 made", "  broken.png: tasks/missing.png does not exist"]
    assert [call.kwargs["base"] for call in generate.mock_calls] == [False] * 4 + [True] + [False] * 4
    results = [(path.stem, vino.imageio.imread(path, plugin="pyav")) for path in Path("results").iterdir()]
    made = {index: frames.shape[:3] for index, frames in results}
    assert made == {index: size for index, *_, size in TASKS if size}
    kind = vino.imageio.immeta("results/camera.mp4", plugin="pyav")
    assert (kind["codec"], kind["video_format"], kind["fps"]) == ("h264", "yuv420p", 8)


def test_weights_that_do_not_load_end_a_task_file_at_once_and_any_process_says_so(media, capsys, monkeypatch):
    Path("two.json").write_text(json.dumps([{"caption": "x", "task": "t2i", "index": k} for k in range(2)]))
    monkeypatch.setattr(command_line, "RANK", 1)
    with patch.object(Vino, "load", side_effect=InputError("a tensor is missing")) as load:
        assert sample_py(*"--tasks two.json --out results".split()) == 2
    assert load.call_count == 1
    assert capsys.readouterr().err == "sample.py: error (rank 1): a tensor is missing\n"


CALLS = {
    "": "t2i", "--frames 9": "t2v", "--out a.gif": "t2v", "--image 1": "ti2i", "--image 1 --frames 5": "i2v",
    "--image 1 --out a.MP4": "i2v", "--image 1 2": "ti2i", "--image 1 --image 2 --out a.mp4": "ti2v",
    "--video 1": "tv2v", "--video 1 --image 1": "tiv2v", "--video 1 --image 1 2 --out a.gif": "tiv2v",
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "task"), CALLS.items())
def test_the_task_follows_from_the_inputs(arguments, task):
    args = command_line.build_parser().parse_args(["--prompt", "x", *arguments.split()])
    assert command_line.single_job(args).task == task


def test_an_edit_takes_its_shape_from_what_it_edits_and_only_its_area_from_the_command(media, capsys):
    area = ["--height", "64", "--width", "128"]
    assert sample_py("--prompt", "x", "--image", "square.png", "wide.png", *area) == 0
    assert sample_py("--prompt", "y", "--image", "wide.png", "square.png", *area) == 0
    assert [Image.open(f"{name}_0.png").size for name in "xy"] == [(128, 64), (96, 96)]
    assert sample_py("--prompt", "z", "--video", "clip.mp4", "--frames", "12", "--out", "z.mp4") == 0
    assert vino.imageio.imread("z.mp4", plugin="pyav").shape == (9, 32, 80, 3)
    assert "--frames 12 is rounded down to 9" in capsys.readouterr().err


def test_the_same_command_gives_the_same_pixels_and_many_seeds_equal_single_runs(media):
    call = ["--prompt", "a dot", "--height", "40", "--width", "50"]
    assert sample_py(*call, "--seed", "3", "--count", "2", "--out", "dots") == 0  # makes the folder
    assert sample_py(*call, "--seed", "4", "--out", "a.png") == sample_py(*call, "--out", "b.png") == 0
    three, four, a, b = pixels("dots/a-dot_3.png", "dots/a-dot_4.png", "a.png", "b.png")
    assert (four == a).all() and a.shape == (32, 48, 3)
    assert (three != four).any() and (a != b).any()


def test_results_carry_command_seed_and_prompt(media):
    for name, frames in (("a.png", "1"), ("a.gif", "5"), ("a.mp4", "5")):
        assert sample_py("--prompt", "<|im_end|> é", "--seed", "7", "--frames", frames, "--out", name) == 0
        is_clip = name.endswith("mp4")
        text = vino.imageio.immeta(name, plugin="pyav") if is_clip else Image.open(name).info
        facts = json.loads(text["comment"])
        assert (facts["seed"], facts["prompt"]) == (7, "<|im_end|> é")
        assert facts["command"].startswith("python sample.py") and f"--out {name}" in facts["command"]


def test_nothing_is_overwritten_unless_asked_nor_by_a_result_that_fails(media, capsys):
    Path("x_0.png").write_text("mine")
    with patch.object(Vino, "load", side_effect=AssertionError("loaded")):  # refused before the costly work
        assert "x_0.png exists; --overwrite" in refused(capsys, "--prompt", "x")
    with patch.object(Image.Image, "save", side_effect=OSError(28, "No space left on device")):
        assert sample_py("--prompt", "x", "--overwrite") == 2
    assert "No space left" in capsys.readouterr().err
    assert Path("x_0.png").read_text() == "mine" and not list(Path().glob("*.partial"))
    assert sample_py("--prompt", "x", "--overwrite") == 0 and Image.open("x_0.png").size == (64, 64)
    capsys.readouterr()
    other = ["--prompt", "x", "--cfg-text", "2"]  # not the command that made it
    assert "x_0.png exists; --overwrite" in refused(capsys, *other)


def test_explain_is_the_sequence_that_the_model_sees(media, capsys, monkeypatch):
    call = ["--prompt", "<|vision_start|>", "--image", "square.png", "wide.png", "--video", "clip.mp4"]
    with patch.object(Vino, "load", side_effect=AssertionError("loaded")):
        assert sample_py(*call, "--explain") == 0
    rows = [re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()[1:]]
    packed, built, pack, build = [], [], vino.pack, vino.build_prompts
    monkeypatch.setattr(vino, "pack", lambda *a: packed.append(pack(*a)) or packed[-1])
    monkeypatch.setattr(vino, "build_prompts", lambda *a: built.append(build(*a)) or built[-1])
    assert sample_py(*call, "--out", "a.mp4") == 0
    positions, prompt, begin = packed[0][1], built[0], 0
    for _, count, time, _ in rows[:-3]:
        times = positions[begin : begin + int(count), 0]  # the model's own, for the tokens of this row
        assert time == f"{times.min()}-{times.max()}"
        begin += int(count)
    assert begin == len(positions) and int(rows[-1][1]) == begin + prompt.ids.shape[1] + 32
    places = {source: place for source, _, _, place in rows}
    for name, start, end in zip(("Image 1", "Image 2", "Video 1"), prompt.starts, prompt.ends, strict=True):
        ours = [places[f"{name}, {piece}"] for piece in ("start token", "latents", "end token")]
        assert ours == [str(start), f"{start + 1}-{end - 1}", str(end)]


EXPANDING = patch.object(
    Vino, "rewrite", lambda _, texts, images, video, seed: [f"{texts[0]} of {len(images)}, seed {seed}"]
)


@EXPANDING
def test_the_vlm_expands_a_prompt_if_told_or_if_the_config_says_so_of_text_alone(media, capsys):
    assert sample_py("--prompt", "a dot", "--rewrite", "--seed", "3", "--count", "2") == 0
    for seed in (3, 4):
        prompt = json.loads(Image.open(f"a-dot_{seed}.png").info["comment"])["prompt"]
        assert prompt == f"a dot of 0, seed {seed}"
    image = ["--image", "wide.png"]
    cases = ([], True), (["--no-rewrite"], False), (image, False), ([*image, "--rewrite"], True)
    for more, expanded in cases:
        assert command_line.main(["--prompt", "a red circle", "--explain", *more]) == 0
        line = f"rewritten: a red circle of {'--image' in more:d}, seed 0"
        assert (line in capsys.readouterr().err) == expanded


@EXPANDING
def test_rewrite_only_writes_the_task_file_again_and_keeps_the_captions_that_fail(media, capsys):
    bad = {"index": "a", "task": "ti2i", "caption": "x", "ref_image_paths": ["missing.png"]}
    good = {"index": "b", "task": "ti2i", "caption": "y", "ref_image_paths": ["wide.png"], "note": "mine"}
    Path("tasks.json").write_text(json.dumps([bad, good]))
    assert sample_py("--tasks", "tasks.json", "--rewrite-only", "--out", "new.json", "--seed", "4") == 1
    last = capsys.readouterr().err.splitlines()[-2:]
    assert last == ["1 of 2 made", "  a.png: missing.png does not exist"]
    rewritten = [bad | {"caption_raw": "x"}, good | {"caption": "y of 1, seed 4", "caption_raw": "y"}]
    assert json.loads(Path("new.json").read_text()) == rewritten
    # From what the user wrote, not from the caption:
    sample_py("--tasks", "new.json", "--rewrite-only", "--out", "again.json", "--seed", "4")
    assert json.loads(Path("again.json").read_text()) == rewritten


@EXPANDING
def test_what_the_vlm_has_written_once_is_not_expanded_again(media, capsys):
    item = {"index": "a", "task": "t2i", "caption": "x"}
    for more, expanded in (({}, True), ({"caption_raw": "y"}, False)):
        Path("a.json").write_text(json.dumps([item | more]))
        command = "--tasks a.json --out made --steps 1 --overwrite".split()
        assert command_line.main(command) == 0
        assert ("rewritten" in capsys.readouterr().err) == expanded


def test_a_task_file_with_another_prompt_does_not_replace_what_it_has_made(media, capsys):
    item = {"index": "a", "task": "t2i", "caption": "x"}
    made, kept = "1 of 1 made", "made/a.png exists; --overwrite"
    for caption, line in (("x", made), ("x", made), ("y", kept)):
        Path("a.json").write_text(json.dumps([item | {"caption": caption}]))
        sample_py("--tasks", "a.json", "--out", "made")
        assert line in capsys.readouterr().err


def test_queries_can_be_taken_away_from_finished_weights(media, capsys):
    assert sample_py("--prompt", "a dot", "--out", "with.png") == 0
    assert sample_py("--prompt", "a dot", "--out", "without.png", "--no-queries") == 0
    assert not np.array_equal(*pixels("with.png", "without.png"))
    assert sample_py("--prompt", "a dot", "--explain", "--no-queries") == 0
    assert re.search("learnable queries +0 ", capsys.readouterr().out)


def test_pictures_and_clips_are_read_upright_and_over_white(media):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.new("RGB", (32, 16), "red").save("turned.jpg", exif=exif)
    assert vino.read_image("turned.jpg").size == (16, 32)
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save("clear.png")
    assert vino.read_image("clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((16, 16), 100 * 257, np.uint16)).save("deep.png")  # 16 bits, gray
    assert vino.read_image("deep.png").getpixel((0, 0)) == (100, 100, 100)
    frame = next(vino.read_frames("clip.mp4"))
    assert abs(frame - pixels("wide.png")[0]).mean() < 2
    turned = bytearray(Path("clip.mp4").read_bytes())
    place = turned.find(b"tkhd") + 44  # nine 32-bit numbers: a quarter turn to the right
    turned[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 40 << 16, 0, 1 << 30)
    Path("turned.mp4").write_bytes(turned)
    assert (next(vino.read_frames("turned.mp4")) == np.rot90(frame, -1)).all()
    assert next(vino.read_frames("turned.mp4", area=20 * 40)).shape == (40, 20, 3)


def test_a_damaged_clip_is_one_line_and_nobodys_result(media):
    film("clip.mkv", np.zeros((9, 64, 64, 3), np.uint8))
    for name, seed in itertools.product(("clip.mp4", "clip.mkv"), range(15)):
        damage, content = random.Random(seed), bytearray(Path(name).read_bytes())
        for _ in range(damage.choice([1, 5, 50])):
            content[damage.randrange(len(content))] = damage.randrange(256)
        Path(f"bad-{name}").write_bytes(content)
        command_line.made_by(Path(f"bad-{name}"))  # raises nothing
        with contextlib.suppress(InputError):
            list(vino.read_frames(f"bad-{name}"))


BAD = {
    "": "say what to make: --prompt TEXT or --tasks FILE.json",
    "--promt x": "unrecognized arguments: --promt x",
    "--tasks a.json --rewrite-only --out a.txt": "--rewrite-only goes with",
    "--tasks a.json": "--tasks needs --out",
    "--tasks a.json --out a --count 2": "--tasks excludes",
    "--prompt ''": "prompt is empty",
    "--prompt a\udcff": "the prompt is not valid UTF-8",
    "--prompt x --negative-prompt a\udcff": "the prompt is not valid UTF-8",
    "--prompt x --height 0 --width 64": "invalid int (16 to",
    "--prompt x --height 64": "go together",
    "--prompt x --frames 1001": "the config allows 33",
    "--prompt x --base --image wide.png": "--base needs two images",
    "--prompt x --image wide.png wide.png wide.png wide.png wide.png": "allows 4",
    "--prompt x --image cut.png": "cut.png is not an image, or is cut short",
    "--prompt x --video cut.mp4": "cut.mp4 is not a video, or is cut short",
    "--prompt x --video wide.png": "1 frame(s), and a video needs at least 5",
    "--prompt x --video clip.mp4 --video clip.mp4": "--video takes one file, not 2",
    "--prompt x --video clip.mp4 --frames 1": "--frames 1 is an image",
    "--prompt x --video clip.mp4 --height 16 --width 16": "is too narrow",
    "--prompt x --out a.jpg": "text to image goes to a .png, or a folder; .mp4 and .gif make a video",
    "--prompt x --out wide.png/a.png": "wide.png: File exists",
    "--prompt x --weights clip.mp4": "clip.mp4 is neither a .safetensors nor a folder",
    "--tasks good.json --out clip.mp4": "--out clip.mp4 is a file; --tasks needs a folder",
    "--prompt x --config image_size.json": "image_size.json: field 'sampling.image_size' should be two",
    "--prompt x --config fps.json": "fps.json: field 'sampling.fps' should be at least 1",
    "--prompt x --config shift.json": "shift.json: field 'sampling.shift' should be two values",
    "--prompt x --config cut.png": "cut.png is not JSON, or is cut short",
    "--prompt x --config typo.json": "typo.json: there is no field 'num_querys'",
    "--prompt x --weights hub": "cannot download Qwen/Qwen3-VL-4B-Instruct: no network",
    "--prompt x --device moon": "--device moon is not here",
    "--prompt x --offload": "--offload needs a GPU",
}


@pytest.mark.parametrize(("arguments", "message"), BAD.items())
def test_bad_input_is_one_clear_line_and_leaves_files_alone(media, capsys, monkeypatch, arguments, message):
    offline = Mock(side_effect=vino.LocalEntryNotFoundError("no network"))
    monkeypatch.setattr(vino, "snapshot_download", offline)
    Path("cut.png").write_bytes(Path("wide.png").read_bytes()[:-300])
    Path("typo.json").write_text(json.dumps({"num_querys": 3}))
    for name, value in (("image_size", [64, 65]), ("fps", 0), ("shift", [3.0])):
        Path(f"{name}.json").write_text(json.dumps({"sampling": {name: value}}))
    Path("good.json").write_text('[{"index": "a", "task": "t2i", "caption": "x"}]')
    Path("cut.mp4").write_bytes(Path("clip.mp4").read_bytes()[:600])
    assert message in refused(capsys, *(word.strip("'") for word in arguments.split()))


ITEM = '[{"index": "a", "task": "ti2i", "caption": "x", "ref_image_paths": ["wide.png"], %s}]'
BAD_TASKS = {
    '[\n{"index": 1,}]': "line 2 ",
    "[" * 100_000: "is not JSON",
    "[1]": "item 1: should be an object",
    ITEM % '"task": "i2i"': "unknown task 'i2i'",
    ITEM % '"task": "t2i"': "does not go with these references",
    ITEM % '"caption": 3': "'caption' is int, should be str",
    ITEM % '"caption": null': "item 1: 'caption' is missing",
    ITEM % '"index": ".."': "'index' should be a file's name, and is \"..\"",
    ITEM % '"index": "\\ud800"': "a file's name",
    ITEM % '"ref_image_paths": [5]': "should be paths",
}


@pytest.mark.parametrize(("text", "message"), BAD_TASKS.items(), ids=range(len(BAD_TASKS)))
def test_a_malformed_task_file_is_refused_with_its_line_or_item(media, capsys, text, message):
    Path("a.json").write_text(text)
    assert message in refused(capsys, "--tasks", "a.json", "--out", "results")
    assert not Path("results").exists()


def test_compiling_and_profiling_leave_the_picture_alone(media, capsys, monkeypatch):
    compile_, graphs = torch.compile, CompileCounter()  # torch's own backend needs a C++ compiler
    monkeypatch.setattr(torch, "compile", lambda layer, **_: compile_(layer, dynamic=True, backend=graphs))
    assert sample_py("--prompt", "x", "--out", "a.png") == 0
    assert sample_py("--prompt", "x", "--out", "b.png", "--compile", "--profile") == 0
    assert {"language model", "MMDiT", "VAE, decoder"} < {*re.split(r" {2,}|\n", capsys.readouterr().out)}
    assert abs(np.subtract(*pixels("a.png", "b.png"))).max() <= 1
    assert graphs.frame_count == 2  # one for each kind of block, and prompts of all lengths


def test_notices_name_all_strange_words_and_every_reference_that_nobody_gave(media, capsys):
    prompt = "Make the corgi in Image 1 ride as in Image 2."
    assert command_line.main(["--prompt", prompt, "--image", "wide.png", "--explain"]) == 0
    words, reference = capsys.readouterr().err.splitlines()[:2]
    assert words.startswith("'corgi', 'ride' mean nothing to this model: these weights know coloured shapes")
    assert reference == "the prompt names Image 2, which is not given"
    assert command_line.main(["--prompt", "赤い a red großer circle", "--explain"]) == 0
    assert "'赤い', 'großer' mean nothing" in capsys.readouterr().err


def test_memory_that_runs_out_and_an_interrupt_are_one_line_and_leave_nothing(media, capsys):
    full, before = torch.OutOfMemoryError("CUDA out of memory."), files()
    too_large = "error: too large for the GPU's memory: try --offload"
    for error, status, line in ((full, 2, too_large), (KeyboardInterrupt, 130, "stopped")):
        with patch.object(Vino, "generate", side_effect=error):
            assert sample_py("--prompt", "x") == status and files() == before
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"sample.py: {line}")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_stdout_or_one_without_the_letters_of_a_name_is_no_error_of_the_picture(media, capsys):
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    with open("/dev/full", "w") as full:
        for stdout in (full, ascii_only):
            with contextlib.redirect_stdout(stdout):
                assert sample_py("--prompt", "é", "--out", "é.png") == 0 and Path("é.png").exists()
    assert "cannot print to stdout: No space left" in capsys.readouterr().err
    assert ascii_only.buffer.getvalue() == b"\\xe9.png\n"


def test_processes_that_cannot_share_the_heads_are_refused(media, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "WORLD", 3)
    assert "3 processes cannot share 4 attention heads evenly" in refused(capsys, "--prompt", "x")


def test_a_config_file_changes_what_it_names_and_nothing_else(tmp_path):
    path, saved = tmp_path / "some.json", vino.read_metadata(train.TINY, None)[0]
    path.write_text('{"sampling": {"steps": 2}, "training": {"3": {"mixture": {"t2v": 1.0}}}}')
    config = vino.read_config(path, train.TINY)
    assert config.sampling == replace(saved.sampling, steps=2) and config.text == saved.text
    assert config.training["3"] == saved.training["3"] | {"mixture": {"t2v": 1.0}}
    assert vino.read_config(path, "random") == Config.from_dict(json.loads(path.read_text()))


# --- README -------------------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text()
COMMANDS = re.findall(
    r"python (sample\.py|train\.py|-m toy\.\w+)(.*)", README + (HERE / "toy/README.md").read_text()
)


@pytest.mark.parametrize("row", re.findall(r"^\| .+ \| `(--prompt .+)` \|$", README, re.MULTILINE))
def test_each_row_of_the_readmes_table_of_tasks_runs_as_printed(row, media):
    shutil.copytree(HERE / "assets/examples", "assets/examples")
    assert command_line.main([*shlex.split(row), "--steps", "1"]) == 0


def test_every_command_of_the_readmes_has_options_that_exist():
    parsers = {
        "sample.py": lambda words: command_line.build_parser().parse_args(words),
        "train.py": train.parse_arguments,
        "-m toy.pretrain": pretrain.parse_arguments,
        "-m toy.benchmark": benchmark.parse_arguments,
        "-m toy.figures": figures.parse_arguments,
    }
    assert len(COMMANDS) > 10 and {program for program, _ in COMMANDS} == {*parsers}
    for program, options in COMMANDS:
        options = re.split(r"`|\||  #|\)", options)[0].replace("…", "").replace("samples.jsonl", "a.jsonl")
        parsers[program](shlex.split(options))


def test_torchrun_takes_none_of_our_options_for_its_own(capsys):
    for call in (command_line.main, train.main):
        with pytest.raises(SystemExit):
            call(["--help"])
    ours, theirs = (
        {*re.findall(r"--[a-z-]+", text)} - {"--help", "--nproc-per-node"}  # the last stands in our examples
        for text in (capsys.readouterr().out, torch.distributed.run.get_args_parser().format_help())
    )
    assert len(ours) > 50 and "--numa-binding" in theirs
    assert not [option for option in ours if any(other.startswith(option) for other in theirs)]


def test_the_recipe_of_the_readme_trains_and_draws_its_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [(_, recipe), (_, picture)] = [command for command in COMMANDS if "runs/recipe" in command[1]]
    shutil.copytree(HERE / "assets", "assets")
    few = shlex.split(recipe.replace("--steps 300", "--steps 2 --batch 1 --validate-every 0"))
    assert train.main(few) == 0
    monkeypatch.setattr(figures, "generate", functools.partial(figures.generate, steps=2))
    assert figures.main(shlex.split(picture.replace("selection selection selection", "selection"))) == 0
    assert Path("recipe.png").exists()


def test_every_name_in_the_readmes_map_of_the_paper_exists():
    table = README.split("| paper | code |")[1].split("\n\n")[0]
    others = {"train.py", "sample.py", "toy.benchmark", "understanding"}
    names = {*re.findall(r"`([A-Za-z_.]+)`", table)} - others
    assert len(names) > 15
    for name in names:
        owner = train if name.startswith("train.") else vino
        for part in name.removeprefix("train.").split("."):
            owner = getattr(owner, part)
