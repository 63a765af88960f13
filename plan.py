"""Plans a run before anything is rented: parameters, FLOPs, memory, disk, hours, energy, money.

    python plan.py configs/7b.py --gpus 8 --gpu a100-80gb
    python plan.py 1b --gpus 16 --parallel.strategy=fsdp --parallel.shard=8 --train.activation_checkpointing=2
    python plan.py 124m --gpus 1 --tokens-per-second-per-gpu 150000 --price 2.0    # with a measured speed
    python plan.py demo --train.micro_batch_size=4                                 # settings as everywhere
    python plan.py 7b --train.micro_batch_size=0 --train.activation_checkpointing=auto      # both are chosen

Memory is derived from the code (memory.py). On one GPU, an H200, it was within 1 % of nine measured peaks
(benchmarks/README.md). Several GPUs are not measured.

Reads the config and, where the dataset is built, its manifest; writes nothing; imports no torch. A plan that
does not fit into memory is refused (exit code 2) with the smallest change that would fit.
"""

import argparse
import itertools
import textwrap

import config
import configurator
import consistency
import cost
import hardware
import memory
from config import Config, ConfigError
from hardware import GIB

# ---- the report -------------------------------------------------------------------------------------------


def row(name: str, value: object, note: str = "") -> str:
    value = f"{value:,}" if isinstance(value, int) else value
    return f"  {name:<28}{value:>16}   {note}".rstrip()


def sentence(text: str) -> list[str]:
    """Lines of the report: the text begins with a capital letter and ends with a full stop."""
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


KINDS = {  # kind of bytes in memory.peak -> its name in the table
    "weights": "weights, FP32",
    "gradients": "gradients, FP32",
    "optimizer": "optimizer moments, FP32",
    "copies": "gathered, cast, reduced",
    "activations": "activations",
    "loss": "logits and their gradients",
    "working": "working memory",
}


def about_memory(cfg: Config, args: argparse.Namespace) -> list[str]:
    """The plan, and beside it what DDP, FSDP and activation checkpointing would change."""
    # The columns: each strategy that is possible, without and with activation checkpointing.
    cuda, again = args.gpu != "cpu", cfg.train.activation_checkpointing
    chosen = (cfg.parallel.strategy, again)
    strategies = ("ddp", "fsdp") if args.gpus > 1 and cfg.optim.optimizer == "adamw" else chosen[:1]
    recomputes = dict.fromkeys((0, again or 1) if len(strategies) > 1 else (0, "selective", again or 1, 1))
    plans = {}
    for strategy, recompute in itertools.product(strategies, recomputes):
        other = memory.variant(cfg, strategy, recompute)
        plans[strategy, recompute] = memory.peak(other, args.gpus, cuda)
    heads = []
    for strategy, recompute in plans:
        words = [">"] * ((strategy, recompute) == chosen) + [strategy.upper()] * (len(strategies) > 1)
        name = "sel." if recompute == "selective" else recompute
        words += [f"ckpt {name}"] if recompute else ["no ckpt"] * (len(strategies) == 1)
        heads.append(" ".join(words))

    # The table: a row for each kind of bytes, their sum, and whether it fits.
    limit, totals = hardware.usable(args.gpu, args.gpus), [memory.total(plan) for plan in plans.values()]
    unit, size = ("GiB", GIB) if memory.total(plans[chosen]) >= GIB else ("MiB", 2**20)
    table = [("", heads)]
    for kind, name in KINDS.items():
        values = [plan[kind] for plan in plans.values()]
        if any(values):
            table.append((name, [f"{value / size:,.2f}" for value in values]))
    table.append(("total", [f"{value / size:,.2f}" for value in totals]))
    table.append(("", ["fits" if value <= limit else "does not fit" for value in totals]))

    # The notes below it: the usable memory, and what saving needs on the host.
    share, rest = hardware.USABLE, "CUDA or ROCm, communication and gaps"
    if not cuda:
        share, rest = hardware.USABLE_ON_CPU, "all else and malloc's gaps"
    over = f" over {args.gpus} processes" * (not cuda and args.gpus > 1)
    whole = hardware.machine(args.gpu).memory
    copied, writers = cost.saving(cfg, args.gpus)
    copies = f"the copies of {writers} processes of about {big(copied / writers, 'B')}"
    return [
        f"memory: {unit} on {'each GPU' if cuda else 'each process'} at its peak; "
        f"micro-batch {cfg.train.micro_batch_size}, {cost.precision(cfg, cuda)}",
        *(f"  {name:<28}" + "".join(f"{value:>16}" for value in values) for name, values in table),
        f"  >: the plan; its peak is when {plans[chosen]['at']}.",
        "  ckpt n: every n-th block is recomputed; ckpt sel.: all but matmuls and attention.",
        f"  Usable: {limit / GIB:,.1f} GiB, {share:.0%} of {whole / GIB:,.1f}{over}; the rest is for {rest}.",
        "  Host memory for saving during training: "
        f"{big(copied, 'B')} in all, {copies if writers > 1 else 'the copy of 1 process'}.",
    ]


def about_steps(cfg: Config, args: argparse.Namespace, when: cost.Schedule) -> list[str]:
    # The plan has the steps of all the data; this run makes those from `begin` to `last`.
    T, plan, begin, last = cfg.model.seq_len, when.steps, when.begin, when.last_step
    n_tokens = (plan.consumed(last) - plan.consumed(begin)) * T
    left = plan.n_rows - plan.consumed(plan.n_steps)
    about = cost.about_schedule(cfg, plan, plan.n_steps, last)
    notes = (f"steps {begin:,} to {last:,}{about}", cost.about_warmup(cfg, plan, last), when.assumed)

    # Batches: the first, and those that double, each with its micro-batches.
    size, doubled = plan.size(begin), []
    accumulation = cost.accumulation(cfg, args.gpus)
    micro_rows = cfg.train.batch_size // accumulation  # one micro-batch of each GPU
    for first, _, larger in plan.phases[1:]:
        if begin < first < last:
            note = f"{larger:,} rows, accumulation {larger // micro_rows:,}"
            doubled.append(row(f"from step {first:,}", larger * T, note))
    process = "GPU" if args.gpu != "cpu" else "process"
    micro = f"micro-batches of {cfg.train.micro_batch_size} rows a step on each {process}"

    # Chunks: all have the same number of rows, and fewer steps the larger the batch.
    n_chunks = len(when.chunks)
    each, more = divmod(plan.n_steps, n_chunks)
    chunks = f"{n_chunks} chunks" + f"; {more} of them have one step more" * (more > 0)
    if len(plan.phases) > 1:
        chunks = f"{n_chunks} chunks, on average"
    return [
        f"steps: {plan.n_rows:,} rows of {T:,} tokens, from {when.source}",
        row("tokens a step", size * T, f"{size:,} rows"),
        row("gradient accumulation", size // micro_rows, micro),
        *doubled,
        row("steps", last - begin),
        row("steps a chunk", each, chunks),
        row("tokens", n_tokens, f"{left:,} rows at the end fill no step" if left else ""),
        *(line for note in notes if note for line in sentence(note)),
    ]


def about_disk(cfg: Config, when: cost.Schedule) -> list[str]:
    # The words of the notes.
    n, n_saved = len(when.on_disk), len(when.checkpoints)
    b = cost.disk(cfg, n, when.begin)
    one = f"weights {big(b['weights'], 'B')}, moments {big(b['optimizer'], 'B')}"
    first = f"step {when.begin:,} included" + ", which has no moments" * (when.begin == 0)
    deleted = f"of {n_saved:,} that are saved, train.keep_others={cfg.train.keep_others} deletes the rest"
    deleted += "; one more is there while it is written"

    # The rows of numbers.
    id_bytes = 2 if cfg.model.vocab_size < 2**16 else 4
    rows = when.steps.n_rows * (cfg.model.seq_len + 1) * id_bytes
    return [
        "disk",
        row("one checkpoint", big(b["weights"] + b["optimizer"], "B"), one),
        row(f"all {n:,} checkpoints", big(b["all"], "B"), first),
        *(sentence(deleted) if n < n_saved else []),
        row("without the optimizer", big(b["all without optimizer"], "B")),
        row("the dataset's rows", big(rows, "B"), f"{id_bytes} bytes a token"),
    ]


def about_time(cfg: Config, args: argparse.Namespace, when: cost.Schedule) -> list[str]:
    gpu, measured = hardware.machine(args.gpu), args.tokens_per_second_per_gpu
    if not measured and not gpu.flops:
        way = "train a few steps and give --tokens-per-second-per-gpu"
        return ["time", f"  No peak is known for a CPU: {way}."]

    # Speed, measured or from the MFU; and hours.
    flops, one = sum(cost.flops_per_token(cfg.model).values()), "GPU" if gpu.flops else "process"
    speed = measured or args.mfu * gpu.flops / flops
    rows = when.steps.consumed(when.last_step) - when.steps.consumed(when.begin)
    hours = cost.hours(rows * cfg.model.seq_len, speed, args.gpus)
    out = [f"time and energy on {args.gpus} x {args.gpu}"]
    out.append(row(f"tokens a second a {one}", f"{speed:,.0f}", "stated" if measured else "from the MFU"))
    if gpu.flops:
        plain, palm = cost.mfu(cfg.model, speed, gpu.flops)
        how = "from the speed" if measured else "planned" if args.mfu_from else "stated"
        note = f"{how}; {plain:.1%} by 6N; of {gpu.flops / 1e12:,.0f} TFLOP/s, dense BF16"
        out.append(row("MFU, attention counted", f"{palm:.1%}", note))
        if args.mfu_from:
            out += sentence(cost.about_measured(args.mfu_from))
    out.append(row("hours", f"{hours:,.1f}", f"{hours / 24:,.1f} days without a pause"))
    out.append(row(f"{one}-hours", f"{hours * args.gpus:,.1f}"))

    # Energy, CO2 and money.
    watts = args.watts or gpu.watts
    if watts:
        mwh = cost.megawatt_hours(hours * args.gpus, watts)
        whose = "energy of the GPUs" if gpu.flops else "energy of the processes"
        how = "stated" if args.watts else "assumed: the limit of the board"
        note = f"{watts:,.0f} W each on average, {how}"
        out.append(row(whose, amount(mwh, "MWh", "kWh"), note))
        carbon = cost.tonnes_co2(mwh, args.pue, args.kg_co2_per_kwh)
        note = f"x PUE {args.pue:g} x {args.kg_co2_per_kwh:g} kg/kWh"
        out.append(row("CO2 equivalent", amount(carbon, "t", "kg"), note))
    else:
        out.append("  Energy: give --watts, what a process's share of the machine draws.")
    if args.price:
        out.append(row("money", f"{hours * args.gpus * args.price:,.0f}", f"at {args.price:g} a {one}-hour"))
    return out


# ---- the command ------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the overrides of settings. Raises ConfigError where a name is neither."""
    usage = "python plan.py CONFIG [flags] [--section.name=value ...]"
    parser = configurator.parser(__doc__, epilog=config.settings_help(), allow_abbrev=False, usage=usage)
    add, kinds = parser.add_argument, ", ".join((*hardware.GPUS, "cpu"))
    pue, kg = {"type": float, "default": cost.PUE}, {"type": float, "default": cost.KG_CO2_PER_KWH}
    add("config", help="configs/7b.py, or 7b")
    add("--gpu", help=f"{kinds}; 8xh100 is 8 of them; default: a100-80gb, or cpu if train.device=cpu")
    add("--gpus", type=int, help="number of processes, one per GPU; default: 8 (a node), or 1 on a CPU")
    add("--tokens", type=float, help="tokens to train on; default: the dataset's, or data.expected_tokens")
    add("--mfu", type=float, help="share of the peak, attention counted; default: from measured ones")
    add("--tokens-per-second-per-gpu", type=float, help="measured speed, instead of --mfu")
    add("--watts", type=float, help="average power of one GPU; default: the limit of its board")
    add("--pue", **pue, help="power usage effectiveness; default: 1.1, as OLMo and LLaMA")
    add("--kg-co2-per-kwh", **kg, help="carbon intensity of the grid; default: 0.385, as LLaMA")
    add("--price", type=float, help="price of a GPU-hour in any currency; default: no money is named")
    args, overrides = parser.parse_known_args(argv)

    # What argparse does not know must be a setting.
    flags = [action.option_strings[-1][2:] for action in parser._actions if action.option_strings]
    for override in overrides:
        name = override.removeprefix("--").partition("=")[0]
        if override.startswith("--") and name not in (*config.SETTINGS, *config.RENAMED):
            raise ConfigError(f"--{name}{config.did_you_mean_setting(name, flags)}")
    return args, overrides


def command_line(argv: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """The config and the flags, complete. Raises ConfigError for unknown names and impossible values."""
    args, overrides = parse(argv)
    cfg = config.load(args.config, overrides)

    # Refuse numbers that make no sense, and flags that contradict one another.
    for name, value in vars(args).items():
        zero = value == 0 and name == "kg_co2_per_kwh"  # a grid may emit nothing
        if isinstance(value, (int, float)) and not (0 < value < float("inf") or zero):
            raise ConfigError(f"--{name.replace('_', '-')}={value} must be a number above 0 and finite")
    if args.mfu and args.tokens_per_second_per_gpu:
        raise ConfigError("--mfu and --tokens-per-second-per-gpu say the same thing twice; keep one")
    if args.mfu and args.mfu > 1:
        raise ConfigError(f"--mfu={args.mfu} is a share of the peak: 40 % is 0.4")
    if args.pue < 1:
        raise ConfigError(f"--pue={args.pue}: all power over the computers' power is at least 1")

    if args.gpu:  # perhaps with a number: "8xh100"
        given = args.gpu
        count, args.gpu = hardware.by_name(given)
        if count and args.gpus not in (None, count):
            raise ConfigError(f"--gpu={given} and --gpus={args.gpus} contradict one another; keep one")
        args.gpus = count or args.gpus

    # Fill in the flags that are not given.
    trained_on = {"auto": "a100-80gb", "cpu": "cpu", "cuda": "a100-80gb"}
    args.gpu = args.gpu or config.choose("train.device", cfg.train.device, trained_on)
    assumed = not args.gpus and args.gpu != "cpu"
    args.gpus = args.gpus or (1 if args.gpu == "cpu" else 8)

    # Refuse what the machine cannot do, and a batch that does not divide over it.
    peak, speed = hardware.machine(args.gpu).flops, args.tokens_per_second_per_gpu
    if args.gpu == "cpu" and args.mfu:
        raise ConfigError("--mfu: no peak is known for a CPU; give --tokens-per-second-per-gpu")
    if speed and peak and cost.mfu(cfg.model, speed, peak)[0] > 1:
        most = peak / cost.flops_per_token(cfg.model)["6N"]
        raise ConfigError(
            f"--tokens-per-second-per-gpu={speed:,.0f} is more than {peak / 1e12:,.0f} TFLOP/s "
            f"allow: at most {most:,.0f}"
        )
    try:
        asked, cfg = cfg, memory.chosen(cfg, args.gpus, args.gpu)
        args.chosen = cfg != asked
        cost.accumulation(cfg, args.gpus)
    except ConfigError as error:
        here = f". This is for {args.gpus} x {args.gpu}, which no flag asked for: --gpus 1, or --gpu cpu"
        raise ConfigError(f"{error}{here * assumed}") from None

    # The MFU, and the measured steps that it is planned from, where no flag says it.
    args.mfu_from = []
    if not args.mfu and not speed and peak:
        args.mfu, args.mfu_from = cost.planned_mfu(cfg, args.gpu)
    return cfg, args


@configurator.script
def main(argv: list[str] | None = None) -> None:
    cfg, args = command_line(argv)
    when = cost.schedule(cfg, args.tokens or 0)
    _, shard, tp = consistency.mesh_shape(cfg.parallel, args.gpus)
    how = f", {cfg.parallel.strategy.upper()}" * (args.gpus > 1)
    how += f" over {shard}" * (1 < shard < args.gpus) + f", tensor parallel over {tp}" * (tp > 1)
    if again := cfg.train.activation_checkpointing:
        how += f", {memory.about_recompute(again)}"
    print(f"{cfg.name} on {args.gpus} x {args.gpu}{how}")
    if args.chosen:
        print("\n".join(sentence(f"chosen: {memory.about_choice(cfg, args.gpus, args.gpu)}")))

    # The memory is shown before it is judged: a plan that does not fit ends here.
    for section in (about_parameters(cfg), about_flops(cfg), about_memory(cfg, args)):
        print("\n" + "\n".join(section))
    memory.check(cfg, args.gpus, args.gpu)

    if when is None:
        missing = f"{cfg.dataset} is not built and data.expected_tokens is not set; state --tokens"
        print(f"\nsteps, disk and time\n  Not known: {missing}.")
        return
    if not cfg.optim.anneal_steps:  # annealing has no warm-up
        cost.check_warmup(cfg, when.steps)
    for section in (about_steps(cfg, args, when), about_disk(cfg, when), about_time(cfg, args, when)):
        print("\n" + "\n".join(section))


if __name__ == "__main__":
    main()
