"""`make quality`: does a classifier of real clothes see in the embedded model's images what was asked for?

A small convolutional network is trained on the training split of Fashion-MNIST and measured on its test split; then it
labels images of the model, the same number for each class. The classifier never sees the model.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastdiff
from benchmarks import record
from fastdiff.errors import InputError
from fastdiff.files import write_atomic
from fastdiff.models.loading import Model
from fastdiff.training.data import ImageSet, load_images

DATA = record.ROOT.parent / "shared" / "data" / "fashion-mnist"
CLASSIFIER = record.ROOT / "build" / "fashion-classifier.safetensors"
RESULTS = record.RESULTS / "quality.csv"
EPOCHS, BATCH, PEAK_RATE = 6, 128, 4e-3


class Classifier(nn.Module):
    """Grey images (N, 1, 28, 28) in [-1, 1] -> scores (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 96, 128)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = F.relu(norm(convolution(x)))
            if index in (0, 2):
                x = F.max_pool2d(x, 2)
        return self.head(F.dropout(x.mean(dim=(2, 3)), 0.2, self.training))


def inputs(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def mirrored(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Every other image mirrored, at random: clothes stay what they are."""
    chosen = torch.from_numpy(rng.random(len(images)) < 0.5)
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def train_classifier(data: ImageSet, *, seed: int = 0) -> Classifier:
    """AdamW with one cycle of the learning rate; equal seeds give equal weights on one machine."""
    torch.manual_seed(seed)
    network = Classifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE, weight_decay=0.01)
    batches = len(data) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=EPOCHS * batches)
    assert data.labels is not None
    for epoch in range(EPOCHS):
        rng = np.random.default_rng([seed, epoch])
        order = torch.from_numpy(rng.permutation(len(data)))
        for part in tqdm(order[: batches * BATCH].split(BATCH), desc=f"classifier, epoch {epoch + 1} of {EPOCHS}"):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                scores = network(mirrored(inputs(data.images[part]), rng))
            loss = F.cross_entropy(scores.float(), data.labels[part], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def predictions(network: Classifier, images: Tensor) -> Tensor:
    """The class of each image (N, 1, 28, 28) in [-1, 1]: int64 (N,)."""
    return torch.cat([network(part).argmax(dim=1) for part in images.split(500)])


def classifier(path: Path, data: Path) -> Classifier:
    """The classifier stored at `path`, or a new one, which is stored there."""
    if path.exists():
        network = Classifier()
        network.load_state_dict(load_file(path))
        return network.eval()
    network = train_classifier(load_images(data))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(network.state_dict()))
    return network


def recognised(network: Classifier, model: Model, count: int, **options: object) -> tuple[list[float], float]:
    """(share of each class's `count` images that the classifier puts into that class, seconds of sampling)."""
    classes = model.num_classes or 0
    labels = [label for label in range(classes) for _ in range(count)]
    start = time.perf_counter()
    images = fastdiff.sample(model, seeds=range(len(labels)), labels=labels, **options)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    # What a viewer sees has 256 shades.
    seen = predictions(network, ((images + 1) * 127.5).round() / 127.5 - 1)
    hits = (seen == torch.tensor(labels)).float().reshape(classes, count)
    return hits.mean(dim=1).tolist(), seconds


def checksum(model: Model) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.network.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (__doc__ or "").split("\n\n")[0]
    parser.add_argument("--model", default="fashion", help="model to judge (default: the embedded one)")
    parser.add_argument("--data", type=Path, default=DATA, help=f"Fashion-MNIST as IDX files (default {DATA})")
    parser.add_argument("--classifier", type=Path, default=CLASSIFIER, help="where the classifier is kept")
    parser.add_argument("--method", default="dpmpp_2m", help="sampling method (default dpmpp_2m)")
    parser.add_argument("--steps", type=int, default=20, help="steps (default 20)")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance (default 2.0)")
    parser.add_argument("--count", type=int, default=100, help="images of each class (default 100)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV that gets one more row")


def append(path: Path, row: dict[str, str]) -> None:
    """Add a row to the CSV; columns that earlier rows lack stay empty there."""
    rows = record.read(path) if path.exists() else []
    columns = list(dict.fromkeys([name for old in rows for name in old] + list(row)))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows([*rows, row])
    write_atomic(path, text.getvalue().encode())


def main(arguments: argparse.Namespace) -> int:
    if arguments.count < 1 or arguments.threads < 1:
        raise InputError("count and threads: expected at least 1")
    torch.set_num_threads(arguments.threads)
    model = fastdiff.load_model(arguments.model)
    test = load_images(arguments.data, split="t10k")
    assert test.labels is not None
    network = classifier(arguments.classifier, arguments.data)
    ceiling = (predictions(network, inputs(test.images)) == test.labels).float().mean().item()
    options = {"method": arguments.method, "steps": arguments.steps, "guidance": arguments.guidance}
    shares, seconds = recognised(network, model, arguments.count, **options)
    accuracy = sum(shares) / len(shares)
    names = model.class_names or tuple(map(str, range(len(shares))))
    for name, share in zip(names, shares, strict=True):
        print(f"{name:<12} {share:6.1%}")
    print(f"{'all classes':<12} {accuracy:6.1%}   (on real test images the classifier reaches {ceiling:.1%})")
    facts = {"model": arguments.model, "checksum": checksum(model)} | {k: str(v) for k, v in options.items()}
    figures = {"accuracy": accuracy, "classifier_accuracy": ceiling} | {
        f"accuracy_{name}": share for name, share in zip(names, shares, strict=True)
    }
    row = facts | {"images": str(len(shares) * arguments.count)} | {k: f"{v:.4f}" for k, v in figures.items()}
    append(arguments.out, row | {"seconds": f"{seconds:.1f}"} | record.environment(torch.device("cpu")))
    return 0


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="python -m benchmarks.quality")
    add_arguments(_parser)
    try:
        sys.exit(main(_parser.parse_args()))
    except InputError as _error:
        _parser.exit(2, f"quality: {_error}\n")
