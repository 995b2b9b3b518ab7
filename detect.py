"""Find objects in pictures, folders, videos and streams.

python detect.py --weights runs/train/exp/weights/best.safetensors --source pictures/
python detect.py --weights yolov3.weights --cfg yolov3.cfg --names data/coco.names --source 0
"""

import argparse
from collections import Counter

from utils.arguments import add_limits, add_network, add_output, add_resize, add_thresholds, count, whole
from utils.errors import QuarantineError, printable, run_main


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find objects in pictures, folders, videos and streams.")
    add_network(parser, precision="auto").add_argument(
        "--names", "--data", metavar="FILE", help="class names: .names, data .yaml or .data; a checkpoint knows its own"
    )
    seen = parser.add_argument_group("what to look at")
    seen.add_argument(
        "--source",
        required=True,
        help="picture, folder, glob, video, camera number, rtsp:// or http:// stream, or a .txt list of them",
    )
    add_resize(seen)
    add_limits(seen)
    seen.add_argument("--batch-size", type=count, default=8, metavar="N", help="default: 8; a stream has 1")
    seen.add_argument("--vid-stride", type=count, default=1, metavar="N", help="look at every N-th frame of a video")
    seen.add_argument(
        "--retries",
        type=whole,
        default=5,
        metavar="N",
        help="to open a stream again, 1, 2, 4, ... 30 s apart; default: 5",
    )
    found = add_thresholds(parser, conf_thres=0.25, iou_thres=0.45)
    found.add_argument("--classes", nargs="+", metavar="CLASS", help="keep these classes only: names or numbers")
    found.add_argument(
        "--track", action="store_true", help="number objects over the frames (needs: pip install trackers)"
    )
    written = add_output(parser, "runs/detect")
    written.add_argument("--save-json", action="store_true", help="detections.json")
    written.add_argument("--save-crop", action="store_true", help="crops/CLASS/*.jpg")
    written.add_argument("--nosave", action="store_true", help="no drawn pictures or videos")
    written.add_argument("--view-img", action="store_true", help="show a window (q closes it)")
    written.add_argument("--line-thickness", type=count, metavar="N", help="pixels (default: by the picture's size)")
    written.add_argument("--hide-labels", action="store_true")
    written.add_argument("--hide-conf", action="store_true")
    written.add_argument("--fourcc", type=fourcc, default="mp4v", help="video codec (default: mp4v)")
    written.add_argument("--strict", action="store_true", help="exit 3 if anything could not be read")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def fourcc(text: str) -> str:
    """The four letters of a codec."""
    if len(text) != 4:
        raise argparse.ArgumentTypeError(f"expected four letters such as mp4v, found {text!r}")
    return text


def main(args: argparse.Namespace | None = None) -> None:
    """One walk: frames -> letterbox -> network -> original pixels -> files. Reading, looking and writing overlap.

    Not for streams: there the newest frame counts, and work done ahead would be done on older ones.
    """
    args = args or parse_args()
    import sys
    import time
    from contextlib import closing
    from functools import partial

    from tqdm import tqdm

    from models.detector import Detector
    from models.loading import find_file, load_networks
    from utils.datasets.limits import Limits
    from utils.datasets.records import read_names
    from utils.datasets.sources import open_source
    from utils.draw import draw_detections
    from utils.evaluate import refuse_invalid
    from utils.interrupts import Interrupts
    from utils.prefetch import prefetch
    from utils.results import ResultWriter, check_codec
    from utils.run import new_run, select_device, select_precision
    from utils.tracking import Tracker
    from utils.window import Window

    # the network
    device = select_device(args.device)
    precision = select_precision(args.precision, device)
    window = Window() if args.view_img else None
    track = Tracker() if args.track else None
    names = read_names(find_file(args.names, "names file")) if args.names else None
    detector = Detector(
        load_networks(args.weights, cfg=args.cfg, names=names),
        device=device,
        precision=precision,
        img_size=args.img_size,
        resize=args.resize,
        augment=args.augment,
        conf_thres=args.conf_thres,
        iou_thres=args.iou_thres,
        max_det=args.max_det,
        classes=args.classes,
        agnostic=args.agnostic_nms,
    )
    names, size, predict = detector.names, detector.size, detector.predict

    # the pictures; the first one is read before anything is written
    source = open_source(
        args.source,
        channels=detector.channels,
        stride=args.vid_stride,
        limits=Limits.of(args),
        retries=args.retries,
        say=partial(tqdm.write, file=sys.stderr),
    )
    streams = source.streams
    if source.has_videos and not args.nosave:
        check_codec(args.fourcc)
    folder = new_run(args.project, args.name, exist_ok=args.exist_ok)
    writer = ResultWriter(
        folder=folder,
        names=names,
        save_txt=args.save_txt or args.save_conf,
        save_conf=args.save_conf,
        save_json=args.save_json,
        save_crop=args.save_crop,
        fourcc=args.fourcc,
        side_by_side=bool(streams),
    )
    draw = partial(
        draw_detections,
        names=names,
        line_thickness=args.line_thickness,
        hide_labels=args.hide_labels,
        hide_conf=args.hide_conf,
    )

    # look
    seen, num_invalid, totals, start = 0, 0, Counter(), time.perf_counter()
    batch_size = 1 if streams else args.batch_size
    ahead = (lambda items, depth=1: items) if streams else prefetch
    placed = ahead(place(source, batch_size, size, detector.stretch))
    try:
        with (
            Interrupts("what was found is written"),
            closing(writer),
            closing(ahead(look(predict, placed), batch_size)) as looked,
            closing(source),
            tqdm(total=source.total, desc="detect", unit="frame", dynamic_ncols=True, disable=None) as bar,
        ):
            for frame, detections in looked:
                detections = track(frame, detections) if track else detections
                drawn = draw(frame.image, detections) if window or not args.nosave else None
                writer.write(frame, detections, None if args.nosave else drawn)
                totals.update(detections.labels.tolist())
                seen += 1
                num_invalid += detections.num_invalid
                if streams:
                    bar.set_postfix_str(streams.finished(frame), refresh=False)
                bar.update()
                if window and not window.show(drawn):
                    break
    finally:  # say what happened, also after a signal, the usual end of a stream
        seconds = time.perf_counter() - start
        print(f"{seen} frames in {seconds:.1f} s, found: {in_words(totals, names)}")
        if track:
            print(f"tracked: {in_words(track.totals, names)}")
        parts = " / ".join(
            f"{1000 * part / max(1, seen):.1f} ms {name}" for name, part in predict.timer.seconds.items()
        )
        print(f"Speed: {parts} per frame at {size[1]}x{size[0]}, batch size {batch_size}")
        for line in source.report():
            print(line)
        print(f"Results: {folder}")

    refuse_invalid(num_invalid, ", ".join(args.weights))
    if streams:
        streams.refuse_lost(source.name)
    if source.problems and args.strict:
        raise QuarantineError(source.name, "not everything could be read, see the warnings above")


def in_words(totals: Counter, names: list[str]) -> str:
    """``2 dog, 1 cat``."""
    return (
        ", ".join(f"{totals[label]} {printable(name)}" for label, name in enumerate(names) if totals[label])
        or "nothing"
    )


def place(frames, batch_size: int, size: tuple[int, int], stretch: bool):
    """Batches: frames, where each lies on its canvas, and the canvases (uint8 [B, C, H, W])."""
    from itertools import islice

    from utils.datasets import in_memory

    frames = iter(frames)
    while batch := list(islice(frames, batch_size)):
        images, paths = [frame.image for frame in batch], [frame.path for frame in batch]
        yield batch, *in_memory.place(images, size, stretch=stretch, paths=paths)


def look(predict, batches):
    """(frame, detections in its own pixels), one after the other."""
    for frames, infos, images in batches:
        for frame, info, detections in zip(frames, infos, predict(images)):
            yield frame, detections.cpu().to_original(info)


if __name__ == "__main__":
    run_main(main)
