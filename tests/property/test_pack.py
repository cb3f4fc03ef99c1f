"""Properties of packing."""

from itertools import accumulate

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nightshift.data.encode import Encoded
from tasks.pack import OverLength, build_rows, fit, join, pack

EXAMPLES = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 40)).map(lambda pair: (pair[0], min(pair))),
    min_size=1,
    max_size=30,
)


@settings(max_examples=30, deadline=None)
@given(EXAMPLES, st.sampled_from(["drop", "truncate", "split"]))
def test_packing_conserves_tokens_and_never_overfills(
    examples: list[tuple[int, int]], policy: OverLength
) -> None:
    """Each example is (length, index of the first labelled token); tokens are unique in the corpus."""
    encoded = []
    for number, (length, first_label) in enumerate(examples):
        ids = (np.arange(length) + 1000 * number).astype(np.int32)
        encoded.append(Encoded(ids, np.where(np.arange(length) >= first_label, ids, np.int32(-100))))
    names = [str(number) for number in range(len(examples))]
    corpus = join(encoded, names, [f"s/000001.jsonl:{name}" for name in names])
    spans, dropped, lost = fit(corpus, 16, policy)
    assert sum(length for length, _ in examples) == sum(s.stop - s.start for s in spans) + lost.total()
    assert len(examples) == len({span.example for span in spans}) + len(dropped)
    if not spans:
        return
    rows = build_rows(corpus, spans, pack([s.stop - s.start for s in spans], 16)).to_pylist()
    placed = []
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 16
        begins = [0, *accumulate(row["seq_lengths"])]
        for i, (name, start) in enumerate(zip(row["example_ids"], row["starts"], strict=True)):
            labels = row["labels"][begins[i] : begins[i + 1]]
            ids = row["input_ids"][begins[i] : begins[i + 1]]
            placed += ids
            assert ids == encoded[int(name)].input_ids[start : start + len(ids)].tolist()
            assert labels[0] == -100
            assert any(label != -100 for label in labels)
            assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
    assert len(placed) == len(set(placed)) == sum(s.stop - s.start for s in spans)
    # Best fit: any two rows together exceed one row's capacity.
    sizes = sorted(len(row["input_ids"]) for row in rows)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 16
