"""One step, one evaluation, one look at the gradients: the computing of training, without files, clocks and signals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resblocks.undisturbed import restored

from .augment import augment, derive_seed, draw, draw_first_flips, normalise, resize
from .data import Dataset
from .graph import GraphedStep, check_graph
from .meter import Meter
from .ranks import Ranks
from .recipe import Recipe

GRADIENT_IMAGES = 128  # of the training set, the same ones every time; fewer where a batch is smaller


class Loop:
    """A net on a device with its data and its optimizer; step `s` is a function of (net before it, recipe, seed, s).

    Args:
        compile_mode: of torch.compile; None leaves the net as it is.
        graph: replay each step as one CUDA graph.

    Raises:
        ValueError: batch size, ranks, images and augmentation do not go together.
    """

    def __init__(
        self,
        net: nn.Module,
        dataset: Dataset,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        ranks: Ranks,
        *,
        compile_mode: str | None = None,
        graph: bool = False,
        channels_last: bool = True,
    ) -> None:
        images = len(dataset.train_images)
        if recipe.batch_size > images:
            raise ValueError(f"batch_size must be at most the {images} training images, got {recipe.batch_size}")
        if recipe.batch_size % ranks.size:
            raise ValueError(f"batch_size must be a multiple of the {ranks.size} processes, got {recipe.batch_size}")
        self.recipe, self.seed, self.device, self.dtype, self.ranks = recipe, seed, device, dtype, ranks
        draw(recipe, 1, *dataset.shape[1:], seed=0, step=0)  # raises before anything is moved or compiled
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.images, self.labels = dataset.train_images.to(device), dataset.train_labels.to(device)
        self.test_images, self.test_labels = dataset.test_images.to(device), dataset.test_labels.to(device)
        self.mean, self.std = dataset.mean.to(device), dataset.std.to(device)
        self.first_flips = draw_first_flips(images, seed=seed).to(device)
        self.steps_per_epoch = images // recipe.batch_size  # the same on every rank: nobody waits for a missing batch
        self.total_steps = self.steps_per_epoch * recipe.epochs
        self.local_batch = recipe.batch_size // ranks.size
        self._order_of: tuple[int, Tensor] | None = None

        self.net = net.to(device=device, memory_format=self.memory_format)  # type: ignore[call-overload]
        # CUDA graphs, whose results the next replay writes over
        self.replays = compile_mode not in (None, "default")
        if graph:
            check_graph(device, ranks.size, self.replays, recipe.start_scale)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(net, mode=compile_mode) if compile_mode else net
        self.model: Callable[[Tensor], Tensor] = self.forward
        self.optimizer = torch.optim.SGD(
            self.net.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
            fused=True,  # faster, and it can be told on the device to leave the weights alone
        )
        if recipe.momentum > 0:
            # The fused kernel takes all buffers or none, but a weight may get its first gradient later than others.
            for weight in [weight for weight in net.parameters() if weight.requires_grad]:
                self.optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        self.optimizer.zero_grad(set_to_none=True)  # the first step would add its gradient to the caller's
        self.meter = Meter(device)
        state = {name: tensor for name, tensor in net.state_dict().items() if tensor.is_floating_point()}
        self.finite_at_start = [name for name, tensor in state.items() if tensor.isfinite().all()]  # a mask is not
        self.graphed = GraphedStep(self.update, self._changing) if graph else None

    def distribute(self) -> None:
        """Let the ranks share their gradients from now on, and start from the first one's weights."""
        if not self.ranks.on:
            return
        on_gpu = self.device.type == "cuda"
        # Gradients are else grouped anew after a process's first step, and with them the order of the sums, which
        # matters from three ranks on: a resumed run would round in another way. Only the CPU promises the same bits.
        keeps_groups = self.ranks.size > 2 and not on_gpu
        self.model = nn.parallel.DistributedDataParallel(
            self.forward,
            device_ids=[self.device.index] if on_gpu else None,
            find_unused_parameters=keeps_groups or self.has_idle_weights(),
        )

    def has_idle_weights(self) -> bool:
        """Whether a weight that is to be trained gets no gradient, such as those of a shortcut that is off."""
        self.reseed(derive_seed("idle", self.seed))
        images = self.normalised(self.images[: self.local_batch], self.recipe.scale_at(0, self.total_steps))
        with restored(self.net):
            with self.autocast():
                logits = self.net.train()(images)
            logits.sum().backward()
            idle = any(weight.requires_grad and weight.grad is None for weight in self.net.parameters())
        self.optimizer.zero_grad(set_to_none=True)
        return idle

    def order(self, epoch: int) -> Tensor:
        """The order of the training images in an epoch, counted from 0: the same on any number of ranks."""
        if self._order_of is None or self._order_of[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))
            self._order_of = epoch, torch.randperm(len(self.images), generator=generator).to(self.device)
        return self._order_of[1]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's part of the step's images, augmented, and labels: (B, C, H, W) and (B,)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        size = self.recipe.batch_size
        draws = draw(self.recipe, size, *self.images.shape[2:], seed=self.seed, step=step, device=self.device)
        mine = slice(self.ranks.rank * self.local_batch, (self.ranks.rank + 1) * self.local_batch)
        rows = self.order(epoch)[index * size : (index + 1) * size][mine]
        draws = draws[mine]
        if self.recipe.alternate_flip:
            draws = replace(draws, mirrored=self.first_flips[rows] ^ bool(epoch % 2))
        images = augment(self.images, rows, draws, self.recipe, self.mean, self.std)
        images = resize(images, self.recipe.scale_at(step, self.total_steps))
        return images.contiguous(memory_format=self.memory_format), self.labels[rows]

    def normalised(self, images: Tensor, scale: float = 1.0) -> Tensor:
        """Images without augmentation, as the net takes them."""
        images = resize(normalise(images, self.mean, self.std), scale)
        return images.contiguous(memory_format=self.memory_format)

    def train_step(self, step: int) -> None:
        """One update. Where a rank's loss or the gradient is not finite, this and all later steps change no weight."""
        self.reseed(derive_seed("step", self.seed, step, self.ranks.rank))  # dropout, stochastic depth
        self.net.train()
        lr = self.recipe.lr_at(step, self.total_steps)
        self.meter.step.fill_(step)
        if self.graphed is None:
            self.update(*self.batch(step), lr)
        else:
            self.graphed(*self.batch(step), torch.full((), lr, device=self.device))
            self._set_lr(lr)  # the graph reads its own; checkpoints are to hold plain numbers

    def update(self, images: Tensor, labels: Tensor, lr: float | Tensor) -> None:
        """The part of a step that a graph can hold: nothing here asks the device for a value.

        The fused optimizer skips where `found_inf` is 1, so the host need not know what is finite.
        """
        self._set_lr(lr)
        if self.replays:
            torch.compiler.cudagraph_mark_step_begin()
        with self.autocast():
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        loss.backward()
        first_bad = self.ranks.min_(self.meter.note(loss.detach(), self.clip()))
        self.optimizer.found_inf = torch.isfinite(first_bad).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.add(loss.detach(), logits.detach(), labels)

    def clip(self) -> Tensor:
        """Clip the gradient if the recipe says so; returns the norm that it had, a tensor of shape ()."""
        if self.recipe.clip_norm > 0:
            return nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip_norm)
        return nn.utils.get_total_norm([p.grad for p in self.net.parameters() if p.grad is not None])

    def _set_lr(self, lr: float | Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _changing(self) -> list[Tensor]:
        """What a step changes."""
        momenta = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.net.parameters(), *self.net.buffers(), *momenta, self.meter.values]
        return [tensor for tensor in tensors if isinstance(tensor, Tensor)]

    @torch.no_grad()
    def evaluate(self, epoch: int = 0, stop: Callable[[], bool] = lambda: False) -> tuple[float, float] | None:
        """Mean loss and accuracy in percent over the whole evaluation part; None if `stop` became true.

        Each image is seen by exactly one rank, none twice: padding to equal parts would bias the mean.
        """
        self.reseed(derive_seed("evaluate", self.seed, epoch, self.ranks.rank))  # some nets draw there, too
        self.ranks.broadcast_(list(self.net.buffers()))  # batch norm statistics differ by rank
        self.net.eval()
        sums = Meter(self.device)
        rows = torch.arange(len(self.test_images), device=self.device)[self.ranks.rank :: self.ranks.size]
        for part in rows.split(self.local_batch) if len(rows) else ():  # there may be more ranks than images
            if not self.ranks.on and stop():  # with several ranks the flag is agreed on between steps only
                return None
            images = self.normalised(self.test_images[part])
            with self.autocast():
                logits = self._logits(images)
                if self.recipe.tta == "flip":
                    logits = (logits + self._logits(images.flip(3))) / 2
            sums.add(F.cross_entropy(logits, self.test_labels[part]), logits, self.test_labels[part])
        self.ranks.sum_(sums.values[:3])
        total = sums.read()
        return total.loss / total.images, 100 * total.correct / total.images

    def _logits(self, images: Tensor) -> Tensor:
        """In float32, to be kept over the next call."""
        logits = self.forward(images).float()
        return logits.clone() if self.replays else logits

    def gradient_layers(self) -> list[dict[str, Any]]:
        """The gradient of each convolution and linear weight, on fixed training images and in float32.

        Modes, buffers and gradients are left as they were: no copy of the net, which may keep what cannot be copied.
        Empty where only norms and the like are trained. None is what is not finite. For all ranks to call together:
        layers such as SyncBatchNorm exchange statistics.
        """
        from resblocks.diagnostics import gradient_sizes

        self.reseed(derive_seed("gradients", self.seed))
        rows = self.order(0)[: min(GRADIENT_IMAGES, self.recipe.batch_size)]  # shuffled: files come class by class
        images = self.normalised(self.images[rows])
        with restored(self.net):
            logits = self.net.train()(images)
            F.cross_entropy(logits, self.labels[rows], label_smoothing=self.recipe.label_smoothing).backward()
            flow = gradient_sizes(self.net)
        self.optimizer.zero_grad(set_to_none=True)
        return [{"name": row.name, "mean_abs": _finite(row.mean_abs), "norm": _finite(row.norm)} for row in flow]

    def reseed(self, seed: int) -> None:
        """Seed the CPU and our device only: torch.manual_seed visits all back ends, which takes milliseconds."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def finite(self) -> bool:
        """True when no weight or buffer of the net has become infinite or not a number."""
        state = self.net.state_dict()
        return bool(torch.stack([state[name].isfinite().all() for name in self.finite_at_start]).all())

    def sums(self) -> Tensor:
        """Loss, correct answers and images of the epoch so far, over all ranks. Shape: (3,)."""
        return self.ranks.sum_(self.meter.values[:3].clone())

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, as tensors and plain types."""
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "sums": self.sums().cpu()}

    def load(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.graphed is not None:  # a graph would go on with the buffers that the optimizer had before
            self.graphed = GraphedStep(self.update, self._changing)
        if self.ranks.is_first:  # else they would be counted once per rank
            self.meter.values[:3] = state["sums"].to(self.device)


def _finite(number: float) -> float | None:
    """JSON has neither infinity nor NaN."""
    return number if math.isfinite(number) else None
