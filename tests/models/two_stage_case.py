"""A network in two stages small enough for a test, and a batch for it."""

import torch

from models.cfg import parse_cfg
from models.darknet import Darknet
from models.losses import build_criterion
from utils.structures import Targets

SIZE = (96, 128)
NET = "[net]\nwidth=128\nheight=96\nchannels=3\n"
CONV = "[convolutional]\nfilters={}\nsize={}\nstride={}\npad=1\nactivation={}\n"
PYRAMID = NET + CONV.format(12, 3, 4, "leaky") + CONV.format(12, 3, 2, "leaky")  # layers 0 and 1, strides 4 and 8
RPN = (
    "[route]\nlayers=0\n" + CONV.format(30, 1, 1, "linear") + "[rpn]\nsizes=12,20\nratios=.5,1,2\noffset=.5\n"
)  # 2 to 4
RPN += "[route]\nlayers=1\n" + CONV.format(30, 1, 1, "linear") + "share_index=3\n[rpn]\nsizes=32,56\nratios=.5,1,2\n"
ROI = "[roi]\nfrom=0,1\nclasses=3\npool=5\nunits=24\ncanonical_size=64\npost_nms=40\n"
MASK = "[mask]\nclasses=3\ncanonical_size=64\npool=6\nconvs=1\nchannels=8\n"
BOXES = PYRAMID + RPN + ROI
MASKS = BOXES + MASK

OBJECTS = [  # image, label, box; picture 1 has none
    (0, 0, (8.0, 10.0, 30.0, 30.0)),
    (0, 2, (50.0, 20.0, 110.0, 80.0)),
    (2, 1, (60.0, 40.0, 76.0, 60.0)),
]


def make_network(text=MASKS, seed=0):
    torch.manual_seed(seed)
    return Darknet(parse_cfg(text, "my.cfg"))


def make_images(seed=1, num=3):
    return torch.rand(num, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def make_targets(objects=OBJECTS, masks=True, **ignore):
    image, labels, boxes = zip(*objects) if objects else ((), (), ())
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    pixels = torch.ones(len(boxes), 28, 28, dtype=torch.uint8)
    pixels[:, :, 14:] = 0  # the left half
    image, labels = (torch.tensor(values, dtype=torch.int64) for values in (image, labels))
    return Targets.of(image, labels, boxes, masks=pixels if masks else None, **ignore)


def make_criterion(model, **keys):
    loss = {"name": "two_stage", "num_samples": 32, **keys}
    return build_criterion({"name": "rpn", "num_samples": 64}, loss, model.num_classes, "test.yaml", model.heads)
