"""Properties of labels: they are those of the tokens inside the answers, with any kind of tokenizer."""

import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from nightshift.data.encode import Encoded, Encoder, Fault, Rendered, label_all, tokenize
from nightshift.data.tokenizer import load_fast
from nightshift.data.tokens import _from_bytes, _to_bytes

SAMPLE = [
    "Hello world, this is a test.\n\n  x = 1",
    "Ünïcode naïve café 数 🙂 don't",
    "İstanbul ﬁne ½ \u200d",
] * 9
METASPACE = pre_tokenizers.Metaspace()


def train(model: Any, trainer: Any, before: Any, normalizer: Any = None, after: Any = None) -> Tokenizer:
    """Train a tokenizer with few merges, so that words have several tokens."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = before
    if normalizer:
        tokenizer.normalizer = normalizer
    if after:
        tokenizer.post_processor = after
    tokenizer.train_from_iterator(SAMPLE, trainer)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<e>", special=True)])
    return tokenizer


BYTES = pre_tokenizers.ByteLevel.alphabet()
# The words of GPT-4, which Llama 3 and Qwen split likewise; Llama 3 takes three digits at once, Qwen one.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_like_llama(pattern: str) -> Any:
    """Return the pre-tokenizer of Llama 3 and Qwen: words by a pattern, then bytes."""
    words = pre_tokenizers.Split(Regex(pattern), "isolated", invert=False)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


TOKENIZERS = {
    "byte_level": train(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=BYTES, show_progress=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ),
    "byte_level_trimmed": train(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=BYTES, show_progress=False),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        after=processors.ByteLevel(trim_offsets=True),
    ),
    "like_llama_3": train(
        models.BPE(ignore_merges=True),
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=BYTES, show_progress=False),
        split_like_llama(WORDS),
        after=processors.Sequence([processors.ByteLevel(trim_offsets=True)]),
    ),
    "like_qwen": train(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=BYTES, show_progress=False),
        split_like_llama(WORDS.replace("{1,3}", "")),
        normalizers.NFC(),
        processors.ByteLevel(trim_offsets=False),
    ),
    "digits": train(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=BYTES, show_progress=False),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    ),
    "metaspace": train(
        models.BPE(byte_fallback=True, unk_token="<unk>"),
        trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>"], show_progress=False),
        METASPACE,
    ),
    "unigram_nfkc": train(
        models.Unigram(),
        trainers.UnigramTrainer(unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
        METASPACE,
        normalizers.NFKC(),
    ),
    "wordpiece_bert": train(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False),
        pre_tokenizers.BertPreTokenizer(),
        normalizers.BertNormalizer(),
    ),
    "prepend": train(
        models.BPE(unk_token="<unk>"),
        trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>"], show_progress=False),
        pre_tokenizers.Split(" ", "merged_with_next"),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.NFD()]),
    ),
}
# Those that fastokens tokenizes. The others change the text, or have no vocabulary of bytes.
FAST = ("byte_level", "like_llama_3", "like_qwen", "digits")
PIECES = (
    *("Hello", " world", "\n\n", "  ", "x=1", "<s>", "<e>", "'LL", "\r\n\t", "1234567", "\u3000"),
    *("naïve", "🙂", "👩\u200d👩\u200d👧", "数", "½", "ﬁ", "İ", "\u0301"),
)
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), min_size=1, max_size=12).map("".join)


def describe(sequences: list[Encoded] | Fault) -> Any:
    """Return the values of the sequences, which numpy would compare one by one."""
    if isinstance(sequences, Fault):
        return sequences
    return [(one.input_ids.tolist(), one.labels.tolist(), one.rounds.tolist()) for one in sequences]


def test_fastokens_tokenizes_byte_level_bpe() -> None:
    assert [name for name, tokenizer in TOKENIZERS.items() if load_fast(tokenizer)] == [*FAST]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=150)
# The prefix space of the first word comes before its character's bytes, but its offset is after them.
@example(text="<s>ﬁ数Hello", edges=[4, 5])
# More tokens of white space follow the answer than may be out of order.
@example(text="\n\n00\x80\n\n\n\n\r\n\t", edges=[0, 5])
@given(text=TEXT, edges=st.lists(st.integers(0, 60), min_size=2, max_size=6))
def test_labels_are_on_the_tokens_inside_the_answers(name: str, text: str, edges: list[int]) -> None:
    edges = sorted({min(edge, len(text)) for edge in edges})
    answers = list(zip(edges[::2], edges[1::2], strict=False))
    encoder = Encoder(TOKENIZERS[name], None, 0, None, "")
    rendered: list[list[Rendered] | Fault] = [[Rendered(text, answers, [0, *edges])]]
    tokens = encoder.tokenizer.encode(text, add_special_tokens=False)
    (sequences,) = label_all(rendered, tokenize(rendered, encoder), encoder)
    if fast := load_fast(encoder.tokenizer):
        (placed,) = fast.find_tokens([text])
        if placed is None:
            assert unicodedata.normalize("NFC", text) != text
        else:
            assert placed.equals(tokens, text)
            (again,) = label_all(rendered, [placed], encoder)
            assert describe(again) == describe(sequences)
    # A token may contain the white space after an answer.
    spaces = [len(text) - len(text[stop:].lstrip()) for _, stop in answers]
    spans = [(*answer, edge) for answer, edge in zip(answers, spaces, strict=True)]
    inside = [any(a <= start < b and end <= edge for a, b, edge in spans) for start, end in tokens.offsets]
    if not any(inside):
        assert sequences == Fault("no_supervised_token")
        return
    assert isinstance(sequences, list)
    (found,) = sequences
    assert found.input_ids.tolist() == tokens.ids
    assert found.labels.tolist() == [
        token if labelled else -100 for token, labelled in zip(tokens.ids, inside, strict=True)
    ]
    starts = [-1, *(start for start, _ in tokens.offsets), len(text) + 1]
    for token, edge in zip(found.rounds.tolist(), [0, *edges], strict=True):
        assert starts[token] < edge <= starts[token + 1] or token == edge == 0


@given(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=40),
    st.lists(st.integers(0, 40), max_size=5),
)
def test_cached_bytes_give_the_same_tokens(tokens: list[tuple[int, bool]], rounds: list[int]) -> None:
    ids = np.array([token for token, _ in tokens], dtype=np.int32)
    labels = np.array([token if labelled else -100 for token, labelled in tokens], dtype=np.int32)
    one = Encoded(ids, labels, np.array(rounds, dtype=np.int32))
    first, found = _from_bytes(_to_bytes([one, one]))
    assert first.input_ids.tolist() == ids.tolist()
    assert (found.input_ids.tolist(), found.labels.tolist()) == (ids.tolist(), labels.tolist())
    assert found.rounds.tolist() == rounds
    assert {found.input_ids.dtype, found.labels.dtype, found.rounds.dtype} == {np.dtype(np.int32)}
