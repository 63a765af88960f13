"""What a config costs, before anything is rented: parameters, FLOPs, memory, disk, hours, energy, money.

    python plan.py configs/7b.py --gpus 8 --gpu a100-80gb
    python plan.py 1b --gpus 16 --parallel.strategy=fsdp --parallel.shard=8 --train.activation_checkpointing=2
    python plan.py 124m --gpus 1 --tokens-per-second-per-gpu 150000 --price 2.0    # with a measured speed
    python plan.py demo --train.micro_batch_size=4                                 # settings as everywhere

Reads the config and, where the dataset is built, its manifest; writes nothing; imports no torch. A plan that
does not fit into memory is refused (exit code 2) with the smallest change that would fit.
"""

import argparse
import itertools
import re
import textwrap

import config
import configurator
import cost
from config import Config, ConfigError

# ---- the report -------------------------------------------------------------------------------------------


def row(name: str, value: object, note: str = "") -> str:
    value = f"{value:,}" if isinstance(value, int) else value
    return f"  {name:<28}{value:>16}   {note}".rstrip()


def sentence(text: str) -> list[str]:
    """As lines of the report: it begins with a capital and ends with a full stop."""
    return textwrap.wrap(f"{text[0].upper()}{text[1:]}.", 108, initial_indent="  ", subsequent_indent="  ")


def big(n: float, unit: str = "") -> str:
    """big(9.73e12, "B") -> "9.73 TB"; powers of a thousand, as disks and FLOPs are counted."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:,.{2 if n < 100 * size else 0}f} {prefix}{unit}"
    return f"{n:.3g} {unit}".rstrip()


def amount(n: float, unit: str, thousandth: str) -> str:
    """amount(22.8, "t", "kg") -> "22.8 t"; amount(0.0032, "t", "kg") -> "3.2 kg"."""
    return f"{n:,.1f} {unit}" if n >= 1 else f"{n * 1000:,.1f} {thousandth}"


def about_parameters(cfg: Config) -> list[str]:
    counts = cost.parameters(cfg.model)
    out = ["parameters", *(row(part, count) for part, count in counts.items() if count)]
    out.append(row("total", sum(counts.values())))
    entries = cfg.tokenizer.vocab_size
    if entries < cfg.model.vocab_size:
        note = f"{entries:,} entries in the tokenizer, {cfg.model.vocab_size:,} rows in the model"
        out.append(row("total without padding", cost.without_padding(cfg.model, entries), note))
    return out


def about_flops(cfg: Config) -> list[str]:
    flops = cost.flops_per_token(cfg.model)
    return [
        "FLOPs a token, forward and backward",
        row("6N", big(flops["6N"]), "N: all parameters"),
        row("6N + 12 L (H Dh) T", big(sum(flops.values())), "with attention as PaLM counts it, appendix B"),
    ]


KINDS = {
    "weights": "weights, FP32",
    "gradients": "gradients, FP32",
    "optimizer": "moments, FP32",
    "copies": "gathered, cast, on their way",
    "activations": "activations",
    "loss": "logits and their gradients",
    "working": "being computed",
}


def about_memory(cfg: Config, args: argparse.Namespace) -> list[str]:
    """The plan, and beside it what DDP, FSDP and activation checkpointing would change."""
    cuda, every = args.gpu != "cpu", cfg.train.activation_checkpointing
    chosen = (cfg.parallel.strategy, every)
    strategies = ("ddp", "fsdp") if args.gpus > 1 and cfg.optim.optimizer == "adamw" else chosen[:1]
    plans = {
        key: cost.memory(cost.variant(cfg, *key), args.gpus, cuda)
        for key in itertools.product(strategies, (0, every or 1))
    }

    def line(name: str, values) -> str:
        return f"  {name:<28}" + "".join(f"{value:>16}" for value in values)

    where = "each GPU" if cuda else "each process"
    names = [f"{s.upper()} " * (len(strategies) > 1) + (f"ckpt {e}" if e else "") for s, e in plans]
    names = [name.strip() or "no ckpt" for name in names]
    limit, size = cost.usable(args.gpu, args.gpus), cost.machine(args.gpu).memory
    share, rest = (
        (cost.USABLE, "CUDA, NCCL and gaps") if cuda else (cost.USABLE_ON_CPU, "all else and malloc's gaps")
    )
    unit, each = ("GiB", cost.GIB) if cost.total(plans[chosen]) >= cost.GIB else ("MiB", 2**20)
    how = f"micro-batch {cfg.train.micro_batch_size}, {cost.precision(cfg, cuda)}"
    copied, writers = cost.saving(cfg, args.gpus)
    one, each_writes = ("copies", f" of about {big(copied / writers, 'B')}") if writers > 1 else ("copy", "")
    save = f"{big(copied, 'B')} in all, the {one} of {writers} process{'es' * (writers > 1)}{each_writes}"
    rows = {name: [plan[kind] for plan in plans.values()] for kind, name in KINDS.items()}
    rows["total"] = [cost.total(plan) for plan in plans.values()]
    return [
        f"memory: {unit} on {where} at its peak; {how}",
        line("", [f"> {name}" if key == chosen else name for name, key in zip(names, plans)]),
        *(line(name, [f"{v / each:,.2f}" for v in values]) for name, values in rows.items() if any(values)),
        line("", ["fits" if value <= limit else "does not fit" for value in rows["total"]]),
        f"  >: the plan; its peak is when {plans[chosen]['at']}.",
        "  ckpt n: activation checkpointing of every n-th block.",
        f"  Usable: {limit / cost.GIB:,.1f} GiB, {share:.0%} of {size / cost.GIB:,.1f}"
        + f" over {args.gpus} processes" * (not cuda and args.gpus > 1)
        + f"; the rest is for {rest}.",
        f"  Host memory for saving while training goes on: {save}.",
    ]


def about_steps(cfg: Config, args: argparse.Namespace, when: cost.Schedule) -> list[str]:
    batch, T, micro = cfg.train.batch_size, cfg.model.seq_len, cfg.train.micro_batch_size
    plan, begin, last = when.steps, when.begin, when.last_step
    each, more = divmod(plan.n_steps, len(when.chunks))
    chunks = f"{len(when.chunks)} chunks" + f"; {more} of them have one step more" * (more > 0)
    if len(plan.phases) > 1:  # a chunk has its rows, and fewer steps the larger the batch
        chunks = f"{len(when.chunks)} chunks, on average"
    left = plan.n_rows - plan.consumed(plan.n_steps)
    process = "GPU" if args.gpu != "cpu" else "process"
    about = cost.about_schedule(cfg, plan, plan.n_steps, last)
    notes = [f"steps {begin:,} to {last:,}{about}", cost.about_warmup(cfg, plan, last), when.assumed]
    grows = [
        row(
            f"from step {first:,}",
            size * T,
            f"{size:,} rows, accumulation {cost.accumulation(cfg, args.gpus) * size // batch:,}",
        )
        for first, _, size in plan.phases[1:]
        if begin < first < last
    ]
    return [
        f"steps: {plan.n_rows:,} rows of {T:,} tokens, from {when.source}",
        row("tokens a step", plan.size(begin) * T, f"{plan.size(begin):,} rows"),
        row(
            "gradient accumulation",
            cost.accumulation(cfg, args.gpus) * plan.size(begin) // batch,
            f"micro-batches of {micro} rows a step on each {process}",
        ),
        *grows,
        row("steps", last - begin),
        row("steps a chunk", each, chunks),
        row(
            "tokens",
            (plan.consumed(last) - plan.consumed(begin)) * T,
            f"{left:,} rows at the end fill no step" if left else "",
        ),
        *itertools.chain.from_iterable(map(sentence, filter(None, notes))),
    ]


def about_disk(cfg: Config, when: cost.Schedule) -> list[str]:
    n, entry = len(when.on_disk), 2 if cfg.model.vocab_size < 2**16 else 4
    b = cost.disk(cfg, n, when.begin)
    one = f"weights {big(b['weights'], 'B')}, moments {big(b['optimizer'], 'B')}"
    rows = when.steps.n_rows * (cfg.model.seq_len + 1) * entry
    first = f"step {when.begin:,} included" + ", which has no moments" * (when.begin == 0)
    kept = (
        f"of {len(when.checkpoints):,} that are saved, train.keep_others={cfg.train.keep_others} deletes the "
        "rest; one more is there while it is written"
    )
    return [
        "disk",
        row("one checkpoint", big(b["weights"] + b["optimizer"], "B"), one),
        row(f"all {n:,} checkpoints", big(b["all"], "B"), first),
        *(sentence(kept) if n < len(when.checkpoints) else []),
        row("without the optimizer", big(b["all without optimizer"], "B")),
        row("the dataset's rows", big(rows, "B"), f"{entry} bytes a token"),
    ]


def about_time(cfg: Config, args: argparse.Namespace, when: cost.Schedule) -> list[str]:
    gpu, flops = cost.machine(args.gpu), sum(cost.flops_per_token(cfg.model).values())
    speed, how = args.tokens_per_second_per_gpu, "stated"
    if not speed and not gpu.flops:
        way = "train a few steps and give --tokens-per-second-per-gpu"
        return ["time", f"  No peak is known for a CPU: {way}."]
    if not speed:
        speed, how = args.mfu * gpu.flops / flops, "from the MFU"
    one = "GPU" if gpu.flops else "process"
    rows = when.steps.consumed(when.last_step) - when.steps.consumed(when.begin)
    long = cost.hours(rows * cfg.model.seq_len, speed, args.gpus)
    out = [f"time and energy on {args.gpus} x {args.gpu}"]
    out.append(row(f"tokens a second a {one}", f"{speed:,.0f}", how))
    if gpu.flops:
        plain, palm = cost.mfu(cfg.model, speed, gpu.flops)
        how = "from the speed" if args.tokens_per_second_per_gpu else args.mfu_is
        note = f"{how}; {plain:.1%} by 6N; of {gpu.flops / 1e12:,.0f} TFLOP/s, dense BF16"
        out.append(row("MFU, attention counted", f"{palm:.1%}", note))
    out.append(row("hours", f"{long:,.1f}", f"{long / 24:,.1f} days without a pause"))
    out.append(row(f"{one}-hours", f"{long * args.gpus:,.1f}"))
    watts = args.watts or gpu.watts
    if watts:
        mwh = cost.megawatt_hours(long * args.gpus, watts)
        draw = (
            f"{watts:,.0f} W each on average, {'stated' if args.watts else 'assumed: the limit of the board'}"
        )
        out.append(
            row(f"energy of the {'GPUs' if gpu.flops else 'processes'}", amount(mwh, "MWh", "kWh"), draw)
        )
        carbon = cost.tonnes_co2(mwh, args.pue, args.kg_co2_per_kwh)
        note = f"x PUE {args.pue:g} x {args.kg_co2_per_kwh:g} kg/kWh"
        out.append(row("CO2 equivalent", amount(carbon, "t", "kg"), note))
    else:
        out.append("  Energy: give --watts, what a process's share of the machine draws.")
    if args.price:
        out.append(row("money", f"{long * args.gpus * args.price:,.0f}", f"at {args.price:g} a {one}-hour"))
    return out


def command_line(argv: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """Raises ConfigError for what is not known and for values that make no sense."""
    parser = argparse.ArgumentParser(
        prog="plan.py", description=__doc__, epilog=config.settings_help(), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python plan.py CONFIG [flags] [--section.name=value ...]",
    )  # fmt: skip
    add = parser.add_argument
    add("config", help="configs/7b.py, or 7b")
    kinds = (*cost.GPUS, "cpu")
    add("--gpu", help=f"{', '.join(kinds)}; 8xh100 is 8 of them; default: a100-80gb, or cpu as train.device")
    add("--gpus", type=int, help="processes, one a GPU; default: 8, a node; on a CPU 1")
    add("--tokens", type=float, help="to train on; default: the dataset's, or data.expected_tokens")
    add("--mfu", type=float, help="share of the peak, attention counted; default: 0.4")
    add("--tokens-per-second-per-gpu", type=float, help="measured, instead of --mfu")
    add("--watts", type=float, help="average of one GPU; default: its board's limit")
    add(
        "--pue",
        type=float,
        default=cost.PUE,
        help="power usage effectiveness; default: 1.1, as OLMo and LLaMA",
    )
    add(
        "--kg-co2-per-kwh",
        type=float,
        default=cost.KG_CO2_PER_KWH,
        help="of the grid; default: 0.385, as LLaMA",
    )
    add("--price", type=float, help="of a GPU-hour, in any currency; default: no money is named")
    args, overrides = parser.parse_known_args(argv)
    flags = [action.option_strings[-1][2:] for action in parser._actions if action.option_strings]
    for override in overrides:
        name = override.removeprefix("--").partition("=")[0]
        if override.startswith("--") and name not in (*config.SETTINGS, *config.RENAMED):
            raise ConfigError(f"--{name}{config.did_you_mean_setting(name, flags)}")
    cfg = config.load(args.config, overrides)
    if args.gpu:
        count, name = re.fullmatch(r"(?:(\d{1,9})x)?(.*)", args.gpu.lower().replace(" ", "-")).groups()
        name = cost.SHORT.get(name, name)
        if name not in kinds:
            raise ConfigError(f"--gpu={args.gpu}{config.did_you_mean(name, kinds)}")
        if count and args.gpus not in (None, int(count)):
            raise ConfigError(f"--gpu={args.gpu} and --gpus={args.gpus} contradict one another; keep one")
        args.gpu, args.gpus = name, int(count) if count else args.gpus
    for name, value in vars(args).items():
        flag, zero = name.replace("_", "-"), name == "kg_co2_per_kwh"  # a grid may be free of it
        if isinstance(value, (int, float)) and not (value > 0 or (zero and value == 0)):
            raise ConfigError(f"--{flag}={value} must be a number above 0")
        if value == float("inf"):
            raise ConfigError(f"--{flag}={value} must be finite")
    if args.mfu and args.tokens_per_second_per_gpu:
        raise ConfigError("--mfu and --tokens-per-second-per-gpu say the same thing twice; keep one")
    if args.mfu and args.mfu > 1:
        raise ConfigError(f"--mfu={args.mfu} is a share of the peak: 40 % is 0.4")
    args.mfu_is, args.mfu = ("stated", args.mfu) if args.mfu else ("assumed", 0.4)
    trained_on = {"auto": "a100-80gb", "cpu": "cpu", "cuda": "a100-80gb"}
    args.gpu = args.gpu or config.choose("train.device", cfg.train.device, trained_on)
    assumed = not args.gpus and args.gpu != "cpu"
    args.gpus = args.gpus or (1 if args.gpu == "cpu" else 8)
    if args.gpu == "cpu" and args.mfu_is == "stated":
        raise ConfigError("--mfu: no peak is known for a CPU; give --tokens-per-second-per-gpu")
    if args.pue < 1:
        raise ConfigError(f"--pue={args.pue}: all power over the computers' power is at least 1")
    peak, speed = cost.machine(args.gpu).flops, args.tokens_per_second_per_gpu
    if speed and peak and cost.mfu(cfg.model, speed, peak)[0] > 1:
        raise ConfigError(
            f"--tokens-per-second-per-gpu={speed:,.0f} is more than {peak / 1e12:,.0f} TFLOP/s "
            f"allow: at most {peak / cost.flops_per_token(cfg.model)['6N']:,.0f}"
        )
    try:
        cost.accumulation(cfg, args.gpus)  # they must divide
    except ConfigError as error:
        here = f". This is for {args.gpus} x {args.gpu}, which no flag asked for: --gpus 1, or --gpu cpu"
        raise ConfigError(f"{error}{here * assumed}") from None
    return cfg, args


@configurator.script
def main(argv: list[str] | None = None) -> None:
    try:
        cfg, args = command_line(argv)
        when = cost.schedule(cfg, args.tokens or 0)
        _, shard, tp = config.mesh_shape(cfg.parallel, args.gpus)
        how = f", {cfg.parallel.strategy.upper()}" * (args.gpus > 1)
        how += f" over {shard}" * (1 < shard < args.gpus) + f", tensor parallel over {tp}" * (tp > 1)
        if every := cfg.train.activation_checkpointing:
            how += f", activation checkpointing of every {f'{every}-th ' * (every > 1)}block"
        print(f"{cfg.name} on {args.gpus} x {args.gpu}{how}")
        for section in (about_parameters(cfg), about_flops(cfg), about_memory(cfg, args)):
            print("\n" + "\n".join(section))
        cost.check_memory(cfg, args.gpus, args.gpu)
        if when is None:
            missing = f"{cfg.dataset} is not built and data.expected_tokens is not set; state --tokens"
            print(f"\nsteps, disk and time\n  Not known: {missing}.")
            return
        if not cfg.optim.anneal_steps:  # a schedule that has begun is not asked again
            cost.check_warmup(cfg, when.steps)
        for section in (about_steps(cfg, args, when), about_disk(cfg, when), about_time(cfg, args, when)):
            print("\n" + "\n".join(section))
    except ConfigError as error:
        configurator.fail(error)


if __name__ == "__main__":
    main()
