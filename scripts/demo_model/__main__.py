"""``python -m scripts.demo_model make | evaluate``: see ``scripts/make-demo-model --help``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from scripts.demo_model import autoencoder, denoiser, evaluate, text_encoder, tokens
from scripts.demo_model.checker import check
from scripts.demo_model.run import DEVICE, Run

ROOT = Path(__file__).resolve().parents[2]


def _scheduler() -> DPMSolverMultistepScheduler:
    """The model's own scheduler, with the settings that other scheduler classes take over from it.

    Neither clipping nor thresholding of the predicted latent: DDIM and UniPC lose the picture with
    it (1 and 19 of 20 right with, 19 and 19 without; at guidance 7.5, 0 and 15 against 20 and 18).
    Karras et al.'s spacing of the noise levels (2022) keeps the multistep solvers stable at high
    guidance: 82 of 84 right with DPM++ and with UniPC at 7.5 and 20 steps, against 71 and 47.
    """
    return DPMSolverMultistepScheduler.from_config(
        {
            **denoiser.NOISE_SCHEDULE,
            "prediction_type": "v_prediction",
            "steps_offset": 1,
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
            "clip_sample": False,
            "use_karras_sigmas": True,
        }
    )


def _pipeline(
    vae: AutoencoderKL, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def grid(images: list[np.ndarray], columns: int, zoom: int = 2) -> Image.Image:
    """Pictures side by side, magnified without smoothing."""
    rows = [np.concatenate(images[i : i + columns], axis=1) for i in range(0, len(images), columns)]
    return Image.fromarray(np.concatenate(rows).repeat(zoom, axis=0).repeat(zoom, axis=1))


def make(args: argparse.Namespace) -> None:
    """Train every part and save the model in fp16."""
    run = Run(args.work, args.seed)
    run.log(stage="start", seed=args.seed, steps=args.steps, device=DEVICE.type, torch=torch.__version__)
    vae = autoencoder.settle(autoencoder.train(run))
    tokenizer = tokens.make_tokenizer(run.folder / "tokenizer")
    encoder = text_encoder.train(run, tokenizer)
    asked = evaluate.questions(96, 24, seed=11)

    def look(unet: UNet2DConditionModel, step: int) -> None:
        pipe = _pipeline(vae, encoder, tokenizer, unet)
        images = list(evaluate.pictures(pipe, asked, 7.5))
        rows = evaluate.judge(asked, [check(im, q.scene) for im, q in zip(images, asked, strict=True)])
        run.log(stage="look", step=step, guidance=7.5, **{r.group: round(r.right, 1) for r in rows})
        print(f"step {step}: all right {rows[0].right:.1f} %, one object {rows[3].right:.1f} %", flush=True)
        grid(images, 20).save(run.folder / f"samples-{step:06d}.png")

    unet = denoiser.train(run, vae, encoder, tokenizer, args.steps, look)
    pipe = _pipeline(vae, encoder, tokenizer, unet).to("cpu", torch.float16)
    part = args.out.with_name(args.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipe.save_pretrained(part)
    tokens.make_tokenizer(part / "tokenizer")
    for file in part.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors saves for the owner alone
    shutil.rmtree(args.out, ignore_errors=True)
    part.rename(args.out)
    shutil.copyfile(run.folder / "log.jsonl", ROOT / "docs" / "demo-model-log.jsonl")
    print(f"saved {args.out}")


def load(folder: Path) -> StableDiffusionPipeline:
    """The saved model in fp32 (fp16 arithmetic is slow on a CPU) on the best device."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ask(args: argparse.Namespace) -> None:
    """Evaluate a saved model; write the table and a grid of samples beside each other."""
    pipe = load(args.out)
    text = evaluate.report(pipe, args.seen, args.unseen)
    print(text)
    if args.report:
        args.report.write_text(text, encoding="utf-8")
    if args.grid:
        rest = evaluate.questions(48, 12, seed=3)
        grid(list(evaluate.pictures(pipe, rest, 7.5)), 12).save(args.grid)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="make-demo-model", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, default=ROOT / "models" / "shapes", help="the model's folder")
    maker = commands.add_parser("make", parents=[common], help="train the model from nothing (resumes)")
    maker.add_argument("--work", type=Path, default=ROOT / "build.demo-model", help="checkpoints, log, samples")
    maker.add_argument("--steps", type=int, default=11_000, help="denoiser steps")
    maker.add_argument("--seed", type=int, default=7)
    maker.set_defaults(run=make)
    judge = commands.add_parser("evaluate", parents=[common], help="the 500-prompt evaluation")
    judge.add_argument("--seen", type=int, default=evaluate.SEEN)
    judge.add_argument("--unseen", type=int, default=evaluate.UNSEEN)
    judge.add_argument("--report", type=Path, help="also write the tables to this Markdown file")
    judge.add_argument("--grid", type=Path, help="also write a grid of samples to this PNG")
    judge.set_defaults(run=ask)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
