"""VINO: one generator for images and videos, in one file, in the paper's order.

Text, reference images and a reference video go in; a new or an edited image or video comes out. A frozen
vision-language model (VLM) reads the prompt and the references; its hidden states, with those of learnable
queries appended to the prompt, condition a diffusion transformer (MMDiT). The references' VAE latents join
the noisy target in the MMDiT's sequence.

    1. Multi-modal conditions          2.1, figures 3 and 4   the frozen VLM, learnable queries, connectors
    2. Interleaved omnimodal context   2.2, figure 5          references and target on one timeline
    3. MMDiT                           appendix A             HunyuanVideo's diffusion transformer
    4. VAE                             appendix A             HunyuanVideo's causal 3D autoencoder
    5. Rectified flow and guidance     appendix B             loss, sampler, text and image guidance
    6. Vino                            figure 3               all of it together
    7. Several GPUs for one sample                            sequence parallelism
    8. Reference pixels                                       letterboxing, resizing, patches
    9. Files                                                  weights, tokenizers, pictures, clips

"The release" is the authors' public inference code: this file follows it where it differs from the paper.
Parameters carry the public checkpoints' names, so that real weights load without a renaming table.
Shapes: B batch, L tokens, T frames, H height, W width, C channels, D width of a transformer, R references;
t, h, w count patches.
"""

import json
import math
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import lru_cache, partial
from itertools import islice, pairwise
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import DynamicCache, Qwen3VLConfig, Qwen3VLForConditionalGeneration


class InputError(ValueError):
    """A user error. The message is one line: what is wrong, where, and what would be right."""


def items(*values):
    """A list as the default of a dataclass's field."""
    return field(default_factory=lambda: list(values))


def chain(**layers):
    """An nn.Sequential whose layers have names."""
    return nn.Sequential(OrderedDict(layers))


# --- 1. Multi-modal conditions (2.1, figures 3 and 4): what the frozen VLM reads and what comes out of it ---


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
    # The release resizes twice. Each entry is one resizing's arguments to `vlm_size`: [multiple, fewest
    # pixels, most pixels]. The limits of a video's second resizing count the pixels of all its frames.
    image_resize: list = items([28, 4 * 28**2, 16384 * 28**2], [32, 2**16, 2**24])
    video_resize: list = items([28, 256 * 32**2, 768 * 28**2], [32, 2**12, 25165824])
    video_frames: int = 8  # appendix B


# Attention kernels that take any length as it comes: all but cuDNN's, which plans each new one for up to 1 s.
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

NUCLEUS = 0.5  # of the next token's probability, when the VLM expands prompts

SYSTEM_PROMPT = "You are a helpful assistant aimed at generating an output video caption."


@dataclass
class Prompts:
    """Figure 4's template, filled in for B texts about the same references, and tokenised."""

    ids: Tensor  # [B, L]; padding precedes shorter texts
    positions: Tensor  # [3, B, L]: M-RoPE positions in time, height and width
    mask: Tensor | None  # [B, L], False at padding; None where there is none
    starts: list  # for each reference, the index of its (first) <|vision_start|>
    ends: list  # and of its (last) <|vision_end|>


def build_prompts(tokenizer, texts, references, merge, system=SYSTEM_PROMPT):
    """Figure 4 for each of B texts: system line, images, video, the user's text.

    A reference has `grid`, (t, h, w) in patches, and `is_video`; images stand before the one video.
    `merge` is the VLM's spatial_merge_size: merge x merge patches make one token.
    """
    ids, positions, starts, ends = [], [], [], []  # of what all prompts share

    def append(text):
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        begin = 1 + max(positions[-1]) if positions else 0
        ids.extend(tokens)
        positions.extend((place, place, place) for place in range(begin, begin + len(tokens)))

    tokenizer.encode_special_tokens = False  # <|...|> is one token
    append(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>")
    pending = "user\n"  # tokenised with the text that follows: a token may cross the border
    for number, reference in enumerate(references, 1):
        t, h, w = reference.grid[0], reference.grid[1] // merge, reference.grid[2] // merge
        pad = tokenizer.token_to_id("<|video_pad|>" if reference.is_video else "<|image_pad|>")
        pending += "Video 1: " if reference.is_video else f"Image {number}: "
        for pair in range(t):  # each is two frames of a video, or an image
            if reference.is_video:  # the release timestamps the VLM's frames as if at 24 FPS
                pending += f"<{(2 * pair + 0.5) / 24:.1f} seconds>"
            append(pending + "<|vision_start|>")
            pending = ""
            if pair == 0:
                starts.append(len(ids) - 1)
            begin = 1 + max(positions[-1])
            ids.extend([pad] * (h * w))
            positions.extend((begin, begin + row, begin + column) for row in range(h) for column in range(w))
            append("<|vision_end|>")
        ends.append(len(ids) - 1)
    closing = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False).ids

    tokenizer.encode_special_tokens = True  # spelled in a user's text, <|...|> is plain text
    encodings = tokenizer.encode_batch([pending + text for text in texts], add_special_tokens=False)
    tails = [encoding.ids + closing for encoding in encodings]
    lengths = torch.tensor([len(tail) for tail in tails])
    longest = max(map(len, tails))
    valid = torch.arange(longest) >= longest - lengths[:, None]  # [B, tail]
    padding = tokenizer.token_to_id("<|endoftext|>")
    tails = torch.tensor([[padding] * (longest - len(tail)) + tail for tail in tails])
    mask = None if valid.all() else F.pad(valid, (len(ids), 0), value=True)
    tail_positions = 1 + max(positions[-1]) + (valid.cumsum(1) - 1).clamp(min=0)
    ids = torch.tensor(ids).expand(len(texts), -1)
    positions = torch.tensor(positions).T[:, None].expand(-1, len(texts), -1)
    ids = torch.cat([ids, tails], 1)
    positions = torch.cat([positions, tail_positions.expand(3, -1, -1)], 2)
    return Prompts(ids, positions, mask, starts, ends)


@dataclass(eq=False)
class EncodedReference:
    """A reference after both encoders: independent of the prompt, so all guidance branches share it."""

    latents: Tensor  # [B, C, T, H, W], scaled
    features: list  # [B, t*h*w / 4, D]: the VLM's input, then what each of its first layers adds (deepstack)
    grid: tuple  # (t, h, w) in patches
    is_video: bool


@dataclass
class Condition:
    """What the MMDiT is conditioned on."""

    tokens: Tensor  # [B, L, text_embed_dim]: prompt, then learnable queries
    mask: Tensor | None  # [B, L], True where valid; None where nothing is padded
    # For each reference, in order: (start, latents, end). The latents [B, C, T, H, W] stand between
    # the projected boundary tokens [B, D] (2.2), which are None in the ablation of figure 11.
    references: list


def connector(in_dim, out_dim):
    """Two-layer MLP from the VLM's hidden states to the MMDiT (2.1), after the release's norm."""
    hidden = 4 * out_dim
    mlp = nn.Sequential(nn.Linear(in_dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, out_dim))
    return chain(norm_qwen=nn.RMSNorm(in_dim, eps=1e-6), mlp=mlp)


class MultiModalEncoder(nn.Module):
    """The frozen VLM, the learnable queries after its prompt, and the two connectors (2.1, figure 3 left).

    `connector` carries prompt and queries into the MMDiT's text stream; `connector_vae_branch` carries the
    boundary tokens into its visual stream.
    """

    def __init__(self, config, tokenizer):
        super().__init__()
        width = config.text.hidden_size
        self.tokenizer = tokenizer
        self.merge = config.vision.spatial_merge_size
        self.boundary_tokens = config.boundary_tokens
        self.mm_encoder = build_vlm(config).requires_grad_(False)
        # The learnable queries: the paper's learnable tokens.
        self.metaquery = nn.Parameter(torch.randn(config.num_queries, width) / math.sqrt(width))
        self.connector = connector(width, config.mmdit.text_embed_dim)
        self.connector_vae_branch = connector(width, config.mmdit.width)

    def forward(self, prompts, references, vae_branch=True):
        """The MMDiT's condition for B prompts about EncodedReferences, images before the video.

        A boundary token is the VLM's penultimate hidden state at <|vision_start|> or <|vision_end|> (2.2;
        figure 5: "projected from the VLM output"), and not the token's input embedding. Without `vae_branch`
        only the VLM sees the references (image reconstruction, appendix B).
        """
        hidden, mask, starts, ends = self.hidden_states(prompts, references)
        hidden = hidden.to(self.connector.mlp[0].weight.dtype)
        wrapped = []
        for reference, start, end in zip(references if vae_branch else [], starts, ends):
            start = self.connector_vae_branch(hidden[:, start]) if self.boundary_tokens else None  # [B, D]
            end = self.connector_vae_branch(hidden[:, end]) if self.boundary_tokens else None
            wrapped.append((start, reference.latents.expand(len(prompts), -1, -1, -1, -1), end))
        return Condition(self.connector(hidden), mask, wrapped)

    def hidden_states(self, prompts, references):
        """The VLM's penultimate hidden states of the prompts and of the learnable queries that follow (2.1).

        The prompt runs first, without gradient, and fills a cache of keys and values; the queries then attend
        to it, with gradient. Attention is causal, so this equals a single pass, but keeps no activations of
        the prompt for the backward pass.

        Returns: hidden [B, L, D], mask [B, L] or None, and Prompts' starts and ends.
        """
        prompts = build_prompts(self.tokenizer, prompts, references, self.merge)
        cache = DynamicCache()
        with torch.no_grad():
            _, hidden = self.prefill(prompts, references, cache)
        mask, count = prompts.mask, len(self.metaquery)
        mask = None if mask is None else F.pad(mask, (0, count), value=True).to(hidden.device)
        if count:
            queries = self.metaquery.to(hidden.dtype).expand(len(hidden), -1, -1)  # [B, count, D]
            # As in the release, the first query shares the position of the prompt's last token.
            positions = prompts.positions[:, :, -1:] + torch.arange(count)  # [3, B, count]
            _, query_hidden = self.language(queries, positions, mask, cache)
            hidden = torch.cat([hidden, query_hidden], 1)
        return hidden, mask, prompts.starts, prompts.ends

    def prefill(self, prompts, references, cache):
        """Run Prompts with their references' features through the language model, and fill `cache` ->
        last and penultimate hidden states, both [B, L, D]."""
        ids = prompts.ids.to(self.metaquery.device, non_blocking=True)
        embeds = self.mm_encoder.get_input_embeddings()(ids)  # [B, L, D]
        visual_mask, deepstack = None, None
        if references:
            image, video = (self.tokenizer.token_to_id(f"<|{kind}_pad|>") for kind in ("image", "video"))
            visual_mask = (ids == image) | (ids == video)
            features, *deepstack = [
                torch.cat([part.expand(len(ids), -1, -1) for part in layer], 1).flatten(0, 1)  # [B * n, D]
                for layer in zip(*[reference.features for reference in references])
            ]
            embeds = embeds.masked_scatter(visual_mask[..., None], features.to(embeds.dtype))
        return self.language(embeds, prompts.positions, prompts.mask, cache, visual_mask, deepstack)

    def language(self, embeds, positions, mask, cache, visual_mask=None, deepstack=None):
        """Run the language model on embeds [B, L, D] after what is in `cache` -> last and penultimate hidden
        states. `mask` covers all tokens so far; where `visual_mask` [B, L] is True the first layers add the
        deepstack features, each [tokens, D]."""
        positions = positions.to(embeds.device)
        mask = None if mask is None else mask.to(embeds.device, torch.long)
        with sdpa_kernel(ANY_LENGTH):  # prompts differ in length
            # The first argument, input_ids, is None. The cache goes by position, as transformers 4 and 5 name
            # it differently; without one they take jumps in the positions for borders of packed sequences.
            visual = {"visual_pos_masks": visual_mask, "deepstack_visual_embeds": deepstack}
            language_model = self.mm_encoder.model.language_model
            output = language_model(None, mask, positions, cache, embeds, output_hidden_states=True, **visual)
        return output.last_hidden_state, output.hidden_states[-2]

    def encode_vision(self, reference):
        """The vision tower on a Reference: the features of an EncodedReference."""
        vision = self.mm_encoder.model.visual
        batch = len(reference.patches)
        patches = reference.patches.flatten(0, 1).to(self.metaquery.device, vision.dtype)
        t, h, w = reference.grid
        # Frames do not see each other, so a batch can pass as one long video.
        output = vision(patches, torch.tensor([[batch * t, h, w]], device=patches.device))
        if isinstance(output, tuple):  # transformers 4
            features, deepstack = output
        else:
            features, deepstack = output.pooler_output, output.deepstack_features
        return [layer.unflatten(0, (batch, -1)) for layer in (features, *deepstack)]

    @torch.no_grad()
    def answer(self, prompts, references=(), system=SYSTEM_PROMPT, seed=None, max_new_tokens=256):
        """The VLM's text answers to B prompts about EncodedReferences: by greedy decoding, or with a seed by
        nucleus sampling, answer i from seed + i."""
        batch = build_prompts(self.tokenizer, prompts, references, self.merge, system)
        cache = DynamicCache()
        end = self.tokenizer.token_to_id("<|im_end|>")
        last, _ = self.prefill(batch, references, cache)
        positions, mask = batch.positions[:, :, -1:], batch.mask
        done = torch.zeros(len(last), dtype=torch.bool, device=last.device)
        ids, generators = [], None
        if seed is not None:
            generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        while len(ids) < max_new_tokens and not done.all():
            token = next_token(self.mm_encoder.lm_head(last[:, -1]), generators)  # [B]
            ids.append(token.masked_fill(done, end))
            done |= ids[-1] == end
            positions = positions + 1
            mask = None if mask is None else F.pad(mask, (0, 1), value=True)
            embeds = self.mm_encoder.get_input_embeddings()(ids[-1][:, None])
            last, _ = self.language(embeds, positions, mask, cache)
        rows = torch.stack(ids, 1).tolist()
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def next_token(logits, generators):
    """The likeliest token of each row [B, V]; or, with a generator for each, one drawn from its nucleus: the
    likeliest tokens that hold `NUCLEUS` of the probability."""
    if generators is None:
        return logits.argmax(-1)
    p, tokens = (x.cpu() for x in logits.float().softmax(-1).sort(descending=True, stable=True))
    p[p.cumsum(-1) - p >= NUCLEUS] = 0  # the likelier tokens hold enough
    p = p.scatter(1, tokens, p)  # in the vocabulary's order
    drawn = [torch.multinomial(row, 1, generator=generator) for row, generator in zip(p, generators)]
    return torch.cat(drawn).to(logits.device)


def build_vlm(config):
    """Qwen3-VL of the config's sizes, with random weights; transformers knows the architecture."""
    text, vision = asdict(config.text), asdict(config.vision)
    for ours in ("image_resize", "video_resize", "video_frames"):
        del vision[ours]
    rope = {"rope_type": "default", "mrope_section": text.pop("mrope_section"), "mrope_interleaved": True}
    text["rope_scaling"] = rope  # transformers 5 calls it rope_parameters, and accepts this name
    tie = config.text.tie_word_embeddings
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie)
    return Qwen3VLForConditionalGeneration(config).eval()


# --- 2. Interleaved omnimodal context (2.2, figure 5): references, boundary tokens and target on one timeline


def pack(references, target):
    """Figure 5: one sequence of all references, each between its boundary tokens, and the noisy target, and
    the place of each token on the shared RoPE timeline.

    A boundary token takes one step of time, at (t, 0, 0). A block of latents takes one step for each of its
    frames, and its height and width start at 0. The target follows the last reference.

    Args:
        references: (start, patches, end) of each: boundary tokens [B, D] or None, patches [B, D, T, H, W].
        target: patches [B, D, T, H, W].
    Returns: tokens [B, L, D], the target's last, and positions [L, 3] in time, height and width.
    """
    pieces = [piece for triple in [*references, (target,)] for piece in triple if piece is not None]
    tokens, positions, time = [], [], 0
    for piece in pieces:
        if piece.dim() == 2:
            piece = piece[:, :, None, None, None]  # a boundary token is a block of one
        t, h, w = (torch.arange(size, device=target.device) for size in piece.shape[2:])
        tokens.append(piece.flatten(2).mT.to(target.dtype))  # [B, T*H*W, D]
        positions.append(torch.cartesian_prod(time + t, h, w))  # [T*H*W, 3]
        time += len(t)
    return torch.cat(tokens, 1), torch.cat(positions)


def rope_3d(positions, axes_dim, theta):
    """RoPE at positions [L, 3]: angles position * theta**(-2i / d), where each axis gets d of the channels.
    -> cosines [L, 1, head / 2, 1], and sines [L, 1, head / 2, 2] with the signs of a rotation."""
    angles = []
    for position, dim in zip(positions.unbind(-1), axes_dim, strict=True):
        frequencies = theta ** -(torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
        angles.append(position[:, None].float() * frequencies)
    angles = torch.cat(angles, -1)[:, None, :, None]
    return angles.cos(), torch.cat([-angles.sin(), angles.sin()], -1)


def apply_rope(x, rope):
    """Rotate neighbouring channels (a, b) of x [B, L, heads, head] to (a cos - b sin, b cos + a sin)."""
    cos, sin = rope
    pairs = x.float().unflatten(-1, (-1, 2))  # [B, L, heads, head / 2, 2]
    return torch.addcmul(pairs * cos, pairs.flip(-1), sin).flatten(-2).to(x.dtype)


# --- 3. MMDiT (appendix A): dual-stream blocks, then single-stream blocks, modulated by the timestep --------


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


def attend(q, k, v, rope=None, mask=None):
    """Softmax attention of rotated queries and keys: q, k, v [B, L, heads, head] -> [B, L, D]. `mask` [B, L]
    is True where a key may be seen; None where nothing is padded, which is faster."""
    if rope is not None:
        q = apply_rope(q, rope)
        k = apply_rope(k, rope)
    if mask is not None:
        mask = mask[:, None, None]  # [B, heads, queries, keys]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, L, head]
    # cuDNN's kernel, the fastest, is for sampling only: it plans each new length anew, and up to torch 2.13
    # its backward misreads the gradient's layout (pytorch pull request 191576).
    with sdpa_kernel(ANY_LENGTH) if torch.is_grad_enabled() else nullcontext():
        x = F.scaled_dot_product_attention(q, k, v, mask)
    return x.transpose(1, 2).flatten(2)


def sinusoid(t, dtype):
    """Sinusoidal features [B, 256] of t [B], cosines first."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1).to(dtype)


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


def embedder(in_dim, width):
    """Two-layer MLP for timestep, guidance or pooled text."""
    return chain(linear_1=nn.Linear(in_dim, width), silu=nn.SiLU(), linear_2=nn.Linear(width, width))


def feed_forward(config, activation):
    """Two-layer MLP of a block."""
    hidden = int(config.width * config.mlp_ratio)
    first = chain(proj=nn.Linear(config.width, hidden), activation=activation)
    # The empty layer keeps the public name of the last one, net.2.
    return chain(net=nn.Sequential(first, nn.Identity(), nn.Linear(hidden, config.width)))


class Attention(nn.Module):
    """Queries, keys and values of one stream."""

    def __init__(self, config, norm=True, out=True):
        super().__init__()
        width, head = config.width, config.attention_head_dim
        self.head = head
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(head, eps=1e-6) if norm else nn.Identity() for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(width, width)) if out else None

    def qkv(self, x):  # [B, L, D] -> 3 x [B, L, heads, head]
        q, k, v = (layer(x).unflatten(-1, (-1, self.head)) for layer in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v


class JointAttention(Attention):
    """Projections for joint attention: the text stream has its own."""

    def __init__(self, config):
        super().__init__(config)
        width, head = config.width, config.attention_head_dim
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
        self.norm_added_q, self.norm_added_k = (nn.RMSNorm(head, eps=1e-6) for _ in range(2))
        self.to_add_out = nn.Linear(width, width)

    def text_qkv(self, x):  # [B, L, D] -> 3 x [B, L, heads, head]
        layers = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (layer(x).unflatten(-1, (-1, self.head)) for layer in layers)
        return self.norm_added_q(q), self.norm_added_k(k), v


class DualBlock(nn.Module):
    """Dual-stream block: separate weights for visual tokens and text, joint attention over both."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = Modulation(config.width, 6)
        self.norm1_context = Modulation(config.width, 6)
        self.attn = JointAttention(config)
        self.ff = feed_forward(config, nn.GELU("tanh"))
        self.ff_context = feed_forward(config, nn.GELU("tanh"))

    def forward(self, x, text, embedding, attention):
        """Visual tokens x [B, Lv, D] and text [B, Lt, D] -> the same shapes."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1(embedding)
        t_shift, t_scale, t_gate, t_shift_ff, t_scale_ff, t_gate_ff = self.norm1_context(embedding)

        q, k, v = self.attn.qkv(modulate(x, shift, scale))
        t_q, t_k, t_v = self.attn.text_qkv(modulate(text, t_shift, t_scale))
        both = attention(torch.cat([q, t_q], 1), torch.cat([k, t_k], 1), torch.cat([v, t_v], 1))
        attended, t_attended = both.split([x.shape[1], text.shape[1]], 1)

        x = x + gate * self.attn.to_out(attended)
        x = x + gate_ff * self.ff(modulate(x, shift_ff, scale_ff))
        text = text + t_gate * self.attn.to_add_out(t_attended)
        text = text + t_gate_ff * self.ff_context(modulate(text, t_shift_ff, t_scale_ff))
        return x, text


class SingleBlock(nn.Module):
    """Single-stream block over visual tokens and text, with attention and feed-forward in parallel."""

    def __init__(self, config):
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.norm = Modulation(width, 3)
        self.attn = Attention(config, out=False)
        self.proj_mlp = nn.Linear(width, hidden)
        self.proj_out = nn.Linear(width + hidden, width)

    def forward(self, x, embedding, attention):  # [B, Lv + Lt, D] -> the same shape
        shift, scale, gate = self.norm(embedding)
        normed = modulate(x, shift, scale)
        attended = attention(*self.attn.qkv(normed))
        activated = F.gelu(self.proj_mlp(normed), approximate="tanh")
        return x + gate * self.proj_out(torch.cat([attended, activated], -1))


class RefinerBlock(nn.Module):
    """A plain transformer block over the text, gated by timestep and pooled text."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config, norm=False)
        self.ff = feed_forward(config, nn.SiLU())
        self.norm_out = Modulation(config.width, 2)

    def forward(self, x, embedding, mask):
        gate, gate_ff = self.norm_out(embedding)
        attended = attend(*self.attn.qkv(self.norm1(x)), mask=mask)
        x = x + gate * self.attn.to_out(attended)
        return x + gate_ff * self.ff(self.norm2(x))


class TokenRefiner(nn.Module):
    """Projects the condition's tokens to the MMDiT's width, and lets them attend to each other."""

    def __init__(self, config):
        super().__init__()
        width, text = config.width, config.text_embed_dim
        self.time_text_embed = nn.Module()  # holds the public names
        self.time_text_embed.timestep_embedder = embedder(256, width)
        self.time_text_embed.text_embedder = embedder(text, width)
        self.proj_in = nn.Linear(text, width)
        blocks = [RefinerBlock(config) for _ in range(config.num_refiner_layers)]
        self.token_refiner = nn.Module()
        self.token_refiner.refiner_blocks = nn.ModuleList(blocks)

    def forward(self, tokens, mask, timestep):
        """tokens [B, L, text_embed_dim], mask [B, L] or None, timestep [B] in 0..999 -> [B, L, D]."""
        if mask is None:
            pooled = tokens.mean(1)
        else:
            pooled = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        embed = self.time_text_embed
        embedding = embed.timestep_embedder(sinusoid(timestep, tokens.dtype)) + embed.text_embedder(pooled)
        x = self.proj_in(tokens)
        for block in self.token_refiner.refiner_blocks:
            x = block(x, embedding, mask)
        return x


class MMDiT(nn.Module):
    """HunyuanVideo's transformer over the interleaved context: predicts the target's velocity."""

    UNUSED = "time_text_embed.text_embedder."  # for CLIP's pooled text: in the base checkpoint, not in VINO

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch = (config.patch_size_t, config.patch_size, config.patch_size)
        self.x_embedder = chain(proj=nn.Conv3d(config.in_channels, config.width, self.patch, self.patch))
        self.context_embedder = TokenRefiner(config)
        self.time_text_embed = nn.Module()
        self.time_text_embed.timestep_embedder = embedder(256, config.width)
        self.time_text_embed.guidance_embedder = embedder(256, config.width)
        self.time_text_embed.text_embedder = embedder(config.pooled_projection_dim, config.width)
        self.transformer_blocks = nn.ModuleList([DualBlock(config) for _ in range(config.num_layers)])
        singles = [SingleBlock(config) for _ in range(config.num_single_layers)]
        self.single_transformer_blocks = nn.ModuleList(singles)
        self.norm_out = Modulation(config.width, 2)
        self.proj_out = nn.Linear(config.width, math.prod(self.patch) * config.out_channels)

    def blocks(self):
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    def forward(self, latents, t, condition, parallel=None):
        """Velocity (noise - data) of the target's latents [B, C, T, H, W] at times t [B], where 1 is noise,
        under a Condition. `parallel` is a SequenceParallel of processes that share the tokens."""
        dtype = self.proj_out.weight.dtype
        timestep = 999 * t  # as the release scales it
        target = self.x_embedder(latents.to(dtype))  # [B, D, t, h, w]
        references = [(start, self.x_embedder(z.to(dtype)), end) for start, z, end in condition.references]
        x, positions = pack(references, target)  # [B, Lv, D], [Lv, 3]
        text = self.context_embedder(condition.tokens.to(dtype), condition.mask, timestep)  # [B, Lt, D]
        embed = self.time_text_embed
        embedding = embed.timestep_embedder(sinusoid(timestep, dtype))  # [B, D]
        guidance = torch.full_like(timestep, 1000.0)  # the release feeds the base model's guidance a constant
        embedding = embedding + embed.guidance_embedder(sinusoid(guidance, dtype))

        visual = x.shape[1]
        positions = F.pad(positions, (0, 0, 0, text.shape[1]))  # text is not rotated: it stays at (0, 0, 0)
        rope = rope_3d(positions, self.config.rope_axes_dim, self.config.rope_theta)
        mask = condition.mask
        if mask is not None:
            mask = F.pad(mask, (visual, 0), value=True)  # [B, Lv + Lt]
        attention = partial(attend, rope=rope, mask=mask)
        if parallel:
            x, text, attention = parallel.shard(x, text, rope, mask)

        for block in self.transformer_blocks:
            x, text = block(x, text, embedding, attention)
        own = x.shape[1]  # visual tokens of this process
        x = torch.cat([x, text], 1)
        for block in self.single_transformer_blocks:
            x = block(x, embedding, attention)
        x = x[:, :own]

        scale, shift = self.norm_out(embedding)  # in this order in the checkpoint
        x = self.proj_out(modulate(x, shift, scale))
        if parallel:
            x = parallel.gather(x, visual)
        grid = target.shape[2:]
        x = x[:, -math.prod(grid) :].unflatten(-1, (-1, *self.patch)).unflatten(1, grid)
        x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)  # [B, C, t, pt, h, ph, w, pw]
        return x.flatten(6).flatten(4, 5).flatten(2, 3)


def compiled(forward):
    """Compile a block's forward with dynamic shapes and correct gradients: torch 2.10 to 2.13 lose those of
    `Modulation` over thousands of tokens unless mix-order reductions are off (pytorch issue 193061)."""
    # Each kind of block needs a graph for short and long sequences, with and without mask, with and without
    # gradient; torch gives up after eight.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.optimize_ddp = False  # it would cut each block in two
    return torch.compile(forward, dynamic=True, options={"triton.mix_order_reduction": False})


# --- 4. VAE (appendix A): HunyuanVideo's causal 3D autoencoder ----------------------------------------------


@dataclass
class VAEConfig:
    """HunyuanVideo's autoencoder: 8x smaller in height and width, 4x in time."""

    latent_channels: int = 16
    block_out_channels: list = items(128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.476986
    tile_frames: list = items(16, 12)  # (length, stride) of tiles in time, in frames of pixels
    tile_pixels: list = items(256, 192)  # (side, stride) of tiles in space, in pixels
    untiled_area: int = 2**19  # frames of up to this many pixels are not tiled in space


def causal_conv(in_channels, out_channels, kernel=3, stride=1):
    """3D convolution with replicate padding: on both sides in space, only before the first frame in time."""
    side = (kernel - 1) // 2
    pad = nn.ReplicationPad3d((side, side, side, side, kernel - 1, 0))  # width, height, time
    return chain(pad=pad, conv=nn.Conv3d(in_channels, out_channels, kernel, stride))


class Resnet(nn.Module):
    """Residual block of two convolutions."""

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = causal_conv(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = causal_conv(out_channels, out_channels)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else causal_conv(in_channels, out_channels, kernel=1)

    def forward(self, x):
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return self.conv_shortcut(x) + hidden


class FrameAttention(nn.Module):
    """Single-head attention, causal over frames."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x):  # [B, C, T, H, W]
        tokens = self.group_norm(x).flatten(3).permute(0, 2, 3, 1)  # [B, T, H*W, C]
        layers = (self.to_q, self.to_k, self.to_v)
        q, k, v = (layer(tokens).flatten(1, 2)[:, :, None] for layer in layers)  # [B, T*H*W, 1 head, C]
        frame = x.shape[3] * x.shape[4]
        ends = range(frame, q.shape[1] + 1, frame)
        # Frame by frame: avoids a mask with quadratic memory.
        frames = [attend(q[:, end - frame : end], k[:, :end], v[:, :end]) for end in ends]
        return x + self.to_out(torch.cat(frames, 1)).mT.unflatten(2, x.shape[2:])


class Upsample(nn.Module):
    """Nearest-neighbour upsampling, then a convolution. The first frame is not repeated in time."""

    def __init__(self, channels, factor):
        super().__init__()
        self.factor = factor
        self.conv = causal_conv(channels, channels)

    def forward(self, x):
        repeated = F.interpolate(x, scale_factor=self.factor)
        return self.conv(repeated[:, :, self.factor[0] - 1 :])


class MidBlock(nn.Module):
    """The smallest level: resnets around attention."""

    def __init__(self, channels, groups):
        super().__init__()
        self.attentions = nn.ModuleList([FrameAttention(channels, groups)])
        self.resnets = nn.ModuleList([Resnet(channels, channels, groups) for _ in range(2)])

    def forward(self, x):
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


def levels(widths, layers, groups, up):
    """The levels of the encoder or, with `up`, of the decoder. All but the last end with a change of size:
    always in space, in the last two of these also in time."""
    blocks = []
    for i, (before, width) in enumerate(pairwise([widths[0], *widths])):
        resnets = [Resnet(before, width, groups)] + [Resnet(width, width, groups) for _ in range(layers - 1)]
        parts = {"resnets": nn.Sequential(*resnets)}
        factor = (2 if i >= len(widths) - 3 else 1, 2, 2)  # time, height, width
        if up and i < len(widths) - 1:
            parts["upsamplers"] = nn.Sequential(Upsample(width, factor))
        elif i < len(widths) - 1:
            parts["downsamplers"] = nn.Sequential(chain(conv=causal_conv(width, width, stride=factor)))
        blocks.append(chain(**parts))
    return nn.Sequential(*blocks)


def tiled(function, x, dim, sizes, ratio, lead=0):
    """Apply `function` to overlapping tiles of x along `dim` and blend where they overlap.

    The result is `ratio` times as long as x. `sizes` is the tiles' (length, stride), in frames or pixels.
    `lead` is 1 along time, where a tile's first frame has no past: tiles are longer by that frame, and all
    but the first drop its output.
    """
    tile, stride = (int(size / max(ratio, 1)) for size in sizes)  # in elements of x: pixels or latents
    length = x.shape[dim]
    if length <= tile:
        return function(x)
    step, overlap = int(stride * ratio), int((tile - stride) * ratio)
    result, previous = [], None
    for begin in range(0, length - lead, stride):
        output = function(x.narrow(dim, begin, min(tile + lead, length - begin))).movedim(dim, 0)
        first, output = output[:lead], output[lead:]
        if previous is None:
            result.append(first)
        else:
            blend = min(overlap, len(output), len(previous) - step)  # the last tiles may be short
            weight = (torch.arange(blend, device=x.device) / blend).to(output.dtype)
            weight = weight.view(-1, *[1] * (x.dim() - 1))
            blended = previous[step : step + blend] * (1 - weight) + output[:blend] * weight
            output = torch.cat([blended, output[blend:]])
        result.append(output[:step])
        previous = output
    return torch.cat(result).movedim(0, dim)


class VAE(nn.Module):
    """Pixels [B, 3, 4(T-1) + 1, 8H, 8W] in [-1, 1] <-> scaled latents [B, C, T, H, W]."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        widths, groups, layers = config.block_out_channels, config.norm_num_groups, config.layers_per_block
        self.encoder = chain(
            conv_in=causal_conv(3, widths[0]),
            down_blocks=levels(widths, layers, groups, up=False),
            mid_block=MidBlock(widths[-1], groups),
            conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=1e-6),
            silu=nn.SiLU(),
            conv_out=causal_conv(widths[-1], 2 * config.latent_channels),
        )
        self.decoder = chain(
            conv_in=causal_conv(config.latent_channels, widths[-1]),
            mid_block=MidBlock(widths[-1], groups),
            up_blocks=levels(widths[::-1], layers + 1, groups, up=True),
            conv_norm_out=nn.GroupNorm(groups, widths[0], eps=1e-6),
            silu=nn.SiLU(),
            conv_out=causal_conv(widths[0], 3),
        )
        self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, 1)

    def in_tiles(self, function, x, space, time):
        """Apply `function` to x in tiles: in time always, as the public model does; in space only where
        frames are large. `space` and `time` are the ratios of the result's size to x's."""
        if x.shape[3] * x.shape[4] * max(space, 1) ** 2 > self.config.untiled_area:
            for dim in (4, 3):
                function = partial(tiled, function, dim=dim, sizes=self.config.tile_pixels, ratio=space)
        return tiled(function, x, 2, self.config.tile_frames, time, lead=1)

    def moments(self, pixels):
        """The posterior's mean and log-variance, each [B, C, T, H, W], not scaled."""
        parts = self.in_tiles(lambda x: self.quant_conv(self.encoder(x)), pixels, space=1 / 8, time=1 / 4)
        return parts.chunk(2, 1)

    def encode(self, pixels):
        """Scaled latents: the posterior's mean instead of a sample, so that encoding is deterministic."""
        mean, _ = self.moments(pixels.to(self.quant_conv.weight.dtype))
        return mean * self.config.scaling_factor

    def decode(self, latents):
        """Pixels, not clamped."""
        latents = latents.to(self.quant_conv.weight.dtype) / self.config.scaling_factor
        return self.in_tiles(lambda z: self.decoder(self.post_quant_conv(z)), latents, space=8, time=4)


# --- 5. Rectified flow and guidance (appendix B) ------------------------------------------------------------


def shift_time(u, shift):
    """Timestep shift (table 1): move uniform u in [0, 1] to noise, where large outputs need more steps."""
    return shift * u / (1 - u + shift * u)


def flow_loss(velocity, data, noise, u, shift):
    """Rectified flow: on the straight line x_t = (1 - t) data + t noise the velocity is noise - data.
    -> the squared error [B] of velocity(x_t, t), for data and noise [B, C, T, H, W] and uniform u [B]."""
    t = shift_time(u, shift)
    weight = t.view(-1, 1, 1, 1, 1)
    x_t = (1 - weight) * data + weight * noise
    error = velocity(x_t, t).float() - (noise - data)
    return error.square().flatten(1).mean(1)


def guidance_weights(cfg_text, cfg_image):
    """The weight of each branch's velocity in the guided velocity (appendix B)

        v_image_dropped + cfg_image (v_text_dropped - v_image_dropped) + cfg_text (v - v_text_dropped),

    where "image_dropped" drops text and images. A scale of 1 or less turns that guidance off. The result is a
    weighted sum, so branches can run on different GPUs."""
    cfg_text, cfg_image = max(cfg_text, 1.0), max(cfg_image, 1.0)
    return {"full": cfg_text, "text_dropped": cfg_image - cfg_text, "image_dropped": 1 - cfg_image}


def sample(velocity, noise, steps, shift, progress=False):
    """Euler's method from noise to data, in float32. `velocity` is a function of (x, t [B])."""
    x = noise.float()
    times = shift_time(torch.linspace(1, 0, steps + 1), shift)
    for t, next_t in tqdm(pairwise(times), "denoising", steps, unit="step", disable=not progress):
        x = x - (t - next_t).to(x) * velocity(x, t.to(x).expand(len(x))).float()
    return x


# --- 6. Vino: all of it together (figure 3) -----------------------------------------------------------------


@dataclass
class SamplingConfig:
    """The release's defaults, as [image, video] where these differ. Appendix B has cfg_text 7 for text alone,
    and cfg_text 5 and cfg_image 1.5 with references."""

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
    negative_prompt: list = items(
        "low quality, blurry, distorted, malformed, watermark, text",
        "low quality, blurry, distorted, malformed, flickering, jitter, watermark, text",
    )
    rewrite: bool = False  # by default expand prompts without references
    rewrite_system: str = (
        "You are a helpful assistant aimed at generating an output video caption. Based on the user's input "
        "command, provide a caption describing the video and output it directly. "
    )

    def check(self):
        """Raise an InputError if a size or a number cannot be meant."""
        for name in ("image_size", "video_size"):
            size = getattr(self, name)
            if len(size) != 2 or not all(type(side) is int and side > 0 and side % 16 == 0 for side in size):
                raise InputError(f"field 'sampling.{name}' should be two multiples of 16, and is {size}")
        for name in ("reference_area", "frames", "fps", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"field 'sampling.{name}' should be at least 1")
        for name in ("shift", "cfg_text", "negative_prompt"):
            if len(getattr(self, name)) != 2:
                raise InputError(f"field 'sampling.{name}' should be two values, for images and videos")


@dataclass
class Config:
    """The full configuration; the defaults are the paper's model (3.1, Base Models). Field names follow the
    public config files, and a JSON file can override any field."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    mmdit: MMDiTConfig = field(default_factory=MMDiTConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    num_queries: int = 256  # learnable tokens; 0 is the ablation of figure 8
    boundary_tokens: bool = True  # False is the ablation of figure 11
    training: dict = field(default_factory=dict)  # changes to table 1, by stage: see train.py

    @classmethod
    def from_dict(cls, overrides, base=None, source="config"):
        """Apply `overrides` to the defaults, or to `base` in place. An InputError names a field that is
        unknown or has a wrong value, and the `source`."""
        config = base or cls()
        try:
            override(config, overrides, "")
            config.sampling.check()
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        return config


class Vino(nn.Module):
    """Figure 3. Parameter names are the public checkpoint's: `transformer.`, `mm_encoder.`, and `vae.`."""

    def __init__(self, config, tokenizer):
        super().__init__()
        self.config = config
        self.mm_encoder = MultiModalEncoder(config, tokenizer)
        self.transformer = MMDiT(config.mmdit)
        self.vae = VAE(config.vae).requires_grad_(False)

    @torch.no_grad()
    def encode(self, reference):
        """Both encoders on a Reference (2.2) -> EncodedReference."""
        features = self.mm_encoder.encode_vision(reference)
        latents = self.vae.encode(reference.pixels.to(features[0].device))
        return EncodedReference(latents, features, reference.grid, reference.is_video)

    def answer(self, questions, images=(), video=None):
        """The frozen VLM's answers to B questions about References (C.1, table 9)."""
        return self.mm_encoder.answer(questions, self.encode_all(images, video))

    def rewrite(self, prompts, images=(), video=None, seed=0):
        """Expand B prompts into captions with the VLM (tables 2 and 3 mark rewritten prompts by a dagger):
        caption i from seed + i, which decides what a prompt leaves open."""
        references = self.encode_all(images, video)
        return self.mm_encoder.answer(prompts, references, self.config.sampling.rewrite_system, seed)

    def encode_all(self, images, video):
        references = images if video is None else [*images, video]
        return [self.encode(reference) for reference in references]

    def remove_queries(self):
        """Go on without learnable queries (figures 8 and 13)."""
        self.config.num_queries = 0
        self.mm_encoder.metaquery = nn.Parameter(self.mm_encoder.metaquery[:0].detach().clone())

    def branches(self, prompts, negatives, references, base, cfg_text, cfg_image):
        """The guidance branches of non-zero weight (appendix B): {name: (weight, Condition)}.

        "text_dropped" has negative prompts and all references. "image_dropped" has negative prompts, the
        video and, with `base`, the last image, which is edited. With no image to drop, images do not guide.
        """
        images = [reference for reference in references if not reference.is_video]
        dropped = images[:-1] if base else images
        kept = [reference for reference in references if reference not in dropped]
        inputs = {
            "full": (prompts, references),
            "text_dropped": (negatives, references),
            "image_dropped": (negatives, kept),
        }
        weights = guidance_weights(cfg_text, cfg_image if dropped else 1.0)
        return {name: (weight, self.mm_encoder(*inputs[name])) for name, weight in weights.items() if weight}

    @torch.no_grad()
    def generate(
        self, prompts, images=(), video=None, *, size, base=False, steps=None, shift=None, cfg_text=None,
        cfg_image=None, negative_prompt=None, seed=0, noise=None, group=None, progress=False,
    ):  # fmt: skip
        """Make an image or a video for each prompt.

        Args:
            prompts: B texts, which call the References (`images`, `video`) Image 1, Image 2, ..., Video 1.
            size: (frames, height, width) of the result: 4k + 1, and multiples of 16.
            base: the last image is the one being edited, the others are references for the edit.
            steps, shift, cfg_text, cfg_image, negative_prompt: by default the config's, for image or video.
            seed: sample i starts from the noise of seed + i. noise: overrides it, [B, C, T, H, W].
            group: a process group of torch.distributed, whose ranks all call this and share the work.
        Returns: pixels [B, 3, frames, height, width], about in [-1, 1], not clamped; None on all ranks but 0.
        """
        defaults = self.config.sampling
        kind = 0 if size[0] == 1 else 1
        shift = defaults.shift[kind] if shift is None else shift
        cfg_text = defaults.cfg_text[kind] if cfg_text is None else cfg_text
        cfg_image = defaults.cfg_image if cfg_image is None else cfg_image
        negative = defaults.negative_prompt[kind] if negative_prompt is None else negative_prompt
        references, negatives = self.encode_all(images, video), [negative] * len(prompts)
        branches = self.branches(prompts, negatives, references, base, cfg_text, cfg_image)
        branches, parallel = share_branches(list(branches.values()), group)

        def guided(x, t):
            velocity = sum(weight * self.transformer(x, t, c, parallel).float() for weight, c in branches)
            if group:
                dist.all_reduce(velocity, group=group)
            return velocity

        if noise is None:
            shape = (self.config.vae.latent_channels, (size[0] - 1) // 4 + 1, size[1] // 8, size[2] // 8)
            seeds = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in seeds])
        noise = noise.to(self.mm_encoder.metaquery.device)
        latents = sample(guided, noise, steps or defaults.steps, shift, progress)
        if group and group.rank() > 0:
            return None
        return self.vae.decode(latents).float()

    @classmethod
    def load(cls, weights, config=None, device="cpu", dtype=torch.float32, base=False):
        """Build the model on `meta` and stream its weights straight to `device` and `dtype`.

        `weights`: a `.safetensors` file of this project; a folder with the public weights
        (`Qwen3-VL-4B-Instruct/`, `HunyuanVideo/`, `vino.ckpt`); "hub" to download those; or "random", from a
        fixed seed. `config`: by default the file's own, else the full size. `base`: where the folder lacks
        `vino.ckpt`, learnable queries and connectors are random, as before stage 1 (2.3).
        """
        base = base and Path(weights).is_dir() and not Path(weights, "vino.ckpt").exists()
        config, tokenizer, stream = open_weights(weights, config, device, base)
        with torch.device("meta"):
            model = cls(config, tokenizer)
        stream = stream or random_tensors(model.saved_tensors(), device, dtype)
        new = ("mm_encoder.metaquery", "mm_encoder.connector") if base else ()
        model.fill(stream, weights, device, dtype, new)
        return model.eval()

    def fill(self, stream, source, device, dtype, new=()):
        """Load the parameters from `stream`, a lazy iterator of (name, tensor). Those whose names begin with
        one of `new` are random if it lacks them."""
        expected, tensors = self.saved_tensors(), {}
        for name, tensor in stream:
            if name not in expected:
                raise InputError(f"{source}: surplus tensor '{name}', which this config has no place for")
            ours, theirs = list(expected[name].shape), list(tensor.shape)
            if ours != theirs:
                raise InputError(f"{source}: tensor '{name}' has shape {theirs}, the config asks for {ours}")
            tensors[name] = tensor.to(device, dtype)
        for name, parameter in expected.items():
            if name.startswith("transformer." + MMDiT.UNUSED):
                tensors.setdefault(name, torch.zeros(parameter.shape, dtype=dtype, device=device))
        lacking = {name: p for name, p in expected.items() if name.startswith(new) and name not in tensors}
        tensors |= random_tensors(lacking, device, dtype)
        missing = sorted(expected.keys() - tensors.keys())
        if missing:
            raise InputError(f"{source}: tensor '{missing[0]}' is missing ({len(missing)} in all)")
        self.load_state_dict(tensors, strict=False, assign=True)
        self.mm_encoder.mm_encoder.tie_weights()
        restore_buffers(self.mm_encoder.mm_encoder, self.config, device, dtype)

    def saved_tensors(self):
        """The state dict, without the language model's head if that is tied to the embedding."""
        tied = "mm_encoder.mm_encoder.lm_head.weight" if self.config.text.tie_word_embeddings else None
        return {name: tensor for name, tensor in self.state_dict().items() if name != tied}

    def save(self, path, tensors=None):
        """Save our weights, or `tensors` instead, as one `.safetensors` with config and tokenizer in its
        metadata. The file gets its name when it is complete."""
        tensors = tensors or self.saved_tensors()
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        config, tokenizer = json.dumps(asdict(self.config)), self.mm_encoder.tokenizer.to_str()
        unfinished = Path(f"{path}.partial")
        unfinished.touch()
        mode = unfinished.stat().st_mode  # a new file's; safetensors lets nobody but the owner read it
        save_file(tensors, unfinished, {"config": config, "tokenizer": tokenizer})
        unfinished.chmod(mode)
        unfinished.replace(path)

    def offload(self, device):
        """Move to a GPU that cannot hold all weights. Those of the MMDiT's blocks and of the VLM's layers
        stay in the host's memory, and FSDP copies them to the GPU one at a time."""
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
        # Under torchrun each process offloads for itself: its mesh, "alone", has one GPU.
        meshes = init_device_mesh("cuda", (dist.get_world_size(), 1), mesh_dim_names=("all", "alone"))
        vlm = self.mm_encoder.mm_encoder.model
        layers = [*vlm.visual.blocks, *vlm.language_model.layers, *self.transformer.blocks()]
        options = {"mesh": meshes["alone"], "reshard_after_forward": True}
        with torch.cuda.device(device):  # FSDP takes the current one
            for layer in layers:
                fully_shard(layer, offload_policy=CPUOffloadPolicy(), **options)
        on_host = {parameter for layer in layers for parameter in layer.parameters()}
        for tensor in [*self.parameters(), *self.buffers()]:
            if tensor not in on_host:
                tensor.data = tensor.data.to(device)


# --- 7. Several GPUs for one sample -------------------------------------------------------------------------


class SequenceParallel:
    """Sequence parallelism within one guidance branch (DeepSpeed-Ulysses). Each process holds a shard of the
    tokens; for attention, an all-to-all gives it all tokens and a shard of the heads. The number of processes
    divides the number of heads; both streams are padded to a multiple of the number of processes."""

    def __init__(self, group):
        self.group = group
        self.size = group.size()
        self.rank = group.rank()

    def shard(self, x, text, rope, mask):
        """This process's shard of both streams [B, L, D], and the attention over all shards.

        rope and mask cover the whole sequence [visual, text]. In attention tokens stand in order of process:
        visual and text of process 0, those of process 1, ... Only the mask has to follow that order."""
        streams = [x.shape[1], text.shape[1]]
        numbers = torch.arange(sum(streams), device=x.device).split(streams)
        shards = [F.pad(part, (0, -len(part) % self.size), value=-1).view(self.size, -1) for part in numbers]
        # Which token stands where. 5 visual, 3 of text, 2 processes: [[0, 1, 2, 5, 6], [3, 4, -1, 7, -1]]
        layout = torch.cat(shards, 1)
        kept = (layout.flatten() >= 0).nonzero()[:, 0]
        if mask is not None:
            mask = mask[:, layout.flatten()[kept]]
        own = layout[self.rank].clamp(min=0)  # token 0 serves as padding
        rope = [part[own] for part in rope]
        x, text = torch.cat([x, text], 1)[:, own].split([part.shape[1] for part in shards], 1)
        return x, text, partial(self.attend, rope=rope, mask=mask, kept=kept)

    def gather(self, x, length):
        """All shards [B, L / size, D] in their order, without padding: [B, length, D]."""
        shards = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(shards, x.contiguous(), group=self.group)
        return torch.cat(shards, 1)[:, :length]

    def attend(self, q, k, v, rope, mask, kept):
        """`attend` over all tokens: q, k, v [B, L / size, heads, head] -> [B, L / size, D]."""
        return self.attend_to_all(apply_rope(q, rope), apply_rope(k, rope), v, mask, kept)

    @torch.compiler.disable  # communication stays out of the compiled graphs
    def attend_to_all(self, q, k, v, mask, kept):
        q, k, v = (self.exchange(x, 2, 1) for x in (q, k, v))  # [B, padded L, heads / size, head]
        length = q.shape[1]
        if len(kept) < length:
            q, k, v = q[:, kept], k[:, kept], v[:, kept]
        x = attend(q, k, v, mask=mask)  # [B, L, D / size]
        if len(kept) < length:
            x = x.new_zeros(len(x), length, x.shape[2]).index_copy(1, kept, x)
        return self.exchange(x, 1, 2)

    def exchange(self, x, split, join):
        """All-to-all: send a part along dimension `split` to each process, join theirs along `join`."""
        parts = x.unflatten(split, (self.size, -1)).movedim(split, 0).contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self.group)
        return received.movedim(0, join).flatten(join, join + 1)


subgroups = lru_cache(dist.new_subgroups)  # made once, by all processes together


def share_branches(branches, group):
    """Divide guidance branches, (weight, Condition), among a group's processes: a team for each branch if
    that divides evenly, else one team for all. A team splits the tokens.

    Returns: the branches of this process, weighted so that the sum over all processes is the guided velocity,
        and its team's SequenceParallel or None."""
    if group is None:
        return branches, None
    teams = len(branches) if group.size() % len(branches) == 0 else 1
    size = group.size() // teams
    own = branches[group.rank() // size :: teams]
    own = [(weight / size, branch) for weight, branch in own]  # each of a team adds the same velocity
    return own, SequenceParallel(subgroups(size, group)[0]) if size > 1 else None


# --- 8. Reference pixels: letterboxing, resizing, the VLM's patches -----------------------------------------


def letterbox_size(width, height, area):
    """(h, w), multiples of 16, of the area closest to `area` at the aspect ratio width / height."""
    ratio = width / height
    middle = round(math.sqrt(area / ratio) / 16)
    sizes = []
    for h in range(16 * max(1, middle - 256), 16 * (middle + 257), 16):
        sizes.append((h, 16 * max(1, math.floor(ratio * h / 16))))
        sizes.append((h, 16 * max(1, math.ceil(ratio * h / 16))))
    return min(sizes, key=lambda size: (abs(size[0] * size[1] - area), abs(size[1] / size[0] - ratio), size))


def letterbox(image, area):
    """The PIL image scaled to fit `letterbox_size` and centred on white."""
    h, w = letterbox_size(*image.size, area)
    scale = min(w / image.width, h / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    corner = ((w - inner[0]) // 2, (h - inner[1]) // 2)
    canvas = Image.new("RGB", (w, h), "white")
    canvas.paste(image.convert("RGB").resize(inner, Image.LANCZOS), corner)
    return canvas


def scaled_size(path, width, height, area):
    """(h, w) of the given area at the aspect ratio width / height, for the picture or clip at `path`."""
    ratio = width / height
    h = math.sqrt(area / ratio)
    w = h * ratio
    if min(round(h), round(w)) < 16:
        raise InputError(f"{path}: {width} x {height} is too narrow: one side gets less than 16 pixels")
    return round(h), round(w)


def crop16(frames):
    """Frames [T, H, W, 3] cropped at bottom and right to multiples of 16."""
    height, width = (side // 16 * 16 for side in frames.shape[1:3])
    return frames[:, :height, :width]


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


def spread_frames(length, count):
    """Which frames of a clip the VLM sees: `count` indices from the first to the last one."""
    return torch.linspace(0, length - 1, count).round().int().tolist()


def to_frames(images):
    """PIL images of one size, or a uint8 array [T, H, W, 3] -> uint8 [T, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def resize(frames, size):
    """Antialiased bicubic resizing of [T, 3, H, W] to (h, w): of uint8 rounded, of floats not clamped."""
    return F.interpolate(frames, size, mode="bicubic", antialias=True)


def normalize(frames):
    """[T, 3, H, W] in 0..255 -> [1, 3, T, H, W] in [-1, 1]."""
    return frames.transpose(0, 1)[None].float() / 127.5 - 1


def patchify(pixels, config):
    """Pixels [B, 3, T, H, W] in [-1, 1] as Qwen's vision tower takes them: patches of a merged 2 x 2 group in
    a row, an odd last frame repeated -> patches [B, t*h*w, 3 * 2 * 16 * 16] and the grid (t, h, w)."""
    p, m, q = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    repeats = -pixels.shape[2] % q
    pixels = torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, repeats, -1, -1)], dim=2)
    # [B, 3, T, H, W] -> [B, 3, t, q, h, m, p, w, m, p]
    x = pixels.unflatten(4, (-1, m, p)).unflatten(3, (-1, m, p)).unflatten(2, (-1, q))
    grid = (x.shape[2], x.shape[4] * m, x.shape[7] * m)
    return x.permute(0, 2, 4, 7, 5, 8, 1, 3, 6, 9).flatten(6).flatten(1, 5).contiguous(), grid


@dataclass
class Reference:
    """A reference image or video, preprocessed for the VAE and for the VLM (2.2)."""

    pixels: Tensor  # [B, 3, T, H, W] in [-1, 1], for the VAE; T = 1 for an image
    patches: Tensor  # [B, t*h*w, 3*2*16*16], for the VLM
    grid: tuple  # (t, h, w): patches along time, height and width
    is_video: bool

    @classmethod
    def image(cls, image, area, config):
        """A PIL image, letterboxed to `area` pixels. `config` is a VisionConfig."""
        image = letterbox(image, area)
        h, w = vlm_size(image.height, image.width, *config.image_resize[0])
        seen = to_frames([image.resize((w, h), Image.BICUBIC)])
        seen = resize(seen, vlm_size(h, w, *config.image_resize[1]))
        patches, grid = patchify(normalize(seen), config)
        return cls(normalize(to_frames([image])), patches, grid, is_video=False)

    @classmethod
    def video(cls, frames, seen, config):
        """A clip, uint8 [T, H, W, 3]: `frames` (4k + 1 of them) for the VAE, and `seen` for the VLM, the
        `spread_frames` at the clip's own size."""
        rules = config.video_resize
        size = vlm_size(*seen.shape[1:3], *rules[0])
        seen = resize(to_frames(seen).float(), size).round().clamp(0, 255)
        seen = resize(seen, vlm_size(*size, *rules[1], frames=len(seen)))
        patches, grid = patchify(normalize(seen), config)
        return cls(normalize(to_frames(crop16(frames))), patches, grid, is_video=True)


# --- 9. Files: pictures and clips, tokenizers, weights ------------------------------------------------------


def existing(path):
    """The path, or an InputError that names it."""
    if not Path(path).exists():
        raise InputError(f"{path} does not exist")
    return Path(path)


@contextmanager
def reading(path, kind):
    """Turn whatever goes wrong while a file is read into an InputError of one line."""
    existing(path)
    try:
        yield
    except Exception as error:  # damaged files make readers fail in many ways
        reason = " ".join(str(error).split()).split(". ")[0]
        reason = f" ({reason})" if reason else ""
        raise InputError(f"{path} is not {kind}, or is cut short{reason}") from error


def read_image(path):
    """The picture at `path` as RGB: upright, and over white where it is transparent."""
    with reading(path, "an image"), Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I;16"):  # 16-bit grey, which `convert` would clip
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def read_frames(path, area=None):
    """The frames of the clip at `path`, one after the other: uint8 [H, W, 3], upright. With `area` the
    decoder scales them to that area at the clip's own aspect ratio (ffmpeg's bilinear filter)."""
    with reading(path, "a video"), imageio.imopen(path, "r", plugin="pyav") as file:
        height, width = file.properties(0).shape[:2]
        matrix = file.metadata(0).get("DISPLAYMATRIX")
    turns, filters = 0, None
    if matrix is not None:
        cosine, sine = np.frombuffer(matrix, np.int32)[:2] / 2**16  # of a turn to the right
        turns = round(-math.atan2(sine, cosine) / (math.pi / 2)) % 4  # quarters that make frames upright
    if area:
        if turns % 2:
            width, height = height, width
        h, w = scaled_size(path, width, height, area)
        scale = f"{h}:{w}" if turns % 2 else f"{w}:{h}"
        filters = [("scale", f"{scale}:flags=bilinear"), ("format", "rgb24")]
    with reading(path, "a video"), imageio.imopen(path, "r", plugin="pyav") as file:
        for frame in file.iter(format="rgb24", filter_sequence=filters):
            yield np.rot90(frame, turns)


def read_video(path, frames, area, config, length=None):
    """The clip at `path`, or its first `length` frames, as a Reference. The VAE gets at most `frames` of
    them, cut to 4k + 1 and decoded at `area` pixels; the VLM `config.video_frames` spread over all."""
    count = sum(1 for _ in islice(read_frames(path), length))
    if count < 5:
        raise InputError(f"{path} has {count} frame(s), and a video needs at least 5")
    first = islice(read_frames(path, area), (min(frames, count) - 1) // 4 * 4 + 1)
    wanted = spread_frames(count, config.video_frames)
    seen = {i: frame for i, frame in enumerate(islice(read_frames(path), count)) if i in wanted}
    return Reference.video(np.stack(list(first)), np.stack([seen[i] for i in wanted]), config)


def read_json(path):
    with reading(path, "JSON"):
        return json.loads(Path(path).read_bytes())


SPECIAL_TOKENS = (
    "<|im_end|> <|endoftext|> <|im_start|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()


def byte_tokenizer():
    """A tokenizer without a file, for random weights: the 256 bytes (their printable symbols, sorted), then
    the special tokens."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(split.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def read_tokenizer(folder):
    """The tokenizer of a public VLM's folder."""
    path = folder / "tokenizer.json"
    with reading(path, "a tokenizer"):
        return Tokenizer.from_file(str(path))


def override(node, overrides, prefix):
    """Set the fields of the dataclass `node`, in place, to the values of the dictionary `overrides`."""
    if not isinstance(overrides, dict):
        where = f"field '{prefix[:-1]}' " if prefix else ""
        raise InputError(f"{where}should be an object in braces")
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


def agree(ours, theirs, name, path):
    """Raise an InputError where the config at `path` differs from ours, in the fields that both have."""
    if isinstance(ours, dict):
        for key in sorted(ours.keys() & theirs.keys()):
            agree(ours[key], theirs[key], f"{name}.{key}", path)
    elif ours != theirs:
        raise InputError(f"field '{name}' does not fit: it is {ours} here, and {theirs} in {path}")


def read_config(path, weights):
    """The Config of a JSON file for `weights`. Fields that it leaves out come from `weights`, if that is a
    `.safetensors` of this project, else from the defaults."""
    base = read_metadata(weights, None)[0] if Path(weights).suffix == ".safetensors" else Config()
    training = base.training
    config = Config.from_dict(read_json(path), base, path)
    for stage, changes in training.items():
        own = config.training.setdefault(stage, {})
        config.training[stage] = changes | own if isinstance(own, dict) else own
    return config


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


HUB = {  # the public weights: repository -> files
    "Qwen/Qwen3-VL-4B-Instruct": ["*.json", "*.safetensors"],
    "hunyuanvideo-community/HunyuanVideo": ["transformer/*", "vae/*"],
    "SOTAMak1r/VINO-weight": ["vino.ckpt"],
}


def download(name, files):
    """The folder of a repository of the hub, with those of its files that match the patterns `files`."""
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise InputError(f"cannot download {name}: {' '.join(str(error).split())}") from error


def open_weights(weights, config, device, base_only=False):
    """Config, tokenizer, and a stream for `Vino.fill`, which is None for random weights."""
    if str(weights) == "random":
        return config or Config(), byte_tokenizer(), None
    if Path(weights).suffix == ".safetensors":
        config, tokenizer = read_metadata(weights, config)
        return config, tokenizer, read_safetensors(Path(weights), "", device)
    if str(weights) == "hub":
        vlm, base, vino = (download(name, files) for name, files in HUB.items())
    elif existing(weights).is_file():
        raise InputError(f"{weights} is neither a .safetensors nor a folder of the public weights")
    else:
        vino = Path(weights)
        vlm, base = (existing(vino / name) for name in ("Qwen3-VL-4B-Instruct", "HunyuanVideo"))
    config, ckpt = config or Config(), None if base_only else existing(vino / "vino.ckpt")
    return config, read_tokenizer(vlm), read_public(vlm, base, ckpt, config, device)


def random_tensors(expected, device, dtype):
    """A stream for `Vino.fill`: variance-preserving matrices and kernels, norms near 1, biases near 0. A GPU
    draws them if there is one, also for the host: the full size takes a CPU minutes."""
    if torch.device(device).type == "cpu" and torch.cuda.is_available():
        device = "cuda"
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in expected.items():
        x = torch.randn(tensor.shape, generator=generator, device=device, dtype=dtype)
        if tensor.dim() > 1:
            x *= math.prod(tensor.shape[1:]) ** -0.5
        else:
            x = float(name.endswith("weight")) + 0.02 * x
        yield name, x


def restore_buffers(vlm, config, device, dtype):
    """Give a VLM that was built on `meta` its RoPE frequencies, which no checkpoint holds: those of a VLM
    with the same heads and no layers. In bfloat16 they are rounded, as in the release."""
    text = replace(config.text, num_hidden_layers=0, vocab_size=1)
    vision = replace(config.vision, depth=0, deepstack_visual_indexes=[])
    small = build_vlm(replace(config, text=text, vision=vision))
    for name, buffer in small.named_buffers():
        module, _, leaf = name.rpartition(".")
        vlm.get_submodule(module).register_buffer(leaf, buffer.to(device, dtype), persistent=False)


def read_public(vlm, base, ckpt, config, device):
    """All tensors of the public weights, under our names; those of `vino.ckpt` win over the base model's."""
    ours = asdict(config)
    qwen = {"text_config": ours["text"], "vision_config": ours["vision"]}
    for part, folder in ((qwen, vlm), (ours["mmdit"], base / "transformer"), (ours["vae"], base / "vae")):
        path = folder / "config.json"
        agree(part, read_json(path), folder.name, path)
    yield from read_safetensors(vlm, "mm_encoder.mm_encoder.", device)
    yield from read_safetensors(base / "vae", "vae.", device)
    trained = read_checkpoint(ckpt) if ckpt else {}
    for name, tensor in trained.items():
        if not name.startswith("mm_encoder.mm_encoder."):  # the frozen VLM again
            yield name, tensor
    yield from read_safetensors(base / "transformer", "transformer.", device, skip=trained)


def open_safetensors(path, device="cpu"):
    with reading(path, "a safetensors file"):
        return safe_open(path, "pt", device=str(device))


def read_safetensors(path, prefix, device, skip=()):
    """(name, tensor on `device`) of all tensors in a file or in a folder's files but those in `skip`."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} holds no .safetensors file")
    for part in files:
        with open_safetensors(part, device) as file:
            for name in file.keys():
                if prefix + name not in skip:
                    yield prefix + name, file.get_tensor(name)


def read_checkpoint(path):
    """{name: tensor} of a `.ckpt` of torch. A tensor is read from the file when it is used."""
    with reading(path, "a checkpoint of named tensors"):
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise TypeError("it holds something other than tensors")
    return tensors
