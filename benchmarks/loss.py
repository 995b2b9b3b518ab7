"""Loss, with the gradient of the raw maps: all slots of a network, 80 classes, 16 pictures x 20 objects.

python -m benchmarks.loss
python -m benchmarks.loss --quick            # does it run?

yolov3's three heads at 640: 25,200 slots, maps in float32 and channels-last, the YOLOv3 recipe. One thread, CPU time,
every contender in a process of its own.

The archive (ultralytics/yolov3) is no package. Its loss took 110 ms where writing the gradient of 137 MB once took
7 ms; ``x archive`` is derived by that factor from the pass over memory of the same run (``one pass``). ``plain`` is a
loss in its manner, written here on leaves in its layout: index the rows of each map, BCE over every slot's objectness,
and let autograd make a map of gradients for each slice. ``dense`` is our loss over predictions decoded for all slots,
as it was before it read only what it needs. ``ours`` runs with freed memory kept, as train.py does on a CPU.
"""

import argparse
from pathlib import Path
from statistics import median

from benchmarks.contender import Contender
from benchmarks.journal import record_row
from benchmarks.paired import span, take_turns, verdict
from utils.errors import run_main

ROOT = Path(__file__).resolve().parents[1]
SIZE, IMAGES, OBJECTS, CLASSES = 640, 16, 20, 80
GOAL, PASSES = 2.0, 110 / 7  # times the archive; what the archive takes, in passes over its gradient


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="2 pictures, one round, nothing recorded")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)
    images, rounds = (2, 1) if args.quick else (IMAGES, args.rounds)
    contenders = {
        "ours": Contender(ours, images, True),
        "ours, memory not kept": Contender(ours, images, False),
        "dense": Contender(dense, images),
        "plain": Contender(plain, images),
        "one pass": Contender(one_pass, images),
    }
    clock = lambda: sum(contender.seconds for contender in contenders.values())  # noqa: E731
    result = take_turns(contenders, rounds=rounds, warmup=3, clock=clock)
    print(f"Loss and its gradient, {images} pictures x {OBJECTS} objects x 25200 slots x {CLASSES} classes")
    print(result.table("plain"))
    for contender in contenders.values():
        contender.stop()
    if not args.quick:
        cpu = torch.device("cpu")
        for name in ("ours", "ours, memory not kept"):
            derived = [PASSES * ratio for ratio in result.ratio(name, "one pass")]
            record_row("loss", f"{name} / archive (derived)", derived, GOAL, cpu)
            mark = "met" if median(derived) >= GOAL else "NOT met"
            print(f"loss: {name} is {span(derived)} x archive (derived), goal {GOAL:g}: {mark}")
        print(verdict("loss", "ours", "plain", result, GOAL, cpu))


def scene(images: int):
    """Leaves as a network's maps, and targets."""
    import torch

    from models.cfg import read_cfg
    from models.darknet import Darknet
    from utils.boxes import xywh_to_xyxy
    from utils.structures import Targets

    torch.manual_seed(0)
    model = Darknet(read_cfg(ROOT / "cfg/yolov3.cfg"))
    maps = [torch.randn(images, 3 * (5 + CLASSES), SIZE // s, SIZE // s) for s in (32, 16, 8)]
    maps = [raw.contiguous(memory_format=torch.channels_last).requires_grad_() for raw in maps]
    size = 16 * 25 ** torch.rand(images * OBJECTS, 2)
    boxes = xywh_to_xyxy(torch.cat([size / 2 + torch.rand(len(size), 2) * (SIZE - size), size], dim=1))
    image = torch.arange(images).repeat_interleave(OBJECTS)
    return model, maps, Targets.of(image, torch.randint(CLASSES, (len(size),)), boxes)


def yolo_criterion(model):
    from models.losses import build_criterion

    return build_criterion({"name": "wh_iou"}, {"name": "yolo"}, CLASSES, heads=model.heads)


def backward(maps, loss) -> None:
    for raw in maps:
        raw.grad = None
    loss.backward()


def ours(images: int, keep_memory: bool):
    from models.losses import compute_loss
    from utils.allocator import keep_freed_memory

    if keep_memory:
        keep_freed_memory()
    model, maps, targets = scene(images)
    criterion = yolo_criterion(model)
    return lambda: backward(maps, sum(compute_loss(maps, targets, model, criterion, (SIZE, SIZE)).values()))


def dense(images: int):
    model, maps, targets = scene(images)
    criterion = yolo_criterion(model)
    return lambda: backward(maps, sum(criterion(model.decode(maps, (SIZE, SIZE)), targets).values()))


def plain(images: int):
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits as bce

    from models.assigners import build_targets
    from utils.boxes import paired_giou

    model, maps, targets = scene(images)
    values = [head.values(raw).detach().contiguous().requires_grad_() for head, raw in zip(model.heads, maps)]
    assigner = yolo_criterion(model).assigner
    rows = build_targets(model.decode([raw.detach() for raw in maps], (SIZE, SIZE)), targets, assigner).compact()

    def run() -> None:
        loss = 0
        start = 0
        for head, said_by_all in zip(model.heads, values):
            priors = head.priors(said_by_all.shape[2:4], (SIZE, SIZE))
            grid = priors.grids[0]
            here = (rows.prior >= start) & (rows.prior < start + grid.count)
            image, slot, target = rows.image[here], rows.prior[here] - start, rows.target[here]
            cell = slot % (grid.rows * grid.columns)
            place = image, slot // (grid.rows * grid.columns), cell // grid.columns, cell % grid.columns
            said = said_by_all[place]
            near = (priors.center[slot], priors.size[slot], priors.stride[slot])
            iou = paired_giou(head.coder.decode(said[:, :4], *near), targets.boxes[target])
            objectness = said_by_all[..., 4]
            wanted = torch.zeros_like(objectness).index_put(place, iou.detach().clamp(min=0))
            named = torch.zeros_like(said[:, 5:]).scatter(1, targets.labels[target][:, None], 1)
            loss = loss + (1 - iou).mean() + bce(objectness, wanted) + bce(said[:, 5:], named)
            start += grid.count
        backward(values, loss)

    return run


def one_pass(images: int):
    """Write as much memory as the gradient has."""
    import torch

    gradients = [torch.zeros_like(raw) for raw in scene(images)[1]]
    return lambda: [gradient.fill_(1) for gradient in gradients]


if __name__ == "__main__":
    arguments = parse_args()
    run_main(lambda: main(arguments))
