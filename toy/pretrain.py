"""Make the tiny model that the three stages start from: "stage 0", in place of what the paper downloads.

    python -m toy.pretrain            all three parts, one after the other
    python -m toy.pretrain --part vlm --weights runs/pretrain-vae/final.safetensors

    vae      the autoencoder, on images and clips
    vlm      the language model: it describes what it sees, says what an instruction asks for, and expands
             short prompts
    mmdit    text to image and video, with a text encoder of its own. That one is thrown away, so that stage 1
             has to align the VLM with the model (2.3)

The loop, its checkpoints and its pictures are train.py's.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

import train
from toy.world import ToyWorld, toy_tokenizer
from train import HERE, Objective, Run, Stage, draw_noise, make_stage
from vino import Condition, EncodedReference, Modulation, Vino, build_prompts, read_config

TOY = {
    "beta1": 0.9, "beta2": 0.99, "ema": 0.0, "area": 64**2, "drop": 0.0, "warmup": 200, "checkpointing": False
}  # fmt: skip
PARTS = {
    "vae": Stage(lr=1.5e-3, steps=9_600, cooldown=6_000, shift=1.0, batch=48, trainable=["vae."], **TOY,
                 mixture={"t2i": 0.3, "t2v": 0.7}),
    "vlm": Stage(lr=1e-3, steps=20_000, cooldown=14_000, shift=1.0, batch=32,
                 trainable=["mm_encoder.mm_encoder."], **TOY,
                 mixture={"look": 0.08, "watch": 0.06, "rewrite": 0.06, "rewrite_clip": 0.12, "motion": 0.02}
                 | {"ti2i": 0.13, "ti2i_ref": 0.06, "ti2v": 0.22, "tv2v": 0.15, "tiv2v": 0.07}
                 | {"t2i": 0.01, "t2v": 0.01, "i2v": 0.01}),
    "mmdit": Stage(lr=2e-3, steps=4_900, cooldown=1_600, shift=3.0, batch=128,
                   trainable=["native_text.", "transformer."], **TOY | {"drop": 0.1},
                   mixture={"t2i": 0.5, "t2v": 0.5}),
}  # fmt: skip
KL = 3e-5  # weight of the posterior's distance to the normal distribution, against the squared error


class Autoencoding(Objective):
    """The VAE's: squared error, and a little of the posterior's distance to the normal distribution."""

    def loss(self, batch):
        vae = self.vino.vae
        mean, log_variance = (part.float() for part in vae.moments(batch.target))
        noise = draw_noise(batch.key, mean)[1]
        output = vae.decode((mean + noise * (log_variance / 2).exp()) * vae.config.scaling_factor)
        surplus = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
        return (output.float() - batch.target).square().flatten(1).mean(1) + KL * surplus.flatten(1).mean(1)

    def picture(self, batch):
        return self.vino.vae.decode(self.vino.vae.encode(batch.target)).float(), batch.prompts


class Captioning(Objective):
    """The VLM's: next-token cross-entropy of the answer."""

    sometimes_used = "mm_encoder.mm_encoder.model.visual"

    def loss(self, batch):
        vlm = self.vino.mm_encoder
        references = []
        for reference in batch.references:
            features = vlm.encode_vision(reference)
            references.append(EncodedReference(None, features, reference.grid, reference.is_video))
        prompts, cache = build_prompts(vlm.tokenizer, batch.prompts, references, vlm.merge), DynamicCache()
        last, _ = vlm.prefill(prompts, references, cache)
        end = vlm.tokenizer.token_to_id("<|im_end|>")
        answers = [[*encoding.ids, end] for encoding in vlm.tokenizer.encode_batch(batch.answers)]
        most = max(map(len, answers))
        wanted = torch.tensor([answer + [-100] * (most - len(answer)) for answer in answers]).to(last.device)
        embeds = vlm.mm_encoder.get_input_embeddings()(wanted[:, :-1].clamp(min=0))
        positions = prompts.positions[:, :, -1:] + torch.arange(1, most)
        mask = None if prompts.mask is None else F.pad(prompts.mask, (0, most - 1), value=True)
        answered, _ = vlm.language(embeds, positions, mask, cache)
        last = torch.cat([last[:, -1:], answered], 1)
        losses = F.cross_entropy(vlm.mm_encoder.lm_head(last).mT.float(), wanted, reduction="none")
        return losses.sum(1) / (wanted >= 0).sum(1)

    def picture(self, batch):
        references = [self.vino.encode(reference) for reference in batch.references]
        return batch.target, self.vino.mm_encoder.answer(batch.prompts, references)


class NativeText(nn.Module):
    """The text encoder that the tiny text-to-video model is born with: a table of words and one of places."""

    def __init__(self, config, tokenizer, length=256):
        super().__init__()
        self.tokenizer, self.start = tokenizer, tokenizer.token_to_id("<|im_start|>")
        self.words = nn.Embedding(config.text.vocab_size, config.mmdit.text_embed_dim)
        self.places = nn.Embedding(length, config.mmdit.text_embed_dim)

    def forward(self, prompts):
        """B texts -> Condition."""
        ids = [[self.start, *encoding.ids] for encoding in self.tokenizer.encode_batch(prompts)]
        lengths, device = torch.tensor([len(row) for row in ids]), self.words.weight.device
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True).to(device)
        places = torch.arange(ids.shape[1], device=device)
        mask = places < lengths.to(device)[:, None]
        return Condition(self.words(ids) + self.places(places), mask, [])


class TextToVideo(Objective):
    """Rectified flow under the native text encoder."""

    def __init__(self, vino, shift):
        super().__init__(vino, shift)
        self.native_text = NativeText(vino.config, vino.mm_encoder.tokenizer)

    def condition(self, batch):
        return self.native_text(batch.prompts)


OBJECTIVES = {"vae": Autoencoding, "vlm": Captioning, "mmdit": TextToVideo}


@torch.no_grad()
def quieten(vino):
    """Residual branches add nothing at first: their last matrix or their gate is zero. So is the velocity."""
    ends = ("conv2.conv", "attentions.0.to_out.0", "o_proj", "down_proj", "attn.proj", "mlp.linear_fc2")
    for name, module in vino.named_modules():
        if name.endswith((*ends, "transformer.proj_out")) or isinstance(module, Modulation):
            for parameter in module.parameters():
                parameter.zero_()


@torch.no_grad()
def scale_latents(run):
    """Make latents as wide as the noise, as rectified flow wants them."""
    latents = []
    for task in run.source.tasks:
        drawn = [run.source.draw(task, 0, -1 - number) for number in range(64)]
        target = run.source.collate(task, drawn, run.device).target
        latents.append(run.vino.vae.encode(target).float().flatten())
    run.vino.config.vae.scaling_factor /= torch.cat(latents).std().item()


def prepare(args, part, weights, out):
    """The Run of one part, at its first step or where it was stopped."""
    found, saved = train.find_checkpoint(out, args.resume)
    device, dtype = train.start_device(args.dtype)
    weights = str(weights or saved.get("weights") or "random")
    path = args.config or HERE / "tiny_config.json"
    config = read_config(path, weights) if args.config or weights == "random" else None
    vino = Vino.load(weights, config, device, dtype)
    if weights == "random":
        vino.mm_encoder.tokenizer = toy_tokenizer()
        quieten(vino)
    stage = make_stage(part, vino.config, vars(args), PARTS)
    args.stage = f"0-{part}"
    encoders = vino if device.type == "cuda" else None
    source = ToyWorld(stage, vino.config, f"{args.seed} {args.stage}", encoders)
    run = Run(args, out, stage, source, OBJECTIVES[part](vino, stage.shift), weights, device, dtype)
    train.start(run, found, saved)
    return run


def parse_arguments(arguments):
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser("toy.pretrain", "python -m toy.pretrain [options]", about)
    parser.add_argument("--part", choices=list(PARTS), help="only this one; by default all three")
    parser.add_argument("--weights", help="a .safetensors to go on from; by default random weights")
    parser.add_argument("--out", help="output goes to OUT-vae, OUT-vlm, OUT-mmdit; default: runs/pretrain")
    parser.set_defaults(data=None, shard="ddp", ema_on_host=False)
    train.add_common_arguments(parser)
    for f in fields(Stage):
        if f.name in ("lr", "steps", "batch", "warmup", "cooldown"):
            parser.add_argument("--" + f.name, type=f.type, metavar="X")
    return parser.parse_args(arguments)


def pretrain(args):
    """All parts that the command line asks for, each from what the one before has made -> exit status."""
    folder, weights = Path(args.out or "runs/pretrain"), args.weights
    for part in [args.part] if args.part else PARTS:
        out = folder.with_name(f"{folder.name}-{part}")
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
    return train.main(arguments, parse_arguments, pretrain)


if __name__ == "__main__":
    sys.exit(main())
