"""Train a licence-plate reader with CTC loss: on drawn plates, on your crops, or on both.

    python train.py                                       # no data: plates are drawn on the fly
    python train.py --data DIR                            # labelled crops, in DIR or DIR/train
    python train.py --data CCPD2019-dl1 --epochs 5
    python train.py --data CCPD2019-dl1 --model notebook  # the baseline: its network and recipe
    python train.py --init assets/reader.pth --data DIR --epochs 4         # fine-tuning
    torchrun --nproc-per-node 8 train.py --data CCPD2019-dl1 --epochs 5    # eight GPUs

All of a run is in one file, ckpt.pth: the best weights, the arguments, the history, and until
the run ends what --resume needs. A ckpt.pth of an earlier run is kept as ckpt.pth.bak.

Of the options that stand in RECIPES: --warmup is in steps, at most a fifth of the run; with --decay
the learning rate falls to 0; --clip is the max gradient norm; --prior discounts how often each
province occurs among the crops.
"""

import argparse
import copy
import io
import math
import os
import sys
import time
from collections import Counter
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

# All that differs between the recipes: each number and each switch is an option as well, such as
# --batch-size or --no-augment. The baseline's values are its own.
SMALL = {
    "size": [32, 128],
    "bidirectional": True,
    "epochs": 16,
    "batch_size": 32,
    "lr": 2e-3,
    "weight_decay": 0.02,
    "optimizer": "AdamW",
    "amsgrad": False,
    "warmup": 300.0,  # steps; a float, since it may be 0 and whole numbers must be at least 1
    "decay": True,  # the learning rate falls to 0
    "clip": 5.0,  # max gradient norm
    "prior": True,  # see province_prior
    "synthetic": None,  # by the number of crops, see synthetic_share
    "augment": True,
}
NOTEBOOK = {
    "alphabet": data.NOTEBOOK_ALPHABET,
    "size": [96, 448],
    "bidirectional": False,
    "epochs": 5,
    "batch_size": 128,
    "lr": 3e-4,
    "weight_decay": 1e-4,
    "optimizer": "Adam",
    "amsgrad": True,
    "warmup": 0.0,
    "decay": False,
    "clip": math.inf,
    "prior": False,
    "synthetic": 0.0,
    "augment": False,
}
RECIPES = {"small": SMALL, "wide": SMALL | {"epochs": 32}, "notebook": NOTEBOOK}
CONFIG = ("model", "alphabet", "size", "rnn", "bidirectional")  # the network's part
MAY_CHANGE = {"resume", "out", "device", "precision", "lr"}  # in a run that is resumed
EPOCH_IMAGES = 20_000  # an epoch has at least so many: small data sets are repeated
MOST_VIEWS = 80  # a run shows each crop about so often at most, or it overfits
MOST_CROPS = 0.5  # of a batch: the rest is drawn, however many crops there are


def parse_arguments(argv):
    """All the arguments, and those among them that model.build_network takes, as a dict."""
    parser, add = data.make_parser(__doc__)
    share = data.between(float, 0, 1)
    # its whole path: evaluation may run in another folder
    add(
        "--data",
        type=os.path.realpath,
        help="labelled crops, or a folder with train inside (default: drawn plates)",
    )
    add("--out", default="ckpt.pth", help="checkpoint to write (default: %(default)s)")
    add("--model", choices=RECIPES, default="small", help="network and recipe")
    add("--rnn", choices=model.RECURRENT, default="lstm", help="recurrent layer")
    add("--size", type=int, nargs=2, help="height and width of the images")
    add("--alphabet", type=data.read_alphabet, default=data.ALPHABET, help="or a .txt of it")
    add("--synthetic", type=share, help="share of drawn plates (default: by the crops)")
    add("--val", type=share, default=0.05, help="share of the labels that is held out")
    add("--seed", type=int, default=0, help="of all random numbers")
    add("--init", help="a checkpoint: start from its weights")
    add("--resume", action="store_true", help="go on after the last whole epoch of --out")
    data.machine_options(add)
    # the numbers and switches of the recipe are options too
    for name, value in SMALL.items():
        flag = f"--{name.replace('_', '-')}"
        kind = type(value)
        if kind is bool:
            add(flag, action=argparse.BooleanOptionalAction, help=f"(small: {value})")
        elif kind in (int, float):
            add(flag, type=data.between(kind, int(kind is int), math.inf), help=f"(small: {value})")
    args = parser.parse_args(argv)
    known = model.load_checkpoint(args.init)[0].config if args.init else {"model": args.model}
    # Again: now the values of the recipe, or of the checkpoint, are the defaults.
    parser.set_defaults(**RECIPES[known["model"]] | known)
    args = parser.parse_args(argv)
    config = {name: vars(args)[name] for name in CONFIG}
    if args.init and config != known:
        raise OSError(f"{args.init}: has another --{' or --'.join(CONFIG)}; drop yours")
    if not model.is_config(**config):
        raise OSError(
            f"--size {args.size}: give multiples of {model.NETWORKS[args.model].multiples}, "
            "64 wide to 512 2048, and no / in --alphabet"
        )
    return args, config


def learning_rate(step, steps, args):
    """The learning rate of step number `step` of `steps`: a linear warm-up, at most a fifth of
    them, times half a cosine that falls from 1 to 0 (Loshchilov and Hutter, 2017). Without
    args.decay this factor is 1."""
    rise = min(1, (step + 1) / (min(args.warmup, steps // 5) + 1))
    fall = 0.5 + 0.5 * math.cos(math.pi * args.decay * step / steps)
    return args.lr * rise * fall


def synthetic_share(num_crops, args):
    """The share of a batch that is drawn, if there are `num_crops` crops to learn from."""
    can_draw = plates and set(data.NOTEBOOK_ALPHABET) <= set(args.alphabet)
    share = args.synthetic if num_crops else 1.0
    if share is None:
        views = MOST_VIEWS * num_crops / (args.epochs * max(EPOCH_IMAGES, num_crops))
        share = 1 - min(MOST_CROPS, views) if can_draw else 0.0
    if share and not can_draw:
        raise OSError(
            "drawn plates need assets/ and the alphabet of plates; give --data, or a smaller --val"
        )
    return share


def province_prior(texts, alphabet):
    """(C,) float32: how much likelier than usual each province is in `texts`, as a logarithm.

    0 for all other classes. Training adds it to the logits of crops, and reading goes without
    it. So the network learns what a province looks like, and not how many photographs came from
    there (logit adjustment; Menon et al., 2021, arXiv:2007.07314)."""
    counts = Counter(text[0] for text in texts)
    smallest = 0.001 * len(texts)  # for provinces that no crop shows
    provinces = data.PROVINCES if data.is_chinese(alphabet) else ""
    numbers = [counts[char] + smallest if char in provinces else 0.0 for char in alphabet]
    share = torch.tensor([0.0, *numbers]) / sum(numbers)  # the blank's first
    # over the crops log(share) has the mean -entropy: with the entropy added the mean is 0, and
    # provinces gain nothing against other classes
    return torch.where(share > 0, share.log() + torch.special.entr(share).sum(), 0)


def validate(network, validation, precision):
    """The scores of greedy reads of the validation set, and their mean loss, as a dict.

    validation: pairs of images, uint8 (B, 3, H, W), and their texts."""
    alphabet = network.config["alphabet"]
    images, texts = zip(*validation)
    texts = sum(texts, [])
    logits = model.predict_logits(network, torch.cat(images), precision)
    scores = evaluate.metrics(texts, model.greedy_decode(logits, alphabet))
    return scores | {"val_loss": model.ctc_loss(logits, texts, alphabet).item()}


def train(args, config):
    """The whole run, with what parse_arguments returns. Raises OSError with one sentence the user
    can act on."""
    # 1) the device, and the processes that share the run: torchrun's environment says which
    data.check_output(args.out, ".pth")
    device = model.pick_device(args.device)
    precision = args.precision or model.pick_precision(device)
    rank = int(os.getenv("RANK", 0))
    world_size = int(os.getenv("WORLD_SIZE", 1))
    if world_size > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group()  # nccl for GPUs, gloo for CPUs
    if rank > 0:
        sys.stdout = None  # the first process tells how the run goes
    torch.backends.cudnn.benchmark = True  # all batches have one size: look for the fastest way

    # 2) the network
    data.seed_all(args.seed)
    learnt = []  # the labels that the weights come from, as hashes
    network = model.build_network(**config)
    if args.init:
        content = model.load_checkpoint(args.init)[1]
        network.load_state_dict(content["model"])
        learnt = content["args"]["labels"]
    network.to(device)
    # gradients averaged over all processes
    parallel = torch.nn.parallel.DistributedDataParallel(network) if world_size > 1 else network

    # 3) the crops, decoded once: to each process its share, and to the first one those held out
    labelled = []
    held_out = []
    if args.data:
        for path, text in data.find_crops(data.split_folder(args.data, "train"), args.alphabet):
            if model.steps_needed(text) > network.steps:
                raise OSError(f"{path}: too long for {network.steps} time steps; remove it")
            (held_out if data.is_held_out(text, args.val) else labelled).append((path, text))
    share = synthetic_share(len(labelled), args)
    # in a batch; at least one crop, unless all is to be drawn
    num_drawn = min(round(share * args.batch_size), args.batch_size - (share < 1))
    num_crops = args.batch_size - num_drawn
    if not num_crops:
        labelled = []
    all_texts = [text for _, text in labelled]
    args.labels = sorted({*learnt, *map(data.hash_label, all_texts)})
    batches = max(EPOCH_IMAGES / args.batch_size, len(labelled) / max(1, num_crops))
    steps = args.steps = math.ceil(batches / world_size)  # in an epoch
    print(
        f"{args.model} {args.size[0]} x {args.size[1]}, {len(args.alphabet)} characters, "
        f"{device} {precision}, {world_size} process(es)\n"
        f"training on {len(labelled):,} crops, {num_drawn / args.batch_size:.0%} of the images "
        f"drawn; {len(held_out):,} crops held out\n"
        f"{args.epochs} epochs of {steps:,} steps of {args.batch_size * world_size} images"
    )
    prior = torch.zeros(args.batch_size, len(args.alphabet) + 1, device=device)
    prior[:num_crops] = args.prior * province_prior(all_texts, args.alphabet)
    if labelled:
        crops, texts = data.load_crops(labelled[rank::world_size] or labelled, args.size)
    validation = []
    if rank == 0:
        if held_out:
            validation.append(data.load_crops(held_out, args.size))
        if num_drawn:
            validation.append(plates.fixed_plates(*plates.VALIDATION, args.size))

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
    content = {"config": config, "history": [], "best": [math.inf]}  # see model.py
    if args.resume and os.path.exists(args.out):
        content = model.load_checkpoint(args.out)[1]
        changed = {name for name in vars(args) if content["args"].get(name) != vars(args)[name]}
        if changed - MAY_CHANGE or "resume" not in content:
            flags = ", ".join(changed - MAY_CHANGE) or "it has ended"
            raise OSError(f"{args.out}: is not this run ({flags}); drop --resume")
        for part, state in zip(parts, content.pop("resume")):
            part.load_state_dict(state)
        print(f"resumed after epoch {len(content['history'])}")
    content["args"] = vars(args)

    for epoch in range(len(content["history"]), args.epochs):
        network.train()
        data.seed_all(args.seed, epoch, rank)
        if labelled:
            order = torch.randperm(len(crops))
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
                # each crop equally often: after the last the first ones come again
                places = torch.arange((step - 1) * num_crops, step * num_crops)
                chosen = order[places % len(order)]
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
            with model.autocast(device, precision):
                logits = parallel(torch.cat(images))  # (T, B, C)
            loss = model.ctc_loss(logits + prior, labels, args.alphabet)

            # 8) backward and step
            optimizer.param_groups[0]["lr"] = learning_rate(done - 1, steps * args.epochs, args)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            # CTC's first gradients are large: without a limit they throw the weights far away
            torch.nn.utils.clip_grad_norm_(network.parameters(), args.clip)
            scaler.step(optimizer)
            scaler.update()

            # 9) log. A number is asked for only here: to give one, a GPU must be waited for.
            losses.append(loss.detach())
            if done == 10 or step % 50 == 0 or step == steps:
                recent = torch.stack(losses[-50:])
                if not recent.isfinite().any():
                    raise OSError("the loss is not finite; lower --lr and --resume")
                scores = evaluate.metrics(labels, model.greedy_decode(logits, args.alphabet))
                speed = step / (time.perf_counter() - epoch_start)
                print(
                    f"epoch {epoch + 1} step {step:5,}  loss {recent.nanmean():6.3f}  "
                    f"accuracy {scores['accuracy']:.4f}  CER {scores['cer']:.4f}  "
                    f"{speed * args.batch_size * world_size:,.0f} images/s  "
                    f"{(steps * args.epochs - done) / speed / 60:.1f} min left"
                )
                if 0.9 < scores["cer"] <= 1:
                    print("  nearly all is blank: CTC's normal first phase, some 5,000 images")

        # 10) validate, and keep the best weights: the first process does
        if rank > 0:
            continue  # to the first step of the next epoch, which waits for the first process
        row = {
            "epoch": epoch + 1,
            "images": done * args.batch_size * world_size,
            "minutes": (time.perf_counter() - epoch_start) / 60,
            "loss": torch.stack(losses).nanmean().item(),
        }
        score = [-epoch]  # without a validation set the last weights are the best
        if validation:
            row |= validate(network.eval(), validation, precision)
            score = [row["levenshtein"], row["val_loss"]]
        content["history"].append(row)
        is_best = score <= content["best"]
        if is_best:
            content["best"] = score
            content["model"] = copy.deepcopy(network.state_dict())
        numbers = "  ".join(f"{name} {value:.6g}" for name, value in row.items())
        print(f"=== {numbers}  (validation is greedy){', best so far' * is_best}")
        rest = {"resume": [part.state_dict() for part in parts]} if epoch + 1 < args.epochs else {}

        # 11) save all of it in one file: the whole of it, or that of the last epoch stays. The
        # file of an earlier run is kept.
        if epoch == 0 and os.path.exists(args.out):
            earlier = f"{args.out}.bak"
            while os.path.lexists(earlier):
                earlier += ".bak"
            os.replace(args.out, earlier)
            print(f"{args.out}: that of an earlier run is now {earlier}")
        file = io.BytesIO()  # torch's own errors of a full disk are no OSErrors
        torch.save(content | rest, file)
        partial = Path(f"{args.out}.part")
        partial.write_bytes(file.getvalue())
        partial.replace(args.out)
    print(f"{args.out}: the best weights. Next: python evaluate.py {args.out}")
    if world_size > 1:
        dist.destroy_process_group()


@data.one_sentence()
def main(argv=None):
    train(*parse_arguments(argv))


if __name__ == "__main__":
    main()
