"""Times a training step on this machine, CPU or GPU: ours beside other people's, on the same model and batch.

    python benchmarks/bench_train.py                                # on a CPU: with two vocabularies
    python benchmarks/bench_train.py --vocab_size 4096 --steps 20
    python benchmarks/bench_train.py --compile                      # ours by block, theirs as a whole
    python benchmarks/bench_train.py --compile --model 1b --rows 4  # the model of a config; a GPU
    python benchmarks/bench_train.py --compile --model gpt2         # nanoGPT's model, and a loop like its own
    python benchmarks/bench_train.py --compile --model 7b --layers 4 --rows 2    # four of its layers

nano360 is the step that train.py makes. Beside it are LlamaForCausalLM of `transformers` and GPT of `litgpt`,
where they are installed, and `plain`, a transformer as one would write it by hand (below), as nanoGPT has it:
packed projections, whole logits, compiled as a whole. All use fused AdamW and clip the gradient norm. On CUDA
all compute matmuls in BF16 under autocast.

On a CPU the model has 6 layers of width 384, and a batch has 12 rows of 256 tokens. On CUDA it is the model
of configs/124m.py with a head of its own, and a batch has 32 rows of 1,024 tokens. Each side is a process, so
that its peak memory is its own. They step in turn, so that noise of the machine reaches all. All start from
the same weights and see the same tokens, and their losses are compared. Writes the file that --json names.
"""

import dataclasses
import importlib.util
import json
import multiprocessing
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import config
import configurator
import cost
import hardware
from config import Model

# Layers, width, heads, hidden width, tokens a row, rows; and vocabularies.
NAMES = ("layers", "width", "heads", "ff", "length", "rows")
SIZES = {"cpu": (6, 384, 6, 1024, 256, 12), "cuda": (12, 768, 12, 2048, 1024, 32)}
VOCABULARIES = {"cpu": (4096, 50257), "cuda": (50304,)}
# GPT-2 124M as nanoGPT trains it, but for its LayerNorms, which have a bias here (50,304 rows are 50,257
# padded to a multiple of 64).
GPT2 = {"vocab_size": 50304, "seq_len": 1024, "d_model": 768, "n_layers": 12, "n_heads": 12, "d_ff": 3072}
GPT2 |= {"ffn": "gelu", "norm": "layernorm", "positions": "learned", "tie_embeddings": True}
WARM_UP = 3  # steps that are not counted: compilation, allocation, first touches
LR, CLIP = 1e-4, 1.0


# ---- the others -------------------------------------------------------------------------------------------


def plain(m):
    """A LLaMA or GPT-2 by hand: packed projections, whole logits; fill takes our weights."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    D, q, kv = m.d_model, m.n_heads * m.d_head, m.n_kv_heads * m.d_head
    Norm = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}[m.norm]

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = Norm(D, m.norm_eps), Norm(D, m.norm_eps)
            self.qkv = nn.Linear(D, q + 2 * kv, bias=False)
            self.out = nn.Linear(q, D, bias=False)
            self.gate_up = nn.Linear(D, m.d_ff * (1 + m.gated), bias=False)
            self.down = nn.Linear(m.d_ff, D, bias=False)

        def forward(self, x, cos, sin):
            B, T, D = x.shape
            parts = self.qkv(self.norm1(x)).split([q, kv, kv], dim=-1)
            heads = [part.view(B, T, -1, m.d_head).transpose(1, 2) for part in parts]
            if m.positions == "rope":
                heads[:2] = rotate(heads[0], cos, sin), rotate(heads[1], cos, sin)
            grouped = m.n_kv_heads < m.n_heads
            y = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=grouped)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
            hidden = self.gate_up(self.norm2(x))
            if m.gated:
                gate, up = hidden.chunk(2, dim=-1)
                return x + self.down(F.silu(gate) * up)
            return x + self.down(F.gelu(hidden))

    def rotate(x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(m.vocab_size, D)
            self.positions = nn.Embedding(m.seq_len, D) if m.positions == "learned" else None
            self.layers = nn.ModuleList(Layer() for _ in range(m.n_layers))
            self.norm = Norm(D, m.norm_eps)
            self.head = nn.Linear(D, m.vocab_size, bias=False)
            if m.tie_embeddings:
                self.head.weight = self.embed.weight
            half = m.d_head // 2
            angle = torch.outer(torch.arange(m.seq_len), m.rope_theta ** -(torch.arange(half) / half))
            self.register_buffer("cos", angle.cos())
            self.register_buffer("sin", angle.sin())

        def forward(self, tokens, targets):
            x = self.embed(tokens)
            if self.positions is not None:
                x = x + self.positions.weight[: tokens.shape[1]]
            for layer in self.layers:
                x = layer(x, self.cos, self.sin)
            return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())

        def fill(self, w):
            state = {"embed.weight": w["embed_tokens.weight"], "cos": self.cos, "sin": self.sin}
            state["head.weight"] = w["embed_tokens.weight" if m.tie_embeddings else "lm_head.weight"]
            if self.positions is not None:
                state["positions.weight"] = w["embed_positions.weight"]
            packed = {"norm": ("norm",)}
            for i in range(m.n_layers):
                for name, parts in PACKED.items():
                    packed[f"layers.{i}.{name}"] = [f"layers.{i}.{part}" for part in parts]
            for name, parts in packed.items():
                for kind in ("weight", "bias"):
                    if found := [w[f"{part}.{kind}"] for part in parts if f"{part}.{kind}" in w]:
                        state[f"{name}.{kind}"] = torch.cat(found)
            self.load_state_dict(state)

    return Transformer()


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
PACKED = {
    "norm1": ("input_layernorm",),
    "qkv": ATTENTION,
    "out": ("self_attn.o_proj",),
    "norm2": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
LITGPT = {
    "norm_1": ("input_layernorm",),
    "attn.qkv": ATTENTION,
    "attn.proj": ("self_attn.o_proj",),
    "norm_2": ("post_attention_layernorm",),
    "mlp.fc_1": ("mlp.gate_proj",),
    "mlp.fc_2": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}


def other(name: str, m, weights: dict):
    """A model with these weights, and its loss as its own trainer takes it: f(net, inputs, targets)."""
    if name == "plain":
        net = plain(m)
        net.fill(weights)
        return net, lambda net, inputs, targets: net(inputs, targets)
    if name == "transformers":
        from transformers import LlamaConfig, LlamaForCausalLM

        from formats.families import hf_config, to_family

        # shift_labels takes the targets as they are, so that it too computes T positions, not T + 1.
        net = LlamaForCausalLM(LlamaConfig(**{**hf_config(m), "use_cache": False}))
        net.load_state_dict(to_family(weights, m), strict=not m.tie_embeddings)
        net.tie_weights()
        return net, lambda net, inputs, targets: net(inputs, labels=targets, shift_labels=targets).loss

    # litgpt: its names for the sizes, and our weights under its names.
    import torch
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    sizes = {"n_layer": m.n_layers, "n_embd": m.d_model, "n_head": m.n_heads, "intermediate_size": m.d_ff}
    sizes |= {"block_size": m.seq_len, "vocab_size": m.vocab_size, "padded_vocab_size": m.vocab_size}
    sizes |= {"n_query_groups": m.n_kv_heads}
    kind = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "rotary_percentage": 1.0}
    net = GPT(Config(**sizes, **kind, norm_eps=m.norm_eps, parallel_residual=False, bias=False))
    if m.tie_embeddings:
        net.lm_head.weight = net.transformer.wte.weight
    head = "embed_tokens" if m.tie_embeddings else "lm_head"
    names = {"transformer.wte": "embed_tokens", "lm_head": head, "transformer.ln_f": "norm"}
    state = {f"{theirs}.weight": weights[f"{ours}.weight"] for theirs, ours in names.items()}
    for i in range(m.n_layers):
        for theirs, parts in LITGPT.items():
            whole = torch.cat([weights[f"layers.{i}.{part}.weight"] for part in parts])
            state[f"transformer.h.{i}.{theirs}.weight"] = whole
    net.load_state_dict(state)
    return net, lambda net, inputs, targets: chunked_cross_entropy(net(inputs), targets)


# ---- a step of each ---------------------------------------------------------------------------------------


def stepper(name: str, m, args):
    """(step, device): step takes tokens (B, T+1) on that device, trains on them and returns their loss."""
    from config import Config, Optim, Train

    compiles = "on" if args.compile else "off"
    train = Train(batch_size=args.rows, micro_batch_size=args.rows, device=args.device, compile=compiles)
    cfg = Config(model=m, optim=Optim(lr=LR, grad_clip=CLIP), train=train)
    return step_of_ours(cfg) if name == "nano360" else step_of_another(name, cfg, args)


def step_of_ours(cfg):
    """As stepper: the step of train.py."""
    import optim
    import parallel
    import sharding
    import train
    from initial import initial_weights

    world = parallel.start(cfg.train, cfg.parallel)
    model, optimizers = train.build(cfg, world, eot=None)
    world.fill(model, initial_weights(sharding.bare(model), 0))

    def step(rows):
        n_targets = rows[:, 1:].numel()
        sums = train.forward_backward(model, rows, n_targets, train.next_token_loss, world, cfg)
        grad_norm, total = world.sum(optim.grad_norm(model), sums["loss"])
        optim.update(model, optimizers, LR, grad_norm, CLIP)
        return total / n_targets

    return step, world.device


def step_of_another(name: str, cfg, args):
    """As stepper: a model of `other`, trained in the usual way, in the same precision."""
    import torch

    import parallel
    from model import Transformer

    # Device and precision, as parallel.start chooses them for ours.
    device = hardware.device(args.device)
    dtype = parallel.precision("auto", device)
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("high")
    if args.malloc_for_all and device.type == "cpu":
        hardware.keep_freed_memory()

    # The model with our first weights, and its optimizer.
    first = Transformer(cfg.model)
    first.init_weights(0)
    net, loss_of = other(name, cfg.model, first.state_dict())
    del first
    net.to(device)
    run = torch.compile(net) if args.compile else net
    o = cfg.optim
    recipe = {"lr": LR, "betas": (o.beta1, o.beta2), "eps": o.eps, "weight_decay": o.weight_decay}
    adamw = torch.optim.AdamW(net.parameters(), **recipe, fused=True)

    def step(rows):
        with parallel.autocast(device, dtype):
            loss = loss_of(run, rows[:, :-1], rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()

    return step, device


def side(name: str, m, args, pipe) -> None:
    """One side, in a process of its own: for every message a step, and (seconds, loss, peak MiB) back."""
    import torch

    torch.set_num_threads(args.threads)
    step, device = stepper(name, m, args)
    generator = torch.Generator().manual_seed(1)
    while pipe.recv():
        tokens = torch.randint(m.vocab_size, (args.rows, m.seq_len + 1), generator=generator).to(device)
        start = time.perf_counter()
        loss = step(tokens)
        if device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:  # not getrusage's maximum: a new process inherits that from the one that started it
            peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 2**10
        pipe.send((time.perf_counter() - start, loss, peak / 2**20))


def flops_per_token(m) -> float:
    """6 x (parameters that are multiplied: no table that is only looked up) + 12 L (H Dh) T."""
    counts, flops = cost.parameters(m), cost.flops_per_token(m)
    looked_up = counts["learned positions"] + counts["embedding"] * (not m.tie_embeddings)
    return sum(flops.values()) - 6 * looked_up


def compare(m, args) -> dict:
    """Prints a table and returns its figures."""
    # A process for each side. Their first steps, in which they compile, are made at the same time.
    pipes, processes, results = {}, [], {}
    spawn = multiprocessing.get_context("spawn")
    for name in args.sides:
        pipes[name], there = spawn.Pipe()
        processes.append(spawn.Process(target=side, args=(name, m, args, there), daemon=True))
        processes[-1].start()
        there.close()  # if the side dies, recv raises EOFError instead of waiting for ever
        pipes[name].send(True)
    for name in args.sides:
        try:
            results[name] = [pipes[name].recv()]
        except (EOFError, ConnectionError):
            print(f"{name} failed; its message is above", flush=True)
            if name == "nano360":
                raise
    names = list(results)

    # The steps, one side after another; another side begins each time.
    for step in range(args.steps + WARM_UP):
        for i in range(len(names)):
            name = names[(step + i) % len(names)]
            pipes[name].send(True)
            results[name].append(pipes[name].recv())
    for name in names:
        pipes[name].send(False)
    for process in processes:
        process.join()

    # They must compute the same.
    losses = {name: [loss for _, loss, _ in results[name]] for name in names}
    differences = [abs(a - b) for theirs in losses.values() for a, b in zip(losses["nano360"], theirs)]
    assert all(d < 0.01 for d in differences), f"the sides compute different losses: {losses}"  # NaN too
    apart = max(differences)
    what = f"{args.model or 'model'}, {m.n_layers} layers, vocabulary {m.vocab_size:,}"
    what += f", {args.rows} x {m.seq_len} tokens" + ", compiled" * args.compile
    print(f"\n{what}; losses differ by at most {apart:.1e}")

    # Each side's speed and memory.
    figures = {"vocab_size": m.vocab_size, "model": dataclasses.asdict(m), "compile": args.compile}
    figures |= {"rows": args.rows, "losses_apart": apart, "sides": {}}
    seconds = {name: [s for s, _, _ in results[name][1 + WARM_UP :]] for name in names}
    n_tokens, peak_flops = args.rows * m.seq_len, hardware.peak_flops(args.device_name)
    for name in names:
        median, peak, first = statistics.median(seconds[name]), results[name][-1][2], results[name][0][0]
        figures["sides"][name] = {
            "seconds": median,
            "tokens_per_second": n_tokens / median,
            "peak_mib": peak,
            "first_step_seconds": first,
        }
        share = ""
        if peak_flops:
            mfu = n_tokens / median * flops_per_token(m) / peak_flops
            figures["sides"][name]["mfu"], share = mfu, f"   MFU {mfu:.1%}"
        spread = f"{median:.3f} s a step ({min(seconds[name]):.3f} to {max(seconds[name]):.3f})"
        memory = f"peak {peak:,.0f} MiB   first step {first:.1f} s{share}"
        print(f"  {name:<13} {n_tokens / median:>9,.0f} tokens/s   {spread}   {memory}")

    # Ours against each other side, by pairs of steps that followed one another.
    others = [name for name in names if name != "nano360"]
    figures["ratios"] = ratios = {}
    for name in others:
        pairs = [theirs / ours for ours, theirs in zip(seconds["nano360"], seconds[name])]
        ratios[name] = statistics.median(pairs)
        print(f"  speed, nano360 / {name}: {ratios[name]:.2f} (median of {args.steps} pairs)")
    if others:
        figures["best_other"] = best = min(others, key=lambda name: statistics.median(seconds[name]))
        print(f"  the best other is {best}: nano360 is {ratios[best]:.2f} times as fast")
    return figures


def shape_of(args) -> tuple[dict, int]:
    """The settings of the model, and the rows of a batch."""
    given = {name: getattr(args, name) for name in NAMES if getattr(args, name) is not None}
    if min([args.steps, *given.values()]) < 1:
        raise config.ConfigError("--steps, and the sizes of model and batch, are at least 1")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise config.ConfigError(f"--json={args.json}: there is no folder {Path(args.json).parent}")
    names = dict(zip(NAMES, ("n_layers", "d_model", "n_heads", "d_ff", "seq_len"), strict=False))
    defaults = dict(zip(NAMES, SIZES[args.device], strict=True))
    if args.model == "gpt2":
        shape = dict(GPT2)
    elif args.model:
        shape = dataclasses.asdict(config.load(args.model).model)
        if "width" in given:  # these follow from the width
            shape |= {"d_head": 0, "n_kv_heads": 0}
    else:
        shape = {names[name]: value for name, value in defaults.items() if name in names}
    shape |= {names[name]: value for name, value in given.items() if name in names}
    return shape, given.get("rows", defaults["rows"])


def main() -> None:
    parser = configurator.parser(__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--model", help="a config's name, or gpt2; the sizes below change it")
    parser.add_argument("--vocab_size", type=int, nargs="+")
    for name in NAMES:
        parser.add_argument(f"--{name}", type=int, help=f"{name} of the model, or of the batch")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=multiprocessing.cpu_count())
    known = ("nano360", "transformers", "litgpt", "plain")
    parser.add_argument("--sides", nargs="+", choices=known, help="nano360 is always one")
    help = "on a CPU the others also keep freed memory as train.py does (hardware.keep_freed_memory)"
    parser.add_argument("--malloc-for-all", action="store_true", help=help)
    parser.add_argument("--json", help="a file to write the figures to")
    args = parser.parse_args()

    # Fill in the device, the sizes and the sides that were not given.
    args.device_name = ""
    if args.device != "cpu":
        import torch

        if torch.cuda.is_available():
            args.device_name = torch.cuda.get_device_name(0)
        args.device = "cuda" if args.device == "cuda" or args.device_name else "cpu"
    try:
        shape, args.rows = shape_of(args)
        Model(**shape).resolved()
    except config.ConfigError as error:
        configurator.fail(error)
    sizes = args.vocab_size or ([shape["vocab_size"]] if args.model else VOCABULARIES[args.device])
    there = [name for name in known if name in ("nano360", "plain") or importlib.util.find_spec(name)]
    if shape.get("norm") == "layernorm":  # GPT-2: the others' classes here are LLaMA's
        there = ["nano360", "plain"]
    missing = [name for name in known if name not in there]
    args.sides = [name for name in there if not args.sides or name in ("nano360", *args.sides)]
    where = f"{platform.platform()}, Python {platform.python_version()}, {args.device_name or args.device}"
    absent = f"; not compared: {', '.join(missing)}" if missing else ""
    print(f"{where}, {args.threads} threads{absent}", flush=True)

    models = [Model(**{**shape, "vocab_size": size}).resolved() for size in sizes]
    figures = [compare(model, args) for model in models]
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        written = {"format": 1, "settings": settings, "tables": figures}
        Path(args.json).write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
