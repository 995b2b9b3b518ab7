"""The doctor of data sets with a second opinion: where a trained network disagrees with the labels.

python -m models.doctor data.yaml --weights runs/train/exp/weights/best.safetensors
python -m models.doctor data.yaml --weights yolov3.weights --cfg yolov3.cfg --fix

All that ``python -m utils.datasets.doctor`` looks for is in the report, too.
"""

from collections.abc import Callable

from tqdm import tqdm

from models.inference import for_inference
from models.loading import input_size, load_network, stretches
from models.predictor import Predictor
from utils.arguments import add_resize
from utils.datasets.dataset import DetectionDataset
from utils.datasets.doctor import CHECKS, parser, run
from utils.datasets.formats.description import known_splits
from utils.datasets.limits import Limits
from utils.datasets.loader import EvalSampler, build_loader
from utils.datasets.records import DataSet, read_dataset
from utils.datasets.second_opinion import LEAST, second_opinion
from utils.errors import run_main
from utils.run import select_device, select_precision, share_cores
from utils.structures import Detections

BATCH = 16


def opinions(
    predict: Predictor, size: tuple[int, int], *, stretch: bool, workers: int, limits: Limits
) -> Callable[[DataSet], list[Detections | None]]:
    """A function: data set -> what the network finds in each of its pictures, None for one that cannot be read."""
    model = predict.model

    def of(data: DataSet) -> list[Detections | None]:
        dataset = DetectionDataset(data.records, channels=model.channels, stretch=stretch, limits=limits)
        sampler = EvalSampler(dataset.sizes, BATCH, size, rect=not stretch, stride=model.stride)
        loader = build_loader(dataset, sampler, workers=workers, pin_memory=predict.device.type == "cuda")
        found: list[Detections | None] = [None] * len(data.records)
        for batch in tqdm(loader, f"network on {data.split}", unit="batch", leave=False, disable=None):
            for detections, info in zip(predict(batch.images), batch.infos):
                found[info.id] = detections.cpu().to_original(info)
        return found

    return of


def main(arguments: list[str] | None = None) -> None:
    flags = parser("python -m models.doctor", __doc__.splitlines()[0])
    flags.add_argument("--weights", required=True, metavar="FILE", help="checkpoint (.safetensors), .weights or .pt")
    flags.add_argument("--cfg", metavar="FILE", help="the network; a checkpoint knows its own")
    flags.add_argument("--device", default="", help="cpu, 0, ... (default: the first GPU, else the CPU)")
    add_resize(flags)
    args = flags.parse_args(arguments)
    device = select_device(args.device)
    precision = select_precision("auto", device)
    names = read_dataset(args.data, known_splits(args.data)[0], limits=Limits.of(args)).names
    model = load_network(args.weights, cfg=args.cfg, names=list(names)).model
    size = input_size(args.img_size, model)
    predict = Predictor(
        for_inference(model, device, precision.dtype),
        device=device,
        conf_thres=LEAST,
        agnostic=True,
        multi_label=False,
        amp=precision.autocast,
    )
    look = opinions(
        predict,
        size,
        stretch=stretches(args.resize, model),
        workers=share_cores(device, None),
        limits=Limits.of(args)._replace(max_bad=1.0),  # the doctor lists them
    )
    run(args, size, (*CHECKS, second_opinion(look)))


if __name__ == "__main__":
    run_main(main)
