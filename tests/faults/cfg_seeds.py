"""Small cfgs that together use every section, for the fuzz tests."""

from models.rules import ACTIVATIONS, ANY, NET, REFUSED, SECTIONS

HEAD = "[net]\nwidth=32\nheight=32\nchannels=3\n"
CONV = "[convolutional]\nbatch_normalize=1\nfilters={}\nsize=3\nstride={}\npad=1\nactivation=leaky\n"
LINEAR = "[convolutional]\nfilters={}\nactivation=linear\n"
YOLO = "[yolo]\nmask=0,1,2\nanchors=4,4, 8,8, 16,16\nclasses=2\nnum=3\n"
FIRST = HEAD + CONV.format(8, 2)
CHAINS = (  # what follows FIRST, which makes 8x16x16
    CONV.format(4, 1) + LINEAR.format(21) + YOLO,
    "[conv]\nfilters=8\nactivation=mish\n[shortcut]\nfrom=-2\nactivation=linear\n[maxpool]\nstride=2\n[upsample]\nstride=2\n"
    "[route]\nlayers=-1,-3\n" + LINEAR.format(21) + YOLO,
    "[route]\nlayers=-1\ngroups=2\ngroup_id=1\n[convolutional]\nfilters=6\ngroups=2\nsize=3\npad=1\nactivation=swish\n"
    "[maxpool]\nsize=5\nstride=1\n[local_avgpool]\nsize=2\nstride=2\n",
    "[avgpool]\n[conv]\nfilters=8\nactivation=logistic\n[scale_channels]\nfrom=0\n[sam]\nfrom=-4\n[dropout]\nprobability=.2\n"
    "[batchnorm]\n[activation]\nactivation=mish\n[empty]\n",
    "[reorg]\nstride=2\n[reorg3d]\nstride=2\n[reorg]\nreverse=1\nstride=2\n[crop]\ncrop_height=4\ncrop_width=4\n"
    "[contrastive]\n[connected]\noutput=10\nbatch_normalize=1\nactivation=linear\n[softmax]\ngroups=2\n[cost]\ntype=sse\n",
    "[normalization]\nsize=5\n[crnn]\nhidden=4\noutput=6\npad=1\nactivation=leaky\n[implicit]\nfilters=6\n[shortcut]\nfrom=-2\n"
    "weights_type=per_feature\nweights_normalization=relu\n",
    "[shortcut]\nfrom=-1\nweights_type=per_channel\nweights_normalization=softmax\n[maxpool]\nsize=2\nstride=2\nantialiasing=2\n"
    "[convolutional]\nfilters=8\nsize=3\nstride=2\npad=1\nantialiasing=1\nactivation=relu\n[maxpool]\nmaxpool_depth=1\n"
    "out_channels=4\n",
    "[conv]\nfilters=8\nsize=3\npad=1\nactivation=relu\n[conv]\nfilters=8\nsize=3\npad=1\nshare_index=-1\nactivation=relu\n"
    "[conv]\nfilters=8\ngroup_normalize=4\nsize=3\npad=1\ndilation=2\nactivation=relu\nxnor=1\n" + LINEAR.format(33)
    + YOLO.replace("[yolo]", "[Gaussian_yolo]"),
    LINEAR.format(21) + "[region]\nanchors=1,1, 2,2, 3 3,4\nclasses=2\ncoords=4\nnum=3\nsoftmax=1\n",
    LINEAR.format(4) + LINEAR.format(1) + "[route]\nlayers=0\n" + LINEAR.format(2)
    + "[yolox]\nfrom=-4,-3,-1\nclasses=2\n[fcos]\nfrom=1,4\nclasses=2\n",
    LINEAR.format(15) + "[rpn]\nsizes=8\nratios=.5,1,2\n[route]\nlayers=0\n" + CONV.format(8, 2)
    + "[roi]\nfrom=0,-1\nclasses=2\nunits=16\n[mask]\nclasses=2\nchannels=8\nconvs=2\n",
    LINEAR.format(21).replace("linear", "logistic") + YOLO + "new_coords=1\nscale_x_y=2.0\nnms_kind=greedynms\n",
)  # fmt: skip
SEEDS = [(FIRST + chain).encode() for chain in CHAINS]
SEEDS += [
    f"{HEAD}policy=steps\nsteps=1\nscales=.1\nbatch=64\nbatch=64\n[conv] # x\nfilters=4 ; y\n".encode(),
    "# caf\u00e9\r\n[net]\r\ninputs = 8\r\n[connected]\r\noutput=4\r\n".encode("latin-1"),
]
KEYS = sorted({key for rule in (*SECTIONS.values(), NET, ANY) for key in rule.known})
TOKENS = [
    f"\n{word}\n".encode()
    for word in (
        *(f"[{name}]" for name in (*SECTIONS, *REFUSED)),
        *(f"{key}={value}" for key in KEYS for value in (1, 2)),
        *(f"activation={name}" for name in ACTIVATIONS),
    )
]
