"""The training loop, in one sitting. Every hook stands where it runs::

    build the network, weights by name              weights.build_by_name
    for each part: seed, on_start                   edits and run.extra are made here
    fit_members(run)                                further runs, each trained whole; their answers are run.members_of(part)
    [resume: replay edits, load weights, restore parts]
    stages: each part's before(run), then stage(run, 0), stage(run, 1) ... or one plain stage
        on_stage                                    once; may edit (a round that grows the network)
        optimizer(run, params)                      or SGD with Nesterov momentum
        epochs:
            order(run, index, gen)                  or a keyed permutation
            steps:
                seed the global state by (seed, stage, epoch, step)
                the global batch -> on_batch
                shard by process
                around_grad( forward -> objective -> on_loss -> gradient or backward )
                average gradients over processes
                on_grad                             by rank: unscale 0, clip 10, noise 20
                update(run)                         or optimizer.step()
                on_step
                checkpoint, where one is due
            on_epoch -> metrics -> checkpoint
    on_end -> the answer

A run's place is (seed, stage, epoch, step) and the parts' own state; nothing else is carried.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.errors import Diverged, Mistake
from convince.fit.randomness import generator, preserved, seed_global
from convince.fit.run import Run
from convince.fit.state import load_optimizer, named, read_tree, restore_run, run_state, write_tree
from convince.fit.weights import build_by_name
from convince.types import Batch, Out, Stage, StageCost

Progress = Callable[[int, int, str], None]  # steps done, steps of the stage, a line of text


def fit(run: Run, checkpoint: Path | None = None, progress: Progress | None = None) -> None:
    """Train ``run`` to its end; with ``checkpoint`` save there now and then, and go on from what is there."""
    with preserved(), torch.inference_mode(False), torch.enable_grad():
        start(run)
        _fit_members(run, checkpoint, progress)
        state = read_tree(checkpoint) if checkpoint is not None and checkpoint.exists() else None
        if state is not None:
            restore_run(run, state)
        saver = Saver(run, checkpoint, state)
        ahead = stages_before(run)
        if run.settings.pretrain_only and not ahead:
            raise Mistake("--pretrain-only: no part that is switched on has a stage before the main one; add one, such as --with rotnet")
        while (stage := _stage(run, ahead)) is not None:
            _train_stage(run, stage, saver, progress, main=run.stage_number >= len(ahead))
            run.stage_number, run.epoch, run.step, run.stage_steps = run.stage_number + 1, 0, 0, 0
            run.optimizer = None
        run.stage = Stage("end", 0)
        for seat in run.team.seats_with("on_end"):
            seat.technique.on_end(run)
        run.forget_scores()
        run.processes.average_buffers(run.model)
        run.record.close()


def start(run: Run) -> None:
    """Build the network with weights by name, then each part's ``on_start``, seeded by the part's name."""
    run.model = run.plan.place(build_by_name(run.build, run.seed))
    if run.settings.start is not None:
        begin_with(run, Path(run.settings.start))
    run.normalise = run.normalise.to(run.plan.device)
    run.model.train()
    for seat in run.team.seats_with("on_start"):
        seed_global(run.seed, seat.name, "start")
        seat.technique.on_start(run)
    run.extra.to(device=run.plan.device, dtype=run.plan.dtype)


def begin_with(run: Run, folder: Path) -> None:
    """Take the weights of another run's network where name and shape agree; a head for other classes stays as drawn."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise Mistake(f"--start {folder}: no weights can be read there ({str(error).splitlines()[0]}); name the folder of a finished run") from error
    mine = run.model.state_dict()
    same = {name: tensor for name, tensor in found.items() if name in mine and mine[name].shape == tensor.shape}
    if not any(name in same for name, _ in run.model.named_parameters()):
        raise Mistake(f"--start {folder}: none of its weights fits the network {run.settings.model!r}; use the --model that it was trained with")
    run.model.load_state_dict(same, strict=False)
    run.started_with = sum(tensor.numel() for tensor in same.values()) / max(sum(tensor.numel() for tensor in mine.values()), 1)


def _fit_members(run: Run, checkpoint: Path | None, progress: Progress | None) -> None:
    """Train the runs that parts ask for, one after the other; a finished one is not trained again on resume."""
    specs = [(seat.name, spec) for seat in run.team.seats_with("fit_members") for spec in seat.technique.fit_members(run)]
    for i, (owner, spec) in enumerate(specs):
        assert run.child is not None
        child = run.child(spec)
        child.most_steps, child.meter = run.most_steps, run.meter
        fit(child, None if checkpoint is None else checkpoint.with_name(f"member-{i}-{checkpoint.name}"), progress)
        run.children.append(child)
        run.owners.append(owner)
        run.images += child.images
        run.ledger += child.ledger


class Saver:
    """Writes checkpoints on the first process, at most every ``checkpoint_seconds`` and at epoch ends."""

    def __init__(self, run: Run, path: Path | None, state: dict | None) -> None:
        self.run, self.path, self.resumed = run, path, state
        self.last = time.monotonic()
        self.tally = torch.zeros(3, dtype=torch.float64)  # loss x rows, right answers, rows of this epoch
        if state is not None:
            self.tally += state["tally"]

    def save(self, epoch: int, step: int, *, now: bool = False) -> None:
        if self.path is None or not (now or time.monotonic() - self.last >= self.run.settings.checkpoint_seconds):
            return
        run = self.run
        run.epoch, run.step, kept = epoch, step, (run.epoch, run.step)
        state = {**run_state(run), "tally": self.tally}
        run.epoch, run.step = kept
        if run.rank == 0:
            write_tree(self.path, state)
        self.last = time.monotonic()


def stages_before(run: Run) -> list[Stage]:
    """The stages that parts put before the main ones, each with its owner."""
    ahead = []
    for seat in run.team.seats_with("before"):
        for stage in seat.technique.before(run):
            stage.owner = seat.technique
            ahead.append(stage)
    return ahead


def _stage(run: Run, ahead: list[Stage]) -> Stage | None:
    if run.stage_number < len(ahead):
        return ahead[run.stage_number]
    i = run.stage_number - len(ahead)
    if run.settings.pretrain_only:
        return None
    owner = run.team.owner("stage")
    if owner is None:
        settings = run.settings
        return Stage("train", settings.epochs or 0, steps=settings.steps) if i == 0 else None
    stage = owner.stage(run, i)
    if stage is not None:
        stage.owner = owner
    return stage


def _train_stage(run: Run, stage: Stage, saver: Saver, progress: Progress | None, *, main: bool) -> None:
    cost, images, began = StageCost(stage.name, main), run.images, time.monotonic()
    run.ledger.append(cost)
    asked = stage.steps
    if run.most_steps is not None:
        stage = dataclasses.replace(stage, steps=min(stage.steps or run.most_steps, run.most_steps))
    resumed, saver.resumed = saver.resumed, None
    fresh = resumed is None or resumed["optimizer"] is None
    run.stage, run.stopped = stage, False if fresh else run.stopped
    if fresh:
        for seat in run.team.seats_with("on_stage", stage):
            seed_global(run.seed, seat.name, "stage", run.stage_number)
            seat.technique.on_stage(run)
    for name, p in named(run):
        p.requires_grad_(p.is_floating_point() and (stage.trainable is None or stage.trainable(name)))
    run.optimizer = _optimizer(run, stage)
    if not fresh and resumed is not None:
        load_optimizer(run.optimizer, {p: n for n, p in named(run)}, resumed["optimizer"])
    first_epoch, first_step = run.epoch, run.step
    epoch = first_epoch
    while not run.stopped and (epoch < stage.epochs if stage.steps is None else run.stage_steps < stage.steps):
        run.epoch = epoch
        rows = _order(run, stage)
        batches = _batches(rows, run.settings.batch or 64)
        if not batches:
            raise Mistake(f"the stage {stage.name!r} has no samples to train on")
        begin = first_step if epoch == first_epoch else 0
        total = len(batches) * stage.epochs
        cost.planned = cost.planned or (total if asked is None else asked)
        if stage.steps is not None:
            total, batches = stage.steps, batches[: begin + stage.steps - run.stage_steps]
        run.stage_length = total
        for step, batch in enumerate(_load(run, stage, batches[begin:], rows.shape[1] if rows.dim() == 2 else 1), begin):
            run.step = step
            _step(run, stage, batch, saver, run.stage_steps / total)
            cost.steps += 1
            if run.most_steps is not None:
                cost.marks.append(run.meter())
            saver.save(epoch, step + 1)
            if progress is not None:
                progress(run.stage_steps, total, f"{stage.name}, epoch {epoch + 1}")
        run.step = len(batches)
        _end_epoch(run, stage, saver)
        saver.tally.zero_()
        epoch += 1
        saver.save(epoch, 0, now=True)
    cost.images, cost.seconds = run.images - images, time.monotonic() - began


def _order(run: Run, stage: Stage) -> Tensor:
    """Rows of this epoch [m], or groups of rows [m g], from the owner of the order or a keyed permutation."""
    index = run.data.split.train if stage.index is None else stage.index
    if stage.index is None and stage.targets is None and stage.guests:
        index = index[run.data.y[index] >= 0]
    gen = generator(run.seed, "order", run.stage_number, run.epoch)
    owner = run.team.owner("order", stage)
    return index[torch.randperm(len(index), generator=gen)] if owner is None else owner.order(run, index, gen)


def _batches(rows: Tensor, size: int) -> list[Tensor]:
    """Global batches of ``size`` rows (or groups); a shorter last one is dropped unless it is the only one."""
    batches = list(rows.split(size))
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) < size else batches


def _load(run: Run, stage: Stage, batches: list[Tensor], group: int) -> Iterator[Batch]:
    """Pixels and labels of each global batch, on the device."""
    data, plan = run.data, run.plan
    flat = [rows.reshape(-1) for rows in batches]
    for index, x in zip(flat, data.x.batches(flat), strict=True):
        if stage.targets is not None:
            y = stage.targets[index].to(plan.dtype)
        else:
            y = F.one_hot(data.y[index].clamp_min(0), data.k).to(plan.dtype) * (data.y[index] >= 0)[:, None]
        extra = {name: value[index].to(plan.device) for name, value in data.extra.items()}
        yield Batch(plan.pixels(x), y.to(plan.device), index, None, extra, group)


def _step(run: Run, stage: Stage, batch: Batch, saver: Saver, progress: float) -> None:
    run.seed_step("model")
    run.forget_scores()
    run.batch = batch
    for seat in run.team.seats_with("on_batch", stage):
        seat.technique.on_batch(run)
    run.batch, run.share = run.processes.shard(run.batch)
    assert run.optimizer is not None
    run.optimizer.zero_grad(set_to_none=True)
    grad: Callable[[], None] = partial(_grad, run, stage)
    for seat in reversed(run.team.seats_with("around_grad", stage)):
        grad = partial(seat.technique.around_grad, run, grad)
    grad()
    run.processes.average([p for _, p in named(run)], run.share)
    for seat in run.team.seats_with("on_grad", stage):
        seat.technique.on_grad(run)
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor(stage.schedule or run.settings.schedule, run.settings.warmup, progress)
    owner = run.team.owner("update", stage)
    run.optimizer.step() if owner is None else owner.update(run)
    run.steps_done += 1
    run.stage_steps += 1
    with torch.no_grad():
        n = len(run.batch.x)
        right = torch.zeros(())
        if run.out.logits is not None and run.batch.y is not None and run.out.logits.shape == run.batch.y.shape:
            right = (run.out.logits.argmax(1) == run.batch.y.argmax(1)).sum()
        saver.tally += torch.stack([run.loss.detach().double().cpu() * n, right.double().cpu(), torch.tensor(float(n))])
    for seat in run.team.seats_with("on_step", stage):
        seat.technique.on_step(run)


def _grad(run: Run, stage: Stage) -> None:
    """Forward, objective, on_loss, backward (or the owner of the gradient in its place)."""
    run.out = run.forward(run.batch.x)
    objective: Any = stage.objective or getattr(run.team.owner("objective", stage), "objective", soft_cross_entropy)
    run.loss = objective(run, run.out, run.batch)
    for seat in run.team.seats_with("on_loss", stage):
        seat.technique.on_loss(run)
    owner = run.team.owner("gradient", stage)
    run.loss.backward() if owner is None else owner.gradient(run)


def soft_cross_entropy(run: Run, out: Out, batch: Batch) -> Tensor:
    """Mean over rows of ``-sum_k y_k log p_k``, each row times its weight."""
    if out.logits is None or batch.y is None:
        raise Mistake("the plain objective needs logits and labels; switch on a part that owns the objective")
    losses = F.cross_entropy(out.logits, batch.y, reduction="none")
    return losses.mean() if batch.weight is None else (losses * batch.weight).mean()


def factor(schedule: str, warmup: float, progress: float) -> float:
    """The learning rate's factor at ``progress`` 0 to 1: "constant" is 1; "cosine" warms up linearly, then falls to 0."""
    if schedule == "constant":
        return 1.0
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-9)))


def _optimizer(run: Run, stage: Stage) -> torch.optim.Optimizer:
    params = [(name, p) for name, p in named(run) if p.requires_grad]
    owner = run.team.owner("optimizer")
    optimizer = plain_sgd(run, params) if owner is None else owner.optimizer(run, params)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"] if stage.lr is None else stage.lr
    return optimizer


def plain_sgd(run: Run, params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """SGD, Nesterov momentum 0.9; weight decay on matrices and kernels only."""
    settings = run.settings
    groups = [
        {"params": [p for _, p in params if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for _, p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD([group for group in groups if group["params"]], lr=settings.lr or 0.1, momentum=0.9, nesterov=True, fused=True)
    for _, p in params:  # the fused step fails where only some parameters have had a gradient so far
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _end_epoch(run: Run, stage: Stage, saver: Saver) -> None:
    run.processes.average_buffers(run.model)
    loss, right, rows = run.processes.total(saver.tally).tolist()
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss / rows:g} after epoch {run.epoch + 1} of {stage.name!r}; lower --lr or switch off the part that causes it")
    for seat in run.team.seats_with("on_epoch", stage):
        seat.technique.on_epoch(run)
    row = {"kind": "epoch", "stage": stage.name, "epoch": run.epoch, "steps": run.steps_done, "images": run.images}
    row |= {"loss": loss / rows, "train_accuracy": right / rows}
    if run.optimizer is not None:
        row["lr"] = float(run.optimizer.param_groups[0]["lr"])
    if stage.guests and len(run.data.split.val):
        scores = run.evaluate("val")
        row |= {"val_loss": scores.log_loss, "val_accuracy": scores.accuracy}
    run.record.row(**row)
