"""Measure a network: precision, recall and average precision by the COCO, VOC or Darknet protocol.

python test.py --weights runs/train/exp/weights/best.safetensors --data data/shapes.yaml
python test.py --weights yolov3.weights --cfg yolov3.cfg --data coco.data --save-json
"""

import argparse


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure a network on a data set.")
    network = parser.add_argument_group("network")
    network.add_argument("--weights", required=True, metavar="FILE", help="checkpoint (.safetensors), .weights or .pt")
    network.add_argument("--cfg", metavar="FILE", help="the network; a checkpoint knows its own")
    network.add_argument("--device", default="", help="cpu, 0, ... (default: the first GPU, else the CPU)")
    network.add_argument("--precision", default="float32", choices=["auto", "float32", "bf16", "fp16"])
    network.add_argument(
        "--half", dest="precision", action="store_const", const="fp16", help="same as --precision fp16"
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", default="data/shapes.yaml", metavar="FILE", help="data .yaml, Darknet .data, COCO .json or VOC folder"
    )
    data.add_argument("--task", default="val", choices=["train", "val", "test"], help="which split")
    data.add_argument(
        "--img-size",
        "--imgsz",
        "--img",
        type=int,
        nargs="+",
        metavar="N",
        help="input height [width] (default: the cfg's)",
    )
    data.add_argument(
        "--resize", choices=["letterbox", "stretch"], help="how a picture is fitted (default: letter_box of the cfg)"
    )
    data.add_argument("--rect", action="store_true", help="batches as narrow as their pictures allow (letterbox only)")
    data.add_argument("--batch-size", type=int, default=16, metavar="N")
    data.add_argument("--workers", type=int, default=2, metavar="N")
    data.add_argument("--single-cls", action="store_true", help="treat every object as one class")
    found = parser.add_argument_group("what counts as found")
    found.add_argument("--conf-thres", type=float, default=0.001)
    found.add_argument("--iou-thres", type=float, default=0.6, help="overlap above which the lower score is suppressed")
    found.add_argument("--max-det", type=int, default=300, metavar="N", help="per picture (COCO counts the best 100)")
    found.add_argument("--agnostic-nms", action="store_true", help="suppress across classes")
    found.add_argument(
        "--protocol", default="coco", help="what is reported beside COCO: voc07, voc12, darknet0, darknet11, darknet101"
    )
    written = parser.add_argument_group("what is written")
    written.add_argument("--project", default="runs/test", metavar="DIR")
    written.add_argument("--name", default="exp", help="folder below --project; exp2, exp3, ... if taken")
    written.add_argument(
        "--exist-ok", action="store_true", help="write into an existing folder (nothing in it is deleted)"
    )
    written.add_argument("--verbose", action="store_true", help="a row per class")
    written.add_argument("--save-json", action="store_true", help="predictions.json in the COCO results format")
    written.add_argument("--save-txt", action="store_true", help="labels/*.txt: class cx cy w h")
    written.add_argument("--save-conf", action="store_true", help="with the score as sixth column")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """One walk: data -> network -> detections in original pixels -> numbers, pictures, files."""
    from utils.plots import save_evaluation_plots

    from models.loading import input_size, load_network, stretches
    from models.predictor import Predictor
    from utils.datasets.dataset import DetectionDataset
    from utils.datasets.loader import EvalSampler, build_loader
    from utils.datasets.records import read_dataset
    from utils.evaluate import evaluate
    from utils.results import Predictions
    from utils.run import new_run, select_device, select_precision

    # data and network
    data = read_dataset(args.data, args.task)
    print(data.summary())
    device = select_device(args.device)
    model = load_network(args.weights, cfg=args.cfg, names=list(data.names)).model
    size = input_size(args.img_size, model)
    predict = Predictor(
        model,
        device=device,
        conf_thres=args.conf_thres,
        iou_thres=args.iou_thres,
        max_det=args.max_det,
        agnostic=args.agnostic_nms,
        amp=select_precision(args.precision, device).autocast,
    )
    dataset = DetectionDataset(data.records, channels=model.channels, stretch=stretches(args.resize, model))
    sampler = EvalSampler(dataset.sizes, args.batch_size, size, rect=args.rect, stride=model.stride)
    loader = build_loader(dataset, sampler, workers=args.workers, pin_memory=device.type == "cuda")

    # measure
    folder = new_run(args.project, args.name, exist_ok=args.exist_ok)
    predictions = Predictions(folder, data.records, save_txt=args.save_txt, save_conf=args.save_conf)
    result = evaluate(
        predict, loader, data.records, list(data.names), protocol=args.protocol, observe=predictions.observe
    )

    # say it
    print(result.table(verbose=args.verbose))
    save_evaluation_plots(result, folder)
    if args.save_json:
        print(f"COCO results: {predictions.write_json(data.category_ids)}")
    print(f"Results: {folder}")
    return 0


if __name__ == "__main__":
    arguments = parse_args()
    from utils.errors import run_main

    run_main(lambda: main(arguments))
