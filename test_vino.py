"""Each test is a claim of the README or of the paper's method; its name is the claim.

`VINO_GOLDEN` (folders separated by ":") replaces assets/golden by other golden runs of that format.
"""

import functools
import gc
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import MethodType, SimpleNamespace
from unittest.mock import Mock, patch

# Before torch starts: idle threads that sleep leave a busy machine to those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import sample as command_line
import train
import vino
from toy.test_toy import SMALL
from toy.world import ToyWorld
from vino import VAE, Config, InputError, MMDiT, Reference, SequenceParallel, Vino, build_prompt

gc.freeze()  # imageio collects garbage whenever it closes a file
HERE = Path(__file__).parent
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


# ----------------------------------------------------------------------------------------------------------
# The public release's numbers
# ----------------------------------------------------------------------------------------------------------


@functools.cache
def golden_model(folder, dtype=torch.float32):
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
    tokens = sorted(golden["special_tokens"], key=golden["special_tokens"].get)
    names, stream = {"mmdit": "transformer", "vae": "vae", "vlm": "mm_encoder.mm_encoder"}, []
    for name, tensor in load_file(folder / "weights.safetensors").items():
        first, *rest = name.split(".")
        ours = ".".join([names.get(first, f"mm_encoder.{first}"), *rest])
        stream.append((ours, tensor))
    with torch.device("meta"):
        model = Vino(config, vino.byte_tokenizer(tokens))
    model.fill(stream, folder, "cpu", dtype)
    return model.eval()


CASES = [path.with_suffix(".json") for folder in GOLDEN for path in sorted(folder.glob("*.safetensors"))]
CASES = [path for path in CASES if path.exists()]


def golden_references(golden, call, vision):
    """The References of a golden call: images, and the video if there is one, in lists."""
    area = math.prod(call["letterbox_area_hw"])
    pictures = [golden[f"in.image_{k}"].numpy() for k in range(len(call.get("images", [])))]
    images = [Reference.image(Image.fromarray(picture), area, vision) for picture in pictures]
    videos = []
    if "in.video" in golden:
        film = golden["in.video"].numpy()
        first = film[: (min(call["out"][0], len(film)) - 1) // 4 * 4 + 1]
        seen = film[vino.spread_frames(len(film), vision.video_frames)]
        videos.append(Reference.video(first, seen, vision))
    return images, videos


def compare_resized(images, videos, golden, compare):
    """Letterboxed pixels and grids are equal, patches are near; skips where Pillow resizes differently."""
    for k, image in enumerate(images):
        letterboxed = ((image.pixels[0, :, 0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
        assert torch.equal(letterboxed, golden[f"letterboxed_{k}"])
    for references, name, grid in (
        (images, "pixel_values", "image_grid_thw"),
        (videos, "pixel_values_videos", "video_grid_thw"),
    ):
        if references:
            error = compare(f"cond.{name}", torch.cat([r.patches[0] for r in references]), most=5e-3)
            if error > 1e-4:
                pytest.skip("Pillow before 13 resizes some pixels differently")
            assert [list(r.grid) for r in references] == golden[f"cond.{grid}"].tolist()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@torch.no_grad()
def test_every_stage_equals_the_public_release(path):
    call, golden = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    model = golden_model(path.parent)
    vision, encoder = model.config.vision, model.mm_encoder

    def compare(name, ours, most=1e-4):
        step = next((int(key.rsplit("_", 1)[1]) for key in golden if key.startswith(f"{name}.rows_")), None)
        theirs = golden[name] if step is None else golden[f"{name}.rows_{step}"]
        rows = ours if step is None else ours[::step] if ours.dim() == 2 else ours[:, ::step]
        error = relative_error(rows, theirs)
        print(f"{name:24} {error:.1e}")  # shown by pytest -rP
        assert error < most, name
        return error

    images, videos = golden_references(golden, call, vision)
    compare_resized(images, videos, golden, compare)
    encoded = [model.encode(reference) for reference in images + videos]
    for k, reference in enumerate(encoded):
        compare(f"ref_latent_{k}", reference.latents)
    prompt = build_prompt(encoder.tokenizer, call["prompt"], encoded, encoder.merge)
    assert prompt.ids == golden["cond.input_ids"][0].tolist()
    assert prompt.starts == call["cond.pos_vs"][0]
    assert prompt.ends == call["cond.pos_ve"][0][: len(encoded)]

    hidden, mask, starts, ends = encoder.hidden_states([call["prompt"]], encoded)
    assert mask is None and golden["cond.attention_mask"].all()
    assert (starts.tolist(), ends.tolist()) == ([prompt.starts], [prompt.ends])
    compare("cond.penultimate", hidden)
    compare("cond.embeds_vlm", encoder.connector(hidden))
    compare("cond.embeds_vae", encoder.connector_vae_branch(hidden))
    negative = call["negative_prompt_video" if call["out"][0] > 1 else "negative_prompt"]
    guidance = {"cfg_text": call["cfg_text"], "cfg_image": call["cfg_image"]}
    texts, base = ([call["prompt"]], [negative]), call.get("base", False)
    branches = model.branches(*texts, encoded, base, **guidance)
    for k, block in enumerate(branches["full"][1].references):
        compare(f"boundary_{k}", torch.cat([block.start, block.end]))
    theirs = {"full": "cond", "text_dropped": "uncond_text", "image_dropped": "uncond_image"}
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
        h, w = vino.letterbox_size(*case["src_wh"], case["area"])
        assert [h, w] == case["letterbox_hw"]
        once = vino.vlm_size(h, w, *defaults.image_resize[0])
        assert list(vino.vlm_size(*once, *defaults.image_resize[1])) == case["vlm_hw"]
        assert list(vino.video_size(*case["src_wh"], case["area"])) == case["target_hw"]


@pytest.mark.parametrize("folder", [f for f in GOLDEN if (f / "timesteps.json").exists()], ids=str)
def test_sampling_times_equal_the_release(folder):
    for key, expected in json.loads((folder / "timesteps.json").read_text()).items():
        steps, shift = key.split("/")
        times = torch.stack(vino.time_steps(int(steps), float(shift)))
        torch.testing.assert_close(times, torch.tensor(expected))


def test_full_size_parameters_have_the_public_names_and_shapes():
    keys = json.loads((HERE / "assets/golden/full_keys.json").read_text())
    with torch.device("meta"):
        for model, expected in ((MMDiT(Config().mmdit), keys["mmdit"]), (VAE(Config().vae), keys["vae"])):
            assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected


# ----------------------------------------------------------------------------------------------------------
# 1. Multi-modal conditions (2.1)
# ----------------------------------------------------------------------------------------------------------


def test_the_prompt_is_figure_4_with_images_before_the_video(tiny, photo, clip):
    tokenizer = tiny.mm_encoder.tokenizer
    prompt = build_prompt(tokenizer, "Dance.", [photo, clip], 2)
    pads = {"image_pad": photo.grid[1] * photo.grid[2] // 4, "video_pad": clip.grid[1] * clip.grid[2] // 4}

    def visual(name):
        return f"<|vision_start|>{f'<|{name}|>' * pads[name]}<|vision_end|>"

    moments = "".join(f"<{second} seconds>" + visual("video_pad") for second in (0.0, 0.1, 0.2, 0.3))
    assert tokenizer.decode(prompt.ids, skip_special_tokens=False) == (
        f"<|im_start|>system\n{vino.SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"
        f"Image 1: {visual('image_pad')}Video 1: {moments}Dance.<|im_end|>\n<|im_start|>assistant\n"
    )
    ends = {prompt.ids[place] for place in prompt.ends}
    assert ends == {tokenizer.token_to_id("<|vision_end|>")} and prompt.starts[0] < prompt.ends[0]
    assert prompt.ids[prompt.ends[1] + 1 :].count(tokenizer.token_to_id("<|vision_start|>")) == 0


def test_special_tokens_spelled_in_a_prompt_are_text(tiny, photo):
    tokenizer = tiny.mm_encoder.tokenizer
    plain = build_prompt(tokenizer, "", [photo], 2)
    spelled = build_prompt(tokenizer, "<|vision_start|><|image_pad|><|im_end|><|vision_end|>", [photo], 2)
    special = set(range(256, 270))
    assert [i for i in plain.ids if i in special] == [i for i in spelled.ids if i in special]
    assert (plain.starts, plain.ends) == (spelled.starts, spelled.ends)


def test_positions_give_an_image_one_time_and_the_text_behind_it_the_next(tiny, photo):
    prompt = build_prompt(tiny.mm_encoder.tokenizer, "x", [photo], 2)
    begin, end = prompt.starts[0], prompt.ends[0]
    h, w = photo.grid[1] // 2, photo.grid[2] // 2
    time, rows, columns = prompt.positions[:, begin + 1 : end]
    assert time.unique().tolist() == [begin + 1]
    assert (rows - time).view(h, w)[:, 0].tolist() == list(range(h))
    assert (columns - time).view(h, w)[0].tolist() == list(range(w))
    assert prompt.positions[:, end].tolist() == [begin + 1 + max(h, w)] * 3


def test_patches_are_grouped_two_by_two_and_a_lone_frame_fills_the_time_patch(tiny):
    vision = tiny.config.vision
    p = vision.patch_size
    pixels = torch.randn(2, 3, 1, 4 * p, 6 * p)
    patches, grid = vino.patchify(pixels, vision)
    assert grid == (1, 4, 6) and patches.shape == (2, 24, 3 * 2 * p * p)
    first_group = [pixels[1, :, 0, y * p : (y + 1) * p, x * p : (x + 1) * p] for y in (0, 1) for x in (0, 1)]
    twice = torch.stack([torch.stack([tile, tile], 1).flatten() for tile in first_group])
    assert torch.equal(patches[1, :4], twice)


def test_the_vlm_sees_eight_frames_spread_over_the_whole_clip_and_the_vae_the_first_ones(tiny):
    assert vino.spread_frames(9, 8) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert vino.spread_frames(100, 8) == [0, 14, 28, 42, 57, 71, 85, 99]
    frames = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 64, 64, 3), np.uint8) * 10
    seen = frames[vino.spread_frames(20, 8)]
    reference = Reference.video(frames[:9], seen, tiny.config.vision)
    assert reference.pixels.shape == (1, 3, 9, 64, 64)
    levels = reference.patches.unflatten(1, (4, -1)).unflatten(-1, (3, 2, -1))[0, :, 0, 0, :, 0]
    torch.testing.assert_close(levels.flatten(), torch.from_numpy(seen[:, 0, 0, 0] / 127.5 - 1).float())


def one_pass(encoder, prompt, references):
    """Penultimate states of prompt and queries in a single pass, with gradient."""
    ids = torch.tensor([prompt.ids])
    pads = torch.tensor([encoder.tokenizer.token_to_id(pad) for pad in ("<|image_pad|>", "<|video_pad|>")])
    where = torch.isin(ids, pads)
    embeds = encoder.mm_encoder.get_input_embeddings()(ids).clone()
    embeds[where] = torch.cat([r.features[0] for r in references])
    deepstack = [torch.cat(level, 1).flatten(0, 1) for level in zip(*[r.deepstack for r in references])]
    queries = encoder.metaquery[None]
    behind = prompt.positions[:, -1:] + torch.arange(queries.shape[1])  # from the last token's position on
    positions = torch.cat([prompt.positions, behind], 1)[:, None]
    where = F.pad(where, (0, queries.shape[1]))
    inputs = torch.cat([embeds, queries], 1), positions, None, DynamicCache(), where, deepstack
    return encoder.language(*inputs)[1]


def test_queries_against_a_cached_prompt_and_their_gradient_equal_one_pass_over_both(tiny, photo, clip):
    encoder, references = tiny.mm_encoder, [tiny.encode(photo), tiny.encode(clip)]
    cached = encoder.hidden_states(["Make Image 1 blue."], references)[0]
    prompt = build_prompt(encoder.tokenizer, "Make Image 1 blue.", references, encoder.merge)
    whole = one_pass(encoder, prompt, references)
    assert relative_error(cached, whole) < 1e-5
    weights = torch.randn(whole.shape, generator=torch.manual_seed(0))
    ours, full = (torch.autograd.grad((x * weights).sum(), encoder.metaquery)[0] for x in (cached, whole))
    assert relative_error(ours, full) < 1e-5


@torch.no_grad()
def test_queries_see_the_prompt_and_the_queries_before_them_and_change_nothing_before(tiny):
    encoder = tiny.mm_encoder
    before = encoder.hidden_states(["a red circle"], [])[0]
    queries = encoder.metaquery.clone()
    encoder.metaquery[5] += 1
    after = encoder.hidden_states(["a red circle"], [])[0]
    encoder.metaquery.copy_(queries)
    moved = (after - before).abs().amax((0, 2)) > 1e-6
    first = before.shape[1] - len(queries) + 5
    assert moved[first:].all() and not moved[:first].any()


@torch.no_grad()
def test_boundary_tokens_are_contextual_states_and_not_embeddings_of_start_and_end(tiny, photo):
    encoder, image = tiny.mm_encoder, tiny.encode(photo)
    condition = encoder(["x"], [image, image])
    prompt = build_prompt(encoder.tokenizer, "x", [image, image], encoder.merge)
    states = encoder.connector_vae_branch(encoder.hidden_states(["x"], [image, image])[0][0])
    for block, start, end in zip(condition.references, prompt.starts, prompt.ends, strict=True):
        torch.testing.assert_close(block.start[0], states[start], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(block.end[0], states[end], rtol=1e-4, atol=1e-5)
    first, second = condition.references
    assert relative_error(second.start, first.start) > 1e-3  # the same token in another place


def test_a_batch_of_prompts_of_different_length_equals_its_members(tiny, photo):
    prompts = ["Make Image 1 blue.", "Make the big thing in the middle of Image 1 a little more blue."]
    settings = {"size": (1, 48, 80), "steps": 2, "cfg_image": 1.5}
    both = tiny.generate(prompts, [photo], seed=3, **settings)
    for k, prompt in enumerate(prompts):
        alone = tiny.generate([prompt], [photo], seed=3 + k, **settings)
        assert relative_error(both[k : k + 1], alone) < 1e-4


def test_attention_is_masked_only_when_something_is_padded(tiny, photo, monkeypatch):
    masks, attend = [], vino.attend

    def watched(q, k, v, rope=None, mask=None):
        masks.append(mask)
        return attend(q, k, v, rope, mask)

    monkeypatch.setattr(vino, "attend", watched)
    tiny.generate(["one length", "two length"], [photo], size=(1, 48, 80), steps=1)
    assert masks and all(mask is None for mask in masks)
    tiny.generate(["one", "another"], [photo], size=(1, 48, 80), steps=1)
    assert any(mask is not None for mask in masks)


def test_answers_are_greedy_and_the_same_alone_and_in_a_batch(tiny, photo):
    prompts, encoder = ["What is it?", "And where on earth is it?"], tiny.mm_encoder
    references = [tiny.encode(photo)]
    answers = encoder.answer(prompts, references, max_new_tokens=6)
    for prompt, answer in zip(prompts, answers):
        assert encoder.answer([prompt], references, max_new_tokens=6) == [answer]
    prompt, length = build_prompt(encoder.tokenizer, prompts[0], references, encoder.merge), 0
    for _ in range(6):  # without a cache
        last = encoder.prefill([prompt], references, DynamicCache())[0][:, -1]
        position = prompt.positions.max() + torch.ones(3, 1, dtype=torch.long)
        ids = prompt.ids + encoder.mm_encoder.lm_head(last).argmax(-1).tolist()
        prompt = replace(prompt, ids=ids, positions=torch.cat([prompt.positions, position], 1))
        length += 1
    assert encoder.tokenizer.decode(prompt.ids[-length:], skip_special_tokens=True).strip() == answers[0]


def test_rewriting_shows_the_vlm_the_references_and_the_release_system_line(tiny, photo, monkeypatch):
    asked = []

    def answer(prompts, references=(), system=vino.SYSTEM_PROMPT):
        asked.append((*prompts, len(references), system))

    monkeypatch.setattr(tiny.mm_encoder, "answer", answer)
    monkeypatch.setattr(tiny.config, "sampling", Config().sampling)
    tiny.rewrite(["Make it blue."], [photo])
    tiny.answer(["Is it blue?"], [photo])
    line = Config().sampling.rewrite_system
    assert line.startswith(vino.SYSTEM_PROMPT + " Based on the user's input command") and line.endswith(". ")
    assert asked == [("Make it blue.", 1, line), ("Is it blue?", 1, vino.SYSTEM_PROMPT)]


# ----------------------------------------------------------------------------------------------------------
# 2. Interleaved omnimodal context (2.2)
# ----------------------------------------------------------------------------------------------------------


def test_references_boundary_tokens_and_target_share_one_timeline():
    def block(value, *shape):
        return torch.full((1, 8, *shape), float(value))

    image, video, target = block(1, 1, 2, 3), block(2, 3, 2, 2), block(3, 2, 2, 3)
    wrapped = [(block(10), image, block(11)), (block(20), video, block(21))]
    tokens, positions = vino.pack(wrapped, target)
    assert tokens[0, :, 0].tolist() == [10] + [1] * 6 + [11, 20] + [2] * 12 + [21] + [3] * 12
    assert (
        positions[:, 0].tolist()
        == [0] + [1] * 6 + [2, 3] + [4] * 4 + [5] * 4 + [6] * 4 + [7] + [8] * 6 + [9] * 6
    )
    assert positions[0].tolist() == [0, 0, 0] and positions[7].tolist() == [2, 0, 0]
    assert positions[1:7, 1:].tolist() == [[h, w] for h in range(2) for w in range(3)]
    _, plain = vino.pack([(None, image, None), (None, video, None)], target)  # figure 11's ablation
    assert plain[:, 0].unique().tolist() == [0, 1, 2, 3, 4, 5]


def test_rotation_makes_attention_depend_on_distance_alone_and_leaves_position_zero_untouched():
    q, k = torch.randn(2, 1, 1, 1, 32)
    here, there = torch.tensor([[3, 1, 2]]), torch.tensor([[7, 5, 1]])

    def rotated(x, positions):
        return vino.apply_rope(x, vino.rope_3d(positions, [8, 12, 12], 256))

    near, far = ((rotated(q, here + shift) * rotated(k, there + shift)).sum() for shift in (0, 20))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
    assert torch.equal(rotated(q, torch.zeros(1, 3)), q)


# ----------------------------------------------------------------------------------------------------------
# 3. MMDiT
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_model_is_told_999_times_the_time_and_a_constant_guidance(tiny):
    embedders, seen = tiny.transformer.time_text_embed, {}
    for name in ("timestep_embedder", "guidance_embedder"):
        layer = getattr(embedders, name)
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    tiny.velocity(torch.randn(1, 16, 1, 4, 4), torch.tensor([0.5]), tiny.mm_encoder(["x"], []))
    for name, value in (("timestep_embedder", 999 * 0.5), ("guidance_embedder", 1000.0)):
        getattr(embedders, name)._forward_pre_hooks.clear()
        assert torch.equal(seen[name], vino.sinusoid(torch.tensor([value]), torch.float32))


@torch.no_grad()
def test_visual_tokens_and_text_meet_in_one_attention(tiny, photo):
    noise, t = torch.randn(1, 16, 1, 6, 10), torch.tensor([0.5])
    plain = tiny.mm_encoder(["x"], [tiny.encode(photo)])
    velocity = tiny.velocity(noise, t, plain)
    other = replace(plain, tokens=plain.tokens + torch.randn_like(plain.tokens))
    assert relative_error(tiny.velocity(noise, t, other), velocity) > 1e-3
    block = replace(plain.references[0], start=torch.randn_like(plain.references[0].start))
    assert relative_error(tiny.velocity(noise, t, replace(plain, references=[block])), velocity) > 1e-4


def test_compiled_blocks_are_one_graph_for_all_lengths_and_give_the_same_velocity(tiny, photo, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    conditions = [tiny.mm_encoder([text], [tiny.encode(photo)]) for text in ("x", "longer", "the longest")]
    noise, t = torch.randn(1, 16, 1, 6, 10), torch.tensor([0.5])
    eager = [tiny.velocity(noise, t, condition) for condition in conditions]
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, dynamic, options: compile_(f, dynamic=dynamic, backend=backend)
    )
    for block in tiny.transformer.blocks():
        monkeypatch.setattr(block, "forward", vino.compiled(block.forward))
    compiled = [tiny.velocity(noise, t, condition) for condition in conditions]
    assert len(graphs) == 2  # one for each kind of block
    for ours, theirs in zip(compiled, eager):
        assert relative_error(ours, theirs) < 1e-5


# ----------------------------------------------------------------------------------------------------------
# 4. VAE
# ----------------------------------------------------------------------------------------------------------


def test_tiling_puts_a_signal_back_together_exactly():
    def equal(function, x, *how, **lead):
        torch.testing.assert_close(vino.tiled(function, x, *how, **lead), function(x))

    def grow(part):  # as the decoder does: one frame for the first, four for each other
        return torch.cat([part[:, :, :1], part[:, :, 1:].repeat_interleave(4, 2)], 2)

    x = torch.randn(1, 2, 23, 50, 41)
    equal(lambda part: part, x, 3, 16, 12, 1)
    equal(lambda part: part.repeat_interleave(8, 4), x, 4, 16, 12, 8)
    equal(grow, x, 2, 4, 3, 4, lead=1)
    equal(lambda part: part[:, :, ::4], grow(x), 2, 16, 12, 1 / 4, lead=1)


@torch.no_grad()
def test_large_frames_are_decoded_in_tiles_of_bounded_size():
    vae, seen = VAE(Config.from_file(HERE / "tiny_config.json").vae), []
    vae.config.tile_pixels, vae.config.untiled_area = [64, 48], 64 * 64
    vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[2:]))
    pixels = vae.decode(torch.randn(1, 16, 7, 10, 14))
    assert pixels.shape == (1, 3, 25, 80, 112)
    assert max(t for t, _, _ in seen) <= 5 and max(h * w for _, h, w in seen) <= 8 * 8


@torch.no_grad()
def test_frames_depend_on_the_past_only_and_the_first_one_is_an_image_of_its_own(tiny):
    vae = tiny.vae
    pixels = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    latents = vae.encode(pixels)
    changed = torch.cat([pixels[:, :, :5], -pixels[:, :, 5:]], 2)
    with patch.object(torch.nn.GroupNorm, "forward", lambda self, x: x):  # norms see all frames of a tile
        ours, other, first = (vae.encode(x) for x in (pixels, changed, pixels[:, :, :1]))
    assert latents.shape == (1, 16, 3, 4, 6)
    torch.testing.assert_close(ours[:, :, :2], other[:, :, :2])
    torch.testing.assert_close(ours[:, :, :1], first)


@torch.no_grad()
def test_frame_attention_equals_attention_under_a_causal_mask():
    layer, x = vino.FrameAttention(8, 2), torch.randn(2, 8, 3, 4, 5)
    tokens = layer.group_norm(x).flatten(2).transpose(1, 2)
    frame = torch.arange(3).repeat_interleave(20)
    seen = frame[:, None] >= frame[None]
    q, k, v = layer.to_q(tokens), layer.to_k(tokens), layer.to_v(tokens)
    attended = F.scaled_dot_product_attention(q, k, v, seen)
    expected = x + layer.to_out(attended).transpose(1, 2).view_as(x)
    torch.testing.assert_close(layer(x), expected)


# ----------------------------------------------------------------------------------------------------------
# 5. Rectified flow and guidance (appendix B)
# ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_zero_for_the_true_velocity_and_the_sampler_follows_it_to_the_data():
    data, noise = torch.randn(2, 4, 4, 1, 3, 3)
    u = torch.tensor([0.2, 0.4, 0.6, 0.8])

    def velocity(x, t):
        assert torch.equal(t, vino.shift_time(u, 5))
        return (x - data) / t.view(-1, 1, 1, 1, 1)  # on the straight line alone this is noise - data

    loss = vino.flow_loss(velocity, data, noise, u, shift=5)
    assert loss.shape == (4,) and loss.max() < 1e-6
    result = vino.sample(lambda x, t: noise - data, noise, 7, 5.0)
    torch.testing.assert_close(result, data, rtol=1e-4, atol=1e-5)


def test_latents_and_time_stay_in_float32_whatever_the_noise_and_the_model_come_in():
    seen = []

    def velocity(x, t):
        seen.append((x.dtype, t.dtype))
        return x.bfloat16()

    result = vino.sample(velocity, torch.randn(1, 4, 1, 2, 2).bfloat16(), 3, 5.0)
    assert {*seen} == {(torch.float32, torch.float32)} and result.dtype == torch.float32


def test_guidance_weights_are_the_release_formulas_and_weights_up_to_1_switch_guidance_off():
    v, text_dropped, image_dropped = torch.randn(3, 5)
    for w_text, w_image in ((5.0, 1.0), (7.0, 1.5), (1.0, 1.0), (0.5, 0.0)):
        weights = vino.guidance_weights(w_text, w_image)
        branches = {"full": v, "text_dropped": text_dropped, "image_dropped": image_dropped}
        ours = sum(weights[name] * branches[name] for name in branches)
        w_text, w_image = max(w_text, 1), max(w_image, 1)
        theirs = image_dropped + w_image * (text_dropped - image_dropped) + w_text * (v - text_dropped)
        torch.testing.assert_close(ours, theirs)


def test_guidance_runs_only_the_branches_that_count(tiny, photo, clip):
    image, video = tiny.encode(photo), tiny.encode(clip)

    def names(references, base, cfg_text, cfg_image):
        return list(tiny.branches(["x"], [""], references, base, cfg_text, cfg_image))

    assert names([], False, 0.0, 1.0) == ["full"]
    assert names([], False, 5.0, 3.0) == ["full", "text_dropped"]
    assert names([video], False, 5.0, 3.0) == ["full", "text_dropped"]
    assert names([image], False, 5.0, 1.5) == ["full", "text_dropped", "image_dropped"]
    other = tiny.encode(photo)
    dropped = tiny.branches(["x"], [""], [image, other, video], True, 5.0, 1.5)["image_dropped"][1]
    kept = [block.latents for block in dropped.references]  # the image being edited, and the video
    assert len(kept) == 2 and torch.equal(kept[0], other.latents) and torch.equal(kept[1], video.latents)


# ----------------------------------------------------------------------------------------------------------
# 6. Vino
# ----------------------------------------------------------------------------------------------------------


def test_removed_queries_leave_the_prompt_alone(tmp_path, tiny):
    tiny.save(tmp_path / "tiny.safetensors")
    model = Vino.load(tmp_path / "tiny.safetensors")
    whole = model.mm_encoder(["a red circle"], []).tokens
    model.remove_queries()
    without = model.mm_encoder(["a red circle"], []).tokens
    assert torch.equal(without, whole[:, : -tiny.config.num_queries])
    model.save(tmp_path / "without.safetensors")
    assert Vino.load(tmp_path / "without.safetensors").mm_encoder.metaquery.shape[0] == 0


@torch.no_grad()
def test_bfloat16_rounds_the_vlms_rope_frequencies_as_the_release_does(tiny):
    half = Vino.load("random", tiny.config, dtype=torch.bfloat16)
    ours, exact = (dict(m.mm_encoder.mm_encoder.named_buffers()) for m in (half, tiny))
    frequencies = [name for name in exact if name.endswith("inv_freq")]
    assert any("visual" in name for name in frequencies) and any("language" in name for name in frequencies)
    for name in frequencies:
        assert exact[name].dtype == torch.float32
        assert torch.equal(ours[name].float(), exact[name].bfloat16().float())
    rotary = half.mm_encoder.mm_encoder.model.language_model.rotary_emb
    positions = torch.tensor([0, 100, 300, 1000]).expand(3, 1, -1)
    cos, _ = rotary(torch.zeros(1, 4, 8), positions)
    dim = tiny.config.text.head_dim
    rounded = (1 / tiny.config.text.rope_theta ** (torch.arange(0, dim, 2) / dim)).bfloat16().float()
    angles = torch.tensor([0.0, 100, 300, 1000])[:, None] * rounded
    torch.testing.assert_close(cos[0, :, : dim // 2], angles.cos(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_mmdit_in_bfloat16_errs_no_more_than_the_release():
    errors = []
    for path in CASES:
        call, golden = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
        exact, half = golden_model(path.parent), golden_model(path.parent, torch.bfloat16)
        images, videos = golden_references(golden, call, exact.config.vision)
        encoded = [exact.encode(reference) for reference in images + videos]
        condition = exact.mm_encoder([call["prompt"]], encoded)
        velocity = half.velocity(golden["noise"], golden["timesteps"][:1], condition).float()
        errors.append(relative_error(velocity, golden["velocity.cond"]))
    assert np.mean(errors) < 1.1 * 0.0106  # 1.06%: the release's own error


# ----------------------------------------------------------------------------------------------------------
# 7. Several GPUs for one sample
# ----------------------------------------------------------------------------------------------------------


def samples(model, photo, clip, group=None):
    """A picture of two guidance branches; a clip of three, for two prompts of which one is padded."""
    settings = {"steps": 2, "seed": 3, "group": group}
    prompts = ["Let it dance.", "Let Image 1 dance as in Video 1."]
    yield model.generate(["a red circle"], size=(1, 48, 80), **settings)
    yield model.generate(prompts, [photo], clip, size=(9, 64, 64), cfg_image=1.5, **settings)


def with_odd_lengths():
    """A tiny model with larger patches: no number of processes shares its 15 visual tokens evenly."""
    config = Config.from_file(HERE / "tiny_config.json")
    config.mmdit.patch_size = 2
    return Vino.load("random", config)


def one_of_many(rank, size, folder, photo, clip, port):
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    teams, init = [], SequenceParallel.__init__

    def counting(self, group):
        init(self, group)
        teams.append(self.size)

    with patch.object(SequenceParallel, "__init__", counting):
        pixels = [*samples(with_odd_lengths(), photo, clip, dist.group.WORLD)]
    assert teams == {2: [2], 4: [2, 4]}[size]  # two branches divide evenly, three are shared by all
    assert all(sample is None for sample in pixels) == (rank > 0)
    if rank == 0:
        torch.save(pixels, folder / "pixels.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_branches_or_tokens_and_make_the_sample_of_one(size, photo, clip, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(one_of_many, (size, tmp_path, photo, clip, port), nprocs=size)
    shared = torch.load(tmp_path / "pixels.pt")
    for ours, alone in zip(shared, samples(with_odd_lengths(), photo, clip), strict=True):
        assert relative_error(ours, alone) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded_weights_give_the_same_picture_to_the_bit(tiny, photo, clip):
    settings = {"size": (9, 64, 64), "steps": 2, "cfg_image": 1.5}
    resident = Vino.load("random", tiny.config, "cuda").generate(["x"], [photo], clip, **settings)
    weights = Vino.load("random", tiny.config, "cuda").saved_tensors()
    model = Vino.load("random", tiny.config)
    model.fill(weights.items(), "weights", "cpu", torch.float32)
    model.offload("cuda")
    assert all(p.device.type == "cpu" for block in model.transformer.blocks() for p in block.parameters())
    assert torch.equal(model.generate(["x"], [photo], clip, **settings), resident)


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
# 8 and 9. Pixels and files
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
    config = vino.asdict(model.config)
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


def test_public_file_layouts_and_our_own_load_to_the_same_picture(tiny, tmp_path):
    expected = picture(tiny)
    write_public_layout(tiny, tmp_path)
    assert torch.equal(picture(Vino.load(tmp_path, tiny.config)), expected)
    names = [name for name, _ in vino.open_weights(tmp_path, tiny.config, "cpu")[2]]
    assert len(names) == len({*names})  # what vino.ckpt holds is not read from the base model
    tiny.save(tmp_path / "own.safetensors")
    own = Vino.load(tmp_path / "own.safetensors")
    assert own.config == tiny.config and torch.equal(picture(own), expected)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell of its memory")
def test_a_file_is_read_tensor_by_tensor_and_never_copied_whole(tmp_path):
    def copied():  # MiB of memory that no file backs
        status = Path("/proc/self/status").read_text().split("RssAnon:")[1]
        return int(status.split()[0]) / 1024

    tensors = {f"{k}": torch.full((2**18,), float(k)) for k in range(200)}  # 1 MiB each
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.ckpt")
    del tensors
    safe = vino.read_safetensors([tmp_path / "a.safetensors"], "", "cpu")
    for stream in (safe, vino.read_checkpoint(tmp_path / "a.ckpt").items()):
        before = copied()
        for name, tensor in stream:
            assert tensor.sum() == 2**18 * int(name)
        assert copied() - before < 40


def refusal(weights, config=None):
    """The line with which weights are refused."""
    with pytest.raises(InputError) as error:
        Vino.load(weights, config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_that_do_not_fit_are_one_line_that_names_the_tensor_or_field(tiny, tmp_path):
    path = tmp_path / "weights.safetensors"
    tiny.save(path)
    tensors = load_file(path)
    metadata = {
        "config": json.dumps(vino.asdict(tiny.config)),
        "tokenizer": tiny.mm_encoder.tokenizer.to_str(),
    }

    def changed(changes, config=None):
        save_file({name: t for name, t in (tensors | changes).items() if t is not None}, path, metadata)
        return refusal(path, config)

    name = "transformer.proj_out.weight"
    assert f"'{name}' is missing" in changed({name: None})
    assert "surplus tensor 'extra'" in changed({"extra": torch.zeros(1)})
    assert f"'{name}' has shape [3, 2]" in changed({name: torch.zeros(3, 2)})
    other = Config.from_file(HERE / "tiny_config.json")
    other.mmdit.num_layers = 4
    assert "'mmdit.num_layers' does not fit: it is 4 here, and 2 in" in changed({}, other)
    path.write_bytes(path.read_bytes()[:1000])
    assert "cut short" in refusal(path)
    assert "does not exist" in refusal(tmp_path / "nothing.safetensors")


def test_public_weights_that_do_not_fit_are_one_line_that_names_them(tiny, tmp_path):
    write_public_layout(tiny, tmp_path)
    other = Config.from_file(HERE / "tiny_config.json")
    other.text.num_hidden_layers = 9
    assert "text_config.num_hidden_layers" in refusal(tmp_path, other)
    for broken in ("HunyuanVideo/vae/config.json", "Qwen3-VL-4B-Instruct/tokenizer.json"):
        whole = (tmp_path / broken).read_text()
        (tmp_path / broken).write_text(whole[:9])
        assert f"{broken} is not JSON" in refusal(tmp_path, tiny.config)
        (tmp_path / broken).write_text(whole)
    torch.save([1], tmp_path / "vino.ckpt")
    assert "something other than named tensors" in refusal(tmp_path, tiny.config)
    (tmp_path / "vino.ckpt").write_bytes(b"not a pickle")
    assert "vino.ckpt is not a checkpoint" in refusal(tmp_path, tiny.config)
    (tmp_path / "vino.ckpt").unlink()
    assert "vino.ckpt does not exist" in refusal(tmp_path, tiny.config)


def test_config_errors_name_the_field_or_the_line(tmp_path):
    with pytest.raises(InputError, match="'mmdit.layers'"):
        Config.from_dict({"mmdit": {"layers": 3}})
    with pytest.raises(InputError, match="'num_queries' is str, should be int"):
        Config.from_dict({"num_queries": "many"})
    for text, problem in (
        ('{"num_queries": 3,\n}', "line 2"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "not JSON"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=problem):
            Config.from_file(tmp_path / "config.json")


def film(path, frames):
    """Write uint8 frames [T, H, W, 3] without loss, 8 a second."""
    with imageio.imopen(path, "w", plugin="pyav") as file:
        file.write(frames, codec="ffv1", fps=8, out_pixel_format="bgr0")


def test_clips_are_decoded_at_their_own_size_or_scaled_by_the_decoder(tmp_path, monkeypatch):
    frames = np.random.default_rng(0).integers(0, 255, (9, 40, 60, 3), dtype=np.uint8)
    film(tmp_path / "clip.mkv", frames)
    monkeypatch.setattr(gc, "collect", None)  # all threads would wait for it
    assert np.array_equal(np.stack(list(vino.read_frames(tmp_path / "clip.mkv"))), frames)
    scaled = np.stack(list(vino.read_frames(tmp_path / "clip.mkv", area=20 * 30)))
    assert scaled.shape == (9, 20, 30, 3)
    boxes = frames.reshape(9, 20, 2, 30, 2, 3).mean((2, 4))
    assert np.corrcoef(scaled.flatten(), boxes.flatten())[0, 1] > 0.9
    with pytest.raises(InputError, match="does not exist"):
        list(vino.read_frames(tmp_path / "nothing.mp4"))


def test_a_clip_of_any_size_reaches_the_tiny_vlm_at_the_size_it_knows(tmp_path):
    config = Config.from_file(HERE / "tiny_config.json")
    film(tmp_path / "clip.mkv", np.zeros((12, 96, 128, 3), np.uint8))
    reference = vino.read_video(tmp_path / "clip.mkv", 9, 4096, config.vision)
    assert reference.pixels.shape[2:] == (9, 48, 64)
    t, h, w = reference.grid
    assert t == 4 and h * w * config.vision.patch_size**2 <= 4096
    assert vino.read_video(tmp_path / "clip.mkv", 9, 4096, config.vision, length=5).pixels.shape[2] == 5


def test_damaged_clips_are_one_line(tmp_path):
    film(tmp_path / "clip.mkv", np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), dtype=np.uint8))
    whole, rng = (tmp_path / "clip.mkv").read_bytes(), random.Random(0)
    for _ in range(20):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 200)):
            damaged[rng.randrange(2000)] = rng.randrange(256)
        (tmp_path / "bad.mkv").write_bytes(damaged[: rng.randrange(100, len(whole))])
        try:
            list(vino.read_frames(tmp_path / "bad.mkv"))
        except InputError as error:
            assert "bad.mkv is not a video, or is cut short" in str(error)


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


@pytest.fixture(scope="module")
def six_steps(small_config, tmp_path_factory):
    """One process, six steps of stage 3 in one go, two samples a step."""
    out = tmp_path_factory.mktemp("six")
    return run(small_config, out, "--save-every=3", "--batch=1", "--accumulate=2", "--checkpointing"), out


def is_share(count, share, draws=4000):
    """Within four standard deviations."""
    return abs(count / draws - share) < 4 * math.sqrt(share * (1 - share) / draws)


# --- Table 1, mixtures, dropout, the loss -------------------------------------------------------------------


def test_stages_are_the_columns_of_table_1():
    names = ("lr", "betas", "steps", "ema", "area", "shift", "weight_decay", "clip")
    assert [tuple(getattr(stage, name) for name in names) for stage in train.STAGES.values()] == [
        (1e-4, [0.9, 0.99], 20_000, 0, 320**2, 3, 0.01, 1),
        (4e-5, [0.9, 0.95], 4_000, 0.9999, 640**2, 5, 0.01, 1),
        (2e-5, [0.9, 0.95], 16_000, 0.9999, 640**2, 5, 0.01, 1),
    ]


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_a_step_changes_what_table_1_trains_and_nothing_else(stage, small_config, tmp_path):
    started = start(small_config, tmp_path, "--steps=4", "--validate-every=0", stage=stage)
    (group,) = started.optimizer.param_groups
    betas = train.STAGES[stage].betas
    assert ([*group["betas"]], group["weight_decay"]) == (betas, 0.01)
    before = {name: tensor.clone() for name, tensor in started.vino.state_dict().items()}
    train.train(started)  # with and without references
    after = started.vino.state_dict()
    trained = ["mm_encoder.connector", "mm_encoder.metaquery"] + ["transformer."] * (stage > "1")
    for name, tensor in before.items():
        frozen = not name.startswith(tuple(trained)) or "transformer." + MMDiT.UNUSED in name
        assert torch.equal(tensor, after[name]) == frozen, name


def test_the_learning_rate_is_constant_but_for_our_rise_and_fall():
    stage = replace(train.STAGES["3"], lr=1.0, steps=10)
    assert {train.learning_rate(stage, step) for step in range(1, 11)} == {1.0}
    stage = replace(stage, warmup=2, cooldown=4)
    rates = [train.learning_rate(stage, step) for step in range(1, 11)]
    assert rates == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_adamw_steps_at_the_rate_that_is_logged(small_config, tmp_path):
    more = ["--steps=3", "--warmup=2", "--cooldown=2", "--lr=1", "--validate-every=0"]
    started = run(small_config, tmp_path, *more)
    assert [record["lr"] for record in records(tmp_path)] == [0.5, 1, 0.5]
    assert started.optimizer.param_groups[0]["lr"] == 0.5


def test_a_shorter_run_warms_up_cools_down_and_averages_over_fewer_steps():
    config = Config.from_file(HERE / "tiny_config.json")
    long = train.make_stage("3", config, {})
    short = train.make_stage("3", config, {"steps": 20})
    assert (long.warmup, long.cooldown) == (100, 5000) and (short.warmup, short.cooldown) == (2, 5)
    assert max(train.learning_rate(short, step) for step in range(1, 21)) == short.lr
    assert train.make_stage("3", config, {"steps": 20, "warmup": 9}).warmup == 9
    half = train.make_stage("3", config, {"steps": long.steps // 2})
    assert half.ema == pytest.approx(1 - 2 * (1 - long.ema)) and short.ema == 0.5
    assert train.make_stage("3", config, {"steps": 20, "ema": 0.9}).ema == 0.9


def test_the_command_line_wins_over_the_config_and_the_config_over_table_1(small_config):
    args = train.parse_arguments(["--stage=2", "--shift=2.5", "--betas", "0.8", "0.9", "--tasks", "t2v"])
    stage = train.make_stage("2", Config.from_file(small_config), vars(args))
    assert (stage.shift, stage.betas, stage.area, stage.weight_decay) == (2.5, [0.8, 0.9], 1024, 0.01)
    assert stage.mixture == {"t2v": 0.4}
    for wrong, named in [({"1": {"rate": 1}}, "training.1.rate"), ({"4": {}}, "training.4"),
                         ({"1": {"steps": "many"}}, "training.1.steps"),
                         ({"1": {"batch": 0}}, "'batch' should be at least 1"),
                         ({"1": {"trainable": ["MMDiT", "VLM"]}}, "unknown module 'VLM'"),
                         ({"1": {"trainable": [["MMDiT"]]}}, "unknown module"),
                         ({"1": {"betas": ["0.9", "0.99"]}}, "'betas' should be two numbers"),
                         ({"1": {"drop": 2.0}}, "'drop' should be at least 0 and at most 1"),
                         ({"1": {"warmup": -1}}, "'warmup' should be at least 0")]:  # fmt: skip
        with pytest.raises(InputError, match=named):
            train.make_stage("1", Config.from_dict({"training": wrong}), {})


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
    assert alone == [[24, 25], [26, 27], [28, 29], [30, 31]]
    assert load(2, 0, accumulate=2) == (task, alone[::2]) and load(2, 1, accumulate=2) == (task, alone[1::2])


def dropped(step, images, process=0):
    """What is left of two processes' samples: the prompt, the number of images, and of videos."""
    kinds = [False] * images + [True]
    references = [train.Reference(None, None, None, is_video=kind) for kind in kinds]
    batch = train.Batch("tiv2v", ["long"], ["short"], references, None, keys=[(0, step, process)])
    kept = train.drop_conditions(batch, 0, step, train.STAGES["2"])
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
        started = start(small_config, tmp_path, f"--drop={drop}")
        samples = [started.source.draw("tiv2v", 0, index) for index in range(2)]
        batch = started.make_batch("tiv2v", 0, samples)
        assert all(map(bool, batch.prompts)) == prompts and len(batch.references) == references


def test_all_processes_drop_alike_only_where_there_are_many_images():
    few = [[dropped(step, images=2, process=p)[1:] for p in (0, 1)] for step in range(400)]
    many = [[dropped(step, images=3, process=p)[1:] for p in (0, 1)] for step in range(400)]
    assert any(a != b for a, b in few) and all(a == b for a, b in many)


def test_times_are_uniform_then_shifted():
    keys = [(0, step, number) for step in range(1000) for number in range(4)]
    u, noise = train.draw_noise(keys, (2,))
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    t = vino.shift_time(u, 3.0)  # t = 3u / (1 + 2u), so P(t < x) = x / (3 - 2x)
    for x in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert is_share((t < x).sum(), x / (3 - 2 * x))


def test_frames_and_images_adapt_so_that_a_local_batch_of_one_fits():
    source = train.Source(train.STAGES["3"], Config(), 0)
    for images, video in itertools.product(range(9), (False, True)):
        frames = source.frames_that_fit(images, video)
        assert frames % 4 == 1 and frames <= 85
        assert ((frames - 1) // 4 + 1) * (1 + video) + images <= 30
    source.stage = replace(source.stage, latent_frames=6)
    assert (source.images_that_fit(False), source.images_that_fit(True)) == (4, 2)


def toy(config):
    return ToyWorld(train.make_stage("3", config, {}), config, 0)


def test_reconstruction_is_seen_by_the_vlm_only(small_config, tmp_path):
    started = start(small_config, tmp_path)
    world = toy(started.vino.config)
    for task, latents in (("reconstruction", 0), ("selection", 2)):
        batch = world.collate(task, [world.draw(task, 0, 0)], started.device)
        batch.references = batch.references[:2]
        assert len(started.objective.condition(batch).references) == latents


def test_the_loss_is_the_flow_loss_of_the_posteriors_mean(small_config, tmp_path):
    started = start(small_config, tmp_path, "--shift=5")
    world, model = toy(started.vino.config), started.vino
    batch = world.collate("t2i", [world.draw("t2i", 0, index) for index in range(3)], started.device)
    batch.keys = [(0, 1, number) for number in range(3)]
    data = model.vae.encode(batch.target)
    u, noise = train.draw_noise(batch.keys, data.shape[1:])
    t = 5 * u / (1 + 4 * u)
    mixed = (1 - t)[:, None, None, None, None] * data + t[:, None, None, None, None] * noise
    velocity = model.velocity(mixed, t, model.mm_encoder(batch.prompts, []))
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


def test_checkpointing_gives_the_same_gradients_and_computes_attention_once(small_config, monkeypatch):
    model = Vino.load("random", Config.from_file(small_config)).transformer.requires_grad_(True)
    condition = vino.Condition(torch.randn(2, 9, model.config.text_embed_dim), None, [])
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
            model(latents, t, condition).square().sum().backward()
        return watch, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain, expected = gradients()
    for block in model.blocks():
        block.forward = MethodType(train.checkpointed, block)
    assert gradients()[0].products == plain.products  # of a short sequence all is kept
    monkeypatch.setattr(train, "SHORT", 0)
    kept, actual = gradients()
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert kept.attentions == plain.attentions and kept.products >= 1.5 * plain.products


def test_compiled_blocks_stay_compiled_although_short_and_long_have_graphs_of_their_own(
    small_config, monkeypatch
):
    model = Vino.load("random", Config.from_file(small_config)).transformer.requires_grad_(True)
    compile_ = functools.partial(torch.compile, backend="eager", dynamic=True)
    monkeypatch.setattr(torch, "compile", lambda forward, **_: compile_(forward))
    monkeypatch.setattr(train, "SHORT", 40)
    torch._dynamo.reset()
    # torch's limit is 8. With masks and without gradients there are more graphs, which take time to make.
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for block in (model.transformer_blocks[0], model.single_transformer_blocks[0]):
            block.forward = vino.compiled(MethodType(train.checkpointed, block))
        for side in (4, 12):
            words, latents = torch.randn(2, 9, model.config.text_embed_dim), torch.randn(2, 16, 1, side, side)
            assert model(latents, torch.rand(2), vino.Condition(words, None, [])).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_blocks_have_the_gradients_of_eager_ones_over_33_000_tokens():
    torch.manual_seed(0)
    model = MMDiT(Config.from_file(HERE / "tiny_config.json").mmdit).to("cuda")
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


def test_neither_training_nor_the_vlm_uses_cudnn(small_config, monkeypatch):
    allowed, sdpa = [], F.scaled_dot_product_attention

    def watch(q, *inputs, **more):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    x = torch.zeros(1, 10_000, 1, 1)
    vino.attend(x, x, x)
    with torch.no_grad():
        vino.attend(x, x, x)
    assert allowed == [False, True]
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    encoder, allowed = Vino.load("random", Config.from_file(small_config)).mm_encoder, []
    layer = encoder.mm_encoder.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda *_: allowed.append(torch.backends.cuda.cudnn_sdp_enabled()))
    with torch.no_grad():
        encoder.hidden_states(["a red circle"], [])
    assert allowed == [False, False]  # the prompt, then the queries


def test_averages_decay_as_the_stage_says_and_are_what_is_exported(small_config, tmp_path):
    started = start(small_config, tmp_path)
    before = {name: average.clone() for name, average in started.averages.tensors.items()}
    for parameter in started.parameters.values():
        parameter.data.fill_(2.0)
    started.averages.update(1)
    train.export(started)
    exported, decay = load_file(tmp_path / "final.safetensors"), started.stage.ema
    assert before and decay == 0.9
    for name, average in before.items():
        torch.testing.assert_close(exported[name], decay * average.cpu() + (1 - decay) * 2.0)


def test_averages_follow_the_steps_of_a_run(six_steps, small_config):
    started, _ = six_steps
    first = Vino.load("random", Config.from_file(small_config)).state_dict()
    for name, average in started.averages.tensors.items():
        last = started.parameters[name].cpu()
        assert not torch.equal(average.cpu(), first[name]) and not torch.equal(average.cpu(), last)


@torch.no_grad()
def test_averages_in_the_hosts_memory_follow_in_larger_steps_with_the_same_decay():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = {"a": torch.zeros(5, device=device)}
    near, far = train.Averages(weights, 0.9, on_host=False), train.Averages(weights, 0.9, on_host=True)
    weights["a"].fill_(1.0)
    for step in range(1, train.EMA_EVERY + 1):
        assert not far.tensors["a"].any()
        near.update(step)
        far.update(step)
    assert far.tensors["a"].is_pinned() == torch.cuda.is_available()
    torch.testing.assert_close(near.tensors["a"].cpu(), far.tensors["a"])


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
    own = os.environ | {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    calls = [
        subprocess.Popen(
            [sys.executable, "-W", "error::FutureWarning", "-c", script],
            env=own | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
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
    run(small_config, two / how, "--resume", "--batch=1", "--accumulate=2", "--checkpointing")
    assert records(two / how)[-2]["loss"] == pytest.approx(records(out)[-2]["loss"], rel=1e-5)


@pytest.mark.parametrize("how", ["zero2", "fsdp"])
def test_zero2_keeps_weights_whole_from_forward_to_backward_and_fsdp_does_not(how, small_config, tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        started = start(small_config, tmp_path, f"--shard={how}")
        started.model(started.make_batch("t2i", 0, [started.source.draw("t2i", 0, 0)]))
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

    def refuses(out, *more, stage="3", config=small_config):
        with pytest.raises(SystemExit) as stopped:
            train.main(flags(config, out, *more, stage=stage))
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and "Traceback" not in error
        assert error.strip().splitlines()[-1].startswith("train.py: ")
        return error.strip().splitlines()[-1]

    return refuses


ONE = ["--batch=1", "--validate-every=0", "--ema=0.9"]


def test_a_run_on_files_is_resumed_exactly_and_visits_every_sample_once_an_epoch(
    small_config, manifest, tmp_path
):
    data = manifest({})
    whole = run(small_config, tmp_path / "a", data, "--steps=4", *ONE)
    run(small_config, tmp_path / "b", data, "--steps=2", *ONE)
    again = run(small_config, tmp_path / "b", data, "--steps=4", "--resume", *ONE)
    assert equal(whole.tensors(), again.tensors())
    seen = Counter(whole.source.draw("ti2i", 0, index).prompts[0] for index in range(99))
    assert len(seen) == 99  # one is held out for validation


def test_frames_have_the_stages_area_at_their_own_aspect_ratio(tmp_path):
    rng = random.Random(0)
    for number in range(12):
        height, width = rng.randint(200, 900), rng.randint(200, 900)
        Image.new("RGB", (width, height)).save(tmp_path / "a.png")
        h, w = train.read_target(tmp_path / "a.png", 1, 640**2, framed=True).shape[3:]
        exact = 640 * math.sqrt(height / width), 640 * math.sqrt(width / height)
        assert h % 16 == w % 16 == 0 and abs(h - exact[0]) <= 16 and abs(w - exact[1]) <= 16
    film(tmp_path / "clip.mkv", np.zeros((15, 96, 128, 3), np.uint8))
    assert train.read_target(tmp_path / "clip.mkv", 85, 64**2, framed=False).shape == (1, 3, 13, 48, 64)
    assert train.read_target(tmp_path / "clip.mkv", 9, 64**2, framed=True).shape == (1, 3, 9, 48, 64)


@pytest.mark.parametrize("line, problem", [
    ("{", "not JSON"), ("[1]", "should be an object"), ('{"task": "", "prompt": ""}', "'target' is missing"),
    ({"task": "t2x"}, "unknown task 't2x'"), ({"size": 3}, "no field 'size'"), ({"images": [1]}, "of paths"),
    ({"images": "0.png"}, "field 'images' is str"), ({"images": []}, "takes 1 to 1 images, not 0"),
    ({"video": "0.mp4"}, "takes no video"), ("[" * 100_000, "not JSON"),
    ('{"line": ' + "9" * 5000 + "}", "not JSON"), ({"prompt": "\ud800"}, "not JSON"),
])  # fmt: skip
def test_a_broken_line_of_a_manifest_is_named(line, problem, manifest, tmp_path, train_refuses):
    message = train_refuses(tmp_path / "run", manifest({7: line}), *ONE)
    assert "data.jsonl, line 7: " in message and problem in message


def test_a_manifest_keeps_line_separators_inside_its_strings(small_config, tmp_path):
    line = {"task": "t2i", "prompt": "one\u2028two", "target": "a.png"}
    (tmp_path / "data.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    stage = replace(train.STAGES["3"], mixture={"t2i": 1})
    source = train.Manifest(tmp_path / "data.jsonl", stage, Config(), "0")
    assert [entry.prompt for entry in source.entries["t2i"]] == ["one\u2028two"]


def test_an_unreadable_sample_is_reported_once_and_skipped_and_more_than_1_percent_stop(
    small_config, manifest, tmp_path, capsys
):
    def read_all(changes):
        path = manifest(changes).removeprefix("--data=")
        stage = replace(train.STAGES["3"], mixture={"ti2i": 1}, area=1024)
        source = train.Manifest(path, stage, Config.from_file(small_config), "0")
        for index in range(2 * 99):  # two epochs
            source.collate("ti2i", [source.draw("ti2i", 0, index)], torch.device("cpu"))

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
    again = run(small_config, tmp_path, "--resume", "--batch=1", "--accumulate=2", "--checkpointing")
    assert again.step == 6 and equal(whole.tensors(), again.tensors())
    assert equal(load_file(out / "final.safetensors"), load_file(tmp_path / "final.safetensors"))
    clock = {"seconds": 0, "peak_mib": 0}
    assert [r | clock for r in records(out)] == [r | clock for r in records(tmp_path)]


def test_a_checkpoint_holds_plain_tensors_and_json_and_runs_no_code(six_steps):
    _, out = six_steps
    [*files] = (out / "checkpoints" / "step_00000006").iterdir()
    assert sorted(file.name for file in files) == ["0.safetensors", "state.json"]


def test_a_step_that_is_not_finite_changes_nothing_and_ten_in_a_row_stop_the_run(small_config, tmp_path):
    more = ["--validate-every=0", "--ema=0.9"]
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
    given = flags(small_config, tmp_path, "--save-every=2", "--validate-every=0")
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
    run(small_config, tmp_path, "--steps=2", "--validate-every=0")
    limits = train.resource.getrlimit(train.resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        train.resource.setrlimit(train.resource.RLIMIT_FSIZE, (50_000, limits[1]))  # no file may be larger
        message = train_refuses(tmp_path, "--resume", "--steps=4", "--save-every=3", "--validate-every=0")
    finally:
        train.resource.setrlimit(train.resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert "cannot write" in message and "MiB free" in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    assert start(small_config, tmp_path, "--resume").step == 2


def test_a_signal_saves_and_stops_and_only_the_newest_checkpoints_stay(small_config, tmp_path):
    started = start(small_config, tmp_path, "--save-every=1", "--keep=2", "--validate-every=0")
    clip = started.clip_gradients

    def interrupted():
        if started.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip()

    started.clip_gradients = interrupted
    assert train.train(started) == 128 + signal.SIGTERM and started.step == 4
    names = [path.name for path in train.complete_checkpoints(tmp_path)]
    assert names == ["step_00000003", "step_00000004"] and not (tmp_path / "final.safetensors").exists()


def test_the_next_steps_samples_are_read_during_this_one_and_their_errors_are_one_line(
    small_config, manifest, tmp_path, train_refuses, monkeypatch
):
    read, threads = train.read_image, set()

    def watched(path):
        threads.add(threading.current_thread())
        return read(path)

    monkeypatch.setattr(train, "read_image", watched)
    run(small_config, tmp_path / "a", manifest({}), "--steps=2", *ONE)
    assert threads and threading.main_thread() not in threads
    data = manifest({line: {"target": "gone.png"} for line in range(1, 101)})
    assert "no sample of 'ti2i' can be read (line " in train_refuses(tmp_path / "b", data, *ONE)


def test_a_damaged_checkpoint_is_one_clear_error(small_config, tmp_path, train_refuses):
    run(small_config, tmp_path, "--steps=1", "--validate-every=0")
    os.truncate(tmp_path / "checkpoints/step_00000001/0.safetensors", 1000)
    told = train_refuses(tmp_path, "--resume", "--steps=2")
    assert "cut short" in told and "step_00000001" in told
    for forged in ("[]", "{}", '{"step": 1}'):
        (tmp_path / "checkpoints/step_00000001/state.json").write_text(forged)
        assert "state.json is not a checkpoint's" in train_refuses(tmp_path, "--resume", "--steps=2")


def test_a_checkpoint_of_another_run_is_refused_by_the_name_of_the_field(
    small_config, tmp_path, train_refuses, capsys
):
    run(small_config, tmp_path, "--steps=1", "--validate-every=0")
    assert "holds a run" in train_refuses(tmp_path)
    assert "field 'stage' does not fit: it is 2 here, and 3" in train_refuses(tmp_path, "--resume", stage="2")
    message = train_refuses(tmp_path, "--resume", "--no-queries")
    assert "field 'num_queries' does not fit: it is 0 here, and 4" in message
    capsys.readouterr()
    start(small_config, tmp_path, "--resume", "--lr=0.5")
    assert "going on with lr 0.5; until here it was 0.001" in capsys.readouterr().err
    (tmp_path / "checkpoints" / "step_00000001" / "state.json").write_text('{"step": ')
    assert "state.json is not JSON, or is cut short" in train_refuses(tmp_path, "--resume")


@pytest.mark.parametrize("switch", ["--no-queries", "--no-boundary-tokens"])
def test_the_ablations_train_and_their_export_knows_what_is_missing(switch, small_config, tmp_path, photo):
    run(small_config, tmp_path, switch, "--steps=2", "--validate-every=0")
    model = Vino.load(tmp_path / "final.safetensors")
    own, [block] = model.config, model.mm_encoder(["x"], [model.encode(photo)]).references
    assert (own.num_queries, own.boundary_tokens) == ((0, True) if switch == "--no-queries" else (4, False))
    assert (block.start is not None) == own.boundary_tokens
    assert model.generate(["x"], [photo], size=(1, 48, 80), steps=1).isfinite().all()
    start(small_config, tmp_path, switch, "--resume")


def test_a_stage_says_what_it_starts_from_and_takes_the_export_of_the_one_before(
    small_config, tmp_path, capsys
):
    assert train.default_weights("2", tmp_path / "stage2") == str(train.TINY)
    export = tmp_path / "stage1" / "final.safetensors"
    export.parent.mkdir()
    export.touch()
    assert train.default_weights("2", tmp_path / "stage2") == str(export)
    start(small_config, tmp_path / "run")
    assert "from random (--weights chooses others)" in capsys.readouterr().err
    start(small_config, tmp_path / "run", "--steps=9", "--warmup=9", "--cooldown=9")
    assert "stays below 0.001: --warmup and --cooldown are longer" in capsys.readouterr().err


def test_validation_is_the_same_each_time_and_its_picture_and_the_losses_are_drawn(six_steps):
    started, out = six_steps
    train.validate(started)
    first, second = [record for record in records(out) if "validation" in record][-2:]
    assert not list(out.glob("step_00000003.png"))  # every 500 steps, and at the end
    assert first == second and set(first["validation"]) == {"t2i", "ti2i", "ti2v", "tiv2v"}
    assert Image.open(out / "step_00000006.png").width > 96 * 9
    with Image.open(out / "loss.png") as picture:
        assert len(picture.getcolors(10**6)) > 4  # curves in colour, of six points


def test_the_files_depend_on_each_other_as_the_readme_says():
    for module, forbidden in (("vino", "train|sample|toy"), ("sample", "train|toy"), ("train", "sample")):
        source = (HERE / f"{module}.py").read_text()
        assert not re.search(rf"^\s*(import|from) ({forbidden})\b", source, re.MULTILINE), module
    assert not re.search(
        r"^(import|from) toy\b", (HERE / "train.py").read_text(), re.MULTILINE
    )  # only where used


# ----------------------------------------------------------------------------------------------------------
# sample.py: the command line
# ----------------------------------------------------------------------------------------------------------

RANDOM = ["--weights", "random", "--steps", "2", "--device", "cpu"]


@pytest.fixture
def media(tmp_path, monkeypatch):
    """A working directory with a wide and a square picture and a wide clip of 13 frames."""
    monkeypatch.chdir(tmp_path)
    ramp = np.linspace(0, 255, 13 * 40 * 80 * 3).reshape(13, 40, 80, 3).astype(np.uint8)
    Image.fromarray(ramp[0]).save("wide.png")
    Image.fromarray(ramp[0, :, :40]).save("square.png")
    Path("clip.mp4").write_bytes(command_line.encode_mp4(ramp, 8, "{}"))
    return tmp_path


def sample_py(*arguments):
    return command_line.main([*RANDOM, *arguments])


def refused(capsys, *arguments):
    """The one line that a call ends with. The folder holds what it held before."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as end:
        sample_py(*arguments)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("sample.py: error: "), lines
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    return lines[0]


def shape(path):
    """(frames, height, width) of a picture or a clip."""
    if path.suffix == ".png":
        return (1, *Image.open(path).size[::-1])
    return imageio.imread(path, plugin="pyav").shape[:3]


def test_the_same_command_on_a_fresh_machine_makes_its_picture_each_time_and_warns_of_nothing(tmp_path):
    call = [
        sys.executable,
        "-W",
        "error::FutureWarning",
        "-W",
        "error::DeprecationWarning",
        HERE / "sample.py",
    ]
    call += ["--prompt", "A large, red circle!", "--steps", "2"]
    for _ in range(2):
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, "a-large-red-circle_0.png"), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a-large-red-circle_0.png"]
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr and "step/s" in done.stderr


def test_a_task_file_makes_all_nine_tasks_and_names_the_items_that_fail(media, capsys):
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
    call = [
        "--tasks",
        "tasks/all.json",
        "--out",
        "results",
        "--cfg-image",
        "1.5",
        "--frames",
        "5",
        "--steps",
        "1",
    ]
    with patch.object(Vino, "generate", autospec=True, side_effect=Vino.generate) as generate:
        assert sample_py(*call) == 1
    last = capsys.readouterr().err.splitlines()[-2:]
    assert last == ["1 of 10 failed", "  broken.png: tasks/missing.png does not exist"]
    assert [call.kwargs["base"] for call in generate.mock_calls] == [False] * 4 + [True] + [False] * 4
    made = {path.stem: shape(path) for path in Path("results").iterdir()}
    assert made == {index: size for index, *_, size in items if size}
    kind = imageio.immeta("results/camera.mp4", plugin="pyav")
    assert (kind["codec"], kind["video_format"], kind["fps"]) == ("h264", "yuv420p", 8)


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
    assert (
        shape(Path("z.mp4")) == (9, 32, 80) and "--frames 12 is rounded down to 9" in capsys.readouterr().err
    )


def test_the_same_command_gives_the_same_pixels_and_many_seeds_equal_single_runs(media):
    call = ["--prompt", "a dot", "--frames", "5", "--height", "40", "--width", "50"]
    assert sample_py(*call, "--out", "a.gif") == sample_py(*call, "--out", "b.gif") == 0
    a, b = (np.stack(list(vino.read_frames(f"{name}.gif"))) for name in "ab")
    assert a.shape == (5, 32, 48, 3) and (a == b).all()
    assert (
        sample_py("--prompt", "a dot", "--seed", "3", "--num", "2", "--out", "dots") == 0
    )  # makes the folder
    assert sample_py("--prompt", "a dot", "--seed", "4", "--device", "cpu:0") == 0
    pictures = [np.asarray(Image.open(f"{name}.png")) for name in ("dots/a-dot_3", "dots/a-dot_4", "a-dot_4")]
    assert (pictures[1] == pictures[2]).all() and (pictures[0] != pictures[1]).any()


def test_results_carry_command_seed_and_prompt(media):
    for name, frames in (("a.png", "1"), ("a.gif", "5"), ("a.mp4", "5")):
        assert sample_py("--prompt", "<|im_end|> é", "--seed", "7", "--frames", frames, "--out", name) == 0
        is_clip = name.endswith("mp4")
        text = imageio.immeta(name, plugin="pyav") if is_clip else Image.open(name).info
        facts = json.loads(text["comment"])
        assert (facts["seed"], facts["prompt"]) == (7, "<|im_end|> é")
        assert facts["command"].startswith("python sample.py") and f"--out {name}" in facts["command"]


def test_a_clip_is_written_within_half_a_grey_level_of_what_its_format_can_hold(tmp_path):
    y, x = np.mgrid[:64, :64]
    frames = np.stack([np.where((x - 20 - 3 * t) ** 2 + (y - 32) ** 2 < 100, 230, 40) for t in range(9)])
    frames = np.repeat(frames[..., None], 3, -1).astype(np.uint8)
    (tmp_path / "a.mp4").write_bytes(command_line.encode_mp4(frames, 8, "{}"))
    written = np.stack(list(vino.read_frames(tmp_path / "a.mp4"))).astype(float)
    assert written.shape == frames.shape and abs(written - frames).mean() < 2


def test_nothing_is_overwritten_unless_asked_nor_by_a_result_that_fails(media, capsys):
    def full_disk(image, path, *_, **__):
        Path(path).write_text("half of it")
        raise OSError(28, "No space left on device")

    Path("x_0.png").write_text("mine")
    with patch.object(Image.Image, "save", full_disk), pytest.raises(SystemExit):
        sample_py("--prompt", "x", "--overwrite")
    assert "No space left" in capsys.readouterr().err
    with patch.object(Vino, "load", side_effect=AssertionError("loaded")):  # refused before the costly work
        assert "x_0.png exists; --overwrite" in refused(capsys, "--prompt", "x")
        assert sample_py("--prompt", "y", "--explain") == 0
    assert Path("x_0.png").read_text() == "mine" and not list(Path().glob("*.partial"))
    assert sample_py("--prompt", "x", "--overwrite") == 0 and Image.open("x_0.png").size == (64, 64)
    capsys.readouterr()
    other = ["--prompt", "x", "--cfg-text", "2"]  # not the command that made it
    assert "x_0.png exists; --overwrite" in refused(capsys, *other)


def test_explain_is_the_sequence_that_the_model_sees(media, capsys, monkeypatch):
    call = ["--prompt", "<|vision_start|>", "--image", "square.png", "wide.png", "--video", "clip.mp4"]
    Path("plain.json").write_text('{"boundary_tokens": false}')
    with patch.object(Vino, "load", side_effect=AssertionError("loaded")):
        assert sample_py(*call, "--explain", "--config", "plain.json") == 0
        assert "start token" not in capsys.readouterr().out
        assert sample_py(*call, "--explain") == 0
    rows = [re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()[1:]]
    packed, built, pack, build = [], [], vino.pack, vino.build_prompt
    monkeypatch.setattr(vino, "pack", lambda *a: packed.append(pack(*a)) or packed[-1])
    monkeypatch.setattr(vino, "build_prompt", lambda *a: built.append(build(*a)) or built[-1])
    assert sample_py(*call, "--out", "a.mp4") == 0

    positions, prompt, begin = packed[0][1], built[0], 0
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
    seen = []

    def rewrite(self, prompts, images=(), video=None):
        seen.append((len(images), video is not None))
        return [f"{prompts[0]}, at dawn"]

    monkeypatch.setattr(Vino, "rewrite", rewrite)
    assert sample_py("--prompt", "a dot", "--rewrite") == 0
    assert "rewritten: a dot, at dawn\n" in capsys.readouterr().err
    assert json.loads(Image.open("a-dot_0.png").info["comment"])["prompt"] == "a dot, at dawn"
    shipped = ["--prompt", "a red circle", "--explain"]
    for more, expands in ([], True), (["--no-rewrite"], False), (["--image", "square.png"], False):
        assert command_line.main([*shipped, *more]) == 0
        assert ("at dawn" in capsys.readouterr().err) == expands
    sample_py("--prompt", "x", "--image", "square.png", "--video", "clip.mp4", "--rewrite", "--explain")
    assert seen[-1] == (1, True)


def test_rewrite_only_writes_the_task_file_again_with_the_old_captions_beside_the_new(media, monkeypatch):
    monkeypatch.setattr(
        Vino, "rewrite", lambda self, prompts, images, video: [f"{prompts[0]} of {len(images)}"]
    )
    item = {
        "index": "1",
        "task": "ti2i",
        "caption": "blue",
        "ref_image_paths": ["square.png"],
        "note": "mine",
    }
    Path("tasks.json").write_text(json.dumps([item]))
    assert sample_py("--tasks", "tasks.json", "--rewrite-only", "--out", "new.json") == 0
    assert json.loads(Path("new.json").read_text()) == [
        item | {"caption": "blue of 1", "caption_raw": "blue"}
    ]


def test_rewriting_a_task_file_names_the_items_that_fail_and_keeps_their_captions(media, capsys, monkeypatch):
    monkeypatch.setattr(Vino, "rewrite", lambda self, prompts, images, video: [f"{prompts[0]}, at dawn"])
    items = [{"index": "a", "task": "ti2i", "caption": "x", "ref_image_paths": ["missing.png"]}]
    items.append({"index": "b", "task": "t2i", "caption": "y"})
    Path("tasks.json").write_text(json.dumps(items))
    assert sample_py("--tasks", "tasks.json", "--rewrite-only", "--out", "new.json") == 1
    last = capsys.readouterr().err.splitlines()[-2:]
    assert last == ["1 of 2 failed", "  a.png: missing.png does not exist"]
    captions = [(item["caption"], item["caption_raw"]) for item in json.loads(Path("new.json").read_text())]
    assert captions == [("x", "x"), ("y, at dawn", "y")] and not list(Path().glob("*.partial"))


def test_a_damaged_result_is_nobodys_and_is_kept(media):
    assert sample_py("--prompt", "x", "--frames", "5", "--out", "a.mp4") == 0
    whole, damage = Path("a.mp4").read_bytes(), random.Random(0)
    for _ in range(20):
        content = bytearray(whole)
        for _ in range(damage.choice([1, 5, 50])):
            content[damage.randrange(len(content))] = damage.randrange(256)
        Path("a.mp4").write_bytes(content)
        command_line.made_by(Path("a.mp4"))  # raises nothing


def test_queries_can_be_taken_away_from_finished_weights(media):
    for name, more in (("with", []), ("without", ["--no-queries"])):
        assert sample_py("--prompt", "a dot", "--out", f"{name}.png", *more) == 0
    with_, without = (np.asarray(Image.open(f"{name}.png"), int) for name in ("with", "without"))
    assert abs(with_ - without).max() > 0


def test_pictures_and_clips_are_read_upright_and_over_white(media):
    photo, exif = Image.new("RGB", (32, 16), "red"), Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    photo.save("turned.jpg", exif=exif)
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save("clear.png")
    assert vino.read_image("turned.jpg").size == (16, 32)
    assert vino.read_image("clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((16, 16), 100 * 257, np.uint16)).save("deep.png")  # 16 bits, gray
    assert vino.read_image("deep.png").getpixel((0, 0)) == (100, 100, 100)
    frames = np.stack(list(vino.read_frames("clip.mp4")))
    turned = bytearray(Path("clip.mp4").read_bytes())
    place = turned.find(b"tkhd") + 44  # nine 32-bit numbers: a quarter turn to the right
    turned[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 40 << 16, 0, 1 << 30)
    Path("turned.mp4").write_bytes(turned)
    assert (next(vino.read_frames("turned.mp4")) == np.rot90(frames[0], -1)).all()
    assert next(vino.read_frames("turned.mp4", area=20 * 40)).shape == (40, 20, 3)


BAD = {
    "": "give either --prompt",
    "--tasks ''": "--tasks needs --out",
    "--tasks a.json --rewrite-only --out a.txt": "--rewrite-only goes with",
    "--prompt ''": "prompt is empty",
    "--prompt a\udcff": "the prompt is not valid UTF-8",
    "--prompt x --height 0 --width 64": "invalid int (16 to 1000000) value: '0'",
    "--prompt x --height wide --width 64": "value: 'wide'",
    f"--prompt x --seed {'9' * 5000}": "invalid int (0 to",
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
    "--prompt x --out a.jpg": "text to image goes to a .png, or a folder",
    "--prompt x --out a.png --frames 9": "text to video goes to a .mp4 or .gif, or a folder",
    "--prompt x --out none/none/a.png": "cannot write none/none/a.png: No such file or directory",
    "--prompt x --config text": "text is not JSON, or is cut short (Expecting value: line 1 ",
    "--prompt x --config unknown.json": "no field 'text.size'",
    "--prompt x --weights missing": "missing does not exist",
    "--prompt x --weights hub": "cannot download Qwen/Qwen3-VL-4B-Instruct: no network",
    "--prompt x --weights tiny.safetensors --config other.json": "does not fit",
    "--prompt x --device moon": "--device moon: not here",
    "--prompt x --device meta": "--device meta: not here",
    "--prompt x --offload": "--offload needs a GPU",
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
    if "--offload" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert message in refused(capsys, *(word.strip("'") for word in arguments.split()))


ITEM = '[{"index": "a", "task": "ti2i", "caption": "x", "ref_image_paths": ["wide.png"], %s}]'
BAD_TASKS = {
    '[\n{"index": 1,}]': "line 2 ",
    "{}": "should be a list",
    "[1]": "item 1: should be an object",
    "[" * 100_000: "is not JSON",
    '[{"index": %s}]' % ("9" * 5000): "is not JSON",
    '[{"index": "a", "task": "t2i"}]': "item 1: the prompt is empty",
    ITEM % '"task": "i2i"': "unknown task 'i2i'",
    ITEM % '"task": "t2i"': "does not go with these references",
    ITEM % '"caption": 3': "'caption' is 3, should be a str",
    ITEM % '"caption": "\\ud800"': "the prompt is not valid UTF-8",
    ITEM % '"index": "../a"': "a file's name",
    ITEM % '"index": ".."': "a file's name",
    ITEM % '"index": "a\\u0000"': "a file's name",
    ITEM % '"index": "\\ud800"': "a file's name",
    '[{"task": "t2i", "caption": "x"}]': "'index' should be a file's name, and is \"\"",
    ITEM % '"ref_image_paths": "b.png"': "'ref_image_paths' is \"b.png\", should be a list",
    ITEM % '"ref_image_paths": [5]': "should be paths",
}


@pytest.mark.parametrize(("text", "message"), BAD_TASKS.items(), ids=range(len(BAD_TASKS)))
def test_a_malformed_task_file_is_refused_with_its_line_or_item(media, capsys, text, message):
    Path("a.json").write_text(text)
    assert message in refused(capsys, "--tasks", "a.json", "--out", "results")
    assert not Path("results").exists()


def test_a_profile_counts_the_calls_of_each_part_and_leaves_the_picture_alone(media, capsys):
    call = ["--prompt", "x", "--image", "wide.png", "--cfg-image", "2"]
    sample_py(*call, "--out", "a.png")
    sample_py(*call, "--out", "b.png", "--profile")
    rows = dict(re.findall(r"^(\w[\w ,-]+?) {2,}(\d+) ", capsys.readouterr().out, re.MULTILINE))
    assert rows == {
        "vision tower": "1",
        "VAE, encoder": "1",
        "language model": "6",
        "MMDiT": "6",
        "VAE, decoder": "1",
    }
    assert (np.array(Image.open("a.png")) == np.array(Image.open("b.png"))).all()


def test_notices_name_all_strange_words_and_every_reference_that_nobody_gave(media, capsys):
    prompt = "Make the corgi in Image 1 ride as in Image 2."
    call = ["--prompt", prompt, "--image", "wide.png", "--explain"]
    assert command_line.main(call) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(
        "'corgi', 'ride' mean nothing to this model: these weights know coloured shapes"
    )
    assert lines[1] == "the prompt names Image 2, which is not given"
    assert command_line.strange_words("A corgi", vino.byte_tokenizer()) == []  # random weights, or a real VLM


def test_compiling_is_for_work_that_takes_longer_than_it():
    def pays(config, *arguments):
        args = command_line.build_parser().parse_args(["--prompt", "x", *arguments])
        return command_line.pays_to_compile([command_line.single_job(args)], args, config)

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
    monkeypatch.setattr(Vino, "generate", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        sample_py("--prompt", "x")


def test_an_interrupt_is_one_line_and_leaves_nothing(media, capsys, monkeypatch):
    monkeypatch.setattr(Vino, "generate", Mock(side_effect=KeyboardInterrupt))
    before = sorted(path.name for path in Path().iterdir())
    assert sample_py("--prompt", "x") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "sample.py: stopped"
    assert sorted(path.name for path in Path().iterdir()) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_stdout_or_one_without_the_letters_of_a_name_is_no_error_of_the_picture(
    media, capsys, monkeypatch
):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert sample_py("--prompt", "é", "--out", "é.png") == 0 and Path("é.png").exists()
    assert "cannot print to stdout: No space left" in capsys.readouterr().err
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert sample_py("--prompt", "é", "--out", "é.png") == 0
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
    assert config.training["2"] == saved.training["2"]
    assert vino.read_config(path, "random") == Config.from_dict(json.loads(path.read_text()))


def test_the_shipped_weights_hold_the_tiny_config():
    saved, ours = vino.read_metadata(train.TINY, None)[0], Config.from_file(HERE / "tiny_config.json")
    ours.vae.scaling_factor = saved.vae.scaling_factor  # is measured in training
    assert saved == ours
