"""The CRNN: convolutions read columns of an image, a recurrent layer reads the columns in order,
and CTC makes text of it.

    network = CRNN(alphabet)                         # 32 x 128 pixels, 32 time steps
    logits = network(images)                         # uint8 (B, 3, 32, 128) to (32, B, C)
    texts = greedy_decode(logits, alphabet)          # ["皖AX511H", ...]
    network, info = load_checkpoint("ckpt.pth")

B is the number of images, T the number of time steps, C = len(alphabet) + 1 the number of classes.
Shi, Bai and Yao, 2015 (arXiv:1507.05717) for the network; Graves et al., ICML 2006, for CTC.

Copy this file into any project; it imports no other of ours.
"""

import re
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

BLANK = 0  # CTC's class for "no new character"; character k of the alphabet is class k + 1

# ---------------------------------------------------------------------------------------
# The networks


class ConvNorm(nn.Module):
    """Convolution, batch-norm, max-pool if asked, relu.

    Relu after the pool gives the same numbers as before it, on a quarter of the pixels."""

    def __init__(self, c_in, c_out, kernel=3, stride=1, padding=1, pool=False):
        super().__init__()
        # no bias: batch-norm takes every constant away again
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(c_out)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x):
        x = self.norm(self.conv(x))  # (B, c_out, H', W'), smaller by the stride
        x = self.pool(x)  # (B, c_out, H' / 2, W' / 2) if it pools
        return F.relu(x, inplace=True)  # in place: training keeps one copy less in memory


RECURRENT = {"lstm": nn.LSTM, "gru": nn.GRU}


def check_size(size, rows, columns):
    """Raise ValueError unless the convolutions can halve a picture of this (height, width)."""
    height, width = size
    height_fits = height in range(rows, 513, rows)
    # narrower ones would leave CRNN fewer than 16 time steps, too few for some plates
    width_fits = width in range(64, 2049, columns)
    if not (height_fits and width_fits):
        raise ValueError(
            f"--size {height} {width}: this network takes multiples of {rows} x {columns}, "
            f"from {rows} x 64 to 512 x 2048"
        )


def run_recurrent(layer, x):
    """The outputs (T, B, hidden) of a recurrent layer for x (T, B, features)."""
    if not x.is_cuda:
        return layer(x)[0]
    # under autocast cuDNN would compute in float16, where small gradients become zero
    with torch.autocast("cuda", enabled=False):
        return layer(x.float())[0]


# The convolutions of CRNN, from the image on: (channels, stride in rows, stride in columns).
# Where the shape changes, it stands behind the layer, for an image of 32 x 128.
LAYERS = (
    (32, 2, 2),  # (B, 32, 16, 64)
    (32, 1, 1),  # more features before detail is given up
    (64, 2, 2),  # (B, 64, 8, 32)
    (64, 1, 1),
    (128, 2, 1),  # (B, 128, 4, 32): from here on only rows merge, a character keeps its columns
    (128, 1, 1),
    (192, 2, 1),  # (B, 192, 2, 32)
    (256, 1, 1),  # (B, 256, 2, 32)
)
OLD_LAYERS = (LAYERS[0], LAYERS[2], *LAYERS[4:])  # of checkpoints that do not name theirs


class CRNN(nn.Module):
    """Our network, "small": strided convolutions down to one row of width / 4 columns, one
    recurrent layer, and a straight line past it.

    size: (height, width) of the images, multiples of 16 and 4. rnn: "lstm" or "gru"."""

    default_size = (32, 128)

    def __init__(
        self,
        alphabet,
        size=None,
        rnn="lstm",
        bidirectional=True,
        hidden_size=96,
        layers=LAYERS,
    ):
        super().__init__()
        size = size or self.default_size
        check_size(size, 16, 4)
        # what rebuilds this network, in plain types, for the checkpoint
        self.config = {
            "preset": "small",
            "alphabet": alphabet,
            "size": list(size),
            "rnn": rnn,
            "bidirectional": bidirectional,
            "hidden_size": hidden_size,
            "layers": [list(layer) for layer in layers],
        }
        self.steps = size[1] // 4
        classes = len(alphabet) + 1
        self.cnn = nn.Sequential()
        c_in = 3  # red, green, blue
        for c_out, rows, columns in layers:
            self.cnn.append(ConvNorm(c_in, c_out, stride=(rows, columns)))
            c_in = c_out
        rows_left = size[0] // 16
        # they become one
        self.cnn.append(ConvNorm(c_in, 256, kernel=(rows_left, 1), padding=0))
        self.rnn = RECURRENT[rnn](256, hidden_size, bidirectional=bidirectional)
        hidden = hidden_size * (1 + bidirectional)
        self.fc = nn.Linear(hidden, classes)
        self.shortcut = nn.Linear(256, classes)

    def normalise(self, images):
        """uint8 to float32 with mean 0 and deviation 1 in every channel of every image.

        So night, haze and the camera's white balance look alike."""
        x = images.float() / 255
        mean = x.mean((2, 3), keepdim=True)
        x = x - mean
        variance = x.square().mean((2, 3), keepdim=True)
        deviation = variance.sqrt()
        return x / (deviation + 0.03)  # an even picture stays even

    def forward(self, images):
        """uint8 (B, 3, H, W) to logits (T, B, C), with T = W / 4."""
        x = self.normalise(images)  # (B, 3, H, W)
        x = x.contiguous(memory_format=torch.channels_last)  # the layout of fast convolutions
        x = self.cnn(x)  # (B, 256, 1, T)
        x = x.squeeze(2).permute(2, 0, 1)  # (T, B, 256)
        # Synthetic and real characters share no feature exactly, so none may decide alone.
        x = F.dropout(x, 0.25, self.training)
        hidden = run_recurrent(self.rnn, x)  # (T, B, hidden_size, twice if bidirectional)
        # The recurrent layer learns late. Along the straight line gradients reach the
        # convolutions from the first step, and CTC's all-blank phase ends early.
        return self.fc(hidden) + self.shortcut(x)  # (T, B, C)


class NotebookCRNN(nn.Module):
    """The notebook's network: five blocks of two convolutions and a max-pool, the mean over the
    height, a linear map from width / 32 columns to `steps` time steps, two recurrent layers.

    size: (height, width) of the images, multiples of 32. rnn: "lstm" or "gru"."""

    default_size = (96, 448)

    def __init__(
        self,
        alphabet,
        size=None,
        rnn="lstm",
        bidirectional=False,
        hidden_size=256,
        steps=20,
    ):
        super().__init__()
        size = size or self.default_size
        check_size(size, 32, 32)
        self.config = {
            "preset": "notebook",
            "alphabet": alphabet,
            "size": list(size),
            "rnn": rnn,
            "bidirectional": bidirectional,
            "hidden_size": hidden_size,
            "steps": steps,
        }
        self.steps = steps
        layers = []
        channels = (3, 32, 64, 128, 256, 512)
        for c_in, c_out in zip(channels, channels[1:]):
            layers.append(ConvNorm(c_in, c_out))
            layers.append(ConvNorm(c_out, c_out, pool=True))
        self.cnn = nn.Sequential(*layers)
        self.proj = nn.Linear(size[1] // 32, steps)
        self.rnn = RECURRENT[rnn](512, hidden_size, 2, dropout=0.3, bidirectional=bidirectional)
        hidden = hidden_size * (1 + bidirectional)
        self.fc = nn.Linear(hidden, len(alphabet) + 1)

    def forward(self, images):
        """uint8 (B, 3, H, W) to logits (T, B, C), with T = steps."""
        x = images.float() / 255  # (B, 3, H, W), in [0, 1]
        x = x.contiguous(memory_format=torch.channels_last)  # the layout of fast convolutions
        x = self.cnn(x)  # (B, 512, H / 32, W / 32)
        x = x.mean(2)  # (B, 512, W / 32)
        x = self.proj(x)  # (B, 512, T)
        x = x.permute(2, 0, 1)  # (T, B, 512)
        return self.fc(run_recurrent(self.rnn, x))  # (T, B, C)


NETWORKS = {"small": CRNN, "notebook": NotebookCRNN}


def build_network(config):
    """The network that a config describes; config is that of a network or a checkpoint."""
    config = dict(config)
    if not isinstance(config["alphabet"], str):
        raise TypeError("the alphabet is not a string")
    if "hidden" in config:  # the name in older checkpoints
        config["hidden_size"] = config.pop("hidden")
    preset = config.pop("preset")
    if preset == "small":
        config.pop("steps", None)  # older checkpoints name it, though the width decides
        config.setdefault("layers", OLD_LAYERS)
    return NETWORKS[preset](**config)


def fold_norms(network):
    """Merge each batch-norm into its convolution, in place: the same function, less work.

    For prediction only. Returns the network in eval mode."""
    network.eval()
    for layer in network.cnn:
        layer.conv = fuse_conv_bn_eval(layer.conv, layer.norm)
        layer.norm = nn.Identity()
    return network


# ---------------------------------------------------------------------------------------
# CTC: the loss, and the probability of a string


def steps_needed(text):
    """The time steps CTC needs for `text`: one a character, and a blank between equal ones."""
    neighbours = zip(text, text[1:])
    repeats = sum(a == b for a, b in neighbours)
    return len(text) + repeats


def encode(texts, alphabet):
    """Strings to classes on the CPU, int64: (targets, all in a row; lengths, one a string)."""
    targets = [alphabet.index(char) + 1 for char in "".join(texts)]
    targets = torch.tensor(targets, dtype=torch.int64)
    lengths = [len(text) for text in texts]
    lengths = torch.tensor(lengths, dtype=torch.int64)
    return targets, lengths


def string_log_probs(logits, texts, alphabet):
    """The exact log-probability of each string given its image: float32 (B,), at most 0.

    It is the sum over all alignments of the string to the T steps (Graves et al., 2006); -inf
    if the string needs more than T steps. logits: (T, B, C) of any precision."""
    if not texts:
        return logits.new_zeros(0, dtype=torch.float32)
    # float32: sums over alignments do not survive half precision
    log_probs = logits.float().log_softmax(2)
    if log_probs.device.type == "mps":  # which has no CTC loss
        log_probs = log_probs.cpu()
    targets, lengths = encode(texts, alphabet)
    steps = torch.full_like(lengths, len(logits))
    loss = F.ctc_loss(log_probs, targets, steps, lengths, BLANK, reduction="none")
    return -loss.to(logits.device)


def ctc_loss(logits, texts, alphabet):
    """The CTC loss of each image in nats a character: float32 (B,). logits: (T, B, C)."""
    lengths = torch.tensor([len(text) or 1 for text in texts])
    lengths = lengths.to(logits.device, non_blocking=True)
    return -string_log_probs(logits, texts, alphabet) / lengths


# ---------------------------------------------------------------------------------------
# CTC: from logits to text
#
# A plate pattern says for every place which characters may stand there: a sequence of strings.


def greedy_decode(logits, alphabet):
    """The best path of each image, repeats merged, blanks dropped: (T, B, C) to B strings."""
    texts = []
    for path in logits.argmax(2).T.tolist():  # the best class of each time step
        text = ""
        previous = BLANK
        for current in path:
            if current != previous and current != BLANK:
                text += alphabet[current - 1]
            previous = current
        texts.append(text)
    return texts


LEAST_SHARE = 1e-3  # of the step's best probability; beam search passes over rarer classes


def allow(patterns, place, char):
    """Those of `patterns` that allow `char` at `place`."""
    return [p for p in patterns if place < len(p) and char in p[place]]


def is_plate(text, patterns):
    """Whether `text` is a whole string of one of `patterns`."""
    patterns = [p for p in patterns if len(p) == len(text)]
    for place, char in enumerate(text):
        patterns = allow(patterns, place, char)
    return bool(patterns)


def beam_search(log_probs, alphabet, patterns=(), beam_width=12, classes=6):
    """The likeliest strings of one image, best first, by CTC prefix beam search.

    log_probs: (T, C), float. A beam is a prefix with two probabilities: of all paths that spell
    it and end in a blank, and of those that end in its last character. We need both: after a
    blank an equal character is a new one, after itself it is the same one (Graves, 2006; Hannun,
    2017, distill.pub/2017/ctc). With `patterns`, prefixes which no plate begins with are dropped.
    Each step tries its likeliest `classes`, if they are likely at all."""
    beams = {"": (1.0, 0.0)}
    fitting = {"": patterns}  # the patterns of the plates that each prefix begins
    classes = min(classes, log_probs.shape[1])
    likeliest = log_probs.topk(classes, 1).indices
    # as shares of the step's best: products of many small numbers would come to 0
    largest = log_probs.amax(1, keepdim=True)
    shares = (log_probs - largest).exp()
    for step_shares, top_classes in zip(shares.tolist(), likeliest.tolist()):
        longer = defaultdict(lambda: [0.0, 0.0])
        for c in {BLANK, *top_classes}:
            share = step_shares[c]
            # the blank always: where no plate can go on with any other, it passes over the step
            if share < LEAST_SHARE and c != BLANK:
                continue
            for prefix, (ends_blank, ends_char) in beams.items():
                before = ends_blank + ends_char
                if c == BLANK:
                    longer[prefix][0] += before * share
                    continue
                char = alphabet[c - 1]
                if prefix[-1:] == char:
                    # the same character goes on; a new one needs a blank between
                    longer[prefix][1] += ends_char * share
                    before = ends_blank
                text = prefix + char
                if text not in fitting:
                    fitting[text] = allow(fitting[prefix], len(prefix), char)
                if fitting[text] or not patterns:
                    longer[text][1] += before * share
        best = sorted(longer, key=lambda prefix: -sum(longer[prefix]))
        beams = {prefix: longer[prefix] for prefix in best[:beam_width]}
    texts = list(beams)
    if patterns:
        texts = [text for text in texts if is_plate(text, patterns)]
    return texts


def decode(logits, alphabet):
    """Greedy decoding: (B strings, B probabilities). logits: (T, B, C).

    The probability is that of the whole string, exactly."""
    logits = logits.float().cpu()  # many small steps: a GPU would only wait
    texts = greedy_decode(logits, alphabet)
    probabilities = string_log_probs(logits, texts, alphabet).exp()
    return texts, probabilities.tolist()


def candidates(looks, alphabet, patterns=()):
    """The likeliest strings of one image as [(text, probability), ...], the most probable first.

    looks: logits (T, V, C) of the image, seen in V ways. The strings come from the first look;
    a probability is the mean of the exact ones of all looks. With `patterns` all strings are
    plates; the list is empty if nothing in the image looks like one."""
    log_probs = looks[:, 0].float().log_softmax(1)  # (T, C)
    texts = beam_search(log_probs, alphabet, patterns)
    count = looks.shape[1]
    # every look with every string: (T, V times number of texts, C)
    repeated = looks.repeat_interleave(len(texts), 1)
    probabilities = string_log_probs(repeated, texts * count, alphabet).exp()
    probabilities = probabilities.view(count, len(texts)).mean(0)
    pairs = zip(texts, probabilities.tolist())
    return sorted(pairs, key=lambda pair: -pair[1])


# ---------------------------------------------------------------------------------------
# Devices and precisions

CACHE_PIXELS = 350_000  # so many pixels at a time keep all activations in a CPU's cache


def pick_device(name="auto"):
    """The device to run on: `name`, or the first there is of CUDA, Apple's MPS and the CPU.

    Raises ValueError if there is no such device."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device {name}: not on this machine; drop it, or give cpu") from None
    return device


def pick_precision(name, device):
    """`name`, or for "auto" the fastest of bf16, fp16 and fp32 that the device has circuits for."""
    if name != "auto":
        return name
    if device.type == "cuda":
        # bf16 that an older GPU emulates is slower than fp16
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        # other CPUs only imitate bf16, at a fifth of their float32 speed
        for question in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            if getattr(torch.cpu, question, bool)():  # older versions of torch lack them
                return "bf16"
    return "fp32"


def autocast(device, precision):
    """The context in which a network runs in `precision`."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    is_half = precision != "fp32"
    return torch.autocast(device.type, dtype, enabled=is_half)


def images_at_once(network):
    """How many images a network reads best at a time on its device."""
    height, width = network.config["size"]
    device = next(network.parameters()).device
    if device.type != "cpu":
        return 256
    return max(1, CACHE_PIXELS // (height * width))


@torch.inference_mode()
def predict_logits(network, images, precision="fp32"):
    """uint8 (B, 3, H, W) on any device to float32 logits (T, B, C) on the network's device."""
    device = next(network.parameters()).device
    logits = []
    for piece in images.split(images_at_once(network)):
        piece = piece.to(device, non_blocking=True)
        with autocast(device, precision):
            logits.append(network(piece).float())
    return torch.cat(logits, 1)


# ---------------------------------------------------------------------------------------
# Checkpoints: {"model": weights, "config": see build_network, and what the trainer adds:
# "args", "metrics"}, all in plain types, and read with weights_only=True.


def make_checkpoint(network, **info):
    """What a checkpoint holds: a copy of the weights, the config, and `info`."""
    weights = {}
    for name, value in network.state_dict().items():
        weights[name] = value.cpu().clone()
    return {"model": weights, "config": network.config, **info}


def companion(path, suffix):
    """The path of another file of the run that writes `path`: ckpt.pth has ckpt.csv beside it."""
    return Path(str(path).removesuffix(".pth") + suffix)


def one_line(error):
    """An error's own words, cut to fit into one of our sentences."""
    return " ".join(str(error).split())[:100] or type(error).__name__


def read_content(path):
    """What torch.save wrote to `path`, plain types only. Raises ValueError with one sentence."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        advice = "name one that is there, or train one: python train.py"
        raise ValueError(f"{path}: no such checkpoint or folder; {advice}") from None
    except Exception as error:  # broken files raise all kinds of errors
        reason = f"not a whole checkpoint ({one_line(error)})"
        raise ValueError(f"{path}: {reason}; train it again or copy it again") from None


def load_checkpoint(path, alphabet="", device="cpu"):
    """A checkpoint of train.py, or one the notebook saved: (network in eval mode, info).

    info: what the trainer added to it. The notebook's checkpoints hold no alphabet: `alphabet`
    is for them. Raises ValueError with one sentence for any other file."""
    content = read_content(path)
    try:
        if "state_dict" in content:
            content = convert_notebook(content["state_dict"], alphabet)
        with torch.device("meta"):  # shapes without memory, whatever sizes the file asks for
            network = build_network(content["config"])
        network.load_state_dict(content["model"], assign=True)
        network.to(torch.float32)  # whatever precision they were stored in
        values = network.state_dict().values()
        is_finite = all(value.isfinite().all() for value in values)
    except Exception as error:  # a file that we did not write can be wrong in every way
        origin = "not a checkpoint of train.py or of the notebook, or does not fit model.py"
        raise ValueError(f"{path}: {origin} ({one_line(error)})") from None
    if not is_finite:
        raise ValueError(f"{path}: some weights are not numbers; train it again with a lower --lr")
    info = {}
    for key in ("args", "metrics"):
        if isinstance(content.get(key), dict):
            info[key] = content[key]
    return network.to(device, memory_format=torch.channels_last).eval(), info


def convert_notebook(state, alphabet):
    """The notebook's weights as a checkpoint of ours; their shapes tell the sizes."""
    weights = {}
    for name, value in state.items():
        name = name.partition(".")[2]  # without "features_extractor." or "sequence_predictor."
        block = re.match(r"cnn\.(\d+)\.(conv|bn)(\d)", name)
        if block:
            layer = 2 * int(block[1]) + int(block[3]) - 1  # its blocks hold two of our layers
            kind = "norm" if block[2] == "bn" else "conv"
            name = f"cnn.{layer}.{kind}{name[block.end() :]}"
        weights[name] = value
    first = "cnn.0.conv.weight"
    weights[first] = weights[first].flip(1)  # it was trained on BGR, we read RGB
    weights["proj.weight"] = weights["proj.weight"].flatten(1)  # 1 x 1 convolution to linear
    steps, columns = weights["proj.weight"].shape
    gates, hidden_size = weights["rnn.weight_hh_l0"].shape
    config = {
        "preset": "notebook",
        "alphabet": alphabet,
        "size": [96, 32 * columns],
        "rnn": "lstm" if gates == 4 * hidden_size else "gru",  # a GRU has three gates
        "bidirectional": "rnn.weight_hh_l0_reverse" in weights,
        "hidden_size": hidden_size,
        "steps": steps,
    }
    return {"config": config, "model": weights}
