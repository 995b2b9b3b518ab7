"""What an assignment costs beside the forward pass: 16 pictures x 20 objects x 8400 slots x 80 classes.

python -m benchmarks.assign_cost
python -m benchmarks.assign_cost --quick            # does it run?

8400 slots are the cells of a 640 x 640 picture at strides 8, 16 and 32, one anchor each. The aim is under a tenth of
the forward pass of a step. That pass is yolox-s in training mode on one picture, times 16: sixteen at once do not fit
every machine, and its time is proportional to the pictures. float32, median of several repetitions.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.journal import record, table
from models.anchors import grid_priors
from models.assigners import build_targets
from models.cfg import parse_cfg, read_cfg
from models.compare_assigners import build_criteria
from models.darknet import Darknet
from models.structures import Predictions, Priors
from utils.boxes import xywh_to_xyxy
from utils.errors import run_main
from utils.run import select_device, set_seed
from utils.structures import Targets

ROOT = Path(__file__).resolve().parents[1]
FORWARD = "yolox-s"
SIZE, STRIDES, CLASSES = 640, (8, 16, 32), 80
ANCHORS = ((32, 32), (96, 96), (240, 240))  # one per stride
GOAL = 0.1
# what the assigners with anchors ask of a head: three [yolo] sections, whose network is never run
HEADS = "\n".join(
    f"[convolutional]\nfilters={5 + CLASSES}\nsize=1\nstride={stride // before}\nactivation=linear\n"
    f"[yolo]\nmask={level}\nanchors={', '.join(f'{w},{h}' for w, h in ANCHORS)}\nclasses={CLASSES}\nnum=3\n"
    for level, (before, stride) in enumerate(zip((1, *STRIDES), STRIDES))
)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.assign_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--objects", type=int, default=20, help="per picture")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="", help="cpu, 0, ... (default: the first GPU, else the CPU)")
    parser.add_argument("--quick", action="store_true", help="2 pictures, once")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/README.md")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if args.quick:
        args.images, args.repeats = 2, 1
    device = select_device(args.device)
    set_seed(0)
    preds, targets = scene(args.images, args.objects, device)
    forward = args.images * milliseconds(forward_pass(device), min(args.repeats, 3), device)
    rows = []
    for name, criterion in criteria().items():
        assigner = criterion.assigner
        time_ms = milliseconds(lambda assigner=assigner: build_targets(preds, targets, assigner), args.repeats, device)
        positives = int((build_targets(preds, targets, assigner).weight > 0).sum()) / len(targets)
        within = "yes" if time_ms < GOAL * forward else "no"
        rows.append((name, f"{positives:.1f}", f"{time_ms:.1f}", f"{time_ms / forward:.2%}", within))
    text = table(("assigner", "positives/object", "ms", "of forward", f"under {GOAL:.0%}"), rows)
    title = f"Cost of assignment, {args.images} pictures x {args.objects} objects x {len(preds.priors)} slots"
    note = f"forward pass: {FORWARD} at {SIZE}, {args.images} times {forward / args.images:.0f} ms"
    print(f"{title}\n{note}\n{text}")
    if args.record:
        record(title, "python -m benchmarks.assign_cost", f"{note}\n{text}", device)


def scene(num_images: int, num_objects: int, device: torch.device) -> tuple[Predictions, Targets]:
    """Objects of 16 to 400 pixels, and predictions as of a network on its way: boxes near their cells."""
    priors = Priors.cat(
        [
            grid_priors((anchor,), 0.5, (SIZE // stride, SIZE // stride), (SIZE, SIZE), device, torch.float32)
            for stride, anchor in zip(STRIDES, ANCHORS)
        ]
    )
    shape = (num_images, len(priors))
    center = priors.center + torch.randn(*shape, 2, device=device) * priors.stride
    size = priors.size * torch.exp(0.5 * torch.randn(*shape, 2, device=device))
    preds = Predictions(
        boxes=xywh_to_xyxy(torch.cat([center, size], dim=-1)),
        deltas=torch.randn(*shape, 4, device=device),
        obj=torch.randn(*shape, device=device) - 3,
        cls=torch.randn(*shape, CLASSES, device=device) - 3,
        priors=priors,
    )
    image = torch.arange(num_images).repeat_interleave(num_objects)
    size = 16 * 25 ** torch.rand(len(image), 2)
    center = size / 2 + torch.rand(len(image), 2) * (SIZE - size)
    labels = torch.randint(CLASSES, (len(image),))
    targets = Targets.of(image, labels, xywh_to_xyxy(torch.cat([center, size], dim=1)))
    return preds, targets.to(device)


def criteria():
    """Every assigner with its recipe's keys, for three heads with an anchor each."""
    cfg = parse_cfg(f"[net]\nwidth={SIZE}\nheight={SIZE}\nchannels=3\n{HEADS}", "three heads")
    return build_criteria(Darknet(cfg))[0]


def forward_pass(device: torch.device):
    """The forward pass of a training step on one picture."""
    model = Darknet(read_cfg(ROOT / f"cfg/{FORWARD}.cfg")).train().to(device, memory_format=torch.channels_last)
    image = torch.rand(1, 3, SIZE, SIZE, device=device).contiguous(memory_format=torch.channels_last)
    return lambda: model(image)


def milliseconds(work, repeats: int, device: torch.device) -> float:
    """Median time of ``work()``, after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = _now(device)
        work()
        times.append(_now(device) - start)
    return 1000 * statistics.median(times[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    arguments = parse_args()
    run_main(lambda: main(arguments))
