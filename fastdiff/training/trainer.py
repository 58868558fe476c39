"""The training loop: AdamW, averaged weights, validation with early stopping, checkpoints that continue bit for bit."""

from __future__ import annotations

import copy
import csv
import io
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdiff.config import use_backend
from fastdiff.errors import InputError
from fastdiff.files import write_atomic
from fastdiff.models import UNet
from fastdiff.models.loading import Model, save_model
from fastdiff.training.batches import Batch, BatchStream, validation_batches
from fastdiff.training.data import ImageSet, split_holdout
from fastdiff.training.settings import DTYPES, Settings
from fastdiff.training.state import Progress, ema_decay, load_state, save_state, update_ema

_CSV_HEADER = ("step", "train_loss", "validation_loss", "seconds")


@dataclass(frozen=True)
class Outputs:
    """The files of a run, beside each other: the model, the training state, the loss curve."""

    model: Path

    @property
    def state(self) -> Path:
        return self.model.with_suffix(".state.safetensors")

    @property
    def losses(self) -> Path:
        return self.model.with_suffix(".csv")


def learning_rate(step: int, *, peak: float, warmup: int, steps: int) -> float:
    """peak * step / warmup up to `warmup`, then peak (1 + cos(pi (step - warmup) / (steps - warmup))) / 2."""
    if step <= warmup:
        return peak * step / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


class Trainer:
    """One run: `Trainer(settings, data, out).run()` trains to the end and leaves the averaged weights at `out`.

    resume  continue from the training state beside `out`; everything comes out as if the run had not stopped. With
            another number of steps the learning rate follows the new number from there on
    device  where the network lives; random choices are made on the CPU, the same on every device
    store   the dtype of the weights in the model file; the state is float32

    Errors: InputError for settings that do not fit the data, an unwritable `out`, a state of another run.
    """

    def __init__(
        self,
        settings: Settings,
        data: ImageSet,
        out: str | Path,
        *,
        resume: bool = False,
        device: torch.device | str = "cpu",
        store: torch.dtype = torch.float32,
    ) -> None:
        self.settings, self.data, self.outputs, self.store = settings, data, Outputs(Path(out)), store
        self.device = torch.device(device)
        self.objective = settings.objective()
        self.stream, self.validation = self._batches()
        self.network = self._new_network().to(self.device).train()
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.best = copy.deepcopy(self.average)
        self.optimizer = self._new_optimizer()
        self.progress = Progress()
        self.fingerprint = data.fingerprint()
        self._seconds: dict[int, float] = {}
        self._pool: ThreadPoolExecutor | None = None
        if resume:
            self._restore()
        elif self.outputs.state.exists():
            raise InputError(f"{self.outputs.state}: a run stands there; pass --resume to continue it, or delete it")
        self._check_writable()

    def _batches(self) -> tuple[BatchStream, list[Batch]]:
        """The batches to train on, and those of the validation: none without held-out images."""
        settings, timesteps = self.settings, self.objective.schedule.steps
        train, held_out = split_holdout(self.data, settings.holdout, settings.seed)
        stream = BatchStream(
            train,
            batch=settings.batch,
            timesteps=timesteps,
            seed=settings.seed,
            label_dropout=settings.label_dropout,
            flip=settings.flip,
        )
        if held_out is None:
            return stream, []
        with use_backend("reference"):
            return stream, validation_batches(held_out, batch=settings.batch, timesteps=timesteps, seed=settings.seed)

    def _new_network(self) -> UNet:
        config = self.settings.network_config(self.data.sample_shape, self.data.num_classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return UNet(**config)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.network.parameters(),
            lr=self.settings.lr,
            betas=(0.9, self.settings.beta2),
            weight_decay=self.settings.weight_decay,
            fused=True,
        )

    def run(
        self,
        *,
        stop_after: int | None = None,
        should_stop: Callable[[], bool] | None = None,
        progress_bar: bool = False,
    ) -> Progress:
        """Train until the last step, an early stop, `stop_after` steps in all, or until should_stop() says so."""
        parallel = self.settings.parts > 1 and self.device.type == "cpu"
        pool = ThreadPoolExecutor(
            self.settings.parts, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
        )
        with pool if parallel else nullcontext() as self._pool:
            return self._run(stop_after, should_stop, progress_bar)

    def _run(self, stop_after: int | None, should_stop: Callable[[], bool] | None, progress_bar: bool) -> Progress:
        last = self.settings.steps if stop_after is None else min(stop_after, self.settings.steps)
        start = time.monotonic()
        earlier = max(self._seconds.values(), default=0.0)
        state = self.progress
        with tqdm(total=self.settings.steps, initial=state.step, unit="step", disable=not progress_bar) as bar:
            while state.step < last and not state.finished and not (should_stop is not None and should_stop()):
                state.step += 1
                loss = self._train_step(state.step)
                state.loss_sum, state.loss_count = state.loss_sum + loss, state.loss_count + 1
                if state.step % self.settings.evaluate_every == 0 or state.step == self.settings.steps:
                    self._evaluate()
                    self._seconds[state.step] = earlier + time.monotonic() - start
                    if state.step < last:
                        self._save()
                bar.update()
                bar.set_postfix(self._report(loss), refresh=False)
        self._save()
        return state

    def _train_step(self, step: int) -> float:
        settings = self.settings
        with use_backend("reference"):
            parts = self.stream.at(step).split(settings.parts)
        results = list(map(self._gradients, parts) if self._pool is None else self._pool.map(self._gradients, parts))
        value = sum(loss for loss, _ in results) / len(results)
        if not math.isfinite(value):
            raise InputError(f"training: the loss of step {step} is {value}; lower the learning rate ({settings.lr})")
        for parameter, *gradients in zip(self.network.parameters(), *(g for _, g in results), strict=True):
            parameter.grad = sum(gradients[1:], gradients[0]).div_(len(gradients))
        nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=settings.lr, warmup=settings.warmup, steps=settings.steps)
        self.optimizer.step()
        update_ema(self.average, self.network, ema_decay(step, settings.ema))
        return value

    def _gradients(self, part: Batch) -> tuple[float, tuple[Tensor, ...]]:
        """(mean loss, its gradients) of part of a batch; leaves the network alone, so that parts may run at once."""
        with torch.enable_grad():
            loss = self._losses(self.network, part).mean()
            return loss.item(), torch.autograd.grad(loss, tuple(self.network.parameters()))

    def _losses(self, network: nn.Module, batch: Batch) -> Tensor:
        batch = batch.to(self.device)
        low_precision = self.settings.dtype != "float32"
        # Backend, autocast and its cache belong to a thread: they are set here, and the cache, which is not, is off.
        with (
            use_backend("reference"),
            torch.autocast(self.device.type, dtype=DTYPES["bfloat16"], enabled=low_precision, cache_enabled=False),
        ):
            x = self.objective.noised(batch.x0, batch.noise, batch.k)
            output = network(x, self.objective.timesteps(batch.k), class_labels=batch.labels)
        return self.objective.per_sample(output, batch.x0, batch.noise, batch.k)

    @torch.no_grad()
    def validation_loss(self) -> float | None:
        """Mean loss of the averaged weights on the held-out images, fixed noise and times; None without any."""
        if not self.validation:
            return None
        losses = torch.cat([self._losses(self.average, batch) for batch in self.validation])
        return losses.double().mean().item()

    def _evaluate(self) -> None:
        state, loss = self.progress, self.validation_loss()
        if loss is None or state.best is None or loss < state.best:
            state.best, state.stale = loss, 0
            self.best.load_state_dict(self.average.state_dict())
        else:
            state.stale += 1
        state.history.append((state.step, state.loss_sum / state.loss_count, loss))
        state.loss_sum, state.loss_count = 0.0, 0
        early = self.settings.patience > 0 and state.stale >= self.settings.patience
        state.finished = early or state.step == self.settings.steps

    def _report(self, loss: float) -> dict[str, str]:
        best = self.progress.best
        return {"loss": f"{loss:.4f}"} | ({} if best is None else {"best validation": f"{best:.5f}"})

    def model(self) -> Model:
        """The averaged weights with the lowest validation loss so far, as a model to sample from."""
        data = self.data
        return Model(
            network=self.best,
            schedule=self.objective.schedule,
            prediction=self.settings.prediction,
            sample_shape=data.sample_shape,
            num_classes=data.num_classes,
            class_names=data.class_names,
        )

    def _save(self) -> None:
        # The model first: if the run is killed between the two, resuming from the older state writes it again.
        if self.progress.history:
            lengths = {"lengths": self.progress.lengths} if self.progress.lengths else {}
            training = self.settings.to_dict() | lengths
            save_model(self.model(), self.outputs.model, training=training, dtype=self.store)
        save_state(
            self.outputs.state,
            self._tensors(),
            self.progress,
            settings=self.settings.to_dict(),
            fingerprint=self.fingerprint,
        )
        rows = [(*row, f"{self._seconds.get(row[0], math.nan):.1f}") for row in self.progress.history]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([_CSV_HEADER, *rows])
        write_atomic(self.outputs.losses, text.getvalue().encode())

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for part, module in (("network", self.network), ("average", self.average), ("best", self.best)):
            tensors |= {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def _restore(self) -> None:
        tensors, self.progress = load_state(
            self.outputs.state, settings=self.settings.to_dict(), fingerprint=self.fingerprint
        )
        for part, module in (("network", self.network), ("average", self.average), ("best", self.best)):
            prefix = f"{part}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for name, parameter in self.network.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"optimizer.{key}.{name}" in tensors:
                    value = tensors[f"optimizer.{key}.{name}"]
                    self.optimizer.state[parameter][key] = value.to(self.device)
        if self.outputs.losses.exists():
            with self.outputs.losses.open(newline="") as file:
                self._seconds = {int(row["step"]): float(row["seconds"]) for row in csv.DictReader(file)}

    def _check_writable(self) -> None:
        """Fail before the first step, not at the first checkpoint."""
        probe = self.outputs.model.with_suffix(".probe")
        write_atomic(probe, b"")
        probe.unlink()
