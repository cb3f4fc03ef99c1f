"""Compare deduplication with peer libraries: documents per second, memory, recall, precision.

Each engine gets the same raw texts in a separate process and has to return the documents to remove:
canonical form, shingles, signatures, candidates, exact verification, keep-first. The peers run as their
documentation shows for bulk work, with the same 128 permutations in 16 bands of 8; the steps that they
lack (shingles, verification, keep-first) use our code. `python -m benchmarks.dedupe <engine> <corpus>`
prints one measurement.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.corpus import real_documents, true_pairs, with_edits
from benchmarks.record import Record, record
from nightshift.core.files import read_json, write_json
from nightshift.core.memo import Memo
from nightshift.core.stage import run_main
from nightshift.data.text import Shingles, canonical, comparable_shingles, jaccard
from tasks.dedupe import DedupeParams
from tasks.dedupe.__main__ import find_duplicates
from tasks.dedupe.candidates import Text, shared_buckets
from tasks.dedupe.signatures import sign_texts

PARAMS = DedupeParams(
    num_perm=128, bands=16, rows_per_band=8, shingle_size=3, jaccard_threshold=0.8, seed=1, max_drop_rate=1.0
)
DOCUMENTS, EDITED = 40_000, 10_000
REPEATS = 3


def measure(folder: Path) -> list[Record]:
    """Build the corpus, run all engines in turn, three times, and compare them."""
    corpus = folder / "corpus.json"
    write_json(corpus, with_edits(real_documents(DOCUMENTS), EDITED, seed=0))
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    for _ in range(REPEATS):
        for engine, found in runs.items():
            found.append(run(engine, corpus))
    speed = {
        engine: median((DOCUMENTS + EDITED) / one["seconds"] for one in found)
        for engine, found in runs.items()
    }
    unverified = {
        engine: median((DOCUMENTS + EDITED) / one["seconds_to_candidates"] for one in found)
        for engine, found in runs.items()
        if "seconds_to_candidates" in found[0]
    }
    peers = {engine: value for engine, value in speed.items() if engine != "nightshift"}
    fastest = max(peers, key=lambda engine: peers[engine])
    memory = max(one["extra_mib"] for one in runs["nightshift"])
    recall, precision, pairs = quality(read_json(corpus))
    shown: dict[str, Any] = {
        "documents": DOCUMENTS + EDITED,
        "documents_per_second": speed,
        "repeats": REPEATS,
    }
    return [
        record("dedupe: recall of pairs at J >= 0.8", recall, "share", at_least=0.99, true_pairs=pairs),
        record("dedupe: precision after verification", precision, "share", at_least=1.0),
        record(
            "dedupe: end to end, documents per second as a multiple of the fastest peer",
            speed["nightshift"] / peers[fastest],
            "ratio",
            at_least=1.3,
            peer=fastest,
            **shown,
            peers_without_verification=unverified,
        ),
        record(
            "dedupe: extra memory",
            memory,
            "MiB",
            at_most=1024,
            peers={engine: max(one["extra_mib"] for one in found) for engine, found in runs.items()},
        ),
    ]


def run(engine: str, corpus: Path) -> dict[str, Any]:
    """Measure one engine in a separate process."""
    command = [sys.executable, "-m", "benchmarks.dedupe", engine, str(corpus)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def quality(documents: Sequence[str]) -> tuple[float, float, int]:
    """Compare the verified candidate pairs with all true pairs.

    Returns:
        Recall, precision, number of true pairs.
    """
    texts = list(dict.fromkeys(canonical(text) for text in documents))
    sets = [comparable_shingles(text, PARAMS.shingle_size) for text in texts]
    truth = true_pairs(sets, PARAMS.jaccard_threshold)
    members: dict[int, list[int]] = {}
    for index, buckets in shared_buckets(sign_texts(texts, PARAMS)):
        for bucket in buckets:
            members.setdefault(bucket, []).append(index)
    candidates = {(a, b) for one in members.values() for i, b in enumerate(one) for a in one[:i]}
    accepted = {(a, b) for a, b in candidates if jaccard(sets[a], sets[b]) >= PARAMS.jaccard_threshold}
    return len(accepted & truth) / len(truth), len(accepted & truth) / len(accepted), len(truth)


def nightshift(documents: Sequence[str]) -> dict[str, float]:
    """Run the code of the stage, with an empty cache."""
    start = time.perf_counter()
    texts = [Text("", canonical(text)) for text in documents]
    with tempfile.TemporaryDirectory() as folder, Memo("signatures", {}, Path(folder)) as memo:
        removed = find_duplicates(texts, PARAMS, memo)
    return {"seconds": time.perf_counter() - start, "removed": len(removed)}


def rensa(documents: Sequence[str]) -> dict[str, float]:
    """Run RMinHash and RMinHashLSH in bulk."""
    from rensa import RMinHash, RMinHashLSH

    start = time.perf_counter()
    sets = [comparable_shingles(canonical(text), PARAMS.shingle_size) for text in documents]
    hashes = RMinHash.from_token_sets([list(one) for one in sets], 128, 42)
    index = RMinHashLSH(0.8, 128, 16)
    index.insert_many(hashes)
    candidates = index.query_all(hashes)
    found = time.perf_counter() - start
    removed = keep_first(sets, candidates)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "seconds_to_candidates": found, "removed": removed}


def datasketch(documents: Sequence[str]) -> dict[str, float]:
    """Run MinHash.generator and MinHashLSH."""
    from datasketch import MinHash, MinHashLSH

    start = time.perf_counter()
    sets = [comparable_shingles(canonical(text), PARAMS.shingle_size) for text in documents]
    index = MinHashLSH(num_perm=128, params=(16, 8))
    hashes = list(MinHash.generator([[s.encode() for s in one] for one in sets], num_perm=128))
    with index.insertion_session() as session:
        for number, one in enumerate(hashes):
            session.insert(number, one, check_duplication=False)
    candidates = [index.query(one) for one in hashes]
    found = time.perf_counter() - start
    removed = keep_first(sets, candidates)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "seconds_to_candidates": found, "removed": removed}


def datatrove(documents: Sequence[str]) -> dict[str, float]:
    """Run MinhashDedupSignature and MinhashDedupBuckets in one process.

    SHA-1 replaces xxHash, whose version 4 does not accept datatrove's text.
    """
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.logging import logger
    from datatrove.utils.word_tokenizers import WhitespaceTokenizer

    logger.disable("datatrove")
    start = time.perf_counter()
    sets = [comparable_shingles(canonical(text), PARAMS.shingle_size) for text in documents]
    config = MinhashConfig(num_buckets=16, hashes_per_bucket=8, hash_config=HashConfig(hash_fc="sha1"))
    candidates: list[list[int]] = [[] for _ in documents]
    with tempfile.TemporaryDirectory() as folder:
        signatures, pairs = f"{folder}/signatures", f"{folder}/pairs"
        signer = MinhashDedupSignature(signatures, config, WhitespaceTokenizer())
        # Pass our shingles instead of the text, to be hashed one by one.
        signer.get_shingles = lambda one: np.fromiter(
            map(signer._hash_func, one), dtype=np.uint64, count=len(one)
        ).reshape((-1, 1))
        signer.run(Document(text=one, id=str(number)) for number, one in enumerate(sets))
        for bucket in range(16):
            MinhashDedupBuckets(signatures, pairs, config=config).run(None, bucket, 16)
        for file in Path(pairs).glob("*.dups"):
            for _, first, _, second in np.frombuffer(file.read_bytes(), dtype="<u4").reshape(-1, 4).tolist():
                candidates[max(first, second)].append(min(first, second))
    found = time.perf_counter() - start
    removed = keep_first(sets, candidates)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "seconds_to_candidates": found, "removed": removed}


def keep_first(sets: Sequence[Shingles], candidates: Iterable[Sequence[int]]) -> int:
    """Verify a peer's candidates against the kept documents, and return the number of removed ones."""
    removed: set[int] = set()
    for i, others in enumerate(candidates):
        if any(
            jaccard(sets[i], sets[other]) >= PARAMS.jaccard_threshold
            for other in sorted(others)
            if other < i and other not in removed
        ):
            removed.add(i)
    return len(removed)


ENGINES: dict[str, Callable[[Sequence[str]], dict[str, float]]] = {
    "nightshift": nightshift,
    "rensa": rensa,
    "datasketch": datasketch,
    "datatrove": datatrove,
}


def main(engine: str, corpus: Path) -> None:
    """Run one engine on a corpus, and print seconds and memory."""
    documents = read_json(corpus)
    ENGINES[engine](documents[:100])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = ENGINES[engine](documents)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.stdout.write(json.dumps({**result, "extra_mib": (after - before) / 1024}) + "\n")


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("engine", choices=ENGINES, help="deduplication engine")
    parser.add_argument("corpus", type=Path, help="JSON file with a list of texts")


if __name__ == "__main__":
    run_main(main, declare)
