"""Who answers for whom: every assigner on one network and one batch, as pictures, numbers and one HTML page.

python -m models.show                                                  # the default network on the generated pictures
python -m models.show --weights runs/train/exp/weights/best.safetensors --data my.yaml
python -m models.show --cfg yolov3.cfg --weights yolov3.weights --data coco.yaml --img-size 416
"""

import argparse
from pathlib import Path

from utils.errors import UserError, run_main

ROOT = Path(__file__).resolve().parents[1]


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="models.show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg", default="", help="network; default: that of --weights, else cfg/matchbox.cfg")
    parser.add_argument("--weights", default="", help="what it has learned; without, it is new and predicts noise")
    parser.add_argument(
        "--data", default=str(ROOT / "data/shapes.yaml"), help="data.yaml, .data, COCO .json or a folder"
    )
    parser.add_argument("--task", default="val", choices=["train", "val", "test"], help="which split")
    parser.add_argument("--img-size", "--imgsz", "--img", type=int, nargs="+", metavar="N", help="default: the cfg's")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="pictures: the first with objects")
    parser.add_argument("--device", default="", help="cpu, 0, ... (default: the first GPU, else the CPU)")
    parser.add_argument("--project", default="runs/show", help="folder of all runs")
    parser.add_argument("--name", default="exp", help="this run's folder in it; numbered if taken")
    parser.add_argument("--exist-ok", action="store_true", help="write into project/name even if it is there")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """One walk: network and batch -> assignments -> pictures, numbers, page."""
    import torch

    from models.assignment_page import page
    from models.assignment_pictures import panels, sheet
    from models.compare_assigners import about, build_criteria, compare, loss_shares, only
    from models.loading import input_size
    from utils.datasets.records import read_dataset
    from utils.files import write_text
    from utils.results import write_image
    from utils.run import new_run, select_device, set_seed

    set_seed(0)
    device = select_device(args.device)
    data = read_dataset(args.data, args.task)
    model = load_model(args, list(data.names)).to(device)
    if model.cfg.has_masks:
        data = read_dataset(args.data, args.task, masks=True)
    batch = first_batch(args, data.records, model, input_size(args.img_size, model)).to(device)
    images = batch.images.float() / 255

    criteria, refused = build_criteria(model)
    if not criteria:
        raise UserError(model.cfg.path, "no assigner can work with this network", "; ".join(refused.values()))
    with torch.no_grad():
        comparison = compare(model.predict(images), batch.targets, criteria)
    targets = only(batch.targets, 0)
    shares = {name: loss_shares(model, images[:1], targets, criterion) for name, criterion in criteria.items()}

    folder = new_run(args.project, args.name, args.exist_ok)
    drawn = [panels(comparison, batch, number) for number in range(len(batch))]
    for number, pictures in enumerate(drawn):
        write_image(folder / f"picture{number + 1}.png", sheet(comparison, pictures, number))
    learned = args.weights or "none: the network is new, so assigners that ask its predictions see noise"
    notes = [f"Network: {model.cfg.path}", f"Weights: {learned}", f"Pictures: {args.data}, {args.task}"]
    text = page(
        comparison,
        drawn,
        shares,
        title="Who answers for whom",
        notes=notes,
        about={name: about(criterion) for name, criterion in criteria.items()},
        refused=refused,
    )
    write_text(folder / "index.html", text)
    print(comparison.table())
    for name, reason in refused.items():
        print(f"{name}: {reason}")
    print(f"Results: {folder}/index.html and picture*.png")


def load_model(args: argparse.Namespace, names: list[str]):
    """The network of the command line in eval mode, with the data's classes."""
    from models.cfg import adapt_classes, read_cfg
    from models.darknet import Darknet
    from models.loading import find_file, load_network

    if args.weights:
        return load_network(args.weights, cfg=args.cfg or None, names=names).model
    cfg, _ = adapt_classes(read_cfg(find_file(args.cfg or "matchbox.cfg", "cfg")), len(names))
    return Darknet(cfg).eval()


def first_batch(args: argparse.Namespace, records: list, model, size: tuple[int, int]):
    """The first pictures that have objects, as test.py would show them to the network."""
    from models.loading import stretches
    from utils.datasets.dataset import DetectionDataset
    from utils.datasets.loader import Draw, collate

    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}", "expected 1 or more")
    chosen = [record for record in records if not record.ignore.all()][: args.batch_size]
    if not chosen:
        raise UserError(args.data, f"no picture of split {args.task} has an object", "choose another with --task")
    dataset = DetectionDataset(chosen, channels=model.channels, stretch=stretches(None, model))
    return collate([dataset[Draw(0, index, index, size)] for index in range(len(chosen))])


if __name__ == "__main__":
    arguments = parse_args()
    run_main(lambda: main(arguments))
