"""Each test is a claim of the README or of the paper's method; its name is the claim.

`VINO_GOLDEN` (folders separated by ":") replaces assets/golden by other golden runs of that format. `SLOW=1`
adds the over-fitting of one batch of each task.
"""

import copy
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import MethodType, SimpleNamespace
from unittest.mock import Mock, patch

# Before torch starts: idle threads shall sleep, or the suite takes many times as long on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import av
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import multiprocessing
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import DynamicCache

import sample as command_line
import train
import vino
from train import STAGES, TASKS, Trainer, parse_arguments
from vino import (
    VAE, Block, Config, Downsample, FrameAttention, InputError, MMDiT, Reference, Resnet, Upsample, Vino,
    build_prompt, byte_tokenizer, flow_loss, guidance_weights, letterbox_size, pack, patchify, rope_3d,
    rotate, sample, shift_time, tiled, time_steps, timeline, video_size, vlm_size,
)  # fmt: skip

HERE, records = Path(__file__).parent, train.read_metrics
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process needs none
GOLDEN = [Path(folder) for folder in os.environ.get("VINO_GOLDEN", str(HERE / "assets/golden")).split(":")]


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(scope="session")
def tiny():
    """The tiny architecture with seeded random weights."""
    return Vino.load("random", Config.from_file(HERE / "tiny_config.json"))


@pytest.fixture(scope="session")
def photo(tiny):
    """A reference image with some structure, 48 x 80."""
    ramp = np.linspace(0, 255, 48 * 80 * 3).reshape(48, 80, 3).astype(np.uint8)
    return Reference.image(Image.fromarray(ramp), 48 * 80, tiny.config.vision)


@pytest.fixture(scope="session")
def clip(tiny):
    frames = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), dtype=np.uint8)
    return Reference.video(frames, 9, tiny.config.vision)


# ----------------------------------------------------------------------------------------------------------
# The public release's numbers
# ----------------------------------------------------------------------------------------------------------


@functools.cache
def golden_model(folder):
    """The tiny VINO of a golden folder, from its config and weights."""
    golden = json.loads((folder / "config.json").read_text())
    sizes = golden["cfg"]
    text = dict(sizes["text"], vocab_size=golden["vlm_config"]["text_config"]["vocab_size"])
    text["mrope_section"] = text.pop("rope_scaling")["mrope_section"]
    vision, mmdit = sizes["vision"], sizes["mmdit"]
    assert (mmdit.pop("qk_norm"), mmdit.pop("guidance_embeds")) == ("rms_norm", True)
    for kind in ("image", "video"):
        least, most = (sizes[f"{kind}_size"][edge] for edge in ("shortest_edge", "longest_edge"))
        vision[f"{kind}_resize"] = [getattr(Config().vision, f"{kind}_resize")[0], [32, least, most]]
    parts = {"text": text, "vision": vision, "mmdit": mmdit, "vae": sizes["vae"]}
    config = Config.from_dict(parts | {"num_queries": sizes["num_queries"]})
    tokenizer = byte_tokenizer(sorted(golden["special_tokens"], key=golden["special_tokens"].get))
    names, stream = {"mmdit": "transformer", "vae": "vae", "vlm": "mm_encoder.mm_encoder"}, []
    for name, tensor in load_file(folder / "weights.safetensors").items():
        first, *rest = name.split(".")
        ours = ".".join([names.get(first, f"mm_encoder.{first}"), *rest])
        stream.append((ours, lambda tensor=tensor: tensor))
    with torch.device("meta"):
        model = Vino(config, tokenizer)
    model.fill(stream, folder, "cpu", torch.float32)
    return model.eval()


CASES = [path.with_suffix(".json") for folder in GOLDEN for path in sorted(folder.glob("*.safetensors"))]
CASES = [path for path in CASES if path.exists()]


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@torch.no_grad()
def test_every_stage_equals_the_public_release(path):
    call, golden = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    if "in.video" in golden and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch rounds resized video frames differently on this processor: needs x86 with AVX2")
    model = golden_model(path.parent)
    vision, encoder = model.config.vision, model.mm_encoder

    def compare(name, ours):
        step = next((int(key.rsplit("_", 1)[1]) for key in golden if key.startswith(f"{name}.rows_")), None)
        theirs = golden[name] if step is None else golden[f"{name}.rows_{step}"]
        rows = ours if step is None else ours[::step] if ours.dim() == 2 else ours[:, ::step]
        error = relative_error(rows, theirs)
        print(f"{name:24} {error:.1e}")  # shown by pytest -rP
        assert error < 1e-4, name

    area = math.prod(call["letterbox_area_hw"])
    pictures = [golden[f"in.image_{k}"].numpy() for k in range(len(call.get("images", [])))]
    images = [Reference.image(Image.fromarray(picture), area, vision) for picture in pictures]
    films = [golden["in.video"].numpy()] if "in.video" in golden else []
    videos = [Reference.video(film, call["out"][0], vision) for film in films]
    for k, image in enumerate(images):
        letterboxed = ((image.pixels[0, :, 0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
        assert torch.equal(letterboxed, golden[f"letterboxed_{k}"])
    inputs = (images, "pixel_values", "image"), (videos, "pixel_values_videos", "video")
    for references, kind, grids in inputs:
        if references:
            compare(f"cond.{kind}", torch.cat([r.patches[0] for r in references]))
            assert [list(r.grid) for r in references] == golden[f"cond.{grids}_grid_thw"].tolist()

    encoded = [model.encode(reference) for reference in images + videos]
    for k, reference in enumerate(encoded):
        compare(f"ref_latent_{k}", reference.latents)
    prompt = build_prompt(encoder.tokenizer, call["prompt"], encoded, encoder.merge)
    assert prompt.ids == golden["cond.input_ids"][0].tolist()
    assert prompt.starts == call["cond.pos_vs"][0]
    assert prompt.ends == call["cond.pos_ve"][0][: len(encoded)]

    hidden, mask, starts, ends = encoder.read([call["prompt"]], encoded)
    assert mask is None and golden["cond.attention_mask"].all()
    compare("cond.penultimate", hidden)
    compare("cond.embeds_vlm", encoder.connector(hidden))
    compare("cond.embeds_vae", encoder.connector_vae_branch(hidden))
    negative = call["negative_prompt_video" if call["out"][0] > 1 else "negative_prompt"]
    guidance = {"cfg_text": call["cfg_text"], "cfg_image": call["cfg_image"]}
    texts, base = ([call["prompt"]], [negative]), call.get("base", False)
    branches = model.branches(*texts, encoded[: len(images)], encoded[len(images) :], base, **guidance)
    theirs = {"full": "cond", "text_dropped": "uncond_text", "image_dropped": "uncond_image"}
    for k, boundary in enumerate(branches["full"][1].boundaries):
        compare(f"boundary_{k}", torch.cat(boundary))
    for name, key in theirs.items():
        if f"velocity.{key}" in golden:  # without an image to drop, the last two branches are one
            condition = branches.get(name, branches.get("text_dropped"))[1]
            compare(f"{key}.embeds_vlm", condition.tokens)
            velocity = model.velocity(golden["noise"], golden["timesteps"][:1], condition)
            compare(f"velocity.{key}", velocity)

    with patch.object(model.vae, "decode", wraps=model.vae.decode) as decode:
        settings = {"size": call["out"], "base": base, "steps": call["steps"], "shift": call["shift"]}
        settings |= {"negative_prompt": negative, "noise": golden["noise"], **guidance}
        pixels = model.generate([call["prompt"]], images, *videos, **settings)
    compare("latents", decode.call_args.args[0])
    compare("pixels", pixels)


@pytest.mark.parametrize("folder", [f for f in GOLDEN if (f / "sizes.json").exists()], ids=str)
def test_sizes_of_references_equal_the_release(folder):
    defaults = Config().vision
    for case in json.loads((folder / "sizes.json").read_text()):
        h, w = letterbox_size(*case["src_wh"], case["area"])
        assert [h, w] == case["letterbox_hw"]
        once = vlm_size(h, w, *defaults.image_resize[0])
        assert list(vlm_size(*once, *defaults.image_resize[1])) == case["vlm_hw"]
        assert list(video_size(*case["src_wh"], case["area"])) == case["target_hw"]


@pytest.mark.parametrize("folder", [f for f in GOLDEN if (f / "timesteps.json").exists()], ids=str)
def test_sampling_times_equal_the_release(folder):
    for key, expected in json.loads((folder / "timesteps.json").read_text()).items():
        steps, shift = key.split("/")
        torch.testing.assert_close(torch.stack(time_steps(int(steps), float(shift))), torch.tensor(expected))


def test_full_size_parameters_have_the_public_names_and_shapes():
    keys = json.loads((HERE / "assets/golden/full_keys.json").read_text())
    with torch.device("meta"):
        for model, expected in ((MMDiT(Config().mmdit), keys["mmdit"]), (VAE(Config().vae), keys["vae"])):
            assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected
            public = {name: torch.empty(shape) for name, shape in expected.items()}
            model.load_state_dict(public, strict=True, assign=True)


# ----------------------------------------------------------------------------------------------------------
# 1. Multi-modal conditions
# ----------------------------------------------------------------------------------------------------------


def test_special_tokens_spelled_in_a_prompt_are_text(tiny, photo):
    tokenizer, image = tiny.mm_encoder.tokenizer, tiny.encode(photo)
    plain = build_prompt(tokenizer, "", [image], 2)
    spelled = build_prompt(tokenizer, "<|vision_start|><|image_pad|><|im_end|><|vision_end|>", [image], 2)
    special = set(range(256, 270))
    assert [i for i in plain.ids if i in special] == [i for i in spelled.ids if i in special]
    assert (plain.starts, plain.ends) == (spelled.starts, spelled.ends)


def test_positions_give_an_image_one_time_and_the_text_behind_it_the_next(tiny, photo):
    tokenizer = tiny.mm_encoder.tokenizer
    prompt = build_prompt(tokenizer, "x", [photo], 2)
    pads = [i for i, token in enumerate(prompt.ids) if token == tokenizer.token_to_id("<|image_pad|>")]
    h, w = photo.grid[1] // 2, photo.grid[2] // 2
    time, rows, columns = prompt.positions[:, pads]
    assert time.unique().tolist() == [prompt.starts[0] + 1]
    assert (rows - time).view(h, w)[:, 0].tolist() == list(range(h))
    assert (columns - time).view(h, w)[0].tolist() == list(range(w))
    assert prompt.positions[:, prompt.ends[0]].tolist() == [prompt.starts[0] + 1 + max(h, w)] * 3


def test_patches_are_grouped_two_by_two_and_a_lone_frame_fills_the_time_patch(tiny):
    vision = tiny.config.vision
    p = vision.patch_size
    pixels = torch.randn(2, 3, 1, 4 * p, 6 * p)
    patches, grid = patchify(pixels, vision)
    assert grid == (1, 4, 6) and patches.shape == (2, 24, 3 * 2 * p * p)
    first_group = [pixels[1, :, 0, y * p : (y + 1) * p, x * p : (x + 1) * p] for y in (0, 1) for x in (0, 1)]
    twice = torch.stack([torch.stack([tile, tile], 1).flatten() for tile in first_group])
    assert torch.equal(patches[1, :4], twice)


def test_queries_against_a_cached_prompt_and_their_gradient_equal_one_pass_over_both(tiny, photo, clip):
    encoder, references = tiny.mm_encoder, [tiny.encode(photo), tiny.encode(clip)]
    cached = encoder.read(["Make Image 1 blue."], references)[0]
    prompt = build_prompt(encoder.tokenizer, "Make Image 1 blue.", references, encoder.merge)
    model, ids = encoder.mm_encoder.model.language_model, torch.tensor([prompt.ids])
    pads = torch.tensor([encoder.tokenizer.token_to_id(pad) for pad in ("<|image_pad|>", "<|video_pad|>")])
    where, embeds = torch.isin(ids, pads), model.embed_tokens(ids).clone()
    embeds[where] = torch.cat([r.features[0] for r in references])
    deepstack = [torch.cat(level, 1).flatten(0, 1) for level in zip(*[r.deepstack for r in references])]
    queries = encoder.metaquery[None]
    behind = prompt.positions[:, -1:] + torch.arange(queries.shape[1])
    positions = torch.cat([prompt.positions, behind], 1)[:, None]
    where = torch.nn.functional.pad(where, (0, queries.shape[1]))
    inputs = torch.cat([embeds, queries], 1), positions, None, DynamicCache(), where, deepstack
    whole = encoder.language(*inputs)[1]
    assert relative_error(cached, whole) < 1e-5
    weights = torch.randn(whole.shape, generator=torch.manual_seed(0))
    ours, full = (torch.autograd.grad((x * weights).sum(), encoder.metaquery)[0] for x in (cached, whole))
    assert torch.allclose(ours, full, rtol=1e-5, atol=1e-5 * full.abs().max())


def test_a_batch_of_prompts_of_different_length_equals_its_members(tiny, photo):
    prompts = ["Make Image 1 blue.", "Make the big thing in the middle of Image 1 a little more blue."]
    settings = {"size": (1, 48, 80), "steps": 2, "cfg_image": 1.5}
    both = tiny.generate(prompts, [photo], seed=3, **settings)
    for k, prompt in enumerate(prompts):
        alone = tiny.generate([prompt], [photo], seed=3 + k, **settings)
        assert relative_error(both[k : k + 1], alone) < 1e-4


def test_attention_is_masked_only_when_something_is_padded(tiny, photo, monkeypatch):
    masks, attend = [], vino.attend
    monkeypatch.setattr(vino, "attend", lambda q, k, v, m=None: masks.append(m) or attend(q, k, v, m))
    tiny.generate(["one length", "two length"], [photo], size=(1, 48, 80), steps=1)
    assert masks and all(mask is None for mask in masks)
    tiny.generate(["one", "another"], [photo], size=(1, 48, 80), steps=1)
    assert any(mask is not None for mask in masks)


@pytest.fixture(scope="session")
def branches(tiny, photo, clip):
    """The three Conditions of image guidance for two prompts, of which the longer pads the shorter."""
    prompts = ["Make Image 1 blue.", "Make the big thing in the middle of Image 1 a little more blue."]
    inputs = prompts, ["low quality", ""], [tiny.encode(photo)], [tiny.encode(clip)]
    with torch.no_grad():
        return [condition for _, condition in tiny.branches(*inputs, False, 5.0, 1.5).values()]


@torch.no_grad()
def test_guidance_branches_of_different_length_run_in_one_forward_and_equal_separate_ones(tiny, branches):
    noise, t = torch.randn(2, 16, 3, 6, 10), torch.tensor([0.5, 0.9])
    context = tiny.transformer.context(branches, noise.shape[2:])
    assert len({*context.visual}) == 2 and len({*context.words}) == 3 and None not in context.masks[:2]
    for together, condition in zip(tiny.transformer(noise, t, context), branches, strict=True):
        assert relative_error(together, tiny.velocity(noise, t, condition)) < 1e-5


@torch.no_grad()
def test_the_profiles_operations_are_those_that_torch_counts(tiny, branches):
    noise, t = torch.randn(2, 16, 1, 16, 16), torch.tensor([0.5, 0.9])
    context = tiny.transformer.context(branches, noise.shape[2:])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tiny.transformer(noise, t, context)
    ours, all_of_them = tiny.transformer.flops(context), counter.get_total_flops()
    assert 0.97 * all_of_them < ours < all_of_them  # without modulation and both ends


def test_small_branches_run_together_and_large_ones_one_after_the_other(tiny, photo, monkeypatch):
    settings = {"size": (1, 48, 80), "steps": 2, "cfg_image": 1.5}
    with patch.object(tiny.transformer, "forward", wraps=tiny.transformer.forward) as forward:
        together = tiny.generate(["x"], [photo], **settings)
        assert forward.call_count == 2
        monkeypatch.setattr(vino, "TOGETHER", 119)  # the image and its reference have 120 patches
        assert relative_error(tiny.generate(["x"], [photo], **settings), together) < 1e-5
        assert forward.call_count == 2 + 3 * 2


def test_what_no_step_or_guidance_branch_changes_is_computed_once(tiny, photo, clip, monkeypatch):
    embedders = tiny.transformer.time_text_embed
    places = [(vino, "pack"), (vino, "rope_3d"), (tiny.transformer.context_embedder, "embed")]
    places += [(embedders["guidance_embedder"], "forward"), (tiny.vae, "encode"), (tiny.mm_encoder, "look")]
    done = {name: Mock(wraps=getattr(owner, name)) for owner, name in places}
    for owner, name in places:
        monkeypatch.setattr(owner, name, done[name])
    tiny.generate(["x"], [photo], clip, size=(1, 48, 80), steps=3, cfg_image=1.5)
    assert {name: function.call_count for name, function in done.items()} == {
        "pack": 3, "rope_3d": 1, "embed": 3, "forward": 1,  # three branches
        "encode": 2, "look": 2,  # two references
    }  # fmt: skip


def test_the_vision_tower_equals_transformers_own_for_a_batch_of_images_and_of_clips(tiny, photo, clip):
    tower = tiny.mm_encoder.mm_encoder.model.visual
    theirs = vino.Qwen3VLForConditionalGeneration(tiny.mm_encoder.mm_encoder.config).eval().model.visual
    theirs.load_state_dict(tower.state_dict())
    for one in (photo, clip):
        patches = torch.cat([one.patches, one.patches.flip(1)])
        ours = tiny.mm_encoder.look(replace(one, patches=patches))
        output = theirs(patches.flatten(0, 1), grid_thw=torch.tensor([one.grid] * 2))
        assert relative_error(ours[0].flatten(0, 1), output[-2]) < 1e-5
        for own, other in zip(ours[1], output[-1], strict=True):
            assert relative_error(own.flatten(0, 1), other) < 1e-5


def test_answers_are_greedy_and_the_same_alone_and_in_a_batch(tiny, photo):
    encoder, prompts = tiny.mm_encoder, ["What is it?", "And where on earth is it?"]
    references = [tiny.encode(photo)]
    answers = encoder.answer(prompts, references, max_new_tokens=6)
    assert answers == [encoder.answer([prompt], references, max_new_tokens=6)[0] for prompt in prompts]
    prompt = build_prompt(encoder.tokenizer, prompts[0], references, encoder.merge)
    for _ in range(6):  # without a cache
        last = encoder.prefill([prompt], references, DynamicCache())[0][:, -1]
        prompt = replace(prompt, ids=prompt.ids + encoder.mm_encoder.lm_head(last).argmax(-1).tolist())
    assert encoder.tokenizer.decode(prompt.ids[-6:], skip_special_tokens=True).strip() == answers[0]


# ----------------------------------------------------------------------------------------------------------
# 2. Interleaved omnimodal context
# ----------------------------------------------------------------------------------------------------------


def test_references_boundary_tokens_and_target_share_one_timeline():
    blocks = timeline([(1, 4, 6), (3, 4, 4)], (2, 4, 6))
    assert [(block.kind, block.time) for block in blocks] == [
        ("start", 0), ("reference", 1), ("end", 2), ("start", 3), ("reference", 4), ("end", 7), ("target", 8),
    ]  # fmt: skip
    assert blocks[4].positions()[-1].tolist() == [6, 3, 3]
    assert Block("end", 7, (1, 1, 1)).positions().tolist() == [[7, 0, 0]]
    plain = timeline([(1, 4, 6), (3, 4, 4)], (2, 4, 6), boundaries=False)
    assert [block.time for block in plain] == [0, 1, 4]


def test_pack_wraps_each_reference_in_its_own_tokens_and_puts_the_target_last():
    one, two, target = (torch.full((1, 8, 1, 2, 2), float(k)) for k in (1, 2, 3))
    boundaries = [tuple(torch.full((1, 8), float(k)) for k in pair) for pair in ((10, 11), (20, 21))]
    tokens, positions = pack([one, two], boundaries, target)
    assert tokens[0, :, 0].tolist() == [10, 1, 1, 1, 1, 11, 20, 2, 2, 2, 2, 21, 3, 3, 3, 3]
    assert positions[:, 0].tolist() == [0, 1, 1, 1, 1, 2, 3, 4, 4, 4, 4, 5, 6, 6, 6, 6]


def test_rotation_makes_attention_depend_on_distance_alone_and_leaves_position_zero_untouched():
    q, k = torch.randn(2, 1, 1, 1, 32)
    here, there = torch.tensor([[3, 1, 2]]), torch.tensor([[7, 5, 1]])

    def rotated(x, positions):
        return rotate(x, rope_3d(positions, [8, 12, 12], 256))

    near, far = ((rotated(q, here + shift) * rotated(k, there + shift)).sum() for shift in (0, 20))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
    assert torch.equal(rotated(q, torch.zeros(1, 3)), q)


# ----------------------------------------------------------------------------------------------------------
# 4. VAE
# ----------------------------------------------------------------------------------------------------------


def test_tiling_puts_a_signal_back_together_exactly():
    def equal(function, x, *how, **lead):
        torch.testing.assert_close(tiled(function, x, *how, **lead), function(x))

    def grow(part):  # as the decoder does: one frame for the first, four for each other
        return torch.cat([part[:, :, :1], part[:, :, 1:].repeat_interleave(4, 2)], 2)

    x = torch.randn(1, 2, 23, 50, 41)
    equal(lambda part: part, x, 3, 16, 12, 1)
    equal(lambda part: part.repeat_interleave(8, 4), x, 4, 16, 12, 8)
    equal(grow, x, 2, 4, 3, 4, lead=1)
    equal(lambda part: part[:, :, ::4], grow(x), 2, 16, 12, 1 / 4, lead=1)


@torch.no_grad()
def test_large_frames_are_decoded_in_tiles_of_bounded_size(config):
    vae, seen = VAE(Config.from_file(config).vae), []
    vae.config.tile_pixels, vae.config.untiled_area = [64, 48], 64 * 64
    vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[2:]))
    pixels = vae.decode(torch.randn(1, 16, 7, 10, 14))
    assert pixels.shape == (1, 3, 25, 80, 112)
    assert max(t for t, _, _ in seen) <= 5 and max(h * w for _, h, w in seen) <= 8 * 8


def plain_conv(layer, x):
    return layer.conv(torch.nn.functional.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"))


def plain_resnet(layer, x):
    h = plain_conv(layer.conv1, torch.nn.functional.silu(layer.norm1(x)))
    return layer.conv_shortcut.conv(x) + plain_conv(layer.conv2, torch.nn.functional.silu(layer.norm2(h)))


def plain_upsample(layer, x):
    x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
    if layer.doubles_time:
        x = x.repeat_interleave(2, 2)[:, :, 1:]
    return plain_conv(layer.conv, x)


@pytest.mark.parametrize("lengths", [[9], [5, 4], [1, 4, 4], [1, 2, 2, 2, 2]], ids=str)
def test_the_vaes_layers_equal_torchs_with_their_gradients_however_a_clip_is_cut(lengths):
    for layer, plain in (
        (Resnet(4, 8, 2), plain_resnet),
        (Downsample(4, (1, 2, 2)), lambda layer, x: plain_conv(layer.conv, x)),
        (Downsample(4, (2, 2, 2)), lambda layer, x: plain_conv(layer.conv, x)),
        (Upsample(4, (1, 2, 2)), plain_upsample),
        (Upsample(4, (2, 2, 2)), plain_upsample),
    ):
        x = (torch.randn(2, 4, 9, 6, 8) + 1).requires_grad_()
        with torch.no_grad():
            cut = torch.cat(list(layer(list(x.split(lengths, 2)))), 2)
        [ours], theirs = layer([x]), plain(layer, x)
        for result in (cut, ours):
            torch.testing.assert_close(result, theirs, rtol=1e-4, atol=1e-5)
        weight, inputs = torch.randn_like(theirs), [x, *layer.parameters()]
        for a, b in zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, theirs))):
            assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
@torch.no_grad()
def test_how_many_pixels_the_vae_computes_at_once_does_not_change_its_result(tiny, dtype, most):
    vae, results = copy.deepcopy(tiny.vae).to(dtype), []
    pixels = torch.rand(1, 3, 21, 32, 48) * 2 - 1
    for vae.config.chunk_pixels, chunks in ((2**20, 1), (8 * 32 * 48, 3), (1, 5)):
        assert len(vae.encoder.chunks(pixels[:, :, :17])) == chunks
        assert len(vae.decoder.chunks(torch.empty(1, 16, 5, 4, 6))) == chunks
        latents = vae.encode(pixels)
        results.append(torch.cat([latents.flatten(), vae.decode(latents).flatten()]))
    assert max(relative_error(result, results[0]) for result in results[1:]) < most
    with torch.enable_grad():  # keeps all in memory anyway
        assert len(vae.encoder.chunks(pixels)) == 1


@torch.no_grad()
def test_frame_attention_equals_attention_under_a_causal_mask():
    layer, x = FrameAttention(8, 2), torch.randn(2, 8, 3, 4, 5)
    tokens = layer.group_norm(x).flatten(2).transpose(1, 2)
    frame = torch.arange(3).repeat_interleave(20)
    seen = frame[:, None] >= frame[None]
    q, k, v = layer.to_q(tokens), layer.to_k(tokens), layer.to_v(tokens)
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
    expected = x + layer.to_out[0](attended).transpose(1, 2).view_as(x)
    torch.testing.assert_close(layer(x), expected)


# ----------------------------------------------------------------------------------------------------------
# 5. Rectified flow and guidance
# ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_zero_for_the_true_velocity_and_the_sampler_follows_it_to_the_data():
    data, noise = torch.randn(2, 4, 4, 1, 3, 3)
    u = torch.tensor([0.2, 0.4, 0.6, 0.8])

    def velocity(x, t):
        assert torch.equal(t, shift_time(u, 5))
        return (x - data) / t.view(-1, 1, 1, 1, 1)  # on the straight line alone this is noise - data

    loss = flow_loss(velocity, data, noise, u, shift=5)
    assert loss.shape == (4,) and loss.max() < 1e-6
    torch.testing.assert_close(sample(lambda x, t: noise - data, noise, 7, 5.0), data, rtol=1e-4, atol=1e-5)


def generated(model, photo, clip, group=None):
    """A picture of two guidance branches; a clip of three, for two prompts of which one is padded."""
    settings = {"steps": 2, "seed": 3, "group": group}
    prompts = ["Let it dance.", "Let Image 1 dance as in Video 1."]
    yield model.generate(["a red circle"], size=(1, 48, 80), **settings)
    yield model.generate(prompts, [photo], clip, size=(9, 64, 64), cfg_image=1.5, **settings)


def with_odd_lengths():
    """A tiny model whose patches are larger, so that two processes cannot share all tokens evenly."""
    config = Config.from_file(HERE / "tiny_config.json")
    config.mmdit.patch_size = 2
    return Vino.load("random", config)


SHARDS = ("ddp", "zero2", "fsdp")


def one_of_two(rank, folder, config, photo, clip, port):
    """A process of torchrun: samples of `generated`, one of the command line, and a run of train.py for each
    way to share it."""
    torch.set_num_threads(1)
    train.VALIDATION = train.PICTURE_STEPS = 1
    os.chdir(folder)
    ports = itertools.count(port)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
    os.environ["MASTER_PORT"] = f"{next(ports)}"
    torch.distributed.init_process_group("gloo")
    model = with_odd_lengths()
    forward, seen = model.transformer.forward, []  # each process's visual tokens
    model.transformer.forward = lambda *inputs: seen.append(inputs[2].lengths()[::2]) or forward(*inputs)
    pixels = [*generated(model, photo, clip, torch.distributed.group.WORLD)]
    # Two branches, each on one process; then three, of 115 visual tokens or without the image 98, on both.
    assert seen == [[15]] * 2 + [[58 - rank], [58 - rank], [49]] * 2
    torch.distributed.destroy_process_group()
    assert all(sample is None for sample in pixels) == (rank == 1)
    if rank == 0:
        torch.save(pixels, "pixels.pt")
    os.environ["MASTER_PORT"] = f"{next(ports)}"
    sample_py("--prompt", "x", "--cfg-text", "1", "--out", "two.png", "--profile")
    train.SHORT = 0
    for how in SHARDS:
        os.environ["MASTER_PORT"] = f"{next(ports)}"
        given = f"--shard={how}", "--save-every=3", "--checkpointing"
        train.main(flags(config, folder / how, "--batch=1", *given))
    os.environ["MASTER_PORT"] = f"{next(ports)}"
    save = Vino.save
    Vino.save = lambda *inputs: (time.sleep(1), save(*inputs))  # late, for those who do not wait
    train.main(["--stage=0", f"--config={config}", "--steps=1", "--batch=1"])


@pytest.fixture(scope="module")
def two(config, photo, clip, tmp_path_factory):
    """A folder with what two processes make, which are started once: that takes long."""
    folder = tmp_path_factory.mktemp("two")
    port = 20_000 + os.getpid() % 2_000 * 6  # six below those that the system hands out to others
    with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
        multiprocessing.spawn(one_of_two, (folder, config, photo, clip, port), nprocs=2)
    return folder


def test_two_processes_share_branches_or_tokens_and_make_the_same_sample_as_one(two, photo, clip):
    pixels = torch.load(two / "pixels.pt")
    for ours, alone in zip(pixels, generated(with_odd_lengths(), photo, clip), strict=True):
        assert relative_error(ours, alone) < 1e-5
    sample_py("--prompt", "x", "--cfg-text", "1", "--out", f"{two}/one.png")
    pictures = [np.array(Image.open(two / name), int) for name in ("one.png", "two.png")]
    assert abs(np.subtract(*pictures)).max() <= 1 and not list(two.glob("*.partial"))


def test_processes_that_cannot_share_the_heads_are_refused(media, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 processes cannot share 4 attention heads evenly" in refusal(capsys, "--prompt", "x")


def test_guidance_weights_are_the_release_formulas():
    v, text_dropped, image_dropped = torch.randn(3, 5)
    for w_text, w_image in ((5.0, 1.0), (7.0, 1.5), (1.0, 1.0)):
        weights = guidance_weights(w_text, w_image)
        branches = {"full": v, "text_dropped": text_dropped, "image_dropped": image_dropped}
        ours = sum(weights[name] * branches[name] for name in branches)
        theirs = image_dropped + w_image * (text_dropped - image_dropped) + w_text * (v - text_dropped)
        torch.testing.assert_close(ours, theirs)


def test_guidance_runs_only_the_branches_that_count(tiny, photo):
    image = tiny.encode(photo)

    def names(images, base, cfg_text, cfg_image):
        return list(tiny.branches(["x"], [""], images, [], base, cfg_text, cfg_image))

    assert names([], False, 1.0, 1.0) == ["full"]
    assert names([], False, 5.0, 3.0) == ["full", "text_dropped"]
    assert names([image], False, 5.0, 1.5) == ["full", "text_dropped", "image_dropped"]
    kept = tiny.branches(["x"], [""], [image, image], [], True, 5.0, 1.5)["image_dropped"][1]
    assert len(kept.references) == 1  # the image being edited stays


# ----------------------------------------------------------------------------------------------------------
# 6. Files
# ----------------------------------------------------------------------------------------------------------


def picture(model):
    return model.generate(["a red circle"], size=(1, 64, 64), steps=2)


def write_public_layout(model, folder):
    """The three public downloads, as their authors lay them out, with the tensors of `model`."""
    parts = {"transformer": {}, "vae": {}, "vlm": {}, "ckpt": {}}
    for name, tensor in model.saved_tensors().items():
        if name.startswith("mm_encoder.mm_encoder."):
            parts["vlm"][name.removeprefix("mm_encoder.mm_encoder.")] = tensor
        elif name.startswith("vae."):
            parts["vae"][name.removeprefix("vae.")] = tensor
        else:
            parts["ckpt"][name] = tensor
            if name.startswith("transformer."):
                parts["transformer"][name.removeprefix("transformer.")] = torch.zeros_like(tensor)
    config = asdict(model.config)
    vlm = folder / "Qwen3-VL-4B-Instruct"
    layout = {
        vlm: ("vlm", "model", {"text_config": config["text"], "vision_config": config["vision"]}),
        folder / "HunyuanVideo/transformer": ("transformer", "diffusion_pytorch_model", config["mmdit"]),
        folder / "HunyuanVideo/vae": ("vae", "diffusion_pytorch_model", config["vae"]),
    }
    for place, (part, stem, sizes) in layout.items():
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(sizes))
        names = sorted(parts[part])
        files = {name: f"{stem}-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            own = {name: parts[part][name].clone() for name in names if files[name] == file}
            save_file(own, place / file)
        (place / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    model.mm_encoder.tokenizer.save(str(vlm / "tokenizer.json"))
    unused = {name for name in parts["ckpt"] if name.startswith(f"transformer.{MMDiT.UNUSED}")}
    parts["ckpt"]["mm_encoder.mm_encoder.model.visual.pos_embed.weight"] = torch.zeros(1)  # may be there, too
    torch.save({name: t for name, t in parts["ckpt"].items() if name not in unused}, folder / "vino.ckpt")


def test_offloaded_weights_come_in_turn_and_give_the_same_picture(tiny, photo, clip, monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # stand-ins for what a GPU does in the background
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name in ("Stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda device: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0))
        monkeypatch.setattr(torch.cuda, "check_error", lambda result: None)
    settings = {"size": (9, 64, 64), "steps": 2, "cfg_image": 1.5}
    model = Vino.load("random", tiny.config, device)
    resident = model.generate(["x"], [photo], clip, **settings)
    model.offload(device)
    assert relative_error(model.generate(["x"], [photo], clip, **settings), resident) < 1e-5
    blocks = [p.data.untyped_storage() for block in model.transformer.blocks() for p in block.parameters()]
    assert len({storage.data_ptr() for storage in blocks}) == 2  # slots


def test_public_file_layouts_and_our_own_load_to_the_same_picture(tiny, tmp_path):
    expected = picture(tiny)
    write_public_layout(tiny, tmp_path)
    assert torch.equal(picture(Vino.load(tmp_path, tiny.config)), expected)
    names = [name for name, _ in vino.read_public(*vino.locate(tmp_path), tiny.config, "cpu")]
    assert len(names) == len({*names})  # what vino.ckpt holds is not read from the base model
    tiny.save(tmp_path / "own.safetensors")
    own = Vino.load(tmp_path / "own.safetensors")
    assert own.config == tiny.config and torch.equal(picture(own), expected)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell of its memory")
def test_only_a_small_part_of_a_file_is_in_memory_while_it_is_read(tmp_path):
    def in_memory():
        return int(re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

    tensors = {f"{k}": torch.full((2**18,), float(k)) for k in range(200)}  # 1 MiB each
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.ckpt")
    safe = vino.read_safetensors([tmp_path / "a.safetensors"], "", "cpu")
    for stream in (safe, vino.read_checkpoint(tmp_path / "a.ckpt")):
        before, most = in_memory(), 0
        for name, read in stream:
            assert read().sum() == 2**18 * int(name)
            most = max(most, in_memory() - before)
        assert 16 < most < 80


def test_weights_that_do_not_fit_are_one_line_that_names_the_tensor_or_field(tiny, tmp_path):
    path = tmp_path / "weights.safetensors"
    tiny.save(path)
    tensors = load_file(path)
    metadata = {"config": json.dumps(asdict(tiny.config)), "tokenizer": byte_tokenizer().to_str()}

    def load(change, config=None):
        save_file(change(dict(tensors)), path, metadata)
        with pytest.raises(InputError) as error:
            Vino.load(path, config)
        assert "\n" not in str(error.value)
        return str(error.value)

    name = "transformer.proj_out.weight"
    assert f"'{name}' is missing" in load(lambda t: {k: v for k, v in t.items() if k != name})
    assert "surplus tensor 'extra'" in load(lambda t: t | {"extra": torch.zeros(1)})
    assert name in (message := load(lambda t: t | {name: torch.zeros(3, 2)})) and "[3, 2]" in message
    other = copy.deepcopy(tiny.config)
    other.mmdit.num_layers = 4
    assert "'mmdit.num_layers' does not fit: it is 4 here, and 2 in" in load(lambda t: t, other)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="cut short"):
        Vino.load(path)
    with pytest.raises(InputError, match="does not exist"):
        Vino.load(tmp_path / "nothing.safetensors")


def test_public_weights_that_do_not_fit_are_one_line_that_names_them(tiny, tmp_path):
    write_public_layout(tiny, tmp_path)
    other = copy.deepcopy(tiny.config)
    other.text.num_hidden_layers = 9
    with pytest.raises(InputError, match="text_config.num_hidden_layers"):
        Vino.load(tmp_path, other)
    for broken in ("HunyuanVideo/vae/config.json", "Qwen3-VL-4B-Instruct/tokenizer.json"):
        whole = (tmp_path / broken).read_text()
        (tmp_path / broken).write_text(whole[:9])
        with pytest.raises(InputError, match=f"{broken} is not JSON"):
            Vino.load(tmp_path, tiny.config)
        (tmp_path / broken).write_text(whole)
    torch.save([1], tmp_path / "vino.ckpt")
    with pytest.raises(InputError, match="something else than named tensors"):
        Vino.load(tmp_path, tiny.config)
    (tmp_path / "vino.ckpt").write_bytes(b"not a pickle")
    with pytest.raises(InputError, match="vino.ckpt"):
        Vino.load(tmp_path, tiny.config)
    (tmp_path / "vino.ckpt").unlink()
    with pytest.raises(InputError, match="vino.ckpt does not exist"):
        Vino.load(tmp_path, tiny.config)


def test_config_errors_name_the_field(tmp_path):
    with pytest.raises(InputError, match="'mmdit.layers'"):
        Config.from_dict({"mmdit": {"layers": 3}})
    with pytest.raises(InputError, match="'num_queries' is str, should be int"):
        Config.from_dict({"num_queries": "many"})
    (tmp_path / "config.json").write_text('{"num_queries": 3,\n}')
    with pytest.raises(InputError, match="line 2"):
        Config.from_file(tmp_path / "config.json")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_bfloat16_on_a_gpu_is_close_to_float32_on_the_cpu(tiny, photo, tmp_path):
    tiny.save(tmp_path / "tiny.safetensors")
    fast = Vino.load(tmp_path / "tiny.safetensors", device="cuda", dtype=torch.bfloat16)
    noise, t = torch.randn(1, 16, 1, 6, 10), torch.tensor([0.5])
    slow = tiny.velocity(noise, t, tiny.mm_encoder(["x"], [tiny.encode(photo)]))
    condition = fast.mm_encoder(["x"], [fast.encode(photo)])
    assert relative_error(fast.velocity(noise.cuda(), t.cuda(), condition).cpu().float(), slow) < 2e-2
    latents = torch.randn(1, 16, 6, 6, 10)
    decoded = fast.vae.decode(latents.cuda()).cpu().float()
    assert relative_error(decoded, tiny.vae.decode(latents)) < 4e-2


# ----------------------------------------------------------------------------------------------------------
# sample.py: the command line
# ----------------------------------------------------------------------------------------------------------

TINY = ["--weights", "random", "--steps", "2", "--device", "cpu"]


@pytest.fixture
def media(tmp_path, monkeypatch):
    """A working directory with a wide and a square picture and a wide clip of 13 frames."""
    monkeypatch.chdir(tmp_path)
    ramp = np.linspace(0, 255, 13 * 40 * 80 * 3).reshape(13, 40, 80, 3).astype(np.uint8)
    Image.fromarray(ramp[0]).save("wide.png")
    Image.fromarray(ramp[0, :, :40]).save("square.png")
    command_line.write_mp4("clip.mp4", ramp, 8, "")
    return tmp_path


def sample_py(*arguments):
    return command_line.main([*TINY, *arguments])


def refusal(capsys, *arguments):
    """The one line that a call ends with. The folder holds what it held before."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as end:
        sample_py(*arguments)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("sample.py: error: "), lines
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    return lines[0]


def film(path):
    """(frames, height, width), codec, pixel format and frame rate, and the metadata of a file."""
    with av.open(str(path)) as file:
        stream, frames = file.streams.video[0], [frame.to_ndarray(format="rgb24") for frame in file.decode()]
        kind = (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate)
        return (len(frames), *frames[0].shape[:2]), kind, file.metadata


def test_one_command_on_a_fresh_machine_makes_a_picture_named_by_prompt_and_seed(tmp_path):
    call = [sys.executable, HERE / "sample.py", "--prompt", "A large, red circle!", "--steps", "2"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "a-large-red-circle_0.png"), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a-large-red-circle_0.png"]
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr and "step/s" in done.stderr


def test_a_task_file_makes_all_nine_tasks_and_names_the_items_that_fail(media, config, capsys):
    (media / "tasks").mkdir()
    Image.open("wide.png").save("tasks/near.png")  # found beside the task file
    wide, square, clip = "./wide.png", "./square.png", "./clip.mp4"
    items = [  # index, task, images, video, size of the result
        ("text_image", "t2i", None, None, (1, 64, 64)), ("text_video", "t2v", None, None, (5, 64, 64)),
        ("image_video", "i2v", [wide], None, (5, 48, 96)), ("edit", "ti2i", ["near.png"], None, (1, 48, 96)),
        ("guided_edit", "ti2i", [square, wide], None, (1, 48, 96)),
        ("images_video", "ti2v", [wide, square, wide], None, (5, 64, 64)),
        ("broken", "ti2i", ["./missing.png"], None, None), ("video_edit", "tv2v", None, clip, (5, 32, 80)),
        ("guided_video_edit", "tiv2v", [square, square], clip, (5, 32, 80)),
        ("camera", "tiv2v", [wide], clip, (5, 32, 80)),
    ]  # fmt: skip
    names = ("index", "task", "ref_image_paths", "ref_video_path")
    rows = [dict(zip(names, item), caption="Use Image 1", ref_image_have_base=False) for item in items]
    rows[4]["ref_image_have_base"] = True
    Path("tasks/all.json").write_text(json.dumps(rows))
    call = ["--tasks", "tasks/all.json", "--out", "results", "--cfg-image", "1.5", "--config", str(config)]
    with patch.object(Vino, "generate", autospec=True, side_effect=Vino.generate) as generate:
        assert sample_py(*call) == 1
    last = capsys.readouterr().err.splitlines()[-2:]
    assert last == ["1 of 10 failed", "  broken.png: tasks/missing.png does not exist"]
    assert [call.kwargs["base"] for call in generate.mock_calls] == [False] * 4 + [True] + [False] * 4
    made = {path.stem: film(path)[0] for path in Path("results").iterdir()}
    assert made == {index: size for index, *_, size in items if size}
    assert film("results/camera.mp4")[1] == ("h264", "yuv420p", 8)


CALLS = {
    "": "t2i", "--frames 1": "t2i", "--frames 9": "t2v", "--out a.gif": "t2v", "--out a.MP4": "t2v",
    "--image 1": "ti2i", "--image 1 --frames 5": "i2v", "--image 1 --out a.mp4": "i2v", "--image 1 2": "ti2i",
    "--image 1 --image 2 --out a.mp4": "ti2v", "--image 1 2 --base": "ti2i", "--video 1": "tv2v",
    "--video 1 --image 1": "tiv2v", "--video 1 --image 1 2 --out a.gif": "tiv2v",
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "task"), CALLS.items())
def test_the_task_follows_from_the_inputs(arguments, task):
    args = command_line.build_parser().parse_args(["--prompt", "x", *arguments.split()])
    assert command_line.single_job(args).task == task


def test_an_edit_takes_its_size_from_what_it_edits_and_only_its_area_from_the_command(media, capsys):
    area = ["--height", "64", "--width", "128"]
    assert sample_py("--prompt", "x", "--image", "square.png", "wide.png", *area) == 0
    assert sample_py("--prompt", "y", "--image", "wide.png", "square.png", *area) == 0
    assert [Image.open(f"{name}_0.png").size for name in "xy"] == [(128, 64), (96, 96)]
    assert sample_py("--prompt", "z", "--video", "clip.mp4", "--frames", "12", "--out", "z.mp4") == 0
    assert film("z.mp4")[0] == (9, 32, 80) and "--frames 12 is rounded down to 9" in capsys.readouterr().err


def test_the_same_command_gives_the_same_pixels_and_many_seeds_equal_single_runs(media):
    call = ["--prompt", "a dot", "--frames", "5", "--height", "40", "--width", "50"]
    # As GIFs: libx264 now and then gives other bytes for the same frames.
    assert sample_py(*call, "--out", "a.gif") == sample_py(*call, "--out", "b.gif") == 0
    a, b = (np.stack(list(command_line.read_frames(f"{name}.gif"))) for name in "ab")
    assert a.shape == (5, 32, 48, 3) and (a == b).all()
    assert sample_py("--prompt", "a dot", "--seed", "3", "--num", "2", "--out", "dot.png") == 0
    assert sample_py("--prompt", "a dot", "--seed", "4", "--device", "cpu:0") == 0
    three, four, single = (np.asarray(Image.open(f"{name}.png")) for name in ("dot_3", "dot_4", "a-dot_4"))
    assert (four == single).all() and (three != four).any()


def test_results_carry_command_seed_and_prompt(media):
    for name, frames in (("a.png", "1"), ("a.gif", "5"), ("a.mp4", "5")):
        assert sample_py("--prompt", "<|im_end|> é", "--seed", "7", "--frames", frames, "--out", name) == 0
    png, gif = Image.open("a.png").text, json.loads(Image.open("a.gif").info["comment"])
    for name, facts in (("png", png), ("gif", gif), ("mp4", json.loads(film("a.mp4")[2]["comment"]))):
        assert (str(facts["seed"]), facts["prompt"]) == ("7", "<|im_end|> é")
        assert facts["command"].startswith("python sample.py") and f"--out a.{name}" in facts["command"]


def test_nothing_is_overwritten_unless_asked_nor_by_a_result_that_fails(media, capsys):
    def full_disk(image, path, *_, **__):
        Path(path).write_text("half of it")
        raise OSError(28, "No space left on device")

    Path("x_0.png").write_text("mine")
    with patch.object(Image.Image, "save", full_disk), pytest.raises(SystemExit):
        sample_py("--prompt", "x", "--overwrite")
    assert "No space left" in capsys.readouterr().err
    with patch.object(Vino, "load", side_effect=AssertionError("loaded")):  # refused before the costly work
        assert "x_0.png exists; --overwrite" in refusal(capsys, "--prompt", "x")
    assert Path("x_0.png").read_text() == "mine" and not list(Path().glob("*.partial"))
    assert sample_py("--prompt", "x", "--overwrite") == 0 and Image.open("x_0.png").size == (64, 64)


def test_explain_is_the_sequence_that_the_model_sees(media, capsys, monkeypatch):
    call = ["--prompt", "<|vision_start|>", "--image", "square.png", "wide.png", "--video", "clip.mp4"]
    Path("plain.json").write_text('{"boundary_tokens": false}')
    with patch.object(Vino, "load", side_effect=AssertionError("loaded")):
        assert sample_py(*call, "--explain", "--config", "plain.json") == 0
        assert "start token" not in capsys.readouterr().out
        assert sample_py(*call, "--explain") == 0
    rows = [re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()[1:]]
    packed, read, pack, build = [], [], vino.pack, vino.build_prompt
    monkeypatch.setattr(vino, "pack", lambda *a: packed.append(pack(*a)) or packed[-1])
    monkeypatch.setattr(vino, "build_prompt", lambda *a: read.append(build(*a)) or read[-1])
    assert sample_py(*call, "--out", "a.mp4") == 0

    positions, prompt, begin = packed[0][1], read[0], 0
    for _, count, time, _ in rows[:-3]:
        times = positions[begin : begin + int(count), 0]  # the model's own, for the tokens of this row
        assert time == f"{times.min()}-{times.max()}"
        begin += int(count)
    assert begin == len(positions) and int(rows[-1][1]) == begin + len(prompt.ids) + 32
    places = {source: place for source, _, _, place in rows}
    for name, start, end in zip(("Image 1", "Image 2", "Video 1"), prompt.starts, prompt.ends, strict=True):
        ours = [places[f"{name}, {piece}"] for piece in ("start token", "latents", "end token")]
        assert ours == [str(start), f"{start + 1}-{end - 1}", str(end)]


def test_the_vlm_expands_a_prompt_if_told_or_if_the_config_says_so_of_text_alone(media, capsys, monkeypatch):
    monkeypatch.setattr(vino.MultiModalEncoder, "rewrite", lambda self, prompts: [f"{prompts[0]}, at dawn"])
    assert sample_py("--prompt", "a dot", "--rewrite") == 0
    assert "rewritten: a dot, at dawn\n" in capsys.readouterr().err
    assert Image.open("a-dot_0.png").text["prompt"] == "a dot, at dawn"
    shipped = ["--prompt", "a red circle", "--explain"]
    for more, expands in ([], True), (["--no-rewrite"], False), (["--image", "square.png"], False):
        assert command_line.main([*shipped, *more]) == 0
        assert ("at dawn" in capsys.readouterr().err) == expands


def test_pictures_and_clips_are_read_upright_and_over_white(media):
    photo, exif = Image.new("RGB", (32, 16), "red"), Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    photo.save("turned.jpg", exif=exif)
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save("clear.png")
    assert command_line.read_image("turned.jpg").size == (16, 32)
    assert command_line.read_image("clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((16, 16), 100 * 257, np.uint16)).save("deep.png")  # 16 bits, gray
    assert command_line.read_image("deep.png").getpixel((0, 0)) == (100, 100, 100)
    clip = command_line.Clip("clip.mp4")
    with av.open("clip.mp4") as file:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode()])
    assert clip.shape == frames.shape == (13, 40, 80, 3)
    for index in (slice(5), torch.tensor([0, 7, 7, 12])):
        assert (clip[index] == frames[index]).all()
    turned = bytearray(Path("clip.mp4").read_bytes())
    matrix = turned.find(b"tkhd") + 44  # nine 32-bit numbers: a quarter turn to the right
    turned[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 40 << 16, 0, 1 << 30)
    Path("turned.mp4").write_bytes(turned)
    assert (command_line.Clip("turned.mp4")[:1][0] == np.rot90(frames[0], -1)).all()


BAD = {
    "": "give either --prompt",
    "--tasks ''": "--tasks needs --out",
    "--prompt ''": "prompt is empty",
    "--prompt x --height 0 --width 64": "invalid int (16 to 1000000) value: '0'",
    "--prompt x --height wide --width 64": "value: 'wide'",
    "--prompt x --height 64": "go together",
    "--prompt x --height 960000 --width 960000": "GiB",
    "--prompt x --frames 1001": "the config allows 33",
    "--prompt x --cfg-text nan": "invalid float (0 to 1000) value: 'nan'",
    "--prompt x --base --image wide.png": "--base needs two images",
    "--prompt x --image wide.png wide.png wide.png wide.png wide.png": "allows 4",
    "--prompt x --image missing.png": "missing.png does not exist",
    "--prompt x --image empty": "empty is not an image",
    "--prompt x --image text": "text is not an image",
    "--prompt x --image cut.png": "cut.png is not an image, or is cut short",
    "--prompt x --video text": "text is not a video",
    "--prompt x --video cut.mp4": "cut.mp4 is not a video, or is cut short",
    "--prompt x --video wide.png": "1 frame(s), and the VAE needs at least 5",
    "--prompt x --video clip.mp4 --frames 1": "--frames 1 is an image",
    "--prompt x --video clip.mp4 --height 16 --width 16": "is too narrow",
    "--prompt x --out a.jpg": "text to image goes to a .png, or a folder that exists",
    "--prompt x --out a.png --frames 9": "text to video goes to a .mp4 or .gif, or a folder that exists",
    "--prompt x --out none/a.png": "cannot write none/a.png: No such file or directory",
    "--prompt x --config text": "text is not JSON, or is cut short (Expecting value: line 1 ",
    "--prompt x --config unknown.json": "no field 'text.size'",
    "--prompt x --weights missing": "missing does not exist",
    "--prompt x --weights hub": "cannot download Qwen/Qwen3-VL-4B-Instruct: no network",
    "--prompt x --weights tiny.safetensors --config other.json": "does not fit",
    "--prompt x --device moon": "--device moon: not here",
    "--prompt x --device meta": "--device meta: not here",
    "--prompt x --offload": "--offload needs a GPU",
    "--benchmark imgedit": "argument --benchmark: invalid choice: 'imgedit'",
    "--benchmark --prompt x": "give either --prompt",
    "--benchmark gedit --image wide.png": "--benchmark has its own references",
    "--benchmark --out text": "File exists: 'text'",
    "--benchmark --samples 0": "invalid int (1 to 100000) value: '0'",
}


@pytest.mark.parametrize(("arguments", "message"), BAD.items())
def test_bad_input_is_one_clear_line_and_leaves_files_alone(media, capsys, monkeypatch, arguments, message):
    def offline(*_, **__):
        raise vino.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(vino, "snapshot_download", offline)
    files = {"empty": b"", "text": b"hello " * 200, "cut.png": Path("wide.png").read_bytes()[:-300]}
    files |= {"cut.mp4": Path("clip.mp4").read_bytes()[:600], "other.json": b'{"num_queries": 8}'}
    files["unknown.json"] = b'{"text": {"size": 1}}'
    for name, content in files.items():
        Path(name).write_bytes(content)
    if "tiny.safetensors" in arguments:
        Vino.load("random", Config.from_file(HERE / "tiny_config.json")).save("tiny.safetensors")
    assert message in refusal(capsys, *(word.strip("'") for word in arguments.split()))


ITEM = '[{"index": "a", "task": "ti2i", "caption": "x", "ref_image_paths": ["wide.png"], %s}]'
BAD_TASKS = {
    '[\n{"index": 1,}]': "line 2 ",
    "{}": "should be a list",
    "[1]": "item 1: should be an object",
    '[{"index": "a", "task": "t2i"}]': "item 1: the prompt is empty",
    ITEM % '"task": "i2i"': "unknown task 'i2i'",
    ITEM % '"task": "t2i"': "does not go with these references",
    ITEM % '"caption": 3': "'caption' is 3, should be a str",
    ITEM % '"index": "../a"': "a file's name",
    '[{"task": "t2i", "caption": "x"}]': "'index' should be a file's name, and is ''",
    ITEM % '"ref_image_paths": "b.png"': "'ref_image_paths' is \"b.png\", should be a list",
    ITEM % '"ref_image_paths": [5]': "'ref_image_paths' should be a list of strings",
}


@pytest.mark.parametrize(("text", "message"), BAD_TASKS.items())
def test_a_malformed_task_file_is_refused_with_its_line_or_item(media, capsys, text, message):
    Path("a.json").write_text(text)
    assert message in refusal(capsys, "--tasks", "a.json", "--out", "results")
    assert not Path("results").exists()


def test_a_profile_counts_the_calls_of_each_phase_and_leaves_the_picture_alone(media, capsys):
    call = ["--prompt", "x", "--image", "wide.png", "--cfg-image", "2"]
    sample_py(*call, "--out", "a.png")
    sample_py(*call, "--out", "b.png", "--profile")
    rows = dict(re.findall(r"^(\w[\w ,-]+?) {2,}(\d+) ", capsys.readouterr().out, re.MULTILINE))
    assert rows == {
        "load": "1", "VAE, references": "1", "VLM, references": "1", "VLM, prompts and queries": "3",
        "MMDiT, first step, forward 1": "1", "MMDiT, other steps, forward 1": "1", "VAE, result": "1",
        "write": "1",
    }  # fmt: skip
    assert (np.array(Image.open("a.png")) == np.array(Image.open("b.png"))).all()


def test_the_shipped_weights_hold_the_tiny_config():
    saved, ours = vino.read_metadata(train.TINY, None)[0], Config.from_file(HERE / "tiny_config.json")
    ours.vae.scaling_factor = saved.vae.scaling_factor  # is measured in training
    assert saved == ours


def test_a_config_file_changes_what_it_names_and_nothing_else(tmp_path):
    path, saved = tmp_path / "some.json", vino.read_metadata(train.TINY, None)[0]
    path.write_text('{"sampling": {"steps": 2}, "training": {"3": {"mixture": {"t2v": 1.0}}}}')
    config = vino.read_config(path, train.TINY)
    assert config.sampling == replace(saved.sampling, steps=2) and config.text == saved.text
    assert config.training["3"] == saved.training["3"] | {"mixture": {"t2v": 1.0}}
    assert config.training["2"] == saved.training["2"]
    assert vino.read_config(path, "random") == Config.from_dict(json.loads(path.read_text()))


def test_a_reference_that_the_prompt_names_and_nobody_gave_gets_a_line(media, capsys):
    sample_py("--prompt", "Make the circle in Image 1 as in Image 2.", "--image", "wide.png", "--explain")
    assert "the prompt names Image 2, which is not given" in capsys.readouterr().err


def test_compiled_blocks_are_one_graph_for_all_lengths_and_give_the_same_picture(media, monkeypatch):
    calls, graphs = [["--prompt", "x"], ["--prompt", "much more", "--height=32", "--width=48"]], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile = functools.partial(torch.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic, options: compile(forward, dynamic=dynamic))
    for k, call in enumerate(calls):
        assert sample_py(*call, "--out", f"eager{k}.png") == 0
    for k, call in enumerate(calls):
        assert sample_py(*call, "--out", f"compiled{k}.png", "--compile") == 0
        a, b = (np.array(Image.open(f"{how}{k}.png"), int) for how in ("eager", "compiled"))
        assert abs(a - b).max() <= 1
    assert len(graphs) == 2  # one of each kind of block


def test_compiling_is_for_work_that_takes_longer_than_it():
    def pays(config, *arguments):
        args = command_line.build_parser().parse_args(["--prompt", "x", *arguments])
        return command_line.pays_to_compile([command_line.single_job(args)], config)

    assert not pays(Config()) and pays(Config(), "--num=20") and pays(Config(), "--frames=85")
    assert not pays(Config(), "--frames=85", "--steps=2")
    assert not pays(Config.from_file(HERE / "tiny_config.json"), "--frames=9")


def test_memory_that_runs_out_is_one_line_and_other_errors_stay_errors(media, capsys, monkeypatch):
    full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"))
    monkeypatch.setattr(Vino, "generate", full)
    with pytest.raises(SystemExit):
        sample_py("--prompt", "x")
    assert "\nsample.py: error: too large for the memory of cpu: 1 frame(s) of" in capsys.readouterr().err
    Path("a.json").write_text(json.dumps([{"index": n, "task": "t2i", "caption": "x"} for n in "ab"]))
    assert sample_py("--tasks", "a.json", "--out", "results") == 1
    assert "2 of 2 failed" in capsys.readouterr().err
    with monkeypatch.context() as torchrun:  # another process would wait for this one
        torchrun.setenv("WORLD_SIZE", "2")
        torchrun.setenv("RANK", "1")
        torchrun.setattr(torch.distributed, "init_process_group", lambda backend: None)
        with pytest.raises(SystemExit):
            sample_py("--tasks", "a.json", "--out", "results")
    assert "error: too large for the memory" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(Vino, "generate", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        sample_py("--prompt", "x")
    capsys.readouterr()
    monkeypatch.setattr(Vino, "load", full)
    assert "too large for the memory of cpu: the weights" in refusal(capsys, "--prompt", "x", "--rewrite")


# --- The benchmarks ---------------------------------------------------------------------------------------


def scene_of(*objects, ground="gray"):
    return train.Scene(ground, [train.Object(*words, (0, 0)) for words in objects])


@pytest.fixture
def world(tiny):
    return toy(tiny.config)


def blurred(pixels):
    """A little blur, and noise of 29 dB, on [B, 3, T, H, W]."""
    spread = sum(pixels.roll(steps, dims) for steps in (1, -1) for dims in (3, 4))
    return 0.7 * pixels + 0.075 * spread + 0.07 * torch.randn(pixels.shape, generator=torch.manual_seed(0))


def test_the_benchmarks_see_each_scene_of_the_toy_world_through_blur_and_noise(world):
    right = []
    for task, count, times in (("t2i", 150, [0]), ("t2v", 20, [0, 0.5, 1])):
        samples = [world.draw(task, 0, index) for index in range(count)]
        pixels = blurred(world.collate(task, samples, "cpu").target)
        for (*_, told), clip in zip(samples, pixels):
            frames = clip[:, [round(time * (clip.shape[1] - 1)) for time in times]]
            seen = command_line.detect(frames.transpose(0, 1))
            right += [command_line.fits(a, told, time) for a, time in zip(seen, times, strict=True)]
    assert len(right) == 210 and sum(right) >= 208


def test_the_benchmarks_reject_each_thing_that_is_not_as_told(world):
    one = ("cross", "red", "small", "left", "growing")
    two = ("circle", "cyan", "large", "right", "standing still")
    told = scene_of(one, two)
    others = [scene_of(one), scene_of(one, two, ground="white")]
    others.append(scene_of(one, two, ("square", "blue", "small", "top", "standing still")))
    changes = {0: "square", 1: "green", 2: "small", 3: "top right"}
    others += [scene_of(one, (*two[:field], word, *two[field + 1 :])) for field, word in changes.items()]
    seen = command_line.detect(world.render([told, *others], 1, "cpu")[:, :, 0])
    assert [command_line.fits(frame, told) for frame in seen] == [True] + [False] * len(others)

    swapped, still = scene_of((*two[:2], *one[2:]), (*one[:2], *two[2:])), scene_of((*one[:4], two[4]), two)
    sample = train.Sample("", "", "", [], told, told)
    clips = [*world.render([told, swapped, still, scene_of(one)], 9, "cpu")]
    casts = [command_line.score_cast("2", sample, clip, clips[0], None) for clip in clips]
    names = ("identities kept", "motion class", "identities right", "identities swapped")
    assert [tuple(cast["2", name] for name in names) for cast in casts] == [
        (True, True, True, False), (True, False, False, True),
        (True, False, True, False), (False, False, False, False),
    ]  # fmt: skip
    assert [cast["2", "first frame, dB"] > 59 for cast in casts] == [True, False, True, False]
    edits = [command_line.score_edit("x", sample, clip, clips[0], clips[3]) for clip in clips]
    assert [values["x", "success"] for values in edits] == [True, False, False, False]
    flicker = torch.tensor([0.08, -0.08] * 4 + [0.08])[:, None, None]
    clips += [clips[0][:, [0, 1, 2, 3, 7, 4, 5, 6, 8]], clips[0] + flicker]
    rows = [command_line.score_clip("clips", sample, clip, None, None) for clip in clips]
    names = ("subject consistency", "motion smoothness", "dynamic degree", "motion class")
    assert [tuple(row[name, "right"] for name in names) for row in rows] == [
        (True, True, True, True), (True, True, True, False), (True, True, False, False),
        (True, True, True, False), (True, False, True, True), (True, True, True, True),
    ]  # fmt: skip
    assert [round(row["temporal flickering", "gray levels"]) for row in rows] == [0] * 5 + [20]
    white = world.render([told._replace(background="white")], 9, "cpu")[0]
    pieces = [white, torch.cat([clips[0][:, :4], white[:, 4:]], 1)]  # which one it is, the row does not ask
    rows = [command_line.score_clip("clips", sample, clip, None, None) for clip in pieces]
    assert [row["background consistency", "right"] for row in rows] == [True, False]

    sample = sample._replace(target=scene_of(one))
    for text, wrong in {
        "A video on a gray background. A small red cross starts at the left and is growing.": "",
        "A small red cross grows at the left": "background",
        "On a gray background, a large red cross moves left from the top left.": "size motion cell",
        "A small red or blue circle is growing left, on a white background": "colour shape background",
    }.items():
        values = command_line.score_answer("clips", sample, text, None, None)
        assert len(values) == 6
        assert {name for (name, _), right in values.items() if not right} == {*wrong.split()}, text
    told = [
        command_line.score_told("x", sample, train.describe(sample, n > 1), clips[0][:, :n], None)
        for n in (9, 1)
    ]
    assert told == [{("x", "right"): True}] * 2
    assert command_line.score_told("x", sample, train.describe(sample, False), clips[0], None) == {
        ("x", "right"): False
    }


def test_perfect_outputs_are_all_right_in_every_benchmark(world):
    ideal = {"answer": lambda batch: batch.answers}
    ideal |= dict.fromkeys(["generate", "autoencode"], lambda batch: batch.target)
    results, _ = command_line.measure(command_line.SUITES, 4, world, "cpu", ideal)
    assert [len(values) for values in results.values()] == [18, 6, 13, 12, 18, 6, 9, 4]
    for (row, column), values in itertools.chain(*[suite.items() for suite in results.values()]):
        best = {"identities swapped": False, "gray levels": 0}
        best |= dict.fromkeys(["rest, dB", "first frame, dB", "PSNR, dB"], 60)
        best = best.get(column, True)
        assert len(values) >= 2 and set(values) == {best}, (row, column)


def test_words_outside_the_toy_world_are_named():
    strange, (_, tokenizer) = command_line.strange_words, vino.read_metadata(train.TINY, None)
    assert strange("A Corgi rides left, on a red Square in Image 1.", tokenizer) == ["Corgi", "rides"]
    assert strange("a large red circle moving right on a white background", tokenizer) == []
    assert strange("A corgi", byte_tokenizer()) == []  # random weights, or a real VLM


def test_the_shipped_weights_are_small_and_their_vae_and_vlm_know_the_toy_world(world, media, capsys):
    path = HERE / "assets" / "tiny.safetensors"
    assert path.stat().st_size <= 16 * 2**20
    call = ["--benchmark", "autoencoder", "understanding", "--samples", "10", "--weights", str(path)]
    assert sample_py(*call) == 0
    rows = dict(re.findall(r"^\| (\w+) \| \d+ \| ([\d.]+)", capsys.readouterr().out, re.MULTILINE))
    assert float(rows["images"]) > 35 and float(rows["clips"]) > 32 and float(rows["mean"]) > 95
    call = ["--prompt", "a red corgi", "--weights", str(path), "--steps", "1", "--out", "a.png"]
    assert sample_py(*call) == 0
    assert "'corgi' means nothing to this model: these weights know" in capsys.readouterr().err


def test_a_benchmark_writes_its_table_with_intervals_and_its_picture(media, capsys, monkeypatch):
    curt = functools.partialmethod(vino.MultiModalEncoder.answer, max_new_tokens=4)
    monkeypatch.setattr(vino.MultiModalEncoder, "answer", curt)
    call = ["--benchmark", "geneval", "understanding", "--samples", "2", "--steps", "1"]
    assert sample_py(*call) == 0
    text = Path("benchmark/benchmark.md").read_text()
    assert text in capsys.readouterr().out and "--benchmark geneval" in text
    assert re.search(r"\| overall \| 12 \| [\d.]+% \([\d.]+% to [\d.]+%\) \|", text)
    assert "| geneval | samples | right | long prompts | short prompts |" in text
    assert Image.open("benchmark/benchmark.png").height >= (6 + 2) * 2 * 64
    assert "benchmark.md exists; --overwrite" in refusal(capsys, *call)
    told, generate = [], Vino.generate
    monkeypatch.setattr(vino.MultiModalEncoder, "rewrite", lambda self, prompts: ["long"] * len(prompts))
    monkeypatch.setattr(Vino, "generate", lambda *a, **b: told.extend(a[1]) or generate(*a, **b))
    edits = "--benchmark vbench gedit vbench --samples 1 --steps 1 --rewrite --overwrite"  # a suite twice
    assert sample_py(*edits.split()) == 0 and told[0] == "long" and "long" not in told[1:]
    assert command_line.interval([True] * 9 + [False]) == "90.0% (59.6% to 98.2%)"  # Wilson's, by hand
    assert [command_line.interval(dB) for dB in ([30.0], [30.0, 32.0])] == ["30.00", "31.00 ± 1.39"]


# ----------------------------------------------------------------------------------------------------------
# train.py: 2.3, 3.1, table 1 and appendix B, and what a run must survive
# ----------------------------------------------------------------------------------------------------------

SMALL = {  # tiny_config.json, smaller
    "text": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 16, "mrope_section": [3, 3, 2]},
    "vision": {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
               "deepstack_visual_indexes": [0, 1]},
    "mmdit": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1,
              "num_refiner_layers": 1, "patch_size": 2, "text_embed_dim": 32, "rope_axes_dim": [4, 6, 6]},
    "vae": {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1},
    "sampling": {"frames": 5}, "num_queries": 4,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick_runs_and_old_handlers():
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    train.VALIDATION = train.PICTURE_STEPS = 1  # pictures take long
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file of a very small model, with 32 x 32 frames, few tasks, batches of 2, a fast average."""
    tiny = json.loads((HERE / "tiny_config.json").read_text())
    for section, values in SMALL.items():
        tiny[section] = tiny[section] | values if isinstance(values, dict) else values
    stage = {"area": 1024, "batch": 2, "lr": 1e-3, "steps": 6, "warmup": 0, "cooldown": 0}
    # Validation visits every task of a mixture: a few will do.
    look, make = (dict.fromkeys(tasks.split(), 1) for tasks in ("look watch rewrite", "t2i ti2i ti2v tiv2v"))
    tiny["training"] = dict.fromkeys(STAGES, stage) | {"0-vlm": stage | {"mixture": look}}
    tiny["training"] |= {"2": stage | {"ema": 0.9}, "3": stage | {"ema": 0.9, "mixture": make}}
    path = tmp_path_factory.mktemp("config") / "small.json"
    path.write_text(json.dumps(tiny))
    return path


def flags(config, out, *more, stage="3"):
    return [f"--stage={stage}", f"--config={config}", f"--out={out}", "--weights=random", *more]


def start(config, out, *more, stage="3"):
    out.mkdir(exist_ok=True)
    return Trainer(parse_arguments(flags(config, out, *more, stage=stage)))


def run(config, out, *more):
    trainer = start(config, out, *more)
    return trainer, trainer.train()


def toy(config):
    return train.ToyWorld(train.make_stage("3", config, {}), config, 0)


def equal(a, b):
    """Nested dictionaries of tensors, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b)


@pytest.fixture(scope="module")
def six_steps(config, tmp_path_factory):
    """One process, six steps of stage 3 in one go."""
    out = tmp_path_factory.mktemp("six")
    return run(config, out, "--save-every=3")[0], out


def is_share(count, share, draws=4000):
    """Within four standard deviations."""
    return abs(count / draws - share) < 4 * math.sqrt(share * (1 - share) / draws)


# --- Table 1 and the mixture ------------------------------------------------------------------------------


def test_stages_are_the_columns_of_table_1():
    names = ("lr", "betas", "steps", "ema", "area", "shift", "weight_decay", "clip")
    assert [tuple(getattr(stage, name) for name in names) for stage in [STAGES[n] for n in "123"]] == [
        (1e-4, [0.9, 0.99], 20_000, 0, 320**2, 3, 0.01, 1),
        (4e-5, [0.9, 0.95], 4_000, 0.9999, 640**2, 5, 0.01, 1),
        (2e-5, [0.9, 0.95], 16_000, 0.9999, 640**2, 5, 0.01, 1),
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_changes_what_table_1_trains_and_nothing_else(stage, config, tmp_path):
    trainer = start(config, tmp_path, stage=stage)
    rule, (group,) = trainer.stage, trainer.optimizer.param_groups
    assert ([*group["betas"]], group["weight_decay"]) == (rule.betas, rule.weight_decay)
    before = {name: tensor.clone() for name, tensor in trainer.vino.state_dict().items()}
    for _ in range(4):  # with and without references
        trainer.one_step(tqdm(disable=True))
    after = trainer.vino.state_dict()
    align = ("mm_encoder.connector", "mm_encoder.metaquery")
    trained = {"0-vae": "vae.", "0-vlm": "mm_encoder.mm_encoder.", "0-mmdit": "transformer.", "1": align}
    for name, tensor in before.items():
        frozen = not name.startswith(trained.get(stage, (*align, "transformer.")))
        frozen |= "transformer.time_text_embed.text_embedder" in name
        assert torch.equal(tensor, after[name]) == frozen, name


def test_stage_0_makes_latents_of_unit_spread_and_throws_its_text_encoder_away(config, tmp_path):
    out = tmp_path / "stage0"
    train.main(["--stage=0", f"--config={config}", f"--out={out}/", "--steps=2"])
    paths = [tmp_path / f"stage0-{part}" / "final.safetensors" for part in ("vae", "vlm", "mmdit")]
    first, last = Vino.load(paths[0]), Vino.load(paths[2])
    assert not any("native" in name for name in last.saved_tensors())
    assert all(torch.equal(a, b) for a, b in zip(first.vae.parameters(), last.vae.parameters()))
    trainer = start(config, tmp_path / "stage1", "--weights", str(paths[2]), stage="1")
    latents, world = [], toy(trainer.vino.config)
    for task in ("t2i", "t2v"):
        batch = world.collate(task, [world.draw(task, 0, index) for index in range(32)], "cpu")
        latents.append(trainer.vino.vae.encode(batch.target).flatten())
    assert 0.8 < torch.cat(latents).std() < 1.25


def test_the_answers_loss_is_next_token_cross_entropy_whatever_the_padding(config, tmp_path):
    objective = start(config, tmp_path, stage="0-vlm").objective
    world = toy(objective.vino.config)
    samples = [world.draw("look", 0, index) for index in range(3)]
    with torch.no_grad():
        together = objective(world.collate("look", samples, "cpu"))
        alone = [objective(world.collate("look", [sample], "cpu")) for sample in samples]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-4)
    vlm, batch = objective.vino.mm_encoder, world.collate("look", samples[:1], "cpu")
    references = [objective.vino.encode(reference) for reference in batch.references]
    prompt = build_prompt(vlm.tokenizer, batch.prompts[0], references, vlm.merge)
    answer = [*vlm.tokenizer.encode(batch.answers[0]).ids, vlm.tokenizer.token_to_id("<|im_end|>")]
    answered = replace(prompt, ids=prompt.ids + answer)
    states = vlm.prefill([answered], references, DynamicCache())[0][0]
    states = states[len(prompt.ids) - 1 : -1]
    expected = torch.nn.functional.cross_entropy(vlm.mm_encoder.lm_head(states), torch.tensor(answer))
    assert torch.allclose(together[0], expected, rtol=1e-4)


@pytest.mark.parametrize("switch", ["--data=x.jsonl", "--shard=zero2"])
def test_stage_0_refuses_what_it_cannot_do(switch, tmp_path, train_refuses):
    assert f"stage 0 takes no {switch.split('=')[0]}" in train_refuses(tmp_path, switch, stage="0-vlm")


def test_the_learning_rate_rises_stays_and_falls(config, tmp_path):
    trainer = start(config, tmp_path)
    trainer.stage = replace(trainer.stage, lr=1.0, steps=10, warmup=2, cooldown=4)
    rates = []
    for trainer.step in range(1, 11):
        rates.append(trainer.learning_rate())
    assert rates == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_the_command_line_wins_over_the_config_and_the_config_over_table_1(config):
    args = parse_arguments(["--stage=2", "--shift=2.5", "--betas", "0.8", "0.9"])
    stage = train.make_stage("2", Config.from_file(config), vars(args))
    assert (stage.shift, stage.betas, stage.area, stage.weight_decay) == (2.5, [0.8, 0.9], 1024, 0.01)
    for wrong, named in [({"1": {"rate": 1}}, "training.1.rate"), ({"4": {}}, "training.4"),
                         ({"1": {"steps": "many"}}, "training.1.steps"),
                         ({"1": {"batch": 0}}, "'batch' should be at least 1"),
                         ({"1": {"trainable": ["MMDiT", "VLM"]}}, "VAE and VLM are frozen"),
                         ({"1": {"trainable": [["MMDiT"]]}}, "unknown module"),
                         ({"1": {"betas": ["0.9", "0.99"]}}, "'betas' should be two numbers"),
                         ({"1": {"drop": 2.0}}, "'drop' should be at least 0 and at most 1"),
                         ({"1": {"warmup": -1}}, "'warmup' should be at least 0")]:  # fmt: skip
        with pytest.raises(InputError, match=named):
            train.make_stage("1", Config.from_dict({"training": wrong}), {})


def test_tasks_are_drawn_in_the_shares_of_the_mixture():
    for number, mixture in train.MIXTURES.items():
        assert math.isclose(sum(mixture.values()), 1)
        tasks, shares = list(mixture), mixture.values()
        drawn = Counter(train.chance(0, step, "task").choices(tasks, shares)[0] for step in range(4000))
        assert all(is_share(drawn[task], share) for task, share in mixture.items()), number


def test_each_modality_is_dropped_one_time_in_ten_and_on_its_own():
    seen = Counter()
    for step in range(4000):
        references = [train.Reference(None, None, None, is_video=video) for video in (False, False, True)]
        batch = train.Batch("tiv2v", ["long"], ["short"], references, None, keys=[(0, step, 0)])
        kept = train.drop_conditions(batch, 0, step, STAGES["2"])
        images = sum(not r.is_video for r in kept.references)
        assert images in (0, 2)  # all of them or none
        seen.update({kept.prompts[0]: 1, "no images": images == 0, "no video": len(kept.references) == images,
                     "neither": len(kept.references) == 0})  # fmt: skip
    for event, share in [("", 0.1), ("long", 0.45), ("short", 0.45), ("no images", 0.1), ("no video", 0.1),
                         ("neither", 0.01)]:  # fmt: skip
        assert is_share(seen[event], share), event


def test_times_are_uniform_then_shifted():
    keys = [(0, step, number) for step in range(1000) for number in range(4)]
    u, noise = train.draw_noise(keys, (2,))
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    t = shift_time(u, 3.0)  # t = 3u / (1 + 2u), so P(t < x) = x / (3 - 2x)
    for x in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert is_share((t < x).sum(), x / (3 - 2 * x))


def test_a_local_batch_of_one_always_fits():
    source = train.Source(STAGES["3"], Config(), 0)
    for images, video in itertools.product(range(9), (False, True)):
        frames = source.frames_that_fit(images, video)
        assert frames % 4 == 1 and frames <= 85
        assert ((frames - 1) // 4 + 1) * (1 + video) + images <= 30


# --- Going on, on any number of processes -----------------------------------------------------------------


def test_a_run_that_is_resumed_is_bit_equal_to_one_that_never_stopped(six_steps, config, tmp_path):
    whole, out = six_steps
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)  # as if it had been killed after step 5
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000006")
    (tmp_path / "final.safetensors").unlink()
    with open(tmp_path / "metrics.jsonl", "r+") as file:
        file.truncate(file.read().index('"step": 6') + 12)
    again, _ = run(config, tmp_path, "--resume")
    assert again.step == 6 and equal(whole.tensors(), again.tensors())
    assert equal(load_file(out / "final.safetensors"), load_file(tmp_path / "final.safetensors"))
    clock = {"seconds": 0, "peak_mib": 0}
    assert [r | clock for r in records(out)] == [r | clock for r in records(tmp_path)]


def test_two_processes_pass_stage_0s_parts_on_to_each_other(two):
    assert Vino.load(two / "runs/stage0-mmdit/final.safetensors")


def test_ddp_zero2_and_fsdp_on_two_processes_are_one_process(two, six_steps, config):
    alone = load_file(six_steps[1] / "final.safetensors")
    for how in SHARDS:
        for one, both in zip(records(six_steps[1]), records(two / how), strict=True):
            if "validation" in one:
                assert one["validation"] == pytest.approx(both["validation"], rel=1e-5)
                continue
            assert one["task"] == both["task"] and one["samples"] == both["samples"]
            assert both["loss"] == pytest.approx(one["loss"], rel=1e-5), how
            assert both["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4), how
        for name, tensor in load_file(two / how / "final.safetensors").items():
            assert torch.allclose(tensor, alone[name], atol=1e-4), (how, name)
        shutil.rmtree(two / how / "checkpoints" / "step_00000006")
        run(config, two / how, "--resume")  # two processes, then one
        one, both = records(six_steps[1])[-2], records(two / how)[-2]
        assert both["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_checkpointing_gives_the_same_gradients_and_computes_attention_once(config, monkeypatch):
    model = vino.Vino.load("random", Config.from_file(config)).transformer.requires_grad_(True)
    condition = vino.Condition(torch.randn(2, 9, model.config.text_embed_dim), None, [], [])
    latents, t = torch.randn(2, 16, 1, 4, 4), torch.rand(2)

    class Watch(TorchDispatchMode):
        attentions = products = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            self.attentions += "scaled_dot_product" in name and "backward" not in name
            self.products += "addmm" in name
            return function(*args, **(kwargs or {}))

    def gradients():
        model.zero_grad()
        with Watch() as watch:
            context = model.context([condition], latents.shape[2:])
            model(latents, t, context).square().sum().backward()
        return watch, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain, expected = gradients()
    for block in model.blocks():
        block.forward = MethodType(train.checkpointed, block)
    assert gradients()[0].products == plain.products  # of a short sequence all is kept
    monkeypatch.setattr(train, "SHORT", 0)
    kept, actual = gradients()
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert kept.attentions == plain.attentions and kept.products >= 1.5 * plain.products


def test_compiled_blocks_stay_compiled_although_short_and_long_have_graphs_of_their_own(config, monkeypatch):
    model = Vino.load("random", Config.from_file(config)).transformer.requires_grad_(True)
    compile = functools.partial(torch.compile, backend="eager", dynamic=True)
    monkeypatch.setattr(torch, "compile", lambda forward, **_: compile(forward))
    monkeypatch.setattr(train, "SHORT", 40)
    torch._dynamo.reset()
    # torch's limit is 8. With masks and without gradients there are more graphs, which take time to make.
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for block in (model.transformer_blocks[0], model.single_transformer_blocks[0]):
            block.forward = train.compiled(MethodType(train.checkpointed, block))
        for side in (4, 12):
            words, latents = torch.randn(2, 9, model.config.text_embed_dim), torch.randn(2, 16, 1, side, side)
            context = model.context([vino.Condition(words, None, [], [])], latents.shape[2:])
            assert model(latents, torch.rand(2), context).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_blocks_have_the_gradients_of_eager_ones_over_33_000_tokens():
    torch.manual_seed(0)
    model = MMDiT(Config.from_file(HERE / "tiny_config.json").mmdit).to("cuda")
    words, latents = torch.randn(1, 20, 64, device="cuda"), torch.randn(1, 16, 9, 60, 62, device="cuda")

    def gradients():
        context = model.context([vino.Condition(words, None, [], [])], latents.shape[2:])
        loss = model(latents, torch.tensor([0.6], device="cuda"), context).square().mean()
        return torch.autograd.grad(loss, model.parameters(), allow_unused=True)

    expected = gradients()
    for block in model.blocks():
        block.forward = train.compiled(MethodType(train.checkpointed, block))
    for actual, wanted in zip(gradients(), expected):
        assert wanted is None or (actual - wanted).norm() <= 1e-3 * wanted.norm() + 1e-9


def test_training_leaves_cudnn_to_long_sequences(monkeypatch):
    allowed = []

    def watch(q, k, v, mask):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    short, long = (torch.zeros(1, length, 1, 1) for length in (100, 10_000))
    for x in (short, long):
        vino.attend(x, x, x)
    with torch.no_grad():
        vino.attend(short, short, short)
    assert allowed == [False, True, True]


def test_the_vlm_leaves_cudnn_out_as_every_prompt_has_a_length_of_its_own(config):
    encoder, allowed = Vino.load("random", Config.from_file(config)).mm_encoder, []
    watch = lambda *_: allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
    encoder.mm_encoder.model.language_model.layers[0].register_forward_pre_hook(watch)
    with torch.no_grad():
        encoder.read(["a red circle"], [])
    assert allowed == [False, False]  # the prompt, then the queries


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_averages_in_the_hosts_memory_are_pinned_and_equal_those_on_the_gpu(config, tmp_path):
    averages = []
    for how in ([], ["--ema-on-host"]):
        trainer = start(config, tmp_path / str(len(how)), *how)
        for value in (1.0, 2.0, 4.0):
            for parameter in trainer.parameters.values():
                parameter.fill_(value)
            trainer.update_ema()
            trainer.finish_ema()
        averages.append({name: average.cpu() for name, average in trainer.ema.items()})
    assert equal(*averages) and all(average.is_pinned() for average in trainer.ema.values())


def test_averages_decay_as_the_stage_says_and_are_what_is_exported(config, tmp_path):
    trainer = start(config, tmp_path)
    before = {name: average.clone() for name, average in trainer.ema.items()}
    for parameter in trainer.parameters.values():
        parameter.data.fill_(2.0)
    trainer.update_ema()
    trainer.export()
    exported, decay = load_file(tmp_path / "final.safetensors"), trainer.stage.ema
    assert before and 0 < decay < 1
    for name, average in before.items():
        torch.testing.assert_close(exported[name], decay * average + (1 - decay) * 2.0)


@pytest.mark.parametrize("how, whole", [("zero2", True), ("fsdp", False)])
def test_zero2_keeps_weights_whole_from_forward_to_backward_and_fsdp_does_not(
    how, whole, config, tmp_path, monkeypatch
):
    port = f"{20_000 + os.getpid() % 12_000}"
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    trainer = start(config, tmp_path, f"--shard={how}")
    trainer.model(trainer.next_batch("t2i", 0))
    weights = [*trainer.vino.transformer.blocks()[0].parameters()]
    torch.distributed.destroy_process_group()
    assert [isinstance(weight, DTensor) for weight in weights] == [not whole] * len(weights)


def test_reconstruction_is_seen_by_the_vlm_only(config, tmp_path):
    trainer = start(config, tmp_path)
    for task, latents in (("reconstruction", 0), ("selection", 2)):
        world = toy(trainer.vino.config)
        batch = world.collate(task, [world.draw(task, 0, 0)], trainer.device)
        batch.references = batch.references[:2]
        assert len(trainer.objective.condition(batch).references) == latents


def test_a_stage_begins_with_the_export_of_the_one_before(tmp_path):
    assert train.default_weights("2", tmp_path / "stage2") == train.TINY
    export = tmp_path / "stage1" / "final.safetensors"
    export.parent.mkdir()
    export.touch()
    assert train.default_weights("2", tmp_path / "stage2") == export


def test_accumulation_is_a_larger_batch(six_steps, config, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHORT", 0)
    run(config, tmp_path, "--batch=1", "--accumulate=2", "--steps=2", "--checkpointing")
    for one, two in zip(records(six_steps[1]), records(tmp_path)[:2]):
        assert math.isclose(one["loss"], two["loss"], rel_tol=1e-5)


def test_validation_is_the_same_each_time_and_draws_a_picture(config, tmp_path):
    trainer = start(config, tmp_path)
    trainer.tasks = ["t2i", "tiv2v"]
    trainer.validate()
    trainer.validate()
    first, second = records(tmp_path)
    assert first == second and set(first["validation"]) == {"t2i", "tiv2v"}
    assert Image.open(tmp_path / "step_00000000.png").width > 32 * 9


# --- Manifests --------------------------------------------------------------------------------------------


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
def train_refuses(config, capsys):
    """A function that returns the one line with which main refuses a run."""

    def refuses(out, *more, stage="3", config=config):
        with pytest.raises(SystemExit) as stopped:
            train.main(flags(config, out, *more, stage=stage))
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and "Traceback" not in error
        assert error.strip().splitlines()[-1].startswith("train.py: ")
        return error.strip().splitlines()[-1]

    return refuses


def test_a_run_on_files_is_resumed_exactly_and_its_batches_hold_one_bucket(config, manifest, tmp_path):
    data = manifest({})
    whole, _ = run(config, tmp_path / "a", data, "--steps=4")
    run(config, tmp_path / "b", data, "--steps=2")
    again, _ = run(config, tmp_path / "b", data, "--steps=4", "--resume")
    assert equal(whole.tensors(), again.tensors())
    source, seen = whole.source, Counter()
    for first in range(0, 100, 2):
        pair = [source.draw("ti2i", first, index) for index in (first, first + 1)]
        assert pair[0].target.shape == pair[1].target.shape
        seen.update(one.prompts[0] for one in pair)
    assert len(seen) == 99 and max(seen.values()) <= 2  # one is held out; all others come up


def test_frames_have_the_stages_area_at_their_own_aspect_ratio(config, tmp_path):
    stage, rng = STAGES["2"], random.Random(0)
    for framed in [True, False] * 12:
        height, width = rng.randint(200, 900), rng.randint(200, 900)
        h, w = train.fit(np.zeros((1, height, width, 3), dtype=np.uint8), stage.area, framed).shape[2:]
        exact = math.sqrt(stage.area * height / width), math.sqrt(stage.area * width / height)
        assert h % 16 == w % 16 == 0 and abs(h - exact[0]) <= 16 and abs(w - exact[1]) <= 16
    frames = np.zeros((15, 64, 64, 3), dtype=np.uint8)
    imageio.imwrite(tmp_path / "clip.mp4", frames, plugin="pyav", codec="libx264")
    assert train.read_clip(tmp_path / "clip.mp4", 85).shape == (13, 64, 64, 3)
    assert train.read_clip(tmp_path / "clip.mp4", 9).shape == (9, 64, 64, 3)


@pytest.mark.parametrize("line, problem", [
    ("{", "not JSON"), ("[1]", "should be an object"), ('{"task": "", "prompt": ""}', "'target' is missing"),
    ({"task": "t2x"}, "unknown task 't2x'"), ({"size": 3}, "no field 'size'"), ({"images": [1]}, "of paths"),
    ({"images": "0.png"}, "field 'images' is str"), ({"images": []}, "takes 1 to 1 images, not 0"),
    ({"video": "0.mp4"}, "takes no video"),
])  # fmt: skip
def test_a_broken_line_of_a_manifest_is_named(line, problem, config, manifest, tmp_path, train_refuses):
    message = train_refuses(tmp_path / "run", manifest({7: line}))
    assert "data.jsonl, line 7: " in message and problem in message


def test_an_unreadable_sample_is_reported_once_and_skipped_and_more_than_1_percent_stop(
    config, manifest, tmp_path, capsys, train_refuses
):
    run(config, tmp_path / "a", manifest({3: {"target": "gone.png"}}), "--batch=40", "--steps=5")
    told = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(told) == 1 and "line 3" in told[0] and "gone.png" in told[0]
    (tmp_path / "empty.png").write_bytes(b"")
    broken = manifest({3: {"target": "gone.png"}, 4: {"images": ["empty.png"]}})
    message = train_refuses(tmp_path / "b", broken, "--batch=40")
    assert "2 of 100 samples cannot be read, more than 1%" in message


# --- Things that go wrong ---------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_changes_nothing_and_ten_in_a_row_stop_the_run(
    config, tmp_path, monkeypatch, train_refuses
):
    trainer = start(config, tmp_path, "--steps=20")
    loss = trainer.objective.forward
    broken = lambda *args: loss(*args) * (1 if trainer.step <= 2 else math.nan)  # noqa: E731
    monkeypatch.setattr(trainer.objective, "forward", broken)
    monkeypatch.setattr(train, "Trainer", lambda args: trainer)
    assert "not finite for the tenth time" in train_refuses(tmp_path)
    lines = records(tmp_path)
    assert [r["skipped"] for r in lines] == [False] * 2 + [True] * 10 and lines[-1]["loss"] is None
    short, _ = run(config, tmp_path / "short", "--steps=2")
    assert equal(trainer.tensors(), short.tensors())
    assert train.complete_checkpoints(tmp_path / "checkpoints")[-1].name == "step_00000012"


def test_kill_during_a_save_leaves_the_checkpoint_before(config, tmp_path):
    script = (f"import sys, os, signal; sys.path[:0] = [{str(HERE)!r}]; import train, torch\n"
              "save = train.dcp.save\n"
              "def dying(*args, **more):\n"
              "    save(*args, **more)\n"
              "    '00000004' in str(more['checkpoint_id']) and os.kill(os.getpid(), signal.SIGKILL)\n"
              "train.dcp.save = dying\n"
              f"train.main({flags(config, tmp_path, '--save-every=2')!r})")  # fmt: skip
    killed = subprocess.run([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000004.partial"]
    assert start(config, tmp_path, "--resume").step == 2


def test_a_full_disk_is_one_clear_error_and_older_checkpoints_stay(config, tmp_path, train_refuses):
    run(config, tmp_path, "--steps=2")
    limits = train.resource.getrlimit(train.resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        train.resource.setrlimit(train.resource.RLIMIT_FSIZE, (50_000, limits[1]))  # no file may be larger
        message = train_refuses(tmp_path, "--resume", "--steps=4", "--save-every=3")
    finally:
        train.resource.setrlimit(train.resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert "cannot write" in message and "MiB free" in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    assert start(config, tmp_path, "--resume").step == 2


def test_a_signal_saves_and_stops_and_only_the_newest_checkpoints_stay(config, tmp_path):
    trainer = start(config, tmp_path, "--save-every=1", "--keep=2")
    clip = trainer.clip_gradients
    trainer.clip_gradients = lambda: (trainer.step == 4 and os.kill(os.getpid(), signal.SIGTERM), clip())[1]
    assert trainer.train() == 128 + signal.SIGTERM and trainer.step == 4
    names = [path.name for path in train.complete_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step_00000003", "step_00000004"] and not (tmp_path / "final.safetensors").exists()


def test_loader_processes_get_no_signals_of_the_main_ones_group_and_end_with_it(config, manifest, tmp_path):
    trainer = start(config, tmp_path / "run", "--workers=1", "--batch=1")
    assert all([next(stream) for stream in trainer.streams.values()])  # now their processes are set up
    loaders = multiprocessing.active_children()
    assert loaders and all(os.getpgid(loader.pid) == loader.pid for loader in loaders)
    trainer.close()
    assert not multiprocessing.active_children()
    data = manifest({line: {"target": "gone.png"} for line in range(1, 101)})
    more = flags(config, tmp_path / "b", data, "--workers=1", "--batch=1")
    call = [sys.executable, HERE / "train.py", *more]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60)  # the error is a loader's
    assert done.returncode == 2 and "no sample of 'ti2i' can be read" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_one_clear_error(config, tmp_path, train_refuses):
    run(config, tmp_path, "--steps=1")
    for path in tmp_path.glob("checkpoints/step_00000001/*.distcp"):
        os.truncate(path, 1000)
    told = train_refuses(tmp_path, "--resume", "--steps=2")
    assert "cannot read" in told and "step_00000001" in told and "if it is damaged, remove it" in told


def test_clip_0_is_no_limit_of_the_gradient(config, tmp_path):
    none, huge = (run(config, tmp_path / clip, f"--clip={clip}", "--steps=1")[0] for clip in ("0", "1e9"))
    assert equal(none.tensors(), huge.tensors())


def test_a_manifest_keeps_line_separators_inside_its_strings(tmp_path):
    line = {"task": "t2i", "prompt": "one\u2028two", "target": "a.png"}
    (tmp_path / "data.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [entry.prompt for entry in train.read_manifest(tmp_path / "data.jsonl", 4)] == ["one\u2028two"]


def test_a_checkpoint_of_another_run_is_refused_by_the_name_of_the_field(
    config, tmp_path, train_refuses, capsys
):
    run(config, tmp_path, "--steps=1")
    assert "holds a run" in train_refuses(tmp_path)
    assert "field 'stage' does not fit: it is 2 here, and 3" in train_refuses(tmp_path, "--resume", stage="2")
    message = train_refuses(tmp_path, "--resume", "--no-queries")
    assert "field 'num_queries' does not fit: it is 0 here, and 4" in message
    other = json.loads(config.read_text())
    other["mmdit"]["num_layers"] = 2
    (tmp_path / "other.json").write_text(json.dumps(other))
    message = train_refuses(tmp_path, "--resume", config=tmp_path / "other.json")
    assert "'mmdit.num_layers' does not fit: it is 2 here, and 1 in" in message
    capsys.readouterr()
    start(config, tmp_path, "--resume", "--lr=0.5")
    assert "going on with lr 0.5; until here it was 0.001" in capsys.readouterr().err
    (tmp_path / "checkpoints" / "step_00000001" / "state.json").write_text('{"step": ')
    assert "state.json is not JSON, or is cut short" in train_refuses(tmp_path, "--resume")


@pytest.mark.parametrize("switch", ["--no-queries", "--no-boundary-tokens"])
def test_the_ablations_train_and_their_export_knows_what_is_missing(switch, config, tmp_path, photo):
    run(config, tmp_path, switch, "--steps=2")
    model = Vino.load(tmp_path / "final.safetensors")
    own, boundaries = model.config, model.mm_encoder(["x"], [model.encode(photo)]).boundaries
    assert (own.num_queries, own.boundary_tokens) == ((0, True) if switch == "--no-queries" else (4, False))
    assert len(boundaries) == own.boundary_tokens
    assert model.generate(["x"], [photo], size=(1, 48, 80), steps=1).isfinite().all()
    start(config, tmp_path, switch, "--resume")


def test_toy_samples_depend_on_their_number_only_and_a_steps_samples_have_one_layout(tiny):
    world = toy(tiny.config)
    for name, task in TASKS.items():
        samples = [world.draw(name, 40, index) for index in range(40, 56)]
        assert samples == [toy(tiny.config).draw(name, 40, index) for index in range(40, 56)]
        assert len({s.prompt + str(s.target) for s in samples}) > 8, name
        batch = world.collate(name, samples, "cpu")
        assert batch.target.shape == (16, 3, 9 if task.clip else 1, 64, 64)
        videos = [r.is_video for r in batch.references]
        assert videos == sorted(videos) and sum(videos) == task.video
        assert len(videos) - sum(videos) in task.images


def test_runs_are_compared_in_a_picture_and_a_table(six_steps, tmp_path):
    text = train.compare({"one": six_steps[1], "other": six_steps[1]}, tmp_path / "both.png")
    late = [r for r in records(six_steps[1]) if r.get("loss")][3:]
    losses, norms = [r["loss"] for r in late], [r["grad_norm"] for r in late]
    told = f"| all | {np.mean(losses):.4f} | {np.mean(norms):.3f} | {np.var(norms):.4f} |"
    assert f"| one {told}" in text and f"| other {told}" in text
    assert Image.open(tmp_path / "both.png").size == (900, 800)


def test_a_gallery_shows_inputs_target_and_every_models_output(six_steps, tmp_path, monkeypatch):
    blank = lambda self, prompts, *references, size, **_: torch.zeros(1, 3, *size)  # noqa: E731
    monkeypatch.setattr(vino.Vino, "generate", blank)
    export = six_steps[1] / "final.safetensors"
    train.gallery([(export, {}), (export, {"cfg_image": 2.0})], tmp_path / "gallery.png")
    with Image.open(tmp_path / "gallery.png") as picture:
        assert picture.height == len(six_steps[0].tasks) * (32 + 18)
        assert picture.width > 10 * 32  # images to video: an image, three frames of target and of each output


def test_short_captions_count_and_relate_truly():
    seen = Counter()
    for number in range(300):
        sample = train.Teller(f"captions {number}").caption(0, False)
        objects, short = sample.target.objects, sample.short_prompt
        seen[sample.kind] += 1
        if sample.kind == "counting":
            assert short.startswith({2: "two ", 3: "three "}[len(objects)])
            assert len({item[:3] for item in objects}) == 1
        if sample.kind == "position":
            (x, y, _), (u, v, _) = (train.trace(item, 0) for item in objects)
            assert (x < u and "left of" in short) or (x > u and "right of" in short) or (
                y < v and "above" in short) or (y > v and "below" in short)  # fmt: skip
    assert all(seen[kind] > 40 for kind in ("", "counting", "position"))


def test_what_is_seen_is_described_in_reading_order_and_what_is_expanded_in_the_texts():
    for number in range(40):
        teller = train.Teller(f"orders {number}")
        expanded, seen = teller.rewrite(0, True), teller.look(0, True)
        reading = sorted(seen.target.objects, key=lambda item: [*train.CELLS].index(item.cell))
        for told, objects in ((expanded, expanded.target.objects), (seen, reading)):
            words = re.findall(r"A (\w+) (\w+) (\w+) starts at", train.describe(told, clip=True))
            assert words == [(item.size, item.color, item.shape) for item in objects]
            names = [told.prompt.find(f"{item.color} {item.shape}") for item in objects]
            assert names == sorted(names)  # in the text too, where it names them


def test_every_word_of_the_toy_world_is_one_token_and_other_words_are_bytes():
    tokenizer, teller = train.toy_tokenizer(), train.Teller("other words")
    for task in TASKS.values():
        sample = getattr(teller, task.script)(max(task.images), task.clip)
        words = tokenizer.pre_tokenizer.pre_tokenize_str(sample.prompt)
        encoded = tokenizer.encode(sample.prompt)
        assert len(encoded.ids) == len(words) and tokenizer.decode(encoded.ids) == sample.prompt
    assert len(tokenizer.encode("corgi").ids) == 5
    assert tokenizer.get_vocab_size() <= Config.from_file(HERE / "tiny_config.json").text.vocab_size


def test_toy_objects_keep_apart_inside_the_frame_in_their_flat_colours(tiny):
    world = toy(tiny.config)
    allowed = torch.tensor([*train.COLORS.values(), *train.BACKGROUNDS.values()])
    for name, task in TASKS.items():
        samples = [world.draw(name, 0, index) for index in range(24)]
        times = (0, 0.5, 1) if task.clip else (0,)
        for item, time in itertools.product(samples, times):
            for x, y, r in [train.trace(thing, time) for thing in item.target.objects]:
                assert min(x, y, 64 - x, 64 - y) >= r - 1e-6, (name, item)
        pixels = (world.collate(name, samples, "cpu").target + 1) * 127.5
        pixels = pixels.permute(0, 2, 3, 4, 1).reshape(-1, 3)
        flat = (torch.cdist(pixels, allowed.float()).min(1).values < 0.6).float().mean()
        assert flat > 0.9, name  # what is left are edges


@pytest.mark.skipif("SLOW" not in os.environ, reason="SLOW=1 runs this: minutes on two cores")
@pytest.mark.parametrize("task", sorted({task for stage in "123" for task in train.MIXTURES[stage]}))
def test_over_fitting_one_batch_divides_its_loss_by_ten(task, tmp_path):
    more = ["--weights=random", "--batch=2", "--lr=2e-3", "--ema=0"]
    trainer = Trainer(parse_arguments(["--stage=3", f"--out={tmp_path}", *more]))
    batch = trainer.source.collate(task, [trainer.source.draw(task, 0, index) for index in range(2)], "cpu")
    losses = []
    for step in range(200):
        batch.keys = [(0, step % 4, number) for number in range(2)]
        loss = trainer.objective(batch).mean()
        loss.backward()
        trainer.clip_gradients()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        losses.append(loss.item())
    first, last = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
    print(f"\n{task}: loss {first:.3f} -> {last:.4f}, divided by {first / last:.0f}")
    assert last < first / 10
