"""Which sections there are and what each may say: one row per type in `SECTIONS`. Imports no torch.

Darknet's parser is the source of keys and kinds. A key that Darknet reads and that changes nothing here stands in
``other``: it passes in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from models import shapes
from models.cfg import HEAD_FILTERS

ACTIVATIONS = (
    *("linear", "leaky", "relu", "relu6", "relie", "ramp", "elu", "selu", "gelu", "tanh", "loggy", "hardtan", "lhtan"),
    *("plse", "stair", "revleaky", "mish", "hard_mish", "swish", "logistic"),
    *("normalize_channels", "normalize_channels_softmax", "normalize_channels_softmax_maxval"),
)


def at_least(low: int) -> Callable:
    def check(section, key):
        if section.int(key) < low:
            raise section.error(f"{key}={section.int(key)}, expected at least {low}", key)

    return check


def nonzero(section, key):
    if section.int(key) == 0:
        raise section.error(f"{key}=0", key)


def only(value: int) -> Callable:
    """Darknet knows other values, we do not."""

    def check(section, key):
        if section.int(key) != value:
            raise section.error(f"{key}={section.int(key)} is not supported in [{section.type}]", key, f"{key}={value}")

    return check


def positive(section, key):
    """One number or several."""
    for value in section.floats(key):
        if value <= 0:
            raise section.error(f"{key}: {value:g}, expected more than 0", key)


def between(low: float, high: float) -> Callable:
    def check(section, key):
        if not low <= section.float(key) <= high:
            raise section.error(f"{key}={section.float(key):g}, expected {low:g}..{high:g}", key)

    return check


def one_of(*known: str) -> Callable:
    return lambda section, key: section.str(key, choices=known)


def few(section, key):
    """How many of something that is made one by one."""
    if not 1 <= section.int(key) <= 1000:
        raise section.error(f"{key}={section.int(key)}, expected 1..1000", key)


KINDS: dict[str, Callable] = {  # each raises the section's CfgError
    "text": lambda section, key: section.str(key),
    "whole": lambda section, key: section.int(key),
    "natural": at_least(0),
    "count": at_least(1),
    "few": few,
    "nonzero": nonzero,
    "wholes": lambda section, key: section.ints(key),
    "number": lambda section, key: section.float(key),
    "positive": positive,
    "numbers": lambda section, key: section.floats(key),
    "activation": one_of(*ACTIVATIONS),
    "iou": one_of("mse", "iou", "giou", "diou", "ciou"),
}


def keys(**names: str) -> dict[str, Callable]:
    """``keys(count="size stride")`` -> the kind of each key."""
    return {name: KINDS[kind] for kind, group in names.items() for name in group.split()}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One section type: its shapes, its keys with the kind of their value, those that must be there, what it reads.

    ``said`` are defaults worth a warning when they are taken, because few people expect them.
    """

    infer: Callable = shapes.same
    keys: dict[str, Callable] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    reads: str = "previous"  # a key of READS
    said: dict[str, str] = field(default_factory=dict)
    other: str = ""

    @property
    def known(self) -> frozenset[str]:
        """Every key that passes."""
        return frozenset([*self.keys, *self.other.split(), *ANY.keys, *ANY.other.split()])


READS: dict[str, tuple[str | None, bool]] = {  # the key that names layers, and whether the previous one comes first
    "nothing": (None, False),
    "previous": (None, True),
    "layers": ("layers", False),
    "from": ("from", True),
    "only from": ("from", False),
}
ANY = Rule(  # keys of any layer
    keys=keys(whole="stopbackward dontload dontloadscales"),
    other="onlyforward dont_update burnin_update train_only_bn clip learning_rate",
)

WINDOW = keys(few="size", count="stride stride_x stride_y", natural="padding antialiasing")
POOL = WINDOW | keys(whole="maxpool_depth", count="out_channels")
CONVOLUTION = WINDOW | keys(whole="pad batch_normalize xnor", count="dilation groups", activation="activation")
FROM = keys(wholes="from", activation="activation")
HEAD = keys(
    numbers="anchors counters_per_class",
    few="num",
    count="classes",
    wholes="mask",
    natural="max",
    whole="focal_loss",
    number="jitter resize random ignore_thresh truth_thresh iou_thresh max_delta objectness_smooth iou_normalizer "
    "obj_normalizer cls_normalizer delta_normalizer uc_normalizer label_smooth_eps beta_nms beta1 thresh scale_x_y",
    iou="iou_loss iou_thresh_kind",
) | {"nms_kind": one_of("default", "greedynms", "diounms", "cornersnms")}
NMS = keys(number="beta_nms") | {"nms_kind": HEAD["nms_kind"]}
POINT_HEAD = NMS | keys(wholes="from", count="classes")
REGION = NMS | keys(wholes="from", count="classes pool", positive="canonical_size")
HEAD_REQUIRED = ("classes", "anchors", "num")
TRACKING = "map show_details embedding_layer track_history_size sim_thresh dets_for_track dets_for_show track_ciou_norm"

SECTIONS: dict[str, Rule] = {
    "convolutional": Rule(
        infer=shapes.convolutional,
        keys=CONVOLUTION
        | keys(count="filters", natural="group_normalize", whole="share_index binary bin_output cbn")
        | {"flipped": only(0)},
        required=("filters",),
        said={"activation": "logistic", "size": "1"},
        other="assisted_excitation sway rotate stretch stretch_sway angle grad_centr reverse coordconv dot",
    ),
    "crnn": Rule(
        infer=shapes.crnn,
        keys=CONVOLUTION
        | keys(count="hidden output")
        | dict.fromkeys(("stride", "stride_x", "stride_y", "dilation", "groups"), only(1))
        | dict.fromkeys(("antialiasing", "xnor"), only(0)),
        required=("hidden", "output"),
        said={"activation": "logistic"},
        other="shortcut time_steps",
    ),
    "connected": Rule(
        infer=shapes.connected,
        keys=keys(count="output", activation="activation", whole="batch_normalize"),
        required=("output",),
        said={"activation": "logistic"},
    ),
    "maxpool": Rule(infer=shapes.maxpool, keys=POOL),
    "local_avgpool": Rule(infer=shapes.maxpool, keys=POOL),
    "avgpool": Rule(infer=shapes.avgpool),
    "upsample": Rule(infer=shapes.upsample, keys=keys(nonzero="stride", number="scale")),
    "reorg": Rule(infer=shapes.reorg, keys=keys(count="stride", whole="reverse")),
    "reorg3d": Rule(infer=shapes.reorg, keys=keys(count="stride", whole="reverse")),
    "route": Rule(
        infer=shapes.route,
        keys=keys(wholes="layers", count="groups", whole="group_id"),
        required=("layers",),
        reads="layers",
    ),
    "shortcut": Rule(
        infer=shapes.shortcut,
        keys=FROM
        | {"weights_type": one_of("none", "per_feature", "per_layer", "per_channel")}
        | {"weights_normalization": one_of("none", "relu", "avg_relu", "softmax")},
        required=("from",),
        reads="from",
        other="assisted_excitation",
    ),
    "sam": Rule(infer=shapes.sam, keys=FROM, required=("from",), reads="from"),
    "scale_channels": Rule(
        infer=shapes.scale_channels, keys=FROM | keys(whole="scale_wh"), required=("from",), reads="from"
    ),
    "dropout": Rule(
        keys={"probability": between(0, 1)}, other="dropblock dropblock_size_rel dropblock_size_abs dropblock_size"
    ),
    "activation": Rule(keys=keys(activation="activation")),
    "batchnorm": Rule(infer=shapes.batchnorm),
    "normalization": Rule(keys=keys(number="alpha beta kappa", few="size")),
    "softmax": Rule(
        infer=shapes.softmax,
        keys=keys(count="groups", number="temperature"),
        other="tree spatial noloss hierarchy_thresh",
    ),
    "cost": Rule(keys=keys(text="type"), other="scale ratio"),
    "crop": Rule(
        infer=shapes.crop,
        keys=keys(count="crop_height crop_width", whole="noadjust"),
        required=("crop_height", "crop_width"),
        other="flip angle saturation exposure shift",
    ),
    "empty": Rule(),
    "implicit": Rule(infer=shapes.implicit, keys=keys(count="filters atoms", number="mean std"), reads="nothing"),
    "contrastive": Rule(
        keys=keys(count="classes", number="temperature cls_normalizer max_delta", whole="yolo_layer"), other="steps"
    ),
    "yolo": Rule(infer=shapes.head, keys=HEAD | keys(whole="new_coords"), required=HEAD_REQUIRED, other=TRACKING),
    "Gaussian_yolo": Rule(
        infer=shapes.head,
        keys=HEAD | {"yolo_point": one_of("center", "left_top", "right_bottom")},
        required=HEAD_REQUIRED,
        other=TRACKING,
    ),
    "region": Rule(
        infer=shapes.head,
        keys=keys(
            numbers="anchors",
            few="num",
            count="classes",
            number="coord_scale object_scale noobject_scale class_scale mask_scale thresh jitter",
            whole="coords max rescore bias_match absolute softmax random focal_loss classfix log",
        ),
        required=HEAD_REQUIRED,
        other="tree map sqrt",
    ),
    "yolox": Rule(infer=shapes.head, keys=POINT_HEAD, required=("from", "classes"), reads="only from"),
    "fcos": Rule(
        infer=shapes.fcos, keys=POINT_HEAD | keys(number="offset"), required=("from", "classes"), reads="only from"
    ),
    "rpn": Rule(infer=shapes.head, keys=keys(positive="sizes ratios", number="offset"), required=("sizes", "ratios")),
    "roi": Rule(
        infer=shapes.roi,
        keys=REGION | keys(few="fc", count="units pre_nms post_nms", number="nms_thresh min_size"),
        required=("from", "classes"),
        reads="only from",
    ),
    "mask": Rule(infer=shapes.mask, keys=REGION | keys(few="convs", count="channels"), required=("classes",)),
}
HEADS = tuple(HEAD_FILTERS)

REFUSED = {
    "rnn": "a recurrent layer",
    "lstm": "a recurrent layer",
    "gru": "a recurrent layer",
    "conv_lstm": "a recurrent layer",
    "history": "a recurrent layer",
    "detection": "the head of YOLOv1",
    "local": "the unshared convolution of YOLOv1",
    "deconvolutional": "a transposed convolution",
}

NET = Rule(
    keys=keys(
        count="width height channels inputs batch subdivisions resize_step",
        whole="max_batches burn_in sgdr_cycle sgdr_mult mosaic mixup cutmix letter_box flip",
        number="momentum decay learning_rate learning_rate_min power gamma saturation exposure hue angle aspect "
        "ema_alpha label_smooth_eps B1 B2 eps scale loss_scale",
        wholes="steps",
        numbers="scales",
    )
    | {"policy": one_of("constant", "steps", "step", "exp", "sigmoid", "poly", "random", "sgdr")},
    other="max_epochs max_crop min_crop blur gaussian_noise mosaic_bound time_steps track augment_speed step seen adam "
    "sequential_subdivisions try_fix_nan dynamic_minibatch optimized_memory workspace_size_limit_MB use_cuda_graph "
    "contrastive contrastive_jit_flip contrastive_color unsupervised attention adversarial_lr max_chart_loss "
    "seq_scales num_sigmas_reject_badlabels badlabels_rejection_percentage equidistant_point weights_reject_freq",
)
