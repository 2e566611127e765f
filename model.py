"""The CRNN: convolutions read columns of the image, a recurrent layer reads the columns in order, CTC makes text of it.

    model = CRNN(alphabet)                           # preset "small": 32 x 128, 32 time steps
    logits = model(images)                           # uint8 (B, 3, 32, 128) -> float (32, B, len(alphabet) + 1)
    texts = greedy_decode(logits, alphabet)          # ["皖AX511H", ...]
    model, info = load_checkpoint("ckpt.pth")

Shi, Bai and Yao, 2015 (arXiv:1507.05717) for the network; Graves et al., ICML 2006, for CTC. This file imports no
other of ours: copy it anywhere.
"""
import contextlib
import ctypes
import os
import pickle
import platform
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

BLANK = 0                                           # CTC's "no new character"; character k of the alphabet is k + 1
SIZES = {"small": (32, 128), "notebook": (96, 448)}
CACHED = 350_000                                    # pixels of images whose activations stay in a CPU's cache
MULTIPLES = {"small": (16, 4), "notebook": (32, 32)}


class ConvNorm(nn.Module):
    """Convolution, batch-norm, optional 2 x 2 max-pool, relu. Pooling before relu gives the same on a quarter of the work."""

    def __init__(self, c_in, c_out, kernel=3, stride=1, padding=1, pool=False):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(c_out)
        self.pool = pool

    def forward(self, x):
        x = self.norm(self.conv(x))
        return F.relu(F.max_pool2d(x, 2) if self.pool else x, inplace=True)


class CRNN(nn.Module):
    """Reads one line of text from an image.

    preset "small": six strided convolutions to one row of width / 4 columns, one bidirectional recurrent layer, and a
    linear shortcut past it, which ends CTC's all-blank phase early.
    preset "notebook": five blocks of two convolutions and a max-pool, an average over the height, a linear map from
    width / 32 columns to `steps` time steps, two recurrent layers with dropout between them.

    size: (height, width) of the images. rnn: "lstm" or "gru". Raises ValueError for a size the preset cannot take."""

    def __init__(self, alphabet, preset="small", size=None, rnn="lstm", bidirectional=None, hidden=None, steps=20):
        super().__init__()
        small = preset == "small"
        height, width = size = tuple(size or SIZES[preset])
        h, w = MULTIPLES[preset]
        if height % h or width % w or height < h or width < 4 * w:
            raise ValueError(f"--size {height} {width}: the {preset} preset takes heights that are multiples of {h} and "
                             f"widths that are multiples of {w}, at least {h} x {4 * w}, such as {SIZES[preset]}")
        bidirectional = small if bidirectional is None else bidirectional
        hidden = hidden or (96 if small else 256)
        # all that rebuilds this network, in plain types, for the checkpoint
        self.config = dict(alphabet=alphabet, preset=preset, size=list(size), rnn=rnn, bidirectional=bidirectional,
                           hidden=hidden, steps=steps)
        if small:
            self.steps, features = width // 4, 256
            self.cnn = nn.Sequential(               # the shape is (channels, height, width) for 32 x 128
                ConvNorm(3, 32, stride=2),          # (32, 16, 64)
                ConvNorm(32, 64, stride=2),         # (64, 8, 32)
                ConvNorm(64, 128, stride=(2, 1)),   # (128, 4, 32)
                ConvNorm(128, 128),
                ConvNorm(128, 192, stride=(2, 1)),  # (192, 2, 32)
                ConvNorm(192, 256),
                ConvNorm(256, 256, kernel=(height // 16, 1), padding=0))        # (256, 1, 32)
            self.shortcut = nn.Linear(features, len(alphabet) + 1)
        else:
            self.steps, features = steps, 512
            widths = (3, 32, 64, 128, 256, 512)
            self.cnn = nn.Sequential(*(layer for a, b in zip(widths, widths[1:])
                                       for layer in (ConvNorm(a, b), ConvNorm(b, b, pool=True))))
            self.proj = nn.Linear(width // 32, steps)
            self.shortcut = None
        kind = {"lstm": nn.LSTM, "gru": nn.GRU}[rnn]
        self.rnn = kind(features, hidden, 1 if small else 2, dropout=0 if small else 0.3, bidirectional=bidirectional)
        self.fc = nn.Linear(hidden * (1 + bidirectional), len(alphabet) + 1)

    def normalise(self, images):
        """uint8 (B, 3, H, W) to float32: to [0, 1] for the notebook's network; for small every channel of every image
        to mean 0 and deviation 1, so that night, haze and the camera's white balance look alike."""
        x = images.float() / 255
        if self.config["preset"] == "small":
            mean = x.mean((2, 3), keepdim=True)
            x = (x - mean) / ((x - mean).square().mean((2, 3), keepdim=True).sqrt() + 0.03)
        return x.contiguous(memory_format=torch.channels_last)      # the layout that fast convolutions want

    def forward(self, images):
        """uint8 (B, 3, H, W) to logits (T, B, len(alphabet) + 1); T is self.steps."""
        x = self.cnn(self.normalise(images))                        # (B, C, H', W')
        if self.shortcut is None:
            x = self.proj(x.mean(2))                                # (B, C, T)
            x = x.permute(2, 0, 1)                                  # (T, B, C)
        else:
            x = x.squeeze(2).permute(2, 0, 1)                       # (T, B, C)
            # drawn and photographed characters share no feature exactly, so none may decide alone
            x = F.dropout(x, 0.25, self.training)
        logits = self.fc(self.rnn(x)[0])                            # (T, B, len(alphabet) + 1)
        # The LSTM learns late; this straight line lets gradients reach the convolutions from the first step.
        return logits if self.shortcut is None else logits + self.shortcut(x)

    def fold(self):
        """Merge each batch-norm into its convolution, for prediction: the same function with fewer operations. Returns self."""
        self.eval()
        for layer in self.cnn:
            if isinstance(layer.norm, nn.BatchNorm2d):
                layer.conv, layer.norm = fuse_conv_bn_eval(layer.conv, layer.norm), nn.Identity()
        return self


# --------------------------------------------------------------------------------------------------------------
# CTC

def steps_needed(text):
    """The time steps CTC needs for `text`: one a character, and a blank between equal neighbours."""
    return len(text) + sum(a == b for a, b in zip(text, text[1:]))


def ctc_loss(logits, targets, lengths):
    """CTC loss (B,) in nats: logits (T, B, C) of any precision, targets (B, L) padded at will, lengths (B,)."""
    # in float32: the sums over alignments do not survive half precision. MPS has no CTC loss, so the CPU does it there
    device = "cpu" if logits.device.type == "mps" else logits.device
    log_probs = logits.float().log_softmax(2).to(device)
    steps = torch.full((logits.shape[1],), logits.shape[0], device=device)
    return F.ctc_loss(log_probs, targets.to(device), steps, lengths.to(device), BLANK, "none").to(logits.device)


def greedy_decode(logits, alphabet):
    """The best path of each image, repeats merged and blanks dropped: (T, B, C) to a list of B strings."""
    best = logits.argmax(2).T                                       # (B, T)
    new = (best != BLANK) & (best != F.pad(best, (1, 0), value=BLANK)[:, :-1])
    counts = new.sum(1).tolist()
    letters = iter((best[new] - 1).tolist())
    return ["".join(alphabet[next(letters)] for _ in range(n)) for n in counts]


def encode(texts, alphabet):
    """Strings to (targets (B, longest), lengths (B,)), both int64; character k of the alphabet becomes k + 1."""
    index = {char: k + 1 for k, char in enumerate(alphabet)}
    longest = max([1, *map(len, texts)])
    targets = torch.tensor([[index[c] for c in t] + [BLANK] * (longest - len(t)) for t in texts], dtype=torch.long)
    return targets.view(len(texts), longest), torch.tensor([len(t) for t in texts], dtype=torch.long)


def text_loss(logits, texts, alphabet):
    """The CTC loss (B,) of the strings `texts`: minus the logarithm of their probability given the images."""
    return ctc_loss(logits, *encode(texts, alphabet)) if texts else logits.new_zeros(0)


def probability(logits, texts, alphabet):
    """The probability of each string given its image, exactly: the sum over all CTC alignments. float32 (B,) in [0, 1]."""
    return (-text_loss(logits, texts, alphabet)).exp().clamp(0, 1)


def aligned_decode(logits, slots):
    """The most probable alignment whose k-th character is one of slots[k], by Viterbi's algorithm over time.

    logits (T, B, C); slots: bool (S, C), what may stand at each place. Returns (B, S) class indices and (B, S) runners-up:
    the next best allowed class where the alignment reads that place. An alignment that cannot be gives log(0) somewhere,
    never an error."""
    log_probs = logits.float().log_softmax(2)                       # (T, B, C)
    T, B, C = log_probs.shape
    S, never = len(slots), torch.finfo(torch.float32).min / 4
    # Two kinds of state: `char[s, c]`, place s was just read as c, and `gap[s]`, a blank after s places. Because a char
    # state knows its character, one that repeats its left neighbour can only be reached through the gap between them.
    char = log_probs.new_full((B, S, C), never)
    gap = log_probs.new_full((B, S + 1), never)
    gap[:, 0] = 0
    from_char, from_gap = [], []
    for t in range(T):
        best2, who2 = char.topk(2, 2)                               # (B, S, 2), to know the best of all others
        left = torch.cat((char.new_full((B, 1, C), never), best2[:, :-1, :1].expand(-1, -1, C).clone()), 1)
        left_who = F.pad(who2[:, :-1, :1], (0, 0, 1, 0)).expand(-1, -1, C).clone()          # (B, S, C)
        own = F.pad(who2[:, :-1, :1], (0, 0, 1, 0))
        left.scatter_(2, own, F.pad(best2[:, :-1, 1:], (0, 0, 1, 0), value=never))
        left_who.scatter_(2, own, F.pad(who2[:, :-1, 1:], (0, 0, 1, 0)))
        choices = torch.stack((char, gap[:, :-1, None].expand_as(char), left), 3)           # stay, after a blank, after another
        score, choice = choices.max(3)
        from_char.append(torch.where(choice == 2, left_who, -1 - choice))                   # -1 stay, -2 gap, else the class
        stay = F.pad(best2[..., 0], (1, 0), value=never)            # (B, S + 1)
        from_gap.append(torch.where(stay > gap, F.pad(who2[..., 0], (1, 0)), -1))           # -1 stay, else the class
        gap = (torch.maximum(gap, stay) + log_probs[t, :, BLANK, None]).clamp(min=never)
        char = (score + log_probs[t, :, None]).masked_fill(~slots, never).clamp(min=never)
    # backwards along the best path: at place s (0: none left), reading class c or, where c is BLANK, a gap
    best, c = char[:, -1].max(1)
    c = torch.where(gap[:, -1] > best, BLANK, c)
    s, rows = torch.full((B,), S, device=gap.device), torch.arange(B, device=gap.device)
    read = torch.full((B, S + 1), BLANK, device=gap.device)
    peak = torch.full((B, S + 1), never, device=gap.device)
    second = read.clone()
    for t in range(T - 1, -1, -1):
        in_char = c != BLANK
        sharper = in_char & (log_probs[t, rows, c] > peak[rows, s])
        others = log_probs[t].masked_fill(~slots[(s - 1).clamp(min=0)], never).scatter(1, c[:, None], never)
        read[rows, s] = torch.where(in_char, c, read[rows, s])
        second[rows, s] = torch.where(sharper, others.argmax(1), second[rows, s])
        peak[rows, s] = torch.where(sharper, log_probs[t, rows, c], peak[rows, s])
        step = torch.where(in_char, from_char[t][rows, (s - 1).clamp(min=0), c], from_gap[t][rows, s])
        s = torch.where(in_char & (step != -1), s - 1, s)
        c = torch.where(in_char, torch.where(step == -2, BLANK, torch.where(step == -1, c, step)), torch.where(step == -1, BLANK, step))
    return read[:, 1:], second[:, 1:]


def is_of_form(text, forms):
    """Whether `text` has one of `forms`, each of which says for every place what characters may stand there."""
    return any(len(text) == len(form) and all(c in allowed for c, allowed in zip(text, form)) for form in forms)


def candidates(logits, alphabet, forms=()):
    """The likeliest strings of each image: B lists of (text, probability), the most probable first.

    They are the best alignment of each of `forms` (without any: greedy_decode's string), and its neighbours with one
    character exchanged for the next best, ranked by their exact probability."""
    greedy = greedy_decode(logits, alphabet)
    texts = [{text} if not forms or is_of_form(text, forms) else set() for text in greedy]
    for form in forms or [[alphabet] * n for n in {len(text) for text in greedy} - {0}]:
        rows = [b for b, text in enumerate(greedy) if forms or len(text) == len(form)]
        slots = torch.tensor([[False] + [c in allowed for c in alphabet] for allowed in form], device=logits.device)
        best, second = (x.unsqueeze(1) for x in aligned_decode(logits[:, rows], slots))         # (B, 1, S)
        swapped = torch.where(torch.eye(len(form), dtype=torch.bool, device=logits.device), second, best)       # (B, S, S)
        for b, strings in zip(rows, torch.cat((best, swapped), 1).tolist()):
            texts[b].update("".join(alphabet[c - 1] for c in s) for s in strings if BLANK not in s)
    pairs = [(b, text) for b, some in enumerate(texts) for text in sorted(some)]
    sure = probability(logits[:, [b for b, _ in pairs]], [text for _, text in pairs], alphabet).tolist()
    found = [[] for _ in greedy]
    for (b, text), p in zip(pairs, sure):
        found[b].append((text, p))
    return [sorted(some, key=lambda pair: -pair[1]) for some in found]


def decode(logits, alphabet, forms=()):
    """(B strings, their B probabilities): greedy, or with `forms` the likeliest string that has one of them."""
    texts = greedy_decode(logits, alphabet)
    sure = probability(logits, texts, alphabet).tolist()
    # more than half of the probability leaves no room for a rival, so few images need the search
    hard = [b for b, text in enumerate(texts) if forms and (sure[b] <= 0.5 or not is_of_form(text, forms))]
    if hard:
        for b, found in zip(hard, candidates(logits[:, hard], alphabet, forms)):
            texts[b], sure[b] = found[0] if found else (texts[b], sure[b])
    return texts, sure


# --------------------------------------------------------------------------------------------------------------
# Devices, and the loop that reads

def pick_device(name="auto"):
    """The device to run on: `name`, or the first there is of CUDA, Apple's MPS, CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def pick_precision(name, device):
    """`name`, or for "auto" the fastest of "bf16", "fp16" and "fp32" that this device computes in hardware."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # without AMX or AVX512-BF16 a CPU only imitates bf16, at a fifth of its float32 speed
    fast = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return "bf16" if fast else "fp32"


def autocast(device, precision):
    """The context in which a network runs in `precision`."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def keep_memory():
    """Let the process keep memory that it frees, where glibc is the C library: every step asks for the same again, and
    handing pages back to have them zeroed anew cost the notebook's network a fifth of its time."""
    if platform.libc_ver()[0] == "glibc":
        for option, value in ((-1, 2 ** 31 - 1), (-4, 0), (-8, 1)):             # M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX
            ctypes.CDLL(None).mallopt(option, value)


def images_at_once(model):
    """How many images a network reads best at a time where it is: a CPU is twice as fast while activations fit its cache."""
    height, width = model.config["size"]
    return max(1, CACHED // (height * width)) if next(model.parameters()).device.type == "cpu" else 256


def predict_logits(model, images, precision="fp32"):
    """uint8 (B, 3, H, W) to float32 logits (T, B, C) on the model's device, without gradients; the model is in eval mode."""
    device = next(model.parameters()).device
    with torch.inference_mode(), autocast(device, precision):
        return torch.cat([model(piece.to(device, non_blocking=True)).float() for piece in images.split(images_at_once(model))], 1)


# --------------------------------------------------------------------------------------------------------------
# Checkpoints: {"model": weights, "config": CRNN's arguments, and what the trainer adds: "args", "metrics"}, plain types

def save_atomically(content, path):
    """torch.save that leaves either the old file or the whole new one, whatever happens meanwhile. Raises OSError with one
    sentence where there is no room or no permission."""
    path, partial = Path(path), Path(f"{path}.part")
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:        # torch reports a full disk as a RuntimeError
        raise OSError(f"{path}: cannot be written ({str(error).splitlines()[0][:80]}); free some space or choose another place") from None
    finally:
        partial.unlink(missing_ok=True)


def checkpoint(model, **info):
    """What a checkpoint holds: a copy of the weights, what rebuilds the network, and `info`."""
    weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    return {"model": weights, "config": model.config, **info}


def load_checkpoint(path, alphabet="", device="cpu"):
    """A checkpoint of train.py, or one that the notebook saved, to (CRNN in eval mode, dict of what else it holds).

    The notebook's hold no alphabet: `alphabet` is for them. Raises ValueError with one sentence for any other file;
    nothing in the file is ever executed."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint; train one with: python train.py --out {path}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a whole checkpoint of plain weights ({reason}); train it again or copy it again") from None
    try:
        if "state_dict" in content:
            config, weights = from_notebook(content["state_dict"], alphabet)
        else:
            config, weights = content["config"], content["model"]
        model = CRNN(**config)
        model.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, RuntimeError, IndexError, ValueError):
        raise ValueError(f"{path}: a checkpoint of another program; it needs one of train.py or of the notebook") from None
    return model.to(device, memory_format=torch.channels_last).eval(), {k: v for k, v in content.items() if k not in ("model", "state_dict", "optimizer")}


def from_notebook(state, alphabet):
    """The notebook's state_dict as (CRNN's arguments, CRNN's state_dict); its sizes are read off the shapes."""
    weights = {}
    for key, value in state.items():
        block = re.fullmatch(r"features_extractor\.cnn\.(\d+)\.(conv|bn)(\d)\.(.+)", key)
        if block:
            i, what, j, name = block.groups()
            key = f"cnn.{2 * int(i) + int(j) - 1}.{'conv' if what == 'conv' else 'norm'}.{name}"
        weights[key.removeprefix("features_extractor.").removeprefix("sequence_predictor.")] = value
    weights["cnn.0.conv.weight"] = weights["cnn.0.conv.weight"].flip(1)        # it was trained on BGR
    weights["proj.weight"] = weights["proj.weight"].flatten(1)                 # (20, 14, 1, 1): a linear map
    steps, columns = weights["proj.weight"].shape
    gates, hidden = weights["rnn.weight_hh_l0"].shape
    return dict(alphabet=alphabet, preset="notebook", size=[96, 32 * columns], rnn="lstm" if gates == 4 * hidden else "gru",
                bidirectional="rnn.weight_hh_l0_reverse" in weights, hidden=hidden, steps=steps), weights
