"""Make the tiny model that the three stages start from: "stage 0", in place of what the paper downloads.

    python -m toy.pretrain            all three parts, one after the other
    python -m toy.pretrain --part vlm --weights runs/pretrain-vae/final.safetensors

    vae      the autoencoder, on images and clips
    vlm      the vision-language model: it describes what it sees, and captions the result that a prompt or
             an instruction asks for
    mmdit    text to image and video, with a text encoder of its own. This encoder is thrown away, so that
             stage 1 has to align the VLM with the MMDiT (2.3)

The loop, its checkpoints and its pictures are train.py's.
"""

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

import train
from toy.language import toy_tokenizer
from toy.world import ToyWorld
from train import HERE, Objective, Run, Stage, chance, draw_noise, make_stage
from vino import (
    SYSTEM_PROMPT, Condition, Config, EncodedReference, Modulation, Vino, attend, build_prompts, read_config,
    read_json,
)  # fmt: skip

TOY = dict(beta1=0.9, beta2=0.99, ema=0.0, area=64**2, drop=0.0, warmup=200, checkpointing=False)
PARTS = {
    "vae": Stage(lr=1.5e-3, steps=15_200, cooldown=9_900, shift=1.0, batch=16, trainable=["vae."], **TOY,
                 mixture={"t2i": 0.3, "t2v": 0.7}),
    "vlm": Stage(lr=1.5e-3, steps=8_500, cooldown=2_500, shift=1.0, batch=256,
                 trainable=["mm_encoder.mm_encoder."], **TOY,
                 mixture={"look": 0.07, "watch": 0.05, "t2i": 0.13, "t2v": 0.09, "i2v": 0.04, "motion": 0.03}
                 | {"ti2i": 0.20, "ti2i_ref": 0.13, "ti2v": 0.10, "tv2v": 0.11, "tiv2v": 0.05}),
    "mmdit": Stage(lr=2e-3, steps=4_500, cooldown=1_500, shift=3.0, batch=256, encode_once=8_192,
                   trainable=["native_text.", "transformer."], **TOY | {"drop": 0.1},
                   mixture={"t2i": 0.5, "t2v": 0.5}),
}  # fmt: skip
KL = 3e-5  # weight of the KL divergence from the standard normal distribution, against the squared error
EDGE = 4  # extra weight of errors at edges, where shapes blur


def edges(pixels):
    """[B, 3, T, H, W] -> booleans [B, 1, T, H, W]: the pixels that differ from the mean of the 3x3 around
    them, and their neighbours."""
    around = {"kernel_size": (1, 3, 3), "stride": 1, "padding": (0, 1, 1)}
    mean = F.avg_pool3d(pixels, **around, count_include_pad=False)
    difference = (pixels - mean).abs().amax(1, keepdim=True)
    return F.max_pool3d(difference, **around) > 0.05


class Autoencoding(Objective):
    """The VAE's: squared error, which counts more at edges, and a little of the posterior's KL divergence
    from the standard normal distribution."""

    def loss(self, batch):
        vae = self.vino.vae
        mean, log_variance = (part.float() for part in vae.moments(batch.target))
        noise = draw_noise(batch.key, mean)[1]
        output = vae.decode((mean + noise * (log_variance / 2).exp()) * vae.config.scaling_factor)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
        weight = 1.0 + EDGE * edges(batch.target)
        error = (output.float() - batch.target).square() * weight / weight.mean((1, 2, 3, 4), keepdim=True)
        return error.flatten(1).mean(1) + KL * divergence.flatten(1).mean(1)

    def picture(self, batch):
        return self.vino.vae.decode(self.vino.vae.encode(batch.target)).float(), batch.prompts


class BatchedFrameAttention(nn.Module):
    """Attention of Qwen3-VL's vision tower within each frame, in one batch of frames of one size.
    transformers loops over the frames, which takes five times as long in training."""

    def __init__(self, attention):
        super().__init__()
        self.heads, self.qkv, self.proj = attention.num_heads, attention.qkv, attention.proj

    def forward(self, hidden_states, cu_seqlens, position_embeddings, **_):
        """All patches [L, D], the borders of the frames, and RoPE's cosines and sines -> [L, D]."""
        cos, sin = (x[:, None] for x in position_embeddings)  # [L, 1, head]
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.heads, -1)).unbind(1)  # [L, heads, head]
        rotated = [torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) for x in (q, k)]
        q, k = ((x * cos + y * sin).to(v.dtype) for x, y in zip((q, k), rotated))
        frames = len(cu_seqlens) - 1
        q, k, v = (x.unflatten(0, (frames, -1)) for x in (q, k, v))  # [frames, L / frames, heads, head]
        return self.proj(attend(q, k, v).flatten(0, 1))


class Captioning(Objective):
    """The VLM's: next-token cross-entropy of the answer to what people type. Half of the answers that caption
    a result yet to be made come under the system line for rewriting."""

    sometimes_used = "mm_encoder.mm_encoder.model.visual"

    def __init__(self, vino, shift):
        super().__init__(vino, shift)
        for block in vino.mm_encoder.mm_encoder.model.visual.blocks:
            block.attn = BatchedFrameAttention(block.attn)

    def loss(self, batch):
        vlm, seen = self.vino.mm_encoder, batch.references
        references = [EncodedReference(None, vlm.encode_vision(r), r.grid, r.is_video) for r in seen]
        rewrites = batch.task not in ("look", "watch") and chance(*batch.key, "system").random() < 0.5
        system = self.vino.config.sampling.rewrite_system if rewrites else SYSTEM_PROMPT
        prompts = build_prompts(vlm.tokenizer, batch.short_prompts, references, vlm.merge, system)
        end = vlm.tokenizer.token_to_id("<|im_end|>")
        answers = [[*encoding.ids, end] for encoding in vlm.tokenizer.encode_batch(batch.answers)]
        most = max(map(len, answers))
        wanted = torch.tensor([answer + [-100] * (most - len(answer)) for answer in answers])
        answered = replace(
            prompts,
            ids=torch.cat([prompts.ids, wanted[:, :-1].clamp(min=0)], 1),
            positions=torch.cat([prompts.positions, prompts.positions[:, :, -1:] + torch.arange(1, most)], 2),
            mask=None if prompts.mask is None else F.pad(prompts.mask, (0, most - 1), value=True),
        )
        last, _ = vlm.prefill(answered, references, DynamicCache())
        logits = vlm.mm_encoder.lm_head(last[:, -most:]).mT.float()  # [B, vocabulary, most]
        wanted = wanted.to(logits.device)
        losses = F.cross_entropy(logits, wanted, reduction="none")
        return losses.sum(1) / (wanted >= 0).sum(1)

    def picture(self, batch):
        references = [self.vino.encode(reference) for reference in batch.references]
        return batch.target, self.vino.mm_encoder.answer(batch.short_prompts, references)


class TextToVideo(Objective):
    """Rectified flow under a text encoder of the tiny model's own: word and position embeddings."""

    def __init__(self, vino, shift):
        super().__init__(vino, shift)
        width = vino.config.mmdit.text_embed_dim
        words, places = nn.Embedding(vino.config.text.vocab_size, width), nn.Embedding(256, width)
        self.native_text = nn.ModuleDict({"words": words, "places": places})

    def condition(self, batch):
        tokenizer, device = self.vino.mm_encoder.tokenizer, self.native_text.words.weight.device
        start = tokenizer.token_to_id("<|im_start|>")
        ids = [torch.tensor([start, *encoding.ids]) for encoding in tokenizer.encode_batch(batch.prompts)]
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1).to(device)
        places = torch.arange(ids.shape[1], device=device)
        tokens = self.native_text.words(ids.clamp(min=0)) + self.native_text.places(places)
        return Condition(tokens, ids >= 0, [])


OBJECTIVES = {"vae": Autoencoding, "vlm": Captioning, "mmdit": TextToVideo}


@torch.no_grad()
def quieten(vino):
    """Let residual branches and the velocity start at zero: zero their last matrix, or their gate."""
    ends = ("conv2.conv", "attentions.0.to_out.0", "o_proj", "down_proj", "attn.proj", "mlp.linear_fc2")
    for name, module in vino.named_modules():
        if name.endswith((*ends, "transformer.proj_out")) or isinstance(module, Modulation):
            for parameter in module.parameters():
                parameter.zero_()


@torch.no_grad()
def scale_latents(run):
    """Give latents the standard deviation of the noise, 1, for rectified flow."""
    latents = []
    for task in run.source.tasks:
        drawn = [run.source.draw(task, 0, -1 - number) for number in range(64)]
        target = run.source.collate(task, drawn, run.device).target
        latents.append(run.vino.vae.encode(target).float().flatten())
    run.vino.config.vae.scaling_factor /= torch.cat(latents).std().item()


def prepare(args, part, weights, out):
    """The Run of one part, at its first step, or at the one where it was stopped."""
    found, saved = train.find_checkpoint(out, args.resume)
    device, dtype = train.start_device(args.dtype)
    weights = str(weights or saved.get("weights") or "random")
    config = None
    if weights == "random":
        changes = read_json(args.config) if args.config else {}
        config = Config.from_dict(changes, read_config(HERE / "tiny_config.json", weights), args.config)
    elif args.config:
        config = read_config(args.config, weights)
    vino = Vino.load(weights, config, device, dtype)
    if weights == "random":
        vino.mm_encoder.tokenizer = toy_tokenizer()
        quieten(vino)
    stage = make_stage(part, vino.config, vars(args), PARTS)
    args.stage = f"0-{part}"
    if device.type == "cpu" and args.batch is None:
        stage.batch = min(stage.batch, 8)  # a step within seconds
    encoders = vino if device.type == "cuda" else None
    source = ToyWorld(stage, vino.config, f"{args.seed} {args.stage}", encoders)
    run = Run(args, out, stage, source, OBJECTIVES[part](vino, stage.shift), weights, device, dtype)
    train.start(run, found, saved)
    return run


def parse_arguments(arguments):
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser("toy.pretrain", "python -m toy.pretrain [options]", about)
    parser.add_argument("--part", choices=list(PARTS), help="only this one; by default all three")
    parser.add_argument("--weights", help="a .safetensors to start from; by default random weights")
    parser.add_argument("--out", help="output goes to OUT-vae, OUT-vlm, OUT-mmdit; default: runs/pretrain")
    parser.set_defaults(data=None, shard="ddp", ema_on_host=False)
    train.add_common_arguments(parser)
    for f in fields(Stage):
        if f.name in ("lr", "steps", "batch", "warmup", "cooldown"):
            parser.add_argument("--" + f.name, type=f.type, metavar="X")
    return parser.parse_args(arguments)


def pretrain(args):
    """Train the parts that the command line asks for, each from the one before -> exit status."""
    folder, weights = Path(args.out or "runs/pretrain"), args.weights
    for part in [args.part] if args.part else PARTS:
        out = Path(f"{folder}-{part}")
        run = prepare(args, part, weights, out)
        status = train.train(run)
        if status:
            return status
        if part == "vae":
            scale_latents(run)
            train.export(run)  # again, with the scale
        weights = out / "final.safetensors"
    return 0


def main(arguments=None):
    """Run the command line `arguments` -> exit status."""
    return train.main(arguments, "toy.pretrain", parse_arguments, pretrain)


if __name__ == "__main__":
    sys.exit(main())
