"""A trained network for other programs: ONNX, torch.export, TorchScript, Darknet, OpenVINO. Measured, then written.

python -m models.export runs/train/exp/weights/best.safetensors      # best.onnx, for any runtime and OpenCV
python -m models.export best.safetensors --dynamic --nms             # any size, any number, boxes ready to use
python -m models.export yolov3.weights --cfg yolov3.cfg --format torch --half
"""

import argparse
import json
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from utils.arguments import count, fraction
from utils.errors import UserError, run_main

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "torchscript": ".torchscript", "darknet": ".weights", "openvino": ".xml"}
NUM_PICTURES = 11  # that an export is compared on: batches of 1, 3 and 7
SUPPRESSION = {"conf_thres": 0.25, "iou_thres": 0.45, "max_det": 300}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="models.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("which network")
    what.add_argument("weights", metavar="WEIGHTS", help="checkpoint (.safetensors), .weights or .pt")
    what.add_argument("--cfg", metavar="FILE", help="the network; a checkpoint knows its own")
    what.add_argument("--names", metavar="FILE", help="class names, where the weights do not know them")

    how = parser.add_argument_group("as what")
    how.add_argument("--format", choices=list(SUFFIXES), default="onnx", help="default: onnx")
    how.add_argument("--img-size", "--imgsz", "--img", type=count, nargs="+", metavar="N", help="default: the cfg's")
    how.add_argument("--batch-size", type=count, default=1, metavar="N", help="pictures at once (default: 1)")
    how.add_argument("--dynamic", action="store_true", help="any number of pictures, any size the stride divides")
    how.add_argument("--half", action="store_true", help="float16 inside; input and outputs stay float32")
    how.add_argument("--nms", action="store_true", help="with non-maximum suppression: boxes, scores and labels")
    how.add_argument("--conf-thres", type=fraction, help="of --nms: least score (default: 0.25)")
    how.add_argument("--iou-thres", type=fraction, help="of --nms: largest overlap (default: 0.45)")
    how.add_argument("--max-det", type=count, metavar="N", help="of --nms: per picture (default: 300)")

    output = parser.add_argument_group("compared on what, written where")
    output.add_argument("--source", help="pictures to compare on (default: those the network was validated on)")
    output.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: beside the weights")
    output.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(args: argparse.Namespace | None = None) -> None:
    """One walk: network -> another format, in memory -> compared -> files."""
    args = args or parse_args()
    from tqdm import tqdm

    from models.exports import EXPORTS
    from models.exports.parity import batches, compare, refuse_differences, table
    from models.loading import stretches

    kind = EXPORTS[args.format]
    refuse_other_wishes(args, {name: export.offers for name, export in EXPORTS.items()})
    wish, data = read_wish(args)
    target = find_target(args, wish)
    where, pictures = find_pictures(args.source, data, wish.model.channels)
    stretch = stretches(None, wish.model)

    export = kind(wish)
    inputs = list(batches(wish, pictures, stretch))
    found = [compare(wish, export, images) for images in tqdm(inputs, desc="compare", leave=False, disable=None)]
    remark = said_elsewhere(wish, export, inputs[0])
    print(f"Compared with {export.runtime} on {where}\n{table(found)}")
    refuse_differences(wish, found)
    meta = describe(wish, export, args.format, stretch)
    measured = [parity.as_dict() for parity in found]
    meta |= {"parity": {"with": export.runtime, "on": Path(where).name, "batches": measured}}
    for line in (note_on_suppression(wish), remark):
        if line:
            print(line)
    written = write(target, export, meta)
    print(f"Written: {', '.join(f'{path} ({path.stat().st_size / 1e6:.2f} MB)' for path in written)}")


def refuse_other_wishes(args: argparse.Namespace, offers: dict[str, frozenset]) -> None:
    """Raise a UserError for flags that the format cannot fulfil, or that contradict each other."""
    wanted = {"nms": args.nms, "dynamic": args.dynamic, "half": args.half, "batch_size": args.batch_size > 1}
    for name, is_wanted in wanted.items():
        if is_wanted and name not in offers[args.format]:
            able = [other for other, fields in offers.items() if name in fields]
            flag = f"--{name.replace('_', '-')}"
            raise UserError(flag, f"not with --format {args.format}", f"formats that can: {', '.join(able)}")
    if args.dynamic and args.batch_size > 1:
        raise UserError("--batch-size", "with --dynamic any number of pictures goes", "leave one of them out")
    for name in SUPPRESSION:
        if not args.nms and getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}", "belongs to --nms", "add --nms")


def read_wish(args: argparse.Namespace):
    """(what is asked for, the data set that the network was trained on or "")."""
    from models.exports.wish import Suppression, Wish
    from models.loading import find_file, input_size, load_network
    from utils.datasets.records import read_names

    names = read_names(find_file(args.names, "names file")) if args.names else None
    loaded = load_network(args.weights, cfg=args.cfg, names=names)
    chosen = {name: getattr(args, name) for name in SUPPRESSION if getattr(args, name) is not None}
    wish = Wish(
        model=loaded.model.float(),
        weights=find_file(args.weights, "weights file"),
        names=loaded.names,
        size=input_size(args.img_size, loaded.model),
        batch_size=args.batch_size,
        dynamic=args.dynamic,
        half=args.half,
        nms=Suppression(**SUPPRESSION | chosen) if args.nms else None,
    )
    return wish, loaded.meta.get("args", {}).get("data", "")


def find_target(args: argparse.Namespace, wish) -> Path:
    """The main file to be written, which is none of those that are read."""
    from models.loading import find_file

    suffix = SUFFIXES[args.format]
    target = args.output or wish.weights.with_suffix(suffix)
    if target.suffix != suffix:
        raise UserError("-o", f"{target} does not end in {suffix}", f"-o {target.with_suffix(suffix)}")
    sources = [wish.weights] + ([find_file(args.cfg, "cfg")] if args.cfg else [])
    for source in sources:
        if source.resolve().with_suffix("") == target.resolve().with_suffix("") and args.format == "darknet":
            raise UserError("-o", f"{target} and its .cfg would replace {source}", "name another file")
    return target


def find_pictures(source: str | None, data: str, channels: int):
    """(where they come from, the first pictures): of --source, else of the data set's validation half."""
    from utils.datasets.images import read_image
    from utils.datasets.records import read_dataset
    from utils.datasets.sources import open_source

    if source:
        return source, [frame.image for frame in islice(open_source(source, channels=channels), NUM_PICTURES)]
    shapes = str(ROOT / "data/shapes.yaml")
    try:
        records = read_dataset(data or shapes, "val").records
    except UserError as error:
        print(f"warning: {error}; compared on generated pictures instead")
        data, records = shapes, read_dataset(shapes, "val").records
    return f"{data or shapes}, val", [read_image(record.path, channels) for record in records[:NUM_PICTURES]]


def said_elsewhere(wish, export, images) -> str:
    """Whether a program besides the one that was measured agrees, where there is one for such a file."""
    import cv2

    from models.exports.parity import differences

    name, raw = export.elsewhere(images)
    if not name:
        return ""
    if wish.dynamic or wish.nms:
        return f"{name} does not read files with --dynamic or --nms"
    try:
        boxes, scores = differences(wish, raw(images), images)
    except (cv2.error, UserError) as error:
        return f"{name} cannot read it: {str(error).strip().splitlines()[0][:200]}"
    return f"{name} reads it: boxes differ by {boxes:.1e}, scores by {scores:.1e}"


def note_on_suppression(wish) -> str:
    kind = wish.model.heads[-1].section.str("nms_kind", "default") if wish.nms else "default"
    return f"note: the cfg says nms_kind={kind}; ONNX has plain IoU only, as --nms uses it" if kind != "default" else ""


def describe(wish, export, name: str, stretch: bool) -> dict:
    """What a reader of the file has to know, ready for JSON."""
    import torch

    from models.exports.wish import DETECTIONS, INPUT, OUTPUTS
    from utils.datasets.letterbox import FILL

    shape = [wish.batch_size, wish.model.channels, *wish.size]
    if wish.dynamic:
        shape = ["batch", wish.model.channels, "height", "width"]
    return {
        "format": name,
        "weights": wish.weights.name,
        "names": wish.names,
        "input": {
            "name": INPUT,
            "shape": shape,
            "colours": "RGB" if wish.model.channels == 3 else "grey",
            "range": [0, 1],
            "stride": wish.model.stride,
            "resize": "stretch" if stretch else "letterbox",
            "fill": FILL,
        },
        "outputs": list(DETECTIONS if wish.nms else OUTPUTS),
        "nms": vars(wish.nms) if wish.nms else None,
        "precision": "float16" if wish.half else "float32",
        "torch": torch.__version__,
    }


def write(target: Path, export, meta: dict) -> list[Path]:
    """All files or none: each is renamed into place when every one has been written."""
    from utils.files import atomic_write

    contents = {target.with_suffix(suffix): data for suffix, data in export.files(json.dumps(meta)).items()}
    contents[target.with_name(f"{target.name}.json")] = json.dumps(meta, indent=1, ensure_ascii=False).encode() + b"\n"
    with ExitStack() as stack:
        for path, data in contents.items():
            stack.enter_context(atomic_write(path, point="export")).write(data)
    return list(contents)


if __name__ == "__main__":
    run_main(main)
