"""Trains the reference model on the train split of easy-VQA.

    python -m bivlm_edge.reference.train --output work/reference [--resume] [--threads 2]

Three stages: the vision tower under a throwaway classifier of color and shape; projector and
decoder on the questions, the tower frozen; everything at a low rate under growing weight noise,
which leaves a model that rounding its weights hurts less. `--output` receives the checkpoint after
each stage and `state.pt` for --resume. The test split is read by --test alone, after training.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from bivlm_edge.datasets import COLORS, SHAPES, load_easy_vqa
from bivlm_edge.reference.architecture import (
    VISION_WIDTH,
    build_model,
    build_processor,
    build_tokenizer,
)
from bivlm_edge.reference.data import (
    UNKNOWN,
    Packer,
    Pixels,
    Scene,
    augment,
    draw_scene,
    group_scenes,
    sample_questions,
)

log = logging.getLogger("bivlm_edge.reference.train")

VALIDATION_IMAGES = 500
QUESTIONS_PER_IMAGE = 10
MAX_SHIFT = 24
WARM_UP_STEPS = 60
LOG_EVERY = 20
SAVE_EVERY = 300
STATE_FILE = "state.pt"


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of training.

    Attributes:
        name: "vision" trains the tower with a classifier; others train on questions.
        steps: Optimizer steps.
        images: Images per step.
        drawn: How many of them are drawn by our own generator.
        rate: Peak learning rate of the decoder side; cosine to a hundredth of it.
        vision_rate: The same for the vision tower; 0 freezes it.
        noise: Standard deviation of the noise on each weight matrix at the stage's end, relative
            to that of each of its rows; grows linearly from half of it.
    """

    name: str
    steps: int
    images: int
    drawn: int
    rate: float
    vision_rate: float
    noise: float


STAGES = (
    Stage("vision", steps=800, images=64, drawn=32, rate=1e-3, vision_rate=1e-3, noise=0.0),
    Stage("decoder", steps=700, images=28, drawn=16, rate=1e-3, vision_rate=0.0, noise=0.05),
    Stage("joint", steps=450, images=28, drawn=14, rate=4e-4, vision_rate=1e-4, noise=0.2),
)


class Trainee(nn.Module):
    """The model with the classifier of the first stage.

    Attributes:
        llava: The model that is kept.
        head: Mean patch token -> logits of COLORS, then SHAPES; thrown away.
    """

    def __init__(self, llava: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.llava = llava
        self.head = nn.Sequential(
            nn.LayerNorm(VISION_WIDTH), nn.Linear(VISION_WIDTH, len(COLORS) + len(SHAPES))
        )

    def patches(self, pixels: Tensor) -> Tensor:
        """Vision features ``(images, 64, width)`` that LLaVA selects: last layer without CLS."""
        features: Tensor = self.llava.model.vision_tower(pixels).last_hidden_state
        return features[:, 1:]


def normalize(pictures: Sequence[Pixels], processor: LlavaProcessor) -> Tensor:
    """Pictures as the image processor gives them, float32 ``(images, 3, 64, 64)``."""
    mean = torch.tensor(processor.image_processor.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(1, 3, 1, 1)
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return (pixels.float() / 255 - mean) / std


def sample_batch(
    scenes: Sequence[Scene], wordings: Sequence[str], stage: Stage, rng: np.random.Generator
) -> list[Scene]:
    """Augmented training pictures and freshly drawn ones with their questions."""
    batch = []
    for index in rng.choice(len(scenes), stage.images - stage.drawn, replace=False):
        scene = scenes[index]
        pixels = augment(scene.pixels, rng, MAX_SHIFT)
        asked = rng.permutation(len(scene.questions))[:QUESTIONS_PER_IMAGE]
        questions = tuple(scene.questions[i] for i in asked)
        batch.append(Scene(pixels, scene.color, scene.shape, questions, ()))
    for _ in range(stage.drawn):
        color, shape = int(rng.integers(len(COLORS))), int(rng.integers(len(SHAPES)))
        questions = sample_questions(rng, wordings, color, shape, QUESTIONS_PER_IMAGE)
        batch.append(Scene(draw_scene(rng, color, shape), color, shape, questions, ()))
    return batch


def vision_loss(trainee: Trainee, batch: Sequence[Scene], processor: LlavaProcessor) -> Tensor:
    """Cross entropy of color plus that of shape, over the pictures where they are known."""
    logits = trainee.head(trainee.patches(normalize([s.pixels for s in batch], processor)).mean(1))
    colors = torch.tensor([s.color for s in batch])
    shapes = torch.tensor([s.shape for s in batch])
    color_logits, shape_logits = logits.float().split([len(COLORS), len(SHAPES)], dim=1)
    loss: Tensor = nn.functional.cross_entropy(color_logits, colors, ignore_index=UNKNOWN)
    return loss + nn.functional.cross_entropy(shape_logits, shapes, ignore_index=UNKNOWN)


@torch.no_grad()
def vision_accuracy(
    trainee: Trainee, scenes: Sequence[Scene], processor: LlavaProcessor
) -> tuple[float, float]:
    """Share of right colors and of right shapes, over the pictures where they are known."""
    logits = trainee.head(trainee.patches(normalize([s.pixels for s in scenes], processor)).mean(1))
    right = []
    for part, truth in zip(
        logits.split([len(COLORS), len(SHAPES)], dim=1),
        (torch.tensor([s.color for s in scenes]), torch.tensor([s.shape for s in scenes])),
        strict=True,
    ):
        known = truth != UNKNOWN
        right.append((part.argmax(1) == truth)[known].float().mean().item())
    return right[0], right[1]


def answer_logits(
    trainee: Trainee, batch: Sequence[Scene], processor: LlavaProcessor, packer: Packer
) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
    """Logits where an answer token must follow, for all questions on the pictures.

    Returns:
        Logits ``(targets, vocabulary)``, the targets, and for each the number of its question.
    """
    llava = trainee.llava.model
    packed = packer.pack([s.questions for s in batch])
    patches = trainee.patches(normalize([s.pixels for s in batch], processor))
    images = llava.multi_modal_projector(patches)
    ids = torch.from_numpy(packed.ids)
    embeddings = llava.language_model.embed_tokens(ids)
    start = packer.image_start
    end = start + images.shape[1]
    embeddings = torch.cat([embeddings[:, :start], images, embeddings[:, end:]], dim=1)
    blocks = torch.from_numpy(packed.blocks)
    query, key = blocks[:, :, None], blocks[:, None, :]
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    visible = causal & ((key == query) | (key == 0))
    mask = torch.zeros(visible.shape, dtype=embeddings.dtype)
    mask = mask.masked_fill(~visible, torch.finfo(embeddings.dtype).min)[:, None]
    hidden = llava.language_model(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=torch.from_numpy(packed.positions),
        use_cache=False,
    ).last_hidden_state
    chosen = torch.from_numpy(packed.targets != UNKNOWN)
    logits = trainee.llava.lm_head(hidden[chosen])
    targets = torch.from_numpy(packed.targets)[chosen]
    return logits.float(), targets, packed.question[chosen.numpy()]


@contextmanager
def weight_noise(module: nn.Module, ratio: float, generator: torch.Generator) -> Iterator[None]:
    """Add noise to every weight matrix inside the block; afterwards the weights are as before.

    Args:
        module: Modified in place.
        ratio: Standard deviation of the noise relative to that of each row.
        generator: Source of the noise.
    """
    linears = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    kept = []
    with torch.no_grad():
        for linear in linears if ratio else ():
            weight = linear.weight
            kept.append((weight, weight.detach().clone()))
            noise = torch.randn(weight.shape, generator=generator)
            weight.addcmul_(noise, weight.std(dim=1, keepdim=True), value=ratio)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(before)


@torch.no_grad()
def packed_accuracy(
    trainee: Trainee, scenes: Sequence[Scene], processor: LlavaProcessor, packer: Packer
) -> dict[str, float]:
    """Share of questions whose whole answer is the greedy one: over all and for each kind."""
    results: dict[str, list[bool]] = defaultdict(list)
    for at in range(0, len(scenes), 50):
        batch = scenes[at : at + 50]
        logits, targets, question = answer_logits(trainee, batch, processor, packer)
        wrong = (logits.argmax(-1) != targets).numpy()
        kinds = [kind for scene in batch for kind in scene.kinds]
        failed = set(question[wrong].tolist())
        for number, kind in enumerate(kinds):
            results[kind].append(number not in failed)
    results["overall"] = [ok for kind in list(results) for ok in results[kind]]
    results["open_ended"] = results["color"] + results["shape"]
    return {name: float(np.mean(oks)) for name, oks in sorted(results.items())}


def round_to_bfloat16(module: nn.Module) -> None:
    """Round every weight, in place, to the nearest value that the checkpoint can hold."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16().float())


def parameter_groups(trainee: Trainee, stage: Stage) -> list[dict[str, Any]]:
    """Parameters of a stage with their peak rates; matrices decay, all else does not."""
    rates: dict[str, float] = {"llava.model.vision_tower": stage.vision_rate}
    if stage.name == "vision":
        rates["head"] = stage.rate
    else:
        rates["llava.model.multi_modal_projector"] = stage.rate
        rates["llava.model.language_model"] = stage.rate
        rates["llava.lm_head"] = stage.rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in trainee.named_parameters():
        rate = next((r for prefix, r in rates.items() if name.startswith(prefix)), 0.0)
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            groups[rate, 0.08 if parameter.ndim > 1 else 0.0].append(parameter)
    return [
        {"params": members, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then cosine to a hundredth."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def run_stage(
    trainee: Trainee,
    stage: Stage,
    seeds: tuple[int, int],
    loss_of: Callable[[Sequence[Scene]], Tensor],
    draw_batch: Callable[[np.random.Generator], list[Scene]],
    resume: dict[str, Any] | None,
    save: Callable[[int, dict[str, Any]], None],
) -> None:
    """Train one stage, from the saved step if `resume` is given.

    Args:
        trainee: Modified in place.
        stage: What to train, and how.
        seeds: Seed of the run and number of the stage; each step draws from these and its number,
            so a resumed run sees the same batches.
        loss_of: Loss of a batch.
        draw_batch: A batch from a source of randomness.
        resume: "step" and "optimizer" as `save` received them.
        save: Called now and then with the number of steps done and the optimizer's state.
    """
    optimizer = torch.optim.AdamW(parameter_groups(trainee, stage), betas=(0.9, 0.98))
    first = 0
    if resume is not None:
        first = resume["step"]
        if first:
            optimizer.load_state_dict(resume["optimizer"])
    trainee.train()
    began, losses = time.monotonic(), []
    for step in range(first, stage.steps):
        rng = np.random.default_rng([*seeds, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_factor(step, stage.steps)
        ratio = stage.noise * (0.5 + 0.5 * step / stage.steps)
        batch = draw_batch(rng)
        with weight_noise(trainee.llava, ratio, generator):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(batch)
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % LOG_EVERY == 0:
            seconds = time.monotonic() - began
            log.info(
                "%s %d/%d loss %.4f, %.0f s, %.2f s per step",
                stage.name,
                step + 1,
                stage.steps,
                np.mean(losses[-LOG_EVERY:]),
                seconds,
                seconds / (step + 1 - first),
            )
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < stage.steps:
            save(step + 1, optimizer.state_dict())
    trainee.eval()


def write_checkpoint(
    llava: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path
) -> None:
    """Write model and processor as `transformers` loads them, weights in bfloat16.

    Files already in `folder` are replaced one by one, each in one step.
    """
    staging = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    weights = {name: value.bfloat16() for name, value in llava.state_dict().items()}
    llava.config.dtype = torch.bfloat16
    llava.save_pretrained(staging, state_dict=weights)
    processor.save_pretrained(staging)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(staging.iterdir()):
        file.chmod(0o644)
        file.replace(folder / file.name)
    staging.rmdir()


def write_state(
    trainee: Trainee, output: Path, stage: int, step: int, optimizer: dict[str, Any]
) -> None:
    """Write what --resume needs to go on at a step of a stage."""
    partial = output / f"{STATE_FILE}.new"
    state = {"stage": stage, "step": step, "optimizer": optimizer, "model": trainee.state_dict()}
    torch.save(state, partial)
    partial.replace(output / STATE_FILE)


def evaluate(
    trainee: Trainee, scenes: Sequence[Scene], processor: LlavaProcessor, packer: Packer, name: str
) -> dict[str, float]:
    """Accuracy with the weights as the checkpoint holds them; logged and returned."""
    exact = {key: value.clone() for key, value in trainee.state_dict().items()}
    round_to_bfloat16(trainee)
    figures = packed_accuracy(trainee, scenes, processor, packer)
    with weight_noise(trainee.llava, 0.3, torch.Generator().manual_seed(0)):
        noisy = packed_accuracy(trainee, scenes, processor, packer)["overall"]
    trainee.load_state_dict(exact)
    log.info(
        "%s %s, overall under 30 %% weight noise %.4f",
        name,
        " ".join(f"{key} {value:.4f}" for key, value in figures.items()),
        noisy,
    )
    return figures


def train(output: Path, seed: int, scale: float, resume: bool, test: bool) -> None:
    """Run all stages and write the checkpoint to `output`.

    Args:
        output: Folder of the checkpoint, the state for resuming and the figures.
        seed: Fixes weights, batches and noise.
        scale: Factor on the steps of each stage.
        resume: Go on from the state in `output`.
        test: At the end, evaluate on the test split too.
    """
    items = load_easy_vqa("train")
    tokenizer = build_tokenizer(text for item in items for text in (item.question, item.answer))
    processor = build_processor(tokenizer)
    packer = Packer(tokenizer)
    scenes = group_scenes(items)
    order = np.random.default_rng(seed).permutation(len(scenes))
    held_out = [scenes[i] for i in order[:VALIDATION_IMAGES]]
    training = [scenes[i] for i in order[VALIDATION_IMAGES:]]
    wordings = sorted({question for scene in training for question, _ in scene.questions})
    trainee = Trainee(build_model(tokenizer, seed))

    state: dict[str, Any] | None = None
    if resume:
        state = torch.load(output / STATE_FILE, weights_only=True)
        trainee.load_state_dict(state["model"])
    output.mkdir(parents=True, exist_ok=True)
    figures: dict[str, float] = {}

    def question_loss(batch: Sequence[Scene]) -> Tensor:
        logits, targets, _ = answer_logits(trainee, batch, processor, packer)
        return nn.functional.cross_entropy(logits, targets)

    def classifier_loss(batch: Sequence[Scene]) -> Tensor:
        return vision_loss(trainee, batch, processor)

    for number, preset in enumerate(STAGES):
        stage = replace(preset, steps=max(1, round(preset.steps * scale)))
        if state is not None and state["stage"] > number:
            continue

        def save(step: int, optimizer: dict[str, Any], number: int = number) -> None:
            write_state(trainee, output, number, step, optimizer)
            if STAGES[number].name != "vision":
                trainee.eval()
                evaluate(trainee, held_out, processor, packer, "validation")
                write_checkpoint(trainee.llava, processor, output)
                trainee.train()

        def draw(rng: np.random.Generator, stage: Stage = stage) -> list[Scene]:
            return sample_batch(training, wordings, stage, rng)

        resumed = state if state is not None and state["stage"] == number else None
        loss_of = classifier_loss if stage.name == "vision" else question_loss
        run_stage(trainee, stage, (seed, number), loss_of, draw, resumed, save)
        if stage.name == "vision":
            log.info(
                "validation color %.4f shape %.4f", *vision_accuracy(trainee, held_out, processor)
            )
        else:
            figures = evaluate(trainee, held_out, processor, packer, "validation")
        write_checkpoint(trainee.llava, processor, output)
        write_state(trainee, output, number + 1, 0, {})

    record = {"validation": figures}
    if test:
        unseen = group_scenes(load_easy_vqa("test"))
        record["test"] = evaluate(trainee, unseen, processor, packer, "test")
    (output / "figures.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python -m bivlm_edge.reference.train", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --output")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--seed", type=int, default=7, help="of everything random (default: 7)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of steps")
    parser.add_argument("--test", action="store_true", help="evaluate on the test split at the end")
    options = parser.parse_args()
    if options.resume and not (options.output / STATE_FILE).is_file():
        parser.error(f"--resume: {options.output / STATE_FILE} does not exist; leave --resume away")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    train(options.output, options.seed, options.scale, options.resume, options.test)


if __name__ == "__main__":
    main()
