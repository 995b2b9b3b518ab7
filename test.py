"""Measure a network: precision, recall and average precision by the COCO, VOC or Darknet protocol.

python test.py --weights runs/train/exp/weights/best.safetensors --data data/shapes.yaml
python test.py --weights yolov3.weights --cfg yolov3.cfg --data coco.data --save-json
"""

import argparse
from pathlib import Path

from utils.arguments import add_bad_data, add_network, add_output, add_resize, add_thresholds, count, whole
from utils.errors import UserError, nearest, run_main

ROOT = Path(__file__).resolve().parent


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure a network on a data set.")
    add_network(parser, precision="float32")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        default=str(ROOT / "data/shapes.yaml"),
        metavar="FILE",
        help="data .yaml, Darknet .data, COCO .json or VOC folder (default: the generated shapes)",
    )
    data.add_argument("--task", default="val", choices=["train", "val", "test"], help="which split (default: val)")
    add_resize(data)
    data.add_argument("--rect", action="store_true", help="batches as narrow as their pictures allow (letterbox only)")
    data.add_argument("--batch-size", type=count, default=16, metavar="N", help="default: 16")
    data.add_argument("--workers", type=whole, metavar="N", help="processes that load pictures (default: by the cores)")
    data.add_argument("--single-cls", action="store_true", help="count every object and every detection as one class")
    add_bad_data(parser)
    found = add_thresholds(parser, conf_thres=0.001, iou_thres=0.6)
    found.add_argument(
        "--protocol", default="coco", help="what is reported beside COCO: voc07, voc12, darknet0, darknet11, darknet101"
    )
    written = add_output(parser, "runs/test")
    written.add_argument("--save-json", action="store_true", help="predictions.json in the COCO results format")
    written.add_argument("--verbose", action="store_true", help="a row per class")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(args: argparse.Namespace | None = None):
    """One walk: data -> network -> detections in original pixels -> numbers, pictures, files; the Evaluation."""
    args = args or parse_args()
    from models.detector import Detector
    from models.loading import find_file, load_networks
    from utils.datasets.dataset import DetectionDataset
    from utils.datasets.limits import Limits
    from utils.datasets.loader import EvalSampler, build_loader
    from utils.datasets.quarantine import refuse_bad, write_quarantine
    from utils.datasets.records import read_dataset
    from utils.evaluate import evaluate, refuse_invalid
    from utils.gallery import Gallery
    from utils.metrics import PROTOCOLS
    from utils.plots import save_evaluation_plots
    from utils.results import Predictions
    from utils.run import new_run, select_device, select_precision, share_cores

    # what a person can get wrong is found before the data is read, which may take minutes
    if args.protocol not in PROTOCOLS:
        raise UserError("--protocol", f"no such protocol: '{args.protocol}'", nearest(args.protocol, PROTOCOLS))
    device = select_device(args.device)
    precision = select_precision(args.precision, device)
    weights = [find_file(file, "weights file") for file in args.weights]
    cfgs = [find_file(file, "cfg") for file in args.cfg or ()]

    # data and network
    limits = Limits.of(args)
    data = read_dataset(args.data, args.task, limits=limits)
    networks = load_networks(weights, cfg=cfgs, names=None if args.single_cls else list(data.names))
    if networks[0].model.cfg.has_masks:
        data = read_dataset(args.data, args.task, masks=True, limits=limits)
    print(data.summary())
    refuse_bad(data, limits.max_bad)
    detector = Detector(
        networks,
        device=device,
        precision=precision,
        img_size=args.img_size,
        resize=args.resize,
        augment=args.augment,
        conf_thres=args.conf_thres,
        iou_thres=args.iou_thres,
        max_det=args.max_det,
        agnostic=args.agnostic_nms or args.single_cls,
    )
    predict, stretch = detector.predict, detector.stretch
    if args.single_cls:
        data, predict = data.as_single_class(), SingleClass(predict)
    dataset = DetectionDataset(data.records, channels=detector.channels, stretch=stretch, limits=limits)
    rect = args.rect and not stretch
    sampler = EvalSampler(dataset.sizes, args.batch_size, detector.size, rect=rect, stride=detector.stride)
    loader = build_loader(dataset, sampler, workers=share_cores(device, args.workers), pin_memory=device.type == "cuda")

    # measure
    folder, names = new_run(args.project, args.name, exist_ok=args.exist_ok), list(data.names)
    write_quarantine(folder, data.problems)
    dataset.quarantine.folder = folder
    predictions = Predictions(
        folder,
        data.records,
        save_txt=args.save_txt or args.save_conf,
        save_conf=args.save_conf,
        save_json=args.save_json,
    )
    gallery = Gallery(folder, names)

    def observe(batch, detections) -> None:
        predictions.observe(batch, detections)
        gallery.val(batch, detections)

    result = evaluate(predict, loader, data.records, names, protocol=args.protocol, observe=observe)

    # say it
    print(result.table(verbose=args.verbose))
    print(result.coco_table())
    save_evaluation_plots(result, folder)
    if args.save_json:
        print(f"COCO results: {predictions.write_json(data.category_ids)}")
    print(f"Results: {folder}")
    refuse_invalid(result.num_invalid, ", ".join(map(str, weights)))
    return result


class SingleClass:
    """A predictor all of whose detections are of class 0."""

    def __init__(self, predict):
        self.predict, self.timer = predict, predict.timer

    def __call__(self, images):
        from dataclasses import replace

        return [replace(found, labels=found.labels * 0) for found in self.predict(images)]


if __name__ == "__main__":
    run_main(main)
