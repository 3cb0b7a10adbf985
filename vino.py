"""VINO: one generator for images and videos, in one file, in the paper's order.

Text, reference images and a reference video go in; a new or an edited image or video comes out.

    0. Config                          every size, with the paper's as defaults
    1. Multi-modal conditions          (paper 2.1, figure 4)  frozen Qwen3-VL, learnable queries, connectors
    2. Interleaved omnimodal context   (paper 2.2, figure 5)  references and target on one timeline
    3. MMDiT                           (appendix A)           HunyuanVideo's diffusion transformer
    4. VAE                             (appendix A)           HunyuanVideo's causal 3D autoencoder
    5. Rectified flow and guidance     (appendix B)           loss, sampler, text and image guidance
    6. Vino                            all of it together: load, save, encode, velocity, generate

Parameters carry the public checkpoints' names, so that real weights load without a renaming table.
Shapes: B batch, L tokens, T frames, H height, W width, C channels, D width of a transformer.
"""

import json
import math
import pickle
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import DynamicCache, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision


class InputError(ValueError):
    """The user's mistake, in one line: what is wrong, where, and what would be right."""


# ----------------------------------------------------------------------------------------------------------
# 0. Config: field names are those of the public config files; a JSON file overrides fields by name
# ----------------------------------------------------------------------------------------------------------


def items(*values):
    return field(default_factory=lambda: list(values))


@dataclass
class TextConfig:
    """The language model of Qwen3-VL-4B-Instruct."""

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 262144
    rope_theta: float = 5e6
    mrope_section: list = items(24, 20, 20)  # frequencies of time, height, width
    tie_word_embeddings: bool = True


@dataclass
class VisionConfig:
    """The vision tower of Qwen3-VL-4B-Instruct and the pixels it gets."""

    depth: int = 24
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_heads: int = 16
    out_hidden_size: int = 2560
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: list = items(5, 11, 17)
    # The release resizes twice: each row is (multiple of pixels, least and most pixels). The second row of
    # `video_resize` counts the pixels of all frames together.
    image_resize: list = items([28, 4 * 28**2, 16384 * 28**2], [32, 2**16, 2**24])
    video_resize: list = items([28, 256 * 32**2, 768 * 28**2], [32, 2**12, 25165824])
    video_frames: int = 8  # appendix B


@dataclass
class MMDiTConfig:
    """HunyuanVideo's transformer, 13 billion parameters."""

    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 2
    patch_size_t: int = 1
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    rope_theta: float = 256.0
    rope_axes_dim: list = items(16, 56, 56)

    @property
    def width(self):
        return self.num_attention_heads * self.attention_head_dim


@dataclass
class VAEConfig:
    """HunyuanVideo's autoencoder: 8x smaller in height and width, 4x in time."""

    latent_channels: int = 16
    block_out_channels: list = items(128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.476986
    tile_frames: list = items(16, 12)  # (length, stride) of a tile, always used
    tile_pixels: list = items(256, 192)  # (side, stride) of a tile, for large frames only
    untiled_area: int = 2**19  # frames of up to so many pixels are not cut
    chunk_pixels: int = 2**20  # of all frames that are computed at once


@dataclass
class SamplingConfig:
    """The release's defaults; a pair is (for an image, for a video)."""

    image_size: list = items(640, 640)  # (height, width)
    video_size: list = items(480, 848)
    reference_area: int = 480 * 848
    frames: int = 85
    max_frames: int = 89
    max_images: int = 8
    fps: int = 24
    steps: int = 50
    shift: list = items(5.0, 7.0)
    cfg_text: list = items(5.0, 7.0)
    cfg_image: float = 1.0
    rewrite: bool = False  # ours: let the VLM expand prompts that have no references
    negative_prompt: list = items(
        "low quality, blurry, distorted, malformed, watermark, text",
        "low quality, blurry, distorted, malformed, flickering, jitter, watermark, text",
    )


@dataclass
class Config:
    """Everything that fixes a VINO; the defaults are the paper's full size (3.1, Base Models)."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    mmdit: MMDiTConfig = field(default_factory=MMDiTConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    num_queries: int = 256  # learnable tokens; 0 is the ablation of figure 8
    boundary_tokens: bool = True  # False is the ablation of figure 11
    training: dict = field(default_factory=dict)  # changes to table 1, by stage: see train.py

    @classmethod
    def from_dict(cls, overrides, base=None):
        """The defaults, or `base` in place, with `overrides`. An unknown field or a wrong type is an
        InputError that names it."""
        config = base or cls()
        try:
            override(config, overrides, "")
        except InputError as error:
            raise InputError(f"config: {error}") from error
        return config

    @classmethod
    def from_file(cls, path):
        """Like `from_dict`, from a JSON file."""
        return cls.from_dict(read_json(path))


def override(node, overrides, prefix):
    """Set the fields of the dataclass `node`, in place, to the values of the dictionary `overrides`."""
    if not isinstance(overrides, dict):
        raise InputError("should be an object in braces")
    for name, value in overrides.items():
        if name not in {f.name for f in fields(node)}:
            raise InputError(f"there is no field '{prefix}{name}'")
        current = getattr(node, name)
        if is_dataclass(current) and isinstance(value, dict):
            override(current, value, f"{prefix}{name}.")
        elif type(value) is type(current) or (type(value), type(current)) == (int, float):
            setattr(node, name, value)
        else:
            should = "an object" if is_dataclass(current) else type(current).__name__
            raise InputError(f"field '{prefix}{name}' is {type(value).__name__}, should be {should}")


# ----------------------------------------------------------------------------------------------------------
# 1. Multi-modal conditions (2.1, figure 4): what the frozen VLM reads and what comes out of it
# ----------------------------------------------------------------------------------------------------------

SYSTEM_PROMPT = "You are a helpful assistant aimed at generating an output video caption."
REWRITE_PROMPT = (
    "Rewrite this short prompt as one detailed caption of the picture or video it asks for. Name subjects, "
    "colours, background, light and motion, keep every fact, and answer with the caption alone.\n\n"
)
SPECIAL_TOKENS = (
    "<|im_end|> <|endoftext|> <|im_start|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()


def byte_tokenizer(special_tokens=SPECIAL_TOKENS, texts=()):
    """A tokenizer without a file, for tiny models: the 256 bytes (their printable symbols, sorted), each word
    of `texts` as a whole, then the special tokens."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(split.alphabet())
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, *sorted(words.difference(alphabet))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    return tokenizer


def letterbox_size(width, height, area, multiple=16):
    """(h, w), multiples of `multiple`, of the area closest to `area` at the aspect ratio width / height."""
    ratio = width / height
    middle = round(math.sqrt(area / ratio) / multiple)
    best = (math.inf,)
    for h in range(multiple * max(1, middle - 256), multiple * (middle + 257), multiple):
        for steps in (math.floor(ratio * h / multiple), math.ceil(ratio * h / multiple)):
            w = multiple * max(1, steps)
            best = min(best, (abs(h * w - area), abs(w / h - ratio), h, w))
    return best[2:]


def letterbox(image, area):
    """The PIL image scaled to fit `letterbox_size` and centred on white."""
    h, w = letterbox_size(*image.size, area)
    scale = min(w / image.width, h / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    corner = ((w - inner[0]) // 2, (h - inner[1]) // 2)
    canvas = Image.new("RGB", (w, h), "white")
    canvas.paste(image.convert("RGB").resize(inner, Image.LANCZOS), corner)
    return canvas


def video_size(width, height, area):
    """(h, w) of the given area at the aspect ratio width / height: the size at which a clip is read."""
    h = math.sqrt(area / (width / height))
    return round(h), round(h * (width / height))


def vlm_size(height, width, multiple, least, most, frames=1):
    """(h, w), multiples of `multiple` near the given size, with `least` to `most` pixels in all `frames`."""
    h = max(multiple, round(height / multiple) * multiple)
    w = max(multiple, round(width / multiple) * multiple)
    if frames * h * w > most:
        shrink = math.sqrt(frames * height * width / most)
        h = max(multiple, math.floor(height / shrink / multiple) * multiple)
        w = max(multiple, math.floor(width / shrink / multiple) * multiple)
    elif frames * h * w < least:
        grow = math.sqrt(least / (frames * height * width))
        h = math.ceil(height * grow / multiple) * multiple
        w = math.ceil(width * grow / multiple) * multiple
    return h, w


def to_frames(images):
    """PIL images of one size, or a uint8 array [T, H, W, 3] -> uint8 [T, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def bicubic(frames, size):
    """Antialiased resizing of [T, 3, H, W] to (h, w), in float32 and not clamped."""
    return F.interpolate(frames.float(), size, mode="bicubic", antialias=True)


def bicubic_uint8(frames, size):
    """The same for uint8: width first, 16-bit weights, rounded after each axis.

    This is torch's uint8 arithmetic on x86, which the release's image processor uses. It is written out
    because torch rounds differently on other processors and in other versions.
    """
    x = frames.double()
    for length in (size[1], size[0]):
        scale = x.shape[-1] / length
        centers = (torch.arange(length, dtype=x.dtype)[:, None] + 0.5) * scale
        d = ((torch.arange(x.shape[-1], dtype=x.dtype) + 0.5 - centers) / max(scale, 1.0)).abs()
        near, far = (1.5 * d - 2.5) * d * d + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2  # cubic kernel, a = -1/2
        weights = torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
        weights /= weights.sum(1, keepdim=True)
        one = 2.0 ** math.floor(math.log2((2**15 - 0.5) / weights.max()))
        weights = (weights * one + 0.5 * weights.sign()).trunc()
        x = ((x @ weights.T + one / 2) / one).floor().clamp(0, 255).mT
    return x


def fit_clip(clip, area=None):
    """A clip uint8 [T, H, W, 3], scaled to `area` pixels, if given, at its own aspect ratio, and cropped at
    bottom and right to multiples of 16 -> [T, 3, h, w] in 0..255."""
    height, width = clip.shape[1:3]
    h, w = video_size(width, height, area) if area else (height, width)
    if min(h, w) < 16:
        raise InputError(f"a frame of {width} x {height} is too narrow: one side gets less than 16 pixels")
    frames = bicubic(to_frames(clip), (h, w)).round().clamp(0, 255)
    return frames[..., : h // 16 * 16, : w // 16 * 16]


def normalize(frames):
    """[T, 3, H, W] in 0..255 -> [1, 3, T, H, W] in [-1, 1]."""
    return frames.transpose(0, 1)[None].float() / 127.5 - 1


def patchify(pixels, config):
    """Pixels as Qwen's vision tower takes them: merged 2 x 2 groups first, a lone frame repeated in time.

    Args:
        pixels: [B, 3, T, H, W] in [-1, 1]; H and W multiples of patch_size * spatial_merge_size.
        config: a VisionConfig.
    Returns:
        patches [B, t*h*w, 3 * temporal_patch_size * patch_size**2] and the grid (t, h, w).
    """
    p, m, q = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    repeats = -pixels.shape[2] % q
    pixels = torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, repeats, -1, -1)], dim=2)
    # [B, 3, T, H, W] -> [B, 3, t, q, h, m, p, w, m, p]
    x = pixels.unflatten(4, (-1, m, p)).unflatten(3, (-1, m, p)).unflatten(2, (-1, q))
    grid = (x.shape[2], x.shape[4] * m, x.shape[7] * m)
    return x.permute(0, 2, 4, 7, 5, 8, 1, 3, 6, 9).flatten(6).flatten(1, 5).contiguous(), grid


@dataclass
class Reference:
    """One reference image or video, once for each of its two readers (2.2)."""

    pixels: Tensor  # [B, 3, T, H, W] in [-1, 1], for the VAE; T = 1 for an image
    patches: Tensor  # [B, t*h*w, 3*2*16*16], for the VLM
    grid: tuple  # (t, h, w): patches along time, height and width
    is_video: bool

    @classmethod
    def image(cls, image, area, config):
        """A PIL image, letterboxed to `area` pixels. `config` is a VisionConfig."""
        image = letterbox(image, area)
        (h, w), rule = vlm_size(image.height, image.width, *config.image_resize[0]), config.image_resize[1]
        seen = to_frames([image.resize((w, h), Image.BICUBIC)])
        seen = bicubic_uint8(seen, vlm_size(h, w, *rule))
        return cls(normalize(to_frames([image])), *patchify(normalize(seen), config), is_video=False)

    @classmethod
    def video(cls, clip, frames, config, area=None):
        """A clip, uint8 [T, H, W, 3]. The VAE gets its first `frames` (4k + 1), at `area` pixels, if given,
        and the VLM 8 frames spread over all of it."""
        length, height, width = clip.shape[:3]
        if length < 5:
            raise InputError(f"the video has {length} frame(s), and the VAE needs at least 5")
        first = fit_clip(clip[: (min(frames, length) - 1) // 4 * 4 + 1], area)
        spread = torch.linspace(0, length - 1, config.video_frames).round().long()
        size, rule = vlm_size(height, width, *config.video_resize[0]), config.video_resize[1]
        seen = bicubic(to_frames(clip[spread]), size).round().clamp(0, 255)
        seen = bicubic(seen, vlm_size(*size, *rule, frames=len(spread)))
        return cls(normalize(first), *patchify(normalize(seen), config), is_video=True)


@dataclass
class EncodedReference:
    """A reference after both encoders. Neither depends on the prompt, so all guidance branches share it."""

    latents: Tensor  # [B, C, T, H, W], scaled
    features: Tensor  # [B, t*h*w / 4, D] of the VLM
    deepstack: list  # the same shape, for each of the VLM's deepstack layers
    grid: tuple
    is_video: bool


@dataclass
class Condition:
    """What the MMDiT is conditioned on."""

    tokens: Tensor  # [B, L, text_embed_dim]: prompt, then learnable queries
    mask: Tensor | None  # [B, L], True where valid; None where nothing is padded
    references: list  # latents [B, C, T, H, W] that stand in the visual sequence
    boundaries: list  # one (start, end) per reference, each [B, D]


@dataclass
class Prompt:
    """Figure 4's template, filled in and tokenised."""

    ids: list  # L token ids
    head: Tensor  # [3, H]: positions of what stands before the text
    starts: list  # for each reference, the index of its (first) start token
    ends: list  # and of its (last) end token

    @property
    def positions(self):
        """[3, L]: M-RoPE positions in time, height and width. Text counts on all three."""
        text = self.head.max() + 1 + torch.arange(len(self.ids) - self.head.shape[1])
        return torch.cat([self.head, text.expand(3, -1)], 1)


def plain_ids(tokenizer, text):
    """Token ids of a text that stays text: a special token spelled in it is not one."""
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


def build_prompt(tokenizer, text, references, merge):
    """Figure 4: system line, images, video, text. `references` need `grid` and `is_video`; `merge` is the
    VLM's spatial_merge_size."""
    head, before, behind = template(tokenizer, tuple((r.grid, r.is_video) for r in references), merge)
    return replace(head, ids=head.ids + plain_ids(tokenizer, before + text) + behind)


@lru_cache(maxsize=64)  # a batch's prompts have it in common
def template(tokenizer, references, merge):
    """What stands around a prompt's own text: a Prompt; the text between its end and the own one, with which
    that is tokenised as one; and the ids behind it. references: (grid, is_video) of each."""

    def special(name, h=1, w=1):  # a token as (id, height, width), of which all but images' are 1 x 1
        return [(tokenizer.token_to_id(f"<|{name}|>"), h, w)]

    def plain(text):
        return [(token, 1, 1) for token in plain_ids(tokenizer, text)]

    im_start, im_end, start, end = map(special, ("im_start", "im_end", "vision_start", "vision_end"))
    head = im_start + plain(f"system\n{SYSTEM_PROMPT}") + im_end + plain("\n") + im_start
    behind = im_end + plain("\n") + im_start + plain("assistant\n")
    before, first = "user\n", [0]  # first: how many start tokens stand before each reference
    for number, ((t, h, w), is_video) in enumerate(references, 1):
        h, w = h // merge, w // merge
        if not is_video:
            head += plain(f"{before}Image {number}: ") + start + special("image_pad", h, w) + end
        for pair in range(t if is_video else 0):  # two frames each; the release assumes 24 frames a second
            name = "" if pair else f"{before}Video 1: "
            moment = plain(f"{name}<{(2 * pair + 0.5) / 24:.1f} seconds>")
            head += moment + start + special("video_pad", h, w) + end
        before = ""
        first.append(first[-1] + (t if is_video else 1))

    ids, positions, offset = [], [], 0
    for token, h, w in head:
        ids += [token] * (h * w)
        positions += [(offset, offset + row, offset + column) for row in range(h) for column in range(w)]
        offset += max(h, w)
    starts, ends = ([i for i, x in enumerate(ids) if x == edge[0][0]] for edge in (start, end))
    starts, ends = [starts[i] for i in first[:-1]], [ends[i - 1] for i in first[1:]]
    return Prompt(ids, torch.tensor(positions).T, starts, ends), before, [token for token, _, _ in behind]


# Attention kernels that take any length as it comes: all but cuDNN's.
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention_kernels(length):
    """Context in which attention over fewer than 8192 tokens has no cuDNN kernel while gradients are wanted:
    it spends up to two seconds on each new length, and in training each step has another. Without gradients,
    where all steps are alike, it is the fastest; over 15,000 tokens with them, too (torch 2.11, H200)."""
    return sdpa_kernel(ANY_LENGTH) if torch.is_grad_enabled() and length < 8192 else nullcontext()


class Connector(nn.Module):
    """Two-layer MLP from the VLM's hidden states to the MMDiT (2.1)."""

    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.norm_qwen = nn.RMSNorm(in_dim, eps=1e-6)
        hidden = 4 * out_dim
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, out_dim))

    def forward(self, hidden):  # [..., in_dim] -> [..., out_dim]
        return self.mlp(self.norm_qwen(hidden))


class MultiModalEncoder(nn.Module):
    """Frozen Qwen3-VL, learnable queries behind the prompt, and the two connectors (2.1, figure 3 left)."""

    def __init__(self, config, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.merge, self.boundary_tokens = config.vision.spatial_merge_size, config.boundary_tokens
        self.mm_encoder = build_vlm(config)
        width = config.text.hidden_size
        self.metaquery = nn.Parameter(torch.randn(config.num_queries, width) / math.sqrt(width))
        self.connector = Connector(width, config.mmdit.text_embed_dim)
        self.connector_vae_branch = Connector(width, config.mmdit.width)
        self.mm_encoder.requires_grad_(False)

    def look(self, reference):
        """The vision tower: features [B, n, D] and, for each deepstack layer, features of that shape."""
        vision, (t, h, w) = self.mm_encoder.model.visual, reference.grid
        batch = reference.patches.shape[0]
        patches = reference.patches.flatten(0, 1).to(self.metaquery.device, vision.dtype)
        # Frames neither see nor count each other: B references are the frames of one long video.
        output = vision(patches, grid_thw=torch.tensor([[batch * t, h, w]], device=patches.device))
        features, deepstack = output[-2], output[-1]  # transformers 5's record ends in transformers 4's pair
        return features.unflatten(0, (batch, -1)), [layer.unflatten(0, (batch, -1)) for layer in deepstack]

    def read(self, prompts, references):
        """The VLM's penultimate hidden states for the prompts and, behind them, the learnable queries.

        The prompt runs once without gradient and leaves its keys and values; the queries run against those,
        with gradient. Attention is causal, so this equals one pass over both, and training memory does not
        depend on the prompt's length.

        Args:
            prompts: B texts. references: EncodedReferences of batch size B (or 1), images before the video.
        Returns:
            hidden [B, L, D], mask [B, L] or None, and where the boundary tokens are, starts and ends [B, R].
        """
        batch = [build_prompt(self.tokenizer, text, references, self.merge) for text in prompts]
        cache = DynamicCache()
        with torch.no_grad():
            hidden, positions, mask = self.prefill(batch, references, cache)[1:]
        pad = torch.tensor([[hidden.shape[1] - len(prompt.ids)] for prompt in batch])
        edges = torch.tensor([batch[0].starts, batch[0].ends], dtype=torch.long)[:, None]  # alike in all
        starts, ends = (edges + pad).to(hidden.device)
        queries = self.metaquery.to(hidden.dtype).expand(len(batch), -1, -1)
        # The release starts the queries' positions at the last prompt token's, not one after it.
        positions = positions[:, :, -1:] + torch.arange(queries.shape[1], device=hidden.device)
        if queries.shape[1]:
            mask = mask if mask is None else F.pad(mask, (0, queries.shape[1]), value=True)
            hidden = torch.cat([hidden, self.language(queries, positions, mask, cache)[1]], 1)
        return hidden, mask, starts, ends

    def prefill(self, batch, references, cache):
        """Run Prompts with their references' features through the language model, which leaves their keys and
        values in `cache`. Returns its last states and its penultimate ones, both [B, L, D], positions
        [3, B, L], and mask [B, L], or None where nothing is padded."""
        device, longest = self.metaquery.device, max(batch, key=lambda prompt: len(prompt.ids))
        pad = [len(longest.ids) - len(prompt.ids) for prompt in batch]  # on the left
        filler = self.tokenizer.token_to_id("<|endoftext|>")
        ids = torch.tensor([[filler] * n + prompt.ids for n, prompt in zip(pad, batch)], device=device)
        place = torch.arange(len(longest.ids)) - torch.tensor(pad)[:, None]  # [B, L], in the prompt
        # The references are the same in all, so the others' positions are how the longest one's begin.
        positions = longest.positions[:, place.clamp(min=0)].to(device)
        mask = (place >= 0).to(device) if any(pad) else None
        embeds, deepstack, where = self.mm_encoder.model.language_model.embed_tokens(ids), None, None
        if references:
            pads = [self.tokenizer.token_to_id(name) for name in ("<|image_pad|>", "<|video_pad|>")]
            where = torch.isin(ids, torch.tensor(pads, device=device))
            levels = zip(*[[r.features, *r.deepstack] for r in references])
            features, *deepstack = [
                torch.cat([part.expand(len(batch), -1, -1) for part in level], 1).flatten(0, 1)
                for level in levels
            ]
            embeds = embeds.masked_scatter(where[..., None], features.to(embeds.dtype))
        return *self.language(embeds, positions, mask, cache, where, deepstack), positions, mask

    def language(self, embeds, positions, mask, cache, visual_mask=None, deepstack=None):
        """The language model's last states, and the penultimate ones, which enter its last layer. Shapes:
        embeds [B, L, D], positions [3, B, L], mask [B, all tokens so far]."""
        model, entered = self.mm_encoder.model.language_model, []
        order = cache.get_seq_length() + torch.arange(embeds.shape[1], device=embeds.device)
        order = order.expand(1, embeds.shape[0], -1)  # with this fourth row the mask is plainly causal
        watched = model.layers[-1].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        with watched, sdpa_kernel(ANY_LENGTH):  # each prompt has a length of its own
            # By position up to the embeddings: transformers 4 and 5 name the cache differently.
            output = model(
                None,
                None if mask is None else mask.long(),
                torch.cat([order, positions]),
                cache,
                embeds,
                use_cache=True,
                visual_pos_masks=visual_mask,
                deepstack_visual_embeds=deepstack,
            )
        return output.last_hidden_state, entered[0]

    def forward(self, prompts, references, vae_branch=True):
        """Condition for the MMDiT. With `vae_branch` off the references reach the VLM only (image
        reconstruction, appendix B)."""
        hidden, mask, starts, ends = self.read(prompts, references)
        rows, latents, boundaries = torch.arange(len(prompts), device=hidden.device)[:, None], [], []
        weights = self.connector.mlp[0].weight.dtype
        if references and vae_branch:
            latents = [r.latents.expand(len(prompts), -1, -1, -1, -1) for r in references]
            if self.boundary_tokens:
                edges = torch.stack([hidden[rows, starts], hidden[rows, ends]], 2).to(weights)  # [B, R, 2, D]
                boundaries = [pair.unbind(1) for pair in self.connector_vae_branch(edges).unbind(1)]
        return Condition(self.connector(hidden.to(weights)), mask, latents, boundaries)

    @torch.no_grad()
    def answer(self, prompts, references=(), max_new_tokens=200):
        """What the VLM itself says to the prompts and EncodedReferences: B texts. Greedy, so repeatable."""
        batch = [build_prompt(self.tokenizer, text, references, self.merge) for text in prompts]
        cache, end, ids = DynamicCache(), self.tokenizer.token_to_id("<|im_end|>"), []
        last, _, positions, mask = self.prefill(batch, references, cache)
        done = torch.zeros(len(batch), dtype=torch.bool, device=last.device)
        while len(ids) < max_new_tokens and not done.all():
            ids.append(self.mm_encoder.lm_head(last[:, -1]).argmax(-1).masked_fill(done, end))
            done |= ids[-1] == end
            positions = positions.amax((0, 2), keepdim=True).expand(3, -1, 1) + 1  # text counts on all axes
            mask = mask if mask is None else F.pad(mask, (0, 1), value=True)
            embeds = self.mm_encoder.model.language_model.embed_tokens(ids[-1][:, None])
            last = self.language(embeds, positions, mask, cache)[0]
        rows = torch.stack(ids, 1).tolist()
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    def rewrite(self, prompts):
        """Let the VLM expand short prompts into long ones (the paper's dagger)."""
        return self.answer([REWRITE_PROMPT + prompt for prompt in prompts])


def frame_attention(attention, x, cu_seqlens, position_embeddings, **_):
    """The vision tower's attention, over frames of one size [frames * tokens, D], in one kernel. transformers
    starts one for each frame: with 128 images in a batch of the tiny model 512 times for 4 layers."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    frames = len(cu_seqlens) - 1
    return attention.proj(attend(*[part.unflatten(0, (frames, -1)) for part in (q, k, v)]).flatten(0, 1))


def rms_norm(norm, x):
    """The language model's norm in one kernel. transformers' takes eight, and to launch them takes most of a
    prompt's time on a GPU."""
    return F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.variance_epsilon)


def build_vlm(config):
    """Qwen3-VL of the config's sizes, with random weights; transformers knows the architecture."""
    text, vision = asdict(config.text), asdict(config.vision)
    for ours in ("image_resize", "video_resize", "video_frames"):
        del vision[ours]
    rope = {"rope_type": "default", "mrope_section": text.pop("mrope_section"), "mrope_interleaved": True}
    text["rope_scaling"] = rope  # transformers 5 calls it rope_parameters, and still takes the old name
    tie = text["tie_word_embeddings"]
    both = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie)
    vlm = Qwen3VLForConditionalGeneration(both).eval()
    for block in vlm.model.visual.blocks:
        block.attn.forward = partial(frame_attention, block.attn)
    for module in vlm.model.language_model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(rms_norm, module)
    return vlm


# ----------------------------------------------------------------------------------------------------------
# 2. Interleaved omnimodal context (2.2, figure 5): references, boundary tokens and target on one timeline
# ----------------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """A piece of the visual sequence: a boundary token (shape 1 x 1 x 1) or a block of latent patches."""

    kind: str  # "start", "reference", "end" or "target"
    time: int  # where it begins on the RoPE time axis
    shape: tuple  # (T, H, W) in patches

    @property
    def tokens(self):
        return math.prod(self.shape)

    def positions(self):
        """[tokens, 3]: (t, h, w) of every token; height and width count from 0 in each block."""
        t, h, w = (torch.arange(n) for n in self.shape)
        return torch.stack(torch.meshgrid(self.time + t, h, w, indexing="ij"), -1).flatten(0, 2)


def timeline(references, target, boundaries=True):
    """Figure 5 as a list of Blocks: every reference between its two boundary tokens, then the target.

    Args: shapes (T, H, W) in patches; without `boundaries` blocks follow each other directly (figure 11)."""
    blocks, time = [], 0
    for shape in references:
        pieces = [("start", (1, 1, 1)), ("reference", shape), ("end", (1, 1, 1))]
        for kind, size in pieces if boundaries else pieces[1:2]:
            blocks.append(Block(kind, time, size))
            time += size[0]
    return [*blocks, Block("target", time, target)]


def pack(references, boundaries, target):
    """One sequence of references, boundary tokens and noisy target, and where each token stands (figure 5).

    Args:
        references: patch embeddings [B, D, T, H, W], in the prompt's order.
        boundaries: for each reference its (start, end), each [B, D]: the tokens that wrap it in the VLM,
            projected. Empty: no boundary tokens.
        target: patch embeddings [B, D, T, H, W] of the noisy target.
    Returns:
        tokens [B, L, D], the target's last, and positions [L, 3] in (time, height, width).
    """
    tokens = []
    for k, reference in enumerate(references):
        block = reference.flatten(2).transpose(1, 2)
        start_end = [token[:, None].to(block.dtype) for token in boundaries[k]] if boundaries else []
        tokens += [*start_end[:1], block, *start_end[1:]]
    tokens.append(target.flatten(2).transpose(1, 2))
    blocks = timeline([r.shape[2:] for r in references], target.shape[2:], bool(boundaries))
    return torch.cat(tokens, 1), torch.cat([block.positions() for block in blocks]).to(target.device)


def rope_3d(positions, axes_dim, theta):
    """Rotation of every token: angles position * theta**(-2i/d), with a share d of the head for each axis.

    Args: positions [L, 3]; axes_dim: three even numbers that add up to the head's size.
    Returns: (cos, sin), [L, 1, head / 2, 1] and [L, 1, head / 2, 2] with the signs that `rotate` needs."""
    angles = []
    for position, dim in zip(positions.unbind(-1), axes_dim, strict=True):
        frequencies = theta ** -(torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
        angles.append(position[:, None].float() * frequencies)
    angles = torch.cat(angles, -1)[:, None, :, None]
    return angles.cos(), torch.cat([-angles.sin(), angles.sin()], -1)


def rotate(x, rope):
    """Turn neighbouring pairs of channels, x [B, L, heads, head], by the angles of `rope_3d`: (a, b) becomes
    (a cos - b sin, b cos + a sin)."""
    cos, sin = rope
    pairs = x.float().unflatten(-1, (-1, 2))
    return (pairs * cos).addcmul_(pairs.flip(-1), sin).flatten(-2).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------
# 3. MMDiT (appendix A): dual-stream blocks, then single-stream blocks, modulated by the timestep
# ----------------------------------------------------------------------------------------------------------


def attend(q, k, v, mask=None):
    """Softmax attention, q, k, v [B, L, heads, head] -> [B, L, D]. `mask` is True where a key may be seen."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    with attention_kernels(q.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def sinusoid(t, dim=256):
    """Sinusoidal features [B, dim] of t [B], cosines first, in float32."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def modulate(x, shift, scale):
    """LayerNorm without parameters, then scale and shift from the timestep."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Modulation(nn.Module):
    """The timestep embedding [B, D] as `count` vectors [B, 1, D]: shifts, scales and gates."""

    def __init__(self, width, count):
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)

    def forward(self, embedding):
        return self.linear(F.silu(embedding))[:, None].chunk(self.count, -1)


class Embedder(nn.Module):
    """Two-layer MLP for timestep, guidance and pooled text."""

    def __init__(self, in_dim, width):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


gelu = partial(F.gelu, approximate="tanh")


class FeedForward(nn.Module):
    """Two-layer MLP of a block."""

    def __init__(self, config, activation=gelu):
        super().__init__()
        width, hidden, self.activation = config.width, int(config.width * config.mlp_ratio), activation
        first = nn.ModuleDict({"proj": nn.Linear(width, hidden)})
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(hidden, width)])

    def forward(self, x):
        return self.net[2](self.activation(self.net[0]["proj"](x)))


class Attention(nn.Module):
    """Query, key and value of one stream."""

    def __init__(self, config, norm=True, out=True):
        super().__init__()
        width, head, self.heads = config.width, config.attention_head_dim, config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(head, eps=1e-6) if norm else nn.Identity() for _ in range(2))
        if out:
            self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def qkv(self, x):  # [B, L, D] -> 3 x [B, L, heads, head]
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v


class JointAttention(Attention):
    """Attention over both streams: the text has projections of its own."""

    def __init__(self, config):
        super().__init__(config)
        width, head = config.width, config.attention_head_dim
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
        self.norm_added_q, self.norm_added_k = (nn.RMSNorm(head, eps=1e-6) for _ in range(2))
        self.to_add_out = nn.Linear(width, width)

    def text_qkv(self, x):
        layers = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in layers)
        return self.norm_added_q(q), self.norm_added_k(k), v


class DualBlock(nn.Module):
    """Two streams with weights of their own that meet in one attention."""

    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm1_context = Modulation(config.width, 6), Modulation(config.width, 6)
        self.attn = JointAttention(config)
        self.ff, self.ff_context = FeedForward(config), FeedForward(config)

    def forward(self, x, text, embedding, context):
        """x [B, Lv, D] visual, text [B, Lt, D]; both come back in the same shapes."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1(embedding)
        t_shift, t_scale, t_gate, t_shift_ff, t_scale_ff, t_gate_ff = self.norm1_context(embedding)

        visual_qkv = self.attn.qkv(modulate(x, shift, scale))
        text_qkv = self.attn.text_qkv(modulate(text, t_shift, t_scale))
        attended = context.attend(*[context.join(*pair) for pair in zip(visual_qkv, text_qkv)])
        visual_attended, text_attended = context.part(attended)

        x = x + gate * self.attn.to_out[0](visual_attended)
        x = x + gate_ff * self.ff(modulate(x, shift_ff, scale_ff))
        text = text + t_gate * self.attn.to_add_out(text_attended)
        text = text + t_gate_ff * self.ff_context(modulate(text, t_shift_ff, t_scale_ff))
        return x, text


class SingleBlock(nn.Module):
    """One stream of visual tokens and text; attention and feed-forward side by side."""

    def __init__(self, config):
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.norm = Modulation(width, 3)
        self.attn = Attention(config, out=False)
        self.proj_mlp = nn.Linear(width, hidden)
        self.proj_out = nn.Linear(width + hidden, width)

    def forward(self, x, embedding, context):  # x [B, L, D] -> [B, L, D]
        shift, scale, gate = self.norm(embedding)
        normed = modulate(x, shift, scale)
        attended = context.attend(*self.attn.qkv(normed))
        # proj_out of both side by side, as two products: that saves a copy of 5 D for each token.
        of_attention, of_mlp = self.proj_out.weight.split([attended.shape[-1], self.proj_mlp.out_features], 1)
        output = F.linear(attended, of_attention, self.proj_out.bias)
        return x + gate * (output + F.linear(gelu(self.proj_mlp(normed)), of_mlp))


class RefinerBlock(nn.Module):
    """A plain transformer block over the text, gated by timestep and pooled text."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(config, norm=False)
        self.ff = FeedForward(config, F.silu)
        self.norm_out = Modulation(width, 2)

    def forward(self, x, embedding, mask):
        gate, gate_ff = self.norm_out(embedding)
        x = x + gate * self.attn.to_out[0](attend(*self.attn.qkv(self.norm1(x)), mask))
        return x + gate_ff * self.ff(self.norm2(x))


class TokenRefiner(nn.Module):
    """Fits the conditioning tokens to the MMDiT before the first block."""

    def __init__(self, config):
        super().__init__()
        width, text = config.width, config.text_embed_dim
        inputs = {"timestep_embedder": 256, "text_embedder": text}
        self.time_text_embed = nn.ModuleDict({name: Embedder(n, width) for name, n in inputs.items()})
        self.proj_in = nn.Linear(text, width)
        blocks = nn.ModuleList([RefinerBlock(config) for _ in range(config.num_refiner_layers)])
        self.token_refiner = nn.ModuleDict({"refiner_blocks": blocks})

    def embed(self, tokens, mask):
        """What no timestep changes: tokens [B, L, text_embed_dim] and their mean -> [B, L, D] and [B, D]."""
        if mask is None:
            pooled = tokens.mean(1)
        else:
            pooled = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.proj_in(tokens), self.time_text_embed["text_embedder"](pooled)

    def forward(self, x, pooled, mask, timestep):
        """x and pooled from `embed`, mask [B, L] or None, timestep [B] in 0-999 -> [B, L, D]."""
        embedding = self.time_text_embed["timestep_embedder"](sinusoid(timestep)) + pooled
        seen = None if mask is None else mask[:, None, None]
        for block in self.token_refiner["refiner_blocks"]:
            x = block(x, embedding, seen)
        return x


class MMDiT(nn.Module):
    """HunyuanVideo's transformer over the interleaved context: predicts the target's velocity."""

    UNUSED = "time_text_embed.text_embedder."  # CLIP's pooled text: in the base checkpoint, not in VINO

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.width
        self.patch = (config.patch_size_t, config.patch_size, config.patch_size)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv3d(config.in_channels, width, *[self.patch] * 2)})
        self.context_embedder = TokenRefiner(config)
        pooled = config.pooled_projection_dim
        inputs = {"timestep_embedder": 256, "guidance_embedder": 256, "text_embedder": pooled}
        self.time_text_embed = nn.ModuleDict({name: Embedder(n, width) for name, n in inputs.items()})
        self.transformer_blocks = nn.ModuleList([DualBlock(config) for _ in range(config.num_layers)])
        singles = [SingleBlock(config) for _ in range(config.num_single_layers)]
        self.single_transformer_blocks = nn.ModuleList(singles)
        self.norm_out = Modulation(width, 2)
        self.proj_out = nn.Linear(width, math.prod(self.patch) * config.out_channels)

    def blocks(self):
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    def context(self, conditions, shape, crew=None):
        """What no step changes: the Context of guidance branches that run together.

        Args: the branches' Conditions, of one batch size; the shape (T, H, W) of the target's latents. A Crew
        of several processes takes one branch."""
        crew, config, embed = crew or Crew(), self.config, self.x_embedder["proj"]
        grid, dtype = [n // size for n, size in zip(shape, self.patch)], embed.weight.dtype
        fixed, text, positions, masks = [], [], [], []
        for condition in conditions:
            mask, references = condition.mask, [embed(latents.to(dtype)) for latents in condition.references]
            tokens, pooled = self.context_embedder.embed(condition.tokens.to(dtype), mask)
            blank = tokens.new_zeros(len(tokens), config.width, *grid)  # each step has its own target
            packed, where = pack(references, condition.boundaries, blank)
            fixed.append(packed[:, : -math.prod(grid)].clone())  # a view would keep all of it
            text.append((tokens, pooled, mask))
            # Text is not rotated: position 0 on every axis is the rotation by nothing.
            positions += [where, where.new_zeros(tokens.shape[1], 3)]
            if mask is not None:  # every visual token is seen
                mask = crew.joint(mask.new_ones(packed.shape[:2]), mask)[:, None, None]
            masks.append(mask)
        visual, words = [len(part) for part in positions[::2]], [len(part) for part in positions[1::2]]
        positions = torch.cat([crew.own(part, 0) for part in positions])
        rope = rope_3d(positions, config.rope_axes_dim, config.rope_theta)
        # The distilled guidance input is kept, at a constant.
        guidance = sinusoid(torch.full((1,), 1000.0, device=positions.device))
        guidance = self.time_text_embed["guidance_embedder"](guidance)
        return Context(fixed, text, visual, words, masks, rope, guidance, crew)

    def forward(self, latents, t, context):
        """Velocities [branches, B, C, T, H, W] of the noisy target `latents` [B, C, T, H, W] at time t [B] in
        [0, 1], 1 = noise, in each branch of a Context of the same batch size. A process of a crew returns the
        velocity of its own tokens, and zero elsewhere."""
        target = self.x_embedder["proj"](latents.to(self.x_embedder["proj"].weight.dtype))
        timestep = 999 * t
        embedding = self.time_text_embed["timestep_embedder"](sinusoid(timestep)) + context.guidance
        texts = [self.context_embedder(*part, timestep) for part in context.text]
        x, text = context.streams(target.flatten(2).transpose(1, 2), texts)

        for block in self.transformer_blocks:
            x, text = block(x, text, embedding, context)
        x = context.join(x, text)
        for block in self.single_transformer_blocks:
            x = block(x, embedding, context)

        scale, shift = self.norm_out(embedding)
        velocity = self.proj_out(modulate(context.part(x)[0], shift, scale))
        return torch.stack([self.unpatchify(part, target.shape[2:]) for part in context.targets(velocity)])

    def unpatchify(self, x, shape):  # [B, T*H*W, C * patch] -> [B, C, T, H, W]
        x = x.unflatten(-1, (-1, *self.patch)).unflatten(1, tuple(shape))  # [B, T, H, W, C, pt, ph, pw]
        return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)

    def flops(self, context):
        """Operations of one process of the crew in a forward: a token takes 2 for each weight of the blocks,
        and 4 D for each token that it attends to."""
        config, total = self.config, 0
        weights = (4 + 2 * config.mlp_ratio) * config.width**2  # of one stream, in blocks of all three kinds
        depth = config.num_layers + config.num_single_layers
        for visual, words in zip(context.visual, context.words):
            for layers, length in ((depth, visual + words), (config.num_refiner_layers, words)):
                total += layers * length * (2 * weights + 4 * config.width * length)
        return total * len(context.fixed[0]) / context.crew.size


# --- Several guidance branches in one forward, and several GPUs for one branch -----------------------------


@dataclass
class Context:
    """Guidance branches as the MMDiT sees them: all that no step changes.

    They stand one behind the other in one sequence. Every layer but attention takes each token by itself, so
    branches of any lengths run together without padding."""

    fixed: list  # of each branch, [B, L, D]: the packed references, which the target follows
    text: list  # of each branch, what TokenRefiner.forward gets: tokens [B, L, D], their mean [B, D], mask
    visual: list  # of each branch, the number of visual tokens, the target's among them
    words: list  # of each branch, the number of text tokens
    masks: list  # of each branch, [B, 1, 1, L], True where a key may be seen; None where nothing is padded
    rope: tuple  # (cos, sin) of the crew's share of the sequence
    guidance: Tensor  # [1, D], embedded
    crew: "Crew"  # the processes that share each stream's tokens: one, or there is one branch

    def streams(self, target, texts):
        """Our share of both streams, [B, L, D]. target: its tokens; texts: of each branch, refined."""
        visual = torch.cat([part for fixed in self.fixed for part in (fixed, target)], 1)
        return self.crew.own(visual), self.crew.own(joined(texts))

    def targets(self, x):
        """The target's tokens in each branch, from our share of the visual stream; others' are zero."""
        branches = self.crew.alone(x, sum(self.visual)).split(self.visual, 1)
        return [branch[:, fixed.shape[1] :] for branch, fixed in zip(branches, self.fixed)]

    def lengths(self):
        """Of our share, [visual, words, visual, words, ...] of the branches."""
        return [self.crew.shares(n)[self.crew.rank] for pair in zip(self.visual, self.words) for n in pair]

    def join(self, visual, text):
        """Two streams -> one, in which each branch has its visual tokens first and then its text."""
        lengths = self.lengths()
        pairs = zip(visual.split(lengths[::2], 1), text.split(lengths[1::2], 1))
        return torch.cat([part for pair in pairs for part in pair], 1)

    def part(self, x):
        """The reverse of `join`."""
        parts = x.split(self.lengths(), 1)
        return joined(parts[::2]), joined(parts[1::2])

    def attend(self, q, k, v):
        """Rotate, and let each branch attend to itself: 3 x [B, L, heads, head] -> [B, L, D]."""
        q, k = rotate(q, self.rope), rotate(k, self.rope)
        if self.crew.size > 1:
            return self.crew.attend(q, k, v, self.masks[0], self.visual[0], self.words[0])
        lengths = [sum(pair) for pair in zip(self.visual, self.words)]
        branches = zip(*(x.split(lengths, 1) for x in (q, k, v)), self.masks)
        return joined([attend(*branch) for branch in branches])


def joined(parts):
    """Pieces [B, L, ...] one behind the other. torch.cat alone would copy even a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


# Guidance branches of up to so many visual tokens run together: small ones alone leave a GPU half idle.
# Larger ones fill it, and together would only take the memory of all.
TOGETHER = 8192


def arrange(mmdit, conditions, shape, crew):
    """The Contexts of all guidance branches: one while they are small, else one each."""
    sizes = [math.prod(shape) + sum(math.prod(x.shape[2:]) for x in c.references) for c in conditions]
    visual = len(conditions[0].tokens) * max(sizes) // math.prod(mmdit.patch)
    if crew.size > 1 or visual > TOGETHER:
        return [mmdit.context([condition], shape, crew) for condition in conditions]
    return [mmdit.context(conditions, shape)]


@dataclass
class Crew:
    """Processes that run a guidance branch together ("Ulysses"), each with a share of its tokens. In
    attention, where tokens meet, each has all tokens instead, and a share of the heads. Their number must
    divide the number of heads. A process by itself is a crew, too."""

    group: dist.ProcessGroup | None = None
    size: int = 1
    rank: int = 0

    def shares(self, length):
        """How many of `length` tokens each process has, as by tensor_split."""
        return [(length + self.size - 1 - rank) // self.size for rank in range(self.size)]

    def own(self, x, dim=1):
        """This process's share of x; of several a copy: for a view torch.compile would make another graph."""
        return x if self.size == 1 else x.tensor_split(self.size, dim)[self.rank].clone()

    def alone(self, x, length):
        """This process's share among those of the others, which are zero: [B, own, D] -> [B, length, D]."""
        before = sum(self.shares(length)[: self.rank])
        return F.pad(x, (0, 0, before, length - before - x.shape[1]))

    def joint(self, visual, text):
        """[B, Lv, ...] and [B, Lt, ...] in the order of `attend`: visual tokens and text of each process."""
        pairs = zip(visual.tensor_split(self.size, 1), text.tensor_split(self.size, 1))
        return torch.cat([part for pair in pairs for part in pair], 1)

    @torch.compiler.disable  # a compiled block is cut in two here
    def attend(self, q, k, v, mask, visual, words):
        """Attention over everyone's tokens, q, k, v [B, own, heads, head] -> [B, own, D]. visual, words: how
        many tokens of each kind all processes have together."""
        lengths = [sum(pair) for pair in zip(self.shares(visual), self.shares(words))]
        own = [lengths[self.rank]] * self.size
        x = torch.cat([q, k, v]).unflatten(2, (self.size, -1)).permute(2, 1, 0, 3, 4).contiguous()
        tokens = x.new_empty(sum(lengths), *x.shape[2:])  # [L, 3 B, heads / size, head]
        dist.all_to_all_single(tokens, x.flatten(0, 1), lengths, own, self.group)
        x = attend(*tokens.transpose(0, 1).chunk(3), mask).transpose(0, 1).contiguous()  # [L, B, D / size]
        heads = x.new_empty(sum(own), *x.shape[1:])
        dist.all_to_all_single(heads, x, own, lengths, self.group)
        return heads.unflatten(0, (self.size, -1)).permute(2, 1, 0, 3).flatten(2)


@lru_cache  # groups are made once, by all processes
def divide(branches, group):
    """Divide a group of processes into crews: one for each guidance branch, if that comes out even, else one
    for all branches. Returns the number of crews, which of them this process is in, and that one."""
    count = branches if group.size() % branches == 0 else 1
    size = group.size() // count
    crew, _ = dist.new_subgroups(size, group)
    return count, group.rank() // size, Crew(crew, size, crew.rank())


# ----------------------------------------------------------------------------------------------------------
# 4. VAE (appendix A): HunyuanVideo's causal 3D autoencoder
# ----------------------------------------------------------------------------------------------------------


def layout(x):
    """The memory format of the faster convolutions."""
    return torch.channels_last_3d if x.is_cuda else torch.contiguous_format


def empty(shape, like):
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout(like))


def norm_factors(norm, chunks):
    """GroupNorm of a clip in chunks as a factor and a summand for each channel, both [B, C, 1, 1, 1].

    They come from float32 sums over rows, which are short and so exact, do not depend on the chunks, and are
    enough to keep a GPU busy. Channels come last, as in its memory: otherwise sums are 40 times as slow.
    """
    sums = []
    for x in chunks:
        rows = x.permute(0, 2, 3, 4, 1)
        norms = torch.linalg.vector_norm(rows, dim=3, dtype=torch.float32)
        sums.append(torch.stack([rows.sum(3, dtype=torch.float32), norms.square()]))
    groups = norm.num_groups  # [2, B, T, H, groups, C / groups] -> two of [B, groups, 1]
    mean, square = torch.cat(sums, 2).unflatten(4, (groups, -1)).mean((2, 3, 5)).unsqueeze(3) / x.shape[4]
    factor = norm.weight.view(groups, -1) * (square - mean.square() + norm.eps).rsqrt()
    summand = norm.bias.view(groups, -1) - mean * factor
    return [v.flatten(1)[..., None, None, None].to(x.dtype) for v in (factor, summand)]


def padded(x, factors, before, past):
    """x [B, C, T, H, W], or with factors silu(factor * x + summand), its edges in space repeated once.

    In time it follows the frames `before` (padded ones), or its own first frame, `past` times. It is written
    but once: a large VAE takes as long over memory as over convolutions.
    """
    (b, c, t, h, w), begin = x.shape, past if before is None else before.shape[2]
    y = empty((b, c, begin + t, h + 2, w + 2), x)
    new = y[:, :, begin:]
    if factors:
        torch.addcmul(factors[1], x, factors[0], out=new[..., 1:-1, 1:-1])
        F.silu(new, inplace=True)  # with its edges, which are not yet set: it is fastest in one piece
    else:
        new[..., 1:-1, 1:-1] = x
    for outer, inner in ((0, 1), (-1, -2)):
        new[:, :, :, outer] = new[:, :, :, inner]
        new[..., outer] = new[..., inner]
    y[:, :, :begin] = new[:, :, :1] if before is None else before
    return y


def causal_conv(chunks, weight, bias, stride=(1, 1, 1), norm=None):
    """A convolution over repeated edges, in space on both sides, in time in the past only; with a norm, of
    silu(norm(x)).

    A clip comes in chunks of frames [B, C, T, H, W] and leaves in chunks, each as soon as it is done. A chunk
    sees the end of the one before it, so that the result is that of the clip in one piece. Gradients need all
    in memory anyway: with them a clip is one chunk, and torch's own functions do.
    """
    past, kept, before = weight.shape[2] - 1, weight.shape[2] - stride[0], None
    if torch.is_grad_enabled():
        [x] = chunks
        x = F.pad(F.silu(norm(x)) if norm else x, (1, 1, 1, 1, past, 0), mode="replicate")
        yield F.conv3d(x, weight, bias, stride)
        return
    weight = weight.contiguous(memory_format=layout(weight))
    factors = norm_factors(norm, chunks) if norm else None
    for x in chunks:
        x = padded(x, factors, before, past)
        before = x[:, :, -kept:]
        yield F.conv3d(x, weight, bias, stride)


class CausalConv3d(nn.Module):
    """`causal_conv` with weights of its own."""

    def __init__(self, in_channels, out_channels, kernel=3, stride=1):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride)

    def forward(self, chunks, norm=None):
        return causal_conv(chunks, self.conv.weight, self.conv.bias, self.conv.stride, norm)


class Resnet(nn.Module):
    """Its result takes the place of its input, chunk by chunk: at the large end memory holds little else."""

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        if in_channels != out_channels:
            self.conv_shortcut = CausalConv3d(in_channels, out_channels, kernel=1)

    def forward(self, chunks):
        hidden = []
        for i, h in enumerate(self.conv1(chunks, self.norm1)):
            hidden.append(h)
            if hasattr(self, "conv_shortcut"):
                chunks[i] = self.conv_shortcut.conv(chunks[i])
        for i, h in enumerate(self.conv2(hidden, self.norm2)):
            chunks[i] = chunks[i] + h
        return chunks


class FrameAttention(nn.Module):
    """Single-head attention in which a frame sees itself and the past."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        tokens = self.group_norm(x).permute(0, 2, 3, 4, 1).flatten(2, 3)[:, None]  # [B, 1, T, H*W, C]
        q, k, v = (layer(tokens) for layer in (self.to_q, self.to_k, self.to_v))
        # One frame at a time needs neither a mask nor its quadratic memory. Without an axis for heads torch
        # would write down all scores, in float32.
        frames = [
            F.scaled_dot_product_attention(q[:, :, t], *(z[:, :, : t + 1].flatten(2, 3) for z in (k, v)))
            for t in range(x.shape[2])
        ]
        return x + self.to_out[0](torch.cat(frames, 1)).unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3)


class Downsample(nn.Module):
    """A causal convolution with a stride."""

    def __init__(self, channels, factor):
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=factor)  # factor = (time, height, width)

    def forward(self, chunks):
        return self.conv(chunks)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling and a causal convolution of kernel 3, in one step on the small side.

    Where an axis doubles, output 2i sees x[i-1], x[i], x[i], and output 2i + 1 sees x[i], x[i], x[i+1]: two
    taps, one of them a sum, do for three. All 2 x 2 (x 2) kinds of output are channels of one convolution.
    """

    TAPS = [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]  # [kind of output, new tap, old tap]

    def __init__(self, channels, factor):
        super().__init__()
        self.doubles_time = factor[0] == 2
        self.conv = CausalConv3d(channels, channels)

    def forward(self, chunks):
        kernel, bias = self.conv.conv.weight.float(), self.conv.conv.bias
        taps = kernel.new_tensor(self.TAPS)
        # The first frame stands alone: T frames become 2T - 1, and frame i becomes 2i - 1 and 2i.
        times = taps.flip(0) if self.doubles_time else torch.eye(3).to(taps)[None]
        mix = torch.einsum("aut, bvh, cxw -> abcthwuvx", times, taps, taps).flatten(6).flatten(3, 5)
        kinds = list(np.ndindex(mix.shape[:3]))
        weight = kernel.flatten(2).flatten(0, 1) @ mix.flatten(0, 2)  # [kinds, C * C, new taps]
        weight = weight.view(-1, len(bias), times.shape[1], 2, 2).to(bias.dtype)
        for i, x in enumerate(causal_conv(chunks, weight, bias.repeat(len(kinds)))):
            parts = x.unflatten(1, (len(kinds), -1)).unbind(1)  # [B, C, T, H + 1, W + 1], one for each kind
            (b, c, t, h, w), rate = parts[0].shape, len(times)
            y = empty((b, c, rate * t, 2 * h - 2, 2 * w - 2), x)
            for (p, q, r), part in zip(kinds, parts):
                y[:, :, p::rate, q::2, r::2] = part[..., q : q + h - 1, r : r + w - 1]
            yield y[:, :, rate - 1 :] if i == 0 else y


class MidBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.attentions = nn.ModuleList([FrameAttention(channels, groups)])
        self.resnets = nn.ModuleList([Resnet(channels, channels, groups) for _ in range(2)])

    def forward(self, x):
        [x] = self.resnets[0]([x])
        [x] = self.resnets[1]([self.attentions[0](x)])
        return x


class Coder(nn.Module):
    """Encoder or decoder: levels of resnets, resampling between them, attention at the small end.

    Without gradients the levels take a clip in chunks of up to `config.chunk_pixels`, and of one latent frame
    at least. That bounds the memory and changes nothing else.
    """

    def __init__(self, config, in_channels, out_channels, up):
        super().__init__()
        self.config, self.up = config, up
        groups, layers = config.norm_num_groups, config.layers_per_block + up
        channels = config.block_out_channels[:: -1 if up else 1]
        self.conv_in = CausalConv3d(in_channels, channels[0])
        levels, width = [], channels[0]
        for i, level_width in enumerate(channels):
            widths = [width] + [level_width] * layers
            resnets = nn.ModuleList([Resnet(a, b, groups) for a, b in pairwise(widths)])
            level, width = nn.ModuleDict({"resnets": resnets}), level_width
            if i < len(channels) - 1:  # space is resampled at each of these, time at the last two
                factor = (2 if i >= len(channels) - 3 else 1, 2, 2)
                name, resample = ("upsamplers", Upsample) if up else ("downsamplers", Downsample)
                level[name] = nn.ModuleList([resample(width, factor)])
            levels.append(level)
        setattr(self, "up_blocks" if up else "down_blocks", nn.ModuleList(levels))
        self.mid_block = MidBlock(channels[0] if up else channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = CausalConv3d(channels[-1], out_channels)

    def chunks(self, x):
        """Cut a clip between latent frames: of pixels the first of those is 1 frame, every other is 4."""
        if torch.is_grad_enabled():
            return [x]
        pixels, per_latent = x.shape[3] * x.shape[4] * (64 if self.up else 1), 1 if self.up else 4
        length = per_latent * max(1, self.config.chunk_pixels // (4 * pixels))
        return list(x.tensor_split([*range(length - per_latent + 1, x.shape[2], length)], 2))

    def forward(self, x):
        if self.up:
            [x] = self.conv_in([x])
            chunks = self.chunks(self.mid_block(x))
        else:
            chunks = list(self.conv_in(self.chunks(x)))
        for level in self.up_blocks if self.up else self.down_blocks:
            for group in level.values():
                for layer in group:
                    chunks = list(layer(chunks))
        if not self.up:
            chunks = [self.mid_block(torch.cat(chunks, 2))]
        return torch.cat(list(self.conv_out(chunks, self.conv_norm_out)), 2)


def tiled(function, x, dim, tile, stride, ratio, lead=0):
    """Apply `function` to overlapping tiles of x along `dim` and blend where they overlap.

    Args:
        tile, stride: in units of x. ratio: the output's length over the input's.
        lead: 1 along time, where a tile's first frame has no past: later tiles start early, and drop it.
    """
    length = x.shape[dim]
    if length <= tile:
        return function(x)
    step, overlap = int(stride * ratio), int((tile - stride) * ratio)
    result, previous = [], None
    for begin in range(0, length - lead, stride):
        output = function(x.narrow(dim, begin, min(tile + lead, length - begin)))
        first, output = output.split([lead, output.shape[dim] - lead], dim)
        if previous is None:
            result.append(first)
        else:
            blend = min(overlap, output.shape[dim], previous.shape[dim] - step)
            weight = (torch.arange(blend, device=x.device) / blend).to(output.dtype)
            weight = weight.view([-1 if d == dim else 1 for d in range(x.dim())])
            head, rest = output.split([blend, output.shape[dim] - blend], dim)
            output = torch.cat([previous.narrow(dim, step, blend) * (1 - weight) + head * weight, rest], dim)
        result.append(output.narrow(dim, 0, min(step, output.shape[dim])))
        previous = output
    return torch.cat(result, dim)


class VAE(nn.Module):
    """Pixels [B, 3, 4(T-1)+1, 8H, 8W] in [-1, 1] <-> scaled latents [B, C, T, H, W]."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = Coder(config, 3, 2 * latent, up=False)
        self.decoder = Coder(config, latent, 3, up=True)
        self.quant_conv = nn.Conv3d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv3d(latent, latent, 1)

    def in_tiles(self, function, x, space, time):
        """Apply `function` to x in tiles: of 16 frames always, as the public model does; in space only where
        frames are large. `space` and `time` are how much longer the result is than x."""
        frames = [int(n / max(time, 1)) for n in self.config.tile_frames]
        sides = [int(n / max(space, 1)) for n in self.config.tile_pixels]

        def spatial(part):
            return tiled(lambda row: tiled(function, row, 4, *sides, space), part, 3, *sides, space)

        large = x.shape[3] * x.shape[4] * max(space, 1) ** 2 > self.config.untiled_area
        return tiled(spatial if large else function, x, 2, *frames, time, lead=1)

    def moments(self, pixels):
        """The posterior's mean and log-variance, each [B, C, T, H, W], not scaled."""
        parts = self.in_tiles(lambda x: self.quant_conv(self.encoder(x)), pixels, space=1 / 8, time=1 / 4)
        return parts.chunk(2, 1)

    def encode(self, pixels):
        """Scaled latents: the posterior's mean, so that the same input gives the same picture."""
        return self.moments(pixels.to(self.quant_conv.weight.dtype))[0] * self.config.scaling_factor

    def decode(self, latents):
        """Pixels, not clamped."""
        latents = latents.to(self.quant_conv.weight.dtype) / self.config.scaling_factor
        return self.in_tiles(lambda z: self.decoder(self.post_quant_conv(z)), latents, space=8, time=4)


# ----------------------------------------------------------------------------------------------------------
# 5. Rectified flow and guidance (appendix B)
# ----------------------------------------------------------------------------------------------------------


def shift_time(u, shift):
    """Move uniform times u in [0, 1] towards noise: large pictures need more steps there (table 1)."""
    return shift * u / (1 - u + shift * u)


def flow_loss(velocity, data, noise, u, shift):
    """Rectified flow: on the straight line x_t = (1 - t) data + t noise the velocity is noise - data.

    Args: velocity, the function of (x_t, t) that predicts it; data, noise [B, C, T, H, W]; u [B], uniform in
    [0, 1]. Returns the squared error of each sample, [B]."""
    t = shift_time(u, shift)
    weight = t.view(-1, 1, 1, 1, 1)
    predicted = velocity((1 - weight) * data + weight * noise, t)
    return (predicted.float() - (noise - data)).square().flatten(1).mean(1)


def guidance_weights(cfg_text, cfg_image):
    """How much each branch's velocity counts. Without image guidance (cfg_image = 1) this is
    v_text_dropped + w_text (v - v_text_dropped); with it
    v_image_dropped + w_image (v_text_dropped - v_image_dropped) + w_text (v - v_text_dropped)."""
    return {"full": cfg_text, "text_dropped": cfg_image - cfg_text, "image_dropped": 1 - cfg_image}


def time_steps(steps, shift):
    """Times [steps] from 1 down, and the differences [steps] to the next one (the last goes to 0)."""
    times = shift_time(torch.linspace(1, 0, steps + 1), shift)
    return times[:-1], times[:-1] - times[1:]


def sample(velocity, noise, steps, shift, progress=False):
    """Euler's method from noise to data. `velocity` is a function of (x, t [B])."""
    x = noise
    times, differences = time_steps(steps, shift)
    for t, dt in zip(tqdm(times, desc="denoising", unit="step", disable=not progress), differences):
        x = x - dt.to(x) * velocity(x, t.to(x).expand(x.shape[0])).to(x.dtype)
    return x


# ----------------------------------------------------------------------------------------------------------
# 6. Vino: all of it together
# ----------------------------------------------------------------------------------------------------------


HUB = {  # the public weights: repository -> files
    "Qwen/Qwen3-VL-4B-Instruct": ["*.json", "*.safetensors"],
    "hunyuanvideo-community/HunyuanVideo": ["transformer/*", "vae/*"],
    "SOTAMak1r/VINO-weight": ["vino.ckpt"],
}


class Vino(nn.Module):
    """Figure 3. Parameter names are the public checkpoint's: `transformer.`, `mm_encoder.`, and `vae.`."""

    def __init__(self, config, tokenizer):
        super().__init__()
        self.config = config
        self.mm_encoder = MultiModalEncoder(config, tokenizer)
        self.transformer = MMDiT(config.mmdit)
        self.vae = VAE(config.vae).requires_grad_(False)

    @classmethod
    def load(cls, weights, config=None, device="cpu", dtype=torch.float32):
        """Build the model on `meta` and stream its weights straight to `device` and `dtype`.

        Args:
            weights: a `.safetensors` file of this project; a folder with the public weights
                (`Qwen3-VL-4B-Instruct/`, `HunyuanVideo/`, `vino.ckpt`); "hub" to download those; or "random"
                for random weights from a fixed seed.
            config: a Config; by default the file's own, else the full size.
        Raises: InputError that names the file, and the tensor or field that is missing, surplus or misshapen.
        """
        if str(weights) == "random":
            config, tokenizer, stream = config or Config(), byte_tokenizer(), None
        elif Path(weights).suffix == ".safetensors":
            config, tokenizer = read_metadata(weights, config)
            stream = read_safetensors([weights], "", device)
        else:
            config = config or Config()
            vlm, base, ckpt = locate(weights)
            tokenizer = read_tokenizer(vlm)
            stream = read_public(vlm, base, ckpt, config, device)
        with torch.device("meta"):
            model = cls(config, tokenizer)
        model.fill(stream or random_tensors(model.saved_tensors(), device, dtype), weights, device, dtype)
        return model.eval()

    def fill(self, stream, source, device, dtype):
        """Take parameters from `stream`, pairs of a name and a function that reads the tensor."""
        expected, tensors = self.saved_tensors(), {}
        for name, read in stream:
            if name not in expected:
                raise InputError(f"{source}: surplus tensor '{name}', which this config has no place for")
            tensor = read()
            if tensor.shape != expected[name].shape:
                shapes = f"{list(tensor.shape)}, the config asks for {list(expected[name].shape)}"
                raise InputError(f"{source}: tensor '{name}' has shape {shapes}")
            tensors[name] = tensor.to(device, dtype)
        for name, parameter in expected.items():
            if name.startswith("transformer." + MMDiT.UNUSED) and name not in tensors:
                tensors[name] = torch.zeros(parameter.shape, dtype=dtype, device=device)
        missing = sorted(expected.keys() - tensors.keys())
        if missing:
            raise InputError(f"{source}: tensor '{missing[0]}' is missing ({len(missing)} in all)")
        self.load_state_dict(tensors, strict=False, assign=True)
        vlm, text, vision = self.mm_encoder.mm_encoder, self.config.text, self.config.vision
        vlm.tie_weights()
        for module, dim, theta in [
            (vlm.model.language_model.rotary_emb, text.head_dim, text.rope_theta),
            (vlm.model.visual.rotary_pos_emb, vision.hidden_size // vision.num_heads // 2, 1e4),
        ]:  # what transformers computes when it builds a module, and does not save
            for name, _ in list(module.named_buffers()):
                frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
                module.register_buffer(name, frequencies.to(device), persistent=False)

    def saved_tensors(self):
        """The state dict, without the language model's head where that is the embedding again."""
        tied = "mm_encoder.mm_encoder.lm_head.weight" if self.config.text.tie_word_embeddings else None
        return {name: tensor for name, tensor in self.state_dict().items() if name != tied}

    def save(self, path, tensors=None):
        """Write one `.safetensors`: our weights, or `tensors` in their place, and config and tokenizer in its
        metadata. The file gets its name when it is complete."""
        tensors = tensors or self.saved_tensors()
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        tokenizer, unfinished = self.mm_encoder.tokenizer.to_str(), Path(f"{path}.partial")
        unfinished.touch()
        mode = unfinished.stat().st_mode
        save_file(tensors, unfinished, {"config": json.dumps(asdict(self.config)), "tokenizer": tokenizer})
        unfinished.chmod(mode)  # safetensors lets nobody but the owner read it
        unfinished.replace(path)

    def offload(self, device):
        """Move to a GPU that is too small for all weights, from the host: layers of the MMDiT and of the VLM
        stay there, and come to the GPU one by one. From now on the model cannot be saved."""
        vlm = self.mm_encoder.mm_encoder.model
        for layers in (self.transformer.blocks(), vlm.language_model.layers, vlm.visual.blocks):
            Offload(layers, device)
        self.to(device)

    @torch.no_grad()
    def encode(self, reference):
        """Both encoders of a Reference (2.2) -> EncodedReference."""
        latents = self.vae.encode(reference.pixels.to(self.mm_encoder.metaquery.device))
        return EncodedReference(latents, *self.mm_encoder.look(reference), reference.grid, reference.is_video)

    def velocity(self, latents, t, condition):
        """Predicted noise - data, [B, C, T, H, W], at times t [B]."""
        return self.transformer(latents, t, self.transformer.context([condition], latents.shape[2:]))[0]

    def branches(self, prompts, negatives, images, video, base, cfg_text, cfg_image):
        """Guidance's conditions: {name: (weight, Condition)}, without those that do not count.

        "text_dropped" keeps all references; "image_dropped" keeps the video and, with `base`, the last image:
        the one being edited. Args: lists of B texts, lists of EncodedReferences."""
        kept = images[-1:] if base else []
        if len(kept) == len(images):
            cfg_image = 1.0  # no image to drop
        inputs = {
            "full": (prompts, [*images, *video]),
            "text_dropped": (negatives, [*images, *video]),
            "image_dropped": (negatives, [*kept, *video]),
        }
        weights = guidance_weights(cfg_text, cfg_image)
        return {name: (weight, self.mm_encoder(*inputs[name])) for name, weight in weights.items() if weight}

    @torch.no_grad()
    def generate(
        self, prompts, images=(), video=None, *, size, base=False, steps=None, shift=None, cfg_text=None,
        cfg_image=None, negative_prompt=None, seed=0, noise=None, group=None, progress=False,
    ):  # fmt: skip
        """Make an image or a video for each prompt.

        Args:
            prompts: B texts; `images` (References, in order) and `video` (a Reference) are named in them as
                Image 1, Image 2, ..., Video 1. References have batch size B or 1.
            size: (frames, height, width) of the result: 4k + 1, and multiples of 16.
            base: the last image is the one being edited, the others are references for the edit.
            steps, shift, cfg_text, cfg_image, negative_prompt: by default the config's, for image or video.
            seed: sample i starts from the noise of seed + i. noise: overrides it, [B, C, T, H, W].
            group: processes of torch.distributed, which all call this and share the work.
        Returns: pixels [B, 3, frames, height, width], in [-1, 1] but for overshoot; None in all processes of
            the group but the first.
        """
        defaults, kind = self.config.sampling, int(size[0] > 1)
        negative = defaults.negative_prompt[kind] if negative_prompt is None else negative_prompt
        branches = self.branches(
            prompts,
            [negative] * len(prompts),
            [self.encode(image) for image in images],
            [self.encode(video)] if video else [],
            base,
            defaults.cfg_text[kind] if cfg_text is None else cfg_text,
            defaults.cfg_image if cfg_image is None else cfg_image,
        )
        if noise is None:
            shape = (self.config.vae.latent_channels, (size[0] - 1) // 4 + 1, size[1] // 8, size[2] // 8)
            seeds = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in seeds])
        noise = noise.to(self.mm_encoder.metaquery.device)
        count, number, crew = divide(len(branches), group) if group else (1, 0, Crew())
        weights, conditions = zip(*[*branches.values()][number::count])
        contexts = arrange(self.transformer, conditions, noise.shape[2:], crew)

        def guided(x, t):
            velocities = [v for context in contexts for v in self.transformer(x, t, context)]
            velocity = sum(weight * v.float() for weight, v in zip(weights, velocities, strict=True))
            if group:
                dist.all_reduce(velocity, group=group)  # over the branches, and over the tokens of a crew
            return velocity

        shift = defaults.shift[kind] if shift is None else shift
        latents = sample(guided, noise, steps or defaults.steps, shift, progress)
        return None if group and group.rank() else self.vae.decode(latents).float()


class Offload:
    """Modules that run one after the other, again and again, with their weights in the host's memory. These
    come to the GPU through two slots: while a module computes in one, the next one's arrive in the other."""

    def __init__(self, modules, device):
        self.device, self.copies = device, torch.cuda.Stream(device)
        self.coming = None  # the number of the module whose weights are in slot 0, or on their way
        self.shapes = [[parameter.shape for parameter in module.parameters()] for module in modules]
        sizes = [sum(map(math.prod, shapes)) for shapes in self.shapes]
        host = torch.empty(sum(sizes), dtype=next(modules[0].parameters()).dtype)
        self.host = host.split(sizes)
        for number, module in enumerate(modules):
            torch.cat(
                [parameter.detach().flatten().cpu() for parameter in module.parameters()],
                out=self.host[number],
            )
            for parameter in module.parameters():
                parameter.data = parameter.data.new_empty(0)
            module.register_forward_pre_hook(partial(self.enter, number))
        # Pinned in place: torch would round up to a power of two.
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0))
        self.slots = [torch.empty(max(sizes), dtype=host.dtype, device=device) for _ in range(2)]

    def fetch(self, number):
        """Begin to copy a module's weights to the slot that is not in use, which is slot 0 from now on."""
        self.coming = number
        self.slots.reverse()
        self.copies.wait_stream(torch.cuda.current_stream(self.device))  # until its last user has computed
        with torch.cuda.stream(self.copies):
            self.slots[0][: len(self.host[number])].copy_(self.host[number], non_blocking=True)

    def enter(self, number, module, inputs):
        """Before a module computes: its own weights shall be there, and the next one's on their way."""
        if self.coming != number:
            self.fetch(number)
        torch.cuda.current_stream(self.device).wait_stream(self.copies)
        weights = self.slots[0][: len(self.host[number])].split([*map(math.prod, self.shapes[number])])
        for parameter, part, shape in zip(module.parameters(), weights, self.shapes[number]):
            parameter.data = part.view(shape)
        self.fetch((number + 1) % len(self.host))


def random_tensors(expected, device, dtype):
    """A stream for `Vino.fill`: matrices and kernels that keep the variance, norms of one, small biases."""
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in expected.items():
        x = torch.randn(tensor.shape, generator=generator, device=device, dtype=dtype)
        if tensor.dim() > 1:
            x *= math.prod(tensor.shape[1:]) ** -0.5
        else:
            x = float(name.endswith("weight")) + 0.02 * x
        yield name, lambda x=x: x


def existing(path):
    """The path, or an InputError that names it."""
    if not Path(path).exists():
        raise InputError(f"{path} does not exist")
    return Path(path)


def read_image(path):
    """The picture at `path` as RGB: upright, and over white where it is transparent."""
    existing(path)
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):  # 16-bit gray, which `convert` would clip
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            image = image.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not an image, or is cut short") from error
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def read_frames(path):
    """The frames of the video at `path`, one after the other: uint8 [H, W, 3], upright."""
    import av  # here, so that pictures do without it

    try:
        with av.open(str(existing(path))) as file:
            if file.format.name == "tty":  # ffmpeg would film a text file
                raise InputError(f"{path} is a text, not a video")
            for frame in file.decode(video=0) if file.streams.video else ():
                yield np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    except av.FFmpegError as error:
        raise InputError(f"{path} is not a video, or is cut short") from error


def read_json(path):
    path = existing(path)
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON, or is cut short ({error})") from error


def read_tokenizer(folder):
    """The tokenizer of a public VLM's folder."""
    return Tokenizer.from_str(json.dumps(read_json(folder / "tokenizer.json")))


def open_safetensors(path, device="cpu"):
    try:
        return safe_open(existing(path), "pt", device=str(device))
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file, or is cut short ({error})") from error


def read_metadata(path, config):
    """Config and tokenizer of a `.safetensors` of this project; must fit `config`, if that is given."""
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
    if not {"config", "tokenizer"} <= metadata.keys():
        raise InputError(f"{path} was not written by this project: its metadata holds no config")
    saved = Config.from_dict(json.loads(metadata["config"]))
    if config:
        config.vae.scaling_factor = saved.vae.scaling_factor  # is measured in training
        ours, theirs = asdict(config), asdict(saved)
        for section in ("text", "vision", "mmdit", "vae", "num_queries"):
            agree(ours[section], theirs[section], section, path)
    return config or saved, Tokenizer.from_str(metadata["tokenizer"])


def read_config(path, weights):
    """The Config of a JSON file for `weights`: what it does not name is as these have it, if they are a
    `.safetensors` of this project, and else as the paper has it."""
    base = read_metadata(weights, None)[0] if Path(weights).suffix == ".safetensors" else Config()
    training = base.training
    config = Config.from_dict(read_json(path), base)
    for stage, changes in training.items():
        own = config.training.setdefault(stage, {})
        config.training[stage] = changes | own if isinstance(own, dict) else own
    return config


def agree(ours, theirs, name, path):
    """Raise an InputError where the config at `path` differs from ours, in the fields that both have."""
    if isinstance(ours, dict):
        for key in sorted(ours.keys() & theirs.keys()):
            agree(ours[key], theirs[key], f"{name}.{key}", path)
    elif ours != theirs:
        raise InputError(f"field '{name}' does not fit: it is {ours} here, and {theirs} in {path}")


def download(name, files):
    """The folder of a repository of the hub, with those of its files that match the patterns `files`."""
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise InputError(f"cannot download {name}: {' '.join(str(error).split())}") from error


def locate(weights):
    """Folders of the VLM and of HunyuanVideo, and the path of vino.ckpt, downloaded first for "hub"."""
    if str(weights) == "hub":
        vlm, base, vino = (download(name, files) for name, files in HUB.items())
        return vlm, base, vino / "vino.ckpt"
    folder = existing(weights)
    return [existing(folder / name) for name in ("Qwen3-VL-4B-Instruct", "HunyuanVideo", "vino.ckpt")]


def read_public(vlm, base, ckpt, config, device):
    """All tensors of the public weights, under our names; those of `vino.ckpt` win over the base model's."""
    ours = asdict(config)
    qwen = {"text_config": ours["text"], "vision_config": ours["vision"]}
    for part, folder in ((qwen, vlm), (ours["mmdit"], base / "transformer"), (ours["vae"], base / "vae")):
        path = folder / "config.json"
        agree(part, read_json(path), folder.name, path)
    trained = open_checkpoint(ckpt).keys()
    yield from read_safetensors(shards(vlm), "mm_encoder.mm_encoder.", device)
    yield from read_safetensors(shards(base / "vae"), "vae.", device)
    for name, read in read_checkpoint(ckpt):
        if not name.startswith("mm_encoder.mm_encoder."):  # the frozen VLM again
            yield name, read
    for name, read in read_safetensors(shards(base / "transformer"), "transformer.", device):
        if name not in trained:
            yield name, read


def shards(folder):
    """The safetensors files of a folder: those its index names, or the only one."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        names = sorted(set(read_json(indexes[0])["weight_map"].values()))
        return [existing(folder / name) for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no .safetensors file")
    return files


# Files are opened anew after so many tensors: what has been read of an open one counts as our memory.
AT_ONCE = 32


def read_safetensors(paths, prefix, device):
    """(name, function that reads the tensor to `device`) for every tensor of the files."""
    for path in paths:
        with open_safetensors(path) as file:
            names = [*file.keys()]
        for begin in range(0, len(names), AT_ONCE):
            with open_safetensors(path, device) as file:
                for name in names[begin : begin + AT_ONCE]:
                    yield prefix + name, lambda name=name: file.get_tensor(name)


def open_checkpoint(path):
    """{name: tensor} of a `.ckpt` of torch. Tensors are read when they are used."""
    try:
        tensors = torch.load(existing(path), map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} is not a checkpoint of plain tensors, or is cut short") from error
    if not (isinstance(tensors, dict) and all(isinstance(tensor, Tensor) for tensor in tensors.values())):
        raise InputError(f"{path} holds something else than named tensors")
    return tensors


def read_checkpoint(path):
    """(name, function that reads the tensor) for every tensor of a `.ckpt`."""
    names = [*open_checkpoint(path)]
    for begin in range(0, len(names), AT_ONCE):
        tensors = open_checkpoint(path)
        for name in names[begin : begin + AT_ONCE]:
            yield name, lambda name=name: tensors[name]
