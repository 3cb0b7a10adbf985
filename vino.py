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

"The release" is the authors' public inference code; where it differs from the paper, this file follows it.
Parameters carry the public checkpoints' names, so that real weights load without a renaming table.
Shapes: B batch, L tokens, T frames, H height, W width, C channels, D width of a transformer, R references;
t, h, w count patches.
"""

import json
import math
import pickle
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import lru_cache, partial
from itertools import islice, pairwise
from pathlib import Path

import av
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
    # The release resizes twice in turn: [sides are multiples of, fewest pixels, most pixels]. The limits of a
    # video's second resizing count the pixels of all its frames.
    image_resize: list = items([28, 4 * 28**2, 16384 * 28**2], [32, 2**16, 2**24])
    video_resize: list = items([28, 256 * 32**2, 768 * 28**2], [32, 2**12, 25165824])
    video_frames: int = 8  # appendix B


# Attention kernels that take any length as it comes: all but cuDNN's, which plans each new one for up to 2 s.
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

SYSTEM_PROMPT = "You are a helpful assistant aimed at generating an output video caption."


@dataclass
class Prompts:
    """Figure 4's template, filled in for B texts about the same references, and tokenised."""

    ids: Tensor  # [B, L]; before shorter texts stands padding
    positions: Tensor  # [3, B, L]: M-RoPE positions in time, height and width
    mask: Tensor | None  # [B, L], False at padding; None where there is none
    starts: list  # for each reference, the index of its (first) <|vision_start|>
    ends: list  # and of its (last) <|vision_end|>


def build_prompts(tokenizer, texts, references, merge, system=SYSTEM_PROMPT):
    """Figure 4 for each of B texts: system line, images, video, the user's text.

    Args:
        references: objects with `grid`, (t, h, w) in patches, and `is_video`; images before the one video.
        merge: the VLM's spatial_merge_size: merge x merge patches make one token.
    """
    tokenizer.encode_special_tokens = True  # special tokens spelled in user text are encoded as plain text
    ids, positions, starts, ends = [], [], [], []  # of what all prompts share

    def special(name):
        return [tokenizer.token_to_id(f"<|{name}|>")]

    def words(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    def append(tokens):
        begin = 1 + max(positions[-1]) if positions else 0
        ids.extend(tokens)
        positions.extend((place, place, place) for place in range(begin, begin + len(tokens)))

    append(special("im_start") + words(f"system\n{system}") + special("im_end") + words("\n"))
    append(special("im_start"))
    pending = "user\n"  # tokenised with the text that follows: a token may cross the border
    for number, reference in enumerate(references, 1):
        t, h, w = reference.grid[0], reference.grid[1] // merge, reference.grid[2] // merge
        pending += "Video 1: " if reference.is_video else f"Image {number}: "
        for pair in range(t):  # two frames of a video each; an image is one
            if reference.is_video:  # their mean timestamp at an assumed 24 frames a second
                pending += f"<{(2 * pair + 0.5) / 24:.1f} seconds>"
            append(words(pending))
            pending = ""
            if pair == 0:
                starts.append(len(ids))
            append(special("vision_start"))
            begin = 1 + max(positions[-1])
            ids.extend(special("video_pad" if reference.is_video else "image_pad") * (h * w))
            positions.extend((begin, begin + row, begin + column) for row in range(h) for column in range(w))
            append(special("vision_end"))
        ends.append(len(ids) - 1)

    closing = special("im_end") + words("\n") + special("im_start") + words("assistant\n")
    encodings = tokenizer.encode_batch([pending + text for text in texts], add_special_tokens=False)
    own = [encoding.ids + closing for encoding in encodings]
    longest = max(map(len, own))
    places = torch.arange(longest) - torch.tensor([[longest - len(row)] for row in own])  # below 0: padding
    own_positions = (1 + max(positions[-1]) + places.clamp(min=0)).expand(3, -1, -1)
    positions = torch.tensor(positions).T[:, None].expand(-1, len(own), -1)
    own_ids = torch.tensor([special("endoftext") * (longest - len(row)) + row for row in own])
    ids = torch.tensor(ids).expand(len(own), -1)
    mask = None
    if (places < 0).any():
        mask = F.pad(places >= 0, (ids.shape[1], 0), value=True)
    ids, positions = torch.cat([ids, own_ids], 1), torch.cat([positions, own_positions], 2)
    return Prompts(ids, positions, mask, starts, ends)


@dataclass(eq=False)
class EncodedReference:
    """A reference after both encoders: independent of the prompt, so all guidance branches share it."""

    latents: Tensor  # [B, C, T, H, W], scaled
    features: Tensor  # [B, t*h*w / 4, D] of the VLM
    deepstack: list  # same shape; one entry for each early layer of the language model that adds them
    grid: tuple  # (t, h, w) in patches
    is_video: bool


@dataclass
class LatentBlock:
    """A reference in the MMDiT: its latents between the two tokens that wrap it in the VLM (2.2)."""

    latents: Tensor  # [B, C, T, H, W]
    start: Tensor | None  # [B, D], projected; None in the ablation of figure 11
    end: Tensor | None


@dataclass
class Condition:
    """What the MMDiT is conditioned on."""

    tokens: Tensor  # [B, L, text_embed_dim]: prompt, then learnable queries
    mask: Tensor | None  # [B, L], True where valid; None where nothing is padded
    references: list  # LatentBlocks, in the prompt's order


class Connector(nn.Module):
    """Two-layer MLP from the VLM's hidden states to the MMDiT (2.1), behind the release's norm."""

    def __init__(self, in_dim, out_dim):
        super().__init__()
        hidden = 4 * out_dim
        self.norm_qwen = nn.RMSNorm(in_dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, out_dim))

    def forward(self, hidden):  # [..., in_dim] -> [..., out_dim]
        return self.mlp(self.norm_qwen(hidden))


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
        self.connector = Connector(width, config.mmdit.text_embed_dim)
        self.connector_vae_branch = Connector(width, config.mmdit.width)

    def forward(self, prompts, references, vae_branch=True):
        """The MMDiT's condition.

        A boundary token is the VLM's penultimate hidden state at <|vision_start|> or <|vision_end|> (2.2;
        figure 5: "projected from the VLM output"), and not the token's input embedding.

        Args:
            prompts: B texts.
            references: EncodedReferences of batch size B or 1, images before the video.
            vae_branch: False shows the references to the VLM only (image reconstruction, appendix B).
        """
        hidden, mask, starts, ends = self.hidden_states(prompts, references)
        hidden = hidden.to(self.connector.mlp[0].weight.dtype)
        blocks = []
        for reference, start, end in zip(references if vae_branch else [], starts, ends):
            if self.boundary_tokens:
                start = self.connector_vae_branch(hidden[:, start])  # [B, D]
                end = self.connector_vae_branch(hidden[:, end])
            else:
                start, end = None, None
            latents = reference.latents.expand(len(prompts), -1, -1, -1, -1)
            blocks.append(LatentBlock(latents, start, end))
        return Condition(self.connector(hidden), mask, blocks)

    def hidden_states(self, prompts, references):
        """The VLM's penultimate hidden states of the prompts and of the learnable queries that follow (2.1).

        The prompt runs first, without gradient, and fills a cache of keys and values; the queries then attend
        to it, with gradient. Attention is causal, so this equals a single pass, but keeps no activations of
        the prompt for the backward pass.

        Returns: hidden [B, L, D], mask [B, L] or None, and the indices of the references' boundary tokens,
            starts and ends, of each reference.
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
        """Run Prompts and their references' features through the language model, and fill `cache` with their
        keys and values -> last and penultimate hidden states, both [B, L, D]."""
        ids = prompts.ids.to(self.metaquery.device, non_blocking=True)
        embeds = self.mm_encoder.get_input_embeddings()(ids)  # [B, L, D]
        visual_mask, deepstack = None, None
        if references:
            names = ("<|image_pad|>", "<|video_pad|>")
            visual_mask = torch.isin(
                prompts.ids, torch.tensor([self.tokenizer.token_to_id(n) for n in names])
            )
            visual_mask = visual_mask.to(ids.device)
            layers = zip(*[[reference.features, *reference.deepstack] for reference in references])
            features, *deepstack = [
                torch.cat([part.expand(len(ids), -1, -1) for part in layer], 1).flatten(0, 1)
                for layer in layers  # in the order of their placeholders: [B * tokens, D]
            ]
            embeds = embeds.masked_scatter(visual_mask[..., None], features.to(embeds.dtype))
        return self.language(embeds, prompts.positions, prompts.mask, cache, visual_mask, deepstack)

    def language(self, embeds, positions, mask, cache, visual_mask=None, deepstack=None):
        """Run the language model on `embeds`, after what is in `cache` -> last and penultimate hidden states.

        Args: embeds [B, L, D]; positions [3, B, L]; mask [B, all tokens so far]; visual_mask [B, L], True at
        the tokens that get the deepstack features, each [tokens, D], in the first layers."""
        positions = positions.to(embeds.device)
        mask = None if mask is None else mask.to(embeds.device, torch.long)
        with sdpa_kernel(ANY_LENGTH):  # prompts differ in length
            # By position: transformers 4 and 5 name the cache differently. Without a cache they would take
            # jumps in the positions for the borders of packed sequences.
            visual = {"visual_pos_masks": visual_mask, "deepstack_visual_embeds": deepstack}
            language_model = self.mm_encoder.model.language_model
            output = language_model(None, mask, positions, cache, embeds, output_hidden_states=True, **visual)
        return output.last_hidden_state, output.hidden_states[-2]

    def encode_vision(self, reference):
        """The vision tower on a Reference: features [B, n, D], and the same for each deepstack layer."""
        vision = self.mm_encoder.model.visual
        batch = len(reference.patches)
        patches = reference.patches.flatten(0, 1).to(self.metaquery.device, vision.dtype)
        output = vision(patches, torch.tensor([reference.grid] * batch, device=patches.device))
        if isinstance(output, tuple):  # transformers 4
            features, deepstack = output
        else:
            features, deepstack = output.pooler_output, output.deepstack_features
        return features.unflatten(0, (batch, -1)), [layer.unflatten(0, (batch, -1)) for layer in deepstack]

    @torch.no_grad()
    def answer(self, prompts, references=(), system=SYSTEM_PROMPT, max_new_tokens=256):
        """The VLM's text answers to B prompts about EncodedReferences, by greedy decoding."""
        batch = build_prompts(self.tokenizer, prompts, references, self.merge, system)
        cache = DynamicCache()
        end = self.tokenizer.token_to_id("<|im_end|>")
        last, _ = self.prefill(batch, references, cache)
        positions, mask = batch.positions[:, :, -1:], batch.mask
        done = torch.zeros(len(last), dtype=torch.bool, device=last.device)
        ids = []
        while len(ids) < max_new_tokens and not done.all():
            ids.append(self.mm_encoder.lm_head(last[:, -1]).argmax(-1).masked_fill(done, end))  # [B]
            done |= ids[-1] == end
            positions = positions + 1
            mask = None if mask is None else F.pad(mask, (0, 1), value=True)
            embeds = self.mm_encoder.get_input_embeddings()(ids[-1][:, None])
            last, _ = self.language(embeds, positions, mask, cache)
        rows = torch.stack(ids, 1).tolist()
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def build_vlm(config):
    """Qwen3-VL of the config's sizes, with random weights; transformers knows the architecture."""
    text, vision = asdict(config.text), asdict(config.vision)
    for ours in ("image_resize", "video_resize", "video_frames"):
        del vision[ours]
    rope = {"rope_type": "default", "mrope_section": text.pop("mrope_section"), "mrope_interleaved": True}
    text["rope_scaling"] = rope  # transformers 5 calls it rope_parameters, and still takes the old name
    tie = text["tie_word_embeddings"]
    both = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie)
    return Qwen3VLForConditionalGeneration(both).eval()


# --- 2. Interleaved omnimodal context (2.2, figure 5): references, boundary tokens and target on one timeline


def pack(references, target):
    """Figure 5: one sequence of all references, each between its boundary tokens, and the noisy target, and
    the place of each token on the shared RoPE timeline.

    A boundary token takes one step of time, at (t, 0, 0). A block of latents takes one step for each of its
    frames, and its height and width start at 0. The target follows the last reference.

    Args:
        references: (start, patches, end) of each, in the prompt's order: boundary tokens [B, D] or None, and
            patch embeddings [B, D, T, H, W].
        target: patch embeddings [B, D, T, H, W].
    Returns:
        tokens [B, L, D], the target's last, and positions [L, 3] in time, height and width.
    """
    pieces = []
    for start, patches, end in references:
        if start is None:
            pieces.append(patches)
        else:
            pieces.extend([start[:, :, None, None, None], patches, end[:, :, None, None, None]])
    pieces.append(target)

    tokens, positions, time = [], [], 0
    for piece in pieces:
        t, h, w = (torch.arange(size, device=target.device) for size in piece.shape[2:])
        tokens.append(piece.flatten(2).mT.to(target.dtype))  # [B, T*H*W, D]
        positions.append(torch.cartesian_prod(time + t, h, w))  # [T*H*W, 3]
        time += len(t)
    return torch.cat(tokens, 1), torch.cat(positions)


def rope_3d(positions, axes_dim, theta):
    """RoPE's cosines and sines: angles position * theta**(-2i / d), where each axis gets d of the channels.

    Args: positions [L, 3]; axes_dim: three even numbers that add up to the head's size.
    Returns: cosines [L, 1, head / 2, 1], and sines [L, 1, head / 2, 2] with the signs of a rotation."""
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
    """Softmax attention of rotated queries and keys: q, k, v [B, L, heads, head] -> [B, L, D].

    `mask` [B, L] is True where a key may be seen; None where nothing is padded, which is faster."""
    if rope is not None:
        q = apply_rope(q, rope)
        k = apply_rope(k, rope)
    if mask is not None:
        mask = mask[:, None, None]  # [B, heads, queries, keys]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, L, head]
    # cuDNN's kernel, the fastest, is for sampling. It plans each new length anew, and up to torch 2.13 takes
    # the gradient of one block for one of another layout (pytorch pull request 191576): it gets wrong.
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

    def forward(self, latents, t, condition, group=None):
        """Velocity (noise - data) of the noisy target under one condition.

        Args:
            latents: [B, C, T, H, W], the target at time t [B] in [0, 1], 1 = noise.
            condition: a Condition of batch size B.
            group: a SequenceParallel of processes that share the tokens.
        Returns: [B, C, T, H, W].
        """
        dtype = self.proj_out.weight.dtype
        timestep = 999 * t  # as the release scales it
        target = self.x_embedder(latents.to(dtype))  # [B, D, t, h, w]
        references = [(r.start, self.x_embedder(r.latents.to(dtype)), r.end) for r in condition.references]
        x, positions = pack(references, target)  # [B, Lv, D], [Lv, 3]
        text = self.context_embedder(condition.tokens.to(dtype), condition.mask, timestep)  # [B, Lt, D]
        embed = self.time_text_embed
        guidance = torch.full_like(timestep, 1000.0)  # the release feeds the base model's guidance a constant
        embedding = embed.timestep_embedder(sinusoid(timestep, dtype))  # [B, D]
        embedding = embedding + embed.guidance_embedder(sinusoid(guidance, dtype))

        visual = x.shape[1]
        positions = F.pad(positions, (0, 0, 0, text.shape[1]))  # text is not rotated: it stays at (0, 0, 0)
        rope = rope_3d(positions, self.config.rope_axes_dim, self.config.rope_theta)
        mask = condition.mask
        if mask is not None:
            mask = F.pad(mask, (visual, 0), value=True)  # [B, Lv + Lt]
        attention = partial(attend, rope=rope, mask=mask)
        if group:
            x, text, attention = group.shard(x, text, rope, mask)

        for block in self.transformer_blocks:
            x, text = block(x, text, embedding, attention)
        streams = [x.shape[1], text.shape[1]]
        x = torch.cat([x, text], 1)
        for block in self.single_transformer_blocks:
            x = block(x, embedding, attention)
        x, _ = x.split(streams, 1)

        scale, shift = self.norm_out(embedding)  # in this order in the checkpoint
        x = self.proj_out(modulate(x, shift, scale))
        if group:
            x = group.gather(x, visual)
        grid = target.shape[2:]
        return self.unpatchify(x[:, -math.prod(grid) :], grid)

    def unpatchify(self, x, grid):  # [B, t*h*w, C * patch] -> [B, C, T, H, W]
        x = x.unflatten(-1, (-1, *self.patch)).unflatten(1, grid)  # [B, t, h, w, C, pt, ph, pw]
        return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)


def compiled(forward):
    """Compile a block's forward with dynamic shapes and correct gradients: torch 2.10 to 2.13 lose those of
    `Modulation` over thousands of tokens unless mix-order reductions are off (pytorch issue 193061)."""
    # Each kind of block needs a graph for short and long sequences, with and without mask, with and without
    # gradient; torch gives up after eight.
    torch._dynamo.config.recompile_limit = 64
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


class CausalConv3d(nn.Module):
    """3D convolution with replicate padding: on both sides in space, only before the first frame in time."""

    def __init__(self, in_channels, out_channels, kernel=3, stride=1):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride)
        side = (kernel - 1) // 2
        self.padding = (side, side, side, side, kernel - 1, 0)  # width, height, time

    def forward(self, x):
        return self.conv(F.pad(x, self.padding, mode="replicate"))


class Resnet(nn.Module):
    """Residual block of two convolutions."""

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        if in_channels != out_channels:
            self.conv_shortcut = CausalConv3d(in_channels, out_channels, kernel=1)

    def forward(self, x):
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        if hasattr(self, "conv_shortcut"):
            x = self.conv_shortcut(x)
        return x + hidden


class FrameAttention(nn.Module):
    """Single-head attention, causal over frames."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x):  # [B, C, T, H, W]
        tokens = self.group_norm(x).permute(0, 2, 3, 4, 1).flatten(2, 3)  # [B, T, H*W, C]
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        frames = []
        for t in range(x.shape[2]):  # frame by frame: avoids a mask with quadratic memory
            past = slice(0, t + 1)
            keys = k[:, None, past].flatten(2, 3)  # [B, 1 head, frames * H*W, C]
            values = v[:, None, past].flatten(2, 3)
            frames.append(F.scaled_dot_product_attention(q[:, None, t], keys, values))
        attended = self.to_out(torch.cat(frames, 1))  # [B, T, H*W, C]
        return x + attended.unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3)


def downsample(channels, factor):
    return chain(conv=CausalConv3d(channels, channels, stride=factor))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling, then a convolution. In time the first frame is not repeated."""

    def __init__(self, channels, factor):
        super().__init__()
        self.factor = factor
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x):
        repeated = F.interpolate(x, scale_factor=self.factor)
        return self.conv(repeated[:, :, self.factor[0] - 1 :])


def resnets(in_channels, out_channels, layers, groups):
    widths = [in_channels] + [out_channels] * layers
    return nn.Sequential(*[Resnet(a, b, groups) for a, b in pairwise(widths)])


class MidBlock(nn.Module):
    """The smallest level: resnets around attention."""

    def __init__(self, channels, groups):
        super().__init__()
        self.attentions = nn.ModuleList([FrameAttention(channels, groups)])
        self.resnets = resnets(channels, channels, 2, groups)

    def forward(self, x):
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


def levels(widths, layers, config, name, resample):
    """The levels of encoder or decoder: resnets. All but the last also resample, under the public `name`:
    always in space, and in the last two in time."""
    blocks = []
    for i, width in enumerate(widths):
        parts = {"resnets": resnets(widths[max(i - 1, 0)], width, layers, config.norm_num_groups)}
        if i < len(widths) - 1:
            factor = (2 if i >= len(widths) - 3 else 1, 2, 2)  # time, height, width
            parts[name] = nn.Sequential(resample(width, factor))
        blocks.append(chain(**parts))
    return nn.Sequential(*blocks)


def output_layers(width, channels, groups):
    """What ends encoder and decoder."""
    norm = nn.GroupNorm(groups, width, eps=1e-6)
    return {"conv_norm_out": norm, "silu": nn.SiLU(), "conv_out": CausalConv3d(width, channels)}


def build_encoder(config):
    """Pixels [B, 3, T, H, W] -> mean and log-variance of the posterior, [B, 2C, (T-1)/4 + 1, H/8, W/8]."""
    widths, groups = config.block_out_channels, config.norm_num_groups
    return chain(
        conv_in=CausalConv3d(3, widths[0]),
        down_blocks=levels(widths, config.layers_per_block, config, "downsamplers", downsample),
        mid_block=MidBlock(widths[-1], groups),
        **output_layers(widths[-1], 2 * config.latent_channels, groups),
    )


def build_decoder(config):
    """Latents [B, C, T, H, W] -> pixels [B, 3, 4(T-1) + 1, 8H, 8W]."""
    widths, groups = config.block_out_channels[::-1], config.norm_num_groups
    return chain(
        conv_in=CausalConv3d(config.latent_channels, widths[0]),
        mid_block=MidBlock(widths[0], groups),
        up_blocks=levels(widths, config.layers_per_block + 1, config, "upsamplers", Upsample),
        **output_layers(widths[-1], 3, groups),
    )


def tiled(function, x, dim, tile, stride, ratio, lead=0):
    """Apply `function` to overlapping tiles of x along `dim` and blend where they overlap. A tile begins
    every `stride`, is `tile` + `lead` long, and all but the first drop the first `lead` of their output.

    Args:
        tile, stride: in units of x. ratio: the output's length over the input's.
        lead: 1 along time, where a tile's first frame has no past.
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
        self.encoder = build_encoder(config)
        self.decoder = build_decoder(config)
        self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, 1)

    def in_tiles(self, function, x, space, time):
        """Apply `function` to x in tiles: in time always, as the public model does; in space only where
        frames are large. `space` and `time` are how much longer the result is than x. The config counts
        pixels and frames, of which the decoder's x, latents, has fewer."""
        frames = [int(n / max(time, 1)) for n in self.config.tile_frames]
        sides = [int(n / max(space, 1)) for n in self.config.tile_pixels]
        if x.shape[3] * x.shape[4] * max(space, 1) ** 2 > self.config.untiled_area:
            in_columns = partial(tiled, function, dim=4, tile=sides[0], stride=sides[1], ratio=space)
            function = partial(tiled, in_columns, dim=3, tile=sides[0], stride=sides[1], ratio=space)
        return tiled(function, x, 2, *frames, time, lead=1)

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

    Args: velocity, the function of (x_t, t) that predicts it; data, noise [B, C, T, H, W]; u [B], uniform in
    [0, 1]. Returns the squared error of each sample, [B]."""
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


def time_steps(steps, shift):
    """Descending times [steps], starting at 1, and step sizes [steps]; the last step ends at 0."""
    times = shift_time(torch.linspace(1, 0, steps + 1), shift)
    return times[:-1], times[:-1] - times[1:]


def sample(velocity, noise, steps, shift, progress=False):
    """Euler's method from noise to data, in float32. `velocity` is a function of (x, t [B])."""
    x = noise.float()
    times, differences = time_steps(steps, shift)
    for t, dt in zip(tqdm(times, desc="denoising", unit="step", disable=not progress), differences):
        x = x - dt.to(x) * velocity(x, t.to(x).expand(len(x))).float()
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
    rewrite: bool = False  # expand prompts that have no references by default
    rewrite_system: str = (
        "You are a helpful assistant aimed at generating an output video caption. Based on the user's input "
        "command, provide a caption describing the video and output it directly. "
    )
    rewrite_prefix: str = ""  # stands before a prompt without references that is to be rewritten


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
    def from_dict(cls, overrides, base=None):
        """Apply `overrides` to the defaults, or to `base` in place. An InputError names a field that is
        unknown or has the wrong type."""
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
        features, deepstack = self.mm_encoder.encode_vision(reference)
        latents = self.vae.encode(reference.pixels.to(features.device))
        return EncodedReference(latents, features, deepstack, reference.grid, reference.is_video)

    def velocity(self, latents, t, condition):
        """Predicted noise - data, [B, C, T, H, W], at times t [B]."""
        return self.transformer(latents, t, condition)

    def answer(self, questions, images=(), video=None):
        """The frozen VLM's answers to B questions about References (C.1, table 9)."""
        return self.mm_encoder.answer(questions, self.encode_all(images, video))

    def rewrite(self, prompts, images=(), video=None):
        """Expand B prompts into captions with the VLM (tables 2 and 3 mark rewritten prompts by a dagger)."""
        sampling, references = self.config.sampling, self.encode_all(images, video)
        if not references:
            prompts = [sampling.rewrite_prefix + prompt for prompt in prompts]
        return self.mm_encoder.answer(prompts, references, sampling.rewrite_system)

    def encode_all(self, images, video):
        references = images if video is None else [*images, video]
        return [self.encode(reference) for reference in references]

    def remove_queries(self):
        """Go on without learnable queries (figures 8 and 13)."""
        self.config.num_queries = 0
        self.mm_encoder.metaquery = nn.Parameter(self.mm_encoder.metaquery[:0].detach().clone())

    def branches(self, prompts, negatives, references, base, cfg_text, cfg_image):
        """The guidance branches of non-zero weight (appendix B): {name: (weight, Condition)}.

        Args:
            prompts, negatives: lists of B texts; a negative prompt replaces a dropped one.
            references: EncodedReferences. "text_dropped" keeps all of them. "image_dropped" drops the text,
                too, and keeps the video and, with `base`, the last image, the one being edited; without any
                other image there is no image guidance.
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
            prompts: B texts; `images` (References, in order) and `video` (a Reference) are named in them as
                Image 1, Image 2, ..., Video 1. References have batch size B or 1.
            size: (frames, height, width) of the result: 4k + 1, and multiples of 16.
            base: the last image is the one being edited, the others are references for the edit.
            steps, shift, cfg_text, cfg_image, negative_prompt: by default the config's, for image or video.
            seed: sample i starts from the noise of seed + i. noise: overrides it, [B, C, T, H, W].
            group: a process group of torch.distributed, whose ranks all call this and share the work.
        Returns: pixels [B, 3, frames, height, width], about in [-1, 1], not clamped; None on all ranks but 0.
        """
        defaults = self.config.sampling
        kind = 0 if size[0] == 1 else 1
        negative = defaults.negative_prompt[kind] if negative_prompt is None else negative_prompt
        branches = self.branches(
            prompts,
            [negative] * len(prompts),
            self.encode_all(images, video),
            base,
            defaults.cfg_text[kind] if cfg_text is None else cfg_text,
            defaults.cfg_image if cfg_image is None else cfg_image,
        )
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
        shift = defaults.shift[kind] if shift is None else shift
        latents = sample(guided, noise, steps or defaults.steps, shift, progress)
        if group and group.rank() > 0:
            return None
        return self.vae.decode(latents).float()

    @classmethod
    def load(cls, weights, config=None, device="cpu", dtype=torch.float32):
        """Build the model on `meta` and stream its weights straight to `device` and `dtype`.

        Args:
            weights: a `.safetensors` file of this project; a folder with the public weights
                (`Qwen3-VL-4B-Instruct/`, `HunyuanVideo/`, `vino.ckpt`); "hub" to download those; or "random"
                for random weights from a fixed seed.
            config: a Config; by default the file's own, else the full size.
        Raises: InputError that names the file, and the tensor or field that is missing, unexpected or of the
            wrong shape.
        """
        config, tokenizer, stream = open_weights(weights, config, device)
        with torch.device("meta"):
            model = cls(config, tokenizer)
        model.fill(stream or random_tensors(model.saved_tensors(), device, dtype), weights, device, dtype)
        return model.eval()

    def fill(self, stream, source, device, dtype):
        """Load the parameters from `stream`, a lazy iterator of (name, tensor)."""
        expected, tensors = self.saved_tensors(), {}
        for name, tensor in stream:
            if name not in expected:
                raise InputError(f"{source}: surplus tensor '{name}', which this config has no place for")
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
        tokenizer, unfinished = self.mm_encoder.tokenizer.to_str(), Path(f"{path}.partial")
        unfinished.touch()
        mode = unfinished.stat().st_mode  # a new file's; safetensors lets nobody but the owner read it
        save_file(tensors, unfinished, {"config": json.dumps(asdict(self.config)), "tokenizer": tokenizer})
        unfinished.chmod(mode)
        unfinished.replace(path)

    def offload(self, device):
        """Move to a GPU that cannot hold all weights. Those of the MMDiT's blocks and of the VLM's layers
        stay in the host's memory, from where they visit the GPU in turn."""
        vlm, visitors = self.mm_encoder.mm_encoder.model, set()
        for layers in (vlm.visual.blocks, vlm.language_model.layers, self.transformer.blocks()):
            visitors |= Visits(layers, device).hosts.keys()
        for tensor in [*self.parameters(), *self.buffers()]:
            if tensor not in visitors:
                tensor.data = tensor.data.to(device)


class Visits:
    """Layers that run one after the other, with weights in the host's pinned memory. While one layer
    computes, the next one's weights travel to the GPU."""

    def __init__(self, layers, device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.hosts = {}
        for layer, following in zip(layers, [*layers[1:], None]):
            for parameter in layer.parameters():
                parameter.data = self.hosts[parameter] = parameter.data.pin_memory()
            layer.register_forward_pre_hook(partial(self.enter, following))
            layer.register_forward_hook(self.leave)
        self.left = torch.cuda.Event()

    def fetch(self, layer):
        with torch.cuda.stream(self.stream):
            for parameter in layer.parameters():
                if not parameter.is_cuda:
                    parameter.data = self.hosts[parameter].to(self.device, non_blocking=True)

    def enter(self, following, layer, inputs):
        self.fetch(layer)  # the first layer; the others have been fetched by the one before
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        if following is not None:
            self.fetch(following)

    def leave(self, layer, inputs, output):
        stream = torch.cuda.current_stream(self.device)
        for parameter in layer.parameters():
            parameter.data.record_stream(stream)
            parameter.data = self.hosts[parameter]
        self.left.synchronize()  # Python may run one layer ahead of the GPU, or all would visit it at once
        self.left.record(stream)


# --- 7. Several GPUs for one sample -------------------------------------------------------------------------


class SequenceParallel:
    """Sequence parallelism within one guidance branch (DeepSpeed-Ulysses). Each process holds a shard of the
    tokens; for attention, an all-to-all gives it all tokens and a shard of the heads. The number of processes
    divides the number of heads; streams are padded to a multiple of it."""

    def __init__(self, group):
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def shard(self, x, text, rope, mask):
        """This process's shard of both streams [B, L, D], and the attention over all shards.

        rope and mask cover the whole sequence [visual, text]. In attention, tokens are ordered by process:
        visual and text of process 0, those of process 1, ... Only the mask has to follow that order."""
        visual, words = x.shape[1], text.shape[1]
        streams = torch.arange(visual + words, device=x.device).split([visual, words])
        shards = [F.pad(part, (0, -len(part) % self.size), value=-1).chunk(self.size) for part in streams]
        # Which token stands where. 5 visual, 3 of text, 2 processes: [[0, 1, 2, 5, 6], [3, 4, -1, 7, -1]]
        layout = torch.stack([torch.cat(shard) for shard in zip(*shards)])
        kept = (layout.flatten() >= 0).nonzero()[:, 0]
        if mask is not None:
            mask = mask[:, layout.flatten()[kept]]
        own_rope = [part[layout[self.rank].clamp(min=0)] for part in rope]
        return self.own(x), self.own(text), partial(self.attend, rope=own_rope, mask=mask, kept=kept)

    def own(self, stream):
        padded = F.pad(stream, (0, 0, 0, -stream.shape[1] % self.size))
        return padded.chunk(self.size, 1)[self.rank].contiguous()

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


@lru_cache  # subgroups are made once, by all processes together
def subgroup(size, group):
    return dist.new_subgroups(size, group)[0]


def share_branches(branches, group):
    """Divide guidance branches among a group's processes: a team for each branch if that divides evenly, else
    one team for all branches. A team splits the tokens.

    Args: (weight, Condition) of each branch.
    Returns: those of this process, weighted so that the sum over all processes is the guided velocity, and
        the team's SequenceParallel, or None."""
    if group is None:
        return branches, None
    teams = len(branches) if group.size() % len(branches) == 0 else 1
    size = group.size() // teams
    own = branches[group.rank() // size :: teams]
    own = [(weight / size, branch) for weight, branch in own]  # each of a team adds the same velocity
    return own, SequenceParallel(subgroup(size, group)) if size > 1 else None


# --- 8. Reference pixels: letterboxing, resizing, the VLM's patches -----------------------------------------


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
    """(h, w) of the given area at the aspect ratio width / height: the size at which a clip is decoded."""
    h = math.sqrt(area / (width / height))
    return round(h), round(h * (width / height))


def crop16(frames):
    """Frames [T, H, W, 3] cropped at bottom and right to multiples of 16."""
    height, width = frames.shape[1:3]
    return frames[:, : height // 16 * 16, : width // 16 * 16]


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


@contextmanager
def decoding(path):
    """Turn any decoder's error into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # decoders fail in many ways
        raise InputError(f"{path} is not a video, or is cut short") from error


def read_frames(path, area=None):
    """The frames of the clip at `path`, one after the other: uint8 [H, W, 3], upright. With `area` the
    decoder scales them to so many pixels at the clip's own aspect ratio (ffmpeg's bilinear filter)."""
    path, scale = existing(path), None
    # Not with imageio, which collects garbage after each file: a training step waits a second for that.
    with decoding(path), av.open(str(path)) as file:
        for frame in file.decode(video=0):
            turns = round(frame.rotation / 90)  # to the left
            if area and not scale:
                sideways = turns % 2
                upright = (frame.height, frame.width) if sideways else (frame.width, frame.height)
                size = video_size(*upright, area)
                if min(size) < 16:
                    shape = f"{upright[0]} x {upright[1]}"
                    raise InputError(f"{path}: {shape} is too narrow: one side gets less than 16 pixels")
                scale = scaler(file.streams.video[0], *(size[::-1] if sideways else size))
            frame = scale(frame) if scale else frame
            yield np.rot90(frame.to_ndarray(format="rgb24"), turns)


def scaler(stream, height, width):
    """ffmpeg's bilinear filter as a function of a stream's frames."""
    graph = av.filter.Graph()
    source, sink = graph.add_buffer(template=stream), graph.add("buffersink")
    scale = graph.add("scale", f"{width}:{height}:flags=bilinear")
    graph.link_nodes(source, scale, graph.add("format", "rgb24"), sink).configure()

    def filtered(frame):
        graph.push(frame)
        return graph.pull()

    return filtered


def read_video(path, frames, area, config, length=None):
    """The clip at `path`, or its first `length` frames, as a Reference. The VAE gets at most `frames` of
    them, cut to 4k + 1 and decoded at `area` pixels; the VLM `config.video_frames` spread over all."""
    count = sum(1 for _ in islice(read_frames(path), length))
    if count < 5:
        raise InputError(f"{path} has {count} frame(s), and the VAE needs at least 5")
    first = islice(read_frames(path, area), (min(frames, count) - 1) // 4 * 4 + 1)
    wanted = spread_frames(count, config.video_frames)
    seen = {i: frame for i, frame in enumerate(islice(read_frames(path), count)) if i in wanted}
    return Reference.video(np.stack(list(first)), np.stack([seen[i] for i in wanted]), config)


def read_json(path):
    path = existing(path)
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON, or is cut short ({error})") from error


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


def read_tokenizer(folder):
    """The tokenizer of a public VLM's folder."""
    return Tokenizer.from_str(json.dumps(read_json(folder / "tokenizer.json")))


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


def agree(ours, theirs, name, path):
    """Raise an InputError where the config at `path` differs from ours, in the fields that both have."""
    if isinstance(ours, dict):
        for key in sorted(ours.keys() & theirs.keys()):
            agree(ours[key], theirs[key], f"{name}.{key}", path)
    elif ours != theirs:
        raise InputError(f"field '{name}' does not fit: it is {ours} here, and {theirs} in {path}")


def read_config(path, weights):
    """The Config of a JSON file for `weights`. Fields that it does not name come from these, if they are a
    `.safetensors` of this project, else from the defaults."""
    base = read_metadata(weights, None)[0] if Path(weights).suffix == ".safetensors" else Config()
    training = base.training
    config = Config.from_dict(read_json(path), base)
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


def open_weights(weights, config, device):
    """Config, tokenizer, and a stream for `Vino.fill`, which is None for random weights."""
    if str(weights) == "random":
        return config or Config(), byte_tokenizer(), None
    if Path(weights).suffix == ".safetensors":
        config, tokenizer = read_metadata(weights, config)
        return config, tokenizer, read_safetensors([weights], "", device)
    if str(weights) == "hub":
        vlm, base, vino = (download(name, files) for name, files in HUB.items())
    else:
        vino = existing(weights)
        vlm, base = (existing(vino / name) for name in ("Qwen3-VL-4B-Instruct", "HunyuanVideo"))
    config, ckpt = config or Config(), existing(vino / "vino.ckpt")
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
    yield from read_safetensors(shards(vlm), "mm_encoder.mm_encoder.", device)
    yield from read_safetensors(shards(base / "vae"), "vae.", device)
    trained = read_checkpoint(ckpt)
    for name, tensor in trained.items():
        if not name.startswith("mm_encoder.mm_encoder."):  # the frozen VLM again
            yield name, tensor
    yield from read_safetensors(shards(base / "transformer"), "transformer.", device, skip=trained)


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


def open_safetensors(path, device="cpu"):
    try:
        return safe_open(existing(path), "pt", device=str(device))
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file, or is cut short ({error})") from error


def read_safetensors(paths, prefix, device, skip=()):
    """(name, tensor on `device`) of the tensors in the files, one by one, but for the names in `skip`."""
    for path in paths:
        with open_safetensors(path, device) as file:
            for name in file.keys():
                if prefix + name not in skip:
                    yield prefix + name, file.get_tensor(name)


def read_checkpoint(path):
    """{name: tensor} of a `.ckpt` of torch. A tensor is read from the file when it is used."""
    try:
        tensors = torch.load(existing(path), map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} is not a checkpoint of plain tensors, or is cut short") from error
    if not (isinstance(tensors, dict) and all(isinstance(tensor, Tensor) for tensor in tensors.values())):
        raise InputError(f"{path} holds something other than named tensors")
    return tensors
