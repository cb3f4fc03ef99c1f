"""Properties of packing."""

from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nightshift.data.encode import Encoded
from tasks.pack import OverLength, PackParams
from tasks.pack.__main__ import Tally, add, build_batches
from tasks.pack.packer import pack
from tasks.pack.spans import SpanFile

# Tokens, index of the first labelled token, and tokens of a round (0 for a plain text).
EXAMPLES = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 40), st.integers(0, 20)), min_size=1, max_size=30
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(EXAMPLES, st.sampled_from(["drop", "truncate", "split"]))
def test_packing_conserves_tokens_and_never_overfills(
    tmp_path: Path, examples: list[tuple[int, int, int]], policy: OverLength
) -> None:
    """Tokens are unique in the corpus."""
    encoded = []
    for number, (length, first_label, size) in enumerate(examples):
        ids = (np.arange(length) + 1000 * number).astype(np.int32)
        labels = np.where(np.arange(length) >= first_label, ids, np.int32(-100))
        encoded.append(Encoded(ids, labels, np.arange(0, length if size else 0, size or 1, dtype=np.int32)))
    params = PackParams(
        packing=True,
        max_length=16,
        over_length=policy,
        max_lost_token_share=1.0,
        max_drop_rate=1.0,
        replay_share=None,
        seed=0,
    )
    tally = Tally()
    with SpanFile.create(tmp_path) as spans:
        for number, one in enumerate(encoded):
            add(number, {"origin": f"s/000001.jsonl:{number}"}, [one], spans, params, tally)
        kept = list(zip(spans.examples, spans.starts, spans.lengths, strict=True))
        assert sum(one[0] for one in examples) == sum(spans.lengths) + tally.lost.total()
        assert len(examples) == len(set(spans.examples)) + tally.drops.by_reason().total()
        if not kept:
            return
        names = [str(number) for number in range(len(examples))]
        table = pa.table({"id": names, "origin": names})
        batches = build_batches(spans, pack(spans.lengths, 16), table)
        rows = [row for batch in batches for row in batch.to_pylist()]
    placed, supervised = [], 0
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 16
        begins = [0, *accumulate(row["seq_lengths"])]
        for i, (name, start) in enumerate(zip(row["example_ids"], row["starts"], strict=True)):
            labels = row["labels"][begins[i] : begins[i + 1]]
            ids = row["input_ids"][begins[i] : begins[i + 1]]
            placed.append((int(name), start, len(ids)))
            source = encoded[int(name)]
            assert ids == source.input_ids[start : start + len(ids)].tolist()
            assert labels == [-100, *source.labels[start + 1 : start + len(ids)].tolist()]
            supervised += sum(label != -100 for label in labels)
            assert any(label != -100 for label in labels)
            if policy == "split" and len(source.rounds):
                assert {start, start + len(ids)} <= {*source.rounds.tolist(), len(source.input_ids)}
    assert sorted(placed) == sorted(kept)
    assert supervised == tally.supervised
    # Best fit: any two rows together exceed one row's capacity.
    sizes = sorted(len(row["input_ids"]) for row in rows)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 16
