"""Post-processing at confidence 0.001, 80 classes: every class of a slot counts, the best 300 of a picture are wanted.

python -m benchmarks.postprocess
python -m benchmarks.postprocess --quick            # does it run?

Three populations, made from a seed: what a trained, a half-trained and an untrained network says (3,841, 286,307 and
1,903,347 scores of a picture pass, but at most 94 % of all), boxes in clusters around objects. Each comes with
objectness, as from [yolo], and without, as from a head whose classes are the scores: what the peer's networks say.

The peer is ultralytics' ``non_max_suppression``, its time limit lifted (as shipped it returns nothing for the rest of
a slow batch). It is handed ready scores in its own layout; ours starts from the raw logits. torchvision is the
threshold, a full gather and ``batched_nms``, which is the definition of the result: before any clock runs, ours must
keep the same boxes.
"""

import argparse
from dataclasses import replace

import torch
from torchvision.ops import batched_nms

from benchmarks.paired import peer, take_turns, verdict
from models.anchors import grid_priors
from models.postprocess import postprocess
from models.structures import Predictions, Priors
from utils.boxes import xywh_to_xyxy, xyxy_to_xywh
from utils.errors import run_main
from utils.run import select_device

CLASSES, CONF, IOU, MAX_DET, OBJECTS = 80, 0.001, 0.6, 300, 12
ENOUGH = 30_000  # as many as the peer looks at
ANCHORS = {  # stride -> YOLOv3's, pixels
    32: ((116, 90), (156, 198), (373, 326)),
    16: ((30, 61), (62, 45), (59, 119)),
    8: ((10, 13), (16, 30), (33, 23)),
}
OURS, PEER, PLAIN = "matchbox", "ultralytics", "torchvision"
CERTAIN = 60.0
MOST = 0.944  # of all scores: what an untrained network of 25,200 slots says
# name -> (scores of a picture that pass, how far logits of an object stand above the background's, goal)
POPULATIONS = {"trained": (3_841, 12.0, 2.5), "half-trained": (286_307, 4.0, 20.0), "early": (1_903_347, 0.5, 20.0)}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.postprocess", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=4, help="pictures of a batch")
    parser.add_argument("--sizes", type=int, nargs="+", default=(416, 640), help="of the input")
    parser.add_argument("--device", default="cpu", help="cpu, 0, ... (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="one picture of 128 x 128, one round")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if args.quick:
        args.rounds, args.images, args.sizes = 1, 1, (128,)
    torch.set_num_threads(1)
    device = select_device(args.device)
    ultralytics = peer("ultralytics.utils.nms", "ultralytics")
    for size in args.sizes:
        for name, (num_passing, contrast, goal) in POPULATIONS.items():
            for objectness in (True, False):
                preds = population(args.images, size, num_passing, contrast, objectness)
                preds = replace(preds, **{key: getattr(preds, key).to(device) for key in ("boxes", "obj", "cls")})
                scores = ready_scores(preds)
                passing = int((scores > CONF).sum()) // args.images
                check_equal(preds, scores)
                contenders = {OURS: lambda preds=preds: ours(preds), PLAIN: lambda p=preds, s=scores: plain(p, s)}
                if ultralytics:
                    layout = torch.cat([xyxy_to_xywh(preds.boxes), scores], dim=-1).transpose(1, 2).contiguous()
                    contenders[PEER] = lambda layout=layout: ultralytics.non_max_suppression(
                        layout, CONF, IOU, multi_label=True, max_det=MAX_DET, max_time_img=1e9
                    )
                rounds = take_turns(contenders, rounds=args.rounds, units=args.images)
                title = f"{name}, {len(preds.priors)} slots, {'with' if objectness else 'without'} objectness"
                print(f"\n{title}: {passing} scores pass\n{rounds.table(PLAIN)}")
                if ultralytics and not args.quick:
                    print(verdict(f"postprocess {title}", OURS, PEER, rounds, goal, device))


def population(num_images: int, size: int, num_passing: int, contrast: float, objectness: bool) -> Predictions:
    """What three YOLOv3 heads say of pictures of ``size``: ``num_passing`` scores of each are above CONF, at most MOST.

    Boxes are anchors, somewhat moved. Slots in an object take its box the more, the higher ``contrast``: how far the
    logits of objects stand above those of the background.
    """
    generator = torch.Generator().manual_seed(0)
    priors = slots(size)
    num_slots = len(priors)

    def normal(*shape):
        return torch.randn(num_images, num_slots, *shape, generator=generator)

    def uniform(*shape):
        return torch.rand(num_images, OBJECTS, *shape, generator=generator)

    middle, extent = uniform(2) * size, (0.05 + 0.4 * uniform(2)) * size
    label = torch.randint(CLASSES, (num_images, OBJECTS), generator=generator)
    away = ((priors.center[None, :, None] - middle[:, None]) / extent[:, None]).abs().amax(-1)  # [B, P, objects]
    away, owner = away.min(dim=-1)
    rows = torch.arange(num_images)[:, None]
    fit = (priors.size.log() - extent[rows, owner].log()).abs().sum(-1) + 2 * away
    trust = (1.5 - fit).clamp(0, 1)[..., None]  # 0: background, 1: the best slots of an object
    pull = trust * contrast / (contrast + 2)
    center = torch.lerp(priors.center + 0.3 * normal(2) * priors.stride, middle[rows, owner], pull)
    side = torch.lerp((priors.size * (0.15 * normal(2)).exp()), extent[rows, owner], pull) * (0.05 * normal(2)).exp()
    of_object = torch.nn.functional.one_hot(label[rows, owner], CLASSES) * trust * contrast
    spread = 0.5 + contrast / 6
    obj, cls = contrast * (trust[..., 0] - 1) + spread * normal(), of_object + spread * normal(CLASSES)
    if not objectness:
        obj, cls = torch.full_like(obj, CERTAIN), cls + obj[..., None]
    boxes = xywh_to_xyxy(torch.cat([center, side], dim=-1))
    preds = Predictions(boxes=boxes, deltas=torch.zeros_like(boxes), obj=obj, cls=cls, priors=priors)
    return shifted(preds, round(min(num_passing, MOST * num_slots * CLASSES) * num_images))


def slots(size: int) -> Priors:
    """YOLOv3's slots on a square input: 10,647 at 416, 25,200 at 640."""
    parts = [
        grid_priors(anchors, 0.5, (size // stride, size // stride), (size, size), torch.device("cpu"), torch.float32)
        for stride, anchors in ANCHORS.items()
    ]
    return Priors.cat(parts)


def shifted(preds: Predictions, num_passing: int) -> Predictions:
    """All logits raised or lowered by one number, so that ``num_passing`` scores are above CONF."""
    low, high = -40.0, 40.0
    for _ in range(40):
        middle = (low + high) / 2
        moved = replace(preds, cls=preds.cls + middle, obj=preds.obj + middle)
        low, high = (low, middle) if int((ready_scores(moved) > CONF).sum()) > num_passing else (middle, high)
    return moved


def ready_scores(preds: Predictions) -> torch.Tensor:
    """[B, P, C]."""
    return preds.cls.sigmoid() * preds.obj.sigmoid()[..., None]


def ours(preds: Predictions) -> list:
    return postprocess(preds, conf_thres=CONF, iou_thres=IOU, max_det=MAX_DET)


def plain(preds: Predictions, scores: torch.Tensor) -> list:
    """The definition: sorted, class by class, the best 300. [(boxes, scores, labels)]

    Of the best ENOUGH only, as the fate of a candidate depends on better ones alone: exact if these give 300.
    """
    found = []
    for boxes, confidence in zip(preds.boxes, scores):
        passing = (confidence.flatten() > CONF).nonzero().squeeze(1)
        confidence = confidence.flatten()[passing]
        confidence, best = confidence.topk(min(ENOUGH, len(passing)))
        slots, labels = passing[best] // CLASSES, passing[best] % CLASSES
        kept = batched_nms(boxes[slots], confidence, labels, IOU)[:MAX_DET]
        assert len(kept) == MAX_DET or len(best) == len(passing), "ENOUGH is not"
        found.append((boxes[slots[kept]], confidence[kept], labels[kept]))
    return found


def check_equal(preds: Predictions, scores: torch.Tensor) -> None:
    for mine, (boxes, confidence, labels) in zip(ours(preds), plain(preds, scores), strict=True):
        torch.testing.assert_close(mine.scores, confidence, rtol=1e-6, atol=0)  # a sigmoid may round otherwise by place
        assert torch.equal(mine.boxes, boxes) and torch.equal(mine.labels, labels), "other boxes"


if __name__ == "__main__":
    arguments = parse_args()
    run_main(lambda: main(arguments))
