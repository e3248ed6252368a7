"""Train the bundled models from nothing: ``python -m hicache.demo.train --out DIR``; ``--task upscale``.

Flow matching (velocity = noise − picture) on the procedural pictures of :mod:`hicache.demo.pictures`. Times
are logit-normal, shifted towards noise as Stable Diffusion 3 does: flat pictures are decided early. The same
seed, thread count and torch version give the same weights. The bundled weights are the defaults of both
tasks, the upscaler's by one thread:

draw: captions to pictures, 10% of the captions dropped for classifier-free guidance. 7,000 steps of batch 64,
a little over an hour on two CPU cores.

upscale: pictures of 8 × 8 pixels to 32 × 32; half of a batch are parts of pictures twice as large. 1,500
steps of batch 64: at 1.6 steps a second a quarter of an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tqdm import tqdm

from hicache.demo import packing, pictures, upscaler
from hicache.demo.pipeline import ShapesPipeline

WARMUP_STEPS = 300
EMA_DECAY = 0.999
CAPTION_DROPOUT = 0.1
SHIFT = 3.0  # of training times towards noise: t -> 3 t / (1 + 2 t)


def flux_of_shapes(
    num_layers: int,
    num_single_layers: int,
    num_heads: int,
    in_channels: int = packing.CHANNELS,
    vocabulary: int = pictures.VOCABULARY,
) -> FluxTransformer2DModel:
    """diffusers' FLUX transformer for the pipelines' latents and captions, with random weights."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        out_channels=packing.CHANNELS,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=32,
        num_attention_heads=num_heads,
        joint_attention_dim=vocabulary,
        pooled_projection_dim=vocabulary,
        axes_dims_rope=(8, 12, 12),
        guidance_embeds=False,
    )


def build_transformer(
    in_channels: int = packing.CHANNELS, vocabulary: int = pictures.VOCABULARY
) -> FluxTransformer2DModel:
    """diffusers' FLUX transformer at 5.1M parameters; every block starts as the identity."""
    transformer = flux_of_shapes(2, 4, num_heads=6, in_channels=in_channels, vocabulary=vocabulary)
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


def noised(
    clean: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise ``[batch, tokens, channels]``, times ``[batch]``, and pictures that far on the way to noise."""
    noise = torch.randn(clean.shape, generator=generator)
    time = torch.sigmoid(torch.randn(len(clean), generator=generator) + math.log(SHIFT))
    return noise, time, torch.lerp(clean, noise, time[:, None, None])


def drawing_loss(transformer: torch.nn.Module, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the velocity on one random batch of captions."""
    captions, images = pictures.sample(batch, generator, packing.PICTURE_SIZE)
    dropped = torch.rand(batch, generator=generator) < CAPTION_DROPOUT
    words = pictures.encode([pictures.Caption() if d else c for c, d in zip(captions, dropped, strict=True)])
    clean = packing.pack(images)
    noise, time, noisy = noised(clean, generator)
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


def upscaling_loss(transformer: torch.nn.Module, batch: int, generator: torch.Generator) -> torch.Tensor:
    """The same on one random batch of pictures, half of them cut from larger ones."""
    side = upscaler.TILE
    _, whole = pictures.sample(batch - batch // 2, generator, side)
    _, large = pictures.sample(batch // 2, generator, 2 * side)
    corners = (torch.randint(side // upscaler.SCALE + 1, (batch // 2, 2), generator=generator)).tolist()
    parts = [
        picture[:, top * upscaler.SCALE :, left * upscaler.SCALE :][:, :side, :side]
        for picture, (top, left) in zip(large, corners, strict=True)
    ]
    images = torch.cat([whole, torch.stack(parts)])
    clean = packing.pack(images)
    given = packing.pack(upscaler.enlarge(upscaler.shrink(images)))
    noise, time, noisy = noised(clean, generator)
    velocity: torch.Tensor = transformer(
        hidden_states=torch.cat([noisy, given], dim=-1), timestep=time, **upscaler.constants(batch, clean)
    )[0]
    return (velocity - (noise - clean)).square().mean()


@dataclass(frozen=True)
class Task:
    """What a model is trained for.

    Args:
        build: the transformer, with random weights.
        loss_of: one random batch of a size.
        pipeline: that the weights are saved as.
        steps: of the bundled weights.
    """

    build: Callable[[], FluxTransformer2DModel]
    loss_of: Callable[[torch.nn.Module, int, torch.Generator], torch.Tensor]
    pipeline: type[DiffusionPipeline]
    steps: int


TASKS = {
    "draw": Task(build_transformer, drawing_loss, ShapesPipeline, steps=7000),
    "upscale": Task(
        lambda: build_transformer(2 * packing.CHANNELS, upscaler.WORD),
        upscaling_loss,
        upscaler.ShapesUpscaler,
        steps=1500,
    ),
}


def save(pipeline: type[DiffusionPipeline], transformer: FluxTransformer2DModel, out: Path) -> None:
    """Write a folder that the pipeline's ``from_pretrained`` loads; weights in float16."""
    half = copy.deepcopy(transformer).half()
    pipeline(transformer=half, scheduler=FlowMatchEulerDiscreteScheduler()).save_pretrained(out)


def train(task: Task, out: Path, steps: int, batch: int, peak: float, seed: int, every: int) -> None:
    """Train and save to ``out``; goes on from ``out/checkpoint.pt`` when that exists."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    transformer = task.build()
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
        loss = task.loss_of(transformer, batch, generator)
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
    save(task.pipeline, average, out)
    checkpoint.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the pipeline; checkpoints go there too"
    )
    parser.add_argument("--task", choices=TASKS, default="draw")
    parser.add_argument("--steps", type=int, help="the task's own if not given")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    task = TASKS[args.task]
    train(task, args.out, args.steps or task.steps, args.batch, args.lr, args.seed, args.every)


if __name__ == "__main__":
    main()
