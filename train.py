"""Train a licence-plate reader with CTC loss: on synthetic plates, on your crops, or on both.

    python train.py                                       # no data: plates are drawn on the fly
    python train.py --data DIR                            # labelled crops, in DIR or DIR/train
    python train.py --data CCPD2019-dl1 --epochs 5
    python train.py --data CCPD2019-dl1 --epochs 5 --model notebook    # the notebook's recipe
    torchrun --nproc-per-node 8 train.py --data CCPD2019-dl1 --epochs 5    # eight GPUs

The best weights go to ckpt.pth, what --resume needs to ckpt.state.pth, the history to ckpt.csv.
A ckpt.pth of an earlier run is kept as ckpt.pth.bak.
"""

import argparse
import copy
import io
import math
import os
import signal
import sys
import time
from collections import Counter, deque
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
import evaluate
import model as crnn
import predict

# All that differs between the presets. The notebook's values are the notebook's own.
RECIPES = {
    "small": {
        "epochs": 32,
        "batch_size": 64,  # of all processes
        "lr": 2e-3,
        "weight_decay": 0.02,
        "optimizer": "adamw",
        "warmup": 300,  # steps
        "decay": True,  # the learning rate falls to nothing
        "clip": 5.0,  # the longest gradient
        "average": 500,  # steps that the kept weights are averaged over
        "province_prior": True,
        "synthetic": True,
        "augment": True,
    },
    "notebook": {
        "epochs": 5,
        "batch_size": 128,
        "lr": 3e-4,
        "weight_decay": 1e-4,
        "optimizer": "adam-amsgrad",
        "warmup": 0,
        "decay": False,
        "clip": math.inf,
        "average": 1,
        "province_prior": False,
        "synthetic": False,
        "augment": False,
    },
}
EPOCH_IMAGES = 20_000  # an epoch has at least so many: small data sets are repeated
MOST_VIEWS = 80  # a run shows each crop about so often at most, or it learns them by heart
MOST_CROPS = 0.5  # of a batch: the rest is synthetic, however many crops there are
LOG_STEPS = 100  # a line every so many steps ...
LOG_SECONDS = 30  # ... or seconds, where steps are slow
BAD_STEPS = 30  # so many steps in a row whose gradients are no numbers end a run
MAY_CHANGE = {"resume", "out", "workers", "device", "precision"}  # in a run that is resumed

# ---------------------------------------------------------------------------------------
# The run, and the processes that share it


def join_processes(device):
    """(rank, world_size, device) of this process. torchrun says in the environment which it is."""
    rank = 0
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        rank = int(os.environ["RANK"])
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world_size, device


def ask_first(question, run):
    """What question() returns in the first process, for all; what it raises is raised in all."""
    answer = [None]
    if run.rank == 0:
        try:
            answer = [question()]
        except (ValueError, OSError) as error:
            answer = [error]
    if run.world_size > 1:
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def gather(value, run):
    """The values of all processes, as a list."""
    values = [value] * run.world_size
    if run.world_size > 1:
        dist.all_gather_object(values, value)
    return values


def make_network(args):
    """A new network, or that of --init. Raises ValueError if --init and another flag disagree."""
    options = {"size": args.size, "rnn": args.rnn, "bidirectional": args.bidirectional}
    options = {name: value for name, value in options.items() if value is not None}
    if not args.init:
        return crnn.NETWORKS[args.model or "small"](args.alphabet or data.ALPHABET, **options)
    network, _ = crnn.load_checkpoint(args.init, data.ALPHABET)
    if args.model:
        options["preset"] = args.model
    if args.alphabet:
        options["alphabet"] = args.alphabet
    for name, value in options.items():
        if value != network.config[name]:
            flag = "--model" if name == "preset" else f"--{name}"
            raise ValueError(f"{args.init}: has {flag} {network.config[name]}; drop {flag} {value}")
    return network


class Run:
    """One process's view of a run. What it has learnt so far is what --resume restores."""

    def __init__(self, args):
        self.args = args
        device = crnn.pick_device(args.device)
        self.rank, self.world_size, self.device = join_processes(device)
        self.precision = crnn.pick_precision(args.precision, device)
        torch.manual_seed(args.seed)
        self.network = make_network(args).to(self.device, memory_format=torch.channels_last)
        self.alphabet = self.network.config["alphabet"]
        self.recipe = dict(RECIPES[self.network.config["preset"]])
        for name in ("epochs", "batch_size", "lr", "weight_decay", "augment"):
            if getattr(args, name) is None:
                setattr(args, name, self.recipe[name])
            self.recipe[name] = getattr(args, name)
        self.parallel = self.network
        if self.world_size > 1:
            self.parallel = torch.nn.parallel.DistributedDataParallel(self.network)
        # what it has learnt
        self.average = copy.deepcopy(self.network).to(self.device)  # .to() packs an LSTM's weights
        self.optimizer = make_optimizer(self.network, self.recipe, self.device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.epoch = 0  # whole epochs done
        self.best = None  # the smallest [Levenshtein distance, loss] on the validation images
        self.history = []  # a row an epoch
        self.minutes = 0.0
        # what it has not
        self.bad_steps = 0  # in a row
        self.begin = time.time()

    def say(self, *words, **options):
        """Print, in the first process."""
        if self.rank == 0:
            print(*words, flush=True, **options)

    def state(self):
        """What was learnt, in plain types."""
        return {
            "model": self.network.state_dict(),
            "ema": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "best": self.best,
            "history": self.history,
            "minutes": self.minutes,
            "args": vars(self.args),
        }

    def restore(self, state):
        """Continue where `state` was taken."""
        self.network.load_state_dict(state["model"])
        self.average.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty if that run had another precision
            self.scaler.load_state_dict(state["scaler"])
        self.epoch = state["epoch"]
        self.best = state["best"]
        self.history = state["history"]
        self.minutes = state.get("minutes", 0.0)
        self.begin -= 60 * self.minutes


# ---------------------------------------------------------------------------------------
# The images


def load_crops(run):
    """The crops of --data whose labels fit the network: (dataset, train_ids, val_ids)."""
    args = run.args
    folder = data.split_folder(args.data, "train")
    paths, texts = data.find_crops(folder, run.alphabet, quiet=run.rank > 0)
    # half of the free memory, shared by the processes of this machine
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", run.world_size))
    cache_bytes = data.free_memory() // 2 // neighbours
    dataset = data.PlateDataset(paths, texts, run.network.config["size"], cache_bytes)
    # evaluate.py splits the same texts, so none may be left out before
    train_ids, val_ids = data.split_validation(texts, args.val)
    steps = run.network.steps
    too_long = {k for k, text in enumerate(texts) if crnn.steps_needed(text) > steps}
    if too_long:
        count = len(too_long)
        run.say(f"warning: {count:,} labels left out; they need more than {steps} time steps")
    train_ids = [k for k in train_ids if k not in too_long]
    val_ids = [k for k in val_ids if k not in too_long]
    if len(train_ids) < run.world_size:
        raise ValueError(f"{args.data}: too few crops to train on; add crops, or lower --val")
    return dataset, train_ids, val_ids


def count_synthetic(run, crops):
    """How many images of a batch are synthetic, if there are `crops` crops to train on."""
    args = run.args
    can_draw = set(data.ALPHABET) <= set(run.alphabet)
    if not can_draw and (args.synthetic or not crops):
        raise ValueError("--alphabet: only Chinese plates can be drawn; give crops with --data")
    if not crops:
        return args.batch_size
    if args.synthetic is not None:
        return round(args.synthetic * args.batch_size)
    if not run.recipe["synthetic"] or not can_draw:
        return 0
    images = max(EPOCH_IMAGES, crops) * args.epochs
    crop_share = min(MOST_CROPS, MOST_VIEWS * crops / images)
    return args.batch_size - max(1, round(crop_share * args.batch_size))


def province_prior(texts, alphabet):
    """(C,) float32: how much likelier than usual each province is in `texts`, as a logarithm.

    0 for all other classes. Training adds it to the logits of crops, and reading goes without
    it. So the network learns what a province looks like, and not how many photographs came from
    there (logit adjustment; Menon et al., 2021, arXiv:2007.07314)."""
    counts = Counter(text[:1] for text in texts)
    smallest = 0.001 * len(texts)  # for provinces that no crop shows
    numbers = [0.0]  # the blank's
    for char in alphabet:
        numbers.append(counts[char] + smallest if char in data.PROVINCES else 0.0)
    share = torch.tensor(numbers) / max(1e-9, sum(numbers))
    # with the entropy added the mean over all crops is 0: other classes keep their odds
    entropy = torch.special.entr(share).sum()
    return torch.where(share > 0, share.log() + entropy, 0)


class Images:
    """The images of one process: for each step its part of the crops and of the synthetic plates.

    Each process has crops of its own, so that each is decoded once and kept in one memory."""

    def __init__(self, run):
        self.run = run
        self.size = run.network.config["size"]
        self.workers = run.args.workers or data.count_cpus()
        # MPS lacks some of the camera's operations
        self.device = torch.device("cpu") if run.device.type == "mps" else run.device
        self.dataset = None
        self.train_ids = []
        self.val_ids = []
        if run.args.data:
            self.dataset, self.train_ids, self.val_ids = load_crops(run)
        synthetic = count_synthetic(run, len(self.train_ids))
        crops = run.args.batch_size - synthetic
        if 0 < crops < run.world_size or 0 < synthetic < run.world_size:
            raise ValueError(f"--batch-size {run.args.batch_size}: too small for all processes")
        steps = EPOCH_IMAGES / run.args.batch_size
        if crops:
            steps = max(steps, len(self.train_ids) / crops)
        self.steps = math.ceil(steps)
        # this process's part of a batch
        self.crops = len(range(run.rank, crops, run.world_size))
        self.synthetic = len(range(run.rank, synthetic, run.world_size))
        self.glyphs = None
        if synthetic:
            self.glyphs = data.load_glyphs(data.glyph_height(self.size), self.device)
        prior_texts = [self.dataset.texts[k] for k in self.train_ids]
        if not run.recipe["province_prior"]:
            prior_texts = []
        self.prior = province_prior(prior_texts, run.alphabet).to(run.device)
        self.synthetic_val = None

    def crop_batches(self, epoch):
        """(images, texts) of the crops of each step: each crop once, then each again."""
        if not self.crops:
            return [(None, [])] * self.steps
        seed = data.make_seed(self.run.args.seed, epoch, self.run.rank)
        shuffle = np.random.default_rng(seed)
        mine = self.train_ids[self.run.rank :: self.run.world_size]
        order = []
        while len(order) < self.steps * self.crops:
            order += shuffle.permutation(mine).tolist()
        batches = data.in_batches(order, self.crops)[: self.steps]
        return data.load_batches(self.dataset, batches, self.workers)

    @torch.no_grad()
    def make_batch(self, crops, texts, rng):
        """(images uint8 (B, 3, *size), texts): the crops, augmented, then synthetic plates."""
        parts = []
        if texts:
            if self.device.type == "cuda":
                crops = crops.pin_memory()
            crops = crops.to(self.device, non_blocking=True)
            if self.run.args.augment:
                crops = data.camera(crops, self.size, rng, data.CROP_STRENGTH)
            parts.append(crops)
        if self.synthetic:
            plates, new_texts = data.draw_plates(
                self.synthetic, self.size, rng, self.glyphs, data.PRACTICE
            )
            parts.append(plates)
            texts = texts + new_texts  # not +=, for the caller counts its crops
        if not parts:
            # No file of this step could be read. But every process takes every step, or the
            # others would wait for ever: a black image with no text, whose loss counts nothing.
            parts.append(torch.zeros(1, 3, *self.size, dtype=torch.uint8))
            texts = [""]
        return torch.cat(parts), texts

    def training_batches(self, epoch):
        """Yield (images, texts, number of crops) for each step of an epoch.

        All that is random in a step follows from (seed, epoch, step, rank), dropout as well."""
        for step, (crops, texts) in enumerate(self.crop_batches(epoch)):
            seed = data.make_seed(self.run.args.seed, epoch, step, self.run.rank)
            torch.manual_seed(seed)
            rng = data.RandomNumbers(seed, self.device)
            images, all_texts = self.make_batch(crops, texts, rng)
            yield images.to(self.run.device), all_texts, len(texts)

    def validation_crops(self):
        """The batches of (images, texts) of this process's part of the validation crops."""
        if not self.val_ids:
            return []
        mine = self.val_ids[self.run.rank :: self.run.world_size]
        return data.load_batches(self.dataset, data.in_batches(mine, 256), self.workers)

    def validation_plates(self):
        """The same for synthetic plates, if the run draws any: the first process reads them."""
        if self.glyphs is None or self.run.rank > 0:
            return []
        if self.synthetic_val is None:
            batches = data.synthetic_batches(*evaluate.SYNTHETIC_VAL, self.size)
            self.synthetic_val = list(batches)
        return self.synthetic_val


# ---------------------------------------------------------------------------------------
# Learning


def learning_rate(step, steps, recipe):
    """The learning rate of step number `step` of `steps`."""
    warmup = min(recipe["warmup"], steps // 5)
    # 1) a linear warm-up
    if step < warmup:
        return recipe["lr"] * (step + 1) / (warmup + 1)
    # 2) then it stays, in the notebook's recipe
    if not recipe["decay"]:
        return recipe["lr"]
    # 3) or it falls along half a cosine to nothing (Loshchilov and Hutter, 2017)
    progress = (step - warmup) / max(1, steps - warmup)
    return recipe["lr"] * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(network, recipe, device):
    """The optimizer that the recipe names."""
    options = {"lr": recipe["lr"], "weight_decay": recipe["weight_decay"]}
    if recipe["optimizer"] == "adam-amsgrad":
        return torch.optim.Adam(network.parameters(), amsgrad=True, **options)
    return torch.optim.AdamW(network.parameters(), fused=device.type != "mps", **options)


def batch_loss(logits, texts, alphabet, crops, prior):
    """The mean CTC loss a character. The first `crops` images have the prior added (C,)."""
    is_crop = torch.arange(len(texts), device=logits.device) < crops  # (B,)
    logits = logits + prior * is_crop.unsqueeze(1)  # (T, B, C)
    loss = crnn.ctc_loss(logits, texts, alphabet).mean()
    # the black image of make_batch teaches nothing, but every process must run backward
    return loss if any(texts) else 0 * loss


def take_step(run, loss, rate):
    """Backward and step. Returns whether the gradients were numbers.

    Raises ValueError if they were none for many steps in a row."""
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.zero_grad(set_to_none=True)
    # float16 loses small gradients, so the scaler enlarges the loss; it does nothing otherwise
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)  # the true gradients, before they are measured
    # CTC's first gradients are large: without a limit they throw the weights far away
    norm = torch.nn.utils.clip_grad_norm_(run.network.parameters(), run.recipe["clip"])
    # the norm is the same in all processes, so that they skip together
    is_number = bool(torch.isfinite(norm))
    if is_number or run.scaler.is_enabled():
        run.scaler.step(run.optimizer)  # an enabled scaler skips by itself
    run.scaler.update()
    run.bad_steps = 0 if is_number else run.bad_steps + 1
    if run.bad_steps == BAD_STEPS:
        raise ValueError(f"{BAD_STEPS} steps in a row gave no number as loss; lower --lr")
    return is_number


@torch.no_grad()
def move_average(average, network, share):
    """Move the averaged weights and batch-norm statistics by `share` towards the network's."""
    averaged = [value for value in average.state_dict().values() if value.is_floating_point()]
    current = [value for value in network.state_dict().values() if value.is_floating_point()]
    torch._foreach_lerp_(averaged, current, share)  # all in one launch on a GPU


def mean(losses):
    """The mean of those losses that are numbers; take_step passes over the others."""
    losses = torch.stack(losses)
    return losses[losses.isfinite()].mean().item()


class Log:
    """The lines about training: loss and speed since the line before, scores of the last steps."""

    def __init__(self, run):
        self.run = run
        self.losses = []  # of the whole epoch
        self.images = 0  # of the whole epoch
        self.start_line()

    def start_line(self):
        self.start = time.time()
        self.first_step = len(self.losses)
        self.first_image = self.images
        self.recent = deque(maxlen=10)

    def add(self, loss, texts, logits):
        self.losses.append(loss.detach())  # made a number only to print it: a GPU goes on
        self.recent.append((texts, logits.detach()))
        self.images += sum(map(bool, texts))

    def is_due(self, step):
        return step % LOG_STEPS == 0 or time.time() - self.start > LOG_SECONDS

    def write_line(self, step, steps_left):
        trues = []
        preds = []
        for texts, logits in self.recent:
            trues += texts
            preds += crnn.greedy_decode(logits, self.run.alphabet)
        scores = evaluate.metrics(trues, preds)
        seconds = time.time() - self.start
        speed = (self.images - self.first_image) * self.run.world_size / seconds
        steps_a_minute = (len(self.losses) - self.first_step) / seconds * 60
        self.run.say(
            f"epoch {self.run.epoch + 1} step {step:5,}  "
            f"loss {mean(self.losses[self.first_step :]):6.3f}  "
            f"accuracy {scores['accuracy']:.4f}  CER {scores['cer']:.4f}  "
            f"Levenshtein {scores['levenshtein']:.3f}  "
            f"{speed:,.0f} images/s  {steps_left / steps_a_minute:.1f} min left"
        )
        if not any(preds):
            self.run.say(
                "  every prediction is still blank: CTC's normal first phase; it ends within "
                "about 10,000 images (the notebook's network: 80,000)"
            )
        self.start_line()


def train_epoch(run, images):
    """One epoch: for each batch forward, loss, backward, step. Returns its Log."""
    log = Log(run)
    all_steps = run.args.epochs * images.steps
    # dropout on, and batch-norm by the batch's own statistics
    run.network.train()
    for step, (pixels, texts, crops) in enumerate(images.training_batches(run.epoch), 1):
        # the schedule follows the steps of the whole run, so that --resume finds its place
        done = run.epoch * images.steps + step
        # half precision for the network alone; the loss sums over paths and needs float32
        with crnn.autocast(run.device, run.precision):
            # through DistributedDataParallel, which averages the gradients of all processes
            logits = run.parallel(pixels)  # (T, B, C)
        loss = batch_loss(logits, texts, run.alphabet, crops, images.prior)
        # a step whose gradients are no numbers must not reach the average either
        if take_step(run, loss, learning_rate(done - 1, all_steps, run.recipe)):
            # the first weights are far off, so the average first forgets them fast
            share = max(1 / run.recipe["average"], 9 / (9 + done))
            move_average(run.average, run.network, share)
        log.add(loss, texts, logits)
        if log.is_due(step) or step == images.steps:
            log.write_line(step, all_steps - done)
    if not any(gather(log.images, run)):
        raise ValueError(f"{run.args.data}: no crop in it can be read; check the files")
    return log


def validate(run, batches):
    """The scores of the averaged weights on `batches` of all processes, and their mean loss.

    The averaged weights are those that are kept."""
    if run.world_size > 1:
        for buffer in run.average.buffers():  # each process has its own batch-norm statistics
            dist.broadcast(buffer, 0)
    results = evaluate.read_batches(run.average.eval(), batches, run.precision)
    columns = zip(*gather(results, run))
    trues, preds, _, losses = (sum(parts, []) for parts in columns)
    scores = evaluate.metrics(trues, preds)
    scores["val_loss"] = sum(losses) / max(1, len(losses))
    return scores


def overall(name, crops, plates):
    """The mean of a score over all validation images: crops and synthetic plates."""
    total = crops[name] * crops["n"] + plates[name] * plates["n"]
    return total / (crops["n"] + plates["n"])


def finish_epoch(run, images, log):
    """Validate, print the epoch's line, save."""
    crop_scores = validate(run, images.validation_crops())
    plate_scores = validate(run, images.validation_plates())
    can_choose = crop_scores["n"] + plate_scores["n"] > 0
    run.epoch += 1
    if images.val_ids and not can_choose:
        raise ValueError(f"{run.args.data}: no validation crop can be read; check the files")
    # Both choose the weights: a few dozen crops alone would choose by chance, and those of one
    # camera would choose what reads others badly. Without any, each epoch beats the one before.
    # The best have the smallest score, and of equal ones the smaller loss.
    score = [-run.epoch, 0.0]
    if can_choose:
        names = ("levenshtein", "val_loss")
        score = [overall(name, crop_scores, plate_scores) for name in names]
    loss = mean(log.losses)
    # a bad step now and then is passed over; one at the end may be the first of many
    last_loss = log.losses[-1].item()
    if not math.isfinite(last_loss + score[1]):
        raise ValueError("the loss is not a number; lower --lr")
    is_first = run.best is None
    is_best = is_first or score <= run.best
    if is_best:
        run.best = score
    # the line shows the crops, if there are any, as users know them
    scores = crop_scores if crop_scores["n"] else plate_scores
    run.minutes = (time.time() - run.begin) / 60
    seen = run.epoch * images.steps * run.args.batch_size
    row = {"epoch": run.epoch, "images": seen, "minutes": round(run.minutes, 2)}
    row |= {"loss": loss} | scores | {"score": score[0]}
    run.history.append(row)
    line = f"=== epoch {run.epoch:3}  loss {row['loss']:7.4f}  "
    if row["n"]:
        line += f"val loss {row['val_loss']:7.4f}  accuracy {row['accuracy']:.4f}  "
        line += f"CER {row['cer']:.5f}  Levenshtein {row['levenshtein']:.4f}  "
    line += f"{run.minutes:.1f} min"
    line += "  best so far" if is_best else ""
    if images.dataset and images.dataset.unreadable:
        line += f"  ({len(images.dataset.unreadable):,} unreadable files left out)"
    run.say(line)
    if run.rank == 0:
        save_epoch(run, row, is_first, is_best)


# ---------------------------------------------------------------------------------------
# Files


def check_writable(out):
    """Raise ValueError now, not after the first epoch, if a file of the run cannot be written."""
    files = [out, crnn.companion(out, ".state.pth"), crnn.companion(out, ".csv")]
    files += [f"{path}.part" for path in files]
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        for path in files:
            is_new = not os.path.lexists(path)
            if not is_new and not os.path.isfile(path):
                raise ValueError(f"{path}: is not a regular file; choose another --out")
            with open(path, "ab"):  # changes nothing in a file that is there
                pass
            if is_new:
                os.unlink(path)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror}); choose another") from None


def read_state(args):
    """What an earlier run with the same arguments saved after its last whole epoch, or None."""
    path = crnn.companion(args.out, ".state.pth")
    if not path.exists():
        print(f"{path}: nothing to resume; starting from the beginning")
        return None
    state = crnn.read_content(path)
    kinds = {"epoch": int, "history": list}
    kinds |= dict.fromkeys(["model", "ema", "optimizer", "scaler", "args"], dict)
    is_state = isinstance(state, dict) and "best" in state
    if not is_state or not all(isinstance(state.get(name), kinds[name]) for name in kinds):
        raise ValueError(f"{path}: not a state of train.py; drop --resume to start anew")
    for name, value in vars(args).items():
        before = state["args"].get(name)
        if name not in MAY_CHANGE and before != value:
            flag = f"--{name.replace('_', '-')}"
            cure = "give the same or drop --resume"
            raise ValueError(f"{path}: {flag} was {before}, now it is {value}; {cure}")
    return state


def save(content, path):
    """torch.save by way of memory, since torch's own writer does not say that a disk is full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data.write_file(path, buffer.getvalue())


def keep_earlier(out):
    """Rename a checkpoint of an earlier run, so that it is never lost: ckpt.pth.bak, .bak2, ..."""
    free = f"{out}.bak"
    count = 1
    while os.path.lexists(free):
        count += 1
        free = f"{out}.bak{count}"
    os.replace(out, free)
    print(f"{out}: the one of an earlier run is now {free}")


def save_epoch(run, row, is_first, is_best):
    """Write the state and the history, and the averaged weights if they are the best so far."""
    out = run.args.out
    if is_first and Path(out).exists():
        keep_earlier(out)
    # the state before the weights: a run that is stopped between the two can still be resumed
    save(run.state(), crnn.companion(out, ".state.pth"))
    if is_best:
        checkpoint = crnn.make_checkpoint(run.average, args=vars(run.args), metrics=row)
        save(checkpoint, out)
    rows = [past.values() for past in run.history]
    data.write_csv(crnn.companion(out, ".csv"), list(row), rows)


# ---------------------------------------------------------------------------------------
# The whole run


def describe(run, images):
    """The lines at the start."""
    height, width = run.network.config["size"]
    parameters = sum(parameter.numel() for parameter in run.network.parameters())
    validation = []
    if images.val_ids:
        validation.append(f"{len(images.val_ids):,} crops")
    if images.glyphs is not None:
        validation.append(f"{evaluate.SYNTHETIC_VAL[0]:,} synthetic plates")
    validation = " and ".join(validation) or "none, so the last weights are kept"
    share = images.synthetic / (images.synthetic + images.crops)
    return (
        f"{run.network.config['preset']} {height} x {width}, {parameters:,} parameters, "
        f"{len(run.alphabet)} characters, {run.device} {run.precision}, "
        f"{run.world_size} process(es)\n"
        f"training on {len(images.train_ids):,} crops, {share:.0%} of the images synthetic; "
        f"validation: {validation}\n"
        f"{run.args.epochs} epochs of {images.steps:,} steps of {run.args.batch_size} images\n"
    )


def resume(run):
    """Go on where an earlier run saved its state, or from the beginning if there is none."""
    state = ask_first(lambda: read_state(run.args), run)
    if not state:
        return
    try:
        run.restore(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        path = crnn.companion(run.args.out, ".state.pth")
        raise ValueError(f"{path}: does not fit; drop --resume to start anew") from None
    run.say(f"resumed after epoch {run.epoch}")
    out = run.args.out
    if run.rank == 0 and not Path(out).exists():
        print(f"{out}: gone; written again with the weights of this epoch")
        checkpoint = crnn.make_checkpoint(run.average, args=vars(run.args), metrics={})
        save(checkpoint, out)


def train(args):
    """The whole run. Raises ValueError or OSError with one sentence the user can act on."""
    torch.backends.cudnn.benchmark = True  # all batches have one size: look for the fastest way
    run = Run(args)
    ask_first(lambda: check_writable(args.out), run)
    images = Images(run)
    run.say(describe(run, images))
    if args.resume:
        resume(run)
    try:
        while run.epoch < args.epochs:
            log = train_epoch(run, images)
            finish_epoch(run, images, log)
    except BaseException:  # Ctrl-C, a signal, a loss that is no number
        kept = "no epoch was complete, so nothing was written"
        if run.best and Path(args.out).exists():
            kept = f"{args.out} holds the best weights so far; --resume goes on"
        run.say(f"\nstopped; {kept}", file=sys.stderr)
        raise
    run.say(f"\n{args.out}: the best weights. Next: python evaluate.py {args.out}")


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    count = data.positive_int
    add(
        "--data",
        type=data.not_empty,
        help="labelled crops, or a folder with train inside (default: synthetic plates)",
    )
    add("--out", default="ckpt.pth", help="checkpoint to write (default: %(default)s)")
    add("--model", choices=list(RECIPES), help="network (default: small, or that of --init)")
    add("--rnn", choices=["lstm", "gru"], help="recurrent layer (default: lstm)")
    add("--bidirectional", action=switch, help="read both ways (default: only small)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="(default: 32 128; notebook 96 448)")
    add("--alphabet", type=data.read_alphabet, help="other labels' characters, or a file of them")
    add("--epochs", type=count, help="of 20,000 images at least (default: 32; notebook 5)")
    add("--batch-size", type=count, help="of all processes (default: 64; notebook 128)")
    add("--lr", type=float, help="highest learning rate (default: 2e-3; notebook 3e-4)")
    add("--weight-decay", type=float, help="(default: 0.02; notebook 1e-4)")
    add(
        "--synthetic",
        type=float,
        metavar="F",
        help="share of the images (default: by the number of crops; notebook 0)",
    )
    add("--augment", action=switch, help="the camera on crops too (default: only small)")
    add(
        "--val",
        type=float,
        default=0.05,
        metavar="F",
        help="share of the plates that chooses the best weights (default: %(default)s)",
    )
    predict.machine_options(parser)
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--init", type=data.not_empty, metavar="CKPT", help="start from these weights")
    add("--resume", action="store_true", help="go on after the last whole epoch of --out")
    args = parser.parse_args(argv)
    rules = {
        "--synthetic is a share from 0 to 1": 0 <= (args.synthetic or 0) <= 1,
        "--val is a share from 0 to less than 1": 0 <= args.val < 1,
        "--batch-size is at least 2": (args.batch_size or 2) >= 2,
        "--lr is a positive number": args.lr is None or 0 < args.lr < math.inf,
        "--weight-decay is not negative": 0 <= (args.weight_decay or 0) < math.inf,
        "--seed is from 0 to 2**63 - 1": 0 <= args.seed < 2**63,
    }
    for rule, is_kept in rules.items():
        if not is_kept:
            parser.error(rule)
    return args


def main(argv=None):
    args = parse_arguments(argv)
    with data.plain_errors():
        try:
            train(args)
        except RuntimeError as error:
            if not dist.is_initialized() or "memory" in str(error):
                raise
            reason = str(error).splitlines()[0][:100]
            advice = "start all again with --resume"
            raise ValueError(f"another process ended ({reason}); {advice}") from None
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


if __name__ == "__main__":
    # a batch queue or a spot machine ends a run with SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
