"""Each test is a claim of the README or of the paper's method; its name is the claim.

`VINO_GOLDEN` (folders separated by ":") replaces assets/golden by other golden runs of the same format.
"""

import copy
import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vino
from vino import (
    VAE, Block, Condition, Config, FrameAttention, InputError, MMDiT, Reference, Vino, build_prompt,
    byte_tokenizer, flow_loss, guidance_weights, letterbox_size, pack, patchify, rope_3d, rotate, sample,
    tiled, time_steps, timeline, video_size, vlm_size,
)  # fmt: skip

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
    frames = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), dtype=np.uint8)
    return Reference.video(frames, 9, tiny.config.vision)


# ----------------------------------------------------------------------------------------------------------
# The public release's numbers
# ----------------------------------------------------------------------------------------------------------


def golden_model(folder):
    """The tiny VINO of a golden folder, from its config and weights."""
    golden = json.loads((folder / "config.json").read_text())
    sizes = golden["cfg"]
    text = dict(sizes["text"], vocab_size=golden["vlm_config"]["text_config"]["vocab_size"])
    text["mrope_section"] = text.pop("rope_scaling")["mrope_section"]
    mmdit = dict(sizes["mmdit"])
    assert (mmdit.pop("qk_norm"), mmdit.pop("guidance_embeds")) == ("rms_norm", True)
    limits = Config().vision
    image, video = (
        [32, sizes[k]["shortest_edge"], sizes[k]["longest_edge"]] for k in ("image_size", "video_size")
    )
    resize = {
        "image_resize": [limits.image_resize[0], image],
        "video_resize": [limits.video_resize[0], video],
    }
    config = Config.from_dict(
        {"text": text, "vision": sizes["vision"] | resize, "mmdit": mmdit, "vae": sizes["vae"]}
        | {"num_queries": sizes["num_queries"]}
    )
    tokenizer = byte_tokenizer(sorted(golden["special_tokens"], key=golden["special_tokens"].get))
    ours = {"mmdit": "transformer", "vae": "vae", "vlm": "mm_encoder.mm_encoder"}
    stream = []
    for name, tensor in load_file(folder / "weights.safetensors").items():
        first, *rest = name.split(".")
        stream.append(
            (".".join([ours.get(first, f"mm_encoder.{first}"), *rest]), lambda tensor=tensor: tensor)
        )
    with torch.device("meta"):
        model = Vino(config, tokenizer)
    model.fill(stream, folder, "cpu", torch.float32)
    return model.eval()


def golden_cases():
    return [
        path
        for folder in GOLDEN
        for path in sorted(folder.glob("*.json"))
        if path.with_suffix(".safetensors").exists()
    ]


GOLDEN_MODELS = {}


@pytest.mark.parametrize("path", golden_cases(), ids=lambda path: path.stem)
@torch.no_grad()
def test_every_stage_equals_the_public_release(path):
    call, golden = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    if "in.video" in golden and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch rounds resized video frames differently on this processor: needs x86 with AVX2")
    if path.parent not in GOLDEN_MODELS:
        GOLDEN_MODELS[path.parent] = golden_model(path.parent)
    model = GOLDEN_MODELS[path.parent]
    vision, encoder = model.config.vision, model.mm_encoder

    def compare(name, ours):
        step = next((int(key.rsplit("_", 1)[1]) for key in golden if key.startswith(f"{name}.rows_")), None)
        theirs = golden[name] if step is None else golden[f"{name}.rows_{step}"]
        rows = ours if step is None else ours[::step] if ours.dim() == 2 else ours[:, ::step]
        error = relative_error(rows, theirs)
        print(f"{name:24} {error:.1e}")  # shown by pytest -rP
        assert error < 1e-4, name

    area = math.prod(call["letterbox_area_hw"])
    images = [
        Reference.image(Image.fromarray(golden[f"in.image_{k}"].numpy()), area, vision)
        for k in range(len(call.get("images", [])))
    ]
    videos = (
        [Reference.video(golden["in.video"].numpy(), call["out"][0], vision)] if "in.video" in golden else []
    )
    for k, image in enumerate(images):
        letterboxed = ((image.pixels[0, :, 0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
        assert torch.equal(letterboxed, golden[f"letterboxed_{k}"])
    for references, kind, grids in (
        (images, "pixel_values", "image"),
        (videos, "pixel_values_videos", "video"),
    ):
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
    branches = model.branches(
        [call["prompt"]],
        [negative],
        encoded[: len(images)],
        encoded[len(images) :],
        call.get("base", False),
        **guidance,
    )
    theirs = {"full": "cond", "text_dropped": "uncond_text", "image_dropped": "uncond_image"}
    assert {f"velocity.{theirs[name]}" for name in branches} == {
        name for name in golden if "velocity" in name
    }
    for k, boundary in enumerate(branches["full"][1].boundaries):
        compare(f"boundary_{k}", torch.cat(boundary))
    for name, (_, condition) in branches.items():
        compare(f"{theirs[name]}.embeds_vlm", condition.tokens)
        compare(
            f"velocity.{theirs[name]}", model.velocity(golden["noise"], golden["timesteps"][:1], condition)
        )

    decoded = []
    decode = model.vae.decode
    model.vae.decode = lambda latents: decoded.append(latents) or decode(latents)
    pixels = model.generate(
        [call["prompt"]], images, *videos, size=call["out"], base=call.get("base", False),
        steps=call["steps"], shift=call["shift"], negative_prompt=negative, noise=golden["noise"], **guidance,
    )  # fmt: skip
    del model.vae.decode
    compare("latents", decoded[0])
    compare("pixels", pixels)


@pytest.mark.parametrize("folder", GOLDEN, ids=str)
def test_sizes_of_references_equal_the_release(folder):
    defaults = Config().vision
    for case in json.loads((folder / "sizes.json").read_text()):
        h, w = letterbox_size(*case["src_wh"], case["area"])
        assert [h, w] == case["letterbox_hw"]
        assert (
            list(vlm_size(*vlm_size(h, w, *defaults.image_resize[0]), *defaults.image_resize[1]))
            == case["vlm_hw"]
        )
        assert list(video_size(*case["src_wh"], case["area"])) == case["target_hw"]


@pytest.mark.parametrize("folder", GOLDEN, ids=str)
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


@torch.no_grad()
def test_cached_prompt_and_queries_equal_one_pass_over_both(tiny, photo, clip):
    encoder, references = tiny.mm_encoder, [tiny.encode(photo), tiny.encode(clip)]
    hidden = encoder.read(["Make Image 1 blue."], references)[0]
    prompt = build_prompt(encoder.tokenizer, "Make Image 1 blue.", references, encoder.merge)
    ids = torch.tensor([prompt.ids])
    language = encoder.mm_encoder.model.language_model
    embeds = language.embed_tokens(ids)
    where = torch.isin(ids, torch.tensor([268, 269]))
    embeds[where] = torch.cat([r.features[0] for r in references])
    deepstack = [torch.cat([r.deepstack[k][0] for r in references]) for k in range(3)]
    queries = encoder.metaquery[None]
    behind = prompt.positions[:, -1:] + torch.arange(queries.shape[1])
    whole = encoder.penultimate(
        torch.cat([embeds, queries], 1),
        torch.cat([prompt.positions, behind], 1)[:, None],
        None,
        vino.DynamicCache(),
        torch.nn.functional.pad(where, (0, queries.shape[1])),
        deepstack,
    )
    assert relative_error(hidden, whole) < 1e-5


def test_a_batch_of_prompts_of_different_length_equals_its_members(tiny, photo):
    prompts = ["Make Image 1 blue.", "Make the big thing in the middle of Image 1 a little more blue."]
    settings = {"size": (1, 48, 80), "steps": 2, "cfg_image": 1.5}
    both = tiny.generate(prompts, [photo], seed=3, **settings)
    for k, prompt in enumerate(prompts):
        alone = tiny.generate([prompt], [photo], seed=3 + k, **settings)
        assert relative_error(both[k : k + 1], alone) < 1e-4


def test_attention_is_masked_only_when_something_is_padded(tiny, photo, monkeypatch):
    masks = []
    attend = vino.attend
    monkeypatch.setattr(
        vino, "attend", lambda q, k, v, mask=None: masks.append(mask) or attend(q, k, v, mask)
    )
    tiny.generate(["one length", "two length"], [photo], size=(1, 48, 80), steps=1)
    assert masks and all(mask is None for mask in masks)
    tiny.generate(["one", "another"], [photo], size=(1, 48, 80), steps=1)
    assert any(mask is not None for mask in masks)


def test_references_are_encoded_once_for_all_guidance_branches(tiny, photo, clip, monkeypatch):
    looks, encodes = [], []
    look, encode = tiny.mm_encoder.look, tiny.vae.encode
    monkeypatch.setattr(tiny.mm_encoder, "look", lambda reference: looks.append(1) or look(reference))
    monkeypatch.setattr(tiny.vae, "encode", lambda pixels: encodes.append(1) or encode(pixels))
    tiny.generate(["x"], [photo], clip, size=(9, 64, 64), steps=1, cfg_image=2.0)
    assert len(looks) == len(encodes) == 2


def test_without_queries_or_boundary_tokens_the_model_still_runs(photo):
    config = Config.from_file(HERE / "tiny_config.json")
    config.num_queries, config.boundary_tokens = 0, False
    model = Vino.load("random", config)
    assert model.mm_encoder(["x"], [model.encode(photo)]).boundaries == []
    assert model.generate(["x"], [photo], size=(1, 48, 80), steps=1).isfinite().all()


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
    assert [block.time for block in timeline([(1, 4, 6), (3, 4, 4)], (2, 4, 6), boundaries=False)] == [
        0,
        1,
        4,
    ]


def test_pack_wraps_each_reference_in_its_own_tokens_and_puts_the_target_last():
    one, two, target = (torch.full((1, 8, 1, 2, 2), float(k)) for k in (1, 2, 3))
    boundaries = [tuple(torch.full((1, 8), float(k)) for k in pair) for pair in ((10, 11), (20, 21))]
    tokens, positions = pack([one, two], boundaries, target)
    assert tokens[0, :, 0].tolist() == [10, 1, 1, 1, 1, 11, 20, 2, 2, 2, 2, 21, 3, 3, 3, 3]
    assert positions[:, 0].tolist() == [0, 1, 1, 1, 1, 2, 3, 4, 4, 4, 4, 5, 6, 6, 6, 6]


def test_rotation_makes_attention_depend_on_distance_alone_and_leaves_position_zero_untouched():
    q, k = torch.randn(2, 1, 1, 1, 32)
    here, there = torch.tensor([[3, 1, 2]]), torch.tensor([[7, 5, 1]])

    def score(shift):
        return (
            rotate(q, rope_3d(here + shift, [8, 12, 12], 256))
            * rotate(k, rope_3d(there + shift, [8, 12, 12], 256))
        ).sum()

    torch.testing.assert_close(score(0), score(20), rtol=1e-4, atol=1e-4)
    assert torch.equal(rotate(q, rope_3d(torch.zeros(1, 3), [8, 12, 12], 256)), q)


@torch.no_grad()
def test_boundary_tokens_and_reference_latents_reach_the_target(tiny, photo, clip):
    condition = tiny.mm_encoder(["x"], [tiny.encode(photo), tiny.encode(clip)])
    noise, t = torch.randn(1, 16, 1, 8, 8), torch.tensor([0.5])
    velocity = tiny.velocity(noise, t, condition)
    swapped = Condition(condition.tokens, None, condition.references, condition.boundaries[::-1])
    assert not torch.allclose(tiny.velocity(noise, t, swapped), velocity)
    bare = Condition(condition.tokens, None, [], [])
    assert not torch.allclose(tiny.velocity(noise, t, bare), velocity)


# ----------------------------------------------------------------------------------------------------------
# 4. VAE
# ----------------------------------------------------------------------------------------------------------


def test_tiling_puts_a_signal_back_together_exactly():
    x = torch.randn(1, 2, 23, 50, 41)
    torch.testing.assert_close(tiled(lambda part: part, x, 3, 16, 12, 1), x)
    torch.testing.assert_close(
        tiled(lambda part: part.repeat_interleave(8, 4), x, 4, 16, 12, 8), x.repeat_interleave(8, 4)
    )

    def grow(part):  # as the decoder does: one frame for the first, four for each other
        return torch.cat([part[:, :, :1], part[:, :, 1:].repeat_interleave(4, 2)], 2)

    torch.testing.assert_close(tiled(grow, x, 2, 4, 3, 4, lead=1), grow(x))
    torch.testing.assert_close(
        tiled(lambda part: part[:, :, ::4], grow(x), 2, 16, 12, 1 / 4, lead=1), grow(x)[:, :, ::4]
    )


@torch.no_grad()
def test_large_frames_are_decoded_in_tiles_of_bounded_size(tiny):
    vae, seen = copy.deepcopy(tiny.vae), []
    vae.config.untiled_area = 128 * 128
    vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[2:]))
    pixels = vae.decode(torch.randn(1, 16, 7, 24, 40))
    assert pixels.shape == (1, 3, 25, 192, 320)
    assert max(t for t, _, _ in seen) <= 5 and max(h * w for _, h, w in seen) <= 32 * 32


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
    loss = flow_loss(lambda x, t: noise - data, data, noise, torch.rand(4), shift=5)
    assert loss.shape == (4,) and loss.max() == 0
    torch.testing.assert_close(sample(lambda x, t: noise - data, noise, 7, 5.0), data, rtol=1e-4, atol=1e-5)


def test_guidance_weights_are_the_release_formulas():
    v, text_dropped, image_dropped = torch.randn(3, 5)
    for w_text, w_image in ((5.0, 1.0), (7.0, 1.5), (1.0, 1.0)):
        weights = guidance_weights(w_text, w_image)
        ours = (
            weights["full"] * v
            + weights["text_dropped"] * text_dropped
            + weights["image_dropped"] * image_dropped
        )
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
            save_file(
                {name: parts[part][name].clone() for name in names if files[name] == file}, place / file
            )
        (place / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    model.mm_encoder.tokenizer.save(str(vlm / "tokenizer.json"))
    unused = {name for name in parts["ckpt"] if name.startswith(f"transformer.{MMDiT.UNUSED}")}
    parts["ckpt"]["mm_encoder.mm_encoder.model.visual.pos_embed.weight"] = torch.zeros(1)  # may be there, too
    torch.save({name: t for name, t in parts["ckpt"].items() if name not in unused}, folder / "vino.ckpt")


def test_public_file_layouts_and_our_own_load_to_the_same_picture(tiny, tmp_path):
    expected = picture(tiny)
    write_public_layout(tiny, tmp_path)
    assert torch.equal(picture(Vino.load(tmp_path, tiny.config)), expected)
    tiny.save(tmp_path / "own.safetensors")
    own = Vino.load(tmp_path / "own.safetensors")
    assert own.config == tiny.config and torch.equal(picture(own), expected)
    assert not list(tmp_path.glob("*.partial"))


def test_weights_that_do_not_fit_are_one_line_that_names_the_tensor_or_field(tiny, tmp_path):
    path = tmp_path / "weights.safetensors"
    tiny.save(path)
    tensors, metadata = (
        load_file(path),
        {"config": json.dumps(asdict(tiny.config)), "tokenizer": byte_tokenizer().to_str()},
    )

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
    assert "'mmdit.num_layers' is 4, and 3" in load(lambda t: t, other)
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
