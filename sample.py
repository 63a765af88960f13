"""Writes text with a checkpoint and a key/value cache: `generate` for a batch, `stream` token by token.

    python sample.py runs/demo --prompt "def "                     # newest checkpoint, text as it comes
    python sample.py runs/demo --checkpoint 605 --temperature 0    # greedy, from the start of a document
    python sample.py path/to/checkpoint --prompt "Once" --save     # also adds it to the run's samples.jsonl
    python sample.py runs/demo --prompt "def" --prompt "The"       # one text after another

The prompt runs through the model once and leaves keys and values in the cache. After that, each step reads
one token per sequence. Reads a run folder, a checkpoint folder, or any Hugging Face folder that checkpoint.py
can load. Writes nothing, except with --save: it then appends a line to RUN/samples.jsonl, whose "text" begins
with the prompt.

Shapes: B sequences, P tokens of prompt, V vocabulary.
"""

if __name__ == "__main__":  # before torch, which takes seconds to import
    import configurator

    configurator.quiet_imports()

import argparse
import codecs
import copy
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
import configurator
import files
import hardware
import integrity
import run_folder
import tokenizer as tokenizers
from config import ConfigError
from linear import linear
from masks import Cache
from model import Transformer

# Maximum number of prompt tokens in one forward: 2048 tokens x d_ff 1024 x 4 bytes = 8 MiB per activation,
# which fits into a CPU's cache. Decoding has no such limit: a step reads each matrix once for all sequences,
# so more is faster.
PREFILL_TOKENS = 2048


def generate(
    model: Transformer,
    tokens: Tensor,
    n: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Prompts (B, P) int64 -> (B, P + n): the prompts and n more tokens each.

    Prompts that differ in length are padded on the right, with any token, and `lengths` (B) gives their
    lengths; row b of the result then continues at lengths[b], and ends with the padding that is left. With
    `stop`, a sequence that has produced this token is filled up with it. `choose` and `distribution` explain
    the other arguments. Raises ConfigError as `stream` does.
    """
    out = F.pad(tokens, (0, n), value=0 if stop is None else stop)  # (B, P + n)
    ends = torch.full_like(tokens[:, :1], tokens.shape[1]) if lengths is None else lengths[:, None]  # (B, 1)
    if stop is not None:  # over padding too: the loop ends when all have stopped
        out.scatter_(1, ends + torch.arange(n, device=out.device), stop)
    stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for i, token in enumerate(stream(model, tokens, n, temperature, top_k, top_p, generator, lengths)):
        if stop is not None:
            token = token.masked_fill(stopped, stop)
            stopped |= token == stop
        out.scatter_(1, ends + i, token[:, None])
        if stop is not None and stopped.all():
            break
    return out


@torch.inference_mode()
def stream(
    model: Transformer,
    tokens: Tensor,
    n: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    lengths: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of each prompt (B, P), n times: (B,) int64. Padding: as in `generate`.

    Raises ConfigError if that needs a position that the model was never trained on. The last token is not
    read again, so P + n - 1 positions are used. A prompt is never truncated on the left to make room: that
    would silently give the text of another prompt.
    """
    # Check the arguments.
    B, P = tokens.shape
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
        raise ConfigError(
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}: temperature and top_k are at least 0, "
            "top_p is above 0 and at most 1"
        )
    if P == 0 or P + n - 1 > model.cfg.seq_len:
        raise ConfigError(
            f"{P} tokens of prompt and {n} more do not fit: a prompt has 1 or more, and the model has seen "
            f"{model.cfg.seq_len} positions, enough for {model.cfg.seq_len + 1} tokens in all"
        )
    if lengths is not None and not (lengths.shape == (B,) and lengths.min() >= 1 and lengths.max() <= P):
        raise ConfigError(f"lengths {lengths.tolist()} of {B} prompts of {P} tokens: give each as 1 to {P}")
    if n < 1:
        return

    # Read the prompts, then choose and read one token at a time.
    autocast = torch.is_autocast_enabled(tokens.device.type)
    dtype = torch.get_autocast_dtype(tokens.device.type) if autocast else model.embed_tokens.weight.dtype
    cache = Cache(model.cfg, B, P + n - 1, tokens.device, dtype)
    logits = prefill(model, tokens, cache, lengths)  # (B, V)
    for i in range(n):
        token = choose(logits, temperature, top_k, top_p, generator)  # (B)
        yield token
        if i < n - 1:
            logits = linear(model.hidden(token[:, None], cache)[:, -1], model.head).float()


def prefill(model: Transformer, tokens: Tensor, cache: Cache, lengths: Tensor | None) -> Tensor:
    """Reads prompts (B, P) into the empty cache, some at a time -> logits (B, V) of the token after each.

    It computes no other logits: for a prompt of 32 tokens the other 31 rows of logits would be a tenth of all
    work, and most of the memory.
    """
    logits, parts, P = [], [], tokens.shape[1]
    for rows in torch.arange(len(tokens)).split(max(1, PREFILL_TOKENS // P)):
        some, part = slice(rows[0], rows[-1] + 1), copy.copy(cache)
        part.keys, part.values = cache.keys[:, some], cache.values[:, some]  # views: what is written stays
        length = None if lengths is None else lengths[some]
        h = model.hidden(tokens[some], part, length)  # (b, P, D)
        last = h[:, -1] if length is None else h[torch.arange(len(h), device=h.device), length - 1]
        logits.append(linear(last, model.head).float())
        parts.append(part)
    cache.advance(P, lengths)
    if model.cfg.document_mask:
        cache.document_start = torch.cat([part.document_start for part in parts])
    return torch.cat(logits)


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator=None) -> Tensor:
    """Logits (B, V) -> one token each, (B,): greedy at temperature 0 (equals: the lowest id), or drawn."""
    if temperature == 0:
        return logits.argmax(-1)
    p, ids = distribution(logits, temperature, top_k, top_p)
    return ids.gather(1, torch.multinomial(p, 1, generator=generator)).squeeze(1)


def distribution(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The distribution to draw from: (probabilities, ids), both (B, V), the likeliest first; ruled out: 0.

    softmax(logits / temperature). top_k keeps the k likeliest tokens (0: all; among equals the lower id),
    then top_p keeps the fewest whose probabilities sum to p or more (Holtzman et al. 2020, section 3.1).
    """
    logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    logits = (logits - logits[:, :1]) / temperature  # the peak at 0: a tiny temperature cannot overflow
    if top_k:
        logits[:, top_k:] = -torch.inf
    p = logits.softmax(-1)
    if top_p < 1:
        p = p * (p.cumsum(-1) - p < top_p)  # keep a token while the sum before it is below p
    return p / p.sum(-1, keepdim=True), ids


def text_of(tokenizer, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yields pieces of text as their tokens come, up to the end-of-text token.

    A character whose bytes are spread over several tokens is held back until it is whole. Bytes that are not
    UTF-8 become U+FFFD, and so does an id beyond the tokenizer's vocabulary (the embedding may have more
    rows). A token's bytes are those by which the decoded text grows, because SentencePiece decodes a token
    differently after different tokens.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    ids = list(prompt)
    done = len(tokenizer.decode_bytes(ids))
    for token in tokens:
        if token == tokenizer.eot:
            break
        if token >= tokenizer.vocab_size:
            yield decoder.decode(b"", final=True) + "\ufffd"
            continue
        ids.append(token)
        text = tokenizer.decode_bytes(ids)
        yield decoder.decode(text[done:])
        done = len(text)
    yield decoder.decode(b"", final=True)


# ---- the command line -------------------------------------------------------------------------------------


def sample(args: argparse.Namespace) -> None:
    """Checks the arguments, loads the model, and writes a text for each prompt."""
    # Find the checkpoint, and check the arguments.
    folder = integrity.model_folder(args.folder, args.checkpoint, args.verify)
    if args.save and folder.resolve().parent.name != "checkpoints":
        raise ConfigError(
            f"--save writes beside the run's results, and {folder} is in no run; leave --save out"
        )
    if args.tokens is not None and args.tokens < 1:
        raise ConfigError(f"--tokens {args.tokens}: use 1 or more")
    if not -(2**63) < args.seed < 2**63 or args.top_k >= 2**63 or args.temperature == float("inf"):
        raise ConfigError("--seed and --top_k fit into 64 bits, and --temperature is a finite number")

    # Load the model; then one text after another, each from the same seed, as if it were alone.
    device = hardware.device("auto")
    model = checkpoint.load_model(folder, device, args.verify)
    tokenizer = tokenizers.load(folder)
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" rather than a traceback
    for prompt in args.prompt or [""]:
        # A shell passes bytes that are not UTF-8 as surrogates, which no tokenizer can encode.
        prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        write(model, tokenizer, prompt, folder, args)


def write(model: Transformer, tokenizer, prompt: str, folder: Path, args: argparse.Namespace) -> None:
    """Prints a prompt and the text that is drawn after it; with --save, appends them to samples.jsonl."""
    # Models trained here have no BOS: for them a document begins after the end-of-text of the one before.
    device = model.embed_tokens.weight.device
    start = tokenizer.eot if tokenizer.bos is None else tokenizer.bos
    begins = {"auto": tokenizer.adds_bos, "on": True, "off": False}[args.bos]
    ids = [start] * begins + tokenizer.encode(prompt) or [tokenizer.eot]

    # Draw tokens, and print their text as it comes.
    room = model.cfg.seq_len + 1 - len(ids)
    n = min(200 if args.tokens is None else args.tokens, max(room, 1))  # no room at all: stream refuses
    generator = torch.Generator(device).manual_seed(args.seed)
    how = (args.temperature, args.top_k, args.top_p)
    tokens = stream(model, torch.tensor([ids], device=device), n, *how, generator)
    tokens = (token.item() for token in tokens)
    first = list(itertools.islice(tokens, 1))  # stream refuses a mistake here, before anything is printed
    text = prompt
    print(prompt, end="", flush=True)
    try:
        for piece in text_of(tokenizer, ids, itertools.chain(first, tokens)):
            text += piece
            print(piece, end="", flush=True)
    finally:
        print()

    # Save the text, with everything that decides it.
    if args.save:
        names = dict(zip(("temperature", "top_k", "top_p"), how))
        record = {"format": 1, "checkpoint": folder.resolve().name, "prompt": prompt, "text": text, **names}
        record |= {"seed": args.seed} | ({"bos": start} if begins else {})
        record |= {} if args.verify else {"verified": False}
        files.append(folder.resolve().parents[1] / "samples.jsonl", record)


@configurator.script
def main() -> None:
    parser = configurator.parser(__doc__, allow_abbrev=False)
    parser.add_argument("folder", metavar="RUN|CHECKPOINT")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="can be given several times; empty: the start of a document; special tokens in it are text",
    )
    parser.add_argument(
        "--bos", choices=("auto", "on", "off"), default="auto",
        help="put the token that begins a text before the prompt; auto: if the model's own tokenizer does "
        "(LLaMA, llama2.c; no model trained here); on: the end-of-text token if there is no other",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, help="at most N, or fewer if the model has no more room (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the k likeliest tokens; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest that add up to p")
    parser.add_argument(
        "--seed", type=int, default=1234, help="the same seed, device and version give the same text"
    )
    parser.add_argument(
        "--checkpoint", type=run_folder.step_number, metavar="STEP", help="default: the newest complete one"
    )
    parser.add_argument("--save", action="store_true", help="append to RUN/samples.jsonl")
    configurator.add_no_verify(parser)
    sample(parser.parse_args())


if __name__ == "__main__":
    main()
