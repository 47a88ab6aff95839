"""Near-duplicates against Jaccard indices counted exactly."""

import random

import numpy as np
import pytest

from longnet.data.duplicates import HASHES, Duplicates, digest, signature

WORDS = [f"w{n:04}" for n in range(5000)]


def text(seed, words=600):
    return " ".join(random.Random(seed).choices(WORDS, k=words)).encode()


def jaccard(a, b):
    """Count shared shingles of 24 bytes with Python's own sets."""
    one, other = ({c[i : i + 24] for i in range(len(c) - 23)} for c in (b" ".join(a.split()), b" ".join(b.split())))
    return len(one & other) / len(one | other)


def edited(content, share, seed=0):
    words, draw = content.split(), random.Random(seed)
    for place in draw.sample(range(len(words)), int(share * len(words))):
        words[place] = b"zzzzz"
    return b" ".join(words)


@pytest.mark.parametrize("share", [0, 0.01, 0.03, 0.1, 0.5])
def test_a_signature_estimates_the_jaccard_index(share):
    errors = []
    for seed in range(20):
        one, other = text(seed), edited(text(seed), share, seed)
        errors.append(np.mean(signature(one) == signature(other)) - jaccard(one, other))
    assert abs(np.mean(errors)) < 0.03
    assert np.std(errors) < 0.11  # 1/√120 of the minima, 1/√450 of the sampled shingles


def test_white_space_does_not_matter_and_length_does_not_change_shingles():
    content = text(0, words=200_000)  # longer than the parts that are hashed at a time
    assert (signature(content) == signature(b"\n\t" + content.replace(b" ", b"\n   "))).all()
    assert jaccard(text(1), text(1) + b" " + text(2, 30)) > 0.9
    assert np.mean(signature(text(1)) == signature(text(1) + b" " + text(2, 30))) > 0.85


def test_short_texts_are_compared_exactly_only(tmp_path):
    assert not signature(b"short").any()
    assert not signature(b"").any()
    with Duplicates(tmp_path) as seen:
        assert [seen.add(digest(t), signature(t)) for t in (b"a", b"b", b"a", b"a ")] == [False, False, True, False]


def test_near_duplicates_are_found_and_others_kept(tmp_path):
    with Duplicates(tmp_path) as seen:
        for seed in range(100):
            assert not seen.add(digest(text(seed)), signature(text(seed)))
        for seed in range(100):
            near, far = edited(text(seed), 0.01, seed), edited(text(seed), 0.15, seed)
            assert jaccard(text(seed), near) > 0.85
            assert jaccard(text(seed), far) < 0.6
            assert seen.add(digest(near), signature(near))
            assert not seen.add(digest(far), signature(far))


def test_another_process_goes_on(tmp_path):
    with Duplicates(tmp_path) as seen:
        for seed in range(5):
            seen.add(digest(text(seed)), signature(text(seed)))
        count = seen.sync()
        seen.add(digest(text(5)), signature(text(5)))
    assert count == 5
    with Duplicates(tmp_path, count) as seen:
        near = edited(text(4), 0.01)
        assert seen.add(digest(near), signature(near))
        assert seen.add(digest(text(0)), np.zeros(HASHES, dtype=np.uint32))
        assert not seen.add(digest(text(5)), signature(text(5)))
