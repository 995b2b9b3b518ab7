"""The flags of train.py. No heavy import: --help is quick."""

import argparse
from pathlib import Path

from utils.arguments import add_bad_data, count, minutes, whole

ROOT = Path(__file__).resolve().parents[1]
AUTO = "auto"

MOVED = {  # flags of other trainers that say how a network is taught
    "--adam": "--set optimizer=adam",
    "--optimizer": "--set optimizer=adamw",
    "--cos-lr": "--set schedule=cosine",
    "--multi-scale": "--set multi_scale=0.67,1.5",
    "--label-smoothing": "--set label_smoothing=0.1",
    "--accumulate": "--set nominal_batch=64",
}


def count_or_auto(text: str) -> int | str:
    """A whole number from 1, or ``auto``."""
    return AUTO if text == AUTO else count(text)


def parse_args(argv: list[str], defaults: dict | None = None, *, description: str = "") -> argparse.Namespace:
    """The command line; ``defaults`` are what a resumed run was started with."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to train, on what")
    what.add_argument("--cfg", default=str(ROOT / "cfg/matchbox.cfg"), help="network; yolov3.cfg is found in cfg/ too")
    what.add_argument(
        "--data", default=str(ROOT / "data/shapes.yaml"), help="data.yaml, Darknet .data, COCO .json or a folder"
    )
    what.add_argument("--weights", default="", help="start from .weights, *.conv.NN, .safetensors or .pt")
    what.add_argument("--hyp", default="matchbox", metavar="RECIPE", help="a file, or the name of one in cfg/hyp")
    what.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one value of the recipe")
    what.add_argument("--single-cls", action="store_true", help="treat all classes as one")

    how = parser.add_argument_group("how long, how large")
    how.add_argument("--epochs", type=count, default=50, help="times through the training pictures (default: 50)")
    how.add_argument(
        "--batch-size",
        type=count_or_auto,
        default=16,
        metavar="N",
        help="images of a batch, over all processes; auto: those of a whole step, or as many as memory holds",
    )
    how.add_argument(
        "--img-size",
        "--imgsz",
        "--img",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="side, or height width; default: the cfg's",
    )
    how.add_argument("--rect", action="store_true", help="rectangular batches: pictures of like shape together")
    how.add_argument("--image-weights", action="store_true", help="show pictures with rare classes more often")
    how.add_argument(
        "--freeze",
        type=whole,
        nargs="+",
        default=[],
        metavar="N",
        help="one N: the first N layers; several: these layers",
    )
    how.add_argument(
        "--patience", type=whole, default=100, help="stop after so many epochs without a better one; 0: never"
    )
    how.add_argument("--seed", type=whole, default=0)

    instead = parser.add_argument_group("before a training, instead of it")
    instead.add_argument(
        "--dry-run",
        action="store_true",
        help="20 steps, then what it will take: time, memory, disk; refuses what does not fit, writes nothing",
    )
    instead.add_argument(
        "--selftest",
        action="store_true",
        help="why is my mAP zero? about two minutes, a page in the run's folder, a verdict in words",
    )

    machine = parser.add_argument_group("on what machine")
    machine.add_argument("--device", default="", help="cpu, or the number of a GPU; default: a GPU if there is one")
    machine.add_argument(
        "--workers", type=whole, default=None, help="processes that load pictures; default: by the cores there are"
    )
    machine.add_argument(
        "--cache", "--cache-images", nargs="?", const="ram", choices=("ram", "disk"), help="keep decoded pictures"
    )
    machine.add_argument(
        "--precision",
        choices=("auto", "float32", "bf16", "fp16"),
        default="auto",
        help="auto: bf16 where the processor has it",
    )
    machine.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, default=True, help="memory layout of convolutions"
    )
    machine.add_argument("--sync-bn", action="store_true", help="batch norm over all GPUs")
    machine.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=("default", "reduce-overhead", "max-autotune"),
        help="torch.compile the network, each size of batch once; reduce-overhead: with CUDA graphs",
    )

    add_bad_data(parser, ", and no picture may be in two splits")

    output = parser.add_argument_group("what to write, and where")
    output.add_argument("--project", default="runs/train", help="folder of all runs")
    output.add_argument("--name", default="exp", help="this run's folder in it; numbered if taken")
    output.add_argument("--exist-ok", action="store_true", help="write into project/name even if it is there")
    output.add_argument("--nosave", action="store_true", help="checkpoints after the last epoch only")
    output.add_argument("--noval", "--notest", action="store_true", help="evaluate after the last epoch only")
    output.add_argument(
        "--save-period", type=whole, default=0, metavar="N", help="keep a checkpoint of every N-th epoch"
    )
    output.add_argument(
        "--save-interval",
        type=minutes,
        default=5.0,
        metavar="MINUTES",
        help="save within an epoch, too, so often (default: 5; 0: after every step)",
    )
    output.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="continue a run folder or checkpoint; default: the newest; auto: the newest of this --name, if any",
    )
    output.add_argument("--allow-data-change", action="store_true", help="continue although the data set has changed")
    output.add_argument(
        "--show-assignments",
        action="store_true",
        help="after each evaluation, pictures of who answers for whom, by every assigner, to the run and TensorBoard",
    )
    output.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(**(defaults or {}))
    args, unknown = parser.parse_known_args(argv)
    for flag in unknown:
        cure = MOVED.get(flag.partition("=")[0])
        parser.error(f"{flag} belongs to the recipe: {cure}" if cure else f"unrecognized arguments: {flag}")
    return args
