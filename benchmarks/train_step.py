"""One training step, whole: network, loss, optimiser, average; against the network alone, and against ultralytics.

python -m benchmarks.train_step                                  # yolov3-tiny, 8 pictures of 416
python -m benchmarks.train_step --cfg yolov3 --batch-size 2
python -m benchmarks.train_step --quick                          # does it run?

One thread, CPU time, every contender in a process of its own, asked in turn. ``ours`` is what train.py runs (Trainer:
wh_iou, YOLO loss, Nesterov SGD, clipping, average, guard), in the precision and layout that train.py picks. ``bare``
is benchmarks/bare.py; ``bare, memory kept`` the same with the allocator told as train.py tells it. ultralytics
(pip install ultralytics) trains its yaml of the same name, whose heads are larger, with its own loss, SGD and average.

The archive (ultralytics/yolov3) is no package. Measured beside bare networks once, on 2 cores of an AMD EPYC with
bf16: bare float32 contiguous is 1.05 (yolov3: 1.02) times as fast as its step, and its step needs 1293 MB above the
start where that bare network needs 1026 (yolov3: 2500 and not measured). ``x archive`` and its memory are derived by
these factors from the bare network of the same run.
"""

import argparse
from pathlib import Path
from statistics import median

from benchmarks.contender import Contender
from benchmarks.journal import record_row, table
from benchmarks.paired import span, take_turns, verdict
from utils.errors import run_main

ROOT = Path(__file__).resolve().parents[1]
SIZE, OBJECTS = 416, 15  # pixels; objects per picture
GOALS = {  # of the issue: times the archive, times ultralytics; bare float32 contiguous / archive
    "yolov3-tiny": {"archive": 2.4, "ultralytics": 2.9, "factor": 1.05},
    "yolov3": {"archive": 2.1, "ultralytics": 3.0, "factor": 1.02},
}
OF_BARE, MEMORY, ARCHIVE_MEMORY = 0.95, 0.8, 1293 / 1026


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.train_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg", choices=GOALS, default="yolov3-tiny")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round with one picture, nothing recorded")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    import torch

    if args.quick:
        args.batch_size, args.rounds = 1, 1
    cpu = torch.device("cpu")
    torch.set_num_threads(1)
    contenders = {
        "ours": Contender(ours, args.cfg, args.batch_size, "auto", True),
        "ours float32": Contender(ours, args.cfg, args.batch_size, "float32", True),
        "bare, memory kept": Contender(bare, args.cfg, args.batch_size, "auto", True, True),
        "bare": Contender(bare, args.cfg, args.batch_size, "auto", True, False),
        "bare float32": Contender(bare, args.cfg, args.batch_size, "float32", True, False),
        "bare float32 contiguous": Contender(bare, args.cfg, args.batch_size, "float32", False, False),
    }
    if _has_ultralytics():
        contenders["ultralytics"] = Contender(ultralytics, args.cfg, args.batch_size)
    rounds = take_turns(
        contenders,
        rounds=args.rounds,
        warmup=1 if args.quick else 2,
        units=args.batch_size,
        clock=lambda: sum(contender.seconds for contender in contenders.values()),
    )
    print(f"{args.cfg}, {args.batch_size} pictures of {SIZE}, CPU time per picture")
    print(rounds.table("bare float32 contiguous"))
    print(table(("contender", "MB above start"), [(name, f"{each.peak:.0f}") for name, each in contenders.items()]))
    for contender in contenders.values():
        contender.stop()
    if args.quick:
        return
    goals, name = GOALS[args.cfg], f"train_step {args.cfg}"
    print(verdict(name, "ours", "bare", rounds, OF_BARE, cpu))
    print(verdict(name, "ours", "bare, memory kept", rounds, OF_BARE, cpu))
    print(verdict(name, "ours float32", "bare float32", rounds, OF_BARE, cpu))
    base = rounds.ratio("ours", "bare float32 contiguous")
    derived = [ratio * goals["factor"] for ratio in base]
    record_row(name, "ours / archive (derived)", derived, goals["archive"], cpu)
    print(f"{name}: ours is {span(derived)} x archive (derived), goal {goals['archive']}: {_mark(derived, goals)}")
    if "ultralytics" in contenders:
        print(verdict(name, "ours", "ultralytics", rounds, goals["ultralytics"], cpu))
    else:
        print("ultralytics: not installed (pip install ultralytics)")
    if args.cfg == "yolov3-tiny":
        share = contenders["ours"].peak / (contenders["bare float32 contiguous"].peak * ARCHIVE_MEMORY)
        record_row(f"{name} memory", "archive (derived) / ours", [1 / share], 1 / MEMORY, cpu)
        mark = "met" if share <= MEMORY else "NOT met"
        print(f"{name}: memory of ours is {share:.2f} x archive (derived), goal at most {MEMORY}: {mark}")


def _mark(ratios: list[float], goals: dict) -> str:
    return "met" if median(ratios) >= goals["archive"] else "NOT met"


def _has_ultralytics() -> bool:
    from importlib.util import find_spec

    return find_spec("ultralytics") is not None


# ------------------------------------------------------------------------------------------------------ the contenders


def bare(cfg: str, batch_size: int, precision: str, channels_last: bool, keep_memory: bool):
    import torch

    from benchmarks.bare import BareNetwork, bare_step
    from models.cfg import read_cfg
    from utils.allocator import keep_freed_memory
    from utils.run import select_precision

    if keep_memory:
        keep_freed_memory()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = BareNetwork(read_cfg(ROOT / f"cfg/{cfg}.cfg")).train().to(memory_format=layout)
    images = torch.rand(batch_size, 3, SIZE, SIZE).contiguous(memory_format=layout)
    return bare_step(model, images, select_precision(precision, torch.device("cpu")).autocast)


def ours(cfg: str, batch_size: int, precision: str, channels_last: bool):
    from itertools import repeat

    import torch

    from models.cfg import read_cfg
    from models.darknet import Darknet
    from models.losses import TrainStep, build_criterion
    from utils.allocator import keep_freed_memory
    from utils.config import read_recipe
    from utils.run import select_precision
    from utils.structures import Batch
    from utils.trainer import Trainer

    keep_freed_memory()
    cpu, recipe = torch.device("cpu"), read_recipe(ROOT / "cfg/hyp/yolov3.yaml", [f"nominal_batch={batch_size}"])
    model = Darknet(read_cfg(ROOT / f"cfg/{cfg}.cfg"))
    criterion = build_criterion(recipe.assigner, recipe.loss, model.num_classes, heads=model.heads)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    step = TrainStep(model, criterion).to(memory_format=layout)
    precision = select_precision(precision, cpu)
    trainer = Trainer(
        step, optim=recipe.optim, device=cpu, precision=precision, num_batches=1, batch_size=batch_size, epochs=10**6
    )
    images = torch.randint(0, 256, (batch_size, 3, SIZE, SIZE), dtype=torch.uint8).contiguous(memory_format=layout)
    batch = Batch(images=images, targets=targets(batch_size), infos=())

    def run() -> None:
        trainer.train_epoch(repeat(batch))
        trainer.end_epoch()

    return run


def targets(batch_size: int):
    import torch

    from utils.boxes import xywh_to_xyxy
    from utils.structures import Targets

    torch.manual_seed(0)
    size = 20 + torch.rand(batch_size * OBJECTS, 2) * 200
    boxes = xywh_to_xyxy(torch.cat([size / 2 + torch.rand(len(size), 2) * (SIZE - size), size], dim=1))
    image = torch.arange(batch_size).repeat_interleave(OBJECTS)
    return Targets.of(image, torch.randint(80, (len(size),)), boxes)


def ultralytics(cfg: str, batch_size: int):
    """Its network, loss, parameter groups, clipping, SGD and average, as its trainer puts them together on a CPU."""
    import torch
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils.torch_utils import ModelEMA

    from utils.boxes import xyxy_to_xywh

    model = DetectionModel(f"{cfg}.yaml", nc=80, verbose=False).train()
    model.args = get_cfg()
    decayed = [weight for weight in model.parameters() if weight.requires_grad and weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.requires_grad and weight.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=1e-4, momentum=0.937, nesterov=True)
    average = ModelEMA(model)
    objects = targets(batch_size)
    images = torch.randint(0, 256, (batch_size, 3, SIZE, SIZE), dtype=torch.uint8)
    labels = {"cls": objects.labels[:, None].float(), "bboxes": xyxy_to_xywh(objects.boxes) / SIZE}

    def run() -> None:
        batch = {"img": images.float() / 255, "batch_idx": objects.image.float(), **labels}
        loss, _ = model(batch)
        loss.sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=10.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)

    return run


if __name__ == "__main__":
    arguments = parse_args()
    run_main(lambda: main(arguments))
