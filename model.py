"""Lesson 2, model: from a picture to a text. Convolutions read columns of the picture, a recurrent
layer reads the columns in order, and CTC makes text of it.

    network = CRNN(alphabet)                         # 32 x 128 pixels, 32 time steps
    logits = network(images)                         # uint8 (B, 3, 32, 128) to (32, B, C)
    texts = greedy_decode(logits, alphabet)          # ["皖AX511H", ...]
    network, content = load_checkpoint("ckpt.pth")

B is the number of images, T the number of time steps, C = len(alphabet) + 1 the number of classes.
Shi, Bai and Yao, 2015 (arXiv:1507.05717) for the network; Graves et al., ICML 2006, for CTC.

The pictures come from data.py (lesson 1); train.py (lesson 3) finds the weights. First come the
networks, then CTC: its loss, and three ways from logits to text, from quick to careful.

Copy this file into any project; it imports no other of ours.
"""

import functools
import itertools
import math
import os
import zipfile
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import Conv2dNormActivation as ConvNorm  # convolution, batch-norm, relu

BLANK = 0  # CTC's class for "no new character"; character k of the alphabet is class k + 1

# ---------------------------------------------------------------------------------------
# The networks

RECURRENT = {"lstm": nn.LSTM, "gru": nn.GRU}


class CRNN(nn.Module):
    """Our network, "small": strided convolutions down to one row of width / 4 columns, one
    recurrent layer, and a skip connection past it.

    size: (height, width) of the images. rnn: "lstm" or "gru"."""

    def __init__(self, alphabet, size=(32, 128), rnn="lstm", bidirectional=True):
        super().__init__()
        self.cnn = nn.Sequential(  # (B, 3, 32, 128), for example: red, green, blue
            ConvNorm(3, 32, stride=2),  # (B, 32, 16, 64)
            ConvNorm(32, 32),  # more features before detail is given up
            ConvNorm(32, 64, stride=2),  # (B, 64, 8, 32)
            ConvNorm(64, 64),
            # from here on only rows merge: a character keeps its columns
            ConvNorm(64, 96, stride=(2, 1)),  # (B, 96, 4, 32)
            ConvNorm(96, 96),
            ConvNorm(96, 192, stride=(2, 1)),  # (B, 192, 2, 32)
            # the rows that are left become one
            ConvNorm(192, 256, kernel_size=(math.ceil(size[0] / 16), 1), padding=0),
        )
        self.rnn = RECURRENT[rnn](256, 96, bidirectional=bidirectional)
        self.fc = nn.Linear(96 * (1 + bidirectional), len(alphabet) + 1)
        self.skip = nn.Linear(256, len(alphabet) + 1)

    def forward(self, images):
        """uint8 (B, 3, H, W) to logits (T, B, C), with T = W / 4."""
        x = images.float() / 255  # (B, 3, H, W)
        # mean 0 and deviation 1 in each channel of each image, so that night, haze and the
        # camera's white balance look alike; an even picture stays even
        x = x - x.mean((2, 3), keepdim=True)  # torch.std_mean takes three times as long
        x = x / (x.square().mean((2, 3), keepdim=True).sqrt() + 0.03)
        x = self.cnn(x)  # (B, 256, 1, T)
        x = x.squeeze(2).permute(2, 0, 1)  # (T, B, 256)
        hidden = self.rnn(x)[0]  # (T, B, 96, or 192 if bidirectional)
        # The recurrent layer learns late. Along the skip connection gradients reach the
        # convolutions from the first step, and CTC's all-blank phase ends early.
        return self.fc(hidden) + self.skip(x)  # (T, B, C)


class NotebookCRNN(nn.Module):
    """The baseline's network: five blocks of two convolutions and a max-pool, the mean over the
    height, a linear map from width / 32 columns to 20 time steps, two recurrent layers.

    size: (height, width) of the images. rnn: "lstm" or "gru"."""

    def __init__(self, alphabet, size, rnn, bidirectional):
        super().__init__()
        self.cnn = nn.Sequential()
        c_in = 3
        for c_out in (32, 64, 128, 256, 512):
            block = [ConvNorm(c_in, c_out), ConvNorm(c_out, c_out), nn.MaxPool2d(2, ceil_mode=True)]
            self.cnn.extend(block)
            c_in = c_out
        self.proj = nn.Linear(math.ceil(size[1] / 32), 20)
        self.rnn = RECURRENT[rnn](512, 256, 2, dropout=0.3, bidirectional=bidirectional)
        self.fc = nn.Linear(256 * (1 + bidirectional), len(alphabet) + 1)

    def forward(self, images):
        """uint8 (B, 3, H, W) to logits (T, B, C), with T = 20."""
        x = images.float() / 255  # (B, 3, H, W), in [0, 1]
        x = self.cnn(x)  # (B, 512, H / 32, W / 32)
        x = x.mean(2)  # (B, 512, W / 32)
        x = self.proj(x)  # (B, 512, T)
        x = x.permute(2, 0, 1)  # (T, B, 512)
        return self.fc(self.rnn(x)[0])  # (T, B, C)


# --model NAME takes a class from here. To add your own: it is built with alphabet, size, rnn and
# bidirectional, whether it needs them or not. It takes uint8 images (B, 3, H, W) and gives logits
# (T, B, C): T time steps, at least one a character, and C = len(alphabet) + 1 classes, of which
# the first is the blank. Reading makes one layer of a ConvNorm's convolution and batch-norm. All
# else is free; it trains with the recipe of "small" (see train.py).
NETWORKS = {"small": CRNN, "notebook": NotebookCRNN}


def build_network(model, **config):
    """The network that a config describes: model is a key of NETWORKS, the rest what its class
    takes. It keeps the config, which is of plain types, as network.config. Raises OSError for a
    size or an alphabet that a user had better not give."""
    alphabet = config["alphabet"]
    height, width = config["size"]
    if not (
        # a read may become the name of a file, and a line on a terminal
        alphabet.isprintable()
        and not set(alphabet) & set("/\\")
        and 0 < len(alphabet) < 100_000  # of a stranger's: no network that fills the memory
        and type(height) is type(width) is int
        and 16 <= height <= 512
        and 64 <= width <= 2048
        and type(config["bidirectional"]) is bool
    ):
        raise OSError(f"--size {height} {width}: give 16 64 to 512 2048, and no / in --alphabet")
    network = NETWORKS[model](**config)
    network.to(memory_format=torch.channels_last)  # the layout of fast convolutions
    network.config = {"model": model, **config}
    return network


# ---------------------------------------------------------------------------------------
# CTC: the loss, and the probability of a string


def steps_needed(text):
    """The time steps CTC needs for `text`: one a character, and a blank between equal ones."""
    return len(text) + sum(map(str.__eq__, text, text[1:]))


def ctc_loss(logits, texts, alphabet, reduction="mean"):
    """The CTC loss of logits (T, B, C) for B strings: the mean in nats per character, or with
    reduction="none" the loss of each string in nats, float32 (B,).

    The loss is minus the logarithm of the probability of a string, summed exactly over all its
    alignments to the T steps (Graves et al., 2006); inf if the string needs more than T steps."""
    # float32: sums over alignments do not survive half precision
    log_probs = logits.float().log_softmax(2)
    targets = torch.tensor([alphabet.index(char) + 1 for char in "".join(texts)])
    targets = targets.to(logits.device, non_blocking=True)  # so that no GPU is waited for
    lengths = list(map(len, texts))
    steps = len(texts) * [len(logits)]
    return F.ctc_loss(log_probs, targets, steps, lengths, BLANK, reduction)


def probabilities(logits, texts, alphabet):
    """The exact probability of each of B strings given its image, in [0, 1]: float32 (B,)."""
    return (-ctc_loss(logits, texts, alphabet, "none")).exp()


# ---------------------------------------------------------------------------------------
# CTC: from logits to text
#
# A plate pattern says for every place which characters may stand there: a sequence of strings.


def greedy_decode(logits, alphabet):
    """The best path of each image, repeats merged, blanks dropped: (T, B, C) to B strings."""
    return [
        "".join(alphabet[c - 1] for c, _ in itertools.groupby(path) if c != BLANK)
        for path in logits.argmax(2).T.tolist()  # the best class of each time step
    ]


def is_plate(text, patterns):
    """Whether `text` is a whole string of one of `patterns`."""
    return any(
        len(pattern) == len(text) and all(map(str.__contains__, pattern, text))
        for pattern in patterns
    )


def beam_search(log_probs, alphabet, patterns=(), beam_width=12):
    """The likeliest strings of one image, best first, by CTC prefix beam search.

    log_probs: (T, C), float. A beam is a prefix with two probabilities: of all paths that spell
    it and end in a blank, and of those that end in its last character. We need both: after a
    blank an equal character is a new one, after itself it is the same one (Graves, 2006; Hannun,
    2017, distill.pub/2017/ctc). Two steps, in each of which blank has .6 and A has .4:

        beam    after one step         after two steps
                blank   character      blank               character
        ""      .6      0              .6 * .6 = .36       0
        "A"     0       .4             .4 * .6 = .24       .4 * .4 + .6 * .4 = .40

    So "A" wins with .64, though the best path is blank twice, with .36. With `patterns`, prefixes
    which no plate begins with are dropped. Each step tries the classes that are likely at all."""
    beams = {"": (1.0, 0.0)}
    fitting = {"": patterns}  # the patterns of the plates that each prefix begins
    # as shares of the step's best: products of many small numbers would come to 0
    shares = (log_probs - log_probs.amax(1, keepdim=True)).exp()
    for blank_share, *char_shares in shares.tolist():
        following = defaultdict(lambda: [0.0, 0.0])
        # the blank always: if no character fits the patterns here, it carries the prefix on
        for prefix, beam in beams.items():
            following[prefix][0] = sum(beam) * blank_share
        for char, share in zip(alphabet, char_shares):
            if share < 1e-3:
                continue
            for prefix, (ends_blank, ends_char) in beams.items():
                so_far = ends_blank + ends_char
                if prefix[-1:] == char:
                    # the same character goes on; a new one needs a blank between
                    following[prefix][1] += ends_char * share
                    so_far = ends_blank
                text = prefix + char
                if text not in fitting:
                    k = len(prefix)
                    fitting[text] = [p for p in fitting[prefix] if k < len(p) and char in p[k]]
                if fitting[text] or not patterns:
                    following[text][1] += so_far * share
        best = sorted(following.items(), key=lambda beam: -sum(beam[1]))
        beams = dict(best[:beam_width])
    return [text for text in beams if not patterns or is_plate(text, patterns)]


def candidates(views, texts, alphabet):
    """Strings of one image with their probabilities: [(text, probability), ...], the best first.

    views: logits (T, V, C) of the image, seen in V ways. A probability is the mean over the views
    of the exact one."""
    # every view with every string: (T, V * number of texts, C)
    repeated = views.repeat_interleave(len(texts), 1)
    shares = probabilities(repeated, texts * views.shape[1], alphabet)
    means = shares.view(-1, len(texts)).mean(0)  # over the views
    return sorted(zip(texts, means.tolist()), key=lambda pair: -pair[1])


# ---------------------------------------------------------------------------------------
# Devices and precisions


def pick_device(name=None):
    """The device called `name`, or CUDA where there is one, or the CPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":  # each of torchrun's processes has its own
        name = f"cuda:{os.getenv('LOCAL_RANK', 0)}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # torch built without CUDA asserts
        raise OSError(f"--device {name}: not on this machine; give cpu, or nothing") from None


@functools.lru_cache  # with many cores the file is long
def pick_precision(device):
    """The fastest of "bf16", "fp16" and "fp32" that the device has circuits for.

    Always the same on one machine, so that a seed gives the same weights."""
    if device.type == "cuda":
        # bf16 that an older GPU emulates is slower than fp16
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # Many CPUs imitate bf16 at a fifth of their float32 speed. Linux tells which do not; where
    # nothing is told or was measured, as on ARM, float32 is never slow.
    flags = Path("/proc/cpuinfo")
    return "bf16" if flags.exists() and "avx512_bf16" in flags.read_text() else "fp32"


def autocast(device, precision):
    """The context in which a network runs in `precision`."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def images_at_once(network):
    """How many images to read at a time: so few that all activations stay in a CPU's cache."""
    return max(1, 350_000 // math.prod(network.config["size"]))


@torch.inference_mode()
def predict_logits(network, images, precision="fp32"):
    """uint8 (B, 3, H, W) on any device to float32 logits (T, B, C) on the CPU."""
    device = next(network.parameters()).device
    pieces = images.split(images_at_once(network))
    with autocast(device, precision):
        logits = [network(piece.to(device, non_blocking=True)).float() for piece in pieces]
    return torch.cat(logits, 1).cpu()  # decoding is many small steps, for which a GPU would wait


# ---------------------------------------------------------------------------------------
# Checkpoints: {"model": weights, "config": see build_network, "args": {"data": a folder or None,
# "labels": hashes of those learnt}, "history": a dict of numbers for each epoch}, and what the
# trainer adds, in plain types.


def is_checkpoint(path):
    """Whether a path, whatever its name, may be that of a checkpoint: these are zip archives."""
    return os.path.isfile(path) and zipfile.is_zipfile(path)


def fold_norms(network):
    """Make the batch-norm of a ConvNorm a part of its convolution: the same function, less work."""
    for block in network.modules():
        norm = block[1] if isinstance(block, ConvNorm) and len(block) > 1 else None
        if isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            block[0] = fuse_conv_bn_eval(block[0], norm)
            block[1] = nn.Identity()


def load_checkpoint(path, device="cpu"):
    """A checkpoint of train.py: (network ready to read, all that the file holds).

    To train on, load content["model"] into build_network(**content["config"]): this network is in
    eval mode, and its batch-norms are folded. Files of strangers cannot run code, nor fill the
    memory. Raises OSError with one sentence."""
    size = os.path.getsize(path)  # of no such file Python says so
    try:
        if not is_checkpoint(path):
            raise ValueError
        with zipfile.ZipFile(path) as archive:
            # unpacked, a small file could fill the memory
            if sum(part.file_size for part in archive.infolist()) > size:
                raise ValueError
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises all kinds of errors
        raise OSError(
            f"{path}: not a checkpoint, locked or damaged; give a file that train.py wrote"
        ) from None
    try:
        args = content["args"]
        rows = content["history"]
        weights = dict(content["model"])  # without _metadata, which could have them not copied
        # a file can name one row, or one number, many times
        claimed = sum(map(len, rows)) + sum(weight.nbytes for weight in weights.values())
        if claimed > size or not type(rows) is type(args["labels"]) is list:
            raise ValueError("no lists, or more than the file can hold")
        numbers = set(args["labels"]).union(*map(dict.values, rows))
        is_plain = {*map(type, numbers)} <= {int, float}
        if not (is_plain and isinstance(args["data"], (str, type(None)))):
            raise ValueError("its args or history")
        network = build_network(**content["config"])
        # copies, to float32, what has the same name and shape
        network.load_state_dict(weights)
    except Exception as error:  # a key that is absent, and all that a stranger's file may hold
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise OSError(
            f"{path}: made by another model.py, or not by train.py ({reason[:300]})"
        ) from None
    fold_norms(network.eval())
    if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
        raise OSError(f"{path}: its weights are not finite; train again with a lower --lr")
    return network.to(device), content
