"""Train the bundled model from nothing: ``python -m hicache.demo.train --out DIR``.

Flow matching (velocity = noise − picture) on the procedural pictures of :mod:`hicache.demo.pictures`, with
10% of the captions dropped for classifier-free guidance. Times are logit-normal, shifted towards noise as
Stable Diffusion 3 does: flat pictures are decided early. The same seed, thread count and torch version give
the same weights. The bundled weights are this script's defaults: 7,000 steps of batch 64, a little over an
hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tqdm import tqdm

from hicache.demo import packing, pictures

WARMUP_STEPS = 300
EMA_DECAY = 0.999
CAPTION_DROPOUT = 0.1
SHIFT = 3.0  # of training times towards noise: t -> 3 t / (1 + 2 t)


def flux_of_shapes(num_layers: int, num_single_layers: int, num_heads: int) -> FluxTransformer2DModel:
    """diffusers' FLUX transformer for the pipeline's latents and captions, with random weights."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=packing.CHANNELS,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=32,
        num_attention_heads=num_heads,
        joint_attention_dim=pictures.VOCABULARY,
        pooled_projection_dim=pictures.VOCABULARY,
        axes_dims_rope=(8, 12, 12),
        guidance_embeds=False,
    )


def build_transformer() -> FluxTransformer2DModel:
    """diffusers' FLUX transformer at 5.1M parameters; every block starts as the identity."""
    transformer = flux_of_shapes(num_layers=2, num_single_layers=4, num_heads=6)
    for name, module in transformer.named_modules():
        # adaLN-zero (DiT, section 3.2): gates and the output start at zero
        if name == "proj_out" or (".norm" in name and name.endswith(".linear")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return transformer


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then cosine decay to zero."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    return peak * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def loss_of(transformer: torch.nn.Module, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the velocity on one random batch."""
    captions, images = pictures.sample(batch, generator, packing.PICTURE_SIZE)
    dropped = torch.rand(batch, generator=generator) < CAPTION_DROPOUT
    words = pictures.encode([pictures.Caption() if d else c for c, d in zip(captions, dropped, strict=True)])
    clean = packing.pack(images)
    noise = torch.randn(clean.shape, generator=generator)
    time = torch.sigmoid(torch.randn(batch, generator=generator) + math.log(SHIFT))
    noisy = torch.lerp(clean, noise, time[:, None, None])
    velocity: torch.Tensor = transformer(
        hidden_states=noisy,
        encoder_hidden_states=words,
        pooled_projections=words.sum(1),
        timestep=time,
        img_ids=packing.position_ids(packing.PICTURE_SIZE, packing.PICTURE_SIZE),
        txt_ids=torch.zeros(pictures.NUM_SLOTS, 3),
        return_dict=False,
    )[0]
    return (velocity - (noise - clean)).square().mean()


def save(transformer: FluxTransformer2DModel, out: Path) -> None:
    """Write a folder that ``ShapesPipeline.from_pretrained`` loads; weights in float16."""
    from hicache.demo.pipeline import ShapesPipeline

    half = copy.deepcopy(transformer).half()
    ShapesPipeline(transformer=half, scheduler=FlowMatchEulerDiscreteScheduler()).save_pretrained(out)


def train(out: Path, steps: int, batch: int, peak: float, seed: int, every: int) -> None:
    """Train and save to ``out``; goes on from ``out/checkpoint.pt`` when that exists."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    transformer = build_transformer()
    average = copy.deepcopy(transformer).requires_grad_(False)
    optimizer = torch.optim.AdamW(transformer.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start = 0
    checkpoint = out / "checkpoint.pt"
    out.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        transformer.load_state_dict(state["transformer"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        start = state["step"]
    smooth = None
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="training", mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = loss_of(transformer, batch, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), transformer.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % every == 0 and step + 1 < steps:
            state = {
                "transformer": transformer.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
                "step": step + 1,
            }
            # a run that is cut off here must find either the old checkpoint or the new one
            torch.save(state, checkpoint.with_suffix(".new"))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
    save(average, out)
    checkpoint.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the pipeline; checkpoints go there too"
    )
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.out, args.steps, args.batch, args.lr, args.seed, args.every)


if __name__ == "__main__":
    main()
