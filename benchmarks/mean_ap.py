"""Average precision of 5,000 pictures x 100 detections x 80 classes: all twelve numbers of the COCO protocol.

python -m benchmarks.mean_ap
python -m benchmarks.mean_ap --quick            # does it run?

A data set like COCO's validation half, made from a seed: 7.3 objects a picture, 1 % of them crowds, 60 % of the objects
found several times with boxes more or less near, the rest false. Everybody starts from what a program has after its
last picture: we from tensors per picture, the peers (pycocotools, faster-coco-eval) from the list of result entries in
memory; truths are indexed before the clock starts, which is free for us. Ours also counts the curves and the confusion
matrix that the peers do not have. Before any number is shown all twelve must be equal.

pycocotools needs half a minute per round: it has as many as the others, but one warm-up for all.
"""

import argparse
import contextlib
import io

import numpy as np
import torch

from benchmarks.paired import peer, take_turns, verdict
from utils.errors import run_main
from utils.evaluate import coco_results
from utils.metrics import DetectionMetrics
from utils.structures import Detections, Record

CLASSES, DETECTIONS, OBJECTS, SIDE = 80, 100, 7.3, 640
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
OURS = "matchbox"
# package -> (module of the data set, its name, module of the evaluation, its name, goal)
PEERS = {
    "pycocotools": ("pycocotools.coco", "COCO", "pycocotools.cocoeval", "COCOeval", 35.0),
    "faster-coco-eval": ("faster_coco_eval", "COCO", "faster_coco_eval", "COCOeval_faster", 6.0),
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.mean_ap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--quick", action="store_true", help="50 pictures, one round")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if args.quick:
        args.images, args.rounds = 50, 1
    torch.set_num_threads(1)
    found, records = scene(args.images)
    contenders = {OURS: lambda: ours(found, records)}
    for name in args.peers:
        data_module, data, eval_module, evaluation, _ = PEERS[name]
        modules = peer(data_module, name), peer(eval_module, name)
        if None not in modules:
            contenders[name] = theirs(getattr(modules[0], data), getattr(modules[1], evaluation), found, records)
    expected = contenders[OURS]()
    for name, run in contenders.items():
        np.testing.assert_allclose(run(), expected, rtol=0, atol=1e-12, err_msg=name)
    rounds = take_turns(contenders, rounds=args.rounds, warmup=0)
    print(f"{args.images} pictures, AP {expected[0]:.6f}, AP50 {expected[1]:.6f}\n{rounds.table(OURS)}")
    for name in contenders:
        if name in PEERS and not args.quick:
            print(verdict(f"mAP of {args.images} pictures", OURS, name, rounds, PEERS[name][-1], torch.device("cpu")))


def scene(num_images: int) -> tuple[list[Detections], list[Record]]:
    """Detections, best first, and truths of every picture."""
    rng = np.random.default_rng(0)
    found, records = [], []
    for number in range(num_images):
        num = rng.poisson(OBJECTS)
        boxes, labels = random_boxes(rng, num), rng.integers(CLASSES, size=num)
        crowd = rng.random(num) < 0.01
        width, height = (boxes[:, 2:] - boxes[:, :2]).T
        records.append(
            Record(
                path=f"{number}.jpg", size=(SIDE, SIDE), boxes=boxes.astype(np.float32), labels=labels,
                ignore=crowd, crowd=crowd, area=(0.6 * width * height).astype(np.float32), image_id=number + 1,
            )
        )  # fmt: skip
        near = rng.integers(num, size=DETECTIONS) if num else np.zeros(DETECTIONS, int)
        true = (rng.random(DETECTIONS) < 0.3) & (num > 0)
        guesses, classes = random_boxes(rng, DETECTIONS), rng.integers(CLASSES, size=DETECTIONS)
        if num:
            sizes = np.tile(boxes[near, 2:] - boxes[near, :2], 2)
            moved = boxes[near] + 0.1 * sizes * rng.standard_normal((DETECTIONS, 4))
            guesses = np.where(true[:, None], moved, guesses)
            classes = np.where(true & (rng.random(DETECTIONS) < 0.8), labels[near], classes)
        low, high = np.minimum(guesses[:, :2], guesses[:, 2:]), np.maximum(guesses[:, :2], guesses[:, 2:])
        scores = np.clip(np.where(true, 0.5, 0.2) * rng.random(DETECTIONS) + rng.normal(0, 0.05, DETECTIONS), 0.001, 1)
        order = np.argsort(-scores, kind="stable")
        found.append(
            Detections(
                boxes=torch.from_numpy(np.hstack([low, high])[order]).float(),
                scores=torch.from_numpy(scores[order]).float(),
                labels=torch.from_numpy(classes[order]),
            )
        )
    return found, records


def random_boxes(rng: np.random.Generator, num: int) -> np.ndarray:
    """[num, 4] of all three of COCO's sizes."""
    size = SIDE * 2 ** rng.uniform(-6, -0.5, (num, 2))
    corner = rng.random((num, 2)) * (SIDE - size)
    return np.hstack([corner, corner + size])


def ours(found: list[Detections], records: list[Record]) -> list[float]:
    metrics = DetectionMetrics([str(number) for number in range(CLASSES)])
    for detections, record in zip(found, records):
        metrics.update(detections, record)
    return list(metrics.compute().coco.values())


def theirs(data, evaluation, found: list[Detections], records: list[Record]):
    """From entries in memory to the twelve numbers, by a package with the COCO tools' interface."""
    annotations = [
        {"image_id": r.image_id, "category_id": int(label) + 1, "area": float(area), "iscrowd": int(crowd),
         "bbox": [float(x1), float(y1), float(x2) - float(x1), float(y2) - float(y1)]}
        for r in records for (x1, y1, x2, y2), label, area, crowd in zip(r.boxes, r.labels, r.area, r.crowd)
    ]  # fmt: skip
    entries = coco_results(found, records, list(range(1, CLASSES + 1)))
    truths = {
        "info": {},
        "images": [{"id": r.image_id, "height": SIDE, "width": SIDE} for r in records],
        "categories": [{"id": number + 1, "name": str(number)} for number in range(CLASSES)],
        "annotations": [{"id": number + 1, **annotation} for number, annotation in enumerate(annotations)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        indexed = data()
        indexed.dataset = truths
        indexed.createIndex()

    def run() -> list[float]:
        with contextlib.redirect_stdout(io.StringIO()):
            result = evaluation(indexed, indexed.loadRes([dict(entry) for entry in entries]), "bbox")
            result.evaluate()
            result.accumulate()
            result.summarize()
        return list(result.stats[: len(NUMBERS)])

    return run


if __name__ == "__main__":
    arguments = parse_args()
    run_main(lambda: main(arguments))
