"""Lesson 3, train: weights from examples, with CTC loss: drawn plates, your crops, or both.

    python train.py                                       # no data: plates are drawn on the fly
    python train.py --data DIR                            # labelled crops, in DIR or DIR/train
    python train.py --data CCPD2019-dl1 --epochs 5
    python train.py --data CCPD2019-dl1 --model notebook  # the baseline: its network and recipe
    python train.py --init assets/reader.pth --data DIR --epochs 4         # fine-tuning
    torchrun --nproc-per-node 8 train.py --data CCPD2019-dl1 --epochs 5    # eight GPUs

train() is one loop in eleven numbered parts. 6 to 8 are the loop of any course: a batch, forward,
backward and step; the others are what real use adds. data.py (lesson 1) gives the pictures,
model.py (lesson 2) the network and the loss, evaluate.py (lesson 5) the metrics.

All of a run is in one file, ckpt.pth: the best weights, the arguments, the history, and until
the run ends what --resume needs. A ckpt.pth of an earlier run is kept as ckpt-1.pth, or the next
number that is free.
"""

import argparse
import copy
import io
import itertools
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import data
import evaluate
import model

try:
    from assets import plates
except ImportError:  # this file was copied without assets/: it can learn from crops
    plates = None

# What the options are where nobody gives them. The baseline's values are its own.
SMALL = {
    "alphabet": data.ALPHABET,
    "size": [32, 128],
    "rnn": "lstm",
    "bidirectional": True,
    "epochs": 16,
    "batch_size": 32,
    "lr": 2e-3,
    "weight_decay": 0.02,
    "optimizer": "AdamW",
    "amsgrad": False,
    "warmup": 300,
    "decay": True,
    "clip": 5.0,
    "prior": True,
    "augment": True,  # and synthetic by the number of crops, see synthetic_share
}
NOTEBOOK = {
    "alphabet": data.NOTEBOOK_ALPHABET,
    "size": [96, 448],
    "rnn": "lstm",
    "bidirectional": False,
    "epochs": 5,
    "batch_size": 128,
    "lr": 3e-4,
    "weight_decay": 1e-4,
    "optimizer": "Adam",
    "amsgrad": True,
    "warmup": 0,
    "decay": False,
    "clip": math.inf,
    "prior": False,
    "synthetic": 0.0,
    "augment": False,
}
# Not tried: with four times the images in a step, Adam's rate is twice as high, by the square root
# (Malladi et al., 2022, arXiv:2205.10287).
ON_GPU = {"batch_size": 128, "lr": 4e-3}
CONFIG = ("model", "alphabet", "size", "rnn", "bidirectional")  # the network's part
# in a run that is resumed; of --data the labels are compared, wherever they lie now
MAY_CHANGE = {"resume", "out", "data", "init", "device", "precision", "lr"}
EPOCH_IMAGES = 20_000  # an epoch has at least so many: small data sets are repeated
MOST_VIEWS = 80  # a run shows each crop about so often at most, or it overfits
MOST_CROPS = 0.5  # of a batch: the rest is drawn, however many crops there are
ENOUGH_CROPS = 100  # so many held out, or more, choose the best weights alone
# scores in the history: of the crops held out, and of drawn plates
CROPS = ("accuracy", "cer", "levenshtein", "val_loss")
DRAWN = ("drawn_accuracy", "drawn_cer", "drawn_levenshtein", "drawn_loss")


def parse_arguments(argv):
    """All the arguments, and those among them that model.build_network takes, as a dict."""
    parser, add = data.make_parser(__doc__)
    share = data.between(float, 0, 1)
    count = data.between(int, 1, math.inf)
    number = data.between(float, 0, math.inf)
    switch = argparse.BooleanOptionalAction
    add("--data", help="labelled crops, or a folder with train inside (default: drawn plates)")
    add("--out", default="ckpt.pth", help="checkpoint to write (default: %(default)s)")
    add("--model", choices=model.NETWORKS, help="network and recipe (default: small)")
    add("--rnn", choices=model.RECURRENT, help="recurrent layer (default: lstm)")
    add("--bidirectional", action=switch, help="let it read from both ends")
    add("--size", type=int, nargs=2, help="height and width of the images")
    add("--alphabet", type=data.read_alphabet, help="or a .txt of it (default: plates')")
    add("--synthetic", type=share, help="share of drawn plates (default: by the crops)")
    add("--val", type=share, default=0.05, help="share of the labels that is held out")
    add("--seed", type=int, default=0, help="of all random numbers")
    add("--init", help="a checkpoint: start from its weights")
    add("--resume", action="store_true", help="go on after the last whole epoch of --out")
    data.machine_options(add)
    # of these, too, the recipe of --model has the defaults
    add("--epochs", type=count, help="(small: 16)")
    add("--batch-size", type=count, help="images in a step of one process (small: 32)")
    add("--lr", type=number, help="highest learning rate (small: 0.002)")
    add("--weight-decay", type=number, help="(small: 0.02)")
    add("--warmup", type=number, help="steps, at most a fifth of the run (small: 300)")
    add("--clip", type=number, help="max gradient norm (small: 5)")
    add("--prior", action=switch, help="discount how often a province occurs (small: yes)")
    add("--augment", action=switch, help="photograph crops anew each time (small: yes)")
    args = parser.parse_args(argv)
    known = {"model": args.model or "small"}
    if args.init:
        known = model.load_checkpoint(args.init)[1]["config"]
    recipe = NOTEBOOK if known["model"] == "notebook" else SMALL
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    if recipe is SMALL and on_gpu and not args.batch_size:
        recipe = SMALL | ON_GPU
    for name, value in (recipe | known).items():
        if vars(args).get(name) is None:
            setattr(args, name, value)
    config = {name: vars(args)[name] for name in CONFIG}
    if args.init and config != known:
        raise OSError(f"{args.init}: has another --{' or --'.join(CONFIG)}; drop yours")
    if args.data:
        args.data = os.path.realpath(args.data)  # evaluation may run in another folder
    return args, config


def find_processes():
    """The number of this process and how many there are, as torchrun's environment says. They have
    found each other then. Raises OSError."""
    if not {"RANK", "WORLD_SIZE"} & set(os.environ):
        return 0, 1
    try:
        dist.init_process_group()  # nccl for GPUs, gloo for CPUs
        local_size = int(os.getenv("LOCAL_WORLD_SIZE", 1))
        if local_size > 1:  # torchrun gives each one thread, and crops are decoded in threads
            torch.set_num_threads(max(1, os.cpu_count() // local_size))
    except Exception as error:  # torch raises all kinds
        raise OSError(f"RANK, WORLD_SIZE: {error}; start with torchrun, or unset both") from None
    return dist.get_rank(), dist.get_world_size()


def learning_rate(step, steps, args):
    """The learning rate of step number `step` of `steps`: a linear warm-up, at most a fifth of
    them, times half a cosine that falls from 1 to 0 (Loshchilov and Hutter, 2017). Without
    args.decay this factor is 1."""
    rise = min(1, (step + 1) / (min(args.warmup, steps // 5) + 1))
    fall = 0.5 + 0.5 * math.cos(math.pi * args.decay * step / steps)
    return args.lr * rise * fall


def synthetic_share(num_crops, args):
    """The share of a batch that is drawn, if there are `num_crops` crops to learn from."""
    can_draw = plates and set(data.ALPHABET) <= set(args.alphabet)
    share = args.synthetic
    if share is None:
        views = MOST_VIEWS * num_crops / (args.epochs * max(EPOCH_IMAGES, num_crops))
        share = 1 - min(MOST_CROPS, views) if can_draw else 0.0
    if (share < 1 and not num_crops) or (share and not can_draw):
        raise OSError(
            f"--synthetic {share:g}: no crops to learn from, or no assets/ or alphabet of plates "
            "to draw with; give --data, or a smaller --val"
        )
    return share


def province_prior(texts, alphabet):
    """(C,) float32: how much likelier than usual each province is in `texts`, as a logarithm.

    0 for all other classes. Training adds it to the logits of crops, and reading goes without it.
    So the network learns what a province looks like, and not how many photographs came from there
    (logit adjustment; Menon et al., 2021, arXiv:2007.07314)."""
    firsts = [text[0] for text in texts]
    smallest = 0.001 * len(texts)  # for provinces that no crop shows
    numbers = [
        firsts.count(char) + smallest if char in data.PROVINCES else 0.0 for char in alphabet
    ]
    share = torch.tensor([0.0, *numbers]) / sum(numbers)  # the blank's first
    # over the crops log(share) has the mean -entropy: with the entropy added the mean is 0, and
    # provinces gain nothing against other classes
    return torch.where(share > 0, share.log() + torch.special.entr(share).sum(), 0)


def validate(network, images, texts, precision):
    """Four scores of greedy reads: accuracy, CER, Levenshtein distance and mean loss."""
    alphabet = network.config["alphabet"]
    logits = model.predict_logits(network, images, precision)
    scores = evaluate.metrics(texts, model.greedy_decode(logits, alphabet))
    return (*scores.values(), model.ctc_loss(logits, texts, alphabet).item())


def score(row, kinds):
    """What the best epoch has least of: the Levenshtein distance, then the loss. Of few crops and
    drawn plates together the losses alone: a good reader makes too few errors there to tell."""
    sums = [sum(row[name] for name in names) for names in zip(*kinds)]
    return sums[2:] if len(kinds) == 1 else sums[3:]


def free_name(path):
    """ckpt-1.pth for ckpt.pth, or the next number that is free."""
    stem, suffix = os.path.splitext(path)
    for k in itertools.count(1):
        name = f"{stem}-{k}{suffix}"
        if not os.path.lexists(name):
            return name


def content_of(path):
    """The bytes of a file, or None if there is none. Raises OSError for a name that is too long."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return None


def train(args, config):
    """The whole run, with what parse_arguments returns. Raises OSError with one sentence the user
    can act on."""
    # 1) the processes that share the run, and the device of this one
    data.check_output(args.out, ".pth")
    out = os.path.realpath(args.out)  # a link is followed
    written = content_of(out)
    content_of(free_name(out))  # none, but an error if the name is too long
    rank, world_size = find_processes()
    device = model.pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the first GPU is not everybody's
    if rank > 0:
        sys.stdout = None  # the first process tells how the run goes
    torch.backends.cudnn.benchmark = True  # all batches have one size: look for the fastest way
    content = {"config": config, "history": [], "args": {}}  # see model.py
    if args.resume and written:
        content = model.load_checkpoint(out)[1]
    if world_size > 1:  # the first process may be the only one that has the file
        shared = [content]
        dist.broadcast_object_list(shared)
        content = shared[0]
    args.precision = (
        args.precision or content["args"].get("precision") or model.pick_precision(device)
    )

    # 2) the network
    data.seed_all(args.seed)
    learnt = []  # the labels that the weights come from, as hashes
    network = model.build_network(**config)
    if args.init:
        earlier = model.load_checkpoint(args.init)[1]
        network.load_state_dict(earlier["model"])
        learnt = earlier["args"]["labels"]
    network.to(device)
    # three images go through it now: a network of your own may be wrong
    logits = model.predict_logits(network.eval(), torch.zeros(3, 3, *args.size, dtype=torch.uint8))
    if logits.shape[1:] != (3, len(args.alphabet) + 1):
        raise OSError(
            f"--model {args.model}: gives {tuple(logits.shape)} for 3 images; its logits are to be "
            f"(steps, 3, {len(args.alphabet) + 1})"
        )
    # gradients averaged over all processes
    parallel = torch.nn.parallel.DistributedDataParallel(network) if world_size > 1 else network

    # 3) the crops, decoded once: to each process its share, and to the first one those held out
    labelled = []
    held_out = []
    if args.data:
        crops = data.find_crops(data.split_folder(args.data, "train"), args.alphabet)
        too_long = [str(path) for path, text in crops if model.steps_needed(text) > len(logits)]
        if too_long:
            raise OSError(
                f"{', '.join(too_long)}: too long for {len(logits)} time steps; remove them"
            )
        for crop in crops:
            (held_out if data.is_held_out(crop[1], args.val) else labelled).append(crop)
    # With 1,145 crops to learn from and --epochs 4, a batch of 32 is 16 crops and 16 drawn plates,
    # and an epoch has 625 steps; each crop is seen 35 times in the run.
    share = synthetic_share(len(labelled), args)
    num_crops = max(1, round((1 - share) * args.batch_size))
    if share == 1:
        num_crops = 0
        labelled = []
    num_drawn = args.batch_size - num_crops
    all_texts = [text for _, text in labelled]
    args.labels = sorted({*learnt, *map(data.hash_label, all_texts)})
    batches = max(EPOCH_IMAGES / args.batch_size, len(labelled) / max(1, num_crops))
    steps = math.ceil(batches / world_size)  # in an epoch
    print(
        f"{args.model} {args.size[0]} x {args.size[1]}, {len(args.alphabet)} characters, "
        f"{device} {args.precision}, {world_size} process(es) of {torch.get_num_threads()} "
        "thread(s)\n"
        f"training on {len(labelled):,} crops, {num_drawn / args.batch_size:.0%} of the images "
        f"drawn; {len(held_out):,} crops held out\n"
        f"{args.epochs} epochs of {steps:,} steps of {args.batch_size * world_size} images"
    )
    prior = torch.zeros(args.batch_size, len(args.alphabet) + 1, device=device)
    if labelled:
        if len(held_out) < ENOUGH_CROPS:
            print(f"{len(held_out)} crops held out tell little; a larger --val holds out more")
        if args.prior and data.is_chinese(args.alphabet):
            prior[:num_crops] = province_prior(all_texts, args.alphabet)
        crops, texts = data.load_crops(labelled[rank::world_size] or labelled, args.size)
    validation = {}
    if rank == 0:
        if held_out:
            validation[CROPS] = data.load_crops(held_out, args.size)
        if num_drawn:
            validation[DRAWN] = plates.fixed_plates(*plates.VALIDATION, args.size)
    # what chooses the best weights: crops, which the reader is for, if they are many
    kinds = [CROPS] if len(held_out) >= ENOUGH_CROPS else validation

    # 4) the optimizer
    optimizer = getattr(torch.optim, args.optimizer)(
        network.parameters(),
        weight_decay=args.weight_decay,
        amsgrad=args.amsgrad,
        fused=True,
    )
    # float16 loses small gradients, so the scaler enlarges the loss. In all precisions it skips
    # the steps with non-finite gradients, on the device, which need not be waited for.
    scaler = torch.amp.GradScaler(device.type)
    parts = (network, optimizer, scaler)

    # 5) resume
    best = [math.inf]
    if content["history"]:
        # as text: what a stranger's file holds may raise an error when it is compared
        before = content["args"]
        changed = {name for name in vars(args) if str(before.get(name)) != str(vars(args)[name])}
        reason = ", ".join(sorted(changed - MAY_CHANGE))
        if reason or "resume" not in content:
            raise OSError(
                f"{args.out}: cannot go on ({reason or 'it has ended'}); give the options it began "
                f"with, or start a run from its weights with --init {args.out}"
            )
        try:
            states = content.pop("resume")
            groups = optimizer.param_groups  # the options, which are the same
            for k, part in enumerate(parts):
                part.load_state_dict(states[k])
            optimizer.param_groups = groups
            for weight, state in optimizer.state.items():
                step, *means = state.values()
                # a fused step takes them to lie as the weights do, and writes anywhere otherwise
                places = {(mean.shape, mean.stride()) for mean in means}
                if step.shape or places != {(weight.shape, weight.stride())}:
                    raise ValueError
            best = min(score(row, kinds) for row in content["history"])
        except Exception:  # the parts raise all kinds of errors
            raise OSError(f"{args.out}: damaged, cannot go on; drop --resume") from None
        print(f"resumed after epoch {len(content['history'])}")
    content["args"] = vars(args)

    for epoch in range(len(content["history"]), args.epochs):
        network.train()
        data.seed_all(args.seed, epoch, rank)
        if labelled:
            # each crop equally often: after the last the first ones come again
            order = itertools.cycle(torch.randperm(len(crops)).tolist())
        losses = []
        epoch_start = time.perf_counter()
        for step in range(1, steps + 1):
            done = epoch * steps + step
            # 6) a batch: crops, then drawn plates. All that is random in a step, the baseline's
            # dropout as well, follows from its place in the run.
            data.seed_all(args.seed, epoch, step, rank)
            images = []
            labels = []
            if num_crops:
                chosen = list(itertools.islice(order, num_crops))
                batch = crops[chosen].to(device, non_blocking=True)
                if args.augment:
                    batch = data.camera(batch, args.size)
                images.append(batch)
                labels += [texts[k] for k in chosen]
            if num_drawn:
                batch, new = plates.draw_plates(num_drawn, args.size, plates.PRACTICE, device)
                images.append(batch)
                labels += new

            # 7) forward: half precision for the network alone, the loss needs float32
            with model.autocast(device, args.precision):
                logits = parallel(torch.cat(images))  # (T, B, C)
            loss = model.ctc_loss(logits + prior, labels, args.alphabet)

            # 8) backward and step
            optimizer.param_groups[0]["lr"] = learning_rate(done - 1, steps * args.epochs, args)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            # CTC's first gradients are large: without a limit they throw the weights far away
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), args.clip)
            scaler.step(optimizer)
            scaler.update()

            # 9) log. A number is asked for only here: to give one, a GPU must be waited for.
            losses.append(torch.where(norm.isfinite(), loss.detach(), math.nan))  # nan: skipped
            if done == 10 or step % 50 == 0 or step == steps:
                recent = torch.stack(losses[-50:]).nanmean()
                if recent.isnan():
                    raise OSError(
                        "the loss is not finite; train again with a lower --lr, or from the best "
                        f"weights, if there are any, with --init {args.out}"
                    )
                scores = evaluate.metrics(labels, model.greedy_decode(logits, args.alphabet))
                speed = step / (time.perf_counter() - epoch_start)
                print(
                    f"epoch {epoch + 1} step {step:5,}  loss {recent:6.3f}  "
                    f"accuracy {scores['accuracy']:.4f}  CER {scores['cer']:.4f}  "
                    f"{speed * args.batch_size * world_size:,.0f} images/s  "
                    f"{(steps * args.epochs - done) / speed / 60:.1f} min left"
                )
                if 0.9 < scores["cer"] <= 1:
                    print("  nearly all is blank: CTC's normal first phase, some 5,000 images")

        # 10) validate, and keep the best weights: the first process does
        if rank > 0:
            continue  # to the first step of the next epoch, which waits for the first process
        epoch_losses = torch.stack(losses)
        row = {
            "epoch": epoch + 1,
            "images": done * args.batch_size * world_size,
            "minutes": (time.perf_counter() - epoch_start) / 60,
            "loss": epoch_losses.nanmean().item(),
            "skipped": epoch_losses.isnan().sum().item(),  # steps with gradients not finite
        }
        for names, part in validation.items():
            row |= zip(names, validate(network.eval(), *part, args.precision))
        content["history"].append(row)
        numbers = "  ".join(f"{name} {value:.6g}" for name, value in row.items())
        print(f"=== {numbers}  (validation is greedy)")
        if score(row, kinds) <= best:  # without a validation set the last weights are the best
            print("    best so far")
            best = score(row, kinds)
            content["model"] = copy.deepcopy(network.state_dict())
        rest = {}
        if epoch + 1 < args.epochs:
            rest = {"resume": [part.state_dict() for part in parts]}

        # 11) save all of it in one file: the whole of it, or that of the last epoch stays. The
        # file of an earlier run is kept, and that of another run beside this one, too.
        file = io.BytesIO()  # torch's own errors of a full disk are no OSErrors
        torch.save(content | rest, file)
        spare = free_name(out)
        if content_of(out) != written:
            data.write_file(spare, file.getvalue())
            raise OSError(f"{args.out}: another run has written it; this run is now {spare}")
        if written and epoch == 0:
            os.replace(out, spare)
            print(f"{args.out}: that of an earlier run is now {spare}")
        written = file.getvalue()
        data.write_file(out, written)
    print(f"{args.out}: the best weights. Next: python evaluate.py {args.out}")
    if dist.is_initialized():
        dist.destroy_process_group()


@data.one_sentence()
def main(argv=None):
    train(*parse_arguments(argv))


if __name__ == "__main__":
    main()
