"""Small trainings of every kind of state, and a checkpoint of plain files to stop them with.

Run as a program it is the new process: ``python training_cases.py FOLDER`` builds each case
anew from other random numbers, restores it from its folder under FOLDER, trains it to the end,
and writes the digests of the final states to ``FOLDER/digests.json``.
"""

from __future__ import annotations

import json
import random
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from blake3 import blake3
from torch import nn
from torch.optim import swa_utils
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from ckpt_tasks.format.safetensors import TensorSpec, build_header, parse_header
from ckpt_tasks.state.capture import capture, restore_values
from ckpt_tasks.state.rng import capture_rng, restore_rng
from ckpt_tasks.state.staging import copy_images
from ckpt_tasks.state.tensors import tensor_from_buffer
from ckpt_tasks.state.tracked import TrackedItems

SAVED_AFTER = 4
STEPS = 9
RNG = "ckpt_tasks.rng"


class Case(NamedTuple):
    """What a training tracks, and one step of it."""

    items: dict[str, Any]
    step: Callable[[int], None]


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Data that depends on all three global generators."""
    noise = torch.from_numpy(np.random.standard_normal((5, 6)).astype("float32"))
    return torch.randn(5, 6) + noise * random.gauss(), torch.randint(0, 3, (5,))


def loss_of(model: nn.Module) -> torch.Tensor:
    inputs, targets = batch()
    return nn.functional.cross_entropy(model(inputs), targets)


def trained(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    make_scheduler: Callable[[Any], Any] | None = None,
) -> Callable[[], Case]:
    """A case with one model, one optimizer, and perhaps a scheduler."""

    def build() -> Case:
        model = build_model()
        optimizer = make_optimizer(model)
        items: dict[str, Any] = {"model": model, "optimizer": optimizer}
        scheduler = make_scheduler(optimizer) if make_scheduler else None
        if scheduler is not None:
            items["lr_scheduler"] = scheduler

        def step(_: int) -> None:
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(loss.item())
            elif scheduler is not None:
                scheduler.step()

        return Case(items, step)

    return build


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adam_with_tensor_lr(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01))


def adamw_with_groups(model: nn.Module) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [
            {"params": weights, "weight_decay": 0.1, "name": "weights"},
            {"params": others, "lr": 0.02, "betas": (0.8, 0.9), "amsgrad": True},
        ],
        lr=0.01,
    )


def lbfgs() -> Case:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, line_search_fn="strong_wolfe")

    def step(_: int) -> None:
        inputs, targets = batch()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        optimizer.step(closure)

    return Case({"model": model, "optimizer": optimizer}, step)


def sparse_adam() -> Case:
    model = nn.Embedding(20, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.05)

    def step(_: int) -> None:
        optimizer.zero_grad()
        model(torch.randint(0, 20, (6,))).pow(2).sum().backward()
        optimizer.step()

    return Case({"model": model, "optimizer": optimizer}, step)


def several_optimizers() -> Case:
    generator, critic = build_model(), build_model()
    first = torch.optim.RMSprop(generator.parameters(), lr=0.01, momentum=0.5, centered=True)
    second = torch.optim.Adagrad(critic.parameters(), lr=0.05, lr_decay=0.01)

    def step(_: int) -> None:
        for model, optimizer in ((generator, first), (critic, second)):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    return Case({"generator": generator, "critic": critic, "first": first, "second": second}, step)


def grad_scaler() -> Case:
    model = build_model()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)

    def step(index: int) -> None:
        optimizer.zero_grad()
        loss = loss_of(model) * (float("inf") if index == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return Case({"model": model, "optimizer": optimizer, "scaler": scaler}, step)


def averaged() -> Case:
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ema = swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    scheduler = swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=5)

    def step(_: int) -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        scheduler.step()
        ema.update_parameters(model)

    items = {"model": model, "optimizer": optimizer, "ema": ema, "lr_scheduler": scheduler}
    return Case(items, step)


class TiedModel(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.output = nn.Linear(6, 12, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(self.embedding(tokens))


def tied_weights() -> Case:
    model = TiedModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)

    def step(_: int) -> None:
        optimizer.zero_grad()
        tokens = torch.randint(0, 12, (7,))
        nn.functional.cross_entropy(model(tokens), tokens.roll(1)).backward()
        optimizer.step()

    return Case({"model": model, "optimizer": optimizer}, step)


def low_precision() -> Case:
    """A bfloat16 model whose optimizer keeps float32 masters and integer counts as state."""
    model = nn.Linear(6, 3).to(torch.bfloat16)
    optimizer = MasterSGD(model.parameters(), lr=0.05)

    def step(_: int) -> None:
        optimizer.zero_grad()
        model(torch.randn(5, 6, dtype=torch.bfloat16)).pow(2).mean().backward()
        optimizer.step()

    return Case({"model": model, "optimizer": optimizer}, step)


class MasterSGD(torch.optim.Optimizer):
    """SGD on float32 copies, with state of every kind that load_state_dict would change."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["master"] = parameter.float()
                    state["count"] = torch.zeros((), dtype=torch.int64)
                    state["mode"] = "warm"
                    state["history"] = [parameter.double().sum()]
                state["count"] += 1
                state["mode"] += str(int(state["count"]) % 10)
                state["history"].append(state["master"].double().sum())
                state["master"] -= group["lr"] * parameter.grad.float() * len(state["mode"])
                parameter.copy_(state["master"])


def loop_state() -> Case:
    """Variables of the loop, among them a live view of the weights and a frozen copy."""
    model = build_model()
    optimizer = sgd(model)
    state: dict[str, Any] = {"best": float("inf"), "seen": {}, "live": model.state_dict()}

    def step(index: int) -> None:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        state["seen"][index, "loss"] = loss.item()
        state["mean"] = state.get("mean", torch.zeros(())) * 0.5 + loss.detach()
        if loss.item() < state["best"]:
            state["best"] = loss.item()
            state["weights"] = {key: value.clone() for key, value in model.state_dict().items()}

    return Case({"state": state, "model": model, "optimizer": optimizer}, step)


CASES: dict[str, Callable[[], Case]] = {
    "sgd_momentum": trained(sgd),
    "adam_tensor_lr": trained(adam_with_tensor_lr, lambda o: CosineAnnealingLR(o, 20)),
    "adamw_groups": trained(adamw_with_groups, lambda o: LambdaLR(o, lambda n: 0.9**n)),
    "adagrad": trained(lambda m: torch.optim.Adagrad(m.parameters(), lr=0.05)),
    "rmsprop": trained(lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.3)),
    "adam_fused": trained(lambda m: torch.optim.Adam(m.parameters(), lr=0.01, fused=True)),
    "lbfgs": lbfgs,
    "sparse_adam": sparse_adam,
    "several_optimizers": several_optimizers,
    "one_cycle": trained(sgd, lambda o: OneCycleLR(o, max_lr=0.2, total_steps=20)),
    "cyclic": trained(sgd, lambda o: CyclicLR(o, 0.01, 0.1, step_size_up=3)),
    "multi_step": trained(sgd, lambda o: MultiStepLR(o, [2, 6, 6])),
    "sequential": trained(
        sgd,
        lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=3), CosineAnnealingLR(o, 6)], [3]),
    ),
    "plateau": trained(adam_with_tensor_lr, lambda o: ReduceLROnPlateau(o, patience=0, factor=0.5)),
    "grad_scaler": grad_scaler,
    "averaged": averaged,
    "tied_weights": tied_weights,
    "low_precision": low_precision,
    "loop_state": loop_state,
}

SAVED_BEFORE_THE_FIRST_STEP = ("sgd_momentum", "adamw_groups", "lbfgs", "several_optimizers")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def save(folder: Path, items: Mapping[str, Any]) -> None:
    """Write tracked items as safetensors files and one JSON index."""
    folder.mkdir(parents=True)
    captured = capture({**items, RNG: capture_rng()})
    for item in captured.trees:
        images = [image for image in captured.tensors if image.item == item]
        specs = [TensorSpec(image.key, image.dtype, image.shape) for image in images]
        with (folder / f"{item}.safetensors").open("wb") as file:
            file.write(build_header(specs, {}))
            for image in images:
                data = bytearray(image.nbytes)
                copy_images([image], memoryview(data), [0])
                file.write(data)
    places = [[image.item, image.key] for image in captured.tensors]
    index = msgspec.json.encode({"trees": captured.trees, "tensors": places})
    (folder / "index.json").write_bytes(index)


def load(folder: Path) -> dict[str, Any]:
    """The values that `save` wrote."""
    index = msgspec.json.decode((folder / "index.json").read_bytes())
    files = {
        item: bytearray((folder / f"{item}.safetensors").read_bytes()) for item in index["trees"]
    }
    ends = {item: 8 + int.from_bytes(data[:8], "little") for item, data in files.items()}
    headers = {item: parse_header(bytes(data[: ends[item]])) for item, data in files.items()}

    def tensor_at(number: int) -> torch.Tensor:
        item, key = index["tensors"][number]
        spec, offset = headers[item][key]
        start = ends[item] + offset
        return tensor_from_buffer(
            memoryview(files[item])[start : start + spec.size], spec.dtype, spec.shape
        )

    return restore_values(index["trees"], tensor_at)


def digest(items: Mapping[str, Any]) -> str:
    """Over every bit of state, independent of the code under test."""
    parts: list[object] = []
    for name, item in items.items():
        parts.append([name, image(item.state_dict() if hasattr(item, "state_dict") else item)])
    parts.append(
        [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    )
    return blake3(repr(parts).encode()).hexdigest()


def image(value: Any) -> object:
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return [kind, str(value.dtype), list(value.shape), list(value.stride()), data]
    if isinstance(value, float):
        return [kind, struct.pack(">d", value)]
    if isinstance(value, dict):
        return [kind, [[image(key), image(item)] for key, item in value.items()]]
    if isinstance(value, (list, tuple)):
        return [kind, [image(item) for item in value]]
    return [kind, repr(value)]


def start_and_save(name: str, folder: Path, saved_after: int) -> str:
    """Train to the end, saving on the way; the digest of the final state."""
    seed_everything(1)
    case = CASES[name]()
    for index in range(STEPS):
        if index == saved_after:
            save(folder, case.items)
        case.step(index)
    return digest(case.items)


def resume(name: str, folder: Path, saved_after: int) -> str:
    """Build anew, restore, train to the end; the digest of the final state."""
    seed_everything(2)
    case = CASES[name]()
    tracked = TrackedItems()
    for key, item in case.items.items():
        tracked.add(key, item)
    values = load(folder)
    tracked.restore(values)
    restore_rng(values[RNG])
    for index in range(saved_after, STEPS):
        case.step(index)
    return digest(case.items)


def scenarios() -> list[tuple[str, int]]:
    """Case and the number of steps after which it is saved."""
    early = [(name, 0) for name in SAVED_BEFORE_THE_FIRST_STEP]
    return [(name, SAVED_AFTER) for name in CASES] + early


def main(folder: Path) -> None:
    """Resume every scenario and write the digests."""
    torch.set_num_threads(1)
    digests = {
        f"{name}-{after}": resume(name, folder / f"{name}-{after}", after)
        for name, after in scenarios()
    }
    (folder / "digests.json").write_text(json.dumps(digests))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
