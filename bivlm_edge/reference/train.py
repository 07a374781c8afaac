"""Trains a reference model on the train split of easy-VQA or of scenes.

    python -m bivlm_edge.reference.train --data scenes --output work/scenes [--resume] [--threads 2]

Stages: the vision tower under throwaway classifiers of what is in the picture; for scenes, patches
matched with the words for what they show (`grounding`); projector and decoder on the questions, the
tower frozen; everything at a low rate under growing weight noise, which leaves a model that
rounding its weights hurts less. No token is ever left out: the model
learns nothing about pruning. `--output` receives the checkpoint after each stage and `state.pt` for
--resume. The test split is read by --test alone, after training.
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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from bivlm_edge.datasets import OPEN_ENDED_KINDS, TRAINING_DATA
from bivlm_edge.reference.architecture import build_model, build_processor, build_tokenizer
from bivlm_edge.reference.easy_vqa import EasyVqaTask
from bivlm_edge.reference.grounding import Pointing, look_for_alike, match_words, named_classes
from bivlm_edge.reference.packing import Packer
from bivlm_edge.reference.scenes_task import ScenesTask
from bivlm_edge.reference.task import UNKNOWN, Example, Pixels, Stage, Task

log = logging.getLogger("bivlm_edge.reference.train")

TASKS: dict[str, Callable[[int], Task]] = {
    EasyVqaTask.name: EasyVqaTask,
    ScenesTask.name: ScenesTask,
}
WARM_UP_STEPS = 60
LOG_EVERY = 20
SAVE_EVERY = 50
EVALUATE_EVERY = 300  # a multiple of SAVE_EVERY
EVALUATION_IMAGES = 50  # at a time
EARLY_IMAGES = 150  # for figures within a stage
STATE_FILE = "state.pt"


class Trainee(nn.Module):
    """The model with the classifiers of the first stage.

    Attributes:
        llava: The model that is kept.
        head: Patch token, or their mean -> logits of all classifiers in turn; thrown away.
        classes: Number of classes of each classifier.
    """

    def __init__(self, llava: LlavaForConditionalGeneration, classes: Sequence[int]) -> None:
        super().__init__()
        self.llava = llava
        self.classes = list(classes)
        width = llava.config.vision_config.hidden_size
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(classes)))

    def patches(self, pixels: Tensor) -> Tensor:
        """Features ``(images, tokens, width)`` that LLaVA selects: last layer without CLS."""
        features: Tensor = self.llava.model.vision_tower(pixels).last_hidden_state
        return features[:, 1:]

    def classify(self, pixels: Tensor, rows: int) -> Sequence[Tensor]:
        """Logits ``(images, rows, classes)`` of each classifier; one row is of the mean token."""
        features = self.patches(pixels)
        if rows == 1:
            features = features.mean(1, keepdim=True)
        logits: Tensor = self.head(features)
        return torch.split(logits.float(), self.classes, dim=-1)


def normalize(pictures: Sequence[Pixels], processor: LlavaProcessor) -> Tensor:
    """Pictures as the image processor gives them, float32 ``(images, 3, side, side)``."""
    mean = torch.tensor(processor.image_processor.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(1, 3, 1, 1)
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return (pixels.float() / 255 - mean) / std


def vision_loss(trainee: Trainee, batch: Sequence[Example], processor: LlavaProcessor) -> Tensor:
    """Sum over the classifiers of their cross entropy where the class is known."""
    labels = torch.from_numpy(np.stack([example.labels for example in batch]))
    logits = trainee.classify(normalize([e.pixels for e in batch], processor), labels.shape[1])
    losses = [
        nn.functional.cross_entropy(
            part.flatten(0, 1), labels[..., number].flatten(), ignore_index=UNKNOWN
        )
        for number, part in enumerate(logits)
    ]
    return torch.stack(losses).sum()


@torch.no_grad()
def vision_accuracy(
    trainee: Trainee, examples: Sequence[Example], processor: LlavaProcessor
) -> list[float]:
    """Mean over the classes of each classifier of the share of their rows that it gets right."""
    counts = [torch.zeros(2, classes) for classes in trainee.classes]
    for at in range(0, len(examples), EVALUATION_IMAGES):
        batch = examples[at : at + EVALUATION_IMAGES]
        labels = torch.from_numpy(np.stack([example.labels for example in batch]))
        logits = trainee.classify(normalize([e.pixels for e in batch], processor), labels.shape[1])
        for number, part in enumerate(logits):
            known = labels[..., number] != UNKNOWN
            truth = labels[..., number][known]
            right = (part.argmax(-1)[known] == truth).float()
            counts[number][0].index_add_(0, truth, right)
            counts[number][1].index_add_(0, truth, torch.ones_like(right))
    return [(hits / rows)[rows > 0].mean().item() for hits, rows in counts]


def word_loss(
    trainee: Trainee, batch: Sequence[Example], processor: LlavaProcessor, named: NDArray[np.int64]
) -> Tensor:
    """`match_words` of the projected patches."""
    llava = trainee.llava.model
    with torch.no_grad():
        patches = trainee.patches(normalize([e.pixels for e in batch], processor))
    projected = llava.multi_modal_projector(patches).float()
    labels = torch.from_numpy(np.stack([example.labels for example in batch]))
    return match_words(projected, llava.language_model.embed_tokens.weight, labels, named)


class Answers(NamedTuple):
    """What the model says where an answer token must follow.

    Attributes:
        logits: ``(targets, vocabulary)``.
        targets: The tokens that must follow.
        question: For each target the number of its question.
        missed: The loss of `Pointing`; 0 without it.
    """

    logits: Tensor
    targets: Tensor
    question: NDArray[np.int64]
    missed: Tensor


def answer_questions(
    trainee: Trainee,
    batch: Sequence[Example],
    processor: LlavaProcessor,
    packer: Packer,
    named: NDArray[np.int64] | None = None,
) -> Answers:
    """Read all questions on the pictures.

    Args:
        trainee: The model.
        batch: Pictures and questions.
        processor: Normalizes pictures.
        packer: Packs questions.
        named: With it attention is led, see `grounding.Pointing`; of `named_classes`.
    """
    llava = trainee.llava.model
    packed = packer.pack([e.questions for e in batch])
    pointing = None
    if named is not None:
        labels = np.stack([example.labels for example in batch])
        pointing = Pointing(packed, labels, named, packer.image_start)
    patches = trainee.patches(normalize([e.pixels for e in batch], processor))
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
    if pointing is not None:
        visible &= ~torch.from_numpy(pointing.hidden())
    mask = torch.zeros(visible.shape, dtype=embeddings.dtype)
    mask = mask.masked_fill(~visible, torch.finfo(embeddings.dtype).min)[:, None]
    llava.language_model.set_attn_implementation("sdpa" if pointing is None else "eager")
    read = llava.language_model(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=torch.from_numpy(packed.positions),
        use_cache=False,
        output_attentions=pointing is not None,
    )
    chosen = torch.from_numpy(packed.targets != UNKNOWN)
    logits = trainee.llava.lm_head(read.last_hidden_state[chosen])
    targets = torch.from_numpy(packed.targets)[chosen]
    missed = torch.zeros(()) if pointing is None else pointing.loss(read.attentions)
    return Answers(logits.float(), targets, packed.question[chosen.numpy()], missed)


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
    trainee: Trainee, examples: Sequence[Example], processor: LlavaProcessor, packer: Packer
) -> dict[str, float]:
    """Share of questions whose whole answer is the greedy one: over all and for each kind."""
    results: dict[str, list[bool]] = defaultdict(list)
    for at in range(0, len(examples), EVALUATION_IMAGES):
        batch = examples[at : at + EVALUATION_IMAGES]
        given = answer_questions(trainee, batch, processor, packer)
        wrong = (given.logits.argmax(-1) != given.targets).numpy()
        kinds = [kind for example in batch for kind in example.kinds]
        failed = set(given.question[wrong].tolist())
        for number, kind in enumerate(kinds):
            results[kind].append(number not in failed)
    groups = {"overall": set(results), "open_ended": OPEN_ENDED_KINDS & set(results)}
    for name, members in groups.items():
        if members:
            results[name] = [ok for kind in sorted(members) for ok in results[kind]]
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
    elif stage.name == "words":
        rates["llava.model.multi_modal_projector"] = stage.rate
        rates["llava.model.language_model.embed_tokens"] = stage.rate
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
    loss_of: Callable[[Sequence[Example]], Tensor],
    draw_batch: Callable[[np.random.Generator], list[Example]],
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
    trainee: Trainee,
    examples: Sequence[Example],
    processor: LlavaProcessor,
    packer: Packer,
    name: str,
) -> dict[str, float]:
    """Accuracy with the weights as the checkpoint holds them; logged and returned."""
    exact = {key: value.clone() for key, value in trainee.state_dict().items()}
    round_to_bfloat16(trainee)
    figures = packed_accuracy(trainee, examples, processor, packer)
    with weight_noise(trainee.llava, 0.3, torch.Generator().manual_seed(0)):
        noisy = packed_accuracy(trainee, examples, processor, packer)["overall"]
    trainee.load_state_dict(exact)
    log.info(
        "%s %s, overall under 30 %% weight noise %.4f",
        name,
        " ".join(f"{key} {value:.4f}" for key, value in figures.items()),
        noisy,
    )
    return figures


def train(task: Task, output: Path, seed: int, scale: float, resume: bool, test: bool) -> None:
    """Run all stages and write the checkpoint to `output`.

    Args:
        task: What to train on.
        output: Folder of the checkpoint, the state for resuming and the figures.
        seed: Fixes weights, batches and noise.
        scale: Factor on the steps of each stage.
        resume: Go on from the state in `output`.
        test: At the end, evaluate on the test split too.
    """
    tokenizer = build_tokenizer(task.texts())
    processor = build_processor(tokenizer, task.design)
    packer = Packer(tokenizer, task.design.image_tokens)
    held_out = task.validation()
    model = build_model(tokenizer, task.design, seed)
    setattr(model.config, TRAINING_DATA, task.name)
    trainee = Trainee(model, list(task.classifiers.values()))

    state: dict[str, Any] | None = None
    if resume:
        state = torch.load(output / STATE_FILE, weights_only=True)
        trainee.load_state_dict(state["model"])
    output.mkdir(parents=True, exist_ok=True)
    figures: dict[str, float] = {}

    named = named_classes(tokenizer, task.words, list(task.classifiers))

    def loss_of(stage: Stage, batch: Sequence[Example]) -> Tensor:
        if stage.name == "vision":
            return vision_loss(trainee, batch, processor)
        if stage.name == "words":
            return word_loss(trainee, batch, processor, named)
        leading = named if stage.pointing else None
        given = answer_questions(trainee, batch, processor, packer, leading)
        answers = nn.functional.cross_entropy(given.logits, given.targets)
        return answers + stage.pointing * given.missed

    def judge(stage: Stage, examples: Sequence[Example]) -> dict[str, float]:
        if stage.name == "words":
            return {}
        if stage.name != "vision":
            return evaluate(trainee, examples, processor, packer, "validation")
        shares = vision_accuracy(trainee, examples, processor)
        found = dict(zip(task.classifiers, shares, strict=True))
        log.info("validation %s", " ".join(f"{key} {value:.4f}" for key, value in found.items()))
        return found

    for number, preset in enumerate(task.stages):
        stage = replace(preset, steps=max(1, round(preset.steps * scale)))
        if state is not None and state["stage"] > number:
            continue

        def save(
            step: int, optimizer: dict[str, Any], number: int = number, stage: Stage = stage
        ) -> None:
            write_state(trainee, output, number, step, optimizer)
            if step % EVALUATE_EVERY == 0:
                trainee.eval()
                judge(stage, held_out[:EARLY_IMAGES])
                write_checkpoint(trainee.llava, processor, output)
                trainee.train()

        def draw(rng: np.random.Generator, stage: Stage = stage) -> list[Example]:
            return task.batch(stage, rng)

        resumed = state if state is not None and state["stage"] == number else None
        if stage.name == "words" and resumed is None:
            look_for_alike(model, torch.Generator().manual_seed(seed))
        run_stage(trainee, stage, (seed, number), partial(loss_of, stage), draw, resumed, save)
        if stage.name == "words":  # to say a word, make its vector
            with torch.no_grad():
                model.lm_head.weight.copy_(model.model.language_model.embed_tokens.weight)
        figures = judge(stage, held_out)
        write_checkpoint(trainee.llava, processor, output)
        write_state(trainee, output, number + 1, 0, {})

    record = {"validation": figures}
    if test:
        record["test"] = evaluate(trainee, task.test(), processor, packer, "test")
    (output / "figures.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python -m bivlm_edge.reference.train", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--data", choices=sorted(TASKS), default="easy-vqa", help="data set (default: easy-vqa)"
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
    task = TASKS[options.data](options.seed)
    train(task, options.output, options.seed, options.scale, options.resume, options.test)


if __name__ == "__main__":
    main()
