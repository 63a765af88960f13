"""The byte-pair encoding trainer: texts -> pieces and their counts -> merges.

    counts = bpe.count_pieces(texts, bpe.SPLITS["gpt4"])       # {"the": 1203, " quick": 8, ...}
    merges = bpe.learn_merges(counts, n_merges=32000 - 256)    # [(left id, right id), ...]

Byte-pair encoding (Sennrich et al. 2016, section 3.2; on bytes: GPT-2, section 2.2) begins with the 256 bytes
and makes the most frequent pair of neighbours one new token, as often as is asked. Text is first cut into
pieces that no merge crosses; a piece that occurs a thousand times is worked on once. Of pairs that are
equally frequent the one with the smaller ids is merged, the left id deciding first; so neither the order of
documents nor the number of processes matters, and the merges are those of the `tokenizers` library's trainer.
"""

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
from tqdm import tqdm

from config import ConfigError

# gpt2: contractions, words, numbers and other signs, each with a space before it, if any; then blanks.
# gpt4: any sign may lead a word, a number has three digits at most, line ends belong to what is before them.
SPLITS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# What the same comes to in ASCII text, for Python's `re`, which is more than twice as fast as `regex`.
ASCII_SPLITS = {
    SPLITS["gpt2"]: r"'(?:[sdmt]|ll|ve|re)| ?[a-zA-Z]+| ?[0-9]+| ?[^\t-\r a-zA-Z0-9]+"
    r"|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+",
    SPLITS["gpt4"]: r"'(?i:[sdmt]|ll|ve|re)|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]{1,3}"
    r"| ?[^\t-\r a-zA-Z0-9]+[\r\n]*|[\t-\r ]*[\r\n]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+",
}
# Before a line end that follows a letter or digit both always cut, and the two parts are cut as the whole is.
SAFE_CUT = re.compile(r"(?<=[a-zA-Z0-9])(?=\n)")
# What SentencePiece merges within: spaces and a word. The space or line end before them is not part of it.
WORDS = r"[ \t\r\n]( *[^ \t\r\n]*)"

# The order of the bytes' ids: those that print as themselves in Latin-1, then the rest, as in GPT-2.
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # 94 + 12 + 82 = 188
BYTES += [byte for byte in range(256) if byte not in BYTES]
BATCH = 4_000_000  # characters of text that a worker is given at once


# ---- texts -> pieces --------------------------------------------------------------------------------------


def count_pieces(texts: Iterable[str], pattern: str, workers: int = 0) -> Counter:
    """Cuts texts into pieces and counts these, in `workers` processes (0: one a core).

    Keeps the pieces that are different, and of the texts no more than two batches a worker.
    """
    workers, counts, running = workers or os.cpu_count() or 1, Counter(), deque()
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
    """Lists of about BATCH characters. A longer text is cut where that changes no piece."""
    batch, size = [], 0
    for text in texts:
        while len(text) > BATCH and (pattern in ASCII_SPLITS or pattern == WORDS):
            cut = SAFE_CUT.search(text, BATCH)
            if not cut:
                break
            yield [text[: cut.start()]]
            text = text[cut.start() :]
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def count_batch(texts: list[str], pattern: str) -> Counter:
    counts = Counter()
    for text in texts:
        if pattern == WORDS:
            counts.update(re.findall(WORDS, "\n" + text))
        elif pattern in ASCII_SPLITS:
            for part in [text] if text.isascii() else SAFE_CUT.split(text):
                ascii_only = part.isascii()
                find = re.compile(ASCII_SPLITS[pattern]) if ascii_only else regex.compile(pattern)
                counts.update(find.findall(part))
        else:
            pieces = [match[0] for match in regex.finditer(pattern, text)]
            if sum(map(len, pieces)) != len(text):
                raise ConfigError(skips(pattern, text))
            counts.update(pieces)
    return counts


def skips(pattern: str, text: str) -> str:
    return rf"the split pattern {pattern!r} skips a part of {text[:60]!r}; end it in '|.|\n' for the rest"


# ---- worker processes -------------------------------------------------------------------------------------


def submit(pool: ProcessPoolExecutor, function: Callable, *arguments) -> Future:
    """Hands work to a pool. Its workers start here, and inherit that Ctrl-C waits: the parent answers it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return pool.submit(function, *arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def end_with_parent() -> None:
    """Runs first in a worker: it ends when its parent does, even by `kill -9`."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# ---- pieces -> merges -------------------------------------------------------------------------------------


def learn_merges(counts: dict[str, int], n_merges: int, first: int = 0) -> list[tuple[int, int]]:
    """Pieces and their counts -> the first n_merges merges, or fewer when no two tokens are neighbours.

    The bytes have the ids first .. first + 255 in the order of BYTES, and merge i makes first + 256 + i. A
    pair counts wherever two tokens are neighbours ("aaa" has "aa" twice); a run is merged from left to right.
    learn_merges({"abab": 2, "b": 1}, 2) -> [(64, 65), (256, 256)]

    The pieces lie one after the other, a place for each byte. A place has its token, the places of its
    neighbours and the count of its piece; a merge puts the new token in the left place and empties the right
    one. When a token is made, every pair with it arises there and then; later its count can only fall. So it
    is enough to note a pair's places and count once, in a heap: the pair on top is counted again at its
    places, and merged if it is still the best. Most pairs never are: those below `floor` are not noted, and
    when no noted one is left, all pairs that are still there are counted again with a lower floor.
    """
    pieces = [piece.encode() for piece in counts]
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    n = int(lengths.sum())
    id_bits, place_bits = (first + 256 + n_merges).bit_length(), (n + 1).bit_length()
    if 2 * id_bits + place_bits > 63:
        raise ConfigError(f"{n_merges} merges of {n} bytes of different pieces are too many; use fewer")
    ids = np.zeros(256, np.int32)
    ids[BYTES] = np.arange(first, first + 256)
    # the last place, -1, has no token and is the neighbour of every end
    token = np.append(ids[np.frombuffer(b"".join(pieces), np.uint8)], np.int32(-1))
    weight = np.append(np.repeat(np.fromiter(counts.values(), np.int64, len(pieces)), lengths), 0)
    after, before = np.arange(1, n + 2, dtype=np.int32), np.arange(-1, n, dtype=np.int32)
    ends = np.cumsum(lengths)
    after[ends - 1] = after[-1] = before[ends - lengths] = -1
    merges, heap, noted, floor = [], [], {}, 0

    def note(left: np.ndarray, right: np.ndarray, places: np.ndarray, floor: int) -> int:
        """Notes every pair (left, right) that occurs `floor` times or more, with its left token's places."""
        # pair and place in one number: numpy sorts numbers five times as fast as it finds the order of them
        packed = np.sort((left.astype(np.int64) << id_bits | right) << place_bits | places)
        pairs, places = packed >> place_bits, (packed & (1 << place_bits) - 1).astype(np.int32)
        starts = np.flatnonzero(np.concatenate(([True], pairs[1:] != pairs[:-1])))
        sums = np.add.reduceat(weight[places], starts)
        floor = floor or max(1, int(sums.max()) // 16)
        often = np.flatnonzero(sums >= floor)
        ends = np.append(starts, len(places))[often + 1]
        columns = pairs[starts[often]], sums[often], starts[often], ends
        for pair, count, start, end in zip(*(column.tolist() for column in columns)):
            noted[pair] = places[start:end]
            heapq.heappush(heap, (-count, pair))
        return floor

    bar = tqdm(total=n_merges, unit=" merges", leave=False, disable=None)
    while len(merges) < n_merges:
        if not heap:
            places = np.flatnonzero((token >= 0) & (token[after] >= 0))
            if floor == 1 or not len(places):
                break
            floor = note(token[places], token[after[places]], places, 0)
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
        if a == b:  # every other place of a run
            i = np.arange(len(left))
            follows = np.concatenate(([False], after[left[:-1]] == left[1:]))
            left = left[(i - np.maximum.accumulate(np.where(follows, 0, i))) % 2 == 0]
        new = first + 256 + len(merges)
        merges.append((a, b))
        bar.update()
        right = after[left]
        rest = after[right]
        token[left], token[right], after[left], before[rest] = new, -1, rest, left
        prior = before[left]
        x, y = token[prior], token[rest]
        # (x, new) unless x is new as well: then the pair is (new, y) of the place before
        has_x, has_y = (x >= 0) & (x != new), y >= 0
        x, y, places = x[has_x], y[has_y], np.concatenate((prior[has_x], left[has_y]))
        if len(places):
            x_new, new_y = np.full(len(x), new, np.int32), np.full(len(y), new, np.int32)
            note(np.concatenate((x, new_y)), np.concatenate((x_new, y)), places, floor)
    bar.close()
    return merges
