"""The training loop, the only one: rows in training order -> checkpoints, one at the end of every data chunk.

    python train.py configs/demo.py                              # one process
    python train.py demo --init_from=models/mine --run=runs/new  # from weights that are there
    torchrun --nproc_per_node=8 train.py configs/7b.py           # eight GPUs, the same program

Reads the dataset folder that data.py built. Writes the run folder (checkpoint.py). Ctrl-C and SIGTERM save a
checkpoint and leave. The same command again goes on from the newest complete checkpoint, after kill -9 too,
and ends with the same weights, bit for bit, as a run that was never interrupted (on the same hardware and
number of processes, a CPU; on CUDA this is not secured yet).
"""

if __name__ == "__main__":  # before torch, which takes seconds to import: help and mistakes answer at once
    import config

    CONFIG = config.from_command_line(__doc__)

import dataclasses
import math
import signal
import sys
import time
from pathlib import Path

import safetensors
import torch

import checkpoint
import config
import cost
import files
import ledger
import optim
import parallel
import tokenizer as tokenizers
from config import Config, ConfigError
from dataset import Dataset, differences
from families import model_config
from model import Transformer


class Interrupted:
    """`came` says that Ctrl-C or SIGTERM has; the loop then saves and leaves. A second one ends at once."""

    def __init__(self):
        self.came = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.came = True
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


class NotFinite(RuntimeError):
    """The loss or the gradient is not a number any more."""


def train(cfg: Config) -> None:
    """Trains cfg.run from where it stands to the end of the data, or to train.steps."""
    # Settings are checked before the processes meet and before the first file is written.
    accumulation = config.accumulation_steps(
        cfg.train.batch_size, cfg.train.micro_batch_size, parallel.world_size()
    )
    if Path(cfg.run).exists() and not Path(cfg.run).is_dir():
        raise ConfigError(f"--run={cfg.run} is a file; name a folder")
    dataset = open_dataset(cfg)
    origin = None if checkpoint.checkpoints(cfg.run) else open_origin(cfg, dataset)
    n_steps = dataset.n_rows // cfg.train.batch_size  # of the schedule; the ledger names the rows left over
    last_step = min(cfg.train.steps or n_steps, n_steps)
    chunk_ends = [dataset.chunk_range(chunk)[1] for chunk in range(dataset.n_chunks)]
    save_at = cost.checkpoint_steps(cfg, chunk_ends, last_step)
    run, tokens_a_step = Path(cfg.run), cfg.train.batch_size * cfg.model.seq_len
    changed = ledger.check_same_run(cfg, dataset)
    everyone = parallel.start(cfg.train)
    everyone.once(ledger.lock, run)
    resumed = (checkpoint.checkpoints(run) or [None])[-1]
    if resumed and resumed.step >= last_step:
        everyone.once(
            ledger.say, f"{run} is trained: {resumed.path.name} is its last checkpoint; nothing to do"
        )
        everyone.once(ledger.close, cfg, resumed.step, changed)
        ledger.LOCKS.clear()
        return everyone.leave()
    interrupted = Interrupted()

    model = Transformer(cfg.model, dataset.manifest["eot"])
    step = 0
    if resumed:
        step = resumed.step
        checkpoint.load_weights(resumed.path, model)
    elif origin:
        checkpoint.load_weights(origin, model)
    else:
        model.init_weights(cfg.train.seed)
    model.to(everyone.device)
    optimizer = optim.adamw(model, cfg.optim, cfg.model.mup_scale)
    if resumed:
        checkpoint.load_optimizer(resumed.path, model, optimizer)
    else:
        torch.manual_seed(cfg.train.seed)
    wrapped = everyone.wrap(model)

    def log(event: str, **record) -> None:
        everyone.once(files.append, run / "ledger.jsonl", {"event": event, "time": time.time(), **record})

    def save() -> None:
        rows = step * cfg.train.batch_size
        state = {
            "step": step,
            "rows": rows,  # position in the order: rows 0 .. rows - 1 have been trained on
            "tokens": step * tokens_a_step,
            "chunk": newest_chunk(dataset, rows, step == n_steps),
            "eot": dataset.manifest["eot"],
            "dataset_sha256": dataset.sha256,
            "tokenizer_sha256": dataset.manifest["tokenizer"]["sha256"],
            "world_size": everyone.world_size,
        }
        everyone.once(checkpoint.save, run, model, optimizer, state, ledger.tokenizer_files(dataset))
        log("checkpoint", step=step, chunk=state["chunk"], checkpoint=f"step-{step:08d}")

    machine = ledger.about_machine(everyone)
    everyone.once(ledger.write_run, cfg, dataset, machine, model)
    log(
        "resume" if resumed else "start",
        step=step,
        steps=last_step,
        world_size=everyone.world_size,
        accumulation=accumulation,
        init_from=str(origin) if origin else None,
        rows_never_trained=dataset.n_rows - n_steps * cfg.train.batch_size,
        changed=changed,
        **machine,
    )
    everyone.once(ledger.greet, cfg, dataset, everyone, model, step, last_step, n_steps, accumulation)
    if not resumed:
        save()

    began, began_at = time.perf_counter(), step
    while step < last_step:
        t0 = time.perf_counter()
        # (B / processes, T+1)
        batch = dataset.batch(step, cfg.train.batch_size)[everyone.share(cfg.train.batch_size)]
        batch = torch.from_numpy(batch).to(everyone.device)
        t1 = time.perf_counter()

        lr = optim.learning_rate(step, n_steps, cfg.optim)
        optim.set_rate(optimizer, lr)
        nats = torch.zeros((), device=everyone.device)
        for i, micro in enumerate(batch.split(cfg.train.micro_batch_size)):
            with everyone.accumulate(wrapped, last=i == accumulation - 1):
                with parallel.autocast(everyone.device, everyone.dtype):
                    loss = wrapped(micro[:, :-1], micro[:, 1:])  # a sum over this micro-batch
                # The gradient of the mean over the global batch; DDP divides by the processes: undo that.
                (loss * (everyone.world_size / tokens_a_step)).backward()
            nats += loss.detach()
        norm = optim.clip(model, cfg.optim.grad_clip)
        loss, stop, norm_sum = everyone.sum(nats, interrupted.came, norm)
        loss, norm = loss / tokens_a_step, norm_sum / everyone.world_size  # every process has the same norm
        if not (math.isfinite(loss) and math.isfinite(norm)):
            not_finite(cfg, dataset, step, loss, norm, log)
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        seconds = time.perf_counter() - t0
        record = {
            "step": step,
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "tokens": step * tokens_a_step,
            "tokens_per_second": tokens_a_step / seconds,
            "seconds": seconds,
            "data_seconds": t1 - t0,
            "chunk": dataset.chunk_of(step * cfg.train.batch_size - 1),
            "time": time.time(),
        }
        everyone.once(ledger.log_step, run, record)
        if step % cfg.train.log_every == 0 or step in (1, last_step):
            pace = (time.perf_counter() - began) / (step - began_at)
            everyone.once(ledger.say, ledger.step_line(record, last_step, (last_step - step) * pace))
        if step in save_at or stop:
            save()
        if stop and step < last_step:
            log("interrupted", step=step)
            everyone.once(
                ledger.say, f"interrupted and saved at step {step}; the same command goes on from there"
            )
            break
    else:
        log("finish", step=step, seconds=time.perf_counter() - began)
    ledger.LOCKS.clear()
    everyone.leave()


# ---- before the loop --------------------------------------------------------------------------------------


def open_dataset(cfg: Config) -> Dataset:
    """The dataset of a config. ConfigError where it does not fit the model, or is not the one asked for."""
    if not Path(cfg.dataset, "manifest.json").exists():
        raise ConfigError(
            f"there is no dataset in {cfg.dataset}; build it: python data.py, same config, same overrides"
        )
    dataset = Dataset(cfg.dataset)
    if dataset.seq_len != cfg.model.seq_len:
        raise ConfigError(
            f"{cfg.dataset} has rows of {dataset.seq_len} tokens and model.seq_len={cfg.model.seq_len}; "
            "build it again with python data.py"
        )
    if dataset.vocab_size > cfg.model.vocab_size:
        raise ConfigError(
            f"{cfg.dataset} has ids up to {dataset.vocab_size - 1} and model.vocab_size="
            f"{cfg.model.vocab_size}; set model.vocab_size to at least {dataset.vocab_size}"
        )
    # Rows need not come in multiples of this batch; and the same files may lie elsewhere on another machine.
    names = [source.name for source in cfg.data.sources]
    differs = [d for d in differences(dataset.manifest, cfg) if not d.startswith(("train.", "data.sources="))]
    if differs or names != dataset.sources:
        raise ConfigError(
            f"{cfg.dataset} is not what the config asks for: {'; '.join(differs) or 'other sources'}; "
            "build it again with python data.py, or name another with --dataset=FOLDER"
        )
    if dataset.n_rows < cfg.train.batch_size:
        raise ConfigError(
            f"{cfg.dataset} has {dataset.n_rows} rows, train.batch_size={cfg.train.batch_size}: not one step"
        )
    return dataset


def open_origin(cfg: Config, dataset: Dataset) -> Path | None:
    """The model folder that init_from names. ConfigError where that is another model or tokenizer.

    Only weights are taken from it: the optimizer, the schedule and the data begin anew.
    """
    if not cfg.init_from:
        return None
    folder = checkpoint.model_folder(cfg.init_from)
    theirs, ours = dataclasses.asdict(model_config(folder)), dataclasses.asdict(cfg.model)
    free = ("seq_len", "document_mask") if cfg.model.positions != "learned" else ("document_mask",)
    free += tuple(name for name in ours if name.startswith("init"))
    differs = [name for name in ours if name not in free and ours[name] != theirs[name]]
    if differs:
        settings = " ".join(f"--model.{name}={theirs[name]}" for name in differs)
        if "mup_base_width" in differs:  # which the kind of initialisation goes with
            settings += f" --model.init={'mup' if theirs['mup_base_width'] else 'normal'}"
        raise ConfigError(f"--init_from={cfg.init_from} is a model with other settings; add {settings}")
    known = [path for path in (folder / "tokenizer.json", folder / "tokenizer.model") if path.exists()]
    if known and not tokenizers.equal(tokenizers.load(folder), tokenizers.load(dataset.folder)):
        raise ConfigError(
            f"{cfg.dataset} was made with another tokenizer than {known[0]}; build one with that: "
            f"python data.py, same config, --tokenizer.path={folder} --dataset=ANOTHER_FOLDER"
        )
    return folder


def newest_chunk(dataset: Dataset, rows: int, finished: bool) -> int:
    """The last chunk whose rows have all been trained on, -1 for none.

    The tail of the last chunk, shorter than a batch, is never trained on (the ledger names it), so a finished
    run has used up the last chunk.
    """
    if finished:
        return dataset.n_chunks - 1
    return sum(dataset.chunk_range(chunk)[1] <= rows for chunk in range(dataset.n_chunks)) - 1


# ---- in the loop ------------------------------------------------------------------------------------------


def not_finite(cfg: Config, dataset: Dataset, step: int, loss: float, norm: float, log) -> None:
    """Ends the run before the optimizer is touched, naming what was being learned."""
    first = step * cfg.train.batch_size
    last = first + cfg.train.batch_size - 1
    documents = {(d[0], d[1]) for position in range(first, last + 1) for d in dataset.documents(position)}
    names = sorted(f"{source}:{name}" for source, name in documents)
    some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    chunk = dataset.chunk_of(first)
    about = {"loss": str(loss), "grad_norm": str(norm), "chunk": chunk, "rows": [first, last]}
    log("nonfinite", step=step, **about, documents=names)
    raise NotFinite(
        f"loss {loss} and gradient norm {norm} in the step after step {step}: chunk {chunk}, rows {first} to "
        f"{last}, {len(names)} documents: {some} (all of them in "
        f"{cfg.run}/ledger.jsonl). The optimizer has not moved and the newest checkpoint is good; a lower "
        "optim.lr or a tighter optim.grad_clip, in a run of its own (--run=FOLDER), is the usual remedy"
    )


def main(cfg: Config) -> None:
    try:
        train(cfg)
    except ConfigError as error:
        config.fail(error)
    except NotFinite as error:
        config.fail(error, code=1)
    except KeyboardInterrupt:
        sys.exit(130)  # before the first step, or a second Ctrl-C: what is on disk is whole
    except (OSError, safetensors.SafetensorError) as error:  # a full disk, a missing permission
        config.fail(f"{cfg.run}: {error}; earlier checkpoints are whole", code=1)


if __name__ == "__main__":
    main(CONFIG)
