"""Byte-pair encoding on bytes: learned (texts -> pieces and their counts -> merges), and run by tiktoken.

    counts = bpe.count_pieces(texts, bpe.SPLITS["gpt4"])       # {"the": 1203, " quick": 8, ...}
    merges = bpe.learn_merges(counts, n_merges=32000 - 256)    # [(left id, right id), ...]
    encode = bpe.encoder(bpe.SPLITS["gpt4"], ids)              # ids: {b"a": 0, ..., b"th": 256, ...}

Byte-pair encoding (Sennrich et al. 2016, section 3.2; on bytes: GPT-2, section 2.2) begins with the 256 bytes
and makes the most frequent pair of neighbours a new token, again and again. Text is first cut into pieces,
and no merge crosses a border between pieces. Equal pieces are worked on once.

Ties: of pairs with the same frequency the one with the smaller left id is merged, then the one with the
smaller right id. So neither the order of documents nor the number of processes matters, and the merges are
those of the trainer in the `tokenizers` library.
"""

import contextlib
import heapq
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

from config import ConfigError

# gpt2: contractions; words, numbers and other signs, each with one space before it, if there is one; blanks.
# gpt4: any sign may begin a word, a number has at most three digits, signs include the line ends after them.
SPLITS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# The same patterns for ASCII text and Python's `re`, which is more than twice as fast as `regex`.
ASCII_SPLITS = {
    SPLITS["gpt2"]: r"'(?:[sdmt]|ll|ve|re)| ?[a-zA-Z]+| ?[0-9]+| ?[^\t-\r a-zA-Z0-9]+"
    r"|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+",
    SPLITS["gpt4"]: r"'(?i:[sdmt]|ll|ve|re)|[^\r\na-zA-Z0-9]?[a-zA-Z]+"
    r"| +(?= [^\t-\r ])"  # also found by the last line, but slowly; indentation is frequent in code
    r"|[0-9]{1,3}| ?[^\t-\r a-zA-Z0-9]+[\r\n]*"
    r"|[\t-\r ]*[\r\n]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+",
}
# Both patterns always cut here: before a line end that follows a letter or digit. The two parts on their own
# give the same pieces as the whole text.
SAFE_CUT = re.compile(r"(?<=[a-zA-Z0-9])(?=\n)")
# They also cut before a space that follows an ASCII letter, digit or sign. So a text can be split into parts
# that end there: the longest that are ASCII, and between them the shortest that are not.
PART_END = r"(?:(?<=[!-~])(?= )|\Z)"
PARTS = re.compile(rf"[\x00-\x7f]+{PART_END}|.+?{PART_END}", re.DOTALL)
# SentencePiece's pieces: a word and the spaces before it, except for the first space or line end.
WORDS = r"[ \t\r\n]( *[^ \t\r\n]*)"

# The order of the bytes' ids, as in GPT-2: first those that print as themselves in Latin-1, then the rest.
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # 94 + 12 + 82 = 188
BYTES += [byte for byte in range(256) if byte not in BYTES]
BATCH = 4_000_000  # characters of text that a worker gets at once
WINDOW = 1 << 16  # characters; see long_blank


# ---- texts -> pieces --------------------------------------------------------------------------------------


def count_pieces(texts: Iterable[str], pattern: str, workers: int = 0) -> Counter:
    """Cuts texts into pieces and counts them, in `workers` processes (0: one a core).

    Memory holds each different piece once, and at most two batches of text a worker.
    """
    workers = workers or os.cpu_count() or 1
    counts, running = Counter(), deque()
    spawn = multiprocessing.get_context("spawn")  # a fork while other threads hold locks can hang
    pool = ProcessPoolExecutor(workers, spawn, end_with_parent)
    try:
        for batch in batches(texts, pattern):
            running.append(submit(pool, count_batch, batch, pattern))
            if len(running) == 2 * workers:
                counts.update(running.popleft().result())
        for future in running:
            counts.update(future.result())
    finally:
        pool.shutdown(cancel_futures=True)
    return counts


def batches(texts: Iterable[str], pattern: str) -> Iterator[list[str]]:
    """Lists of texts of about BATCH characters. A longer text is cut where that changes no piece."""
    batch, size = [], 0
    for text in texts:
        # Take parts of about a batch from the start of a long text.
        while len(text) > BATCH and (pattern in ASCII_SPLITS or pattern == WORDS):
            cut = SAFE_CUT.search(text, BATCH)
            if not cut:
                break
            yield [text[: cut.start()]]
            text = text[cut.start() :]
        # Collect texts until the batch is full.
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def count_batch(texts: list[str], pattern: str) -> Counter:
    """Pieces and their counts."""
    counts = Counter()
    for text in texts:
        for pieces in split(text, pattern):
            counts.update(pieces)
    return counts


def split(text: str, pattern: str) -> Iterator[list[str]]:
    """The pieces of each part of a text. Raises ConfigError where a pattern of the user's skips some."""
    if pattern == WORDS:
        yield re.findall(WORDS, "\n" + text)
    elif pattern in ASCII_SPLITS:
        # Most parts of a text are ASCII, and take the faster pattern.
        for part in [text] if text.isascii() else PARTS.findall(text):
            find = re.compile(ASCII_SPLITS[pattern]) if part.isascii() else regex.compile(pattern)
            yield find.findall(part)
    else:
        # A pattern of the user's: check that it matches every character.
        pieces = [match[0] for match in regex.finditer(pattern, text)]
        if sum(map(len, pieces)) != len(text):
            raise ConfigError(skips(pattern, text))
        yield pieces


def skips(pattern: str, text: str) -> str:
    """The message about a pattern that does not match every character."""
    return rf"the split pattern {pattern!r} skips a part of {text[:60]!r}; end it in '|.|\n' for the rest"


# ---- worker processes -------------------------------------------------------------------------------------


def submit(pool: ProcessPoolExecutor, function: Callable, *arguments) -> Future:
    """Hands work to a pool. The workers that start here ignore Ctrl-C: only the parent answers it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return pool.submit(function, *arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def end_with_parent() -> None:
    """Makes a worker process end when its parent ends, even by `kill -9`. It is a worker's first call."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# ---- pieces -> merges -------------------------------------------------------------------------------------


def learn_merges(counts: dict[str, int], n_merges: int, first: int = 0) -> list[tuple[int, int]]:
    """Pieces and their counts -> the first n_merges merges, or fewer when no two tokens are neighbours.

    The bytes have the ids first .. first + 255 in the order of BYTES, and merge i makes id first + 256 + i.
    A pair counts wherever two tokens are neighbours ("aaa" has "aa" twice); runs merge from left to right.
    learn_merges({"abab": 2, "b": 1}, 2) -> [(64, 65), (256, 256)]

    Data: all pieces lie one after the other in arrays, with a slot for each byte. A slot has its token, the
    slots of its neighbours and the count of its piece. A merge puts the new token into the left slot and
    empties the right one.

    Search: when a token is made, every pair with it appears at once; afterwards its count can only fall. So
    a pair's slots and count are noted once, in a heap. The pair on top is counted again at its slots, and
    merged if it is still the best. Most pairs are never merged: those with a count below `floor` are not
    noted. When no noted pair is left, all pairs that still exist are counted again with a lower floor.
    """
    # Ids and slots must fit together into one integer of 63 bits; see note().
    pieces = [piece.encode() for piece in counts]
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    n = int(lengths.sum())
    id_bits, slot_bits = (first + 256 + n_merges).bit_length(), (n + 1).bit_length()
    if 2 * id_bits + slot_bits > 63:
        raise ConfigError(f"{n_merges} merges of {n} bytes of different pieces are too many; use fewer")

    # Lay out the arrays of slots. The last slot, -1, has no token and is the neighbour of every piece's end.
    ids = np.zeros(256, np.int32)
    ids[BYTES] = np.arange(first, first + 256)
    token = np.append(ids[np.frombuffer(b"".join(pieces), np.uint8)], np.int32(-1))
    weight = np.append(np.repeat(np.fromiter(counts.values(), np.int64, len(pieces)), lengths), 0)
    after = np.arange(1, n + 2, dtype=np.int32)
    before = np.arange(-1, n, dtype=np.int32)
    ends = np.cumsum(lengths)
    after[ends - 1] = after[-1] = before[ends - lengths] = -1

    merges, heap, noted, floor = [], [], {}, 0

    def note(left: np.ndarray, right: np.ndarray, slots: np.ndarray, floor: int) -> int:
        """Notes every pair (left, right) that occurs `floor` times or more, with its left token's slots.

        With floor=0, the floor is a sixteenth of the highest count. Returns the floor.
        """
        # Pack pair and slot into one integer: numpy sorts integers five times faster than it finds an order.
        packed = np.sort((left.astype(np.int64) << id_bits | right) << slot_bits | slots)
        pairs, slots = packed >> slot_bits, (packed & (1 << slot_bits) - 1).astype(np.int32)
        starts = np.flatnonzero(np.concatenate(([True], pairs[1:] != pairs[:-1])))
        sums = np.add.reduceat(weight[slots], starts)

        floor = floor or max(1, int(sums.max()) // 16)
        often = np.flatnonzero(sums >= floor)
        ends = np.append(starts, len(slots))[often + 1]
        columns = pairs[starts[often]], sums[often], starts[often], ends
        for pair, count, start, end in zip(*(column.tolist() for column in columns)):
            noted[pair] = slots[start:end]
            heapq.heappush(heap, (-count, pair))
        return floor

    bar = tqdm(total=n_merges, unit=" merges", leave=False, disable=None)
    while len(merges) < n_merges:
        # Count all pairs, at the start and when no noted pair is left.
        if not heap:
            slots = np.flatnonzero((token >= 0) & (token[after] >= 0))
            if floor == 1 or not len(slots):
                break
            floor = note(token[slots], token[after[slots]], slots, 0)

        # Count the pair on top again. Where it is no longer the best, put it back.
        _, pair = heapq.heappop(heap)
        a, b = pair >> id_bits, pair & (1 << id_bits) - 1
        left = noted.pop(pair)
        left = left[(token[left] == a) & (token[after[left]] == b)]
        count = int(weight[left].sum())
        if count < floor:
            continue
        if heap and (-count, pair) > heap[0]:
            noted[pair] = left
            heapq.heappush(heap, (-count, pair))
            continue

        # Merge it. In a run ("aaaa") only every other slot begins a merge.
        if a == b:
            i = np.arange(len(left))
            follows = np.concatenate(([False], after[left[:-1]] == left[1:]))
            left = left[(i - np.maximum.accumulate(np.where(follows, 0, i))) % 2 == 0]
        new = first + 256 + len(merges)
        merges.append((a, b))
        bar.update()
        right = after[left]
        rest = after[right]
        token[left], token[right] = new, -1
        after[left], before[rest] = rest, left

        # Note the pairs that this made: (x, new) and (new, y). Where x is new as well, the pair is already
        # noted as the (new, y) of the slot before.
        prior = before[left]
        x, y = token[prior], token[rest]
        has_x, has_y = (x >= 0) & (x != new), y >= 0
        x, y = x[has_x], y[has_y]
        slots = np.concatenate((prior[has_x], left[has_y]))
        if len(slots):
            x_new, new_y = np.full(len(x), new, np.int32), np.full(len(y), new, np.int32)
            note(np.concatenate((x, new_y)), np.concatenate((x_new, y)), slots, floor)
    bar.close()
    return merges


# ---- text -> ids ------------------------------------------------------------------------------------------


def encoder(
    pattern: str, ids: dict[bytes, int], lacks: bytes = b"", name: str = "the tokenizer"
) -> Callable[[str], np.ndarray]:
    """The function text -> uint32 ids, run by tiktoken's engine.

    `ids` has the bytes and the merged tokens, in the order of merges. The function raises UnicodeEncodeError
    for a text that needs one of the bytes `lacks`, and ConfigError where the pattern skips a part of a text.
    """
    # tiktoken merges in the order of its ids. Where ours are not in that order, tiktoken gets ranks instead,
    # and `table` maps a rank to the id.
    made = [id for token, id in ids.items() if len(token) > 1]
    table = None if made == sorted(made) else np.array(list(ids.values()), np.uint32)
    mergeable = ids if table is None else {token: rank for rank, token in enumerate(ids)}
    # Without any special token, tiktoken's search for them stops at every character and takes a third longer.
    unused_id = max(mergeable.values()) + 1
    unused = {"<nobody looks for this>": unused_id}
    n_bytes = np.zeros(unused_id, np.int64)
    n_bytes[list(mergeable.values())] = [len(token) for token in mergeable]
    try:
        own, grouped = regex.compile(pattern), group_plain(pattern)
        engine = tiktoken.Encoding(name, pat_str=grouped, mergeable_ranks=mergeable, special_tokens=unused)
        core = engine._core_bpe  # its methods for lists take longer than those of the core
    except (ValueError, regex.error) as error:
        raise ConfigError(f"{name}: the split pattern {pattern!r} cannot be used: {error}") from None

    def encode_slowly(text: str) -> np.ndarray:
        """The same tokens, cut by `regex`: tiktoken's engine panics at a run of a million blanks."""
        pieces = [core.encode_single_piece(match[0].encode()) for match in own.finditer(text)]
        return np.array([token for piece in pieces for token in piece], np.uint32)

    def encode(text: str) -> np.ndarray:
        if lacks and len(text.encode().translate(None, lacks)) < len(text.encode()):
            i, byte = next((i, byte) for i, c in enumerate(text) for byte in c.encode() if byte in lacks)
            reason = f"the byte 0x{byte:02X}, which the vocabulary of {name} lacks"
            raise UnicodeEncodeError("vocabulary", text, i, i + 1, reason)
        try:
            if long_blank(text):
                tokens = encode_slowly(text)
            else:
                tokens = np.frombuffer(core.encode_to_tiktoken_buffer(text, frozenset()), np.uint32)
        except BaseException as error:  # a panic of the engine is no Exception
            if type(error).__name__ != "PanicException":
                raise
            tokens = encode_slowly(text)

        # Our own patterns match every character; a user's pattern may skip some.
        if pattern not in ASCII_SPLITS and n_bytes[tokens].sum() != len(text.encode()):
            raise ConfigError(skips(pattern, text))
        return tokens if table is None else table[tokens]

    return encode


def group_plain(pattern: str) -> str:
    r"""The same pattern, its alternatives before a look-ahead in a group: a|b|\s+(?!\S) -> (?:a|b)|\s+(?!\S)

    tiktoken's engine tries alternatives one at a time where the pattern has a look-ahead. It matches a group
    without one in a single pass, so a text takes a fifth (gpt2) to a quarter (gpt4) less time.
    """
    plain, bar, rest = pattern.partition(r"|\s+(?!")
    with contextlib.suppress(regex.error):
        regex.compile(plain)  # else the bar is inside parentheses or brackets
        return f"(?:{plain}){bar}{rest}" if bar else pattern
    return pattern


def long_blank(text: str) -> bool:
    """Whether the text may have a run of 2 x WINDOW blanks or more; tiktoken handles one of 300,000."""
    return any(text[i : i + WINDOW].isspace() for i in range(0, len(text) - WINDOW, WINDOW))
