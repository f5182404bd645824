"""finetune(model, images, validation, config, recipe, folder): train a model with merging in it."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypedDict

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from atm_triton.config import ATMConfig
from atm_triton.measure.distributed import rank, silent, sum_over_processes, world_size
from atm_triton.measure.evaluate import Batches, Evaluation, evaluate, share
from atm_triton.patch import apply_patch, settled
from atm_triton.training.folder import AVERAGED, WEIGHTS, RunFolder
from atm_triton.training.images import PASS, TrainImages, passes, seed_all, steps_per_epoch
from atm_triton.training.method import Method
from atm_triton.training.recipe import AMP, Recipe

SAID_EVERY = 60.0  # seconds between two lines if there is no terminal to show a bar
LEAST_SCALE = 2.0**-20  # give up if a float16 loss scaled by less than this still has gradients that are not finite


class StepRow(TypedDict):
    """A step's line in the log."""

    step: int
    loss: float
    lr: float
    grad_norm: float | None


class Training:
    """Trains a model step by step. ``model`` stays unpatched and in eval mode; :meth:`merge_by` makes a copy,
    ``merging``, that shares its weights, merges by ``config`` and is in training mode. With a ``method`` the config is
    None, and the method reduces the copy's tokens.

    Raises:
        ValueError: the model is in 16 bits, has nothing to train or no head, or, with several processes, has batch
            norms; or several processes cannot share out the passes of a step evenly.
    """

    config: ATMConfig | None
    merging: VisionTransformer

    def __init__(
        self, model: VisionTransformer, recipe: Recipe, steps_per_epoch: int, method: Method | None = None
    ) -> None:
        _check_trainable(model)
        _check_processes(model, recipe)
        self.model, self.recipe = model, recipe
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.method = Method() if method is None else method
        self.optimizer = self.method.optimizer(model, recipe)
        self.schedule = recipe.schedule(self.optimizer, steps_per_epoch)
        self.ema = None if recipe.ema is None else ModelEmaV3(model, decay=recipe.ema)
        self.device, self.dtype = self.parameters[0].device, self.parameters[0].dtype
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "float16")
        self.mixing, self.loss = recipe.mixing(model.num_classes), recipe.loss()
        self.step, self.steps = 0, recipe.epochs * steps_per_epoch

    def merge_by(self, config: ATMConfig | None) -> None:
        self.config = None if config is None else settled(config, self.model)
        self.merging = self.patch(share(self.model)).train()
        self.merging.set_grad_checkpointing(self.recipe.grad_checkpointing)

    def patch(self, model: VisionTransformer) -> VisionTransformer:
        """Make a copy of the model reduce its tokens the way training does."""
        return self.method.patch(model) if self.config is None else apply_patch(model, self.config)

    def advance(self, own_passes: list[tuple[Tensor, Tensor]]) -> StepRow:
        """Take a step from the passes of this process. Returns its loss, the largest learning rate, and the norm of the
        gradient (None if a scaled loss was too large and the step was left out).

        Raises:
            ValueError: the loss or a gradient is not finite; the weights are as before the step.
        """
        self.method.begin_step(self.merging, self.optimizer, self.step / self.steps)
        self.schedule.step_update(self.step)
        self.optimizer.zero_grad()
        losses = torch.zeros(self.recipe.accumulate, dtype=torch.float64)
        for turn, (images, labels) in enumerate(own_passes):
            number = rank() + turn * world_size()
            losses[number] = self._backward(images, labels, number)
        sum_over_processes([losses])
        loss = losses.mean().item()
        if not math.isfinite(loss):
            raise ValueError(_diverged(f"the loss of step {self.step + 1} is {loss}"))
        self._sum_gradients()
        norm = self._update()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model)
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        return {"step": self.step, "loss": loss, "lr": lr, "grad_norm": norm}

    def _sum_gradients(self) -> None:
        """Sum gradients over the processes. A parameter used only by other processes gets their gradient here too."""
        if world_size() == 1:
            return
        used = torch.tensor([p.grad is not None for p in self.parameters], dtype=torch.float64)
        sum_over_processes([used])
        for parameter, processes in zip(self.parameters, used.tolist(), strict=True):
            if processes and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sum_over_processes([p.grad for p in self.parameters if p.grad is not None])

    def _backward(self, images: Tensor, labels: Tensor, number: int) -> float:
        """Add the gradients of a pass, the ``number``-th of its step, and return its loss."""
        seed_all(self.recipe.seed, PASS, self.step, number)
        images, targets = images.to(self.device, self.dtype), labels.to(self.device)
        if self.mixing is not None:
            images, targets = self.mixing(images, targets)
        amp = None if self.recipe.amp is None else AMP[self.recipe.amp]
        with torch.autocast(self.device.type, dtype=amp, enabled=amp is not None):
            answer = self.method.answer(self.merging, images)
        loss = self.method.loss(answer, targets, self._criterion)
        self.scaler.scale(loss / self.recipe.accumulate).backward()
        return loss.item()

    def _criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.loss(logits.to(self.dtype), targets)

    def _update(self) -> float | None:
        """Take a step by the summed gradients and return their norm; None if the step was left out."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_grad or math.inf).item()
        lost = not math.isfinite(norm)
        if lost and (not self.scaler.is_enabled() or self.scaler.get_scale() < LEAST_SCALE):
            raise ValueError(_diverged(f"the gradient of step {self.step + 1} is {norm}"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return None if lost else norm

    @torch.inference_mode()
    def check_sound(self, own_passes: list[tuple[Tensor, Tensor]]) -> None:
        """Raise ValueError if the weights after a step answer its images with NaN or infinity, so that no checkpoint
        holds such weights."""
        if not self.model(own_passes[0][0].to(self.device, self.dtype)).isfinite().all():
            raise ValueError(_diverged(f"the answers after step {self.step} are not finite"))

    def state(self) -> dict[str, Any]:
        """Everything that decides how training continues, in tensors, numbers and text."""
        return {
            "model": self.model.state_dict(),
            "model_ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "config": None if self.config is None else self.config.to_json(),
            "step": self.step,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`.

        Raises:
            ValueError: the state belongs to another model or recipe.
        """
        try:
            self.model.load_state_dict(state["model"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["model_ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            why = str(error).strip().splitlines()[-1].strip()
            raise ValueError(f"the checkpoint is of another model or recipe: {why}") from error
        self.step = state["step"]
        self.merge_by(None if state["config"] is None else ATMConfig.from_json(state["config"]))


def finetune(
    model: VisionTransformer,
    images: TrainImages,
    validation: Batches,
    config: ATMConfig | None,
    recipe: Recipe,
    folder: RunFolder,
    resume: bool = False,
    recalibrate: Callable[[VisionTransformer], ATMConfig] | None = None,
    workers: int = 0,
    save_every: int | None = None,
    method: Method | None = None,
) -> dict[str, Any]:
    """Train ``model`` in place, with merging. The model stays unpatched and ends with the trained weights.

    Under torchrun every process calls this with the same arguments (``validation`` with its own batches), after
    :func:`atm_triton.measure.distributed.start`; the result equals that of one process up to the order of sums. This
    seeds the generators of Python, NumPy and torch.

    Args:
        model: unpatched, in eval mode, float32 or float64, on its device.
        images: a :class:`~atm_triton.training.images.TrainFolder` or ``TrainDigits``, indexed by (epoch, number).
        validation: (images, labels), as for :func:`atm_triton.measure.evaluate.evaluate`.
        config: how tokens merge; None: what ``recalibrate`` finds.
        recipe: how to train.
        folder: where log, checkpoints and weights go.
        resume: continue from the folder's checkpoint, as if the run had not been interrupted.
        recalibrate: needed with ``recipe.recalibrate``: a function that takes the unpatched model and finds a
            configuration for its present weights, as :func:`atm_triton.calibrate` does.
        workers: processes that load images.
        save_every: save every so many steps within an epoch too; None: only at the end of an epoch.
        method: a way to reduce tokens other than ATM; ``config`` is then None.

    Returns:
        The final ``config``; ``before``, ``after`` and, with ``ema``, ``after_ema``: Evaluations as dicts; ``epochs``:
        one row per epoch, the first before training; ``steps`` and ``seconds``.

    Raises:
        ValueError: the model cannot be trained, the loss is not finite, the checkpoint has other settings, or another
            run is writing the folder. OSError: a file cannot be written. What was saved before is kept in each case.
    """
    if (recalibrate is None) != (recipe.recalibrate is None):
        raise ValueError("recalibrate wants two things: how often, in the recipe, and what finds the configuration")
    if method is not None and (config, recalibrate) != (None, None):
        raise ValueError("a method reduces tokens in a way of its own: leave config and recalibrate out")
    find = _fixed(config, method) if recalibrate is None else recalibrate
    training = Training(model, recipe, steps_per_epoch(images, recipe), method)
    run = _Run(training, images, validation, folder, find, workers, save_every)
    with folder.held():
        if resume:
            run.load(folder.load())
        else:
            folder.check_new()
            run.begin(config)
        for epoch in range(run.epochs_done, recipe.epochs):
            run.epoch(epoch)
        return run.result()


def _fixed(config: ATMConfig | None, method: Method | None) -> Callable[[VisionTransformer], ATMConfig | None]:
    if config is None and method is None:
        raise ValueError("there is no config, and no recalibrate that finds one; give one of them")
    return lambda _: config


class _Run:
    """A training run: the model in training, its images, its folder, and what was measured after each epoch."""

    def __init__(
        self,
        training: Training,
        images: TrainImages,
        validation: Batches,
        folder: RunFolder,
        find: Callable[[VisionTransformer], ATMConfig | None],
        workers: int,
        save_every: int | None,
    ) -> None:
        self.training, self.images, self.validation, self.folder = training, images, validation, folder
        self.find, self.workers, self.save_every = find, workers, save_every
        self.steps = steps_per_epoch(images, training.recipe)
        self.rows: list[dict[str, Any]] = []  # one per epoch, and one from before the first
        self.evaluations: dict[str, Any] = {}
        self.losses = 0.0  # summed over the steps of this epoch
        self.seconds = 0.0

    @property
    def epochs_done(self) -> int:
        return self.training.step // self.steps

    def begin(self, config: ATMConfig | None) -> None:
        self.training.merge_by(self.find(self.training.model) if config is None else config)
        before = self._evaluate(self.training.model)
        check_leaves_something(before, self.training.model)
        self.evaluations["before"] = before.to_dict()
        row = self._row(before, None, None)
        self._save()  # before anything else is written: if this fails, the run leaves nothing behind
        self.folder.log(row)

    def load(self, state: dict[str, Any]) -> None:
        self.training.load(state)
        for name in ("rows", "evaluations", "losses", "seconds"):
            setattr(self, name, state[name])

    def epoch(self, epoch: int) -> None:
        training, begin = self.training, time.perf_counter() - self.seconds
        every = training.recipe.recalibrate
        if every and epoch and epoch % every == 0 and training.step == epoch * self.steps:
            training.merge_by(self.find(training.model))
        for own_passes in self._shown(epoch):
            row = training.advance(own_passes)
            self.losses += row["loss"]
            self.seconds = time.perf_counter() - begin
            self.folder.log({**row, "epoch": epoch + 1, "seconds": self.seconds})
            due = self.save_every and training.step % self.save_every == 0
            if due or training.step % self.steps == 0:
                training.check_sound(own_passes)
            if due and training.step % self.steps:
                self._save()
        after = self._evaluate(training.model)
        averaged = None if training.ema is None else self._evaluate(training.ema.module)
        self.evaluations |= {"after": after.to_dict(), "after_ema": averaged and averaged.to_dict()}
        loss, self.losses = self.losses / self.steps, 0.0
        self.seconds = time.perf_counter() - begin
        self.folder.log(self._row(after, averaged, loss))
        self._save()

    def _shown(self, epoch: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """The passes of the rest of an epoch, under a progress bar, or with a line per minute without a terminal."""
        training, recipe = self.training, self.training.recipe
        first = training.step - epoch * self.steps
        pinned = training.device.type == "cuda"
        rest = passes(self.images, recipe, epoch, first, self.workers, pinned)
        title = f"epoch {epoch + 1}/{recipe.epochs}"
        bar = tqdm(rest, title, self.steps, initial=first, unit="step", leave=False, disable=silent(title))
        said = time.monotonic()
        for done, own_passes in enumerate(bar, start=first):
            if rank() == 0 and not sys.stderr.isatty() and time.monotonic() - said > SAID_EVERY:
                said = time.monotonic()
                print(f"{title}: step {done} of {self.steps}", flush=True)
            yield own_passes

    def _evaluate(self, model: VisionTransformer) -> Evaluation:
        return evaluate(model, self.validation, self.training.patch)

    def _row(self, now: Evaluation, averaged: Evaluation | None, loss: float | None) -> dict[str, Any]:
        """Make the row of an epoch, keep it, and print a line of it."""
        quality, recipe = now.overall, self.training.recipe
        row = {"epoch": self.epochs_done, "step": self.training.step, "train_loss": loss}
        row |= {"top1": quality.top1, "top1_unpatched": quality.top1_unpatched, "kl": quality.kl}
        top1_ema = None if averaged is None else averaged.overall.top1
        row |= {"gflops": quality.gflops, "top1_ema": top1_ema, "seconds": self.seconds}
        self.rows.append(row)
        if rank() > 0:
            return row
        of_loss = "" if loss is None else f"loss {loss:.4f}, "
        of_ema = "" if averaged is None else f", averaged weights {averaged.overall.top1:.2f} %"
        print(
            f"epoch {row['epoch']}/{recipe.epochs}: {of_loss}top-1 {quality.top1:.2f} % (unpatched "
            f"{quality.top1_unpatched:.2f} %{of_ema}), {quality.gflops:.3f} GFLOPs, {self.seconds:.0f} s",
            flush=True,
        )
        return row

    def _save(self) -> None:
        own = {name: getattr(self, name) for name in ("rows", "evaluations", "losses", "seconds")}
        self.folder.save({**self.training.state(), **own})

    def result(self) -> dict[str, Any]:
        training = self.training
        self.folder.save_weights(WEIGHTS, training.model.state_dict())
        if training.ema is not None:
            self.folder.save_weights(AVERAGED, training.ema.module.state_dict())
        config = None if training.config is None else asdict(training.config)
        about = {"config": config, "steps": training.step, "seconds": self.seconds}
        return {**about, **self.evaluations, "epochs": self.rows}


def _diverged(what: str) -> str:
    return (
        f"{what}: training ends, and the last checkpoint is kept; begin anew in another --out with a lower lr, or with "
        "clip_grad"
    )


def check_leaves_something(before: Evaluation, model: VisionTransformer) -> None:
    """Raise ValueError if at most one patch token is left for the last block."""
    first, last = (N - model.num_prefix_tokens for N in (before.tokens[0], before.tokens[-1]))
    if last <= 1 < first:
        raise ValueError(
            f"the configuration merges everything: of {first:.0f} patch tokens {last:.1f} enter the last block; raise "
            "the thresholds, or lower r"
        )


def _check_trainable(model: VisionTransformer) -> None:
    kinds = {p.dtype for p in model.parameters()}
    if not kinds <= {torch.float32, torch.float64}:
        raise ValueError(
            f"weights of {', '.join(map(str, kinds))} are too coarse to be trained: take float32, and for faster "
            "passes amp"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of the model is trained: requires_grad is False for each of them")
    if model.num_classes < 2:
        raise ValueError(f"the model has {model.num_classes} classes: training with labels wants a head of two or more")


def _check_processes(model: VisionTransformer, recipe: Recipe) -> None:
    if recipe.accumulate % world_size():
        raise ValueError(
            f"accumulate={recipe.accumulate} passes a step cannot be shared evenly among {world_size()} processes; "
            f"give a multiple of {world_size()}"
        )
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms and world_size() > 1:
        raise ValueError(f"{norms[0]} is a batch norm: each process would have statistics of its own; use one process")
