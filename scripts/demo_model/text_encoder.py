"""The demo model's text encoder: learns to say what a caption says, then is frozen.

A denoiser that reads features which already tell colour, shape and count apart learns several
times faster than one that trains its text encoder along.
"""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scripts.demo_model.grammar import LABEL_VALUES, describe, sample_training_scene
from scripts.demo_model.run import DEVICE, Progress, Run
from scripts.demo_model.tokens import LENGTH

STEPS = 700
BATCH = 64
WIDTH = 128


def build(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder of our size (0.35 M parameters)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=256,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """int64 (N, 77), padded as the pipelines pad."""
    out = tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return out.input_ids


def train(run: Run, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Train the text encoder to classify captions from its end-of-text and padding positions."""
    torch.manual_seed(run.seed + 2)
    encoder = build(tokenizer).to(DEVICE)
    heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(values)) for name, values in LABEL_VALUES.items()}).to(DEVICE)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2)
    if state := run.load("text"):
        encoder.load_state_dict(state["model"])
        return encoder.eval()
    progress = Progress("text encoder", STEPS)
    for step in range(STEPS):
        rng = random.Random(f"{run.seed}-text-{step}")
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        described = [describe(sample_training_scene(rng), rng) for _ in range(BATCH)]
        ids = tokenize(tokenizer, [text for text, _ in described]).to(DEVICE)
        hidden = encoder(ids).last_hidden_state
        first_end = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
        # one position between the end of the text and the last: each of them is to know everything
        spread = torch.rand(BATCH, generator=run.generator(2, step)).to(DEVICE).square()
        where = first_end + (spread * (LENGTH - first_end)).long()
        features = hidden[torch.arange(BATCH, device=DEVICE), where.clamp(max=LENGTH - 1)]
        loss = torch.zeros((), device=DEVICE)
        right = torch.ones(BATCH, dtype=torch.bool, device=DEVICE)
        for name, values in LABEL_VALUES.items():
            target = torch.tensor([values.index(getattr(labels, name)) for _, labels in described], device=DEVICE)
            logits = heads[name](features)
            loss = loss + F.cross_entropy(logits, target)
            right &= logits.argmax(1) == target
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress.step(step + 1, loss=loss.item(), right=right.float().mean().item())
        if (step + 1) % 100 == 0:
            run.log(stage="text", step=step + 1, loss=round(loss.item(), 5), right=right.float().mean().item())
    run.save("text", {"model": encoder.state_dict()})
    return encoder.eval()
